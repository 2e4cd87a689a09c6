"""What a check found, as a page, as Markdown for a comment, and as JSON that can be read back."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from symmetrize.errors import InvalidInputError, did_you_mean
from symmetrize.files import write_text
from symmetrize.report.check_figures import Drawing, drawing, merged
from symmetrize.report.libraries import require_libraries
from symmetrize.report.tables import Table, number
from symmetrize.testing.outcome import Finding, Outcome, Report, Result, Verdict, worst_first
from symmetrize.testing.serialize import report_from_dict

#: Forms of a report, by the ending of the file.
SUFFIXES = (".html", ".md", ".json")

#: Checks that are shown first where all is well.
_FAMOUS = (
    "rotation_equivariance",
    "inversion_equivariance",
    "permutation_equivariance",
    "translation_invariance",
    "smoothness",
)

#: Figures of one check that are shown openly.
_N_FIGURES = 4


@dataclass
class Group:
    """The results of one check that stand together on the page."""

    check: str
    title: str
    results: list[Result]
    figures: list[Drawing] = field(default_factory=list)
    more: list[Drawing] = field(default_factory=list)

    @property
    def bad(self) -> list[Result]:
        """Those that do not let a run pass."""
        return [r for r in self.results if not r.verdict.good]

    @property
    def fine(self) -> list[Result]:
        """The others."""
        return [r for r in self.results if r.verdict.good]

    @property
    def worst(self) -> Result:
        """Furthest beyond its limit; where there is none, the largest number."""
        return max(self.results, key=_badness)

    @property
    def about(self) -> Result:
        """A result with the words on the property."""
        return self.results[0]


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
    data = chemiscope.dataset(report.structures, _rounding(report)) if structures else None
    sections = _sections(report)
    for name, groups in sections.items():
        for group in groups:
            _add_figures(group, openly=_N_FIGURES if name != "passed" else 2)
    return environment.from_string((folder / "check.html").read_text(encoding="utf-8")).render(
        r=report,
        style=(folder / "style.html").read_text(encoding="utf-8"),
        sentences=summary(report),
        tiles=_tiles(report),
        counts=[(v, n) for v, n in report.count().items() if n],
        sections=sections,
        evaluations=sum(r.evaluations for r in report.results),
        seconds=sum(r.seconds for r in report.results),
        viewer=data,
        embedded=None if data is None else chemiscope.embedded(data),
        library=None if data is None else chemiscope.library(),
        colored=data is not None and bool(data["choices"]),
        command=lambda result: reproduce(report, result),
        unit=lambda finding: _unit(report, finding),
        absolute=lambda finding: _absolute(report, finding),
        place=_place,
        ratio=_ratio,
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
        columns = [("check",), ("worst",), ("number",), ("limit",), ("number / limit",), ("where",)]
        rows = [_row(r, ratio=True) for r in ordered if not r.verdict.good]
        lines += [Table("Failed", columns, rows).markdown(), ""]
        for group in _sections(report)["failed"]:
            first = group.bad[0]
            lines += [f"**{_cell(group.title)}.** {_cell(first.meaning)}"]
            lines += [f"Probably: {_cell(first.suspicion)}"] if first.suspicion else []
            lines += ["", "```", reproduce(report, first), "```", ""]
    if judged:
        columns = [("check",), ("verdict",), ("worst",), ("number",), ("limit",), ("where or why",)]
        rows = [[r.id, r.verdict.value, *_row(r)[1:]] for r in judged]
        table = Table("All checks", columns, [[_cell(c) for c in row] for row in rows]).markdown()
        lines += [
            f"<details><summary>All {len(judged)} checks that were judged</summary>",
            "",
            table,
            "",
            "</details>",
            "",
        ]
    if recorded:
        columns = [("check",), ("worst",), ("number",), ("where",)]
        rows = [[c for k, c in enumerate(_row(r)) if k != 3] for r in recorded]
        table = Table("Measured, not judged", columns, rows).markdown()
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
        if not skip and word.split("=")[0] not in ("--only", "--seed", "--profile"):
            kept.append(word)
        skip = not skip and word in ("--only", "--seed", "--profile")
    kept += ["--only", result.id, "--seed", str(report.seed), "--profile", report.profile]
    return shlex.join(kept)


def summary(report: Report) -> list[str]:
    """Sentences: what is broken, by how much, and whether it matters; or how far from its limits all is."""
    judged = [r for r in report.results if r.verdict in (Verdict.PASSED, Verdict.EXPECTED)]
    sentences = _broken(report)
    if not sentences and not judged:
        sentences.append("Nothing was judged: no check applied to what this model claims.")
    elif not sentences:
        numbers = [(f, r) for r in judged if r.outcome for f in r.outcome.findings if f.ok and f.limit]
        sentences.append(f"Everything that the model claims and that was checked holds, in {len(judged)} checks.")
        if numbers:
            found, result = max(numbers, key=lambda pair: pair[0].excess)
            sentences.append(
                f"Closest to its limit: {found.quantity} at {_percent(found.excess)} of it ({_name(result)})."
            )
    expected = [r for r in report.results if r.verdict is Verdict.EXPECTED]
    if expected:
        sentences.append(f"{_count(len(expected), 'failure')} had been announced with a reason.")
    sentences += _not_claimed(report)
    return sentences


def _broken(report: Report) -> list[str]:
    groups = _sections(report)["failed"]
    failed = [g for g in groups if any(r.verdict is Verdict.FAILED for r in g.results)]
    sentences = []
    if failed:
        parts = []
        for group in failed[:4]:
            n = sum(r.verdict is Verdict.FAILED for r in group.results)
            parts.append(group.title + (f" (on {n} of {len(group.results)})" if len(group.results) > 1 else ""))
        parts += [f"{len(failed) - 4} more"] if len(failed) > 4 else []
        sentences.append(f"Broken: {_and(parts)}.")
        result = max((r for g in failed for r in g.bad if r.outcome and r.outcome.worst), key=_badness, default=None)
        if result is not None and result.outcome is not None and result.outcome.worst is not None:
            found = result.outcome.worst
            sentences.append(f"Worst: {_described(report, found)} ({_name(result)}{_comma(found.worst)}).")
            sentences += _matters(found)
    errors = [r for r in report.results if r.verdict is Verdict.ERROR]
    if errors:
        names = list(dict.fromkeys(r.title for r in errors))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sentences.append(f"{_count(len(errors), 'check')} could not be run to the end: {', '.join(names[:3])}{more}.")
    stale = [r for r in report.results if r.verdict is Verdict.STALE]
    if stale:
        which = ", ".join(r.id for r in stale[:3])
        sentences.append(f"Announced as failures, and yet they pass: {which}{' and more' if len(stale) > 3 else ''}.")
    return sentences


def _described(report: Report, found: Finding) -> str:
    value = number(found.number) if math.isfinite(found.number) else "a number that is not finite"
    unit = f" {found.unit}" if found.unit else (" of its error scale" if found.scale is not None else "")
    absolute = _absolute(report, found)
    text = f"{found.quantity} is off by {value}{unit}{f' ({absolute})' if absolute else ''}"
    return text + (f", {_ratio(found)} times the limit" if _ratio(found) not in ("", "∞") else "")


def _matters(found: Finding) -> list[str]:
    if not math.isfinite(found.number):
        return ["Whatever uses these numbers will break."]
    if found.unit or found.scale is None:
        return []
    if found.number >= 0.3:
        return ["That is as large as what the model predicts: results depend on it."]
    if found.number >= 1e-3:
        return ["That is a visible part of what the model predicts: results depend on it."]
    if found.number >= 1e-6:
        return ["Small beside what the model predicts, but no rounding: it can show in derivatives and in long runs."]
    return [
        "Invisible in a single prediction, but more than rounding explains: something is not exact, or less precise."
    ]


def _not_claimed(report: Report) -> list[str]:
    recorded = [r for r in report.results if r.verdict is Verdict.RECORDED and r.outcome and r.outcome.worst]
    parts = []
    for title in dict.fromkeys(r.title for r in recorded):
        found = [f for r in recorded if r.title == title and r.outcome for f in r.outcome.findings]
        scaled = [f.number for f in found if not f.unit and f.scale is not None]
        if scaled:
            worst = max((v if math.isfinite(v) else math.inf for v in scaled), default=0.0)
            parts.append(f"{title} (up to {number(worst)} of the error scale)")
    return [f"Not claimed, measured only: {_and(parts[:4])}."] if parts else []


def _sections(report: Report) -> dict[str, list[Group]]:
    """Groups of results by what became of them; within each, worst first for failures and otherwise as run."""
    kinds: dict[str, list[Group]] = {k: [] for k in ("failed", "expected", "recorded", "passed", "skipped")}
    bad = {r.check for r in report.failures}
    of_verdict = {Verdict.EXPECTED: "expected", Verdict.RECORDED: "recorded", Verdict.SKIPPED: "skipped"}
    for result in worst_first(report.results) if bad else report.results:
        kind = of_verdict.get(result.verdict, "failed" if result.check in bad else "passed")
        known = next((g for g in kinds[kind] if g.check == result.check), None)
        if known is None:
            kinds[kind].append(Group(result.check, result.title, [result]))
        else:
            known.results.append(result)
    order = [r.check for r in report.results]
    for kind, groups in kinds.items():
        if kind != "failed":
            groups.sort(key=lambda group: order.index(group.check))
    return kinds


def _add_figures(group: Group, openly: int) -> None:
    """Draw the plots of a check, those of its worst results first; histograms of its sets become one."""
    ordered = sorted(group.results, key=lambda r: (r.verdict.good, -_badness(r)[0]))
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


def _tiles(report: Report) -> list[dict[str, Any]]:
    """Key numbers: failures first, then famous checks, then those closest to their limits."""
    groups: dict[str, Group] = {}
    for result in report.results:
        if result.verdict not in (Verdict.SKIPPED, Verdict.RECORDED):
            groups.setdefault(result.check, Group(result.check, result.title, [])).results.append(result)

    def rank(group: Group) -> tuple[int, float]:
        famous = _FAMOUS.index(group.check) if group.check in _FAMOUS else len(_FAMOUS)
        return (0, -_badness(group.worst)[0]) if group.bad else (1 + famous, -_badness(group.worst)[0])

    tiles = []
    for group in sorted(groups.values(), key=rank)[:5]:
        result = max(group.bad or group.results, key=_badness)
        found = result.outcome.worst if result.outcome is not None else None
        of = f"{len(group.bad)} of {len(group.results)} fail" if group.bad else f"all {len(group.results)} hold"
        tiles.append(
            {
                "title": group.title,
                "check": group.check,
                "ok": not group.bad,
                "value": "no result" if found is None else number(found.number),
                "of": "" if found is None else _unit(report, found) or "of the error scale",
                "note": "" if found is None or found.limit is None else f"limit {number(found.limit)}",
                "sets": of if len(group.results) > 1 else "",
            }
        )
    return tiles


def _row(result: Result, ratio: bool = False) -> list[str]:
    """Cells of a Markdown table: id, quantity, number, limit, number over limit, where."""
    found = None if result.outcome is None else result.outcome.worst
    if found is None:
        cells = [result.id, "", "", "", *([""] if ratio else []), result.reason]
    else:
        limit = "" if found.limit is None else number(found.limit)
        value = f"{number(found.number)} {found.unit}".strip()
        where = found.worst + (f"; {result.reason}" if result.reason else "")
        cells = [result.id, found.quantity, value, limit, *([_ratio(found)] if ratio else []), where]
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


def _badness(result: Result) -> tuple[float, float]:
    found = None if result.outcome is None else result.outcome.worst
    if found is None:
        return (math.inf if not result.verdict.good else -1.0, 0.0)
    return (found.excess, found.number if math.isfinite(found.number) else math.inf)


def _rounding(report: Report) -> float | None:
    """Largest error that rounding explains, from the limits of what was judged on the error scale."""
    outcomes: list[Outcome] = [r.outcome for r in report.results if r.outcome is not None]
    limits = [f.limit for o in outcomes for f in o.findings if f.limit and not f.unit and f.scale is not None]
    return min(limits, default=None)


def _unit(report: Report, found: Finding) -> str:
    return found.unit if found.unit else ("" if found.scale is not None else "absolute")


def _absolute(report: Report, found: Finding) -> str:
    """The number in the unit of the output, where there is one."""
    scale: Mapping[str, Any] = report.scales.get(found.quantity.split(": ")[0], {})
    unit = scale.get("unit")
    if not unit or found.scale is None or found.unit or not math.isfinite(found.number):
        return ""
    return f"{number(found.number * found.scale)} {unit}"


def _ratio(found: Finding) -> str:
    """Number over limit."""
    if found.limit is None or not math.isfinite(found.excess):
        return "" if found.limit is None else "∞"
    return number(found.excess, 2)


def _place(found: Finding) -> float:
    """Percent of the width: six decades below the limit, which is at 30 percent, and fourteen above."""
    if not math.isfinite(found.excess):
        return 100.0
    return min(max(30.0 + 5.0 * math.log10(max(found.excess, 1e-30)), 0.0), 100.0)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{number(100 * share, 2)} %"


def _name(result: Result) -> str:
    return result.title + (f" on {result.on}" if result.on else "")


def _comma(text: str) -> str:
    return f": {text}" if text else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())
