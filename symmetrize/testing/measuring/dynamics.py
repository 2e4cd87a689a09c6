"""Forces put to use: work around closed loops, and what a short trajectory at constant energy conserves.

A force field without an energy, or one whose energy is not that of its forces, does work on a closed loop, and its
trajectories heat up or cool down; one that is not rotationally invariant turns molecules that nothing turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import validate
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing.measuring.derivatives import take_rows
from symmetrize.testing.measuring.elements import copied, moved_to
from symmetrize.testing.measuring.orbits import where_finite
from symmetrize.testing.measuring.scales import Model
from symmetrize.testing.measuring.sites import forces_at


@dataclass(frozen=True)
class LoopWork:
    """Work around closed loops in the space of configurations.

    Attributes
    ----------
    work : Tensor of shape (n_loops, n_structures), float64
        Force times length; zero for conservative forces; inf where a force is not finite.
    scale : Tensor of shape (n_structures,), float64
        RMS over loops and points of :math:`F \\cdot dx/ds`, where s runs from 0 to 1 around a loop.
    uncertainty : Tensor of shape (n_loops, n_structures), float64
        Difference from the work by half as many points, an upper bound for the error of the quadrature.
    n_points : int
        On every loop, in the end.
    dtype : torch.dtype
        Of the positions.
    """

    work: Tensor
    scale: Tensor
    uncertainty: Tensor
    n_points: int
    dtype: torch.dtype

    @property
    def structures(self) -> Tensor:
        """Largest work of any loop over ``scale``, for each structure: Tensor of shape (n_structures,)."""
        return _ratio(self.work.abs().amax(dim=0), self.scale)

    @property
    def relative(self) -> float:
        """Largest of ``structures``; infinite where there are no forces at all."""
        return float(self.structures.max()) if self.work.numel() else math.inf

    @property
    def relative_uncertainty(self) -> float:
        """Largest ``uncertainty`` over ``scale``."""
        return float(_ratio(self.uncertainty.amax(dim=0), self.scale).max()) if self.work.numel() else math.inf

    def __str__(self) -> str:
        return (
            f"closed loops: work {self.relative:.3g} of the scale (quadrature: {self.relative_uncertainty:.1g} with "
            f"{self.n_points} points), worst in structure {int(self.structures.argmax())}"
        )


def measure_closed_loops(
    f: Model,
    batch: Data,
    *,
    forces: str = "forces",
    n_loops: int = 3,
    size: float = 0.1,
    n_points: int = 32,
    max_points: int = 256,
    generator: torch.Generator | None = None,
) -> LoopWork:
    r"""Work :math:`\oint F \cdot dx` of the forces around random closed loops; no energy is needed.

    The loops are :math:`x(s) = x + \sum_{k=1,2} (a_k \cos 2\pi k s + b_k \sin 2\pi k s)` with normal random vectors;
    the trapezoid rule converges faster than any power of the number of points as long as the forces are smooth.

    Parameters
    ----------
    f : callable
    batch : Data
        Lattice vectors stay as they are.
    forces : str
        Name of the output, (n_atoms, 3).
    n_loops : int
    size : float
        RMS displacement of an atom, in the unit of the positions.
    n_points, max_points : int
        On every loop: doubled from ``n_points`` (even, at least 4) on, as long as it stays within ``max_points`` and
        the last doubling has changed the work of some structure by more than 1e-8 (100 roundings) of ``scale``.
    generator : torch.Generator, optional
        Of the loops; seed 0 by default.

    Raises
    ------
    InvalidInputError
        Numbers out of range.
    BackboneOutputError
        No such forces.
    """
    if n_points < 4 or n_points % 2 or n_loops < 1 or not size > 0.0:
        raise InvalidInputError(
            f"measure_closed_loops: expected a positive size, loops, and an even number of at least 4 points, got "
            f"size={size}, n_loops={n_loops}, n_points={n_points}"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    structure, n_structures = batch[keys.BATCH].cpu(), batch[keys.PTR].shape[0] - 1
    coefficients = torch.randn((n_loops, 2, 2, *pos.shape), dtype=torch.float64, generator=generator)
    loops = [tuple(pair * (size / math.sqrt(6.0))) for pair in coefficients]
    waves = torch.arange(1, 3, dtype=torch.float64)

    def power(s: Tensor) -> Tensor:
        """F . dx/ds at some points of all loops: Tensor of shape (n_loops, n_points, n_structures)."""
        phase = 2.0 * math.pi * s[:, None] * waves
        cos, sin, turn = torch.cos(phase), torch.sin(phase), 2.0 * math.pi * waves
        moves = [torch.einsum("pk,knx->pnx", cos, a) + torch.einsum("pk,knx->pnx", sin, b) for a, b in loops]
        velocity = torch.cat(
            [torch.einsum("pk,knx->pnx", cos * turn, b) - torch.einsum("pk,knx->pnx", sin * turn, a) for a, b in loops]
        )
        values = forces_at(f, batch, pos + torch.cat(moves), forces)
        rows = (values * velocity).sum(dim=2).T
        return segment_sum(rows, structure, n_structures).T.reshape(n_loops, len(s), n_structures)

    values = power(torch.arange(n_points, dtype=torch.float64) / n_points)
    target = max(1e-8, 100 * torch.finfo(batch[keys.POS].dtype).eps)
    while True:
        work, half = values.mean(dim=1), values[:, ::2].mean(dim=1)
        scale = values.square().mean(dim=(0, 1)).sqrt()
        settled = bool(((work - half).abs() <= target * scale).all())
        if settled or 2 * values.shape[1] > max_points or not bool(torch.isfinite(values).all()):
            break
        between = power((torch.arange(values.shape[1], dtype=torch.float64) + 0.5) / values.shape[1])
        values = torch.stack([values, between], dim=2).flatten(1, 2)
    return LoopWork(where_finite(work), scale, where_finite(work - half).abs(), values.shape[1], batch[keys.POS].dtype)


# --- constant energy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dynamics:
    """What a trajectory at constant energy conserves, for each structure; inf where a value is not finite.

    How to judge: conservative, smooth forces have an energy error of order dt^2, so ``orders`` are near 2 and
    ``extrapolated`` is far below ``fluctuation``; forces that are not conservative have an error that does not depend
    on dt, order 0, and ``extrapolated`` shows it. Where ``fluctuation[1]`` is not well above ``floor``, rounding is
    what is seen, and the order means nothing (energies in float32, and large ones in particular). Momentum and angular
    momentum are conserved by the integrator to rounding, whatever the time step, if the energy is invariant under
    translations and rotations.

    Attributes
    ----------
    time_step, duration : Tensor of shape (n_structures,), float64
        The longer time step, chosen for each structure, and the time of the whole run.
    kinetic : Tensor of shape (n_structures,), float64
        Mean kinetic energy, which the following are relative to.
    fluctuation : Tensor of shape (2, n_structures), float64
        RMS deviation of the total energy from its mean, at dt and at dt / 2.
    drift : Tensor of shape (2, n_structures), float64
        Slope of the total energy (least squares) times the duration, at dt and at dt / 2.
    extrapolated : Tensor of shape (n_structures,), float64
        RMS over time of the change of energy extrapolated to dt = 0: what does not come from the time step.
    floor : Tensor of shape (n_structures,), float64
        Estimate of the rounding of the energy, of positions as they enter it included.
    momentum : Tensor of shape (n_structures,), float64
        Largest change of the total momentum, relative to the root of the sum of squares of the momenta.
    angular_momentum : Tensor of shape (n_structures,), float64
        Largest change of the angular momentum about the center of mass, relative to the root of the sum of squares
        of the atoms' own; NaN for periodic structures, where it is not conserved.
    dtype : torch.dtype
        Of the positions.
    """

    time_step: Tensor
    duration: Tensor
    kinetic: Tensor
    fluctuation: Tensor
    drift: Tensor
    extrapolated: Tensor
    floor: Tensor
    momentum: Tensor
    angular_momentum: Tensor
    dtype: torch.dtype

    @property
    def orders(self) -> Tensor:
        """log2 of the ratio of the two fluctuations; NaN where it is not defined: Tensor of shape (n_structures,)."""
        return torch.log2(self.fluctuation[0] / self.fluctuation[1])

    @property
    def order(self) -> float:
        """Smallest of the orders of the structures whose energy error is ten times the floor; NaN without any."""
        orders = self.orders[~(self.fluctuation[1] <= 10.0 * self.floor)]
        if not orders.numel():
            return math.nan
        return float(torch.where(torch.isfinite(orders), orders, torch.full_like(orders, -math.inf)).min())

    @property
    def relative(self) -> float:
        """Largest ``extrapolated`` error of the energy."""
        return _largest(self.extrapolated)

    @property
    def relative_drift(self) -> float:
        """Largest drift at dt / 2, in either direction."""
        return _largest(self.drift[1].abs())

    @property
    def relative_momentum(self) -> float:
        """Largest change of momentum."""
        return _largest(self.momentum)

    @property
    def relative_angular_momentum(self) -> float:
        """Largest change of angular momentum of a finite structure; NaN without any."""
        finite = self.angular_momentum[~torch.isnan(self.angular_momentum)]
        return float(finite.max()) if finite.numel() else math.nan

    def __str__(self) -> str:
        return (
            f"constant energy: fluctuation {_largest(self.fluctuation[0]):.3g} and {_largest(self.fluctuation[1]):.3g} "
            f"of the kinetic energy at dt and dt/2 (order {self.order:.2f}, floor {_largest(self.floor):.1g}), drift "
            f"{self.relative_drift:.3g}, extrapolated {self.relative:.3g}, momentum {self.relative_momentum:.3g}, "
            f"angular momentum {self.relative_angular_momentum:.3g}"
        )


def measure_nve(
    f: Model,
    batch: Data,
    *,
    energy: str = "energy",
    forces: str = "forces",
    n_steps: int = 100,
    excursion: float = 0.03,
    masses: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Dynamics:
    r"""Conservation of energy, momentum and angular momentum in short trajectories of all structures at once.

    Velocity Verlet with a time step of :math:`0.15 / \omega`, where :math:`\omega^2` is the largest curvature that a
    power iteration with differences of the forces finds, and with half of it over the same time. Initial velocities
    are random, without total momentum, and such that the stiffest mode swings by ``excursion``; a run in which atoms
    would move by more than ten times that (a structure far from equilibrium) is shortened, with as many steps. No unit
    of energy, mass or time enters. The integrator is symplectic and of second order, and keeps
    linear and quadratic invariants such as momentum and angular momentum: E. Hairer, C. Lubich, G. Wanner, Geometric
    numerical integration illustrated by the Stoermer-Verlet method, Acta Numerica 12, 399 (2003).

    Parameters
    ----------
    f : callable
        Returns energies (n_structures,) and forces (n_atoms, 3).
    batch : Data
        Structures of at least two atoms; neighbor lists are built anew in every step where there is one.
    n_steps : int
        Of the longer time step; at least 4.
    excursion : float
        RMS displacement in the unit of the positions.
    masses : Tensor of shape (n_atoms,), optional
        By default all 1.
    generator : torch.Generator, optional
        Of velocities and start vectors; seed 0 by default.

    Raises
    ------
    InvalidInputError
        A structure of one atom, or numbers out of range.
    BackboneOutputError
        Energies or forces are missing or of another shape.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    if n_steps < 4 or not excursion > 0.0:
        raise InvalidInputError(
            f"measure_nve: expected n_steps >= 4 and a positive excursion, got {n_steps} and {excursion}"
        )
    if bool((batch[keys.PTR].diff() < 2).any()):
        single = int((batch[keys.PTR].diff() < 2).nonzero()[0])
        raise InvalidInputError(f"measure_nve: expected two or more atoms, structure {single} has one")
    n_atoms = len(batch[keys.POS])
    mass = torch.ones(n_atoms, dtype=torch.float64) if masses is None else masses.to("cpu", torch.float64)
    if mass.shape != (n_atoms,) or not bool((mass > 0.0).all()):
        raise InvalidInputError(f"masses: expected {n_atoms} positive numbers, got shape {tuple(mass.shape)}")
    system = _System(f, batch, energy, forces, mass)
    omega = system.stiffness(generator)
    known = torch.isfinite(omega) & (omega > 0.0)
    omega = torch.where(known, omega, torch.ones_like(omega))
    velocity = torch.randn(n_atoms, 3, dtype=torch.float64, generator=generator) / mass.sqrt()[:, None]
    velocity = velocity - (system.sum(mass[:, None] * velocity) / system.sum(mass)[:, None])[system.structure]
    # Mass-weighted, so that with equal masses the RMS displacement of an atom in the stiffest mode is the excursion.
    speed = (system.sum((mass[:, None] * velocity.square()).sum(dim=1)) / system.sum(mass)).sqrt()
    # Without forces nothing moves, no kinetic energy is there to compare with, and nothing passes.
    factor = torch.where(known & (speed > 0.0), excursion * omega / speed, torch.zeros_like(speed))
    velocity = velocity * factor[system.structure][:, None]
    # A trial run tells when atoms have gone ten times the excursion, and how stiff it is there.
    end, duration = system.explore(velocity, 0.15 / omega, n_steps, 10.0 * excursion)
    elsewhere = system.stiffness(generator, end)
    omega = torch.where(torch.isfinite(elsewhere), torch.maximum(omega, elsewhere), omega)
    step = torch.minimum(0.15 / omega, duration / n_steps)
    coarse, fine = system.run(velocity, step, n_steps, 1), system.run(velocity, 0.5 * step, 2 * n_steps, 2)
    kinetic = 0.5 * (coarse.kinetic + fine.kinetic)

    def relative(x: Tensor) -> Tensor:
        return _ratio(where_finite(x), kinetic)

    change = (4.0 * (fine.energies - fine.energies[0]) - (coarse.energies - coarse.energies[0])) / 3.0
    return Dynamics(
        step,
        n_steps * step,
        kinetic,
        torch.stack([relative(_spread(run.energies)) for run in (coarse, fine)]),
        torch.stack([relative(_slope(run.energies)) for run in (coarse, fine)]),
        relative(change[1:].square().mean(dim=0).sqrt()),
        relative(torch.maximum(coarse.rounding, fine.rounding)),
        where_finite(torch.maximum(coarse.momentum, fine.momentum)),
        torch.where(
            batch[keys.PBC].any(dim=1).cpu(),
            torch.full_like(kinetic, math.nan),
            where_finite(torch.maximum(coarse.angular_momentum, fine.angular_momentum)),
        ),
        batch[keys.POS].dtype,
    )


