"""`run_study`: evaluate what is not finished yet, cell by cell, and write down every cell when it is."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symmetrize.errors import DeclarationError, InvalidInputError, SymmetrizeError, did_you_mean
from symmetrize.files import write_text
from symmetrize.study.backbones import epochs_done, train_backbone
from symmetrize.study.cells import describe_error, evaluate_cell, make_record
from symmetrize.study.config import Study, load_study
from symmetrize.study.results import (
    DESCRIPTION,
    FAILED,
    REFUSED,
    StudyRun,
    append,
    labels_of,
    locked,
    read_records,
    read_run,
)
from symmetrize.study.specs import Cell, Specs, list_cells, missing_folders
from symmetrize.study.workers import Workers, make_workers

#: Seconds between two looks at the logs of backbones in training.
_POLL = 2.0


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes
    ----------
    cells : list of dict
        All cells of the study: ``key`` and ``cell``, see `StudyRun`.
    skipped : list of dict
    specs : list of dict
        Of the cells that were selected, by `Specs.spec`, in order.
    done : dict of str to dict
        The last record of those of them that have one, by key.
    pending : list of dict
        Specifications of those that will be evaluated.
    only : dict of str to list of str
        What was selected, see `run_study`.
    """

    cells: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    specs: list[dict[str, Any]]
    done: dict[str, dict[str, Any]]
    pending: list[dict[str, Any]]
    only: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def make_plan(
    study: Study,
    output: str | Path,
    *,
    data: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    retry_failed: bool = False,
) -> Plan:
    """Find out what there is to do; nothing is evaluated or written.

    Parameters
    ----------
    study, output, data, only, retry_failed
        See `run_study`.

    Raises
    ------
    SymmetrizeError
        Data or backbones that the study names cannot be used.
    """
    only = {kind: list(names) for kind, names in (only or {}).items() if names}
    known: dict[str, Mapping[str, Any]] = {"backbone": study.backbones, "method": study.methods, "data": study.data}
    for kind, names in only.items():
        if kind not in known:
            raise DeclarationError(f"only: unknown {kind!r}, {did_you_mean(kind, known)}")
        for name in names:
            if name not in known[kind]:
                raise DeclarationError(f"--only-{kind}: unknown {name!r}, {did_you_mean(name, known[kind])}")
    if data is not None and not Path(data).is_dir():
        raise InvalidInputError(f"--data: expected a folder, got {str(data)!r}")
    output = Path(output)
    found = list_cells(study)
    wanted = [
        cell for cell in found if not cell.skip and all(cell.labels[kind] in names for kind, names in only.items())
    ]
    if not wanted:
        raise InvalidInputError("study: expected at least one cell, got none: all are skipped or not selected")
    maker = Specs(study, output, None if data is None else Path(data))
    specs = {id(cell): maker.spec(cell) for cell in wanted}
    maker.check_properties(wanted)
    keys: dict[int, str | None] = {number: spec["key"] for number, spec in specs.items()}
    # The others are looked at only where there are results, which may be of an earlier version.
    recorded = {labels_of(record["cell"]) for record in read_records(output)}
    for cell in found:
        if not cell.skip and id(cell) not in specs and labels_of(cell.labels) in recorded:
            keys[id(cell)] = _key(maker, cell)
    cells = [{"key": keys.get(id(cell)), "cell": cell.labels} for cell in found if not cell.skip]
    skipped = [{"cell": cell.labels, "reason": cell.skip} for cell in found if cell.skip]
    return _left(Plan(cells, skipped, list(specs.values()), {}, [], only), output, retry_failed)


def _key(maker: Specs, cell: Cell) -> str | None:
    """That of a cell which is not to be evaluated now; None where its data or backbone is not at hand."""
    try:
        return str(maker.spec(cell)["key"])
    except SymmetrizeError:
        return None


