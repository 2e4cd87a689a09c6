"""Named structures, generic and degenerate: those where symmetrisation methods are known to fail come by name.

Lengths in angstrom. Tags:

* ``generic``: no symmetry, no coincidence of distances; ``symmetric``: the point group has a proper rotation,
  ``near-symmetric``: almost;
* ``isolated``: one atom without neighbors; ``collinear``: all atoms on a line; ``near-collinear``: almost;
  ``planar``: all atoms in a plane, but not on a line;
* ``axial``: an environment within `CUTOFF` that is collinear in a structure that is not;
* ``equidistant``: ties between nearest neighbors; ``cutoff``: distances of exactly `CUTOFF`;
* ``aligned``: bonds along the coordinate axes; ``chiral``: no improper symmetry operation;
* ``centroid``: an atom at the centroid;
* ``periodic`` (any direction), ``molecule`` (real chemistry), ``cloud`` (one species, shape only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from symmetrize.errors import DeclarationError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

#: Radius that the structures tagged ``cutoff`` and ``axial`` are made for, unless they are given another.
CUTOFF = 4.0


@dataclass(frozen=True)
class Geometry:
    """A named structure: call it for a new ``ase.Atoms``."""

    name: str
    build: Callable[[], Atoms]
    tags: frozenset[str]

    def __call__(self) -> Atoms:
        atoms = self.build()
        atoms.info["name"] = self.name
        return atoms


#: All geometries by name.
GEOMETRIES: dict[str, Geometry] = {}


def geometries(*tags: str, exclude: Iterable[str] = ()) -> dict[str, Atoms]:
    """Structures that have all of the tags and none of the excluded ones, by name.

    Raises
    ------
    DeclarationError
        For an unknown tag.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    known = {tag for geometry in GEOMETRIES.values() for tag in geometry.tags}
    for tag in (*tags, *exclude):
        if tag not in known:
            raise DeclarationError(f"geometries: unknown tag {tag!r}, {did_you_mean(tag, known)}")
    return {
        name: geometry()
        for name, geometry in GEOMETRIES.items()
        if geometry.tags.issuperset(tags) and not geometry.tags.intersection(exclude)
    }


def with_species(atoms: Atoms, species: Sequence[int]) -> Atoms:
    """Copy in which the chemical elements are replaced by those in ``species``, in order of first appearance and
    cyclically: for models that know few of them. Atoms alike stay alike."""
    out = atoms.copy()
    order = {int(z): k for k, z in enumerate(dict.fromkeys(atoms.numbers.tolist()))}
    out.numbers = [species[order[int(z)] % len(species)] for z in atoms.numbers]
    return out


def _register(name: str, *tags: str) -> Callable[[Callable[[], Atoms]], Callable[[], Atoms]]:
    def keep(build: Callable[[], Atoms]) -> Callable[[], Atoms]:
        GEOMETRIES[name] = Geometry(name, build, frozenset(tags))
        return build

    return keep


def _atoms(symbols: str | Sequence[str], positions: object, cell: object = None, pbc: object = False) -> Atoms:
    from ase import Atoms

    return Atoms(symbols, positions=np.asarray(positions, dtype=float), cell=cell, pbc=pbc)


def _in_general_orientation(atoms: Atoms) -> Atoms:
    """A fixed rotation and translation that align nothing with a coordinate axis."""
    w, x, y, z = np.array([0.83, -0.31, 0.42, 0.21]) / np.linalg.norm([0.83, -0.31, 0.42, 0.21])
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    out = atoms.copy()
    out.set_cell(atoms.cell.array @ matrix.T)
    out.positions = atoms.positions @ matrix.T + ([0.1, -0.7, 0.4] if not atoms.pbc.any() else 0.0)
    return out


def _turned(family: Callable[..., Atoms], *args: Any) -> Callable[[], Atoms]:
    return lambda: _in_general_orientation(family(*args))


# --- families with parameters -------------------------------------------------------------------------------------


def linear(symbols: Sequence[str], coordinates: Sequence[float]) -> Atoms:
    """Atoms on the x axis: collinear exactly."""
    return _atoms(symbols, [[x, 0.0, 0.0] for x in coordinates])


def water(angle: float = 104.5, bond: float = 0.9572) -> Atoms:
    """H-O-H with an angle in degrees, up to 180, where it is exactly linear."""
    half = math.radians(angle) / 2
    x, y = (bond, 0.0) if angle == 180.0 else (bond * math.sin(half), bond * math.cos(half))
    return _atoms("OHH", [[0, 0, 0], [x, y, 0], [-x, y, 0]])


def off_axis(distance: float) -> Atoms:
    """O=C=O with one oxygen ``distance`` off the line through the other two atoms."""
    return _atoms("OCO", [[-1.16, 0, 0], [0, 0, 0], [1.16, distance, 0]])


