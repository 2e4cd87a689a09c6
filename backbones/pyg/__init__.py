"""Networks of torch-geometric on raw vectors: any of theirs, two of ours that can be trained, and SchNet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from symmetrize.weights import check_dtype, fill, find_weights, read_described, shipped_weights

from .adapter import EDGE_FEATURES, PyGBackbone
from .energies import VERSION
from .network import GNNConfig
from .reference import FORMAT, ReferenceGNN
from .schnet import SchNetBackbone
from .transformer import FORMAT as TRANSFORMER_FORMAT
from .transformer import MolecularTransformer, TransformerConfig

__all__ = [
    "EDGE_FEATURES",
    "GNNConfig",
    "MolecularTransformer",
    "PyGBackbone",
    "ReferenceGNN",
    "SchNetBackbone",
    "TransformerConfig",
    "load",
    "load_molecular_transformer",
    "load_schnet",
    "molecular_transformer",
    "rebuild",
    "rebuild_molecular_transformer",
    "rebuild_schnet",
    "reference",
    "shipped",
]

_WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """Names of the trained models that come with the package."""
    return shipped_weights(_WEIGHTS)


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
    check_dtype(dtype)
    path = find_weights(name_or_path, _WEIGHTS, "gnn")
    found = read_described(path, format=FORMAT, version=VERSION)
    model = ReferenceGNN(GNNConfig.from_dict(found.config), metadata=found.metadata).to(found.dtype)
    fill(model, found.tensors, path)
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


def load_molecular_transformer(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> MolecularTransformer:
    """A saved `MolecularTransformer`; none is shipped, see `molecular_transformer` for training one.

    Raises
    ------
    DeclarationError, InvalidInputError
        As `load`.
    """
    check_dtype(dtype)
    found_path = find_weights(path, _WEIGHTS, "molecular-transformer")
    found = read_described(found_path, format=TRANSFORMER_FORMAT, version=VERSION)
    model = rebuild_molecular_transformer(found.config).to(found.dtype)
    model.metadata = found.metadata
    fill(model, found.tensors, found_path)
    return (model if dtype is None else model.to(dtype)).eval()


def molecular_transformer(**hyperparameters: Any) -> MolecularTransformer:
    """Untrained `MolecularTransformer`, for recipes; ``seed`` and the entries of a `TransformerConfig`."""
    seed = hyperparameters.pop("seed", None)
    seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
    return MolecularTransformer(TransformerConfig.from_dict(hyperparameters), seed=seed)


def rebuild_molecular_transformer(description: dict[str, Any]) -> MolecularTransformer:
    """Untrained `MolecularTransformer` of a description."""
    return MolecularTransformer(TransformerConfig.from_dict(description))
