"""Tables of a study: one row per method, the best values marked, refusals and failures with their reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from symmetrize.report.tables import number
from symmetrize.study.results import find_number

#: Relative errors below this are rounding: all of them are as good as each other.
EXACT = 1e-12
#: A network with more of the error of a constant has learned nothing of the quantity.
_LEARNED = 0.95
_CAUSES = "not learned, or another zero of energy, or data that are foreign to it"
#: Row of the errors that predicting means makes.
CONSTANT = "no model: no forces, mean energy"


@dataclass(frozen=True)
class Column:
    """A number of every cell.

    Attributes
    ----------
    title : tuple of str
        Lines of the heading.
    path : str
        Into the measures; ``*`` stands for every entry, of which the largest absolute value counts.
    relative : bool
        An error relative to the error scale, or to another scale: below `EXACT` it is rounding.
    ranked : bool
        Whether less is better.
    floor : float
        Smaller values are noise of the measurement, and as good as each other.
    tie : float
        Values within this ratio of the best are as good as it.
    """

    title: tuple[str, ...]
    path: str
    relative: bool = True
    ranked: bool = True
    floor: float = 0.0
    tie: float = 1.05


#: What is shown of a data set, in this order, where any cell has it.
COLUMNS = (
    Column(("energy MAE", "meV/atom"), "accuracy.symmetrized.energy.mae", relative=False, tie=1.005),
    Column(("force MAE", "meV/Å"), "accuracy.symmetrized.forces.mae", relative=False, tie=1.005),
    Column(("rotation", "error"), "equivariance.rotations.*.max"),
    Column(("inversion", "error"), "equivariance.inversion.*.max"),
    Column(("orientation", "std"), "variance.symmetrized.*"),
    Column(("symmetric", "structures"), "symmetric.structures.*.equivariance"),
    Column(("permutation", "error"), "permutation.*"),
    Column(("call to call",), "determinism.*"),
    Column(("jump on", "paths"), "smoothness.jump.*", floor=1e-10),
    Column(("steepness", "over bare"), "smoothness.ratio.*", relative=False),
    Column(("size", "consistency"), "locality.size_consistency"),
    Column(("local", "equivariance"), "locality.local_equivariance"),
    Column(("ΔL in NVE", "ħ"), "dynamics.angular_momentum", relative=False, floor=1e-10),
    Column(("ΔE in NVE", "meV/atom"), "dynamics.energy_rms", relative=False),
    Column(("forces not", "the gradient"), "dynamics.forces", floor=1e-8),
    Column(("evaluations", "per atom"), "cost.evaluations_per_center", relative=False),
    Column(("time", "over bare"), "cost.time_ratio", relative=False),
    Column(("memory", "over bare"), "cost.peak_memory_ratio", relative=False),
)


def mean_value(records: Sequence[Mapping[str, Any]], path: str) -> float | None:
    """Mean over the seeds of a cell; None where no record has the number."""
    found = [x for x in (find_number(r["measures"], path) for r in records) if x is not None]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Cell:
    """What stands in a field of a table."""

    text: str
    best: bool = False
    exact: bool = False
    bad: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A method: its cells, or why there are none."""

    label: str
    status: str
    cells: list[Cell]
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyTable:
    """All methods for one backbone and data set."""

    columns: list[Column]
    rows: list[Row]

    def markdown(self, title: str) -> str:
        """A GitHub table, the best values in bold."""
        heading = ["method", *(" ".join(c.title) for c in self.columns)]
        lines = [heading, [":--", *["--:"] * len(self.columns)]]
        below = []
        for row in self.rows:
            if row.cells:
                lines.append([row.label, *(f"**{c.text}**" if c.best else c.text for c in row.cells)])
            else:
                lines.append([row.label, row.status, *[""] * (len(self.columns) - 1)])
                below.append(f"* {row.label}: {row.status}: {row.reason}")
            below += [f"* {row.label}: {note}" for note in row.notes]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n".join([f"### {title}", "", table, "", *below]).rstrip() + "\n"


