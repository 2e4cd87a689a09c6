"""What a training step through the symmetrisation costs, how much sampled frames vary, and the memory of all frames."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, load
from torch import Tensor
from torch_geometric.data import Batch

from benchmarks.datasets import BUNDLED
from benchmarks.memory import peak
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import in_turns
from symmetrize import keys
from symmetrize.training.composition import baseline_of
from symmetrize.training.config import SymmetrizeRecipe
from symmetrize.training.dataset import (
    TARGET_ENERGY,
    TARGET_FORCES,
    StructureTable,
    augment,
    generator_for,
    tabulate,
)
from symmetrize.training.drawn import DrawnFrames
from symmetrize.training.gradients import energy_and_forces
from symmetrize.training.symmetrized import (
    make_symmetrizer,
    sampled_energy_and_forces,
    symmetrized_energy_and_forces,
)

#: Structures that frames are drawn for ahead of the steps; their cost is shared by the steps.
N_STRUCTURES = 96
DRAWS = 12
UNBOUNDED = 10**9

COLUMNS = (
    Column("network", "network"),
    Column("batch_size", "structures"),
    Column("frames", "frames"),
    Column("relative", "time / bare step", fixed(2)),
    Column("relative_augmented", "time / augmented step", fixed(2)),
    Column("force_deviation", "force std. dev. (meV/Å)", digits(2)),
    Column("gradient_noise", "gradient noise / minibatch noise", digits(2)),
    Column("chunk_size", "chunk size"),
    Column("width", "D (Å)", str),
    Column("evaluations", "evaluations", fixed(1)),
    Column("mebibytes", "memory (MiB)", digits(3)),
)

WITH, WITHOUT = "1 sampled frame, with score", "1 sampled frame, without"

EVERY = SymmetrizeRecipe().score_every

Step = Callable[[int], tuple[Tensor, Tensor, Batch]]


def run(setting: Setting) -> Result:
    """Ethanol, float32: a step is energies, forces, and the gradient of a loss of both."""
    structures = setting.datasets[BUNDLED][:N_STRUCTURES]
    cases = [("ethanol", "PET, 1 block, trained", 8), ("ethanol", "PET, 1 block, trained", 32)]
    cases += [("ethanol-2block", "PET, 2 blocks, trained", 8)]
    records = []
    for weights, network, batch_size in setting.bar(cases, "training"):
        records += _steps(setting, structures, weights, network, batch_size)
    chunks: list[tuple[int, float]] = [(128, 0.15), (128, 0.6), (UNBOUNDED, 0.15), (UNBOUNDED, 0.6)]
    for chunk_size, width in setting.bar(chunks, "memory"):
        records.append(_in_process(setting, chunk_size, width))
    rounds = _rounds(setting)
    notes = [
        "Time: one step (batch, energies, forces, gradient of the loss), least of "
        f"{rounds} rounds in turns (on a CPU, the processor's time), over that of the bare backbone without and with "
        f"random orientations. One sampled frame: one step in {EVERY}, at random, with the score. "
        "Sampled: "
        f"drawing frames and their derivatives included, a {N_STRUCTURES}th of the time for {N_STRUCTURES} structures.",
        "Force std. dev.: of one estimate about its mean, RMS over force components; one block: a frame for each atom, "
        "two blocks: a frame for each structure. Gradient noise: standard deviation of the gradient of the loss over "
        f"{DRAWS} draws (or orientations), same structures, over that between minibatches.",
        "Memory: growth of the peak of a fresh process during a step over all frames of 8 ethanols (one block), after "
        "a small one. Larger D: more frames. Chunk size: atoms in one call, copies included; -1: everything at once.",
    ]
    return Result("Training", records, COLUMNS, {"group": "O(3)", "dtype": "float32", "n_rounds": rounds}, notes)


def _rounds(setting: Setting) -> int:
    return 25 if setting.full else 6


def _steps(
    setting: Setting, structures: list[Atoms], weights: str, network: str, batch_size: int
) -> list[dict[str, Any]]:
    backbone = load(weights).train().requires_grad_(True).to(setting.device)
    table, baseline = _table(backbone, structures)
    everything, picked = list(range(len(table))), list(range(batch_size))
    model = make_symmetrizer(backbone, SymmetrizeRecipe(frames="all"))
    sources = {n: DrawnFrames(table, model, SymmetrizeRecipe(n_samples=n), (0,)) for n in (1, 2)}

    def bare(seed: int, chosen: list[int] = picked) -> tuple[Tensor, Tensor, Batch]:
        batch = table.select(torch.tensor(chosen), torch.float32, baseline).to(setting.device)
        return *energy_and_forces(backbone, batch, create_graph=True), batch

    def augmented(seed: int) -> tuple[Tensor, Tensor, Batch]:
        batch = table.select(torch.tensor(picked), torch.float32, baseline)
        batch = augment(batch, generator_for(seed)).to(setting.device)
        return *energy_and_forces(backbone, batch, create_graph=True), batch

    def everywhere(seed: int) -> tuple[Tensor, Tensor, Batch]:
        batch = table.select(torch.tensor(picked), torch.float32, baseline).to(setting.device)
        return *symmetrized_energy_and_forces(model, batch, create_graph=True), batch

    def sampled(n_samples: int, score: float = 1.0) -> Step:
        def step(seed: int) -> tuple[Tensor, Tensor, Batch]:
            batch = sources[n_samples].select(picked, torch.float32, baseline, seed, everything).to(setting.device)
            found = sampled_energy_and_forces(backbone, batch, model.scope, n_samples, create_graph=True, score=score)
            return *found, batch

        return step

    steps: dict[str, Step] = {
        "bare": bare,
        "bare, augmented": augmented,
        WITH: sampled(1, float(EVERY)),
        WITHOUT: sampled(1, 0.0),
        "2 sampled frames": sampled(2),
        "all frames": everywhere,
    }
    functions: dict[str, Callable[[], object]] = {
        name: lambda step=step: _gradient(backbone, *step(0))
        for name, step in steps.items()  # type: ignore[misc]
    }
    # A new epoch: all frames are drawn again.
    epoch = iter(range(1, 10**6))
    for n, source in sources.items():
        functions[f"drawing {n}"] = lambda n=n, source=source: source.select(  # type: ignore[misc]
            picked, torch.float32, baseline, next(epoch), everything
        )
        functions[f"chosen {n}"] = lambda n=n, source=source: source.select(  # type: ignore[misc]
            picked, torch.float32, baseline, source._epoch, everything
        )
    for source in sources.values():
        source.select(picked, torch.float32, baseline, 0, everything)
    order = ["drawing 1", "chosen 1", "drawing 2", "chosen 2"]
    # A step at epoch 0 after `drawing` would draw anew: time the steps first, then the drawing.
    times = _in_turns(setting, {name: functions[name] for name in steps})
    ahead = _in_turns(setting, {name: functions[name] for name in order})
    minibatches = [_gradient(backbone, *bare(0, everything[k : k + batch_size])) for k in _starts(batch_size)]
    between = _deviation(torch.stack(minibatches))
    # A training step is one or the other at random.
    times["1 sampled frame"] = (times[WITH] + (EVERY - 1) * times[WITHOUT]) / EVERY
    steps["1 sampled frame"] = lambda seed: steps[WITHOUT if seed % EVERY else WITH](seed)
    records = []
    for name, step in steps.items():
        seconds = times[name]
        drawing = 0.0
        for n in (1, 2):
            if name.startswith(f"{n} sampled"):
                drawing = max(0.0, ahead[f"drawing {n}"] - ahead[f"chosen {n}"])
        seconds += drawing * batch_size / N_STRUCTURES
        record = {
            "network": network,
            "batch_size": batch_size,
            "frames": name,
            "seconds": seconds,
            "seconds_drawing": drawing,
            "relative": seconds / times["bare"],
            "relative_augmented": seconds / times["bare, augmented"],
        }
        if name not in ("bare", "all frames"):
            found = [step(seed) for seed in range(1, DRAWS + 1)]
            gradients = torch.stack([_gradient(backbone, *each) for each in found])
            record["gradient_noise"] = _deviation(gradients) / between
            if "sampled" in name:
                forces = torch.stack([each[1].detach() for each in found])
                record["force_deviation"] = 1e3 * float(forces.var(dim=0).mean().sqrt())
        records.append(record)
    return records


def _in_turns(setting: Setting, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each function: of this process on a CPU, which others do not add to."""
    if setting.device.type != "cpu":
        times = in_turns(functions, _rounds(setting), setting.device)
        return {name: times.seconds(name) for name in functions}
    least = dict.fromkeys(functions, float("inf"))
    for n in range(_rounds(setting) + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if n:
                least[name] = min(least[name], time.process_time() - start)
    return least


def _starts(batch_size: int) -> range:
    """First structures of some minibatches, which overlap where there are too few structures."""
    return range(0, N_STRUCTURES - batch_size + 1, max(1, min(batch_size, (N_STRUCTURES - batch_size) // DRAWS)))


def _table(backbone: PET, structures: list[Atoms]) -> tuple[StructureTable, Tensor]:
    table = tabulate(structures, backbone.cutoff, "energy", "forces")
    return table, baseline_of(table, backbone.composition.detach().cpu().to(torch.float64), (1, 6, 8))


def _gradient(backbone: PET, energy: Tensor, forces: Tensor, batch: Batch) -> Tensor:
    """Gradient of the loss of the shipped recipes: all parameters in one row."""
    scale, n_atoms = float(backbone.scale), batch[keys.PTR].diff()[: energy.shape[0]]
    energy_error = (energy - batch[TARGET_ENERGY][: energy.shape[0]]) / (n_atoms * scale)
    force_error = (forces - batch[TARGET_FORCES][: forces.shape[0]]) / scale
    loss = 5.0 * energy_error.abs().mean() + (force_error.square().sum(dim=1) + 1e-12).sqrt().mean()
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.reshape(-1) for g in found if g is not None])


def _deviation(gradients: Tensor) -> float:
    return float(gradients.var(dim=0).sum().sqrt())


def _in_process(setting: Setting, chunk_size: int, width: float) -> dict[str, Any]:
    options = {"chunk_size": chunk_size, "width": width, "device": str(setting.device), "threads": setting.threads}
    command = [sys.executable, "-m", "benchmarks.training", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training: a measurement failed ({options}):\n{done.stderr}")
    shown = -1 if chunk_size == UNBOUNDED else chunk_size
    case = {"network": "PET, 1 block, trained", "batch_size": 8, "frames": "all frames"}
    return {**case, "chunk_size": shown, "width": width, **json.loads(done.stdout.splitlines()[-1])}


def _measure(options: dict[str, Any]) -> dict[str, float]:
    from benchmarks.datasets import load as load_data

    torch.set_num_threads(options["threads"])
    device = torch.device(options["device"])
    structures = load_data(None, False)[0][BUNDLED][:8]
    backbone = load("ethanol").train().requires_grad_(True).to(device)
    table, baseline = _table(backbone, structures)

    def step(n_structures: int, chunk_size: int) -> float:
        settings = SymmetrizeRecipe(frames="all", chunk_size=chunk_size, options={"cutoff_width": options["width"]})
        model = make_symmetrizer(backbone, settings)
        batch = table.select(torch.arange(n_structures), torch.float32, baseline).to(device)
        _gradient(backbone, *symmetrized_energy_and_forces(model, batch, create_graph=True), batch)
        return model.frames(batch).n_evaluations / batch[keys.POS].shape[0]

    step(1, 16)
    before = peak(device)
    evaluations = step(8, options["chunk_size"])
    return {"mebibytes": peak(device) - before, "mebibytes_before": before, "evaluations": evaluations}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
