"""Figures of a check report, from the JSON-ready data that checks leave behind."""

from __future__ import annotations

import html
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symmetrize.report.style import GRID, INK, MUTED, draw, log_axis
from symmetrize.report.tables import number

#: Within the limit, beyond it, not judged; legible on light and on dark.
GOOD, BAD, NEUTRAL = "#179a6e", "#d9434e", "#4186d8"

#: Curves in the order in which they are named.
SERIES = ("#4186d8", "#e07b24", "#179a6e", "#8a63c9", "#c2477f", "#6d8a1e", "#2f9aa8", "#8d7455")

#: Errors below it, exact zeros included, are drawn here.
FLOOR = -17

#: Outputs that one figure has room for.
ROWS = 12

_ORDERS = ("value", "first derivative", "second derivative", "third derivative")


@dataclass(frozen=True)
class Drawing:
    """A figure with the words below it.

    Attributes
    ----------
    body : str
        HTML: an inline SVG or a table.
    title, caption : str
    wide : bool
        Whether it wants the width of the page.
    """

    body: str
    title: str
    caption: str
    wide: bool = False


def drawing(plot: Mapping[str, Any], name: str) -> Drawing | None:
    """The figure of a plot; None for a kind that is not known, or without data.

    Parameters
    ----------
    plot : dict
        As in `symmetrize.testing.running.outcome.Outcome.plots`; numbers may be ``"inf"``, ``"-inf"`` or ``"nan"``.
    name : str
        Prefix of identifiers, unique on the page.
    """
    painter = _PAINTERS.get(str(plot.get("kind")))
    return None if painter is None else painter(plot, name)


