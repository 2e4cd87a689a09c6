"""Relax a molecule and compute its vibrations, bare and symmetrised: python examples/relaxation.py [--small]

Ethanol has a mirror plane, and its vibrations do not depend on how it lies in space. A network that is not symmetric
breaks both, a little; symmetrised by ECSE it keeps both, to the last digit or to what finite differences allow.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from symmetrize.backbones.pet import load

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.data import from_ase
from symmetrize.ops.rotations import random_rotations

METHODS = {"bare": (Identity, "#e07b24"), "ECSE": (ECSE, "#179a6e")}


def turned(atoms: Atoms, seed: int) -> Atoms:
    """The molecule in a random orientation."""
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0].numpy()
    atoms = atoms.copy()
    atoms.positions = atoms.positions @ rotation.T
    return atoms


def mirror_images(atoms: Atoms, pairs: list[tuple[int, int]]) -> float:
    """How far the mirror plane is off (angstrom): distances to all atoms, for atoms that are images of each other."""
    distances, order = atoms.get_all_distances(), np.arange(len(atoms))
    for i, j in pairs:
        order[[i, j]] = j, i
    return float(np.abs(distances[np.ix_(order, order)] - distances).max())


def mirror_pairs(atoms: Atoms) -> list[tuple[int, int]]:
    """Hydrogens that the mirror plane z = 0 exchanges."""
    images = atoms.positions * (1.0, 1.0, -1.0)
    partner = np.linalg.norm(images[:, None] - atoms.positions, axis=-1).argmin(axis=1)
    return [(i, int(j)) for i, j in enumerate(partner) if i < j]


def frequencies(atoms: Atoms) -> np.ndarray:
    """Wave numbers of the vibrations (1/cm), without translations and rotations."""
    with tempfile.TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, name=f"{folder}/vibrations", delta=1e-3)
        vibrations.run()
        return np.sort(np.real(vibrations.get_frequencies()))[6:]


def draw(spreads: dict[str, np.ndarray], wave_numbers: np.ndarray, path: Path) -> None:
    """How much each vibration depends on the orientation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, spread in spreads.items():
        axes.semilogy(wave_numbers, np.maximum(spread, 1e-9), "o", color=METHODS[name][1], label=name)
    axes.set_xlabel("wave number (1/cm)")
    axes.set_ylabel("range over orientations (1/cm)")
    axes.set_title("Vibrations of ethanol in different orientations", loc="left")
    axes.grid(color="#dde4ea")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two orientations and a looser minimum")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/relaxation"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    backbone = load("ethanol", dtype=torch.float64)
    start = molecule("CH3CH2OH")
    pairs = mirror_pairs(start)
    n_orientations, fmax = (2, 1e-3) if options.small else (6, 1e-5)
    spreads, wave_numbers = {}, np.zeros(0)
    print("model   mirror plane off by (Å)  vibrations differ by (1/cm)  evaluations per atom")
    for name, (method, _) in METHODS.items():
        calculator = SymmetrizerCalculator(Symmetrizer(backbone, method()))
        relaxed = turned(start, seed=0)
        relaxed.calc = calculator
        BFGS(relaxed, logfile=None).run(fmax=fmax, steps=200)
        off = mirror_images(relaxed, pairs)
        found = []
        for seed in range(n_orientations):
            atoms = turned(relaxed, seed)
            atoms.calc = calculator
            found.append(frequencies(atoms))
        spreads[name], wave_numbers = np.ptp(found, axis=0), np.mean(found, axis=0)
        cost = calculator.model.explain(from_ase(relaxed)).evaluations_mean
        print(f"{name:6} {off:24.1e} {spreads[name].max():28.1e} {cost:21.1f}")
    draw(spreads, wave_numbers, options.output / "vibrations.svg")
    print(f"figure: {options.output / 'vibrations.svg'}")


if __name__ == "__main__":
    main()
