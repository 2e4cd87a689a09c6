"""The one network that every tool symmetrises, and clouds of points of equal size as dense tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys

#: Sizes and seed of the network, for the record.
WIDTH = 32
N_SPECIES = 8
LENGTH = 4.0
SEED = 0

#: Structures that are evaluated at once.
CHUNK = 256


def species_features(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Smooth features of atomic numbers, different for every element: Tensor of shape (..., N_SPECIES)."""
    rates = 0.61803398875 * torch.arange(1, N_SPECIES + 1, dtype=dtype)
    return torch.cos(z[..., None].to(dtype) * rates + rates)


class Network(torch.nn.Module):
    r"""Random sums over points: invariant under permutations, infinitely differentiable, not equivariant.

    With :math:`h_i = \tanh(W_1 (r_i - \bar r) / L + W_2 s_i)`, :math:`g = \sum_i h_i / 10` and
    :math:`k_i = \tanh(W_3 h_i + W_4 g)`, the energy is :math:`a \cdot \sum_i k_i` and vectors are :math:`B k_i`. The
    entries are normal; those of :math:`W_1` have standard deviation 0.4 and L is
    4 Å; the others are divided by the square root of their number of rows.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)

        def matrix(rows: int, columns: int, scale: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(rows, columns, dtype=torch.float64, generator=generator))

        self.points = matrix(3, WIDTH, 0.4)
        self.species = matrix(N_SPECIES, WIDTH, N_SPECIES**-0.5)
        self.own = matrix(WIDTH, WIDTH, WIDTH**-0.5)
        self.pooled = matrix(WIDTH, WIDTH, WIDTH**-0.5)
        self.energy = matrix(WIDTH, 1, WIDTH**-0.5)
        self.vector = matrix(WIDTH, 3, WIDTH**-0.5)
        self.n_evaluations = 0

    def forward(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (b,) and vectors (b, n, 3) of clouds (b, n, 3) with features (b, n, N_SPECIES) of the species."""
        self.n_evaluations += points.shape[0]
        centered = (points - points.mean(dim=1, keepdim=True)) / LENGTH
        h = torch.tanh(centered @ self.points + species @ self.species)
        k = torch.tanh(h @ self.own + 0.1 * h.sum(dim=1, keepdim=True) @ self.pooled)
        return (k @ self.energy).sum(dim=(1, 2)), k @ self.vector


def by_size(batch: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Structures with the same number of atoms: their numbers (b,), and their rows (b, n), at most `CHUNK` at once."""
    ptr = batch[keys.PTR]
    counts = ptr.diff()
    for n in counts.unique().tolist():
        for chosen in (counts == n).nonzero()[:, 0].split(CHUNK):
            yield chosen, ptr[chosen][:, None] + torch.arange(n)


class Clouds(torch.nn.Module):
    """A model of dense clouds as a model of batches.

    A subclass has a `network`, and `evaluate`, which returns energies (b,) and vectors (b, n, 3) or None.
    """

    #: Whether there are vectors.
    has_vectors = True

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network as it is."""
        return self.network(points, species)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        pos = batch[keys.POS]
        features = species_features(batch[keys.Z], pos.dtype)
        order, energies, rows, vectors = [], [], [], []
        for chosen, atoms in by_size(batch):
            energy, vector = self.evaluate(pos[atoms], features[atoms])
            order.append(chosen)
            energies.append(energy)
            if vector is not None:
                rows.append(atoms.flatten())
                vectors.append(vector.reshape(-1, 3))
        out = {"energy": torch.cat(energies)[torch.argsort(torch.cat(order))]}
        if vectors:
            out["vector"] = torch.cat(vectors)[torch.argsort(torch.cat(rows))]
        return out


class WithGradient(torch.nn.Module):
    """The energy of a model and minus its derivative by the positions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Data) -> dict[str, Tensor]:
        pos = batch[keys.POS].detach().clone().requires_grad_(True)
        work = batch.clone()
        work[keys.POS] = pos
        with torch.enable_grad():
            energy = self.model(work)["energy"]
            (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return {"energy": energy.detach(), "forces": -gradient}
