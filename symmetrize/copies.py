"""Which atoms and edges have to be evaluated in a frame: whole structures, or the environments of atoms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Copies
from symmetrize.frames import FrameSet, Stratum
from symmetrize.ops.ragged import gather_rows, offsets


def edge_offsets(batch: Data) -> Tensor:
    """Offsets of every center's edges in a list sorted by center: Tensor of shape (n_atoms + 1,)."""
    n_atoms = batch[keys.POS].shape[0]
    edges = batch.get(keys.EDGE_INDEX)
    if edges is None:
        return torch.zeros(n_atoms + 1, dtype=torch.int64, device=batch[keys.POS].device)
    return offsets(torch.bincount(edges[1], minlength=n_atoms))


def copy_structures(batch: Data, edge_ptr: Tensor, structures: Tensor) -> Copies:
    """Copies of whole structures, one for every entry of ``structures``; ``edge_ptr`` is that of `edge_offsets`."""
    atom, edge, atom_copy, edge_copy, source, target = gather_structures(
        _edges(batch), edge_ptr, batch[keys.PTR], structures
    )
    mask = batch.get(keys.CENTER_MASK)
    center = torch.ones_like(atom, dtype=torch.bool) if mask is None else mask[atom]
    return Copies(atom, edge, atom_copy, edge_copy, source, target, center)


def gather_structures(
    edge_index: Tensor, edge_ptr: Tensor, ptr: Tensor, structures: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`copy_structures` in plain tensors, for TorchScript: all fields of `Copies` but the last."""
    atom, atom_copy = gather_rows(ptr, structures)
    # Edges are sorted by center and atoms by structure, so a structure's edges are contiguous.
    edge, edge_copy = gather_rows(edge_ptr[ptr], structures)
    starts = offsets(ptr[structures + 1] - ptr[structures])[:-1]
    shift = (starts - ptr[structures])[edge_copy]
    return atom, edge, atom_copy, edge_copy, edge_index[0, edge] + shift, edge_index[1, edge] + shift


def copy_stars(edge_ptr: Tensor, centers: Tensor) -> Copies:
    """Copies of centers with their edges, without rows for the neighbors (for backbones that share work)."""
    edge, edge_copy = gather_rows(edge_ptr, centers)
    copy = torch.arange(centers.shape[0], device=centers.device)
    center = torch.ones_like(copy, dtype=torch.bool)
    return Copies(centers, edge, copy, edge_copy, torch.zeros_like(edge[:0]), edge_copy, center)


def copy_environments(batch: Data, edge_ptr: Tensor, centers: Tensor, hops: int) -> Copies:
    """Copies of everything that an output of each center depends on after some number of message-passing hops.

    Edges are those that end on an atom within ``hops - 1`` of the center. Periodic images of one atom share a row: in a
    network that reads edge vectors they carry the same features. With 0 hops only the centers remain.
    """
    n_atoms = batch[keys.POS].shape[0]
    atom, edge, atom_copy, edge_copy, source, target = gather_environments(
        _edges(batch), edge_ptr, n_atoms, centers, hops
    )
    return Copies(atom, edge, atom_copy, edge_copy, source, target, atom == centers[atom_copy])


def gather_environments(
    edge_index: Tensor, edge_ptr: Tensor, n_atoms: int, centers: Tensor, hops: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`copy_environments` in plain tensors, for TorchScript: all fields of `Copies` but the last."""
    # A pair (copy, atom) is one integer; sorted pairs are grouped by copy and ascending by atom.
    pairs = torch.arange(centers.shape[0], device=centers.device) * n_atoms + centers
    inner = pairs[:0]
    for _ in range(hops):
        inner = pairs
        edge, pick = gather_rows(edge_ptr, inner % n_atoms)
        reached = (inner // n_atoms)[pick] * n_atoms + edge_index[0, edge]
        pairs = torch.unique(torch.cat([inner, reached]))
    edge, pick = gather_rows(edge_ptr, inner % n_atoms)
    edge_copy = (inner // n_atoms)[pick]
    atom, atom_copy = pairs % n_atoms, pairs // n_atoms
    source = torch.searchsorted(pairs, edge_copy * n_atoms + edge_index[0, edge])
    target = torch.searchsorted(pairs, edge_copy * n_atoms + edge_index[1, edge])
    return atom, edge, atom_copy, edge_copy, source, target


def copied_sizes(batch: Data, owners: Tensor, scope: str, hops: int | None) -> Tensor:
    """Number of atoms of each copy (for environments of more than one hop, an upper bound): Tensor of shape (n,)."""
    ptr = batch[keys.PTR]
    if scope == "structure":
        return (ptr[1:] - ptr[:-1])[owners]
    return environment_sizes(_edges(batch), ptr, batch[keys.BATCH], hops or 0)[owners]


def environment_sizes(edge_index: Tensor, ptr: Tensor, structure: Tensor, hops: int) -> Tensor:
    """`copied_sizes` of the environments of all atoms, in plain tensors, for TorchScript."""
    whole = (ptr[1:] - ptr[:-1])[structure]
    size = torch.ones_like(whole)
    for _ in range(hops):
        size = 1 + torch.zeros_like(size).index_add(0, edge_index[1], size[edge_index[0]])
        size = torch.minimum(size, whole.clamp(min=2) * 64)
    return size if hops == 1 else torch.minimum(size, whole)


def pack(sizes: Tensor, limit: int) -> Iterator[Tensor]:
    """Indices of copies, chunk by chunk: similar sizes together, a total of at most ``limit`` unless one is larger."""
    order, stops = packed(sizes, limit)
    return (order[start:stop] for start, stop in pairwise([0, *stops]))


def packed(sizes: Tensor, limit: int) -> tuple[Tensor, list[int]]:
    """`pack` as an order of the copies and the end of every chunk in it, for TorchScript."""
    order = torch.argsort(sizes, stable=True)
    ends = torch.cumsum(sizes[order], dim=0)
    stops: list[int] = []
    start, before = 0, 0
    while start < order.shape[0]:
        start = max(start + 1, int(torch.searchsorted(ends, before + limit, right=True)))
        before = int(ends[start - 1])
        stops.append(start)
    return order, stops


def divide(batch: Data, frames: FrameSet, hops: int | None, limit: int) -> Iterator[tuple[Tensor, int, bool]]:
    """Frames to be evaluated together: what is evaluated, and what is predicted, is decided here.

    Yields
    ------
    frame : Tensor of shape (n,)
        Numbers of frames, such that their copies hold at most ``limit`` atoms, unless a single one is larger.
    n_atoms : int
        Atoms in their copies (an upper bound, see `copied_sizes`).
    invariant : bool
        Whether they belong to the point stratum: centers alone, invariant part of the outputs.
    """
    evaluated = (frames.stratum != int(Stratum.AUXILIARY)) & (frames.weights.detach() > 0.0)
    point = frames.stratum == int(Stratum.POINT)
    for invariant, chosen in ((False, evaluated & ~point), (True, evaluated & point)):
        frame = chosen.nonzero()[:, 0]
        sizes = copied_sizes(batch, frames.owner[frame], frames.scope, 0 if invariant else hops)
        for part in pack(sizes, limit):
            yield frame[part], int(sizes[part].sum()), invariant


def _edges(batch: Data) -> Tensor:
    edges: Tensor | None = batch.get(keys.EDGE_INDEX)
    if edges is None:
        return torch.zeros(2, 0, dtype=torch.int64, device=batch[keys.POS].device)
    return edges
