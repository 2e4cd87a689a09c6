"""``symmetrize report``: the page of a study, its figures and its tables as files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tqdm import tqdm

from symmetrize.errors import InvalidInputError
from symmetrize.files import write_text
from symmetrize.report import study_figures as figures
from symmetrize.report.libraries import require_libraries
from symmetrize.report.study_tables import EXACT, Cell, Row, StudyTable, make_table
from symmetrize.report.style import draw
from symmetrize.study import StudyRun, read_run

#: Inches.
WIDE = (10.5, 3.9)


def write_report(run: str | Path, output: str | Path | None = None, formats: Sequence[str] = ("svg", "png")) -> Path:
    """Write what a study has found so far.

    One self-contained HTML page (nothing is loaded from anywhere): all rotation errors at a glance, and for every data
    set (a printed page each) and backbone a table of all measures, error against evaluations, accuracy against time,
    scans through degenerate geometries side by side, and dynamics. Beside it ``figures/``, and the tables as Markdown
    under the name of the page.

    Parameters
    ----------
    run : path
        Folder of a study, finished or not.
    output : path, optional
        The page, by default ``report.html`` in the folder.
    formats : sequence of str
        Of the figures that are written as files.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    InvalidInputError
        There are no results.
    MissingDependencyError
        matplotlib or jinja2 is not installed.
    """
    found = read_run(run)
    require_libraries()
    if not found.records:
        raise InvalidInputError(f"run: expected results of a study in {str(run)!r}, got none yet")
    page = Path(output) if output is not None else Path(run) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    methods = _methods(found)
    style = figures.looks(methods)
    folder = page.parent / "figures"
    folder.mkdir(exist_ok=True)
    pairs = tqdm(_pairs(found), desc="figures", disable=not sys.stderr.isatty())
    sections = [_section(found, data, backbone, style, folder, formats) for data, backbone in pairs]
    write_text(page.with_suffix(".md"), _markdown(found, sections))
    write_text(page, _html(found, methods, sections))
    return page


def _methods(run: StudyRun) -> dict[str, Mapping[str, Any]]:
    """Entries of all methods, in the order of the study, and of those that only the results know."""
    known: dict[str, Mapping[str, Any]] = dict(run.study.get("methods", {}))
    for record in run.records:
        known.setdefault(record["cell"]["method"], {"curve": record["cell"].get("curve")})
    return known


def _pairs(run: StudyRun) -> list[tuple[str, str]]:
    """Data sets with their backbones, in the order of the study."""
    order = {label: n for n, label in enumerate(run.study.get("data", {}))}
    pairs = dict.fromkeys((r["cell"]["data"], r["cell"]["backbone"]) for r in run.records)
    return sorted(pairs, key=lambda pair: order.get(pair[0], len(order)))


def _section(
    run: StudyRun,
    data: str,
    backbone: str,
    style: Mapping[str, figures.Look],
    folder: Path,
    formats: Sequence[str],
) -> dict[str, Any]:
    """Everything that is shown of one backbone on one data set."""
    records = run.select(data=data, backbone=backbone)
    slug = _slugs(run)[data, backbone]

    def drawn(name: str, what: str, plot: figures.Plot, size: tuple[float, float] = WIDE) -> str:
        paths = [folder / f"{slug}-{name}.{kind}" for kind in formats]
        return draw(f"{slug}-{name}", f"{what}, {data}, {backbone}", plot, size, paths)

    cost, dynamics = figures.against_cost(records, style), figures.dynamics(records, style)
    scans = []
    for path in figures.scan_paths(records):
        made = figures.scans(records, style, path)
        if made is not None:
            size = (10.5, 1.0 + 1.55 * made[1])
            scans.append({"path": path, "figure": drawn(_slug(path), f"energy along {path}", made[0], size)})
    table = make_table(records, list(style))
    return {"slug": slug, "data": data, "backbone": backbone, "table": table, "scans": scans} | {
        "cost": None if cost is None else drawn("cost", "errors of methods against their cost", cost),
        "dynamics": None if dynamics is None else drawn("dynamics", "dynamics at constant energy", dynamics),
    }


def _slugs(run: StudyRun) -> dict[tuple[str, str], str]:
    """A name for every pair, of letters that files and links can have, all different."""
    found: dict[tuple[str, str], str] = {}
    for n, (data, backbone) in enumerate(_pairs(run)):
        slug = _slug(f"{data}-{backbone}")
        found[data, backbone] = slug if slug and slug not in found.values() else f"{slug}-{n}".strip("-")
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _counted(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _by_data(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sections of each data set, with a name for links that none of them has."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for section in sections:
        groups.setdefault(section["data"], []).append(section)
    return [{"data": data, "slug": f"data-{n}", "sections": found} for n, (data, found) in enumerate(groups.items())]


def _glance(methods: Iterable[str], sections: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rotation errors of all tables in one: a row per method, a column per section."""
    columns: list[dict[str, Cell]] = []
    for section in sections:
        table: StudyTable = section["table"]
        place = next((n for n, c in enumerate(table.columns) if c.path == figures.ERROR), None)
        without = {row.label: Cell(row.status) for row in table.rows}
        found = {row.label: row.cells[place] for row in table.rows if row.cells} if place is not None else {}
        columns.append(without | found)
    rows = [Row(label, "ok", [column.get(label, Cell("–")) for column in columns]) for label in methods]
    return [row for row in rows if any(cell.text != "–" for cell in row.cells)]


