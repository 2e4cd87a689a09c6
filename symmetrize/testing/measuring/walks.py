"""Hooks on the modules of a model: who is called with what, and how that changes when the input is transformed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.backbone import Backbone
from symmetrize.representations import OutputSpec
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.measuring.elements import Element, copied
from symmetrize.testing.measuring.hypotheses import Track


@dataclass
class Call:
    name: str
    number: int
    start: int
    ancestors: tuple[tuple[str, int], ...]  # outermost first
    order: int = -1

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.number


class Tracked(NamedTuple):
    call: Call
    path: str
    type_name: str
    track: Track


_See = Callable[[Call, str, Tensor], None]
Key = tuple[str, int, str]


class Walk:
    """Runs a model with hooks on every module; they are gone when the run is over, however it ends."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.modules: dict[str, torch.nn.Module] = {}
        skipped: list[str] = []
        closed: list[str] = []
        for name, module in root.named_modules():
            if any(name.startswith(prefix) for prefix in closed):
                continue
            if isinstance(module, (Symmetrizer, torch.jit.ScriptModule)):
                closed.append(f"{name}." if name else "")
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks from outside
                skipped.append(name or "(model)")
            else:
                self.modules[name] = module
        self.skipped = tuple(skipped)
        self.calls: Counter[str] = Counter()

    def run(self, f: Callable[[Data], Any], batch: Data, see: _See, inputs: frozenset[tuple[str, int]] | None) -> None:
        """Evaluate; show every output, or only the inputs of some calls."""
        self.calls.clear()
        clock = itertools.count()
        stack: list[Call] = []

        def before(name: str, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.calls[name] += 1
            call = Call(name, self.calls[name], next(clock), tuple(c.key for c in stack))
            stack.append(call)
            if inputs is not None and call.key in inputs:
                for path, tensor in _tensors([list(args), kwargs]):
                    see(call, path, tensor)

        def after(name: str, _module: torch.nn.Module, _args: Any, output: Any) -> None:
            while stack[-1].name != name:  # a call that ended in an exception, caught by the model
                stack.pop()
            call = stack.pop()
            call.order = next(clock)
            if inputs is None:
                for path, tensor in _tensors(output):
                    see(call, path, tensor)

        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(after, name)))
            f(copied(batch))
        finally:
            for handle in handles:
                handle.remove()


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and value.numel():
            yield path, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    for name, item in items:
        yield from _tensors(item, f"{path}.{name}" if path else str(name))


def follow(
    walk: Walk,
    f: Callable[[Data], Any],
    cases: Sequence[tuple[Element | None, Data]],
    inputs: frozenset[tuple[str, int]] | None,
) -> dict[Key, Tracked]:
    """Run all cases: the first is kept, the others are compared with it while they run."""
    tracks: dict[Key, Tracked] = {}

    def first(call: Call, path: str, tensor: Tensor) -> None:
        parent = walk.modules.get(call.ancestors[-1][0]) if call.ancestors else None
        module = walk.modules[call.name]
        declared = (None, False) if inputs is not None else _declared(module, parent, path, tensor)
        tracks[call.name, call.number, path] = Tracked(call, path, type(module).__name__, Track(tensor, *declared))

    for number, (element, batch) in enumerate(cases):
        if number == 0:
            walk.run(f, batch, first, inputs)
            continue
        seen: set[Key] = set()

        def again(
            call: Call, path: str, tensor: Tensor, seen: set[Key] = seen, element: Element | None = element
        ) -> None:
            key = (call.name, call.number, path)
            if key in tracks and key not in seen:
                tracks[key].track.compare(tensor, None if element is None else element.matrix)
            seen.add(key)

        walk.run(f, batch, again, inputs)
        for key in tracks.keys() - seen:
            tracks[key].track.missing()
    return tracks


def _declared(
    module: torch.nn.Module, parent: torch.nn.Module | None, path: str, tensor: Tensor
) -> tuple[OutputSpec | None, bool]:
    """What an output is declared to be, and whether the module itself says so about this very tensor."""
    backbone = module.backbone if isinstance(module, Symmetrizer) else module
    if isinstance(backbone, Backbone) and path in backbone.outputs:
        spec = backbone.outputs[path]
        return (spec, True) if tensor.shape[1:] == spec.shape else (None, False)
    for owner, binding in ((module, not path), (parent, False)):
        irreps = getattr(owner, "irreps_out", None)
        if isinstance(irreps, Mapping):
            irreps, binding = irreps.get(path), owner is module
        if isinstance(irreps, o3.Irreps) and tensor.dim() and 0 < irreps.dim == tensor.shape[-1]:
            return OutputSpec(str(irreps)), binding
    return None, False


@contextmanager
def buffers_restored(module: torch.nn.Module) -> Iterator[None]:
    saved = [(m, n, b, b.detach().clone()) for m in module.modules() for n, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for owner, name, buffer, values in saved:
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)
            if owner._buffers.get(name) is not buffer:
                owner._buffers[name] = buffer
