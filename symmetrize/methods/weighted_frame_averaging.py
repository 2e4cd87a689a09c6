"""Robust weighted frames: Gram-Schmidt frames of pairs of points, with weights that vanish where a pair degenerates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import DeclarationError
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.clouds import Clouds, clouds
from symmetrize.methods.ecse.candidates import axial_order, collinear_square, rigid_square
from symmetrize.ops.ragged import gather_rows, segment_max, segment_sum
from symmetrize.ops.rotations import cyclic_group

#: Exponent of the self-weighted means that stand for the largest square: smooth where the maximum has a kink.
SHARPNESS = 8

#: Atom scope: the share of the cutoff over which neighbors fade by default.
FADING = 0.1

#: Squares that are all smaller have no shares: their reciprocals would leave the range of float64.
_NOTHING = 1e-200

_JUMPS = "second derivatives jump where a pair of points comes to its threshold"


class WeightedFrameAveraging(FrameMethod):
    r"""Average over Gram-Schmidt frames of all pairs of points, weighted by how well a pair defines one: continuous.

    With :math:`u_i = q_i / |q_i|` and the part :math:`q_{j \perp i} = q_j - u_i (u_i \cdot q_j)` of a point that is
    perpendicular to the axis i, the pair (i, j) has the frame
    :math:`F_{ij} = [u_i,\ q_{j \perp i} / |q_{j \perp i}|,\ u_i \times q_{j \perp i} / |q_{j \perp i}|]`, and

    .. math::
        F(x) = \sum_i p_i \sum_j p_{j|i} \Big[ (1 - b_i)\, \rho(F_{ij})\, f(F_{ij}^T x) + \frac{b_i}{n}
        \sum_{m=0}^{n-1} \rho(F_{ij} R_m)\, f\big((F_{ij} R_m)^T x\big) \Big]

    .. math::
        p_i \propto \max\Big(0, \frac{|q_i|^2}{S} - \eta\Big)^2, \qquad
        p_{j|i} \propto \max\Big(0, \frac{|q_{j \perp i}|^2}{S_i} - \eta\Big)^2, \qquad
        b_i = 1 - \mathrm{step}\Big(\frac{S_i}{\tau^2 S}\Big)

    where the weights of either level add up to 1. S is the self-weighted mean
    :math:`\sum_l |q_l|^{2 k + 2} / \sum_l |q_l|^{2 k}`, k = 8, which is smooth and at most the largest :math:`|q_l|^2`,
    so that the best point of either level has at least :math:`(1 - \eta)^2` before the normalization: it never
    degenerates. :math:`S_i` is the same mean of :math:`|q_{l \perp i}|^2`. :math:`R_m` are the rotations by
    :math:`2 \pi m / n` about the first axis, n = max(8, l_max + 4) (made even), and the step is a cubic from 0 at 1/4
    to 1 at 1. For O(3) every frame comes with its mirror image :math:`F_{ij} \operatorname{diag}(1, 1, -1)`.

    Structure scope: q are the positions from the centroid. Atom scope: inverted positions
    :math:`q_j = a_j r_j / |r_j|^2` of the neighbors, so that near ones come first; :math:`a_j` falls from 1 to 0 over
    ``cutoff_width`` at the cutoff, a cubic in the distance. The center without its neighbors (invariant part of the
    outputs) has the weight :math:`B = \max(0, 1 - \sum_j a_j)^2`, all the others are multiplied by 1 - B.

    Source: Dym, Lawrence and Siegel, "Equivariant frames and the impossibility of continuous canonicalization", ICML
    2024, arXiv 2402.16077. Theirs are the definitions (a weighted frame is a measure on the group for every input; it
    is robust if the measures, averaged over stabilizers, transform with the input and depend on it continuously in the
    weak sense; then the invariant average is a bounded projection that preserves continuity; for equivariant outputs
    it has to be stable where the stabilizer grows), the proof that unweighted frames of feasible size cannot be
    continuous, and the form of the frames for SO(d): Gram-Schmidt on tuples of d - 1 points, with weights that vanish
    where a tuple degenerates. This package's own are the formulas above: the weights in two levels (on approach to a
    line the shares of the axes then do not depend on the direction of the approach), their thresholds, the completion
    :math:`b_i` (the stable part, on and near collinear clouds), atom scope, and the mirror images for O(3).

    Parameters
    ----------
    threshold : float
        :math:`\eta`, in [0, 1): pairs count whose squares are above this share of the (mean) largest one. 0: all pairs
        that define a frame, n (n - 1) of them. Larger: fewer evaluations, and weights that change faster, like
        :math:`1 / (1 - \eta)`.
    collinearity : float
        :math:`\tau`, in (0, 1): clouds of a width (relative to their length) of less than this are averaged about the
        axis as well, those of less than half of it only so.
    cutoff_width : float, optional
        Atom scope: the distance over which a neighbor fades at the cutoff, by default a tenth of the cutoff. Unit of
        the positions.

    Raises
    ------
    DeclarationError
        For numbers outside of these ranges.

    Notes
    -----
    Group: SO(3) and O(3). Exact: equivariant to rounding for outputs of every degree, deterministic, independent of the
    order of the points, on symmetric and degenerate clouds as well (all symmetry operations permute frames of equal
    weight). A backbone that is equivariant already is not changed, except in atom scope where B > 0.

    * planar clouds: nothing special, the two signs of the third axis are the mirror images;
    * collinear clouds: the stabilizer holds the rotations about the line, and the average over them is the n-fold sum,
      which is the same as the integral for outputs of degrees below n, in values, and in first derivatives for degrees
      up to n - 2; nearby, what depends on the orientation about the axis is O(h^(n - l)) for a distance h from it;
    * a single point: the invariant part of the output.

    Smooth: values and first derivatives (forces) are continuous, if those of the backbone are: squares of max(0, .)
    switch frames on and off. Second derivatives jump there. Exceptions: in structure scope where all points coincide,
    in atom scope where a neighbor coincides with the center. A power of 1 is enough for continuity, but would leave
    forces undefined on symmetric clouds that happen to lie on a threshold.

    Cost: one evaluation (O(3): two) per pair above the thresholds, times n near collinear clouds: for SO(3) 12 for
    methane, about 8 for ethanol around its centroid, 2.5 around each of its atoms. The number of pairs grows where many
    points are about equally far, without a bound but n (n - 1); `symmetrize.ECSE` shares between fewer.
    """

    limits: Mapping[str, str] = MappingProxyType(
        {
            "energy_conservation": f"{_JUMPS}: the error of the time step falls more slowly than for smooth forces",
            "frame_continuity": _JUMPS,
            "smoothness": _JUMPS,
        }
    )

    def __init__(self, threshold: float = 0.8, collinearity: float = 0.2, cutoff_width: float | None = None) -> None:
        super().__init__()
        self.threshold = _number("threshold", threshold, 0.0, 1.0, "a number from 0 to below 1", least=True)
        self.collinearity = _number("collinearity", collinearity, 0.0, 1.0, "a number between 0 and 1")
        self.cutoff_width = None
        if cutoff_width is not None:
            self.cutoff_width = _number("cutoff_width", cutoff_width, 0.0, math.inf, "a positive number or None")

    def describe(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "collinearity": self.collinearity,
            "cutoff_width": self.cutoff_width,
        }

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        InvalidInputError
            In structure scope for periodic structures.
        """
        around = clouds(batch, scope, type(self).__name__)
        points = self._points(batch, around)
        order = axial_order(l_max)
        axes = _axes(around, points, self.threshold)
        precision = torch.finfo(batch[keys.POS].dtype).eps
        # A tenth of what the strata of ECSE take: a finite cloud may be much longer than the backbone's own lengths.
        rigid, on_axis = 0.01 * rigid_square(precision, order, l_max), collinear_square(precision)
        base, bent, weights, row = _pairs(around, points, axes, self.threshold, self.collinearity, rigid, on_axis)
        rotations, weights, row, stratum = _about_axes(base, bent, weights, row, order)
        if group == "O(3)":
            mirror = torch.diag(rotations.new_tensor([1.0, 1.0, -1.0]))
            rotations = torch.cat([rotations, rotations @ mirror])
            weights = torch.cat([weights, weights]) / 2.0
            row, stratum = row.repeat(2), stratum.repeat(2)
        alone = (points.left.detach() > 0.0).nonzero()[:, 0]
        identity = torch.eye(3, dtype=torch.float64, device=row.device).expand(alone.shape[0], 3, 3)
        row = torch.cat([row, alone])
        order_of_rows = torch.argsort(row, stable=True)
        row = row[order_of_rows]
        owners = around.owners
        return FrameSet(
            rotations=torch.cat([rotations, identity])[order_of_rows],
            weights=torch.cat([weights, points.left[alone]])[order_of_rows],
            owner=owners.index[row],
            stratum=torch.cat([stratum, torch.full_like(alone, int(Stratum.POINT))])[order_of_rows],
            origins=owners.origins[row],
            n_owners=owners.n_owners,
            scope=scope,
        )

    def _points(self, batch: Data, around: Clouds) -> _Points:
        """Directions and squared lengths of q, and what is left for the point itself."""
        vectors, row, n = around.vectors, around.row, around.n
        square = (vectors * vectors).sum(dim=1)
        coincident = square == 0.0
        safe = torch.where(coincident, torch.ones_like(square), square)
        length = torch.sqrt(safe)
        unit = vectors / length[:, None]
        if around.owners.scope == "structure":
            # Positions are distinct: only an atom alone is at its centroid with all there is.
            point = segment_max(square.detach(), row, n, 0.0) == 0.0
            return _Points(unit, square, square, torch.ones_like(coincident), point.to(torch.float64))
        radius = float(batch[keys.EDGE_CUTOFF])
        width = FADING * radius if self.cutoff_width is None else min(self.cutoff_width, radius)
        # Positive everywhere inside the cutoff, where the C-infinity switch is 0 to rounding over some distance: what
        # the backbone sees has to be seen here, or the last neighbor off an axis would break the symmetry unnoticed.
        available = torch.where(coincident, 0.0, _cubic((radius - length) / width))
        left = (1.0 - segment_sum(available, row, n)).clamp(min=0.0) ** 2
        return _Points(unit, square, available**2 / safe, available.detach() > 0.0, left)

    def extra_repr(self) -> str:
        text = f"threshold={self.threshold}, collinearity={self.collinearity}"
        return text if self.cutoff_width is None else f"{text}, cutoff_width={self.cutoff_width}"


