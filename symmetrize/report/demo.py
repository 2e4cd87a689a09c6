"""The page that the demo ends with."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from symmetrize.report import figures
from symmetrize.report.tables import Table, number

if TYPE_CHECKING:
    from symmetrize.demo.results import DemoResult


def render_demo(result: DemoResult, tables: Sequence[Table]) -> str:
    """Self-contained HTML: figures, style and script inline, nothing loaded from anywhere.

    Parameters
    ----------
    result : DemoResult
    tables : sequence of Table
        To be shown; the first two openly, the others folded up.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("symmetrize.report") / "templates"
    environment.filters["number"] = number

    def partial(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    template = environment.from_string(partial("demo.html"))
    return template.render(
        r=result,
        p=result.provenance,
        style=partial("style.html"),
        viewer=partial("molecule.html"),
        molecule=_embedded(result),
        tiles=_tiles(result),
        tables=tables,
        histograms=[
            {
                "label": label,
                "scope": result.row(label, "bare").scope,
                "force": figures.error_histogram(result, label, "force"),
                "energy": figures.error_histogram(result, label, "energy"),
            }
            for label in result.labels
        ],
        scan_energy=figures.scan_energy(result.scan),
        scan_force=figures.scan_force(result.scan),
        momentum=figures.momentum_components(result.dynamics),
        direction=figures.momentum_direction(result.dynamics),
        energy=figures.total_energy(result.dynamics),
        smoothing=figures.smoothing_time(result.dynamics),
        counts=[{"of": c, "figure": figures.frame_counts(c), "strata": _strata(c.strata)} for c in result.counts],
        length=result.dynamics.trajectories[0].time[-1] / 1000.0,
        bare=result.dynamics["bare"],
        symmetrized=result.dynamics["O(3)"],
    )


def _embedded(result: DemoResult) -> str:
    """The molecule as JSON that may stand inside a script element."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return round(value, 5) if isinstance(value, float) else value

    return json.dumps(plain(dataclasses.asdict(result.drawing))).replace("<", "\\u003c")


def _tiles(result: DemoResult) -> list[dict[str, Any]]:
    """What to know first: a quantity before and after, and whether it is what was promised."""
    tiles = []
    for label in result.labels:
        bare, full = result.row(label, "bare"), result.row(label, "O(3)")
        for kind, name in (("rotation", "Rotation"), ("inversion", "Inversion")):
            before, after = getattr(bare, kind), getattr(full, kind)
            tiles.append(
                {
                    "title": f"{name} error of forces",
                    "model": f"{label}, {full.scope} scope",
                    "before": f"{number(before.force_max, 2)} meV/Å",
                    "after": number(after.force_max, 2),
                    "note": f"{_orders(before.force_max, after.force_max)}; largest of {before.force.size} evaluations",
                    "ok": after.relative <= result.tolerance,
                }
            )
    free, kept = result.dynamics["bare"], result.dynamics["O(3)"]
    tiles.append(
        {
            "title": "Angular momentum turned by",
            "model": f"{result.dynamics.label}, {number(float(free.time[-1] / 1000.0), 2)} ps of dynamics",
            "before": f"{number(free.turned, 2)}°",
            "after": f"{number(kept.turned, 2)}°",
            "note": "a molecule in empty space should not turn it at all",
            "ok": kept.turned <= 1e-3 * max(free.turned, 1e-6),
        }
    )
    first = result.labels[0]
    before_row, after_row = result.row(first, "bare"), result.row(first, "O(3)")
    tiles.append(
        {
            "title": "Force error against the reference",
            "model": f"{first}, {before_row.scope} scope",
            "before": number(before_row.force_mae),
            "after": f"{number(after_row.force_mae)} meV/Å",
            "note": f"the price: {after_row.evaluations:.1f} evaluations per {after_row.scope}, "
            f"{after_row.ratio:.1f} times the time",
            "ok": after_row.force_mae <= 1.1 * before_row.force_mae,
        }
    )
    return tiles


def _orders(before: float, after: float) -> str:
    if not (before > 0.0 and after > 0.0 and math.isfinite(before) and math.isfinite(after)):
        return "now zero" if after == 0.0 else "not comparable"
    return f"{math.log10(before / after):.0f} orders of magnitude less"


def _strata(strata: dict[str, int]) -> str:
    names = {"frame": "full coordinate systems", "axis": "members of averages about an axis", "point": "points"}
    return ", ".join(f"{count} {names.get(name, name)}" for name, count in strata.items())
