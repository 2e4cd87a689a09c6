"""What the measures share: the models of a cell as subjects of the harness, and their error scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize.backbone import Backbone, Copies
from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, SymmetrizeError, did_you_mean
from symmetrize.frames import FrameMethod
from symmetrize.representations import OutputSpec
from symmetrize.study.measures.sizes import SIZES
from symmetrize.study.prepared import PreparedCell
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing import Measurement, Subject, error_scale, of_symmetrizer

#: What a study calls to measure one property of a cell: numbers, strings, None, and lists and dicts of them.
Measure = Callable[[PreparedCell], dict[str, Any]]


def size_of(cell: PreparedCell, name: str) -> int:
    """A size of the cell, or its default.

    Raises
    ------
    DeclarationError
        For an unknown name, or a value that is no number of at least 0.
    """
    if name not in SIZES:
        raise DeclarationError(f"sizes: unknown size {name!r}, {did_you_mean(name, SIZES)}")
    value = cell.sizes.get(name, SIZES[name])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DeclarationError(f"sizes.{name}: expected a number of at least 0, got {value!r}")
    return value


def generator_of(cell: PreparedCell) -> torch.Generator:
    """Random numbers of a measure: the same for every method and backbone of a study."""
    return torch.Generator().manual_seed(cell.seed)


def are_crystals(cell: PreparedCell) -> bool:
    """Whether the structures are crystals, and no molecules, be it in a periodic box."""
    return all(bool(atoms.pbc.all()) for atoms in cell.structures) and _is_connected(cell.structures[0])


def _is_connected(atoms: Atoms) -> bool:
    """Whether bonds join periodic images: twice as large a cell would hold eight times as many molecules."""
    counts = []
    for cell in (atoms, atoms.repeat(2)):
        bonds = neighbor_list("ij", cell, natural_cutoffs(cell, mult=1.3))
        adjacency = coo_array((np.ones(len(bonds[0])), bonds), shape=(len(cell), len(cell)))
        counts.append(connected_components(adjacency, directed=False)[0])
    return bool(counts[1] < 8 * counts[0])


class Interaction(Backbone):
    """A backbone without its baseline, which no orientation changes and which costs differences their last digits.

    Parameters
    ----------
    backbone : Backbone
    baseline : callable, optional
        What is left of it, if anything.
    """

    def __init__(self, backbone: Backbone, baseline: Callable[[Data], dict[str, Tensor]] | None = None) -> None:
        super().__init__(
            outputs=backbone.outputs,
            cutoff=backbone.cutoff,
            receptive_field=backbone.receptive_field,
            vectors=backbone.vectors,
        )
        self.backbone, self.rest = backbone, baseline
        self.shares_work, self.cache_rows = backbone.shares_work, backbone.cache_rows
        self.species = backbone.species
        # A new module is in training mode, and a Symmetrizer takes on the mode of its backbone.
        self.train(backbone.training)

    @property
    def oriented_field(self) -> int | None:
        return self.backbone.oriented_field

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        return {} if self.rest is None else self.rest(batch)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        return self.backbone(batch)

    def prepare(self, batch: Data) -> dict[str, Tensor]:
        return self.backbone.prepare(batch)

    def forward_frames(
        self, cache: dict[str, Tensor], edge_vec: Tensor, copies: Copies | None = None
    ) -> dict[str, Tensor]:
        return self.backbone.forward_frames(cache, edge_vec, copies)


def without_baseline(model: Symmetrizer, dtype: torch.dtype | None = None) -> Symmetrizer:
    """The model without composition energies, in another precision if wanted."""
    if dtype is not None and dtype != model.backbone.dtype:
        model = copy.deepcopy(model).to(dtype)
    method = model.method
    if method.auxiliary is not None:
        own, auxiliary = model.backbone, method.auxiliary

        def difference(batch: Data) -> dict[str, Tensor]:
            mine, other = own.baseline(batch), auxiliary.baseline(batch)
            return {
                name: _minus(other.get(name), mine.get(name)) for name in auxiliary.outputs if name in {*mine, *other}
            }

        method = _with_auxiliary(method, Interaction(auxiliary, difference))
    return Symmetrizer(
        Interaction(model.backbone), method, group=model.group, scope=model.scope, chunk_size=model.chunk_size
    ).eval()


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None:
        return -b if b is not None else torch.zeros(())
    return a if b is None else a - b


def _with_auxiliary(method: FrameMethod, auxiliary: Backbone) -> FrameMethod:
    """The method with another auxiliary model, and the same parameters."""
    other = copy.copy(method)
    other._modules = {**method._modules, "auxiliary": auxiliary}
    return other


@dataclass(frozen=True)
class Stage:
    """A cell, ready for the functions of `symmetrize.testing`.

    Attributes
    ----------
    model, bare : Subject
        Without composition energies.
    batch : Batch
        The first structures of the cell.
    outputs : dict of str to OutputSpec
        Those of the models on this batch, forces and stress included.
    scale : dict of str to float
        The error scale of every output, the same for all methods: that of the bare model.
    vectors : dict of str to str
    """

    model: Subject
    bare: Subject
    batch: Batch
    outputs: dict[str, OutputSpec]
    scale: dict[str, float]
    vectors: dict[str, str]


def stage(cell: PreparedCell, n_structures: int | None = None, *, double: bool = False) -> Stage:
    """Subjects, structures and error scales of a cell.

    Parameters
    ----------
    cell : PreparedCell
    n_structures : int, optional
        Of the batch; by default the size ``structures``, from which the error scale comes in any case.
    double : bool
        In float64, whatever the precision of the cell: for differences and derivatives.
    """
    dtype = torch.float64 if double else cell.dtype
    model, bare = (subject_of(cell, m, dtype) for m in (cell.model, cell.bare))
    common = max(1, size_of(cell, "structures"))
    batch = model.prepare(from_ase(cell.structures[:common], dtype=dtype))
    outputs = model.declared(batch)
    scale = {name: one.value for name, one in error_scale(bare.model, batch, outputs).items()}
    if n_structures is not None and n_structures != common:
        batch = model.prepare(from_ase(cell.structures[: max(1, n_structures)], dtype=dtype))
    outputs = {name: spec for name, spec in model.declared(batch).items() if name in outputs}
    return Stage(model, bare, batch, outputs, scale, dict(model.vectors))


def subject_of(cell: PreparedCell, model: Symmetrizer, dtype: torch.dtype | None = None) -> Subject:
    """A model of the cell as a subject of the harness, without composition energies."""
    options: dict[str, Any] = {"species": cell.species} if cell.species else {}
    return of_symmetrizer(
        without_baseline(model, dtype),
        forces=cell.energy is not None and "forces" not in model.backbone.outputs,
        energy=cell.energy or "energy",
        **options,
    )


def relative(found: Measurement) -> dict[str, float]:
    """The largest error of every output on the error scale."""
    return {name: deviation.relative for name, deviation in found.outputs.items()}


def refusal(error: SymmetrizeError) -> str:
    """What a method says that it cannot do, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
