"""How many backbone evaluations symmetrisation takes: per center in atom scope, per molecule in structure scope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ase import Atoms
from symmetrize.backbones.toy import ToyLocal

from benchmarks.datasets import TAGS, named
from benchmarks.record import Column, Result, Setting, fixed
from symmetrize import ECSE, FrameSet, Symmetrizer, from_ase
from symmetrize.frames import Stratum

#: Of the neighbor list in atom scope, angstrom.
CUTOFF = 4.5
WIDTHS = (0.15, 0.05)
COLLINEARITY_WIDTH = 0.2
#: Atoms per call, so that memory stays small.
N_ATOMS = 1000

COLUMNS = (
    Column("dataset", "data set"),
    Column("scope", "scope"),
    Column("n_owners", "centers / molecules"),
    *(
        column
        for width in WIDTHS
        for column in (
            Column(f"mean SO(3) {width}", f"SO(3), D = {width} Å: mean", fixed(2)),
            Column(f"max SO(3) {width}", "max"),
            Column(f"effective SO(3) {width}", "effective", fixed(2)),
            Column(f"mean O(3) {width}", "O(3): mean", fixed(2)),
            Column(f"max O(3) {width}", "max"),
        )
    ),
    Column("axis", "on axes (%)", fixed(1)),
    Column("point", "points (%)", fixed(1)),
    Column("weight_min", "smallest Σw", fixed(3)),
)


def run(setting: Setting) -> Result:
    """Frames only: no network is evaluated."""
    sets = dict(setting.datasets)
    sets |= {f"named: {tag}": named(tag) for tag in TAGS}
    cases = []
    for name, structures in sets.items():
        finite = [atoms for atoms in structures if not atoms.pbc.any()]
        for width in WIDTHS:
            cases.append((name, structures, "atom", width))
            if len(finite) == len(structures):
                cases.append((name, structures, "structure", width))
    records = [_record(setting, *case) for case in setting.bar(cases, "evaluations")]
    notes = [
        f"Atom scope: neighbors within {CUTOFF} Å (one hop). Structure scope: around the centroid, finite structures "
        "only. An evaluation in structure scope is one of the whole molecule.",
        "Effective: mean of (Σw)²/Σw². On axes, points: share of the centers or molecules with weight in these strata, "
        f"which may overlap with frames (D = {WIDTHS[0]} Å).",
    ]
    if setting.absent:
        notes.append(f"Not found, skipped: {', '.join(setting.absent)}.")
    parameters = {
        "cutoff": CUTOFF,
        "cutoff_width": list(WIDTHS),
        "collinearity_width": COLLINEARITY_WIDTH,
        "n_structures": {name: len(structures) for name, structures in sets.items()},
    }
    return Result("Evaluations", records, COLUMNS, parameters, notes, _rows(records))


def _rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all widths; what does not carry the width in its name is that of the first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault((record["dataset"], record["scope"]), dict(record))
        row |= {f"{key} {record['cutoff_width']}": value for key, value in record.items()}
    return list(rows.values())


def _record(setting: Setting, name: str, structures: list[Atoms], scope: str, width: float) -> dict[str, Any]:
    record: dict[str, Any] = {"dataset": name, "scope": scope, "cutoff_width": width}
    for group in ("SO(3)", "O(3)"):
        method = ECSE(cutoff_width=width, collinearity_width=COLLINEARITY_WIDTH)
        model = Symmetrizer(ToyLocal(cutoff=CUTOFF), method, group=group, scope=scope)
        found = []
        with torch.no_grad():
            for part in _parts(structures):
                found.append(_numbers(model.frames(from_ase(part).to(setting.device))))
        columns = {key: torch.cat([numbers[key] for numbers in found]) for key in found[0]}
        record[f"mean {group}"] = float(columns["evaluations"].double().mean())
        record[f"max {group}"] = int(columns["evaluations"].max())
        record[f"effective {group}"] = float(columns["effective"].mean())
        record[f"frames {group}"] = {s.name.lower(): int(columns[s.name].sum()) for s in Stratum}
        if group == "SO(3)":
            record["n_owners"] = len(columns["evaluations"])
            record["weight_min"] = float(columns["weight"].min())
            for stratum in (Stratum.FRAME, Stratum.AXIS, Stratum.POINT):
                share = (columns[stratum.name] > 0).double().mean()
                record[stratum.name.lower()] = 100.0 * float(share)
    return record


def _numbers(frames: FrameSet) -> dict[str, torch.Tensor]:
    """Per owner: evaluations, effective number, total weight, frames of each stratum."""
    counts = torch.zeros(frames.n_owners, len(Stratum), dtype=torch.int64, device=frames.owner.device)
    counts.index_put_((frames.owner, frames.stratum), torch.ones_like(frames.owner), accumulate=True)
    return {
        "evaluations": frames.evaluations.cpu(),
        "effective": frames.effective_number.cpu(),
        "weight": frames.total_weight.cpu(),
        **{stratum.name: counts[:, int(stratum)].cpu() for stratum in Stratum},
    }


def _parts(structures: list[Atoms]) -> Iterator[list[Atoms]]:
    part: list[Atoms] = []
    for atoms in structures:
        if part and sum(map(len, part)) + len(atoms) > N_ATOMS:
            yield part
            part = []
        part.append(atoms)
    yield part
