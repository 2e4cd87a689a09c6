"""The generator of (subject, check) and the loop over it: what all front ends share."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from symmetrize.errors import DeclarationError, SymmetrizeError, did_you_mean
from symmetrize.testing.measuring.elements import batched, copied
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import Check, all_checks
from symmetrize.testing.running.outcome import Report, Result, Verdict
from symmetrize.testing.running.profile import Profile, profile_named
from symmetrize.testing.structures.paths import paths
from symmetrize.testing.structures.sets import StructureSet, by_periodicity, library_sets, users_set
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms
    from torch_geometric.data import Data

    Structures: TypeAlias = Atoms | Data | Sequence[Atoms | Data]


@dataclass(frozen=True)
class Task:
    """A check to be run on a bench.

    Attributes
    ----------
    check : Check
    on : str
        Structure set or path; empty for a check that runs once.
    """

    check: Check
    on: str

    @property
    def id(self) -> str:
        """``check`` or ``check[on]``."""
        return f"{self.check.name}[{self.on}]" if self.on else self.check.name


def make_bench(
    subject: Subject,
    structures: Structures | None = None,
    *,
    profile: str | Profile = "quick",
    seed: int = 0,
    library: bool | None = None,
    trajectory: Sequence[Atoms] | None = None,
    references: Mapping[str, Tensor] | None = None,
) -> Bench:
    """Collect what the checks of a subject run on.

    Parameters
    ----------
    structures : Atoms, Data or a sequence of them, optional
        The user's own.
    library : bool, optional
        Whether the named geometries are used too; by default for models written in torch, which do not mind unusual
        structures, and wherever there are no ``structures``.
    trajectory : sequence of ase.Atoms, optional
        Frames of the same atoms.
    references : dict of str to Tensor, optional
        Reference outputs, rows as the model's on ``structures``; these are then used all of them.
    """
    chosen = profile_named(profile)
    use_library = (
        library if library is not None else (structures is None or subject.kind in ("symmetrizer", "backbone"))
    )
    for name in references or {}:
        if name not in {**subject.outputs, **subject.periodic_outputs}:
            raise DeclarationError(f"references: unknown output {name!r}, {did_you_mean(name, subject.outputs)}")
    sets: dict[str, StructureSet] = {}
    referenced = None
    if structures is not None:
        n = None if references or chosen.n_structures is None else 4 * chosen.n_structures
        referenced = users_set(subject, structures, n)
        sets |= by_periodicity(subject, referenced)
    if use_library:
        sets |= library_sets(subject, chosen)
    bench = Bench(subject, sets, chosen, seed, trajectory, references, use_library)
    bench.referenced = referenced
    return bench


def tasks(bench: Bench, only: Sequence[str] | None = None, skip: Sequence[str] = ()) -> Iterator[Task]:
    """All (check, target) pairs for a subject.

    Parameters
    ----------
    only, skip : sequence of str
        Names of checks or ids such as ``"rotation_equivariance[planar]"``.

    Raises
    ------
    DeclarationError
        Unknown check.
    """
    catalog = all_checks()
    every = [Task(c, on) for c in catalog.values() for on in ([""] if skip_reason(bench, c) else c.targets(bench))]
    for name in (*(only or ()), *skip):
        known_check(name)
        if "[" in name and name not in {task.id for task in every}:
            listed = [task.id for task in every if task.check.name == name.split("[")[0]]
            raise DeclarationError(f"check: unknown id {name!r}, {did_you_mean(name, listed)}")
    for task in every:
        names = {task.check.name, task.id}
        if (not only or names & set(only)) and not names & set(skip):
            yield task


def known_check(name: str) -> Check:
    """The check that a name or an id refers to."""
    catalog = all_checks()
    base = name.split("[")[0]
    if base not in catalog:
        raise DeclarationError(f"check: unknown check {base!r}, {did_you_mean(base, catalog)}")
    return catalog[base]


def run_task(bench: Bench, task: Task, expected_failures: Mapping[str, str] | None = None) -> Result:
    """Run one check and judge it; never raises for what the model does.

    An announced failure is a wrong number. An exception is another thing, and has to be announced as one: by a reason
    that begins with "error".
    """
    entry, subject = task.check, bench.subject
    expected = (expected_failures or {}).get(task.id, (expected_failures or {}).get(entry.name))

    def result(verdict: Verdict, **more: Any) -> Result:
        return Result(
            entry.name,
            task.on,
            entry.title,
            verdict,
            meaning=entry.meaning,
            suspicion=entry.suspicion,
            definition=entry.definition,
            **more,
        )

    if reason := skip_reason(bench, entry):
        return result(Verdict.SKIPPED, reason=reason)
    claimed = entry.claim is None or entry.claim in subject.claims
    start, before = time.perf_counter(), bench.evaluations
    spent: dict[str, Any]
    try:
        outcome = entry.function(bench, task.on)
    except Exception as error:
        spent = {"seconds": time.perf_counter() - start, "evaluations": bench.evaluations - before}
        if expected is not None and expected.lower().startswith("error"):
            return result(Verdict.EXPECTED, reason=f"{expected} ({_summary(error)})", **spent)
        if not claimed or not entry.judged:
            return result(Verdict.SKIPPED, reason=f"not measured: {_summary(error)}", **spent)
        return result(Verdict.ERROR, reason=_summary(error), **spent)
    if not claimed:
        outcome = outcome.unjudged()
    spent = {"outcome": outcome, "seconds": time.perf_counter() - start, "evaluations": bench.evaluations - before}
    if outcome.findings and all(f.limit is None for f in outcome.findings):
        return result(Verdict.RECORDED, **spent)
    if outcome.ok:
        return result(Verdict.PASSED, **spent)
    if expected is None:
        return result(Verdict.FAILED, reason=_known_limit(subject, task), **spent)
    return result(Verdict.EXPECTED, reason=expected, **spent)


def _known_limit(subject: Subject, task: Task) -> str:
    """What is known of the symmetrisation method of a subject about a check; empty where that is nothing."""
    if subject.symmetrizer is None:
        return ""
    method = subject.symmetrizer.method
    reason = method.limits.get(task.id, method.limits.get(task.check.name, ""))
    return f"known of {type(method).__name__}: {reason}" if reason else ""


def _source(error: Exception) -> str:
    """The line that an exception comes from, and what it says."""
    return f"{traceback.extract_tb(error.__traceback__)[-1].line} {error}"


def _summary(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text[:400]} (in {last.name}, line {last.lineno} of {last.filename.split('/')[-1]})"
    )


def _check_announcements(bench: Bench, expected_failures: Mapping[str, str] | None) -> None:
    """Refuse announcements of what is no check: they would be silently ignored. Paths of any profile are known."""
    if not expected_failures:
        return
    known = {task.id for task in tasks(bench)} | {f"{c}[{p}]" for c in all_checks() for p in paths()}
    for name in expected_failures:
        base = known_check(name).name
        if "[" in name and name not in known:
            near = sorted(task for task in known if task.startswith(f"{base}["))
            raise DeclarationError(f"expected_failures: unknown id {name!r}, {did_you_mean(name, near)}")


def with_stale(results: Sequence[Result], expected_failures: Mapping[str, str] | None) -> list[Result]:
    """Mark as stale what was announced as a failure and passed everywhere."""
    out = list(results)
    for name, reason in (expected_failures or {}).items():
        matching = [k for k, r in enumerate(out) if name in (r.check, r.id)]
        if any(out[k].verdict is Verdict.EXPECTED for k in matching):
            continue
        for k in matching:
            if out[k].verdict in (Verdict.PASSED, Verdict.RECORDED):
                what = "it passes" if out[k].verdict is Verdict.PASSED else "nothing is judged"
                text = f"announced as a failure ({reason}), but {what}: remove the announcement"
                out[k] = dataclasses.replace(out[k], verdict=Verdict.STALE, reason=text)
    return out


def estimate(bench: Bench, chosen: Sequence[Task]) -> float:
    """Seconds that a run will take, from one timed evaluation and the number of evaluations of each check."""
    batch = batched([bench.main.batch] * 4)
    bench.subject.model(copied(batch))
    start = time.perf_counter()
    bench.subject.model(copied(batch))
    each = (time.perf_counter() - start) / (4 * bench.main.n_structures)
    return each * sum(task_cost(bench, task) for task in chosen)


def task_cost(bench: Bench, task: Task) -> int:
    """Structures that a task will evaluate, roughly; 0 where it will be skipped."""
    return 0 if skip_reason(bench, task.check) else task.check.cost(bench, task.on)


def skip_reason(bench: Bench, entry: Check) -> str:
    """Why a check cannot run; empty where it can."""
    if entry.claim is not None and entry.claim not in bench.subject.claims and entry.unclaimed == "skip":
        return f"not claimed: {entry.claim}"
    return entry.needs(bench) or ("" if entry.targets(bench) else "nothing to run it on")


def run(
    subject: Subject,
    structures: Structures | None = None,
    *,
    profile: str | Profile = "quick",
    seed: int = 0,
    library: bool | None = None,
    trajectory: Sequence[Atoms] | None = None,
    references: Mapping[str, Tensor] | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    progress: bool = False,
    announce: Callable[[str], None] | None = None,
    command: str = "",
) -> Report:
    """Check a subject.

    Parameters
    ----------
    subject : Subject
    structures, profile, seed, library, trajectory, references
        See `make_bench`.
    only, skip
        See `tasks`.
    expected_failures : dict of str to str, optional
        Check or id -> reason. Strict: one that passes is reported as stale, and the run does not pass.
    progress : bool
        Show a progress bar.
    announce : callable, optional
        Told beforehand how long the run will take.
    command : str
        How to repeat it, for the report.
    """
    bench = make_bench(
        subject,
        structures,
        profile=profile,
        seed=seed,
        library=library,
        trajectory=trajectory,
        references=references,
    )
    chosen = list(tasks(bench, only, skip))
    _check_announcements(bench, expected_failures)
    if announce is not None:
        try:
            seconds = estimate(bench, chosen)
        except Exception as error:
            if not isinstance(error, SymmetrizeError) and subject.cutoff is None and "edge" in _source(error):
                hint = ". It reads edges: which cutoff does its neighbor list have (--cutoff, cutoff=)?"
            else:
                hint = ""
            # The checks go on, one structure may be at fault; but there is no need to wait for them to know this.
            announce(f"{_checks(len(chosen))}; a first evaluation failed: {_summary(error)}{hint}")
        else:
            announce(f"{_checks(len(chosen))}, profile {bench.profile.name}: about {_duration(seconds)}")
    results = []
    with _bar(progress, sum(max(task_cost(bench, t), 1) for t in chosen) if progress else 0) as bar:
        for task in chosen:
            bar.set_description(task.id[:40])
            results.append(run_task(bench, task, expected_failures))
            bar.update(max(task_cost(bench, task), 1) if progress else 0)
    return assemble_report(bench, with_stale(results, expected_failures), command=command)


def assemble_report(bench: Bench, results: Sequence[Result], *, command: str = "") -> Report:
    """Results with everything that a reader needs beside them."""
    from symmetrize.testing.running.atom_errors import structures_with_errors

    subject = bench.subject
    declared = {**subject.outputs, **subject.periodic_outputs}
    scales: dict[str, Any] = {}
    structures: tuple[dict[str, Any], ...] = ()
    # A model that fails on its main structures has said so in every check; the report is written nevertheless.
    with contextlib.suppress(Exception):
        scales = {
            name: {"value": s.value, "kind": s.kind, "magnitude": s.magnitude, "unit": _unit(declared, name)}
            for name, s in bench.scales.items()
        }
    with contextlib.suppress(Exception):
        structures = structures_with_errors(bench)
    about = {
        "name": subject.name,
        "kind": subject.kind,
        "group": subject.group,
        "claims": sorted(subject.claims),
        "smooth": subject.smooth,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "tolerance": subject.tolerance,
        "outputs": {name: str(spec) for name, spec in declared.items()},
        "structures": {name: found.n_structures for name, found in bench.sets.items()},
    }
    return Report(
        about, tuple(results), scales, tuple(structures), bench.profile.name, bench.seed, _environment(command)
    )


def _unit(declared: Mapping[str, Any], name: str) -> str:
    spec = declared.get(name, declared.get(name.removeprefix("atomic_")))
    return "" if spec is None else spec.unit


def _environment(command: str) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch-symmetrize", "torch", "e3nn", "torch-geometric", "ase", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "command": command,
    }


def _checks(n: int) -> str:
    return f"{n} check" if n == 1 else f"{n} checks"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        disable=not progress,
        file=sys.stderr,
        bar_format="{desc:<42}{percentage:3.0f}%|{bar:30}| {remaining}",
    )
