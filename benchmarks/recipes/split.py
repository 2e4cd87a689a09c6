"""Training, validation and test structures for metatrain, from one file: ``python -m benchmarks.recipes.split``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from ase.io import read, write

SIZES = {"train": 500, "val": 50, "test": 450}


@click.command()
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(data: Path, folder: Path) -> None:
    """Write train.xyz, val.xyz and test.xyz into FOLDER, from the 1000 structures of DATA (extended XYZ, eV)."""
    structures = read(data, ":")
    if len(structures) < sum(SIZES.values()):
        raise click.ClickException(f"{data}: expected {sum(SIZES.values())} structures, got {len(structures)}")
    order = np.random.default_rng(0).permutation(len(structures))
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, size in SIZES.items():
        chosen = [structures[k] for k in order[first : first + size]]
        for atoms in chosen:
            # Under names of its own: ASE keeps 'energy' and 'forces' to itself.
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            atoms.calc = None
            atoms.info["energy_dft"], atoms.arrays["forces_dft"] = energy, forces
        write(folder / f"{name}.xyz", chosen, format="extxyz")
        first += size


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.recipes.split")
