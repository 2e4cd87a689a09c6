"""Where equivariance breaks: every layer of a torch model, and the first that stops transforming as it should.

What a hidden layer should do under a rotation is nowhere declared, so it is found out: a layer is in order when its
output h obeys ``h(g x) = rho(g) h(x)`` for some representation, tried from the simple to the general one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import data, keys
from symmetrize.backbone import Backbone
from symmetrize.errors import InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec, check_group
from symmetrize.testing.measuring.elements import batched, displaced, random_elements, split, transform
from symmetrize.testing.measuring.hypotheses import BREAKS, LINEAR, MISLABELED, NOT_COMPARABLE, NOT_FINITE, RANDOM
from symmetrize.testing.measuring.tolerances import tolerance
from symmetrize.testing.measuring.walks import Key, Tracked, Walk, buffers_restored, follow

#: What a walk evaluates at once: structures, atoms and edges (the last two as far as copies are concerned).
_STRUCTURES, _ATOMS, _EDGES = 256, 1024, 20_000


@dataclass(frozen=True)
class Layer:
    """One tensor in the output of one call of one module.

    Attributes
    ----------
    name : str
        Qualified name of the module; empty for the one that is walked itself.
    type_name : str
    call : int
        1 for the first call of the module, 2 for the second.
    output : str
        Which tensor of the output: empty for a single tensor, else keys and numbers such as ``"energy"`` or ``"0.1"``.
    shape : tuple of int
    transforms_as : str or None
        "constant", "invariant", "pseudo-invariant" (some components change sign under improper elements), "irreps
        ..." and "cartesian ..." (as declared), "vector", "pseudovector", "tensor", "pseudotensor",
        "linear representation" (some matrix for each group element), "breaks" (nothing fits), "not as declared"
        (something else fits), "not finite", "not deterministic" (two runs on the same input differ), "not comparable"
        (shape or call depends on the orientation); None: nothing simple fits, and there are too few rows to exclude a
        linear representation.
    residual : float
        RMS of ``h(g x) - rho(g) h(x)`` (over at most some thousand rows) for the worst element, over the RMS of the
        centered values of h (at least a thousandth of their RMS), for the representation given or the best one. inf
        where there is none.
    residual_proper, residual_improper : float
        The same for either kind of element; nan where there was no such element.
    tolerance : float
        That the residual is judged by: of the least precise dtype of positions and layers up to here.
    order : int
        In order of completion: containers after what they contain.
    start : int
        In order of the beginning of the call.
    note : str
    """

    name: str
    type_name: str
    call: int
    output: str
    shape: tuple[int, ...]
    transforms_as: str | None
    residual: float
    residual_proper: float
    residual_improper: float
    tolerance: float
    order: int
    start: int
    note: str = ""

    @property
    def broken(self) -> bool:
        """Known not to be equivariant."""
        return self.transforms_as in (BREAKS, MISLABELED, NOT_FINITE)

    @property
    def equivariant(self) -> bool | None:
        """Whether some representation fits; None where this cannot be told."""
        return None if self.transforms_as in (None, RANDOM, NOT_COMPARABLE) else not self.broken

    @property
    def label(self) -> str:
        """Name, call and output in one."""
        call = f" #{self.call}" if self.call > 1 else ""
        return (self.name or "(model)") + call + (f" [{self.output}]" if self.output else "")

    def __str__(self) -> str:
        what = self.transforms_as or "cannot tell"
        return f"{self.label} ({self.type_name}): {what}, residual {self.residual:.2g}" + (
            f" ({self.note})" if self.note else ""
        )


@dataclass(frozen=True)
class LayerReport:
    """All layers of a model.

    Attributes
    ----------
    layers : tuple of Layer
        In order of completion.
    culprit : Layer or None
        The first that breaks although its input does not; None where the model itself is in order.
    elements : tuple of str
        Group elements that were applied.
    never_called, not_walked : tuple of str
        Modules that were not called, and those that cannot be looked into (TorchScript).
    note : str
    seed : int
    """

    layers: tuple[Layer, ...]
    culprit: Layer | None
    elements: tuple[str, ...]
    never_called: tuple[str, ...]
    not_walked: tuple[str, ...]
    note: str
    seed: int

    def __getitem__(self, name: str) -> Layer:
        """The first layer of a module."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise InvalidInputError(f"layer {name!r}: {did_you_mean(name, {layer.name for layer in self.layers})}")

    def __str__(self) -> str:
        rows = []
        names = {layer.name for layer in self.layers}
        for layer in sorted(self.layers, key=lambda x: (x.start, x.order)):
            # Lists of modules are not called: names are relative to the innermost container that is.
            above = [n for n in names if layer.name and (not n or layer.name.startswith(f"{n}."))]
            start = max((len(n) + 1 for n in above if n), default=0)
            short = replace(layer, name=layer.name[start:]).label
            decades = 16.0 + math.log10(layer.residual) if 0.0 < layer.residual < math.inf else 0.0
            bar = "#" * (16 if layer.residual == math.inf else round(min(max(decades, 0.0), 16.0)))
            mark = "  <-- culprit" if layer == self.culprit else ""
            note = f"  ({layer.note})" if layer.note else ""
            columns = ["  " * len(above) + short, layer.type_name, "x".join(map(str, layer.shape)) or "()"]
            rows.append((*columns, layer.transforms_as or "cannot tell", f"{layer.residual:.1e}", bar + mark + note))
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(5)]
        lines = ["  ".join([*(x.ljust(w) for x, w in zip(r, widths, strict=False)), r[5]]).rstrip() for r in rows]
        if self.never_called:
            lines.append(f"{len(self.never_called)} modules never called")
        if self.not_walked:
            lines.append(f"{len(self.not_walked)} modules not looked into: {', '.join(self.not_walked)}")
        lines.append(f"culprit: {self.culprit}" if self.culprit else "culprit: none")
        return "\n".join([*lines, self.note] if self.note else lines)


