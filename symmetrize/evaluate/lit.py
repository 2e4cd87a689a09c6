"""The Lightning side of evaluation: one process for each device, each with its share of the batches."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from tqdm import tqdm

from symmetrize.errors import SymmetrizeError
from symmetrize.evaluate.job import Job
from symmetrize.evaluate.parts import Parts
from symmetrize.symmetrizer import Symmetrizer


class PredictionModule(pl.LightningModule):
    """Evaluates the share of one device and files it.

    Parameters
    ----------
    job : Job
    parts : Parts
        Where predictions go.
    shares : list of list of list of int
        Batches of every process. Of this and ``parts``, what the first process says counts.
    progress : bool
        Show a bar, for the first process.
    """

    def __init__(self, job: Job, parts: Parts, shares: list[list[list[int]]], progress: bool = True) -> None:
        super().__init__()
        self.job, self.parts, self.shares, self.progress = job, parts, shares, progress
        # Made by each process: not every network can be pickled, and its name can.
        self.model: Symmetrizer | None = None
        self._bar: tqdm[Any] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # This is a process that Lightning has spawned: it has not been told yet to be quiet.
        _silence()

    def setup(self, stage: str) -> None:
        self.parts, self.shares = self.trainer.strategy.broadcast((self.parts, self.shares))
        # Here and not in `configure_model`, where Lightning makes the device the default one for all tensors: Lightning
        # moves the model.
        if self.model is None:
            self.model = self.job.build()

    def predict_dataloader(self) -> DataLoader[Any]:
        # Numbers of structures only: what is wrong with a structure comes up where it can be told to all.
        return DataLoader(self.shares[self.trainer.global_rank], batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        if self.trainer.is_global_zero and self.progress:
            total = len(self.shares[0])
            self._bar = tqdm(total=total, unit="batch", desc="first device", disable=None, leave=False)

    def predict_step(self, batch: list[int], batch_idx: int) -> list[int]:
        # An error in one process would leave the others waiting: all stop at once, and the first one raises it.
        if self.model is not None and self.parts.failure is None:
            try:
                self.parts.write(self.job.predict(self.model, batch, self.device))
            except SymmetrizeError as error:
                self.parts.fail(error)
        if self._bar is not None:
            self._bar.update()
        return batch

    def on_predict_end(self) -> None:
        if self._bar is not None:
            self._bar.close()


def is_first_process() -> bool:
    """Whether this is the process that the user started, and not one that Lightning started beside it."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def predict_on_devices(
    job: Job,
    parts: Parts,
    shares: list[list[list[int]]],
    *,
    accelerator: str,
    devices: int | list[int],
    strategy: str,
) -> None:
    """Evaluate all shares, one for each device; returns, in every process, when the parts of all are there."""
    with _quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.predict(PredictionModule(job, parts, shares), return_predictions=False)
        trainer.strategy.barrier("predictions")


def _as_it_is(item: Any) -> Any:
    return item


_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def _silence() -> None:
    """No advice from Lightning on what is as it should be here."""
    # There is nothing to load.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning itself still uses this.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        _silence()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
