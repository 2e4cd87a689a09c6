"""The reference network: messages from raw edge vectors, with a fade-out at the cutoff, in modules of plain tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.ops.switches import smooth_step


@dataclass(frozen=True)
class GNNConfig:
    """Architecture of a `ReferenceGNN`.

    Attributes
    ----------
    atomic_types : tuple of int
        Species, as atomic numbers.
    cutoff, cutoff_width : float
        Neighbors fade out over ``cutoff_width`` below ``cutoff``; unit of the positions.
    n_hops : int
        Rounds of message passing, which is the receptive field.
    width : int
        Features of atoms and messages.
    n_radial : int
        Gaussians of the distance.
    """

    atomic_types: tuple[int, ...]
    cutoff: float = 5.0
    cutoff_width: float = 2.0
    n_hops: int = 2
    width: int = 64
    n_radial: int = 12

    def __post_init__(self) -> None:
        object.__setattr__(self, "atomic_types", tuple(int(z) for z in self.atomic_types))
        for name in ("n_hops", "width", "n_radial"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeclarationError(f"{name}: expected a positive integer, got {value!r}")
        if not 0.0 < self.cutoff_width <= self.cutoff:
            raise DeclarationError(f"cutoff_width: expected a length up to {self.cutoff}, got {self.cutoff_width}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, inverse of `from_dict`."""
        return {**asdict(self), "atomic_types": list(self.atomic_types)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GNNConfig:
        """Configuration of a dictionary; `DeclarationError` for unknown and missing entries."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise DeclarationError(f"gnn: unknown entry {name!r}, {did_you_mean(str(name), known)}")
        if "atomic_types" not in values:
            raise DeclarationError("gnn: expected an entry 'atomic_types', got none")
        return cls(**values)


class Silu(torch.nn.Module):
    """x sigmoid(x), from functions that can be differentiated any number of times in TorchScript as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def perceptron(*sizes: int) -> torch.nn.Sequential:
    """Linear layers with `Silu` between them."""
    layers: list[torch.nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [torch.nn.Linear(n_in, n_out), Silu()]
    return torch.nn.Sequential(*layers[:-1])


class EdgeFeatures(torch.nn.Module):
    r"""Features of a raw edge vector, and the weight with which the edge counts.

    .. math:: e = \left[\frac{v}{R},\; g_k(|v|),\; \frac{v}{|v|}\, g_k(|v|)\right], \qquad
              g_k(d) = \exp\left(-\frac{(d - \mu_k)^2}{2 \sigma^2}\right)
    """

    def __init__(self, config: GNNConfig) -> None:
        super().__init__()
        self.cutoff, self.cutoff_width = float(config.cutoff), float(config.cutoff_width)
        self.n_radial = int(config.n_radial)
        self.spacing = self.cutoff / config.n_radial
        self.size = 3 + 4 * config.n_radial

    def forward(self, edge_vec: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors of shape (n_edges, size) and (n_edges, 1)."""
        length = torch.sqrt((edge_vec * edge_vec).sum(dim=1, keepdim=True))
        center = self.spacing * (0.5 + torch.arange(self.n_radial, dtype=length.dtype, device=length.device))
        radial = torch.exp(-0.5 * ((length - center) / self.spacing) ** 2)
        directed = (edge_vec / length).unsqueeze(2) * radial.unsqueeze(1)
        weight = smooth_step((self.cutoff - length) / self.cutoff_width)
        return torch.cat([edge_vec / self.cutoff, radial, directed.flatten(1)], dim=1), weight


class Message(torch.nn.Module):
    """What a neighbor tells a center: a perceptron of both and of the edge, faded out at the cutoff."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge = torch.nn.Linear(width, width)
        self.act = Silu()
        self.out = perceptron(width, width, width)

    def forward(self, neighbor: Tensor, center: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        return weight * self.out(self.act(neighbor + center + self.edge(edge)))


class Convolution(MessagePassing):
    """One round: sums of messages over neighbors, and an update of every atom.

    A sum of messages that vanish at the cutoff is smooth as neighbors come and go; a mean or a softmax would not be.
    """

    def __init__(self, width: int) -> None:
        super().__init__(aggr="sum", flow="source_to_target")
        self.neighbor = torch.nn.Linear(width, width, bias=False)
        self.center = torch.nn.Linear(width, width)
        self.network = Message(width)
        self.update_atom = perceptron(2 * width, width, width)

    def forward(self, h: Tensor, edge_index: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        """Features of the atoms after the round: Tensor of shape (n_atoms, width)."""
        neighbor, center = self.neighbor(h), self.center(h)
        total = self.propagate(edge_index, neighbor=neighbor, center=center, edge=edge, weight=weight)
        return h + self.update_atom(torch.cat([h, 0.25 * total], dim=1))

    def message(self, neighbor_j: Tensor, center_i: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        return self.network(neighbor_j, center_i, edge, weight)


class ScriptableConvolution(torch.nn.Module):
    """The same round, sharing the modules of a `Convolution`, without torch_geometric."""

    def __init__(self, source: Convolution) -> None:
        super().__init__()
        self.neighbor, self.center = source.neighbor, source.center
        self.network, self.update_atom = source.network, source.update_atom

    def forward(self, h: Tensor, edge_index: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        neighbor, center = self.neighbor(h), self.center(h)
        messages = self.network(neighbor[edge_index[0]], center[edge_index[1]], edge, weight)
        total = torch.zeros_like(h).index_add(0, edge_index[1], messages)
        return h + self.update_atom(torch.cat([h, 0.25 * total], dim=1))


class ReferenceNetwork(torch.nn.Module):
    """From species rows and edge vectors to one number per atom.

    Parameters
    ----------
    config : GNNConfig
    """

    def __init__(self, config: GNNConfig) -> None:
        super().__init__()
        width = config.width
        self.embedding = torch.nn.Embedding(len(config.atomic_types), width)
        self.features = EdgeFeatures(config)
        self.edge = perceptron(self.features.size, width, width)
        self.rounds = torch.nn.ModuleList([Convolution(width) for _ in range(config.n_hops)])
        self.readout = torch.nn.ModuleList([perceptron(width, width // 2 + 1, 1) for _ in range(config.n_hops)])

    def forward(self, species: Tensor, edge_index: Tensor, edge_vec: Tensor) -> Tensor:
        """Tensor of shape (n_atoms,)."""
        features, weight = self.features(edge_vec)
        edge = self.edge(features)
        h = self.embedding(species)
        total = torch.zeros_like(h[:, 0])
        for step, readout in zip(self.rounds, self.readout):  # noqa: B905 (TorchScript)
            h = step(h, edge_index, edge, weight)
            total = total + readout(h)[:, 0]
        return total

    def scriptable(self) -> ReferenceNetwork:
        """A shallow copy with the same parameters, in which every round is a `ScriptableConvolution`."""
        twin = torch.nn.Module.__new__(ReferenceNetwork)
        torch.nn.Module.__init__(twin)
        twin.embedding, twin.features, twin.edge, twin.readout = self.embedding, self.features, self.edge, self.readout
        rounds = [ScriptableConvolution(one) for one in self.rounds if isinstance(one, Convolution)]
        twin.rounds = torch.nn.ModuleList(rounds)
        return twin
