"""Training recipes: YAML files turned into validated, frozen dataclasses."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from symmetrize.errors import DeclarationError, did_you_mean


class RecipeError(DeclarationError):
    """A training recipe is incomplete or contradictory, or holds an unknown entry."""


@dataclass(frozen=True)
class DataRecipe:
    """Where the structures come from and how they are split.

    Attributes
    ----------
    path : str
        File that ASE reads (extended xyz); relative paths start at the folder of the recipe.
    train, validation, test : int
        Numbers of structures, drawn without replacement.
    split_seed : int
        Seed of the permutation: test structures come first, then validation, then training, so that a smaller
        training set keeps the same test set.
    energy_key, forces_key : str
        Names of the reference values (eV per structure, eV/angstrom).
    source : str
        Where to get the file; part of the message when it is missing.
    """

    path: str
    train: int
    validation: int
    test: int = 0
    split_seed: int = 0
    energy_key: str = "energy"
    forces_key: str = "forces"
    source: str = ""


@dataclass(frozen=True)
class BackboneRecipe:
    """Which network to train.

    Attributes
    ----------
    name : str
        Name of an adapter in ``symmetrize.backbones``, or ``"package.module:factory"`` where the factory is called
        with ``atomic_types`` and the hyperparameters.
    hyperparameters : dict
        Passed to the adapter; ``atomic_types`` comes from the data where it is not given, and may hold more species
        than the data does.
    """

    name: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossRecipe:
    """What is minimised, in units of the energy scale of the data set.

    Attributes
    ----------
    energy, forces : float
        Weights of the error of the energy per atom and of the force components; 0 leaves one of them out. Forces alone
        leave the offset of the energies open.
    kind : str
        "mse", "huber" (quadratic up to ``huber_delta``, linear beyond), "mae", or "norm" (length of the error vector
        of each atom, and the absolute error of the energy).
    huber_delta : float
        In units of the energy scale.
    """

    energy: float = 1.0
    forces: float = 1.0
    kind: Literal["mse", "huber", "mae", "norm"] = "huber"
    huber_delta: float = 0.02


@dataclass(frozen=True)
class OptimizerRecipe:
    """Optimizer and gradient clipping.

    Attributes
    ----------
    name : str
        "adamw", or "muon" (orthogonalised momentum for the matrices of linear layers, AdamW for the rest).
    lr : float
        Highest learning rate.
    weight_decay : float
        Decoupled weight decay.
    beta1, beta2 : float
        Decay rates of AdamW's moments.
    momentum : float
        Momentum of Muon.
    clip : float
        Largest norm of the gradient; 0: no clipping.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    momentum: float = 0.95
    clip: float = 1.0


@dataclass(frozen=True)
class ScheduleRecipe:
    """Linear warmup, constant rate, and half a cosine down to a fraction of the highest learning rate.

    Attributes
    ----------
    warmup : float
        Epochs.
    decay : float
        Epochs, the last ones; 0: everything behind the warmup. While the rate is constant, a run may be resumed with
        other ``epochs`` and ``decay``, since what was done so far is the same.
    final : float
        Last learning rate, relative to the highest one.
    """

    warmup: float = 2.0
    decay: float = 0.0
    final: float = 0.0

    def rate(self, epoch: float, epochs: int) -> float:
        """Learning rate, relative to the highest one, after ``epoch`` (with fractions) of ``epochs``."""
        if epoch < self.warmup:
            return epoch / self.warmup
        start = self.decay_start(epochs)
        progress = min(1.0, max(0.0, (epoch - start) / max(1e-9, epochs - start)))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def decay_start(self, epochs: int) -> float:
        """Epoch from which on the rate falls."""
        return max(self.warmup, epochs - self.decay) if self.decay > 0 else self.warmup


