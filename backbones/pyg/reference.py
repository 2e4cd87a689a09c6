"""`ReferenceGNN`: a small trained network of the plain kind, as a backbone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import edge_vectors
from symmetrize.errors import InvalidInputError, InvalidTypeError
from symmetrize.representations import OutputSpec
from symmetrize.weights import save_described

from .network import GNNConfig, ReferenceNetwork
from .species import SpeciesTable

#: Of its files.
FORMAT, VERSION = "torch-symmetrize GNN", 1


class ReferenceGNN(Backbone):
    """Message passing on raw edge vectors: compact, infinitely differentiable, and not equivariant at all.

    ``energy`` is a contribution per atom, in eV for lengths in angstrom, without the composition's part, which
    `baseline` returns.

    Parameters
    ----------
    config : GNNConfig
    seed : int
        Seed of the initial weights.
    metadata : dict, optional
        Free-form, JSON-serialisable provenance that is saved along, such as the training recipe.

    Attributes
    ----------
    scale : Tensor of shape (), float64
        Unit of the network's outputs: they are multiplied by it.
    composition : Tensor of shape (n_species,), float64
        Energy of an atom of each species, in the order of ``config.atomic_types``.
    """

    adapter = "gnn"

    scale: Tensor
    composition: Tensor

    def __init__(self, config: GNNConfig, *, seed: int = 0, metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(config, GNNConfig):
            raise InvalidTypeError(f"config: expected a GNNConfig, got {type(config).__name__}")
        outputs = {"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")}
        super().__init__(outputs=outputs, cutoff=config.cutoff, receptive_field=config.n_hops)
        self.config = config
        self.species = config.atomic_types
        self.metadata = dict(metadata or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ReferenceNetwork(config)
        self.table = SpeciesTable(config.atomic_types)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("composition", torch.zeros(len(config.atomic_types), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReferenceGNN:
        # Total energies do not survive float32: the dtype of these two is not the dtype of the network.
        exact = {"scale": self.scale, "composition": self.composition}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(device=getattr(self, name).device))
        return self

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` of every wanted atom."""
        rows = self.table.of_batch(batch)
        edge_index, edge_vec = edges_of(batch)
        energy = self.network(rows, edge_index, edge_vec.to(self.dtype)) * self.scale.to(self.dtype)
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energy if mask is None else energy[mask]}

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """Composition energies of the atoms, float64."""
        energies = self.composition[self.table.of_batch(batch)]
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energies if mask is None else energies[mask]}

    def describe(self) -> dict[str, Any]:
        return self.config.to_dict()

    def scriptable(self) -> torch.nn.Module:
        return _Scriptable(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json``, each at once or not at all."""
        save_described(
            path,
            self,
            format=FORMAT,
            version=VERSION,
            dtype=self.dtype,
            config=self.config.to_dict(),
            metadata=self.metadata,
        )


class _Scriptable(torch.nn.Module):
    """See `symmetrize.backbone.Backbone.scriptable`."""

    def __init__(self, model: ReferenceGNN) -> None:
        super().__init__()
        self.network, self.table = model.network.scriptable(), model.table
        self.register_buffer("scale", model.scale)
        self.register_buffer("composition", model.composition)

    def forward(
        self,
        pos: Tensor,
        z: Tensor,
        structure: Tensor,
        n_structures: int,
        edge_index: Tensor,
        cell_shift: Tensor,
        edge_vec: Tensor,
        center: Tensor,
    ) -> dict[str, Tensor]:
        energy = self.network(self.table(z), edge_index, edge_vec) * self.scale.to(edge_vec.dtype)
        return {"energy": energy[center]}

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        return {"energy": self.composition[self.table(z)]}  # type: ignore[index]


def edges_of(batch: Data) -> tuple[Tensor, Tensor]:
    """Edge list, neighbors first, and edge vectors of a batch, those of rotated copies where it holds them."""
    edge_index = batch.get(keys.EDGE_INDEX)
    if edge_index is None:
        raise InvalidInputError(
            "batch: expected a neighbor list in 'edge_index', got none; from_ase(..., cutoff=...) builds one"
        )
    given = batch.get(keys.EDGE_VEC)
    return edge_index, edge_vectors(batch) if given is None else given
