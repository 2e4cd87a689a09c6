"""Full neighbor lists of batches, by the vesin library, with our own reading of cells."""

from __future__ import annotations

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
    neighbors, centers, shifts = [], [], []
    calculator = _calculator(float(cutoff))
    for s, (first, last) in enumerate(pairwise(starts)):
        if last == first:
            continue
        box = complete_cell(boxes[s], periodic[s])
        i, j, shift = calculator.compute(points[first:last], box, periodic[s], "ijS")
        centers.append(i.to(torch.int64) + first)
        neighbors.append(j.to(torch.int64) + first)
        shifts.append(shift.to(torch.int64))
    if not centers:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return torch.stack([empty, empty]), torch.zeros(0, 3, dtype=torch.int64, device=device)
    center, neighbor, cell_shift = torch.cat(centers), torch.cat(neighbors), torch.cat(shifts)
    order = torch.argsort(center, stable=True)
    return torch.stack([neighbor[order], center[order]]).to(device), cell_shift[order].to(device)