def merged(plots: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same plots with all histograms of one title in one.

    Errors beyond the limit of their own histogram are counted in ``"beyond"``, since limits may differ.
    """
    out: list[dict[str, Any]] = []
    of_title: dict[str, dict[str, Any]] = {}
    for plot in plots:
        if plot.get("kind") != "histogram":
            out.append(dict(plot))
            continue
        title = str(plot.get("title", ""))
        if title not in of_title:
            of_title[title] = {"kind": "histogram", "title": title, "outputs": {}, "limits": set(), "beyond": {}}
            out.append(of_title[title])
        total, limit = of_title[title], plot.get("limit")
        if limit is not None:
            total["limits"].add(float(limit))
        for output, errors in plot.get("outputs", {}).items():
            values = numbers(errors)
            total["outputs"].setdefault(output, []).extend(values.tolist())
            beyond = 0 if limit is None else int((~(values <= float(limit))).sum())
            total["beyond"][output] = total["beyond"].get(output, 0) + beyond
    return out


def numbers(values: Sequence[Any]) -> np.ndarray:
    """Floats, also from the words that JSON has for those that are not finite."""
    return np.array([math.nan if v is None else float(v) for v in values], dtype=np.float64)


def plain(text: Any, width: int = 40, lines: int = 1) -> str:
    """A label without matplotlib's mathematical markup that fits into a figure."""
    words = textwrap.wrap(str(text).lstrip("_"), width, max_lines=lines, placeholder=" …")
    return "\n".join(words).replace("$", r"\$") or " "


def _draw(name: str, description: str, plot: Callable[[Any], None], size: tuple[float, float]) -> str:
    """`symmetrize.report.style.draw` for words that a user chose."""
    with warnings.catch_warnings():
        # Letters that matplotlib's font lacks: the page sets them in its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        return draw(name, html.escape(description).replace("\\", "/"), plot, size)


def _histogram(plot: Mapping[str, Any], name: str) -> Drawing | None:
    found = {output: numbers(errors) for output, errors in plot.get("outputs", {}).items() if len(errors)}
    if not found:
        return None
    limits = sorted(plot.get("limits") or ([] if plot.get("limit") is None else [float(plot["limit"])]))
    limits = sorted({*limits[:1], *limits[-1:]})
    beyond = plot.get("beyond") or {o: int((~(v <= limits[0])).sum()) if limits else 0 for o, v in found.items()}
    shown = sorted(found, key=lambda o: (-beyond[o], list(found).index(o)))[:ROWS]
    shown = [o for o in found if o in shown]
    every = np.concatenate([*found.values(), np.array(limits)])
    low, high = _decades(every)
    high += 0 if np.isfinite(every).all() else 4
    bins = np.linspace(low, high, 3 * (high - low) + 1)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for row, output in enumerate(reversed(shown)):
            values = found[output]
            finite = values[np.isfinite(values)]
            places = np.clip(_log(finite), low + 1e-6, high - 1e-6)
            height = np.histogram(places, bins)[0].astype(float)
            height *= 0.82 / max(height.max(initial=0.0), 1.0)
            color = BAD if beyond[output] else GOOD if limits else NEUTRAL
            axes.stairs(row + height, 10.0**bins, baseline=row, fill=True, facecolor=color, alpha=0.45)
            axes.stairs(row + height, 10.0**bins, baseline=row, color=color, linewidth=1.1)
            axes.axhline(row, color=GRID, linewidth=0.8)
            if len(finite) < len(values):
                axes.plot([10.0 ** (high - 0.25)], [row + 0.3], ">", color=BAD, markersize=8)
                text = f"{len(values) - len(finite)} not finite"
                axes.text(10.0 ** (high - 0.6), row + 0.3, text, ha="right", va="center", color=BAD)
        for limit in limits:
            axes.axvline(limit, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        log_axis(axes.xaxis, low, high)
        axes.set_yticks(np.arange(len(shown)) + 0.3, [plain(o, 20, 2) for o in reversed(shown)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.08, len(shown))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("error, multiples of the error scale")

    title = str(plot.get("title", "")).replace("_", " ")
    count = sum(map(len, found.values()))
    caption = f"{count} errors, one row per output. " + _limit_words(limits) + " Zeros are counted at the left end."
    if len(found) > len(shown):
        caption += f" Not shown: {len(found) - len(shown)} more."
    figure = _draw(name, f"Histogram of errors, {title}", paint, (5.0, 1.1 + 0.42 * max(len(shown), 2)))
    return Drawing(figure, f"Errors: {title}", caption)


def _limit_words(limits: Sequence[float]) -> str:
    if not limits:
        return "Not judged."
    values = " to ".join(dict.fromkeys(map(number, limits))).replace("e-", "e\u2011")
    return f"Dashed: the limit{'s of the sets' if len(limits) > 1 else ''}, {values}."


def _curve(plot: Mapping[str, Any], name: str) -> Drawing | None:
    x = numbers(plot.get("x", []))
    series = {label: numbers(y)[: len(x)] for label, y in plot.get("series", {}).items()}
    if not len(x) or not series:
        return None
    log = bool(plot.get("log"))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        every = np.concatenate(list(series.values()))
        low, high = _decades(every) if log else (0, 0)
        for k, (label, y) in enumerate(series.items()):
            at, style = x[: len(y)], _style(k)
            values = np.maximum(np.where(np.isfinite(y), y, math.nan), 10.0**low) if log else y
            values = np.where(np.isfinite(values), values, math.nan)
            marker = "o" if len(x) <= 40 else None
            axes.plot(at, values, marker=marker, markersize=3.5, label=plain(label, 26), **style)
        if log:
            axes.set_yscale("log")
            log_axis(axes.yaxis, low, high, max(1, (high - low) // 5))
        _mark_holes(axes, x, series)
        axes.set_xlabel(plain(plot.get("x_label", "")))
        if "degree" in str(plot.get("x_label", "")) and np.nanmax(np.abs(x)) > 100.0:
            axes.set_xticks(np.arange(0, np.nanmax(x) + 1, 45 if np.nanmax(x) < 200 else 90))
        axes.set_ylabel(plain(plot.get("y_label", "")))
        _legend(axes, len(series))

    title = str(plot.get("title", ""))
    return Drawing(_draw(name, title, paint, (5.0, 3.3)), title, _curve_words(log, series))


def _curve_words(log: bool, series: Mapping[str, np.ndarray]) -> str:
    words = ["Logarithmic axis."] if log else []
    if any(not np.isfinite(y).all() for y in series.values()):
        words.append("Red triangles: not finite.")
    return " ".join(words)


def _scan(plot: Mapping[str, Any], name: str) -> Drawing | None:
    t = numbers(plot.get("t", []))
    series = {label: numbers(y)[: len(t)] for label, y in plot.get("series", {}).items()}
    if not len(t) or not series:
        return None
    jumps = [j for j in plot.get("jumps", []) if math.isfinite(float(j["t"]))]
    bad = [j for j in jumps if not j.get("ok", True)]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for j in bad:
            axes.axvline(float(j["t"]), color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
        for k, (label, y) in enumerate(series.items()):
            values = np.where(np.isfinite(y), y, math.nan)
            axes.plot(t[: len(y)], values, label=plain(label, 26), **{**_style(k), "linewidth": 1.5})
        _mark_holes(axes, t, series)
        for j in jumps:
            color = MUTED if j.get("ok", True) else BAD
            axes.plot([float(j["t"])], [0.0], "^", color=color, transform=axes.get_xaxis_transform(), clip_on=False)
        axes.set_xlabel(plain(plot.get("x_label", "t")))
        axes.set_ylabel("outputs, own range = 1" if len(series) > 1 else "output")
        _legend(axes, len(series))

    title = str(plot.get("title", ""))
    listed = [
        f"jump of the {_order(j['order'])} {number(float(j['size']))}"
        + (" (recorded)" if j.get("limit") is None else f" (limit {number(float(j['limit']))})")
        for j in bad or jumps
    ]
    caption = "Triangles on the axis: largest jump of each derivative. " if jumps else ""
    caption += ("Beyond the limit, in red: " if bad else "No jump beyond its limit: ") + "; ".join(listed) + "."
    return Drawing(_draw(name, f"Scan, {title}", paint, (5.0, 3.3)), f"Along a path: {title}", caption if jumps else "")


def _order(order: Any) -> str:
    return _ORDERS[int(order)] if 0 <= int(order) < len(_ORDERS) else f"derivative {order}"


def _spectrum(plot: Mapping[str, Any], name: str) -> Drawing | None:
    found = {
        output: {parity: numbers(parts.get(parity, [])) for parity in ("even", "odd")}
        for output, parts in plot.get("outputs", {}).items()
    }
    found = {o: p for o, p in found.items() if len(p["even"]) or len(p["odd"])}
    if not found:
        return None
    shown = dict(list(found.items())[:6])
    limit = None if plot.get("limit") is None else float(plot["limit"])
    every = np.concatenate([v for p in found.values() for v in p.values()] + ([] if limit is None else [[limit]]))
    low, high = _decades(every)

    def paint(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True, sharey=True))
        for axes, (output, parts) in zip(panels, shown.items(), strict=True):
            for shift, parity, color in ((-0.2, "even", SERIES[0]), (0.2, "odd", SERIES[1])):
                power = parts[parity]
                heights = np.clip(np.nan_to_num(power, nan=np.inf), 10.0**low * 1.01, 10.0**high)
                places = np.arange(len(power)) + shift
                bottom = 10.0**low
                bars = axes.bar(places, heights - bottom, 0.38, bottom=bottom, color=color, label=parity)
                for bar, value in zip(bars, power, strict=True):
                    bar.set(**({} if math.isfinite(value) else {"facecolor": BAD, "hatch": "//"}))
            if limit is not None:
                axes.axhline(limit, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
            axes.set_yscale("log")
            log_axis(axes.yaxis, low, high, max(2, (high - low) // 4))
            axes.set_title(plain(output))
            axes.grid(axis="x", visible=False)
        l_max = max(len(v) for p in shown.values() for v in p.values())
        panels[-1].set_xticks(range(l_max))
        panels[-1].set_xlabel("degree l of the dependence on orientation")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, handlelength=1.0)
        figure.supylabel("relative amplitude", fontsize=10.5, color=INK)

    title = str(plot.get("title", ""))
    caption = (
        "How strongly each output depends on orientation, by degree and parity; an equivariant model has nothing above "
        f"rounding. {_limit_words([] if limit is None else [limit])}"
    ) + ("" if np.isfinite(every).all() else " Hatched: not finite.")
    figure = _draw(name, f"Spectrum, {title}", paint, (5.0, 1.1 + 1.35 * len(shown)))
    return Drawing(figure, f"Spectrum: {title}" if title else "Spectrum", caption)


def _bars(plot: Mapping[str, Any], name: str) -> Drawing | None:
    values = numbers(plot.get("values", []))
    labels = [str(label) for label in plot.get("labels", [])][: len(values)]
    if not labels:
        return None
    log = bool(plot.get("log"))
    finite = values[np.isfinite(values)]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        rows = np.arange(len(labels))[::-1]
        low, high = _decades(values) if log else (0, 0)
        low -= 1  # so that the smallest has a length
        edge = 10.0**high if log else max(float(finite.max(initial=0.0)), 0.0) * 1.15 or 1.0
        start = 10.0**low if log else 0.0
        ends = np.where(np.isfinite(values), values, edge)
        ends = np.clip(ends, start, None) if log else ends
        colors = [NEUTRAL if ok else BAD for ok in np.isfinite(values)]
        axes.barh(rows, ends - start, 0.66, left=start, color=colors)
        for row, end, value in zip(rows, ends, values, strict=True):
            text = " " + (number(float(value)) if math.isfinite(value) else "▶ not finite")
            inside = end > 0.5 * edge if not log else math.log10(max(end, 10.0**low)) > 0.6 * high + 0.4 * low
            axes.annotate(
                text.strip(),
                (end, row),
                (-4 if inside else 4, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                color="#ffffff" if inside else INK,
                fontsize=9.5,
            )
        if log:
            axes.set_xscale("log")
            log_axis(axes.xaxis, low, high, max(1, (high - low) // 5))
        axes.set_yticks(rows, [plain(label, 26, 2) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(plain(plot.get("y_label", "")))

    title = str(plot.get("title", ""))
    return Drawing(
        _draw(name, title, paint, (5.0, 0.9 + 0.34 * len(labels))), title, "Logarithmic axis." if log else ""
    )


def _layers(plot: Mapping[str, Any], name: str) -> Drawing | None:
    layers = plot.get("layers", [])
    if not layers:
        return None
    culprit = plot.get("culprit")
    residuals = numbers([layer.get("residual") for layer in layers])
    rows = []
    for layer, residual in zip(layers, residuals, strict=True):
        shape = layer.get("shape", "")
        shape = " × ".join(map(str, shape)) if isinstance(shape, (list, tuple)) else str(shape)
        here = culprit is not None and layer.get("name") == culprit
        share = 100.0 if not math.isfinite(residual) else _share(residual)
        missing = layer.get("residual") is None
        cells = [layer.get("name", ""), layer.get("type", ""), shape, layer.get("transforms_as") or "unknown"]
        text = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        bar = "" if missing else f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'
        value = "" if missing else number(float(residual))
        rows.append(f"<tr{' class=culprit' if here else ''}>{text}<td>{value}</td><td>{bar}</td></tr>")
    head = "".join(f"<th>{h}</th>" for h in ("layer", "type", "shape", "transforms as", "residual", ""))
    body = f'<div class="wide tall"><table class="layers" id="{name}"><tr>{head}</tr>{"".join(rows)}</table></div>'
    if culprit is None:
        caption = "Residual: what no representation explains, relative to the layer's own size. No layer stands out."
    else:
        caption = f"Residual: what no representation explains. The first layer that breaks the symmetry: {culprit}."
    return Drawing(body, str(plot.get("title", "")) or "Layers", caption, wide=True)


def _share(value: float) -> float:
    """Percent of the way from rounding to one, on a logarithmic scale."""
    return 100.0 * min(max((math.log10(max(value, 1e-16)) + 16.0) / 16.0, 0.01), 1.0)


def _log(values: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(np.abs(values), 10.0**FLOOR))


def _decades(values: np.ndarray) -> tuple[int, int]:
    """Powers of ten around all that is finite and positive."""
    logs = _log(values[np.isfinite(values)])
    if not logs.size:
        return -2, 2
    low, high = math.floor(float(logs.min())), math.ceil(float(logs.max()) + 0.2)
    return max(FLOOR, low), max(high, max(FLOOR, low) + 2)


def _style(k: int) -> dict[str, Any]:
    return {"color": SERIES[k % len(SERIES)], "linestyle": ("-", (0, (5, 2)), (0, (1.5, 1.5)))[k // len(SERIES) % 3]}


def _mark_holes(axes: Any, x: np.ndarray, series: Mapping[str, np.ndarray]) -> None:
    """Triangles at the upper edge wherever a curve is not finite."""
    for y in series.values():
        holes = x[: len(y)][~np.isfinite(y)]
        holes = holes[np.isfinite(holes)]
        axes.plot(holes, np.full(len(holes), 0.97), "v", color=BAD, markersize=7, transform=axes.get_xaxis_transform())


def _legend(axes: Any, n: int) -> None:
    """Above the axes, where it hides nothing."""
    if 1 < n <= 8:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=2 if n > 1 else 1,
            handlelength=1.5,
            columnspacing=1.2,
            borderaxespad=0.2,
        )
    elif n > 8:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5, handlelength=1.2)


_PAINTERS: dict[str, Callable[[Mapping[str, Any], str], Drawing | None]] = {
    "histogram": _histogram,
    "curve": _curve,
    "scan": _scan,
    "spectrum": _spectrum,
    "layers": _layers,
    "bars": _bars,
}
