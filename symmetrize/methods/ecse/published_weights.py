"""Frames and weights of the ECSE article (arXiv 2305.19302), as plain tensor code without loops over pairs.

What is computed is stated in `symmetrize.methods.ecse.paper`; names of its quantities are the article's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.methods.ecse.coordinate_systems import frames_from_normals, unit_vectors
from symmetrize.ops.ragged import gather_rows, segment_max, segment_sum
from symmetrize.ops.switches import smooth_cutoff, smooth_step

#: W_0(1/e) of Lambert's function: what a smooth maximum of two numbers falls short of the larger one, times beta.
LAMBERT = 0.2784645427610738
#: The auxiliary model counts fully for a smooth maximum of the weights of R - D = 0 and not at all from R = 0.5 on.
AUXILIARY = (0.5, 0.5)
#: Pruning is off up to R - D = 0.25, and fully on from R = 0.5.
ONSET = (0.5, 0.25)
#: Weights below 0.9 of the smooth maximum vanish, those above the sum of the two stay.
PRUNED = (0.9, 0.1)


def smooth_maximum(values: Tensor, counts: Tensor, row: Tensor, n_rows: int, beta: float) -> Tensor:
    """SmoothMax_beta(v; p) = sum p v exp(beta v) / sum p exp(beta v) of every row, 0 for none.

    Parameters
    ----------
    values : Tensor of shape (n,)
    counts : Tensor of shape (n,)
        p > 0.
    row : Tensor of shape (n,)
    n_rows : int
    beta : float
        Negative for a smooth minimum.

    Returns
    -------
    Tensor of shape (n_rows,)
    """
    with torch.no_grad():
        largest = segment_max(beta * values, row, n_rows, -float("inf"))
    share = counts * torch.exp(beta * values - largest.index_select(0, row))
    total = segment_sum(share, row, n_rows)
    return segment_sum(share * values, row, n_rows) / torch.where(total > 0.0, total, torch.ones_like(total))


def inner_cutoffs(
    units: Tensor,
    lengths: Tensor,
    center: Tensor,
    n_centers: int,
    ptr: Tensor,
    cutoff: float,
    cutoff_width: float,
    threshold: float,
    sine_width: float,
    beta: float,
) -> Tensor:
    """R_in of every center: a smooth minimum, over pairs of neighbors that are not collinear, of what reaches both.

    Returns
    -------
    Tensor of shape (n_centers,)
    """
    second, first = gather_rows(ptr, center)
    inside = lengths.detach() < cutoff
    chosen = ((second > first) & inside.index_select(0, first) & inside.index_select(0, second)).nonzero()[:, 0]
    first, second = first.index_select(0, chosen), second.index_select(0, chosen)
    cosine = (units.index_select(0, first) * units.index_select(0, second)).sum(dim=1)
    # sin^2 is compared with numbers of order 1 only: from the cosine it is precise enough.
    off_line = ((1.0 - cosine.detach() ** 2) > threshold).nonzero()[:, 0]
    first, second = first.index_select(0, off_line), second.index_select(0, off_line)
    sine = 1.0 - cosine.index_select(0, off_line) ** 2
    open_ = smooth_cutoff(lengths, cutoff, cutoff_width)
    counts = open_.index_select(0, first) * open_.index_select(0, second) * smooth_step((sine - threshold) / sine_width)
    # A count of 0 has derivatives 0 as well.
    there = (counts.detach() > 0.0).nonzero()[:, 0]
    counts, first, second = counts.index_select(0, there), first.index_select(0, there), second.index_select(0, there)
    one, other = lengths.index_select(0, first), lengths.index_select(0, second)
    values = one * torch.sigmoid(beta * (one - other)) + other * torch.sigmoid(beta * (other - one)) + LAMBERT / beta
    always = torch.arange(n_centers, device=center.device)
    values = torch.cat([values, torch.full([n_centers], cutoff, dtype=values.dtype, device=values.device)])
    counts = torch.cat([counts, torch.ones([n_centers], dtype=values.dtype, device=values.device)])
    row = torch.cat([center.index_select(0, first), always])
    return smooth_maximum(values, counts, row, n_centers, -beta) + cutoff_width


def weighted_frames(
    vectors: Tensor,
    center: Tensor,
    n_centers: int,
    cutoff: float,
    cutoff_width: float,
    threshold: float,
    sine_width: float,
    beta: float,
    linear: bool,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coordinate systems of all ordered pairs of neighbors, and their weights before anything is pruned.

    Parameters
    ----------
    vectors : Tensor of shape (n_edges, 3), float64
        From the centers to their neighbors.
    center : Tensor of shape (n_edges,)
        Ascending.
    n_centers : int
    cutoff, cutoff_width : float
        R_out and D_R.
    threshold, sine_width : float
        W and D_W.
    beta : float
    linear : bool
        Whether weights have the factor (z - W + D_W) / D_W.
    least : float
        Frames of this weight or less are left out.

    Returns
    -------
    rotations : Tensor of shape (n_frames, 3, 3)
    weights : Tensor of shape (n_frames,)
    center, first, second : Tensor of shape (n_frames,)
        The center, and the edges to the two neighbors.
    """
    numbers = torch.arange(n_centers + 1, device=center.device)
    units, lengths = unit_vectors(vectors)
    ptr = torch.searchsorted(center.contiguous(), numbers)
    inner = inner_cutoffs(
        units, lengths, center, n_centers, ptr, cutoff, cutoff_width, threshold, sine_width, beta
    ).index_select(0, center)
    near = (lengths.detach() < inner.detach()).nonzero()[:, 0]
    around = center.index_select(0, near)
    available = smooth_cutoff(lengths.index_select(0, near), inner.index_select(0, near), cutoff_width)
    ptr = torch.searchsorted(around, numbers)
    second, first = gather_rows(ptr, around)
    distinct = (first != second).nonzero()[:, 0]
    first, second = first.index_select(0, distinct), second.index_select(0, distinct)
    axis, partner = (
        units.index_select(0, near.index_select(0, first)),
        units.index_select(0, near.index_select(0, second)),
    )
    normal = torch.linalg.cross(axis, partner)
    square = (normal * normal).sum(dim=1)
    onset = threshold - sine_width
    chosen = (square.detach() > onset).nonzero()[:, 0]
    square, first, second = (
        square.index_select(0, chosen),
        first.index_select(0, chosen),
        second.index_select(0, chosen),
    )
    open_ = smooth_step((square - onset) / sine_width)
    if linear:
        open_ = open_ * (square - onset) / sine_width
    weights = available.index_select(0, first) * available.index_select(0, second) * open_
    kept = (weights.detach() > least).nonzero()[:, 0]
    chosen = chosen.index_select(0, kept)
    first, second, square = first.index_select(0, kept), second.index_select(0, kept), square.index_select(0, kept)
    normal = normal.index_select(0, chosen) / torch.sqrt(square)[:, None]
    rotations = frames_from_normals(axis.index_select(0, chosen), normal)
    return (
        rotations,
        weights.index_select(0, kept),
        around.index_select(0, first),
        near.index_select(0, first),
        near.index_select(0, second),
    )


