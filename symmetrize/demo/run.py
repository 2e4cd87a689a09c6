"""``run_demo``: measure everything, write it down, draw it."""

from __future__ import annotations

import dataclasses
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch
from ase import Atoms
from tqdm import tqdm

from symmetrize.data import read_structures
from symmetrize.demo.dynamics import run_dynamics
from symmetrize.demo.results import DemoResult, Dynamics, Row, Scan, SymmetryError
from symmetrize.demo.scenes import draw_frames, scan_rotation
from symmetrize.demo.subjects import BARE, TREATMENTS, Subject, shipped_subjects
from symmetrize.demo.sweep import (
    MILLI,
    REPEATS,
    Accuracy,
    Reference,
    count_frames,
    measure_accuracy,
    measure_symmetry,
    reference,
)
from symmetrize.demo.table import all_tables, as_markdown, as_text
from symmetrize.errors import DeclarationError, InvalidInputError, did_you_mean
from symmetrize.files import write_text
from symmetrize.ops.rotations import random_rotations
from symmetrize.report import render_demo, require_libraries
from symmetrize.testing import Element, tolerance

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
N_ANGLES = 73

_BUNDLED = {
    "name": "100 held-out frames of ethanol molecular dynamics (MD17 type), none of which the models were trained on",
    "source": "https://github.com/metatensor/metatrain (ethanol_1000.xyz)",
    "licence": "BSD-3-Clause, Copyright (c) metatensor developers",
}


def run_demo(
    output: str | os.PathLike[str] = "runs/demo",
    *,
    structures: str | os.PathLike[str] | None = None,
    n_structures: int = 100,
    n_elements: int = 16,
    n_steps: int = 1200,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
    progress: bool = True,
    subjects: Sequence[Subject] | None = None,
    workers: int | None = None,
) -> DemoResult:
    """Measure trained networks bare and symmetrised on real structures, and write a report.

    Parameters
    ----------
    output : path
        Folder for ``report.html``, ``results.json`` and ``table.md``; created if missing.
    structures : path, optional
        Structures with reference ``energy`` (eV) and ``forces`` (eV/A), in any format of ASE; by default the bundled
        held-out ethanol.
    n_structures : int
        At most this many, from the first on.
    n_elements : int
        Random rotations per structure, and as many random rotations times inversion.
    n_steps : int
        Steps of 0.5 fs of molecular dynamics.
    dtype : {"float64", "float32"}
    seed : int
        Of the group elements and of the initial velocities.
    progress : bool
        Show progress bars, and print the tables and the path of the report at the end.
    subjects : sequence of Subject, optional
        Backbones with their scopes; by default the shipped models. The first of them is used for molecular dynamics.
    workers : int, optional
        Measurements at a time, each with one thread; by default two, or one on a single core.

    Returns
    -------
    DemoResult

    Raises
    ------
    DeclarationError, InvalidInputError, MissingDependencyError
        For arguments out of range, structures without reference values, and missing plotting libraries.
    """
    require_libraries()
    numbers = {"n_structures": (n_structures, 2), "n_elements": (n_elements, 1), "n_steps": (n_steps, 1)}
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DeclarationError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if dtype not in _DTYPES:
        raise DeclarationError(f"dtype: unknown dtype {dtype!r}, {did_you_mean(str(dtype), _DTYPES)}")
    n_workers = min(2, len(_cores())) if workers is None else max(1, int(workers))
    precision = _DTYPES[dtype]
    begin = time.perf_counter()
    folder = _folder(output)
    target = reference(_read(structures)[:n_structures])
    chosen = shipped_subjects(precision) if subjects is None else list(subjects)
    if not chosen:
        raise DeclarationError("subjects: expected at least one, got none")
    phases: dict[str, float] = {"setup": time.perf_counter() - begin}
    with _one_thread():
        start = time.perf_counter()
        accuracy = _accuracies(chosen, target, precision, progress)
        counts = [count_frames(subject, target, precision) for subject in chosen]
        drawing = draw_frames(chosen, target.structures, precision)
        phases["accuracy and cost"] = time.perf_counter() - start
        start = time.perf_counter()
        jobs = _Jobs(chosen, target, precision, n_elements, n_steps, seed, progress)
        jobs.run(n_workers)
        phases["symmetry errors and dynamics"] = time.perf_counter() - start
    if jobs.dynamics is None or jobs.scan is None:
        raise RuntimeError("demo: expected the measurements to be complete, got none")
    provenance = _provenance(structures, target, n_elements, n_steps, dtype, seed, n_workers, chosen)
    result = DemoResult(
        rows=_rows(chosen, accuracy, jobs.errors),
        scales={"energy": target.energy_scale * MILLI, "force": target.force_scale * MILLI},
        tolerance=tolerance(precision),
        counts=counts,
        drawing=drawing,
        scan=jobs.scan,
        dynamics=jobs.dynamics,
        provenance=provenance,
        phases=phases,
    )
    start = time.perf_counter()
    result = dataclasses.replace(result, output=folder)
    page = render_demo(result, all_tables(result))
    phases["report"] = time.perf_counter() - start
    write_text(folder / "results.json", result.to_json())
    write_text(folder / "table.md", as_markdown(result))
    write_text(folder / "report.html", page)
    if progress:
        print(f"\n{as_text(result)}\n\nreport: {result.report}")
    return result


class _Stopped(Exception):
    """Raised inside a worker when another one has failed or the user has interrupted."""


