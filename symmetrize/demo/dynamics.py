"""Molecular dynamics at constant energy, bare and symmetrised, from the same start."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.demo.results import Dynamics, Trajectory
from symmetrize.demo.subjects import ALL, BARE, Subject

TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K, of the initial velocities
N_SAMPLES = 500

#: hbar in ASE's units, A sqrt(amu eV).
HBAR = units._hbar * units.J * units.s


def run_dynamics(
    subject: Subject, atoms: Atoms, structure: int, n_steps: int, seed: int, tick: Callable[[], None]
) -> Dynamics:
    """NVE runs of ``n_steps`` steps: Maxwell-Boltzmann velocities without total momentum, but with their rotation."""
    start = atoms.copy()
    masses = start.get_masses()[:, None]
    # Written out: ASE's function for it has changed its name between the versions that we support.
    momenta = np.random.default_rng(seed).standard_normal((len(start), 3)) * np.sqrt(masses * units.kB * TEMPERATURE)
    start.set_momenta(momenta - masses * momenta.sum(axis=0) / masses.sum())
    trajectories = [_run(subject, treatment, start.copy(), n_steps, tick) for treatment in (BARE, ALL)]
    return Dynamics(subject.label, structure, TIMESTEP, TEMPERATURE, trajectories)


def _run(subject: Subject, treatment: str, atoms: Atoms, n_steps: int, tick: Callable[[], None]) -> Trajectory:
    atoms.calc = SymmetrizerCalculator(subject.model(treatment))
    samples: list[tuple[float, float, np.ndarray, float]] = []
    dynamics = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
    stride = max(1, n_steps // N_SAMPLES)

    def record() -> None:
        step = dynamics.get_number_of_steps()
        if step:
            tick()
        if step % stride == 0:
            energy = atoms.get_potential_energy() + atoms.get_kinetic_energy()
            samples.append((step * TIMESTEP, energy, atoms.get_angular_momentum() / HBAR, atoms.get_temperature()))

    dynamics.attach(record, interval=1)
    dynamics.run(n_steps)
    time, energy, momentum, temperature = (np.array(column) for column in zip(*samples, strict=True))
    return Trajectory(treatment, time, (energy - energy[0]) * 1000.0, momentum, temperature)
