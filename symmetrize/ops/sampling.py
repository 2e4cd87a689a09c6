"""Farthest-point sampling and nearest neighbors of batched clouds, from distances alone.

Both select, and a selection jumps where two distances cross: what is built on them is not smooth in the positions. It
is exact under rotations and permutations, ties included, which plain implementations are not: there rounding, or the
order of the points, decides between equal distances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import offsets, pad_rows, positions_in_rows, segment_max, segment_sum

#: Relative difference up to which two squared distances are equal: far above rounding, far below what means anything.
TIES = {torch.float64: 1e-10, torch.float32: 1e-5}

#: Distances in memory at once.
N_DISTANCES = 1 << 22

# The last resort between points that no invariant tells apart.
_DIRECTION = (0.8017, 0.5345, 0.2673)


def structure_sizes(ptr: Tensor) -> Tensor:
    """Number of points of every cloud: Tensor of shape (n_clouds,)."""
    return ptr[1:] - ptr[:-1]


def centered(pos: Tensor, structure: Tensor, n_structures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions relative to the centroid of their cloud, its radius, and the centroid.

    Both commute with rotations (a bounding box would not). Summed in double precision: thousands of points would cost
    single precision several digits.

    Returns
    -------
    Tensor of shape (n_points, 3)
    Tensor of shape (n_structures,)
        Distance of the farthest point from the centroid; 1 for a single point.
    Tensor of shape (n_structures, 3)
    """
    points = pos.to(torch.float64)
    count = segment_sum(torch.ones_like(points[:, 0]), structure, n_structures)
    centroid = segment_sum(points, structure, n_structures) / count[:, None]
    relative = points - centroid[structure]
    largest = segment_max((relative * relative).sum(dim=1), structure, n_structures, 0.0)
    radius = torch.sqrt(torch.where(largest > 0.0, largest, torch.ones_like(largest)))
    return relative.to(pos.dtype), radius.to(pos.dtype), centroid.to(pos.dtype)


def unit_sphere(pos: Tensor, structure: Tensor, n_structures: int) -> Tensor:
    """Every cloud moved to its centroid and scaled to the distance of its farthest point.

    Parameters
    ----------
    pos : Tensor of shape (n_points, 3)
    structure : Tensor of shape (n_points,)
        Cloud that each point belongs to.
    n_structures : int

    Returns
    -------
    Tensor of shape (n_points, 3)
        In the unit sphere, dimensionless.
    """
    relative, radius, _ = centered(pos, structure, n_structures)
    return relative / radius[structure][:, None]


