"""A model on many rotated copies of a batch at once, and what comes out, turned back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import replace
from symmetrize.ops.ragged import segment_max, segment_sum
from symmetrize.representations import OutputSpec, check_group
from symmetrize.testing.measuring.elements import batched
from symmetrize.testing.measuring.scales import Model, Scale, Values, evaluate

#: Structures and atoms of all rotated copies in one call of a model.
_MOST_STRUCTURES, _MOST_ATOMS = 256, 10_000


def both_parities(rotations: Tensor, group: str) -> Tensor:
    """Rotations and, for O(3), the same ones times the inversion behind them."""
    return torch.cat([rotations, -rotations]) if check_group(group) == "O(3)" else rotations


def orbit(
    f: Model, batch: Batch, outputs: Mapping[str, OutputSpec], elements: Tensor, vectors: dict[str, str] | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """f(g x), several elements to a call: these elements, and rows of shape (n, n_rows, *shape) of every output."""
    n_structures, n_atoms = batch[keys.PTR].shape[0] - 1, batch[keys.POS].shape[0]
    size = max(1, min(_MOST_STRUCTURES // n_structures, _MOST_ATOMS // n_atoms, len(elements)))
    copies = batched([batch] * size)
    for some in elements.split(size):
        if len(some) < size:
            copies = batched([batch] * len(some))
        values = evaluate(f, turned(copies, some, vectors), outputs)
        yield some, {name: v.rows.reshape(len(some), -1, *v.spec.shape) for name, v in values.items()}


def turned(copies: Batch, elements: Tensor, vectors: dict[str, str] | None) -> Batch:
    """`transform` by another element for each of the copies, whose rows follow each other in every field."""
    g = elements.to(copies[keys.POS].device)
    fields: dict[str, Tensor | None] = {keys.EDGE_VEC: None}
    for name in (keys.POS, keys.CELL):
        rows = copies[name].detach()
        turned = rows.to(torch.float64).reshape(len(g), -1, 3) @ g.transpose(1, 2)
        fields[name] = turned.reshape(rows.shape).to(rows.dtype)
    for name, irreps in (vectors or {}).items():
        rows = copies[name].detach()
        index = torch.arange(len(g), device=g.device).repeat_interleave(len(rows) // len(g))
        fields[name] = OutputSpec(irreps).rotate(rows.to(torch.float64), g, index).to(rows.dtype)
    return replace(copies, **fields)


def applied(spec: OutputSpec, rows: Tensor, elements: Tensor) -> Tensor:
    """rho(g) on rows of shape (n, n_rows, *shape), for n elements."""
    index = torch.arange(len(elements)).repeat_interleave(rows.shape[1])
    return spec.rotate(rows.flatten(0, 1), elements, index).reshape(rows.shape)


def returned(spec: OutputSpec, rows: Tensor, elements: Tensor) -> Tensor:
    """The inverse of `applied`: F from f(g x)."""
    return applied(spec, rows, elements.transpose(1, 2))


def changes_over(
    f: Model,
    batch: Batch,
    outputs: Mapping[str, OutputSpec],
    elements: Tensor,
    reference: dict[str, Values],
    vectors: dict[str, str] | None,
) -> dict[str, Tensor]:
    """F(g) minus the rows of the reference: Tensor of shape (n, n_rows, *shape) for every output of it."""
    found: dict[str, list[Tensor]] = {name: [] for name in reference}
    for some, rows in orbit(f, batch, outputs, elements, vectors):
        for name, value in reference.items():
            found[name].append(returned(value.spec, rows[name], some) - value.rows)
    return {name: torch.cat(parts) for name, parts in found.items()}


def errors_of(changes: Tensor, owner: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Largest absolute entry and RMS of each copy and structure: two Tensors of shape (n, n_structures)."""
    n, n_structures = len(changes), batch[keys.PTR].shape[0] - 1
    flat = changes.reshape(n * len(owner), -1).abs()
    # Finite check first: a NaN is an infinite error.
    flat = where_finite(flat)
    index = (torch.arange(n)[:, None] * n_structures + owner).flatten()
    largest = segment_max(flat.amax(dim=1), index, n * n_structures, 0.0)
    rms = structure_mean(flat.square().mean(dim=1), index, n * n_structures).sqrt()
    return largest.reshape(n, -1), rms.reshape(n, -1)


def structure_mean(rows: Tensor, owner: Tensor, n_structures: int) -> Tensor:
    counts = torch.bincount(owner, minlength=n_structures).clamp(min=1).to(rows.dtype)
    return segment_sum(rows, owner, n_structures) / counts.reshape(-1, *[1] * (rows.dim() - 1))


def where_finite(x: Tensor) -> Tensor:
    """A NaN is an infinite error."""
    return torch.where(torch.isfinite(x), x, torch.full_like(x, math.inf))


def relative(x: Tensor, scale: Scale) -> Tensor:
    return torch.tensor([scale.relative(float(v)) for v in x.flatten()], dtype=torch.float64).reshape(x.shape)
