"""The Lightning side of training: module, data module, reproducible order, console output."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.training.config import LossRecipe, Recipe
from symmetrize.training.dataset import TARGET_ENERGY, TARGET_FORCES, Split, StructureTable, augment, generator_for
from symmetrize.training.drawn import DrawnFrames
from symmetrize.training.gradients import energy_and_forces, error_sums, errors_from
from symmetrize.training.muon import Muon, muon_groups
from symmetrize.training.symmetrized import (
    baseline_energy,
    frame_variance,
    in_place,
    make_symmetrizer,
    sampled_energy_and_forces,
    symmetrized_energy_and_forces,
)

MONITOR = "validation/forces_mae"
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# First number of the seeds of each use of randomness, so that no two of them share a stream.
_ORDER, _ORIENTATION, _FRAMES = 1, 2, 3


def loss_of(error: Tensor, recipe: LossRecipe) -> Tensor:
    """Mean loss of errors in units of the energy scale: ``error`` of shape (n, 1) or (n, 3)."""
    if recipe.kind == "mse":
        return error.square().mean()
    if recipe.kind == "mae":
        return error.abs().mean()
    if recipe.kind == "norm":
        return (error.square().sum(dim=1) + 1e-12).sqrt().mean()
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=recipe.huber_delta)


class TrainingModule(pl.LightningModule):
    """A bare backbone, its running average, the loss and the optimizer.

    With a section ``symmetrize`` in the recipe, the loss is that of the symmetrised backbone.

    Parameters
    ----------
    backbone : Backbone
        With a per-atom output ``energy``; what is trained.
    recipe : Recipe
    scale : float
        Energy scale (eV) in whose units the loss is measured.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, scale: float) -> None:
        super().__init__()
        self.backbone = backbone
        # A frozen copy instead of a callback: it is part of every checkpoint and moves along with the module.
        self.average = copy.deepcopy(backbone).requires_grad_(False)
        self.recipe = recipe
        self.scale = scale
        self.scope = None if recipe.symmetrize is None else make_symmetrizer(backbone, recipe.symmetrize).scope
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._variances = torch.zeros(4, dtype=torch.float64)

    def _predict(self, batch: Batch, batch_idx: int) -> tuple[Batch, Tensor, Tensor]:
        """What a step is about: the batch (perhaps turned), energies and forces."""
        recipe, settings = self.recipe, self.recipe.symmetrize
        key = (self.current_epoch, batch_idx, self.global_rank)
        if settings is None:
            if recipe.augmentation:
                batch = augment(batch, generator_for(recipe.seed, _ORIENTATION, *key))
            return batch, *energy_and_forces(self.backbone, batch, create_graph=True)
        sampled = settings.frames == "sampled"
        if self.scope is not None and sampled and in_place(self.backbone, self.scope):
            score, every = 1.0, settings.score_every
            if settings.n_samples == 1:
                number = torch.randint(every, (), generator=generator_for(recipe.seed, _FRAMES, *key))
                score = 0.0 if int(number) else float(every)
            return batch, *sampled_energy_and_forces(
                self.backbone, batch, self.scope, settings.n_samples, create_graph=True, score=score
            )
        model = make_symmetrizer(self.backbone, settings, sampled=sampled)
        generator = generator_for(recipe.seed, _FRAMES, *key) if sampled else None
        return batch, *symmetrized_energy_and_forces(model, batch, create_graph=True, generator=generator)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        recipe = self.recipe
        batch, energy, forces = self._predict(batch, batch_idx)
        # Sampled frames come with a copy of the batch for each sample.
        n_atoms = batch[keys.PTR].diff()[: energy.shape[0]]
        target_energy, target_forces = batch[TARGET_ENERGY][: energy.shape[0]], batch[TARGET_FORCES][: forces.shape[0]]
        # Even with weight 0: forces do not depend on the last biases, and every parameter needs a gradient, of zero if
        # need be, where several devices wait for each other's.
        error = (energy - target_energy) / (n_atoms * self.scale)
        loss = recipe.loss.energy * loss_of(error[:, None], recipe.loss)
        if recipe.loss.forces > 0:
            loss = loss + recipe.loss.forces * loss_of((forces - target_forces) / self.scale, recipe.loss)
        size = int(n_atoms.shape[0])
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        force_error = (forces.detach() - target_forces).abs().mean()
        self.log("train/forces_mae", force_error, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # The decay grows to its final value, so that the first random weights are forgotten at once.
        step = self.global_step
        decay = min(self.recipe.ema, (1.0 + step) / (10.0 + step)) if self.recipe.ema > 0 else 0.0
        with torch.no_grad():
            average = [parameter.detach() for parameter in self.average.parameters()]
            current = [parameter.detach() for parameter in self.backbone.parameters()]
            torch._foreach_lerp_(average, current, 1.0 - decay)

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._variances = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        settings = self.recipe.symmetrize
        if settings is None or self.scope is None:
            with torch.enable_grad():
                energy, forces = energy_and_forces(self.average, batch, create_graph=False)
        else:
            model = make_symmetrizer(self.average, settings)
            out = model(batch, forces=True, spread=True, create_graph=False)
            energy, forces = out["energy"] - baseline_energy(self.average, batch), out["forces"]
            found = [out["energy_spread"].to(torch.float64).square()]
            if in_place(self.average, self.scope):
                found.append(frame_variance(self.average, batch, settings, self.scope, self.recipe.seed + batch_idx))
            for n, values in enumerate(found):
                self._variances[2 * n : 2 * n + 2] += torch.tensor([float(values.sum()), values.numel()])
        self._sums = self._sums + error_sums(energy, forces, batch).cpu()

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum")
        errors = errors_from(torch.as_tensor(sums))
        for name in ("energy_mae", "energy_rmse", "forces_mae", "forces_rmse"):
            self.log(f"validation/{name}", getattr(errors, name), sync_dist=True)
        variances = torch.as_tensor(
            self.trainer.strategy.reduce(self._variances.to(self.device), reduce_op="sum")
        ).tolist()
        for name, total, count in (("energy", *variances[:2]), ("forces", *variances[2:])):
            if count > 0:
                variance = total / count
                square = getattr(errors, f"{name}_rmse") ** 2
                self.log(f"validation/orientation_spread_{name}", variance**0.5, sync_dist=True)
                # Of the squared error of one frame, what averaging removes.
                self.log(
                    f"validation/orientation_share_{name}", variance / max(variance + square, 1e-300), sync_dist=True
                )

    def configure_optimizers(self) -> Any:
        recipe = self.recipe.optimizer
        betas = (recipe.beta1, recipe.beta2)
        optimizer: torch.optim.Optimizer
        if recipe.name == "muon":
            optimizer = Muon(
                muon_groups(self.backbone),
                lr=recipe.lr,
                momentum=recipe.momentum,
                betas=betas,
                weight_decay=recipe.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                self.backbone.parameters(), lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay, fused=True
            )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        epochs = self.recipe.epochs
        # The rate of a step is that of its end, so that the first one does not vanish.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.recipe.schedule.rate((step + 1) * epochs / total, epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpochOrder(Sampler[int]):
    """Seeded order of the training structures, a new one every epoch; with several devices, the share of one.

    Parameters
    ----------
    n_structures : int
    seed : int
    rank, n_ranks : int
        Which device of how many.
    """

    def __init__(self, n_structures: int, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        self.n_structures, self.seed, self.rank, self.n_ranks = n_structures, seed, rank, n_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = generator_for(self.seed, _ORDER, self.epoch)
        order = torch.randperm(self.n_structures, generator=generator)
        # Every device takes the same number of steps, or the others wait forever.
        order = order.repeat(2 + self.n_ranks // self.n_structures)[: len(self) * self.n_ranks]
        return iter(order[self.rank :: self.n_ranks].tolist())

    def __len__(self) -> int:
        return -(-self.n_structures // self.n_ranks)


def validation_share(structures: list[int], rank: int, n_ranks: int) -> list[int]:
    """Structures that one of several devices validates on: no list is empty, or the other devices wait forever.

    Every structure counts once, unless there are fewer structures than devices.
    """
    return structures[rank % len(structures) :: n_ranks]


class TableDataModule(pl.LightningDataModule):
    """Batches gathered from a `StructureTable`.

    Parameters
    ----------
    table : StructureTable
    parts : Split
    baseline : Tensor of shape (n_structures,)
        Composition energies (eV).
    recipe : Recipe
    drawn : DrawnFrames, optional
        Frames that training batches come with.
    """

    def __init__(
        self, table: StructureTable, parts: Split, baseline: Tensor, recipe: Recipe, drawn: DrawnFrames | None = None
    ) -> None:
        super().__init__()
        self.table, self.parts, self.baseline, self.recipe = table, parts, baseline, recipe
        self.drawn = drawn

    def _collate(self, picked: list[int]) -> Batch:
        return self.table.select(torch.tensor(picked), DTYPES[self.recipe.dtype], self.baseline)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        structures = self.parts.train.tolist()
        order = EpochOrder(len(structures), self.recipe.seed, *self._ranks())
        collate, drawn = self._collate, self.drawn
        if drawn is not None:

            def collate(picked: list[int]) -> Batch:
                upcoming = [structures[n] for n in order]
                return drawn.select(picked, DTYPES[self.recipe.dtype], self.baseline, order.epoch, upcoming)

        return DataLoader(structures, self.recipe.batch_size, sampler=order, collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        structures = validation_share(self.parts.validation.tolist(), *self._ranks())
        return DataLoader(structures, max(50, self.recipe.batch_size), collate_fn=self._collate)  # type: ignore[arg-type]


def drawn_frames(table: StructureTable, backbone: Backbone, recipe: Recipe) -> DrawnFrames | None:
    """Frames for the batches of a recipe that samples them, where they are evaluated in place."""
    settings = recipe.symmetrize
    if settings is None or settings.frames != "sampled":
        return None
    model = make_symmetrizer(backbone, settings)
    if not in_place(backbone, model.scope):
        return None
    return DrawnFrames(table, model, settings, (recipe.seed, _FRAMES))


class EpochLines(Callback):
    """One line per validation on standard output, for logs and terminals without cursor control."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        n_epochs = trainer.max_epochs or epoch
        if not trainer.is_global_zero or MONITOR not in trainer.callback_metrics:
            return
        if epoch % trainer.check_val_every_n_epoch and epoch != n_epochs:  # type: ignore[operator]
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        elapsed = time.monotonic() - self._start
        left = elapsed / max(1, epoch - self._first) * (n_epochs - epoch)
        print(
            f"epoch {epoch:>{len(str(n_epochs))}}/{n_epochs}"
            f"  loss {metrics.get('train/loss', math.nan):.3e}"
            f"  force MAE [meV/A] train {1e3 * metrics.get('train/forces_mae', math.nan):.2f}"
            f" validation {1e3 * metrics[MONITOR]:.2f}"
            f"  energy MAE [meV] {1e3 * metrics['validation/energy_mae']:.2f}"
            f"  {elapsed:.0f} s, {left:.0f} s left",
            flush=True,
        )


class Stopwatch(Callback):
    """Wall time of the training loop (s), carried over to resumed runs by the checkpoints.

    Attributes
    ----------
    seconds : float
        Up to the last epoch that ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic() - self.seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._since

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])


def progress_callback() -> Callback:
    """A bar on a terminal, lines elsewhere."""
    return TQDMProgressBar(refresh_rate=10) if sys.stderr.isatty() else EpochLines()
