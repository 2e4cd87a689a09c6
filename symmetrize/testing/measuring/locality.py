r"""Whether structures that are too far apart to interact leave each other alone.

What a strictly local model says about a molecule does not depend on whether another one is somewhere else, nor on how
that is turned. Frames of whole structures do: an average over them is exact under rotations of everything, and still
neither size-consistent nor locally equivariant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import replace, validate
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import Element, batched, moved_to, random_elements, split, transform
from symmetrize.testing.measuring.measures import Deviation, Measurement, Scales
from symmetrize.testing.measuring.orbits import errors_of
from symmetrize.testing.measuring.scales import Model, Scale, Values, evaluate, resolve_scale

#: From one member of a pair to the other: along no axis and no diagonal.
_DIRECTION = (0.36, 0.48, 0.80)

#: Fields with one row per structure, of which a pair keeps that of its first member.
_PER_STRUCTURE = (keys.CELL, keys.PBC, keys.SPIN_MULTIPLICITY)


def measure_size_consistency(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    distance: float,
    periodic: bool = False,
    scale: Scales | None = None,
) -> Measurement:
    r"""Difference between two far structures evaluated as one, and what they are by themselves.

    Every structure A gets the next one of the batch, B (a copy of itself where there is no other), as a companion:

    .. math:: |f(A \cup B)_i - f(A)_i|, \qquad |f(A \cup B) - f(A) - f(B)|

    for the rows of atoms and for sums over them (``reduce="sum"``); means are weighted by numbers of atoms. Outputs
    that are per structure with no ``reduce`` declared are not compared: nothing says how they add up.

    Parameters
    ----------
    f : callable
    batch : Data
        Structures without periodicity.
    outputs : dict of str to OutputSpec
    distance : float
        Between the spheres around the members of a pair, which are centered at their centroids; more than the model
        sees (cutoff times hops).
    periodic : bool
        Put the pairs into cubic cells whose images are as far apart; the isolated structures stay without a cell.
    scale : dict of str to Scale or float, optional
        Error scales; by default `error_scale` of this batch.

    Raises
    ------
    InvalidInputError
        For a periodic structure, or a distance that is not positive.
    """
    batch = _finite(batch, distance, "measure_size_consistency")
    singles = split(batch)
    alone = evaluate(f, batch, outputs)
    pairs = _Pairs.of(singles, distance, periodic)
    together = evaluate(f, pairs.batch, outputs)
    expected = {}
    for name, value in alone.items():
        if value.per == "atom":
            expected[name] = value.rows[pairs.rows(batch)]
        elif value.spec.reduce is not None:
            partner = torch.tensor(pairs.partner)
            counts = batch[keys.PTR].diff().cpu().to(torch.float64).reshape((-1,) + (1,) * len(value.spec.shape))
            if value.spec.reduce == "sum":
                expected[name] = value.rows + value.rows[partner]
            else:
                total = value.rows * counts + (value.rows * counts)[partner]
                expected[name] = total / (counts + counts[partner])
    scales = resolve_scale(f, batch, outputs, alone, scale)
    case = "beside another one, periodic" if periodic else "beside another one"
    return _compared("size consistency", batch, (case,), [(expected, together)], scales)


def measure_local_equivariance(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    elements: Iterable[Element] | None = None,
    *,
    distance: float,
    periodic: bool = False,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> Measurement:
    r"""Error when one of two far structures is turned about its centroid and the other one stays as it is.

    .. math:: |f(g A \cup B)_i - \rho(g) f(A \cup B)_i|_{i \in A}, \qquad |f(g A \cup B)_i - f(A \cup B)_i|_{i \in B}

    The pairs are those of `measure_size_consistency`. Sums and means over atoms are compared where their rows come
    beside them (``atomic_<name>``), and whatever is invariant under O(3) has to stay as it is; other outputs that are
    per structure are left out.

    Parameters
    ----------
    f : callable
    batch : Data
        Structures without periodicity.
    outputs : dict of str to OutputSpec
    elements : iterable of Element, optional
        By default four random ones of ``group``.
    distance, periodic
        As for `measure_size_consistency`.
    group : {"O(3)", "SO(3)"}
    vectors : dict of str to str, optional
        Further fields that rotate, as field name -> e3nn irreps.
    generator : torch.Generator, optional
        For the random elements; seed 0 by default.
    scale : dict of str to Scale or float, optional
        Error scales; by default `error_scale` of this batch (of isolated structures).

    Raises
    ------
    InvalidInputError
        For a periodic structure, or a distance that is not positive.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = _finite(batch, distance, "measure_local_equivariance")
    chosen = random_elements(4, generator, group=group) if elements is None else list(elements)
    singles = split(batch)
    pairs = _Pairs.of(singles, distance, periodic)
    reference = evaluate(f, pairs.batch, outputs)
    cases = []
    for element in chosen:
        changed = evaluate(f, pairs.with_turned(element, vectors), outputs)
        cases.append((_turned(reference, pairs, element), changed))
    scales = resolve_scale(f, batch, outputs, evaluate(f, batch, outputs), scale)
    return _compared(
        "local equivariance", batch, tuple(e.name for e in chosen), cases, scales, generator.initial_seed()
    )


