"""What a `PET` reads off the lengths of edges, once for all orientations, as plain tensor code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adaptive import adaptive_cutoffs
from .config import PETConfig
from .edges import cutoff_weights, step


class Geometry(nn.Module):
    """Cutoff weights of edges, from their lengths; holds no parameters."""

    def __init__(self, config: PETConfig) -> None:
        super().__init__()
        self.cutoff = config.cutoff
        self.width = config.cutoff_width
        self.function = config.cutoff_function
        self.wanted = 0.0 if config.num_neighbors_adaptive is None else config.num_neighbors_adaptive
        self.method = config.adaptive_cutoff_method
        self.adaptive_width = config.cutoff_width_adaptive

    def forward(self, length: Tensor, source: Tensor, target: Tensor, n_atoms: int) -> Tensor:
        """Length, cutoff weight and its logarithm of each edge: Tensor of shape (n_edges, 3)."""
        if self.wanted > 0.0:
            cutoff = adaptive_cutoffs(
                length, source, target, n_atoms, self.wanted, self.cutoff, self.adaptive_width, self.method
            )
            weight, log_weight = step((length - (cutoff - self.width)) / self.width, self.function)
        else:
            weight, log_weight = cutoff_weights(length, self.cutoff, self.width, self.function)
        return torch.stack([length, weight, log_weight], dim=1)


def species_rows(z: Tensor, table: Tensor) -> Tensor:
    """Row of each atom's species in the embeddings, -1 for those that are not in ``table``."""
    z = z.to(torch.int64)
    last = table.shape[0] - 1
    known = table.index_select(0, z.clamp(0, last))
    return torch.where((z < 0) | (z > last), torch.full_like(z, -1), known)


def inverse_volumes(cell: Tensor) -> Tensor:
    """1 / volume of each cell, zero where there is none: Tensor of shape (n_structures,)."""
    volume = torch.linalg.det(cell).abs()
    return torch.where(volume > 0.0, 1.0 / torch.where(volume > 0.0, volume, torch.ones_like(volume)), volume)
