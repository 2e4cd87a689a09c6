"""A small backbone with a scriptable form, for tests of exports: nothing about it is rotation-equivariant."""

# No "from __future__ import annotations" here: TorchScript reads the annotations.

import math

import torch
from torch import Tensor

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.representations import OutputSpec


class ToyNetwork(torch.nn.Module):
    """Messages along edges, a tanh after each round, linear readouts."""

    sizes: dict[str, list[int]]

    def __init__(self, cutoff: float, n_hops: int, width: int, sizes: dict[str, list[int]], seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64))

        self.n_hops, self.cutoff, self.sizes = n_hops, cutoff, sizes
        self.direction, self.mixing, self.species = matrix(3, width), matrix(width, width), matrix(120, width)
        self.readout = matrix(width, sum(math.prod(shape) for shape in sizes.values()))
        self.register_buffer("composition", -100.0 * torch.arange(120, dtype=torch.float64))

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
        h = self.species[z]
        x = torch.linalg.vector_norm(edge_vec, dim=1) / self.cutoff
        weight = torch.where(x < 1.0, (0.5 + 0.5 * torch.cos(math.pi * x)) ** 2, torch.zeros_like(x))
        for _ in range(self.n_hops):
            message = torch.tanh(edge_vec @ self.direction + 0.3 * h[edge_index[0]] @ self.mixing)
            h = h + torch.zeros_like(h).index_add(0, edge_index[1], message * weight[:, None])
        h = torch.tanh(h[center])
        values = h @ self.readout
        out: dict[str, Tensor] = {}
        start = 0
        for name, shape in self.sizes.items():
            count = 1
            for n in shape:
                count *= n
            stop = start + count
            out[name] = values[:, start:stop].reshape([values.shape[0]] + shape)
            start = stop
        return out

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        return {"energy": self.composition[z]}


class ScriptableToy(Backbone):
    """The network as a backbone."""

    species = (1, 6, 8)

    def __init__(
        self,
        cutoff: float = 2.5,
        n_hops: int = 1,
        width: int = 6,
        seed: int = 0,
        more: dict[str, OutputSpec] | None = None,
    ) -> None:
        energy = OutputSpec("0e", reduce="sum", unit="eV")
        super().__init__(outputs={"energy": energy, **(more or {})}, cutoff=cutoff, receptive_field=n_hops)
        self.network = ToyNetwork(
            cutoff, n_hops, width, {name: list(spec.shape) for name, spec in self.outputs.items()}, seed
        )

    def forward(self, batch):
        z, mask = batch[keys.Z], batch.get(keys.CENTER_MASK)
        center = torch.ones_like(z, dtype=torch.bool) if mask is None else mask
        return self.network(
            batch[keys.POS],
            z,
            batch[keys.BATCH],
            batch[keys.PTR].shape[0] - 1,
            batch[keys.EDGE_INDEX],
            batch[keys.CELL_SHIFT],
            batch[keys.EDGE_VEC],
            center,
        )

    def baseline(self, batch):
        energies = self.network.composition.to(torch.float64)[batch[keys.Z]]
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energies if mask is None else energies[mask]}

    def scriptable(self):
        return self.network
