"""What ``symmetrize check`` does: find the model, check it, print a table, write reports."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symmetrize.backbone import Backbone
from symmetrize.data import read_structures
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, SymmetrizeError, did_you_mean
from symmetrize.frames import FrameMethod
from symmetrize.methods.text import read_method
from symmetrize.registry import list_backbones, load_backbone
from symmetrize.storage import is_saved_model, load
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.fronts.front import EXPORTED_SUFFIXES, as_subject, explain_failures, report_paths, save_report
from symmetrize.testing.fronts.parametrize import is_factory
from symmetrize.testing.running.catalog import all_checks
from symmetrize.testing.running.outcome import Finding, Report, Result, Verdict
from symmetrize.testing.running.runner import make_bench, run, tasks
from symmetrize.testing.subjects.declarations import SYNTAX, read_declaration
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms

#: Exit statuses.
PASSED, FAILED, NOT_RUN = 0, 1, 2

_WORST_FIRST = (
    Verdict.ERROR,
    Verdict.FAILED,
    Verdict.STALE,
    Verdict.EXPECTED,
    Verdict.PASSED,
    Verdict.RECORDED,
    Verdict.SKIPPED,
)


def check_target(
    target: str,
    *,
    structures: str | Path | None = None,
    outputs: Sequence[str] = (),
    group: str | None = None,
    symmetrize: bool = False,
    method: str | None = None,
    profile: str = "quick",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    expected_failures: Sequence[str] = (),
    references: bool = False,
    trajectory: str | Path | None = None,
    species: str | None = None,
    cutoff: float | None = None,
    tolerance: float | None = None,
    library: bool | None = None,
    report: Sequence[str | Path] = (),
    seed: int = 0,
    dtype: str | None = None,
    quiet: bool = False,
    list_only: bool = False,
    command: str = "",
    threads: int | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Check what a target stands for; options as on the command line.

    Parameters
    ----------
    target : str
        See `load_target`.
    outputs : sequence of str
        ``"NAME=REPRESENTATION[:ROWS[:UNIT]]"`` (see `read_declaration`), several in one separated by commas.
    method : str, optional
        ``"NAME[:OPTION=VALUE,...]"``: symmetrise a backbone by this method (see `symmetrize.methods.text.read_method`)
        instead of ECSE; implies ``symmetrize``.
    expected_failures : sequence of str
        ``"ID=REASON"``.
    list_only : bool
        List what would be run, and stop.
    echo : callable
        Takes what would be printed.

    Returns
    -------
    int
        0: passed, 1: a check failed, 2: nothing could be judged.

    Raises
    ------
    SymmetrizeError
        Arguments that cannot be used.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    declared = _outputs(outputs)
    expected = _expected(expected_failures)
    paths = report_paths(list(report))
    if any(path.suffix == ".html" for path in paths):
        from symmetrize.report.libraries import require_libraries

        require_libraries()
    if library is False and structures is None:
        raise DeclarationError("--no-library: expected --structures FILE, or there is nothing to check on")
    atoms = None if structures is None else read_structures(structures, "--structures")
    frames = None if trajectory is None else read_structures(trajectory, "--trajectory")
    chosen = None if method is None and not symmetrize else read_method("ECSE" if method is None else method)
    model = _prepared(load_target(target), method=chosen, group=group, dtype=dtype)
    options: dict[str, Any] = {"group": group, "cutoff": cutoff, "tolerance": tolerance, "species": _species(species)}
    if dtype is not None and not isinstance(model, torch.nn.Module):
        options["dtype"] = getattr(torch, dtype)
    given = {name: value for name, value in options.items() if value is not None}
    subject = _subject(model, target, atoms, declared, given)
    if group is not None:
        # Who names a group wants it judged.
        asked = {"rotations", "inversion"} if group == "O(3)" else {"rotations"}
        subject = dataclasses.replace(subject, claims=subject.claims | asked)
    if list_only:
        bench = make_bench(subject, atoms, profile=profile, seed=seed, library=library, trajectory=frames)
        for task in tasks(bench, list(only) or None, list(skip)):
            echo(task.id)
        return PASSED
    if not quiet:
        for line in _about(target, subject, atoms, structures):
            echo(line)
    found = run(
        subject,
        atoms,
        profile=profile,
        seed=seed,
        library=library,
        trajectory=frames,
        references=_references(subject, atoms, structures) if references else None,
        only=list(only) or None,
        skip=list(skip),
        expected_failures=expected,
        progress=not quiet and sys.stderr.isatty(),
        announce=None if quiet else echo,
        command=command,
    )
    for line in table(found):
        echo(line)
    echo("")
    echo(explain_failures(found))
    if "rotations" not in subject.claims:
        echo(_unclaimed(found))
    for path in paths:
        save_report(found, path)
        echo(f"report: {path}")
    return exit_status(found)


def _unclaimed(report: Report) -> str:
    """What was measured of a symmetry that the model does not claim."""
    found = [r.outcome.worst for r in report.results if r.check == "rotation_equivariance" and r.outcome is not None]
    numbers = [f for f in found if f is not None]
    measured = ""
    if numbers:
        worst = max(numbers, key=lambda f: f.number)
        measured = f": under rotations, {worst.quantity} errs by up to {worst.number:.2g} of its error scale"
    return (
        f"Rotations were not judged, since the model claims no equivariance{measured}. "
        "To judge it nevertheless: --group O(3)"
    )


def exit_status(report: Report) -> int:
    """0 for a run that passed, 1 where a check failed, 2 where no check came to a verdict."""
    if report.ok:
        return PASSED
    judged = any(r.verdict not in (Verdict.ERROR, Verdict.SKIPPED, Verdict.RECORDED) for r in report.results)
    return FAILED if judged and report.failures else NOT_RUN


def list_checks(echo: Callable[[str], None] = print) -> None:
    """All checks with what they mean."""
    for entry in all_checks().values():
        echo(f"{entry.name}  [{entry.claim}]" if entry.claim else entry.name)
        echo(textwrap.fill(entry.meaning, width=96, initial_indent="    ", subsequent_indent="    "))


# --- the target ------------------------------------------------------------------------------------------------------


def load_target(target: str) -> Any:
    """The object that a name on the command line stands for.

    Parameters
    ----------
    target : str
        ``"NAME"`` or ``"NAME:WEIGHTS"`` of a registered backbone; ``"module:object"`` or ``"file.py:object"``, where
        the current directory is searched too and functions or classes without required arguments are called; the folder
        of a saved model (`symmetrize.save`); or an exported metatomic model, ``"model.pt"``.

    Raises
    ------
    DeclarationError, InvalidInputError
        Nothing of that name, or code that raises.
    """
    if target.endswith(EXPORTED_SUFFIXES):
        if not Path(target).is_file():
            raise InvalidInputError(f"target: no such file: {target}")
        return Path(target)
    if is_saved_model(target):
        return load(target)
    name, _, attribute = target.partition(":")
    known = list_backbones()
    if name in known:
        return _guarded(target, lambda: load_backbone(name, *([attribute] if attribute else [])))
    if not attribute:
        raise DeclarationError(
            "target: expected module:object, a registered backbone, the folder of a saved model or an exported model "
            f"(.pt), got {target!r}; "
            f"backbones: {did_you_mean(name, known)}"
        )
    value = _guarded(target, lambda: _imported(name))
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_")] if hasattr(value, "__dict__") else []
            raise DeclarationError(f"target: {name!r} has no {part!r}, {did_you_mean(part, public)}")
        value = getattr(value, part)
    return _guarded(target, value) if is_factory(value) else value


def _imported(name: str) -> Any:
    if importlib.util.find_spec("metatomic") is not None:
        # After torch_geometric it can be imported in a special way only, which the user's code knows nothing of.
        from symmetrize.metatomic import import_metatomic

        import_metatomic()
    if name.endswith(".py"):
        return _from_file(name)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        here = [p.stem for p in Path(folder).glob("*.py")]
        near = f"; {did_you_mean(name, here)}" if here else ""
        raise DeclarationError(f"target: no module {name!r}, neither installed nor in {folder}{near}") from error


def _from_file(name: str) -> Any:
    """A module whatever else is called like it; its neighbors can be imported."""
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidInputError(f"target: no such file: {name}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _guarded(target: str, load: Callable[[], Any]) -> Any:
    """Exceptions in the user's code as one line that says where."""
    try:
        return load()
    except SymmetrizeError:
        raise
    except Exception as error:
        raise InvalidInputError(f"target: {target} could not be loaded: {_summary(error)}") from error


