"""What a wrapped module is called with: arguments found by name, or said, and checked against the layout."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import edge_vectors, replace
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.ops.ragged import offsets, segment_sum

LAYOUTS = ("flat", "padded", "dense", "single")

#: Where the value of an argument comes from: a field, several fields side by side, or a function of the batch.
Source: TypeAlias = "str | tuple[str, ...] | Callable[[Batch], Any]"

# Fields that are made here: lengths of edge vectors (n_edges,); which slots of a padded tensor hold points, and which
# do not (n_structures, n_max); number of points of each structure (n_structures,); number of structures (an int).
EDGE_LENGTH, MASK, PADDING_MASK, COUNTS, N_STRUCTURES = "edge_length", "mask", "padding_mask", "counts", "n_structures"

EDGES = {keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC, EDGE_LENGTH}
STRUCTURE_FIELDS = {keys.CELL, keys.PBC, COUNTS}
NUMBERING = {keys.BATCH, keys.PTR}
MASKS = {MASK, PADDING_MASK}
FIELDS = {keys.POS, keys.Z, keys.X, keys.CENTER_MASK, N_STRUCTURES, *EDGES, *STRUCTURE_FIELDS, *NUMBERING, *MASKS}

_NAMES: dict[str, str] = {
    keys.POS: "pos position positions coord coords coordinates xyz points point_cloud pts",
    keys.Z: "z species numbers atomic_numbers atom_types",
    keys.X: "x feat feats feature features node_features",
    keys.BATCH: "batch batch_index batch_idx",
    keys.PTR: "ptr",
    keys.CELL: "cell cells lattice",
    keys.PBC: "pbc",
    keys.EDGE_INDEX: "edge_index",
    keys.CELL_SHIFT: "cell_shift cell_shifts",
    keys.EDGE_VEC: "edge_vec edge_vecs edge_vector edge_vectors edge_attr",
    EDGE_LENGTH: "edge_length edge_lengths edge_weight",
    keys.CENTER_MASK: "center_mask",
    MASK: "mask node_mask point_mask attention_mask",
    PADDING_MASK: "padding_mask key_padding_mask src_key_padding_mask",
    COUNTS: "counts lengths n_atoms num_atoms n_points num_points",
    N_STRUCTURES: "n_structures num_structures num_graphs batch_size",
}
_ALIASES = {alias: field for field, names in _NAMES.items() for alias in names.split()}


@dataclass(frozen=True)
class Argument:
    """One argument of the module: where it comes from, how it is passed, whether it may be missing."""

    name: str
    source: Source
    positional: bool = False
    optional: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that it reads, as far as they are declared."""
        if isinstance(self.source, str):
            return (self.source,)
        return self.source if isinstance(self.source, tuple) else ()


@dataclass(frozen=True)
class Convention:
    """How a module is called: the parameters of `symmetrize.wrap` of these names."""

    arguments: tuple[Argument, ...]
    layout: str = "flat"
    center: str | None = None
    channels_first: bool = False
    per_structure: frozenset[str] = frozenset()


