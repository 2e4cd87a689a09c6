"""Checkpoints of metatrain's PET as models of this package.

A checkpoint is read by metatrain's own loader, which upgrades old versions of the format, and is translated in memory.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from symmetrize.errors import (
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    MissingDependencyError,
    did_you_mean,
)
from symmetrize.metatomic import compilable, import_metatrain

from .model import PET
from .translation import from_metatrain

WEIGHTS = {"best": "export", "last": "restart"}
ARCHITECTURE = "pet"
#: The version of metatrain's format in which parameters have the names that are translated here.
OLDEST_FORMAT = 16


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    trust_pickle: bool = False,
    weights: str = "best",
    energy: str | None = None,
    targets: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> PET:
    """A checkpoint of metatrain's PET as a model of this package, and, with ``output``, as files.

    The result is the same function: energies without the composition, forces and direct outputs agree with metatrain's
    to rounding in both precisions.

    Parameters
    ----------
    path : str or path
        The checkpoint (``model.ckpt``), of any version that the installed metatrain upgrades.
    output : str or path, optional
        Write ``<output>.safetensors`` and ``<output>.json``.
    trust_pickle : bool
        Checkpoints of metatrain are pickles: reading one runs whatever code it contains. Refused unless True.
    weights : {"best", "last"}
        The best ones of the training, which metatrain exports, or the last.
    energy : str, optional
        The target that becomes ``energy``, where there are several energies.
    targets : iterable of str, optional
        The targets to keep; by default all that can be rotated, with a warning about the others.
    dtype : torch.dtype, optional
        float32 or float64; by default that of the checkpoint.

    Returns
    -------
    PET
        In evaluation mode; ``metadata["converted"]`` says what from.

    Raises
    ------
    InvalidInputError
        A file that is no checkpoint, of another architecture, or of a version that metatrain does not know; a pickle
        that was not declared as trusted.
    MissingDependencyError
        metatrain is not installed, or too old.
    DeclarationError
        Features or targets that are not supported, saying which.
    """
    if weights not in WEIGHTS:
        raise DeclarationError(f"weights: unknown value {weights!r}; {did_you_mean(str(weights), WEIGHTS)}")
    if dtype not in (None, torch.float32, torch.float64):
        raise InvalidTypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    problem = _problem(path)
    if problem:
        raise InvalidInputError(f"{os.fspath(path)}: expected a checkpoint of metatrain, got {problem}")
    if not trust_pickle:
        raise InvalidInputError(
            f"{os.fspath(path)}: refused, because checkpoints of metatrain are pickles: reading one runs whatever code "
            "is in it, with your rights, before anything can be checked. If you made it yourself, or trust where it "
            "comes from, say so with trust_pickle=True (on the command line --trust-pickle). What is written is free "
            "of code."
        )
    metatrain = import_metatrain()
    io = import_metatrain("metatrain.utils.io")
    if import_metatrain("metatrain.pet").PET.__checkpoint_version__ < OLDEST_FORMAT:
        raise MissingDependencyError(
            f"convert: metatrain {metatrain.__version__} is too old, 2026.4 or later upgrades its checkpoints: "
            "pip install --upgrade metatrain"
        )
    checkpoint = _read(path)
    provenance = _provenance(checkpoint, path, weights, metatrain.__version__)
    try:
        with compilable(), warnings.catch_warnings():
            # What its loader says about long-range features and old formats is said here, in errors and metadata.
            warnings.simplefilter("ignore")
            original = io.model_from_checkpoint(checkpoint, context=WEIGHTS[weights])
    except Exception as error:  # whatever fails in there: our user has not called it
        raise InvalidInputError(
            f"{os.fspath(path)}: metatrain {metatrain.__version__} cannot read this checkpoint: {error}; "
            "it may need another version of metatrain (pip install --upgrade metatrain)"
        ) from error
    provenance["metadata"] = _metadata(original.metadata)
    provenance["hypers"] = {name: value for name, value in _plain(original.hypers).items()}
    model = from_metatrain(original.eval(), energy=energy, targets=targets, metadata={"converted": provenance})
    model = model if dtype is None else model.to(dtype)
    if output is not None:
        model.save(output)
    return model


def _problem(path: str | os.PathLike[str]) -> str:
    """What a file is instead of a checkpoint, found without unpickling anything; empty if it may be one."""
    if not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "no such file"
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            # What torch.save wrote before 2020 begins with a pickled number.
            return "" if file.read(1) == b"\x80" else "another kind of file"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        return f"a broken archive ({error})"
    if "extra/metatomic-version" in names:
        return "an exported model: load it as it is, as a metatomic model, or convert the model.ckpt beside it"
    if "constants.pkl" in names:
        return "a TorchScript module"
    return "" if "data.pkl" in names else "an archive of something else"


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with compilable():
            checkpoint = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:  # unpickling runs code, and may fail in any way
        raise InvalidInputError(
            f"{os.fspath(path)}: expected a checkpoint of metatrain, got a file that fails to load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(checkpoint, dict) or "architecture_name" not in checkpoint:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise InvalidInputError(
            f"{os.fspath(path)}: expected a checkpoint of metatrain, which says its architecture_name, got {found}"
        )
    if checkpoint["architecture_name"] != ARCHITECTURE:
        raise InvalidInputError(
            f"{os.fspath(path)}: expected a checkpoint of the architecture {ARCHITECTURE!r}, got "
            f"{checkpoint['architecture_name']!r}; export it (mtt export) and wrap the exported file instead"
        )
    return checkpoint


def _provenance(checkpoint: dict[str, Any], path: str | os.PathLike[str], weights: str, version: str) -> dict[str, Any]:
    epoch = checkpoint.get("best_epoch" if weights == "best" else "epoch")
    info = checkpoint.get("model_data", {}).get("dataset_info")
    described = {
        name: {"quantity": target.quantity, "unit": target.unit, "description": getattr(target, "description", "")}
        for name, target in dict(getattr(info, "targets", {})).items()
    }
    return {
        "from": "metatrain checkpoint",
        "file": Path(path).name,
        "checkpoint_version": checkpoint.get("model_ckpt_version"),
        "metatrain_version": version,
        "weights": weights,
        "epoch": None if epoch is None else int(epoch),
        "length_unit": str(getattr(info, "length_unit", "")),
        "targets": described,
    }


def _metadata(metadata: Any) -> dict[str, Any]:
    fields = {name: getattr(metadata, name, "") for name in ("name", "description", "authors", "references")}
    return {name: _plain(value) for name, value in fields.items() if value}


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
