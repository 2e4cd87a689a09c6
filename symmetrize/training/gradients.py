"""Energies and conservative forces of a bare backbone, and their errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import replace
from symmetrize.ops.ragged import segment_sum
from symmetrize.training.dataset import TARGET_ENERGY, TARGET_FORCES, StructureTable


def energy_and_forces(backbone: Backbone, batch: Batch, *, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies without composition baseline, and forces, of the orientation in which a batch is given.

    With r_e the vector of edge e from its center to its neighbor, the force on atom i is the sum of dE/dr_e over the
    edges that it is the center of, minus the sum over those that it is the neighbor of, minus dE/dx_i for what reads
    positions.

    Parameters
    ----------
    backbone : Backbone
        With a per-atom output ``energy``.
    batch : Batch
        With neighbor lists.
    create_graph : bool
        Whether the forces will be differentiated in turn.

    Returns
    -------
    energy : Tensor of shape (n_structures,)
        eV.
    forces : Tensor of shape (n_atoms, 3)
        eV/angstrom.
    """
    pos = batch[keys.POS].detach().requires_grad_()
    edge_vec = batch[keys.EDGE_VEC].detach().requires_grad_()
    atomic = backbone(replace(batch, **{keys.POS: pos, keys.EDGE_VEC: edge_vec}))["energy"]
    n_structures = batch[keys.PTR].shape[0] - 1
    energy = segment_sum(atomic.reshape(-1), batch[keys.BATCH], n_structures)
    by_pos, by_edge = torch.autograd.grad(
        atomic.sum(), [pos, edge_vec], create_graph=create_graph, retain_graph=create_graph, allow_unused=True
    )
    forces = torch.zeros_like(pos)
    if by_edge is not None:
        neighbor, center = batch[keys.EDGE_INDEX]
        forces = forces.index_add(0, center, by_edge).index_add(0, neighbor, -by_edge)
    if by_pos is not None:
        forces = forces - by_pos
    return energy, forces


@dataclass(frozen=True)
class Errors:
    """Errors of a set of structures.

    Attributes
    ----------
    energy_mae, energy_rmse : float
        Energy per structure (eV).
    forces_mae, forces_rmse : float
        Force components (eV/angstrom).
    n_structures : int
    """

    energy_mae: float
    energy_rmse: float
    forces_mae: float
    forces_rmse: float
    n_structures: int

    def to_dict(self) -> dict[str, float]:
        """As JSON-serialisable dictionary."""
        return dataclasses.asdict(self)


def error_sums(energy: Tensor, forces: Tensor, batch: Batch) -> Tensor:
    """Sums that errors are made of: Tensor of shape (6,), float64.

    Absolute and squared errors and their number, for energies and for force components; add them up over batches.
    """
    sums = []
    for predicted, reference in ((energy, batch[TARGET_ENERGY]), (forces, batch[TARGET_FORCES])):
        error = (predicted.detach() - reference).to(torch.float64)
        sums += [error.abs().sum(), error.square().sum(), torch.full_like(error.sum(), error.numel())]
    return torch.stack(sums)


def errors_from(sums: Tensor) -> Errors:
    """Errors of the sums of `error_sums`."""
    e_abs, e_sq, n_e, f_abs, f_sq, n_f = sums.tolist()
    return Errors(e_abs / n_e, (e_sq / n_e) ** 0.5, f_abs / n_f, (f_sq / n_f) ** 0.5, int(n_e))


def evaluate(
    backbone: Backbone,
    table: StructureTable,
    structures: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 50,
) -> Errors:
    """Errors of a bare backbone in the orientation of the data.

    Parameters
    ----------
    backbone : Backbone
    table : StructureTable
    structures : Tensor of shape (n_picked,), int64
        Which structures, at least one.
    baseline : Tensor of shape (n_structures,)
        Composition energies of all structures of the table (eV).
    dtype : torch.dtype
        Of the backbone.
    batch_size : int
        Structures at a time.

    Returns
    -------
    Errors
    """

    def predict(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return energy_and_forces(backbone, batch, create_graph=False)

    device = next(backbone.parameters()).device
    return errors_of(predict, (table.select(n, dtype, baseline).to(device) for n in structures.split(batch_size)))


def errors_of(predict: Callable[[Batch], tuple[Tensor, Tensor]], batches: Iterable[Batch]) -> Errors:
    """Errors over batches, which hold at least one structure, of what predicts energies and forces."""
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in batches:
        sums += error_sums(*predict(batch), batch).cpu()
    return errors_from(sums)
