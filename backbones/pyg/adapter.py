"""`PyGBackbone`: any network of torch-geometric that takes features of atoms, edges, and features of edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.models.basic_gnn import BasicGNN

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.switches import smooth_cutoff
from symmetrize.representations import OutputSpec

from .reference import edges_of
from .species import SpeciesTable

#: Features that an edge can have, and how many numbers each of them is (None: as many as there are Gaussians).
EDGE_FEATURES: dict[str, int | None] = {"vector": 3, "unit": 3, "length": 1, "switch": 1, "radial": None}

#: How a network is called: (network, x, edge_index, edge_attr, batch) -> Tensor or dict of Tensor.
Call = Callable[[torch.nn.Module, Tensor, Tensor, Tensor, Data], Any]


class PyGBackbone(Backbone):
    r"""A network on graphs, with raw edge vectors among the features of its edges.

    Edges run from the neighbor (source) to the center (target), as in torch-geometric's default flow, and
    ``edge_attr`` holds what ``edge_features`` names. The messages of every convolution are multiplied by the switch

    .. math:: f_c(d) = \mathrm{step}\left(\frac{R - d}{\Delta}\right),

    so that their sum does not jump as neighbors come and go, biases and all.

    Parameters
    ----------
    network : torch.nn.Module
        Made of ``torch_geometric.nn.MessagePassing``. Returns for every atom as many numbers as the outputs have, one
        after the other in their order, or a dict of them by name.
    outputs : dict of str to OutputSpec
        Those per structure are sums over the atoms.
    cutoff : float
    species : iterable of int, optional
        Atomic numbers: atoms enter by their species, "one-hot", or with ``n_features`` as trainable vectors. Without,
        atoms enter by their features ``x``, and if the batch has none, as ones.
    n_features : int, optional
        Length of the vectors of the species.
    n_hops : int, optional
        Rounds of message passing; by default the number of MessagePassing modules. Measured on a chain of atoms here,
        and refused if it is too small. An upper bound does no harm but to the cost.
    edge_features : iterable of str
        Of "vector", "unit" (direction), "length", "radial" (Gaussians of the length), "switch", in this order:
        ``edge_dim`` numbers.
    n_radial : int
        Number of Gaussians.
    cutoff_width : float, optional
        Range below the cutoff over which neighbors fade out; by default half of it.
    call : callable, optional
        ``(network, x, edge_index, edge_attr, batch)`` -> output, for networks with other arguments; by default
        ``network(x, edge_index, edge_attr)``, by keywords for ready-made ones (`torch_geometric.nn.models.GAT`, ...).
    seed : int
        Of the vectors of the species.

    Raises
    ------
    DeclarationError
        A receptive field that is too small, a network that drops edges or returns something else than declared.

    Attributes
    ----------
    edge_dim : int
        Numbers per edge, and of atoms ``node_dim``.
    smooth_sums : bool
        Whether all messages are summed by plain sums. Where they are not, a neighbor at the cutoff still changes a
        mean, a maximum or the denominator of a softmax (attention): results then jump a little as neighbors come and
        go, which is the network's own doing and which averaging over frames cannot mend.

    Notes
    -----
    Exactness under rotations does not need smoothness. Kinks of the network itself (ReLU) remain as well.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        outputs: dict[str, OutputSpec],
        cutoff: float,
        *,
        species: Iterable[int] | None = None,
        n_features: int | None = None,
        n_hops: int | None = None,
        edge_features: Iterable[str] = ("vector", "length"),
        n_radial: int = 8,
        cutoff_width: float | None = None,
        call: Call | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(network, torch.nn.Module):
            raise InvalidTypeError(f"network: expected a torch module, got {type(network).__name__}")
        convolutions = [one for one in network.modules() if isinstance(one, MessagePassing)]
        if not convolutions:
            raise DeclarationError("network: expected torch_geometric.nn.MessagePassing among its modules, got none")
        for one in convolutions:
            _check_convolution(one)
        super().__init__(
            outputs=outputs, cutoff=cutoff, receptive_field=len(convolutions) if n_hops is None else n_hops
        )
        self.network = network
        self.edge_features = _edge_features(edge_features)
        self.n_radial = int(n_radial)
        self.edge_dim = sum(self._size(name) for name in self.edge_features)
        self.cutoff_width = cutoff / 2.0 if cutoff_width is None else float(cutoff_width)
        if not 0.0 < self.cutoff_width <= cutoff:
            raise DeclarationError(f"cutoff_width: expected a length up to {cutoff}, got {cutoff_width}")
        self.call = _default_call(network) if call is None else call
        self.smooth_sums = all(_is_plain_sum(one) for one in convolutions)
        self.table = None if species is None else SpeciesTable(species)
        self.species = None if self.table is None else self.table.species
        self.embedding = None
        if n_features is not None:
            if self.species is None:
                raise DeclarationError("n_features: vectors of species need species, got none")
            self.embedding = torch.nn.Embedding(len(self.species), int(n_features))
            with torch.no_grad():
                values = torch.randn(self.embedding.weight.shape, generator=torch.Generator().manual_seed(seed))
                self.embedding.weight.copy_(values)
            self.embedding.to(next((p.dtype for p in network.parameters()), torch.get_default_dtype()))
        self._check_receptive_field()

    @property
    def node_dim(self) -> int | None:
        """Numbers per atom; None: those of the batch's own features."""
        if self.embedding is not None:
            return self.embedding.embedding_dim
        return None if self.species is None else len(self.species)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """The declared outputs in the orientation given."""
        edge_index, edge_vec = edges_of(batch)
        edge_vec = edge_vec.to(self.dtype)
        length = torch.linalg.vector_norm(edge_vec, dim=1)
        switch = smooth_cutoff(length, float(self.cutoff or 0.0), self.cutoff_width)
        with _faded(self.network, switch):
            got = self.call(self.network, self._atoms(batch), edge_index, self._edges(edge_vec, length, switch), batch)
        return self._outputs(got, batch)

    def _size(self, name: str) -> int:
        size = EDGE_FEATURES[name]
        return self.n_radial if size is None else size

    def _atoms(self, batch: Data) -> Tensor:
        if self.table is None:
            given = batch.get(keys.X)
            like = batch[keys.POS].to(self.dtype)
            return torch.ones_like(like[:, :1]) if given is None else given.to(self.dtype)
        rows = self.table.of_batch(batch)
        if self.embedding is not None:
            return self.embedding(rows)
        return torch.nn.functional.one_hot(rows, len(self.table.species)).to(self.dtype)

    def _edges(self, vector: Tensor, length: Tensor, switch: Tensor) -> Tensor:
        radius = float(self.cutoff or 0.0)
        parts = []
        for name in self.edge_features:
            if name == "vector":
                parts.append(vector)
            elif name == "unit":
                parts.append(vector / length[:, None])
            elif name == "radial":
                spacing = radius / self.n_radial
                centers = spacing * (0.5 + torch.arange(self.n_radial, dtype=length.dtype, device=length.device))
                parts.append(torch.exp(-0.5 * ((length[:, None] - centers) / spacing) ** 2))
            else:
                parts.append((length if name == "length" else switch)[:, None])
        return torch.cat(parts, dim=1)

    def _outputs(self, got: Any, batch: Data) -> dict[str, Tensor]:
        n_atoms = batch[keys.POS].shape[0]
        sizes = {name: math.prod(spec.shape) for name, spec in self.outputs.items()}
        if isinstance(got, Tensor):
            got = got[:, None] if got.dim() == 1 else got
            if tuple(got.shape) != (n_atoms, sum(sizes.values())):
                raise BackboneOutputError(
                    f"network: expected {sum(sizes.values())} numbers for each of {n_atoms} atoms ({sizes}), got shape "
                    f"{tuple(got.shape)}"
                )
            got = dict(zip(sizes, got.split(list(sizes.values()), dim=1), strict=True))
        if not isinstance(got, dict) or set(got) != set(sizes):
            raise BackboneOutputError(f"network: expected outputs {sorted(sizes)}, got {type(got).__name__} of others")
        mask, structure = batch.get(keys.CENTER_MASK), batch.get(keys.BATCH)
        out = {}
        for name, spec in self.outputs.items():
            values = got[name].reshape((-1, *spec.shape))
            if values.shape[0] != n_atoms:
                raise BackboneOutputError(f"network: {name}: expected {n_atoms} rows, got {values.shape[0]}")
            if spec.per == "structure":
                index = torch.zeros_like(batch[keys.POS][:, 0], dtype=torch.int64) if structure is None else structure
                ptr = batch.get(keys.PTR)
                n_structures = int(index.max()) + 1 if ptr is None else ptr.shape[0] - 1
                values = segment_sum(values, index, n_structures)
            elif mask is not None:
                values = values[mask]
            out[name] = values
        return out

    def _check_receptive_field(self) -> None:
        """On a chain in which atoms see their neighbors only: does the first one feel an atom further off?"""
        hops = int(self.receptive_field or 0)
        n_atoms = hops + 3
        pos = torch.zeros(n_atoms, 3, dtype=self.dtype)
        pos[:, 0] = 0.6 * float(self.cutoff or 0.0) * torch.arange(n_atoms)
        pos[:, 1] = 0.05 * float(self.cutoff or 0.0) * torch.cos(torch.arange(n_atoms) * 2.0)
        device = next((p.device for p in self.parameters()), pos.device)
        pos = pos.to(device).requires_grad_()
        first = torch.arange(n_atoms - 1, device=device)
        forth = torch.stack([torch.cat([first, first + 1]), torch.cat([first + 1, first])])
        batch = Data(pos=pos, batch=torch.zeros_like(pos[:, 0], dtype=torch.int64))
        batch[keys.EDGE_INDEX] = forth[:, torch.argsort(forth[1], stable=True)]
        if self.species is not None:
            batch[keys.Z] = torch.tensor(self.species, device=device)[torch.arange(n_atoms) % len(self.species)]
        modes = {module: module.training for module in self.modules()}
        try:
            self.eval()
            with torch.enable_grad():
                got = self._run_probe(batch)
                felt = [
                    torch.autograd.grad(value[:1].sum(), pos, retain_graph=True, allow_unused=True)[0]
                    for name, value in got.items()
                    if self.outputs[name].per == "atom" and value.requires_grad
                ]
        finally:
            for module, training in modes.items():
                module.training = training
        reach = max(
            (int((one != 0).any(dim=1).nonzero().max()) for one in felt if one is not None and one.any()), default=0
        )
        if reach > hops:
            raise DeclarationError(
                f"n_hops: expected the number of rounds of message passing, got {hops}: an output of an atom depends "
                f"on an atom {reach} neighbors away"
            )

    def _run_probe(self, batch: Data) -> dict[str, Tensor]:
        if self.table is None:
            # Features of atoms are not known here: a length that the network takes is found, not declared.
            width = _first_width(self.network)
            batch[keys.X] = torch.ones(batch[keys.POS].shape[0], width, dtype=self.dtype, device=batch[keys.POS].device)
        try:
            return self(batch)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, (BackboneOutputError, DeclarationError)):
                raise
            raise DeclarationError(
                f"network: cannot be evaluated with {self.node_dim or 'its'} numbers per atom and {self.edge_dim} per "
                f"edge ({', '.join(self.edge_features)}): {type(error).__name__}: {error}"
            ) from error


