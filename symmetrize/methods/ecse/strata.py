"""The stratified form of ECSE: a smooth partition over frames, axes and the point.

A cloud of candidates around a center has one of three kinds of stabiliser: none (two directions that are not
collinear), the rotations about an axis (everything on one line), all rotations (nothing there). The weights of the
three strata are products of two levels of stick-breaking (see `weights`), over primary axes j and, for each of them,
over partners k:

    frame (j, k): w1_j w2_jk        axis j: w1_j b_j        point: B.

The axis stratum is the n-fold average about the axis over frames attached to all partners, with weights
omega_jk ~ (g_k h_jk^2)^(n/2), h_jk the distance of the partner from the axis. A backbone's dependence on the angle
about the axis is a Fourier series whose m-th term is O(h^m); the average removes every m that n does not divide. On an
exactly collinear cloud, where no partner defines an angle, any frame with that axis gives the same average.

Pure tensor code, differentiable any number of times, without loops over centers, neighbors or frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.methods.ecse.coordinate_systems import axis_frames, pair_frames, unit_vectors, with_mirrors
from symmetrize.methods.ecse.weights import contenders, drop_negligible, stick_breaking
from symmetrize.ops.ragged import gather_rows, segment_max, segment_sum
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
        D, the width over which candidates of similar distance share their weight.
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

    Returns
    -------
    rotations : Tensor of shape (n_frames, 3, 3)
    weights : Tensor of shape (n_frames,)
    owner : Tensor of shape (n_frames,)
    stratum : Tensor of shape (n_frames,)
    """
    n_owners = ptr.shape[0] - 1
    owner_of = torch.repeat_interleave(torch.arange(n_owners, device=ptr.device), ptr[1:] - ptr[:-1])
    units, lengths = unit_vectors(vectors)

    # First level: primary axes.
    axis = contenders(available.detach(), lengths.detach(), owner_of, n_owners, width).nonzero()[:, 0]
    axis_owner = owner_of[axis]
    axis_weight, point_weight = stick_breaking(available[axis], lengths[axis], axis_owner, n_owners, width)

    # Second level: partners. Only active axes look for them, and only contenders enter the graph.
    active = (axis_weight > 0.0).nonzero()[:, 0]
    axis, axis_owner, axis_weight = axis[active], axis_owner[active], axis_weight[active]
    n_axes = axis.shape[0]
    partner, row = gather_rows(ptr, axis_owner)
    distinct = partner != axis[row]
    partner, row = partner[distinct], row[distinct]
    with torch.no_grad():
        offered = available[partner] * _off_axis(units[axis[row]], units[partner], sine_width)
        contending = contenders(offered, lengths[partner], row, n_axes, width).nonzero()[:, 0]
    k, j = partner[contending], row[contending]
    offered = available[k] * _off_axis(units[axis[j]], units[k], sine_width)
    pair_weight, on_axis = stick_breaking(offered, lengths[k], j, n_axes, width)
    pair_weight = axis_weight[j] * pair_weight
    on_axis = axis_weight * on_axis

    partner, row, attached_weight, rigid, free = _attach(
        vectors, units, lengths, reach, axis, on_axis, partner, row, order, collinear, rigid_below
    )

    # One list of weights, in which negligible ones are switched off before any frame is built.
    weights = torch.cat([pair_weight, attached_weight, on_axis[free], point_weight])
    owner = torch.cat([axis_owner[j], axis_owner[row], axis_owner[free], torch.arange(n_owners, device=ptr.device)])
    weights = drop_negligible(weights, owner, n_owners, threshold * order)
    n_pair, n_attached, n_free = pair_weight.shape[0], attached_weight.shape[0], free.shape[0]
    pair_weight, attached_weight, free_weight, point_weight = torch.split(
        weights, [n_pair, n_attached, n_free, n_owners]
    )

    lonely = (point_weight > 0.0).nonzero()[:, 0]

    keep = (pair_weight > 0.0).nonzero()[:, 0]
    pair_weight, pair_owner = pair_weight[keep], axis_owner[j[keep]]
    pair = pair_frames(units[axis[j[keep]]], units[k[keep]])
    keep = (attached_weight > 0.0).nonzero()[:, 0]
    attached = _attached_frames(units[axis[row[keep]]], units[partner[keep]], rigid[keep])
    line = torch.cat([attached, axis_frames(units[axis[free]])])
    line_weight = torch.cat([attached_weight[keep], free_weight])
    line_owner = torch.cat([axis_owner[row[keep]], axis_owner[free]])
    turned = line[:, None] @ cyclic_group(order, line.device)

    rotations = torch.cat([pair, turned.reshape(-1, 3, 3)])
    weights = torch.cat([pair_weight, (line_weight / order).repeat_interleave(order)])
    owner = torch.cat([pair_owner, line_owner.repeat_interleave(order)])
    stratum = torch.full_like(owner, axial)
    stratum[: pair_owner.shape[0]] = frame
    if mirror:
        rotations = with_mirrors(rotations).reshape(-1, 3, 3)
        weights = torch.cat([weights, weights]) / 2.0
        owner = torch.cat([owner, owner])
        stratum = torch.cat([stratum, stratum])
    identity = torch.eye(3, dtype=vectors.dtype, device=vectors.device).expand(lonely.shape[0], 3, 3)
    return (
        torch.cat([rotations, identity]),
        torch.cat([weights, point_weight[lonely]]),
        torch.cat([owner, lonely]),
        torch.cat([stratum, torch.full_like(lonely, point)]),
    )


def _attach(
    vectors: Tensor,
    units: Tensor,
    lengths: Tensor,
    reach: Tensor,
    axis: Tensor,
    on_axis: Tensor,
    partner: Tensor,
    row: Tensor,
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
    near_line = (on_axis > 0.0)[row].nonzero()[:, 0]
    partner, row = partner[near_line], row[near_line]
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


def _off_axis(axis: Tensor, partner: Tensor, width: float) -> Tensor:
    """Smooth switch in the sine of the angle: 0 for directions on one line, 1 well off it.

    In the sine, and from 0 on, the switch is as slow as it can be for the range of angles that it covers. At 0, where
    the sine has a cone, the switch is flat to all orders.
    """
    normal = torch.linalg.cross(axis, partner)
    square = (normal * normal).sum(dim=1)
    flat = square < 1e-6 * width * width
    sine = torch.sqrt(torch.where(flat, torch.ones_like(square), square))
    return smooth_step(torch.where(flat, torch.zeros_like(sine), sine) / width)