def farthest_points(pos: Tensor, ptr: Tensor, n_samples: Tensor) -> Tensor:
    """Farthest-point sampling of every cloud at once: each point is the farthest from those before it.

    It starts from the point farthest from the centroid. Of equally far ones it takes the one with the largest value of
    an invariant, which depends on the whole cloud and on the points selected before (see `_surroundings`), so that the
    selection turns with the cloud and does not depend on the order of the points. What remains undecided is, but for
    coincidences, exchanged by a rotation that maps the cloud and the selected points onto themselves: there a fixed
    direction decides, and averages over frames of a cloud do not notice the choice.

    Parameters
    ----------
    pos : Tensor of shape (n_points, 3)
        Grouped by cloud.
    ptr : Tensor of shape (n_clouds + 1,)
        Offsets of the clouds.
    n_samples : Tensor of shape (n_clouds,), int64
        From 1 to the number of points of the cloud.

    Returns
    -------
    Tensor of shape (sum of n_samples,), int64
        Rows of ``pos``, grouped by cloud, in the order of selection.
    """
    sizes = structure_sizes(ptr)
    if bool((n_samples < 1).any()) or bool((n_samples > sizes).any()):
        raise InvalidInputError("n_samples: expected from 1 to the number of points of every cloud")
    n_clouds, width = sizes.shape[0], int(sizes.max())
    structure = torch.repeat_interleave(torch.arange(n_clouds, device=pos.device), sizes)
    tie = TIES[pos.dtype]
    points = unit_sphere(pos.detach().to(torch.float64), structure, n_clouds)
    position = positions_in_rows(structure, n_clouds)

    def padded(values: Tensor, fill: float) -> Tensor:
        return pad_rows(values, structure, position, n_clouds, width, fill)

    own, normals = _surroundings(points, structure, n_clouds)
    own = padded(own, 0.0)
    direction = torch.tensor(_DIRECTION, dtype=points.dtype, device=points.device)
    cloud = torch.stack([padded(points[:, k], 0.0) for k in range(3)], dim=2)
    normal_of = torch.stack([padded(normals[:, k], 0.0) for k in range(3)], dim=2)
    real = padded(torch.ones_like(points[:, 0]), 0.0) > 0.0
    every = torch.arange(n_clouds, device=pos.device)

    picked: list[Tensor] = []
    # Two sums over the points picked so far, with weights that tell their order.
    a, b = torch.zeros_like(cloud[:, 0]), torch.zeros_like(cloud[:, 0])

    def label() -> Tensor:
        """Of every point, given those that were picked before."""
        if not picked:
            return own
        known = (cloud @ (a + 0.7 * b + torch.linalg.cross(a, b))[:, :, None])[:, :, 0]
        return own + known + (normal_of @ a[:, :, None])[:, :, 0]

    def pick(score: Tensor) -> None:
        nonlocal a, b
        picked.append(farthest(score))
        point, step = cloud[every, picked[-1]], float(len(picked))
        a = a + (math.cos(step) * point - a) / step
        b = b + (math.sin(1.7 * step + 0.5) * point - b) / step

    def farthest(score: Tensor) -> Tensor:
        score = torch.where(real, score, torch.full_like(score, -torch.inf))
        best = score.max(dim=1, keepdim=True).values
        tied = score >= best - tie
        if int(tied.sum()) == n_clouds:
            return score.argmax(dim=1)
        for key in (label(), cloud @ direction):
            key = torch.where(tied, key, torch.full_like(key, -torch.inf))
            tied = tied & (key >= key.max(dim=1, keepdim=True).values - tie)
        return tied.to(torch.int8).argmax(dim=1)

    pick((cloud * cloud).sum(dim=2))
    nearest = torch.full_like(own, torch.inf)
    for _ in range(1, int(n_samples.max())):
        newest = cloud - cloud[every, picked[-1]][:, None]
        nearest = torch.minimum(nearest, (newest * newest).sum(dim=2))
        pick(nearest)
    chosen = torch.stack(picked, dim=1)
    wanted = torch.arange(chosen.shape[1], device=pos.device)[None, :] < n_samples[:, None]
    return (chosen + ptr[:-1, None])[wanted]


