"""What the networks of point clouds have in common: reading batches, shared graphs, maxima, dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Copies
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.ops.ragged import gather_rows, offsets
from symmetrize.ops.sampling import farthest_points, nearest_neighbors, sample_counts, structure_sizes


class Clouds(NamedTuple):
    """Positions of a batch, grouped by cloud: (n_points, 3), (n_points,), (n_clouds + 1,)."""

    pos: Tensor
    structure: Tensor
    ptr: Tensor


def clouds_of(batch: Data) -> Clouds:
    """The clouds of a batch; a single `Data` is one cloud."""
    pos, structure, ptr = batch[keys.POS], batch.get(keys.BATCH), batch.get(keys.PTR)
    if structure is None:
        structure = torch.zeros(pos.shape[0], dtype=torch.int64, device=pos.device)
    if ptr is None:
        ptr = offsets(torch.bincount(structure))
    return Clouds(pos, structure, ptr)


def features_of(batch: Data, n_features: int, default: float | None = None) -> Tensor:
    """The invariant features ``x``, or a constant where they are absent and that is allowed."""
    pos, x = batch[keys.POS], batch.get(keys.X)
    if x is None and default is not None:
        return pos.new_full((pos.shape[0], n_features), default)
    if x is None or x.dim() != 2 or x.shape[1] != n_features:
        got = "none" if x is None else tuple(x.shape)
        raise InvalidInputError(f"x: expected features of shape (n_atoms, {n_features}), got {got}")
    return x.to(pos.dtype)


class Level(NamedTuple):
    """One resolution of copied clouds.

    Attributes
    ----------
    ptr : Tensor of shape (n_copies + 1,)
        Offsets of the points of every copy.
    sample : Tensor of shape (n_points,)
        Row of each point in the level before (in the copied atoms for the first).
    down : Tensor of shape (2, n_edges)
        From neighbors in the level before to the points here, sorted by target; empty in the first level.
    graph : Tensor of shape (2, n_edges)
        From neighbors in this level to its points, each point included, sorted by target.
    """

    ptr: Tensor
    sample: Tensor
    down: Tensor
    graph: Tensor


def build_levels(clouds: Clouds, k: int, n_levels: int, ratio: float) -> dict[str, Tensor]:
    """Samples and neighbors of every resolution, all from distances: the same in every orientation.

    Returns
    -------
    dict of str to Tensor
        Integers, from which `select_levels` takes the clouds of any list of copies.
    """
    points, ptr = clouds.pos.detach(), clouds.ptr
    cache = {"structure": clouds.structure}
    sample, edges = torch.arange(points.shape[0], device=points.device), torch.zeros_like(clouds.structure[:0])
    down = torch.stack([edges, edges])
    for level in range(n_levels):
        if level > 0:
            counts = sample_counts(structure_sizes(ptr), ratio)
            sample = farthest_points(points, ptr, counts)
            below, below_ptr = points, ptr
            points, ptr = below[sample], offsets(counts)
            down = nearest_neighbors(below, below_ptr, points, ptr, k)
        graph = nearest_neighbors(points, ptr, points, ptr, k)
        cache[f"ptr{level}"], cache[f"sample{level}"] = ptr, sample
        for name, edges in (("down", down), ("graph", graph)):
            cache[f"{name}{level}"] = edges
            # Sorted by target and targets by cloud: the edges of a cloud are contiguous.
            cache[f"{name}_ptr{level}"] = torch.searchsorted(edges[1].contiguous(), ptr)
    return cache


def select_levels(cache: dict[str, Tensor], copies: Copies | None, n_levels: int) -> list[Level]:
    """The resolutions of a list of copies of whole clouds (None: one of each)."""
    if copies is None:
        return [
            Level(*(cache[f"{name}{level}"] for name in ("ptr", "sample", "down", "graph")))
            for level in range(n_levels)
        ]
    first = torch.searchsorted(copies.atom_copy, torch.arange(int(copies.atom_copy[-1]) + 1, device=copies.atom.device))
    clouds = cache["structure"][copies.atom[first]]
    found: list[Level] = []
    before = clouds[:0]
    for level in range(n_levels):
        ptr = cache[f"ptr{level}"]
        starts = offsets(structure_sizes(ptr)[clouds])
        shift = starts[:-1] - ptr[clouds]
        before = before if level > 0 else shift
        row, copy = gather_rows(ptr, clouds)
        down, down_copy = gather_rows(cache[f"down_ptr{level}"], clouds)
        graph, graph_copy = gather_rows(cache[f"graph_ptr{level}"], clouds)
        found.append(
            Level(
                starts,
                cache[f"sample{level}"][row] + before[copy],
                cache[f"down{level}"][:, down] + torch.stack([before[down_copy], shift[down_copy]]),
                cache[f"graph{level}"][:, graph] + shift[graph_copy],
            )
        )
        before = shift
    return found


def grouped_max(values: Tensor, counts: Tensor) -> Tensor:
    """Maximum over consecutive rows: Tensor of shape (n_groups, n_features).

    A maximum has kinks: what follows is continuous in the values, but not smooth.
    """
    n_groups, largest = counts.shape[0], int(counts.max())
    if values.shape[0] == n_groups * largest:
        return values.reshape(n_groups, largest, -1).amax(dim=1)
    group = torch.repeat_interleave(torch.arange(n_groups, device=values.device), counts)
    out = values.new_full((n_groups, values.shape[1]), -torch.inf)
    return out.scatter_reduce(0, group[:, None].expand_as(values), values, "amax")


def grouped_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over consecutive rows: Tensor of shape (n_groups, n_features)."""
    group = torch.repeat_interleave(torch.arange(counts.shape[0], device=values.device), counts)
    total = values.new_zeros(counts.shape[0], values.shape[1]).index_add(0, group, values)
    return total / counts[:, None].to(values.dtype)


def edge_counts(edges: Tensor, n_targets: int) -> Tensor:
    """Number of edges that end on every point: Tensor of shape (n_targets,)."""
    return torch.bincount(edges[1], minlength=n_targets)


def dense(n_in: int, n_out: int, activation: Callable[[], torch.nn.Module], bias: bool = True) -> torch.nn.Sequential:
    """Linear map, batch normalization, activation (a convolution of width one, in the papers)."""
    return torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=bias), torch.nn.BatchNorm1d(n_out), activation())


def check_positive(name: str, value: object) -> int:
    """A positive integer, or a `DeclarationError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeclarationError(f"{name}: expected a positive integer, got {value!r}")
    return value
