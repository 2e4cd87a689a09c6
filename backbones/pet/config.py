"""Hyperparameters of the Point Edge Transformer, validated where they are written down."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from symmetrize.errors import DeclarationError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec

FLOAT32_EPSILON = 2.0**-23
CUTOFF_FUNCTIONS = ("bump", "cosine")
NORMALIZATIONS = ("RMSNorm", "LayerNorm")
ACTIVATIONS = ("SwiGLU", "SiLU")
TRANSFORMER_TYPES = ("PreLN", "PostLN")
FEATURIZER_TYPES = ("residual", "feedforward")
ADAPTIVE_CUTOFF_METHODS = ("solver", "grid")
INPUTS = ("vectors", "lengths")

_CHOICES = {
    "cutoff_function": CUTOFF_FUNCTIONS,
    "normalization": NORMALIZATIONS,
    "activation": ACTIVATIONS,
    "transformer_type": TRANSFORMER_TYPES,
    "featurizer_type": FEATURIZER_TYPES,
    "adaptive_cutoff_method": ADAPTIVE_CUTOFF_METHODS,
    "inputs": INPUTS,
}
_SIZES = ("d_pet", "d_node", "d_head", "d_feedforward", "num_heads", "num_attention_layers", "num_gnn_layers")


@dataclass(frozen=True)
class Target:
    """One output of a `PET`.

    Attributes
    ----------
    name : str
        Name of the output.
    irreps, cartesian : str or None
        How it transforms, see `symmetrize.OutputSpec`; exactly one of them is given.
    reduce : str or None
        "sum" for a quantity of the structure: the sum over its atoms.
    unit : str
    head : str or None
        Readout that it is a part of, where several outputs share one: their components follow each other in the order
        in which they are listed. By default a readout of its own, of the same name.
    per_volume : bool
        Whether the readout predicts the output times the volume of the cell; such an output (a stress) is zero without
        a cell, and symmetric.
    """

    name: str
    irreps: str | None = None
    cartesian: str | None = None
    reduce: str | None = None
    unit: str = ""
    head: str | None = None
    per_volume: bool = False

    def __post_init__(self) -> None:
        for name in (self.name, self.readout):
            if not isinstance(name, str) or not name or "." in name:
                raise DeclarationError(f"targets: expected names without a dot, got {name!r}")
        if self.per_volume and self.spec.shape != (3, 3):
            raise DeclarationError(f"targets: {self.name!r}: per_volume is for tensors of rank 2, got {self.spec}")

    @property
    def readout(self) -> str:
        """Name of its readout."""
        return self.name if self.head is None else self.head

    @property
    def spec(self) -> OutputSpec:
        """Declaration of the output."""
        reduce: Any = self.reduce
        return OutputSpec(self.irreps, self.cartesian, per="atom", reduce=reduce, unit=self.unit)

    @property
    def width(self) -> int:
        """Components of one row."""
        return math.prod(self.spec.shape)


ENERGY = Target("energy", irreps="0e", reduce="sum", unit="eV")
DIRECT_FORCES = Target("non_conservative_forces", irreps="1o", unit="eV/A")


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
    targets : tuple of Target or None
        All outputs, where they are others than ``energy`` and ``non_conservative_forces``.
    num_neighbors_adaptive : float or None
        Each atom's cutoff is such that it has about so many neighbors, and at most ``cutoff``; that of a pair is the
        mean of those of its atoms. None: every cutoff is ``cutoff``.
    adaptive_cutoff_method : str
        "solver" or "grid", see `adaptive`.
    cutoff_width_adaptive : float
        Width of the smooth step with which neighbors are counted.
    zbl : tuple of float or None
        Covalent radii of the species (angstrom), for the repulsion of screened nuclei that is added to ``energy``, see
        `repulsion`; None: there is none.
    system_conditioning : bool
        Whether the total charge and the spin multiplicity of a structure are inputs (fields ``charge`` and
        ``spin_multiplicity``, one entry per structure; neutral singlets by default).
    max_charge, max_spin_multiplicity : int
        Largest magnitude of a charge and largest multiplicity that are known.
    inputs : str
        What is seen of an edge: "vectors", its vector and length; or "lengths", the length alone. The latter is
        invariant by construction, at the price of not telling structures of equal distances apart: the auxiliary model
        of the published ECSE. Its outputs are invariant scalars.
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
    targets: tuple[Target, ...] | None = None
    num_neighbors_adaptive: float | None = None
    adaptive_cutoff_method: str = "solver"
    cutoff_width_adaptive: float = 1.0
    zbl: tuple[float, ...] | None = None
    system_conditioning: bool = False
    max_charge: int = 10
    max_spin_multiplicity: int = 10
    inputs: str = "vectors"

    def __post_init__(self) -> None:
        types = tuple(self.atomic_types)
        if not types or any(isinstance(z, bool) or not isinstance(z, int) or z < 0 for z in types):
            raise DeclarationError(f"atomic_types: expected at least one atomic number, got {self.atomic_types!r}")
        if list(types) != sorted(set(types)):
            raise DeclarationError(f"atomic_types: expected distinct atomic numbers in ascending order, got {types}")
        object.__setattr__(self, "atomic_types", types)
        for name in ("cutoff", "cutoff_width", "attention_temperature", "cutoff_width_adaptive") + (
            () if self.num_neighbors_adaptive is None else ("num_neighbors_adaptive",)
        ):
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
        for name in ("max_charge", "max_spin_multiplicity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "max_charge"):
                raise DeclarationError(f"{name}: expected a whole number, got {value!r}")
        if self.zbl is not None:
            object.__setattr__(self, "zbl", tuple(float(radius) for radius in self.zbl))
            if len(self.zbl) != len(types) or not all(0.0 < radius < math.inf for radius in self.zbl):
                raise DeclarationError(f"zbl: expected a positive radius for each of {types}, got {self.zbl}")
        self._check_targets()
        if self.d_pet % self.num_heads != 0:
            raise DeclarationError(f"num_heads: expected a divisor of d_pet={self.d_pet}, got {self.num_heads}")
        directed = [target.name for target in self.outputs if not target.spec.is_invariant_scalar]
        if self.inputs == "lengths" and directed:
            raise DeclarationError(
                f"inputs='lengths': expected invariant scalars ('0e') as outputs only, got {directed}"
            )

    def _check_targets(self) -> None:
        if self.targets is None:
            return
        object.__setattr__(self, "targets", tuple(self.targets))
        names = [target.name for target in self.outputs if isinstance(target, Target)]
        if not names or len(names) < len(self.outputs):
            raise InvalidTypeError(f"targets: expected at least one Target, and nothing else, got {self.targets!r}")
        if len(set(names)) < len(names):
            raise DeclarationError(f"targets: expected distinct names, got {names}")
        if self.direct_forces:
            raise DeclarationError("direct_forces: expected False where all targets are listed, got True")
        if self.zbl is not None and not (
            "energy" in names and self.outputs[names.index("energy")].spec.is_invariant_scalar
        ):
            raise DeclarationError(f"zbl: the repulsion is added to a scalar output 'energy', got {names}")

    @property
    def outputs(self) -> tuple[Target, ...]:
        """All outputs."""
        if self.targets is not None:
            return self.targets
        return (ENERGY, DIRECT_FORCES) if self.direct_forces else (ENERGY,)

    @property
    def n_exchanges(self) -> int:
        """Exchanges of messages.

        Each block lets edges of one atom see each other, and messages move along edges between blocks. A feedforward
        readout exchanges messages once more behind the last block, so that even a single block reaches two hops.
        """
        return self.num_gnn_layers - (0 if self.featurizer_type == "feedforward" else 1)

    @property
    def oriented_field(self) -> int:
        """Hops over which an atom's output depends on the directions of edges."""
        return self.n_exchanges + 1

    @property
    def receptive_field(self) -> int:
        """Hops that an atom's output depends on.

        One more than directions do with an adaptive cutoff, since that of an edge depends on how many neighbors the
        atoms at both of its ends have.
        """
        return self.oriented_field + (0 if self.num_neighbors_adaptive is None else 1)

    @property
    def output_widths(self) -> dict[str, int]:
        """Components of each readout per atom."""
        widths: dict[str, int] = {}
        for target in self.outputs:
            widths[target.readout] = widths.get(target.readout, 0) + target.width
        return widths

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        fields["atomic_types"] = list(self.atomic_types)
        fields["targets"] = None if self.targets is None else [dataclasses.asdict(target) for target in self.targets]
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
        targets = fields.get("targets")
        if targets is not None:
            targets = tuple(_target(target) for target in targets)
        return cls(**{**fields, "atomic_types": tuple(fields["atomic_types"]), "targets": targets})


def _target(fields: Any) -> Target:
    known = [field.name for field in dataclasses.fields(Target)]
    if not isinstance(fields, dict) or "name" not in fields:
        raise DeclarationError(f"targets: expected dictionaries with a name, got {fields!r}")
    for name in fields:
        if name not in known:
            raise DeclarationError(f"targets: unknown entry {name!r}; {did_you_mean(name, known)}")
    return Target(**fields)