class View:
    """Fields of a batch as the module is to see them."""

    def __init__(self, convention: Convention, dtypes: Collection[torch.dtype], batch: Data) -> None:
        pos = batch.get(keys.POS)
        if not isinstance(pos, Tensor):
            raise InvalidInputError("batch: expected a field 'pos', got none")
        self.convention = convention
        self.n_atoms = int(pos.shape[0])
        if dtypes and pos.dtype not in dtypes:
            raise InvalidTypeError(
                f"pos: expected the dtype of the module's parameters ({next(iter(dtypes))}), got {pos.dtype}; convert "
                "one of them: module.to(torch.float64), or from_ase(..., dtype=torch.float32)"
            )
        structure, ptr = batch.get(keys.BATCH), batch.get(keys.PTR)
        if structure is None:
            structure = torch.zeros(self.n_atoms, dtype=torch.int64, device=pos.device)
        if ptr is None:
            ptr = offsets(torch.bincount(structure))
        self.structure, self.ptr, self.counts = structure, ptr, ptr.diff()
        self.n_structures = int(self.counts.shape[0])
        pbc = batch.get(keys.PBC)
        if blind_to_images(convention.arguments) and pbc is not None and bool(pbc.any()):
            raise InvalidInputError(
                f"pbc: structure {int(pbc.any(dim=1).nonzero()[0])} is periodic, and the module takes positions, which "
                "do not say where images of neighbors are; let it take edge_vec instead (declare cutoff=...), or pos, "
                "cell and cell_shift"
            )
        if convention.center is not None:
            mean = segment_sum(pos, structure, self.n_structures) / self.counts[:, None].to(pos.dtype)
            pos = pos - mean[structure]
        self.batch = replace(batch, **{keys.POS: pos, keys.BATCH: structure, keys.PTR: ptr})
        self.pos = pos
        self.values = {a.name: self._value(a) for a in convention.arguments if not self._left_out(a)}

    def _left_out(self, argument: Argument) -> bool:
        return argument.optional and any(
            name in (keys.X, keys.Z, keys.CELL, keys.PBC) and self.batch.get(name) is None for name in argument.fields
        )

    def _value(self, argument: Argument) -> tuple[Any, str]:
        """Value of an argument for all structures, and what it has one row of: atom, structure, edge or nothing."""
        source = argument.source
        if callable(source):
            value = source(self.batch)
            if not isinstance(value, Tensor):
                return value, ""
            return self._checked(argument.name, value, argument.name in self.convention.per_structure)
        if isinstance(source, str):
            return self._field(source)
        parts = [self._field(name) for name in source]
        kinds = {kind for _, kind in parts}
        if kinds == {"atom", "structure"}:
            # What belongs to a structure belongs to each of its atoms.
            parts = [(v[self.structure] if kind == "structure" else v, "atom") for v, kind in parts]
        elif len(kinds) != 1 or not kinds <= {"atom", "structure", "edge"}:
            raise DeclarationError(f"inputs[{argument.name!r}]: expected fields of the same rows, got {source}")
        rows = [v[:, None] if v.dim() == 1 else v.flatten(1) for v, _ in parts]
        return torch.cat([r.to(self.pos.dtype) for r in rows], dim=1), parts[0][1]

    def _field(self, name: str) -> tuple[Any, str]:
        if name in NUMBERING | MASKS | {N_STRUCTURES}:
            return {keys.BATCH: self.structure, keys.PTR: self.ptr, N_STRUCTURES: self.n_structures}.get(name), name
        if name == COUNTS:
            return self.counts, "structure"
        if name in EDGES:
            if self.batch.get(keys.EDGE_INDEX) is None:
                raise InvalidInputError(
                    "batch: expected a neighbor list in 'edge_index', got none; from_ase(..., cutoff=...) builds one"
                )
            if name in (keys.EDGE_VEC, EDGE_LENGTH):
                vectors = self.batch.get(keys.EDGE_VEC)
                vectors = edge_vectors(self.batch) if vectors is None else vectors
                return (vectors if name == keys.EDGE_VEC else vectors.norm(dim=1)), "edge"
            value = self.batch.get(name)
            value = torch.zeros_like(self.batch[keys.EDGE_INDEX].T[:, :1]).expand(-1, 3) if value is None else value
            return value, "edge"
        value = self.batch.get(name)
        if value is None and name in (keys.CELL, keys.PBC, keys.CENTER_MASK):
            shape = {keys.CELL: (self.n_structures, 3, 3), keys.PBC: (self.n_structures, 3)}.get(name, (self.n_atoms,))
            value = self.pos.new_zeros(shape, dtype=self.pos.dtype if name == keys.CELL else torch.bool)
            value = ~value if name == keys.CENTER_MASK else value
        if not isinstance(value, Tensor):
            known = [k for k in self.batch.keys() if isinstance(self.batch[k], Tensor)]
            raise InvalidInputError(
                f"batch: expected a field {name!r}, which the module takes; {did_you_mean(name, known)}"
            )
        return self._checked(name, value, name in STRUCTURE_FIELDS | self.convention.per_structure)

    def _checked(self, name: str, value: Tensor, per_structure: bool) -> tuple[Tensor, str]:
        expected = self.n_structures if per_structure else self.n_atoms
        if value.shape[:1] != (expected,):
            unit, hint = ("structure", "") if per_structure else ("atom", f"; or declare per_structure=({name!r},)")
            raise InvalidInputError(f"{name}: expected one row per {unit} ({expected}), got {tuple(value.shape)}{hint}")
        value = value.to(self.pos.dtype) if value.is_floating_point() else value
        return value, "structure" if per_structure else "atom"

    def flat(self) -> dict[str, Any]:
        """Arguments as they are."""
        return {name: value for name, (value, _) in self.values.items()}

    def groups(self) -> list[Tensor]:
        """Structures that are evaluated in one call."""
        if self.convention.layout == "padded":
            return [torch.arange(self.n_structures, device=self.ptr.device)]
        if self.convention.layout == "single":
            return list(torch.arange(self.n_structures, device=self.ptr.device)[:, None])
        return [(self.counts == n).nonzero()[:, 0] for n in torch.unique(self.counts)]

    def rectangular(self, group: Tensor) -> tuple[dict[str, Any], Tensor, Tensor, int]:
        """Arguments for a group of structures, their atoms, the slot of each, and slots per structure."""
        single, counts = self.convention.layout == "single", self.counts[group]
        n_max = int(counts.max())
        place = torch.full_like(self.counts, -1)
        place[group] = torch.arange(group.shape[0], device=group.device)
        atom = (place[self.structure] >= 0).nonzero()[:, 0]
        slot = place[self.structure[atom]] * n_max + atom - self.ptr[self.structure[atom]]
        shape = (group.shape[0], n_max)
        filled = torch.zeros(shape[0] * n_max, dtype=torch.bool, device=slot.device).index_fill(0, slot, True)
        out: dict[str, Any] = {}
        for name, (value, kind) in self.values.items():
            if kind in MASKS:
                value = (filled if kind == MASK else ~filled).reshape(shape)
            elif kind == "structure":
                value = value[group]
            elif kind == "atom":
                padded = torch.zeros((shape[0] * n_max, *value.shape[1:]), dtype=value.dtype, device=value.device)
                value = padded.index_copy(0, slot, value[atom]).reshape(*shape, *value.shape[1:])
                if self.convention.channels_first and value.dim() > 2:
                    value = value.movedim(1, -1)
            elif kind == "edge":
                out[name] = self._edges(value, int(group[0]))
                continue
            else:
                one = {keys.BATCH: torch.zeros_like(atom), keys.PTR: offsets(counts), N_STRUCTURES: shape[0]}
                out[name] = one.get(kind, value)
                continue
            out[name] = value[0] if single else value
        return out, atom, slot, n_max

    def _edges(self, value: Tensor, structure: int) -> Tensor:
        chosen = self.structure[self.batch[keys.EDGE_INDEX][1]] == structure
        return value[:, chosen] - self.ptr[structure] if value is self.batch[keys.EDGE_INDEX] else value[chosen]


