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
    # The frames of one atom see the same environment: where they are neighbors, it is looked for once, and repeated.
    # (A single hop is found as quickly as it is repeated.)
    owners, which = centers, centers
    if hops > 1:
        owners, which = torch.unique_consecutive(centers, return_inverse=True)
    shells = reach(edge_index, edge_ptr, n_atoms, owners, hops)
    pairs, inner = shells[-1], shells[-2] if hops > 0 else shells[0][:0]
    edge, pick = gather_rows(edge_ptr, inner % n_atoms)
    atom, atom_copy = pairs % n_atoms, pairs // n_atoms
    edge_copy = (inner // n_atoms).index_select(0, pick)
    source = torch.searchsorted(pairs, edge_copy * n_atoms + edge_index[0].index_select(0, edge))
    target = torch.searchsorted(pairs, inner).index_select(0, pick)
    if owners.shape[0] == centers.shape[0]:
        return atom, edge, atom_copy, edge_copy, source, target
    first_atom = offsets(torch.bincount(atom_copy, minlength=owners.shape[0]))
    first_edge = offsets(torch.bincount(edge_copy, minlength=owners.shape[0]))
    row, atom_copy = gather_rows(first_atom, which)
    item, edge_copy = gather_rows(first_edge, which)
    # From rows of the environment to those of each copy of it.
    sizes = first_atom[which + 1] - first_atom[which]
    shift = (torch.cumsum(sizes, dim=0) - sizes - first_atom[which]).index_select(0, edge_copy)
    return (
        atom.index_select(0, row),
        edge.index_select(0, item),
        atom_copy,
        edge_copy,
        source.index_select(0, item) + shift,
        target.index_select(0, item) + shift,
    )


def reach(edge_index: Tensor, edge_ptr: Tensor, n_atoms: int, owners: Tensor, hops: int) -> list[Tensor]:
    """Atoms within 0, 1, ... hops of each owner.

    Parameters
    ----------
    edge_index, edge_ptr : Tensor of shape (2, n_edges), (n_atoms + 1,)
        Edges sorted by center, and their offsets.
    n_atoms : int
    owners : Tensor of shape (n_owners,)
        Atoms to start from.
    hops : int

    Returns
    -------
    list of Tensor of shape (n_pairs,)
        ``number of the owner * n_atoms + atom``, ascending; ``hops + 1`` of them, each within the next one.
    """
    pairs = torch.arange(owners.shape[0], device=owners.device) * n_atoms + owners
    shells = [pairs]
    for _ in range(hops):
        edge, pick = gather_rows(edge_ptr, pairs % n_atoms)
        start = (pairs // n_atoms) * n_atoms
        reached = start.index_select(0, pick) + edge_index[0].index_select(0, edge)
        pairs = torch.unique(torch.cat([pairs, reached]))
        shells.append(pairs)
    return shells


def count_environments(
    edge_index: Tensor, edge_ptr: Tensor, n_atoms: int, owners: Tensor, hops: int, block: int = 1048576
) -> tuple[Tensor, Tensor, Tensor]:
    """What environments hold, without making copies: work and memory are those of a search for each owner.

    Parameters
    ----------
    edge_index, edge_ptr, n_atoms, owners, hops :
        See `reach`.
    block : int
        Edges that are followed at a time, at most (unless those of a single owner are more).

    Returns
    -------
    atoms : Tensor of shape (n_owners,)
    edges : Tensor of shape (n_owners,)
        Edges that end within ``hops - 1`` of the owner.
    nested : Tensor of shape (n_owners,)
        Edges that each layer of a deep network needs, added up over ``hops`` layers: the last one needs those of the
        owner, the one before those of its neighbors, and so on.
    """
    degree = edge_ptr[1:] - edge_ptr[:-1]
    atoms, edges, nested = torch.ones_like(owners), torch.zeros_like(owners), torch.zeros_like(owners)
    if hops == 0 or owners.shape[0] == 0:
        return atoms, edges, nested
    # Every path is an upper bound of what is followed; blocks are cut by it, so that dense parts of a batch fit, too.
    paths = degree.to(torch.float64)
    for _ in range(hops - 1):
        paths = (degree + torch.zeros_like(paths).index_add(0, edge_index[1], paths[edge_index[0]])).clamp(max=1e15)
    total = torch.cumsum(paths[owners].clamp(max=float(edge_index.shape[1])) + 1.0, dim=0)
    start, before = 0, 0.0
    while start < owners.shape[0]:
        stop = max(start + 1, int(torch.searchsorted(total, before + block, right=True)))
        shells = reach(edge_index, edge_ptr, n_atoms, owners[start:stop], hops)
        atoms[start:stop] = torch.bincount(shells[-1] // n_atoms, minlength=stop - start)
        for inner in shells[:-1]:
            edges[start:stop] = torch.zeros_like(owners[start:stop]).index_add(
                0, inner // n_atoms, degree[inner % n_atoms]
            )
            nested[start:stop] += edges[start:stop]
        start, before = stop, float(total[stop - 1])
    return atoms, edges, nested


def copied_sizes(batch: Data, owners: Tensor, scope: str, hops: int | None) -> Tensor:
    """Number of atoms of each copy: Tensor of shape (n,).

    Environments of one hop count their neighbors, of which several may be images of one atom and share a row.
    """
    ptr = batch[keys.PTR]
    if scope == "structure":
        return (ptr[1:] - ptr[:-1])[owners]
    if hops is None or hops <= 1:
        return environment_sizes(_edges(batch), ptr, batch[keys.BATCH], hops or 0)[owners]
    atoms, which = torch.unique(owners, return_inverse=True)
    return count_environments(_edges(batch), edge_offsets(batch), batch[keys.POS].shape[0], atoms, hops)[0][which]


def environment_sizes(edge_index: Tensor, ptr: Tensor, structure: Tensor, hops: int) -> Tensor:
    """`copied_sizes` of the environments of all atoms, in plain tensors, for TorchScript."""
    n_atoms = structure.shape[0]
    degree = torch.bincount(edge_index[1], minlength=n_atoms)
    if hops == 0:
        return torch.ones_like(structure)
    if hops == 1:
        return 1 + degree
    everyone = torch.arange(n_atoms, device=structure.device)
    return count_environments(edge_index, offsets(degree), n_atoms, everyone, hops)[0]


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
        Atoms in their copies, see `copied_sizes`.
    invariant : bool
        Whether they belong to the point stratum: centers alone, invariant part of the outputs.
    """
    evaluated = (frames.stratum != int(Stratum.AUXILIARY)) & (frames.weights.detach() > 0.0)
    point = frames.stratum == int(Stratum.POINT)
    for invariant, chosen in ((False, evaluated & ~point), (True, evaluated & point)):
        frame = chosen.nonzero()[:, 0]
        # Frames of one owner next to each other: their environment is then found once for all of them.
        frame = frame[torch.argsort(frames.owner[frame], stable=True)]
        sizes = copied_sizes(batch, frames.owner[frame], frames.scope, 0 if invariant else hops)
        for part in pack(sizes, limit):
            yield frame[part], int(sizes[part].sum()), invariant


def _edges(batch: Data) -> Tensor:
    edges: Tensor | None = batch.get(keys.EDGE_INDEX)
    if edges is None:
        return torch.zeros(2, 0, dtype=torch.int64, device=batch[keys.POS].device)
    return edges
