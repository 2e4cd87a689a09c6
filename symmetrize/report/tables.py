"""Tables of measured numbers, as aligned text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells with their headings; the first column is text, the others are numbers.

    Attributes
    ----------
    title : str
    columns : list of tuple of str
        Lines of each heading.
    rows : list of list of str
    """

    title: str
    columns: list[tuple[str, ...]]
    rows: list[list[str]]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        height = max(map(len, self.columns))
        heading = [[*([""] * (height - len(c))), *c] for c in self.columns]
        lines = [list(line) for line in zip(*heading, strict=True)]
        widths = [max(len(row[k]) for row in [*lines, *self.rows]) for k in range(len(self.columns))]

        def joined(row: Sequence[str]) -> str:
            cells = [
                cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = []
        for n, row in enumerate(self.rows):
            if n and n % 3 == 0:
                body.append("")
            body.append(joined(row))
        return "\n".join([self.title, rule, *map(joined, lines), rule, *body, rule])

    def markdown(self) -> str:
        """A GitHub table."""
        heading = [" ".join(part for part in column if part) for column in self.columns]
        lines = [heading, [":--", *["--:"] * (len(heading) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(row) + " |" for row in lines)])


def number(value: float, digits: int = 3) -> str:
    """Three digits, with a power of ten where a plain number would be hard to read."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0.0:
        return "0"
    if 0.01 <= abs(value) < 10000.0:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
