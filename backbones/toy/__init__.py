"""Small random networks that depend strongly on orientation: something to symmetrise in tests and examples."""

from __future__ import annotations

from typing import Any

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.representations import OutputSpec

from .networks import ToyGlobal, ToyLocal

__all__ = ["ToyGlobal", "ToyLocal", "load", "rebuild"]

_KINDS: dict[str, type[Backbone]] = {"local": ToyLocal, "global": ToyGlobal}


def load(kind: str = "local", **options: Any) -> Backbone:
    """A `ToyLocal` ("local") or a `ToyGlobal` ("global") with the given options."""
    if kind not in _KINDS:
        raise DeclarationError(f"toy: unknown network {kind!r}; {did_you_mean(kind, _KINDS)}")
    return _KINDS[kind](**options)


def rebuild(description: dict[str, Any]) -> Backbone:
    """The network of a description, with the random weights of its seed."""
    options = dict(description)
    outputs = {name: OutputSpec(**fields) for name, fields in options.pop("outputs").items()}
    return load(options.pop("kind"), outputs=outputs, **options)
