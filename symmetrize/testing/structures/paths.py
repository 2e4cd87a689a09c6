"""Smooth one-parameter families of structures, t in [0, 1], that pass through a critical geometry at known t.

Positions are analytic functions of t, so that any jump in an output along a path is the model's. Events lie at exactly
t = 0.5 (0.25 and 0.75 where there are two), where the critical geometry is met without rounding as far as possible.
Lengths in angstrom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from symmetrize.testing.structures.geometries import methane, propyne

if TYPE_CHECKING:
    from ase import Atoms


#: The path for models whose cutoff is not known.
WIDE = "pair pulled apart"


@dataclass(frozen=True)
class Path:
    """A family of structures.

    Attributes
    ----------
    name : str
    build : callable
        t -> ``ase.Atoms``.
    events : tuple of float
        Values of t at which something critical happens.
    what : str
        What happens there.
    """

    name: str
    build: Callable[[float], Atoms]
    events: tuple[float, ...]
    what: str

    def __call__(self, t: float) -> Atoms:
        return self.build(t)


def paths(cutoff: float | None = None) -> dict[str, Path]:
    """All paths by name.

    Parameters
    ----------
    cutoff : float, optional
        The radius of the model, for the paths on which an atom crosses it; larger than 2. Where it is not known, they
        are for 4, and a pair is pulled apart over all distances at which a cutoff may be.
    """
    unknown = cutoff is None
    cutoff = 4.0 if cutoff is None else cutoff
    entries = [
        Path("bending CO2", _bending_co2, (0.5,), "O=C=O becomes linear at 180 degrees"),
        Path("bending HCN", _bending_hcn, (0.5,), "H-C-N becomes linear, one atom off the axis"),
        Path("bending C2H2, cis", lambda t: _bending_c2h2(t, 1.0), (0.5,), "linear, two atoms off the axis"),
        Path("bending C2H2, trans", lambda t: _bending_c2h2(t, -1.0), (0.5,), "linear, two atoms off the axis"),
        Path("bending propyne", _bending_propyne, (0.5,), "carbons become collinear, three hydrogens off the axis"),
        Path("methyl onto the axis", _methyl, (0.5,), "three off-axis atoms cross the axis together"),
        Path("pair crosses the cutoff", lambda t: _dissociation(t, cutoff), (0.5,), "a dimer falls apart"),
        Path("right angle", lambda t: _right_angle(t, cutoff), (0.5,), "partner at 90 degrees leaves"),
        Path("neighbor leaves, in company", lambda t: _in_company(t, cutoff), (0.5,), "as before, a molecule far away"),
        Path("atom beside a dimer", lambda t: _beside_dimer(t, cutoff), (0.25, 0.75), "leaves either atom's cutoff"),
        Path("atom leaves a cluster", lambda t: _leaving(t, cutoff), (0.5,), "last neighbor of an atom leaves"),
        Path("exchange of nearest neighbors", _exchange, (0.5,), "two neighbors have equal distance"),
        Path("three-fold exchange", _three_fold, (0.5,), "three neighbors have equal distance"),
        Path("through the centroid", _centroid, (0.5,), "an atom is at the centroid of the structure"),
        Path("umbrella inversion", _umbrella, (0.5,), "NH3 is planar"),
        Path("through the tetrahedron", _tetrahedron, (0.5,), "CH4 has Td symmetry"),
        Path("through the square", _square, (0.5,), "a rhombus has four-fold symmetry"),
        Path("through bcc", _bain, (0.5,), "a tetragonal crystal is cubic (Bain path)"),
    ]
    if unknown:
        entries.append(Path(WIDE, _pulled_apart, (), "a dimer is pulled apart from 1 to 13 angstrom"))
    return {path.name: path for path in entries}


def _atoms(symbols: str, positions: object, cell: object = None, pbc: object = False) -> Atoms:
    from ase import Atoms

    return Atoms(symbols, positions=np.asarray(positions, dtype=float), cell=cell, pbc=pbc)


def _bending_co2(t: float) -> Atoms:
    angle = 1.2 * (t - 0.5)
    return _atoms("OCO", [[-1.16, 0, 0], [0, 0, 0], [1.16 * math.cos(angle), 1.16 * math.sin(angle), 0]])


def _bending_hcn(t: float) -> Atoms:
    angle = 1.2 * (t - 0.5)
    return _atoms("HCN", [[-1.07 * math.cos(angle), 0, 1.07 * math.sin(angle)], [0, 0, 0], [1.16, 0, 0]])


def _bending_c2h2(t: float, side: float) -> Atoms:
    angle = 1.2 * (t - 0.5)
    x, y = 0.6 + 1.06 * math.cos(angle), 1.06 * math.sin(angle)
    return _atoms("HCCH", [[-x, side * y, 0], [-0.6, 0, 0], [0.6, 0, 0], [x, y, 0]])


def _bending_propyne(t: float) -> Atoms:
    atoms, angle = propyne(), 1.2 * (t - 0.5)
    # The methyl group turns about the middle carbon.
    pivot, turning = np.array([-0.2, 0, 0]), [0, 4, 5, 6]
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    atoms.positions[turning] = (atoms.positions[turning] - pivot) @ matrix.T + pivot
    return atoms


def _methyl(t: float) -> Atoms:
    # Three different distances along the axis: the atoms meet the axis, not each other.
    h, x = 1.6 * (t - 0.5), (1.0, 2.1, 3.2)
    phi = (0.3, 2.5, 4.4)
    points = [[a, h * math.cos(p), h * math.sin(p)] for a, p in zip(x, phi, strict=True)]
    return _atoms("CNHHH", [[0, 0, 0], [-1.2, 0, 0], *points])


def _dissociation(t: float, cutoff: float) -> Atoms:
    return _atoms("CO", [[0, 0, 0], [cutoff + 1.2 * (t - 0.5), 0, 0]])


def _pulled_apart(t: float) -> Atoms:
    return _atoms("CO", [[0, 0, 0], [1.0 + 12.0 * t, 0, 0]])


def _right_angle(t: float, cutoff: float) -> Atoms:
    return _atoms("CHO", [[0, 0, 0], [1.0, 0, 0], [0, cutoff + 1.2 * (t - 0.5), 0]])


def _in_company(t: float, cutoff: float) -> Atoms:
    # The far molecule has frames of its own, so that a structure without this partner is no special case.
    far = np.array([0.0, 0.0, 2.5 * cutoff])
    water = [far, far + [0.76, 0.59, 0.0], far + [-0.76, 0.59, 0.0]]
    return _atoms("CHOOHH", [[0, 0, 0], [1.0, 0, 0], [0, cutoff + 0.6 * (t - 0.5), 0], *water])


def _beside_dimer(t: float, cutoff: float) -> Atoms:
    # Going along x it leaves the cutoff of the first atom at t = 0.25, that of the second (0.6 further) at t = 0.75.
    reach, height = 0.6 * cutoff, 0.8 * cutoff
    x = reach + 1.2 * (t - 0.25)
    return _atoms("NNO", [[0, 0, 0], [0.6, 0, 0], [x, height, 0]])


def _leaving(t: float, cutoff: float) -> Atoms:
    d = cutoff + 1.2 * (t - 0.5)
    return _atoms("CHON", [[0, 0, 0], [-1.1, 0, 0], [-0.4, 1.0, 0.9], [d, 0, 0]])


def _exchange(t: float) -> Atoms:
    d = 0.6 * (t - 0.5)
    return _atoms("CHHO", [[0, 0, 0], [1.2 + d, 0, 0], [0, 1.2 - d, 0], [-0.5, -0.7, 1.5]])


def _three_fold(t: float) -> Atoms:
    d = 0.6 * (t - 0.5)
    return _atoms("CHHHO", [[0, 0, 0], [1.2 + d, 0, 0], [0, 1.2 - d, 0], [0, 0, 1.2 + 0.4 * d], [-1.1, -1.0, -0.9]])


def _centroid(t: float) -> Atoms:
    # The others have their centroid at the origin exactly.
    outer = np.array([[1.5, 0.25, 0.5], [-1.0, 1.25, -0.75], [-0.5, -1.5, 0.25]])
    way = np.array([0.8, 0.5, 1.1]) * (t - 0.5)
    return _atoms("COOH", np.concatenate([[way], outer]))


def _umbrella(t: float) -> Atoms:
    phi = 2 * np.pi / 3 * np.arange(3)
    height = 1.0 * (t - 0.5)
    return _atoms("NHHH", [[0, 0, height], *[[0.95 * math.cos(p), 0.95 * math.sin(p), 0.0] for p in phi]])


def _tetrahedron(t: float) -> Atoms:
    atoms = methane()
    way = [[0.2, -0.1, 0.15], [0.3, 0.25, -0.2], [-0.15, 0.3, 0.1], [0.1, -0.2, 0.35], [-0.3, 0.05, 0.2]]
    atoms.positions += (t - 0.5) * np.array(way)
    return atoms


def _square(t: float) -> Atoms:
    d = 0.5 * (t - 0.5)
    return _atoms("H4", [[1 + d, 0, 0], [0, 1 - d, 0], [-1 - d, 0, 0], [0, -1 + d, 0]])


def _bain(t: float) -> Atoms:
    a, c = 2.87 * (1 - 0.1 * (t - 0.5)), 2.87 * (1 + 0.2 * (t - 0.5))
    return _atoms("Fe2", [[0, 0, 0], [a / 2, a / 2, c / 2]], cell=[a, a, c], pbc=True)
