"""What a check found, as a page, as Markdown for a comment, and as JSON that can be read back."""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from symmetrize.errors import InvalidInputError, did_you_mean
from symmetrize.files import write_text
from symmetrize.report.check_figures import drawing, merged
from symmetrize.report.check_words import (
    Group,
    absolute_of,
    badness,
    grouped,
    key_numbers,
    place,
    ratio,
    rounding_limit,
    summary,
    unit_of,
)
from symmetrize.report.libraries import require_libraries
from symmetrize.report.tables import Table, number
from symmetrize.testing.running.outcome import Report, Result, Verdict, worst_first
from symmetrize.testing.running.serialize import report_from_dict

#: Forms of a report, by the ending of the file.
SUFFIXES = (".html", ".md", ".json")

#: Options that a command for one result has values of its own for; it must not write over the report of all.
_REPLACED = ("--only", "--skip", "--seed", "--profile", "--report")

#: Figures of one check that are shown openly.
_N_FIGURES = 4


def render_check(report: Report, *, structures: bool = True) -> str:
    """Self-contained HTML: figures, style, viewer inline, nothing loaded from anywhere.

    Parameters
    ----------
    report : Report
    structures : bool
        Whether to include the structures and their viewer (1.3 MB).

    Raises
    ------
    MissingDependencyError
        Without matplotlib or jinja2.
    """
    require_libraries()
    from jinja2 import Environment, StrictUndefined

    from symmetrize.report import chemiscope

    folder = files("symmetrize.report") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.filters["slug"] = _slug
    data = chemiscope.dataset(report.structures, rounding_limit(report)) if structures else None
    sections = grouped(report)
    for name, groups in sections.items():
        for group in groups:
            _add_figures(group, openly=_N_FIGURES if name != "passed" else 2)
    return environment.from_string((folder / "check.html").read_text(encoding="utf-8")).render(
        r=report,
        style=(folder / "style.html").read_text(encoding="utf-8"),
        sentences=summary(report),
        tiles=key_numbers(report),
        counts=[(v, n) for v, n in report.count().items() if n],
        sections=sections,
        evaluations=sum(r.evaluations for r in report.results),
        seconds=sum(r.seconds for r in report.results),
        viewer=data,
        embedded=None if data is None else chemiscope.embedded(data),
        library=None if data is None else chemiscope.library(),
        colored=data is not None and bool(data["choices"]),
        command=lambda result: reproduce(report, result),
        unit=lambda finding: unit_of(report, finding),
        absolute=lambda finding: absolute_of(report, finding),
        ordered=lambda found: sorted(found, key=lambda f: (f.excess, f.number), reverse=True),
        about=_about(report),
        place=place,
        ratio=ratio,
    )


def check_markdown(report: Report) -> str:
    """Verdict, failures, all checks, recorded numbers and environment, as GitHub takes it."""
    counts = ", ".join(f"{n} {v.value}" for v, n in report.count().items() if n)
    lines = [f"## {_cell(str(report.subject['name']))}: {'passed' if report.ok else 'FAILED'}", "", f"{counts}.", ""]
    lines += [*(_cell(s) for s in summary(report)), ""]
    ordered = worst_first(report.results)
    judged = [r for r in ordered if r.verdict is not Verdict.RECORDED]
    recorded = [r for r in ordered if r.verdict is Verdict.RECORDED]
    if report.failures:
        rows = [_row(r, over=True) for r in ordered if not r.verdict.good]
        lines += [_table("Failed", "check, worst, number, limit, number / limit, where", rows), ""]
        for group in grouped(report)["failed"]:
            first = group.bad[0]
            lines += [f"**{_cell(group.title)}.** {_cell(first.meaning)}"]
            lines += [f"Probably: {_cell(first.suspicion)}"] if first.suspicion else []
            lines += ["", "```", reproduce(report, first), "```", ""]
    if judged:
        rows = [[*_row(r)[:1], r.verdict.value, *_row(r)[1:]] for r in judged]
        table = _table("All checks", "check, verdict, worst, number, limit, where or why", rows)
        lines += [
            f"<details><summary>All checks ({len(judged)})</summary>",
            "",
            table,
            "",
            "</details>",
            "",
        ]
    if recorded:
        rows = [[c for k, c in enumerate(_row(r)) if k != 3] for r in recorded]
        table = _table("Measured, not judged", "check, worst, number, where", rows)
        lines += ["<details><summary>Measured, not judged</summary>", "", table, "", "</details>", ""]
    lines += [f"Profile {report.profile}, seed {report.seed}. {_about(report)}", ""]
    return "\n".join(lines)


