"""Weights as safetensors, everything else as JSON next to them; and the names under which metatrain keeps them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch

from symmetrize.weights import Described, read_described, save_described

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
    save_described(
        path,
        model,
        format=FORMAT,
        version=VERSION,
        dtype=model.dtype,
        config=model.config.to_dict(),
        metadata=model.metadata,
    )


def read_model(path: str | os.PathLike[str]) -> tuple[PETConfig, Described]:
    """Configuration and contents of a saved model, brought up to this version."""
    found = read_described(path, format=FORMAT, version=VERSION)
    config = PETConfig.from_dict(found.config)
    if found.version < 2:
        # Before there were other outputs than an energy and forces, all had one scale, and the energy a composition.
        shape = len(config.atomic_types), sum(target.width for target in config.outputs)
        found.tensors["factor"] = torch.ones(shape, dtype=torch.float64)
        found.tensors["offset"] = torch.zeros(shape, dtype=torch.float64)
    return config, found
