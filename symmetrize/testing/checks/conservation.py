"""Are forces and stress what the energy says?"""

from __future__ import annotations

import torch

from symmetrize.testing.bench import Bench
from symmetrize.testing.catalog import check
from symmetrize.testing.derivatives import DerivativeError, measure_forces_fd, measure_hessian_symmetry
from symmetrize.testing.outcome import Finding, Outcome
from symmetrize.testing.structures import StructureSet

#: Finite differences with one Richardson step in float64 are this good where the function is smooth.
_LIMIT = 1e-6


def _forces(bench: Bench) -> str:
    if "forces" not in bench.subject.outputs:
        return "no output called forces"
    return ""


def _energy(bench: Bench) -> str:
    return _forces(bench) or ("" if bench.subject.energy is not None else "no energy that the forces belong to")


def _stress(bench: Bench) -> str:
    if "stress" not in bench.subject.periodic_outputs:
        return "no output called stress"
    if bench.periodic() is None:
        return "no structure that is periodic in three directions"
    return _energy(bench)


def few(bench: Bench, n: int = 3) -> StructureSet:
    """The first structures of the main set: derivatives are expensive where there is no batching."""
    return bench.part(bench.main, range(min(n, bench.main.n_structures)))


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
    found, generator = few(bench), bench.generator("forces")
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
    """Stress equals the derivative of the energy with respect to a strain of the cell, over the volume, and is symmetric.

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
    found, generator = few(bench), bench.generator("hessian")
    measured = measure_hessian_symmetry(
        bench.model, found.batch, n_pairs=max(2, bench.profile.n_directions // 2), generator=generator
    )
    return Outcome((_finding(measured, bench.subject.dtype, found.names),), seed=generator.initial_seed())