def write_check(report: Report, path: str | os.PathLike[str], *, structures: bool = True) -> None:
    """Write a report, whole or not at all.

    Parameters
    ----------
    report : Report
    path : path
        Its ending says the form: ``.html``, ``.md`` or ``.json``.
    structures : bool
        Whether a page shows the structures.

    Raises
    ------
    InvalidInputError
        Another ending.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(f"report: expected a file name ending in {', '.join(SUFFIXES)}, got {str(path)!r}; "
                                f"{did_you_mean(suffix, SUFFIXES)}")  # fmt: skip
    if suffix == ".html":
        write_text(path, render_check(report, structures=structures))
    elif suffix == ".md":
        write_text(path, check_markdown(report))
    else:
        write_text(path, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def read_check(path: str | os.PathLike[str]) -> Report:
    """A report that was written as JSON.

    Raises
    ------
    InvalidInputError
        Not JSON, not a report, or one of a later version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"report: expected JSON in {str(path)!r}, got something else ({error})") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"report: expected a JSON object in {str(path)!r}, got {type(content).__name__}")
    try:
        return report_from_dict(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"report: {str(path)!r} lacks something or holds too much ({error})") from error


def schema() -> dict[str, Any]:
    """JSON Schema of a report that was written as JSON."""
    return json.loads((files("symmetrize.report") / "check.schema.json").read_text(encoding="utf-8"))


def reproduce(report: Report, result: Result) -> str:
    """Command line that repeats one result."""
    given = str(report.environment.get("command", ""))
    try:
        words = shlex.split(given)
    except ValueError:
        words = []
    if len(words) < 3 or Path(words[0]).name != "symmetrize" or words[1] != "check":
        words = ["symmetrize", "check", "TARGET"]
    kept, skip = [], False
    for word in words:
        if not skip and word.split("=")[0] not in _REPLACED:
            kept.append(word)
        skip = not skip and word in _REPLACED
    kept += ["--only", result.id, "--seed", str(report.seed), "--profile", report.profile]
    return shlex.join(kept)


def _add_figures(group: Group, openly: int) -> None:
    """Draw the plots of a check, those of its worst results first; histograms of its sets become one."""
    ordered = sorted(group.results, key=lambda r: (r.verdict.good, -badness(r)[0]))
    plots = merged([plot for r in ordered if r.outcome is not None for plot in r.outcome.plots])
    drawn = []
    histograms = [plot for plot in plots if plot["kind"] == "histogram"]
    if len(histograms) == 1:
        histograms[0]["title"] = group.title
    for k, plot in enumerate(plots[: 3 * openly]):
        # The tail of very long lists stays in the JSON file.
        made = drawing(plot, f"{_slug(group.check)}-{_slug(ordered[0].verdict.value)}-{k}")
        if made is not None:
            drawn.append(made)
    group.figures, group.more = drawn[:openly], drawn[openly:]


def _table(title: str, columns: str, rows: list[list[str]]) -> str:
    return Table(title, [(column,) for column in columns.split(", ")], rows).markdown()


def _row(result: Result, over: bool = False) -> list[str]:
    """Cells of a Markdown table: id, quantity, number, limit, number over limit, where."""
    found = None if result.outcome is None else result.outcome.worst
    if found is None:
        cells = [result.id, "", "", "", *([""] if over else []), result.reason]
    else:
        limit = "" if found.limit is None else number(found.limit)
        value = f"{number(found.number)} {found.unit}".strip()
        where = found.worst + (f"; {result.reason}" if result.reason else "")
        cells = [result.id, found.quantity, value, limit, *([ratio(found)] if over else []), where]
    return [_cell(cell) for cell in cells]


def _cell(text: str) -> str:
    """Text that Markdown neither formats nor takes for a new cell, a tag or a mention."""
    text = re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(text.split()))
    return text.replace("@", "@\u200b")


def _about(report: Report) -> str:
    e = report.environment
    versions = ", ".join(f"{name} {v}" for name, v in dict(e.get("versions", {})).items())
    parts = [
        f"Python {e['python']}" if "python" in e else "",
        str(e.get("machine", "")),
        versions,
        str(e.get("date", "")),
    ]
    return ", ".join(part for part in parts if part)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())
