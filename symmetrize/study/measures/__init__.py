"""What a study measures of a cell: one function per property, `PreparedCell` -> dict, each a composition of
`symmetrize.testing`. What a measure says of something that a backbone does not have is ``{"skipped": reason}``."""

from __future__ import annotations

from typing import Final

from symmetrize.study.measures import accuracy, cost, dynamics, locality, smooth, symmetry
from symmetrize.study.measures.common import Measure
from symmetrize.study.measures.sizes import SIZES

#: All measures by name, in the order in which they are taken.
MEASURES: Final[dict[str, Measure]] = {
    "accuracy": accuracy.accuracy,
    "equivariance": symmetry.equivariance,
    "variance": symmetry.variance,
    "smoothness": smooth.smoothness,
    "permutation": symmetry.permutation,
    "symmetric": symmetry.symmetric,
    "determinism": symmetry.determinism,
    "dynamics": dynamics.dynamics,
    "locality": locality.locality,
    "cost": cost.cost,
}

__all__ = ["MEASURES", "SIZES", "Measure"]
