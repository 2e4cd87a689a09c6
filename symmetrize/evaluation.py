"""Evaluating a backbone in rotated copies: the inputs of a copy, one chunk of copies, and bounded memory.

A chunk is a pure function of differentiable inputs (positions, cells, edge vectors, what a backbone prepared) and of
frames. It returns outputs rotated back and, where forces are wanted, the gradient of the energy with respect to those
inputs. Gradients through frames, weights and neighbor lists are assembled once per batch by the caller, so that no
chunk's graph has to stay alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.errors import BackboneOutputError
from symmetrize.ops.ragged import offsets
from symmetrize.representations import OutputSpec


@dataclass(frozen=True, eq=False)
class Source:
    """What copies are made from.

    Attributes
    ----------
    batch : Data
        Validated, with neighbor list and edge vectors where the backbone wants them.
    inputs : dict of str to Tensor
        The differentiable inputs, by field name (generic backbones) or by cache entry (sharing ones).
    constants : dict of str to Tensor
        Cache entries that are not differentiable.
    shared : bool
        Whether ``inputs`` and ``constants`` are the cache of a backbone that shares work between frames.
    """

    batch: Data
    inputs: dict[str, Tensor]
    constants: dict[str, Tensor]
    shared: bool


def make_source(backbone: Backbone, batch: Data) -> Source:
    """Split a batch (or what the backbone prepares from it) into differentiable inputs and constants."""
    if backbone.shares_work:
        cache = backbone.prepare(batch)
        inputs = {name: value for name, value in cache.items() if value.is_floating_point()}
        constants = {name: value for name, value in cache.items() if name not in inputs}
        # What rotates: edge vectors, or the positions where no neighbor list is read.
        geometry = keys.POS if backbone.cutoff is None else keys.EDGE_VEC
        return Source(batch, {geometry: batch[geometry], **inputs}, constants, True)
    names = [keys.POS, keys.CELL, keys.EDGE_VEC, *backbone.vectors]
    return Source(batch, {name: batch[name] for name in names if batch.get(name) is not None}, {}, False)


def run_backbone(
    backbone: Backbone, source: Source, inputs: dict[str, Tensor], copies: Copies, frames: Tensor, origins: Tensor
) -> dict[str, Tensor]:
    """Outputs of the backbone in local coordinates, ``x_local = F^T (x - origin)``."""
    frames = frames.to(source.batch[keys.POS].dtype)
    edge_vec = inputs.get(keys.EDGE_VEC)
    if source.shared and edge_vec is None:
        pos = inputs[keys.POS][copies.atom] - origins[copies.atom_copy]
        pos = (pos[:, None, :] @ frames[copies.atom_copy])[:, 0]
        cache = {name: value for name, value in inputs.items() if name != keys.POS} | source.constants
        return backbone.forward_frames(cache, pos, copies)
    if edge_vec is not None:
        edge_vec = (edge_vec[copies.edge][:, None, :] @ frames[copies.edge_copy])[:, 0]
        if source.shared:
            cache = {name: value for name, value in inputs.items() if name != keys.EDGE_VEC} | source.constants
            return backbone.forward_frames(cache, edge_vec, copies)
    return backbone(_rotated_batch(backbone, source, inputs, copies, frames, origins, edge_vec))


def _rotated_batch(
    backbone: Backbone,
    source: Source,
    inputs: dict[str, Tensor],
    copies: Copies,
    frames: Tensor,
    origins: Tensor,
    edge_vec: Tensor | None,
) -> Batch:
    batch, atom, copy = source.batch, copies.atom, copies.atom_copy
    n_atoms, n_copies = batch[keys.POS].shape[0], frames.shape[0]
    first = torch.searchsorted(copy, torch.arange(n_copies, device=copy.device))
    structure = batch[keys.BATCH][atom[first]]
    fields: dict[str, Any] = {}
    # Fields travel with their atom or structure; everything geometric is set below.
    special = {keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC, keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC}
    for name in batch.keys():
        value = batch[name]
        if name in special or name in backbone.vectors:
            continue
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == n_atoms:
            value = value[atom]
        elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch[keys.PTR].shape[0] - 1:
            value = value[structure]
        fields[name] = value
    counts = torch.bincount(copy, minlength=n_copies)
    fields[keys.POS] = ((inputs[keys.POS][atom] - origins[copy])[:, None, :] @ frames[copy])[:, 0]
    fields[keys.CELL] = inputs[keys.CELL][structure] @ frames
    fields[keys.PBC] = batch[keys.PBC][structure]
    for name, irreps in backbone.vectors.items():
        inverse = frames.transpose(1, 2)
        fields[name] = OutputSpec(irreps).rotate(inputs[name][atom], inverse, copy)
    if edge_vec is not None:
        fields[keys.EDGE_VEC] = edge_vec
        fields[keys.EDGE_INDEX] = torch.stack([copies.source, copies.target])
        fields[keys.CELL_SHIFT] = batch[keys.CELL_SHIFT][copies.edge]
    fields[keys.CENTER_MASK] = copies.center
    return Batch(**{keys.BATCH: copy, keys.PTR: offsets(counts)}, **fields)


def check_outputs(backbone: Backbone, got: Any, copies: Copies, n_copies: int, batch: Data) -> dict[str, Tensor]:
    """The declared outputs, or an error that says what is wrong with them and where."""
    if not isinstance(got, dict):
        raise BackboneOutputError(f"backbone: expected a dict of outputs, got {type(got).__name__}")
    checked = {}
    for name, spec in backbone.outputs.items():
        value = got.get(name)
        if not isinstance(value, Tensor):
            raise BackboneOutputError(f"backbone: expected an output {name!r}, got {sorted(got)}")
        n_rows = int(copies.center.sum()) if spec.per == "atom" else n_copies
        if tuple(value.shape) != (n_rows, *spec.shape):
            raise BackboneOutputError(
                f"backbone: output {name!r} ({spec}): expected shape {(n_rows, *spec.shape)} "
                f"({n_rows} {'centers' if spec.per == 'atom' else 'copies of structures'}), got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value.detach()).all()):
            bad = int((~torch.isfinite(value.detach())).reshape(n_rows, -1).any(dim=1).nonzero()[0, 0])
            if spec.per == "atom":
                atom = int(copies.atom[copies.center][bad])
            else:
                atom = int(copies.atom[(copies.atom_copy == bad).nonzero()[0, 0]])
            structure = int(batch[keys.BATCH][atom])
            where = f", atom {atom - int(batch[keys.PTR][structure])}" if spec.per == "atom" else ""
            raise BackboneOutputError(
                f"backbone: output {name!r}: expected finite values, got {value.detach()[bad].tolist()} for "
                f"structure {structure}{where}"
            )
        checked[name] = value
    return checked


#: A chunk: (differentiable tensors, keep the graph of gradients) -> (outputs, gradients).
ChunkFunction = Callable[[list[Tensor], bool], tuple[list[Tensor], list[Tensor]]]


def run_chunk(
    function: ChunkFunction,
    tensors: list[Tensor],
    parameters: list[Tensor],
    n_outputs: int,
    *,
    bounded: bool,
    create_graph: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluate a chunk, either keeping its graph or, bounded, recomputing it in the backward pass."""
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors + parameters)
    if not (bounded and differentiable):
        return function(tensors, create_graph)
    flat = _Recomputed.apply(function, create_graph, len(tensors), *tensors, *parameters)
    return list(flat[:n_outputs]), list(flat[n_outputs:])


