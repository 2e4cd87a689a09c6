"""What ``symmetrize export`` does: find the model, symmetrise it where it is not, write the file, say what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, did_you_mean
from symmetrize.metatomic.tensor_maps import quantity
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.identity import Identity
from symmetrize.registry import list_backbones, load_backbone
from symmetrize.storage import is_saved_model, load
from symmetrize.symmetrizer import Symmetrizer

#: Suffixes of files in the metatomic format.
SUFFIXES = (".pt", ".pth")


def run_export(
    target: str,
    output: str | Path,
    *,
    group: str | None = None,
    scope: str | None = None,
    dtype: str | None = None,
    chunk_size: int | None = None,
    bare: bool = False,
    name: str = "",
    description: str = "",
    authors: Sequence[str] = (),
    species: str | None = None,
    outputs: Sequence[str] = (),
    echo: Callable[[str], None] = print,
) -> None:
    """Write a symmetrised model in the metatomic format; options as on the command line.

    Parameters
    ----------
    target : str
        See `load_model`.
    output : path
        By convention ``*.pt``.
    group, scope, chunk_size
        Of the `Symmetrizer`; by default as the model was saved, else its defaults.
    dtype : {"float32", "float64", "mixed"}, optional
        See `symmetrize.export.metatomic.export`.
    bare : bool
        Not symmetrised, for comparison.
    species : str, optional
        Symbols or atomic numbers, separated by commas.
    outputs : sequence of str
        Of a model in the metatomic format; by default all that can be rotated.
    echo : callable
        Takes what would be printed.

    Raises
    ------
    SymmetrizeError
        Arguments that cannot be used, and models that cannot be exported.
    """
    from symmetrize.export.metatomic import export

    output = Path(output)
    if output.is_dir():
        raise InvalidInputError(f"output: expected a file such as model.pt, got a folder: {output}")
    if target.endswith(SUFFIXES) and output.resolve() == Path(target).resolve():
        raise InvalidInputError(f"output: expected another file than the one that is read, got {output}")
    model = symmetrized(load_model(target, outputs), group=group, scope=scope, chunk_size=chunk_size, bare=bare)
    exported = export(
        model,
        output,
        name=name,
        description=description,
        authors=authors,
        dtype=dtype,
        species=None if species is None else parse_species(species),
    )
    echo(summary(output, model, exported))


def load_model(target: str, outputs: Sequence[str] = ()) -> Backbone | Symmetrizer:
    """What a name on the command line stands for.

    Parameters
    ----------
    target : str
        The folder of a saved model (`symmetrize.save`); ``"NAME"`` or ``"NAME:WEIGHTS"`` of a registered backbone, such
        as ``"pet:ethanol"`` or ``"pet:PATH"`` of a converted one; or a file in the metatomic format, ``"model.pt"``.

    Raises
    ------
    DeclarationError, InvalidInputError
        Nothing of that name.
    """
    if target.endswith(SUFFIXES):
        if not Path(target).is_file():
            raise InvalidInputError(f"model: no such file: {target}")
        return load_backbone("metatomic", target, list(outputs) or None)
    if is_saved_model(target):
        return load(target)
    name, _, weights = target.partition(":")
    known = list_backbones()
    if name not in known:
        raise DeclarationError(
            "model: expected the folder of a saved model, a registered backbone such as pet:ethanol, or a file in the "
            f"metatomic format (.pt), got {target!r}; backbones: {did_you_mean(name, known)}"
        )
    return load_backbone(name, *([weights] if weights else []))


def symmetrized(
    model: Backbone | Symmetrizer,
    *,
    group: str | None = None,
    scope: str | None = None,
    chunk_size: int | None = None,
    bare: bool = False,
) -> Symmetrizer:
    """The model, symmetrised by ECSE if it is not yet; options replace what was saved."""
    if isinstance(model, Backbone):
        method: Any = Identity() if bare else ECSE()
        return Symmetrizer(model, method, group or "O(3)", scope, chunk_size)
    changed = {"group": group, "scope": scope, "chunk_size": chunk_size}
    settings = {"group": model.group, "scope": model.scope, "chunk_size": model.chunk_size}
    settings |= {key: value for key, value in changed.items() if value is not None}
    return Symmetrizer(model.backbone, Identity() if bare else model.method, **settings)  # type: ignore[arg-type]


def parse_species(text: str) -> list[int]:
    """Atomic numbers from symbols or numbers, separated by commas."""
    from ase.data import atomic_numbers

    numbers = []
    for part in (piece.strip() for piece in text.split(",")):
        number = int(part) if part.isdigit() else atomic_numbers.get(part, 0)
        if not 0 < number < len(atomic_numbers):
            raise DeclarationError(f"species: expected symbols of elements such as H,C,O, got {part!r}")
        numbers.append(number)
    return sorted(set(numbers))


def summary(path: Path, model: Symmetrizer, exported: Any) -> str:
    """What was written, in a few lines."""
    from ase.data import chemical_symbols

    capabilities = exported.capabilities()
    reach = float(capabilities.interaction_range)
    # Without the former names, by which the format offers some outputs again.
    kinds = [str(name) for name in capabilities.outputs if quantity(name) == name.split("/")[0]]
    elements = [chemical_symbols[int(z)] for z in capabilities.atomic_types]
    listed = ", ".join(elements) if len(elements) <= 20 else f"{len(elements)} elements"
    length = f"{reach:g} {capabilities.length_unit}" if reach < float("inf") else "infinite (finite systems only)"
    lines = [
        f"{path} ({path.stat().st_size / 1e6:.1f} MB), reproduces the model",
        f"  method             {model.method!r}",
        f"  group, scope       {model.group}, {model.scope}",
        f"  outputs            {', '.join(sorted(kinds))}",
        f"  elements           {listed}",
        f"  interaction range  {length}",
        f"  precision          {capabilities.dtype}",
    ]
    return "\n".join(lines)
