"""Closed-form smooth weights by stick-breaking: a candidate keeps its weight unless a nearer one takes it.

For candidates with availability a_j in [0, 1] and ordering key d_j (a distance), with a C-infinity step,

    w_j = a_j prod_{l != j} [1 - a_l step((d_j - d_l) / D)],        rest = prod_j (1 - a_j).

Ordered by key the products telescope, so that sum_j w_j + rest >= 1: the weights never need a threshold to be
normalized. They depend on invariants only and are infinitely differentiable. Steepness: |dw/dd| <= 2 / D for every
competitor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.ops.ragged import pad_rows, positions_in_rows, segment_min, segment_sum
from symmetrize.ops.switches import smooth_step


def contenders(available: Tensor, key: Tensor, row: Tensor, n_rows: int, width: float) -> Tensor:
    """Which candidates can have weight at all: available, and not outdone by a fully available one.

    Anything further than ``width`` behind a candidate of availability 1 has weight exactly 0, and takes no part in the
    weights of the others. This keeps the quadratic step small.

    Returns
    -------
    Tensor of shape (n_candidates,), bool
    """
    infinity = float("inf")
    complete = torch.where(available >= 1.0, key, torch.full_like(key, infinity))
    reach = segment_min(complete, row, n_rows, infinity) + width
    return (available > 0.0) & (key < reach[row])


def stick_breaking(available: Tensor, key: Tensor, row: Tensor, n_rows: int, width: float) -> tuple[Tensor, Tensor]:
    """Weights of the candidates of every row, and what is left over.

    Parameters
    ----------
    available, key : Tensor of shape (n_candidates,)
    row : Tensor of shape (n_candidates,)
        Ascending; candidates compete inside a row.
    n_rows : int
    width : float
        D, in the unit of the key.

    Returns
    -------
    weights : Tensor of shape (n_candidates,)
    rest : Tensor of shape (n_rows,)
    """
    if available.shape[0] == 0:
        return available, torch.ones([n_rows], dtype=available.dtype, device=available.device)
    position = positions_in_rows(row, n_rows)
    longest = int(position.max()) + 1
    a = pad_rows(available, row, position, n_rows, longest, 0.0)
    d = pad_rows(key, row, position, n_rows, longest, 0.0)
    # step(0) = 0 takes j out of its own product, a_l = 0 takes the padding out.
    beaten = a[:, None, :] * smooth_step((d[:, :, None] - d[:, None, :]) / width)
    weights = a * torch.prod(1.0 - beaten, dim=2)
    return weights[row, position], torch.prod(1.0 - a, dim=1)


def drop_negligible(weights: Tensor, row: Tensor, n_rows: int, threshold: float) -> Tensor:
    """Switch off weights below a threshold smoothly, keeping the sum of every row.

    A weight under the threshold becomes exactly 0, above twice the threshold it is unchanged up to the common factor
    that restores the sum.

    Returns
    -------
    Tensor of shape (n,)
    """
    kept = weights * smooth_step(weights / threshold - 1.0)
    before = segment_sum(weights, row, n_rows)
    after = segment_sum(kept, row, n_rows)
    factor = before / torch.where(after > 0.0, after, torch.ones_like(after))
    return kept * factor[row]
