"""One symmetrised evaluation: chunks of copies, the weighted average of what comes back, and its gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.copies import copy_environments, copy_stars, copy_structures, divide, edge_offsets
from symmetrize.data import replace, with_neighbors
from symmetrize.evaluation import Source, check_outputs, make_source, run_backbone, run_chunk
from symmetrize.frames import FrameSet, Stratum
from symmetrize.ops.ragged import segment_sum
from symmetrize.representations import OutputSpec

if TYPE_CHECKING:
    from symmetrize.symmetrizer import Symmetrizer

# Suffix of the per-copy reduced values of an output, for their spread.
REDUCED = " reduced"


def chunk_limit(chunk_size: int | None, device: torch.device) -> int:
    """Atoms, rotated copies included, in one call of the backbone."""
    if chunk_size is not None:
        return chunk_size
    return 1024 if device.type == "cpu" else 16384


class _Chunk(NamedTuple):
    frame: Tensor  # frames of this chunk, (n_copies,)
    copies: Copies
    invariant: bool  # the point stratum: only the invariant part of the outputs counts
    row_copy: dict[str, Tensor]  # for the rows of each output: the copy that they come from,
    row_target: dict[str, Tensor]  # and the row of the result that they add to


class Average:
    """Accumulates one evaluation of a batch; lives for the duration of a call."""

    def __init__(
        self,
        model: Symmetrizer,
        graph: Data,
        frames: FrameSet,
        energy: str | None,
        create_graph: bool,
        spread: bool,
    ) -> None:
        self.model, self.backbone, self.graph, self.frames = model, model.backbone, graph, frames
        self.energy, self.create_graph, self.spread = energy, create_graph, spread
        self.source: Source = make_source(self.backbone, graph)
        # Once per batch: every chunk looks up its edges here.
        self.edge_ptr = edge_offsets(graph)
        self.weights = frames.normalized_weights
        self.names = list(self.backbone.outputs)
        self.inputs = list(self.source.inputs)
        self.parameters: list[Tensor] = [p for p in self.backbone.parameters() if p.requires_grad]
        self.n_structures = graph[keys.PTR].shape[0] - 1
        n_atoms = graph[keys.POS].shape[0]
        rows = {"atom": n_atoms, "structure": self.n_structures}
        device = graph[keys.POS].device
        self.sums = {
            name: torch.zeros(rows[spec.per], *spec.shape, dtype=torch.float64, device=device)
            for name, spec in self.backbone.outputs.items()
        }
        self.collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        # The weighted energy as a function of these, and its gradient with respect to each.
        self.differentiated: list[Tensor] = []
        self.cotangents: list[Tensor] = []

    def run(self) -> dict[str, Tensor]:
        chunks = list(self._chunks())
        conservative = self.energy is not None
        bounded = len(chunks) > 1
        input_gradients: list[Tensor | None] = [None] * len(self.inputs)
        frame_gradients, origin_gradients, weight_gradients = [], [], []
        for chunk in chunks:
            tensors = [self.source.inputs[name] for name in self.inputs]
            tensors += [self.frames.rotations[chunk.frame], self.frames.origins[chunk.frame], self.weights[chunk.frame]]
            function = _ChunkFunction(self.backbone, self.source, self.model.group, self.energy, chunk)
            if conservative and not self.create_graph:
                with torch.no_grad():
                    outputs, gradients = function([t.detach().requires_grad_(t.requires_grad) for t in tensors], False)
            else:
                outputs, gradients = run_chunk(
                    function,
                    tensors,
                    self.parameters,
                    len(self.names),
                    bounded=bounded,
                    create_graph=self.create_graph,
                )
            weights, owner = self.weights[chunk.frame], self.frames.owner[chunk.frame]
            for name, values in zip(self.names, outputs, strict=True):
                self._accumulate(name, values, weights, owner, chunk.row_copy[name], chunk.row_target[name])
            if conservative:
                n = len(self.inputs)
                input_gradients = [
                    g if total is None else total + g for total, g in zip(input_gradients, gradients[:n], strict=True)
                ]
                frame_gradients.append(gradients[n])
                origin_gradients.append(gradients[n + 1])
                # dE/dw_k is the energy of copy k itself.
                energies = outputs[self.names.index(str(self.energy))].to(torch.float64)
                weight_gradients.append(segment_sum(energies, chunk.row_copy[str(self.energy)], len(chunk.frame)))
        if conservative and chunks:
            order = torch.cat([chunk.frame for chunk in chunks])
            self._differentiate(self.frames.rotations[order], torch.cat(frame_gradients))
            self._differentiate(self.frames.origins[order], torch.cat(origin_gradients))
            self._differentiate(self.weights[order], torch.cat(weight_gradients))
            for name, gradient in zip(self.inputs, input_gradients, strict=True):
                if gradient is not None:
                    self._differentiate(self.source.inputs[name], gradient)
        self._add_auxiliary()
        return self._finish()

    def _differentiate(self, tensor: Tensor, cotangent: Tensor) -> None:
        if tensor.requires_grad:
            self.differentiated.append(tensor)
            self.cotangents.append(cotangent.to(tensor.dtype))

    def _chunks(self) -> Iterator[_Chunk]:
        limit = chunk_limit(self.model.chunk_size, self.graph[keys.POS].device)
        for frame, _, invariant in divide(self.graph, self.frames, self.backbone.oriented_field, limit):
            owner = self.frames.owner[frame]
            copies = self._copies(owner, invariant)
            yield _Chunk(frame, copies, invariant, *self._rows(copies, owner))

    def _copies(self, owner: Tensor, invariant: bool) -> Copies:
        if self.model.scope == "structure":
            return copy_structures(self.graph, self.edge_ptr, owner)
        hops = 0 if invariant else int(self.backbone.oriented_field or 0)
        if self.backbone.shares_work and hops <= 1:
            stars = copy_stars(self.edge_ptr, owner)
            if not invariant:
                return stars
            none = stars.edge[:0]
            return stars._replace(edge=none, edge_copy=none, source=none, target=none)
        return copy_environments(self.graph, self.edge_ptr, owner, hops)

    def _rows(self, copies: Copies, owner: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        atoms = copies.atom_copy[copies.center], copies.atom[copies.center]
        structures = torch.arange(owner.shape[0], device=owner.device), owner
        rows = {n: atoms if spec.per == "atom" else structures for n, spec in self.backbone.outputs.items()}
        return {name: pair[0] for name, pair in rows.items()}, {name: pair[1] for name, pair in rows.items()}

    def _accumulate(
        self, name: str, values: Tensor, weights: Tensor, owner: Tensor, row_copy: Tensor, row_target: Tensor
    ) -> None:
        """Add weighted rows; ``weights`` and ``owner`` are those of the copies."""
        factor = weights[row_copy].reshape((-1,) + (1,) * (values.dim() - 1))
        self.sums[name] = self.sums[name].index_add(0, row_target, values.to(torch.float64) * factor)
        if self.spread:
            self.collected[name].append((values.detach(), weights[row_copy].detach(), row_target))
            spec = self.backbone.outputs[name]
            if spec.reduce is not None and self.model.scope == "structure":
                # All atoms of a structure share their frames: what varies is the reduced value of each copy.
                n_copies = weights.shape[0]
                reduced = spec.reduce_atoms(values.detach(), row_copy, n_copies)
                self.collected[name + REDUCED].append((reduced, weights.detach(), owner))

    def _add_auxiliary(self) -> None:
        auxiliary, frames = self.model.method.auxiliary, self.frames
        chosen = (frames.stratum == int(Stratum.AUXILIARY)).nonzero()[:, 0]
        if auxiliary is None or not len(chosen):
            return
        graph = replace(self.graph, **{keys.EDGE_INDEX: None, keys.CELL_SHIFT: None, keys.EDGE_VEC: None})
        if auxiliary.cutoff is not None:
            graph = with_neighbors(replace(graph, **{keys.EDGE_CUTOFF: None}), auxiliary.cutoff)
        everything = torch.arange(self.n_structures, device=frames.owner.device)
        copies = copy_structures(graph, edge_offsets(graph), everything)
        outputs = check_outputs(auxiliary, auxiliary(graph), copies, self.n_structures, graph)
        # The baseline of the backbone is added to everything in the end, that of the auxiliary model belongs here.
        own, other = self.backbone.baseline(graph), auxiliary.baseline(graph)
        weight = segment_sum(self.weights[chosen], frames.owner[chosen], frames.n_owners)
        for name, spec in self.backbone.outputs.items():
            rows = copies.atom[copies.center] if spec.per == "atom" else everything
            copy = graph[keys.BATCH][rows] if self.model.scope == "structure" and spec.per == "atom" else rows
            owners = torch.arange(frames.n_owners, device=rows.device)
            values = outputs[name].to(torch.float64)
            values = values + other[name] if name in other else values
            values = values - own[name] if name in own else values
            self._accumulate(name, values, weight, owners, copy, rows)
            if name == self.energy:
                self._differentiate_sum(values, weight, copy)

    def _differentiate_sum(self, values: Tensor, weight: Tensor, owner: Tensor) -> None:
        scalar = (values.to(torch.float64) * weight[owner]).sum()
        if scalar.requires_grad:
            self.differentiated.append(scalar)
            self.cotangents.append(torch.ones_like(scalar))

    def _finish(self) -> dict[str, Tensor]:
        graph, dtype = self.graph, self.graph[keys.POS].dtype
        mask = graph.get(keys.CENTER_MASK)
        structure = graph[keys.BATCH] if mask is None else graph[keys.BATCH][mask]
        baseline = self.backbone.baseline(graph)
        out: dict[str, Tensor] = {}
        for name, spec in self.backbone.outputs.items():
            rows = self.sums[name]
            if spec.per == "atom" and mask is not None:
                rows = rows[mask]
            # A large constant is kept in double precision; everything else returns to the precision of the input.
            rows = rows + baseline[name] if name in baseline else rows
            final = torch.float64 if name in baseline else dtype
            spreads = self._spread(name, self.sums[name].shape[0]) if self.spread else None
            if spreads is not None and spec.per == "atom" and mask is not None:
                spreads = spreads[mask]
            if spec.reduce is not None:
                out[f"atomic_{name}"] = rows.to(final)
                out[name] = spec.reduce_atoms(rows, structure, self.n_structures).to(final)
                if spreads is not None:
                    out[f"atomic_{name}_spread"] = spreads.to(dtype)
                    out[f"{name}_spread"] = self._reduced_spread(name, spec, spreads, structure).to(dtype)
            else:
                out[name] = rows.to(final)
                if spreads is not None:
                    out[f"{name}_spread"] = spreads.to(dtype)
        return out

    def _spread(self, name: str, n_rows: int) -> Tensor:
        """Weighted standard deviation over frames, norm over components: Tensor of shape (n_rows,)."""
        parts = self.collected[name]
        values = torch.cat([part[0] for part in parts]).to(torch.float64)
        weights, target = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        values = values.reshape(values.shape[0], -1)
        mean = segment_sum(weights[:, None] * values, target, n_rows)
        return torch.sqrt(segment_sum(weights * ((values - mean[target]) ** 2).sum(dim=1), target, n_rows))

    def _reduced_spread(self, name: str, spec: OutputSpec, spreads: Tensor, structure: Tensor) -> Tensor:
        n = self.n_structures
        if self.model.scope == "structure":
            return self._spread(name + REDUCED, n)
        scale = torch.bincount(structure, minlength=n).clamp(min=1) if spec.reduce == "mean" else 1.0
        return torch.sqrt(segment_sum(spreads**2, structure, n)) / scale


class _ChunkFunction:
    """A chunk as a pure function of its differentiable tensors (see `symmetrize.evaluation`).

    It holds only what lies upstream of its result: a reference to what is accumulated from it would close a cycle
    through the autograd graph, which no garbage collector can free.
    """

    def __init__(self, backbone: Backbone, source: Source, group: str, energy: str | None, chunk: _Chunk) -> None:
        self.backbone, self.source, self.group, self.energy, self.chunk = backbone, source, group, energy, chunk

    def __call__(self, tensors: list[Tensor], create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        conservative = self.energy is not None
        if conservative and not create_graph:
            # Only of what moves: a cell that nothing strains needs no gradient, which a black box would charge for.
            tensors = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        else:
            # Aliases: some inputs are functions of others, and gradients below are meant to be partial ones.
            tensors = [t.view_as(t) for t in tensors]
        with torch.set_grad_enabled(torch.is_grad_enabled() or conservative):
            outputs = self._evaluate(tensors)
            if not conservative:
                return outputs, []
            energies = outputs[list(self.backbone.outputs).index(str(self.energy))]
            scalar = (energies.to(torch.float64) * tensors[-1][self.chunk.row_copy[str(self.energy)]]).sum()
            gradients = _gradients(scalar, tensors[:-1], create_graph)
        return (outputs if create_graph else [value.detach() for value in outputs]), gradients

    def _evaluate(self, tensors: list[Tensor]) -> list[Tensor]:
        chunk, declared = self.chunk, self.backbone.outputs
        inputs = dict(zip(self.source.inputs, tensors[:-3], strict=True))
        rotations, origins = tensors[-3], tensors[-2]
        got = run_backbone(self.backbone, self.source, inputs, chunk.copies, rotations, origins)
        outputs = check_outputs(self.backbone, got, chunk.copies, chunk.frame.shape[0], self.source.batch)
        if chunk.invariant:
            return [spec.project_invariant(outputs[name], self.group) for name, spec in declared.items()]
        return [spec.rotate(outputs[name], rotations, chunk.row_copy[name]) for name, spec in declared.items()]


def _gradients(scalar: Tensor, tensors: list[Tensor], create_graph: bool) -> list[Tensor]:
    """Gradient with respect to every tensor, zeros where there is no dependence."""
    wanted = [t for t in tensors if t.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if scalar.requires_grad and wanted:
        found = list(torch.autograd.grad(scalar, wanted, create_graph=create_graph, allow_unused=True))
    iterator = iter(found)
    gradients = [next(iterator) if t.requires_grad else None for t in tensors]
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