def make_table(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> StudyTable:
    """The table of one backbone and data set.

    Parameters
    ----------
    records : sequence of dict
        Of these alone; several seeds of a method are averaged, and their range is noted.
    methods : sequence of str
        Labels in the order of the rows.
    """
    groups = {label: [r for r in records if r["cell"]["method"] == label] for label in methods}
    groups = {label: found for label, found in groups.items() if found}
    good = {label: [r for r in found if r["status"] == "ok"] for label, found in groups.items()}
    columns = [*_properties(records), *COLUMNS]
    columns = [c for c in columns if any(mean_value(found, c.path) is not None for found in good.values() if found)]
    values = {label: [mean_value(found, c.path) for c in columns] for label, found in good.items() if found}
    best = [_best(c, [v[n] for label, v in values.items()]) for n, c in enumerate(columns)]
    rows = list(_constants(columns, records))
    for label, found in groups.items():
        if label not in values:
            error = found[0].get("error") or {}
            rows.append(Row(label, found[0]["status"], [], _one_line(error.get("message", ""))))
            continue
        cells = [
            _cell(c, values[label][n], best[n], [find_number(r["measures"], c.path) for r in good[label]])
            for n, c in enumerate(columns)
        ]
        notes = dict.fromkeys(note for record in good[label] for note in _notes(record["measures"]))
        notes |= dict.fromkeys(_without_result(record) for record in found if record["status"] != "ok")
        rows.append(Row(label, "ok", cells, notes=tuple(notes)))
    return StudyTable(columns, rows)


def _constants(columns: Sequence[Column], records: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """What the accuracies are measured by: a model that has learned nothing but a mean."""
    paths = [c.path.replace(".symmetrized.", ".constant.") if c.path.startswith("accuracy.") else "" for c in columns]
    values = [mean_value(records, path) if path else None for path in paths]
    if any(value is not None for value in values):
        notes = [f"{name} come out no better from the bare network: {_CAUSES}" for name in _not_learned(records)]
        yield Row(CONSTANT, "ok", [Cell("–") if v is None else Cell(number(v, 3)) for v in values], notes=tuple(notes))


def _not_learned(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Quantities of which the network knows no more than a constant."""
    for name in dict.fromkeys(n for r in records for n in r["measures"].get("accuracy", {}).get("constant", {})):
        bare, constant = (mean_value(records, f"accuracy.{which}.{name}.mae") for which in ("bare", "constant"))
        if bare is not None and constant is not None and bare > _LEARNED * constant:
            yield {"energy": "energies", "forces": "forces"}.get(name, f"values of {name!r}")


def _properties(records: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns of properties beside energies and forces."""
    units: dict[str, str] = {}
    for record in records:
        for name, entry in record["measures"].get("accuracy", {}).get("symmetrized", {}).items():
            if name not in ("energy", "forces") and isinstance(entry, Mapping):
                units.setdefault(name, str(entry.get("unit", "")))
    return [Column((f"{n} MAE", u), f"accuracy.symmetrized.{n}.mae", relative=False) for n, u in units.items()]


def _best(column: Column, values: Sequence[float | None]) -> float | None:
    """What a value may be to count as the best."""
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    if not finite or not column.ranked or len(finite) < 2:
        return None
    least = min(finite)
    limit = max(least * column.tie, EXACT if column.relative else 0.0, column.floor)
    return None if all(v <= limit for v in finite) and len(finite) == len(values) else limit


def _cell(column: Column, value: float | None, best: float | None, seeds: Sequence[float | None]) -> Cell:
    if value is None:
        return Cell("–")
    if not math.isfinite(value):
        return Cell("not finite", bad=True)
    size = abs(value)
    several = [x for x in seeds if x is not None]
    note = (
        f"{number(min(several), 2)} to {number(max(several), 2)} over {len(several)} seeds" if len(several) > 1 else ""
    )
    return Cell(number(value, 3), best is not None and size <= best, column.relative and size < EXACT, note=note)


def _without_result(record: Mapping[str, Any]) -> str:
    """A seed that does not enter the means."""
    reason = _one_line((record.get("error") or {}).get("message", ""))
    return f"seed {record['cell']['seed']} {record['status']}: {reason}"


def _notes(measures: Mapping[str, Any]) -> Iterator[str]:
    """What a number does not say: refused structures and paths, discontinuities, measures that failed."""
    for name, entry in measures.items():
        if not isinstance(entry, Mapping):
            continue
        if "error" in entry and isinstance(entry["error"], Mapping):
            yield f"{name} failed: {_one_line(entry['error'].get('message', ''))}"
        elif "skipped" in entry:
            yield f"{name}: {_one_line(entry['skipped'])}"
    structures = measures.get("symmetric", {}).get("structures", {})
    refused = [name for name, one in structures.items() if one.get("refused")]
    if refused:
        yield f"refuses {', '.join(refused)}"
    unusable = [name for name, one in structures.items() if not one.get("refused") and one.get("finite") is False]
    if unusable:
        yield f"not finite on {', '.join(unusable)}"
    paths = [name for name, why in measures.get("smoothness", {}).get("refused", {}).items() if why]
    if paths:
        yield f"refuses structures on the way: {', '.join(paths)}"
    broken = [
        f"{name} ({('the energy', 'its slope', 'its curvature')[int(order)]} jumps)"
        for name, order in measures.get("smoothness", {}).get("discontinuous", {}).items()
        if order is not None
    ]
    if broken:
        yield f"not smooth: {', '.join(broken)}"


def _one_line(text: Any, length: int = 240) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= length else f"{words[: length - 3]}..."