def _problems(run: StudyRun) -> list[dict[str, str]]:
    """Cells without results."""
    return [
        {
            "cell": " · ".join(str(record["cell"][name]) for name in ("method", "backbone", "data", "seed")),
            "status": record["status"],
            "reason": " ".join(str((record.get("error") or {}).get("message", "")).split())[:400],
        }
        for record in run.records
        if record["status"] != "ok"
    ]


def _environment(run: StudyRun) -> str:
    """Versions, threads and dates of all records."""
    environments = [r.get("environment", {}) for r in run.records]
    versions = {name: str(v) for e in environments for name, v in e.get("versions", {}).items()}
    dates = sorted(str(e["date"]) for e in environments if e.get("date"))
    threads = sorted({str(e.get("threads", "?")) for e in environments})
    machines = sorted({str(e.get("machine", "?")) for e in environments})
    when = f"{dates[0][:10]} to {dates[-1][:10]}; " if dates else ""
    listed = ", ".join(f"{name} {v}" for name, v in versions.items())
    return f"{when}{', '.join(machines)}, threads per cell: {', '.join(threads)}; {listed}"


def _markdown(run: StudyRun, sections: Sequence[Mapping[str, Any]]) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in run.counts.items() if n)
    lines = [f"# {run.study.get('name', run.folder.name)}", "", f"{counts}. {_environment(run)}.", "", _LEGEND, ""]
    for section in sections:
        table: StudyTable = section["table"]
        lines.append(table.markdown(f"{section['data']}: {section['backbone']}"))
    if run.skipped:
        lines += ["### Left out", ""]
        lines += [f"* {text}" for text in _skipped(run)]
    return "\n".join(lines).rstrip() + "\n"


def _skipped(run: StudyRun) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in run.skipped:
        cell = entry["cell"]
        groups.setdefault((str(cell["method"]), str(entry["reason"])), []).append(
            f"{cell['backbone']} on {cell['data']}"
        )
    return [f"{method}: {reason} ({'; '.join(dict.fromkeys(cells))})" for (method, reason), cells in groups.items()]


#: What the numbers mean.
_LEGEND = (
    "Errors are relative to the error scale (the spread of an output without its composition's part; the RMS force), "
    f"largest over structures, elements and outputs; below {EXACT:.0e} they are rounding. Best values are marked, ties "
    "included; accuracy is that of the symmetrised model. Evaluations: how many times the backbone looks at an atom. "
    "Symmetric structures: equivariance error on well-known symmetric molecules or crystals. Jump: of the energy along "
    "paths through degenerate geometries, over its range; steepness: largest second derivative over that of the bare "
    "model."
)


def _html(run: StudyRun, methods: Mapping[str, Mapping[str, Any]], sections: Sequence[Mapping[str, Any]]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("symmetrize.report") / "templates"
    described = [
        {
            "label": label,
            "name": str(entry.get("name", "")),
            "options": ", ".join(f"{k}={v}" for k, v in dict(entry.get("options") or {}).items()),
            "group": entry.get("group") or "",
            "scope": entry.get("scope") or "",
        }
        for label, entry in methods.items()
    ]
    template = environment.from_string((folder / "study.html").read_text(encoding="utf-8"))
    return template.render(
        name=run.study.get("name", run.folder.name),
        profile=run.study.get("profile") or "",
        counts=run.counts,
        outdated=run.outdated,
        n_methods=_counted(len({r["cell"]["method"] for r in run.records}), "method"),
        n_pairs=_counted(len(sections), "pair") + " of backbone and data set",
        style=(folder / "style.html").read_text(encoding="utf-8"),
        legend=_LEGEND,
        sections=sections,
        groups=_by_data(sections),
        glance=_glance(methods, sections),
        methods=described,
        data=run.study.get("data", {}),
        problems=_problems(run),
        skipped=_skipped(run),
        environment=_environment(run),
        sizes=run.study.get("sizes", {}),
        seeds=run.study.get("seeds", []),
        dtype=run.study.get("dtype", ""),
    )
