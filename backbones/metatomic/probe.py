"""What is found out about a model by evaluating it when it is loaded."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import assemble, validate, with_neighbors
from symmetrize.data import replace as with_fields
from symmetrize.errors import DeclarationError
from symmetrize.metatomic import import_metatomic
from symmetrize.metatomic.tensor_maps import Part
from symmetrize.representations import OutputSpec

from .model import MetatomicBackbone, copied_systems, evaluate, list_cutoff, request
from .outputs import HOW, declared, recognized

#: Distance of atoms in the structures that models are tried on, angstrom.
SPACING = 1.6


def find_parts(
    model: Any, wanted: dict[str, OutputSpec | None], sources: dict[str, str], dtype: torch.dtype, strict: bool
) -> tuple[dict[str, Part], dict[str, str]]:
    """Outputs by name, and those that are left out with the reason, from an evaluation of a cluster.

    Parameters
    ----------
    model : metatomic.torch.AtomisticModel
    wanted : dict of str to OutputSpec or None
        None: to be recognised.
    sources : dict of str to str
        What the model calls each of them.
    dtype : torch.dtype
    strict : bool
        Whether an output that is not recognised is an error.

    Raises
    ------
    DeclarationError
        An output is not there as declared, cannot be recognised though it has to be, or none can.
    """
    capabilities = model.capabilities().outputs
    left_out: dict[str, str] = {}
    requests: dict[str, Any] = {}
    for name, spec in wanted.items():
        kind = capabilities[sources[name]].sample_kind
        if kind not in ("atom", "system"):
            left_out[name] = f"it is per {kind.replace('_', ' ')}"
        elif spec is not None and spec.per == "atom" and kind == "system":
            raise DeclarationError(f"outputs[{name!r}]: the model has it per structure only, got {spec}")
        else:
            per = spec.per if spec is not None else "atom" if kind == "atom" else "structure"
            requests[name] = request(model, sources[name], per)
    tensors, failed = _tried(model, requests, sources, dtype)
    parts: dict[str, Part] = {}
    for name, asked in requests.items():
        spec = wanted[name]
        if name not in failed:
            _check_dtype(name, tensors[name], dtype)
        try:
            if name in failed:
                raise DeclarationError(failed[name])
            if spec is not None:
                found = declared(name, tensors[name], replace(spec, unit=spec.unit or asked.unit))
            else:
                found = recognized(name, tensors[name], asked.unit)
        except DeclarationError as error:
            if spec is not None:
                raise
            left_out[name] = str(error)
        else:
            parts |= {key: replace(part, source=sources[name]) for key, part in found.items()}
    if strict and left_out:
        name, reason = next(iter(left_out.items()))
        raise DeclarationError(f"outputs: cannot tell how {name!r} is to be rotated: {reason}; {HOW % name}")
    if not parts:
        raise DeclarationError(f"model: expected an output that can be rotated, got {left_out}; {HOW % '...'}")
    return parts, left_out


def _tried(
    model: Any, requests: dict[str, Any], sources: dict[str, str], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, str]]:
    """TensorMaps of a cluster by name, and what went wrong for the others."""
    problem = ""
    # Some models are of crystals only.
    for periodic in (False, True):
        batch = cluster(model, dtype, periodic)
        try:
            got = evaluate(model, copied_systems(model, batch), {sources[name]: r for name, r in requests.items()})
            missing = {name: "declared, but not returned" for name in requests if sources[name] not in got}
            return {name: got[sources[name]] for name in requests if name not in missing}, missing
        except (RuntimeError, ValueError) as error:
            problem = problem or _reason(error)
    tensors, failed = {}, {}
    for name, one in requests.items():
        try:
            tensors[name] = evaluate(model, copied_systems(model, cluster(model, dtype)), {sources[name]: one})[
                sources[name]
            ]
        except (RuntimeError, ValueError, KeyError) as error:
            failed[name] = f"evaluating it fails: {_reason(error)}"
    if not tensors:
        raise DeclarationError(f"model: cannot be evaluated in {dtype}: {problem}")
    return tensors, failed


def _check_dtype(name: str, tensor: Any, dtype: torch.dtype) -> None:
    for block in tensor.blocks():
        if block.values.dtype != dtype:
            raise DeclarationError(
                f"dtype: expected a model that can be evaluated in the precision {dtype}, its output {name!r} is "
                f"{block.values.dtype}"
            )


def _reason(error: Exception) -> str:
    """The last line of what TorchScript reports: the message, below the stack."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def energies_alone(backbone: MetatomicBackbone) -> dict[str, Tensor]:
    """For every output that is an energy, that of each species on its own: Tensor of shape (largest species + 1,).

    Any constants of the species will do as a baseline. Those of lone atoms hold the composition's part whatever the
    model makes of it, and need no data.
    """
    names = [name for name, part in backbone.parts.items() if part.spec.is_invariant_scalar and _is_energy(part)]
    if not names:
        return {}
    species = list(backbone.species or ())
    # With a cluster, since some models fail where there is no edge at all.
    crowd = cluster(backbone.model, backbone.dtype)
    n = crowd[keys.POS].shape[0]
    lone = torch.zeros(len(species), 3, dtype=backbone.dtype)
    batch = assemble(
        pos=torch.cat([lone, crowd[keys.POS].cpu()]),
        counts=torch.tensor([1] * len(species) + [n]),
        z=torch.cat([torch.tensor(species), crowd[keys.Z].cpu()]),
    )
    batch = with_vectors(backbone, batch).to(backbone.reference.device)
    try:
        with torch.no_grad():
            raw = backbone.raw(batch)
    except (RuntimeError, ValueError) as error:
        warnings.warn(
            f"metatomic: the energies of lone atoms could not be found ({_reason(error)}): total energies keep the "
            "precision of the model",
            stacklevel=3,
        )
        return {}
    out = {}
    for name in names:
        values = raw[name][: len(species)].to(torch.float64)
        if bool(torch.isfinite(values).all()):
            constants = values.new_zeros(max(species) + 1)
            constants[species] = values
            out[name] = constants
    return out


