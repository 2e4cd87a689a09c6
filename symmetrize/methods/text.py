"""Methods as command lines write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symmetrize.errors import DeclarationError
from symmetrize.methods import make_method

if TYPE_CHECKING:
    from symmetrize.frames import FrameMethod

_WORDS = {"true": True, "false": False, "null": None, "none": None}


def read_method(text: str) -> FrameMethod:
    """A method by name and options.

    Parameters
    ----------
    text : str
        ``"NAME"`` or ``"NAME:OPTION=VALUE,..."``; values are numbers, true, false, null or words.

    Raises
    ------
    DeclarationError
        Something else, or a name or option that does not exist.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not option or not value or option in options:
            raise DeclarationError(f"method: expected NAME:OPTION=VALUE,... with every option once, got {text!r}")
        options[option] = _value(value)
    return make_method(name.strip(), **options)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return _WORDS.get(text.lower(), text)