def anchor_points(pos: Tensor, ptr: Tensor, n_anchors: int) -> tuple[Tensor, Tensor]:
    """Farthest-point sampling without choices: where several points are equally far, all of them are taken.

    The anchors turn with the cloud, are the same in every order of the points, and have all its symmetries. As long as
    they lie on one line, the next is the point farthest from that line: they lie on a line only if the cloud does.

    Parameters
    ----------
    pos : Tensor of shape (n_points, 3)
        Grouped by cloud.
    ptr : Tensor of shape (n_clouds + 1,)
    n_anchors : int
        It ends when a cloud has at least so many (more only where points are equally far) or no further point.

    Returns
    -------
    Tensor of shape (n_rows,), Tensor of shape (n_clouds,)
        Rows of ``pos``, ascending, and how many of each cloud.
    """
    sizes = structure_sizes(ptr)
    n_clouds, width = sizes.shape[0], int(sizes.max())
    structure = torch.repeat_interleave(torch.arange(n_clouds, device=pos.device), sizes)
    tie = TIES[pos.dtype]
    points = unit_sphere(pos.detach().to(torch.float64), structure, n_clouds)
    position = positions_in_rows(structure, n_clouds)
    cloud = torch.stack([pad_rows(points[:, k], structure, position, n_clouds, width, 0.0) for k in range(3)], dim=2)
    real = torch.arange(width, device=pos.device)[None, :] < sizes[:, None]
    every = torch.arange(n_clouds, device=pos.device)
    taken = torch.zeros_like(real)
    nearest = torch.full_like(cloud[:, :, 0], torch.inf)
    origin, axis = torch.zeros_like(cloud[:, 0]), torch.zeros_like(cloud[:, 0])
    on_line = torch.ones_like(taken[:, 0])
    score = (cloud * cloud).sum(dim=2)
    for step in range(n_anchors):
        score = torch.where(real & ~taken, score, torch.full_like(score, -torch.inf))
        best = score.max(dim=1, keepdim=True).values
        wanted = (taken.sum(dim=1, keepdim=True) < n_anchors) & (best > (tie if step else -torch.inf))
        new = (score >= best - tie) & real & ~taken & wanted
        if not bool(new.any()):
            break
        number = torch.cumsum(new.to(torch.int64), dim=1)
        for k in range(1, int(number[:, -1].max()) + 1):
            some = new & (number == k)
            has = some.any(dim=1)
            point = cloud[every, some.to(torch.int8).argmax(dim=1)]
            difference = cloud - point[:, None]
            nearest = torch.where(has[:, None], torch.minimum(nearest, (difference * difference).sum(dim=2)), nearest)
            if step == 0 and k == 1:
                origin = point
                continue
            arm = point - origin
            fresh = has & (axis == 0.0).all(dim=1)
            axis = torch.where(fresh[:, None], torch.nn.functional.normalize(arm, dim=1), axis)
            on_line = on_line & (~has | (torch.linalg.cross(axis, arm).square().sum(dim=1) <= tie))
        taken = taken | new
        height = torch.linalg.cross(axis[:, None].expand_as(cloud), cloud - origin[:, None]).square().sum(dim=2)
        off = on_line & (axis != 0.0).any(dim=1) & ((height * real).max(dim=1).values > tie)
        score = torch.where(off[:, None], height, nearest)
    return taken[structure, position].nonzero()[:, 0], taken.sum(dim=1)


def _surroundings(points: Tensor, structure: Tensor, n_structures: int) -> tuple[Tensor, Tensor]:
    """What tells points apart from which distances to the centroid do not.

    With the moments v = <|x|^2 x>, T = <|x|^2 x x^T>, U = <|x|^4 x x^T> and M = <x x x x> of a cloud, and
    w = T r + M[r, r, r]: a number r.v + r.w + (r x w).v + det[r, w, U r], and the vector r x w. Both turn with the
    cloud, and a reflection changes their sign, so that mirror images are told apart where the cloud is not symmetric
    under rotations.

    Returns
    -------
    Tensor of shape (n_points,), Tensor of shape (n_points, 3)
    """
    count = segment_sum(torch.ones_like(points[:, 0]), structure, n_structures)[:, None]
    square = (points * points).sum(dim=1, keepdim=True)
    outer = (points[:, :, None] * points[:, None, :]).reshape(-1, 9)

    def moment(values: Tensor) -> Tensor:
        return (segment_sum(values, structure, n_structures) / count)[structure]

    v, t, u = moment(square * points), moment(square * outer), moment(square * square * outer)
    fourth = moment((outer[:, :, None] * outer[:, None, :]).reshape(-1, 81)).reshape(-1, 9, 9)
    matrix = t.reshape(-1, 3, 3) + (fourth @ outer[:, :, None]).reshape(-1, 3, 3)
    w = (matrix @ points[:, :, None])[:, :, 0]
    normal = torch.linalg.cross(points, w)
    ur = (u.reshape(-1, 3, 3) @ points[:, :, None])[:, :, 0]
    return (points * (v + w) + normal * (v + ur)).sum(dim=1), normal


