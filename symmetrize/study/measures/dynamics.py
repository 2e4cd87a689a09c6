"""What short trajectories at constant energy conserve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.data import from_ase
from symmetrize.study.measures.common import generator_of, size_of, subject_of, without_baseline
from symmetrize.study.prepared import PreparedCell
from symmetrize.testing import Subject, measure_forces_fd, measure_nve

TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K, of the initial velocities

#: hbar in ASE's units, A sqrt(amu eV).
_HBAR = units._hbar * units.J * units.s

#: Samples of a trajectory that are kept.
_KEPT = 200


def dynamics(cell: PreparedCell) -> dict[str, Any]:
    r"""Energy and angular momentum in molecular dynamics at constant energy, and whether forces are a gradient at all.

    Velocity Verlet with steps of 0.5 fs from the first structure of two or more atoms, with Maxwell-Boltzmann
    velocities of 300 K, the same for all methods. Stochastic methods draw what is a function of the structure. In a
    short trajectory the drift is that of a few vibrations; ``"extrapolated"`` takes the error of the integrator out of
    it (`symmetrize.testing.measure_nve`), and ``"forces"`` needs no trajectory.

    Returns
    -------
    dict
        ``"energy_drift"`` (meV/atom/ps, least squares), ``"energy_rms"`` (meV/atom, about the drift),
        ``"angular_momentum"`` (largest change, in hbar; NaN for periodic structures), ``"series"``: ``{"t"`` (fs),
        ``"energy"`` (meV, relative to the start), ``"angular_momentum"`` (change, hbar)``}``, ``"extrapolated"``: RMS
        change of the energy over the kinetic energy, extrapolated to steps of zero; ``"forces"``: largest difference
        between forces and finite differences of the energy, over the RMS force. In the float precision of the cell,
        but for the last two.
    """
    if cell.energy is None or "forces" in cell.outputs:
        return {"skipped": "the backbone has no energy that forces derive from"}
    start = next((atoms for atoms in cell.structures if len(atoms) > 1), None)
    if start is None:
        return {"skipped": "no structure has two or more atoms"}
    found = _trajectory(cell, start)
    subject = subject_of(cell, cell.model, torch.float64)
    return {**found, **_without_time_step(cell, subject, start)}


def _trajectory(cell: PreparedCell, start: Atoms) -> dict[str, Any]:
    atoms = start.copy()
    masses = atoms.get_masses()[:, None]
    # Written out: ASE's function for it has changed its name between the versions that we support.
    momenta = np.random.default_rng(cell.seed).standard_normal((len(atoms), 3))
    momenta *= np.sqrt(masses * units.kB * TEMPERATURE)
    atoms.set_momenta(momenta - masses * momenta.sum(axis=0) / masses.sum())
    atoms.calc = SymmetrizerCalculator(without_baseline(cell.model), energy=cell.energy or "energy")
    n_steps = max(2, size_of(cell, "steps"))
    stride = max(1, math.ceil(n_steps / (_KEPT - 1)))
    run = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
    energies, turning = [], []

    def record() -> None:
        energies.append(atoms.get_potential_energy() + atoms.get_kinetic_energy())
        turning.append(atoms.get_angular_momentum() / _HBAR)

    run.attach(record, interval=1)
    run.run(n_steps)
    t = TIMESTEP * np.arange(len(energies))
    energy = 1000.0 * (np.array(energies) - energies[0])
    change = np.linalg.norm(np.array(turning) - turning[0], axis=1)
    if atoms.pbc.any():
        change = np.full(len(change), math.nan)  # images pull at each other
    drift, offset = np.polyfit(t, energy, 1) if np.isfinite(energy).all() else (math.nan, math.nan)
    kept = slice(None, None, stride)
    return {
        "energy_drift": float(drift) * 1000.0 / len(atoms),
        "energy_rms": float(np.sqrt(np.mean((energy - drift * t - offset) ** 2))) / len(atoms),
        "angular_momentum": float(change.max()),
        "series": {"t": t[kept].tolist(), "energy": energy[kept].tolist(), "angular_momentum": change[kept].tolist()},
        "steps": n_steps,
    }


def _without_time_step(cell: PreparedCell, subject: Subject, start: Atoms) -> dict[str, Any]:
    energy = cell.energy or "energy"
    batch = subject.prepare(from_ase([start], dtype=torch.float64))
    found: dict[str, Any] = {}
    if size_of(cell, "directions"):
        forces = measure_forces_fd(
            subject.model,
            batch,
            energy=energy,
            n_directions=size_of(cell, "directions"),
            generator=generator_of(cell),
        )
        found["forces"] = forces["forces"].relative
    if size_of(cell, "nve_steps"):
        masses = torch.as_tensor(start.get_masses(), dtype=torch.float64)
        nve = measure_nve(
            subject.model,
            batch,
            energy=energy,
            n_steps=max(4, size_of(cell, "nve_steps")),
            masses=masses,
            generator=generator_of(cell),
        )
        found["extrapolated"] = nve.relative
    return found
