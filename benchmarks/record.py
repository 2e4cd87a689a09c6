"""Results as values: tables, JSON with its provenance."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from tqdm import tqdm

from symmetrize.files import write_text
from symmetrize.report.tables import number

SCHEMA = "torch-symmetrize benchmarks"
SCHEMA_VERSION = 1

_PACKAGES = ("torch-symmetrize", "torch", "torch-geometric", "e3nn", "vesin-torch", "numpy", "ase")


@dataclass(frozen=True)
class Column:
    """How a field of the records is shown."""

    key: str
    title: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes
    ----------
    title : str
    records : list of dict
        One measurement each: what is saved.
    columns : list of Column
        What of it is printed.
    rows : list of dict
        What the table shows where it is not the records themselves, such as one row for several of them.
    parameters : dict
        Everything that was fixed.
    notes : list of str
        How to read the numbers; what was left out, and why.
    """

    title: str
    records: list[dict[str, Any]]
    columns: Sequence[Column]
    parameters: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """The records as an aligned Markdown table, which a terminal shows well, too."""
        shown = self.rows or self.records
        rows = [[_shown(column, record) for column in self.columns] for record in shown]
        titles = [column.title for column in self.columns]
        widths = [max(len(row[k]) for row in [titles, *rows]) for k in range(len(titles))]
        left = [all(isinstance(record.get(c.key, ""), str) for record in shown) for c in self.columns]

        def line(cells: Iterable[str]) -> str:
            padded = [
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(cells, widths, left, strict=True)
            ]
            return "| " + " | ".join(padded) + " |"

        rule = [
            ":" + "-" * (w - 1) if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)
        ]
        return "\n".join([line(titles), line(rule), *map(line, rows)])

    def text(self) -> str:
        """Title, table and notes."""
        notes = "\n".join(f"* {note}" for note in self.notes)
        return f"## {self.title}\n\n{self.table()}\n" + (f"\n{notes}\n" if notes else "")


@dataclass(frozen=True)
class Setting:
    """What a benchmark is run with.

    Attributes
    ----------
    datasets : dict of str to list of ase.Atoms
        See `benchmarks.datasets`.
    absent : list of str
        Data sets that were asked for and are not there.
    device : torch.device
    full : bool
        The profile: all structures, longer series.
    threads : int
    progress : bool
    pet_source : Path, optional
        A clone of github.com/spozdn/pet, the proof of concept of ECSE.
    """

    datasets: dict[str, list[Atoms]]
    absent: list[str]
    device: torch.device
    full: bool
    threads: int
    progress: bool
    pet_source: Path | None = None

    def bar(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """The items, with a progress bar."""
        return iter(tqdm(items, desc=what, disable=not self.progress, leave=False))


def _shown(column: Column, record: dict[str, Any]) -> str:
    value = record.get(column.key)
    return "-" if value is None else column.show(value)


def digits(n: int) -> Callable[[float], str]:
    """Shows numbers with n significant digits."""
    return lambda value: number(float(value), n)


def fixed(n: int) -> Callable[[float], str]:
    """Shows numbers with n decimals."""
    return lambda value: f"{value:.{n}f}"


def provenance(setting: Setting) -> dict[str, Any]:
    """Where and with what the numbers were measured, without anything that identifies the machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = "CPU" if setting.device.type == "cpu" else torch.cuda.get_device_name(setting.device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cores": cores,
        "threads": setting.threads,
        "packages": versions,
        "data": {name: len(structures) for name, structures in setting.datasets.items()},
        "absent": setting.absent,
    }


def save(
    folder: Path, setting: Setting, results: dict[str, Result], seconds: dict[str, float], origin: dict[str, Any]
) -> None:
    """Write ``results.json`` and ``results.md``, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    benchmarks = {
        name: {
            "title": result.title,
            "seconds": round(seconds[name], 1),
            "parameters": result.parameters,
            "records": [_rounded(record) for record in result.records],
            "notes": result.notes,
        }
        for name, result in results.items()
    }
    content = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "profile": "full" if setting.full else "small",
        "provenance": origin,
        "benchmarks": benchmarks,
    }
    write_text(folder / "results.json", _dumped(content) + "\n")
    head = (
        f"# Benchmarks, {content['profile']} profile\n\n"
        f"{origin['date'][:10]}; {origin['cores']} cores, {_count(origin['threads'], 'thread')}, "
        f"{origin['device']}; torch {origin['packages']['torch']}.\n"
    )
    write_text(folder / "results.md", "\n".join([head, *(result.text() for result in results.values())]))


def _dumped(value: Any, indent: str = "") -> str:
    """JSON with one line for each record."""
    inner = indent + " "
    # Records are at depth 4.
    if isinstance(value, dict) and len(indent) < 4 and any(isinstance(v, (dict, list)) for v in value.values()):
        entries = [f"{inner}{json.dumps(key)}: {_dumped(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        return "[\n" + ",\n".join(f"{inner}{_dumped(entry, inner)}" for entry in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _rounded(value: Any) -> Any:
    """Six digits; what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
