"""Peak memory against the number of frames, each measurement in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from symmetrize.backbones.pet import load
from torch_geometric.data import Data
from tqdm import tqdm

from benchmarks.record import Column, Result, Setting, digits, fixed
from symmetrize import FrameMethod, FrameSet, Symmetrizer, from_ase, keys
from symmetrize.frames import Scope, Stratum
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import geometries

#: Molecules, and atoms per call: such that the fewest frames fill more than one call in either scope.
N_MOLECULES, CHUNK_SIZE = 8, 512
#: Everything in one call.
UNBOUNDED = 10**9

#: Memory is compared to that of so many frames.
FILLED = 8

COLUMNS = (
    Column("task", "task"),
    Column("scope", "scope"),
    Column("chunks", "calls"),
    Column("n_frames", "frames"),
    Column("mebibytes", "memory (MiB)", digits(3)),
    Column("relative", f"over that of {FILLED} frames in many calls", fixed(2)),
    Column("seconds", "time (s)", digits(2)),
)


class RandomFrames(FrameMethod):
    """Random rotations of equal weight: any number of frames, which costs nothing to find."""

    def __init__(self, n_frames: int) -> None:
        super().__init__()
        self.n_frames = n_frames

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`."""
        pos = batch[keys.POS]
        n_owners = pos.shape[0] if scope == "atom" else batch[keys.PTR].shape[0] - 1
        origins = pos if scope == "atom" else segment_sum(pos, batch[keys.BATCH], n_owners) / (len(pos) / n_owners)
        owner = torch.arange(n_owners, device=pos.device).repeat_interleave(self.n_frames)
        rotations = random_rotations(len(owner), generator=torch.Generator().manual_seed(0)).to(pos.device)
        return FrameSet(
            rotations=rotations,
            weights=torch.ones(len(owner), dtype=torch.float64, device=pos.device),
            owner=owner,
            stratum=torch.full_like(owner, int(Stratum.FRAME)),
            origins=origins[owner],
            n_owners=n_owners,
            scope=scope,
        )


def run(setting: Setting) -> Result:
    """Energy and forces, and a training step on both, of some ethanols."""
    counts = (8, 16, 32, 64, 128, 256, 512) if setting.full else (8, 64, 512)
    cases: list[dict[str, Any]] = []
    for scope in ("structure", "atom"):
        for task in ("forces", "training on forces"):
            cases += [_case(task, scope, CHUNK_SIZE, n) for n in counts]
            # What would be used without chunks, for comparison.
            cases += [_case(task, scope, UNBOUNDED, n) for n in (FILLED, 64)]
    workers = 1 if setting.device.type == "cuda" else min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        measured = pool.map(lambda case: _in_process(setting, case), cases)
        records = list(tqdm(measured, "memory", len(cases), disable=not setting.progress, leave=False))
    notes = [
        f"Of {N_MOLECULES} ethanols, float32: one-block PET in atom scope (so many frames for every atom), two-block "
        f"PET in structure scope. Many: at most {CHUNK_SIZE} atoms per call, copies included; one: everything at once.",
        "Memory: growth of the peak resident size of a fresh process over that after importing everything and one "
        "small warm-up (on a GPU: peak allocated)."
        + (f" {workers} processes at a time: their times are for orientation only." if workers > 1 else ""),
    ]
    filled = {(r["task"], r["scope"]): r for r in records if r["chunks"] == "many" and r["n_frames"] == FILLED}
    for record in records:
        record["relative"] = record["mebibytes"] / max(filled[record["task"], record["scope"]]["mebibytes"], 1e-9)
    for (task, scope), first in filled.items():
        last = max(
            (r for r in records if (r["task"], r["scope"], r["chunks"]) == (task, scope, "many")),
            key=lambda r: r["n_frames"],
        )
        owners = N_MOLECULES * (9 if scope == "atom" else 1)
        grown = 2**20 * (last["mebibytes"] - first["mebibytes"]) / (owners * (last["n_frames"] - first["n_frames"]))
        notes.append(
            f"{task}, {scope} scope: what grows is {grown:.0f} bytes for each frame: its rotation, origin, weight and "
            "owner, their gradients, and its place in a call; the backbone's part is that of one call."
        )
    return Result("Memory", records, COLUMNS, {"chunk_size": CHUNK_SIZE, "dtype": "float32"}, notes)


def _case(task: str, scope: str, chunk_size: int, n_frames: int) -> dict[str, Any]:
    return {"task": task, "scope": scope, "chunk_size": chunk_size, "n_frames": n_frames}


def _in_process(setting: Setting, case: dict[str, Any]) -> dict[str, Any]:
    options = {**case, "device": str(setting.device), "threads": setting.threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory: a measurement failed ({case}):\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    chunks = "one" if case["chunk_size"] == UNBOUNDED else "many"
    return {**case, "chunks": chunks, **found}


def _measure(options: dict[str, Any]) -> dict[str, float]:
    import time

    torch.set_num_threads(options["threads"])
    device, scope = torch.device(options["device"]), options["scope"]
    training = options["task"] != "forces"
    backbone = load("ethanol" if scope == "atom" else "ethanol-2block").requires_grad_(training).to(device)
    molecules = [geometries()["ethanol"] for _ in range(N_MOLECULES)]
    for n, molecule in enumerate(molecules):
        molecule.rattle(0.05, seed=n)  # equal ones would be evaluated once
    batch = from_ase(molecules, dtype=torch.float32).to(device)

    def evaluate(n_frames: int, chunk_size: int) -> None:
        model = Symmetrizer(backbone, RandomFrames(n_frames), scope=scope, chunk_size=chunk_size)
        model.train(training)
        out = model(batch, forces=True)
        if training:
            (out["energy"].square().sum() + out["forces"].square().sum()).backward()
            model.zero_grad(set_to_none=True)

    evaluate(1, 16)
    before = peak(device)
    start = time.perf_counter()
    evaluate(options["n_frames"], options["chunk_size"])
    seconds = time.perf_counter() - start
    return {"mebibytes": peak(device) - before, "mebibytes_before": before, "seconds": seconds}


def peak(device: torch.device) -> float:
    """Largest memory of this process so far, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # Not from getrusage, whose peak on Linux starts at that of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
