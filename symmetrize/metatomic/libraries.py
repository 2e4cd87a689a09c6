"""Importing metatomic and metatrain, in whatever order with torch_geometric."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from symmetrize.errors import InvalidInputError, InvalidTypeError, MissingDependencyError


@contextmanager
def compilable() -> Iterator[None]:
    """A context in which TorchScript compiles what calls ``torch.index_select`` or ``torch.select``.

    Recent versions of torch_geometric replace both by functions that TorchScript refuses: in the meantime, torch has
    its own again.
    """
    import torch

    replaced = {name: getattr(torch, name) for name in ("index_select", "select")}
    for name in replaced:
        setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(torch, name, function)


def import_metatomic() -> Any:
    """The module ``metatomic.torch``, whose first import compiles functions (see `compilable`).

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    return _imported("metatomic.torch", "metatomic models need: pip install metatomic-torch")


def import_metatrain(module: str = "metatrain") -> Any:
    """A module of metatrain, such as ``"metatrain.pet"``: importing most of them compiles functions as well.

    Raises
    ------
    MissingDependencyError
        It, or what it needs, is not installed.
    """
    return _imported(module, "models of metatrain need: pip install metatrain")


def _imported(name: str, hint: str) -> Any:
    with compilable():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(hint) from error


def load_model(model: Any, extensions_directory: str | os.PathLike[str] | None = None) -> Any:
    """A model from a file, or a copy of one in memory.

    Parameters
    ----------
    model : str, path or metatomic.torch.AtomisticModel
        Files are TorchScript: code that is run, though not Python's. A pickle is never read.
    extensions_directory : path, optional
        Of the compiled libraries that the model needs.

    Raises
    ------
    MissingDependencyError
        metatomic is not installed.
    InvalidTypeError
        Neither a path nor a model.
    InvalidInputError
        A file that is not there, or is not an exported model.
    """
    metatomic = import_metatomic()
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        problem = _problem(path)
        if problem:
            raise InvalidInputError(f"{path}: expected an exported metatomic model, got {problem}")
        directory = None if extensions_directory is None else os.fspath(extensions_directory)
        try:
            with warnings.catch_warnings():
                # Addressed to whoever exported it; it answers to old and new names.
                warnings.filterwarnings("ignore", message=".*(output|input) name is deprecated")
                return metatomic.load_atomistic_model(path, extensions_directory=directory)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvalidInputError(f"{path}: expected an exported metatomic model, which fails: {reason}") from error
    import torch

    if not isinstance(model, torch.nn.Module) or not callable(getattr(model, "requested_neighbor_lists", None)):
        raise InvalidTypeError(f"model: expected a path or an AtomisticModel, got {type(model).__name__}")
    # The caller's is left where it is.
    return copy.deepcopy(model)


def _problem(path: str) -> str:
    """What a file is instead of an exported model, found without running or unpickling anything; empty if it is one."""
    if not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "no such file"
    if not zipfile.is_zipfile(path):
        return "another kind of file"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        return f"a broken archive ({error})"
    if "extra/metatomic-version" in names:
        return ""
    if "constants.pkl" in names:
        return "a TorchScript module that metatomic did not write"
    if "data.pkl" in names:
        return (
            "a pickle of PyTorch, such as a checkpoint, which is not read here: export the model first, "
            "with 'mtt export model.ckpt' if it is one of metatrain"
        )
    return "an archive of something else"
