"""The stratified form of ECSE: a smooth partition over frames, axes and the point.

A cloud of candidates around a center has one of three kinds of stabiliser: none (two directions that are not
collinear), the rotations about an axis (everything on one line), all rotations (nothing there). The weights of the
three strata are those of stick-breaking (see `weights`), among all pairs of an axis j and a partner k, and, for what
they leave over, among the axes:

    frame (j, k): w_jk        axis j: b w_j        point: b B

with w_jk from the availabilities a_jk = g_k step(sin / sin_0), the key of the pair, and the availability of the axis:
its share among all axes by distance, over 1.7 times the width. What pairs leave over is b, w_j comes from g_j and the
distance, and B = prod_j (1 - g_j). In total at least sum w_jk + b >= 1.

The axis stratum is the n-fold average about the axis over frames attached to all partners, with weights
omega_jk ~ (g_k h_jk^2)^(n/2), h_jk the distance of the partner from the axis. A backbone's dependence on the angle
about the axis is a Fourier series whose m-th term is O(h^m); the average removes every m that n does not divide. On an
exactly collinear cloud, where no partner defines an angle, any frame with that axis gives the same average.

Pure tensor code, differentiable any number of times, without loops over centers, neighbors or frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.methods.ecse.coordinate_systems import (
    axis_frames,
    frames_from_normals,
    pair_frames,
    unit_vectors,
    with_mirrors,
)
from symmetrize.methods.ecse.weights import (
    BROAD,
    contenders,
    drop_negligible,
    lowest_key,
    pair_key,
    shared_stick_breaking,
    stick_breaking,
)
from symmetrize.ops.ragged import gather_rows, segment_max, segment_min, segment_sum
from symmetrize.ops.rotations import cyclic_group
from symmetrize.ops.switches import smooth_step


def stratify(
    vectors: Tensor,
    available: Tensor,
    reach: Tensor,
    ptr: Tensor,
    width: float,
    sine_width: float,
    order: int,
    mirror: bool,
    collinear: float,
    rigid_below: float,
    threshold: float,
    frame: int = 0,
    axial: int = 1,
    point: int = 2,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    scale: Tensor | None = None,
    broad: float = BROAD,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames and weights of every owner from the candidates around it.

    Parameters
    ----------
    vectors : Tensor of shape (n_candidates, 3), float64
        From the owner's origin to the candidates, grouped by owner.
    available : Tensor of shape (n_candidates,)
        g in [0, 1], 0 where a candidate appears, disappears or has no direction.
    reach : Tensor of shape (n_candidates,)
        Factor of h^2 in the weights of the axis stratum, 0 where a candidate appears or disappears.
    ptr : Tensor of shape (n_owners + 1,)
        Offsets of the owners' candidates.
    width : float
        D, the width over which pairs of similar key, and candidates of similar distance, share their weight.
    sine_width : float
        A partner counts fully from this sine of its angle with the axis on, and not at all on the axis.
    order : int
        n of the n-fold average, even.
    mirror : bool
        Add the mirror image of every frame (the group O(3)).
    collinear : float
        sin^2 below which rounding decides the direction of a partner about the axis.
    rigid_below : float
        sin^2 below which, for all partners of an axis, the angle about it is held constant in derivatives.
    threshold : float
        Weights below it are switched off.
    frame, axial, point : int
        Numbers of the strata.
    lengths : Tensor of shape (n_candidates,), optional
        Of the vectors, if they are known; positive, also where a vector is zero and therefore not available.
    key : Tensor of shape (n_candidates,), optional
        What candidates are ordered by: those of lowest key come first. By default the length.
    scale : Tensor of shape (n_candidates,), optional
        Length that the preference for a right angle is measured in. By default that of the axis.

    broad : float
        Width over which axes share before pairs are compared, in units of ``width``.

    Returns
    -------
    rotations : Tensor of shape (n_frames, 3, 3)
    weights : Tensor of shape (n_frames,)
    owner : Tensor of shape (n_frames,)
    stratum : Tensor of shape (n_frames,)
    """
    n_owners = ptr.shape[0] - 1
    infinity = float("inf")
    owner_of = torch.repeat_interleave(ptr[1:] - ptr[:-1], output_size=vectors.shape[0])
    if lengths is None:
        units, lengths = unit_vectors(vectors)
    else:
        units = vectors / lengths[:, None]
    key = lengths if key is None else key
    scale = lengths if scale is None else scale

    with torch.no_grad():
        # The key of those that are available at all, and of those that are so fully.
        open_key = key.masked_fill(available <= 0.0, infinity)
        full_key = key.masked_fill(available < 1.0, infinity)
        axis = contenders(open_key, full_key, owner_of, n_owners, broad * width).nonzero()[:, 0]
    # Near neighbors are axes; among them the pairs decide.
    on_axis, _ = stick_breaking(
        available.index_select(0, axis),
        key.index_select(0, axis),
        owner_of.index_select(0, axis),
        n_owners,
        broad * width,
    )
    shared = torch.zeros_like(available).index_copy(0, axis, on_axis)
    with torch.no_grad():
        open_axis = key.masked_fill(shared <= 0.0, infinity)
        full_axis = key.masked_fill(shared < 1.0, infinity)
        first, second = _contending_pairs(
            units, scale, open_axis, full_axis, open_key, full_key, owner_of, ptr, width, sine_width
        )
    owner = owner_of.index_select(0, first)
    axis_unit, partner_unit = units.index_select(0, first), units.index_select(0, second)
    normal = torch.linalg.cross(axis_unit, partner_unit)
    sine = _sine(normal, sine_width)
    offered = available.index_select(0, second) * smooth_step(sine / sine_width)
    compared = pair_key(
        key.index_select(0, first),
        key.index_select(0, second),
        scale.index_select(0, first),
        _row_sums(axis_unit * partner_unit),
    )
    weights, left = shared_stick_breaking(
        shared.index_select(0, first), offered, compared, first, owner, n_owners, width
    )

    # Where everything has a full coordinate system, this is all.
    complete = not bool((left > 0.0).any())
    if complete:
        weights = drop_negligible(weights, owner, n_owners, threshold * order)
        keep = (weights > 0.0).nonzero()[:, 0]
        weights, owner = weights.index_select(0, keep), owner.index_select(0, keep)
        rotations = _full_frames(axis_unit, normal, sine, keep)
        if mirror:
            rotations = with_mirrors(rotations).view(-1, 3, 3)
            weights, owner = (0.5 * weights).repeat(2), owner.repeat(2)
        return rotations, weights, owner, torch.full_like(owner, frame)

    # What is left goes to the axes, and what they leave to the point.
    needy = (left > 0.0).index_select(0, owner_of)
    axis = (contenders(open_key, full_key, owner_of, n_owners, width) & needy).nonzero()[:, 0]
    axis_owner, line_unit = owner_of.index_select(0, axis), units.index_select(0, axis)
    on_axis, point_weight = stick_breaking(
        available.index_select(0, axis), key.index_select(0, axis), axis_owner, n_owners, width
    )
    on_axis, point_weight = on_axis * left.index_select(0, axis_owner), point_weight * left
    partner, row, attached_weight, rigid, free = _attach(
        vectors, units, lengths, reach, axis, on_axis, ptr, axis_owner, order, collinear, rigid_below
    )
    # One list of weights, in which negligible ones are switched off before any frame is built.
    free_weight = on_axis.index_select(0, free)
    n_pair, n_attached, n_free = weights.shape[0], attached_weight.shape[0], free.shape[0]
    weights = torch.cat([weights, attached_weight, free_weight, point_weight])
    owner = torch.cat([owner, axis_owner[row], axis_owner[free], torch.arange(n_owners, device=ptr.device)])
    weights = drop_negligible(weights, owner, n_owners, threshold * order)
    pair_weight, attached_weight, free_weight, point_weight = torch.split(
        weights, [n_pair, n_attached, n_free, n_owners]
    )

    keep = (pair_weight > 0.0).nonzero()[:, 0]
    pair_weight, pair_owner = pair_weight.index_select(0, keep), owner.index_select(0, keep)
    pair = _full_frames(axis_unit, normal, sine, keep)
    keep = (attached_weight > 0.0).nonzero()[:, 0]
    attached = _attached_frames(line_unit[row[keep]], units[partner[keep]], rigid[keep])
    line = torch.cat([attached, axis_frames(line_unit[free])])
    line_weight = torch.cat([attached_weight[keep], free_weight])
    line_owner = torch.cat([axis_owner[row[keep]], axis_owner[free]])
    turned = line[:, None] @ cyclic_group(order, line.device)

    rotations = torch.cat([pair, turned.reshape(-1, 3, 3)])
    weights = torch.cat([pair_weight, (line_weight / order).repeat_interleave(order)])
    owner = torch.cat([pair_owner, line_owner.repeat_interleave(order)])
    stratum = torch.full_like(owner, axial)
    stratum[: pair_owner.shape[0]] = frame
    if mirror:
        rotations = with_mirrors(rotations).view(-1, 3, 3)
        weights, owner, stratum = (0.5 * weights).repeat(2), owner.repeat(2), stratum.repeat(2)
    lonely = (point_weight > 0.0).nonzero()[:, 0]
    identity = torch.eye(3, dtype=vectors.dtype, device=vectors.device).expand(lonely.shape[0], 3, 3)
    return (
        torch.cat([rotations, identity]),
        torch.cat([weights, point_weight[lonely]]),
        torch.cat([owner, lonely]),
        torch.cat([stratum, torch.full_like(lonely, point)]),
    )


