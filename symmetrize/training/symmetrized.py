r"""Energies and forces of a symmetrised backbone for training: over all frames, or over frames that are drawn.

Frames and their weights do not depend on the parameters. Those that are drawn are computed ahead, together with their
derivatives, for many structures at once. A training step then consists of one evaluation of the bare backbone, in
which the edges of every owner (an atom or a structure) are turned into the frame of that owner. With :math:`y` the
energy of an owner, :math:`G_e = R\, \partial y / \partial (R^T r_e)`, and the torque
:math:`\tau = \sum_e G_e \times r_e`,

.. math:: \frac{d \hat y}{d r_e} = G_e + \left(\frac{\partial \omega}{\partial r_e}\right)^T \tau
          + \frac{\partial \ln p}{\partial r_e}\, (y - b),

where omega is the infinitesimal rotation of the frame and b the energy in the companion (see `SampledFrames`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import replace
from symmetrize.frames import FrameMethod, Scope
from symmetrize.methods import find_method
from symmetrize.methods.sampled import SampledFrames
from symmetrize.ops.ragged import offsets, segment_sum
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.training.config import RecipeError, SymmetrizeRecipe
from symmetrize.training.dataset import StructureTable
from symmetrize.training.drawn import (
    COMPANION,
    COMPANION_EMPTY,
    DIFFERS,
    EMPTY,
    ROTATION,
    SCORE,
    TURN,
    draw_frames,
)
from symmetrize.training.gradients import Errors, errors_of


def make_method(recipe: SymmetrizeRecipe) -> FrameMethod:
    """The frame method of a recipe, all of its frames."""
    name = {"ecse": "ECSE", "group_averaging": "GroupAveraging"}[recipe.method]
    try:
        return find_method(name)(**recipe.options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"symmetrize.options: {error}") from error


def make_symmetrizer(backbone: Backbone, recipe: SymmetrizeRecipe, *, sampled: bool = False) -> Symmetrizer:
    """A backbone with the frames of a recipe: all, or some of them in one call of the backbone."""
    method = make_method(recipe)
    chunk_size = recipe.chunk_size
    if sampled:
        # As much in one call as there is without frames.
        method, chunk_size = SampledFrames(method, recipe.n_samples), 10**9
    return Symmetrizer(backbone, method, group=recipe.group, scope=recipe.scope, chunk_size=chunk_size)


def in_place(backbone: Backbone, scope: str) -> bool:
    """Whether one frame per owner can be evaluated by turning the edges of a batch, without copies of environments.

    So it is for whole structures, and in atom scope if only the edges of an atom, and nothing but their vectors, enter
    its output.
    """
    return scope == "structure" or (backbone.shares_work and backbone.oriented_field in (0, 1))


def sampled_energy_and_forces(
    backbone: Backbone, batch: Batch, scope: str, n_samples: int, *, create_graph: bool, score: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of the energies (without baseline) and the forces of a symmetrised backbone.

    Parameters
    ----------
    backbone : Backbone
        One that can be evaluated in place, see `in_place`.
    batch : Batch
        Of `DrawnFrames.select`: every structure once for each sample.
    scope : {"atom", "structure"}
    n_samples : int
    create_graph : bool
        Whether the forces will be differentiated in turn.
    score : float
        Factor of the derivative of the probabilities. Any random number of mean 1 leaves the expectation as it is; for
        0, companions are not evaluated.

    Returns
    -------
    energy : Tensor of shape (n_structures,)
        eV.
    forces : Tensor of shape (n_atoms, 3)
        eV/angstrom.
    """
    structure, n_structures = batch[keys.BATCH], batch[keys.PTR].shape[0] - 1
    atom_owner = torch.arange(structure.shape[0], device=structure.device) if scope == "atom" else structure
    rotation, plain_pos, plain_edges = batch[ROTATION], batch[keys.POS], batch[keys.EDGE_VEC]
    local, kept = _turned(batch, rotation, batch[EMPTY], atom_owner, scope)
    pos, edge_vec = local[keys.POS].requires_grad_(), local[keys.EDGE_VEC].requires_grad_()
    atomic = backbone(replace(local, **{keys.POS: pos, keys.EDGE_VEC: edge_vec}))["energy"].reshape(-1)
    by_pos, by_edge = torch.autograd.grad(
        atomic.sum(), [pos, edge_vec], create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    n_owners = rotation.shape[0]
    own = atomic if scope == "atom" else segment_sum(atomic, structure, n_structures)

    neighbor, center = batch[keys.EDGE_INDEX]
    edge_gradient = torch.zeros_like(plain_edges)
    if by_edge is not None:
        lab = torch.einsum("nij,nj->ni", rotation[atom_owner[local[keys.EDGE_INDEX][1]]], by_edge)
        edge_gradient = lab if kept is None else edge_gradient.index_add(0, kept, lab)
    torque = segment_sum(torch.linalg.cross(edge_gradient, plain_edges), atom_owner[center], n_owners)
    forces = torch.zeros_like(plain_pos)
    if by_pos is not None and scope == "structure":
        pos_gradient = torch.einsum("nij,nj->ni", rotation[structure], by_pos)
        torque = torque + segment_sum(torch.linalg.cross(pos_gradient, plain_pos), structure, n_owners)
        forces = forces - pos_gradient
    site_owner = atom_owner[center] if scope == "atom" else structure
    by_frame = torch.einsum("nij,ni->nj", batch[TURN], torque[site_owner])
    if score > 0.0:
        difference = own - _control(backbone, batch, own, scope, n_samples)
        by_frame = by_frame + score * batch[SCORE] * difference[site_owner, None]
    if scope == "atom":
        edge_gradient = edge_gradient + by_frame
    else:
        forces = forces - by_frame
    forces = forces.index_add(0, center, edge_gradient).index_add(0, neighbor, -edge_gradient)
    energy = segment_sum(atomic, structure, n_structures)
    return energy.reshape(n_samples, -1).mean(dim=0), forces.reshape(n_samples, -1, 3).mean(dim=0)


def _control(backbone: Backbone, batch: Batch, own: Tensor, scope: str, n_samples: int) -> Tensor:
    """Energies that do not depend on an owner's draw, (n_owners,): in the other samples, or in the companion."""
    if n_samples > 1:
        copies = own.reshape(n_samples, -1)
        return ((copies.sum(dim=0) - copies) / (n_samples - 1)).reshape(-1)
    owners = batch[DIFFERS].nonzero()[:, 0]
    return own.index_put((owners,), _companion_energies(backbone, batch, owners, scope))


def _companion_energies(backbone: Backbone, batch: Batch, owners: Tensor, scope: str) -> Tensor:
    """Energies of the companions that differ, in a call of their own: Tensor of shape (n_differing,)."""
    if not len(owners):
        return batch[keys.POS].new_zeros(0)
    differs = batch[DIFFERS]
    part = _only(batch, differs, scope)
    if scope == "structure":
        local, _ = _turned(part, batch[COMPANION][owners], batch[COMPANION_EMPTY][owners], part[keys.BATCH], scope)
        return segment_sum(backbone(local)["energy"].reshape(-1), part[keys.BATCH], len(owners))
    atom_owner = torch.arange(differs.shape[0], device=differs.device)
    local, _ = _turned(part, batch[COMPANION], batch[COMPANION_EMPTY], atom_owner, scope)
    return backbone(local)["energy"].reshape(-1)


def _only(batch: Batch, differs: Tensor, scope: str) -> Batch:
    """Part of a batch that the companions need: edges of some atoms (as centers), or some structures."""
    edges = batch[keys.EDGE_INDEX]
    if scope == "atom":
        kept = differs[edges[1]].nonzero()[:, 0]
        return replace(_with_edges(batch, kept), **{keys.CENTER_MASK: differs})
    structure = batch[keys.BATCH]
    mine = differs[structure]
    atoms, kept = mine.nonzero()[:, 0], mine[edges[1]].nonzero()[:, 0]
    place = torch.cumsum(mine, dim=0) - 1
    counts = batch[keys.PTR].diff()[differs]
    fields = {name: batch[name][atoms] for name in (keys.POS, keys.Z)}
    fields |= {name: batch[name][differs] for name in (keys.CELL, keys.PBC)}
    numbers = torch.arange(counts.shape[0], device=counts.device)
    return Batch(
        **{
            **fields,
            keys.BATCH: numbers.repeat_interleave(counts),
            keys.PTR: offsets(counts),
            keys.EDGE_INDEX: place[edges[:, kept]],
            keys.CELL_SHIFT: batch[keys.CELL_SHIFT][kept],
            keys.EDGE_VEC: batch[keys.EDGE_VEC][kept],
            keys.EDGE_CUTOFF: batch[keys.EDGE_CUTOFF],
        }
    )


def _with_edges(batch: Batch, kept: Tensor) -> Batch:
    rows = {name: batch[name][kept] for name in (keys.CELL_SHIFT, keys.EDGE_VEC)}
    return replace(batch, **rows, **{keys.EDGE_INDEX: batch[keys.EDGE_INDEX][:, kept]})


def _turned(
    batch: Batch, rotation: Tensor, empty: Tensor, atom_owner: Tensor, scope: str
) -> tuple[Batch, Tensor | None]:
    """A batch in the frames of its owners, and its edges where some are left out (those of the point stratum)."""
    kept = None
    center = batch[keys.EDGE_INDEX][1]
    if scope == "atom" and bool(empty[center].any()):
        kept = (~empty[center]).nonzero()[:, 0]
        batch = _with_edges(batch, kept)
        center = center[kept]
    edge_vec = torch.einsum("ni,nij->nj", batch[keys.EDGE_VEC], rotation[atom_owner[center]])
    pos = batch[keys.POS].detach()
    if scope == "structure":
        pos = torch.einsum("ni,nij->nj", pos, rotation[atom_owner])
    return replace(batch, **{keys.POS: pos, keys.EDGE_VEC: edge_vec.detach()}), kept


def symmetrized_energy_and_forces(
    model: Symmetrizer, batch: Batch, *, create_graph: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Energies (without baseline) and forces of a symmetrised model, by its evaluator: see `Symmetrizer.forward`."""
    out = model(batch, forces=True, create_graph=create_graph, generator=generator)
    return out["energy"] - baseline_energy(model.backbone, batch), out["forces"]


def baseline_energy(backbone: Backbone, batch: Batch) -> Tensor:
    """Composition energies, which training leaves out: Tensor of shape (n_structures,), float64, eV."""
    n_structures = batch[keys.PTR].shape[0] - 1
    rows = backbone.baseline(batch).get("energy")
    if rows is None:
        return torch.zeros(n_structures, dtype=torch.float64, device=batch[keys.POS].device)
    return segment_sum(rows, batch[keys.BATCH], n_structures)


def frame_variance(backbone: Backbone, batch: Batch, recipe: SymmetrizeRecipe, scope: Scope, seed: int) -> Tensor:
    """Squared differences between two independent estimates from sampled frames, halved: unbiased for their variance.

    Parameters
    ----------
    backbone : Backbone
        One that can be evaluated in place, see `in_place`.
    batch : Batch
        With neighbor lists.
    recipe : SymmetrizeRecipe
    scope : {"atom", "structure"}
    seed : int

    Returns
    -------
    Tensor of shape (n_atoms, 3)
        Of the forces, (eV/angstrom)^2.
    """
    method = make_method(recipe)
    l_max = max(spec.l_max for spec in backbone.outputs.values())
    forces = []
    for n in range(2):
        samples = draw_frames(
            method,
            replace(batch, **{name: batch[name].to(torch.float64) for name in (keys.POS, keys.EDGE_VEC, keys.CELL)}),
            group=recipe.group,
            scope=scope,
            l_max=l_max,
            seed=2 * seed + n,
            n_samples=1,
        )
        dtype = batch[keys.POS].dtype
        fields = {k: v.to(dtype) if v.is_floating_point() else v for k, v in samples[0].items()}
        with torch.enable_grad():
            forces.append(
                sampled_energy_and_forces(backbone, replace(batch, **fields), scope, 1, create_graph=False)[1]
            )
    return (forces[0] - forces[1]).detach().to(torch.float64).square() / (2.0 * recipe.n_samples)


def evaluate_symmetrized(
    backbone: Backbone,
    table: StructureTable,
    structures: Tensor,
    baseline: Tensor,
    recipe: SymmetrizeRecipe,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 50,
) -> Errors:
    """Errors of a symmetrised backbone, over all frames: `symmetrize.training.evaluate` for what a recipe trains."""
    model = make_symmetrizer(backbone, recipe)
    device = next(backbone.parameters()).device
    batches = (table.select(picked, dtype, baseline).to(device) for picked in structures.split(batch_size))
    return errors_of(lambda batch: symmetrized_energy_and_forces(model, batch, create_graph=False), batches)