def _summary(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"


def _prepared(model: Any, *, method: FrameMethod | None, group: str | None, dtype: str | None) -> Any:
    """In the wanted precision, and symmetrised where asked for."""
    if dtype is not None and isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        model = model.to(getattr(torch, dtype))
    if isinstance(model, Backbone):
        model = model.eval()
    if method is None:
        return model
    if not isinstance(model, Backbone):
        raise InvalidTypeError(
            f"--symmetrize, --method: expected a symmetrize.Backbone, got a {type(model).__name__}; a network becomes "
            "one by writing one method (see the README)"
        )
    group = group or ("O(3)" if "O(3)" in method.groups else method.groups[0])
    return Symmetrizer(model, method, group=group).eval()


def _subject(model: Any, target: str, atoms: Any, declared: dict[str, str], options: Mapping[str, Any]) -> Subject:
    declares = isinstance(model, (Subject, Symmetrizer, Backbone, Path))
    if declares and declared:
        raise DeclarationError(f"--outputs: {target} declares its own")
    try:
        return as_subject(model, atoms, outputs=declared or None, **options)
    except SymmetrizeError as error:
        if isinstance(error, DeclarationError) and not declared and str(error).startswith("outputs: a "):
            raise DeclarationError(
                f"--outputs: {target} does not say how its outputs transform; expected for example "
                "--outputs energy=scalar:structure --outputs forces=vector:atom"
            ) from error
        raise
    except Exception as error:  # of a first evaluation
        raise InvalidInputError(f"target: {target} could not be evaluated: {_summary(error)}") from error


# --- arguments -------------------------------------------------------------------------------------------------------


def _outputs(texts: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in (part for entry in texts for part in entry.split(",")):
        name, equals, spec = text.strip().partition("=")
        if not equals or not name or not spec:
            raise DeclarationError(f"--outputs: expected NAME={SYNTAX}, such as dipole=1o:structure, got {text!r}")
        read_declaration(spec)
        if name in out:
            raise DeclarationError(f"--outputs: {name!r} is declared twice")
        out[name] = spec
    return out


def _expected(texts: Sequence[str]) -> dict[str, str]:
    out = {}
    for text in texts:
        name, equals, reason = text.partition("=")
        if not equals or not reason.strip():
            raise DeclarationError(f"--expect-failure: expected ID=REASON, got {text!r}")
        out[name.strip()] = reason.strip()
    return out


def _species(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    from ase.data import atomic_numbers

    out = []
    for part in text.replace(",", " ").split():
        if part not in atomic_numbers and not (part.isdigit() and int(part) > 0):
            raise DeclarationError(f"--species: expected symbols such as H,C,O, got {part!r}")
        out.append(atomic_numbers[part] if part in atomic_numbers else int(part))
    if not out:
        raise DeclarationError("--species: expected symbols such as H,C,O, got none")
    return tuple(sorted(set(out)))


def _references(subject: Subject, atoms: Sequence[Atoms] | None, path: str | Path | None) -> dict[str, Tensor]:
    """Reference energies and forces of the file, as rows of the outputs of that name."""
    import numpy as np

    if atoms is None:
        raise DeclarationError("--references: expected --structures FILE, which holds them")
    results = [{} if a.calc is None else a.calc.results for a in atoms]
    out = {}
    for name in ("energy", "forces"):
        if name in subject.outputs and all(name in r for r in results):
            out[name] = torch.as_tensor(np.concatenate([np.atleast_1d(r[name]) for r in results]), dtype=torch.float64)
    if not out:
        raise InvalidInputError(f"--references: {path} does not hold energies or forces of all structures")
    return out


# --- what is printed -------------------------------------------------------------------------------------------------


def _about(target: str, subject: Subject, atoms: Sequence[Atoms] | None, path: str | Path | None) -> list[str]:
    declared = {**subject.outputs, **subject.periodic_outputs}
    lines = [f"{target}: {subject.name} ({subject.kind}, {str(subject.dtype).removeprefix('torch.')})"]
    lines += [f"  {name}: {spec}" for name, spec in declared.items()]
    lines.append(
        f"  claims {subject.group} equivariance"
        if {"rotations", "inversion"} & subject.claims
        else "  claims no equivariance: rotations and inversion are recorded, not judged"
    )
    if atoms is not None:
        lines.append(f"  structures: {len(atoms)} in {path}")
    return lines


def table(report: Report, width: int | None = None) -> list[str]:
    """One line per check: verdict, the number furthest beyond its limit, where.

    Parameters
    ----------
    report : Report
    width : int, optional
        Longest line; by default that of the terminal, unlimited where there is none.
    """
    if width is None:
        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    by_check: dict[str, list[Result]] = {}
    for result in report.results:
        by_check.setdefault(result.check, []).append(result)
    size = max([len(name) for name in by_check] + [len("check")])
    lines = [f"{'check':<{size}}  {'verdict':<16}  {'worst':>9}  {'limit':>9}  where"]
    skipped = [name for name, rs in by_check.items() if all(r.verdict is Verdict.SKIPPED for r in rs)]
    for name, results in by_check.items():
        if name in skipped:
            continue
        verdict = next(v for v in _WORST_FIRST if any(r.verdict is v for r in results))
        n = sum(r.verdict is verdict for r in results)
        share = (
            "" if len(results) == 1 else (f" ({len(results)})" if n == len(results) else f" ({n} of {len(results)})")
        )
        shown = _label(verdict) + share
        numbers, where = _worst([r for r in results if r.verdict is verdict])
        lines.append(f"{name:<{size}}  {shown:<16}  {numbers}  {where}")
    reasons: dict[str, list[str]] = {}
    for name in skipped:
        reasons.setdefault(by_check[name][0].reason, []).append(name)
    lines += [f"skipped: {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return [line if len(line) <= width else line[: width - 3] + "..." for line in lines]


def _label(verdict: Verdict) -> str:
    labels = {Verdict.FAILED: "FAILED", Verdict.ERROR: "ERROR", Verdict.STALE: "STALE", Verdict.EXPECTED: "expected"}
    return labels.get(verdict, verdict.value)


def _worst(results: Sequence[Result]) -> tuple[str, str]:
    found = [(r, r.outcome.worst) for r in results if r.outcome is not None and r.outcome.worst is not None]
    if not found:
        return f"{'':>9}  {'':>9}", next((r.reason for r in results if r.reason), "")
    result, finding = max(found, key=lambda pair: _rank(pair[1]))
    limit = "" if finding is None or finding.limit is None else f"{finding.limit:.2g}"
    if finding is None:
        return f"{'':>9}  {limit:>9}", ""
    unit = f" [{finding.unit}]" if finding.unit else ""
    where = f"{finding.quantity}{unit}" + (f", {finding.worst}" if finding.worst else "")
    return f"{finding.number:>9.2g}  {limit:>9}", where + (f"  [{result.on}]" if result.on else "")


def _rank(finding: Finding | None) -> tuple[float, float]:
    return (0.0, 0.0) if finding is None else (finding.excess, finding.number)