class _Recomputed(torch.autograd.Function):
    """A chunk whose graph, gradients included, lives only while it is evaluated.

    `torch.utils.checkpoint` frees activations after the first backward pass, but the gradient inside the chunk (the
    forces) would keep them for a second one. Here the forward pass returns outputs and gradients as plain numbers, and
    the backward pass evaluates the chunk again with a graph and differentiates both.
    """

    @staticmethod
    def forward(
        ctx: Any, function: ChunkFunction, create_graph: bool, n_tensors: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.create_graph, ctx.n_tensors = function, create_graph, n_tensors
        device = tensors[0].device.type
        ctx.devices = [tensors[0].device] if device == "cuda" else []
        ctx.random_state = torch.get_rng_state()
        ctx.device_state = torch.cuda.get_rng_state(tensors[0].device) if device == "cuda" else None
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            plain = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:n_tensors]]
            outputs, gradients = function(plain, False)
        return tuple(outputs) + tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        tensors, parameters = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
        # Cut off from what they were computed from: the gradients wanted here are partial ones.
        tensors = [t.view_as(t) if again else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        # As it was in the forward pass: random numbers (dropout) and mixed precision.
        with torch.enable_grad(), torch.random.fork_rng(devices=ctx.devices), torch.autocast(**ctx.autocast):
            torch.set_rng_state(ctx.random_state)
            if ctx.device_state is not None:
                torch.cuda.set_rng_state(ctx.device_state, tensors[0].device)
            outputs, gradients = ctx.function(list(tensors), ctx.create_graph)
        results = [
            (result, cotangent)
            for result, cotangent in zip([*outputs, *gradients], cotangents, strict=True)
            if cotangent is not None and result.requires_grad
        ]
        wanted = [t for t in (*tensors, *parameters) if t.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if results and wanted:
            found = list(
                torch.autograd.grad(
                    [result for result, _ in results],
                    wanted,
                    [cotangent for _, cotangent in results],
                    allow_unused=True,
                    create_graph=again,
                )
            )
        iterator = iter(found)
        returned = [next(iterator) if t.requires_grad else None for t in (*tensors, *parameters)]
        return (None, None, None, *returned)
