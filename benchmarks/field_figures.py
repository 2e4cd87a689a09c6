"""Error against time of every tool of `benchmarks.field`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Family -> (color, marker, label).
STYLES = {
    "bare": ("#e07b24", "o", "bare"),
    "metatomic SymmetrizedModel": ("#4186d8", "s", "SymmetrizedModel"),
    "metatomic SymmetrizedCalculator": ("#9a6fd0", "^", "SymmetrizedCalculator"),
    "GroupAveraging": ("#8a96a3", "v", "GroupAveraging (ours)"),
    "frame-averaging-pytorch": ("#c2485a", "X", "FrameAverage (not smooth)"),
    "ECSE proof of concept": ("#a8842c", "P", "ECSE proof of concept, SO(3)"),
    "ECSE SO(3)": ("#179a6e", "d", "ECSE SO(3) (ours)"),
    "ECSE O(3)": ("#0b5c41", "D", "ECSE O(3) (ours)"),
}
#: Errors of exactly zero are drawn at rounding.
FLOOR = 2e-16


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each network and system: largest error under rotations over milliseconds, one structure a call."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["network"], r["structures"]) for r in records))
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.6 * n_columns, 3.1 * n_rows + 0.7), layout="constrained")
    every = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, panel in zip(every.flat, panels, strict=False):
        for family, (color, marker, label) in STYLES.items():
            rows = [r for r in records if (r["network"], r["structures"]) == panel and r["family"] == family]
            if not rows:
                continue
            x = [row["ms"] for row in rows]
            y = [max(row["rotation_energy"], row["rotation_forces"], FLOOR) for row in rows]
            curve = rows[0]["degree"] is not None
            (line,) = axes.loglog(
                x, y, marker=marker, linestyle="-" if curve else "", color=color, markersize=6, linewidth=1.4
            )
            handles.setdefault(label, line)
            if family == "metatomic SymmetrizedModel":
                for row, at_x, at_y in zip(rows, x, y, strict=True):
                    axes.annotate(
                        str(row["degree"]), (at_x, at_y), (4, 4), textcoords="offset points", fontsize=8, color=color
                    )
        axes.axhline(1e-6, color="#506070", linewidth=0.9, linestyle=":")
        network, system = panel
        axes.set_title(f"{system}\n{network}", loc="left", fontsize=10, fontweight="bold")
        axes.grid(True, which="major", color="#d0d8e0", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.set_xlabel("energy and forces (ms)")
        axes.set_ylim(1e-16, 30.0)
    for row in every:
        row[0].set_ylabel("largest rotation error\n(relative)")
    figure.legend(list(handles.values()), list(handles), frameon=False, loc="outside upper center", ncols=4, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
