"""Figures of the demo's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from symmetrize.report.style import COLORS, INK, MUTED, NAMES, draw, log_axis, power_of_ten
from symmetrize.report.tables import number

if TYPE_CHECKING:
    from symmetrize.demo.results import DemoResult, Dynamics, FrameCounts, Row, Scan

#: Errors below it, exact zeros included, are counted here.
FLOOR = -15

#: Size of figures that stand three in a row, inches.
NARROW = (4.2, 3.0)

_SPECIES = {"H": "#9fb4c8", "C": "#5b6b7b", "N": "#4d6fe0", "O": "#d9434e", "structure": "#8a63c9"}


def error_histogram(result: DemoResult, label: str, quantity: str) -> str:
    """Errors of all structures and orientations, before and after, on one axis.

    Parameters
    ----------
    quantity : {"energy", "force"}
    """
    rows = [row for row in result.rows if row.label == label]
    unit = "meV" if quantity == "energy" else "meV/Å"
    what = "error of the energy" if quantity == "energy" else "RMS force error of a structure"
    every = np.concatenate([getattr(getattr(r, k), quantity).ravel() for r in rows for k in ("rotation", "inversion")])
    high = max(2, math.ceil(math.log10(max(float(every.max()), 1.0)) + 0.3))
    low = max(FLOOR, math.floor(math.log10(max(float(every[every > 0].min(initial=1.0)), 10.0**FLOOR))) - 1)
    bins = np.logspace(low, high, 4 * (high - low) + 1)

    def plot(figure: Any) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, kind, title in zip(
            panels, ("rotation", "inversion"), ("rotations", "rotations × inversion"), strict=True
        ):
            for row in rows:
                values = np.clip(getattr(getattr(row, kind), quantity).ravel(), bins[0] * 1.01, bins[-1] * 0.99)
                share = np.full(values.shape, 100.0 / values.size)
                color = COLORS[row.treatment]
                axes.hist(
                    values,
                    bins,
                    weights=share,
                    histtype="stepfilled",
                    facecolor=(color, 0.4),
                    edgecolor=color,
                    linewidth=1.4,
                    label=NAMES[row.treatment],
                )
            axes.set_xscale("log")
            axes.set_title(title)
            axes.set_ylabel("share, %")
            _mark_gain(axes, rows, kind, quantity)
        log_axis(panels[1].xaxis, low, high)
        panels[1].set_xlabel(f"{what}, {unit}")
        panels[0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.02), ncols=1, handlelength=1.2)

    description = f"Histogram of the {what} under rotations and inversions, {label}"
    return draw(f"hist-{_slug(label)}-{quantity}", description, plot, (5.0, 4.4))


def _mark_gain(axes: Any, rows: Sequence[Row], kind: str, quantity: str) -> None:
    """An arrow from the median error of the bare model to that in O(3)."""
    medians = {row.treatment: float(np.median(getattr(getattr(row, kind), quantity))) for row in rows}
    before, after = medians.get("bare", 0.0), medians.get("O(3)", 0.0)
    if not (before > 0.0 and after > 0.0 and before / after > 100.0):
        return
    top = axes.get_ylim()[1]
    axes.set_ylim(0.0, 1.35 * top)
    axes.annotate(
        "", (after * 6.0, 0.3 * top), (before / 6.0, 0.3 * top), arrowprops={"arrowstyle": "->", "color": MUTED}
    )
    factor = power_of_ten(round(math.log10(before / after)))
    axes.text(math.sqrt(before * after), 0.36 * top, f"÷ {factor}", ha="center", va="bottom", color=INK)


def scan_energy(scan: Scan) -> str:
    """Energy along a full rotation, as given and mirrored."""

    def plot(figure: Any) -> None:
        panels = figure.subplots(2, 1, sharex=True, sharey=True)
        for axes, k, title in zip(panels, (0, 1), ("the molecule turned", "its inverted image turned"), strict=True):
            for curve in scan.curves:
                axes.plot(scan.angles, curve.energy[k], **_line(curve.treatment))
            axes.set_title(title)
            axes.set_ylabel("ΔE, meV")
        _angles(panels[1])
        panels[0].legend(loc="upper right", ncols=3, handlelength=1.4, columnspacing=1.0, borderaxespad=0.0)
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high + 0.35 * (high - low))

    return draw("scan-energy", f"Energy along a full rotation, {scan.label}", plot, (5.0, 4.4))


def scan_force(scan: Scan) -> str:
    """Force error along a full rotation, as given and mirrored."""
    values = np.concatenate([curve.force.ravel() for curve in scan.curves])
    low = max(FLOOR, math.floor(math.log10(max(float(values[values > 0].min(initial=1.0)), 10.0**FLOOR))))
    high = max(2, math.ceil(math.log10(max(float(values.max()), 1.0))) + 1)

    def plot(figure: Any) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, k, title in zip(panels, (0, 1), ("the molecule turned", "its inverted image turned"), strict=True):
            for curve in scan.curves:
                axes.plot(scan.angles, np.maximum(curve.force[k], 10.0**low), **_line(curve.treatment))
            axes.set_yscale("log")
            log_axis(axes.yaxis, low, high, 4)
            axes.set_title(title)
            axes.set_ylabel("force error, meV/Å")
        _angles(panels[1])

    return draw("scan-force", f"Force error along a full rotation, {scan.label}", plot, (5.0, 4.4))


def momentum_components(dynamics: Dynamics) -> str:
    """Change of the three components of the angular momentum in time."""
    shades = {"bare": ("#f3a45f", "#e07b24", "#a8530c"), "O(3)": ("#5cc9a2", "#179a6e", "#0b6347")}

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for trajectory in dynamics.trajectories:
            change = trajectory.angular_momentum - trajectory.angular_momentum[0]
            for k, style in enumerate(("-", "--", ":")):
                label = f"{NAMES[trajectory.treatment]}, {'xyz'[k]}"
                axes.plot(
                    trajectory.time / 1000.0, change[:, k], style, color=shades[trajectory.treatment][k], label=label
                )
        axes.set_xlabel("time, ps")
        axes.set_ylabel("L(t) − L(0), ħ")
        _room_above(axes, 0.4)
        axes.legend(loc="upper left", ncols=2, columnspacing=1.2, handlelength=1.8, borderaxespad=0.1)

    return draw("momentum", "Components of the angular momentum in time", plot, NARROW)


def momentum_direction(dynamics: Dynamics) -> str:
    """Angle by which the angular momentum has turned."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for t in dynamics.trajectories:
            line = _line(t.treatment)
            line["label"] += f", at most {number(t.turned, 2)}°"
            axes.plot(t.time / 1000.0, t.angle, **line)
        axes.set_xlabel("time, ps")
        axes.set_ylabel("L has turned by, degrees")
        _room_above(axes, 0.25)
        axes.legend(loc="upper left", borderaxespad=0.1)

    return draw("direction", "Direction of the angular momentum in time", plot, NARROW)


