"""What is finished, batch by batch, in a folder: other processes write to it and interrupted runs leave it behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from symmetrize import errors
from symmetrize.errors import InvalidInputError, SymmetrizeError
from symmetrize.files import replacing, write_text

_DESCRIPTION, _FAILURE = "evaluation.json", "failure.json"
#: Beside the arrays that `symmetrize.data.from_ase` reads, the entries of `info` that it does.
_STATE = ("charge", "spin_multiplicity", "spin")


@dataclass(frozen=True)
class Prediction:
    """Of one structure.

    Attributes
    ----------
    energy : float
        eV.
    forces : array of shape (n_atoms, 3), optional
        eV/angstrom.
    stress : array of shape (3, 3), optional
        eV/angstrom^3.
    energy_spread : float, optional
        eV.
    """

    energy: float
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    energy_spread: float | None = None


@dataclass(frozen=True)
class Part:
    """Predictions of one batch, by the keys of its structures, and the time that the model took (s)."""

    predictions: dict[str, Prediction]
    seconds: float


def key_of(atoms: Atoms) -> str:
    """A structure's fingerprint: of everything that a prediction may depend on, and not of its place in a file."""
    digest = hashlib.sha256()
    for name, values in sorted(atoms.arrays.items()):
        digest.update(f"{name}{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes() if values.dtype != object else repr(values).encode())
    digest.update(atoms.cell.array.tobytes() + atoms.pbc.tobytes())
    digest.update(repr([atoms.info.get(name) for name in _STATE]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Parts:
    """A folder of parts; every file appears in it whole or not at all, whichever process writes it."""

    folder: Path

    def claim(self, description: dict[str, Any], restart: bool) -> None:
        """Make sure that the folder is new or holds parts of the same evaluation.

        Raises
        ------
        InvalidInputError
            If it holds parts of another one.
        """
        path = self.folder / _DESCRIPTION
        if restart:
            self.remove()
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted(before.keys() | description.keys()):
                if before.get(name) != description.get(name):
                    raise InvalidInputError(
                        f"output: an interrupted evaluation left parts with {name} = {before.get(name)!r} in "
                        f"{self.folder}, got {description.get(name)!r}; repeat its options to finish it, or start "
                        "again with --restart (restart=True)"
                    )
        write_text(path, json.dumps(description, indent=2) + "\n")
        (self.folder / _FAILURE).unlink(missing_ok=True)

    def write(self, part: Part) -> None:
        """Add a part, under a name of its own."""
        arrays: dict[str, Any] = {"key": np.array(list(part.predictions)), "seconds": np.array(part.seconds)}
        members = list(part.predictions.values())
        arrays["energy"] = np.array([p.energy for p in members])
        if members[0].forces is not None:
            arrays["counts"] = np.array([len(p.forces) for p in members if p.forces is not None])
            arrays["forces"] = np.concatenate([p.forces for p in members if p.forces is not None])
        if members[0].stress is not None:
            arrays["stress"] = np.stack([p.stress for p in members if p.stress is not None])
        if members[0].energy_spread is not None:
            arrays["energy_spread"] = np.array([p.energy_spread for p in members])
        name = hashlib.sha256("".join(part.predictions).encode()).hexdigest()[:32]
        with replacing(self.folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self) -> Part:
        """Everything that is finished, as one part."""
        found: dict[str, Prediction] = {}
        seconds = 0.0
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                part = {name: arrays[name] for name in arrays.files}
            seconds += float(part["seconds"])
            ends = np.cumsum(part["counts"])[:-1] if "counts" in part else None
            forces = None if ends is None else np.split(part["forces"], ends)
            for n, key in enumerate(part["key"]):
                found[str(key)] = Prediction(
                    float(part["energy"][n]),
                    None if forces is None else forces[n],
                    part["stress"][n] if "stress" in part else None,
                    float(part["energy_spread"][n]) if "energy_spread" in part else None,
                )
        return Part(found, seconds)

    def fail(self, error: SymmetrizeError) -> None:
        """Tell all processes that the evaluation cannot succeed."""
        write_text(self.folder / _FAILURE, json.dumps([type(error).__name__, str(error)]))

    @property
    def failure(self) -> SymmetrizeError | None:
        """The error that some process told."""
        path = self.folder / _FAILURE
        if not path.is_file():
            return None
        kind, message = json.loads(path.read_text(encoding="utf-8"))
        return getattr(errors, kind, SymmetrizeError)(message)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Delete the folder unless a part in it is worth keeping."""
        if not any(self.folder.glob("*.npz")):
            self.remove()
