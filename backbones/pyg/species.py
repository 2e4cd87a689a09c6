"""Atomic numbers to rows of a table."""

# No annotations from the future: TorchScript reads the one of the buffer.
from collections.abc import Iterable

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import refuse_unknown_species
from symmetrize.errors import DeclarationError, InvalidInputError


class SpeciesTable(torch.nn.Module):
    """Row of each atomic number among the species that a model knows.

    Parameters
    ----------
    species : iterable of int
        Atomic numbers, in the order of the rows.

    Raises
    ------
    DeclarationError
        None, repeated or negative numbers.
    """

    row: Tensor

    def __init__(self, species: Iterable[int]) -> None:
        super().__init__()
        numbers = [int(z) for z in species]
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise DeclarationError(f"species: expected different atomic numbers, got {numbers}")
        self.species = tuple(numbers)
        row = torch.full((max(numbers) + 1,), -1, dtype=torch.int64)
        row[numbers] = torch.arange(len(numbers))
        self.register_buffer("row", row, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Row of each atomic number, -1 for those that are not known: Tensor of the shape of ``z``, int64."""
        last = self.row.shape[0] - 1
        inside = (z >= 0) & (z <= last)
        return torch.where(inside, self.row[z.clamp(0, last)], torch.full_like(z, -1))

    def of_batch(self, batch: Data) -> Tensor:
        """Rows of the atoms of a batch: Tensor of shape (n_atoms,), int64.

        Raises
        ------
        InvalidInputError
            There is no field ``z``.
        UnknownSpeciesError
            A species outside the table; the message names structure and atom.
        """
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("batch: expected a field 'z' with atomic numbers, got none")
        rows = self(z.to(torch.int64))
        refuse_unknown_species(batch, rows, self.species)
        return rows