class _State(NamedTuple):
    pos: Tensor
    velocity: Tensor
    potential: Tensor
    force: Tensor
    eps: float


@dataclass(frozen=True)
class _Run:
    energies: Tensor  # (n_samples, n_structures), total
    kinetic: Tensor  # (n_structures,), mean
    momentum: Tensor  # (n_structures,), relative
    angular_momentum: Tensor  # (n_structures,), relative
    rounding: Tensor  # (n_structures,), of the energy


class _System:
    """Structures, their masses, and a model that moves them. Positions are kept in float64 and rounded for the model
    only."""

    def __init__(self, f: Model, batch: Batch, energy: str, forces: str, mass: Tensor) -> None:
        self.f, self.batch, self.energy, self.forces, self.mass = f, batch, energy, forces, mass
        self.structure = batch[keys.BATCH].cpu()
        self.n_structures = batch[keys.PTR].shape[0] - 1
        self.start = batch[keys.POS].detach().to("cpu", torch.float64)

    def sum(self, values: Tensor) -> Tensor:
        return segment_sum(values, self.structure, self.n_structures)

    def evaluate(self, pos: Tensor) -> tuple[Tensor, Tensor, float]:
        """Energies, forces, and the epsilon of the coarser of the dtypes of energies and positions."""
        result = self.f(copied(moved_to(self.batch, pos.to(self.batch[keys.POS].device))))
        energies = take_rows(result, self.energy, (self.n_structures,))
        coarsest = max(torch.finfo(x.dtype).eps for x in (result[self.energy], self.batch[keys.POS]))
        return energies, take_rows(result, self.forces, tuple(pos.shape)), coarsest

    def stiffness(self, generator: torch.Generator, pos: Tensor | None = None, n_iterations: int = 8) -> Tensor:
        """Largest frequency: root of the largest curvature (of either sign) of each structure."""
        pos = self.start if pos is None else pos
        h = 1e-3 if self.batch[keys.POS].dtype == torch.float64 else 2e-2
        root = self.mass.sqrt()[:, None]
        # Such that an atom moves by about h.
        length = h * float(root.mean()) * torch.bincount(self.structure).to(torch.float64).sqrt()
        length = length[self.structure][:, None]
        direction = torch.randn(pos.shape, dtype=torch.float64, generator=generator)
        largest = torch.zeros(self.n_structures, dtype=torch.float64)
        for _ in range(n_iterations):
            size = self.sum(direction.square().sum(dim=1)).sqrt()
            size = torch.where(torch.isfinite(size) & (size > 0.0), size, torch.ones_like(size))
            direction = torch.nan_to_num(direction / size[self.structure][:, None])
            plus, minus = (self.evaluate(pos + s * length * direction / root)[1] for s in (1.0, -1.0))
            direction = (minus - plus) / (2.0 * length * root)
            largest = torch.maximum(largest, self.sum(direction.square().sum(dim=1)).sqrt())
        return largest.sqrt()

    def trajectory(self, velocity: Tensor, step: Tensor, n_steps: int) -> Iterator[_State]:
        """Velocity Verlet from the given structures, the initial state first; ends where something is not finite."""
        dt, mass, pos = step[self.structure][:, None], self.mass[:, None], self.start
        potential, force, eps = self.evaluate(pos)
        yield _State(pos, velocity, potential, force, eps)
        for _ in range(n_steps):
            velocity = velocity + 0.5 * dt * force / mass
            pos = pos + dt * velocity
            if not bool(torch.isfinite(pos).all()):
                return
            potential, force, eps = self.evaluate(pos)
            velocity = velocity + 0.5 * dt * force / mass
            yield _State(pos, velocity, potential, force, eps)

    def explore(self, velocity: Tensor, step: Tensor, n_steps: int, limit: float) -> tuple[Tensor, Tensor]:
        """Positions of every structure before its RMS displacement exceeds ``limit``, and the time of that."""
        end, duration, count = self.start, step, self.sum(torch.ones_like(self.mass))
        inside = torch.ones_like(step, dtype=torch.bool)
        for n, state in enumerate(self.trajectory(velocity, step, n_steps)):
            away = (self.sum((state.pos - self.start).square().sum(dim=1)) / count).sqrt()
            inside = inside & (away <= limit)
            if not bool(inside.any()):
                break
            end = torch.where(inside[self.structure][:, None], state.pos, end)
            duration = torch.where(inside, max(n, 1) * step, duration)
        return end, duration

    def run(self, velocity: Tensor, step: Tensor, n_steps: int, every: int) -> _Run:
        """What is conserved; energies of every so many steps."""
        energies, kinetics, totals, turns, sizes, arms, rounding = [], [], [], [], [], [], []
        for n, (pos, v, potential, force, eps) in enumerate(self.trajectory(velocity, step, n_steps)):
            momenta = self.mass[:, None] * v
            kinetic = 0.5 * self.sum((momenta * v).sum(dim=1))
            if n % every == 0:
                energies.append(potential + kinetic)
                kinetics.append(kinetic)
            center = self.sum(self.mass[:, None] * pos) / self.sum(self.mass)[:, None]
            own = torch.linalg.cross(pos - center[self.structure], momenta)
            totals.append(self.sum(momenta))
            turns.append(self.sum(own))
            sizes.append(self.sum(momenta.square().sum(dim=1)).sqrt())
            arms.append(self.sum(own.square().sum(dim=1)).sqrt())
            rounding.append(eps * (potential.abs() + self.sum((force * pos).square().sum(dim=1)).sqrt()))
        if len(totals) <= n_steps:
            nan = torch.full_like(step, math.nan)
            return _Run(nan.expand(n_steps // every + 1, -1), nan, nan, nan, nan)

        def change(values: list[Tensor], size: list[Tensor]) -> Tensor:
            stacked = torch.stack(values)
            largest = (stacked - stacked[0]).norm(dim=2).amax(dim=0)
            return _ratio(largest, torch.stack(size).square().mean(dim=0).sqrt())

        return _Run(
            torch.stack(energies),
            torch.stack(kinetics).mean(dim=0),
            change(totals, sizes),
            change(turns, arms),
            torch.stack(rounding).amax(dim=0),
        )


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale; infinite where x is not finite, or the scale is 0 or not finite."""
    usable = torch.isfinite(scale) & (scale > 0.0) & torch.isfinite(x)
    return torch.where(usable, x / torch.where(usable, scale, torch.ones_like(scale)), torch.full_like(x, math.inf))


def _largest(x: Tensor) -> float:
    return float(where_finite(x).max()) if x.numel() else math.inf


def _spread(energies: Tensor) -> Tensor:
    return (energies - energies.mean(dim=0)).square().mean(dim=0).sqrt()


def _slope(energies: Tensor) -> Tensor:
    """Least-squares slope over the whole run times its length."""
    t = torch.linspace(-0.5, 0.5, len(energies), dtype=torch.float64)
    return torch.einsum("t,ts->s", t, energies - energies.mean(dim=0)) / t.square().sum().clamp(min=1e-300)
