"""The smallest frame of an ordered point cloud: one coordinate system from its first independent points."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.clouds import Clouds, clouds
from symmetrize.ops.ragged import gather_rows, segment_max, segment_min
from symmetrize.ops.rotations import cyclic_group

ORDERS = ("atoms", "invariants")

#: Points nearer to the origin, the line or the plane than this many units of rounding (relative to the farthest point)
#: lie in it.
_RANK = 1024.0

#: Invariants that differ by less than this many units of rounding are equal.
_EQUAL = 1e5


#: Why checks fail.
_NUMBERED = "the frame is built from the first atoms: another numbering or supercell has another one"
_ROUNDED = "the axes of nearly collinear surroundings are known to rounding / (distance from the line) only"
_STEEP = "a frame keeps its weight while the points that it is built from become collinear"
_BEYOND = "the integral about a line is exact up to the degree of the outputs, and the moments have higher ones"
_JUMPS = "another point takes over, at full weight, where one crosses a line, a plane or the cutoff"
_TIES = "another pair takes over, at full weight, where distances become equal or a pair collinear"


class MinimalFrameAveraging(FrameMethod):
    r"""The smallest set of frames that makes an average exact: the coset of the stabilizer, one frame in general.

    .. math:: F(x) = \int_{\mathrm{Stab}(c)} \rho(g_0 h)\, f\big((g_0 h)^{-1} x\big)\, \mathrm dh, \qquad x = g_0 c

    with the canonical form c of the cloud. For an ordered cloud :math:`g_0` is the orthogonal factor of the QR
    decomposition, with a positive diagonal of R, of the first three linearly independent points (from the centroid):

    .. math:: e_1 \propto r_i, \qquad e_2 \propto r_j - e_1 (e_1 \cdot r_j), \qquad e_3 = \pm e_1 \times e_2,

    i the first point that is not at the centroid, j the first that is not on the line of i. For SO(3),
    :math:`e_3 = e_1 \times e_2`; for O(3) it points to the side of the first point k outside of the plane.

    Source: Lin, Helwig, Gui and Ji, "Equivariance via minimal frame averaging for more symmetries and efficiency", ICML
    2024, arXiv 2406.07598: minimal frames as cosets of the stabilizer of a canonical form, and canonical forms of
    matrices under orthogonal groups by QR decomposition of an independent set of columns. (Where a cloud does not span
    space, the authors' code, github.com/divelab/MFA, drops the coordinates outside of the span; the average over the
    stabilizer that is taken here is the same for vectors in O(3), and covers the other outputs.)

    Parameters
    ----------
    order : {"atoms", "invariants"}
        What the first points are. ``"atoms"``, as published for clouds whose points have an order: those of the lowest
        numbers, so that renumbering the atoms changes the result. ``"invariants"``: the pair (i, j) of the smallest
        invariants, compared one after the other: of each point the distance (in structure scope the farthest first, in
        atom scope the nearest) and the species (heaviest first), then the angle; all pairs that are equal in these
        share the weight. It stands for the canonical labelling of the Gram matrix that the paper has for
        :math:`S_n \times O(d)`: independent of the numbering, and a frame that contains the minimal one, sometimes
        larger (equal pairs in a cloud without that symmetry; twice for O(3), both signs of :math:`e_3`).

    Raises
    ------
    DeclarationError
        For an unknown order.

    Notes
    -----
    Group: SO(3) and O(3). Exact for outputs of every degree, on degenerate clouds as well:

    * planar clouds in O(3): the stabilizer is the reflection, the average is over both signs of :math:`e_3`;
    * collinear clouds: the stabilizer holds all rotations about the line (in O(3) reflections through it, too); the
      integral over it is done with n = max(2, l_max + 1) equidistant rotations (twice as many with reflections), which
      is the same for outputs of degrees up to l_max, and leaves no force across the line;
    * a single point (in atom scope, an atom without neighbors): everything is in the stabilizer, and the average
      is the invariant part of the output.

    What is collinear is decided at 1024 units of rounding (times the distance of the farthest point); above that, the
    axes are as inaccurate as rounding / distance of the point i from the centroid, and of j from the line.

    In atom scope (an extension) the points are the neighbors, those of one atom in the order of their lattice
    translations: with order "atoms" other descriptions of the same crystal have other frames.

    Not continuous: the frame jumps where a point crosses the line or the plane that decides, with order "invariants"
    also where distances become equal (species may hide it), in atom scope where an atom passes the cutoff. Forces are
    the exact gradient everywhere else. No canonical form of clouds is continuous (Dym, Lawrence and Siegel, ICML 2024,
    arXiv 2402.16077).

    Cost: 1 evaluation of the backbone for every owner, 2 for planar clouds in O(3).
    """

    limits: Mapping[str, str] = MappingProxyType(
        {
            **dict.fromkeys(
                (
                    "permutation_equivariance",
                    "frame_permutation",
                    "symmetric_sites",
                    "degeneracy_splitting",
                    "periodicity",
                ),
                _NUMBERED,
            ),
            **dict.fromkeys(("rotation_equivariance", "inversion_equivariance"), _ROUNDED),
            **dict.fromkeys(("smoothness", "frame_continuity", "closed_loops", "energy_conservation"), _JUMPS),
            "frame_equivariance": _BEYOND,
            "frame_conditioning": _STEEP,
        }
    )

    def __init__(self, order: Literal["atoms", "invariants"] = "atoms") -> None:
        super().__init__()
        if order not in ORDERS:
            raise DeclarationError(
                f"MinimalFrameAveraging: order: unknown order {order!r}, {did_you_mean(str(order), ORDERS)}"
            )
        self.order = order
        if order == "invariants":
            self.limits = {
                **dict.fromkeys(("rotation_equivariance", "inversion_equivariance"), _ROUNDED),
                **dict.fromkeys(("symmetric_sites", "translation_invariance"), _ROUNDED),
                **dict.fromkeys(("smoothness", "frame_continuity"), _TIES),
                "frame_equivariance": _BEYOND,
            }

    def describe(self) -> dict[str, Any]:
        return {"order": self.order}

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
        # A point at the cutoff has no influence, but would have a frame, or not, as rounding decides.
        radius = float(batch[keys.EDGE_CUTOFF]) if scope == "atom" else float("inf")
        cloud = _Points(around, torch.finfo(batch[keys.POS].dtype).eps, radius)
        if self.order == "atoms":
            row, first, second = cloud.in_order(_numbering(batch, around))
        else:
            row, first, second = cloud.by_invariants(outermost=scope == "structure")
        axes, above = cloud.axes(row, first, second, _numbering(batch, around) if self.order == "atoms" else None)
        return _with_stabilizers(around, row, axes, above, first, second, group, l_max)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


def _numbering(batch: Data, around: Clouds) -> Tensor:
    """Points in the order of atoms, then of lattice translations: the rank of each, Tensor of shape (n_points,)."""
    order = torch.arange(around.row.shape[0], device=around.row.device)
    shift, mask = batch.get(keys.CELL_SHIFT), batch.get(keys.CENTER_MASK)
    if around.owners.scope == "atom" and shift is not None:
        shift = shift if mask is None else shift[mask[batch[keys.EDGE_INDEX][1]]]
        for column in (2, 1, 0):
            order = order[torch.argsort(shift[order, column], stable=True)]
    order = order[torch.argsort(around.atom[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    return rank


class _Points:
    """Clouds with what decides their rank: lengths relative to the farthest point of each."""

    def __init__(self, around: Clouds, eps: float, radius: float) -> None:
        self.around, self.eps = around, eps
        self.fixed = around.vectors.detach()
        self.lengths = self.fixed.norm(dim=1)
        self.reach = segment_max(self.lengths, around.row, around.n, 0.0)
        self.off = _RANK * eps * self.reach
        self.seen = self.lengths < radius * (1.0 - _RANK * eps)
        self.placed = self.seen & (self.lengths > self.off[around.row])

    def in_order(self, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every owner the first point off the origin and the first off its line; -1 for none."""
        row, n = self.around.row, self.around.n
        first = _first(rank, self.placed, row, n)
        axis = _unit(self.fixed, first)
        distance = torch.linalg.cross(self.fixed, axis[row]).norm(dim=1)
        second = _first(rank, self.seen & (distance > self.off[row]) & (first[row] >= 0), row, n)
        return torch.arange(n, device=row.device), first, second

    def by_invariants(self, outermost: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of smallest invariants of every owner, with their owner; -1 for what there is none of."""
        row, n, reach = self.around.row, self.around.n, self.reach
        equal = _EQUAL * self.eps
        species = self.around.species
        weight = torch.zeros_like(self.lengths) if species is None else -species.to(torch.float64)
        relative = self.lengths / reach.clamp(min=torch.finfo(torch.float64).tiny)[row]
        relative = -relative if outermost else relative
        leading = _smallest([(relative, equal), (weight, 0.0)], self.placed, row, n).nonzero()[:, 0]
        # Every pair of a leading point and another point of the same owner.
        second, pick = gather_rows(self.around.ptr, row[leading])
        first = leading[pick]
        axis = _unit(self.fixed, first)
        distance = torch.linalg.cross(self.fixed[second], axis).norm(dim=1)
        owner = row[first]
        cosine = (self.fixed[second] * axis).sum(dim=1) / self.lengths[second].clamp(min=1e-300)
        usable = self.seen[second] & (distance > self.off[owner])
        criteria = [(relative[second], equal), (weight[second], 0.0), (-cosine, equal)]
        best = _smallest(criteria, usable, owner, n).nonzero()[:, 0]
        # Owners without a pair: collinear (every leading point spans the line) or without points.
        paired = torch.zeros(n, dtype=torch.bool, device=row.device)
        paired[owner[best]] = True
        lonely = leading[~paired[row[leading]]]
        occupied = torch.zeros_like(paired)
        occupied[row[leading]] = True
        empty = (~occupied).nonzero()[:, 0]
        none = torch.full_like(empty, -1)
        rows = torch.cat([owner[best], row[lonely], empty])
        firsts = torch.cat([first[best], lonely, none])
        seconds = torch.cat([second[best], torch.full_like(lonely, -1), none])
        order = torch.argsort(rows, stable=True)
        return rows[order], firsts[order], seconds[order]

    def axes(self, row: Tensor, first: Tensor, second: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
        """Right-handed coordinate systems of pairs, and on which side of their plane the cloud begins.

        Returns
        -------
        axes : Tensor of shape (n_pairs, 3, 3), float64
            Columns; where there is no second point the other two are any, where there is no first all three.
        above : Tensor of shape (n_pairs,)
            1 or -1: the side of the first point outside of the plane; 0 where there is none, or no order.
        """
        fallback = torch.eye(3, dtype=torch.float64, device=row.device)
        e1 = _unit(self.around.vectors, first)
        # Where nothing else is there, the coordinate axis that e1 is farthest from.
        helper = fallback[e1.detach().abs().argmin(dim=1)] if e1.shape[0] else e1
        partner = helper
        if self.around.vectors.shape[0]:
            partner = torch.where((second >= 0)[:, None], self.around.vectors[second.clamp(min=0)], helper)
        for _ in range(2):  # twice is enough: what rounding left of e1 is gone
            partner = partner - e1 * (e1 * partner).sum(dim=1, keepdim=True)
            partner = partner / partner.norm(dim=1, keepdim=True)
        e3 = torch.linalg.cross(e1, partner)
        axes = torch.stack([e1, partner, e3], dim=2)
        above = torch.zeros_like(e1[:, 0]).detach()
        if rank is not None and self.around.vectors.shape[0]:
            height = (self.fixed * e3.detach()[self.around.row]).sum(dim=1)
            outside = self.seen & (height.abs() > self.off[self.around.row])
            third = _first(rank, outside, self.around.row, self.around.n)
            above = torch.where(third >= 0, torch.sign(height[third.clamp(min=0)]), 0.0)
        return axes, above


def _with_stabilizers(
    around: Clouds,
    row: Tensor,
    axes: Tensor,
    above: Tensor,
    first: Tensor,
    second: Tensor,
    group: str,
    l_max: int,
) -> FrameSet:
    """The cosets g Stab, as weighted frames: equal weights that add up to 1 for every owner."""
    mirror = torch.diag(axes.new_tensor([1.0, 1.0, -1.0]))
    spin = cyclic_group(max(2, l_max + 1), axes.device)
    if group == "O(3)":
        spin = torch.cat([spin, spin @ mirror])
    kinds: list[tuple[Tensor, Tensor, Stratum]] = []
    pair, line = second >= 0, (second < 0) & (first >= 0)
    alone = torch.eye(3, dtype=torch.float64, device=axes.device)[None]
    if group == "O(3)":
        kinds.append((pair & (above > 0.0), alone, Stratum.FRAME))
        kinds.append((pair & (above < 0.0), mirror[None], Stratum.FRAME))
        kinds.append((pair & (above == 0.0), torch.cat([alone, mirror[None]]), Stratum.FRAME))
    else:
        kinds.append((pair, alone, Stratum.FRAME))
    kinds.append((line, spin, Stratum.AXIS))
    kinds.append((first < 0, alone, Stratum.POINT))
    rotations, weights, owner, stratum = [], [], [], []
    share = 1.0 / torch.bincount(row, minlength=around.n).clamp(min=1).to(torch.float64)
    for chosen, elements, kind in kinds:
        which = chosen.nonzero()[:, 0]
        n = elements.shape[0]
        rotations.append((axes[which, None] @ elements).flatten(0, 1))
        weights.append((share[row[which]] / n).repeat_interleave(n))
        owner.append(row[which].repeat_interleave(n))
        stratum.append(torch.full_like(owner[-1], int(kind)))
    place = torch.cat(owner)
    order = torch.argsort(place, stable=True)
    place = place[order]
    return FrameSet(
        rotations=torch.cat(rotations)[order],
        weights=torch.cat(weights)[order],
        owner=around.owners.index[place],
        stratum=torch.cat(stratum)[order],
        origins=around.owners.origins[place],
        n_owners=around.owners.n_owners,
        scope=around.owners.scope,
    )


def _first(rank: Tensor, allowed: Tensor, row: Tensor, n: int) -> Tensor:
    """The allowed point of the lowest rank in every row, -1 for none: Tensor of shape (n,)."""
    n_points = rank.shape[0]
    lowest = segment_min(torch.where(allowed, rank, n_points), row, n, n_points)
    by_rank = torch.cat([torch.argsort(rank), rank.new_full((1,), -1)])
    return by_rank[lowest]


def _smallest(criteria: list[tuple[Tensor, float]], allowed: Tensor, row: Tensor, n: int) -> Tensor:
    """Which of the allowed items are smallest in their row, by one criterion after the other, up to a tolerance."""
    for values, tolerance in criteria:
        least = segment_min(torch.where(allowed, values, torch.inf), row, n, float("inf"))
        allowed = allowed & (values <= least[row] + tolerance)
    return allowed


def _unit(vectors: Tensor, which: Tensor) -> Tensor:
    """Directions of some points, the first coordinate axis for -1: Tensor of shape (n, 3)."""
    substitute = torch.eye(3, dtype=vectors.dtype, device=vectors.device)[0]
    if not vectors.shape[0]:
        return substitute.expand(which.shape[0], 3)
    chosen = torch.where((which >= 0)[:, None], vectors[which.clamp(min=0)], substitute)
    return chosen / chosen.norm(dim=1, keepdim=True)
