"""Models in the metatomic format as subjects.

An exported model is evaluated as an engine would, on batches: systems with the neighbor lists that it asks for, lengths
in angstrom, and forces and stress from the derivative of its energy. What it returns says itself how it transforms (see
`symmetrize.metatomic.tensor_maps`).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import from_ase, replace, validate
from symmetrize.errors import DeclarationError
from symmetrize.metatomic.libraries import load_model
from symmetrize.metatomic.systems import systems_of
from symmetrize.metatomic.tensor_maps import UNITS, Part, parts_of, quantity, rows_of, wanted_outputs
from symmetrize.representations import OutputSpec
from symmetrize.testing.structures.geometries import crystal, random_cluster
from symmetrize.testing.subjects.subject import CLAIMS, Subject

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def of_metatomic(
    model: Any,
    *,
    outputs: Iterable[str] | None = None,
    device: str = "cpu",
    extensions_directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Subject:
    """An exported metatomic model as a subject.

    An energy is differentiated: ``forces`` and ``stress`` are declared beside it. The blocks of an output that has
    several are called ``name[key=value, ...]``, the properties of a Cartesian tensor ``name[k]``.

    Parameters
    ----------
    model : str, path or metatomic.torch.AtomisticModel
    outputs : iterable of str, optional
        Outputs of the model; by default all but features and other auxiliary outputs, and variants of outputs that are
        there themselves. By default, an output that cannot be recognised is left out with a warning.
    device : str
    extensions_directory : path, optional
        Of the compiled libraries that the model needs.
    **options
        Attributes of `Subject`, instead of those found; ``finite=False`` for a model of crystals only.

    Returns
    -------
    Subject
        Its ``model`` is a `MetatomicModel`, whose ``left_out`` says what was left out, and why. ``reach`` is the radius
        of the largest neighbor list, without one the interaction range.

    Raises
    ------
    MissingDependencyError
        metatomic is not installed.
    DeclarationError
        Unknown output, one whose representation cannot be recognised, or an input that cannot be provided.
    """
    loaded = load_model(model, extensions_directory).to(device)
    capabilities = loaded.capabilities()
    if capabilities.dtype not in _DTYPES:
        raise DeclarationError(f"model: expected float32 or float64 in its capabilities, got {capabilities.dtype!r}")
    types = tuple(int(z) for z in capabilities.atomic_types)
    name = loaded.metadata().name or (os.path.basename(str(model)) if isinstance(model, (str, os.PathLike)) else "")
    found: dict[str, Any] = dict(
        name=name or type(loaded).__name__,
        kind="metatomic",
        claims=frozenset(CLAIMS) - {"locality"},
        species=types,
        reach=_reach(loaded),
        vectors={field: "1o" for field in ("velocity", "momentum") if field in loaded.requested_inputs(True)},
        dtype=_DTYPES[capabilities.dtype],
    )
    settings = {**found, **options}
    wanted = wanted_outputs(capabilities.outputs, outputs)
    energy = next((one for one in wanted if one.split("/")[0] == "energy"), None)
    f = MetatomicModel(loaded, wanted, energy, device)
    f.recognize(_probe(settings, types), strict=outputs is not None)
    if f.left_out and outputs is None:
        listed = "; ".join(f"{one} ({reason})" for one, reason in f.left_out.items())
        warnings.warn(f"of_metatomic: {settings['name']}: left out {listed}", stacklevel=2)
    return _subject(f, settings, options, _conversion(f, settings, options, types))


def _subject(f: MetatomicModel, settings: Mapping[str, Any], options: Mapping[str, Any], convert: Any) -> Subject:
    evaluated = dict(
        model=f,
        outputs=f.declared(periodic=False),
        periodic_outputs=f.declared(periodic=True),
        energy=f.energy,
        convert=convert,
    )
    return Subject(**{**settings, **evaluated, **options, "dtype": settings["dtype"]})


def _conversion(
    f: MetatomicModel, settings: Mapping[str, Any], options: Mapping[str, Any], types: tuple[int, ...]
) -> Any:
    """dtype -> Subject, if an evaluation in the other precision succeeds, and really is in it."""

    def convert(dtype: torch.dtype) -> Subject:
        return _subject(f.to(dtype), {**settings, "dtype": dtype}, options, convert)

    other = torch.float64 if settings["dtype"] == torch.float32 else torch.float32
    try:
        values = f.to(other)(_probe({**settings, "dtype": other}, types))
    except Exception:  # a constant of the exported code that cannot be converted
        return None
    return convert if all(value.dtype == other for value in values.values()) else None


class MetatomicModel:
    """A metatomic model as a function of batches.

    Parameters
    ----------
    model : metatomic.torch.AtomisticModel
    outputs : iterable of str
        What is asked of it.
    energy : str or None
        The output that is differentiated.
    device : str

    Attributes
    ----------
    parts : dict of str to Part
        Recognised outputs by the name that they are declared under.
    left_out : dict of str to str
        Other outputs, and why.
    """

    def __init__(self, model: Any, outputs: Iterable[str], energy: str | None, device: str = "cpu") -> None:
        self.model, self.names, self.energy, self.device = model, list(outputs), energy, device
        self.parts: dict[str, Part] = {}
        self.left_out: dict[str, str] = {}

    def to(self, dtype: torch.dtype) -> MetatomicModel:
        """A copy in another precision."""
        out = copy.copy(self)
        out.model = copy.deepcopy(self.model).to(dtype)
        return out

    def declared(self, *, periodic: bool) -> dict[str, OutputSpec]:
        """Declarations, of outputs that exist in crystals only or of the others."""
        specs = {name: part.spec for name, part in self.parts.items()}
        if self.energy is not None:
            specs |= {
                "forces": OutputSpec("1o", unit="eV/A"),
                "stress": OutputSpec(cartesian="ij=ji", per="structure", unit="eV/A^3"),
            }
        stresses = {name for name in specs if name == "stress" or quantity(name) == "non_conservative_stress"}
        return {name: spec for name, spec in specs.items() if (name in stresses) == periodic}

    def recognize(self, probe: Batch, *, strict: bool = False) -> None:
        """Find out how the outputs transform from an evaluation.

        Raises
        ------
        DeclarationError
            If ``strict``, where one cannot be recognised; or where nothing can.
        """
        tensors, pos, _ = self._evaluate(probe)
        for name in self.names:
            try:
                found = parts_of(name, tensors[name], self._output(name).unit)
            except (DeclarationError, KeyError) as error:
                reason = str(error) if isinstance(error, DeclarationError) else "declared, but not returned"
                if strict:
                    raise DeclarationError(f"{name}: {reason}") from error
                self.left_out[name] = reason
            else:
                self.parts |= found
        self.names = [name for name in self.names if name not in self.left_out]
        if self.energy is not None:
            part = self.parts.get(self.energy)
            total = None if part is None or part.spec.reduce is None else self._energy(tensors)
            if total is None or not total.requires_grad:
                self.energy = None
            elif torch.autograd.grad(total.sum(), pos, allow_unused=True)[0] is None:
                self.energy = None
        if not self.parts:
            raise DeclarationError(f"model: expected an output that can be recognised, got {self.left_out}")

    def __call__(self, batch: Data) -> dict[str, Tensor]:
        full = validate(batch)
        tensors, pos, strain = self._evaluate(full)
        periodic = bool(full[keys.PBC].all())
        ptr, structure, mask = full[keys.PTR].cpu(), full[keys.BATCH].cpu(), full.get(keys.CENTER_MASK)
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if not periodic and quantity(part.source) == "non_conservative_stress":
                continue
            rows, per_atom = rows_of(part, tensors[part.source], ptr)
            rows = rows.detach().cpu()
            if per_atom and part.spec.reduce is not None:
                total = torch.zeros(len(ptr) - 1, *rows.shape[1:], dtype=rows.dtype).index_add(0, structure, rows)
                out[name], name = total, f"atomic_{name}"
            out[name] = rows if mask is None or not per_atom else rows[mask.cpu()]
        if self.energy is not None:
            total = self._energy(tensors).sum()
            # Without any neighbor, there may be no way from the positions to the energy.
            grads = torch.autograd.grad(total, [pos, strain], allow_unused=True) if total.requires_grad else (None,) * 2
            forces, virial = (
                torch.zeros_like(x) if g is None else g for g, x in zip(grads, (pos, strain), strict=True)
            )
            out["forces"] = -forces if mask is None else -forces[mask.to(forces.device)]
            if periodic:
                volume = torch.linalg.det(full[keys.CELL].detach()).abs().to(virial)
                out["stress"] = virial / volume[:, None, None]
        return {name: value.detach().to(full[keys.POS].device) for name, value in out.items()}

    def _energy(self, tensors: Mapping[str, Any]) -> Tensor:
        return tensors[str(self.energy)].block().values

    def _output(self, name: str) -> Any:
        """What is asked for: energies of the atoms where the model has them."""
        from metatomic.torch import ModelOutput

        declared = self.model.capabilities().outputs[name]
        unit = UNITS.get(quantity(name), declared.unit) if declared.unit else ""
        return ModelOutput(unit=unit, sample_kind=declared.sample_kind)

    def _evaluate(self, batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
        """TensorMaps by name, and the leaves (positions, strain) that the energy is to be differentiated by."""
        from metatomic.torch import ModelEvaluationOptions

        conservative = self.energy is not None
        pos = batch[keys.POS].detach().to(self.device).clone().requires_grad_(conservative)
        cell = (batch[keys.CELL] * batch[keys.PBC][:, :, None]).detach().to(pos)
        strain = torch.zeros_like(cell).requires_grad_(conservative)
        with torch.enable_grad():
            deformation = torch.eye(3, dtype=pos.dtype, device=pos.device) + 0.5 * (strain + strain.transpose(1, 2))
            moved = torch.einsum("na,nab->nb", pos, deformation[batch[keys.BATCH].to(pos.device)])
            systems = systems_of(batch, self.model, moved, cell @ deformation)
            options = ModelEvaluationOptions(
                length_unit="angstrom", outputs={name: self._output(name) for name in self.names}, selected_atoms=None
            )
            return self.model(systems, options, check_consistency=False), pos, strain


def _reach(model: Any) -> float | None:
    radii = [float(request.engine_cutoff("angstrom")) for request in model.requested_neighbor_lists()]
    far = float(model.capabilities().engine_interaction_range("angstrom"))
    radius = max(radii, default=far)
    return radius if 0.0 < radius < float("inf") else None


def _probe(settings: Mapping[str, Any], types: tuple[int, ...]) -> Batch:
    """A structure with as many species as possible."""
    if settings.get("finite", True):
        atoms = random_cluster(min(max(8, len(types)), 24), seed=1)
    else:
        atoms = crystal("Si", "diamond", 5.43, cubic=True, rattle=0.1)
    atoms.numbers = [types[k % len(types)] for k in range(len(atoms))]
    batch = from_ase(atoms, dtype=settings["dtype"])
    vectors = {
        name: torch.randn(len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
            settings["dtype"]
        )
        for name in settings["vectors"]
    }
    return validate(replace(batch, **vectors))
