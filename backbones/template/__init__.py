"""A template: copy this file into a package of your own and replace the network.

Status: experimental. Maintainer: you. License: that of the code or library that you wrap; say it here, together with
the reference of the model and where its weights come from.

1. Copy this file as ``my_package/__init__.py``; it imports nothing of its surroundings.
2. Replace `Network` by your own, or by a call of your library. Import the library in *this* file and in none that it is
   not needed for: adapters are imported when they are loaded, never when they are listed.
3. Register it in your ``pyproject.toml``, under a name of your choice, which `Template.adapter` repeats::

       [project.entry-points."symmetrize.backbones"]
       template = "my_package:load"

   ``symmetrize.load_backbone("template")`` then finds it. An adapter inside torch-symmetrize is a folder like this one
   and an entry of ``ADAPTERS`` in ``backbones/__init__.py`` instead, with what pip has to install as ``requires``.
4. ``symmetrize.testing.check_backbone(load())`` measures everything that a backbone promises; run it in a test.

For a network that only has to be evaluated here and now, `symmetrize.wrapping.wrap` does without any of this.
"""

# No "from __future__ import annotations" here: TorchScript could not read the type of a buffer.
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import edge_vectors
from symmetrize.errors import DeclarationError, UnknownSpeciesError
from symmetrize.representations import OutputSpec

__all__ = ["Network", "Template", "load", "rebuild"]


class Network(torch.nn.Module):
    """What is wrapped: plain tensors in and out, nothing about batches, rotations or frames.

    Here: random features of edge vectors, summed over the neighbors of each atom, and an energy from the sums.
    ``torch.jit.script`` accepts it, which exports to simulation engines need; if yours is not accepted, leave out
    `Template.scriptable`, and everything but the export works.

    Parameters
    ----------
    species : sequence of int
        Atomic numbers that it knows.
    cutoff : float
        Where edges have faded out.
    width : int
        Number of features.
    """

    number_to_index: Tensor

    def __init__(self, species: Sequence[int], cutoff: float, width: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.neighbor = torch.nn.Embedding(len(species), width)
        self.center = torch.nn.Embedding(len(species), width)
        self.edge = torch.nn.Linear(3, width)
        self.energy = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 1))
        index = torch.zeros(119, dtype=torch.int64)
        index[torch.tensor(list(species))] = torch.arange(len(species))
        self.register_buffer("number_to_index", index, persistent=False)

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
        """Energies of the atoms in ``center``; the arguments are those of `symmetrize.Backbone.scriptable`."""
        species = self.number_to_index[z]
        # Edge vectors, and not differences of positions: a neighbor may be the image of an atom in another cell.
        length = torch.linalg.vector_norm(edge_vec, dim=1)
        # Everything has to fade out smoothly towards the cutoff, or energies jump when an atom crosses it.
        fade = torch.where(length < self.cutoff, 0.5 + 0.5 * torch.cos(math.pi * length / self.cutoff), length * 0.0)
        messages = (fade**3)[:, None] * torch.tanh(self.edge(edge_vec)) * self.neighbor(species[edge_index[0]])
        hidden = self.center(species)
        hidden = hidden.index_add(0, edge_index[1], messages)
        return {"energy": self.energy(hidden[center])[:, 0]}

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        """Composition energies per atom, in float64: here there are none."""
        empty: dict[str, Tensor] = {}
        return empty


class Template(Backbone):
    """The adapter: declarations, and a `forward` that takes the batch apart.

    Parameters
    ----------
    species : sequence of int
    cutoff : float
        In the unit of the positions.
    width : int
    """

    #: The name that it is registered under; with `describe` and `rebuild` a symmetrized model can be saved.
    adapter = "template"

    def __init__(self, species: Sequence[int] = (1, 6, 7, 8), cutoff: float = 4.0, width: int = 16) -> None:
        if not species or any(not 0 < z < 119 for z in species):
            raise DeclarationError(f"species: expected atomic numbers, got {tuple(species)}")
        super().__init__(
            # How each output transforms, what it belongs to, how it is reduced, its unit.
            outputs={"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")},
            # The neighbor list that comes with every batch; None if the network reads none.
            cutoff=cutoff,
            # Rounds of message passing: 1 is strictly local. None if a row depends on the whole structure.
            receptive_field=1,
            # Further inputs that rotate, such as velocities: vectors={"velocity": "1o"}.
        )
        self.species = tuple(species)
        self.width = width
        self.network = Network(self.species, cutoff, width)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Outputs in the orientation given: rows of ``center_mask``, or of all atoms where it is absent."""
        z, edge_vec = batch[keys.Z], batch.get(keys.EDGE_VEC)
        known = torch.isin(z, torch.tensor(self.species, device=z.device))
        if not bool(known.all()):
            raise UnknownSpeciesError(f"z: expected species among {self.species}, got {int(z[~known][0])}")
        mask = batch.get(keys.CENTER_MASK)
        center = torch.ones_like(z, dtype=torch.bool) if mask is None else mask
        return self.network(
            batch[keys.POS],
            z,
            batch[keys.BATCH],
            int(batch[keys.PTR].shape[0] - 1),
            batch[keys.EDGE_INDEX],
            batch[keys.CELL_SHIFT],
            edge_vectors(batch) if edge_vec is None else edge_vec,
            center,
        )

    def describe(self) -> dict[str, Any]:
        """What `rebuild` needs; everything in it has to be JSON."""
        return {"species": list(self.species or ()), "cutoff": self.cutoff, "width": self.width}

    def scriptable(self) -> torch.nn.Module:
        """The network itself: it has the signature that exports expect, and shares its parameters with this."""
        return self.network


def load(seed: int = 0, **options: Any) -> Template:
    """What ``symmetrize.load_backbone("template", ...)`` returns: here a random network in float64.

    A real adapter loads weights here, from safetensors rather than from pickles.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Template(**options).double().eval()


def rebuild(description: dict[str, Any]) -> Template:
    """The network of a description, before its parameters are loaded."""
    return Template(**description)
