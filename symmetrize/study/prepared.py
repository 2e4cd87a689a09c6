"""What a measure of a study gets: the models of one cell, and the structures to measure them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize.backbone import Backbone
from symmetrize.data import from_ase
from symmetrize.representations import OutputSpec
from symmetrize.symmetrizer import Symmetrizer


@dataclass(frozen=True, eq=False)
class PreparedCell:
    """One backbone, one method and one data set, ready to be measured.

    Attributes
    ----------
    model : Symmetrizer
        The backbone, symmetrised by the method, in evaluation mode.
    bare : Symmetrizer
        The same backbone without symmetrisation (`Identity`), in the scope of ``model``.
    backbone : Backbone
        That of both; its parameters require no gradient.
    structures : list of ase.Atoms
        Held out: no structure that the backbone was trained on by this study. Without calculators.
    references : dict of str to Tensor
        Reference values as rows of the output of that name, float64: per-structure outputs and sums have one row per
        structure, per-atom outputs one per atom; ``"forces"`` has shape (n_atoms, 3). Empty where the data has none.
    units : dict of str to str
        Unit of each reference; forces in eV/angstrom, energies in eV.
    outputs : dict of str to OutputSpec
        What the backbone declares.
    species : tuple of int
        Atomic numbers that the backbone knows; where it takes any, those of the structures.
    energy : str, optional
        The output that forces derive from; None where the backbone has none.
    seed : int
        Of everything that a measure draws.
    sizes : mapping of str to int or float
        Sizes of the measures as the configuration gives them; a measure has a default for each.
    dtype : torch.dtype
        Precision of parameters and positions.
    group : {"O(3)", "SO(3)"}
        The group that ``model`` averages over.
    """

    model: Symmetrizer
    bare: Symmetrizer
    backbone: Backbone
    structures: list[Atoms]
    references: dict[str, Tensor]
    outputs: dict[str, OutputSpec]
    species: tuple[int, ...]
    energy: str | None
    seed: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    group: str = "O(3)"

    def batch(self, n_structures: int | None = None) -> Batch:
        """The first structures (by default all) as one batch in the precision of the cell."""
        return from_ase(self.structures[:n_structures], dtype=self.dtype)
