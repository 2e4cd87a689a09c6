"""Weights as safetensors, everything else as JSON next to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from symmetrize.errors import InvalidInputError
from symmetrize.files import replacing

from .network import GNNConfig

if TYPE_CHECKING:
    from .reference import ReferenceGNN

FORMAT = "torch-symmetrize GNN"
VERSION = 1


def save_model(model: ReferenceGNN, path: str | os.PathLike[str]) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``."""
    stem = _stem(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config.to_dict(),
        "metadata": model.metadata,
    }
    text = json.dumps(description, indent=2) + "\n"  # before anything is written: metadata may be unserialisable
    with replacing(stem, ".safetensors", ".json") as inner:
        save_file(tensors, f"{inner}.safetensors")
        Path(f"{inner}.json").write_text(text, encoding="utf-8")


def read_model(path: str | os.PathLike[str]) -> tuple[GNNConfig, dict[str, Any], torch.dtype, dict[str, Tensor]]:
    """Configuration, metadata, dtype and tensors of a saved model.

    Raises
    ------
    InvalidInputError
        A missing file, or one of another format or version.
    """
    stem = _stem(path)
    names = [stem.with_name(stem.name + suffix) for suffix in (".json", ".safetensors")]
    for name in names:
        if not name.is_file():
            raise InvalidInputError(f"model: expected a file {str(name)!r}, got none")
    try:
        description = json.loads(names[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{names[0]}: expected JSON, got something else: {error}") from error
    expected = {"format": FORMAT, "version": VERSION}
    for key, value in expected.items():
        if not isinstance(description, dict) or description.get(key) != value:
            raise InvalidInputError(f"{names[0]}: {key}: expected {value!r}, got another")
    if description.get("dtype") not in ("float32", "float64"):
        raise InvalidInputError(f"{names[0]}: dtype: expected float32 or float64, got {description.get('dtype')!r}")
    config = GNNConfig.from_dict(description["config"])
    return config, description["metadata"], getattr(torch, description["dtype"]), load_file(names[1])


def _stem(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