def nearest_neighbors(points: Tensor, ptr: Tensor, queries: Tensor, query_ptr: Tensor, k: int) -> Tensor:
    """The k nearest points of every query inside its own cloud, and all that are as near as the k-th.

    Ties are kept rather than cut, so that the result depends neither on rounding nor on the order of the points; a
    query therefore has at least min(k, number of points) neighbors. A query that is a point of the cloud is its own
    first neighbor.

    Parameters
    ----------
    points : Tensor of shape (n_points, n_dimensions)
        Positions or features, grouped by cloud.
    ptr : Tensor of shape (n_clouds + 1,)
    queries : Tensor of shape (n_queries, n_dimensions)
    query_ptr : Tensor of shape (n_clouds + 1,)
    k : int

    Returns
    -------
    Tensor of shape (2, n_edges), int64
        Row 0 the point (source), row 1 the query (target); sorted by query, then by point. Memory grows linearly: at
        most `N_DISTANCES` distances, or the row of one query in every cloud, exist at once.
    """
    sizes, query_sizes = structure_sizes(ptr), structure_sizes(query_ptr)
    n_clouds, width, height = sizes.shape[0], int(sizes.max()), int(query_sizes.max())
    tie = TIES[points.dtype]
    column = torch.arange(width, device=ptr.device)
    row = torch.arange(height, device=ptr.device)
    # Clouds that do not fit together are taken one after another, queries inside them in blocks.
    n_together = max(1, min(n_clouds, N_DISTANCES // max(1, width * min(height, 64))))
    found = []
    for first in range(0, n_clouds, n_together):
        clouds = torch.arange(first, min(first + n_together, n_clouds), device=ptr.device)
        inside = column[None, :] < sizes[clouds][:, None]
        rows = (ptr[clouds][:, None] + column).clamp(max=points.shape[0] - 1)
        cloud = points.detach()[rows]
        block = max(1, N_DISTANCES // max(1, width * clouds.shape[0]))
        kept = min(k, width)
        for start in range(0, height, block):
            part = row[start : start + block]
            asked = part[None, :] < query_sizes[clouds][:, None]
            asking = queries.detach()[(query_ptr[clouds][:, None] + part).clamp(max=queries.shape[0] - 1)]
            distance = _distances(asking, cloud)
            distance = distance.masked_fill(~inside[:, None, :], torch.inf)
            limit = distance.topk(kept, dim=2, largest=False).values
            # In a cloud of fewer than k points: all of them.
            limit = torch.where(torch.isinf(limit), torch.full_like(limit, -torch.inf), limit).max(dim=2).values
            limit = limit * (1.0 + tie) + torch.finfo(limit.dtype).tiny
            cloud_row, query, point = ((distance <= limit[:, :, None]) & asked[:, :, None]).nonzero(as_tuple=True)
            source = ptr[clouds[cloud_row]] + point
            target = query_ptr[clouds[cloud_row]] + part[query]
            found.append(torch.stack([source, target]))
    edges = torch.cat(found, dim=1)
    if n_together > 1:
        edges = edges[:, torch.argsort(edges[1], stable=True)]
    return edges


def _distances(queries: Tensor, points: Tensor) -> Tensor:
    """Distances without cancellation in space, by matrix products between features."""
    mode = "donot_use_mm_for_euclid_dist" if points.shape[2] <= 3 else "use_mm_for_euclid_dist"
    return torch.cdist(queries, points, compute_mode=mode)


def sample_counts(sizes: Tensor, ratio: float) -> Tensor:
    """Rounded up, so that no cloud ends up empty: Tensor of shape (n_clouds,), int64."""
    return torch.ceil(sizes.to(torch.float64) * ratio - 1e-9).to(torch.int64).clamp(min=1)


def sampled_offsets(n_samples: Tensor) -> Tensor:
    """Offsets of the samples of every cloud: Tensor of shape (n_clouds + 1,)."""
    return offsets(n_samples)
