"""What trained networks of interatomic energies have in common: a unit, energies of the composition, files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.representations import OutputSpec
from symmetrize.weights import save_described

from .species import SpeciesTable

#: Of the files.
VERSION = 1


class EnergyNetwork(Backbone):
    """Base class of networks whose ``energy`` is a contribution per atom, without the composition's part (`baseline`).

    Parameters
    ----------
    atomic_types : tuple of int
        Species, as atomic numbers.
    network : callable
        Makes the network; called with a seeded global generator, which is restored.
    config : dict
        JSON-serialisable, of the architecture.
    seed : int
    metadata : dict, optional
        Free-form, JSON-serialisable provenance that is saved along, such as the training recipe.
    cutoff, receptive_field
        See `symmetrize.Backbone`.

    Attributes
    ----------
    scale : Tensor of shape (), float64
        Unit of the network's outputs: they are multiplied by it.
    composition : Tensor of shape (n_species,), float64
        Energy of an atom of each species, in the order of ``atomic_types``.
    """

    #: Name of its files' format.
    format: str

    scale: Tensor
    composition: Tensor

    def __init__(
        self,
        atomic_types: tuple[int, ...],
        network: Callable[[], torch.nn.Module],
        config: dict[str, Any],
        *,
        seed: int,
        metadata: dict[str, Any] | None,
        cutoff: float | None,
        receptive_field: int | None,
    ) -> None:
        outputs = {"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")}
        super().__init__(outputs=outputs, cutoff=cutoff, receptive_field=receptive_field)
        self.species = atomic_types
        self.metadata = dict(metadata or {})
        self._config = dict(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = network()
        self.table = SpeciesTable(atomic_types)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("composition", torch.zeros(len(atomic_types), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnergyNetwork:
        # Total energies do not survive float32: the dtype of these two is not the dtype of the network.
        exact = {"scale": self.scale, "composition": self.composition}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(device=getattr(self, name).device))
        return self

    def scaled(self, batch: Data, energy: Tensor) -> dict[str, Tensor]:
        """Numbers of the network as ``energy`` of every wanted atom."""
        energy = energy * self.scale.to(self.dtype)
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energy if mask is None else energy[mask]}

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """Composition energies of the atoms, float64."""
        energies = self.composition[self.table.of_batch(batch)]
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energies if mask is None else energies[mask]}

    def describe(self) -> dict[str, Any]:
        return dict(self._config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json``, each at once or not at all."""
        save_described(
            path,
            self,
            format=self.format,
            version=VERSION,
            dtype=self.dtype,
            config=self._config,
            metadata=self.metadata,
        )
