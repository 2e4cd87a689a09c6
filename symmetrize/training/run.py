"""`train`: from a recipe to a folder with trained weights, errors and everything needed to resume."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import InvalidInputError, MissingDependencyError
from symmetrize.files import write_text
from symmetrize.training.composition import baseline_of, count_species, energy_scale, fit_composition
from symmetrize.training.config import Recipe, RecipeError, load_recipe
from symmetrize.training.dataset import fingerprint, gather, read_structures
from symmetrize.training.gradients import Errors, evaluate
from symmetrize.training.models import (
    build_backbone,
    energy_reference,
    load_start,
    save_backbone,
    set_energy_reference,
)
from symmetrize.training.symmetrized import evaluate_symmetrized

if TYPE_CHECKING:
    from symmetrize.training.lit import TableDataModule, TrainingModule

RECIPE, RESULT, WEIGHTS, CHECKPOINTS = "recipe.json", "result.json", "model", "checkpoints"


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind.

    Attributes
    ----------
    folder : Path
        Of the run.
    weights : Path
        Stem of the weight files: add ``.safetensors`` or ``.json``.
    errors : dict of str to Errors
        Of the parts "validation" and "test" (where there is one): of the bare backbone in the orientation of the data,
        or of the symmetrised one, if that was trained.
    epochs : int
        Epochs that were completed.
    seconds : float
        Wall time of the training loop, summed over resumed attempts.
    backbone : Backbone
        The averaged weights of the best validation, on the CPU.
    report : dict
        Content of ``result.json``.
    """

    folder: Path
    weights: Path
    errors: dict[str, Errors]
    epochs: int
    seconds: float
    backbone: Backbone
    report: dict[str, Any]


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a backbone on energies and forces: bare, with random orientations, or through its symmetrisation.

    A run that was killed is taken up after its last complete epoch by calling this again; what follows is what would
    have followed without the interruption, since all randomness is a function of seed, epoch and step.

    Parameters
    ----------
    recipe : path or mapping
        YAML file or its content; see `Recipe`.
    output : path, optional
        Folder of the run; by default ``runs/<name of the recipe's file>`` in the working directory.
    resume : bool
        Continue (or return) the run that ``output`` holds; otherwise it is started again.
    progress : bool
        Report on the console.
    overrides : mapping, optional
        Entries that replace those of the recipe, by dotted name, such as ``{"data.path": "my.xyz", "epochs": 3}``.

    Returns
    -------
    TrainingResult

    Raises
    ------
    RecipeError
        The recipe is unusable, or ``output`` holds a run of another recipe.
    InvalidInputError
        The data is missing or unusable.
    MissingDependencyError
        Lightning is not installed.
    """
    settings = load_recipe(recipe, overrides)
    name = "training" if isinstance(recipe, Mapping) else Path(recipe).stem
    folder = Path("runs") / name if output is None else Path(output)
    _require_lightning()
    from symmetrize.training.lit import DTYPES, TableDataModule, TrainingModule, drawn_frames

    structures = read_structures(settings.data)
    present = tuple(sorted({int(z) for atoms in structures for z in atoms.numbers}))
    dtype = DTYPES[settings.dtype]
    backbone = _backbone(settings, present).to(dtype)
    atomic_types = _species(settings, present, backbone)
    table, parts, numbers = gather(structures, backbone.cutoff, settings.data)
    if settings.start_from is None:
        counts = count_species(table.batch["z"], table.batch["batch"], len(table), atomic_types)
        composition = fit_composition(counts[parts.train], table.energy[parts.train])
        baseline = baseline_of(table, composition, atomic_types)
        training_atoms = torch.isin(table.batch["batch"], parts.train)
        scale = energy_scale(table.forces[training_atoms], (table.energy - baseline)[parts.train])
        set_energy_reference(backbone, composition, scale)
    else:
        composition, scale = energy_reference(backbone)
        baseline = baseline_of(table, composition, atomic_types)

    data_hash = fingerprint(settings.data.path)
    _claim(folder, settings, data_hash, resume)
    module = TrainingModule(backbone, settings, scale)
    data = TableDataModule(table, parts, baseline, settings, drawn_frames(table, backbone, settings))
    n_parameters = sum(p.numel() for p in backbone.parameters())
    if progress:
        print(f"{folder}: {n_parameters} parameters, {len(parts.train)} training structures", flush=True)
    epochs, seconds = _fit(module, data, settings, folder, progress)

    best = folder / CHECKPOINTS / "best.ckpt"
    checkpoint = torch.load(best, map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    prefix = "average."
    backbone = module.average.cpu()
    backbone.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    backbone.eval()
    errors, bare = {}, {}
    for part in ("validation", "test"):
        members = getattr(parts, part)
        if len(members):
            bare[part] = evaluate(backbone, table, members, baseline, dtype=dtype)
            errors[part] = bare[part]
            if settings.symmetrize is not None:
                errors[part] = evaluate_symmetrized(
                    backbone, table, members, baseline, settings.symmetrize, dtype=dtype
                )
    report = {
        "data_sha256": data_hash,
        "data_source": settings.data.source,
        "units": {"energy": "eV", "length": "angstrom"},
        "errors": {part: found.to_dict() for part, found in errors.items()},
        **_orientation(settings, bare),
        "epochs": epochs,
        "best_epoch": int(checkpoint["epoch"]) + 1,
        "seconds": round(seconds, 1),
        "n_parameters": n_parameters,
        "energy_scale": scale,
        "composition": dict(zip(map(str, atomic_types), composition.tolist(), strict=True)),
        "test_structures": numbers[parts.test].tolist(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch-symmetrize", "torch", "lightning", "numpy")},
        },
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": {**settings.to_dict(), "data": {**settings.to_dict()["data"], "path": Path(settings.data.path).name}},
    }
    if module.global_rank == 0:
        save_backbone(backbone, folder / WEIGHTS, {"training": report})
        _write_json(folder / RESULT, report)
    if progress and module.global_rank == 0:
        for part, found in errors.items():
            print(
                f"{part}: force MAE {1e3 * found.forces_mae:.2f} meV/A, "
                f"energy MAE {1e3 * found.energy_mae:.2f} meV per structure",
                flush=True,
            )
    return TrainingResult(folder, folder / WEIGHTS, errors, epochs, seconds, backbone, report)


def _require_lightning() -> None:
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "training needs lightning; install it with: pip install 'torch-symmetrize[train]'"
        ) from error


def _claim(folder: Path, recipe: Recipe, data_hash: str, resume: bool) -> None:
    """Make sure that a folder is new or holds a run of the same recipe and data."""
    settings = recipe.to_dict()
    # Where the file lies, and on which hardware, does not make it another run.
    settings["data"].pop("path")
    settings["data"].pop("source")
    settings.pop("trainer")
    content = json.loads(json.dumps({"recipe": settings, "data_sha256": data_hash}))
    path = folder / RECIPE
    if not resume:
        for old in [path, folder / RESULT, folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.json"]:
            old.unlink(missing_ok=True)
        for old in (folder / CHECKPOINTS).glob("*.ckpt"):
            old.unlink()
    if path.is_file() and (folder / CHECKPOINTS / "last.ckpt").is_file():
        before = _flatten(json.loads(path.read_text(encoding="utf-8")))
        now = _flatten(content)
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if _constant_so_far(before, recipe, folder):
            differing = [key for key in differing if key not in ("recipe.epochs", "recipe.schedule.decay")]
        if differing:
            key = differing[0]
            raise RecipeError(
                f"output: {folder} holds a run of another recipe, expected {key} = {before.get(key)!r}, got "
                f"{now.get(key)!r}; choose another folder, or pass resume=False to start again"
            )
    _write_json(path, content)


def _constant_so_far(before: dict[str, Any], recipe: Recipe, folder: Path) -> bool:
    """Whether neither the earlier nor the new length of a run has made the learning rate fall yet."""
    last = torch.load(folder / CHECKPOINTS / "last.ckpt", map_location="cpu", weights_only=True)
    earlier = dataclasses.replace(recipe.schedule, decay=float(before["recipe.schedule.decay"]))
    done = int(last["epoch"]) + 1
    return done <= min(earlier.decay_start(before["recipe.epochs"]), recipe.schedule.decay_start(recipe.epochs))


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    return {k: v for name, inner in content.items() for k, v in _flatten(inner, f"{prefix}{name}.").items()}


def _backbone(recipe: Recipe, present: tuple[int, ...]) -> Backbone:
    if recipe.start_from is None:
        return build_backbone(recipe.backbone, present, recipe.seed)
    return load_start(recipe.backbone, recipe.start_from, present, recipe.seed)


def _orientation(recipe: Recipe, bare: dict[str, Errors]) -> dict[str, Any]:
    """What the errors of a report are those of."""
    if recipe.symmetrize is None:
        return {"orientation": "as in the data; the bare backbone, not symmetrised"}
    return {
        "orientation": "any; the backbone symmetrised over all frames",
        "errors_bare": {part: found.to_dict() for part, found in bare.items()},
    }


def _species(recipe: Recipe, present: tuple[int, ...], backbone: Backbone) -> tuple[int, ...]:
    """Species of the backbone, in its order; those that the data lacks get the mean composition energy."""
    declared = tuple(recipe.backbone.hyperparameters.get("atomic_types", present))
    if recipe.start_from is not None and backbone.species is not None:
        declared = backbone.species
    missing = [z for z in present if z not in declared]
    if missing:
        raise InvalidInputError(
            f"backbone.hyperparameters.atomic_types: expected all species of the data, {list(present)}, "
            f"got {list(declared)} without {missing}"
        )
    return declared


def _accelerator(name: Any) -> Any:
    """What Lightning is asked for: never Apple's MPS, which lacks the float64 of the reference energies."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name == "gpu" else name


