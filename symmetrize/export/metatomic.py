"""Export to metatomic, the format that LAMMPS, i-PI, ASE, torch-sim and others read."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidTypeError, did_you_mean
from symmetrize.export.frames import FixedFrames, frames_module
from symmetrize.files import replacing
from symmetrize.frames import FrameMethod
from symmetrize.metatomic import compilable, import_metatomic
from symmetrize.metatomic.tensor_maps import RENAMED
from symmetrize.methods.ecse import ECSE
from symmetrize.registry import load_backbone
from symmetrize.symmetrizer import Symmetrizer, check_energy

#: Names of outputs in metatomic, where they are others.
NAMES = {"non_conservative_forces": "non_conservative_force", "charges": "charge"}

#: Outputs that metatomic defines; the names of others carry a domain.
STANDARD = (
    "charge",
    "energy",
    "energy_ensemble",
    "energy_uncertainty",
    "feature",
    "heat_flux",
    "non_conservative_force",
    "non_conservative_stress",
)

#: Units in metatomic's spelling.
UNITS = {"eV/A": "eV/Angstrom", "eV/A^3": "eV/Angstrom^3"}

#: What each precision means: (of the network, of the systems).
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.float32, torch.float64),
}

ARTICLE = (
    "S. N. Pozdnyakov and M. Ceriotti, Smooth, exact rotational symmetrization for deep learning on point clouds, "
    "NeurIPS 2023, https://arxiv.org/abs/2305.19302"
)


def export(
    model: Symmetrizer,
    path: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
    description: str = "",
    authors: Iterable[str] = (),
    extra: Mapping[str, str] | None = None,
    dtype: str | torch.dtype | None = None,
    chunk_size: int | None = None,
    length_unit: str = "angstrom",
    species: Iterable[int] | None = None,
    energy: str | None = None,
    names: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Any:
    """A symmetrised model as a file for simulation engines.

    The file holds the average itself: frames, weights, rotated copies in chunks, and the derivative of the energy
    through all of them, so that engines get conservative forces and stress from their usual backward pass, in memory
    that does not grow with the number of frames. First derivatives only: an engine cannot differentiate forces again,
    and outputs other than the energy are not differentiable.

    Parameters
    ----------
    model : Symmetrizer
        With `ECSE`, `GroupAveraging` or `Identity`. In atom scope the interaction range is that of the backbone, and
        domain decomposition is exact; in structure scope it is infinite, and with `ECSE` periodic systems are refused.
        The backbone has a scriptable form (see `Backbone.scriptable`), or is itself a model in this format.
    path : path, optional
        Where to write it, whole or not at all; by convention ``*.pt``.
    name, description, authors
        Of the model, for its metadata.
    extra : dict of str to str, optional
        Further metadata.
    dtype : {"float32", "float64", "mixed"} or torch.dtype, optional
        Precision; by default that of the backbone. Results have the precision of the systems: a total energy of
        -4000 eV in ``"float32"`` is rounded to 0.0002 eV. In ``"mixed"``, systems, frames, sums and composition
        energies are float64 and the network float32: as fast as float32, and the energy is resolved.
    chunk_size : int, optional
        Atoms per call of the backbone, copies included; by default that of the model.
    length_unit : str
        Of the positions that the model was made for.
    species : iterable of int, optional
        Atomic numbers that the model is for; by default those that the backbone declares.
    energy : str, optional
        The output that is differentiated; by default ``"energy"`` where there is one.
    names : dict of str to str, optional
        Names in the file. By default names that metatomic defines are used, and others become ``symmetrize::name``.
    verify : bool
        Compare the file with the model on small structures before it is written.

    Returns
    -------
    metatomic.torch.AtomisticModel
        As it was read back.

    Raises
    ------
    MissingDependencyError
        metatomic is not installed.
    DeclarationError
        For what cannot be exported, and if the file does not reproduce the model.
    """
    metatomic = import_metatomic()
    if not isinstance(model, Symmetrizer):
        raise InvalidTypeError(
            f"model: expected a Symmetrizer, got {type(model).__name__}; the bare model is "
            "Symmetrizer(backbone, Identity())"
        )
    if model.backbone.vectors:
        raise DeclarationError(f"export: vector inputs are not supported, got {sorted(model.backbone.vectors)}")
    energy = _energy(model.backbone, energy)
    precision = _precision(model.backbone, dtype)
    converted = copy.deepcopy(model).to(PRECISIONS[precision][0]).eval()
    size = chunk_size if chunk_size is not None else model.chunk_size
    inner = _wrapped(converted.backbone)
    with compilable(), warnings.catch_warnings():
        # torch 2.13 warns about all of TorchScript, which the format consists of.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.*")
        if inner is not None:
            if names:
                raise DeclarationError(f"names: a model in the metatomic format keeps its own, got {sorted(names)}")
            own = inner.capabilities().length_unit
            if length_unit not in ("angstrom", own):
                raise DeclarationError(f"length_unit: expected that of the model ({own!r}), got {length_unit!r}")
            module, outputs = _around_another(converted, inner, energy, size or 0, precision)
            length_unit = own
        else:
            named = _names(model.backbone, names or {})
            module, outputs = _around_backbone(converted, named, energy, size or 0, precision)
        capabilities = metatomic.ModelCapabilities(
            outputs=outputs,
            atomic_types=_species(model.backbone, species),
            interaction_range=_range(converted),
            length_unit=length_unit,
            supported_devices=["cuda", "cpu"] if inner is None else inner.capabilities().supported_devices,
            dtype=str(PRECISIONS[precision][1]).removeprefix("torch."),
        )
        metadata = _metadata(model, inner, name, description, list(authors), dict(extra or {}), precision)
        exported = metatomic.AtomisticModel(module.eval(), metadata, capabilities)
        with tempfile.TemporaryDirectory() as folder, nullcontext() if path is None else replacing(path) as temporary:
            file = Path(folder) / "model.pt" if temporary is None else temporary
            exported.save(file)
            loaded = metatomic.load_atomistic_model(file)
            if verify:
                from symmetrize.export.verify import verify_export

                verify_export(converted, loaded, energy, {} if inner is not None else named)
    return loaded


def export_wrapped(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    method: FrameMethod | None = None,
    group: str = "O(3)",
    scope: str | None = None,
    outputs: Iterable[str] | None = None,
    **options: Any,
) -> Any:
    """A model in the metatomic format, symmetrised and written in the same format.

    Parameters
    ----------
    model : str, path or metatomic.torch.AtomisticModel
    path : path, optional
        Where to write it; not where it is read.
    method : FrameMethod, optional
        By default `ECSE` with its defaults.
    group, scope : str
        See `Symmetrizer`. Atom scope asks for a finite interaction range: every atom is evaluated with what surrounds
        it within that range, as a finite cluster. Structure scope is for finite systems.
    outputs : iterable of str, optional
        By default all that can be rotated.
    **options
        Of `export`.

    Returns
    -------
    metatomic.torch.AtomisticModel
    """
    backbone = load_backbone("metatomic", model, outputs)
    return export(Symmetrizer(backbone, ECSE() if method is None else method, group, scope), path, **options)


def _around_backbone(
    model: Symmetrizer, named: Mapping[str, str], energy: str, chunk_size: int, precision: str
) -> tuple[torch.nn.Module, dict[str, Any]]:
    from metatomic.torch import ModelOutput, NeighborListOptions

    from symmetrize.export.averaging import Average
    from symmetrize.export.rotating import Representation
    from symmetrize.export.scripted import Output, SymmetrizedModel

    backbone, per_atom = model.backbone, model.scope == "atom"
    network, systems = PRECISIONS[precision]
    hops = int(backbone.receptive_field or 0) if per_atom else 0
    requests, reach = [], None
    if backbone.cutoff is not None:
        # Copies hold all that is read; candidates only what breaks the symmetry (see `Backbone.oriented_field`).
        reach = max(int(backbone.oriented_field or 0) if per_atom else 0, 1) * backbone.cutoff
        requests.append(NeighborListOptions(backbone.cutoff, True, True))
        if per_atom and reach > backbone.cutoff:
            # Candidates have to cover everything that an output depends on.
            requests.append(NeighborListOptions(reach, True, True))
    average = Average(
        backbone.scriptable(),
        _frames(model, reach),
        {one: Representation(spec, model.group) for one, spec in backbone.outputs.items()},
        energy,
        per_atom,
        hops,
        chunk_size,
        network,
    )
    written = {one: Output(spec, named[one]) for one, spec in backbone.outputs.items()}
    outputs = {
        named[one]: ModelOutput(
            unit=UNITS.get(spec.unit, spec.unit), sample_kind="atom" if spec.per == "atom" else "system"
        )
        for one, spec in backbone.outputs.items()
    }
    return SymmetrizedModel(average, written, requests, systems), outputs


def _around_another(
    model: Symmetrizer, inner: Any, energy: str, chunk_size: int, precision: str
) -> tuple[torch.nn.Module, dict[str, Any]]:
    from metatomic.torch import ModelOutput, NeighborListOptions

    from symmetrize.export.generic import BlockRotation
    from symmetrize.export.wrapped import WrappedModel

    backbone, per_atom = model.backbone, model.scope == "atom"
    if precision == "mixed":
        raise DeclarationError("dtype: expected 'float32' or 'float64' for a model in the metatomic format")
    if energy not in ("", "energy"):
        raise DeclarationError(f"energy: expected the output 'energy' of the model, got {energy!r}")
    for one, spec in backbone.outputs.items():
        if spec.rank > 2:
            raise DeclarationError(f"export: {one!r}: expected Cartesian tensors of rank 2 at most, got {spec}")
    known = inner.capabilities().outputs
    sources = sorted({part.source for part in backbone.parts.values()})  # type: ignore[operator]
    if per_atom:
        for one in sources:
            if known[one].sample_kind != "atom":
                raise DeclarationError(f"scope='atom': expected per-atom outputs only, {one!r} is per system")
    inner_requests = [NeighborListOptions(r.cutoff, r.full_list, r.strict) for r in inner.requested_neighbor_lists()]
    outer_requests, reach = inner_requests, None
    if per_atom:
        reach = float(inner.capabilities().interaction_range)
        reach = max(reach, _range(model) * reach / float(inner.capabilities().engine_interaction_range("angstrom")))
        outer_requests = [NeighborListOptions(reach, True, True)]
    wrapper = WrappedModel(
        inner.module,
        _frames(model, reach),
        BlockRotation(max(model.l_max, 1), model.group == "O(3)"),
        per_atom,
        chunk_size,
        inner_requests,
        outer_requests,
        _own_names(inner, sources),
    )
    return wrapper, {
        one: ModelOutput(unit=known[one].unit, sample_kind=known[one].sample_kind, description=known[one].description)
        for one in sources
    }


def _own_names(inner: Any, names: Sequence[str]) -> dict[str, str]:
    """Present name -> the deprecated one that a module was written with, for which only its wrapper has both."""
    former = {present: past for past, present in RENAMED.items()}
    own: dict[str, str] = {}
    for name in names:
        base = name.split("/")[0]
        past = name.replace(base, former.get(base, base), 1)
        if past != name and past in inner._model_capabilities_outputs_names:
            own[name] = past
    return own


def _frames(model: Symmetrizer, reach: float | None) -> torch.nn.Module:
    epsilon = torch.finfo(model.backbone.dtype).eps
    return frames_module(
        model.method, group=model.group, scope=model.scope, l_max=model.l_max, epsilon=epsilon, radius=reach
    )


def _wrapped(backbone: Backbone) -> Any:
    """The model in the metatomic format that a backbone consists of, or None."""
    from metatomic.torch import AtomisticModel

    model = getattr(backbone, "model", None)
    return model if isinstance(model, AtomisticModel) else None


def _range(model: Symmetrizer) -> float:
    backbone = model.backbone
    fixed = isinstance(_frames(model, 1.0), FixedFrames)
    if backbone.receptive_field is None or not (model.scope == "atom" or fixed):
        return math.inf
    return max(backbone.receptive_field, 0) * (backbone.cutoff or 0.0)


def _energy(backbone: Backbone, energy: str | None) -> str:
    if energy is not None or "energy" in backbone.outputs:
        check_energy(backbone, energy or "energy")
        return energy or "energy"
    return ""


def _precision(backbone: Backbone, dtype: str | torch.dtype | None) -> str:
    wanted = str(backbone.dtype if dtype is None else dtype).removeprefix("torch.")
    if wanted not in PRECISIONS:
        raise DeclarationError(f"dtype: unknown precision {wanted!r}, {did_you_mean(wanted, PRECISIONS)}")
    return wanted


def _species(backbone: Backbone, species: Iterable[int] | None) -> list[int]:
    found = backbone.species if species is None else tuple(species)
    if not found:
        raise DeclarationError(
            "species: expected the atomic numbers that the model is for, since the backbone does not name them: "
            "export(..., species=[1, 6, 8])"
        )
    unknown = set() if backbone.species is None else set(found) - set(backbone.species)
    if unknown:
        raise DeclarationError(f"species: the model does not know {sorted(unknown)}, it knows {backbone.species}")
    return [int(z) for z in found]


def _names(backbone: Backbone, names: Mapping[str, str]) -> dict[str, str]:
    for name in names:
        if name not in backbone.outputs:
            raise DeclarationError(f"names: unknown output {name!r}, {did_you_mean(name, backbone.outputs)}")
    out = {}
    for name in backbone.outputs:
        base, slash, variant = name.partition("/")
        known = NAMES.get(base, base)
        default = known + slash + variant if known in STANDARD or "::" in known else f"symmetrize::{name}"
        out[name] = names.get(name, default)
    if len(set(out.values())) < len(out):
        raise DeclarationError(f"names: expected different names, got {out}")
    return out


def _metadata(
    model: Symmetrizer, inner: Any, name: str, description: str, authors: list[str], extra: dict[str, str], dtype: str
) -> Any:
    from metatomic.torch import ModelMetadata

    given = None if inner is None else inner.metadata()
    references: dict[str, list[str]] = {} if given is None else {k: list(v) for k, v in given.references.items()}
    if isinstance(model.method, ECSE):
        references["architecture"] = [*references.get("architecture", []), ARTICLE]
    provenance = {
        "symmetrized with": f"torch-symmetrize {version('torch-symmetrize')}",
        "method": repr(model.method),
        "group": model.group,
        "scope": model.scope,
        "backbone": type(model.backbone).__name__,
        "outputs": json.dumps({one: str(spec) for one, spec in model.backbone.outputs.items()}),
        "precision": dtype,
    }
    if given is not None:
        name = name or (f"{given.name}, symmetrized" if given.name else "")
        description, authors = description or given.description, authors or list(given.authors)
        provenance = {**dict(given.extra), **provenance}
    return ModelMetadata(
        name=name or f"{type(model.backbone).__name__}, symmetrized",
        description=description,
        authors=authors,
        references=references,
        extra={**provenance, **extra},
    )
