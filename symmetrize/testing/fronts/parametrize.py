"""Checks as tests of pytest, one for each check of each model."""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidTypeError, SymmetrizeError, did_you_mean
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.fronts.front import CheckFailure, as_subject, explain, save_report
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.outcome import Report, Result, Verdict
from symmetrize.testing.running.runner import Task, assemble_report, known_check, make_bench, run_task, tasks
from symmetrize.testing.running.serialize import report_from_dict, report_to_dict
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms
    from torch import Tensor

    from symmetrize.testing.fronts.front import Structures

__all__ = ["parametrize_with_checks"]

#: Check or id -> reason, or a function of the subject that says so.
Expected = Mapping[str, str] | Callable[[Subject], Mapping[str, str]]


def parametrize_with_checks(
    models: Sequence[Any] | Mapping[str, Any],
    *,
    structures: Structures | Callable[[], Structures] | None = None,
    expected_failures: Expected | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    library: bool | None = None,
    trajectory: Sequence[Atoms] | None = None,
    references: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Decorator: one test for each check of each model.

    ::

        @parametrize_with_checks([make_model])
        def test_model(check):
            check()

    Every check is reported under an id such as ``make_model-rotation_equivariance[planar]``. A check that does not
    apply is skipped with the reason; one without a limit passes, with its number among the recorded properties.

    Parameters
    ----------
    models : sequence, or dict of str to model
        Anything that `check` takes, or a function without arguments that returns it: called once, when its tests are
        collected. The keys of a dict are the names in the ids.
    structures : Atoms, Data, a sequence of them, or a function without arguments that returns them, optional
    expected_failures : dict of str to str, or function of the subject, optional
        Check or id -> reason: reported as xfail, strictly, so that one that passes is a failure.
    only, skip, library, trajectory, references
        As for `check`.
    profile, seed : optional
        ``--symmetrize-profile`` and ``--symmetrize-seed`` on the command line win.
    **options
        As for `as_subject`: attributes of `Subject`, and ``outputs`` for torch modules.
    """
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise DeclarationError("parametrize_with_checks needs pytest: pip install pytest") from error
    plan = Plan(
        models,
        structures=structures,
        expected_failures=expected_failures,
        only=only,
        skip=skip,
        profile=profile,
        seed=seed,
        bench=dict(library=library, trajectory=trajectory, references=references),
        options=options,
    )
    from symmetrize.pytest_plugin import MARK

    return getattr(pytest.mark, MARK).with_args(plan)


class Plan:
    """The arguments of one decorator."""

    #: What the plugin reports as an error in the arguments.
    errors = (SymmetrizeError,)

    def __init__(
        self,
        models: Sequence[Any] | Mapping[str, Any],
        *,
        structures: Any,
        expected_failures: Expected | None,
        only: Sequence[str] | None,
        skip: Sequence[str],
        profile: str | None,
        seed: int | None,
        bench: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        if isinstance(models, (str, bytes)) or not isinstance(models, (Sequence, Mapping)):
            raise InvalidTypeError(f"models: expected a list or a dict of models, got {type(models).__name__}")
        if not models:
            raise DeclarationError("models: expected at least one, got none")
        self.items = dict(models) if isinstance(models, Mapping) else _named(models)
        self.structures, self.expected_failures = structures, expected_failures
        self.only, self.skip, self.profile, self.seed = only, tuple(skip), profile, seed
        self.bench, self.options = dict(bench), dict(options)
        self._groups: list[Group] | None = None

    def groups(self, *, profile: str | None, default_profile: str, seed: int | None) -> list[Group]:
        """One group for each model; the arguments come from pytest."""
        if self._groups is None:
            chosen = profile or self.profile or default_profile
            number = seed if seed is not None else (self.seed or 0)
            self._groups = [Group(self, name, item, chosen, number) for name, item in self.items.items()]
        return self._groups


def _named(models: Iterable[Any]) -> dict[str, Any]:
    """Short names, numbered where they come twice."""
    out: dict[str, Any] = {}
    for model in models:
        name = _short_name(model)
        unique, n = name, 1
        while unique in out:
            n += 1
            unique = f"{name}-{n}"
        out[unique] = model
    return out


def _short_name(model: Any) -> str:
    if isinstance(model, Subject):
        return model.name
    if isinstance(model, Symmetrizer):
        return f"{type(model.backbone).__name__}-{type(model.method).__name__}"
    return str(getattr(model, "__name__", type(model).__name__))


def is_factory(item: Any) -> bool:
    """A function without required arguments, or a class that can be created without any."""
    if isinstance(item, (Subject, torch.nn.Module, Backbone)) or not callable(item):
        return False
    try:
        parameters = inspect.signature(item).parameters.values()
    except (TypeError, ValueError):
        return False
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in variable for p in parameters)


class Group:
    """A model, its workbench, and what became of its checks."""

    def __init__(self, plan: Plan, name: str, item: Any, profile: str, seed: int) -> None:
        self.plan, self.name, self.item, self.profile, self.seed = plan, name, item, profile, seed
        self.results: dict[str, Result] = {}
        self.tasks: list[Task] = []
        self.expected: dict[str, str] = {}
        self._bench: Bench | None = None
        self._cases: list[Case] | None = None

    def cases(self) -> list[Case]:
        """All checks; a single one that fails where the model could not be made."""
        if self._cases is None:
            try:
                bench = self._made()
            except SymmetrizeError:
                raise
            except Exception as error:  # a test that fails, rather than a file that cannot be collected
                self._cases = [Case(self, None, error)]
                return self._cases
            self.tasks = list(tasks(bench, self.plan.only, self.plan.skip))
            self._check_expected()
            self._cases = [Case(self, task) for task in self.tasks]
        return self._cases

    def _made(self) -> Bench:
        if self._bench is None:
            plan = self.plan
            structures = plan.structures() if callable(plan.structures) else plan.structures
            model = self.item() if is_factory(self.item) else self.item
            subject = as_subject(model, structures, **plan.options)
            self._bench = make_bench(subject, structures, profile=self.profile, seed=self.seed, **plan.bench)
            expected = plan.expected_failures
            self.expected = dict(expected(subject) if callable(expected) else expected or {})
        return self._bench

    def _check_expected(self) -> None:
        for name in self.expected:
            known_check(name)
            ids = {task.id for task in self.tasks}
            if "[" in name and name not in ids and not self.plan.only and name not in self.plan.skip:
                raise DeclarationError(f"expected_failures: unknown id {name!r}, {did_you_mean(name, ids)}")

    def run(self, task: Task) -> Result:
        """Run a check, once."""
        result = run_task(self._made(), task, self.expected)
        if result.verdict is Verdict.PASSED and (stale := self._stale(task)):
            import dataclasses

            result = dataclasses.replace(result, verdict=Verdict.STALE, reason=stale)
        self.results[task.id] = result
        return result

    def _stale(self, task: Task) -> str:
        """Why a passing check is a failure: it, or all of its kind, had been announced as failing."""
        reason = self.expected.get(task.id)
        if reason is None and (reason := self.expected.get(task.check.name)) is not None:
            others = [t.id for t in self.tasks if t.check.name == task.check.name and t.id != task.id]
            if any(t not in self.results or self.results[t].verdict is Verdict.EXPECTED for t in others):
                return ""
        if reason is None:
            return ""
        return f"announced as a failure ({reason}), but it passes: remove the announcement"

    def report(self) -> dict[str, Any] | None:
        """What ran, as a JSON-ready report; None for nothing."""
        if not self.results or self._bench is None:
            return None
        report = assemble_report(self._bench, list(self.results.values()), command="pytest")
        content = report_to_dict(report)
        content["subject"]["test_name"] = self.name
        return content


class Case:
    """One check of one model: what a test function gets and calls."""

    def __init__(self, group: Group, task: Task | None, error: Exception | None = None) -> None:
        self.group, self.task, self.error = group, task, error
        self.called = False

    @property
    def id(self) -> str:
        """``model-check[on]``."""
        return f"{self.group.name}-{self.task.id if self.task is not None else 'construction'}"

    def __repr__(self) -> str:
        return f"<check {self.id}>"

    @property
    def result(self) -> Result | None:
        """What it found, where it ran."""
        return None if self.task is None else self.group.results.get(self.task.id)

    def __call__(self) -> Result:
        """Run the check; pytest's skip and xfail where they apply.

        Raises
        ------
        CheckFailure
            With what failed, by how much, and what is probably wrong.
        """
        __tracebackhide__ = True
        import pytest

        self.called = True
        if self.task is None:
            raise CheckFailure(f"{self.group.name}: the model could not be made\n{_outside(self.error)}")
        result = self.group.run(self.task)
        if result.verdict is Verdict.SKIPPED:
            pytest.skip(result.reason)
        if result.verdict is Verdict.EXPECTED:
            pytest.xfail(result.reason)
        if not result.verdict.good:
            raise CheckFailure(explain(result))
        return result

    def properties(self) -> list[tuple[str, object]]:
        """Name and number of what was found: all that is recorded, the worst of what is judged."""
        result = self.result
        if result is None or result.outcome is None:
            return []
        worst = result.outcome.worst
        chosen = result.outcome.findings if result.verdict is Verdict.RECORDED else [worst] if worst else []
        return [(f"{result.id}: {f.quantity}", f.number if math.isfinite(f.number) else str(f.number)) for f in chosen]


def _outside(error: Exception | None) -> str:
    """A traceback from the first frame on that is not in this file."""
    if error is None:
        return ""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Report]:
    """Reports by name; parts of the same model (from several processes) as one."""
    import dataclasses

    out: dict[str, Report] = {}
    for part in parts:
        report = report_from_dict(part)
        name = str(report.subject.get("test_name", report.subject["name"]))
        if name in out and not {r.id for r in out[name].results} & {r.id for r in report.results}:
            out[name] = dataclasses.replace(out[name], results=(*out[name].results, *report.results))
        else:
            unique, n = name, 1
            while unique in out:
                n += 1
                unique = f"{name}-{n}"
            out[unique] = report
    return out


def write_reports(reports: Mapping[str, Report], path: str) -> list[Path]:
    """Write one report to ``path``, several to ``path`` with their names before the suffix."""
    base = Path(path)
    written = []
    for name, report in reports.items():
        safe = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-")
        target = base if len(reports) == 1 else base.with_name(f"{base.stem}-{safe}{base.suffix}")
        save_report(report, target)
        written.append(target)
    return written