@dataclass(frozen=True)
class Setting:
    """What there is to give to a module: declarations that decide which fields exist."""

    layout: str
    cutoff: float | None
    own_fields: frozenset[str]
    has_structure_outputs: bool


def bind(
    f: Callable[..., Any], inputs: Mapping[str, Source | None], setting: Setting, skip: int = 0
) -> tuple[Argument, ...]:
    """What every argument but the first ``skip`` is given, from its name or from what was said.

    Raises
    ------
    DeclarationError
        An unknown argument, one that the layout or the cutoff has nothing for, or no geometry at all.
    """
    parameters = _signature(f)[skip:]
    kinds = {p.kind for p in parameters}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    open_ended = bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})
    names = [p.name for p in named]
    for name in inputs:
        if name not in names and not open_ended:
            raise DeclarationError(f"inputs: the module has no argument {name!r}, {did_you_mean(name, names)}")
    found = [a for p in named if (a := _argument(p, inputs, setting)) is not None]
    extra = [n for n in inputs if n not in names]
    by_place = inspect.Parameter.VAR_POSITIONAL in kinds
    found += [Argument(n, source, positional=by_place) for n in extra if (source := inputs[n]) is not None]
    masks = [a for a in found if PADDING_MASK in a.fields]
    if masks:
        # With both, as in torch.nn.TransformerEncoder, `mask` is one of pairs of points.
        found = [a for a in found if not (a.optional and MASK in a.fields)]
    if not any(callable(a.source) or {keys.POS, keys.EDGE_VEC, EDGE_LENGTH} & set(a.fields) for a in found):
        required = [a for a in found if not a.optional]
        if len(required) != 1 or required[0].name in inputs:
            raise DeclarationError(
                f"inputs: none of the arguments {tuple(names)} is known to take positions or edge vectors; say which "
                f"does: inputs={{{(names or ['argument'])[0]!r}: 'pos'}}"
            )
        # The only thing that a function of positions can want.
        found[found.index(required[0])] = Argument(required[0].name, keys.POS, required[0].positional)
    _check_layout(found, setting)
    return tuple(found)


def _argument(p: inspect.Parameter, inputs: Mapping[str, Source | None], setting: Setting) -> Argument | None:
    required, positional = p.default is p.empty, p.kind is p.POSITIONAL_ONLY
    if p.name in inputs:
        given = inputs[p.name]
        if given is None and required:
            raise DeclarationError(f"inputs: argument {p.name!r} has no default, expected a field for it, got None")
        return None if given is None else Argument(p.name, given, positional)
    if p.name in setting.own_fields:
        return Argument(p.name, p.name, positional)
    field = _ALIASES.get(p.name)
    if field is None:
        return Argument(p.name, p.name, positional) if required else None
    if not required and _obstacle(field, setting):
        return None
    return Argument(p.name, field, positional, optional=not required)


