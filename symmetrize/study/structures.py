"""Data sets of a study: where the file is, which of its structures are evaluated, and their reference values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from symmetrize.errors import InvalidInputError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.study.config import AUTO, DataEntry
from symmetrize.training.config import DataRecipe
from symmetrize.training.dataset import fingerprint, split

#: Data that comes with the package, by name.
BUNDLED = {"ethanol": "demo/data/ethanol-test.xyz"}
_PREFIX = "bundled:"
_UNITS = {"energy": "eV", "forces": "eV/angstrom"}


@dataclass(frozen=True)
class DataFile:
    """A file of structures that was found.

    Attributes
    ----------
    path : Path
        Absolute.
    sha256 : str
    """

    path: Path
    sha256: str


def find_file(label: str, entry: DataEntry, folder: Path, data: Path | None = None) -> DataFile:
    """The file of a data set.

    Parameters
    ----------
    label : str
        Of the data set, for messages.
    entry : DataEntry
    folder : Path
        Of the configuration.
    data : Path, optional
        Folder that is searched first: for the path, then for a file of that name in its subfolders.

    Raises
    ------
    InvalidInputError
        There is none, or another one than was meant.
    """
    where = f"data.{label}.path"
    if entry.path.startswith(_PREFIX):
        name = entry.path.removeprefix(_PREFIX)
        if name not in BUNDLED:
            raise InvalidInputError(f"{where}: unknown bundled data {name!r}, {did_you_mean(name, BUNDLED)}")
        with as_file(files("symmetrize") / BUNDLED[name]) as path:
            return DataFile(Path(path), fingerprint(Path(path)))
    if data is not None and not data.is_dir():
        raise InvalidInputError(f"--data: expected a folder, got {str(data)!r}")
    wanted = Path(entry.path).expanduser()
    places = [wanted] if wanted.is_absolute() else [*([] if data is None else [data / wanted]), folder / wanted]
    found = [place for place in places if place.is_file()][:1]
    if not found and data is not None:
        found = sorted(path for path in data.rglob(wanted.name) if path.is_file())
        if len({fingerprint(path) for path in found}) > 1:
            listed = " and ".join(str(path.relative_to(data)) for path in found[:3])
            raise InvalidInputError(f"{where}: expected one file {wanted.name!r} in {data}, got {listed}")
    if not found:
        hint = f"; get it from {entry.source}" if entry.source else ""
        option = "" if data is not None else " (or name the folder that holds it with --data)"
        raise InvalidInputError(
            f"{where}: expected a file of structures, there is none at {' or '.join(map(str, places))}{hint}{option}"
        )
    digest = fingerprint(found[0])
    if not digest.startswith(entry.sha256.lower()):
        raise InvalidInputError(
            f"data.{label}.sha256: expected {entry.sha256}, got {digest} ({found[0].name}): another file of that name"
        )
    return DataFile(found[0].resolve(), digest)


def fingerprint_structure(atoms: Atoms) -> str:
    """Hash of species, positions (to 1e-6 angstrom) and cell: the same in every file that a structure is in."""
    numbers = [np.round(values, 6) + 0.0 for values in (atoms.numbers, atoms.positions, atoms.cell.array)]
    return hashlib.sha256(b"".join(values.tobytes() for values in numbers)).hexdigest()


def chosen(entry: DataEntry, n_structures: int, label: str) -> list[int]:
    """Numbers of the structures that are evaluated.

    Raises
    ------
    InvalidInputError
        The file holds too few.
    """
    if entry.test == 0:
        return list(range(n_structures))
    if entry.test > n_structures:
        raise InvalidInputError(f"data.{label}.test: expected at most {n_structures} structures, got {entry.test}")
    recipe = DataRecipe(path="", train=0, validation=0, test=entry.test, split_seed=entry.split_seed)
    return split(n_structures, recipe).test.tolist()


def reference_keys(entry: DataEntry, atoms: Atoms) -> dict[str, str]:
    """Names of the reference values in the file, by output; what is "auto" only where it is there."""
    keys = dict(entry.properties)
    for name in ("energy", "forces"):
        key = getattr(entry, name)
        if key is not None and (key != AUTO or _lookup(atoms, name) is not None):
            keys.setdefault(name, name if key == AUTO else key)
    return keys


def check_references(label: str, entry: DataEntry, frames: Sequence[Atoms], numbers: Sequence[int], file: str) -> None:
    """Refuse a file that lacks a reference value that the study asks for.

    Raises
    ------
    InvalidInputError
        Naming file, structure, the value, and what there is.
    """
    for key in reference_keys(entry, frames[numbers[0]]).values():
        for n in numbers:
            if _lookup(frames[n], key) is None:
                raise InvalidInputError(
                    f"data.{label}: {file}: structure {n}: expected a reference value {key!r}, got {_known(frames[n])}"
                )


def references(
    label: str, entry: DataEntry, frames: Sequence[Atoms], outputs: Mapping[str, OutputSpec]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reference values of what a backbone predicts, as rows of its outputs, and their units.

    Parameters
    ----------
    frames : sequence of ase.Atoms
        Those that are evaluated.
    outputs : mapping of str to OutputSpec
        Of the backbone.

    Returns
    -------
    dict of str to Tensor
        float64: (n_structures, ...) or (n_atoms, ...); "forces" (n_atoms, 3).
    dict of str to str

    Raises
    ------
    InvalidInputError
        A value has the wrong size or is not finite.
    """
    values: dict[str, Tensor] = {}
    units: dict[str, str] = {}
    shape: tuple[int, ...]
    for name, key in reference_keys(entry, frames[0]).items():
        if name in outputs:
            spec = outputs[name]
            shape, per_atom = tuple(spec.shape), spec.per == "atom" and spec.reduce is None
            unit = spec.unit or _UNITS.get(name, "")
        elif name == "forces" and "energy" in outputs:  # its gradient
            shape, per_atom, unit = (3,), True, _UNITS[name]
        else:
            continue
        rows = [_rows(atoms, key, (len(atoms) if per_atom else 1, *shape), label, n) for n, atoms in enumerate(frames)]
        values[name], units[name] = torch.cat(rows), unit
    return values, units


def _rows(atoms: Atoms, key: str, shape: tuple[int, ...], label: str, n: int) -> Tensor:
    found = np.asarray(_lookup(atoms, key), dtype=np.float64)
    if found.size != int(np.prod(shape)):
        raise InvalidInputError(
            f"data.{label}: structure {n} of those that are evaluated: {key}: expected shape {shape}, got {found.shape}"
        )
    if not np.isfinite(found).all():
        raise InvalidInputError(
            f"data.{label}: structure {n} of those that are evaluated: {key}: expected finite numbers, got others"
        )
    return torch.as_tensor(found.reshape(shape).copy())


def _lookup(atoms: Atoms, key: str) -> Any:
    for place in (atoms.info, atoms.arrays, {} if atoms.calc is None else atoms.calc.results):
        if key in place:
            return place[key]
    return None


def _known(atoms: Atoms) -> list[str]:
    own = {*atoms.info, *atoms.arrays} - {"numbers", "positions"}
    return sorted({*own, *({} if atoms.calc is None else atoms.calc.results)})