def auxiliary_weight(weights: Tensor, row: Tensor, n_rows: int, beta: float) -> tuple[Tensor, Tensor]:
    """Weight of the auxiliary model, and how far pruning is off (1: fully), from the smooth maximum of the weights.

    Returns
    -------
    w_aux, off : Tensor of shape (n_rows,)
    """
    largest = smooth_maximum(weights, weights, row, n_rows, beta)
    return smooth_cutoff(largest, *AUXILIARY), smooth_cutoff(largest, *ONSET)


def prune(weights: Tensor, row: Tensor, off: Tensor, beta: float) -> Tensor:
    """One pass of pruning: w [ q_0(w | 0.9 m, 0.1 m) (1 - t) + t ], m the smooth maximum and t how far it is off.

    Returns
    -------
    Tensor of shape (n_frames,)
    """
    largest = smooth_maximum(weights, weights, row, off.shape[0], beta).index_select(0, row)
    start, width = PRUNED
    return _mixed(weights, smooth_step((weights - start * largest) / (width * largest)), off.index_select(0, row))


def prune_species(weights: Tensor, kinds: Tensor, row: Tensor, off: Tensor, beta: float) -> Tensor:
    """Keep frames of the last kind: w [ q_0(kind | K - 1/2, 1/2) (1 - t) + t ], K the smooth maximum of the kinds.

    Parameters
    ----------
    weights : Tensor of shape (n_frames,)
    kinds : Tensor of shape (n_frames,)
        Whole numbers.
    row, off, beta
        As in `prune`.

    Returns
    -------
    Tensor of shape (n_frames,)
    """
    largest = smooth_maximum(kinds, weights, row, off.shape[0], beta).index_select(0, row)
    return _mixed(weights, smooth_step((kinds - largest + 0.5) / 0.5), off.index_select(0, row))


def _mixed(weights: Tensor, factor: Tensor, off: Tensor) -> Tensor:
    return weights * (factor * (1.0 - off) + off)
