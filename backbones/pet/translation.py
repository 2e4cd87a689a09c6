"""A PET that metatrain holds in memory as one of ours: configuration, parameters, composition and scale.

Parameters keep metatrain's names below ``backend.``, all but the last layers, where a target is made of blocks: the
blocks of a target become one layer, whose rows are reordered (properties outside, components inside) and, for spherical
targets, turned from the basis of metatensor (m = -l ... l about the z axis) into that of e3nn.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symmetrize.errors import DeclarationError, InvalidInputError, did_you_mean
from symmetrize.metatomic.tensor_maps import to_e3nn

from .config import (
    ACTIVATIONS,
    ADAPTIVE_CUTOFF_METHODS,
    CUTOFF_FUNCTIONS,
    FEATURIZER_TYPES,
    NORMALIZATIONS,
    TRANSFORMER_TYPES,
    PETConfig,
    Target,
)
from .model import PET

#: Present names of outputs, by what metatrain may call them.
_RENAMED = {"non_conservative_force": "non_conservative_forces"}
_CHOICES = {
    "cutoff_function": CUTOFF_FUNCTIONS,
    "normalization": NORMALIZATIONS,
    "activation": ACTIVATIONS,
    "transformer_type": TRANSFORMER_TYPES,
    "featurizer_type": FEATURIZER_TYPES,
    "adaptive_cutoff_method": ADAPTIVE_CUTOFF_METHODS,
}
_PLAIN = (
    "d_pet",
    "d_node",
    "d_head",
    "d_feedforward",
    "num_heads",
    "num_attention_layers",
    "num_gnn_layers",
    "max_charge",
    "max_spin_multiplicity",
)
_REAL = ("cutoff", "cutoff_width", "cutoff_width_adaptive", "attention_temperature")
_KNOWN = {*_CHOICES, *_PLAIN, *_REAL, "num_neighbors_adaptive", "zbl", "long_range", "system_conditioning"}
#: Modules of metatrain's backend that only hand on what they get, and its table of species.
_EMPTY = re.compile(r"^(gnn_layers_post_mp_|(node|edge)_backbone\.|species_to_species_index)")


@dataclass(frozen=True)
class _Block:
    """Rows of a last layer that belong to one block of a target.

    Attributes
    ----------
    key : str
        Its name among the last layers.
    number : int
        Its number among the blocks of the target.
    turn : Tensor of shape (n_rows, n_rows)
        From metatrain's rows to ours.
    properties : list of int
        The property that each of our rows belongs to.
    """

    key: str
    number: int
    turn: Tensor
    properties: list[int]


@dataclass(frozen=True)
class _Head:
    """A target of metatrain: its name there, our outputs, and the blocks that they are made of, in the same order."""

    name: str
    targets: tuple[Target, ...]
    blocks: tuple[_Block, ...]


def from_metatrain(
    model: Any,
    *,
    energy: str | None = None,
    targets: Iterable[str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> PET:
    """A PET of metatrain as one of ours: the same function in the same precision.

    Parameters
    ----------
    model : metatrain.pet.PET
    energy : str, optional
        The target that becomes ``energy``, where there are several energies.
    targets : iterable of str, optional
        The targets to keep; by default all that can be rotated, with a warning about the others.
    metadata : dict, optional
        Added to the provenance that is kept with the model.

    Raises
    ------
    DeclarationError
        For features and targets that are not supported, saying which.
    InvalidInputError
        Parameters that are not those of a PET.
    """
    hypers = dict(model.hypers)
    if dict(hypers.get("long_range") or {}).get("enable"):
        raise DeclarationError(
            "convert: this model has long-range features (long_range.enable), which are not supported: they are sums "
            "over the whole system, outside of the cutoff; export it with metatrain and wrap the exported file"
        )
    for name, value in hypers.items():
        if name not in _KNOWN and value:
            raise DeclarationError(
                f"convert: this model has the setting {name} = {value!r}, which is newer than this version of "
                "torch-symmetrize and may change the function"
            )
    heads = _heads(model, energy, targets)
    outputs = tuple(t for head in heads for t in head.targets)
    config = _config(hypers, model.dataset_info, outputs, _radii(model, outputs))
    backend = model.backend.state_dict()
    _merge_low_rank(model.backend, backend)
    dtype = backend["edge_embedder.weight"].dtype
    out = PET(config, metadata=metadata).to(dtype)
    _load(out, _parameters(backend, heads))
    _fill_references(out, model, heads)
    return out.eval()


def _config(
    hypers: dict[str, Any], info: Any, targets: tuple[Target, ...], radii: tuple[float, ...] | None
) -> PETConfig:
    unit = str(info.length_unit or "angstrom")
    if unit.lower() not in ("angstrom", "a", "å"):
        raise DeclarationError(f"convert: expected a model for lengths in angstrom, got one for {unit!r}")
    fields: dict[str, Any] = {name: hypers[name] for name in _PLAIN}
    fields |= {name: float(hypers[name]) for name in _REAL}
    for name, choices in _CHOICES.items():
        known = {choice.lower(): choice for choice in choices}
        value = str(hypers[name])
        if value.lower() not in known:
            raise DeclarationError(f"convert: {name} = {value!r} is not supported; {did_you_mean(value, choices)}")
        fields[name] = known[value.lower()]
    adaptive = hypers["num_neighbors_adaptive"]
    return PETConfig(
        atomic_types=tuple(int(z) for z in info.atomic_types),
        normalization_epsilon=None,
        targets=targets,
        num_neighbors_adaptive=None if adaptive is None else float(adaptive),
        zbl=radii,
        system_conditioning=bool(hypers["system_conditioning"]),
        **fields,
    )


def _radii(model: Any, targets: tuple[Target, ...]) -> tuple[float, ...] | None:
    """Covalent radii of the species, where a repulsion is added to the energy."""
    repelled = [name for additive in list(model.additive_models)[1:] for name in additive.outputs]
    energies = [target.readout for target in targets if target.name == "energy"]
    if not set(energies) & set(repelled):
        return None
    return tuple(float(radius) for radius in model.additive_models[1].covalent_radii)


def _heads(model: Any, energy: str | None, wanted: Iterable[str] | None) -> list[_Head]:
    infos = dict(model.dataset_info.targets)
    listed = None if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    for name in [*(listed or []), *([] if energy is None else [energy])]:
        if name not in infos:
            raise DeclarationError(f"convert: unknown target {name!r}; {did_you_mean(name, infos)}")
    chosen = _choose_energy(infos, energy, listed)
    variant = "" if chosen is None else chosen.partition("/")[2]
    heads, dropped = [], {}
    for name, info in infos.items():
        if listed is not None and name not in listed and name != chosen:
            continue
        base, _, of = name.partition("/")
        alias = "energy" if name == chosen else name
        if name != chosen and of == variant and base not in infos:
            alias = base  # the direct forces that belong to the chosen energy
        alias = _RENAMED.get(alias, alias)
        try:
            heads.append(_head(name, alias, info, list(model.output_shapes[name])))
        except DeclarationError as error:
            if listed is not None:
                raise DeclarationError(f"convert: target {name!r} is not supported: {error}") from error
            dropped[name] = str(error)
    if not heads:
        raise DeclarationError(f"convert: expected at least one target that is supported, got {dropped or 'none'}")
    for name, reason in dropped.items():
        warnings.warn(f"convert: target {name!r} is left out: {reason}", stacklevel=4)
    return heads


def _choose_energy(infos: dict[str, Any], energy: str | None, listed: list[str] | None) -> str | None:
    candidates = [
        name
        for name, info in infos.items()
        if info.quantity == "energy"
        and info.is_scalar
        and len(info.layout.block(0).properties) == 1
        and (listed is None or name in listed)
    ]
    if energy is not None:
        if energy not in candidates and (listed is None or energy in listed):
            raise DeclarationError(f"convert: energy: expected a scalar energy, {energy!r} is none; {candidates}")
        return energy
    if "energy" in candidates or len(candidates) == 1:
        return "energy" if "energy" in candidates else candidates[0]
    if candidates:
        raise DeclarationError(f"convert: energy: expected the name of one of the energies {candidates}, got none")
    return None


def _head(name: str, alias: str, info: Any, keys: list[str]) -> _Head:
    if info.is_atomic_basis or info.sample_kind == "atom_pair":
        raise DeclarationError("its blocks depend on the species of atoms or pairs (an atomic basis)")
    reduce = "sum" if info.sample_kind == "system" or alias == "energy" else None
    common: dict[str, Any] = {"reduce": reduce, "unit": str(info.unit), "head": None if name == alias else name}
    targets, blocks = [], []
    n_blocks = len(keys)
    for number, (key, (label, block)) in enumerate(zip(keys, info.layout.items(), strict=True)):
        entries = {k: int(v) for k, v in zip(label.names, label.values, strict=True)}
        components, n = [tuple(c.names) for c in block.components], len(block.properties)
        title = alias if n_blocks == 1 else f"{alias}[{','.join(f'{k}={v}' for k, v in entries.items())}]"
        size = math.prod(len(c) for c in block.components)
        change = torch.eye(size, dtype=torch.float64)
        if not components:
            targets.append(Target(title, irreps=f"{n}x0e", **common))
        elif components == [("xyz",)]:
            targets.append(Target(title, irreps=f"{n}x1o", **common))
        elif components == [("o3_mu",)] and {"o3_lambda", "o3_sigma"} <= set(entries):
            l, sigma = entries["o3_lambda"], entries["o3_sigma"]
            # A proper tensor (sigma = 1) of degree l has the parity of l vectors.
            parity = "e" if sigma * (-1) ** l == 1 else "o"
            targets.append(Target(title, irreps=f"{n}x{l}{parity}", **common))
            change = to_e3nn(l).T
        elif components == [(f"xyz_{k + 1}",) for k in range(len(components))]:
            stress = name == "non_conservative_stress"
            formula = "ij=ji" if stress else "ijklmn"[: len(components)]
            for k in range(n):
                each = title if n == 1 else f"{title}[{k}]"
                shared = common if n == 1 and n_blocks == 1 else common | {"head": name}
                targets.append(Target(each, cartesian=formula, per_volume=stress, **shared))
        else:
            raise DeclarationError(f"it cannot be told how components {components} with keys {entries} rotate")
        # Rows (component, property) become rows (property, component).
        turn = torch.kron(torch.eye(n, dtype=torch.float64), change)
        order = torch.arange(size * n).reshape(size, n).T.reshape(-1)
        rows = torch.zeros(size * n, size * n, dtype=torch.float64)
        rows[torch.arange(size * n), order] = 1.0
        blocks.append(_Block(key, number, turn @ rows, [k for k in range(n) for _ in range(size)]))
    if n_blocks > 1:
        targets = [Target(**{**vars(target), "head": name}) for target in targets]
    return _Head(name, tuple(targets), tuple(blocks))


def _merge_low_rank(backend: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Add the low-rank updates of a fine-tuning (LoRA) to the weights that they update."""
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        first, second = state.pop(name), state.pop(f"{stem}.lora_B.weight")
        scaling = float(backend.get_submodule(stem).scaling)  # type: ignore[arg-type]
        state[f"{stem}.weight"] = state.pop(f"{stem}.linear.weight") + scaling * (second @ first)
        if f"{stem}.linear.bias" in state:
            state[f"{stem}.bias"] = state.pop(f"{stem}.linear.bias")