def _with_known_keys(cells: list[dict[str, Any]], study: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Cells with the keys that an earlier call knew, if the study is the same."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return cells
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["study"] != study:
        return cells
    known = {json.dumps(cell["cell"], sort_keys=True): cell["key"] for cell in before["cells"]}
    return [{**cell, "key": cell["key"] or known.get(json.dumps(cell["cell"], sort_keys=True))} for cell in cells]


def _left(plan: Plan, folder: Path, retry_failed: bool) -> Plan:
    """A plan with what is done at the moment, and what is not."""
    records = {record["key"]: record for record in read_records(folder)}
    done = {spec["key"]: records[spec["key"]] for spec in plan.specs if spec["key"] in records}
    again = {key for key, record in done.items() if retry_failed and record["status"] == FAILED}
    pending = [spec for spec in plan.specs if spec["key"] not in done or spec["key"] in again]
    return dataclasses.replace(plan, done=done, pending=pending)


def run_study(
    study: Study | str | Path,
    output: str | Path | None = None,
    *,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    scheduler: str | None = None,
    profile: str | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    retry_failed: bool = False,
) -> StudyRun:
    """Evaluate all cells of a study that are not finished yet.

    Every finished cell is a line in ``results.jsonl``, written at once: a run that was killed goes on where it was when
    it is repeated, and so does the training of backbones. A cell is evaluated again only if something that determines
    it has changed.

    Parameters
    ----------
    study : Study or path
        Or the YAML file of one.
    output : path, optional
        Folder of the run; by default ``runs/<name of the study>``.
    data : path, optional
        Folder that holds the data, searched before the paths of the configuration.
    workers : int, optional
        Processes on this machine, with one thread each; 0: this process. By default two, or one on a single core. A
        script that uses processes needs ``if __name__ == "__main__":``.
    progress : bool
        Report on the console.
    scheduler : str, optional
        Address of a dask scheduler, whose workers evaluate the cells instead.
    profile : str, optional
        Of the YAML file.
    only : mapping, optional
        Labels of the cells to be evaluated: ``{"method": ["ECSE"], "data": [...], "backbone": [...]}``.
    retry_failed : bool
        Evaluate cells that have failed again.

    Returns
    -------
    StudyRun
        With the records of earlier calls.

    Raises
    ------
    SymmetrizeError
        The study cannot be run. What goes wrong in a cell is part of its record instead.
    """
    if not isinstance(study, Study):
        study = load_study(study, profile)
    folder = Path("runs") / study.name if output is None else Path(output)
    plan = make_plan(study, folder, data=data, only=only)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"output: expected a folder that can be written to, got {str(folder)!r}") from error
    with locked(folder):
        plan = _left(plan, folder, retry_failed)
        content = json.loads(json.dumps(study.to_dict()))
        cells = _with_known_keys(plan.cells, content, folder)
        description = {"study": content, "cells": cells, "skipped": plan.skipped}
        text = json.dumps(description, indent=2) + "\n"
        path = folder / DESCRIPTION
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        if plan.pending:
            with make_workers(workers, scheduler) as pool, _Display(plan, progress) as display:
                _Loop(plan, folder, pool, display).run()
    return read_run(folder)


def preview(plan: Plan) -> list[tuple[str, str]]:
    """What a run would do: title and state of every cell that was selected, skipped ones included."""
    pending = {spec["key"] for spec in plan.pending}
    lines = []
    for spec in plan.specs:
        record = plan.done.get(spec["key"])
        state = "pending" if record is None else str(record["status"])
        if record is not None and spec["key"] in pending:
            state += ", to be repeated"
        if missing_folders(spec):
            state += "; its backbone is trained first"
        lines.append((Cell(spec["cell"]).title, state))
    for entry in plan.skipped:
        if all(entry["cell"][kind] in labels for kind, labels in plan.only.items()):
            lines.append((Cell(entry["cell"]).title, f"skipped: {entry['reason']}"))
    return lines