@dataclass(frozen=True)
class SymmetrizeRecipe:
    """Training of the symmetrised network instead of the bare one, whose weights are saved all the same.

    Attributes
    ----------
    method : str
        Frame method: "ecse" or "group_averaging".
    options : dict
        Arguments of the method, such as ``cutoff_width``.
    group : str
        "O(3)" or "SO(3)".
    scope : str, optional
        "atom" or "structure"; by default as `symmetrize.Symmetrizer` resolves it.
    frames : str
        "sampled": frames drawn with their weights as probabilities, new ones in every epoch (see
        `symmetrize.methods.sampled.SampledFrames`), for little more than a bare step per sample; the expectation of
        energies and forces is that of the average, the loss also penalises their variance over frames. "all": the
        average itself, at the cost of all frames.
    n_samples : int
        Frames of every owner that are drawn.
    score_every : int
        With ``n_samples: 1``, one step in so many, chosen at random, contains the derivative of the probabilities,
        multiplied by this number: right in expectation, and only these steps evaluate companions.
    chunk_size : int, optional
        With ``frames: all``, atoms per call of the network, which bounds the memory; see `symmetrize.Symmetrizer`.
    """

    method: Literal["ecse", "group_averaging"] = "ecse"
    options: dict[str, Any] = field(default_factory=dict)
    group: Literal["O(3)", "SO(3)"] = "O(3)"
    scope: Literal["atom", "structure"] | None = None
    frames: Literal["sampled", "all"] = "sampled"
    n_samples: int = 1
    score_every: int = 3
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise RecipeError(f"symmetrize.n_samples: expected a positive number, got {self.n_samples}")
        if self.score_every < 1:
            raise RecipeError(f"symmetrize.score_every: expected a positive number, got {self.score_every}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise RecipeError(f"symmetrize.chunk_size: expected a positive number of atoms, got {self.chunk_size}")
        if self.frames == "all" and self.n_samples != 1:
            raise RecipeError("symmetrize.n_samples: expected frames: sampled, got all of them")
        if self.frames == "sampled" and self.chunk_size is not None:
            raise RecipeError("symmetrize.chunk_size: expected frames: all; frames that are drawn take one call")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Attributes
    ----------
    data, backbone, loss, optimizer, schedule
        See the classes of these sections.
    epochs, batch_size : int
        Passes over the training structures, and structures per step and device.
    seed : int
        Of the initial weights, the order of the structures and the random orientations.
    dtype : str
        "float32" or "float64".
    augmentation : bool
        Whether every structure is seen in a random element of O(3) at every step. A symmetrised network is the same in
        all of them: nothing is turned where there is a section ``symmetrize``.
    ema : float
        Decay per step of the running average of the weights, which is what is validated and saved; 0: no average.
    validate_every : int
        Epochs between validations and checkpoints, at most: fewer where this does not divide ``epochs``, so that the
        last epoch is among them.
    patience : int
        Stop after this many validations without a better force error; 0: never.
    trainer : dict
        Passed to ``lightning.pytorch.Trainer``: ``accelerator``, ``devices``, ``num_nodes``, ``strategy``, ... The
        accelerator is CUDA where there is any and the CPU otherwise, unless it is given; "mps" has no float64, which
        reference energies need.
    symmetrize : SymmetrizeRecipe, optional
        Train the symmetrised network; by default the bare one.
    start_from : str, optional
        Weights to start from, composition energies and energy scale included: those of an adapter by name, as
        ``"pet:ethanol"``, or the stem of weight files that a run saved, relative to the folder of the recipe.
    """

    data: DataRecipe
    backbone: BackboneRecipe
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    epochs: int = 100
    batch_size: int = 8
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    augmentation: bool = True
    ema: float = 0.999
    validate_every: int = 1
    patience: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
    symmetrize: SymmetrizeRecipe | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        positive = {
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "validate_every": self.validate_every,
            "optimizer.lr": self.optimizer.lr,
            "loss.huber_delta": self.loss.huber_delta,
        }
        for name, value in positive.items():
            if not value > 0:
                raise RecipeError(f"{name}: expected a positive number, got {value}")
        not_negative = {
            "data.test": self.data.test,
            "seed": self.seed,
            "data.split_seed": self.data.split_seed,
            "patience": self.patience,
            "schedule.warmup": self.schedule.warmup,
            "schedule.decay": self.schedule.decay,
            "loss.energy": self.loss.energy,
            "loss.forces": self.loss.forces,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "optimizer.clip": self.optimizer.clip,
        }
        for name, value in not_negative.items():
            if not value >= 0:
                raise RecipeError(f"{name}: expected zero or a positive number, got {value}")
        fractions = {
            "ema": self.ema,
            "schedule.final": self.schedule.final,
            "optimizer.beta1": self.optimizer.beta1,
            "optimizer.beta2": self.optimizer.beta2,
            "optimizer.momentum": self.optimizer.momentum,
        }
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise RecipeError(f"{name}: expected a number from 0 to below 1, got {value}")
        if self.loss.energy == self.loss.forces == 0:
            raise RecipeError("loss: expected a positive weight for the energy or the forces, got none")
        if self.trainer.get("accelerator") == "mps":
            raise RecipeError("trainer.accelerator: expected 'auto', 'cpu' or 'cuda', got 'mps', which has no float64")
        for name in self.trainer:
            if name in _RESERVED:
                raise RecipeError(f"trainer.{name}: set by {_RESERVED[name]}, not here")

    @property
    def validation_interval(self) -> int:
        """Epochs between validations: the largest divisor of ``epochs`` up to ``validate_every``."""
        return next(n for n in range(self.validate_every, 0, -1) if self.epochs % n == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, inverse of `load_recipe`."""
        return dataclasses.asdict(self)


_RESERVED = {
    "max_epochs": "epochs",
    "max_steps": "epochs",
    "callbacks": "train",
    "logger": "train",
    "default_root_dir": "output",
    "precision": "dtype",
    "gradient_clip_val": "optimizer.clip",
    "check_val_every_n_epoch": "validate_every",
    "inference_mode": "train",
    "use_distributed_sampler": "train",
    "num_sanity_val_steps": "train",
    "enable_checkpointing": "train",
    "enable_progress_bar": "progress",
}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Recipe from a YAML file or a nested mapping.

    Parameters
    ----------
    source : path or mapping
    overrides : mapping, optional
        Values that replace those of the recipe, with dotted names: ``{"data.path": "other.xyz", "epochs": 3}``.

    Returns
    -------
    Recipe

    Raises
    ------
    RecipeError
        No such file, no valid YAML, unknown, missing or unusable entries; the message holds the dotted name.
    """
    folder = Path()
    if isinstance(source, Mapping):
        content: Any = source
    else:
        folder = Path(source).parent
        content = _read_yaml(Path(source))
    if not isinstance(content, Mapping):
        raise RecipeError(f"recipe: expected sections such as 'data' and 'backbone', got {type(content).__name__}")
    values = _copy(content)
    for name, value in (overrides or {}).items():
        _assign(values, name, value)
    recipe = _build(Recipe, values, "")
    path = Path(recipe.data.path).expanduser()
    given = "data.path" in (overrides or {})
    if not path.is_absolute() and not given:
        path = folder / path
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(path)))
    start = recipe.start_from
    if start is not None and not is_named(start) and not Path(start).is_absolute():
        recipe = dataclasses.replace(recipe, start_from=str(folder / start))
    return recipe


def is_named(weights: str) -> bool:
    """Whether weights are named as ``"adapter:name"`` and not by a path."""
    adapter, colon, name = weights.partition(":")
    return bool(colon) and adapter.isidentifier() and len(adapter) > 1 and name.replace("-", "_").isidentifier()


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise RecipeError(f"recipe: expected a YAML file, there is none at {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: {path} is no valid YAML: {error}") from error


def _copy(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in content.items()}


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{name}: {section!r} is no section of the recipe")
        values = inner
    values[last] = value


def _build(cls: type, values: Any, where: str) -> Any:
    """Dataclass from a mapping, converting and checking the type of every entry."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where}: expected a section, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise RecipeError(f"{prefix}{name}: unknown entry; {did_you_mean(str(name), fields)}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RecipeError(f"{prefix}{name}: expected an entry, got none")
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:  # of one type and None
        (inner,) = (choice for choice in typing.get_args(hint) if choice is not types.NoneType)
        return None if value is None else _convert(inner, value, where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise RecipeError(f"{where}: unknown value {value!r}; {did_you_mean(str(value), choices)}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: expected a section, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
