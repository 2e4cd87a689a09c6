"""Results of a study: one JSON object per finished cell and line, and a run that is read back."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from symmetrize.errors import InvalidInputError

SCHEMA, VERSION = "torch-symmetrize-study", 1
RESULTS, DESCRIPTION, LOCK = "results.jsonl", "study.json", ".lock"
OK, REFUSED, FAILED = "ok", "refused", "failed"

_LABELS = ("backbone", "method", "data", "seed")
#: Entries of measures that are no results.
_ASIDE = ("seconds", "elements")
#: Measures of which NaN is no result: one that is not finite is infinite there.
_NOT_APPLICABLE = ("symmetric.", "smoothness.", "dynamics.", "locality.")
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite become "inf", "-inf" or "nan"."""
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return encode(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else str(number)


def number(value: Any) -> float | None:
    """The number that `encode` wrote; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return _NON_FINITE.get(value) if isinstance(value, str) else None


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a record: a line that is whole and on the disk when this returns."""
    line = json.dumps(encode(record), allow_nan=False) + "\n"
    path = folder / RESULTS
    with path.open("ab+") as file:
        # What a killed run left of a line is ended, and skipped on reading.
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in the order in which they were written; torn lines are skipped.

    Raises
    ------
    InvalidInputError
        The file holds something else, or records of a newer version.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    records = []
    for n, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise InvalidInputError(f"{path}: line {n + 1}: expected a record of a {SCHEMA!r}, got {line[:60]!r}")
        if record.get("version") != VERSION:
            raise InvalidInputError(
                f"{path}: line {n + 1}: expected version {VERSION}, got {record.get('version')!r}; "
                "another torch-symmetrize wrote it"
            )
        records.append(record)
    return records


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from running the study in a folder.

    Raises
    ------
    InvalidInputError
        One is running.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            # Released by the system however this process ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidInputError(f"output: another process is running the study in {folder}") from error
        yield


@dataclass(frozen=True)
class StudyRun:
    """What a study has measured so far.

    Attributes
    ----------
    folder : Path
    study : dict
        The configuration, as `Study.to_dict` returns it.
    cells : list of dict
        All cells of the study in order: ``key`` (None where it is not known, since the data was not at hand), ``cell``
        (its labels: backbone, method, data, seed, curve).
    skipped : list of dict
        Combinations that were left out: ``cell`` and ``reason``.
    records : list of dict
        The last record of every cell of the study that has one, in the order of ``cells``; see the documentation of
        the format. Older records and those of cells that the study no longer has are left out.
    outdated : int
        Cells without a record whose labels have one: the study, its data or a backbone has changed since.
    """

    folder: Path
    study: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    outdated: int = 0

    def select(self, status: str | None = None, **labels: Any) -> list[dict[str, Any]]:
        """Records with these labels (backbone, method, data, seed, curve) and this status."""
        return [
            record
            for record in self.records
            if status in (None, record["status"]) and all(record["cell"].get(k) == v for k, v in labels.items())
        ]

    @property
    def counts(self) -> dict[str, int]:
        """Cells that are ok, refused, failed, and pending."""
        found = {status: len(self.select(status)) for status in (OK, REFUSED, FAILED)}
        return {**found, "pending": len(self.cells) - len(self.records)}

    def table(self, columns: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row per record: its labels, its status, and numbers by dotted path.

        Parameters
        ----------
        columns : mapping of str to str
            Name of a column -> path into ``measures``, such as ``"cost.time_ratio"``. ``*`` stands for every entry,
            of which the largest counts.

        Returns
        -------
        list of dict
            None where a record has no such number.
        """
        return [
            {**record["cell"], "status": record["status"]}
            | {name: find_number(record["measures"], path) for name, path in columns.items()}
            for record in self.records
        ]


def find_number(measures: Any, path: str) -> float | None:
    """The number at a dotted path; None where there is none.

    Of several that ``*`` stands for it is the largest absolute value, and NaN before that. Where a measure says NaN
    for what does not apply (a structure that is refused or of which symmetry demands nothing, the angular momentum of
    a crystal), the others count.
    """
    found = [n for n in map(number, _walk(measures, path.split("."))) if n is not None]
    if path.startswith(_NOT_APPLICABLE):
        found = [n for n in found if not math.isnan(n)]
    if not found:
        return None
    return math.nan if any(math.isnan(n) for n in found) else max(found, key=abs)


def _walk(value: Any, path: Sequence[str]) -> Iterator[Any]:
    if not path:
        yield value
    elif isinstance(value, Mapping):
        first, *rest = path
        names = [name for name in value if name not in _ASIDE] if first == "*" else [first]
        for name in names:
            if name in value:
                yield from _walk(value[name], rest)


def read_run(folder: str | Path) -> StudyRun:
    """Read the results of a study.

    Raises
    ------
    InvalidInputError
        The folder holds none.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file() and not (folder / RESULTS).is_file():
        raise InvalidInputError(f"run: expected the folder of a study, with {RESULTS} in it, got {str(folder)!r}")
    records = read_records(folder)
    if not path.is_file():
        last = {r["key"]: r for r in records}
        return StudyRun(folder, {}, [{"key": k, "cell": r["cell"]} for k, r in last.items()], [], list(last.values()))
    description = json.loads(path.read_text(encoding="utf-8"))
    cells = description["cells"]
    found = current(cells, records)
    known = {labels_of(record["cell"]) for record in records}
    outdated = sum(labels_of(cell["cell"]) in known for cell in cells) - len(found)
    return StudyRun(folder, description["study"], cells, description["skipped"], found, outdated)


def current(cells: Sequence[Mapping[str, Any]], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each of the cells that has one, under its present labels."""
    by_key = {record["key"]: record for record in records}
    # By what they were measured with: the same labels may have stood for other settings.
    pairs = ((cell["cell"], by_key.get(cell["key"])) for cell in cells)
    return [{**record, "cell": dict(labels)} for labels, record in pairs if record is not None]


def labels_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in _LABELS)
