"""Exported metatomic models, symmetrised from the file alone, beside metatomic's own average over a quadrature.

    python -m benchmarks.metatomic_models --model two.pt --local-model one.pt --structures test.xyz

Everything is measured in one run, each row in a process of its own (its peak memory is one of the numbers).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from ase import Atoms
from ase.io import read
from torch import Tensor

from benchmarks.memory import peak
from benchmarks.record import Column, Result, Setting, digits, fixed, provenance
from symmetrize.files import write_text

#: max_angular_momentum_grid of metatomic's SymmetrizedModel: 48, 416 and 1200 evaluations.
GRIDS = (3, 7, 11)
#: Atoms per call, for both.
CHUNK_SIZE = 1024
EPS = torch.finfo(torch.float64).eps

COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("scope", "scope"),
    Column("evaluations", "evaluations: mean", fixed(2)),
    Column("evaluations_max", "max"),
    Column("rotation_energy", "rotation: ΔE (meV)", digits(2)),
    Column("rotation_forces", "ΔF (meV/Å)", digits(2)),
    Column("inversion_energy", "inversion: ΔE (meV)", digits(2)),
    Column("inversion_forces", "ΔF (meV/Å)", digits(2)),
    Column("n_accuracy", "test set"),
    Column("mae_energy", "MAE E (meV)", fixed(2)),
    Column("change_energy", "change (%)", fixed(2)),
    Column("mae_forces", "MAE F (meV/Å)", fixed(2)),
    Column("change_forces", "change (%)", fixed(2)),
    Column("seconds", "time (ms)", lambda value: fixed(0)(1e3 * value)),
    Column("mebibytes", "memory (MiB)", fixed(1)),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="Exported model.")
@click.option("--local-model", type=click.Path(exists=True, path_type=Path), help="Exported, strictly local model.")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="PET checkpoint of metatrain of it.")
@click.option("--structures", type=click.Path(exists=True, path_type=Path), required=True, help="Extended XYZ.")
@click.option("--energy-key", default="energy_dft", show_default=True)
@click.option("--forces-key", default="forces_dft", show_default=True)
@click.option("--errors-on", default=6, show_default=True, help="Structures whose symmetry errors are measured.")
@click.option("--grid-errors-on", default=2, show_default=True, help="Likewise, for the quadratures.")
@click.option("--rotations", default=3, show_default=True, help="Random rotations of each.")
@click.option("--accuracy-on", default=450, show_default=True, help="Structures of the test set.")
@click.option("--grid-accuracy-on", default=10, show_default=True, help="Likewise, for the quadratures.")
@click.option("--threads", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/metatomic_models"), show_default=True)
@click.option("--figure", type=click.Path(path_type=Path), help="SVG; by default in the output folder.")
@click.option("--measure", hidden=True, help="One row, as JSON.")
def main(**options: Any) -> None:
    """Symmetry errors, accuracy, time and memory of exported models: bare, symmetrised here, averaged by metatomic."""
    if options["measure"] is not None:
        torch.set_num_threads(options["threads"])
        click.echo(json.dumps(_measure(json.loads(options["measure"]), options)))
        return
    two, one = {"model": "exported, several hops"}, {"model": "exported, one hop"}
    cases: list[dict[str, Any]] = [
        {**two, "method": "bare", "kind": "bare", "path": "model"},
        {**two, "method": "ECSE O(3)", "kind": "ecse", "path": "model", "scope": "structure"},
    ]
    cases += [
        {**two, "method": f"SymmetrizedModel, degree {grid}", "kind": "grid", "grid": grid, "path": "model"}
        for grid in GRIDS
    ]
    if options["local_model"] is not None:
        cases += [
            {**one, "method": "bare", "kind": "bare", "path": "local_model"},
            {**one, "method": "ECSE O(3)", "kind": "ecse", "path": "local_model", "scope": "atom"},
            {**one, "method": "ECSE O(3)", "kind": "ecse", "path": "local_model", "scope": "structure"},
        ]
    if options["checkpoint"] is not None:
        converted = {"model": "converted, one hop", "path": "checkpoint"}
        cases += [
            {**converted, "method": "bare", "kind": "bare"},
            {**converted, "method": "ECSE O(3)", "kind": "ecse", "scope": "atom"},
        ]
    setting = Setting({}, [], torch.device("cpu"), True, options["threads"], True)
    origin = provenance(setting)
    origin["packages"]["metatomic-torch"] = version("metatomic-torch")
    records = []
    for case in setting.bar(cases, "models"):
        records.append({**case, **_in_process(case)})
        _compare(records)
    result = Result("Exported metatomic models", records, COLUMNS, _parameters(options), _notes(options, records))
    _save(result, origin, options)
    click.echo(result.text())


def _in_process(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.metatomic_models", *sys.argv[1:], "--measure", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"a measurement failed ({case}):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _compare(records: list[dict[str, Any]]) -> None:
    """Change of the mean absolute errors over that of the bare model on the same structures, in percent."""
    last = records[-1]
    bare = next(record for record in records if record["path"] == last["path"] and record["kind"] == "bare")
    n = last["n_accuracy"]
    for what in ("energy", "forces"):
        errors, before = last[f"errors_{what}"], bare[f"errors_{what}"][:n]
        last[f"mae_{what}"] = 1e3 * sum(errors) / n
        last[f"change_{what}"] = 100 * (sum(errors) / sum(before) - 1) if last is not bare else None


def _symmetrizer(case: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """What is measured, and the bare model."""
    from symmetrize.backbones.metatomic import MetatomicBackbone, load

    from symmetrize import ECSE, Identity, Symmetrizer

    path = options[case["path"]]
    if case["path"] == "checkpoint":
        from symmetrize.backbones.pet.convert import convert

        # What the caller names on the command line is trusted.
        bare: Any = convert(path, trust_pickle=True, targets=["energy"], dtype=torch.float64)
    else:
        bare = load(path, ["energy"], dtype=torch.float64)
    if case["kind"] == "grid":
        from metatomic.torch.o3 import SymmetrizedModel

        batch_size = CHUNK_SIZE // 9
        wrapped = SymmetrizedModel.wrap(bare.model, max_angular_momentum_grid=case["grid"], batch_size=batch_size)
        # Through the same code as ours, but for the average.
        backbone = MetatomicBackbone(wrapped, bare.parts, hops=None, dtype=torch.float64)
        return Symmetrizer(backbone, Identity(), scope="structure"), bare
    method = ECSE() if case["kind"] == "ecse" else Identity()
    return Symmetrizer(bare, method, scope=case.get("scope", "structure"), chunk_size=CHUNK_SIZE), bare


def _measure(case: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    from symmetrize import Identity, Symmetrizer, from_ase

    limit = options["grid_accuracy_on"] if case["kind"] == "grid" else options["accuracy_on"]
    structures = read(options["structures"], f":{limit}")
    model, bare = _symmetrizer(case, options)
    single = from_ase(structures[:1])
    for _ in range(5):  # TorchScript optimizes in its first calls
        Symmetrizer(bare, Identity(), scope="structure")(single, forces=True)
    grid, before = case["kind"] == "grid", peak(torch.device("cpu"))
    model(single, forces=True)
    found: dict[str, Any] = {"mebibytes": peak(torch.device("cpu")) - before}
    found |= _evaluations(case, model, structures)
    n_errors = min(options["grid_errors_on"] if grid else options["errors_on"], limit)
    found |= _symmetry(model, structures[:n_errors], options["rotations"])
    energy, forces, times = [], [], []
    for atoms in structures[:20]:
        batch = from_ase([atoms])
        start = time.perf_counter()
        model(batch, forces=True)
        times.append(time.perf_counter() - start)
        if sum(times) > 30.0:
            break
    found["seconds"] = sorted(times)[len(times) // 2]
    size = 1 if grid else 50
    for first in range(0, len(structures), size):
        part = structures[first : first + size]
        out = model(from_ase(part), forces=True)
        stated = torch.tensor([atoms.info[options["energy_key"]] for atoms in part])
        energy += (out["energy"] - stated).abs().tolist()
        reference = torch.cat([torch.from_numpy(atoms.arrays[options["forces_key"]]) for atoms in part])
        rows = (out["forces"] - reference).abs().mean(dim=1).split([len(atoms) for atoms in part])
        forces += [float(row.mean()) for row in rows]
    return {**found, "n_accuracy": len(structures), "errors_energy": energy, "errors_forces": forces}


def _evaluations(case: dict[str, Any], model: Any, structures: list[Atoms]) -> dict[str, Any]:
    """Per molecule, or per atom in atom scope."""
    from symmetrize import from_ase

    if case["kind"] == "grid":
        buffers = dict(model.backbone.model.named_buffers())
        # Every rotation with and without inversion.
        n = 2 * next(len(value) for name, value in buffers.items() if name.endswith("_rotation_weights"))
        return {"evaluations": float(n), "evaluations_max": n, "scope": "structure"}
    with torch.no_grad():
        counts = torch.cat(
            [model.frames(from_ase(structures[k : k + 50])).evaluations for k in range(0, len(structures), 50)]
        )
    return {
        "evaluations": float(counts.double().mean()),
        "evaluations_max": int(counts.max()),
        "share_up_to_5": float((counts <= 5).double().mean()),
        "scope": model.scope,
    }


def _symmetry(model: Any, structures: list[Atoms], n_rotations: int) -> dict[str, float]:
    """Largest change of the energy, and of a force rotated back, under rotations and under inversion."""
    from symmetrize import from_ase
    from symmetrize.ops.rotations import random_rotations

    rotations = random_rotations(n_rotations, torch.Generator().manual_seed(0))
    elements = {"rotation": rotations, "inversion": -torch.eye(3, dtype=torch.float64)[None]}
    worst = {f"{kind}_{what}": 0.0 for kind in elements for what in ("energy", "forces")}
    scale = []
    for atoms in structures:
        before = model(from_ase([atoms]), forces=True)
        scale.append(before["forces"].square().sum(dim=1).mean())
        for kind, each in elements.items():
            for element in each:
                after = model(from_ase([_turned(atoms, element)]), forces=True)
                changes = {
                    "energy": (after["energy"] - before["energy"]).abs().max(),
                    "forces": (after["forces"] - before["forces"] @ element.T).norm(dim=1).max(),
                }
                for what, change in changes.items():
                    worst[f"{kind}_{what}"] = max(worst[f"{kind}_{what}"], 1e3 * float(change))
    rms = 1e3 * float(torch.stack(scale).mean().sqrt())
    return {
        **worst,
        "forces_rms": rms,
        "forces_over_eps": max(worst["rotation_forces"], worst["inversion_forces"]) / rms / EPS,
    }


def _turned(atoms: Atoms, element: Tensor) -> Atoms:
    out = atoms.copy()
    out.positions = atoms.positions @ element.T.numpy()
    return out


def _parameters(options: dict[str, Any]) -> dict[str, Any]:
    chosen = ("errors_on", "grid_errors_on", "rotations", "accuracy_on", "grid_accuracy_on", "threads")
    return {name: options[name] for name in chosen} | {
        "dtype": "float64",
        "chunk_size": CHUNK_SIZE,
        "degrees": list(GRIDS),
    }


def _notes(options: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    ours = next(record for record in records if record["kind"] == "ecse")
    return [
        "PETs trained by metatrain (recipes/), exported by it, in float64. In atom scope, evaluations are counted per "
        "atom, each of its environment; in structure scope per molecule.",
        f"{100 * ours['share_up_to_5']:.1f} % of {ours['n_accuracy']} molecules take at most 5 evaluations in "
        f"structure scope; on average {ours['evaluations']:.2f}.",
        f"Symmetry errors: largest over {options['errors_on']} molecules (quadratures: {options['grid_errors_on']}), "
        f"{options['rotations']} random rotations and inversion, all atoms; forces are derivatives of the averaged "
        "energy. In float64, a total energy of -4209 eV is resolved to 9e-10 meV. Forces of ECSE over the RMS force: "
        f"{ours['forces_over_eps']:.0f} eps.",
        "Test set: mean absolute errors, and their change over the bare model on the same structures.",
        f"Time (median) and memory (growth of the peak) of energy and forces of one molecule; threads: "
        f"{options['threads']}; calls of at most {CHUNK_SIZE} atoms. Other processes may have shared the cores.",
    ]


def _save(result: Result, origin: dict[str, Any], options: dict[str, Any]) -> None:
    folder = options["output"]
    folder.mkdir(parents=True, exist_ok=True)
    hidden = {"path", "kind", "errors_energy", "errors_forces"}
    rows = [{k: _rounded(v) for k, v in record.items() if k not in hidden} for record in result.records]
    content = {"provenance": origin, "parameters": result.parameters, "records": rows, "notes": result.notes}
    write_text(folder / "metatomic_models.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    head = f"{origin['date'][:10]}; {origin['cores']} cores, {origin['threads']} thread, CPU"
    head += f"; torch {origin['packages']['torch']}, metatomic-torch {origin['packages']['metatomic-torch']}."
    notes = "".join(f"* {note}\n" for note in result.notes)
    text = f"# Exported metatomic models\n\n{head}\n\n{result.table()}\n\n{notes}"
    write_text(folder / "metatomic_models.md", text)
    _draw(result.records, options["figure"] or folder / "metatomic_models.svg")


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _draw(records: list[dict[str, Any]], path: Path) -> None:
    """Error against evaluations, of the model whose range is several cutoffs."""
    from matplotlib.figure import Figure

    chosen = [record for record in records if record["path"] == "model"]
    styles = {
        "bare": ("#e07b24", "o", "bare"),
        "ecse": ("#179a6e", "D", "ECSE O(3)"),
        "grid": ("#4186d8", "s", "SymmetrizedModel"),
    }
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    for axes, what, unit in zip(figure.subplots(1, 2), ("energy", "forces"), ("meV", "meV/Å"), strict=True):
        for kind, (color, marker, label) in styles.items():
            rows = [record for record in chosen if record["kind"] == kind]
            x = [record["evaluations"] for record in rows]
            # An energy that does not change at all is shown at the resolution of the total energy.
            y = [max(r[f"rotation_{what}"], r[f"inversion_{what}"], 9e-10 if what == "energy" else 0.0) for r in rows]
            axes.loglog(x, y, marker + ("-" if kind == "grid" else ""), color=color, label=label, markersize=7)
        axes.set_xlabel("evaluations per molecule")
        axes.set_ylabel(f"largest error ({unit})")
        axes.set_title({"energy": "Energy", "forces": "Forces"}[what], loc="left", fontsize=11, fontweight="bold")
        axes.set_xlim(0.6, 3000)
        axes.grid(True, which="major", color="#d0d8e0", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=3, fontsize=9.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.metatomic_models")
