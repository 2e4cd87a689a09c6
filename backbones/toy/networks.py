"""`ToyLocal` and `ToyGlobal`: sines of random projections of vectors, mixed by random matrices.

A sine of ``w . r`` contains all degrees up to about ``|w| |r|``. Frequencies are such that this is 6 at the typical
length, so that the outputs vary quickly, strongly and nonlinearly with orientation; no choice of axes is special.
Everything is infinitely differentiable.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import edge_vectors
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.switches import smooth_cutoff
from symmetrize.representations import OutputSpec

_DEGREE = 6.0


def _energy() -> dict[str, OutputSpec]:
    return {"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")}


class _Random:
    """Random parameters of a network, from a seed of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int, scale: float) -> torch.nn.Parameter:
        values = torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)
        return torch.nn.Parameter(scale * values)

    def directions(self, columns: int, longest: float) -> torch.nn.Parameter:
        """Random vectors of lengths spread evenly up to ``longest``, as columns."""
        values = torch.randn(3, columns, generator=self.generator, dtype=torch.float64)
        lengths = torch.linspace(longest / columns, longest, columns, dtype=torch.float64)
        return torch.nn.Parameter(values / values.norm(dim=0) * lengths)


def _species(batch: Data, like: Tensor, n_atoms: int, width: int) -> Tensor:
    """Features of each species, distinct for all atomic numbers: Tensor of shape (n_atoms, width)."""
    z = batch.get(keys.Z)
    number = like.new_zeros(n_atoms) if z is None else z.to(like.dtype)
    rates = torch.arange(1, width + 1, dtype=like.dtype, device=like.device) * 0.61803398875
    return torch.cos(number[:, None] * rates + rates)


def _structures(batch: Data) -> tuple[Tensor, int]:
    n_atoms = batch[keys.POS].shape[0]
    structure = batch.get(keys.BATCH)
    if structure is None:
        return torch.zeros(n_atoms, dtype=torch.int64, device=batch[keys.POS].device), 1
    ptr = batch.get(keys.PTR)
    if ptr is not None:
        return structure, ptr.shape[0] - 1
    return structure, int(structure.max()) + 1 if n_atoms else 0


class _Toy(Backbone):
    """Readout shared by both: linear maps of the features of atoms to any outputs."""

    adapter = "toy"
    options: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        return {**self.options, "outputs": {name: asdict(spec) for name, spec in self.outputs.items()}}

    def _add_readout(self, random: _Random, width: int) -> None:
        self.readout = torch.nn.ParameterDict(
            {name: random.matrix(width, math.prod(spec.shape), width**-0.5) for name, spec in self.outputs.items()}
        )

    def _read_out(self, features: Tensor, batch: Data) -> dict[str, Tensor]:
        mask = batch.get(keys.CENTER_MASK)
        out = {}
        for name, spec in self.outputs.items():
            values = features @ self.readout[name].to(features.dtype)
            if spec.per == "structure":
                values = segment_sum(values, *_structures(batch))
            elif mask is not None:
                values = values[mask]
            out[name] = values.reshape((values.shape[0],) + tuple(spec.shape))
        return out


