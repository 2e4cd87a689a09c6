"""Figures of a study: error against cost, scans side by side, dynamics."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from symmetrize.report.study_tables import mean_value
from symmetrize.report.style import COLORS, GRID, MUTED, log_axis
from symmetrize.study.results import find_number

#: Nothing below this is told apart.
FLOOR = 1e-16
#: Nor above this.
CEILING = 3e3

#: Okabe and Ito's colors that read on light and on dark, times markers.
_PALETTE = ("#8a6fd1", "#4186d8", "#cc79a7", "#b58900", "#56b4e9", "#c44e52", "#7a7f87", "#5f7a1f")
_MARKERS = ("s", "^", "v", "P", "X", "<", ">", "p", "h", "*")
#: Of the lines of one color.
_LINES = ("-", "--", ":", "-.")

#: Values that differ by more than this factor are not told apart on a linear axis.
_FAR = 10.0
#: The least share of the values that an axis of accuracies covers.
_NEAR = 0.02

ERROR = "equivariance.rotations.*.max"
ACCURACY = "accuracy.symmetrized.forces.mae"
EVALUATIONS = "cost.evaluations_per_center"
TIME = "cost.time_ratio"

Plot = Callable[[Any], None]


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every figure."""

    color: str
    marker: str
    line: str = "-"


def looks(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Look]:
    """A look for every method: bare in orange, ECSE in green, those of one curve in one color."""
    found: dict[str, Look] = {}
    colors: dict[str, str] = {}
    n_greens = 0
    for label, entry in methods.items():
        name, curve = str(entry.get("name", "")), entry.get("curve")
        if name == "Identity":
            color, marker = COLORS["bare"], "o"
        elif name in ("ECSE", "ECSE.paper", "PaperECSE"):
            color, marker = COLORS["O(3)"] if name == "ECSE" else "#0c5c43", ("D", "d", "H")[n_greens % 3]
            n_greens += 1
        else:
            color = colors.setdefault(str(curve or label), _PALETTE[len(colors) % len(_PALETTE)])
            marker = _MARKERS[len(found) % len(_MARKERS)]
        n_before = sum(look.color == color for look in found.values())
        found[label] = Look(color, marker, _LINES[n_before % len(_LINES)])
    return found


def _shown(label: str) -> str:
    """A label that matplotlib puts into a legend: it leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def by_method(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """Records with results, in the order of the methods."""
    groups = {m: [r for r in records if r["cell"]["method"] == m and r["status"] == "ok"] for m in methods}
    return {label: found for label, found in groups.items() if found}


def against_cost(records: Sequence[Mapping[str, Any]], style: Mapping[str, Look]) -> Plot | None:
    """Rotation error against evaluations (methods of a curve joined), and accuracy against time with its front."""
    groups = by_method(records, list(style))
    panels = [
        panel
        for panel in (
            (EVALUATIONS, ERROR, "evaluations per atom", "largest rotation error"),
            (TIME, ACCURACY, "time over bare", "force MAE (meV/Å)"),
        )
        if any(_point(found, panel[0], panel[1]) for found in groups.values())
    ]
    if not panels:
        return None

    def plot(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (x, y, x_label, y_label) in zip(axes, panels, strict=True):
            _scatter(axis, groups, style, x, y)
            axis.set_xscale("log")
            _plain_decades(axis.xaxis)
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
            if y == ERROR:
                axis.set_yscale("log")
                log_axis(axis.yaxis, -17, 4)
                axis.axhspan(1e-17, 1.5 * FLOOR, color=GRID, alpha=0.5, linewidth=0)
                axis.axhline(1e-6, color=MUTED, linewidth=0.8, linestyle=":")
            else:
                points = [p for p in (_point(found, x, y) for found in groups.values()) if p is not None]
                _front(axis, points)
                _accuracy_axis(axis, [height for _, height in points])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8.5, handletextpad=0.4)

    return plot


def _point(found: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[float, float] | None:
    a, b = mean_value(found, x), mean_value(found, y)
    if a is None or b is None or not math.isfinite(a) or a <= 0.0 or math.isnan(b):
        return None
    return (a, b) if math.isfinite(b) or y == ERROR else None


def _scatter(
    axis: Any, groups: Mapping[str, Sequence[Mapping[str, Any]]], style: Mapping[str, Look], x: str, y: str
) -> None:
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for label, found in groups.items():
        point = _point(found, x, y)
        if point is None:
            # It keeps its place in the legend.
            axis.plot([], [], style[label].marker, color=style[label].color, markersize=7, label=_shown(label))
            continue
        # What is smaller or larger lies on the edge.
        height = min(max(point[1], FLOOR), CEILING) if y == ERROR else point[1]
        axis.plot(
            [point[0]], [height], style[label].marker, color=style[label].color, markersize=7, label=_shown(label)
        )
        curve = found[0]["cell"].get("curve")
        if curve:
            curves.setdefault(str(curve), []).append((point[0], height, style[label].color))
    for points in curves.values():
        points.sort()
        axis.plot([p[0] for p in points], [p[1] for p in points], color=points[0][2], linewidth=1.2, zorder=1)


def _accuracy_axis(axis: Any, heights: Sequence[float]) -> None:
    """Logarithmic where values are far apart; where they are close, a small difference looks small."""
    low, high = min(heights), max(heights)
    if low > 0.0 and high > _FAR * low:
        axis.set_yscale("log")
        _plain_decades(axis.yaxis)
        return
    axis.ticklabel_format(axis="y", useOffset=False, style="plain")
    if high - low < _NEAR * high:
        middle, half = 0.5 * (low + high), 0.6 * _NEAR * high
        axis.set_ylim(middle - half, middle + half)


def _front(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """Those that nothing is both faster and more accurate than."""
    front, lowest = [], math.inf
    for a, b in sorted(points):
        if b < lowest:
            front.append((a, b))
            lowest = b
    if len(front) > 1:
        axis.step([p[0] for p in front], [p[1] for p in front], where="post", color=GRID, linewidth=1.5, zorder=0)


def _plain_decades(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scan_paths(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths that any record has a scan of."""
    found: dict[str, None] = {}
    for record in records:
        found |= dict.fromkeys(record["measures"].get("smoothness", {}).get("scans", {}))
    return list(found)