def _number(name: str, value: object, low: float, high: float, expected: str, *, least: bool = False) -> float:
    """A number between two others, or the lower one if that is allowed, or a `DeclarationError`."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    if not (low < number < high or (least and number == low)):
        raise DeclarationError(f"WeightedFrameAveraging: {name}: expected {expected}, got {value!r}")
    return number


@dataclass(frozen=True, eq=False)
class _Points:
    """The points of all clouds as the weights see them.

    Attributes
    ----------
    unit : Tensor of shape (n_points, 3)
        Directions; zero for a point at the origin.
    square : Tensor of shape (n_points,)
        Squared distance from the origin.
    key : Tensor of shape (n_points,)
        :math:`|q|^2`.
    seen : Tensor of shape (n_points,), bool
        Within reach of the backbone.
    left : Tensor of shape (n_owners_with_frames,)
        Weight of the center alone.
    """

    unit: Tensor
    square: Tensor
    key: Tensor
    seen: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class _Axes:
    """The first axes of all owners.

    Attributes
    ----------
    point, row : Tensor of shape (n_axes,)
        Point that an axis goes through, entry of ``owners.index``.
    weight : Tensor of shape (n_axes,)
        :math:`(1 - B) p_i`.
    mean : Tensor of shape (n_axes,)
        S of the owner.
    """

    point: Tensor
    row: Tensor
    weight: Tensor
    mean: Tensor


def _axes(around: Clouds, points: _Points, threshold: float) -> _Axes:
    shares, mean = _shares(points.key, around.row, around.n, threshold)
    point = (shares.detach() > 0.0).nonzero()[:, 0]
    row = around.row[point]
    return _Axes(point, row, (1.0 - points.left)[row] * shares[point], mean[row])


def _pairs(
    around: Clouds,
    points: _Points,
    axes: _Axes,
    threshold: float,
    collinearity: float,
    rigid: float,
    on_axis: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames of all pairs that count, and of axes that nothing is off.

    Parameters
    ----------
    rigid : float
        Squared distance from the axis, over that of the farthest point, below which the cloud is a line.
    on_axis : float
        sin^2 below which a direction off the axis is rounding.

    Returns
    -------
    frames : Tensor of shape (n_frames, 3, 3)
    axial : Tensor of shape (n_frames,)
        :math:`b_i`, the share that is averaged about the axis.
    weights : Tensor of shape (n_frames,)
    row : Tensor of shape (n_frames,)
    """
    n_axes = axes.point.shape[0]
    item, axis = gather_rows(around.ptr, axes.row)
    direction = points.unit[axes.point]
    along = points.unit[item]
    along = along - direction[axis] * (direction[axis] * along).sum(dim=1, keepdim=True)
    sine = (along * along).sum(dim=1)  # squared
    sine = torch.where(sine > on_axis, sine, torch.zeros_like(sine))
    shares, off_axis = _shares(points.key[item] * sine, axis, n_axes, threshold)
    axial = 1.0 - _cubic((off_axis / (collinearity**2 * axes.mean) - 0.25) / 0.75)
    with torch.no_grad():
        # Near the axis and in derivatives an angle about it means nothing: it has no effect beyond rounding.
        reach = torch.where(points.seen, points.square, torch.zeros_like(points.square))
        farthest = segment_max(reach, around.row, around.n, 0.0)[axes.row]
        straight = segment_max(reach[item] * sine, axis, n_axes, 0.0) <= rigid * farthest
        chosen = ((shares > 0.0) & ~straight[axis]).nonzero()[:, 0]
        lone = straight.nonzero()[:, 0]
        helper = torch.eye(3, dtype=direction.dtype, device=direction.device)
        helper = helper[direction[lone].abs().argmin(dim=1)] if lone.shape[0] else direction[lone]
    owner = torch.cat([axis[chosen], lone])
    weights = axes.weight[owner] * torch.cat([shares[chosen], torch.ones_like(axes.weight[lone])])
    e1, e2 = direction[owner], torch.cat([along[chosen], helper])
    for _ in range(2):  # twice is enough: what rounding left of e1 is gone
        e2 = e2 - e1 * (e1 * e2).sum(dim=1, keepdim=True)
        e2 = e2 / e2.norm(dim=1, keepdim=True)
    frames = torch.stack([e1, e2, torch.linalg.cross(e1, e2)], dim=2)
    return frames, axial[owner], weights, axes.row[owner]


