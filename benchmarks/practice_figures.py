"""Figures of `benchmarks.practice`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLORS = {"bare": "#e07b24", "GroupAveraging(3)": "#8a63c9", "ECSE": "#179a6e", "EMT": "#7a8794"}
NAMES = {"GroupAveraging(3)": "averaged, degree 3"}
_RC: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "symmetrize",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dde4ea",
    "legend.frameon": False,
}
#: What is zero to the last digit is shown here.
FLOOR = 1e-17
LOWEST = 1e-13
ROUNDING = 1e-9  # of total energies, meV


def draw_all(phonons: list[dict[str, Any]], curves: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``practice-phonons``, ``practice-momentum`` and ``practice-bend`` as SVG; returns their paths."""
    return [
        _draw(folder / "practice-phonons.svg", (7.6, 3.2), lambda figure: _phonons(figure, phonons)),
        _draw(folder / "practice-momentum.svg", (5.6, 3.2), lambda figure: _momentum(figure, curves["dynamics"])),
        _draw(folder / "practice-bend.svg", (7.6, 4.6), lambda figure: _bend(figure, curves)),
    ]


def _draw(path: Path, size: tuple[float, float], plot: Callable[[Any], None]) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        plot(figure)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    return path


def _label(method: str) -> str:
    return NAMES.get(method, method)


def _phonons(figure: Any, records: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    places = list(dict.fromkeys((r["crystal"], r["point"]) for r in records))
    methods = list(dict.fromkeys(r["method"] for r in records))
    for k, method in enumerate(methods):
        values = {(r["crystal"], r["point"]): r["splitting"] for r in records if r["method"] == method}
        x = [n + 0.2 * (k - (len(methods) - 1) / 2) for n, place in enumerate(places) if place in values]
        y = np.array([max(values[place], 2 * LOWEST) for place in places if place in values])
        axes.bar(x, y - LOWEST, width=0.18, bottom=LOWEST, color=COLORS[method], label=_label(method))
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 10.0)
    axes.set_xticks(range(len(places)), [f"{crystal}\n{point}" for crystal, point in places])
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("splitting (THz)")
    axes.set_title("Phonons that symmetry makes degenerate (displacements of 0.0001 Å)")
    axes.legend(ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _momentum(figure: Any, curves: dict[str, Any]) -> None:
    axes = figure.subplots()
    for method, curve in curves.items():
        time, change = np.array(curve["time"])[1:] / 1000.0, np.array(curve["change"])[1:]
        axes.plot(time, np.maximum(change, FLOOR), color=COLORS[method], lw=1.4, label=_label(method))
    axes.set_yscale("log")
    axes.set_xlabel("time (ps)")
    axes.set_ylabel("|L(t) − L(0)| / |L(0)|")
    axes.set_title("Angular momentum of CH₄ in free space")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _bend(figure: Any, curves: dict[str, Any]) -> None:
    panels = figure.subplots(2, len(curves["bends"]), sharex="col", squeeze=False)
    angles = np.array(curves["angles"])
    half = angles > 0.0
    for (upper, lower), (name, found) in zip(panels.T, curves["bends"].items(), strict=True):
        for method, values in found.items():
            energies = 1e3 * np.array(values)
            style = {"color": COLORS[method], "lw": 1.6, "label": _label(method)}
            upper.plot(angles, energies, **style)
            # The path is symmetric: the two directions are images of each other.
            difference = np.abs(energies - energies[::-1])[half]
            lower.plot(angles[half], np.maximum(difference, ROUNDING), **style)
            lower.plot(-angles[half], np.maximum(difference, ROUNDING), **{**style, "label": None})
        lower.set_yscale("log")
        lower.set_xlabel("bend (°)")
        upper.set_title({"CO2": "CO₂", "C2H2": "C₂H₂, trans"}.get(name, name))
    panels[0, 0].set_ylabel("energy (meV)")
    panels[1, 0].set_ylabel("|E(bend) − E(−bend)| (meV)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside lower center")