def measure_layers(
    f: Callable[[Data], Any],
    batch: Data,
    *,
    module: torch.nn.Module | None = None,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    n_elements: int = 3,
    n_copies: int | None = None,
    generator: torch.Generator | None = None,
) -> LayerReport:
    r"""How the output of every module transforms, and which module breaks equivariance.

    The model sees randomly deformed and turned copies of the structures (`displaced`), x, and ``g x``. The output h of
    a layer is compared with, in this order, what is invariant (up to signs under improper elements), the irreps or
    specification that the module declares (``irreps_out`` as in e3nn, ``outputs`` of a `Backbone`), Cartesian vectors
    and tensors along axes of length 3, and any linear representation: a matrix with
    :math:`h(g x) - c = M(g) [h(x) - c]` is fitted on half of the rows (all of h, or the same along one axis) and
    tested on the other half. The first that fits is reported. A module that declares something has to fulfil it.

    The culprit is the first module in order of completion whose output breaks while its input does not: a leaf where
    possible, else the container in whose own code it happens. What an outer module repairs is no culprit.

    Parameters
    ----------
    f : callable
        From a batch to outputs of any kind; called 2 + ``n_elements`` times, and again to look at the inputs of
        suspects. Its train or eval mode stays as it is, buffers are restored.
    batch : Data
        Generic structures; of more than 256 only the first. If the model reads a neighbor list it should be there:
        edges stay in the same order, while a list that ``f`` builds for itself may depend on the orientation.
    module : torch.nn.Module, optional
        What is walked; ``f`` itself by default. For a `Symmetrizer` pass its ``backbone`` as ``f``: of the
        Symmetrizer itself only the outputs are walked, since its backbone sees frames and not the structures.
    group : {"O(3)", "SO(3)"}
    vectors : dict of str to str, optional
        Further fields that rotate, as field name -> e3nn irreps; by default those of a `Backbone`.
    n_elements : int
        Random group elements; of O(3) every second one is improper.
    n_copies : int, optional
        Copies of the batch: the more rows, the wider the layers for which a linear representation can be excluded. By
        default as many as make about a thousand atoms.
    generator : torch.Generator, optional
        Seed 0 by default.

    Raises
    ------
    InvalidTypeError
        ``f`` is no module and ``module`` is not given.

    Notes
    -----
    A layer that is nearly linear cannot be told from a linear one when its nonlinearity is below the tolerance, which
    is 1e-3 in float32: walk models in float64 where possible (a model of e3nn that was built in float32 and converted
    keeps constants of that precision, and is found to break at 1e-8). A fixed vector that is added to features of
    undeclared layout is part of c, and comes to light at the next nonlinearity.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    root = f if module is None else module
    if not isinstance(root, torch.nn.Module):
        raise InvalidTypeError(f"module: expected a torch.nn.Module to walk, got {type(root).__name__}")
    if n_elements < 1 or (n_copies is not None and n_copies < 1):
        raise InvalidInputError(f"measure_layers: expected positive counts, got {n_elements=}, {n_copies=}")
    check_group(group)
    if isinstance(root, Backbone):
        vectors = root.vectors if vectors is None else vectors
        if root.cutoff is not None and batch.get(keys.EDGE_INDEX) is None:
            batch = data.with_neighbors(data.validate(batch), root.cutoff)
    sample = _sample(batch, group, vectors, n_copies, generator)
    elements = random_elements(n_elements, generator, group=group)
    cases = [(None, sample), (None, sample)]
    cases += [(e, _with_edge_vec(transform(sample, e, vectors), sample)) for e in elements]  # type: ignore[misc]
    walk = Walk(root)
    with buffers_restored(root):
        tracks = follow(walk, f, cases, None)
        called = set(walk.calls)
        layers = _judge(tracks, sample[keys.POS].dtype)
        suspect = _first_unrepaired(layers, tracks)
        culprit, note = None, ""
        if suspect is not None:
            around = tracks[suspect.name, suspect.call, suspect.output].call.ancestors
            chain = [(suspect.name, suspect.call), *reversed(around)]
            inputs = _judge(follow(walk, f, cases, frozenset(chain)), sample[keys.POS].dtype)
            broken = {(x.name, x.call) for x in inputs if x.broken}
            culprit, note = _blame(suspect, chain, broken, layers)
    notes = [note]
    if culprit is None and any(x.broken for x in layers):
        notes.append("layers break, but what contains them does not")
    if random := [x for x in layers if x.transforms_as == RANDOM]:
        notes.append(f"{random[0].label} is not deterministic: nothing behind it can be judged")
    if culprit is None and sample[keys.POS].dtype == torch.float32:
        notes.append("smaller deviations than 1e-3 are only seen in float64")
    if any(x.transforms_as is None for x in layers):
        notes.append("too few rows for some layers: increase n_copies")
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)
    idle = tuple(n for n, m in walk.modules.items() if n not in called and not isinstance(m, containers))
    return LayerReport(
        layers=tuple(layers),
        culprit=culprit,
        elements=tuple(e.name for e in elements),
        never_called=idle,
        not_walked=walk.skipped,
        note="; ".join(filter(None, notes)),
        seed=generator.initial_seed(),
    )


# --- input -------------------------------------------------------------------------------------------------------


def _sample(
    batch: Data, group: str, vectors: dict[str, str] | None, n_copies: int | None, generator: torch.Generator
) -> Batch:
    """Displaced copies, each structure in an orientation of its own, since rows that are near each other cannot tell a
    nonlinear function from a linear one."""
    valid = data.validate(batch)
    n_structures = valid[keys.PTR].shape[0] - 1
    if n_structures > _STRUCTURES:
        valid = batched(split(valid)[:_STRUCTURES])
        n_structures = _STRUCTURES
    if n_copies is None:
        edges = valid.get(keys.EDGE_INDEX)
        n_copies = math.ceil(_ATOMS / valid[keys.POS].shape[0])
        if edges is not None and edges.shape[1]:
            n_copies = min(n_copies, max(2, _EDGES // edges.shape[1]))
    n_copies = max(1, min(n_copies, _STRUCTURES // n_structures))
    moved = displaced(batched([valid] * n_copies), generator, size=0.1)
    structure = moved[keys.BATCH]
    g = torch.stack([e.matrix for e in random_elements(n_structures * n_copies, generator, group=group)])
    g = g.to(structure.device)

    def turned(rows: Tensor, spec: OutputSpec, index: Tensor) -> Tensor:
        return spec.rotate(rows.detach().to(torch.float64), g, index).to(rows.dtype)

    fields: dict[str, Any] = {keys.POS: turned(moved[keys.POS], OutputSpec(cartesian="i"), structure)}
    fields[keys.CELL] = (moved[keys.CELL].to(torch.float64) @ g.transpose(1, 2)).to(moved[keys.CELL].dtype)
    for name, irreps in (vectors or {}).items():
        fields[name] = turned(moved[name], OutputSpec(irreps), structure)
    return _with_edge_vec(data.replace(moved, **fields), batch)


def _with_edge_vec(batch: Batch, like: Data) -> Batch:
    wanted = like.get(keys.EDGE_VEC) is not None
    return data.replace(batch, **{keys.EDGE_VEC: data.edge_vectors(batch) if wanted else None})


# --- judging -----------------------------------------------------------------------------------------------------


def _judge(tracks: dict[Key, Tracked], dtype: torch.dtype) -> list[Layer]:
    layers: list[Layer] = []
    limit = tolerance(dtype)
    for call, path, type_name, track in sorted(tracks.values(), key=lambda x: x.call.order):
        # What went through a lower precision does not become more precise again; a tenth is no rounding any more.
        limit = max(limit, min(tolerance(track.dtype), 0.1))
        what, total, proper, improper, note = track.verdict(limit)
        layers.append(
            Layer(
                name=call.name,
                type_name=type_name,
                call=call.number,
                output=path,
                shape=track.shape,
                transforms_as=what,
                residual=total,
                residual_proper=proper,
                residual_improper=improper,
                tolerance=limit,
                order=len(layers),
                start=call.start,
                note=note,
            )
        )
    return layers


def _first_unrepaired(layers: list[Layer], tracks: dict[Key, Tracked]) -> Layer | None:
    """The first that breaks, unless a module around it returns nothing but what is in order.

    Some linear representation is not enough to excuse one that was declared to be another.
    """
    outputs: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        outputs.setdefault((layer.name, layer.call), []).append(layer)
    sound = {key for key, group in outputs.items() if all(layer.equivariant for layer in group)}
    named = {key for key in sound if all(layer.transforms_as != LINEAR for layer in outputs[key])}
    for layer in layers:
        ancestors = tracks[layer.name, layer.call, layer.output].call.ancestors
        excused = named if layer.transforms_as == MISLABELED else sound
        if layer.broken and not excused.intersection(ancestors):
            return layer
    return None


def _blame(
    suspect: Layer, chain: list[tuple[str, int]], broken: set[tuple[str, int]], layers: list[Layer]
) -> tuple[Layer, str]:
    """Innermost module around the suspect, itself included, whose input is in order."""
    for key in chain:
        if key in broken:
            continue
        if key == chain[0]:
            return suspect, ""
        name = key[0] or "the model"
        own = [layer for layer in layers if (layer.name, layer.call) == key and layer.broken]
        return (own[0] if own else suspect), f"it happens in the code of {name} itself, before {suspect.label}"
    return suspect, "what the model is given breaks already"
