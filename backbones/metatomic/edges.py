"""Neighbor lists as a model asks for them, from the edges of a (rotated copy of a) batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Edges(NamedTuple):
    """``edge_index``, ``cell_shift`` and ``edge_vec`` of a batch."""

    pairs: Tensor
    shift: Tensor
    vectors: Tensor

    def pick(self, rows: Tensor) -> Edges:
        """Some of them."""
        return Edges(self.pairs[:, rows], self.shift[rows], self.vectors[rows])

    def reversed(self) -> Edges:
        """Seen from the other atom."""
        return Edges(self.pairs.flip(0), -self.shift, -self.vectors)


def both_ways(edges: Edges) -> Edges:
    """Every pair in both directions: reverse edges are added where they are missing.

    The copy of an environment holds the edges of its center only, but models of full lists may look for the reverse of
    every edge, and find a wrong one where there is none.
    """
    key, reverse = _keys(edges)
    missing = ~torch.isin(reverse, key)
    if not bool(missing.any()):
        return edges
    added = edges.pick(missing.nonzero()[:, 0]).reversed()
    return Edges(*(torch.cat(pair, dim=int(k == 0)) for k, pair in enumerate(zip(edges, added, strict=True))))


def one_way(edges: Edges) -> Edges:
    """Every pair once, whether it is there in both directions or in one.

    From the atom of lower number to the other; of an atom and its own image, the first nonzero translation is positive.
    """
    source, target = edges.pairs
    sign = torch.sign(edges.shift) @ edges.shift.new_tensor([9, 3, 1])
    forward = (target < source) | ((target == source) & (sign > 0))
    turned = edges.reversed()
    kept = Edges(
        torch.where(forward, edges.pairs, turned.pairs),
        torch.where(forward[:, None], edges.shift, turned.shift),
        torch.where(forward[:, None], edges.vectors, turned.vectors),
    )
    _, inverse = torch.unique(_keys(kept)[0], return_inverse=True)
    # The first edge of each pair.
    n = int(inverse.max()) + 1 if len(inverse) else 0
    rows = torch.arange(len(inverse), device=inverse.device)
    first = torch.full((n,), len(inverse), device=inverse.device).scatter_reduce(0, inverse, rows, "amin")
    return kept.pick(first)


def _keys(edges: Edges) -> tuple[Tensor, Tensor]:
    """One integer for every directed edge, and for its reverse."""
    if not edges.pairs.numel():
        return edges.pairs[0], edges.pairs[0]
    n, m = int(edges.pairs.max()) + 1, int(edges.shift.abs().max())
    places = edges.shift.new_tensor([(2 * m + 1) ** 2, 2 * m + 1, 1])
    total = (2 * m + 1) ** 3
    source, target = edges.pairs

    def key(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
        return (a * n + b) * total + (shift + m) @ places

    return key(target, source, edges.shift), key(source, target, -edges.shift)
