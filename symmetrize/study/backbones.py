"""Backbones of a study: by name, or trained first and kept in the folder of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, SymmetrizeError
from symmetrize.registry import load_backbone
from symmetrize.storage import is_saved_model, load
from symmetrize.study.config import Study, StudyError
from symmetrize.study.structures import DataFile
from symmetrize.training.config import BackboneRecipe, RecipeError, is_named, load_recipe

#: Folder of trained backbones inside that of a run.
TRAINED = "backbones"


# --- by name ---------------------------------------------------------------------------------------------------------


def resolve_name(name: str, folder: Path) -> str:
    """The name of a backbone, with paths that are relative to a folder made absolute."""
    if is_saved_model(folder / name):
        return str(folder / name)
    adapter, colon, argument = name.partition(":")
    for suffix in ("", ".json", ".safetensors"):
        if colon and argument and (folder / f"{argument}{suffix}").exists():
            return f"{adapter}:{folder / argument}"
    return name


def load_named(name: str, options: Mapping[str, Any]) -> Backbone:
    """A backbone as the command line names it: ``"adapter"``, ``"adapter:argument"`` or the folder of a saved model."""
    if is_saved_model(name):
        return load(name).backbone
    adapter, _, argument = name.partition(":")
    return load_backbone(adapter, *([argument] if argument else []), **options)


def fingerprint_backbone(backbone: Backbone) -> str:
    """SHA-256 of everything that the numbers of a backbone depend on, as far as it can be read off."""
    digest = hashlib.sha256()
    try:
        description: Any = backbone.describe()
    except DeclarationError:
        description = repr(backbone)
    declared = {name: str(spec) for name, spec in backbone.outputs.items()}
    content = [type(backbone).__qualname__, declared, backbone.cutoff, backbone.receptive_field, description]
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for name, value in sorted(backbone.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- trained ---------------------------------------------------------------------------------------------------------


def training_recipe(study: Study, label: str, seed: int, file: DataFile | None = None) -> dict[str, Any]:
    """What `symmetrize.training.train` gets for a backbone of a study.

    The structures that the study evaluates are never trained on: they are held out of every data set of the same path.

    Parameters
    ----------
    study : Study
    label : str
        Of the backbone.
    seed : int
    file : DataFile, optional
        Of its data set; without it the recipe is only good for being checked.

    Raises
    ------
    StudyError
        Naming the place in the study.
    """
    where = f"backbones.{label}.train"
    entry = study.backbones[label]
    recipe = dict(entry.train or {})
    split = dict(recipe.pop("data"))
    name = split.pop("set")
    data = study.data[name]
    same = {k: other for k, other in study.data.items() if other.path == data.path}
    evaluated = {k for k in entry.data or study.data if k in same}
    for other in evaluated:
        if same[other].test == 0:
            raise StudyError(
                f"data.{other}.test: expected a number of structures to hold out, since {label!r} is trained on others "
                "of this file, got 0: all"
            )
        if same[other].split_seed != data.split_seed:
            raise StudyError(
                f"data.{other}.split_seed: expected {data.split_seed} as for {name!r}, the same file, "
                f"got {same[other].split_seed}"
            )
    held_out = max([_held_out(study, k) for k in {*evaluated, name}])
    start = recipe.get("start_from")
    if isinstance(start, str) and not is_named(start):
        recipe["start_from"] = str(study.folder / start)
    full = {
        **recipe,
        "seed": seed,
        "data": {
            **split,
            "path": data.path if file is None else str(file.path),
            "source": data.source,
            "test": held_out,
            "split_seed": data.split_seed,
            "energy_key": "energy" if data.energy in (None, "auto") else data.energy,
            "forces_key": "forces" if data.forces in (None, "auto") else data.forces,
        },
    }
    try:
        return load_recipe(full).to_dict()
    except RecipeError as error:
        raise StudyError(f"{where}.{error}") from error


def _held_out(study: Study, label: str) -> int:
    data = study.data[label]
    return data.test if data.held_out is None else data.held_out


def training_hash(recipe: Mapping[str, Any], file: DataFile) -> str:
    """16 digits that name a trained backbone: of its recipe and data, wherever the file lies and whatever trains it."""
    content = json.loads(json.dumps(recipe))
    for name in ("path", "source"):
        content["data"].pop(name)
    content.pop("trainer")
    start = content.get("start_from")
    if start is not None and not is_named(start):
        path = Path(f"{start}.safetensors")
        content["start_from"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else start
    content["data_sha256"] = file.sha256
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_trained(folder: Path) -> bool:
    """Whether a training run in a folder is complete."""
    return (folder / "result.json").is_file() and (folder / "model.safetensors").is_file()


def train_backbone(spec: dict[str, Any]) -> dict[str, Any]:
    """Train a backbone, or go on where an earlier attempt was stopped; in a process of its own.

    Parameters
    ----------
    spec : dict
        ``recipe`` and ``folder``.

    Returns
    -------
    dict
        Content of ``result.json``.
    """
    from symmetrize.training import train

    folder = Path(spec["folder"])
    if not is_trained(folder):
        train(spec["recipe"], output=folder, resume=True, progress=False)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def load_trained(folder: Path) -> Backbone:
    """The backbone that `train_backbone` left in a folder.

    Raises
    ------
    SymmetrizeError
        There is none.
    """
    from symmetrize.training.models import load_start

    if not is_trained(folder):
        raise SymmetrizeError(f"backbones: expected a trained backbone in {folder.name}, got none")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    recipe = BackboneRecipe(**result["recipe"]["backbone"])
    atomic_types = tuple(int(z) for z in result["composition"])
    return load_start(recipe, str(folder / "model"), atomic_types, int(result["recipe"]["seed"]))


def epochs_done(folder: Path) -> int | None:
    """Epochs that a training run has logged so far; None before the first one."""
    logs = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return None
    try:
        lines = logs[-1].read_text(encoding="utf-8").splitlines()
        column = lines[0].split(",").index("epoch")
        return 1 + max(int(line.split(",")[column]) for line in lines[1:] if line.split(",")[column])
    except (ValueError, IndexError, OSError):
        return None