def _contending_pairs(
    units: Tensor,
    scale: Tensor,
    open_axis: Tensor,
    full_axis: Tensor,
    open_key: Tensor,
    full_key: Tensor,
    owner_of: Tensor,
    ptr: Tensor,
    width: float,
    sine_width: float,
) -> tuple[Tensor, Tensor]:
    """Which pairs of an axis and a partner can have weight, from keys and cosines alone.

    A superset does no harm: what is here without need gets weight 0, and takes no part in the weights of the others.

    Parameters
    ----------
    open_axis, full_axis, open_key, full_key : Tensor of shape (n_candidates,)
        Key of a candidate, infinity if it is not available (fully), as an axis and as a partner.

    Returns
    -------
    axis, partner : Tensor of shape (n_pairs,)
        Candidates, ordered by owner.
    """
    n_owners = ptr.shape[0] - 1
    infinity = float("inf")
    # The first axis that is available fully, and the best partner that it has, leave nothing to pairs that are more
    # than the width behind.
    lead = segment_min(full_axis, owner_of, n_owners, infinity).index_select(0, owner_of)
    axis = ((full_axis == lead) & (full_axis < infinity)).nonzero()[:, 0]
    first, _, _, closed = _pair_keys(units, scale, open_axis, open_key, full_key, owner_of, ptr, axis, sine_width)
    limit = segment_min(closed, owner_of.index_select(0, first), n_owners, infinity) + width
    nearest = segment_min(open_key, owner_of, n_owners, infinity).index_select(0, owner_of)
    axis = (lowest_key(open_axis, nearest, scale) < limit.index_select(0, owner_of)).nonzero()[:, 0]
    first, second, possible, closed = _pair_keys(
        units, scale, open_axis, open_key, full_key, owner_of, ptr, axis, sine_width
    )
    full = closed.masked_fill(full_axis.index_select(0, first) == infinity, infinity)
    # Among the pairs of one axis it does not matter how far the axis is available.
    contending = contenders(possible, full, owner_of.index_select(0, first), n_owners, width)
    contending = contending & contenders(possible, closed, first, owner_of.shape[0], width)
    chosen = contending.nonzero()[:, 0]
    return first.index_select(0, chosen), second.index_select(0, chosen)


