"""Accuracy, cost and symmetry errors of one model on a set of structures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import from_ase
from symmetrize.demo.results import FrameCounts, SymmetryError
from symmetrize.demo.subjects import ROTATIONS, Subject
from symmetrize.errors import InvalidInputError
from symmetrize.frames import NEGLIGIBLE_WEIGHT, Stratum
from symmetrize.ops.ragged import segment_sum
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing import Deviation, Element, declared, measure_equivariance

#: eV to meV.
MILLI = 1000.0

#: Evaluations that are timed.
REPEATS = 2


@dataclass(frozen=True)
class Reference:
    """Structures with what a model should give for them.

    Attributes
    ----------
    structures : list of Atoms
    energy : Tensor of shape (n_structures,)
        eV.
    forces : Tensor of shape (n_atoms, 3)
        eV/A.
    energy_scale, force_scale : float
        Common error scales: RMS of the energy minus its composition baseline (eV), RMS force component (eV/A).
    """

    structures: list[Atoms]
    energy: Tensor
    forces: Tensor
    energy_scale: float
    force_scale: float


def reference(structures: Sequence[Atoms]) -> Reference:
    """Collect reference energies and forces.

    Raises
    ------
    InvalidInputError
        If a structure has none, or if all energies are the same.
    """
    items = list(structures)
    for n, atoms in enumerate(items):
        found = {} if atoms.calc is None else atoms.calc.results
        for name in ("energy", "forces"):
            if name not in found or not np.isfinite(found[name]).all():
                raise InvalidInputError(f"structure {n}: expected a finite reference {name!r}, got {sorted(found)}")
    energy = torch.tensor([atoms.get_potential_energy() for atoms in items], dtype=torch.float64)
    forces = torch.cat([torch.as_tensor(atoms.get_forces(), dtype=torch.float64) for atoms in items])
    species = sorted({int(z) for atoms in items for z in atoms.numbers})
    counts = torch.tensor([[int((atoms.numbers == z).sum()) for z in species] for atoms in items], dtype=torch.float64)
    residual = energy - counts @ torch.linalg.lstsq(counts, energy, driver="gelsd").solution
    free = max(1, len(items) - int(torch.linalg.matrix_rank(counts)))
    scale = float((residual.square().sum() / free).sqrt())
    if not scale > 1e-9:
        raise InvalidInputError(f"structures: expected energies that differ, got {len(items)} that do not")
    return Reference(items, energy, forces, scale, float(forces.square().mean().sqrt()))


@dataclass(frozen=True)
class Accuracy:
    """Errors against the reference (meV, meV/A), backbone evaluations per owner, processor seconds."""

    energy_mae: float
    energy_mae_per_atom: float
    force_mae: float
    evaluations: float
    evaluations_max: int
    seconds: float


def graph_of(subject: Subject, structures: Sequence[Atoms], dtype: torch.dtype) -> Batch:
    """Batch with the neighbor list that the backbone of a subject reads."""
    return from_ase(structures, cutoff=subject.backbone.cutoff, dtype=dtype)


def energy_and_forces(model: Symmetrizer, batch: Data) -> dict[str, Tensor]:
    """Energies without anything per atom, and conservative forces."""
    with torch.no_grad():
        out = model(batch, forces=True, create_graph=False)
    return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


def measure_accuracy(
    subject: Subject, treatment: str, target: Reference, dtype: torch.dtype, tick: Callable[[], None]
) -> Accuracy:
    """Compare with the reference, and time the faster of `REPEATS` evaluations of all structures.

    The time is that of the processor, which other programs on the machine change less than the clock's.
    """
    batch = graph_of(subject, target.structures, dtype)
    model = subject.model(treatment)
    seconds, out = [], {}
    for _ in range(REPEATS):
        start = time.thread_time()
        out = energy_and_forces(model, batch)
        seconds.append(time.thread_time() - start)
        tick()
    energy_error = (out["energy"].double() - target.energy).abs() * MILLI
    n_atoms = (batch[keys.PTR][1:] - batch[keys.PTR][:-1]).double()
    plan = model.explain(batch)
    return Accuracy(
        energy_mae=float(energy_error.mean()),
        energy_mae_per_atom=float((energy_error / n_atoms).mean()),
        force_mae=float((out["forces"].double() - target.forces).abs().mean()) * MILLI,
        evaluations=plan.evaluations_mean,
        evaluations_max=plan.evaluations_max,
        seconds=min(seconds),
    )


def measure_symmetry(
    subject: Subject,
    treatment: str,
    target: Reference,
    proper: Sequence[Element],
    improper: Sequence[Element],
    dtype: torch.dtype,
    tick: Callable[[], None],
) -> tuple[SymmetryError, SymmetryError]:
    """Errors under proper and under improper elements."""
    batch = graph_of(subject, target.structures, dtype)
    model = subject.model(treatment, baseline=False)

    def f(changed: Data) -> dict[str, Tensor]:
        out = energy_and_forces(model, changed)
        tick()
        return out

    outputs = declared({"energy": subject.backbone.outputs["energy"]}, forces=True)
    scale = {"energy": target.energy_scale, "forces": target.force_scale}
    measured = measure_equivariance(f, batch, outputs, [*proper, *improper], scale=scale)
    energy, forces, n = measured["energy"], measured["forces"], len(proper)
    return _symmetry_error(energy, forces, slice(0, n)), _symmetry_error(energy, forces, slice(n, None))


def _symmetry_error(energy: Deviation, forces: Deviation, cases: slice) -> SymmetryError:
    def parts(deviation: Deviation) -> tuple[float, float]:
        return float(deviation.max[cases].max()), float(deviation.rms[cases].square().mean().sqrt())

    energy_max, energy_rms = parts(energy)
    force_max, force_rms = parts(forces)
    return SymmetryError(
        energy_max=energy_max * MILLI,
        energy_rms=energy_rms * MILLI,
        force_max=force_max * MILLI,
        force_rms=force_rms * MILLI,
        energy_max_relative=energy.scale.relative(energy_max),
        energy_rms_relative=energy.scale.relative(energy_rms),
        force_max_relative=forces.scale.relative(force_max),
        force_rms_relative=forces.scale.relative(force_rms),
        energy=energy.max[cases].numpy() * MILLI,
        force=forces.rms[cases].numpy() * MILLI,
    )


def count_frames(subject: Subject, target: Reference, dtype: torch.dtype) -> FrameCounts:
    """Frames of every owner in SO(3)."""
    batch = graph_of(subject, target.structures, dtype)
    with torch.no_grad():
        frames = subject.model(ROTATIONS).frames(batch)
    numbers = frames.evaluations.tolist()
    if subject.scope == "atom":
        symbols = [symbol for atoms in target.structures for symbol in atoms.get_chemical_symbols()]
    else:
        symbols = ["structure"] * len(numbers)
    groups: dict[str, list[int]] = {symbol: [] for symbol in sorted(set(symbols))}
    for symbol, number in zip(symbols, numbers, strict=True):
        groups[symbol].append(int(number))
    counted = frames.weights > NEGLIGIBLE_WEIGHT
    strata = {
        stratum.name.lower(): int((counted & (frames.stratum == int(stratum))).sum())
        for stratum in Stratum
        if bool((frames.stratum == int(stratum)).any())
    }
    return FrameCounts(
        label=subject.label,
        scope=subject.scope,
        evaluations=groups,
        effective_mean=float(frames.effective_number.mean()),
        weight_min=float(segment_sum(frames.weights, frames.owner, frames.n_owners).min()),
        strata=strata,
    )
