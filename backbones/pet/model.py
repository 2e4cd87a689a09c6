"""`PET`: the adapter between batches and the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.data import edge_vectors
from symmetrize.errors import InvalidInputError, InvalidTypeError, UnknownSpeciesError
from symmetrize.representations import OutputSpec

from .config import PETConfig
from .edges import cutoff_weights, find, needed_atoms, reverse_edges
from .network import PETNetwork
from .storage import save_model


class PET(Backbone):
    """Point Edge Transformer (arXiv:2305.19302) with the architecture of metatrain.

    ``energy`` is a contribution per atom, in eV for lengths in angstrom, without the composition's part, which
    `baseline` returns.

    Parameters
    ----------
    config : PETConfig
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

    shares_work = True

    scale: Tensor
    composition: Tensor
    species_row: Tensor

    def __init__(self, config: PETConfig, *, seed: int = 0, metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(config, PETConfig):
            raise InvalidTypeError(f"config: expected a PETConfig, got {type(config).__name__}")
        outputs = {"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")}
        if config.direct_forces:
            outputs["non_conservative_forces"] = OutputSpec("1o", per="atom", unit="eV/A")
        super().__init__(outputs=outputs, cutoff=config.cutoff, receptive_field=config.receptive_field)
        self.config = config
        self.species = tuple(config.atomic_types)
        self.metadata = dict(metadata or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PETNetwork(config)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("composition", torch.zeros(len(config.atomic_types), dtype=torch.float64))
        row = torch.full((max(config.atomic_types) + 1,), -1, dtype=torch.int64)
        row[list(config.atomic_types)] = torch.arange(len(config.atomic_types))
        self.register_buffer("species_row", row, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PET:
        # Energies of -4000 eV do not survive float32: the dtype of these two is not the dtype of the network.
        exact = {"scale": self.scale, "composition": self.composition}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(device=getattr(self, name).device))
        return self

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """Composition energies of the atoms, float64."""
        energies = self.composition.index_select(0, self._species(batch))
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energies if mask is None else energies[mask]}

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` of every wanted atom (and ``non_conservative_forces``)."""
        edge_vec = _edge_vec(batch)
        return self.forward_frames(self._prepare(batch, edge_vec), edge_vec)

    def prepare(self, batch: Data) -> dict[str, Tensor]:
        """Species, lengths, cutoffs and reverse edges; lengths keep their gradient."""
        return self._prepare(batch, _edge_vec(batch))

    def _prepare(self, batch: Data, edge_vec: Tensor) -> dict[str, Tensor]:
        species = self._species(batch)
        n_atoms = species.shape[0]
        source, target = batch[keys.EDGE_INDEX]
        if edge_vec.shape != (target.shape[0], 3):
            raise InvalidInputError(f"edge_vec: expected shape ({target.shape[0]}, 3), got {tuple(edge_vec.shape)}")
        length = torch.linalg.vector_norm(edge_vec.to(self.dtype), dim=1)
        weight, log_weight = cutoff_weights(
            length, self.config.cutoff, self.config.cutoff_width, self.config.cutoff_function
        )
        mask = batch.get(keys.CENTER_MASK)
        cache = {
            "species": species,
            "neighbor_species": species.index_select(0, source),
            "source": source,
            "target": target,
            "center": torch.ones_like(species, dtype=torch.bool) if mask is None else mask,
            "edge_scalars": torch.stack([length, weight, log_weight], dim=1),
        }
        if self.network.n_exchanges > 0:
            shift = batch.get(keys.CELL_SHIFT)
            shift = source.new_zeros(source.shape[0], 3) if shift is None else shift
            reverse = reverse_edges(source, target, shift, n_atoms)
            self._check_reverse(cache, reverse)
            cache["reverse"] = reverse
        else:
            cache["reverse"] = source[:0]
        return cache

    def forward_frames(
        self, cache: dict[str, Tensor], edge_vec: Tensor, copies: Copies | None = None
    ) -> dict[str, Tensor]:
        """Outputs of copies of what was prepared; see `Backbone.forward_frames`."""
        if copies is None:
            species, scalars, neighbors = cache["species"], cache["edge_scalars"], cache["neighbor_species"]
            source, target, reverse, center = cache["source"], cache["target"], cache["reverse"], cache["center"]
        else:
            edge, target, center, source = copies.edge, copies.target, copies.center, copies.source
            species = cache["species"].index_select(0, copies.atom)
            scalars = cache["edge_scalars"].index_select(0, edge)
            neighbors = cache["neighbor_species"].index_select(0, edge)
            reverse = cache["reverse"]
            if self.network.n_exchanges > 0:
                n_edges = cache["target"].shape[0]
                partner = reverse.index_select(0, edge)
                first = copies.edge_copy * n_edges
                wanted = torch.where(partner < 0, partner, first + partner)
                reverse = find(first + edge, wanted, torch.arange(edge.shape[0], device=edge.device))
        if bool((target[1:] < target[:-1]).any()):
            order = torch.argsort(target, stable=True)
            edge_vec, scalars, neighbors = edge_vec[order], scalars[order], neighbors[order]
            target = target[order]
            source = source[order] if source.shape[0] else source
            if self.network.n_exchanges > 0:
                number = torch.empty_like(order)
                number[order] = torch.arange(order.shape[0], device=order.device)
                partner = reverse[order]
                reverse = torch.where(partner < 0, partner, number[partner.clamp(min=0)])
        values = self.network(edge_vec.to(self.dtype), scalars, neighbors, species, source, target, reverse, center)
        scale = self.scale.to(self.dtype)
        return {name: value.reshape((-1,) + self.outputs[name].shape) * scale for name, value in values.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json``, each at once or not at all."""
        save_model(self, path)

    def _species(self, batch: Data) -> Tensor:
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("batch: expected a field 'z' with atomic numbers, got none")
        z = z.to(torch.int64)
        last = self.species_row.shape[0] - 1
        row = torch.where((z < 0) | (z > last), torch.full_like(z, -1), self.species_row[z.clamp(0, last)])
        unknown = torch.nonzero(row < 0).view(-1)
        if unknown.shape[0]:
            atom = int(unknown[0])
            structure, first = 0, 0
            if batch.get(keys.BATCH) is not None:
                structure = int(batch[keys.BATCH][atom])
                first = int(torch.searchsorted(batch[keys.BATCH].contiguous(), structure))
            raise UnknownSpeciesError(
                f"z: structure {structure}, atom {atom - first}: expected one of the species "
                f"{list(self.config.atomic_types)} that this model was built for, got {int(z[atom])}"
            )
        return row

    def _check_reverse(self, cache: dict[str, Tensor], reverse: Tensor) -> None:
        source, target = cache["source"], cache["target"]
        if reverse.shape[0] == 0 or bool((reverse >= 0).all()):
            return
        if int(reverse[0]) == -2:
            raise InvalidInputError(
                "edge_index: expected edges that differ in atoms or in cell_shift, got the same edge twice (is "
                "cell_shift missing?)"
            )
        # Without its reverse an edge is only good for atoms that nothing wanted depends on.
        masks = needed_atoms(cache["center"], source, target, self.network.n_exchanges)
        lost = torch.nonzero((reverse < 0) & masks[1].index_select(0, target)).view(-1)
        if lost.shape[0]:
            edge = int(lost[0])
            raise InvalidInputError(
                f"edge_index: expected a full neighbor list, in which every edge has its reverse; edge {edge} from "
                f"atom {int(source[edge])} to atom {int(target[edge])} has none"
            )


def _edge_vec(batch: Data) -> Tensor:
    if batch.get(keys.EDGE_INDEX) is None:
        raise InvalidInputError("batch: expected a neighbor list in 'edge_index', got none")
    given = batch.get(keys.EDGE_VEC)
    return edge_vectors(batch) if given is None else given