class ToyLocal(_Toy):
    """Random message passing over neighbors; nothing but `forward`.

    Parameters
    ----------
    outputs : dict of str to OutputSpec, optional
        Any outputs; by default an energy.
    cutoff : float
        Neighbors fade out smoothly over the whole range up to here.
    n_hops : int
        Rounds of message passing, which is the receptive field; at least 1.
    seed : int
    width : int
        Number of features.
    """

    def __init__(
        self,
        outputs: dict[str, OutputSpec] | None = None,
        cutoff: float = 4.0,
        n_hops: int = 1,
        seed: int = 0,
        width: int = 16,
    ) -> None:
        if isinstance(n_hops, bool) or not isinstance(n_hops, int) or n_hops < 1:
            raise DeclarationError(f"n_hops: expected a positive integer, got {n_hops!r}")
        super().__init__(outputs=_energy() if outputs is None else outputs, cutoff=cutoff, receptive_field=n_hops)
        self.options = {"kind": "local", "cutoff": cutoff, "n_hops": n_hops, "seed": seed, "width": width}
        random = _Random(seed)
        self.width = width
        # Half the cutoff is the typical length of an edge.
        self.waves = torch.nn.ParameterList([random.directions(width, 2.0 * _DEGREE / cutoff) for _ in range(n_hops)])
        self.from_neighbor = torch.nn.ParameterList([random.matrix(width, width, width**-0.5) for _ in range(n_hops)])
        self.from_center = torch.nn.ParameterList([random.matrix(width, width, width**-0.5) for _ in range(n_hops)])
        self.mixing = torch.nn.ParameterList([random.matrix(2 * width, width, width**-0.5) for _ in range(n_hops)])
        self._add_readout(random, width)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Outputs in the orientation given."""
        if batch.get(keys.EDGE_INDEX) is None:
            raise InvalidInputError(
                "batch: expected a neighbor list in 'edge_index', got none; from_ase(..., cutoff=...) builds one"
            )
        source, target = batch[keys.EDGE_INDEX]
        vectors = batch.get(keys.EDGE_VEC)
        vectors = edge_vectors(batch) if vectors is None else vectors
        n_atoms = batch[keys.POS].shape[0]
        radius = float(self.cutoff or 0.0)
        weight = smooth_cutoff(vectors.norm(dim=1), radius, radius)[:, None]
        species = _species(batch, vectors, n_atoms, self.width)
        features = species
        for wave, neighbor, center, mixing in zip(
            self.waves, self.from_neighbor, self.from_center, self.mixing, strict=True
        ):
            phase = (features @ neighbor.to(vectors.dtype))[source] + (features @ center.to(vectors.dtype))[target]
            messages = segment_sum(weight * torch.sin(vectors @ wave.to(vectors.dtype) + phase), target, n_atoms)
            features = torch.tanh(torch.cat([features, messages], dim=1) @ mixing.to(vectors.dtype))
        return self._read_out(features, batch)


class ToyGlobal(_Toy):
    """Random network on all positions relative to the centroid of the structure; it reads no neighbor list.

    Parameters
    ----------
    outputs : dict of str to OutputSpec, optional
        Any outputs; by default an energy.
    seed : int
    width : int
        Number of features.
    length : float
        Typical distance of an atom from the centroid.
    """

    def __init__(
        self, outputs: dict[str, OutputSpec] | None = None, seed: int = 0, width: int = 16, length: float = 1.5
    ) -> None:
        super().__init__(outputs=_energy() if outputs is None else outputs, cutoff=None, receptive_field=None)
        self.options = {"kind": "global", "seed": seed, "width": width, "length": length}
        random = _Random(seed)
        self.width = width
        self.length = length
        self.waves = random.directions(width, _DEGREE / length)
        self.own = random.matrix(width, width, width**-0.5)
        self.pooled = random.matrix(width, width, width**-0.5)
        self.second = random.matrix(width, width, width**-0.5)
        self._add_readout(random, width)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Outputs in the orientation given."""
        pos = batch[keys.POS]
        structure, n_structures = _structures(batch)
        ones = torch.ones_like(pos[:, :1])
        count = segment_sum(ones, structure, n_structures)
        centered = pos - (segment_sum(pos, structure, n_structures) / count)[structure]
        species = _species(batch, pos, pos.shape[0], self.width)
        # Fades slowly with the distance, so that large structures stay bounded; even in the distance, hence smooth.
        fade = torch.exp(-centered.square().sum(dim=1, keepdim=True) / (8.0 * self.length**2))
        local = torch.sin(centered @ self.waves.to(pos.dtype) + species)
        pooled = segment_sum(fade * local, structure, n_structures)
        mixed = local @ self.own.to(pos.dtype) + (pooled @ self.pooled.to(pos.dtype))[structure]
        features = torch.tanh(torch.tanh(mixed) @ self.second.to(pos.dtype) + local)
        return self._read_out(features, batch)
