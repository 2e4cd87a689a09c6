"""One-line assertions for tests: `assert_equivariant` and `assert_smooth`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.backbone import Backbone
from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.representations import OutputSpec, check_group
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.fronts.front import CheckFailure, as_subject, is_calculator
from symmetrize.testing.measuring.scales import evaluate
from symmetrize.testing.measuring.smoothness import Curve, measure_smoothness
from symmetrize.testing.running.outcome import Finding, Report, worst_first
from symmetrize.testing.running.profile import PROFILES
from symmetrize.testing.running.runner import run
from symmetrize.testing.structures.paths import Path
from symmetrize.testing.subjects.declarations import read_declaration
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms

    from symmetrize.testing.fronts.front import Outputs

__all__ = ["assert_equivariant", "assert_smooth"]

#: Without these the others prove nothing.
_SOUND = ("finite_outputs", "nontrivial_outputs")


def assert_equivariant(
    f: Callable[..., Any],
    inputs: Atoms | Data | Sequence[Atoms | Data] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    outputs: Outputs | Sequence[OutputSpec | str] | None = None,
    *,
    group: str = "O(3)",
    tolerance: float | None = None,
    n_elements: int = 8,
    n_cover: int = 1000,
    seed: int = 0,
    vectors: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    r"""Fail unless :math:`f(g x) = \rho(g) f(x)`, with outputs that are finite and depend on the input.

    Elements: special ones (90, 120 and 180 degrees, near the identity; for O(3) inversion and mirrors), the symmetry
    operations of the inputs themselves, and random ones.

    Parameters
    ----------
    f : callable
        Batch -> Tensor or dict of Tensor; where ``inputs`` is a dict, ``f(**inputs)`` -> Tensor, dict or tuple of them.
        A Symmetrizer, Backbone or `Subject` declares its own outputs.
    inputs : Atoms, Data, a sequence of them, or dict of str to Tensor or (Tensor, irreps)
        One or more structures; or named arguments (see `of_arguments`), of which those with irreps are turned.
    outputs : dict of str to OutputSpec or str, or one of them
        Declarations such as ``"1o"``, ``"vector:structure"`` (see `read_declaration`); for a function that returns a
        tuple, a sequence of them.
    group : {"O(3)", "SO(3)"}
    tolerance : float, optional
        Largest error on the error scale; by default rounding in the dtype of the inputs.
    n_elements : int
        Random rotations (and as many improper ones).
    n_cover : int
        Orientations of an even cover, in which the first structure is tried: 1000 find every patch of a two-hundredth
        of all orientations. 0: none.
    seed : int
    vectors : dict of str to str, optional
        Further fields of the batch that are turned, as name -> e3nn irreps.
    **options
        Attributes of `Subject`: ``cutoff`` for a neighbor list, ``dtype`` for structures of ASE, ...

    Raises
    ------
    CheckFailure
        An AssertionError that says what, by how much on which scale, for which element, and what is probably wrong.
    """
    __tracebackhide__ = True
    check_group(group)
    if isinstance(n_elements, bool) or not isinstance(n_elements, int) or n_elements < 1:
        raise InvalidInputError(f"n_elements: expected a positive number, got {n_elements!r}")
    settings: dict[str, Any] = {"group": group, "tolerance": tolerance, **options}
    if vectors is not None:
        settings["vectors"] = dict(vectors)
    structures: Any = inputs
    if _are_arguments(inputs):
        from symmetrize.testing.subjects.arguments import of_arguments

        if outputs is None:
            raise DeclarationError("outputs: expected the representation of what f returns, such as '1o', got none")
        if vectors is not None:
            raise DeclarationError("vectors: expected irreps beside the argument, as (Tensor, irreps)")
        subject, structures = of_arguments(f, structures, _returned(outputs), **settings)
    else:
        if "dtype" not in settings and (dtype := _dtype(inputs)) is not None:
            settings["dtype"] = dtype
        declared: Any = outputs
        subject = as_subject(f, structures, outputs=declared, **settings)
    # Whatever is claimed otherwise, this is what is asserted.
    subject = dataclasses.replace(subject, claims=subject.claims | {"rotations", "inversion"})
    # Outside of any check, so that an exception in the model arrives as it is.
    _evaluate_once(subject, structures)
    profile = dataclasses.replace(
        PROFILES["quick"], name="assertion", n_structures=None, n_elements=n_elements, n_cover=max(n_cover, 1)
    )
    only = [*_SOUND, "rotation_equivariance", *(["inversion_equivariance"] if group == "O(3)" else [])]
    if n_cover:
        only.append("orientation_cover")
    report = run(subject, structures, profile=profile, seed=seed, library=False, only=only)
    if not report.ok:
        raise CheckFailure(_explain(report, group))


def _are_arguments(inputs: Any) -> bool:
    if isinstance(inputs, (list, tuple)) and inputs:
        return all(isinstance(one, Mapping) for one in inputs)
    return isinstance(inputs, Mapping)


def _returned(outputs: Any) -> Any:
    """Declarations of what a function of tensors returns: irreps as text where the number of rows shall decide."""
    if isinstance(outputs, OutputSpec):
        return outputs
    if isinstance(outputs, str):
        declaration = read_declaration(outputs)
        if declaration.rows_known:
            return declaration.spec
        if declaration.spec.rank > 1:
            raise DeclarationError(f"outputs: expected rows for a tensor, such as '{outputs}:atom', got {outputs!r}")
        return declaration.spec.irreps or "1o"
    if isinstance(outputs, Mapping):
        return {name: _returned(spec) for name, spec in outputs.items()}
    return [_returned(spec) for spec in outputs]


def _dtype(inputs: Any) -> torch.dtype | None:
    first = inputs[0] if isinstance(inputs, Sequence) and inputs else inputs
    pos = first.get("pos") if isinstance(first, Data) else None
    return pos.dtype if isinstance(pos, Tensor) else None


def _evaluate_once(subject: Subject, structures: Any) -> None:
    from symmetrize.testing.structures.sets import users_set

    batch = users_set(subject, structures, None).batch
    evaluate(subject.model, batch, subject.declared(batch))


def _explain(report: Report, group: str) -> str:
    name, seed = report.subject["name"], f"(seed={report.seed})"
    # Where an output is not finite or constant, nothing else is worth saying.
    unsound = [r for check in _SOUND for r in report.failures if r.check == check][:1]
    verdict = "proves nothing about equivariance" if unsound else "is not equivariant"
    lines = [f"{name} {verdict} under {group} {seed}"]
    for result in unsound or worst_first(report.failures):
        lines.append(f"{result.title}: {result.reason or 'failed'}")
        if result.outcome is not None:
            worst = sorted(result.outcome.findings, key=lambda f: (-f.excess, -f.number))
            lines += [f"  {_described(f, result.check)}" for f in worst[:4] if not f.ok]
            lines.append(f"  probably: {result.suspicion}")
    return "\n".join(lines)


def _described(finding: Finding, check: str) -> str:
    """The absolute error beside the relative one."""
    if check == "nontrivial_outputs":
        return f"{finding.quantity}: does not change beyond rounding when the input is deformed"
    if check == "finite_outputs":
        return f"{finding.quantity}: {finding.number:.0f} rows are NaN or infinite, in {finding.worst}"
    if finding.scale is None or not finding.scale > 0.0 or finding.unit:
        return str(finding)
    limit = "" if finding.limit is None else f"; limit {finding.limit:.2g}"
    return (
        f"{finding.quantity}: error {finding.number * finding.scale:.3g} = {finding.number:.3g} x error scale "
        f"{finding.scale:.3g}{limit}; worst at: {finding.worst}"
    )


def assert_smooth(
    f: Callable[..., Any],
    path: Path | Sequence[Atoms] | None = None,
    outputs: Outputs | None = None,
    *,
    order: int = 1,
    events: Sequence[float] | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    n_points: int = 101,
    n_candidates: int = 3,
    cutoff: float | None = None,
    **options: Any,
) -> None:
    """Fail if a function jumps along a path, or one of its derivatives up to ``order`` does.

    A float32 module is evaluated in float64: jumps are differences.

    Parameters
    ----------
    f : callable
        Without ``path``: a curve, Tensor of shape (n,), float64 -> Tensor of shape (n, ...). With one: batch -> Tensor
        or dict of Tensor, or anything that `check` takes.
    path : Path or sequence of ase.Atoms, optional
        See `paths`; frames of a trajectory are joined by a cubic spline.
    outputs : dict of str to OutputSpec or str, or one of them, optional
        Only what is named here is looked at; by default every output.
    order : {0, 1, 2}
        Highest derivative that has to be continuous.
    events : sequence of float, optional
        Values of t to look at whatever the scan shows there; by default those of the path.
    interval : tuple of float
        Range of t.
    n_points, n_candidates : int
        Points of the scan, and places on it that are refined per derivative.
    cutoff : float, optional
        Radius of the neighbor list that the batch shall bring along.
    **options
        Attributes of `Subject`, where ``f`` or ``outputs`` call for one.

    Raises
    ------
    CheckFailure
        An AssertionError that says which derivative jumps, by how much, and where.
    """
    __tracebackhide__ = True
    from symmetrize.testing.checks.smoothness import judge_smoothness, trajectory_path

    if order not in (0, 1, 2):
        raise InvalidInputError(f"order: expected 0, 1 or 2 continuous derivatives, got {order!r}")
    if path is None and not callable(f):
        raise InvalidTypeError(f"f: expected a function, got {type(f).__name__}")
    n_frames = 0
    if path is None:
        curve: Curve = f
    else:
        if not isinstance(path, Path):
            n_frames = len(path)
            path = trajectory_path(list(path))
            n_points = max(n_points, 20 * (n_frames - 1) + 1)
        if not callable(path):
            raise InvalidTypeError(f"path: expected a Path or frames, got {type(path).__name__}")
        events = path.events if events is None else events
        curve = _along(_evaluator(f, path, outputs, cutoff, options), path)
    found = measure_smoothness(
        _normalized(curve, interval),
        events=events or (),
        n_points=n_points,
        n_candidates=n_candidates,
        interval=interval,
    )
    findings = judge_smoothness(found, order)
    if all(finding.ok for finding in findings):
        return
    name = getattr(f, "__name__", type(f).__name__)
    lines = [f"{name} is not smooth" + (f" along {path.name!r}: {path.what}" if path is not None else "")]
    for finding, jump in zip(findings, found.jumps, strict=True):
        if not finding.ok:
            frame = f", between frames: {jump.location * (n_frames - 1):.4f}" if n_frames else ""
            what = "is not finite" if not finding.number < float("inf") else f"jumps: {finding.number:.3g} of its range"
            limit = f" (limit {finding.limit:.2g})" if finding.number < float("inf") else ""
            lines.append(f"  {finding.quantity} {what}{limit} at t = {jump.location:.9g}{frame}")
    lines.append(
        "  probably: something drops out at a cutoff with weight left, an argmax, a sort or a sign changes there, "
        "or an activation has a kink"
    )
    raise CheckFailure("\n".join(lines))


def _evaluator(
    f: Any, path: Path, outputs: Outputs | None, cutoff: float | None, options: Mapping[str, Any]
) -> Callable[[list[Atoms]], Mapping[str, Tensor]]:
    """Structures -> outputs, in float64."""
    if isinstance(f, torch.nn.Module):
        f = copy.deepcopy(f).double()
    if outputs is None and not isinstance(f, (Subject, Symmetrizer, Backbone)) and not is_calculator(f):

        def bare(structures: list[Atoms]) -> Mapping[str, Tensor]:
            value = f(from_ase(structures, cutoff=cutoff))
            return value if isinstance(value, Mapping) else {"output": value}

        return bare
    settings = {**options, **({} if cutoff is None else {"cutoff": cutoff})}
    subject = as_subject(f, [path(0.3), path(0.6)], outputs=outputs, **settings)
    subject = subject.convert(torch.float64) if subject.dtype != torch.float64 and subject.convert else subject

    def declared(structures: list[Atoms]) -> Mapping[str, Tensor]:
        batch = subject.prepare(from_ase(structures, dtype=subject.dtype))
        out = subject.model(batch)
        return {name: out[name] for name in subject.declared(batch)}

    return declared


def _along(f: Callable[[list[Atoms]], Mapping[str, Tensor]], path: Path, limit: int = 128) -> Curve:
    def curve(t: Tensor) -> Tensor:
        parts = []
        for some in t.split(limit):
            out = f([path(float(x)) for x in some])
            rows = [v.detach().to("cpu", torch.float64).reshape(len(some), -1) for v in out.values()]
            parts.append(torch.cat(rows, dim=1))
        return torch.cat(parts)

    return curve


def _normalized(curve: Curve, interval: tuple[float, float]) -> Curve:
    """Components in units of their range on a coarse scan: what the limits are for."""
    coarse = curve(torch.linspace(*interval, 12, dtype=torch.float64)[1:-1])
    if not isinstance(coarse, Tensor) or coarse.shape[:1] != (10,):
        got = tuple(coarse.shape) if isinstance(coarse, Tensor) else type(coarse).__name__
        raise InvalidInputError(f"curve: expected one row for each of 10 values of t, got {got}")
    values = coarse.detach().to("cpu", torch.float64).reshape(10, -1)
    spread = values.amax(dim=0) - values.amin(dim=0)
    # What varies by rounding only, or is zero by symmetry beside components that are not, is not blown up.
    largest = values.abs().nan_to_num(0.0, 0.0, 0.0).max()
    largest = torch.where(largest > 0.0, largest, torch.ones_like(largest))
    varies = torch.isfinite(spread) & (spread > 1e3 * torch.finfo(torch.float64).eps * largest)
    size = torch.where(varies, spread, largest)

    def scaled(t: Tensor) -> Tensor:
        return curve(t).detach().to("cpu", torch.float64).reshape(len(t), -1) / size

    return scaled