def _obstacle(field: str, setting: Setting) -> str:
    """Why a field cannot be given, or nothing."""
    rectangular = setting.layout in ("padded", "dense")
    if field in EDGES and setting.cutoff is None:
        return "needs a neighbor list: declare its radius, cutoff=..."
    if field in EDGES | NUMBERING and rectangular:
        return f"numbers points one after the other: expected layout='flat' or 'single', got {setting.layout!r}"
    if field in MASKS and not rectangular:
        return f"tells points from padding: expected layout='padded', got {setting.layout!r}"
    return ""


def _check_layout(arguments: list[Argument], setting: Setting) -> None:
    for argument in arguments:
        for field in argument.fields:
            problem = _obstacle(field, setting)
            if problem:
                raise DeclarationError(f"argument {argument.name!r} ({field}) {problem}")
    given = {field for a in arguments for field in a.fields}
    if setting.layout == "padded" and not given & MASKS and not any(callable(a.source) for a in arguments):
        raise DeclarationError(
            "layout='padded': none of the arguments takes a mask, so padding would be taken for points; say which "
            "does: inputs={'argument': 'mask'} (True: a point) or 'padding_mask' (True: padding), or declare "
            "layout='dense', which puts structures of equal size together and pads nothing"
        )
    several = setting.layout == "flat" and setting.has_structure_outputs
    numbered = given & {keys.BATCH, keys.PTR, COUNTS} or any(callable(a.source) for a in arguments)
    if several and not numbered:
        raise DeclarationError(
            "layout='flat': a per-structure output needs to know which atom belongs where, and none of the arguments "
            "takes 'batch' or 'ptr'; declare layout='single' for a module of one structure"
        )


def _signature(f: Callable[..., Any]) -> list[inspect.Parameter]:
    if isinstance(f, torch.jit.ScriptModule):
        none, kind = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
        schema = getattr(f.forward, "schema").arguments[1:]  # noqa: B009
        return [inspect.Parameter(a.name, kind, default=None if a.has_default_value() else none) for a in schema]
    # What a partial function fixes by name is not asked for again.
    fixed = f.keywords if isinstance(f, functools.partial) else {}
    if isinstance(f, functools.partial) and isinstance(f.func, torch.nn.Module):
        f = functools.partial(f.func.forward, *f.args, **f.keywords)
    try:
        found = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).parameters
        return [p for p in found.values() if p.name not in fixed]
    except (TypeError, ValueError) as error:
        raise DeclarationError(
            f"module: {f!r} has no signature to read; wrap a function with named arguments around it"
        ) from error


def held_modules(f: Callable[..., Any]) -> list[torch.nn.Module]:
    """Modules inside a callable that is none; refused where they are out of reach of copies and conversions."""
    if isinstance(f, torch.nn.Module):
        return []
    if isinstance(f, functools.partial):
        inner = [f.func, *f.args, *f.keywords.values()]
        return [m for part in inner for m in ([part] if isinstance(part, torch.nn.Module) else _held_if_callable(part))]
    if isinstance(f, types.MethodType):
        owner = f.__self__
        return [owner] if isinstance(owner, torch.nn.Module) else _in_attributes(owner)
    if not isinstance(f, types.FunctionType):
        return _in_attributes(f)
    for name, value in _seen_from(f).items():
        if isinstance(value, torch.nn.Module) or (
            isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module)
        ):
            raise DeclarationError(
                f"module: the function uses {name!r} ({type(value).__name__}) from outside, so its parameters would "
                f"neither be trained nor converted; expected wrap({name}, call=lambda {name}, pos, ...: ...)"
            )
    return []


def _seen_from(f: types.FunctionType) -> dict[str, Any]:
    """What a function refers to outside itself, by name."""
    loaded = {i.argval for i in dis.get_instructions(f) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    found = {name: f.__globals__[name] for name in loaded if name in f.__globals__}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def _held_if_callable(value: Any) -> list[torch.nn.Module]:
    return held_modules(value) if isinstance(value, (functools.partial, types.MethodType, types.FunctionType)) else []


def _in_attributes(owner: Any) -> list[torch.nn.Module]:
    return [v for v in getattr(owner, "__dict__", {}).values() if isinstance(v, torch.nn.Module)]


def blind_to_images(arguments: Sequence[Argument]) -> bool:
    """Whether a module takes positions without the means to find images of periodic structures."""
    given = {field for a in arguments for field in a.fields}
    return keys.POS in given and not given >= {keys.CELL, keys.CELL_SHIFT}


def source_name(source: Source) -> str:
    if isinstance(source, tuple):
        return " + ".join(source)
    return source if isinstance(source, str) else getattr(source, "__name__", "function")
