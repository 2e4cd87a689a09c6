"""Outputs declared in a few characters, such as ``"1o:structure"``: for tests and for the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import copied

#: What can be declared by a word instead of by irreps or a formula.
WORDS: dict[str, dict[str, str]] = {
    "scalar": {"irreps": "0e"},
    "pseudoscalar": {"irreps": "0o"},
    "vector": {"cartesian": "i"},
    "pseudovector": {"irreps": "1e"},
    "tensor": {"cartesian": "ij"},
    "symmetric-tensor": {"cartesian": "ij=ji"},
}

#: What a row belongs to.
ROWS: dict[str, dict[str, Any]] = {
    "atom": {"per": "atom"},
    "structure": {"per": "structure"},
    "sum": {"per": "atom", "reduce": "sum"},
    "mean": {"per": "atom", "reduce": "mean"},
}

#: For help texts.
SYNTAX = "REPRESENTATION[:ROWS[:UNIT]]"

#: The name of an output that has none.
SINGLE = "output"


@dataclass(frozen=True)
class Declaration:
    """An `OutputSpec`, or one of which it is still open whether rows are atoms or structures.

    Attributes
    ----------
    spec : OutputSpec
    rows_known : bool
    """

    spec: OutputSpec
    rows_known: bool = True


def read_declaration(text: str | OutputSpec) -> Declaration:
    """Parse ``REPRESENTATION[:ROWS[:UNIT]]``.

    Parameters
    ----------
    text : str or OutputSpec
        REPRESENTATION: e3nn irreps (``0e``, ``1o``, ``0e+2e``), a Cartesian formula of up to four indices (``i``,
        ``ij``, ``ij=ji``), or one of `WORDS`. ROWS: ``atom`` or ``structure``, or ``sum`` or ``mean`` for an output
        that is the sum or mean of the rows of the atoms; left out, the number of rows decides. UNIT: for reports.

    Raises
    ------
    DeclarationError, InvalidTypeError
    """
    if isinstance(text, OutputSpec):
        return Declaration(text)
    if not isinstance(text, str):
        raise InvalidTypeError(f"output: expected an OutputSpec or text such as '1o', got {type(text).__name__}")
    what, _, rest = text.strip().partition(":")
    rows, _, unit = rest.partition(":")
    what, rows = what.strip(), rows.strip()
    if rows and rows not in ROWS:
        raise DeclarationError(f"output {text!r}: unknown rows {rows!r}, {did_you_mean(rows, ROWS)}")
    options = {**_representation(what, text), **ROWS.get(rows, {}), "unit": unit.strip()}
    return Declaration(OutputSpec(**options), bool(rows))


def _representation(what: str, text: str) -> dict[str, str]:
    if what in WORDS:
        return WORDS[what]
    if re.fullmatch(r"[a-z]{1,4}(\s*=\s*-?[a-z]{1,4})*", what):
        return {"cartesian": what}
    if not re.search(r"\d", what):
        raise DeclarationError(
            f"output {text!r}: expected irreps such as '1o', a formula such as 'ij=ji', or a word: "
            f"{did_you_mean(what, WORDS)}"
        )
    return {"irreps": what}


def read_declarations(
    outputs: Mapping[str, OutputSpec | str] | OutputSpec | str,
) -> dict[str, Declaration]:
    """Declarations by name; a single one gets the name ``"output"``."""
    if isinstance(outputs, (str, OutputSpec)):
        return {SINGLE: read_declaration(outputs)}
    if not isinstance(outputs, Mapping) or not outputs:
        raise InvalidTypeError(
            "outputs: expected a dict of name -> OutputSpec (or text such as '1o'), or one of them, "
            f"got {type(outputs).__name__ if outputs else 'none'}"
        )
    return {str(name): read_declaration(spec) for name, spec in outputs.items()}


def with_rows(
    model: Callable[[Data], Mapping[str, Tensor]], batch: Data, declarations: Mapping[str, Declaration]
) -> dict[str, OutputSpec]:
    """The declarations with open rows found from one evaluation: as many as atoms, or as many as structures.

    Where both are the same number (isolated atoms only), rows are atoms.

    Raises
    ------
    BackboneOutputError
        An output is missing, or has another number of rows.
    """
    if all(d.rows_known for d in declarations.values()):
        return {name: d.spec for name, d in declarations.items()}
    with torch.enable_grad():
        result = model(copied(batch))
    if not isinstance(result, Mapping):
        raise BackboneOutputError(f"model: expected a dict of outputs, got {type(result).__name__}")
    n_atoms, n_structures = batch[keys.POS].shape[0], batch[keys.PTR].shape[0] - 1
    out = {}
    for name, declaration in declarations.items():
        out[name] = declaration.spec
        if declaration.rows_known:
            continue
        if name not in result:
            raise BackboneOutputError(f"{name}: declared, but the model returned {did_you_mean(name, result)}")
        value = result[name]
        if not isinstance(value, Tensor):
            raise BackboneOutputError(f"{name}: expected a Tensor, got {type(value).__name__}")
        n_rows = value.shape[0] if value.dim() else 0
        if n_rows not in (n_atoms, n_structures):
            raise BackboneOutputError(
                f"{name}: expected {n_structures} rows (one per structure) or {n_atoms} (one per atom), "
                f"got shape {tuple(value.shape)}"
            )
        spec = declaration.spec
        per: Any = "atom" if n_rows == n_atoms else "structure"
        out[name] = OutputSpec(spec.irreps, spec.cartesian, per=per, unit=spec.unit)
    return out
