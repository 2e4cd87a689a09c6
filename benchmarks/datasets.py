"""Structures to measure on: what comes with the package, and public files in a folder of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from ase import Atoms
from ase.io import read

from symmetrize.testing import geometries

BUNDLED = "ethanol (bundled)"


@dataclass(frozen=True)
class Source:
    """A public file; where it comes from is in README.md.

    Attributes
    ----------
    name : str
    file : str
        Looked for in all subfolders.
    n_small : int
        Structures in the small profile.
    finite : bool
        Molecules: whatever box the file puts them into is left out.
    """

    name: str
    file: str
    n_small: int
    finite: bool


SOURCES = (
    Source("ethanol", "ethanol_1000.xyz", 500, True),
    Source("QM7-X", "qm7x_polarizability_100.xyz", 100, True),
    Source("QM7b", "qm7b_ccsd_dipole_pol_test1443.xyz", 200, True),
    Source("methane", "methane_test.xyz", 100, True),
    Source("water", "deepmd_water_100.extxyz", 4, False),
    Source("silicon", "mlearn_Si_test.extxyz", 25, False),
    Source("alloys", "hea25_100.xyz", 10, False),
    Source("carbon", "carbon_100.xyz", 100, False),
)

#: Tags of `symmetrize.testing.structures.geometries`, each a data set of its own.
TAGS = ("generic", "symmetric", "collinear", "near-collinear", "periodic")


def load(folder: Path | None, full: bool) -> tuple[dict[str, list[Atoms]], list[str]]:
    """All data sets by name, and the files that are not in the folder (all of them without one)."""
    with as_file(files("symmetrize.demo").joinpath("data", "ethanol-test.xyz")) as path:
        found = {BUNDLED: read(path, ":")}
    absent = []
    for source in SOURCES:
        paths = sorted(folder.rglob(source.file)) if folder is not None else []
        if not paths:
            absent.append(source.file)
            continue
        structures = read(paths[0], ":")
        # Spread over the file, whose structures may be sorted.
        stride = 1 if full else max(1, len(structures) // source.n_small)
        structures = structures[::stride] if full else structures[::stride][: source.n_small]
        for atoms in structures:
            if source.finite:
                atoms.pbc = False
        found[source.name] = structures
    return found, absent


def named(tag: str) -> list[Atoms]:
    """Named geometries of a tag; those that are periodic under ``"periodic"`` only."""
    exclude = () if tag == "periodic" else ("periodic",)
    return list(geometries(tag, exclude=exclude).values())
