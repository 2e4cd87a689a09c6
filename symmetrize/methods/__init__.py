"""Symmetrisation methods: one file per method, each a `FrameMethod`; named here without being imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from symmetrize.frames import FrameMethod

#: Where each method is found.
METHODS: Final = {
    "Anchored": "symmetrize.methods.anchored",
    "ECSE": "symmetrize.methods.ecse",
    "GroupAveraging": "symmetrize.methods.group_averaging",
    "Identity": "symmetrize.methods.identity",
    "SampledFrames": "symmetrize.methods.sampled",
}


def find_method(name: str) -> type[FrameMethod]:
    """The class of a method in `METHODS`, which is imported now."""
    found: type[FrameMethod] = getattr(importlib.import_module(METHODS[name]), name)
    return found
