"""What is checked: any model, reduced to one callable, declarations, and what it claims."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import edge_vectors, validate, with_neighbors
from symmetrize.data import replace as replace_fields
from symmetrize.errors import DeclarationError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec, check_group
from symmetrize.testing.measuring.scales import Model, declared

if TYPE_CHECKING:
    from symmetrize.symmetrizer import Symmetrizer

#: What a model can promise. Everything is promised unless it is taken back: a check that fails is a failure.
CLAIMS: dict[str, str] = {
    "rotations": "outputs turn with the input",
    "inversion": "outputs have their declared parity",
    "translation": "a shift of the whole structure changes nothing",
    "permutation": "renumbering the atoms renumbers their rows and nothing else",
    "periodicity": "every description of the same crystal gives the same outputs",
    "batching": "a structure's outputs do not depend on what else is in the batch",
    "determinism": "the same input gives the same output",
    "purity": "a call changes neither its input nor any global state",
    "smoothness": "outputs and their derivatives do not jump",
    "conservation": "forces and stress are derivatives of the energy",
    "locality": "the declared receptive field is the true one",
    "precision": "the arithmetic is as precise as the dtype of the input",
}

#: Rotations and inversion are what a backbone makes no promise about.
BACKBONE_CLAIMS = frozenset(CLAIMS) - {"rotations", "inversion"}


#: What a conversion makes anew; everything else is declared.
_MADE = ("model", "module", "bare", "backbone", "symmetrizer", "dtype", "convert")


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Made by `of_symmetrizer`, `of_backbone`, `of_callable`, `symmetrize.testing.of_calculator` and
    `symmetrize.testing.of_metatomic`; any front end accepts one.

    Attributes
    ----------
    name : str
    kind : str
        Where it came from: ``"symmetrizer"``, ``"backbone"``, ``"callable"``, ``"calculator"``, ``"metatomic"``.
    model : callable
        Batch -> dict of Tensor, with at least the declared outputs that the batch allows.
    outputs : dict of str to OutputSpec
        Declarations, conservative forces included.
    periodic_outputs : dict of str to OutputSpec
        Those that exist where all structures are periodic in three directions only, such as stress.
    group : {"O(3)", "SO(3)"}
        The group that is claimed; elements of O(3) outside of it are measured and not judged.
    claims : frozenset of str
        Of `CLAIMS`.
    smooth : int
        How many derivatives are claimed to be continuous: 0 (the values), 1 or 2; of forces and stress that derive from
        an energy, one less.
    energy : str or None
        Output whose negative gradient ``forces`` claim to be.
    vectors : dict of str to str
        Further geometric inputs, as field name -> e3nn irreps.
    add_fields : callable or None
        Batch -> batch with the further fields that the model needs, for structures that come without; by default
        random ``vectors``.
    cutoff : float or None
        Radius of the neighbor list that batches have to bring along.
    reach : float or None
        Radius at which a neighbor drops out of sight, where it is known.
    species : tuple of int or None
        Atomic numbers that the model knows; None for any.
    periodic : bool
        Whether periodic structures can be evaluated.
    finite : bool
        Whether structures without any periodicity can be evaluated.
    collinear : bool
        Whether it accepts atoms on a line and single atoms.
    dtype : torch.dtype
    tolerance : float or None
        Largest error on the error scale that is accepted; None: rounding only.
    module : torch.nn.Module or None
        Whose layers can be walked.
    bare : callable or None
        The same model without symmetrisation, for comparison.
    symmetrizer : Symmetrizer or None
    convert : callable or None
        dtype -> the same subject in that precision.
    """

    name: str
    kind: str
    model: Model
    outputs: Mapping[str, OutputSpec]
    periodic_outputs: Mapping[str, OutputSpec] = field(default_factory=dict)
    group: str = "O(3)"
    claims: frozenset[str] = frozenset(CLAIMS)
    smooth: int = 1
    energy: str | None = None
    vectors: Mapping[str, str] = field(default_factory=dict)
    add_fields: Callable[[Batch], Batch] | None = None
    cutoff: float | None = None
    reach: float | None = None
    species: tuple[int, ...] | None = None
    periodic: bool = True
    finite: bool = True
    collinear: bool = True
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    module: torch.nn.Module | None = None
    bare: Model | None = None
    backbone: Backbone | None = None
    symmetrizer: Symmetrizer | None = None
    convert: Callable[[torch.dtype], Subject] | None = None

    def __post_init__(self) -> None:
        check_group(self.group)
        if not self.outputs and not self.periodic_outputs:
            raise DeclarationError(f"{self.name}: expected at least one declared output, got none")
        for name, spec in {**self.outputs, **self.periodic_outputs}.items():
            if not isinstance(spec, OutputSpec):
                raise InvalidTypeError(f"outputs[{name!r}]: expected an OutputSpec, got {type(spec).__name__}")
        for claim in self.claims:
            if claim not in CLAIMS:
                raise DeclarationError(f"claims: unknown claim {claim!r}, {did_you_mean(claim, CLAIMS)}")
        if self.smooth not in (0, 1, 2):
            raise DeclarationError(f"smooth: expected 0, 1 or 2 continuous derivatives, got {self.smooth!r}")
        if self.energy is not None and self.energy not in self.outputs:
            raise DeclarationError(f"energy: unknown output {self.energy!r}, {did_you_mean(self.energy, self.outputs)}")

    def declared(self, batch: Data) -> dict[str, OutputSpec]:
        """The outputs that a batch allows."""
        if self.periodic_outputs and bool(batch[keys.PBC].all()):
            return {**self.outputs, **self.periodic_outputs}
        return dict(self.outputs)

    def prepare(self, structures: Batch) -> Batch:
        """Add neighbor list and further fields."""
        batch = validate(structures)
        if self.cutoff is not None and batch.get(keys.EDGE_INDEX) is None:
            batch = with_neighbors(batch, self.cutoff)
        if self.add_fields is not None:
            return validate(self.add_fields(batch))
        missing = {name: irreps for name, irreps in self.vectors.items() if batch.get(name) is None}
        return replace_fields(batch, **_random_vectors(batch, missing)) if missing else batch

    @property
    def judged_group(self) -> str:
        """The group whose elements are judged: without inversion where that is not claimed."""
        return self.group if "inversion" in self.claims else "SO(3)"

    def converted(self, dtype: torch.dtype) -> Subject:
        """The same subject in another precision, with everything that is declared about this one."""
        if self.convert is None:
            raise DeclarationError(f"{self.name}: cannot be converted to {dtype}")
        new = self.convert(dtype)
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _MADE}
        return replace(new, **same)

    def without(self, *claims: str) -> Subject:
        """The same subject with fewer claims."""
        for claim in claims:
            if claim not in CLAIMS:
                raise DeclarationError(f"claims: unknown claim {claim!r}, {did_you_mean(claim, CLAIMS)}")
        return replace(self, claims=self.claims - set(claims))


