"""Point Edge Transformer: interatomic energies from attention over the edges of each atom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean

from .config import PETConfig, Target
from .model import PET
from .storage import read_model

__all__ = ["PET", "PETConfig", "Target", "load", "rebuild", "shipped"]

_WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | os.PathLike[str] = "ethanol", dtype: torch.dtype | None = None) -> PET:
    """A saved model.

    Parameters
    ----------
    name_or_path : str or path
        Name of a shipped model (`shipped`), or path of a saved one, with or without the suffix.
    dtype : torch.dtype, optional
        float32 or float64; by default what was saved.

    Raises
    ------
    DeclarationError
        For a name that is neither shipped nor a file.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InvalidTypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    path = Path(name_or_path)
    text = os.fspath(name_or_path)
    if text in shipped():
        path = _WEIGHTS / text
    elif path.suffix not in (".safetensors", ".json") and not path.with_name(path.name + ".json").is_file():
        known = shipped()
        hint = did_you_mean(text, known) if known else "no model is shipped"
        raise DeclarationError(f"pet: expected a shipped model or the path of a saved one, got {text!r}; {hint}")
    config, metadata, saved, tensors = read_model(path)
    model = PET(config, metadata=metadata).to(saved)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "holds the unexpected"
        raise InvalidInputError(f"{path}: {problem} parameter {name!r}")
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise InvalidInputError(
                f"{path}: {name}: expected shape {tuple(value.shape)}, got {tuple(tensors[name].shape)}"
            )
    model.load_state_dict(tensors)
    return (model if dtype is None else model.to(dtype)).eval()


def rebuild(description: dict[str, Any]) -> PET:
    """The model that `PET.describe` describes, with parameters that are still to be loaded.

    Raises
    ------
    InvalidInputError
        For anything that is no such description.
    DeclarationError
        For a configuration with unknown entries.
    """
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InvalidInputError("pet: expected a description with an entry 'config'")
    return PET(PETConfig.from_dict(description["config"]), metadata=description.get("metadata"))
