"""Any torch module or function of positions as a `Backbone`, declared in one call: `wrap`.

What a module wants is found from the names of its arguments, and said with ``inputs=`` where that is not enough; how
the points of several structures are laid out in its tensors is one word. What was declared is tried at once on small
structures (`probes`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidTypeError, SymmetrizeError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.wrapping.arguments import (
    FIELDS,
    LAYOUTS,
    MASK,
    MASKS,
    PADDING_MASK,
    Convention,
    Setting,
    Source,
    View,
    bind,
    held_modules,
    source_name,
)
from symmetrize.wrapping.probes import probe_backbone
from symmetrize.wrapping.trials import ProbeFailure, synthetic_batch, with_edges


def wrap(
    module: Callable[..., Any],
    outputs: dict[str, OutputSpec],
    *,
    cutoff: float | None = None,
    receptive_field: int | None = None,
    vectors: dict[str, str] | None = None,
    layout: str = "flat",
    inputs: Mapping[str, Source | None] | None = None,
    returns: Mapping[str, str | int | Callable[[Any], Tensor]] | None = None,
    center: str | None = None,
    channels_first: bool = False,
    channels_first_out: bool | None = None,
    per_structure: Sequence[str] = (),
    species: Sequence[int] | None = None,
    math_attention: bool = False,
    call: Callable[..., Any] | None = None,
    probe: bool | Data = True,
) -> Wrapped:
    r"""A torch module or a function of positions as a `Backbone`.

    Parameters
    ----------
    module : torch.nn.Module or callable
        Becomes the submodule ``module`` of the result and is not changed. A function must not use modules from outside,
        since their parameters would be invisible: see ``call``.
    outputs : dict of str to OutputSpec
        What it returns: a Tensor for one output, a tuple in this order, or a dict by name. A scalar may have a trailing
        axis of length 1, and a Cartesian tensor may be flat (row by row).
    cutoff : float, optional
        Radius of the neighbor list, if the module takes edges.
    receptive_field : int, optional
        Message-passing hops that a row of a per-atom output depends on; None: the whole structure.
    vectors : dict of str to str, optional
        Further per-atom inputs that rotate with the positions, as field -> e3nn irreps: ``{"velocity": "1o"}``.
    layout : {"flat", "padded", "dense", "single"}
        How the module takes several structures. ``"flat"``: all points as (n_atoms, ...) with ``batch`` as in
        torch_geometric. ``"padded"``: (n_structures, n_max, ...), zeros behind the end of each, with a mask.
        ``"dense"``: the same without padding or mask, structures of equal size together. ``"single"``: (n_atoms, ...)
        of one structure after the other, per-structure fields without their first axis.
    inputs : dict of str to (str, tuple of str, function or None), optional
        Argument -> field of the batch, for arguments whose name does not say it: ``{"src": "pos"}``. Several fields are
        put side by side: ``("pos", "x")``. A function of the batch returns one row per atom. None leaves an argument to
        its default. Besides the fields of `symmetrize.keys` and those of the batch there are ``"edge_length"``,
        ``"mask"`` (True: a point), ``"padding_mask"`` (True: padding, the convention of torch's ``key_padding_mask``),
        ``"counts"`` and ``"n_structures"``. An argument ``edge_attr`` gets ``edge_vec``.
    returns : dict of str to (str, int or function), optional
        Output -> key or place in what the module returns, or a function of it: ``{"logits": 0}``.
    center : {None, "centroid"}
        ``"centroid"`` hands in positions relative to the centroid of each structure, for modules that read absolute
        positions.
    channels_first : bool
        Padded, dense and single: points along the last axis, such as (n_structures, 3, n_max).
    channels_first_out : bool, optional
        The same for per-atom outputs; by default as for inputs.
    per_structure : sequence of str
        Fields of the batch (or arguments given by a function) with one row per structure.
    species : sequence of int, optional
        Atomic numbers that the module knows.
    math_attention : bool
        Evaluate ``scaled_dot_product_attention`` by plain tensor operations: slower, but it can be differentiated
        twice, as training on forces needs.
    call : callable, optional
        ``call(module, ...)`` instead of ``module(...)``: ``lambda net, pos, batch: net.head(net.encode(pos), batch)``.
    probe : bool or Data
        Try the declarations on random clusters, or on this example (needed where features are), in evaluation mode;
        False: do not.

    Returns
    -------
    Wrapped

    Raises
    ------
    DeclarationError
        An argument that nothing is known for, a declaration that contradicts another, or, as `ProbeFailure`, one that
        the module does not keep; the message says by how much and what to declare instead.

    Notes
    -----
    In atom scope (``receptive_field`` given, per-atom outputs) and for periodic structures neighbors are images, and
    only ``edge_vec`` says where they are: a module that takes positions, but neither of ``edge_vec`` alone and ``pos,
    cell, cell_shift``, is refused periodic structures. A declared vector that is not read, positions that no gradient
    reaches, missing second derivatives and dropout left on are warned about (`symmetrize.wrapping.ProbeWarning`).

    Examples
    --------
    >>> def dipole(pos, velocity):
    ...     return (pos.norm(dim=1, keepdim=True) * velocity).sum(dim=0)
    >>> wrap(dipole, {"dipole": OutputSpec("1o", per="structure")}, vectors={"velocity": "1o"}, layout="single",
    ...      center="centroid").convention.layout
    'single'
    """
    options: dict[str, Any] = dict(
        cutoff=cutoff,
        receptive_field=receptive_field,
        vectors=vectors,
        layout=layout,
        inputs=inputs,
        returns=returns,
        center=center,
        channels_first=channels_first,
        channels_first_out=channels_first_out,
        per_structure=per_structure,
        species=species,
        math_attention=math_attention,
        call=call,
    )
    backbone = Wrapped(module, outputs, **options)
    if not isinstance(probe, (bool, Data)):
        raise InvalidTypeError(f"probe: expected a bool or a torch_geometric Data, got {type(probe).__name__}")
    if probe is False:
        return backbone
    batch = probe if isinstance(probe, Data) else _synthetic(backbone)
    try:
        probe_backbone(backbone, batch)
    except ProbeFailure as failure:
        remedy = _remedy(failure, module, outputs, options, batch)
        raise ProbeFailure(failure.property, f"{failure}{_called_with(backbone, batch, failure)}{remedy}") from failure
    return backbone


class Wrapped(Backbone):
    """What `wrap` returns; the parameters are those of `wrap`, and nothing is probed here.

    Attributes
    ----------
    module : torch.nn.Module or callable
    convention : Convention
        Layout, and what every argument is given.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        outputs: dict[str, OutputSpec],
        *,
        cutoff: float | None = None,
        receptive_field: int | None = None,
        vectors: dict[str, str] | None = None,
        layout: str = "flat",
        inputs: Mapping[str, Source | None] | None = None,
        returns: Mapping[str, str | int | Callable[[Any], Tensor]] | None = None,
        center: str | None = None,
        channels_first: bool = False,
        channels_first_out: bool | None = None,
        per_structure: Sequence[str] = (),
        species: Sequence[int] | None = None,
        math_attention: bool = False,
        call: Callable[..., Any] | None = None,
    ) -> None:
        if not callable(module):
            raise InvalidTypeError(f"module: expected a torch.nn.Module or a function, got {type(module).__name__}")
        if isinstance(module, (Backbone, type)):
            what = f"the class {module.__name__}" if isinstance(module, type) else "a Backbone, which needs no wrap()"
            raise InvalidTypeError(f"module: expected a torch.nn.Module or a function, got {what}")
        super().__init__(outputs=outputs, cutoff=cutoff, receptive_field=receptive_field, vectors=vectors)
        if layout not in LAYOUTS:
            raise DeclarationError(f"layout: unknown layout {layout!r}, {did_you_mean(str(layout), LAYOUTS)}")
        if center not in (None, "centroid"):
            raise DeclarationError(f"center: expected 'centroid' or None, got {center!r}")
        if center is not None and receptive_field is not None:
            raise DeclarationError(
                f"center: the centroid depends on all atoms, a receptive_field of {receptive_field} hops does not; "
                "let the module read edge_vec, or declare receptive_field=None"
            )
        if channels_first and layout == "flat":
            raise DeclarationError("channels_first: expected layout='padded', 'dense' or 'single', got 'flat'")
        for name, irreps in self.vectors.items():
            if name in FIELDS:
                raise DeclarationError(f"vectors: {name!r} is a field of its own, expected another name")
            OutputSpec(irreps)
        for name in returns or {}:
            if name not in outputs:
                raise DeclarationError(f"returns: unknown output {name!r}, {did_you_mean(name, outputs)}")
        self.module = module
        self.call = call
        self.channels_first_out = channels_first if channels_first_out is None else channels_first_out
        self.returns = dict(returns or {})
        self.math_attention = math_attention
        self.species = None if species is None else tuple(int(z) for z in species)
        held = [m for f in (module, call) if f is not None for m in held_modules(f)]
        if held:
            self.held = torch.nn.ModuleList(held)
        called = module if call is None else call
        has_structure_outputs = any(spec.per == "structure" for spec in outputs.values())
        own = frozenset(self.vectors) | frozenset(per_structure)
        setting = Setting(layout, self.cutoff, own, has_structure_outputs)
        arguments = bind(called, dict(inputs or {}), setting, skip=0 if call is None else 1)
        self.convention = Convention(arguments, layout, center, channels_first, frozenset(per_structure))
        # A network that was loaded for evaluation stays in evaluation mode.
        networks = [m for m in (module, *held) if isinstance(m, torch.nn.Module)]
        self.training = any(m.training for m in networks)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Outputs in the orientation given.

        Raises
        ------
        InvalidInputError, InvalidTypeError
            A field that the module needs is missing or has another shape; positions of another precision than the
            parameters; a periodic structure for a module that could not see it.
        BackboneOutputError
            The module returned something other than what was declared.
        """
        view = self._view(batch)
        if self.convention.layout == "flat":
            got = self._outputs(self._run(view.flat()), (view.n_atoms,), (view.n_structures,))
        else:
            got = self._grouped(view)
        mask = view.batch.get(keys.CENTER_MASK)
        if mask is not None:
            for name, spec in self.outputs.items():
                if spec.per == "atom" and got[name].shape[0] == view.n_atoms:
                    got[name] = got[name][mask]
        return got

    def called_with(self, batch: Data) -> dict[str, Any]:
        """Arguments of the (first) call of the module for a batch, by name: to see what a module is given."""
        view = self._view(batch)
        return view.flat() if self.convention.layout == "flat" else view.rectangular(next(iter(view.groups())))[0]

    def _view(self, batch: Data) -> View:
        return View(self.convention, {p.dtype for p in self.parameters() if p.is_floating_point()}, batch)

    def extra_repr(self) -> str:
        given = ", ".join(f"{a.name} <- {source_name(a.source)}" for a in self.convention.arguments)
        layout = f"layout={self.convention.layout}, center={self.convention.center}"
        return f"{super().extra_repr()}, {layout}, arguments=({given})"

    def _grouped(self, view: View) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        atoms, structures = [], []
        for group in view.groups():
            arguments, atom, slot, n_max = view.rectangular(group)
            lead: tuple[int, ...] = () if self.convention.layout == "single" else (group.shape[0],)
            got = self._outputs(self._run(arguments), (*lead, n_max), lead)
            for name, spec in self.outputs.items():
                n = group.shape[0] * (n_max if spec.per == "atom" else 1)
                values = got[name].reshape(n, *spec.shape)
                rows[name].append(values[slot] if spec.per == "atom" else values)
            atoms.append(atom)
            structures.append(group)
        back = {"atom": torch.argsort(torch.cat(atoms)), "structure": torch.argsort(torch.cat(structures))}
        return {name: torch.cat(rows[name])[back[spec.per]] for name, spec in self.outputs.items()}

    def _run(self, arguments: dict[str, Any]) -> Any:
        first = () if self.call is None else (self.module,)
        positional = [arguments[a.name] for a in self.convention.arguments if a.positional]
        named = {
            a.name: arguments[a.name] for a in self.convention.arguments if not a.positional and a.name in arguments
        }
        function = self.module if self.call is None else self.call
        with sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext():
            return function(*first, *positional, **named)

    def _outputs(self, got: Any, per_atom: tuple[int, ...], per_structure: tuple[int, ...]) -> dict[str, Tensor]:
        """Named outputs of one call, of shape (*per_atom, *shape) or (*per_structure, *shape)."""
        return {
            name: self._shaped(name, _picked(name, got, self), {"atom": per_atom, "structure": per_structure})
            for name in self.outputs
        }

    def _shaped(self, name: str, value: Any, leads: dict[str, tuple[int, ...]]) -> Tensor:
        spec = self.outputs[name]
        if not isinstance(value, Tensor):
            raise BackboneOutputError(f"output {name!r}: expected a Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise BackboneOutputError(f"output {name!r}: expected floating-point values, got {value.dtype}")
        lead, got = leads[spec.per], tuple(value.shape)
        first, axis = spec.per == "atom" and len(got) > len(lead), len(lead) - 1
        given = value.movedim(-1, axis) if first and self.channels_first_out else value
        fitted = _fitted(given, lead, spec)
        if fitted is None and self.convention.layout == "single":
            fitted = _fitted(given[0], lead, spec) if got[:1] == (1,) else None
        # Rows of center_mask alone, from a module that takes it.
        if (
            fitted is None
            and spec.per == "atom"
            and any(keys.CENTER_MASK in a.fields for a in self.convention.arguments)
        ):
            fitted = _fitted(given, got[:1], spec)
        if fitted is not None:
            return fitted
        words = {"atom": "one row per atom", "structure": "one row per structure"}
        message = f"output {name!r} ({spec}): expected shape {(*lead, *spec.shape)} ({words[spec.per]}), got {got}"
        other = "structure" if spec.per == "atom" else "atom"
        if _fitted(value, leads[other], spec) is not None:
            message += f"; that is {words[other]}: declare per={other!r}"
        elif self.convention.layout == "flat" and got in (spec.shape, (1, *spec.shape)):
            message += "; that is one result for the whole batch: layout='single' evaluates structures one by one"
        elif self.convention.layout != "flat" and first:
            other_way = value if self.channels_first_out else value.movedim(-1, axis)
            if _fitted(other_way, lead, spec) is not None:
                message += f"; declare channels_first_out={not self.channels_first_out}"
        raise BackboneOutputError(message)


def _picked(name: str, got: Any, backbone: Wrapped) -> Any:
    """One output from what the module returned."""
    key = backbone.returns.get(name)
    if callable(key):
        return key(got)
    if key is None and isinstance(got, Tensor) and len(backbone.outputs) == 1:
        return got
    if key is None and isinstance(got, (tuple, list)):
        if len(got) != len(backbone.outputs):
            raise BackboneOutputError(
                f"outputs: expected {len(backbone.outputs)} values ({', '.join(backbone.outputs)}), got {len(got)}; "
                f"say which is which: returns={{{name!r}: 0}}"
            )
        key = list(backbone.outputs).index(name)
    key = name if key is None else key
    if isinstance(got, Mapping) and key in got:
        return got[key]
    if isinstance(got, (tuple, list)) and isinstance(key, int) and -len(got) <= key < len(got):
        return got[key]
    if isinstance(got, Mapping):
        what = f"a dict; {did_you_mean(str(key), map(str, got))}"
    else:
        what = f"{len(got)} values" if isinstance(got, (tuple, list)) else type(got).__name__
    raise BackboneOutputError(f"outputs: expected {key!r} for {name!r} in what the module returns, got {what}")


def _fitted(value: Tensor, lead: tuple[int, ...], spec: OutputSpec) -> Tensor | None:
    """A value of the shape declared, up to a trailing axis of length one and flat Cartesian tensors; None otherwise."""
    wanted, got = (*lead, *spec.shape), tuple(value.shape)
    flat = 1
    for n in spec.shape:
        flat *= n
    return value.reshape(wanted) if got in (wanted, (*lead, flat)) else None


def _synthetic(backbone: Wrapped) -> Data:
    """Random clusters with what the module takes, or an error that asks for an example."""
    known = FIELDS - {keys.X} | set(backbone.vectors)
    for argument in backbone.convention.arguments:
        for field in () if argument.optional else argument.fields:
            if field not in known:
                what = "features of unknown width" if field == keys.X else f"a field {field!r} that only the batch has"
                raise DeclarationError(
                    f"probe: argument {argument.name!r} takes {what}; expected an example, probe=batch (or "
                    f"inputs={{{argument.name!r}: ...}} if it is something else, or probe=False)"
                )
    return synthetic_batch(backbone)


def _called_with(backbone: Wrapped, batch: Data, failure: ProbeFailure) -> str:
    """Shapes of the arguments, where the module did not run or returned a wrong shape."""
    if failure.property not in ("call", "outputs"):
        return ""
    try:
        arguments = backbone.called_with(with_edges(backbone, batch))
    except SymmetrizeError:
        return ""
    words = [
        f"{name}: {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" if isinstance(v, Tensor) else f"{name}: {v!r}"
        for name, v in arguments.items()
    ]
    return f"\n  The module was called with {', '.join(words)}."


def _remedy(
    failure: ProbeFailure,
    module: Callable[..., Any],
    outputs: dict[str, OutputSpec],
    given: dict[str, Any],
    batch: Data,
) -> str:
    """The first changed declaration with which nothing fails, found by trying; empty where none is known."""
    for words, changed_outputs, changes in _candidates(failure, module, outputs, given):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                probe_backbone(Wrapped(module, changed_outputs, **{**given, **changes}), batch)
        except SymmetrizeError:
            continue
        return f"\n  Tried: with {words} all probes pass."
    return ""


def _candidates(
    failure: ProbeFailure, module: Callable[..., Any], outputs: dict[str, OutputSpec], given: dict[str, Any]
) -> Iterator[tuple[str, dict[str, OutputSpec], dict[str, Any]]]:
    inputs, hops = dict(given["inputs"] or {}), given["receptive_field"]
    if failure.property == "translation" and hops is None:
        yield "center='centroid'", outputs, {"center": "centroid"}
    if failure.property == "locality" and hops is not None:
        for more in (hops + 1, hops + 2, hops + 3):
            yield f"receptive_field={more}", outputs, {"receptive_field": more}
        yield "receptive_field=None", outputs, {"receptive_field": None}
    if failure.property in ("call", "outputs") and len(outputs) == 1:
        (name, spec), *_ = outputs.items()
        other: Literal["atom", "structure"] = "structure" if spec.per == "atom" else "atom"
        yield f"per={other!r}", {name: dataclasses.replace(spec, per=other, reduce=None)}, {}
    if failure.property in ("call", "outputs") and given["layout"] != "flat":
        flipped = not given["channels_first"]
        yield f"channels_first={flipped}", outputs, {"channels_first": flipped, "channels_first_out": None}
        yield (
            f"channels_first={flipped}, channels_first_out={not flipped}",
            outputs,
            {
                "channels_first": flipped,
                "channels_first_out": not flipped,
            },
        )
    if failure.property in ("batch", "call", "outputs", "finite"):
        for argument in Wrapped(module, outputs, **given).convention.arguments:
            if argument.source in MASKS:
                swapped = {**inputs, argument.name: PADDING_MASK if argument.source == MASK else MASK}
                yield f"inputs={{{argument.name!r}: {swapped[argument.name]!r}}}", outputs, {"inputs": swapped}
        for layout in ("dense", "single"):
            if layout != given["layout"]:
                yield f"layout={layout!r}", outputs, {"layout": layout}
