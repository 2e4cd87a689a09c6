"""How far a model is from each symmetry it should have: numbers, no verdicts.

Every ``measure_*`` takes any callable ``f(batch) -> dict of Tensor`` and the declarations of its outputs, evaluates it
on a batch and on changed copies of it, and compares in float64 what came out with what should have. Non-finite outputs
count as infinite errors. Judge with ``within(measurement.relative, tolerance(measurement.dtype))``.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import validate
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import segment_max, segment_sum
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import (
    Element,
    batched,
    change_lattice,
    copied,
    displaced,
    group_elements,
    permute,
    split,
    supercell,
    transform,
    translate,
    wrap,
)
from symmetrize.testing.measuring.scales import Model, Scale, Values, evaluate, resolve_scale

Scales = Mapping[str, Scale | float]


@dataclass(frozen=True)
class Deviation:
    """Errors of one output.

    Attributes
    ----------
    name : str
    cases : tuple of str
        What was done, such as the names of the group elements.
    max, rms : Tensor of shape (n_cases, n_structures), float64
        Largest absolute and RMS error over rows and components, in the unit of the output; inf where a value is not
        finite.
    scale : Scale
    """

    name: str
    cases: tuple[str, ...]
    max: Tensor
    rms: Tensor
    scale: Scale

    @property
    def relative(self) -> float:
        """Largest absolute error of all on the error scale."""
        return self.scale.relative(float(self.max.max()) if self.max.numel() else math.inf)

    @property
    def relative_rms(self) -> float:
        """RMS over cases and structures of the RMS errors, on the error scale."""
        return self.scale.relative(float(self.rms.square().mean().sqrt()) if self.rms.numel() else math.inf)

    @property
    def worst(self) -> tuple[str, int]:
        """Case and structure of the largest error."""
        where = int(self.max.argmax())
        return self.cases[where // self.max.shape[1]], where % self.max.shape[1]

    def __str__(self) -> str:
        case, structure = self.worst
        return (
            f"{self.name}: error {float(self.max.max()):.3g} = {self.relative:.3g} x scale {self.scale.value:.3g} "
            f"({self.scale.kind}), worst at {case!r}, structure {structure}"
        )


@dataclass(frozen=True)
class Measurement:
    """Errors of all outputs under one property.

    Attributes
    ----------
    name : str
        The property.
    outputs : dict of str to Deviation
    dtype : torch.dtype
        Of the positions: what the errors are to be judged by, whatever the dtype of the outputs.
    seed : int or None
        Initial seed of the generator that was used.
    """

    name: str
    outputs: dict[str, Deviation]
    dtype: torch.dtype
    seed: int | None = None

    @property
    def relative(self) -> float:
        """Largest relative error of any output; infinite where nothing was compared."""
        return max((d.relative for d in self.outputs.values()), default=math.inf)

    @property
    def worst(self) -> Deviation:
        """The output with the largest relative error."""
        return max(self.outputs.values(), key=lambda d: d.relative)

    def __getitem__(self, name: str) -> Deviation:
        return self.outputs[name]

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" (seed {self.seed})"
        return "\n  ".join([f"{self.name}{seed}", *map(str, self.outputs.values())])


#: What an output should be and what it is: expected rows, rows, and the structure of the reference each belongs to.
_Pair = tuple[Tensor, Tensor, Tensor]


def _errors(pair: _Pair, n_structures: int) -> tuple[Tensor, Tensor]:
    expected, got, owner = pair
    difference = (got - expected).reshape(len(expected), -1).abs()
    # A NaN is no small error: this comes before any maximum or comparison.
    finite = torch.isfinite(difference)
    difference = torch.where(finite, difference, torch.full_like(difference, math.inf))
    largest = segment_max(difference.amax(dim=1), owner, n_structures, 0.0)
    counts = torch.bincount(owner, minlength=n_structures).clamp(min=1)
    return largest, (segment_sum(difference.square().mean(dim=1), owner, n_structures) / counts).sqrt()


def _measurement(
    name: str,
    batch: Batch,
    cases: Sequence[tuple[str, dict[str, _Pair]]],
    scales: dict[str, Scale],
    generator: torch.Generator | None = None,
) -> Measurement:
    n_structures = batch[keys.PTR].shape[0] - 1
    out = {}
    for output, scale in scales.items():
        labels, largest, rms = [], [], []
        for label, pairs in cases:
            if output in pairs:
                errors = _errors(pairs[output], n_structures)
                labels.append(label)
                largest.append(errors[0])
                rms.append(errors[1])
        if labels:
            out[output] = Deviation(output, tuple(labels), torch.stack(largest), torch.stack(rms), scale)
    return Measurement(name, out, batch[keys.POS].dtype, None if generator is None else generator.initial_seed())


def _same(reference: dict[str, Values], changed: dict[str, Values]) -> dict[str, _Pair]:
    return {name: (value.rows, changed[name].rows, value.owner) for name, value in reference.items()}


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def measure_equivariance(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    elements: Iterable[Element] | None = None,
    *,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> Measurement:
    r"""Equivariance error :math:`|f(g x) - \rho(g) f(x)|` of every output, structure and group element.

    Parameters
    ----------
    f : callable
    batch : Data
        With a neighbor list where ``f`` needs one.
    outputs : dict of str to OutputSpec
        `declared` adds forces and stress.
    elements : iterable of Element, optional
        By default `group_elements` of ``group``: special and random ones.
    vectors : dict of str to str, optional
        Further fields that rotate, as field name -> e3nn irreps.
    generator : torch.Generator, optional
        For the random elements; seed 0 by default.
    scale : dict of str to Scale or float, optional
        Error scales; by default `error_scale` of this batch.
    """
    generator = _seeded(generator)
    batch = validate(batch)
    chosen = group_elements(generator, group=group) if elements is None else list(elements)
    reference = evaluate(f, batch, outputs)
    cases = []
    for element in chosen:
        changed = evaluate(f, transform(batch, element, vectors), outputs)
        pairs = {}
        for name, value in reference.items():
            every = torch.zeros(len(value.rows), dtype=torch.int64)
            expected = value.spec.rotate(value.rows, element.matrix[None], every)
            pairs[name] = (expected, changed[name].rows, value.owner)
        cases.append((element.name, pairs))
    return _measurement("equivariance", batch, cases, resolve_scale(f, batch, outputs, reference, scale), generator)


def measure_permutation(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    n_permutations: int = 4,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> Measurement:
    """Change of the outputs when atoms (and edges) are renumbered within structures: never by the identity."""
    generator = _seeded(generator)
    batch = validate(batch)
    if not bool((batch[keys.PTR].diff() > 1).any()):
        raise InvalidInputError("measure_permutation: expected a structure with two or more atoms")
    reference = evaluate(f, batch, outputs)
    mask = batch.get(keys.CENTER_MASK)
    mask = torch.ones(batch[keys.POS].shape[0], dtype=torch.bool) if mask is None else mask.cpu()
    row_of_atom = torch.cumsum(mask, dim=0) - 1
    cases = []
    for k in range(n_permutations):
        permuted, permutation = permute(batch, generator)
        changed = evaluate(f, permuted, outputs)
        old = permutation.cpu()
        old_row = row_of_atom[old[mask[old]]]
        pairs = {
            name: (v.rows[old_row] if v.per == "atom" else v.rows, changed[name].rows, v.owner)
            for name, v in reference.items()
        }
        cases.append((f"permutation {k}", pairs))
    return _measurement("permutation", batch, cases, resolve_scale(f, batch, outputs, reference, scale), generator)


def measure_translation(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    n_translations: int = 3,
    size: float = 3.0,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> Measurement:
    """Change of the outputs when every structure is shifted by its own vector (of ``size`` times a standard normal)."""
    generator = _seeded(generator)
    batch = validate(batch)
    reference = evaluate(f, batch, outputs)
    cases = [
        (f"translation {k}", _same(reference, evaluate(f, translate(batch, generator, size), outputs)))
        for k in range(n_translations)
    ]
    return _measurement("translation", batch, cases, resolve_scale(f, batch, outputs, reference, scale), generator)


def measure_periodicity(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    repeats: Sequence[int] | None = (2, 1, 1),
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> Measurement:
    """Change of the outputs under other descriptions of the same crystal.

    Atoms wrapped into the cell, moved by random lattice vectors, other lattice vectors of the same lattice, and a
    supercell (None: no supercell), in which the sum of an extensive output is as many times larger, while per-atom
    rows, means and a ``stress`` are the same; other per-structure outputs are not compared there.
    """
    generator = _seeded(generator)
    batch = validate(batch)
    if not bool(batch[keys.PBC].any()):
        raise InvalidInputError("measure_periodicity: expected a periodic structure")
    reference = evaluate(f, batch, outputs)
    cases = [
        (label, _same(reference, evaluate(f, changed, outputs)))
        for label, changed in (
            ("wrapped", wrap(batch)),
            ("random images", wrap(batch, generator)),
            ("other lattice vectors", change_lattice(batch, generator)),
            ("other lattice vectors, random images", wrap(change_lattice(batch, generator), generator)),
        )
    ]
    if repeats is not None:
        cases.append((f"supercell {tuple(repeats)}", _supercell(f, batch, outputs, repeats, reference)))
    return _measurement("periodicity", batch, cases, resolve_scale(f, batch, outputs, reference, scale), generator)


def _supercell(
    f: Model, batch: Batch, outputs: Mapping[str, OutputSpec], repeats: Sequence[int], reference: dict[str, Values]
) -> dict[str, _Pair]:
    repeated, origin, factor = supercell(batch, repeats)
    changed = evaluate(f, repeated, outputs)
    mask = batch.get(keys.CENTER_MASK)
    mask = torch.ones(batch[keys.POS].shape[0], dtype=torch.bool) if mask is None else mask.cpu()
    old = origin.cpu()
    old_row = (torch.cumsum(mask, dim=0) - 1)[old[mask[old]]]
    pairs: dict[str, _Pair] = {}
    for name, value in reference.items():
        rows = changed[name].rows
        if value.per == "atom":
            pairs[name] = (value.rows[old_row], rows, value.owner[old_row])
        elif value.spec.reduce == "sum":
            # Per copy, so that the error is that of one cell.
            shape = (-1,) + (1,) * len(value.spec.shape)
            pairs[name] = (value.rows, rows / factor.cpu().to(rows).reshape(shape), value.owner)
        elif value.spec.reduce == "mean" or name == "stress":
            pairs[name] = (value.rows, rows, value.owner)
    return pairs


def measure_batching(
    f: Model, batch: Data, outputs: Mapping[str, OutputSpec], *, scale: Scales | None = None
) -> Measurement:
    """Difference between every structure evaluated alone and in the batch, and in a batch of the opposite order.

    Raises
    ------
    InvalidInputError
        For a batch of one structure.
    """
    batch = validate(batch)
    singles = split(batch)
    if len(singles) < 2:
        raise InvalidInputError("measure_batching: expected two or more structures, got one")
    reference = evaluate(f, batch, outputs)
    alone = [evaluate(f, single, outputs) for single in singles]
    backwards = evaluate(f, batched(singles[::-1]), outputs)
    pairs_alone, pairs_backwards = {}, {}
    for name, value in reference.items():
        pairs_alone[name] = (value.rows, torch.cat([single[name].rows for single in alone]), value.owner)
        # Stable, so that the rows of a structure keep their order.
        order = torch.argsort(backwards[name].owner, descending=True, stable=True)
        pairs_backwards[name] = (value.rows, backwards[name].rows[order], value.owner)
    cases = [("alone", pairs_alone), ("opposite order", pairs_backwards)]
    return _measurement("batching", batch, cases, resolve_scale(f, batch, outputs, reference, scale))


def measure_determinism(
    f: Model, batch: Data, outputs: Mapping[str, OutputSpec], *, scale: Scales | None = None
) -> Measurement:
    """Change of the outputs on calling again: at once, with another global seed, and after a call on other input.

    An exactly reproducible model gives 0. The state of the global generator is restored.
    """
    batch = validate(batch)
    reference = evaluate(f, batch, outputs)
    cases = [("again", _same(reference, evaluate(f, batch, outputs)))]
    with torch.random.fork_rng():
        torch.manual_seed(20_000_003)
        cases.append(("other global seed", _same(reference, evaluate(f, batch, outputs))))
    evaluate(f, displaced(batch, torch.Generator().manual_seed(4)), outputs)
    cases.append(("after other input", _same(reference, evaluate(f, batch, outputs))))
    return _measurement("determinism", batch, cases, resolve_scale(f, batch, outputs, reference, scale))


def measure_mutation(f: Model, batch: Data) -> dict[str, str]:
    """What a call changes besides returning something: field of the batch -> what happened, empty for nothing.

    Other keys stand for global state: ``"global generator"`` (torch's), ``"numpy's generator"``, ``"random's
    generator"``, ``"default dtype"``, ``"gradient mode"``; and for the model's own, if it is a ``torch.nn.Module``:
    ``"buffer NAME"``, and ``"parameter gradients"`` left behind. All of it is restored.
    """
    given = copied(validate(batch))
    before: dict[str, Any] = {name: given[name] for name in given.keys()}
    content = {k: v.clone() if isinstance(v, Tensor) else v for k, v in before.items()}
    module = f if isinstance(f, torch.nn.Module) else None
    parameters = list(module.parameters()) if module is not None else []
    grads = [p.grad for p in parameters]
    buffers = {} if module is None else {name: b.detach().clone() for name, b in module.named_buffers()}
    found: dict[str, str] = {}
    with _restored() as globals_before:
        f(given)
        for name, value in _global_state().items():
            if not _same_state(value, globals_before[name]):
                found[name] = "advanced" if "generator" in name else f"changed to {value}"
    for name in given.keys():
        if name not in before:
            found[name] = "added"
    for name, value in before.items():
        now = given.get(name)
        if now is None:
            found[name] = "removed"
        elif isinstance(value, Tensor):
            if now is not value:
                found[name] = "replaced"
            elif value.shape != content[name].shape or not torch.equal(value, content[name]):
                found[name] = "changed in place"
            elif value.requires_grad or value.grad is not None:
                found[name] = "made to require a gradient"
        elif now != content[name]:
            found[name] = "replaced"
    for name, buffer in ({} if module is None else dict(module.named_buffers())).items():
        if name in buffers and not torch.equal(buffer, buffers[name]):
            found[f"buffer {name}"] = "changed"
            buffer.data.copy_(buffers[name])
    if any(p.grad is not g for p, g in zip(parameters, grads, strict=True)):
        found["parameter gradients"] = "left behind"
    return found


def _global_state() -> dict[str, Any]:
    return {
        "global generator": torch.get_rng_state(),
        "numpy's generator": tuple(np.random.get_state())[1:],  # noqa: NPY002 (the legacy one is the global one)
        "random's generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
    }


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@contextlib.contextmanager
def _restored() -> Iterator[dict[str, Any]]:
    """Global state that no model has seen before, so that one which always leaves the same behind is found out."""
    numpy_state, random_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    dtype, enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(7_654_321_007)
        np.random.seed(765_432_101)  # noqa: NPY002
        random.seed(765_432_101)
        try:
            yield _global_state()
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(random_state)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(enabled)
