"""What `benchmarks.practice` measures: relaxations, perfect crystals, phonons, dynamics, and a path through a line."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from symmetrize.ops.rotations import random_rotations

#: Of spglib, and of distances in a molecule (angstrom).
TOLERANCE = 1e-5


def turned(atoms: Atoms, seed: int = 0) -> Atoms:
    """In a random orientation: what is aligned with the axes looks more symmetric to a network than it is."""
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0].numpy()
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ rotation.T)
    atoms.positions = atoms.positions @ rotation.T
    return atoms


# --- symmetry of a structure ----------------------------------------------------------------------------------------


def space_group(atoms: Atoms, tolerance: float = TOLERANCE) -> str:
    """International symbol and number."""
    cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(spglib.get_spacegroup(cell, symprec=tolerance))


@dataclass(frozen=True)
class Operations:
    """Symmetry operations of a crystal, in fractional coordinates."""

    rotations: np.ndarray
    translations: np.ndarray

    @classmethod
    def of(cls, atoms: Atoms) -> Operations:
        """Those that spglib finds in a structure."""
        cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = spglib.get_symmetry(cell, symprec=TOLERANCE)
        return cls(found["rotations"], found["translations"])

    def broken_by(self, atoms: Atoms) -> float:
        """How far the operations miss: the largest distance of an image from the atom it should be (angstrom)."""
        cell, scaled = atoms.cell.array, atoms.get_scaled_positions(wrap=False)
        worst = 0.0
        for rotation, translation in zip(self.rotations, self.translations, strict=True):
            images = scaled @ rotation.T + translation
            apart = images[:, None, :] - scaled[None, :, :]
            apart -= np.round(apart)
            distance = np.linalg.norm(apart @ cell, axis=-1)
            distance[atoms.numbers[:, None] != atoms.numbers[None, :]] = np.inf
            # The operation is an isometry if it leaves the metric of the cell alone.
            image = rotation.T @ cell
            lengths = np.sqrt(np.abs(np.diag(cell @ cell.T)))
            metric = np.abs(image @ image.T - cell @ cell.T) / np.outer(lengths, lengths)
            worst = max(worst, float(distance.min(axis=1).max()), float((metric * lengths.max() / 2.0).max()))
        return worst


def centered(atoms: Atoms) -> Atoms:
    """With the first atom at the origin, where the operations of the crystals here have their fixed point."""
    atoms = atoms.copy()
    atoms.positions -= atoms.positions[0]
    return atoms


def point_group_order(atoms: Atoms, tolerance: float = TOLERANCE) -> int:
    """Permutations of like atoms that leave all distances alone (24 for methane): isometries of a molecule in space."""
    distances = atoms.get_all_distances()
    candidates = itertools.permutations(range(len(atoms)))
    count = 0
    for order in candidates:
        chosen = list(order)
        if (atoms.numbers[chosen] != atoms.numbers).any():
            continue
        count += bool(np.abs(distances[np.ix_(chosen, chosen)] - distances).max() < tolerance)
    return count


def spread_of_bonds(atoms: Atoms) -> float:
    """For a molecule AB_n: difference of the longest and shortest of the A-B and of the B-B distances (angstrom)."""
    distances = atoms.get_all_distances()
    bonds, others = distances[0, 1:], distances[1:, 1:][np.triu_indices(len(atoms) - 1, 1)]
    return float(max(np.ptp(bonds), np.ptp(others)))


# --- experiments ----------------------------------------------------------------------------------------------------


def relax_crystal(atoms: Atoms, calculator: Calculator, fmax: float, steps: int) -> dict[str, Any]:
    """Relax positions and cell; what is left of the operations of the start."""
    operations, before = Operations.of(centered(atoms)), space_group(atoms)
    atoms = atoms.copy()
    atoms.calc = calculator
    filtered: Any = FrechetCellFilter(atoms)
    optimizer = BFGS(filtered, logfile=None, maxstep=0.05)
    converged = bool(optimizer.run(fmax=fmax, steps=steps))
    return {
        "before": before,
        "after": space_group(atoms),
        "broken": operations.broken_by(centered(atoms)),
        "steps": optimizer.nsteps,
        "converged": converged,
        "volume": atoms.get_volume() / len(atoms),
    }


def relax_molecule(atoms: Atoms, calculator: Calculator, fmax: float, steps: int) -> tuple[Atoms, dict[str, Any]]:
    """Relax a molecule."""
    atoms = atoms.copy()
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None, maxstep=0.05)
    converged = bool(optimizer.run(fmax=fmax, steps=steps))
    return atoms, {"steps": optimizer.nsteps, "converged": converged}


def perfect_crystal(atoms: Atoms, calculator: Calculator) -> dict[str, Any]:
    """Forces and anisotropic stress of a crystal in which symmetry forbids both."""
    atoms = atoms.copy()
    atoms.calc = calculator
    stress = atoms.get_stress(voigt=False)
    anisotropic = stress - np.eye(3) * np.trace(stress) / 3.0
    return {
        "force": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
        "stress": float(np.abs(anisotropic).max() / units.GPa),
        "pressure": float(-np.trace(stress) / 3.0 / units.GPa),
    }


def phonons(
    atoms: Atoms, calculator: Calculator, repeat: int, points: dict[str, tuple[float, ...]], distance: float = 1e-3
) -> dict[str, list[float]]:
    """Frequencies (THz) at commensurate wave vectors, by finite displacements of all atoms without any symmetry."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, positions=atoms.positions)
    phonon = Phonopy(cell, supercell_matrix=np.eye(3, dtype=int) * repeat, primitive_matrix="P", is_symmetry=False)
    phonon.generate_displacements(distance=distance, is_plusminus=True, is_diagonal=False)
    images: Any = phonon.supercells_with_displacements
    forces = []
    for supercell in images:
        image = Atoms(supercell.symbols, cell=supercell.cell, positions=supercell.positions, pbc=True)
        image.calc = calculator
        forces.append(image.get_forces())
    phonon.forces = forces
    phonon.produce_force_constants()
    found = {}
    for name, q in points.items():
        phonon.run_qpoints([q])
        found[name] = [float(f) for f in np.sort(phonon.get_qpoints_dict()["frequencies"][0])]
    return found