def _is_energy(part: Part) -> bool:
    if not part.spec.unit:
        return False
    try:
        import_metatomic().unit_conversion_factor(part.spec.unit, "eV")
    except (RuntimeError, ValueError):
        return False
    return True


def nonlocal_outputs(backbone: MetatomicBackbone, hops: int) -> dict[str, float]:
    """Outputs per atom that change when what lies beyond some number of hops is left out, and by how much.

    Compares a chain of atoms with the environments of two of them, as atom scope evaluates them.
    """
    names = [name for name, spec in backbone.outputs.items() if spec.per == "atom"]
    cutoff = backbone.cutoff
    if not names or cutoff is None:
        return {}
    n = max(6, math.ceil((2 * hops + 1) * cutoff / SPACING))
    batch = _placed(backbone.model, n, backbone.dtype, chain=True)
    batch = with_neighbors(with_vectors(backbone, batch), cutoff).to(backbone.reference.device)
    found: dict[str, float] = {}
    with torch.no_grad():
        try:
            whole = backbone.raw(batch)
        except (RuntimeError, ValueError):  # of crystals only, for example: what is declared has to be believed
            return {}
        for center in (0, n // 2):
            try:
                part = backbone.raw(_environment(batch, center, hops))
            except (RuntimeError, ValueError):
                return dict.fromkeys(names, math.nan)
            for name in names:
                change = float((part[name][0] - whole[name][center]).abs().max())
                eps = torch.finfo(backbone.dtype).eps
                size = float(whole[name].abs().max())
                constants = backbone.constants.get(name)
                rest = whole[name] if constants is None else whole[name] - constants[batch[keys.Z]]
                if not change <= eps * (20 * size + 1e4 * float(rest.abs().max())):
                    found[name] = max(change, found.get(name, 0.0))
    return found


def _environment(batch: Batch, center: int, hops: int) -> Batch:
    """What an atom depends on after some hops, as the evaluator of `symmetrize.Symmetrizer` copies it."""
    source, target = batch[keys.EDGE_INDEX]
    atoms = inner = torch.tensor([center], device=source.device)
    for _ in range(hops):
        inner = atoms
        atoms = torch.unique(torch.cat([atoms, source[torch.isin(target, atoms)]]))
    edges = torch.isin(target, inner).nonzero()[:, 0]
    row = torch.zeros(len(batch[keys.Z]), dtype=torch.int64, device=source.device)
    row[atoms] = torch.arange(len(atoms), device=source.device)
    vectors = {name: batch[name][atoms] for name in ("velocity", "momentum") if batch.get(name) is not None}
    return Batch(
        pos=batch[keys.POS][atoms],
        z=batch[keys.Z][atoms],
        batch=torch.zeros_like(atoms),
        ptr=torch.tensor([0, len(atoms)], device=source.device),
        cell=batch[keys.CELL],
        pbc=batch[keys.PBC],
        edge_index=row[batch[keys.EDGE_INDEX][:, edges]],
        cell_shift=batch[keys.CELL_SHIFT][edges],
        edge_vec=batch[keys.EDGE_VEC][edges],
        center_mask=atoms == center,
        **vectors,
    )


def cluster(model: Any, dtype: torch.dtype, periodic: bool = False) -> Batch:
    """A few atoms of as many species as possible, with the edges that the model asks for."""
    n = min(max(8, len(model.capabilities().atomic_types)), 27)
    batch = _placed(model, n, dtype)
    if periodic:
        side = 4 * SPACING * torch.eye(3, dtype=dtype)
        batch = with_fields(batch, cell=side[None], pbc=torch.ones(1, 3, dtype=torch.bool))
    for name in ("velocity", "momentum"):
        batch = with_fields(batch, **{name: _random(n, dtype, 1)})
    cutoff = list_cutoff(model)
    batch = validate(batch)
    batch = batch if cutoff is None else with_neighbors(batch, cutoff)
    held = next(model.parameters(), next(model.buffers(), None))
    return batch if held is None else batch.to(held.device)


def with_vectors(backbone: MetatomicBackbone, batch: Batch) -> Batch:
    """Random values for the vectors that a model asks for."""
    n = len(batch[keys.Z])
    return validate(with_fields(batch, **{name: _random(n, backbone.dtype, 1) for name in backbone.vectors}))


def _random(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _placed(model: Any, n: int, dtype: torch.dtype, chain: bool = False) -> Batch:
    """Atoms on a cubic lattice of three by three rows, or on a line, all displaced at random."""
    k = torch.arange(n)
    sites = torch.stack([k, 0 * k, 0 * k] if chain else [k % 3, (k // 3) % 3, k // 9], dim=1).to(torch.float64)
    pos = SPACING * (sites + 0.12 * _random(n, torch.float64, 0).clamp(-2.5, 2.5))
    species = torch.tensor(list(model.capabilities().atomic_types))
    return validate(assemble(pos=pos.to(dtype), counts=torch.tensor([n]), z=species[k % len(species)]))