class _Jobs:
    """The long measurements, in parallel: symmetry errors of every model, the scan, and molecular dynamics."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        target: Reference,
        dtype: torch.dtype,
        n_elements: int,
        n_steps: int,
        seed: int,
        progress: bool,
    ) -> None:
        self.subjects, self.target, self.dtype, self.n_steps, self.seed = subjects, target, dtype, n_steps, seed
        rotations = random_rotations(n_elements, torch.Generator().manual_seed(seed))
        self.proper = [Element(f"random proper {k}", g) for k, g in enumerate(rotations)]
        self.improper = [Element(f"random improper {k}", -g) for k, g in enumerate(rotations)]
        self.progress = progress
        self.errors: dict[tuple[int, str], tuple[SymmetryError, SymmetryError]] = {}
        self.dynamics: Dynamics | None = None
        self.scan: Scan | None = None
        self.stop = threading.Event()

    def run(self, n_workers: int) -> None:
        n_sweep = len(self.subjects) * len(TREATMENTS) * (1 + len(self.proper) + len(self.improper))
        n_scan = 2 * len(TREATMENTS)
        pairs = [(k, treatment) for k in range(len(self.subjects)) for treatment in reversed(TREATMENTS)]
        with (
            _bar("rotating every structure", n_sweep + n_scan, self.progress, 0) as sweep,
            _bar("molecular dynamics", 2 * self.n_steps, self.progress, 1) as steps,
            ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            # Longest first.
            futures = [pool.submit(self._run_dynamics, self._ticker(steps))]
            futures += [pool.submit(self._run_sweep, k, treatment, self._ticker(sweep)) for k, treatment in pairs]
            futures += [pool.submit(self._run_scan, self._ticker(sweep))]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop.set()
                for future in futures:
                    future.cancel()
                raise

    def _ticker(self, bar: tqdm) -> Callable[[], None]:
        def tick() -> None:
            if self.stop.is_set():
                raise _Stopped
            bar.update()

        return tick

    def _run_sweep(self, k: int, treatment: str, tick: Callable[[], None]) -> None:
        self.errors[k, treatment] = measure_symmetry(
            self.subjects[k], treatment, self.target, self.proper, self.improper, self.dtype, tick
        )

    def _run_scan(self, tick: Callable[[], None]) -> None:
        self.scan = scan_rotation(self.subjects[0], self.target.structures[0], 0, N_ANGLES, self.dtype, tick)

    def _run_dynamics(self, tick: Callable[[], None]) -> None:
        atoms = self.target.structures[0]
        self.dynamics = run_dynamics(self.subjects[0], atoms, 0, self.n_steps, self.seed, tick)


def _accuracies(
    subjects: Sequence[Subject], target: Reference, dtype: torch.dtype, progress: bool
) -> dict[tuple[int, str], Accuracy]:
    with _bar("accuracy and cost", REPEATS * len(subjects) * len(TREATMENTS), progress) as bar:
        return {
            (k, treatment): measure_accuracy(subject, treatment, target, dtype, lambda: bar.update())
            for k, subject in enumerate(subjects)
            for treatment in TREATMENTS
        }


def _rows(
    subjects: Sequence[Subject],
    accuracy: dict[tuple[int, str], Accuracy],
    errors: dict[tuple[int, str], tuple[SymmetryError, SymmetryError]],
) -> list[Row]:
    return [
        Row(
            label=subject.label,
            scope=subject.scope,
            treatment=treatment,
            rotation=errors[k, treatment][0],
            inversion=errors[k, treatment][1],
            ratio=accuracy[k, treatment].seconds / accuracy[k, BARE].seconds,
            **dataclasses.asdict(accuracy[k, treatment]),
        )
        for k, subject in enumerate(subjects)
        for treatment in TREATMENTS
    ]


def _folder(output: str | os.PathLike[str]) -> Path:
    """Create the folder before anything is measured."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"output: expected a folder that can be written to, got {str(folder)!r}") from error
    return folder


def _read(structures: str | os.PathLike[str] | None) -> list[Atoms]:
    if structures is None:
        with as_file(files("symmetrize.demo") / "data" / "ethanol-test.xyz") as path:
            return read_structures(path)
    found = read_structures(structures)
    if len(found) < 2:
        raise InvalidInputError(f"structures: expected at least two, got {len(found)}")
    return found


def _provenance(
    structures: str | os.PathLike[str] | None,
    target: Reference,
    n_elements: int,
    n_steps: int,
    dtype: str,
    seed: int,
    n_workers: int,
    subjects: Sequence[Subject],
) -> dict[str, Any]:
    packages = ("torch-symmetrize", "torch", "e3nn", "torch-geometric", "ase", "numpy")
    command = ["symmetrize demo"]
    if structures is not None:
        command.append(f"--structures {Path(structures).name}")
    command += [f"--n-structures {len(target.structures)}", f"--n-elements {n_elements}", f"--n-steps {n_steps}"]
    command += [f"--dtype {dtype}", f"--seed {seed}"]
    data = dict(_BUNDLED)
    if structures is not None:
        data = {"name": Path(structures).name, "source": "given by the user", "licence": "not known"}
    return {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "data": data,
        "n_structures": len(target.structures),
        "n_atoms": sum(map(len, target.structures)),
        "n_elements": n_elements,
        "n_steps": n_steps,
        "dtype": dtype,
        "seed": seed,
        "threads": 1,
        "workers": n_workers,
        "cores": len(_cores()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "models": {s.label: repr(s.model("O(3)").method) + f", scope {s.scope}" for s in subjects},
        "parameters": {s.label: sum(p.numel() for p in s.backbone.parameters()) for s in subjects},
        "composition": target.structures[0].get_chemical_formula(),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors on busy cores: several threads can be ten times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(what: str, total: int, progress: bool, position: int = 0) -> tqdm:
    return tqdm(desc=what.ljust(24), total=total, disable=not progress, position=position, dynamic_ncols=True)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