def ring(n: int, bond: float = 1.4, symbol: str = "C") -> Atoms:
    """Regular polygon in the xy plane around the origin."""
    radius = bond / (2 * math.sin(math.pi / n))
    phi = 2 * np.pi * np.arange(n) / n
    return _atoms([symbol] * n, np.stack([radius * np.cos(phi), radius * np.sin(phi), 0 * phi], axis=1))


def right_angle(distance: float, near: float = 1.0) -> Atoms:
    """A center, a neighbor at ``near``, and a third atom at 90 degrees and ``distance``."""
    return _atoms("CHO", [[0, 0, 0], [near, 0, 0], [0, distance, 0]])


def two_hop_collinear(cutoff: float = CUTOFF) -> Atoms:
    """A center whose neighbors lie on a line, with off-axis atoms beyond the cutoff but within two.

    Atoms 1 and 2 are the neighbors of atom 0; atoms 3 and 4 are neighbors of atom 1 and of atom 2.
    """
    r = cutoff
    points = [[0, 0, 0], [0.6 * r, 0, 0], [-0.55 * r, 0, 0], [0.9 * r, 0.7 * r, 0.0], [-0.9 * r, 0.1 * r, 0.65 * r]]
    return _in_general_orientation(_atoms("CNOHF", points))


def two_dimers(symbol: str = "H", bond: float = 0.74, distance: float = 12.0, angle: float = 50.0) -> Atoms:
    """Two skew dimers, not in one plane: each atom sees a line only, the structure has handedness."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = [[0, 0, 0], [bond, 0, 0], [0.3, 0.2, distance], [0.3 + bond * c, 0.2 + bond * s, distance]]
    return _in_general_orientation(_atoms([symbol] * 4, points))


def crystal(symbol: str, structure: str, a: float, *, cubic: bool = False, rattle: float = 0.0, seed: int = 7) -> Atoms:
    """Perfect or rattled (standard deviation in angstrom) elemental crystal by `ase.build.bulk`."""
    from ase.build import bulk

    atoms = bulk(symbol, structure, a=a, cubic=cubic)
    if rattle:
        atoms.positions += rattle * np.random.default_rng(seed).standard_normal(atoms.positions.shape)
    return atoms


def random_cluster(n: int, seed: int, *, symbols: str = "CHON", spacing: float = 1.1, density: float = 0.04) -> Atoms:
    """Random atoms in a cube, no closer than ``spacing``, ``density`` atoms per cubic angstrom."""
    generator = np.random.default_rng(seed)
    side = (n / density) ** (1 / 3)
    points: list[np.ndarray] = []
    while len(points) < n:
        candidate = side * generator.random(3)
        if all(np.linalg.norm(candidate - p) > spacing for p in points):
            points.append(candidate)
    return _atoms([symbols[k % len(symbols)] for k in range(n)], points)


# --- the library --------------------------------------------------------------------------------------------------

_register("isolated atom", "isolated", "symmetric")(lambda: _atoms("C", [[0.3, -0.2, 0.1]]))
_register("isolated atom at the origin", "isolated", "symmetric")(lambda: _atoms("O", [[0, 0, 0]]))

_LINEAR = {
    "H2": ("HH", [0.0, 0.74]),
    "N2": ("NN", [0.0, 1.10]),
    "CO": ("CO", [0.0, 1.13]),
    "CO2": ("OCO", [-1.16, 0.0, 1.16]),
    "C2H2": ("HCCH", [-1.66, -0.60, 0.60, 1.66]),
    "HCN": ("HCN", [-1.07, 0.0, 1.16]),
}
for _name, (_symbols, _x) in _LINEAR.items():
    _tags = ["molecule", "collinear", "symmetric"]
    _tags += ["equidistant", "centroid"] if _name == "CO2" else []
    _register(f"{_name} along x", *_tags, "aligned")(partial(linear, _symbols, _x))
    # Rotated, the atoms are collinear up to rounding only.
    _register(_name, *_tags)(_turned(linear, _symbols, _x))

_register("water", "molecule", "planar", "symmetric", "equidistant")(lambda: _in_general_orientation(water()))
for _angle in (120.0, 150.0, 170.0, 179.0, 179.9):
    _more = () if _angle < 175 else ("near-collinear",)
    _register(f"water at {_angle:g} degrees", "planar", "symmetric", "equidistant", *_more)(_turned(water, _angle))
_register("water at 180 degrees", "collinear", "symmetric", "equidistant", "aligned")(lambda: water(180.0))
for _exponent in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14):
    _register(f"CO2, 1e-{_exponent} off the line", "planar", "near-collinear")(partial(off_axis, 10.0**-_exponent))


@_register("benzene", "molecule", "planar", "symmetric", "equidistant")
def _benzene() -> Atoms:
    carbons, phi = ring(6, 1.395), np.pi / 3 * np.arange(6)
    hydrogens = _atoms("H6", 2.48 * np.stack([np.cos(phi), np.sin(phi), 0 * phi], axis=1))
    return _in_general_orientation(carbons + hydrogens)


for _n, _symbol, _title in ((3, "C", "triangle"), (4, "H", "square"), (5, "C", "pentagon"), (6, "C", "hexagon")):
    _register(_title, "planar", "symmetric", "equidistant", "cloud")(_turned(ring, _n, 1.4, _symbol))
_register("square in the xy plane", "planar", "symmetric", "equidistant", "aligned", "cloud")(
    lambda: _atoms("H4", [[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
)


@_register("methane", "molecule", "symmetric", "equidistant", "centroid")
def methane() -> Atoms:
    """CH4, exactly tetrahedral: hydrogens on alternate corners of a cube."""
    a = 1.087 / math.sqrt(3.0)
    return _atoms("CH4", [[0, 0, 0], [a, a, a], [a, -a, -a], [-a, a, -a], [-a, -a, a]])


@_register("SF6", "molecule", "symmetric", "equidistant", "aligned", "centroid")
def sulfur_hexafluoride() -> Atoms:
    """SF6, exactly octahedral, bonds along the axes."""
    unit = np.eye(3)
    return _atoms("SF6", np.concatenate([[[0, 0, 0]], 1.56 * unit, -1.56 * unit]))


_register("rotated methane", "symmetric", "equidistant", "centroid")(lambda: _in_general_orientation(methane()))
_register("methane, almost", "generic", "near-symmetric")(
    lambda: _atoms("CH4", methane().positions + 1e-6 * np.sin(np.arange(15.0)).reshape(5, 3))
)
_register("ammonia", "molecule", "symmetric", "equidistant")(
    lambda: _in_general_orientation(
        _atoms("NHHH", [[0, 0, 0.38]] + [[0.94 * math.cos(p), 0.94 * math.sin(p), 0] for p in np.arange(3) * 2.0943951])
    )
)
_register("neighbors along the axes", "symmetric", "equidistant", "aligned", "cloud", "centroid")(
    lambda: _atoms("C7", np.concatenate([[[0, 0, 0]], 1.5 * np.eye(3), -1.5 * np.eye(3)]))
)
_register("bonds along the axes", "generic", "aligned")(
    lambda: _atoms("CHNO", [[0, 0, 0], [1.0, 0, 0], [0, 1.2, 0], [0, 0, 1.4]])
)
_register("equidistant neighbors", "equidistant")(
    lambda: _in_general_orientation(
        _atoms("CHNO", [[0, 0, 0], [1.2, 0, 0], [0, 1.2, 0], [1.2 * 0.48, 1.2 * 0.6, 1.2 * 0.64]])
    )
)
_register("opposite neighbors", "generic")(
    lambda: _in_general_orientation(
        _atoms("COOHN", [[0, 0, 0], [1.3, 0, 0], [-1.3, 0, 0], [0.2, 1.5, 0.3], [-0.4, -0.6, 1.4]])
    )
)

# Distances of exactly the cutoff: bonds along x and y so that no rounding moves them.
_register("pair at the cutoff", "cutoff", "collinear", "aligned", "symmetric")(lambda: linear("CO", [0.0, CUTOFF]))
_register("third atom at the cutoff", "cutoff", "planar", "aligned")(lambda: right_angle(CUTOFF))
_register("line with an atom at the cutoff", "cutoff", "collinear", "aligned", "symmetric")(
    lambda: linear("HCO", [-1.0, 0.0, CUTOFF])
)
_register("simple cubic with cutoff neighbors", "cutoff", "periodic", "symmetric", "equidistant", "aligned")(
    lambda: crystal("Po", "sc", CUTOFF / 2)
)

_register("two-hop collinear", "axial")(two_hop_collinear)
_register("two H2, skew", "axial", "chiral")(two_dimers)
_register("two N2, skew", "axial", "chiral")(lambda: two_dimers("N", 1.10, 12.0, 70.0))
_register("two N2, skew and near", "chiral")(lambda: two_dimers("N", 1.10, 3.1, 70.0))
_register("N2 and a far atom", "axial", "planar")(lambda: _atoms("NNO", [[0, 0, 0], [1.1, 0, 0], [3.0, 9.0, 0]]))


@_register("propyne", "molecule", "symmetric", "equidistant")
def propyne() -> Atoms:
    """CH3-C≡C-H: an axis of carbons, and three atoms off it."""
    phi = 2 * np.pi / 3 * np.arange(3)
    methyl = np.stack([-2.03 + 0 * phi, 1.03 * np.cos(phi), 1.03 * np.sin(phi)], axis=1)
    return _atoms("CCCHHHH", np.concatenate([[[-1.66, 0, 0], [-0.2, 0, 0], [1.0, 0, 0], [2.06, 0, 0]], methyl]))


@_register("ethanol", "generic", "molecule", "chiral")
def ethanol() -> Atoms:
    """CH3-CH2-OH, slightly distorted so that it has no symmetry plane."""
    points = [
        *([1.1851, -0.0038, 0.0217], [0.7516, -0.0224, -0.9573], [1.1669, 0.8330, 0.5693]),
        *([1.0915, -0.9328, 0.5712], [-0.0928, 1.3012, 0.1021], [-0.4250, -0.5423, -0.1135]),
        *([-0.7300, -1.5423, 0.2412], [-1.3187, 0.3301, 0.0914], [-2.1207, -0.0612, -0.3105]),
    ]
    from ase.build import molecule

    atoms = molecule("CH3CH2OH")
    atoms.positions += 0.04 * np.asarray(points)[:, ::-1]
    return atoms


@_register("chiral center", "generic", "molecule", "chiral")
def chiral_center() -> Atoms:
    """C with four different neighbors at different distances: CHFClBr."""
    corners = methane().positions[1:] / 1.087
    return _atoms("CHFClBr", np.concatenate([[[0, 0, 0]], corners * np.array([[1.08], [1.36], [1.77], [1.93]])]))


_register("random cluster", "generic", "chiral")(lambda: random_cluster(8, seed=3))
_register("random gas", "generic", "chiral")(lambda: random_cluster(12, seed=5, density=0.006))
_register("random point cloud", "generic", "chiral", "cloud")(lambda: random_cluster(10, seed=11, symbols="C"))

_register("fcc Al", "periodic", "symmetric", "equidistant")(lambda: crystal("Al", "fcc", 4.05))
_register("bcc Fe", "periodic", "symmetric", "equidistant")(lambda: crystal("Fe", "bcc", 2.87))
_register("bcc Fe, cubic cell", "periodic", "symmetric", "equidistant")(lambda: crystal("Fe", "bcc", 2.87, cubic=True))
_register("fcc Al, cubic cell", "periodic", "symmetric", "equidistant")(lambda: crystal("Al", "fcc", 4.05, cubic=True))
_register("sc Po", "periodic", "symmetric", "equidistant", "aligned")(lambda: crystal("Po", "sc", 3.35))
_register("diamond", "periodic", "symmetric", "equidistant")(lambda: crystal("C", "diamond", 3.567))
_register("silicon", "periodic", "symmetric", "equidistant")(lambda: crystal("Si", "diamond", 5.43))
_register("rattled silicon", "periodic", "generic")(lambda: crystal("Si", "diamond", 5.43, cubic=True, rattle=0.08))
_register("rattled carbon", "periodic", "generic")(lambda: crystal("C", "diamond", 3.567, rattle=0.05))


@_register("triclinic crystal", "periodic", "generic", "chiral")
def triclinic() -> Atoms:
    """Four different atoms in a skewed cell, one of them outside it."""
    points = [[0.1, 0.2, 0.3], [1.9, 1.1, 0.8], [2.6, 2.9, 2.4], [-2.4, 4.1, 1.9]]
    return _atoms("CHON", points, cell=[[4.1, 0, 0.2], [-1.1, 4.6, 0], [0.7, -0.9, 4.9]], pbc=True)


@_register("slab", "periodic", "generic")
def slab() -> Atoms:
    """Periodic along x and y, no third lattice vector."""
    points = [[0.1, 0.2, 0.0], [1.8, 1.3, 0.4], [0.4, 1.6, 1.7], [1.5, 0.1, 2.2]]
    return _atoms("SiSiOH", points, cell=[[3.6, 0.3, 0], [-0.4, 3.9, 0], [0, 0, 0]], pbc=[True, True, False])


@_register("wire", "periodic", "generic")
def wire() -> Atoms:
    """Periodic along x only, in a cell whose other vectors mean nothing."""
    points = [[0.1, 0.2, 0.0], [1.3, 0.5, 0.4], [2.2, -0.6, 0.9]]
    return _atoms("CHO", points, cell=[[3.7, 0.2, 0.1], [0, 0, 0], [0, 0, 0]], pbc=[True, False, False])


_register("linear chain", "periodic", "collinear", "symmetric", "equidistant", "aligned")(
    lambda: _atoms("C", [[0, 0, 0]], cell=[[1.3, 0, 0], [0, 0, 0], [0, 0, 0]], pbc=[True, False, False])
)