def _parameters(backend: dict[str, Tensor], heads: list[_Head]) -> dict[str, Tensor]:
    kept = {head.name: head for head in heads}
    out: dict[str, Tensor] = {}
    for name, value in backend.items():
        parts = name.split(".")
        if _EMPTY.match(name):
            continue
        if not re.match(r"^(node|edge)_(heads|last_layers)$", parts[0]):
            out[name] = value
        elif parts[1] in kept and parts[0].endswith("_heads"):
            out[name] = value
        elif parts[1] in kept and parts[3] == kept[parts[1]].blocks[0].key:
            rows = []
            for block in kept[parts[1]].blocks:
                whole = backend[".".join([*parts[:3], block.key, parts[4]])]
                permutation = bool(((block.turn == 0) | (block.turn == 1)).all())
                # Rows that are only reordered stay what they are, to the last bit.
                rows.append(whole[block.turn.argmax(dim=1)] if permutation else block.turn.to(whole) @ whole)
            out[".".join([*parts[:3], parts[4]])] = torch.cat(rows)
    return out


def _load(model: PET, parameters: dict[str, Tensor]) -> None:
    expected = model.network.state_dict()
    for name in sorted(expected.keys() ^ parameters.keys()):
        problem = "lacks the" if name in expected else "holds the unknown"
        raise InvalidInputError(f"convert: the checkpoint {problem} parameter {name!r}")
    for name, value in parameters.items():
        if value.shape != expected[name].shape:
            raise InvalidInputError(
                f"convert: {name}: expected shape {tuple(expected[name].shape)}, got {tuple(value.shape)}"
            )
    model.network.load_state_dict(parameters)


def _fill_references(out: PET, model: Any, heads: list[_Head]) -> None:
    """Composition and scale."""
    composition = model.additive_models[0]
    column = 0
    for head in heads:
        scales = model.scaler.model.scales[head.name]
        weights = composition.model.weights.get(head.name)
        names = None if weights is None else list(weights.keys.names)
        keys = list(model.dataset_info.targets[head.name].layout.keys)
        for block in head.blocks:
            n = len(block.properties)
            # (n_species or 1, n_properties), for all components of a property
            scale = scales.block(block.number).values.detach().to("cpu", torch.float64)
            out.factor[:, column : column + n] = scale[:, block.properties]
            if weights is not None:
                for key, part in weights.items():
                    if names == list(keys[block.number].names) and list(key.values) == list(keys[block.number].values):
                        values = part.values.detach().to("cpu", torch.float64).reshape(len(out.config.atomic_types), -1)
                        out.offset[:, column : column + n] = values @ block.turn.T
            column += n
    for part in out._layout:
        if part.name == "energy" and part.stop - part.start == 1:
            out.composition.copy_(out.offset[:, part.column])
            out.offset[:, part.column] = 0.0