def _random_vectors(batch: Batch, missing: Mapping[str, str]) -> dict[str, Tensor]:
    """Standard normal rows, the same for a structure whatever else is in the batch."""
    out = {}
    for name, irreps in missing.items():
        width = OutputSpec(irreps).shape or (1,)
        rows = [
            torch.randn((int(n), *width), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
            for n in batch[keys.PTR].diff()
        ]
        out[name] = torch.cat(rows).to(batch[keys.POS])
    return out


def of_symmetrizer(
    model: Symmetrizer, *, forces: bool | None = None, energy: str = "energy", **options: Any
) -> Subject:
    """A `symmetrize.Symmetrizer` as a subject.

    Parameters
    ----------
    model : Symmetrizer
    forces : bool, optional
        Whether conservative forces (and stress) are checked; by default where ``energy`` can be differentiated.
    energy : str
    **options
        Attributes of `Subject`, instead of those found.
    """
    from symmetrize.symmetrizer import Symmetrizer

    if not isinstance(model, Symmetrizer):
        raise InvalidTypeError(f"model: expected a Symmetrizer, got {type(model).__name__}")
    backbone = model.backbone
    conservative = _has_energy(backbone, energy) if forces is None else forces
    found: dict[str, Any] = dict(
        name=f"{type(backbone).__name__} with {type(model.method).__name__}, {model.group}, {model.scope} scope",
        kind="symmetrizer",
        model=_symmetrized(model, energy if conservative else None),
        outputs=declared(backbone.outputs, forces=conservative),
        periodic_outputs=declared({}, stress=conservative and model.scope == "atom"),
        group=model.group,
        # The frames of a method decide about smoothness; the backbone's receptive field is checked for backbones.
        claims=frozenset(CLAIMS) - {"locality"},
        smooth=2,
        energy=energy if conservative else None,
        vectors=backbone.vectors,
        reach=backbone.cutoff,
        species=backbone.species,
        periodic=model.scope == "atom" and backbone.cutoff is not None,
        collinear=not backbone.vectors,
        dtype=backbone.dtype,
        module=backbone,
        bare=_bare(backbone, energy if conservative else None),
        backbone=backbone,
        symmetrizer=model,
        convert=lambda dtype: of_symmetrizer(
            copy.deepcopy(model).to(dtype).eval(), forces=conservative, energy=energy, **{**options, "dtype": dtype}
        ),
    )
    return Subject(**{**found, **options})


def of_backbone(backbone: Backbone, *, forces: bool | None = None, energy: str = "energy", **options: Any) -> Subject:
    """A `symmetrize.Backbone` as a subject: everything is claimed but rotations and inversion.

    Parameters
    ----------
    backbone : Backbone
    forces : bool, optional
        Whether the gradient of ``energy`` is checked as forces (and stress); by default where there is such an output.
    energy : str
    **options
        Attributes of `Subject`, instead of those found.
    """
    if not isinstance(backbone, Backbone):
        raise InvalidTypeError(f"backbone: expected a Backbone, got {type(backbone).__name__}")
    conservative = _has_energy(backbone, energy) if forces is None else forces
    found: dict[str, Any] = dict(
        name=type(backbone).__name__,
        kind="backbone",
        model=_bare(backbone, energy if conservative else None),
        outputs=declared(backbone.outputs, forces=conservative),
        periodic_outputs=declared({}, stress=conservative and backbone.cutoff is not None),
        claims=BACKBONE_CLAIMS,
        smooth=2,
        energy=energy if conservative else None,
        vectors=backbone.vectors,
        cutoff=backbone.cutoff,
        reach=backbone.cutoff,
        species=backbone.species,
        periodic=backbone.cutoff is not None,
        dtype=backbone.dtype,
        module=backbone,
        backbone=backbone,
        convert=lambda dtype: of_backbone(
            copy.deepcopy(backbone).to(dtype).eval(), forces=conservative, energy=energy, **{**options, "dtype": dtype}
        ),
    )
    return Subject(**{**found, **options})


def of_callable(
    f: Callable[[Data], dict[str, Tensor] | Tensor],
    outputs: Mapping[str, OutputSpec] | OutputSpec,
    **options: Any,
) -> Subject:
    """A function of batches as a subject.

    Parameters
    ----------
    f : callable or torch.nn.Module
        Batch -> dict of Tensor, or one Tensor where ``outputs`` is one `OutputSpec`.
    outputs : dict of str to OutputSpec, or OutputSpec
    **options
        Further attributes of `Subject`, such as ``group``, ``cutoff``, ``species``, ``claims``, ``energy``.
    """
    as_given = outputs
    if isinstance(outputs, OutputSpec):
        outputs = {"output": outputs}
    model = _Callable(f, tuple(outputs), options.get("cutoff"))
    if not callable(f):
        raise InvalidTypeError(f"f: expected something to call with a batch, got {type(f).__name__}")
    module = f if isinstance(f, torch.nn.Module) else None
    found: dict[str, Any] = dict(
        name=getattr(f, "__name__", type(f).__name__),
        kind="callable",
        model=model,
        outputs=dict(outputs),
        claims=frozenset(CLAIMS) - {"locality"},
        energy="energy" if {"energy", "forces"} <= set(outputs) else None,
        reach=options.get("cutoff"),
        module=module,
    )
    if module is not None:
        found["dtype"] = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float64)
        found["convert"] = lambda dtype: of_callable(
            copy.deepcopy(module).to(dtype), as_given, **{**options, "dtype": dtype}
        )
    return Subject(**{**found, **options})