def _fit(
    module: TrainingModule, data: TableDataModule, recipe: Recipe, folder: Path, progress: bool
) -> tuple[int, float]:
    """Run or resume the training loop; returns the completed epochs and their wall time (s)."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from symmetrize.training.lit import MONITOR, Stopwatch, progress_callback

    checkpoints = folder / CHECKPOINTS
    checkpoint = functools.partial(ModelCheckpoint, checkpoints, enable_version_counter=False)
    stopwatch = Stopwatch()
    callbacks: list[Callback] = [
        checkpoint(filename="best", monitor=MONITOR, save_on_train_epoch_end=False),
        checkpoint(filename="last", save_on_train_epoch_end=True, every_n_epochs=recipe.validation_interval),
        stopwatch,
    ]
    if recipe.patience > 0:
        callbacks.append(EarlyStopping(MONITOR, patience=recipe.patience, check_on_train_epoch_end=False))
    if progress:
        callbacks.append(progress_callback())
    options = {"devices": "auto", "log_every_n_steps": 1, **recipe.trainer}
    options["accelerator"] = _accelerator(options.get("accelerator", "auto"))
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=recipe.epochs,
            callbacks=callbacks,
            logger=CSVLogger(folder, name="logs"),
            default_root_dir=folder,
            precision="64-true" if recipe.dtype == "float64" else "32-true",
            gradient_clip_val=recipe.optimizer.clip or None,
            check_val_every_n_epoch=recipe.validation_interval,
            inference_mode=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=progress and any(type(c).__name__ == "TQDMProgressBar" for c in callbacks),
            enable_model_summary=False,
            **options,
        )
        last = checkpoints / "last.ckpt"
        # Lightning has this argument since 2.6; older ones unpickle whatever the checkpoint holds.
        restricted = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
        trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, **restricted)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return int(trainer.current_epoch), stopwatch.seconds


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on what is as it should be here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Batches are gathered from memory: worker processes would only slow this down.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # `last.ckpt` is written after the validation that `best.ckpt` belongs to.
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*dirpath has changed from.*")
        # Lightning itself still uses this.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