def _about_axes(
    frames: Tensor, axial: Tensor, weights: Tensor, row: Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each frame once, or with its rotations about the first axis: rotations, weights, rows and strata."""
    straight = axial.detach() > 0.0
    turned, once = straight.nonzero()[:, 0], (~straight).nonzero()[:, 0]
    spin = cyclic_group(order, frames.device)
    share = axial[turned, None].expand(-1, order) / order
    first = torch.zeros(order, dtype=share.dtype, device=share.device)
    first[0] = 1.0
    share = share + (1.0 - axial[turned, None]) * first
    kind = torch.full_like(turned, int(Stratum.AXIS))[:, None].repeat(1, order)
    kind[:, 0] = torch.where(axial[turned].detach() < 1.0, int(Stratum.FRAME), int(Stratum.AXIS))
    return (
        torch.cat([frames[once], (frames[turned, None] @ spin).flatten(0, 1)]),
        torch.cat([weights[once], (weights[turned, None] * share).flatten()]),
        torch.cat([row[once], row[turned].repeat_interleave(order)]),
        torch.cat([torch.full_like(once, int(Stratum.FRAME)), kind.flatten()]),
    )


def _shares(squares: Tensor, row: Tensor, n: int, threshold: float) -> tuple[Tensor, Tensor]:
    r"""Shares of the largest items of every row, and how large these are.

    .. math:: p_i \propto \max(0, s_i / S - \eta)^2, \qquad S = \sum_i s_i^{k + 1} \Big/ \sum_i s_i^k

    Parameters
    ----------
    squares : Tensor of shape (n_items,)
        Not negative.
    row : Tensor of shape (n_items,)
    n : int
        Number of rows.
    threshold : float

    Returns
    -------
    shares : Tensor of shape (n_items,)
        Sum 1 in every row; 0 in rows that are empty or all zero.
    mean : Tensor of shape (n,)
        S.
    """
    largest = segment_max(squares.detach(), row, n, 0.0)
    none = largest < _NOTHING
    scale = torch.where(none, torch.ones_like(largest), largest)
    # S is homogeneous of degree 1: derivatives through the scale cancel.
    relative = squares / scale[row]
    powers = relative**SHARPNESS
    total = segment_sum(powers, row, n)
    mean = segment_sum(powers * relative, row, n) / torch.where(none, torch.ones_like(total), total)
    safe = torch.where(none, torch.ones_like(mean), mean)
    excess = (relative / safe[row] - threshold).clamp(min=0.0) ** 2
    excess = torch.where(none[row], torch.zeros_like(excess), excess)
    sums = segment_sum(excess, row, n)
    return excess / torch.where(none, torch.ones_like(sums), sums)[row], mean * scale


def _cubic(x: Tensor) -> Tensor:
    """Step with a continuous derivative: 0 for x <= 0, 1 for x >= 1, strictly positive in between."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)
