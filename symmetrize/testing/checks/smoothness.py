"""Do outputs jump, and where?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symmetrize import keys
from symmetrize.ops.rotations import about_axis, random_rotations
from symmetrize.testing.measuring.elements import batched, transform
from symmetrize.testing.measuring.scales import evaluate
from symmetrize.testing.measuring.smoothness import Curve, Smoothness, measure_smoothness
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome
from symmetrize.testing.structures.paths import WIDE, Path, paths
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms
    from torch_geometric.data import Batch

#: Largest jump of value, first and second derivative over the largest size of each on the scan. A method that drops
#: weights below 1e-10 stays below the first; the others are what step halving can tell from a steep slope.
LIMITS = (1e-8, 1e-5, 2e-2)

#: A jump that is no more than this many times the rounding noise of its difference is not told from it.
_NOISE = 30.0

#: Noise of the values, over their range, that still is rounding (in float32). Louder, it excuses nothing.
_LOUDEST = 1e-4

_ORDERS = ("value", "first derivative", "second derivative")


def judge_smoothness(found: Smoothness, smooth: int = 1) -> list[Finding]:
    """One finding per derivative: its largest jump, over the range of the curve or the largest size of that derivative.

    Parameters
    ----------
    found : Smoothness
        Of a curve of components of order one.
    smooth : int
        Highest derivative that has to be continuous; higher ones are recorded.
    """
    sizes = (max(found.span, 1e-2), max(found.max_first, 1e-1), max(found.max_second, 1.0))
    loud = not found.jumps[0].noise / sizes[0] <= _LOUDEST
    out = []
    for jump, size, limit, name in zip(found.jumps, sizes, LIMITS, _ORDERS, strict=False):
        number = jump.size / size if math.isfinite(size) else math.inf
        allowed = limit if loud else max(limit, min(_NOISE * jump.noise / size, 0.5))
        judged = allowed if jump.order <= smooth else None
        out.append(Finding(name, number, judged, unit="of its range", worst=f"t = {jump.location:.9g}"))
    return out


def scan(
    bench: Bench,
    at: Callable[[Sequence[float]], Batch],
    events: Sequence[float],
    title: str,
    *,
    n_points: int | None = None,
    n_candidates: int | None = None,
    frames: int | None = None,
) -> Outcome:
    """Scan all outputs along a path, judge them, and keep what a figure needs.

    Forces and stress are derivatives of the energy, and have one continuous derivative less to show.

    Parameters
    ----------
    at : callable
        Values of t -> a batch of the structures there.
    frames : int, optional
        Number of the last frame of a trajectory, which locations are then given in.
    """
    outputs, units = Outputs(bench, at), 1.0 if frames is None else float(frames)
    listed: list[Finding] = []
    jumps: list[dict[str, Any]] = []
    series: dict[str, list[float]] = {}
    t: list[float] = []
    for names, smooth in outputs.groups(bench.subject):
        found = measure_smoothness(
            outputs.curve(names),
            events=events,
            n_points=n_points or bench.profile.n_points,
            n_candidates=n_candidates or bench.profile.n_candidates,
            highest=smooth,
        )
        judged = judge_smoothness(found, smooth)
        for jump, finding in zip(found.jumps, judged, strict=True):
            place = jump.location * units
            where = f"t = {place:.9g}" if frames is None else f"at frame {place:.4f}"
            quantity = f"{', '.join(names)}: {finding.quantity}"
            listed.append(dataclasses.replace(finding, quantity=quantity, worst=where))
            jumps.append(
                {"order": jump.order, "t": place, "size": finding.number, "limit": finding.limit, "ok": finding.ok}
            )
        for order, largest in enumerate((found.max_first, found.max_second)):
            # How steep it is where it is smooth: for comparison, with no limit.
            quantity, unit = f"{', '.join(names)}: largest {_ORDERS[order + 1]}", "of its range per unit of t"
            listed.append(Finding(quantity, largest, unit=unit if order == 0 else f"{unit} squared"))
        values = found.values[: len(found.t)]
        t = (found.t[: len(values)] * units).tolist()
        series |= {f"{names[0]} {k}": values[:, k].tolist() for k in _shown(values)}
    label = "t" if frames is None else "frame"
    plot = {"kind": "scan", "title": title, "x_label": label, "t": t, "series": series, "jumps": jumps}
    return Outcome(tuple(listed), (plot,), note=title)


def _shown(values: Tensor, n: int = 4) -> list[int]:
    """The components that vary most."""
    spread = (values.amax(dim=0) - values.amin(dim=0)).nan_to_num(math.inf)
    return spread.topk(min(n, len(spread))).indices.tolist()


class Outputs:
    """Outputs along a path, each divided by its range on it (or a hundredth of its error scale, if larger)."""

    def __init__(self, bench: Bench, at: Callable[[Sequence[float]], Batch]) -> None:
        self.bench, self.at = bench, at
        self.known: dict[bytes, dict[str, Tensor]] = {}
        self.sizes: dict[str, float] = {}
        for name, values in self.rows(torch.linspace(0.0, 1.0, 12, dtype=torch.float64)[1:-1]).items():
            scale = bench.scales[name].value if name in bench.scales else 0.0
            spread = float((values.amax(dim=0) - values.amin(dim=0)).max())
            self.sizes[name] = max(spread if math.isfinite(spread) else 0.0, 1e-2 * scale) or 1.0

    def rows(self, t: Tensor) -> dict[str, Tensor]:
        """All outputs at some places; remembered, since both groups of outputs are asked for at many of them."""
        key = t.numpy().tobytes()
        if key not in self.known:
            batch = self.at([float(x) for x in t])
            found = evaluate(self.bench.model, batch, self.bench.subject.declared(batch))
            self.known[key] = {name: value.rows.reshape(len(t), -1) for name, value in found.items()}
        return self.known[key]

    def groups(self, subject: Subject) -> list[tuple[list[str], int]]:
        """Names of outputs, and how many continuous derivatives they have to have."""
        derived = [n for n in self.sizes if n in ("forces", "stress") and subject.energy is not None]
        others = [n for n in self.sizes if n not in derived]
        out = [(others, subject.smooth)] if others else []
        return [*out, (derived, subject.smooth - 1)] if derived and subject.smooth > 0 else out

    def curve(self, names: Sequence[str]) -> Curve:
        """Some of the outputs side by side."""

        def curve(t: Tensor) -> Tensor:
            rows = self.rows(t)
            return torch.cat([rows[name] / self.sizes[name] for name in names], dim=1)

        return curve


def usable_paths(bench: Bench) -> dict[str, Path]:
    """The paths of the profile that the subject can be evaluated on."""
    subject, wanted = bench.subject, bench.profile.paths
    if not bench.library:
        return {}
    out = {}
    for name, path in paths(subject.reach if subject.reach is not None and subject.reach > 2.0 else None).items():
        allowed = subject.periodic if bool(path(0.5).pbc.any()) else subject.finite
        if allowed and (wanted is None or name in wanted or name == WIDE):
            out[name] = path
    return out


@check(
    "Smooth through critical geometries",
    claim="smoothness",
    targets=lambda bench: list(usable_paths(bench)),
    cost=lambda bench, on: 12 * bench.profile.n_points + 2500 * bench.profile.n_candidates,
)
def check_smoothness(bench: Bench, on: str) -> Outcome:
    """Outputs and their derivatives are continuous where neighbors come and go, atoms fall in line, or distances tie.

    When it fails: a neighbor drops out at a cutoff with weight left; the nearest neighbor is chosen by argmax or by a
    sort; a frame flips where it is ill-defined; a polynomial switch is not smooth enough; a ReLU has its kink there.

    Number: one-sided polynomials are extrapolated to a place from either side and compared, the step is halved until
    rounding: the smallest jump seen (an upper bound), over the range of the value or the largest size of the
    derivative.
    """
    bench = bench.double()
    path = usable_paths(bench)[on]
    structure = bench.turned(path)
    # A path without a known event is long, and anything may be anywhere on it.
    n_points = None if path.events else max(201, bench.profile.n_points)
    n_candidates = None if path.events else max(4, bench.profile.n_candidates)
    at = lambda t: bench.batch_of([structure(x) for x in t])  # noqa: E731
    return scan(bench, at, path.events, path.what, n_points=n_points, n_candidates=n_candidates)


@check(
    "Smooth under rotation",
    claim="smoothness",
    cost=lambda bench, on: (2 if bench.profile.n_axes < 4 else 12) * (12 * bench.profile.n_points + 1500),
    needs=lambda bench: (
        "rotations are claimed: the error in all orientations says more"
        if "rotations" in bench.subject.claims
        else ("" if _finite(bench) else "all structures are periodic")
    ),
)
def check_rotation_smoothness(bench: Bench, on: str) -> Outcome:
    """Outputs do not jump while the structure turns all the way around an axis.

    When it fails: the model chooses by absolute direction (a sign, an argmax or a bin of a coordinate), or has a patch
    of orientations in which it is another model.

    Number: as for critical geometries, along full turns of the first structure about random axes.
    """
    bench = bench.double()
    axes = random_rotations(2 if bench.profile.n_axes < 4 else 12, bench.generator("axes"))
    first = _finite(bench)[0]
    name, single = bench.main.names[first], bench.part(bench.main, [first]).batch
    worst: Outcome | None = None
    for k, rotation in enumerate(axes):
        title = f"turn {k} of {name}"
        found = scan(bench, _turning(bench, single, rotation), (), title, n_points=max(101, bench.profile.n_points))
        if worst is None or _excess(found) > _excess(worst):
            worst = found
    return worst if worst is not None else Outcome(())


def _finite(bench: Bench) -> list[int]:
    """Structures of the main set without periodicity."""
    return [k for k, periodic in enumerate(bench.main.batch[keys.PBC].any(dim=1).tolist()) if not periodic]


def _excess(outcome: Outcome) -> float:
    return 0.0 if outcome.worst is None else outcome.worst.excess


def _turning(bench: Bench, single: Batch, rotation: Tensor) -> Callable[[Sequence[float]], Batch]:
    axis = rotation[:, 0]
    vectors = dict(bench.subject.vectors)

    def at(t: Sequence[float]) -> Batch:
        return batched([transform(single, about_axis(axis, 2 * math.pi * x) @ rotation, vectors) for x in t])

    return at


@check(
    "Smooth along the trajectory",
    claim="smoothness",
    targets=lambda bench: ["trajectory"] if bench.trajectory else [],
    cost=lambda bench, on: 40 * len(bench.trajectory) + 2500 * bench.profile.n_candidates,
)
def check_trajectory_smoothness(bench: Bench, on: str) -> Outcome:
    """Outputs and their derivatives are continuous along the given trajectory, joined by a cubic spline.

    When it fails: as for critical geometries; the location says between which frames.

    Number: as for critical geometries; t is the number of the frame over the number of the last.
    """
    bench = bench.double()
    path, last = trajectory_path(bench.trajectory), len(bench.trajectory) - 1
    return scan(
        bench,
        lambda t: bench.batch_of([path(x) for x in t]),
        (),
        "the given trajectory",
        n_points=max(bench.profile.n_points, 20 * last + 1),
        n_candidates=3 * bench.profile.n_candidates,
        frames=last,
    )


def trajectory_path(frames: Sequence[Atoms]) -> Path:
    """The frames of a trajectory joined by a cubic spline, t from 0 to 1 (not-a-knot: twice continuous).

    Positions have to be unwrapped: an atom that jumps across the cell between two frames is moved across all of it.

    Raises
    ------
    InvalidInputError
        Fewer than two frames, or frames of different atoms.
    """
    import numpy as np
    from scipy.interpolate import CubicSpline

    from symmetrize.errors import InvalidInputError

    if len(frames) < 2:
        raise InvalidInputError(f"trajectory: expected two or more frames, got {len(frames)}")
    first = frames[0]
    for k, atoms in enumerate(frames):
        if len(atoms) != len(first) or (atoms.numbers != first.numbers).any() or (atoms.pbc != first.pbc).any():
            raise InvalidInputError(f"trajectory: expected the same atoms in every frame, frame {k} differs")
    knots = np.linspace(0.0, 1.0, len(frames))
    if len(frames) == 2:
        ends = np.stack([frames[0].positions, frames[1].positions]), np.stack([f.cell.array for f in frames])
        positions, cells = (
            (lambda t: ends[0][0] + t * (ends[0][1] - ends[0][0])),
            (lambda t: ends[1][0] + t * (ends[1][1] - ends[1][0])),
        )
    else:
        positions = CubicSpline(knots, np.stack([f.positions for f in frames]))
        cells = CubicSpline(knots, np.stack([f.cell.array for f in frames]))

    def build(t: float) -> Atoms:
        atoms = first.copy()
        atoms.set_cell(cells(t))
        atoms.positions = positions(t)
        return atoms

    return Path("trajectory", build, (), "along the given frames")
