"""Symmetrisation methods: one file per method, each a `FrameMethod`; named here without being imported."""

from typing import Final

#: Where each method is found.
METHODS: Final = {
    "ECSE": "symmetrize.methods.ecse",
    "GroupAveraging": "symmetrize.methods.group_averaging",
    "Identity": "symmetrize.methods.identity",
}