def _edge_features(names: Iterable[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in EDGE_FEATURES:
            raise DeclarationError(f"edge_features: unknown feature {name!r}, {did_you_mean(name, EDGE_FEATURES)}")
    if not names:
        raise DeclarationError("edge_features: expected at least one, got none")
    return names


def _check_convolution(one: MessagePassing) -> None:
    if one.flow != "source_to_target":
        raise DeclarationError(
            f"network: {type(one).__name__}: expected the flow 'source_to_target' (from the neighbor to the center), "
            f"got {one.flow!r}"
        )
    if getattr(one, "add_self_loops", False):
        raise DeclarationError(
            f"network: {type(one).__name__} removes the edges between an atom and its own periodic images where it "
            "adds loops; make it with add_self_loops=False"
        )


#: Convolutions that divide by a sum over the neighbors: weights of attention, or degrees.
_NORMALIZED = frozenset(
    [
        "GATConv",
        "GATv2Conv",
        "TransformerConv",
        "SuperGATConv",
        "RGATConv",
        "HGTConv",
        "GPSConv",
        "PointTransformerConv",
    ]
) | {"GCNConv", "GCN2Conv", "ChebConv", "TAGConv", "ARMAConv", "SGConv", "APPNP", "FAConv", "LEConv", "MFConv"}


def _is_plain_sum(one: MessagePassing) -> bool:
    return one.aggr in ("add", "sum") and type(one).__name__ not in _NORMALIZED


def _default_call(network: torch.nn.Module) -> Call:
    if isinstance(network, BasicGNN):
        return lambda module, x, edge_index, edge_attr, batch: module(x=x, edge_index=edge_index, edge_attr=edge_attr)
    return lambda module, x, edge_index, edge_attr, batch: module(x, edge_index, edge_attr)


def _first_width(network: torch.nn.Module) -> int:
    for module in network.modules():
        width = getattr(module, "in_channels", None)
        if isinstance(module, MessagePassing) and width is not None:
            return int(width[0] if isinstance(width, tuple) else width)
    return 1


@contextmanager
def _faded(network: torch.nn.Module, switch: Tensor) -> Iterator[None]:
    """All messages of a network times the switch of their edge, for as long as this lasts."""

    def fade(module: MessagePassing, inputs: Any, messages: Tensor) -> Tensor:
        axis = module.node_dim % messages.dim()
        if messages.shape[axis] != switch.shape[0]:
            raise InvalidInputError(
                f"network: {type(module).__name__}: expected one message for each of {switch.shape[0]} edges, got "
                f"{messages.shape[axis]}: it adds or drops edges"
            )
        shape = [1] * messages.dim()
        shape[axis] = -1
        return messages * switch.reshape(shape)

    handles = [
        module.register_message_forward_hook(fade) for module in network.modules() if isinstance(module, MessagePassing)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