class _Loop:
    """Hands out trainings first, cells as their backbones become available, and writes what comes back."""

    def __init__(self, plan: Plan, folder: Path, pool: Workers, display: _Display) -> None:
        self.folder, self.pool, self.display = folder, pool, display
        self.ready: deque[dict[str, Any]] = deque()
        self.waiting: dict[str, list[dict[str, Any]]] = {}
        self.trainings: deque[dict[str, Any]] = deque()
        for spec in plan.pending:
            missing = missing_folders(spec)
            if not missing:
                self.ready.append(spec)
            for place, backbone in missing.items():
                if place not in self.waiting:
                    self.trainings.append({**backbone, "title": f"training {backbone['label']}"})
                self.waiting.setdefault(place, []).append(spec)
        self.running: dict[Future[dict[str, Any]], dict[str, Any]] = {}

    def run(self) -> None:
        """Until nothing is left."""
        while self.ready or self.trainings or self.running:
            while len(self.running) < self.pool.capacity and (self.trainings or self.ready):
                spec = self.trainings.popleft() if self.trainings else self.ready.popleft()
                self.display.show([*self.running.values(), spec])
                self.running[self.pool.submit(train_backbone if "recipe" in spec else evaluate_cell, spec)] = spec
            timeout = _POLL if any("recipe" in spec for spec in self.running.values()) else None
            finished, _ = wait(self.running, timeout=timeout, return_when=FIRST_COMPLETED)
            for future in finished:
                spec = self.running.pop(future)
                if "recipe" in spec:
                    self._trained(future, spec)
                else:
                    self._evaluated(future, spec)
            self.display.show(list(self.running.values()))

    def _trained(self, future: Future[dict[str, Any]], spec: dict[str, Any]) -> None:
        cells = self.waiting.pop(spec["folder"])
        error = future.exception()
        if error is None:
            # A cell may wait for another backbone still.
            others = [cell for waiting in self.waiting.values() for cell in waiting]
            self.ready.extendleft(cell for cell in reversed(cells) if cell not in others)
            self.display.note(f"{spec['title']}: done")
            return
        self.waiting = {folder: [c for c in waiting if c not in cells] for folder, waiting in self.waiting.items()}
        described = _describe(error)
        described["message"] = f"{spec['title']}: {described['message']}"
        for cell in cells:
            self._write(make_record(cell, FAILED, described, {}, 0.0))

    def _evaluated(self, future: Future[dict[str, Any]], spec: dict[str, Any]) -> None:
        error = future.exception()
        self._write(future.result() if error is None else make_record(spec, FAILED, _describe(error), {}, 0.0))

    def _write(self, record: dict[str, Any]) -> None:
        append(self.folder, record)
        self.display.finished(record)


def _describe(error: BaseException) -> dict[str, Any]:
    """An error that no record came back with: most often the process is gone."""
    if isinstance(error, BrokenProcessPool) or type(error).__name__ == "KilledWorker":
        message = "the process that evaluated it ended before it was done: killed, or out of memory?"
        return {"type": type(error).__name__, "message": message, "traceback": ""}
    return describe_error(error)


class _Display:
    """A bar over the cells on a terminal, a line per cell elsewhere."""

    def __init__(self, plan: Plan, progress: bool) -> None:
        self.total, self.before = len(plan.specs), len(plan.specs) - len(plan.pending)
        self.count, self.failed, self.refused = self.before, 0, 0
        self.progress, self.bar = progress, None

    def __enter__(self) -> _Display:
        if self.progress and self.before:
            self._print(f"{self.before} of {self.total} cells were finished before")
        if self.progress and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.before, unit="cell", dynamic_ncols=True, smoothing=0.0)
        return self

    def __exit__(self, *details: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, running: Sequence[dict[str, Any]]) -> None:
        """What is being done at the moment."""
        if self.bar is None:
            return
        titles = []
        for spec in running:
            if "recipe" in spec:
                done = epochs_done(Path(spec["folder"]))
                titles.append(f"{spec['title']}: epoch {done or 0} of {spec['recipe']['epochs']}")
            else:
                titles.append(Cell(spec["cell"]).title)
        counted = [f"{n} {word}" for n, word in ((self.failed, "failed"), (self.refused, "refused")) if n]
        self.bar.set_postfix_str("; ".join([*counted, *titles[:1], *([f"+{len(titles) - 1}"] if titles[1:] else [])]))

    def note(self, text: str) -> None:
        """A line between the others."""
        if self.progress:
            self._print(text)

    def finished(self, record: dict[str, Any]) -> None:
        """One cell more."""
        self.count += 1
        self.failed += record["status"] == FAILED
        self.refused += record["status"] == REFUSED
        if self.bar is not None:
            self.bar.update()
        if not self.progress:
            return
        line = f"[{self.count}/{self.total}] {Cell(record['cell']).title}: {record['status']}"
        if record["error"] is not None:
            message = " ".join(str(record["error"]["message"]).split())
            line += f" ({record['error']['type']}: {message[:160]})"
        elif record["seconds"]:
            line += f", {record['seconds']:.1f} s"
        if self.bar is None or record["status"] == FAILED:
            self._print(line)

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, file=sys.stderr, flush=True)
