"""Is it exact, or only small?"""

from __future__ import annotations

import math

import torch

from symmetrize import keys
from symmetrize.testing.checks.common import findings
from symmetrize.testing.measuring.elements import moved_to, random_elements, shortest_distances
from symmetrize.testing.measuring.measures import Measurement, measure_equivariance
from symmetrize.testing.measuring.scales import evaluate
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome

_BOTH = (torch.float32, torch.float64)


def _convertible(bench: Bench) -> str:
    return "" if bench.subject.convert is not None else "the model cannot be converted to another precision"


@check(
    "Exact, not just small",
    claim="rotations",
    cost=lambda bench, on: 2 * (bench.profile.n_elements + 1) * bench.main.n_structures,
    needs=_convertible,
    unclaimed="record",
)
def check_exactness(bench: Bench, on: str) -> Outcome:
    """The error of an exact method falls with the machine precision; that of an approximate one does not.

    When it fails: the average over orientations is a quadrature of too low a degree; equivariance was learned from
    augmented data; something inside runs in lower precision.

    Number: equivariance error over random elements in float32 and in float64, each in units of eps of its dtype: both
    have to stay below one bound.
    """
    measured: dict[torch.dtype, Measurement] = {}
    limits: dict[torch.dtype, float] = {}
    for dtype in _BOTH:
        other = bench if dtype == bench.subject.dtype else bench.converted(dtype)
        found = other.main
        measured[dtype] = measure_equivariance(
            other.model,
            found.batch,
            other.subject.declared(found.batch),
            random_elements(bench.profile.n_elements, bench.generator("exactness"), group="SO(3)"),
            vectors=dict(bench.subject.vectors),
            scale=other.scale(found),
        )
        if other is not bench:
            bench.count(other.evaluations)
        limits[dtype] = other.limit(found)
    out = []
    for dtype, one in measured.items():
        eps = torch.finfo(dtype).eps
        name = str(dtype).removeprefix("torch.")
        limit = limits[dtype] / eps if bench.subject.tolerance is None else None
        out += [
            Finding(f"{f.quantity}, {name}", f.number / eps, limit, unit="eps", worst=f.worst)
            for f in findings(one, bench.main, None)
        ]
    errors = [measured[dtype].relative for dtype in _BOTH]
    return Outcome(tuple(out), note=_kind(errors[0], errors[1], limits[torch.float64]))


def _kind(single: float, double: float, limit: float) -> str:
    if not (math.isfinite(single) and math.isfinite(double)):
        return "the error is not finite"
    both = f"{single:.2g} in float32, {double:.2g} in float64"
    if double <= limit:
        return f"exact: {both}"
    if double > 0.01 * single:
        return f"approximate: {both}; the error does not fall with the precision"
    return f"between exact and approximate: {both}; part of the model may run in lower precision"


@check(
    "Arithmetic in the precision of the input",
    claim="precision",
    cost=lambda bench, on: 25 * min(3, bench.main.n_structures),
)
def check_arithmetic(bench: Bench, on: str) -> Outcome:
    """The rounding noise of the outputs is that of the dtype of the positions.

    When it fails: positions, distances or weights are cast to float32 (or lower) on the way; a large constant, such
    as a total energy, is added before a difference is taken.

    Number: size of the sixth differences of an output over small displacements of all atoms (from the lower quartile,
    which kinks nearby do not touch), divided by sqrt(924), over the error scale and over eps: the noise of one
    evaluation. The displacements, 1e-5 of the shortest distance (float32: 2e-3), are too small for a smooth function to
    have sixth differences, and large enough to change numbers of lower precision.
    """
    found = bench.part(bench.main, range(min(3, bench.main.n_structures)))
    batch = found.batch
    eps = torch.finfo(bench.subject.dtype).eps
    generator = bench.generator("arithmetic")
    rows: dict[str, list[torch.Tensor]] = {}
    pos = batch[keys.POS]
    lengths = shortest_distances(batch)[batch[keys.BATCH]][:, None]
    direction = torch.randn(pos.shape, dtype=torch.float64, generator=generator).to(pos.device)
    step = 1e-5 if bench.subject.dtype == torch.float64 else 2e-3
    for k in range(25):
        moved = pos.to(torch.float64) + step * k * lengths * direction
        values = evaluate(bench.model, moved_to(batch, moved), bench.subject.declared(batch))
        for name, value in values.items():
            rows.setdefault(name, []).append(value.rows.reshape(len(value.rows), -1))
    out = []
    scales = bench.scale(bench.main)
    for name, listed in rows.items():
        differences = torch.diff(torch.stack(listed), n=6, dim=0)
        # The lower quartile of a normal distribution's absolute values is 0.32 standard deviations.
        noise = float(differences.abs().quantile(0.25, dim=0).max()) / 0.32 / math.sqrt(924.0)
        size = max(scales.get(name, 0.0), 1e-300)
        magnitude = bench.scales[name].magnitude if name in bench.scales else 0.0
        # One rounding of a number as large as the output is no fault of the arithmetic.
        allowed = bench.main.factor + 10.0 * magnitude / size
        number = noise / size / eps if math.isfinite(noise) else math.inf
        out.append(Finding(name, number, allowed, unit="eps"))
    double = bench.subject.dtype == torch.float64
    hint = double and any(not f.ok and 1e-9 < f.number * eps < 1e-4 for f in out)
    note = "the noise is that of float32: if the model is meant to be, say so (dtype=torch.float32)" if hint else ""
    return Outcome(tuple(out), note=note, seed=generator.initial_seed())