class _Callable:
    """A function of batches: edge vectors are always there where there are edges, and one output needs no name."""

    def __init__(self, f: Any, names: tuple[str, ...], cutoff: float | None) -> None:
        self.f, self.names, self.cutoff = f, names, cutoff

    def __call__(self, batch: Data) -> dict[str, Tensor]:
        edges = batch.get(keys.EDGE_INDEX) is not None
        if self.cutoff is not None and edges and batch.get(keys.EDGE_VEC) is None:
            batch = replace_fields(batch, **{keys.EDGE_VEC: edge_vectors(batch)})
        out = self.f(batch)
        return {self.names[0]: out} if isinstance(out, Tensor) and len(self.names) == 1 else out


def _has_energy(backbone: Backbone, energy: str) -> bool:
    spec = backbone.outputs.get(energy)
    return (
        spec is not None
        and spec.is_invariant_scalar
        and (spec.per == "structure" or spec.reduce == "sum")
        and "forces" not in backbone.outputs
    )


def _symmetrized(model: Symmetrizer, energy: str | None) -> Model:
    def f(batch: Data) -> dict[str, Tensor]:
        if energy is None:
            return model(batch)
        stress = model.scope == "atom" and bool(batch[keys.PBC].all())
        return model(batch, forces=True, stress=stress, energy=energy)

    return f


