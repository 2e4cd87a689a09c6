"""Weights as safetensors, everything else as JSON next to them; and the names under which metatrain keeps them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.files import replacing

from .config import PETConfig

if TYPE_CHECKING:
    from .model import PET

FORMAT = "torch-symmetrize PET"
VERSION = 2

#: Parameters of the network whose name in metatrain's ``PETBackend`` differs, as (pattern here, replacement there).
#: All others have the same name. There the last layers hold one more level, the block of a tensor map.
METATRAIN_NAMES: tuple[tuple[str, str], ...] = (
    (
        r"^(node|edge)_last_layers\.(\w+)\.(\d+)\.(weight|bias)$",
        r"\1_last_layers.\2.\3.\2___0.\4",
    ),
)


def metatrain_name(name: str) -> str:
    """Name in metatrain's ``PETBackend`` of a parameter of `PETNetwork`."""
    for pattern, replacement in METATRAIN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def save_model(model: PET, path: str | os.PathLike[str]) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``."""
    stem = _stem(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
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


def read_model(path: str | os.PathLike[str]) -> tuple[PETConfig, dict[str, Any], torch.dtype, dict[str, Tensor]]:
    """Configuration, metadata, dtype and tensors of a saved model."""
    stem = _stem(path)
    names = [stem.with_name(stem.name + suffix) for suffix in (".json", ".safetensors")]
    for name in names:
        if not name.is_file():
            raise InvalidInputError(f"model: expected a file {str(name)!r}, got none")
    description = json.loads(names[0].read_text(encoding="utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InvalidInputError(f"{names[0]}: expected the description of a {FORMAT!r} model")
    version = description.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise InvalidInputError(
            f"{names[0]}: expected version {VERSION} or an earlier one, got {version!r}"
            + (": it was written by a newer torch-symmetrize" if newer else "")
        )
    if description.get("dtype") not in ("float32", "float64"):
        raise DeclarationError(f"{names[0]}: dtype: expected float32 or float64, got {description.get('dtype')!r}")
    dtype = getattr(torch, description["dtype"])
    config, tensors = PETConfig.from_dict(description["config"]), load_file(names[1])
    if version < 2:
        # Before there were other outputs than an energy and forces, all had one scale, and the energy a composition.
        shape = len(config.atomic_types), sum(target.width for target in config.outputs)
        tensors["factor"] = torch.ones(shape, dtype=torch.float64)
        tensors["offset"] = torch.zeros(shape, dtype=torch.float64)
    return config, description["metadata"], dtype, tensors


def _stem(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
