"""Which outputs of a metatomic model are evaluated, and how each of them transforms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from symmetrize.errors import DeclarationError, InvalidTypeError
from symmetrize.metatomic.tensor_maps import RENAMED, Part, parts_of, quantity, wanted_outputs
from symmetrize.representations import OutputSpec

Declared = Mapping[str, OutputSpec | None]

HOW = "declare it yourself: outputs={%r: OutputSpec(...)}"


def declared_outputs(known: Mapping[str, Any], asked: Iterable[str] | Declared | None) -> dict[str, OutputSpec | None]:
    """What is asked of the model, and the representation where the caller declares it.

    Raises
    ------
    DeclarationError
        Unknown output.
    """
    if asked is None:
        return dict.fromkeys(wanted_outputs(known, None))
    specs = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys([asked] if isinstance(asked, str) else asked)
    if not specs:
        raise DeclarationError(f"outputs: expected at least one of {sorted(known)}, got none")
    wanted_outputs(known, specs)
    for name, spec in specs.items():
        if spec is not None and not isinstance(spec, OutputSpec):
            raise InvalidTypeError(f"outputs[{name!r}]: expected an OutputSpec or None, got {type(spec).__name__}")
    return specs


def others(known: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, str]:
    """Outputs of the model that are not asked for by default, and why."""
    reasons = {}
    chosen = set(wanted)
    for name in known:
        base, _, variant = name.partition("/")
        present = name.replace(base, RENAMED.get(base, base), 1)
        # A model answers to the old name and to the new one.
        if name in chosen or (present != name and present in known):
            continue
        if quantity(name) == "feature" or name.startswith("mtt::aux::"):
            reasons[name] = "features carry no declared representation"
        elif variant:
            reasons[name] = f"a variant of {base!r}; ask for it by name"
    return reasons


def present_name(name: str, known: Mapping[str, Any]) -> str:
    """The name that metatomic uses now, where the model answers to it."""
    base = name.partition("/")[0]
    renamed = name.replace(base, RENAMED.get(base, base), 1)
    return renamed if renamed in known else name


def recognized(name: str, tensor: Any, unit: str) -> dict[str, Part]:
    """The outputs that a TensorMap consists of; totals of structures are declared as such.

    Raises
    ------
    DeclarationError
        With the reason, where it cannot be told how it transforms.
    """
    per_atom = all("atom" in block.samples.names for block in tensor.blocks())
    parts = parts_of(name, tensor, unit)
    if per_atom:
        return parts
    return {key: replace(part, spec=replace(part.spec, per="structure", reduce=None)) for key, part in parts.items()}


def declared(name: str, tensor: Any, spec: OutputSpec) -> dict[str, Part]:
    """An output with the representation that the caller gives it: its only block, component axes first.

    Raises
    ------
    DeclarationError
        It does not fit the numbers that are there.
    """
    blocks = list(tensor.items())
    if len(blocks) != 1:
        raise DeclarationError(f"outputs[{name!r}]: expected one block to declare, got {len(blocks)}")
    key, block = blocks[0]
    named = dict(zip(key.names, [int(v) for v in key.values], strict=True))
    per = "atom" if "atom" in block.samples.names else "structure"
    if spec.per != per:
        raise DeclarationError(f"outputs[{name!r}]: expected an OutputSpec per {per}, got {spec}")
    shape = tuple(block.values.shape[1:])
    column = 0 if spec.cartesian is not None and shape == (*spec.shape, 1) else None
    flat = math.prod(shape) == math.prod(spec.shape) and (spec.cartesian is None or len(shape) == 1)
    if column is None and not flat:
        raise DeclarationError(
            f"outputs[{name!r}]: the model returns {shape[:-1]} components of {shape[-1]} properties, {spec} has shape "
            f"{spec.shape}"
        )
    spherical = [tuple(c.names) for c in block.components] == [("o3_mu",)]
    degree = (shape[0] - 1) // 2 if spherical and spec.cartesian is None else None
    return {name: Part(name, named, degree, column, spec)}
