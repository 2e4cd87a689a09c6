"""`SchNetBackbone`: torch-geometric's SchNet with our edges, a control that is invariant by construction."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn.models import SchNet

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, UnknownSpeciesError
from symmetrize.representations import OutputSpec

from .reference import edges_of

#: Arguments of the class, which it keeps as attributes of the same name.
_HYPERPARAMETERS = ("hidden_channels", "num_filters", "num_interactions", "num_gaussians", "cutoff")


class SchNetBackbone(Backbone):
    """SchNet (arXiv:1706.08566) as torch-geometric has it: one invariant number per structure.

    It sees lengths of edges only, so that averaging over frames changes nothing but the rounding. Its own neighbor
    list needs a compiled library and knows no cells: ours is passed in as its interaction graph. Its cutoff is a
    cosine, smooth once.

    Parameters
    ----------
    model : torch_geometric.nn.models.SchNet
        Without ``dipole``.

    Raises
    ------
    DeclarationError
        A SchNet of dipoles.
    """

    adapter = "schnet"
    species = tuple(range(1, 100))

    def __init__(self, model: SchNet) -> None:
        if not isinstance(model, SchNet):
            raise InvalidTypeError(f"model: expected torch_geometric.nn.models.SchNet, got {type(model).__name__}")
        if model.dipole:
            raise DeclarationError("model: expected energies, got dipole=True, which needs absolute positions")
        super().__init__(
            outputs={"energy": OutputSpec("0e", per="structure", unit="eV")},
            cutoff=float(model.cutoff),
            receptive_field=int(model.num_interactions),
        )
        self.model = model

    @classmethod
    def random(cls, *, seed: int = 0, **hyperparameters: Any) -> SchNetBackbone:
        """SchNet with random weights; further arguments are those of the class."""
        for name in hyperparameters:
            if name not in _HYPERPARAMETERS:
                raise DeclarationError(f"schnet: unknown argument {name!r}, known: {', '.join(_HYPERPARAMETERS)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(SchNet(**hyperparameters, interaction_graph=_no_graph))

    @classmethod
    def rebuild(cls, description: dict[str, Any]) -> SchNetBackbone:
        """The model that was described, but for its parameters."""
        options = dict(description)
        atomref = torch.zeros(100, 1) if options.pop("atomref") else None
        return cls(SchNet(**options, atomref=atomref, interaction_graph=_no_graph))

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` of every structure."""
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("batch: expected a field 'z' with atomic numbers, got none")
        unknown = ((z < 1) | (z > 99)).nonzero()
        if len(unknown):
            raise UnknownSpeciesError(
                f"z: atom {int(unknown[0])} of the batch: expected species from 1 to 99, got {int(z[unknown[0]])}"
            )
        edge_index, edge_vec = edges_of(batch)
        graph = edge_index, torch.linalg.vector_norm(edge_vec.to(self.dtype), dim=1)
        energy = _with_graph(self.model, graph)(
            z.to(torch.int64), batch[keys.POS].to(self.dtype), batch.get(keys.BATCH)
        )
        return {"energy": energy[:, 0]}

    def describe(self) -> dict[str, Any]:
        found = {name: getattr(self.model, name) for name in _HYPERPARAMETERS}
        numbers = {name: None if (v := getattr(self.model, name)) is None else float(v) for name in ("mean", "std")}
        return {**found, **numbers, "atomref": self.model.atomref is not None}


def _no_graph(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    raise InvalidInputError("schnet: expected edges from a batch; evaluate it as a backbone")


def _with_graph(model: SchNet, graph: tuple[Tensor, Tensor]) -> SchNet:
    """A shallow copy, with the same parameters, whose interaction graph is the one given: the model is left alone."""
    twin = copy.copy(model)
    twin._modules = {name: module for name, module in model._modules.items() if name != "interaction_graph"}
    twin.__dict__["interaction_graph"] = lambda pos, batch: graph
    return twin
