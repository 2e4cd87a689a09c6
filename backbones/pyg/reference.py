"""`ReferenceGNN`: a small trained network of the plain kind, as a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import edge_vectors
from symmetrize.errors import InvalidInputError, InvalidTypeError

from .energies import EnergyNetwork
from .network import GNNConfig, ReferenceNetwork

#: Of its files.
FORMAT = "torch-symmetrize GNN"


class ReferenceGNN(EnergyNetwork):
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
    """

    adapter = "gnn"
    format = FORMAT

    network: ReferenceNetwork

    def __init__(self, config: GNNConfig, *, seed: int = 0, metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(config, GNNConfig):
            raise InvalidTypeError(f"config: expected a GNNConfig, got {type(config).__name__}")
        super().__init__(
            config.atomic_types,
            lambda: ReferenceNetwork(config),
            config.to_dict(),
            seed=seed,
            metadata=metadata,
            cutoff=config.cutoff,
            receptive_field=config.n_hops,
        )
        self.config = config

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` of every wanted atom."""
        rows = self.table.of_batch(batch)
        edge_index, edge_vec = edges_of(batch)
        return self.scaled(batch, self.network(rows, edge_index, edge_vec.to(self.dtype)))

    def scriptable(self) -> torch.nn.Module:
        return _Scriptable(self)


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
