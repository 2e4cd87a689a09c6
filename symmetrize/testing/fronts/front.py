"""Checking a model from Python: any kind of model in, a `Report` out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.running.outcome import Report, Result, Verdict, worst_first
from symmetrize.testing.running.profile import Profile, profile_named
from symmetrize.testing.running.runner import run
from symmetrize.testing.structures.sets import library_sets, users_set
from symmetrize.testing.subjects.declarations import SINGLE, Declaration, read_declarations, with_rows
from symmetrize.testing.subjects.subject import Subject, of_backbone, of_callable, of_symmetrizer

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

    Structures: TypeAlias = Atoms | Data | Sequence[Atoms | Data]
    Outputs: TypeAlias = Mapping[str, OutputSpec | str] | OutputSpec | str

__all__ = [
    "CheckFailure",
    "as_subject",
    "check",
    "check_backbone",
    "check_calculator",
    "check_callable",
    "check_metatomic",
    "check_symmetrizer",
    "explain_failures",
    "raise_for_failures",
]

#: Formats of reports, by the suffix of the file.
REPORT_SUFFIXES = (".html", ".md", ".json")

#: Files that are taken for exported metatomic models.
EXPORTED_SUFFIXES = (".pt", ".ptm")


class CheckFailure(AssertionError):
    """A model does not have a property that it should have; the message says which, by how much, and probably why."""


def check(
    model: Any,
    structures: Structures | None = None,
    *,
    outputs: Outputs | None = None,
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
    report: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    command: str = "",
    **options: Any,
) -> Report:
    """Check any model; a model that fails is told by ``report.ok``, not by an exception.

    Parameters
    ----------
    model : Symmetrizer, Backbone, Calculator, metatomic model, callable or Subject
    structures : Atoms, Data or a sequence of them, optional
        The user's own; without them, and for a Symmetrizer or Backbone, named geometries of the package are used too.
    outputs : dict of str to OutputSpec or str, or one of them
        Declarations of a callable, as `OutputSpec` or as text such as ``"1o:structure"`` (see `read_declaration`).
    profile : {"quick", "full"} or Profile
    seed : int
    library : bool, optional
        Whether the named geometries are used beside ``structures``; by default for a Symmetrizer or Backbone only.
    trajectory : sequence of ase.Atoms, optional
        Frames of the same atoms, along which the outputs have to be smooth.
    references : dict of str to Tensor, optional
        Reference values of outputs for ``structures``.
    only, skip : sequence of str
        Checks (``"permutation_equivariance"``) or ids (``"rotation_equivariance[planar]"``).
    expected_failures : dict of str to str, optional
        Check or id -> reason; one that passes is a failure too.
    progress, announce
        Show a progress bar; be told beforehand how long it will take.
    report : path or sequence of paths, optional
        Where to write the report: ``.html``, ``.md`` or ``.json``.
    command : str
        How to repeat it, for the report.
    **options
        Attributes of `Subject`, instead of those found: ``group``, ``claims``, ``species``, ``tolerance``, ...

    Returns
    -------
    Report
        See `raise_for_failures`.
    """
    paths = report_paths(report)
    subject = as_subject(model, structures, outputs=outputs, **options)
    found = run(
        subject,
        structures,
        profile=profile,
        seed=seed,
        library=library,
        trajectory=trajectory,
        references=references,
        only=only,
        skip=skip,
        expected_failures=expected_failures,
        progress=progress,
        announce=announce,
        command=command,
    )
    for path in paths:
        save_report(found, path)
    return found


def check_symmetrizer(model: Symmetrizer, structures: Structures | None = None, **options: Any) -> Report:
    """Check a `Symmetrizer`; options as for `check`, and ``forces`` and ``energy`` as for `of_symmetrizer`."""
    return check(_expect(model, Symmetrizer, "model"), structures, **options)


def check_backbone(backbone: Backbone, structures: Structures | None = None, **options: Any) -> Report:
    """Check a `Backbone`: everything it promises, that is all but rotations and inversion, which are recorded.

    Options as for `check`, and ``forces`` and ``energy`` as for `of_backbone`.
    """
    return check(_expect(backbone, Backbone, "backbone"), structures, **options)


def check_callable(
    f: Callable[[Data], Mapping[str, Tensor] | Tensor],
    outputs: Outputs,
    structures: Structures | None = None,
    **options: Any,
) -> Report:
    """Check a function of batches, or a torch module; options as for `check`.

    Parameters
    ----------
    f : callable
        Batch -> dict of Tensor, or Tensor where ``outputs`` is one declaration.
    outputs : dict of str to OutputSpec or str, or one of them
    structures : Atoms, Data or a sequence of them, optional
    """
    if not callable(f):
        raise InvalidTypeError(f"f: expected something to call with a batch, got {type(f).__name__}")
    return check(f, structures, outputs=outputs, **options)


def check_calculator(calc: Calculator, structures: Structures | None = None, **options: Any) -> Report:
    """Check an ASE calculator, through ``get_property`` alone; options as for `check`."""
    if not is_calculator(calc):
        raise InvalidTypeError(f"calc: expected an ASE calculator, got {type(calc).__name__}")
    return check(calc, structures, **options)


def check_metatomic(path: Any, structures: Structures | None = None, **options: Any) -> Report:
    """Check a metatomic model: an exported file or a model in memory; options as for `check`."""
    from symmetrize.testing.subjects.metatomic import of_metatomic

    known = _run_options()
    subject = of_metatomic(path, **{k: v for k, v in options.items() if k not in known})
    return check(subject, structures, **{k: v for k, v in options.items() if k in known})


def as_subject(
    model: Any, structures: Structures | None = None, *, outputs: Outputs | None = None, **options: Any
) -> Subject:
    """What `check` makes of a model.

    Parameters
    ----------
    model : Symmetrizer, Backbone, Calculator, metatomic model or file, callable or Subject
    structures : Atoms, Data or a sequence of them, optional
        For a calculator: which properties it has; for a callable: what its outputs have rows of, where not declared.
    outputs : dict of str to OutputSpec or str, or one of them
        For a callable, which does not declare any; for a calculator, names of properties will do.
    **options
        Attributes of `Subject`, instead of those found.

    Raises
    ------
    InvalidTypeError, DeclarationError
        Nothing that can be checked, an unknown option, or missing or superfluous declarations.
    """
    known = {f.name for f in dataclasses.fields(Subject)} - {"model", "outputs"} | {"forces"}
    if unknown := [name for name in options if name not in known]:
        raise DeclarationError(
            f"options: unknown option {unknown[0]!r}, {did_you_mean(unknown[0], known | _run_options())}"
        )
    declares = outputs is None
    if isinstance(model, Subject):
        subject = dataclasses.replace(model, **options)
    elif isinstance(model, Symmetrizer):
        subject = of_symmetrizer(model, **options)
    elif isinstance(model, Backbone):
        subject = of_backbone(model, **options)
    elif is_calculator(model):
        from symmetrize.testing.subjects.calculators import of_calculator

        subject, declares = of_calculator(model, structures, outputs=_properties(outputs), **options), True
    elif _is_metatomic(model):
        from symmetrize.testing.subjects.metatomic import of_metatomic

        subject = of_metatomic(model, **options)
    elif isinstance(model, type):
        raise InvalidTypeError(f"model: expected a model, got the class {model.__name__}; create an instance of it")
    elif callable(model):
        if outputs is None:
            raise DeclarationError(
                f"outputs: a {type(model).__name__} does not say how its outputs transform; expected declarations "
                "such as outputs={'energy': 'scalar:structure', 'forces': 'vector:atom'}"
            )
        subject, declares = _of_callable(model, outputs, structures, options), True
    else:
        raise InvalidTypeError(
            "model: expected a Symmetrizer, a Backbone, an ASE calculator, a metatomic model, a callable or a Subject, "
            f"got {type(model).__name__}"
        )
    if not declares:
        raise DeclarationError(f"outputs: a {subject.kind} declares its own: {', '.join(subject.outputs)}")
    return subject


def _properties(outputs: Any) -> Any:
    """Properties of a calculator: names as they are, declarations as `OutputSpec`."""
    if not isinstance(outputs, Mapping):
        return outputs
    declarations = read_declarations(outputs)
    for name, declaration in declarations.items():
        if not declaration.rows_known:
            raise DeclarationError(f"outputs: {name}: expected rows, such as {outputs[name]}:structure")
    return {name: d.spec for name, d in declarations.items()}


def _of_callable(f: Any, outputs: Outputs, structures: Structures | None, options: Mapping[str, Any]) -> Subject:
    declarations = read_declarations(outputs)
    single = isinstance(outputs, (str, OutputSpec))

    def subject(specs: Mapping[str, OutputSpec]) -> Subject:
        return of_callable(f, specs[SINGLE] if single else dict(specs), **options)

    provisional = subject({name: d.spec for name, d in declarations.items()})
    if all(d.rows_known for d in declarations.values()):
        return provisional
    return subject(_with_rows(provisional, structures, declarations))


def _with_rows(
    subject: Subject, structures: Structures | None, declarations: Mapping[str, Declaration]
) -> dict[str, OutputSpec]:
    if structures is not None:
        found = users_set(subject, structures, 2)
    else:
        sets = library_sets(subject, profile_named("quick"))
        found = sets["generic"] if "generic" in sets else next(iter(sets.values()))
    return with_rows(subject.model, found.batch, declarations)


def raise_for_failures(report: Report) -> None:
    """Raise `CheckFailure` with an explanation unless the report is ``ok``."""
    __tracebackhide__ = True
    if not report.ok:
        raise CheckFailure(explain_failures(report))


def explain_failures(report: Report) -> str:
    """One paragraph for each check that failed: its worst result, and on what else it failed.

    Checks that stopped at the same exception share a paragraph; expected failures are listed with their reasons.
    """
    counts = ", ".join(f"{n} {v.value}" for v, n in report.count().items() if n)
    # A dict, as several sets share a reason.
    known = {f"{r.check}: expected to fail: {r.reason}": None for r in report.results if r.verdict is Verdict.EXPECTED}
    if not report.failures:
        verdict = "passed" if report.ok else "nothing was judged"
        return "\n".join([f"{report.subject['name']}: {verdict} ({counts or 'no checks'})", *known])
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in worst_first(report.failures):
        key = ("", result.reason) if result.verdict is Verdict.ERROR else (result.check, result.verdict.value)
        groups.setdefault(key, []).append(result)
    lines = [f"{report.subject['name']}: failed ({counts})"]
    for results in groups.values():
        lines.append(explain(results[0]))
        if others := [r.on if r.check == results[0].check and r.on else r.id for r in results[1:]]:
            shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
            lines.append(f"  the same on: {shown}")
    return "\n".join([*lines, *known])


def explain(result: Result) -> str:
    """What failed, by how much, what is probably wrong; an exception speaks for itself."""
    if result.verdict in (Verdict.ERROR, Verdict.STALE):
        return f"{result.id}: {result.verdict.value}\n  {result.reason}"
    return result.explain()


def report_paths(report: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> list[Path]:
    """Where reports go.

    Raises
    ------
    InvalidInputError
        A suffix that stands for no format.
    """
    if report is None:
        return []
    listed = [report] if isinstance(report, (str, os.PathLike)) else list(report)
    paths = [Path(p) for p in listed]
    for path in paths:
        if path.suffix not in REPORT_SUFFIXES:
            raise InvalidInputError(f"report: expected a name that ends in {', '.join(REPORT_SUFFIXES)}, got '{path}'")
    return paths


def save_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report in the format that the suffix says."""
    from symmetrize.report.check import write_check

    write_check(report, Path(path))


def _run_options() -> set[str]:
    """Keyword arguments of `check` that are no attributes of `Subject`."""
    names = set(check.__kwdefaults__ or {})
    return names - {"outputs"}


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidTypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    return value


def is_calculator(model: Any) -> bool:
    """Whether this is a calculator of ASE."""
    from ase.calculators.calculator import BaseCalculator

    return isinstance(model, BaseCalculator)


def _is_metatomic(model: Any) -> bool:
    if isinstance(model, (str, os.PathLike)):
        return str(model).endswith(EXPORTED_SUFFIXES)
    if isinstance(model, torch.jit.ScriptModule):
        return getattr(model, "original_name", "") == "AtomisticModel"
    return any(c.__module__.split(".")[0] == "metatomic" for c in type(model).__mro__ if isinstance(c, type))
