"""How smooth the models of a cell are where geometries are degenerate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.errors import SymmetrizeError
from symmetrize.study.measures.common import are_crystals, generator_of, refusal, size_of, subject_of
from symmetrize.study.prepared import PreparedCell
from symmetrize.testing import Path, Subject, along, max_derivatives, measure_smoothness, paths
from symmetrize.testing.checks.smoothness import judge_smoothness
from symmetrize.testing.measuring.elements import random_elements, transform
from symmetrize.testing.measuring.scales import Model
from symmetrize.testing.measuring.smoothness import Curve
from symmetrize.testing.structures.sets import mapped

#: Paths of `symmetrize.testing.paths`, those first that the known weaknesses of methods lie on: equal eigenvalues,
#: lines, the cutoff, ties between neighbors.
PATHS = (
    *("through the tetrahedron", "bending CO2", "neighbor leaves, in company", "right angle"),
    *("atom leaves a cluster", "exchange of nearest neighbors", "umbrella inversion", "through the square"),
    *("three-fold exchange", "bending propyne", "methyl onto the axis", "through the centroid"),
    *("atom beside a dimer", "bending HCN", "bending C2H2, cis", "bending C2H2, trans", "pair crosses the cutoff"),
)

#: Points of a scan that are kept.
_KEPT = 200


def smoothness(cell: PreparedCell) -> dict[str, Any]:
    r"""Energies along paths through degenerate geometries: steepness, jumps, and the curves themselves.

    The energy without its composition baseline (for backbones without one, the output whose name comes first), bare
    and symmetrised, in float64, in one random orientation that is the same for all methods.

    Returns
    -------
    dict
        By path: ``"ratio"``, the largest :math:`|d^2E/dt^2|` over that of the bare model; ``"jump"``, the largest jump
        of the energy over the range of the bare energy, an upper bound found by halving the step, which a steep slope
        does not survive; ``"kink"``, that of the first derivative over the largest slope of the bare model (with size
        ``derivatives`` of 1 or more); ``"discontinuous"``: the lowest derivative that jumps (0: the energy itself), or
        None; ``"scans"``: ``{"t", "bare", "symmetrized"}`` relative to the start of the bare curve; ``"refused"``: what
        the method says where it refuses a structure on the path: NaN in the scan, and in the other numbers. Besides,
        ``"output"`` and its ``"unit"``.
    """
    model, bare = (subject_of(cell, one, torch.float64) for one in (cell.model, cell.bare))
    output = cell.energy or sorted(cell.outputs)[0]
    found: dict[str, Any] = {"output": output, "unit": cell.outputs[output].unit}
    found |= {name: {} for name in ("ratio", "jump", "kink", "discontinuous", "scans", "refused")}
    for path in _chosen(cell, bare):
        one = _along_path(cell, path, _values(bare, cell, output), _values(model, cell, output), output)
        for name, value in one.items():
            found[name][path.name] = value
    return found


def _chosen(cell: PreparedCell, subject: Subject) -> list[Path]:
    """Paths of the species that the backbone knows; crystals come first where the data are crystals."""
    reach = subject.reach if subject.reach is not None and subject.reach > 2.0 else None
    known = paths(reach)
    names = [*(["through bcc"] if are_crystals(cell) else []), *PATHS]
    chosen = [known[name] for name in names[: size_of(cell, "paths")]]
    return [Path(p.name, lambda t, p=p: mapped(p(t), subject), p.events, p.what) for p in chosen]  # type: ignore[misc]


def _values(subject: Subject, cell: PreparedCell, output: str) -> Model:
    """The output alone, without forces, of structures that are turned once and for all."""
    turn = random_elements(1, generator_of(cell), group="SO(3)")[0]
    model = subject.symmetrizer or subject.model

    def f(batch: Data) -> dict[str, Tensor]:
        with torch.no_grad():
            return {output: model(transform(subject.prepare(batch), turn, dict(subject.vectors)))[output]}

    return f


def _along_path(cell: PreparedCell, path: Path, bare: Model, model: Model, output: str) -> dict[str, Any]:
    n_points = max(16, size_of(cell, "points"))
    highest = min(2, size_of(cell, "derivatives"))
    t = torch.linspace(0.0, 1.0, n_points, dtype=torch.float64)
    before, refused = _scan(along(bare, path, output), t)
    start = before[0]
    ranges = (before - start).amax(dim=0) - (before - start).amin(dim=0)
    component, span = int(ranges.nan_to_num(-1.0).argmax()), float(ranges.max())
    rounding = 1e3 * torch.finfo(before.dtype).eps * max(1.0, float(before.abs().max()))
    # Jumps of an output that does not change along the path are given in its unit.
    size = span if rounding < span < math.inf else 1.0
    bare_curve, curve = (_normalized(along(f, path, output), start, size) for f in (bare, model))
    found: dict[str, Any] = {"ratio": math.nan, "jump": math.nan, "discontinuous": None}
    if highest:
        found["kink"] = math.nan
    try:
        measured = measure_smoothness(
            curve,
            events=path.events,
            n_points=n_points,
            n_candidates=max(1, size_of(cell, "candidates")),
            highest=highest,
        )
    except SymmetrizeError as error:
        after, reason = _scan(curve, t)
        found["refused"] = reason or refusal(error)
    else:
        after = measured.values[:n_points]
        found["jump"] = measured.jump(0)
        broken = [order for order, one in enumerate(judge_smoothness(measured, highest)) if not one.ok]
        found["discontinuous"] = broken[0] if broken else None
        if refused is None:
            slope, curvature = max_derivatives(bare_curve, n_points=n_points)
            found["ratio"] = _ratio(measured.max_second, curvature)
            if highest:
                found["kink"] = _ratio(measured.jump(1), slope)
        else:
            found["refused"] = f"the bare model: {refused}"
    kept = torch.linspace(0, n_points - 1, min(_KEPT, n_points)).round().long()
    found["scans"] = {
        "t": t[kept].tolist(),
        "bare": (before - start)[kept, component].tolist(),
        "symmetrized": (size * after)[kept, component].tolist(),
    }
    return found


def _ratio(x: float, scale: float) -> float:
    """x over a scale that is not negative, NaN where neither says anything."""
    if math.isinf(scale) or math.isnan(scale):
        return math.nan
    return x / scale if scale > 0.0 else math.inf


def _scan(curve: Curve, t: Tensor) -> tuple[Tensor, str | None]:
    """Values at all places, NaN where the model refuses the structure, and what it says there."""
    try:
        return curve(t), None
    except SymmetrizeError as error:
        reason = refusal(error)
    rows: list[Tensor | None] = []
    for place in t:
        try:
            rows.append(curve(place[None])[0])
        except SymmetrizeError:
            rows.append(None)
    width = next((len(row) for row in rows if row is not None), 1)
    nothing = torch.full((width,), math.nan, dtype=torch.float64)
    return torch.stack([nothing if row is None else row for row in rows]), reason


def _normalized(curve: Curve, start: Tensor, size: float) -> Curve:
    return lambda t: (curve(t) - start) / size
