"""`PET` without batches: a module of plain tensors for TorchScript, and outputs as parts of readouts."""

# No "from __future__ import annotations" here: TorchScript cannot read the fields of a NamedTuple through it.
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import PETConfig
from .edges import drop_edges, reverse_edges
from .geometry import inverse_volumes, species_rows

if TYPE_CHECKING:
    from .model import PET


class Part(NamedTuple):
    """Where an output is found in the readouts.

    Attributes
    ----------
    name : str
        Name of the output.
    readout : str
    start, stop : int
        Its components in the readout.
    column : int
        Its first component in ``factor``.
    shape : list of int
        Of a row, -1 in front.
    per_volume, repelled : bool
        Whether it is divided by the volume and made symmetric, and whether the repulsion is added.
    """

    name: str
    readout: str
    start: int
    stop: int
    column: int
    shape: list[int]
    per_volume: bool
    repelled: bool


def layout_of(config: PETConfig) -> list[Part]:
    """Parts of all outputs."""
    parts: list[Part] = []
    column = 0
    taken: dict[str, int] = {}
    for target in config.outputs:
        start = taken.get(target.readout, 0)
        stop = taken[target.readout] = start + target.width
        repelled = config.zbl is not None and target.name == "energy"
        shape = [-1, *target.spec.shape]
        parts.append(Part(target.name, target.readout, start, stop, column, shape, target.per_volume, repelled))
        column += target.width
    return parts


def assemble(
    values: dict[str, Tensor],
    layout: list[Part],
    factor: Tensor,
    repulsion: Tensor | None,
    inverse_volume: Tensor | None,
) -> dict[str, Tensor]:
    """Outputs from readouts.

    Parameters
    ----------
    values : dict of str to Tensor of shape (n_centers, width)
    layout : list of Part
    factor : Tensor of shape (n_centers, n_components)
    repulsion, inverse_volume : Tensor of shape (n_centers,), optional
        Outputs per volume are left out where it is not given.
    """
    out: dict[str, Tensor] = {}
    for part in layout:
        if part.per_volume and inverse_volume is None:
            continue
        rows = values[part.readout][:, part.start : part.stop]
        rows = (rows * factor[:, part.column : part.column + part.stop - part.start]).reshape(part.shape)
        if part.per_volume and inverse_volume is not None:
            rows = 0.5 * (rows + rows.transpose(1, 2)) * inverse_volume[:, None, None]
        if part.repelled and repulsion is not None:
            rows = rows + repulsion
        out[part.name] = rows
    return out


def carries_composition(part: Part) -> bool:
    """Whether ``composition`` belongs to this output."""
    return part.name == "energy" and part.stop - part.start == 1


def compositions(
    layout: list[Part],
    names: list[str],
    species: Tensor,
    composition: Tensor,
    offset: Tensor,
) -> dict[str, Tensor]:
    """Composition parts of some outputs, for atoms of these species."""
    out: dict[str, Tensor] = {}
    for part in layout:
        if part.name in names:
            rows = offset[:, part.column : part.column + part.stop - part.start]
            if carries_composition(part):
                rows = rows + composition[:, None]
            out[part.name] = rows.index_select(0, species).reshape(part.shape)
    return out


class ScriptablePET(torch.nn.Module):
    """The function that a `PET` is, for ``torch.jit.script``; it shares the model's parameters and buffers."""

    layout: list[Part]
    scale: Tensor
    composition: Tensor
    factor: Tensor
    offset: Tensor
    species_row: Tensor

    def __init__(self, model: "PET") -> None:
        super().__init__()
        self.network = model.network
        self.geometry = model.geometry
        self.repulsion = model.repulsion
        for name in ("scale", "composition", "factor", "offset", "species_row"):
            self.register_buffer(name, getattr(model, name), persistent=name != "species_row")
        self.layout = layout_of(model.config)
        self.n_exchanges = model.config.n_exchanges
        self.with_baseline = list(model.baseline_names())

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
        cell: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of the atoms in ``center``, see `Backbone.scriptable`.

        Outputs per volume (``non_conservative_stress``) are there only if ``cell``, of shape (n_structures, 3, 3), is.
        """
        species = self.rows(z)
        n_atoms = species.shape[0]
        dtype = self.network.edge_embedder.weight.dtype
        source, target = edge_index[0], edge_index[1]
        edge_vec = edge_vec.to(dtype)
        length = torch.linalg.vector_norm(edge_vec, dim=1)
        scalars = self.geometry(length, source, target, n_atoms)
        neighbors = species.index_select(0, source)
        chosen = torch.nonzero(center).view(-1)
        repulsion: Tensor | None = None
        if self.repulsion is not None:
            pairs = self.repulsion(length, species.index_select(0, target), neighbors)
            atoms = torch.zeros(n_atoms, dtype=pairs.dtype, device=pairs.device).index_add(0, target, pairs)
            repulsion = atoms.index_select(0, chosen)
        inverse_volume: Tensor | None = None
        if cell is not None:
            volumes = inverse_volumes(cell.to(dtype))
            inverse_volume = volumes.index_select(0, structure).index_select(0, chosen)
        reverse = target[:0]
        if self.n_exchanges > 0:
            reverse = reverse_edges(source, target, cell_shift, n_atoms)
        visible = scalars[:, 1] > 0.0
        if not bool(visible.all()):
            edge_vec, scalars, neighbors, source, target, reverse = drop_edges(
                visible, edge_vec, scalars, neighbors, source, target, reverse
            )
        values = self.network(edge_vec, scalars, neighbors, species, source, target, reverse, center)
        factor = (self.scale * self.factor).to(dtype).index_select(0, species.index_select(0, chosen))
        return assemble(values, self.layout, factor, repulsion, inverse_volume)

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        """Composition parts of the outputs of atoms of these species: per atom, float64."""
        return compositions(self.layout, self.with_baseline, self.rows(z), self.composition, self.offset)

    def rows(self, z: Tensor) -> Tensor:
        species = species_rows(z, self.species_row)
        if bool((species < 0).any()):
            raise ValueError("z: expected species that this model was built for, got another one")
        return species
