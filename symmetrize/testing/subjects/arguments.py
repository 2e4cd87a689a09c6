"""Functions of tensors as subjects: a layer, or anything that is called with named tensors instead of a batch.

A sample of inputs becomes a structure of a batch. Tensors with one row per point become per-atom fields, floating
tensors of another length (one row per edge, one per sample) per-structure fields; both turn with their irreps. Integer
tensors of another length are kept aside and handed to the function as they were, but for the row numbers in
``edge_index``, which follow the order of the rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import assemble, validate
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.testing.subjects.subject import Subject

#: Prefix of the fields that hold arguments, so that no argument is taken for a field of that name.
_PREFIX = "argument_"
#: Original number of each row within its sample, and of the sample.
_ROW, _SAMPLE = "row_number", "sample_number"

#: What can be seen without a structure behind the numbers: nothing is shifted, periodic, batched or differentiated.
_ARGUMENT_CLAIMS = frozenset({"rotations", "inversion", "permutation", "determinism", "purity"})

Inputs = Mapping[str, Tensor | tuple[Tensor, str | None]]
Outputs = Mapping[str, OutputSpec | str] | Sequence[OutputSpec | str] | OutputSpec | str


@dataclass(frozen=True)
class Argument:
    """How one argument is kept in a batch.

    Attributes
    ----------
    name : str
    kind : {"positions", "row", "sample", "aside"}
        One row per point, in ``pos`` or in a field of its own; one row per sample, padded with zeros; or not at all.
    irreps : str or None
        Of one row of the field; None for invariants.
    """

    name: str
    kind: str
    irreps: str | None


def of_arguments(
    f: Callable[..., Any],
    inputs: Inputs | Sequence[Inputs],
    outputs: Outputs,
    *,
    positions: str | None = None,
    **options: Any,
) -> tuple[Subject, Batch]:
    """A function of tensors as a subject, and the batch to check it on: ``run(*of_arguments(...), library=False)``.

    Parameters
    ----------
    f : callable or torch.nn.Module
        Called with the inputs by name where its signature has all of the names, else in the order given.
    inputs : dict of str to Tensor or (Tensor, str), or a sequence of such dicts
        Tensors with their irreps in e3nn notation, the irreps along the last axis; without, they are invariant. Several
        dicts are several samples. The number of rows is that of ``positions``, else of the first tensor with irreps;
        everything as long as that is taken for rows of the same points, which may be permuted. Integer tensors of
        another shape are passed through; one called ``edge_index`` holds row numbers, with any other the claim
        "permutation" is dropped.
    outputs : OutputSpec or str, or a dict or sequence of them
        Declarations by name, or in the order of the tuple that ``f`` returns. For irreps as a string, ``per`` is found
        by trying: one row per point or one for all. A longer axis in between, or a row per edge, becomes the
        multiplicity of irreps.
    positions : str, optional
        Name of the input that holds positions of points: shifting them should change nothing. Without it, the batch has
        random positions which ``f`` never sees.
    **options
        Attributes of `Subject`, instead of those found.

    Returns
    -------
    subject : Subject
        Claims rotations, inversion, permutation, determinism, purity, and with ``positions`` translation and precision.
    batch : Batch
        One structure per sample.

    Raises
    ------
    InvalidInputError, InvalidTypeError
        Samples that differ in names or kinds, shapes that do not fit their irreps.
    DeclarationError
        Irreps or outputs that do not fit what ``f`` returns.
    """
    if not callable(f):
        raise InvalidTypeError(f"f: expected something to call with tensors, got {type(f).__name__}")
    samples = [_sample(one) for one in ([inputs] if isinstance(inputs, Mapping) else list(inputs))]
    if not samples:
        raise InvalidInputError("inputs: expected at least one sample, got none")
    module = f if isinstance(f, torch.nn.Module) else None
    dtype = options.get("dtype", _dtype(module, samples))
    arguments, batch, claims = _arranged(samples, positions, dtype)
    call = ArgumentsModel(f, arguments, samples, {})
    specs = _specs(call, batch, outputs)
    call.outputs = specs
    found: dict[str, Any] = dict(
        name=getattr(f, "__name__", type(f).__name__),
        kind="callable",
        model=call,
        outputs={name: one.spec for name, one in specs.items()},
        claims=claims,
        vectors={_PREFIX + a.name: a.irreps for a in arguments if a.irreps is not None and a.kind != "positions"},
        periodic=False,
        dtype=dtype,
        module=module,
    )
    if module is not None:
        found["convert"] = lambda other: of_arguments(
            copy.deepcopy(module).to(other), inputs, outputs, positions=positions, **{**options, "dtype": other}
        )[0]
    return Subject(**{**found, **options}), batch


@dataclass(frozen=True)
class _Returned:
    """What an output looks like as it comes out of the function.

    ``index``: its name or its place; None for the only one.
    """

    spec: OutputSpec
    index: str | int | None


class ArgumentsModel(torch.nn.Module):
    """A function of tensors as a function of batches, one call per structure.

    Parameters
    ----------
    f : callable
    arguments : sequence of Argument
    samples : sequence of dict of str to (Tensor, str or None)
    outputs : dict of str to _Returned
    """

    def __init__(
        self,
        f: Callable[..., Any],
        arguments: Sequence[Argument],
        samples: Sequence[Mapping[str, tuple[Tensor, str | None]]],
        outputs: Mapping[str, _Returned],
    ) -> None:
        super().__init__()
        self.f, self.arguments, self.samples, self.outputs = f, list(arguments), list(samples), dict(outputs)
        self.by_name = _takes(f, [a.name for a in arguments])

    def returned(self, batch: Data) -> list[Any]:
        """What the function returns for every structure."""
        out = []
        ptr = batch[keys.PTR].tolist()
        for s, (first, last) in enumerate(pairwise(ptr)):
            sample = self.samples[int(batch[_SAMPLE][s, 0])]
            # Row that each original row is in now.
            now = torch.argsort(batch[_ROW][first:last])
            given = {a.name: self._argument(a, sample[a.name][0], batch, s, (first, last), now) for a in self.arguments}
            out.append(self.f(**given) if self.by_name else self.f(*given.values()))
        return out

    def _argument(
        self, argument: Argument, original: Tensor, batch: Data, s: int, rows: tuple[int, int], now: Tensor
    ) -> Tensor:
        if argument.kind == "positions":
            return batch[keys.POS][rows[0] : rows[1]]
        if argument.kind == "row":
            return batch[_PREFIX + argument.name][rows[0] : rows[1]].reshape(original.shape)
        if argument.kind == "sample":
            return batch[_PREFIX + argument.name][s, : original.numel()].reshape(original.shape)
        return now[original] if argument.name == keys.EDGE_INDEX else original.clone()

    def forward(self, batch: Data) -> dict[str, Tensor]:
        counts = batch[keys.PTR].diff().tolist()
        rows: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        for n, value in zip(counts, self.returned(batch), strict=True):
            for name, one in self.outputs.items():
                part = value if one.index is None else value[one.index]
                n_rows = n if one.spec.per == "atom" else 1
                shape = (n_rows, *one.spec.shape)
                if not isinstance(part, Tensor) or part.numel() != torch.Size(shape).numel():
                    got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                    raise BackboneOutputError(f"{name}: expected shape {shape} ({one.spec}), got {got}")
                rows[name].append(part.reshape(shape))
        return {name: torch.cat(listed) for name, listed in rows.items()}


def _sample(one: Any) -> dict[str, tuple[Tensor, str | None]]:
    if not isinstance(one, Mapping):
        raise InvalidTypeError(f"inputs: expected a dict of tensors, got {type(one).__name__}")
    if not one:
        raise InvalidInputError("inputs: expected at least one, got none")
    out = {}
    for name, value in one.items():
        tensor, irreps = value if isinstance(value, tuple) else (value, None)
        if not isinstance(tensor, Tensor):
            raise InvalidTypeError(
                f"inputs[{name!r}]: expected a Tensor or (Tensor, irreps), got {type(tensor).__name__}"
            )
        if irreps is not None:
            OutputSpec(irreps)
            dim = o3.Irreps(irreps).dim
            if not tensor.is_floating_point() or (dim > 1 and tensor.shape[-1:] != (dim,)):
                raise InvalidInputError(
                    f"inputs[{name!r}]: expected floating numbers of shape (..., {dim}) as irreps {irreps} have, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        out[name] = (tensor.detach(), irreps)
    return out


def _dtype(module: torch.nn.Module | None, samples: Sequence[Mapping[str, tuple[Tensor, str | None]]]) -> torch.dtype:
    """Of the parameters, else of the inputs."""
    if module is not None:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    floating = [tensor.dtype for tensor, _ in samples[0].values() if tensor.is_floating_point()]
    if not floating:
        raise InvalidInputError("inputs: expected a floating tensor, got none")
    return floating[0]


def _arranged(
    samples: Sequence[Mapping[str, tuple[Tensor, str | None]]], positions: str | None, dtype: torch.dtype
) -> tuple[list[Argument], Batch, frozenset[str]]:
    """Arguments, batch and claims."""
    first = samples[0]
    if positions is not None and positions not in first:
        raise DeclarationError(f"positions: unknown input {positions!r}, {did_you_mean(positions, first)}")
    for k, sample in enumerate(samples):
        if [(n, i) for n, (_, i) in sample.items()] != [(n, i) for n, (_, i) in first.items()]:
            raise InvalidInputError(f"inputs[{k}]: expected names and irreps as in the first sample, got others")
    counts = [_n_rows(sample, positions) for sample in samples]
    arguments, claims = [], set(_ARGUMENT_CLAIMS)
    fields: dict[str, Tensor] = {}
    pos: list[Tensor] | None = None
    for name, (_, irreps) in first.items():
        tensors = [sample[name][0] for sample in samples]
        by_row = all(t.dim() > 0 and t.shape[0] == n for t, n in zip(tensors, counts, strict=True))
        floating = tensors[0].is_floating_point()
        if name == positions:
            if irreps not in (None, "1o", "1x1o") or any(t.dim() != 2 or t.shape[1] != 3 for t in tensors):
                raise InvalidInputError(f"inputs[{name!r}]: expected positions of shape (n, 3) and irreps 1o")
            arguments.append(Argument(name, "positions", "1o"))
            pos = tensors
        elif by_row and name != keys.EDGE_INDEX:
            widths = {t[0].numel() for t in tensors}
            if len(widths) > 1:
                raise InvalidInputError(f"inputs[{name!r}]: expected rows of one length in all samples, got {widths}")
            repeated = None if irreps is None else _times(irreps, widths.pop())
            arguments.append(Argument(name, "row", repeated))
            # One row per point, all further axes in one; a vector of numbers stays one.
            fields[_PREFIX + name] = torch.cat([t.reshape(t.shape[0], -1) if t.dim() > 1 else t for t in tensors])
        elif floating:
            width = max(t.numel() for t in tensors)
            padded = [torch.nn.functional.pad(t.reshape(1, -1), (0, width - t.numel())) for t in tensors]
            arguments.append(Argument(name, "sample", None if irreps is None else _times(irreps, width)))
            fields[_PREFIX + name] = torch.cat(padded)
        else:
            arguments.append(Argument(name, "aside", None))
            if name != keys.EDGE_INDEX:
                claims.discard("permutation")
    if pos is None:
        generator = torch.Generator().manual_seed(5)
        pos = [3.0 * torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in counts]
    else:
        # Both are measured by moving positions.
        claims |= {"translation", "precision"}
    batch = assemble(
        pos=torch.cat(pos).to(dtype),
        counts=torch.tensor(counts),
        **{name: value.to(dtype) if value.is_floating_point() else value for name, value in fields.items()},
        **{
            _ROW: torch.cat([torch.arange(n) for n in counts]),
            _SAMPLE: torch.arange(len(counts))[:, None],
        },
    )
    return arguments, validate(batch), frozenset(claims)


def _n_rows(sample: Mapping[str, tuple[Tensor, str | None]], positions: str | None) -> int:
    if positions is not None:
        found = sample[positions][0]
    else:
        candidates = [t for t, irreps in sample.values() if irreps is not None and t.dim() > 1]
        candidates = candidates or [t for t, _ in sample.values() if t.dim() > 0 and t.is_floating_point()]
        if not candidates:
            raise InvalidInputError("inputs: expected a tensor with rows, got none")
        found = candidates[0]
    if found.shape[0] == 0:
        raise InvalidInputError("inputs: expected at least one row, got none")
    return int(found.shape[0])


def _times(irreps: str, width: int) -> str:
    """Irreps repeated until they are that long."""
    one = o3.Irreps(irreps)
    return str(o3.Irreps([pair for _ in range(width // one.dim) for pair in one]))


def _takes(f: Callable[..., Any], names: Sequence[str]) -> bool:
    """Whether a function takes all arguments by name."""
    try:
        parameters = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).parameters.values()
    except (TypeError, ValueError):  # compiled code has no signature
        return False
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return True
    allowed = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = set(names) & allowed
    if known and len(known) < len(names):
        wrong = next(name for name in names if name not in allowed)
        raise DeclarationError(f"inputs: f has no argument {wrong!r}, {did_you_mean(wrong, allowed)}")
    return bool(known)


def _specs(call: ArgumentsModel, batch: Batch, outputs: Outputs) -> dict[str, _Returned]:
    """Declarations of what the function returns, from a first evaluation."""
    counts = batch[keys.PTR].diff().tolist()
    # On a copy: the function may write into its arguments.
    values = call.returned(Batch(**{k: v.clone() if isinstance(v := batch[k], Tensor) else v for k in batch.keys()}))
    listed: list[tuple[str, str | int | None, OutputSpec | str]]
    if isinstance(outputs, (OutputSpec, str)):
        listed = [("output", None, outputs)]
    elif isinstance(outputs, Mapping):
        single = len(outputs) == 1 and isinstance(values[0], Tensor)
        ordered = isinstance(values[0], (tuple, list))
        listed = [(n, None if single else k if ordered else n, spec) for k, (n, spec) in enumerate(outputs.items())]
    else:
        listed = [(f"output {k}", k, spec) for k, spec in enumerate(outputs)]
    if not listed:
        raise DeclarationError("outputs: expected at least one declaration, got none")
    out = {}
    for name, index, spec in listed:
        parts = [_take(value, index, name) for value in values]
        out[name] = _Returned(spec if isinstance(spec, OutputSpec) else _found(name, spec, parts, counts), index)
    return out


def _take(value: Any, index: str | int | None, name: str) -> Tensor:
    if index is not None:
        missing = (
            index not in value
            if isinstance(value, Mapping)
            else (not isinstance(value, (tuple, list)) or not isinstance(index, int) or index >= len(value))
        )
        if missing:
            raise DeclarationError(f"outputs: {name!r} is declared, but f returned {_described(value)}")
        value = value[index]
    if not isinstance(value, Tensor):
        raise DeclarationError(f"outputs: {name!r}: expected f to return a Tensor there, got {_described(value)}")
    return value


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _found(name: str, irreps: str, parts: Sequence[Tensor], counts: Sequence[int]) -> OutputSpec:
    """A declaration with multiplicity and ``per`` from what came out."""
    OutputSpec(irreps)
    dim = o3.Irreps(irreps).dim
    sizes = {tuple(p.shape) for p in parts}
    flat = dim == 1 and all(p.dim() == 0 or p.shape[-1] != 1 for p in parts)
    for p in parts:
        if not flat and p.shape[-1:] != (dim,):
            raise DeclarationError(f"{name}: expected shape (..., {dim}) as {irreps} has, got {tuple(p.shape)}")
    by_row = all(p.dim() > 0 and p.shape[0] == n for p, n in zip(parts, counts, strict=True))
    # One row of irreps for one sample is the sample's: (dim,) is no row per point, whatever dim is.
    if by_row and not flat and all(p.dim() == 1 for p in parts):
        by_row = False
    widths = {p.numel() // n if by_row else p.numel() for p, n in zip(parts, counts, strict=True)}
    if len(widths) > 1:
        raise DeclarationError(f"{name}: expected rows of one length in all samples, got shapes {sizes}")
    return OutputSpec(_times(irreps, widths.pop()), per="atom" if by_row else "structure")
