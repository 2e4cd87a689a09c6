"""Time and memory against the number of atoms, in atom scope."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, load

from benchmarks.datasets import BUNDLED
from benchmarks.datasets import load as load_data
from benchmarks.memory import peak
from benchmarks.overhead import random_pet
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import bare_forces, in_turns
from symmetrize import ECSE, Symmetrizer, from_ase

GROUP = "O(3)"
#: Between molecules of the gas, angstrom: they do not see each other.
SPACING = 14.0
#: Repetitions of the box of 192 atoms: 12288 atoms, and in the long profile 110592.
FULL, SMALL, LONG = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8), 576

COLUMNS = (
    Column("system", "system"),
    Column("n_atoms", "atoms"),
    Column("seconds", "symmetrised E+F (s)", digits(3)),
    Column("per_atom", "per atom (ms)", digits(3)),
    Column("slowdown", "symmetrised / bare", fixed(2)),
    Column("evaluations", "evaluations", fixed(2)),
    Column("exponent", "local exponent", fixed(2)),
    Column("mebibytes", "memory (MiB)", digits(3)),
)


def run(setting: Setting) -> Result:
    """Energy and forces of one structure of growing size."""
    series = [("ethanol gas", _gases(setting), load("ethanol").requires_grad_(False))]
    if "water" in setting.datasets:
        waters = [_supercell(setting.datasets["water"][0], n) for n in (FULL if setting.full else SMALL)]
        series.append(("water", waters, random_pet(waters[:1])))
    records = []
    for name, structures, backbone in series:
        records += _timed(setting, name, structures, backbone)
    if "water" in setting.datasets:
        for record in (r for r in records if r["system"] == "water"):
            found = in_process(setting, record["n_atoms"] // len(setting.datasets["water"][0]))
            record["mebibytes"] = found["mebibytes"]
    notes = [
        "One structure, one-block PET (float32), O(3), atom scope. Local exponent: from the size before. All sizes of "
        "a system are timed in turns; memory: growth of the peak resident size of a fresh process (on a GPU: peak "
        "allocated) over that after a box of 192 atoms."
    ]
    for name, _, _ in series:
        own = [r for r in records if r["system"] == name]
        for before, record in pairwise(own):
            record["exponent"] = _exponent([before, record], "seconds")
        overall, bare = _exponent(own, "seconds"), _exponent(own, "seconds_bare")
        notes.append(f"{name}: time ~ atoms^{overall:.2f} over the whole series (bare: ^{bare:.2f}).")
    return Result("Scaling", records, COLUMNS, {"group": GROUP, "scope": "atom", "dtype": "float32"}, notes)


def _gases(setting: Setting) -> list[Atoms]:
    molecules = setting.datasets[BUNDLED]
    counts = (8, 16, 32, 64, 128, 256, 512) if setting.full else (8, 32, 128, 256)
    return [_gas(molecules, n) for n in counts]


def _gas(molecules: Sequence[Atoms], n: int) -> Atoms:
    side = math.ceil(n ** (1 / 3))
    gas = Atoms()
    for k in range(n):
        molecule = molecules[k % len(molecules)].copy()
        place = SPACING * np.array([k // side**2, k // side % side, k % side])
        molecule.positions += place - molecule.positions.mean(axis=0)
        gas += molecule
    gas.pbc = False
    return gas


def _supercell(atoms: Atoms, n: int) -> Atoms:
    """As nearly cubic as possible. Its atoms are moved a little, so that no two boxes are alike."""
    factors = [(a, b, n // a // b) for a in range(1, n + 1) for b in range(1, n + 1) if n % (a * b) == 0]
    best = min(factors, key=sum)
    repeated = atoms.repeat(best)
    repeated.rattle(0.01, seed=n)
    return repeated


def _timed(setting: Setting, name: str, structures: list[Atoms], backbone: PET) -> list[dict[str, Any]]:
    model = Symmetrizer(backbone, ECSE(), group=GROUP, scope="atom").eval().to(setting.device)
    batches = [from_ase(atoms, dtype=torch.float32).to(setting.device) for atoms in structures]
    functions = {}
    for n, batch in enumerate(batches):
        functions[f"bare {n}"] = lambda batch=batch: bare_forces(backbone, batch)
        functions[f"symmetrised {n}"] = lambda batch=batch: model(batch, forces=True)
    # The large ones take long, and are less sensitive to what else happens.
    times = in_turns(functions, 3 if setting.full else 4, setting.device)
    return [
        {
            "system": name,
            "n_atoms": len(atoms),
            "seconds": times.seconds(f"symmetrised {n}"),
            "seconds_bare": times.seconds(f"bare {n}"),
            "per_atom": 1000.0 * times.seconds(f"symmetrised {n}") / len(atoms),
            "slowdown": times.ratio(f"symmetrised {n}", f"bare {n}"),
            "evaluations": model.explain(batch).evaluations_mean,
        }
        for n, (atoms, batch) in enumerate(zip(structures, batches, strict=True))
    ]


def _exponent(records: Sequence[dict[str, Any]], key: str) -> float:
    x = np.log([record["n_atoms"] for record in records])
    y = np.log([record[key] for record in records])
    return float(np.polyfit(x, y, 1)[0])


def in_process(setting: Setting, n_boxes: int) -> dict[str, float]:
    """Seconds and memory of one evaluation of so many boxes of water, in a fresh process."""
    atoms = setting.datasets["water"][0]
    water = {"z": atoms.numbers.tolist(), "pos": atoms.positions.tolist(), "cell": atoms.cell.tolist()}
    options = {"water": water, "n": n_boxes, "device": str(setting.device), "threads": setting.threads}
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure"]
    done = subprocess.run(command, input=json.dumps(options), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"scaling: a measurement failed ({n_boxes} boxes):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(options["threads"])
    device, water = torch.device(options["device"]), options["water"]
    box = Atoms(numbers=water["z"], positions=water["pos"], cell=water["cell"], pbc=True)
    model = Symmetrizer(random_pet([box]), ECSE(), group=GROUP, scope="atom").eval().to(device)
    model(from_ase(box, dtype=torch.float32).to(device), forces=True)
    before = peak(device)
    batch = from_ase(_supercell(box, options["n"]), dtype=torch.float32).to(device)
    start, busy = time.perf_counter(), time.process_time()
    out = model(batch, forces=True)
    return {
        "n_atoms": len(batch.pos),
        "energy": float(out["energy"]),
        "force": float(out["forces"].double().square().mean().sqrt()),
        "seconds": time.perf_counter() - start,
        "seconds_busy": time.process_time() - busy,
        "mebibytes": peak(device) - before,
        "mebibytes_total": peak(device),
    }


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False), help="Folder with public data sets.")
@click.option("--boxes", default=LONG, show_default=True, help="Boxes of 192 atoms.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--measure", is_flag=True, hidden=True)
def main(data: str | None, boxes: int, device: str, threads: int, measure: bool) -> None:
    """The long profile: energy and forces of 110592 atoms of water, in a process of its own."""
    if measure:
        click.echo(json.dumps(_measure(json.load(sys.stdin))))
        return
    if data is None:
        raise click.UsageError("--data: the box of water is not bundled, see benchmarks/README.md")
    datasets, absent = load_data(Path(data), False)
    if "water" not in datasets:
        raise click.ClickException(f"not found in {data}: {', '.join(absent)}")
    setting = Setting(datasets, absent, torch.device(device), True, threads, False)
    for n in (1, boxes):
        click.echo(json.dumps(in_process(setting, n)))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.scaling")
