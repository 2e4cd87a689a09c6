"""A message-passing network for molecules that reads raw coordinates, and the same network made equivariant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import ECSE, Backbone, OutputSpec, Symmetrizer


class MoleculeNet(Backbone):
    """Energy and dipole moment of molecules: one round of messages, each made from species and the vector of an edge.

    Nothing in it knows about rotations.

    Parameters
    ----------
    width : int
        Number of features.
    cutoff : float
        Radius of the neighbor list in angstrom.
    """

    def __init__(self, width: int = 24, cutoff: float = 4.0) -> None:
        super().__init__(
            outputs={
                "energy": OutputSpec("0e", reduce="sum", unit="eV"),
                "dipole": OutputSpec("1o", reduce="sum", unit="e A"),
            },
            cutoff=cutoff,
            receptive_field=1,
        )
        self.radius = cutoff
        self.species_features = torch.nn.Embedding(100, width)
        self.message = torch.nn.Sequential(
            torch.nn.Linear(3 + 2 * width, width), torch.nn.Tanh(), torch.nn.Linear(width, width)
        )
        self.update = torch.nn.Sequential(torch.nn.Linear(2 * width, width), torch.nn.Tanh())
        self.read_out = torch.nn.Linear(width, 4)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        neighbor, center = batch.edge_index
        vectors = batch.edge_vec
        features = self.species_features(batch.z)
        # (1 - x^2)^3 and its first two derivatives vanish at the cutoff.
        weight = (1.0 - (vectors / self.radius).square().sum(dim=1)).clamp(min=0.0) ** 3
        messages = self.message(torch.cat([vectors, features[neighbor], features[center]], dim=1))
        pooled = torch.zeros_like(features).index_add(0, center, weight[:, None] * messages)
        rows = self.read_out(self.update(torch.cat([features, pooled], dim=1)))
        # Environments are evaluated for the sake of their center: only its row is wanted.
        if batch.get("center_mask") is not None:
            rows = rows[batch.center_mask]
        return {"energy": rows[:, 0], "dipole": rows[:, 1:]}


def bare() -> MoleculeNet:
    """The network as it is, here with random weights instead of trained ones."""
    torch.manual_seed(0)
    return MoleculeNet().double().eval()


def symmetrized() -> Symmetrizer:
    """The network averaged over coordinate systems attached to every atom: exactly equivariant under O(3)."""
    return Symmetrizer(bare(), ECSE(), group="O(3)").eval()


def dipole_of_charges(positions: Tensor, charges: Tensor) -> Tensor:
    """Dipole moment of point charges: Tensor of shape (1, 3)."""
    return (charges[:, None] * (positions - positions.mean(dim=0))).sum(dim=0, keepdim=True)
