"""Point Edge Transformer: interatomic energies from attention over the edges of each atom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from symmetrize.errors import InvalidInputError
from symmetrize.weights import check_dtype, fill, find_weights, shipped_weights

from .config import PETConfig, Target
from .model import PET
from .storage import read_model

__all__ = ["PET", "PETConfig", "Target", "load", "rebuild", "shipped"]

_WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return shipped_weights(_WEIGHTS)


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
    check_dtype(dtype)
    path = find_weights(name_or_path, _WEIGHTS, "pet")
    config, found = read_model(path)
    model = PET(config, metadata=found.metadata).to(found.dtype)
    fill(model, found.tensors, path)
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
