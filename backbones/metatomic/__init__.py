"""Any model in the metatomic format as a backbone, from its file alone."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.metatomic.libraries import load_model
from symmetrize.representations import OutputSpec

from .model import DTYPES, MetatomicBackbone, declared_hops
from .outputs import Declared, declared_outputs, others, present_name
from .probe import energies_alone, find_parts, nonlocal_outputs

__all__ = ["MetatomicBackbone", "load", "rebuild"]


def load(
    model: Any,
    outputs: Iterable[str] | Declared | None = None,
    *,
    extensions_directory: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> MetatomicBackbone:
    """An exported metatomic model as a backbone.

    Outputs are per atom where the model can give them so. Where, in addition, its interaction range is that of its
    neighbor list (and it keeps to that, which is tried on a chain of atoms), `symmetrize.Symmetrizer` evaluates
    environments of atoms by default (atom scope), which is exact in crystals and of linear cost; otherwise whole
    structures (structure scope). An output that is per structure only, or an infinite range, leaves structure scope
    alone; a range of several neighbor lists leaves both, and structure scope is the default. ``scope`` of the
    Symmetrizer chooses.

    Parameters
    ----------
    model : str, path or metatomic.torch.AtomisticModel
        A file holds TorchScript, which is run; load files that you trust.
    outputs : iterable of str, or dict of str to OutputSpec or None, optional
        Outputs of the model, by default all but features and variants. How they transform is read from the components
        of their blocks; an OutputSpec says it where the model does not, or where it is wrong.
    extensions_directory : path, optional
        Of the compiled libraries that the model needs.
    dtype : torch.dtype, optional
        float32 or float64; by default that of the file. Exact means exact to rounding: in float64, most models are.
    device : str or torch.device

    Returns
    -------
    MetatomicBackbone
        Its ``left_out`` says which outputs of the model are not there, and why.

    Raises
    ------
    MissingDependencyError
        metatomic is not installed.
    InvalidInputError
        The file is not there, or not a metatomic model.
    DeclarationError
        Unknown outputs, outputs that cannot be rotated though they were asked for, a precision or a device that the
        model does not have, inputs that cannot be provided.

    Warns
    -----
    UserWarning
        Outputs were left out because nothing says how they transform; or the model does not keep to its range.
    """
    if dtype not in (None, *DTYPES.values()):
        raise InvalidTypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    loaded = load_model(model, extensions_directory)
    capabilities = loaded.capabilities()
    if capabilities.dtype not in DTYPES:
        raise DeclarationError(f"model: expected float32 or float64 in its capabilities, got {capabilities.dtype!r}")
    place = torch.device(device)
    if place.type not in capabilities.supported_devices:
        raise DeclarationError(f"device: expected one of {list(capabilities.supported_devices)}, got {place.type!r}")
    # Read again by `rebuild`, so the iterable is not to be used up.
    if outputs is not None and not isinstance(outputs, str):
        outputs = dict(outputs) if isinstance(outputs, Mapping) else list(outputs)
    known = capabilities.outputs
    wanted = declared_outputs(known, outputs)
    precision = DTYPES[capabilities.dtype] if dtype is None else dtype
    loaded = loaded.to(device=place, dtype=precision)
    sources = {name: present_name(name, known) for name in wanted}
    parts, left_out = find_parts(loaded, wanted, sources, precision, strict=outputs is not None)
    if outputs is None:
        left_out |= others(known, wanted)
    origin = {}
    if isinstance(model, (str, os.PathLike)):
        origin = {
            "path": str(Path(model).resolve()),
            "sha256": _hash(model),
            "outputs": outputs if not isinstance(outputs, dict) else {k: v and asdict(v) for k, v in outputs.items()},
            "extensions_directory": None if extensions_directory is None else os.fspath(extensions_directory),
        }
    backbone = MetatomicBackbone(
        loaded, parts, hops=declared_hops(loaded), dtype=precision, left_out=left_out, origin=origin
    )
    backbone.constants = energies_alone(backbone)
    if backbone.receptive_field is not None:
        backbone.receptive_field = _tried_hops(backbone, backbone.receptive_field)
    if outputs is None and left_out:
        listed = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        warnings.warn(
            f"metatomic: left out {listed}; choose with outputs=[...], or declare with "
            "outputs={name: OutputSpec(...)}",
            stacklevel=2,
        )
    return backbone


def _tried_hops(backbone: MetatomicBackbone, stated: int) -> int | None:
    """The number of hops within which an environment gives what the whole structure gives: the declared one or more.

    Declared ranges are not always right. A PET of metatrain that combines the messages of both directions of an edge
    after each block (``featurizer_type: feedforward``) sees one cutoff more than it says.
    """
    far: dict[str, float] = {}
    for hops in range(stated, stated + 3):
        found = nonlocal_outputs(backbone, hops)
        if not found:
            break
        far = far or found
    else:
        hops = 0
    if far:
        reach = stated * float(backbone.cutoff or 0.0)
        listed = ", ".join(f"{name!r} by {change:.1e}" for name, change in far.items())
        instead = f"{hops} hops of the neighbor list are assumed" if hops else "environments cannot be evaluated alone"
        warnings.warn(
            f"metatomic: expected outputs to depend on no more than {reach:g} angstrom as declared, but atoms beyond "
            f"change {listed}; {instead}",
            stacklevel=3,
        )
    return hops or None


def rebuild(description: dict[str, Any]) -> MetatomicBackbone:
    """The model of a description, from the same file.

    Raises
    ------
    InvalidInputError
        The file has moved or changed.
    """
    options = dict(description)
    path, expected = options.pop("path"), options.pop("sha256")
    hint = "; load it yourself: symmetrize.load(folder, backbone=symmetrize.backbones.metatomic.load(path, ...))"
    if not Path(path).is_file():
        raise InvalidInputError(f"{path}: expected the metatomic model that was symmetrised, got no such file{hint}")
    if _hash(path) != expected:
        raise InvalidInputError(
            f"{path}: expected the metatomic model that was symmetrised, the file has changed{hint}"
        )
    outputs = options.pop("outputs")
    if isinstance(outputs, dict):
        outputs = {name: None if spec is None else OutputSpec(**spec) for name, spec in outputs.items()}
    with warnings.catch_warnings():
        # Said when it was loaded for the first time.
        warnings.filterwarnings("ignore", message="metatomic: ")
        return load(path, outputs, dtype=DTYPES[options.pop("dtype")], **options)


def _hash(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
