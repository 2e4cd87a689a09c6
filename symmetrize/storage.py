"""A symmetrised model as a folder: ``model.json`` says what it is, ``model.safetensors`` holds its numbers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.files import replacing
from symmetrize.frames import FrameMethod
from symmetrize.methods import METHODS, find_method
from symmetrize.registry import rebuild_backbone
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.weights import check_dtype, fill

FORMAT = "torch-symmetrize model"
#: Of what is written. A change of the format adds a function to `UPGRADES`, which older folders go through.
VERSION = 1

Upgrade = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]

#: From the version of the key to the next one: (description, tensors) -> (description, tensors).
UPGRADES: dict[int, Upgrade] = {}

_STEM = "model"
_ENTRIES = {"symmetrizer", "method", "backbone", "training", "metadata"}


def is_saved_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that `save` wrote."""
    return (Path(path) / f"{_STEM}.json").is_file()


def save(model: Symmetrizer, folder: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None) -> None:
    """Write a symmetrised model into a folder, each file at once or not at all.

    Parameters
    ----------
    model : Symmetrizer
    folder : path
        Made where needed; a model in it is replaced.
    metadata : dict, optional
        Free-form, JSON-serialisable; see `read_metadata`.

    Raises
    ------
    InvalidTypeError
        If the model is not a `Symmetrizer`, or the metadata cannot be written as JSON.

    Warns
    -----
    UserWarning
        If whoever loads the model has to pass its backbone or its method, such as a wrapped module.
    """
    if not isinstance(model, Symmetrizer):
        raise InvalidTypeError(f"model: expected a Symmetrizer, got {type(model).__name__}")
    method, backbone = model.method, model.backbone
    description = {
        "format": FORMAT,
        "version": VERSION,
        "symmetrizer": {"group": model.group, "scope": model.scope, "chunk_size": model.chunk_size},
        "method": {
            "name": _name(method),
            "description": method.describe(),
            "auxiliary": None if method.auxiliary is None else _describe(method.auxiliary),
        },
        "backbone": _describe(backbone),
        "training": model.training,
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(description, indent=2) + "\n"
    except TypeError as error:
        raise InvalidTypeError(f"metadata: expected what JSON can hold, got {error}") from error
    _warn_where_incomplete(description, method)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with replacing(Path(folder) / _STEM, ".safetensors", ".json") as inner:
        save_file(tensors, f"{inner}.safetensors")
        Path(f"{inner}.json").write_text(text, encoding="utf-8")


def load(
    folder: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    method: FrameMethod | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Symmetrizer:
    """Read a symmetrised model from a folder.

    Nothing is executed but this package and the adapter that the description names.

    Parameters
    ----------
    folder : path
        What `save` wrote, by this or an older version.
    backbone : Backbone, optional
        Takes the saved parameters; needed where no adapter can make it, such as for a wrapped module of yours.
    method : FrameMethod, optional
        Likewise, for a method that is not one of this package.
    dtype : torch.dtype, optional
        float32 or float64; by default as it was saved.
    device : str or torch.device

    Raises
    ------
    InvalidInputError
        If the folder holds no such model, or parts of one, or one of a newer version.
    DeclarationError
        If ``backbone`` or ``method`` is needed, or does not fit.
    """
    check_dtype(dtype)
    description, tensors = _read(folder)
    if backbone is None:
        backbone = _make_backbone(description["backbone"], folder)
    elif not isinstance(backbone, Backbone):
        raise InvalidTypeError(f"backbone: expected a Backbone, got {type(backbone).__name__}")
    _check_declarations(backbone, description["backbone"])
    if method is None:
        method = _make_method(description["method"], folder)
    model = Symmetrizer(backbone, method, **description["symmetrizer"])
    _fill(model, tensors, folder)
    model.train(bool(description["training"]))
    if dtype is not None:
        model = model.to(dtype)
    return model.to(device)


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that a model was saved with."""
    return dict(_read_description(Path(folder)).get("metadata", {}))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / f"{_STEM}.json"
    if not path.is_file():
        raise InvalidInputError(f"model: expected a folder with a file {path.name!r}, got {str(folder)!r}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InvalidInputError(f"{path}: expected the description of a {FORMAT!r}")
    return description


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = _read_description(Path(folder))
    version = description.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version > VERSION:
        raise InvalidInputError(
            f"{folder}: expected a model of version {VERSION} or older, got {version!r}; "
            "a newer torch-symmetrize wrote it"
        )
    path = Path(folder) / f"{_STEM}.safetensors"
    if not path.is_file():
        raise InvalidInputError(f"model: expected a file {str(path)!r}, got none")
    try:
        tensors = load_file(path)
    except Exception as error:  # whatever safetensors raises for a damaged file
        raise InvalidInputError(f"{path}: expected safetensors, got {error}") from error
    for old in range(version, VERSION):
        if old not in UPGRADES:
            raise InvalidInputError(f"{folder}: models of version {old} can no longer be read")
        description, tensors = UPGRADES[old](description, tensors)
    for name in sorted(_ENTRIES - description.keys()):
        raise InvalidInputError(f"{folder}: the description lacks the entry {name!r}")
    return description, tensors


def _describe(backbone: Backbone) -> dict[str, Any]:
    outputs = {name: asdict(spec) for name, spec in backbone.outputs.items()}
    known = {"class": type(backbone).__name__, "adapter": None, "outputs": outputs, "description": None}
    if backbone.adapter is None:
        return known
    try:
        return {**known, "adapter": backbone.adapter, "description": backbone.describe()}
    except DeclarationError:  # it says so itself: whoever loads the model has to make the backbone
        return known


def _warn_where_incomplete(description: dict[str, Any], method: FrameMethod) -> None:
    missing = []
    if description["backbone"]["description"] is None:
        missing.append(("backbone", description["backbone"]["class"]))
    if description["method"]["name"] is None:
        missing.append(("method", type(method).__name__))
    for what, kind in missing:
        warnings.warn(
            f"save: the {what}, a {kind}, cannot be made again from a description: its numbers are saved, and whoever "
            f"loads the model passes the {what}: load(folder, {what}=...)",
            UserWarning,
            stacklevel=3,
        )


def _make_backbone(saved: dict[str, Any], folder: Any) -> Backbone:
    if saved["adapter"] is None:
        raise DeclarationError(
            f"{folder}: its backbone, a {saved['class']}, has no adapter that could make it again; "
            "make it yourself and pass it: load(folder, backbone=...)"
        )
    return rebuild_backbone(saved["adapter"], saved["description"])


def _check_declarations(backbone: Backbone, saved: dict[str, Any]) -> None:
    found = {name: asdict(spec) for name, spec in backbone.outputs.items()}
    if found != saved["outputs"]:
        raise DeclarationError(f"backbone: expected the outputs {saved['outputs']}, got {found}")


def _name(method: FrameMethod) -> str | None:
    home = METHODS.get(type(method).__name__)
    return type(method).__name__ if home is not None and type(method).__module__.startswith(home) else None


def _make_method(saved: dict[str, Any], folder: Any) -> FrameMethod:
    name = saved["name"]
    if name is None:
        raise DeclarationError(
            f"{folder}: its method is not one of this package; make it yourself and pass it: load(folder, method=...)"
        )
    if name not in METHODS:
        raise InvalidInputError(f"{folder}: unknown method {name!r}, {did_you_mean(str(name), METHODS)}")
    auxiliary = None if saved["auxiliary"] is None else _make_backbone(saved["auxiliary"], folder)
    return find_method(name).rebuild(saved["description"], auxiliary)


def _fill(model: Symmetrizer, tensors: dict[str, Tensor], folder: Any) -> None:
    # Each as it was saved: a model in float32 may keep its composition energies in float64.
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            value.data = value.data.to(tensors[name].dtype)
    fill(model, tensors, folder)
