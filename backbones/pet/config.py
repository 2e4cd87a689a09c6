"""Hyperparameters of the Point Edge Transformer, validated where they are written down."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from symmetrize.errors import DeclarationError, did_you_mean

FLOAT32_EPSILON = 2.0**-23
CUTOFF_FUNCTIONS = ("bump", "cosine")
NORMALIZATIONS = ("RMSNorm", "LayerNorm")
ACTIVATIONS = ("SwiGLU", "SiLU")
TRANSFORMER_TYPES = ("PreLN", "PostLN")
FEATURIZER_TYPES = ("residual", "feedforward")

_CHOICES = {
    "cutoff_function": CUTOFF_FUNCTIONS,
    "normalization": NORMALIZATIONS,
    "activation": ACTIVATIONS,
    "transformer_type": TRANSFORMER_TYPES,
    "featurizer_type": FEATURIZER_TYPES,
}
_SIZES = ("d_pet", "d_node", "d_head", "d_feedforward", "num_heads", "num_attention_layers", "num_gnn_layers")


@dataclass(frozen=True)
class PETConfig:
    """Architecture of a `PET`; the names are those of metatrain's hyperparameters.

    Attributes
    ----------
    atomic_types : tuple of int
        Atomic numbers that the model knows, ascending.
    cutoff, cutoff_width : float
        Neighbors count fully up to ``cutoff - cutoff_width`` and not at all from ``cutoff`` on (angstrom).
    cutoff_function : str
        "bump" (infinitely differentiable) or "cosine" (once).
    d_pet, d_node, d_head, d_feedforward : int
        Widths of the edge tokens, of the atoms' own features, of the readout, and of the feed-forward layers.
    num_heads, num_attention_layers, num_gnn_layers : int
        Attention heads, attention layers per block, and blocks (rounds of message passing).
    normalization, activation, transformer_type : str
        "RMSNorm" or "LayerNorm"; "SwiGLU" or "SiLU"; "PreLN" or "PostLN".
    normalization_epsilon : float or None
        What RMSNorm adds to the mean square. By default the machine epsilon of float32 whatever the precision, so that
        a model is the same function in float64 as in the float32 that it was trained in. None is what metatrain does:
        the machine epsilon of the precision in use.
    attention_temperature : float
    featurizer_type : str
        "residual" reads out every block, "feedforward" the last one, after one more exchange of messages.
    direct_forces : bool
        Whether there is an output ``non_conservative_forces`` next to ``energy``.
    """

    atomic_types: tuple[int, ...]
    cutoff: float = 4.5
    cutoff_width: float = 0.5
    cutoff_function: str = "bump"
    d_pet: int = 64
    d_node: int = 96
    d_head: int = 64
    d_feedforward: int = 96
    num_heads: int = 4
    num_attention_layers: int = 2
    num_gnn_layers: int = 1
    normalization: str = "RMSNorm"
    normalization_epsilon: float | None = FLOAT32_EPSILON
    activation: str = "SwiGLU"
    transformer_type: str = "PreLN"
    attention_temperature: float = 1.0
    featurizer_type: str = "residual"
    direct_forces: bool = False

    def __post_init__(self) -> None:
        types = tuple(self.atomic_types)
        if not types or any(isinstance(z, bool) or not isinstance(z, int) or z < 0 for z in types):
            raise DeclarationError(f"atomic_types: expected at least one atomic number, got {self.atomic_types!r}")
        if list(types) != sorted(set(types)):
            raise DeclarationError(f"atomic_types: expected distinct atomic numbers in ascending order, got {types}")
        object.__setattr__(self, "atomic_types", types)
        for name in ("cutoff", "cutoff_width", "attention_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise DeclarationError(f"{name}: expected a positive number, got {value!r}")
            object.__setattr__(self, name, float(value))
        epsilon = self.normalization_epsilon
        if epsilon is not None and (
            isinstance(epsilon, bool) or not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0
        ):
            raise DeclarationError(f"normalization_epsilon: expected a small positive number or None, got {epsilon!r}")
        if self.cutoff_width > self.cutoff:
            raise DeclarationError(f"cutoff_width: expected at most the cutoff {self.cutoff}, got {self.cutoff_width}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise DeclarationError(f"{name}: unknown value {value!r}; {did_you_mean(str(value), choices)}")
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeclarationError(f"{name}: expected a positive integer, got {value!r}")
        if self.d_pet % self.num_heads != 0:
            raise DeclarationError(f"num_heads: expected a divisor of d_pet={self.d_pet}, got {self.num_heads}")

    @property
    def receptive_field(self) -> int:
        """Hops that an atom's output depends on.

        Each block lets edges of one atom see each other, and messages move along edges between blocks. A feedforward
        readout exchanges messages once more behind the last block, so that even a single block reaches two hops.
        """
        return self.num_gnn_layers + (1 if self.featurizer_type == "feedforward" else 0)

    @property
    def output_widths(self) -> dict[str, int]:
        """Components of each output per atom."""
        return {"energy": 1, "non_conservative_forces": 3} if self.direct_forces else {"energy": 1}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        fields["atomic_types"] = list(self.atomic_types)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PETConfig:
        """Configuration from its dictionary; unknown entries are errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise DeclarationError(f"PETConfig: unknown entry {name!r}; {did_you_mean(name, known)}")
        if "atomic_types" not in fields:
            raise DeclarationError("PETConfig: expected an entry 'atomic_types', got none")
        return cls(**{**fields, "atomic_types": tuple(fields["atomic_types"])})
