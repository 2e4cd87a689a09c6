"""Networks of torch-geometric on raw edge vectors: any of theirs, a small trained one of ours, and SchNet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean

from .adapter import EDGE_FEATURES, PyGBackbone
from .network import GNNConfig
from .reference import ReferenceGNN
from .schnet import SchNetBackbone
from .storage import read_model

__all__ = [
    "EDGE_FEATURES",
    "GNNConfig",
    "PyGBackbone",
    "ReferenceGNN",
    "SchNetBackbone",
    "load",
    "load_schnet",
    "rebuild",
    "rebuild_schnet",
    "reference",
    "shipped",
]

_WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | os.PathLike[str] = "ethanol", dtype: torch.dtype | None = None) -> ReferenceGNN:
    """A saved `ReferenceGNN`.

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
    InvalidInputError
        For files of something else.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InvalidTypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    path, text = Path(name_or_path), os.fspath(name_or_path)
    if text in shipped():
        path = _WEIGHTS / text
    elif path.suffix not in (".safetensors", ".json") and not path.with_name(path.name + ".json").is_file():
        hint = did_you_mean(text, shipped()) if shipped() else "no model is shipped"
        raise DeclarationError(f"gnn: expected a shipped model or the path of a saved one, got {text!r}; {hint}")
    config, metadata, saved, tensors = read_model(path)
    model = ReferenceGNN(config, metadata=metadata).to(saved)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        shapes = [tuple(held[name].shape) if name in held else "none" for held in (expected, tensors)]
        if shapes[0] != shapes[1]:
            raise InvalidInputError(f"{path}: parameter {name!r}: expected shape {shapes[0]}, got {shapes[1]}")
    model.load_state_dict(tensors)
    return (model if dtype is None else model.to(dtype)).eval()


def reference(**hyperparameters: Any) -> ReferenceGNN:
    """Untrained `ReferenceGNN`, for recipes; ``seed`` and the entries of a `GNNConfig`."""
    seed = hyperparameters.pop("seed", None)
    seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
    return ReferenceGNN(GNNConfig.from_dict(hyperparameters), seed=seed)


def rebuild(description: dict[str, Any]) -> ReferenceGNN:
    """Untrained `ReferenceGNN` of a description."""
    return ReferenceGNN(GNNConfig.from_dict(description))


def load_schnet(**options: Any) -> SchNetBackbone:
    """SchNet with random weights; see `SchNetBackbone.random`."""
    return SchNetBackbone.random(**options)


def rebuild_schnet(description: dict[str, Any]) -> SchNetBackbone:
    """SchNet of a description, with random weights."""
    return SchNetBackbone.rebuild(description)
