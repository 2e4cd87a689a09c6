"""Are forces and stress what the energy says?"""

from __future__ import annotations

import math

import torch

from symmetrize import keys
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing.measuring.derivatives import DerivativeError, measure_forces_fd, measure_hessian_symmetry
from symmetrize.testing.measuring.dynamics import measure_closed_loops, measure_nve
from symmetrize.testing.measuring.elements import copied
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome
from symmetrize.testing.structures.sets import StructureSet

#: Finite differences with one Richardson step in float64 are this good where the function is smooth.
_LIMIT = 1e-6


def _forces(bench: Bench) -> str:
    if "forces" not in bench.subject.outputs:
        return "no output called forces"
    return _two_atoms(bench)


def _energy(bench: Bench) -> str:
    return _forces(bench) or ("" if bench.subject.energy is not None else "no energy that the forces belong to")


def _two_atoms(bench: Bench) -> str:
    return "" if bool((bench.main.batch[keys.PTR].diff() > 1).any()) else "no structure of two or more atoms"


def _stress(bench: Bench) -> str:
    if "stress" not in bench.subject.periodic_outputs:
        return "no output called stress"
    if bench.periodic() is None:
        return "no structure that is periodic in three directions"
    return _energy(bench)


def few(bench: Bench, n: int = 3, n_atoms: int = 1) -> StructureSet:
    """The first structures of the main set of so many atoms: derivatives are expensive where there is no batching."""
    counts = bench.main.batch[keys.PTR].diff().tolist()
    return bench.part(bench.main, [k for k, count in enumerate(counts) if count >= n_atoms][:n])


def moving(bench: Bench, n: int = 3) -> StructureSet:
    """The first structures of two or more atoms in which there are forces worth mentioning; any, if there are none."""
    batch = bench.main.batch
    forces = bench.model(copied(batch))["forces"].detach().to("cpu", torch.float64)
    n_structures = batch[keys.PTR].shape[0] - 1
    squares = segment_sum(forces.square().sum(dim=1), batch[keys.BATCH].cpu(), n_structures)
    counts = batch[keys.PTR].diff().cpu()
    chosen = ((counts > 1) & (squares > 1e-12 * squares.max())).nonzero()[:, 0].tolist()
    return bench.part(bench.main, chosen[:n]) if chosen else few(bench, n, n_atoms=2)


def _finding(found: DerivativeError, dtype: torch.dtype, names: tuple[str, ...]) -> Finding:
    # What the finite differences cannot resolve is not held against the model, up to a point.
    cap = 1e-3 if dtype == torch.float64 else 5e-2
    limit = min(max(_LIMIT, 20.0 * found.uncertainty), cap)
    where = int(found.errors.amax(dim=0).argmax()) if found.errors.numel() else 0
    worst = f"{names[where]}; finite differences good to {found.uncertainty:.1g}"
    return Finding(found.name, found.relative, limit, scale=found.scale, worst=worst)


@check(
    "Forces are the gradient of the energy",
    claim="conservation",
    cost=lambda bench, on: (1 + 6 * bench.profile.n_directions) * 3,
    needs=_energy,
)
def check_forces_are_gradient(bench: Bench, on: str) -> Outcome:
    """Forces equal minus the derivative of the energy with respect to the positions.

    When it fails: part of the gradient is missing (detached weights or distances, a no_grad block, an in-place edit);
    forces are a direct output of the network; forces have the sign or the unit of something else.

    Number: |E'(finite differences along a random direction v) + F . v| / sqrt(3 n_atoms), over the RMS force. Central
    differences with one step of Richardson extrapolation.
    """
    bench = bench.double()
    found, generator = few(bench, n_atoms=2), bench.generator("forces")
    measured = measure_forces_fd(
        bench.model,
        found.batch,
        energy=bench.subject.energy or "energy",
        n_directions=bench.profile.n_directions,
        generator=generator,
    )
    return Outcome((_finding(measured["forces"], bench.subject.dtype, found.names),), seed=generator.initial_seed())


@check(
    "Stress is the strain derivative of the energy",
    claim="conservation",
    cost=lambda bench, on: (1 + 6 * bench.profile.n_directions) * 6,
    needs=_stress,
)
def check_stress_is_gradient(bench: Bench, on: str) -> Outcome:
    """Stress equals the derivative of the energy with respect to a strain of the cell, over the volume, and is
    symmetric.

    When it fails: the cell is not strained with the positions; the virial lacks a part; the volume is that of another
    cell; only one triangle of the tensor is filled in.

    Number: as for forces, along random symmetric strains, over the RMS stress; the antisymmetric part is an error in
    itself.
    """
    bench = bench.double()
    found = bench.periodic()
    if found is None:  # cannot happen: `needs` says so
        return Outcome(())
    found, generator = bench.part(found, range(min(3, found.n_structures))), bench.generator("stress")
    measured = measure_forces_fd(
        bench.model,
        found.batch,
        energy=bench.subject.energy or "energy",
        stress=True,
        n_directions=bench.profile.n_directions,
        generator=generator,
    )
    return Outcome((_finding(measured["stress"], bench.subject.dtype, found.names),), seed=generator.initial_seed())