def total_energy(dynamics: Dynamics) -> str:
    """Total energy in time, and its running average."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for t in dynamics.trajectories:
            line = _line(t.treatment)
            line["label"] += f", slope {number(t.energy_drift, 2)} meV/ps"
            axes.plot(t.time / 1000.0, t.energy, color=line["color"], linewidth=0.6, alpha=0.4)
            n = _window(t.time)
            average = np.convolve(t.energy, np.full(n, 1.0 / n), mode="valid")
            axes.plot(np.convolve(t.time, np.full(n, 1.0 / n), mode="valid") / 1000.0, average, **line)
        axes.set_xlabel("time, ps")
        axes.set_ylabel("E(t) − E(0), meV")
        _room_above(axes, 0.3)
        axes.legend(loc="upper left", borderaxespad=0.1)

    return draw("energy", "Total energy in time", plot, NARROW)


def smoothing_time(dynamics: Dynamics) -> float:
    """Length of the running average of `total_energy`, fs."""
    time = dynamics.trajectories[0].time
    return float(time[_window(time) - 1] - time[0]) if len(time) > 1 else 0.0


def _window(time: np.ndarray) -> int:
    """Samples in about 40 fs, an odd number, and no more than a fifth of all."""
    step = float(time[1] - time[0]) if len(time) > 1 else 1.0
    return max(1, min(int(40.0 / step), len(time) // 5)) // 2 * 2 + 1


def frame_counts(counts: FrameCounts) -> str:
    """How many coordinate systems the owners have."""
    largest = max(max(numbers) for numbers in counts.evaluations.values())
    total = sum(len(numbers) for numbers in counts.evaluations.values())

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        bottom = np.zeros(largest + 1)
        for symbol, numbers in counts.evaluations.items():
            height = np.bincount(numbers, minlength=largest + 1) * (100.0 / total)
            label = symbol if counts.scope == "atom" else "molecules"
            color = _SPECIES.get(symbol, MUTED)
            axes.bar(np.arange(largest + 1), height, 0.7, bottom, color=color, label=label)
            bottom += height
        for k in range(1, largest + 1):
            if bottom[k] > 0:
                axes.text(
                    k, bottom[k] + 1.0, f"{bottom[k]:.0f}%" if bottom[k] >= 0.95 else "<1%", ha="center", color=INK
                )
        axes.set_xlim(0.4, largest + 0.6)
        axes.set_ylim(0.0, 1.15 * bottom.max())
        axes.set_xticks(range(1, largest + 1))
        axes.grid(axis="x", visible=False)
        owner = "atom" if counts.scope == "atom" else "molecule"
        axes.set_xlabel(f"coordinate systems of one {owner}, SO(3)")
        axes.set_ylabel(f"share of {total} {owner}s, %")
        axes.legend(loc="upper right", handlelength=1.0)

    return draw(f"frames-{_slug(counts.label)}", f"Number of coordinate systems, {counts.label}", plot)


def _line(treatment: str) -> dict[str, Any]:
    styles = {"bare": "-", "SO(3)": "-", "O(3)": (0, (3, 2))}
    return {"color": COLORS[treatment], "linestyle": styles[treatment], "label": NAMES[treatment]}


def _angles(axes: Any) -> None:
    axes.set_xlim(0, 360)
    axes.set_xticks(range(0, 361, 90))
    axes.set_xlabel("rotation angle, degrees")


def _room_above(axes: Any, share: float) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + share * (high - low))


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())
