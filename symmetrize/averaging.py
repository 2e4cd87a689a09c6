"""One symmetrised evaluation: the weighted sum over frames, its gradient, and what completes the outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.copies import copy_structures, edge_offsets
from symmetrize.data import replace, with_neighbors
from symmetrize.evaluation import call_size, check_outputs, make_source
from symmetrize.frames import FrameSet, Stratum
from symmetrize.ops.ragged import segment_sum
from symmetrize.representations import OutputSpec
from symmetrize.weighted_sum import REDUCED, WeightedSum

if TYPE_CHECKING:
    from symmetrize.symmetrizer import Symmetrizer


def chunk_limit(model: Symmetrizer, graph: Data) -> int:
    """Atoms, rotated copies included, in one call of the backbone (see `symmetrize.evaluation.call_size`)."""
    pos, edges = graph[keys.POS], graph.get(keys.EDGE_INDEX)
    stars = model.scope == "atom" and (model.backbone.oriented_field or 0) <= 1
    n_edges = 0 if edges is None else edges.shape[1]
    listed = model.backbone.cutoff is not None
    return call_size(model.chunk_size or 0, pos.shape[0], n_edges, stars, listed, pos.device.type == "cpu")


class Average:
    """One evaluation of a batch; lives for the duration of a call."""

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
        self.weights = frames.normalized_weights
        self.n_structures = graph[keys.PTR].shape[0] - 1
        source = make_source(self.backbone, graph)
        limit = chunk_limit(model, graph)
        self.sum = WeightedSum(self.backbone, source, frames, model.group, energy, limit, spread)
        self.sums: dict[str, Tensor] = {}
        # The weighted energy as a function of these, and its gradient with respect to each.
        self.differentiated: list[Tensor] = []
        self.cotangents: list[Tensor] = []

    def run(self) -> dict[str, Tensor]:
        self.sums, gradients = self.sum(self.weights, self.create_graph)
        for tensor, gradient in gradients:
            self.differentiated.append(tensor)
            self.cotangents.append(gradient)
        self._add_auxiliary()
        return self._finish()

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
            values = outputs[name].to(torch.float64)
            values = values + other[name] if name in other else values
            values = values - own[name] if name in own else values
            weighted = values * weight[copy].reshape((-1,) + (1,) * (values.dim() - 1))
            self.sums[name] = self.sums[name].index_add(0, rows, weighted)
            if self.spread:
                owners = torch.arange(frames.n_owners, device=rows.device)
                self.sum.collect_values(name, values, weight, copy, rows, owners)
            if name == self.energy and weighted.requires_grad:
                scalar = weighted.sum()
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
        parts = self.sum.collected[name]
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