def _bare(backbone: Backbone, energy: str | None) -> Model:
    """The backbone itself, not through the evaluator."""

    def f(batch: Data) -> dict[str, Tensor]:
        if backbone.cutoff is not None and batch.get(keys.EDGE_INDEX) is None:
            batch = with_neighbors(batch, backbone.cutoff)
        if energy is None:
            if backbone.cutoff is not None and batch.get(keys.EDGE_VEC) is None:
                batch = replace_fields(batch, **{keys.EDGE_VEC: edge_vectors(batch)})
            return _reduced(backbone, batch, backbone(batch))
        return _with_gradient(backbone, batch, energy)

    return f


def _with_gradient(backbone: Backbone, batch: Data, energy: str) -> dict[str, Tensor]:
    stress = backbone.cutoff is not None and bool(batch[keys.PBC].all())
    pos = batch[keys.POS].detach().requires_grad_(True)
    n_structures = batch[keys.PTR].shape[0] - 1
    strain = torch.zeros(n_structures, 3, 3, dtype=pos.dtype, device=pos.device, requires_grad=stress)
    work = replace_fields(batch, **{keys.POS: pos, keys.EDGE_VEC: None})
    with torch.enable_grad():
        if stress:
            deformation = torch.eye(3, dtype=pos.dtype, device=pos.device) + 0.5 * (strain + strain.transpose(1, 2))
            work[keys.POS] = torch.einsum("na,nab->nb", pos, deformation[batch[keys.BATCH]])
            work[keys.CELL] = batch[keys.CELL].detach() @ deformation
        if backbone.cutoff is not None:
            work[keys.EDGE_VEC] = edge_vectors(work)
        out = backbone(work)
        total = out[energy].sum()
        wanted = [pos, strain] if stress else [pos]
        gradient = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else (None, None)
    out = _reduced(backbone, batch, {name: value.detach() for name, value in out.items()})
    out["forces"] = torch.zeros_like(pos) if gradient[0] is None else -gradient[0]
    if stress:
        volume = torch.linalg.det(batch[keys.CELL].detach()).abs()
        virial = torch.zeros_like(strain) if gradient[1] is None else gradient[1]
        out["stress"] = virial / volume[:, None, None]
    return out


def _reduced(backbone: Backbone, batch: Data, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """With baselines, and with the sums and means that are declared."""
    base = backbone.baseline(batch)
    out = {name: value.to(torch.float64) + base[name] if name in base else value for name, value in out.items()}
    mask = batch.get(keys.CENTER_MASK)
    structure = batch[keys.BATCH] if mask is None else batch[keys.BATCH][mask]
    for name, spec in backbone.outputs.items():
        if spec.reduce is not None and name in out:
            out[f"atomic_{name}"] = out[name]
            out[name] = spec.reduce_atoms(out[name], structure, batch[keys.PTR].shape[0] - 1)
    return out