@check(
    "Forces have no curl",
    claim="conservation",
    cost=lambda bench, on: 3 * 12 * max(2, bench.profile.n_directions // 2),
    needs=_forces,
)
def check_hessian_symmetry(bench: Bench, on: str) -> Outcome:
    """The derivative of the forces is a symmetric matrix: they are the gradient of something.

    When it fails: forces are predicted directly, or averaged over frames without the derivatives of the weights.

    Number: |w . H v - v . H w| / sqrt(3 n_atoms) for random directions v and w, over the RMS of H v.
    """
    bench = bench.double()
    found, generator = few(bench, n_atoms=2), bench.generator("hessian")
    measured = measure_hessian_symmetry(
        bench.model, found.batch, n_pairs=max(2, bench.profile.n_directions // 2), generator=generator
    )
    return Outcome((_finding(measured, bench.subject.dtype, found.names),), seed=generator.initial_seed())


def _n_loops(bench: Bench) -> int:
    return 1 if bench.profile.n_directions < 5 else 3


@check(
    "No work around closed loops",
    claim="conservation",
    cost=lambda bench, on: 3 * 64 * _n_loops(bench),
    needs=_forces,
)
def check_closed_loops(bench: Bench, on: str) -> Outcome:
    """Moving the atoms around a closed loop takes no work: no energy can be gained by going in circles.

    When it fails: the forces are not the gradient of any energy; in dynamics, temperature drifts.

    Number: the integral of F . dx around random smooth loops of 0.1 (unit of the positions), over the RMS along the
    loop of the power F . dx/ds. Trapezoid rule, which converges exponentially for periodic functions.
    """
    bench = bench.double()
    found, generator = moving(bench), bench.generator("loops")
    measured = measure_closed_loops(bench.model, found.batch, n_loops=_n_loops(bench), generator=generator)
    # Where forces jump, the quadrature converges slowly, which is the business of the checks of smoothness.
    limit = min(max(_LIMIT, 20.0 * measured.relative_uncertainty), 5e-2)
    worst = f"{found.names[int(measured.structures.argmax())]}; quadrature good to {measured.relative_uncertainty:.1g}"
    finding = Finding("work", measured.relative, limit, unit="of the power along the loop", worst=worst)
    return Outcome((finding,), seed=generator.initial_seed())


@check(
    "Energy conservation in dynamics",
    claim="conservation",
    cost=lambda bench, on: 3 * (4 * bench.profile.n_steps + 60),
    needs=_energy,
)
def check_energy_conservation(bench: Bench, on: str) -> Outcome:
    """In a short run at constant energy, the error of the total energy is that of the time step and of nothing else.

    When it fails: forces are not the gradient of the energy, or jump. Angular momentum that is not conserved shows
    that the energy depends on orientation (judged where rotations are claimed).

    Number: change of the total energy, extrapolated from two time steps to zero, over the kinetic energy; largest
    change of momentum and angular momentum over those of the atoms. Velocity Verlet, whose error is of second order
    (Hairer, Lubich and Wanner 2003).
    """
    bench = bench.double()
    found, generator, subject = moving(bench), bench.generator("dynamics"), bench.subject
    measured = measure_nve(
        bench.model,
        found.batch,
        energy=subject.energy or "energy",
        n_steps=bench.profile.n_steps,
        generator=generator,
    )
    # Two time steps leave the next order, a fraction of the fluctuation: of each structure's own. What does not come
    # from the time step is as large as the fluctuation or larger.
    limits = torch.maximum(0.5 * measured.fluctuation[0], 100.0 * measured.floor).clamp(min=1e-6)
    excess = measured.extrapolated / limits
    structure = int(torch.where(torch.isfinite(excess), excess, torch.full_like(excess, math.inf)).argmax())
    fluctuation, limit = float(measured.fluctuation[0, structure]), float(limits[structure])
    loose = 1e-8 if subject.dtype == torch.float64 else 1e-3
    worst = f"{found.names[structure]}, fluctuation {fluctuation:.1g} at the longer step, order {measured.order:.2f}"
    out = [
        Finding(
            "energy, extrapolated to no time step", measured.relative, limit, unit="of the kinetic energy", worst=worst
        )
    ]
    if "translation" in subject.claims:
        out.append(Finding("momentum", measured.relative_momentum, loose, unit="of the atoms' own"))
    angular = measured.relative_angular_momentum
    if angular == angular:
        claimed = "rotations" in subject.claims
        allowed = max(loose, 1e3 * (subject.tolerance or 0.0)) if claimed else None
        out.append(Finding("angular momentum", angular, allowed, unit="of the atoms' own"))
    return Outcome(tuple(out), seed=generator.initial_seed())
