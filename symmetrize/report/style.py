"""One look for all figures: small SVG that inherits the colors and the font of the page around it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from symmetrize.files import replacing

#: Stand-ins for colors of the page, replaced by its CSS variables in the SVG.
INK, MUTED, GRID = "#102030", "#506070", "#d0d8e0"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

#: Colors and line styles of what is done to a backbone; legible on light and on dark.
COLORS = {"bare": "#e07b24", "SO(3)": "#4186d8", "O(3)": "#179a6e"}
NAMES = {"bare": "bare", "SO(3)": "ECSE SO(3)", "O(3)": "ECSE O(3)"}

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "symmetrize",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    # Labels are the users'.
    "text.parse_math": False,
}

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power_of_ten(exponent: int) -> str:
    """Such as 10⁻³, without mathematical markup."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def draw(
    name: str,
    description: str,
    plot: Callable[[Any], None],
    size: tuple[float, float] = (5.0, 3.3),
    files: Sequence[Path] = (),
) -> str:
    """An inline SVG.

    Parameters
    ----------
    name : str
        Prefix of the identifiers inside, unique on the page.
    description : str
        Read out instead of the figure.
    plot : callable
        Draws on the ``matplotlib.figure.Figure`` that it is given.
    size : tuple of float
        Inches; the page scales it to the available width.
    files : sequence of Path
        Also written, on white, in the formats of their suffixes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        # Once for all formats: this takes longer than drawing.
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        with matplotlib.rc_context({"svg.fonttype": "path"}):
            for path in files:
                with replacing(path) as temporary:
                    figure.savefig(
                        temporary,
                        format=path.suffix[1:],
                        dpi=150,
                        metadata={"Date": None} if path.suffix == ".svg" else {},
                    )
        figure.patch.set_alpha(0.0)
        for axes in figure.axes:
            axes.patch.set_alpha(0.0)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), name, description)


def log_axis(axis: Any, low: int, high: int, every: int = 3) -> None:
    """Decades ``low`` to ``high`` on a logarithmic axis, labelled every few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    limit = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    limit(10.0**low, 10.0**high)
    ticks = [10.0**k for k in range(low, high + 1) if k % every == 0]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))


def _inline(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    if box is None:
        raise RuntimeError("figure: expected a viewBox in matplotlib's SVG, got none")
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg class="figure" viewBox="{box.group(1)}" role="img" aria-label="{html.escape(description)}">',
        svg,
        count=1,
    )
    svg = svg.replace("xlink:href", "href")
    # Identifiers are unique per figure only.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"(font(?:-family)?:[^;\"]*?)'[^;\"]*sans-serif", r"\1system-ui, sans-serif", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
