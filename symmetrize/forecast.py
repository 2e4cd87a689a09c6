"""How many frames ECSE will find, and what finding them takes, before they are looked for.

Every primary axis of an owner looks at all of its candidates. The number of such pairs is at most that of the
candidates that no nearer one outdoes, times all candidates: linear to find, and it decides whether frames can be
counted by making them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import replace
from symmetrize.frames import FrameSet
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.ecse.candidates import around_centroids
from symmetrize.ops.ragged import offsets, segment_min, segment_sum
from symmetrize.ops.switches import smooth_step

#: Memory for each pair of an axis and a candidate, about (measured).
PAIR_BYTES = 120
#: Pairs of one owner from which on its frames are estimated: their weights would be compared with each other.
DENSE = 2**15
#: Pairs for which frames are made at a time.
BLOCK = 2**22
#: Owners that stand for all dense ones, and candidates that stand for all of an owner's.
OWNERS, THINNED = 4, (64, 128)

#: Makes the frames of a batch.
Find = Callable[[Data], FrameSet]


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is known of the frames of a batch before they are made.

    Attributes
    ----------
    pairs : int
        Axes times candidates, of all owners.
    blocks : list of Tensor of shape (n_atoms,), bool
        Owners whose frames can be made together, in atom scope; empty: all at once.
    dense : Tensor of shape (n_dense,)
        Owners of so many pairs that their frames are not made, but
    estimates : list of int
        estimated in number.
    """

    pairs: int
    blocks: list[Tensor]
    dense: Tensor
    estimates: list[int]

    def sets(self, graph: Data, find: Find) -> Iterator[FrameSet]:
        """Frames of all owners that are not estimated, of a block at a time."""
        if not self.blocks:
            if not len(self.dense):
                yield find(graph)
            return
        for mask in self.blocks:
            yield find(replace(graph, **{keys.CENTER_MASK: mask}))


def make_forecast(method: ECSE, graph: Data, scope: str, find: Find) -> Forecast:
    """Forecast for a batch with the candidates' neighbor list.

    In structure scope with a dense structure in the batch, all structures are estimated.
    """
    pos, mask = graph[keys.POS], graph.get(keys.CENTER_MASK)
    owner, ptr, lengths, available = _candidates(method, graph, scope)
    n_owners = ptr.shape[0] - 1
    contending = _contenders(lengths, available, owner, n_owners, method.cutoff_width)
    pairs = segment_sum(contending.to(torch.int64), owner, n_owners) * (ptr[1:] - ptr[:-1])
    dense = (pairs > DENSE).nonzero()[:, 0]
    if len(dense) and scope == "structure":
        dense = torch.arange(n_owners, device=dense.device)
    estimates: list[int] = []
    if len(dense):
        spread = torch.linspace(0, len(dense) - 1, min(OWNERS, len(dense))).round().to(torch.int64)
        found = [estimate(graph, int(dense[n]), ptr, scope, find) for n in spread]
        # Every dense owner counts as the nearest one that was looked at.
        near = torch.arange(len(dense))[:, None] - spread[None, :]
        estimates = [found[n] for n in near.abs().argmin(dim=1).tolist()]
    blocks: list[Tensor] = []
    total = torch.cumsum(torch.where(pairs > DENSE, torch.zeros_like(pairs), pairs), dim=0)
    if scope == "atom" and (len(dense) or int(total[-1]) > BLOCK):
        wanted = torch.ones(n_owners, dtype=torch.bool, device=pos.device) if mask is None else mask
        wanted = wanted & (pairs <= DENSE)
        number = torch.div(total, BLOCK, rounding_mode="floor")
        blocks = [wanted & (number == n) for n in range(int(number[-1]) + 1)]
        blocks = [block for block in blocks if bool(block.any())]
    return Forecast(int(pairs.sum()), blocks, dense, estimates)


def estimate(graph: Data, owner: int, ptr: Tensor, scope: str, find: Find) -> int:
    """About how many evaluations one owner takes: counted for some of its candidates, extrapolated as a power."""
    n = int(ptr[owner + 1] - ptr[owner])
    counts = []
    for few in THINNED:
        if n <= few:
            return find(_thinned(graph, owner, ptr, scope, n)).n_evaluations
        counts.append(max(1, find(_thinned(graph, owner, ptr, scope, few)).n_evaluations))
    small, large = THINNED
    power = math.log(counts[1] / counts[0]) / math.log(large / small)
    return round(counts[1] * (n / large) ** min(max(power, 0.0), 2.0))


def _thinned(graph: Data, owner: int, ptr: Tensor, scope: str, n: int) -> Data:
    """One owner with n of its candidates, the same ones whatever the batch."""
    start, stop = int(ptr[owner]), int(ptr[owner + 1])
    chosen = torch.randperm(stop - start, generator=torch.Generator().manual_seed(0))[:n].sort()[0].to(ptr.device)
    n_atoms, n_structures = graph[keys.POS].shape[0], graph[keys.PTR].shape[0] - 1
    if scope == "structure":
        rows: dict[int, Tensor] = {n_structures: torch.tensor([owner], device=ptr.device), n_atoms: start + chosen}
        fields = {
            name: graph[name][rows[graph[name].shape[0]]]
            for name in graph.keys()
            if isinstance(graph[name], Tensor) and graph[name].dim() and graph[name].shape[0] in rows
        }
        edges = dict.fromkeys((keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC))
        fields |= {keys.BATCH: torch.zeros_like(chosen), keys.PTR: torch.tensor([0, n], device=ptr.device)}
        return replace(graph, **{**fields, **edges})
    mask = torch.zeros(n_atoms, dtype=torch.bool, device=ptr.device)
    mask[owner] = True
    own = (graph[keys.EDGE_INDEX][1] == owner).nonzero()[:, 0][chosen]
    vectors, shift = graph[keys.EDGE_VEC][own], graph[keys.CELL_SHIFT][own]
    fields = {keys.EDGE_INDEX: graph[keys.EDGE_INDEX][:, own], keys.EDGE_VEC: vectors, keys.CELL_SHIFT: shift}
    return replace(graph, **{**fields, keys.CENTER_MASK: mask})


def _candidates(method: ECSE, graph: Data, scope: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Owner, offsets, length and availability of every candidate."""
    pos, mask = graph[keys.POS], graph.get(keys.CENTER_MASK)
    if scope == "structure":
        _, vectors, available = around_centroids(pos, graph[keys.BATCH], graph[keys.PTR])
        return graph[keys.BATCH], graph[keys.PTR], torch.linalg.vector_norm(vectors, dim=1), available
    center, vectors = graph[keys.EDGE_INDEX][1], graph[keys.EDGE_VEC]
    if mask is not None:
        center, vectors = center[mask[center]], vectors[mask[center]]
    lengths = torch.linalg.vector_norm(vectors.to(torch.float64), dim=1)
    available = smooth_step((float(graph[keys.EDGE_CUTOFF]) - lengths) / method.cutoff_width)
    return center, offsets(torch.bincount(center, minlength=pos.shape[0])), lengths, available


def _contenders(key: Tensor, available: Tensor, row: Tensor, n_rows: int, width: float) -> Tensor:
    """Candidates that no fully available one outdoes: bool, (n_candidates,)."""
    complete = torch.where(available >= 1.0, key, torch.full_like(key, float("inf")))
    return (available > 0.0) & (key < (segment_min(complete, row, n_rows, float("inf")) + width)[row])