def splitting(frequencies: list[float], sizes: tuple[int, ...]) -> float:
    """Largest difference (THz) inside sets of branches that symmetry makes one frequency.

    ``sizes`` counts the branches of each set, from the lowest; at the zone center they leave out the acoustic ones,
    whose frequencies are roots of rounding errors.
    """
    values = np.array(frequencies)
    if sum(sizes) == len(values) - 3:
        values = np.sort(values[np.sort(np.argsort(np.abs(values))[3:])])
    first = np.cumsum((0, *sizes))
    return max(float(np.ptp(values[a:b])) for a, b in itertools.pairwise(first))


def dynamics(
    atoms: Atoms, calculator: Calculator, step: float, n_steps: int, temperature: float, every: int, seed: int = 0
) -> dict[str, list[float]]:
    """NVE of one molecule: time (fs), angular momentum relative to the start, and total energy (eV)."""
    atoms = atoms.copy()
    thermalize_momenta(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    Stationary(atoms)
    atoms.calc = calculator
    integrator = VelocityVerlet(atoms, timestep=step * units.fs)
    rows: list[tuple[float, float, float]] = []
    start = atoms.get_angular_momentum()

    def record() -> None:
        change = np.linalg.norm(atoms.get_angular_momentum() - start) / np.linalg.norm(start)
        rows.append((integrator.nsteps * step, float(change), float(atoms.get_total_energy())))

    integrator.attach(record, interval=every)
    integrator.run(n_steps)
    time, change, energy = map(list, zip(*rows, strict=True))
    return {"time": time, "change": change, "energy": energy}


def bend(name: str, bond: float, angle: float) -> Atoms:
    """CO2 or C2H2 bent by an angle (degrees, 0 when straight; C2H2: trans), in a random orientation."""
    half = np.radians(angle) / 2.0
    if name == "CO2":
        arms = [[np.cos(half), -np.sin(half), 0.0], [-np.cos(half), -np.sin(half), 0.0]]
        return turned(Atoms("COO", positions=[[0.0, 0.0, 0.0], *(bond * np.array(arms))]), seed=3)
    hydrogen = 1.07 * np.array([np.cos(2 * half), np.sin(2 * half), 0.0])
    carbon = np.array([bond / 2.0, 0.0, 0.0])
    positions = [carbon, -carbon, carbon + hydrogen, -carbon - hydrogen]
    return turned(Atoms("CCHH", positions=positions), seed=3)


def through_the_line(name: str, bond: float, calculator: Calculator, angles: np.ndarray) -> dict[str, Any]:
    """Energies along a bend, and what would show that it is not smooth.

    * ``work``: largest difference, between neighboring angles, of the change of the energy and the work of the forces
      (Simpson's rule, eV): a jump of the energy anywhere on the path is in it.
    * ``force_jump``: largest change of forces (eV/angstrom) over steps of 1e-9 degrees at and around the straight
      geometry.
    * ``across``: largest force perpendicular to the axis of the straight molecule (eV/angstrom).
    """

    def evaluate(angle: float) -> tuple[float, np.ndarray, float]:
        atoms = bend(name, bond, angle)
        atoms.calc = calculator
        forces = atoms.get_forces()
        path = (bend(name, bond, angle + 1e-3).positions - bend(name, bond, angle - 1e-3).positions) / 2e-3
        return float(atoms.get_potential_energy()), forces, float(-(forces * path).sum())

    curve = [evaluate(float(angle)) for angle in angles]
    between = [evaluate(float(a + b) / 2.0) for a, b in itertools.pairwise(angles)]
    work = [
        abs(end[0] - start[0] - (b - a) * (start[2] + 4.0 * middle[2] + end[2]) / 6.0)
        for (a, b), (start, end), middle in zip(
            itertools.pairwise(angles), itertools.pairwise(curve), between, strict=True
        )
    ]
    tiny = 1e-9
    jumps = []
    for middle in (0.0, tiny, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 5.0):
        before, after = evaluate(middle - tiny / 2)[1], evaluate(middle + tiny / 2)[1]
        jumps.append(float(np.linalg.norm(after - before, axis=1).max()))
    straight = bend(name, bond, 0.0)
    axis = straight.positions[1] - straight.positions[0]
    axis /= np.linalg.norm(axis)
    forces = evaluate(0.0)[1]
    across = forces - np.outer(forces @ axis, axis)
    energies = np.array([point[0] for point in curve])
    return {
        "energy": list(energies - energies.min()),
        "work": float(max(work)),
        "force_jump": max(jumps),
        "across": float(np.linalg.norm(across, axis=1).max()),
    }


def bending_angle(atoms: Atoms) -> float:
    """How far CO2 (COO) or C2H2 (CCHH) is from straight (degrees)."""
    if len(atoms) == 3:
        return 180.0 - float(atoms.get_angle(1, 0, 2))
    return 180.0 - min(float(atoms.get_angle(1, 0, 2)), float(atoms.get_angle(0, 1, 3)))
