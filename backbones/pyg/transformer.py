"""`MolecularTransformer`: vector attention among all atoms of a molecule, on raw differences of positions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import PointTransformerConv

from symmetrize import keys
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.ops.ragged import gather_rows

from .energies import EnergyNetwork
from .network import perceptron

#: Of its files.
FORMAT = "torch-symmetrize molecular transformer"


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a `MolecularTransformer`.

    Attributes
    ----------
    atomic_types : tuple of int
        Species, as atomic numbers.
    width : int
        Features of an atom.
    n_layers : int
        Layers of attention.
    length : float
        Unit in which differences of positions are read.
    """

    atomic_types: tuple[int, ...]
    width: int = 64
    n_layers: int = 3
    length: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "atomic_types", tuple(int(z) for z in self.atomic_types))
        for name in ("width", "n_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeclarationError(f"{name}: expected a positive integer, got {value!r}")
        if not self.length > 0.0:
            raise DeclarationError(f"length: expected a positive length, got {self.length!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, inverse of `from_dict`."""
        return {**asdict(self), "atomic_types": list(self.atomic_types)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Configuration of a dictionary; `DeclarationError` for unknown and missing entries."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise DeclarationError(f"transformer: unknown entry {name!r}, {did_you_mean(str(name), known)}")
        if "atomic_types" not in values:
            raise DeclarationError("transformer: expected an entry 'atomic_types', got none")
        return cls(**values)


class _Layer(torch.nn.Module):
    """Attention and a perceptron, each added to what came in after a normalization of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = PointTransformerConv(
            width,
            width,
            pos_nn=perceptron(3, width, width),
            attn_nn=perceptron(width, width, width),
            # The graph of all pairs holds them already.
            add_self_loops=False,
        )
        self.before, self.between = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.after = perceptron(width, 2 * width, width)

    def forward(self, h: Tensor, pos: Tensor, pairs: Tensor) -> Tensor:
        h = h + self.attention(self.before(h), pos, pairs)
        return h + self.after(self.between(h))


class _Network(torch.nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.length = float(config.length)
        self.embedding = torch.nn.Embedding(len(config.atomic_types), width)
        self.layers = torch.nn.ModuleList([_Layer(width) for _ in range(config.n_layers)])
        self.readout = perceptron(width, width, 1)

    def forward(self, species: Tensor, pos: Tensor, pairs: Tensor) -> Tensor:
        """Tensor of shape (n_atoms,)."""
        h = self.embedding(species)
        for layer in self.layers:
            h = layer(h, pos / self.length, pairs)
        return self.readout(h)[:, 0]


class MolecularTransformer(EnergyNetwork):
    """Point Transformer layers on all pairs of atoms of a molecule: smooth, global, and not equivariant at all.

    The vector attention of Zhao et al. (ICCV 2021, arXiv:2012.09164) in torch_geometric's implementation, with smooth
    activations and without sampling, so that energies can be differentiated. Every atom sees every other one: it has
    no cutoff, and is for finite structures. ``energy`` is a contribution per atom, in eV.

    Parameters
    ----------
    config : TransformerConfig
    seed : int
        Seed of the initial weights.
    metadata : dict, optional
        Free-form, JSON-serialisable provenance that is saved along.
    """

    adapter = "molecular-transformer"
    format = FORMAT

    def __init__(self, config: TransformerConfig, *, seed: int = 0, metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(config, TransformerConfig):
            raise InvalidTypeError(f"config: expected a TransformerConfig, got {type(config).__name__}")
        super().__init__(
            config.atomic_types,
            lambda: _Network(config),
            config.to_dict(),
            seed=seed,
            metadata=metadata,
            cutoff=None,
            receptive_field=None,
        )
        self.config = config

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``energy`` of every wanted atom.

        Raises
        ------
        InvalidInputError
            For periodic structures, whose images it would not see.
        """
        periodic = batch.get(keys.PBC)
        if periodic is not None and bool(periodic.any()):
            raise InvalidInputError("molecular-transformer: expected finite structures, got a periodic one")
        pos, ptr = batch[keys.POS].to(self.dtype), batch[keys.PTR]
        # All atoms of the structure of each atom, itself included.
        source, target = gather_rows(ptr, batch[keys.BATCH])
        return self.scaled(batch, self.network(self.table.of_batch(batch), pos, torch.stack([source, target])))
