"""Full neighbor lists of batches, by the vesin library, with our own reading of cells."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from vesin_torch import NeighborList


def complete_cell(cell: Tensor, pbc: Tensor) -> Tensor:
    """Replace the lattice vectors of non-periodic directions by unit vectors orthogonal to the others.

    Parameters
    ----------
    cell : Tensor of shape (3, 3)
    pbc : Tensor of shape (3,), bool

    Returns
    -------
    Tensor of shape (3, 3), float64
    """
    cell = cell.detach().to(torch.float64)
    if bool(pbc.all()):
        return cell
    periodic = cell[pbc]
    _, _, right = torch.linalg.svd(periodic) if len(periodic) else (None, None, torch.eye(3, dtype=torch.float64))
    completed = cell.clone()
    completed[~pbc] = right[len(periodic) :]
    return completed


@lru_cache(maxsize=8)
def _calculator(cutoff: float) -> NeighborList:
    return NeighborList(cutoff=cutoff, full_list=True)


def neighbor_list(pos: Tensor, ptr: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """All pairs (neighbor, center) within a cutoff, periodic images included, grouped by structure.

    Parameters
    ----------
    pos : Tensor of shape (n_atoms, 3)
    ptr : Tensor of shape (n_structures + 1,)
    cell : Tensor of shape (n_structures, 3, 3)
    pbc : Tensor of shape (n_structures, 3), bool
        Any mixture of directions; atoms may lie outside the cell.
    cutoff : float

    Returns
    -------
    edge_index : Tensor of shape (2, n_edges)
        Row 0 the neighbor, row 1 the center; sorted by center.
    cell_shift : Tensor of shape (n_edges, 3)
        ``edge_vec = pos[neighbor] + cell_shift @ cell - pos[center]``.
    """
    device = pos.device
    points = pos.detach().to("cpu", torch.float64)
    starts, boxes, periodic = ptr.tolist(), cell.detach().cpu(), pbc.cpu()
    calculator = _calculator(float(cutoff))
    low, high = _bounds(points, torch.tensor(starts).diff())
    together, alone = _split(low, high, starts, periodic, float(cutoff))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    if together:
        found.append(_finite(calculator, points, low[together], high[together], starts, together, cutoff))
    for s in alone:
        first, last = starts[s], starts[s + 1]
        part = points[first:last] if bool(periodic[s].any()) else _without_gaps(points[first:last], float(cutoff))
        i, j, shift = calculator.compute(part, complete_cell(boxes[s], periodic[s]), periodic[s], "ijS")
        found.append((i.to(torch.int64) + first, j.to(torch.int64) + first, shift.to(torch.int64)))
    if not found:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return torch.stack([empty, empty]), torch.zeros(0, 3, dtype=torch.int64, device=device)
    center, neighbor, cell_shift = (torch.cat(parts) for parts in zip(*found, strict=True))
    center, order = torch.sort(center, stable=True)
    edges = torch.stack([neighbor.index_select(0, order), center])
    return edges.to(device), cell_shift.index_select(0, order).to(device)


def _split(low: Tensor, high: Tensor, starts: list[int], pbc: Tensor, cutoff: float) -> tuple[list[int], list[int]]:
    """Structures that share one call of the library, and those that need one each: periodic or very large ones."""
    # Next to something much larger than the cutoff, offsets would cost the others digits.
    shared = (~pbc.any(dim=1) & ((high - low).amax(dim=1) <= 64.0 * cutoff)).tolist()
    filled = [s for s, (first, last) in enumerate(pairwise(starts)) if last > first]
    return [s for s in filled if shared[s]], [s for s in filled if not shared[s]]


def _bounds(points: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of each structure: Tensor of shape (n_structures, 3), twice."""
    index = torch.repeat_interleave(counts)[:, None].expand(-1, 3)
    limit = torch.full((counts.shape[0], 3), float("inf"), dtype=points.dtype)
    return limit.scatter_reduce(0, index, points, "amin"), (-limit).scatter_reduce(0, index, points, "amax")


def _without_gaps(points: Tensor, cutoff: float) -> Tensor:
    """Coordinates with the same pairs within the cutoff, in which empty space along an axis is at most two cutoffs.

    The library divides the box around all atoms into cells, and does not survive one that is mostly empty.
    """
    values, order = torch.sort(points, dim=0)
    excess = torch.cumsum((values.diff(dim=0) - 2.0 * cutoff).clamp(min=0.0), dim=0)
    moved = values - torch.cat([values[:1], values[:1] + excess])
    return torch.zeros_like(points).scatter(0, order, moved)


def _finite(
    calculator: NeighborList,
    points: Tensor,
    low: Tensor,
    high: Tensor,
    starts: list[int],
    structures: list[int],
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of several finite structures in one call, in which they are out of each other's reach.

    Every structure is moved to a cell of a cubic grid of its own. Only indices are taken from there, and an offset of
    a few hundred cutoffs costs the last three digits of a distance: it can decide only about a pair that is at the
    cutoff to within rounding.
    """
    counts = torch.tensor([starts[s + 1] - starts[s] for s in structures])
    copy = torch.repeat_interleave(counts)
    if len(structures) == len(starts) - 1:
        atom = torch.arange(points.shape[0])
    else:
        atom = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in structures])
    spacing = float((high - low).max()) + 1.5 * cutoff
    side = math.ceil(round(len(structures) ** (1.0 / 3.0), 6))
    number = torch.arange(len(structures))
    grid = torch.stack([number % side, number // side % side, number // (side * side)], dim=1)
    moved = points.index_select(0, atom) + (grid * spacing - low).index_select(0, copy)
    box = torch.eye(3, dtype=torch.float64)
    i, j = calculator.compute(moved, box, torch.zeros(3, dtype=torch.bool), "ij")
    i, j = i.to(torch.int64), j.to(torch.int64)
    return atom[i], atom[j], torch.zeros(i.shape[0], 3, dtype=torch.int64)
