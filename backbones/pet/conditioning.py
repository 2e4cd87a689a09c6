"""Features of an atom that depend on the charge and the spin multiplicity of its structure."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import InvalidInputError

#: Fields of a batch, one entry per structure, and what a structure has without them.
DEFAULTS = {keys.CHARGE: 0, keys.SPIN_MULTIPLICITY: 1}


class SystemConditioning(nn.Module):
    """Tables of charges and multiplicities, mixed by one hidden layer; added to the features behind every block."""

    def __init__(self, width: int, max_charge: int, max_spin_multiplicity: int) -> None:
        super().__init__()
        self.max_charge = max_charge
        self.max_spin_multiplicity = max_spin_multiplicity
        self.charge_embedding = nn.Embedding(2 * max_charge + 1, width)
        self.spin_multiplicity_embedding = nn.Embedding(max_spin_multiplicity, width)
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, charge: Tensor, spin_multiplicity: Tensor) -> Tensor:
        """Features of each structure, (n_structures, d_node), from int64 of shape (n_structures,)."""
        tables = [
            self.charge_embedding(charge + self.max_charge),
            self.spin_multiplicity_embedding(spin_multiplicity - 1),
        ]
        return self.project(torch.cat(tables, dim=1))


def read_condition(batch: Data, module: SystemConditioning) -> Tensor:
    """Conditioning features of every atom: Tensor of shape (n_atoms, d_node).

    Raises
    ------
    InvalidInputError
        A charge or a multiplicity that is no whole number, or that the model does not know.
    """
    structure = batch.get(keys.BATCH)
    if structure is None:
        structure = torch.zeros_like(batch[keys.Z], dtype=torch.int64)
    ptr = batch.get(keys.PTR)
    n_structures = int(structure.max()) + 1 if ptr is None else ptr.shape[0] - 1
    limits = {
        keys.CHARGE: (-module.max_charge, module.max_charge),
        keys.SPIN_MULTIPLICITY: (1, module.max_spin_multiplicity),
    }
    values = {}
    for name, (low, high) in limits.items():
        value = batch.get(name)
        if value is None:
            value = torch.full((n_structures,), DEFAULTS[name], device=structure.device)
        value = torch.as_tensor(value, device=structure.device).reshape(-1)
        if value.shape[0] != n_structures:
            raise InvalidInputError(f"{name}: expected one entry per structure ({n_structures}), got {value.shape[0]}")
        whole = value.detach().round().to(torch.int64)
        bad = torch.nonzero((whole != value) | (whole < low) | (whole > high)).view(-1)
        if bad.shape[0]:
            raise InvalidInputError(
                f"{name}: structure {int(bad[0])}: expected a whole number from {low} to {high}, which this model was "
                f"built for, got {float(value[bad[0]]):g}"
            )
        values[name] = whole
    return module(values[keys.CHARGE], values[keys.SPIN_MULTIPLICITY]).index_select(0, structure)
