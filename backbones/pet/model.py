"""`PET`: the adapter between batches and the network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.data import edge_vectors, refuse_unknown_species
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.ops.ragged import segment_sum

from .conditioning import read_condition
from .config import PETConfig
from .edges import drop_edges, find, needed_atoms, reverse_edges
from .geometry import Geometry, inverse_volumes, species_rows
from .network import PETNetwork
from .repulsion import Repulsion
from .scriptable import ScriptablePET, assemble, carries_composition, compositions, layout_of
from .storage import save_model


class PET(Backbone):
    """Point Edge Transformer (arXiv:2305.19302) with the architecture of metatrain.

    ``energy`` is a contribution per atom, in eV for lengths in angstrom, without the composition's part, which
    `baseline` returns; other outputs are what the configuration lists.

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
    factor, offset : Tensor of shape (n_species, n_components), float64
        The same for every component of every output, in the order of ``config.outputs``: what is multiplied by
        (besides ``scale``) and, in `baseline`, added for an atom of each species.
    """

    shares_work = True

    cache_rows: Mapping[str, str] = {
        "species": "atom",
        "condition": "atom",
        "inverse_volume": "atom",
        "neighbor_species": "edge",
        "edge_scalars": "edge",
        "repulsion": "edge",
        "source": "graph",
        "target": "graph",
        "center": "graph",
        "reverse": "graph",
    }

    adapter = "pet"

    scale: Tensor
    composition: Tensor
    factor: Tensor
    offset: Tensor
    species_row: Tensor
    repulsion: Repulsion | None

    def __init__(self, config: PETConfig, *, seed: int = 0, metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(config, PETConfig):
            raise InvalidTypeError(f"config: expected a PETConfig, got {type(config).__name__}")
        repulsion = None if config.zbl is None else Repulsion(config.atomic_types, config.zbl)
        super().__init__(
            outputs={target.name: target.spec for target in config.outputs},
            cutoff=config.cutoff if config.zbl is None else max(config.cutoff, 2.0 * max(config.zbl)),
            receptive_field=config.receptive_field,
        )
        self.config = config
        self.species = tuple(config.atomic_types)
        self.metadata = dict(metadata or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PETNetwork(config)
        self.geometry = Geometry(config)
        self.repulsion = repulsion
        n_species, n_components = len(config.atomic_types), sum(target.width for target in config.outputs)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("composition", torch.zeros(n_species, dtype=torch.float64))
        self.register_buffer("factor", torch.ones(n_species, n_components, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros(n_species, n_components, dtype=torch.float64))
        row = torch.full((max(config.atomic_types) + 1,), -1, dtype=torch.int64)
        row[list(config.atomic_types)] = torch.arange(n_species)
        self.register_buffer("species_row", row, persistent=False)
        self._layout = layout_of(config)

    @property
    def oriented_field(self) -> int:
        """Hops over which an atom's output depends on the directions of edges: what a rotated copy has to hold.

        An adaptive cutoff reaches one hop further, but through distances only, which `prepare` has read.
        """
        return self.config.oriented_field

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PET:
        # Energies of -4000 eV do not survive float32: the dtype of these is not the dtype of the network.
        exact = {name: getattr(self, name) for name in ("scale", "composition", "factor", "offset")}
        tables = {} if self.repulsion is None else dict(self.repulsion.named_buffers())
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(device=getattr(self, name).device))
        for name, value in tables.items():
            setattr(self.repulsion, name, value.to(device=self.scale.device))
        return self

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """Composition parts of the outputs of the atoms (those that have one), float64."""
        mask = batch.get(keys.CENTER_MASK)
        species = self._species(batch)
        return compositions(
            self._layout,
            self.baseline_names(),
            species if mask is None else species[mask],
            self.composition,
            self.offset,
        )

    def baseline_names(self) -> list[str]:
        """Outputs that have a composition part."""
        names = []
        for part in self._layout:
            given = self.offset[:, part.column : part.column + part.stop - part.start]
            if carries_composition(part) or bool(given.any()):
                names.append(part.name)
        return names

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` and the other outputs of every wanted atom."""
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
        length = torch.linalg.vector_norm(edge_vec.to(self._precision(edge_vec)), dim=1)
        mask = batch.get(keys.CENTER_MASK)
        cache = {
            "species": species,
            "neighbor_species": species.index_select(0, source),
            "source": source,
            "target": target,
            "center": torch.ones_like(species, dtype=torch.bool) if mask is None else mask,
            "edge_scalars": self.geometry(length, source, target, n_atoms),
        }
        if self.repulsion is not None:
            cache["repulsion"] = self.repulsion(length, species.index_select(0, target), cache["neighbor_species"])
        if any(target.per_volume for target in self.config.outputs):
            cache["inverse_volume"] = self._inverse_volume(batch)
        if self.network.system_conditioning is not None:
            cache["condition"] = read_condition(batch, self.network.system_conditioning)
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
        species, condition = cache["species"], cache.get("condition")
        scalars, neighbors = cache["edge_scalars"], cache["neighbor_species"]
        pairs, inverse_volume, reverse = cache.get("repulsion"), cache.get("inverse_volume"), cache["reverse"]
        if copies is None:
            source, target, center = cache["source"], cache["target"], cache["center"]
        else:
            edge, target, center, source = copies.edge, copies.target, copies.center, copies.source
            if self.network.n_exchanges > 0:
                n_edges = cache["target"].shape[0]
                partner = reverse.index_select(0, edge)
                first = copies.edge_copy * n_edges
                wanted = torch.where(partner < 0, partner, first + partner)
                reverse = find(first + edge, wanted, torch.arange(edge.shape[0], device=edge.device))
        everything = bool(center.all())
        # Of the edges of a copy: a center alone feels none.
        repulsion = None if pairs is None else segment_sum(pairs, target, species.shape[0])
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
        visible = scalars[:, 1] > 0.0
        if not bool(visible.all()):  # a skin, an adaptive cutoff: edges of weight zero are those of no edge at all
            edge_vec, scalars, neighbors, source, target, reverse = drop_edges(
                visible, edge_vec, scalars, neighbors, source, target, reverse
            )
        values = self.network(
            edge_vec.to(self.dtype),
            scalars.to(self.dtype),
            neighbors,
            species,
            source,
            target,
            reverse,
            center,
            condition,
        )
        factor = (self.scale * self.factor).to(self.dtype)
        return assemble(
            values,
            self._layout,
            factor.index_select(0, species if everything else species[center]),
            repulsion if repulsion is None or everything else repulsion[center],
            inverse_volume if inverse_volume is None or everything else inverse_volume[center],
        )

    def compilable(self) -> list[torch.nn.Module]:
        """The transformers, which work on rectangles of atoms and tokens; lists of edges stay outside."""
        return [block.trans for block in self.network.gnn_layers]  # type: ignore[misc]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json``, each at once or not at all."""
        save_model(self, path)

    def describe(self) -> dict[str, Any]:
        """Configuration and metadata; `rebuild` makes the model again, but for its parameters."""
        return {"config": self.config.to_dict(), "metadata": self.metadata}

    def scriptable(self) -> torch.nn.Module:
        """See `Backbone.scriptable` and `ScriptablePET`.

        Raises
        ------
        DeclarationError
            For a model that reads charges and multiplicities, which engines do not pass on.
        """
        if self.network.system_conditioning is not None:
            raise DeclarationError(
                "PET: cannot be exported: this model reads the charge and the spin multiplicity of each structure "
                "(system_conditioning), for which the exported form has no inputs"
            )
        return ScriptablePET(self)

    def _species(self, batch: Data) -> Tensor:
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("batch: expected a field 'z' with atomic numbers, got none")
        row = species_rows(z, self.species_row)
        refuse_unknown_species(batch, row, self.config.atomic_types)
        return row

    def _precision(self, given: Tensor) -> torch.dtype:
        # Lengths and cutoffs are those of the positions: a narrow network gets them rounded once, at the end.
        return given.dtype if self.dtype in (torch.bfloat16, torch.float16) else self.dtype

    def _inverse_volume(self, batch: Data) -> Tensor:
        n_atoms = batch[keys.Z].shape[0]
        cell = batch.get(keys.CELL)
        if cell is None:
            return torch.zeros(n_atoms, dtype=self.dtype, device=batch[keys.Z].device)
        structure = batch.get(keys.BATCH)
        # Without all three directions there is no volume to divide by, whatever box a structure is in.
        pbc = batch.get(keys.PBC)
        cell = cell if pbc is None else cell * pbc[:, :, None]
        values = inverse_volumes(cell.to(self._precision(cell)))
        return values.expand(n_atoms) if structure is None else values.index_select(0, structure)

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