def _pair_keys(
    units: Tensor,
    scale: Tensor,
    open_axis: Tensor,
    open_key: Tensor,
    full_key: Tensor,
    owner_of: Tensor,
    ptr: Tensor,
    axis: Tensor,
    sine_width: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of some axes, with their keys: infinity for pairs that are not available.

    Returns
    -------
    first, second : Tensor of shape (n_pairs,)
    possible, closed : Tensor of shape (n_pairs,)
        For pairs that are available at all, and for those that are so fully where their axis is.
    """
    infinity = float("inf")
    second, row = gather_rows(ptr, owner_of.index_select(0, axis))
    first = axis.index_select(0, row)
    cosine = _row_sums(units.index_select(0, first) * units.index_select(0, second))
    square = cosine * cosine
    # Nearer to the axis the switch in the angle is 0 to rounding; for a small width the cosine does not resolve that.
    width = sine_width * sine_width
    off_axis = 1.0 - 5e-7 * width if width > 1e-8 else 2.0
    on_axis = (square >= off_axis) | (first == second)
    lead, length = open_axis.index_select(0, first), scale.index_select(0, first)
    possible = pair_key(lead, open_key.index_select(0, second), length, cosine)
    closed = pair_key(lead, full_key.index_select(0, second), length, cosine)
    return (
        first,
        second,
        possible.masked_fill(on_axis, infinity),
        closed.masked_fill((square > 1.0 - width) | on_axis, infinity),
    )


def _full_frames(first: Tensor, normal: Tensor, sine: Tensor, keep: Tensor) -> Tensor:
    """Coordinate systems of the pairs that are kept."""
    normal = normal.index_select(0, keep) / sine.index_select(0, keep)[:, None]
    return frames_from_normals(first.index_select(0, keep), normal)


def _attach(
    vectors: Tensor,
    units: Tensor,
    lengths: Tensor,
    reach: Tensor,
    axis: Tensor,
    on_axis: Tensor,
    ptr: Tensor,
    axis_owner: Tensor,
    order: int,
    collinear: float,
    rigid_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The axis stratum: which partners define the angle about an axis, and how they share its weight.

    Returns
    -------
    partner, row : Tensor of shape (n_attached,)
        Candidates, and the axis that each of them is attached to.
    weight : Tensor of shape (n_attached,)
    rigid : Tensor of shape (n_attached,)
        bool, whether the angle is held constant in derivatives.
    free : Tensor of shape (n_free,)
        Axes on which everything is collinear to rounding: no partner, and none needed.
    """
    n_axes = axis.shape[0]
    near_line = (on_axis > 0.0).nonzero()[:, 0]
    partner, row = gather_rows(ptr, axis_owner[near_line])
    row = near_line[row]
    height = torch.linalg.cross(units[axis[row]], vectors[partner])
    # Relative to the longer arm: an atom next to the origin is off the axis by its distance, not by its direction.
    longer = torch.maximum(lengths[partner], lengths[axis[row]]).detach()
    sine = (height.detach() * height.detach()).sum(dim=1) / (longer * longer)
    off_line = (sine > collinear).nonzero()[:, 0]
    partner, row, height, sine = partner[off_line], row[off_line], height[off_line], sine[off_line]
    # Very near the line the average no longer depends on the angle about the axis, but its parts do, as 1 / h: their
    # derivatives would cancel to rounding / h. There the angle and the shares are constants.
    rigid = (segment_max(sine, row, n_axes, 0.0) < rigid_below)[row]
    height = torch.where(rigid[:, None], height.detach(), height)
    share = reach[partner] * (height * height).sum(dim=1)
    # Relative to the largest before the power, which would underflow; the quotient does not notice.
    largest = segment_max(share.detach(), row, n_axes, 0.0)
    power = (share / torch.where(largest > 0.0, largest, torch.ones_like(largest))[row]) ** (order // 2)
    total = segment_sum(power, row, n_axes)
    share = power / torch.where(total > 0.0, total, torch.ones_like(total))[row]
    free = ((total == 0.0) & (on_axis > 0.0)).nonzero()[:, 0]
    return partner, row, on_axis[row] * share, rigid, free


def _attached_frames(axis: Tensor, partner: Tensor, rigid: Tensor) -> Tensor:
    """Coordinate systems of axes and partners, carried along with the axis alone where they are rigid."""
    frames = pair_frames(axis, partner)
    carried = pair_frames(axis, -frames[:, :, 2].detach())
    return torch.where(rigid[:, None, None], carried, frames)


def _sine(normal: Tensor, width: float) -> Tensor:
    """Sine of the angle between two directions from their cross product, for a switch from 0 to ``width``.

    In the sine, and from 0 on, the switch is as slow as it can be for the range of angles that it covers. At 0, where
    the sine has a cone, the switch is flat to all orders: there the sine stops, so that no derivative meets the cone.
    """
    return torch.sqrt(_row_sums(normal * normal).clamp(min=1e-6 * width * width))


def _row_sums(values: Tensor) -> Tensor:
    """Sums over the three components: as a matrix product, several times faster than a reduction of so short rows."""
    return torch.mv(values, torch.ones([3], dtype=values.dtype, device=values.device))
