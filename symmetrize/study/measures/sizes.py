"""How much of everything the measures look at, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

#: Entries of the section ``sizes`` of a study, with their defaults: those of a small study, with which all measures of
#: one cell of ethanol take seconds.
SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        # Structures whose symmetry errors are measured and that give the error scale; accuracy takes all.
        "structures": 6,
        # Random rotations of the equivariance error, and as many with inversion.
        "elements": 4,
        # Structures of the orientation variance, and the degree of its quadrature: 24 rotations for 3, 84 for 5, 380
        # for 9, and as many with inversion for O(3).
        "variance_structures": 2,
        "degree": 3,
        # Renumberings of the atoms of every structure.
        "permutations": 3,
        # Paths through degenerate geometries (in the order of `symmetrize.study.measures.smooth.PATHS`), points of
        # the scans (at most 200 are kept), places looked at closely, and the highest derivative whose jump is sought.
        "paths": 3,
        "points": 61,
        "candidates": 1,
        "derivatives": 0,
        # Symmetric structures (in the order of `symmetrize.study.measures.symmetry.SYMMETRIC`).
        "sites": 6,
        # Steps of 0.5 fs at constant energy, and of the trajectories that tell apart what comes from the time step
        # (0: none).
        "steps": 50,
        "nve_steps": 6,
        # Directions of finite differences of the energy.
        "directions": 2,
        # Pairs of far structures, and random elements by which one of each is turned.
        "pairs": 2,
        "turns": 3,
        # Evaluations that are timed, the shortest of which counts.
        "repeats": 3,
    }
)
