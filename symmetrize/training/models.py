"""From the name in a recipe to a backbone, untrained or with weights to start from, and from a trained one to files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.files import replacing
from symmetrize.registry import load_backbone
from symmetrize.training.config import BackboneRecipe, RecipeError, is_named


@runtime_checkable
class Savable(Protocol):
    """A backbone with weight files of its own: ``<path>.safetensors`` and ``<path>.json``, which holds ``metadata``."""

    metadata: dict[str, Any]

    def save(self, path: Path) -> Any:
        """Write both files."""


def build_backbone(recipe: BackboneRecipe, atomic_types: tuple[int, ...], seed: int) -> Backbone:
    """Untrained backbone with seeded weights.

    "pet" is the one short name: its module is imported when it is asked for, since adapters live outside the core.
    Everything else is named as ``"package.module:factory"`` and needs no entry here.

    Parameters
    ----------
    recipe : BackboneRecipe
    atomic_types : tuple of int
        Used where the recipe gives none.
    seed : int
        The global generator of torch is left as it was.

    Raises
    ------
    RecipeError
        Unknown backbone, or hyperparameters that it refuses.
    """
    hyperparameters = {"atomic_types": list(atomic_types), **recipe.hyperparameters}
    factory = _pet if recipe.name == "pet" else _factory(recipe.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            backbone = factory(hyperparameters, seed)
        except (DeclarationError, TypeError) as error:
            raise RecipeError(f"backbone.hyperparameters: {error}") from error
    if not isinstance(backbone, Backbone):
        raise InvalidTypeError(f"backbone.name: {recipe.name} made a {type(backbone).__name__}, expected a Backbone")
    if "energy" not in backbone.outputs or backbone.outputs["energy"].per != "atom":
        raise RecipeError(f"backbone.name: expected a per-atom output 'energy', got {backbone.outputs}")
    return backbone


def _pet(hyperparameters: dict[str, Any], seed: int) -> Any:
    # Adapters are found by name at run time: the core does not import them.
    pet = importlib.import_module("symmetrize.backbones.pet")
    return pet.PET(pet.PETConfig.from_dict(hyperparameters), seed=seed)


def _factory(name: str) -> Callable[[dict[str, Any], int], Any]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise RecipeError(
            f"backbone.name: expected 'package.module:factory' or a trainable backbone, got {name!r}; "
            + did_you_mean(name, ["pet"])
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"backbone.name: cannot import {name!r}: {error}") from error
    return lambda hyperparameters, seed: factory(**hyperparameters)


def load_start(recipe: BackboneRecipe, weights: str, atomic_types: tuple[int, ...], seed: int) -> Backbone:
    """The backbone of a recipe with trained weights.

    Parameters
    ----------
    recipe : BackboneRecipe
        Hyperparameters of "pet" come from the weights; those that are given have to agree.
    weights : str
        ``"adapter:name"``, or the stem of weight files.
    atomic_types, seed
        See `build_backbone`.

    Raises
    ------
    RecipeError
        There are no such weights, or they are those of another network.
    """
    adapter, _, name = weights.partition(":")
    named = is_named(weights)
    if named and adapter != recipe.name:
        raise RecipeError(f"start_from: expected weights of the backbone {recipe.name!r}, got {weights!r}")
    if recipe.name != "pet":
        from safetensors.torch import load_file

        path = Path(f"{weights}.safetensors")
        if not path.is_file():
            raise RecipeError(f"start_from: expected a file {str(path)!r}, got none")
        backbone = build_backbone(recipe, atomic_types, seed)
        try:
            backbone.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise RecipeError(f"start_from: {path}: {error}") from error
        return backbone
    try:
        backbone = load_backbone("pet", name if named else weights)
    except (DeclarationError, InvalidInputError) as error:
        raise RecipeError(f"start_from: {error}") from error
    found = backbone.describe()["config"]
    for key, value in recipe.hyperparameters.items():
        got = found.get(key)
        if key not in found or (list(got) != list(value) if isinstance(value, (list, tuple)) else got != value):
            raise RecipeError(
                f"backbone.hyperparameters.{key}: expected what the weights {weights!r} have, {got!r}, got {value!r}"
            )
    return backbone.train()


def energy_reference(backbone: Backbone) -> tuple[torch.Tensor, float]:
    """Composition energies (n_species,) and the energy scale (eV) that a backbone holds.

    Raises
    ------
    RecipeError
        The backbone has no buffers ``composition`` and ``scale``.
    """
    buffers = dict(backbone.named_buffers())
    for name in ("composition", "scale"):
        if name not in buffers:
            raise RecipeError(f"start_from: {type(backbone).__name__} has no buffer {name!r}, which training reads")
    return buffers["composition"].detach().to(torch.float64).reshape(-1), float(buffers["scale"])


def set_energy_reference(backbone: Backbone, composition: torch.Tensor, scale: float) -> None:
    """Store composition energies (n_species,) and the energy scale (eV) in a backbone.

    Raises
    ------
    RecipeError
        The backbone has no buffers ``composition`` and ``scale``, or not one entry per species.
    """
    buffers = dict(backbone.named_buffers())
    for name, value in {"composition": composition, "scale": torch.tensor(scale)}.items():
        if name not in buffers:
            raise RecipeError(f"backbone: {type(backbone).__name__} has no buffer {name!r}, which training sets")
        if buffers[name].numel() != value.numel():
            raise RecipeError(
                f"backbone: {type(backbone).__name__}: buffer {name!r}: expected {value.numel()} entries, "
                f"got {buffers[name].numel()}"
            )
        with torch.no_grad():
            buffers[name].copy_(value.reshape(buffers[name].shape))


def save_backbone(backbone: Backbone, stem: Path, metadata: dict[str, Any]) -> None:
    """Write ``stem.safetensors`` and ``stem.json``; neither name ever stands for half a file."""
    with replacing(stem, ".safetensors", ".json") as inner:
        if isinstance(backbone, Savable):
            backbone.metadata = metadata
            backbone.save(inner)
        else:
            from safetensors.torch import save_file

            save_file(
                {name: value.contiguous() for name, value in backbone.state_dict().items()}, f"{inner}.safetensors"
            )
            Path(f"{inner}.json").write_text(json.dumps({"metadata": metadata}, indent=2), encoding="utf-8")
