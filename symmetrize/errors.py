"""Errors raised by torch-symmetrize: every message names the thing, what was expected and what was got."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SymmetrizeError(Exception):
    """Root of every error that this package raises on purpose."""


class InvalidInputError(SymmetrizeError, ValueError):
    """A batch, a structure or one of its fields is unusable (shape, value, geometry)."""


class InvalidTypeError(SymmetrizeError, TypeError):
    """An argument is of the wrong kind (dtype, class)."""


class DeclarationError(SymmetrizeError, ValueError):
    """A declaration (output, group, scope, receptive field) is inconsistent or unknown."""


class BackboneOutputError(SymmetrizeError, RuntimeError):
    """A backbone returned something other than what it declared, or non-finite numbers."""


class UnknownSpeciesError(InvalidInputError):
    """A structure holds a chemical species that the model was not built for."""


class NoFrameError(SymmetrizeError, RuntimeError):
    """A center has no well-defined coordinate system and no fallback was allowed."""


class MissingDependencyError(SymmetrizeError, ImportError):
    """An optional library is needed; the message holds the command that installs it."""


class CostWarning(UserWarning):
    """Something will take much more time or memory than it has to."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suffix for an error about an unknown name: the nearest known ones, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    if not close:
        lower = {one.lower(): one for one in known}
        close = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=3)]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(map(repr, known))}"
