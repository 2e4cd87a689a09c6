"""Closed-form smooth weights by stick-breaking: a candidate keeps its weight unless one of lower key takes it.

For candidates with availability a_i in [0, 1] and ordering key c_i (a distance), with a C-infinity step,

    w_i = a_i prod_{l != i} [1 - a_l step((c_i - c_l) / D)],        rest = prod_i (1 - a_i).

Ordered by key the products telescope, so that sum_i w_i + rest >= 1: the weights never need a threshold to be
normalized. They depend on invariants only and are infinitely differentiable. Steepness: |dw/dc| <= 2 / D for every
competitor. The factor behind a_i decreases with the key.

Where candidates come in groups, group j of availability g_j in the same sense, a group takes as much as its candidates
would if it were there for certain, times g_j:

    w_jk = g_j a_jk prod_{m != k} [1 - a_jm s_jm] prod_{l != j} [1 - g_l (1 - prod_m [1 - a_lm s_lm])],

s_lm = step((c_jk - c_lm) / D), rest = prod_l [1 - g_l (1 - prod_m [1 - a_lm])], and again sum w + rest >= 1: it is the
mean of what was said above over groups that are there with probability g_j, candidates with probability a_jk.

The candidates are the pairs (j, k) of an axis and its partner, all pairs of an owner against each other, grouped by
their axis, with the key

    c_jk = 1.5 d_j + d_k + d_j (0.6 cos^2 - 0.12 cos),        cos = u_j . u_k.

Near neighbors come first, and among equally near ones those at a right angle: the 12 neighbors of a close-packed atom
leave 24 pairs of lowest key, as many as the symmetry of the site has rotations, and continuity asks for no fewer. The
sign of the cosine decides between the two sides that cos^2 cannot tell apart. d_j is the only length at hand that a
pair always has and that never exceeds the distances it is compared with by much: no number here has a unit, and what
the angle adds has a slope below 1 with respect to the position of the partner. The factor 1.5 decides between (j, k)
and (k, j).
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.ops.ragged import segment_min
from symmetrize.ops.switches import smooth_step

#: The key of a pair: weight of the axis' distance, of the squared cosine, and of the cosine.
PRIMARY, ACROSS, FORWARD = 1.5, 0.6, 0.12
#: Width over which axes share, before pairs are compared, in units of that for pairs: wide, so that the key of pairs
#: decides, and not so wide that far neighbors become axes of environments that are nearly collinear.
BROAD = 1.7


def pair_key(
    axis: Tensor,
    partner: Tensor,
    scale: Tensor,
    cosine: Tensor,
    primary: float = PRIMARY,
    across: float = ACROSS,
    forward: float = FORWARD,
) -> Tensor:
    """Ordering key of pairs, from the keys of axis and partner, a length and the cosine of the angle between them.

    Returns
    -------
    Tensor of shape (n_pairs,)
    """
    return primary * axis + partner + scale * (cosine * (across * cosine - forward))


def lowest_key(
    axis: Tensor,
    partner: Tensor,
    scale: Tensor,
    primary: float = PRIMARY,
    across: float = ACROSS,
    forward: float = FORWARD,
) -> Tensor:
    """What `pair_key` is at least, whatever the angle.

    Returns
    -------
    Tensor of shape (n_pairs,)
    """
    return primary * axis + partner - scale * (forward * forward / (4.0 * across))


def contenders(available: Tensor, complete: Tensor, row: Tensor, n_rows: int, width: float) -> Tensor:
    """Which candidates can have weight at all: available, and not outdone by a fully available one.

    Anything further than ``width`` behind a candidate of availability 1 has weight exactly 0, and takes no part in the
    weights of the others. This keeps the quadratic step small.

    Parameters
    ----------
    available : Tensor of shape (n_candidates,)
        Key of a candidate, infinity for one of availability 0.
    complete : Tensor of shape (n_candidates,)
        Key of a candidate of availability 1, infinity for the others.
    row : Tensor of shape (n_candidates,)
    n_rows : int
    width : float
        D, in the unit of the key.

    Returns
    -------
    Tensor of shape (n_candidates,), bool
    """
    reach = segment_min(complete, row, n_rows, float("inf")) + width
    return available < reach.index_select(0, row)


def stick_breaking(
    available: Tensor, key: Tensor, row: Tensor, n_rows: int, width: float, block: int = 1048576
) -> tuple[Tensor, Tensor]:
    """Weights of the candidates of every row, and what is left over.

    Parameters
    ----------
    available, key : Tensor of shape (n_candidates,)
    row : Tensor of shape (n_candidates,)
        Ascending; candidates compete inside a row.
    n_rows : int
    width : float
        D, in the unit of the key.
    block : int
        Pairs of competitors that are held at a time.

    Returns
    -------
    weights : Tensor of shape (n_candidates,)
    rest : Tensor of shape (n_rows,)
    """
    return shared_stick_breaking(torch.ones_like(available), available, key, row, row, n_rows, width, block)


def shared_stick_breaking(
    shared: Tensor,
    available: Tensor,
    key: Tensor,
    group: Tensor,
    row: Tensor,
    n_rows: int,
    width: float,
    block: int = 1048576,
) -> tuple[Tensor, Tensor]:
    """Weights of candidates that come in groups, and what is left over.

    Parameters
    ----------
    shared : Tensor of shape (n_candidates,)
        Availability of the group of a candidate, the same for all of the group.
    available, key : Tensor of shape (n_candidates,)
        Availability of the candidate where its group is available.
    group : Tensor of shape (n_candidates,)
        Ascending; a group lies in one row.
    row : Tensor of shape (n_candidates,)
        Ascending; candidates compete inside a row.
    n_rows : int
    width : float
        D, in the unit of the key.
    block : int
        Pairs of competitors that are held at a time. Rows of similar length share a rectangle, so that the short ones
        cost little however long the longest is.

    Returns
    -------
    weights : Tensor of shape (n_candidates,)
    rest : Tensor of shape (n_rows,)
    """
    n = available.shape[0]
    rest = torch.ones([n_rows], dtype=available.dtype, device=available.device)
    if n == 0:
        return available, rest
    row, group = row.contiguous(), group.contiguous()
    position = torch.arange(n, device=row.device) - torch.searchsorted(row, row)
    # Number of the group in its row, and of the candidate in its group.
    inner = torch.arange(n, device=row.device) - torch.searchsorted(group, group)
    outer = torch.cumsum((inner == 0).to(torch.int64), dim=0) - 1
    outer = outer - outer.index_select(0, torch.searchsorted(row, row))
    longest = int(position.max()) + 1
    key = key / width
    if n * longest <= block:
        return _compete(shared, available, key, row, outer, inner, n_rows, block)
    length = torch.bincount(row, minlength=n_rows).index_select(0, row)
    weights = torch.zeros_like(available)
    shorter, limit = 0, 1
    while shorter < longest:
        item = ((length > shorter) & (length <= limit)).nonzero()[:, 0]
        if item.shape[0] > 0:
            rows, local = torch.unique_consecutive(row[item], return_inverse=True)
            w, r = _compete(
                shared[item], available[item], key[item], local, outer[item], inner[item], rows.shape[0], block
            )
            weights = weights.index_copy(0, item, w)
            rest = rest.index_copy(0, rows, r)
        shorter, limit = limit, 2 * limit
    return weights, rest


def _compete(
    shared: Tensor,
    available: Tensor,
    key: Tensor,
    row: Tensor,
    outer: Tensor,
    inner: Tensor,
    n_rows: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """`shared_stick_breaking` with every row padded to the same rectangle; the key in units of the width."""
    n_outer, n_inner = int(outer.max()) + 1, int(inner.max()) + 1
    slot = (row * n_outer + outer) * n_inner + inner
    empty = torch.zeros([n_rows * n_outer * n_inner], dtype=available.dtype, device=available.device)
    a = empty.index_copy(0, slot, available).view(n_rows, n_outer, n_inner)
    d = empty.index_copy(0, slot, key).view(n_rows, n_outer, n_inner)
    first = (inner == 0).nonzero()[:, 0]
    g = torch.zeros([n_rows * n_outer], dtype=available.dtype, device=available.device)
    g = g.index_copy(0, (row * n_outer + outer).index_select(0, first), shared.index_select(0, first))
    g = g.view(n_rows, n_outer)
    rest = torch.prod(1.0 - g * (1.0 - torch.prod(1.0 - a, dim=2)), dim=1)
    n = available.shape[0]
    size = max(1, block // (n_outer * n_inner))
    numbers = torch.arange(n_outer, device=row.device)
    parts: list[Tensor] = []
    for start in range(0, n, size):
        here = row[start : start + size]
        # step(0) = 0 takes a candidate out of its own product, availability 0 takes the padding out.
        ahead = smooth_step(key[start : start + size, None, None] - d.index_select(0, here))
        kept = torch.prod(1.0 - a.index_select(0, here) * ahead, dim=2)
        if n_outer == 1:
            parts.append(kept[:, 0])
            continue
        # Where a candidate has weight its own group is available.
        present = g.index_select(0, here)
        own = numbers[None, :] == outer[start : start + size, None]
        present = torch.where(own, torch.ones_like(present), present)
        parts.append(torch.prod(1.0 - present * (1.0 - kept), dim=1))
    kept = parts[0] if len(parts) == 1 else torch.cat(parts)
    return shared * available * kept, rest


def drop_negligible(weights: Tensor, row: Tensor, n_rows: int, threshold: float) -> Tensor:
    """Switch off weights below a threshold smoothly, keeping the sum of every row.

    A weight under the threshold becomes exactly 0, above twice the threshold it is unchanged up to the common factor
    that restores the sum.

    Returns
    -------
    Tensor of shape (n,)
    """
    kept = weights * smooth_step(weights / threshold - 1.0)
    nothing = torch.zeros([n_rows], dtype=weights.dtype, device=weights.device)
    before = nothing.index_add(0, row, weights)
    after = nothing.index_add(0, row, kept)
    # Of a row that loses everything nothing is restored: 0 times whatever the factor is.
    factor = before / after.clamp(min=1e-300)
    return kept * factor.index_select(0, row)
