"""What ``symmetrize compare`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symmetrize.study.config import load_study
from symmetrize.study.results import FAILED, OK, REFUSED, RESULTS, StudyRun, find_number
from symmetrize.study.run import make_plan, preview, run_study

#: Exit statuses: every cell that was selected is there (refused ones are findings), some have failed.
COMPLETE, INCOMPLETE = 0, 1

#: Columns of the table: heading, path into the measures, format.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("rotations", "equivariance.rotations.*.max", ".1e"),
    ("inversion", "equivariance.inversion.*.max", ".1e"),
    ("force MAE", "accuracy.symmetrized.forces.mae", ".4g"),
    ("smoothness", "smoothness.ratio.*", ".2g"),
    ("evaluations", "cost.evaluations_per_center", ".3g"),
    ("time", "cost.time_ratio", ".3g"),
)

LEGEND = (
    "rotations, inversion: largest relative error; force MAE in meV/A; evaluations per center; smoothness, time: ratio "
    "to the bare backbone"
)


def compare(
    config: str | Path,
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    profile: str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> int:
    """Run a study and print a table; options as on the command line and of `run_study`.

    Parameters
    ----------
    config : path
        YAML file.
    dry_run : bool
        List the cells with what is done, and stop.
    echo : callable
        Takes what would be printed.

    Returns
    -------
    int
        0: all cells that were selected are ok or refused; 1: some have failed.

    Raises
    ------
    SymmetrizeError
        The study cannot be run.
    """
    study = load_study(config, profile)
    folder = Path("runs") / study.name if output is None else Path(output)
    if dry_run:
        plan = make_plan(study, folder, data=data, only=only, retry_failed=retry_failed)
        lines = preview(plan)
        width = max(len(title) for title, _ in lines)
        for title, state in lines:
            echo(f"{title:<{width}}  {state}")
        echo(f"{len(plan.specs)} cells, {len(plan.pending)} to be evaluated; results in {folder}")
        return COMPLETE
    run = run_study(
        study,
        folder,
        data=data,
        workers=workers,
        progress=progress,
        scheduler=scheduler,
        only=only,
        retry_failed=retry_failed,
    )
    kinds = {kind: names for kind, names in (only or {}).items() if names}
    records = [r for r in run.records if all(r["cell"][kind] in names for kind, names in kinds.items())]
    echo("")
    for line in table(records):
        echo(line)
    for line in summary(run, records):
        echo(line)
    return INCOMPLETE if any(record["status"] == FAILED for record in records) else COMPLETE


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line per record, under the heading of its backbone and data set.

    Columns without any number are left out; see `LEGEND`.
    """
    columns = [c for c in _COLUMNS if any(find_number(r["measures"], c[1]) is not None for r in records)]
    several = len({record["cell"]["seed"] for record in records}) > 1
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["cell"]["backbone"], record["cell"]["data"]), []).append(record)
    width = max([len("method"), *(len(_label(record, several)) for record in records)])
    lines = []
    for (backbone, data), members in groups.items():
        lines.append(f"{backbone}, {data}")
        lines.append("  ".join([f"  {'method':<{width}}", f"{'status':<7}", *(f"{c[0]:>11}" for c in columns)]))
        for record in members:
            if record["status"] == OK:
                cells = [f"{_shown(find_number(record['measures'], path), form):>11}" for _, path, form in columns]
            else:
                message = " ".join(str(record["error"]["message"]).split())
                cells = [message if len(message) <= 90 else f"{message[:87]}..."]
            lines.append("  ".join([f"  {_label(record, several):<{width}}", f"{record['status']:<7}", *cells]))
        lines.append("")
    return lines


def summary(run: StudyRun, records: Sequence[dict[str, Any]]) -> list[str]:
    """How many cells are in which state, and where everything is."""
    lines = [LEGEND] if any(record["status"] == OK for record in records) else []
    count = {s: sum(r["status"] == s for r in records) for s in (OK, REFUSED, FAILED)}
    states = ", ".join(f"{n} {status}" for status, n in count.items() if n)
    pending, skipped = run.counts["pending"], len(run.skipped)
    more = [f"{pending} not evaluated yet"] * bool(pending) + [f"{skipped} skipped"] * bool(skipped)
    lines.append(f"{len(records)} cells: {'; '.join([states, *more])}")
    if count[FAILED]:
        lines.append("what failed is in the results, with where; --retry-failed evaluates it again")
    lines.append(f"results: {run.folder / RESULTS}")
    lines.append(f"report:  symmetrize report {run.folder}")
    return lines


def _label(record: dict[str, Any], several: bool) -> str:
    method, seed = record["cell"]["method"], record["cell"]["seed"]
    return f"{method} ({seed})" if several else str(method)


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)