@dataclass(frozen=True)
class _Pairs:
    """Structures with companions.

    Attributes
    ----------
    batch : Batch
        One structure per pair.
    first : Tensor of shape (n_atoms,)
        bool: atoms of the first members, which come first in every pair.
    partner : list of int
        The companion of every structure.
    """

    batch: Batch
    first: Tensor
    partner: list[int]

    @classmethod
    def of(cls, singles: list[Batch], distance: float, periodic: bool) -> _Pairs:
        partner = [(n + 1) % len(singles) for n in range(len(singles))]
        joined = [_joined(singles[a], singles[b], distance, periodic) for a, b in enumerate(partner)]
        first = [
            torch.arange(len(pair[keys.POS])) < len(single[keys.POS])
            for pair, single in zip(joined, singles, strict=True)
        ]
        return cls(batched(joined), torch.cat(first), partner)

    def rows(self, batch: Batch) -> Tensor:
        """The row of a per-atom output of the isolated structures that each of a pair should equal."""
        mask = batch.get(keys.CENTER_MASK)
        owner = batch[keys.BATCH].cpu() if mask is None else batch[keys.BATCH][mask].cpu()
        parts = [(owner == n).nonzero()[:, 0] for n in range(len(self.partner))]
        return torch.cat([torch.cat([parts[a], parts[b]]) for a, b in enumerate(self.partner)])

    def with_turned(self, element: Element, vectors: dict[str, str] | None) -> Batch:
        """The pairs with every first member turned about its centroid, and nothing else changed."""
        structure, first = self.batch[keys.BATCH], self.first.to(self.batch[keys.POS].device)
        pos = self.batch[keys.POS].detach().to(torch.float64)
        own = first.to(torch.float64)
        centers = segment_sum(pos * own[:, None], structure, len(self.partner))
        centers = centers / segment_sum(own, structure, len(self.partner))[:, None]
        arms = replace(self.batch, **{keys.POS: pos - centers[structure]})
        turned = transform(arms, element, vectors)
        moved = torch.where(first[:, None], turned[keys.POS] + centers[structure], pos)
        further = {}
        for name in vectors or {}:
            old = self.batch[name]
            further[name] = torch.where(first.reshape((-1,) + (1,) * (old.dim() - 1)), turned[name], old)
        return moved_to(replace(self.batch, **further), moved)


def _joined(a: Batch, b: Batch, distance: float, periodic: bool) -> Batch:
    """One structure of two, neighbor list included where there was one."""
    both = batched([a, b])
    pos = both[keys.POS].detach().to(torch.float64)
    n = len(a[keys.POS])
    centers = [pos[:n].mean(dim=0), pos[n:].mean(dim=0)]
    reach = [float((part - c).norm(dim=1).max()) for part, c in zip((pos[:n], pos[n:]), centers, strict=True)]
    apart = sum(reach) + distance
    direction = torch.nn.functional.normalize(pos.new_tensor(_DIRECTION), dim=0)
    moved = torch.cat([pos[:n], pos[n:] - centers[1] + centers[0] + apart * direction])
    fields: dict[str, Any] = {name: both[name][:1] for name in _PER_STRUCTURE if both.get(name) is not None}
    if both.get(keys.CHARGE) is not None:
        fields[keys.CHARGE] = both[keys.CHARGE].sum(dim=0, keepdim=True)
    side = apart + sum(reach) + distance
    if periodic:
        fields[keys.CELL] = side * torch.eye(3, dtype=pos.dtype, device=pos.device)[None]
        fields[keys.PBC] = torch.ones_like(fields[keys.PBC])
    fields[keys.BATCH] = torch.zeros_like(both[keys.BATCH])
    fields[keys.PTR] = both[keys.PTR][[0, -1]]
    cell = fields[keys.CELL].to(both[keys.POS].dtype)
    return moved_to(replace(both, **fields), moved, cell)


def _turned(reference: dict[str, Values], pairs: _Pairs, element: Element) -> dict[str, Tensor]:
    """What the outputs should be when the first members are turned."""
    mask = pairs.batch.get(keys.CENTER_MASK)
    first = pairs.first if mask is None else pairs.first[mask.cpu()]
    out: dict[str, Tensor] = {}
    for name, value in reference.items():
        if value.per == "atom":
            turned = value.spec.rotate(value.rows, element.matrix.expand(len(value.rows), 3, 3))
            out[name] = torch.where(first.reshape((-1,) + (1,) * (turned.dim() - 1)), turned, value.rows)
    for name, value in reference.items():
        if value.per == "atom":
            continue
        atomic = f"atomic_{name}"
        if value.spec.is_invariant_scalar:
            out[name] = value.rows
        elif value.spec.reduce is not None and atomic in out:
            change = out[atomic] - reference[atomic].rows
            owner, n = reference[atomic].owner, len(value.rows)
            total = segment_sum(change, owner, n)
            if value.spec.reduce == "mean":
                counts = torch.bincount(owner, minlength=n).to(total)
                total = total / counts.reshape((-1,) + (1,) * (total.dim() - 1))
            out[name] = value.rows + total
    return out


def _compared(
    name: str,
    batch: Batch,
    labels: tuple[str, ...],
    cases: list[tuple[dict[str, Tensor], dict[str, Values]]],
    scales: dict[str, Scale],
    seed: int | None = None,
) -> Measurement:
    out = {}
    for output in cases[0][0]:
        got = cases[0][1][output]
        changes = torch.stack([after[output].rows - expected[output] for expected, after in cases])
        out[output] = Deviation(output, labels, *errors_of(changes, got.owner, batch), scales[output])
    return Measurement(name, out, batch[keys.POS].dtype, seed)


def _finite(batch: Data, distance: float, what: str) -> Batch:
    batch = validate(batch)
    periodic = batch[keys.PBC].any(dim=1).nonzero()
    if len(periodic):
        raise InvalidInputError(f"{what}: expected structures without periodicity, structure {int(periodic[0])} has it")
    if not distance > 0.0:
        raise InvalidInputError(f"{what}: expected a positive distance, got {distance}")
    return batch
