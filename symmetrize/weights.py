"""Trained networks as files: numbers as safetensors, everything else as JSON beside them; nothing that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.files import replacing

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SUFFIXES = (".json", ".safetensors")


class Described(NamedTuple):
    """What `read_described` found.

    Attributes
    ----------
    version : int
        Of the format.
    config, metadata : dict
    dtype : torch.dtype
        Of the network.
    tensors : dict of str to Tensor
    """

    version: int
    config: dict[str, Any]
    metadata: dict[str, Any]
    dtype: torch.dtype
    tensors: dict[str, Tensor]


def save_described(
    path: str | os.PathLike[str],
    network: torch.nn.Module,
    *,
    format: str,
    version: int,
    dtype: torch.dtype,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``, each at once or not at all."""
    stem = _stem(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    description = {
        "format": format,
        "version": version,
        "dtype": str(dtype).removeprefix("torch."),
        "config": dict(config),
        "metadata": dict(metadata),
    }
    text = json.dumps(description, indent=2) + "\n"  # before anything is written: metadata may be unserialisable
    with replacing(stem, ".safetensors", ".json") as inner:
        save_file(tensors, f"{inner}.safetensors")
        Path(f"{inner}.json").write_text(text, encoding="utf-8")


def read_described(path: str | os.PathLike[str], *, format: str, version: int) -> Described:
    """Read what `save_described` wrote, in this version of the format or an earlier one.

    Raises
    ------
    InvalidInputError
        A missing or damaged file, or one of another format or of a newer version.
    """
    stem = _stem(path)
    words, numbers = (stem.with_name(stem.name + suffix) for suffix in _SUFFIXES)
    for name in (words, numbers):
        if not name.is_file():
            raise InvalidInputError(f"model: expected a file {str(name)!r}, got none")
    try:
        description = json.loads(words.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{words}: expected JSON, got something else: {error}") from error
    if not isinstance(description, dict) or description.get("format") != format:
        raise InvalidInputError(f"{words}: expected the description of a {format!r} model")
    found = description.get("version")
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= version:
        newer = isinstance(found, int) and found > version
        raise InvalidInputError(
            f"{words}: expected version {version} or an earlier one, got {found!r}"
            + (": it was written by a newer torch-symmetrize" if newer else "")
        )
    if description.get("dtype") not in _DTYPES:
        raise InvalidInputError(f"{words}: dtype: expected float32 or float64, got {description.get('dtype')!r}")
    for entry in ("config", "metadata"):
        if not isinstance(description.get(entry), dict):
            raise InvalidInputError(f"{words}: expected an entry {entry!r}")
    try:
        tensors = load_file(numbers)
    except SafetensorError as error:
        raise InvalidInputError(f"{numbers}: expected a safetensors file, got a damaged or another one") from error
    dtype = _DTYPES[description["dtype"]]
    return Described(found, description["config"], description["metadata"], dtype, tensors)


def find_weights(name_or_path: str | os.PathLike[str], folder: Path, kind: str) -> Path:
    """The files of a model that comes with the package, by its name, or those of a path.

    Parameters
    ----------
    name_or_path : str or path
        A path with or without the suffix.
    folder : Path
        Of the models that come with the package.
    kind : str
        What to call the model in errors.

    Raises
    ------
    DeclarationError
        For what is neither.
    """
    text, path = os.fspath(name_or_path), Path(name_or_path)
    known = shipped_weights(folder)
    if text in known:
        return folder / text
    if path.suffix not in _SUFFIXES and not path.with_name(path.name + ".json").is_file():
        hint = did_you_mean(text, known) if known else "no model is shipped"
        raise DeclarationError(f"{kind}: expected a shipped model or the path of a saved one, got {text!r}; {hint}")
    return path


def shipped_weights(folder: Path) -> list[str]:
    """Names of the models in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def fill(network: torch.nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load all parameters and buffers, refusing a file that lacks one, has another shape, or more than that.

    Raises
    ------
    InvalidInputError
    """
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "holds the unexpected"
        raise InvalidInputError(f"{os.fspath(source)}: {problem} tensor {name!r}")
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise InvalidInputError(
                f"{os.fspath(source)}: {name}: expected shape {tuple(value.shape)}, got {tuple(tensors[name].shape)}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InvalidInputError(f"{os.fspath(source)}: {name}: expected finite numbers")
    network.load_state_dict(dict(tensors))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a precision that networks are not evaluated in."""
    if dtype is not None and dtype not in _DTYPES.values():
        raise InvalidTypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")


def _stem(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in _SUFFIXES else path
