"""The checks on one tool, and its row of the table."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from benchmarks.peers.network import Network
from benchmarks.peers.registry import Peer, Subjects
from symmetrize import keys
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing.measuring.elements import split, transform
from symmetrize.testing.running.outcome import Report, Result, Verdict
from symmetrize.testing.running.profile import PROFILES
from symmetrize.testing.running.runner import make_bench, run
from symmetrize.testing.subjects.subject import Subject

SETS = ("generic", "symmetric", "planar", "collinear")
PATHS = ("through the tetrahedron", "through the square", "bending CO2")
PROFILE = dataclasses.replace(PROFILES["quick"], name="peers", paths=PATHS)

#: Columns of the table: key -> title.
COLUMNS: dict[str, str] = {
    "generic": "rotations, generic",
    "inversion": "inversion, generic",
    "symmetric": "rotations, symmetric",
    "planar": "rotations, planar",
    "collinear": "rotations, collinear",
    "smooth": "smooth",
    "gradients": "gradients finite",
    "conservative": "forces are the gradient",
    "kind": "exact or approximate",
    "evaluations": "evaluations",
    "permutation": "permutation",
}

#: Forces may be this many times the RMS force on generic structures before they count as unbounded.
BOUNDED = 1e3

#: A tool with a degree is approximate where its error on generic structures falls by this factor from one to the next.
FALLS = 10.0

#: Where noise raises the limit of the smoothness check above this share of the range, a pass proves nothing.
RESOLVED = 1e-2


def measure(peer: Peer) -> dict[str, Any]:
    """All checks on a tool: JSON-ready."""
    random.seed(0)
    torch.manual_seed(0)
    start = time.perf_counter()
    subjects = peer.build()
    found = run(
        subjects.values,
        subjects.batch,
        profile=PROFILE,
        library=subjects.batch is None,
        only=_checks(peer, subjects),
    )
    results = {result.id: _number(result) for result in found.results}
    cells = _cells(found, subjects)
    if subjects.gradients is not None and peer.thorough:
        only = [*(f"finite_outputs[{on}]" for on in SETS), "forces_are_gradient"]
        of_forces = run(subjects.gradients, profile=PROFILE, library=True, only=only)
        results |= {f"forces: {result.id}": _number(result) for result in of_forces.results}
        cells["gradients"] = _gradients(subjects.gradients, of_forces)
        cells["conservative"] = _cell(of_forces["forces_are_gradient"])
    counted = None if subjects.module is None else _evaluations(subjects)
    if counted is not None:
        low, high = counted
        cells["evaluations"] = {
            "verdict": "recorded",
            "number": high,
            "note": f"{low}" if low == high else f"{low}-{high}",
        }
    for key in COLUMNS:
        cells.setdefault(key, {"verdict": "not run"})
    return {
        "title": peer.title,
        "package": peer.package,
        "options": peer.options,
        "group": subjects.values.group,
        "seconds": round(time.perf_counter() - start, 1),
        "columns": cells,
        "results": results,
    }


def _checks(peer: Peer, subjects: Subjects) -> list[str]:
    if subjects.batch is not None:
        every = ("rotation_equivariance", "inversion_equivariance", "permutation_equivariance", "finite_outputs")
        return [*every, "exactness", "determinism", "nontrivial_outputs"]
    if not peer.thorough:
        return ["rotation_equivariance[generic]", "inversion_equivariance[generic]", "exactness"]
    grouped = ("rotation_equivariance", "inversion_equivariance", "permutation_equivariance", "finite_outputs")
    once = ["translation_invariance[generic]", "exactness", "determinism", "batch_independence", "nontrivial_outputs"]
    return [f"{name}[{on}]" for name in grouped for on in SETS] + once + (["smoothness"] if peer.smooth else [])


def _number(result: Result) -> dict[str, Any]:
    """Verdict, and the finding that exceeds its limit most."""
    worst = None if result.outcome is None else result.outcome.worst
    out: dict[str, Any] = {"verdict": result.verdict.value}
    if worst is not None:
        out |= {
            "number": _plain(worst.number),
            "limit": _plain(worst.limit),
            "worst": f"{worst.quantity}; {worst.worst}",
        }
        out["unit"] = worst.unit or "error scale"
    if result.reason:
        out["reason"] = result.reason
    return out


def _plain(value: float | None) -> float | str | None:
    """Three digits; JSON has no infinity."""
    if value is None:
        return None
    return float(f"{value:.3g}") if math.isfinite(value) else "inf"


def _cell(result: Result) -> dict[str, Any]:
    """One result as a cell: pass, fail, error, or not claimed."""
    words = {
        Verdict.PASSED: "pass",
        Verdict.FAILED: "fail",
        Verdict.ERROR: "error",
        Verdict.RECORDED: "not claimed",
        Verdict.SKIPPED: "not run",
    }
    worst = None if result.outcome is None else result.outcome.worst
    cell: dict[str, Any] = {"verdict": words[result.verdict]}
    if worst is not None:
        cell |= {"number": _plain(worst.number), "where": f"{worst.quantity}; {worst.worst}"}
    elif result.reason:
        cell["note"] = result.reason
    return cell


def _cells(found: Report, subjects: Subjects) -> dict[str, dict[str, Any]]:
    by_id = {result.id: result for result in found.results}
    generic = "yours" if subjects.batch is not None else "generic"
    cells: dict[str, dict[str, Any]] = {}
    for on in SETS:
        name = generic if on == "generic" else on
        if (result := by_id.get(f"rotation_equivariance[{name}]")) is not None:
            cells[on] = _cell(result)
    if (result := by_id.get(f"inversion_equivariance[{generic}]")) is not None:
        cells["inversion"] = _cell(result)
    smooth = [_smooth_cell(r) for r in found.results if r.check == "smoothness"]
    if smooth:
        cells["smooth"] = max(smooth, key=lambda cell: (cell["verdict"] != "pass", float(cell.get("number", "inf"))))
    permuted = {r.on: _cell(r) for r in found.results if r.check == "permutation_equivariance"}
    if permuted:
        worst = max(permuted.values(), key=lambda cell: (cell["verdict"] != "pass", float(cell.get("number", "inf"))))
        note = "generic passes" if worst["verdict"] != "pass" and permuted[generic]["verdict"] == "pass" else ""
        cells["permutation"] = {**worst, "note": note}
    exact, turned = by_id["exactness"], by_id[f"rotation_equivariance[{generic}]"]
    cells["kind"] = _kind(exact, turned)
    return cells


def _smooth_cell(result: Result) -> dict[str, Any]:
    """A pass within a limit that noise has raised to the size of the function itself is none."""
    cell = _cell(result)
    cell["where"] = f"{result.on}: {cell.get('where', '')}"
    findings = () if result.outcome is None else result.outcome.findings
    # Of the value and the first derivative.
    noisy = [f for f in findings[:2] if f.limit is not None and f.limit > RESOLVED]
    if cell["verdict"] == "pass" and noisy:
        cell |= {"verdict": "fail", "note": "noise as large as the function", "number": _plain(noisy[0].number)}
    return cell


def _kind(exact: Result, turned: Result) -> dict[str, Any]:
    if exact.outcome is None or turned.outcome is None or turned.outcome.worst is None:
        return {"verdict": "error", "note": exact.reason}
    number = turned.outcome.worst.number
    word = "exact" if exact.verdict is Verdict.PASSED else "neither"
    return {"verdict": word, "number": _plain(number), "note": exact.outcome.note}


def judge_degrees(rows: Mapping[str, dict[str, Any]]) -> None:
    """Call those approximate whose error falls with the degree; rows are those of one tool, in ascending degree."""
    errors = [float(row["columns"]["generic"]["number"]) for row in rows.values()]
    falls = len(errors) > 1 and all(a >= FALLS * b for a, b in pairwise(errors))
    for row in rows.values():
        if falls and row["columns"]["kind"]["verdict"] == "neither":
            row["columns"]["kind"]["verdict"] = "approximate"


def _gradients(subject: Subject, found: Report) -> dict[str, Any]:
    """Finite, and no more than `BOUNDED` times as large on degenerate structures as on generic ones."""
    results = [r for r in found.results if r.check == "finite_outputs"]
    errors = [r for r in results if r.verdict is Verdict.ERROR]
    if errors:
        return {"verdict": "error", "note": errors[0].reason}
    bench = make_bench(subject, profile=PROFILE, library=True)
    generic = subject.model(bench["generic"].batch)["forces"]
    typical = float(generic.square().mean().sqrt())
    turn = random_rotations(1, torch.Generator().manual_seed(4))[0]
    largest: dict[str, float] = {}
    n_bad = 0
    for on in SETS:
        for batch in (bench[on].batch, transform(bench[on].batch, turn)):
            forces = subject.model(batch)["forces"]
            finite = torch.isfinite(forces)
            n_bad += int((~finite).any(dim=1).sum())
            size = float(forces[finite].abs().max()) / typical if bool(finite.any()) else 0.0
            largest[on] = max(largest.get(on, 0.0), size)
    on = max(largest, key=lambda name: largest[name])
    cell: dict[str, Any] = {
        "verdict": "pass",
        "number": _plain(largest[on]),
        "where": f"{on}, times the generic RMS force",
    }
    if n_bad or any(r.verdict is Verdict.FAILED for r in results):
        cell |= {"verdict": "fail", "note": f"NaN for {n_bad} atoms"}
    elif not largest[on] <= BOUNDED:
        cell |= {"verdict": "fail", "note": "unbounded"}
    return cell


def _evaluations(subjects: Subjects) -> tuple[int, int] | None:
    """Fewest and most evaluations of the network for one structure, over all sets."""
    network = next((m for m in subjects.module.modules() if isinstance(m, Network)), None)  # type: ignore[union-attr]
    if network is None:
        return None
    bench = make_bench(subjects.values, profile=PROFILE, library=True)
    counts = []
    for on in SETS:
        for single in split(bench[on].batch):
            network.n_evaluations = 0
            subjects.values.model(single)
            counts.append(network.n_evaluations // subjects.passes)
            if int(single[keys.PTR].shape[0]) != 2:
                raise RuntimeError("expected one structure")
    return min(counts), max(counts)
