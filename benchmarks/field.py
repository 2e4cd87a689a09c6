"""Exact symmetry, what it costs with every tool: the same networks, structures and run.

    python -m benchmarks.field --output runs/field --pet-source PATH

Needs metatomic-ase and frame-averaging-pytorch, and a clone of github.com/spozdn/pet for the proof of concept of ECSE;
what is not there is left out, and said to be.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from ase import Atoms
from torch import Tensor

from benchmarks import field_tools as tools
from benchmarks.datasets import load as load_datasets
from benchmarks.field_cases import DEGREES, Case, cases
from benchmarks.field_figures import draw
from benchmarks.field_tools import About, Tool
from benchmarks.record import Column, Result, Setting, digits, provenance
from symmetrize import ECSE, GroupAveraging, Identity, Symmetrizer
from symmetrize.files import write_text
from symmetrize.ops.rotations import random_rotations

#: An error of a quadrature that is rounding: higher degrees are not tried.
ROUNDING = 1e-10

#: What counts as exact enough, and what is claimed of it.
RESIDUAL, GOAL = 1e-6, 50.0

N_ROTATIONS = 8
#: Of structures for the proof of concept, which takes a second for a few atoms, in loops over pairs of neighbors.
MOST_ATOMS = 64
#: Structures in a call of those tools that take several.
N_TOGETHER = 64

COLUMNS = (
    Column("network", "network"),
    Column("structures", "structures"),
    Column("tool", "tool"),
    Column("group", "group"),
    Column("smooth", "smooth"),
    Column("evaluations", "evaluations", digits(3)),
    Column("rotation_energy", "rotation: ΔE", digits(2)),
    Column("rotation_forces", "ΔF", digits(2)),
    Column("inversion", "inversion", digits(2)),
    Column("accuracy", "MAE F (%)", lambda value: f"{value:+.2f}"),
    Column("ms", "ms", digits(3)),
    Column("over_bare", "over bare", digits(3)),
    Column("over_ours", "over ours", digits(3)),
    Column("ms_together", "together: ms", digits(3)),
    Column("ms_float32", "float32: ms", digits(3)),
    Column("ms_together_float32", "together: ms", digits(3)),
)


@dataclass(frozen=True)
class Effort:
    """How much is measured: seconds for the errors and for the times of each tool, structures at most, rounds."""

    errors: float
    times: float
    n_structures: int
    n_rounds: int


def run(setting: Setting, checkpoint: Path | None = None) -> Result:
    """All tools on all cases: errors in float64, times of energy and forces in float64 and float32."""
    effort = Effort(8.0, 4.0, 8, 20) if setting.full else Effort(0.8, 0.4, 4, 10)
    missing = tools.installed("metatomic-ase", "frame-averaging-pytorch")
    records: list[dict[str, Any]] = []
    for case in setting.bar(cases(setting, checkpoint), "field"):
        records += measure(case, effort, setting.pet_source, missing)
    notes = [
        "Energy and forces of the same network, with the neighbor list, in one run; process time, least of several "
        f"rounds in turns, per structure: one structure in a call, or together {N_TOGETHER} where a tool takes more. "
        "Over bare: the network alone. Over ours: ECSE of the same group, the faster scope. Both with one structure "
        "in a call, float64.",
        "Rotation: largest change of the energy, over the standard deviation of the energy over the structures, and of "
        f"the force on an atom turned back, over the RMS force, in float64, under up to {N_ROTATIONS} random rotations "
        "of each structure (fewer where a call takes long: `n_pairs` in the records counts them). Inversion: the "
        "larger of the two, where it is claimed. MAE F: change of the mean absolute error of the forces over the bare "
        "network's on the same structures.",
        "Evaluations: of the network, mean over structures; in atom scope, over environments of atoms.",
        f"Quadratures: degrees {', '.join(map(str, DEGREES))}, until the error is rounding. Smooth: see "
        f"{tools.SMOOTHNESS}; the weights of the proof of concept jump where a neighbor crosses the outer cutoff.",
        *goals(records),
        *([f"Not installed, left out: {', '.join(missing)}."] if missing else []),
        *([] if setting.pet_source else ["The proof of concept was left out (--pet-source)."]),
    ]
    parameters = {
        "degrees": list(DEGREES),
        "residual": RESIDUAL,
        "n_rotations": N_ROTATIONS,
        "n_together": N_TOGETHER,
        "batch_size": tools.BATCH_SIZE,
        "errors_in": "float64",
    }
    return Result("Against the field", records, COLUMNS, parameters, notes)


# --- the tools of a case --------------------------------------------------------------------------------------------


def make_tools(case: Case, dtype: torch.dtype, pet_source: Path | None, missing: Sequence[str]) -> list[Tool]:
    """All but the quadratures, in one precision."""
    backbone = case.in_precision(dtype)
    scopes = [*(["atom"] if backbone.receptive_field == 1 else []), *(["structure"] if case.finite else [])]
    found: list[Tool] = [tools.Bare(About("bare", "bare", group="", together=True), backbone)]
    for group in ("SO(3)", "O(3)"):
        for scope in scopes:
            about = About(f"ECSE, {scope} scope", f"ECSE {group}", group=group, together=True)
            native = tools.Averaged(about, backbone, ECSE(), scope)
            found.append(native)
            if group == "O(3)" and scope == scopes[-1]:
                about = About(f"ECSE, {scope} scope, exported", "ECSE O(3), exported", together=True)
                found.append(tools.Exported(about, backbone, tools.exported(native.model), native))
    if case.finite and "frame-averaging-pytorch" not in missing:
        found.append(tools.PrincipalAxes(backbone))
    if pet_source is not None and len(case.structures[0]) <= MOST_ATOMS:
        found.append(tools.ProofOfConcept(backbone, pet_source))
    return found


def make_quadratures(
    case: Case, dtype: torch.dtype, missing: Sequence[str]
) -> list[tuple[tuple[int, ...], Callable[[int], Tool]]]:
    """Families of tools that have a degree: (degrees, degree -> tool)."""
    backbone = case.in_precision(dtype)
    model = tools.exported(Symmetrizer(backbone, Identity(), scope="structure"))
    # Whole structures, as elsewhere; in atom scope a call holds the same.
    scope = "structure" if case.finite else "atom"

    def ours(degree: int) -> Tool:
        about = About(f"GroupAveraging, degree {degree}", "GroupAveraging", degree=degree, together=True)
        return tools.Averaged(about, backbone, GroupAveraging(degree), scope)

    families: list[tuple[tuple[int, ...], Callable[[int], Tool]]] = [
        (case.degrees, ours),
        (case.degrees, lambda degree: tools.symmetrized_model(backbone, model, degree)),
    ]
    if "metatomic-ase" not in missing:
        families.append((case.ase_degrees, lambda degree: tools.AseSymmetrized(backbone, model, degree)))
    return families


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(case: Case, effort: Effort, pet_source: Path | None, missing: Sequence[str]) -> list[dict[str, Any]]:
    """Records of all tools on one case."""
    double = make_tools(case, torch.float64, pet_source, missing)
    single = make_tools(case, torch.float32, pet_source, missing)
    scales = _scales(double[0], case.structures)
    errors = [_errors(tool, case, scales, effort) for tool in double]
    families = [make_quadratures(case, dtype, missing) for dtype in (torch.float64, torch.float32)]
    for (degrees, make), (_, make_single) in zip(*families, strict=True):
        for degree in degrees:
            double.append(make(degree))
            single.append(make_single(degree))
            errors.append(_errors(double[-1], case, scales, effort))
            if max(errors[-1]["rotation_energy"], errors[-1]["rotation_forces"]) <= ROUNDING:
                break
    structures = _spread(case.structures, effort.n_structures)
    together = [case.structures[k % len(case.structures)] for k in range(N_TOGETHER)] if case.finite else []
    ms: dict[str, list[Any]] = {
        "ms": _times(double, structures, effort),
        "ms_float32": _times(single, structures, effort),
        "ms_together": _times_together(double, together, effort),
        "ms_together_float32": _times_together(single, together, effort),
    }
    records = []
    for k, tool in enumerate(double):
        records.append(
            {
                "network": case.network,
                "structures": case.system,
                "tool": tool.about.name,
                "family": tool.about.family,
                "degree": tool.about.degree,
                "group": tool.about.group or "-",
                "smooth": "yes" if tool.about.smooth else "no",
                "evaluations": tool.evaluations(structures),
                **errors[k],
                **{name: seconds[k] for name, seconds in ms.items()},
            }
        )
        if tool.about.group == "SO(3)":
            records[-1]["inversion"] = None
    for record in records:
        record["over_bare"] = record["ms"] / records[0]["ms"]
        ours = [r["ms"] for r in records if r["family"] == f"ECSE {record['group']}"]
        record["over_ours"] = record["ms"] / min(ours) if ours else None
    return records


def _spread(structures: Sequence[Atoms], n: int) -> list[Atoms]:
    """At most n of them, evenly."""
    return list(structures[:: max(1, len(structures) // n)][:n])


def _scales(bare: Tool, structures: Sequence[Atoms]) -> tuple[float, float]:
    """Standard deviation of the energy over structures (all of one composition), and RMS force."""
    energy, forces = bare.evaluate(bare.prepare(structures))
    return float((energy - energy.mean()).square().mean().sqrt()), float(forces.square().sum(dim=1).mean().sqrt())


def _errors(tool: Tool, case: Case, scales: tuple[float, float], effort: Effort) -> dict[str, Any]:
    """Under rotations and inversion, and against the labels."""
    rotations = random_rotations(N_ROTATIONS, torch.Generator().manual_seed(0))
    elements = [rotations[0], -torch.eye(3, dtype=torch.float64), *rotations[1:]]
    worst = {"rotation_energy": 0.0, "rotation_forces": 0.0, "inversion": 0.0}
    bare = tools.Bare(tool.about, tool.backbone)
    off, off_bare, n_rotations = 0.0, 0.0, 0
    start = time.perf_counter()
    for atoms in _spread(case.structures, effort.n_structures):
        before = tool.evaluate(tool.prepare([atoms]))
        if case.labeled:
            labels = torch.from_numpy(atoms.get_forces())
            off += float((before[1] - labels).abs().mean())
            off_bare += float((bare.evaluate(bare.prepare([atoms]))[1] - labels).abs().mean())
        for k, element in enumerate(elements):
            if n_rotations and k != 1 and time.perf_counter() - start > effort.errors:
                break
            after = tool.evaluate(tool.prepare([turned(atoms, element)]))
            energy = float((after[0] - before[0]).abs().max()) / scales[0]
            forces = float((after[1] - before[1] @ element.T).norm(dim=1).max()) / scales[1]
            n_rotations += k != 1
            found = {"rotation_energy": energy, "rotation_forces": forces}
            found = {"inversion": max(energy, forces)} if k == 1 else found
            # So that NaN stays.
            worst |= {name: value for name, value in found.items() if not value <= worst[name]}
        if time.perf_counter() - start > effort.errors:
            break
    return {
        **worst,
        "accuracy": 100.0 * (off / off_bare - 1.0) if case.labeled and tool.about.group else None,
        "n_pairs": n_rotations,
    }


def turned(atoms: Atoms, element: Tensor) -> Atoms:
    """In another orientation, the cell included."""
    out = atoms.copy()
    matrix = element.numpy()
    out.set_cell(atoms.cell.array @ matrix.T)
    out.positions = atoms.positions @ matrix.T
    return out


def _times(found: Sequence[Tool], structures: Sequence[Atoms], effort: Effort) -> list[float]:
    """Milliseconds of process time per structure, one in a call: least of several rounds in turns, for each tool."""
    prepared = [[tool.prepare([atoms]) for atoms in structures] for tool in found]
    return _in_turns([_one_by_one(tool, each) for tool, each in zip(found, prepared, strict=True)], effort)


def _times_together(found: Sequence[Tool], structures: Sequence[Atoms], effort: Effort) -> list[float | None]:
    """Likewise, all in one call; None for tools that take one."""
    chosen = [k for k, tool in enumerate(found) if tool.about.together and structures and tool.about.degree is None]
    calls = [_together(found[k], found[k].prepare(structures)) for k in chosen]
    out: list[float | None] = [None] * len(found)
    for k, seconds in zip(chosen, _in_turns(calls, effort), strict=True):
        out[k] = seconds / len(structures)
    return out


def _one_by_one(tool: Tool, prepared: Sequence[Any]) -> list[Callable[[], object]]:
    return [lambda one=one: tool.evaluate(one) for one in prepared]  # type: ignore[misc]


def _together(tool: Tool, prepared: Any) -> list[Callable[[], object]]:
    return [lambda: tool.evaluate(prepared)]


def _in_turns(calls: Sequence[Sequence[Callable[[], object]]], effort: Effort) -> list[float]:
    """Mean over the calls of each of their least milliseconds; of what takes long, fewer calls and rounds."""
    chosen: list[Sequence[Callable[[], object]]] = []
    rounds: list[int] = []
    least: list[list[float]] = []
    for each in calls:
        # TorchScript optimizes in its first calls, which takes a second or two.
        warm = [_clock(each[0])]
        while len(warm) < 4 and (warm[-1] < 1.0 or (len(warm) < 3 and warm[-1] < 4.0)):
            warm.append(_clock(each[0]))
        share = effort.times / min(warm)
        kept = each[: max(1, int(share / 2))]
        chosen.append(kept)
        rounds.append(int(min(effort.n_rounds, share / len(kept))))
        least.append([min(warm), *[float("inf")] * (len(kept) - 1)])
    for turn in range(max(rounds, default=0)):
        for k, each in enumerate(chosen):
            if turn < rounds[k]:
                least[k] = [min(t, _clock(call)) for t, call in zip(least[k], each, strict=True)]
    return [1e3 * sum(times) / len(times) for times in least]


def _clock(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


# --- what came out --------------------------------------------------------------------------------------------------


def goals(records: Sequence[dict[str, Any]]) -> list[str]:
    """For each case: the fastest smooth tool of others within `RESIDUAL`, over ours."""
    lines = []
    for network, system in dict.fromkeys((r["network"], r["structures"]) for r in records):
        rows = [r for r in records if (r["network"], r["structures"]) == (network, system)]
        for group in ("O(3)", "SO(3)"):
            others = [r for r in rows if not _ours(r) and r["smooth"] == "yes" and r["group"] == group]
            within = [r for r in others if residual(r) <= RESIDUAL]
            where = f"{network}, {system}, {group}: "
            ours = [r for r in rows if r["family"] == f"ECSE {group}"]
            if not others or not ours:
                continue
            if not within:
                best = min(others, key=residual)
                lines.append(
                    f"{where}no other smooth tool is within {RESIDUAL:g}; {best['tool']} is at {residual(best):.1e} "
                    f"and takes {best['over_ours']:.3g} times as long as ours."
                )
                continue
            best = min(within, key=lambda r: r["ms"])
            fastest = min(ours, key=lambda r: r["ms"])
            line = f"{where}within {RESIDUAL:g}, {best['tool']} takes {best['over_ours']:.3g} times as long as ours"
            together = [r["ms_together"] for r in ours if r["ms_together"]]
            if together:
                line += f" ({best['ms'] / min(together):.3g} times ours together)"
            lines.append(f"{line}; evaluations {best['evaluations']:.3g} and {fastest['evaluations']:.3g}.")
    return lines


def _ours(record: dict[str, Any]) -> bool:
    return record["family"].startswith(("ECSE O", "ECSE S", "GroupAveraging", "bare"))


def residual(record: dict[str, Any]) -> float:
    """Largest error of a record under what it claims."""
    errors = [record[key] for key in ("rotation_energy", "rotation_forces", "inversion") if record[key] is not None]
    # A maximum passes over NaN.
    return float("nan") if any(math.isnan(error) for error in errors) else max(errors)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/field"), show_default=True)
@click.option(
    "--pet-source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Clone of github.com/spozdn/pet, the proof of concept of ECSE.",
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PET checkpoint of metatrain for ethanol, as a further network.",
)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="See benchmarks/README.md.")
@click.option("--profile", type=click.Choice(["small", "full"]), default="small", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--figure", type=click.Path(path_type=Path), help="SVG; by default in the output folder.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(
    output: Path,
    pet_source: Path | None,
    checkpoint: Path | None,
    data: Path | None,
    profile: str,
    threads: int,
    figure: Path | None,
    quiet: bool,
) -> None:
    """Error and time of tools that symmetrise a network, around the same networks."""
    torch.set_num_threads(threads)
    full = profile == "full"
    datasets, absent = load_datasets(data, full)
    setting = Setting(
        datasets,
        absent if data is not None else [],
        torch.device("cpu"),
        full,
        threads,
        not quiet,
        pet_source,
    )
    origin = provenance(setting)
    for package in ("metatomic-torch", "metatomic-ase", "frame-averaging-pytorch"):
        if not tools.installed(package):
            origin["packages"][package] = version(package)
    start = time.perf_counter()
    result = run(setting, checkpoint)
    save(output, result, {**origin, "profile": profile, "seconds": round(time.perf_counter() - start, 1)})
    draw(result.records, figure or output / "field.svg")
    click.echo(result.text())
    click.echo(f"{time.perf_counter() - start:.0f} s; results in {output}")


def save(output: Path, result: Result, origin: dict[str, Any]) -> None:
    """``results.json`` and ``results.md``, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "provenance": origin,
        "parameters": result.parameters,
        "records": [{k: _rounded(v) for k, v in record.items()} for record in result.records],
        "notes": result.notes,
    }
    write_text(output / "results.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    packages = ", ".join(f"{name} {number}" for name, number in origin["packages"].items())
    threads = "1 thread" if origin["threads"] == 1 else f"{origin['threads']} threads"
    head = f"{origin['date'][:10]}; {origin['cores']} cores, {threads}, {origin['device']}; {packages}."
    notes = "".join(f"* {note}\n" for note in result.notes)
    write_text(output / "results.md", f"# {result.title}\n\n{head}\n\n{result.table()}\n\n{notes}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.field")