def scans(records: Sequence[Mapping[str, Any]], style: Mapping[str, Look], path: str) -> tuple[Plot, int] | None:
    """What each method adds to the bare curve, in small panels with the same axes; and the number of their rows.

    A line for every seed.
    """
    groups = by_method(records, list(style))
    curves: dict[str, list[dict[str, list[float]]]] = {}
    unit = ""
    for label, found in groups.items():
        for measures in (record["measures"].get("smoothness", {}) for record in found):
            scan = measures.get("scans", {}).get(path)
            if scan is not None:
                one = {name: [_float(v) for v in values] for name, values in scan.items()}
                curves.setdefault(label, []).append(one)
                unit = str(measures.get("unit", ""))
    if not curves:
        return None
    n_columns = 4
    n_rows = -(-len(curves) // n_columns)
    # As a difference: a jump of a thousandth of the energy would not be seen. Electronvolts read better in thousandths.
    factor, unit = (1000.0, "meV") if unit == "eV" else (1.0, unit)
    change = {
        label: [[factor * (b - a) for a, b in zip(one["bare"], one["symmetrized"], strict=True)] for one in seeds]
        for label, seeds in curves.items()
    }
    every = [0.0, *(v for seeds in change.values() for values in seeds for v in values if math.isfinite(v))]
    low, high = min(every), max(every)
    margin = 0.06 * (high - low or 1.0)

    def plot(figure: Any) -> None:
        # By hand: finding a layout for so many panels takes seconds.
        figure.set_layout_engine(None)
        height = 1.0 + 1.55 * n_rows
        axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(0.075, 0.5 / height, 0.99, 1.0 - 0.4 / height, wspace=0.08, hspace=0.45)
        for n, axis in enumerate(axes.flat):
            if n >= len(curves):
                axis.set_visible(False)
                continue
            label = list(curves)[n]
            axis.axhline(0.0, color=COLORS["bare"], linewidth=0.9)
            for one, values in zip(curves[label], change[label], strict=True):
                axis.plot(one["t"], values, color=style[label].color, linewidth=1.5)
            axis.set_title(_wrapped(label), fontsize=8.5, fontweight="normal", pad=3)
            axis.tick_params(labelsize=8)
            if not any(math.isfinite(v) for values in change[label] for v in values):
                axis.text(0.5, 0.5, "refused", transform=axis.transAxes, ha="center", va="center", fontsize=9)
        axes[0, 0].set_xlim(0.0, 1.0)
        axes[0, 0].set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
        axes[0, 0].set_ylim(low - margin, high + margin)
        figure.supxlabel("along the path", fontsize=9.5)
        what = "change of the energy" if unit == "meV" else "change of the output"
        figure.supylabel(f"{what} ({unit})" if unit else what, fontsize=9.5)

    return plot, n_rows


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 30))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def dynamics(records: Sequence[Mapping[str, Any]], style: Mapping[str, Look]) -> Plot | None:
    """Change of the angular momentum and of the total energy in a run at constant energy, a line for every seed."""
    groups = by_method(records, list(style))
    series = [
        (label, record["measures"]["dynamics"]["series"])
        for label, found in groups.items()
        for record in found
        if find_number(record["measures"], "dynamics.energy_rms") is not None
        and record["measures"]["dynamics"].get("series")
    ]
    if not series:
        return None

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for label, one in series:
            pen = {"color": style[label].color, "linestyle": style[label].line, "linewidth": 1.3}
            time = [_float(t) for t in one["t"]]
            momentum = [max(abs(_float(v)), FLOOR) for v in one.get("angular_momentum") or []]
            if momentum and any(math.isfinite(v) for v in momentum):
                left.plot(time[1:], momentum[1:], **pen)
            right.plot(time, [_float(v) for v in one["energy"]], **pen)
        for label in dict.fromkeys(label for label, _ in series):
            left.plot([], [], color=style[label].color, linestyle=style[label].line, label=_shown(label))
        left.set_yscale("log")
        log_axis(left.yaxis, -17, 4)
        left.set_ylabel("change of the angular momentum (ħ)")
        right.set_ylabel("change of the energy (meV)")
        for axis in (left, right):
            axis.set_xlabel("time (fs)")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8.5)

    return plot
