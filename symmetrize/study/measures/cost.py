"""What symmetrisation costs: evaluations of the backbone, time and memory."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.errors import CostWarning
from symmetrize.study.measures.common import size_of
from symmetrize.study.prepared import PreparedCell
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing.measuring.elements import copied


def cost(cell: PreparedCell) -> dict[str, Any]:
    """Backbone evaluations, and processor time and memory as ratios to the bare model in this process.

    Of energies and forces (outputs alone, where there is no energy) of the first structures as one batch. The two
    models take turns, and the shortest processor time of several rounds counts for each. Memory is the largest sum of
    the tensors that are alive at one time during an evaluation, less those that were there before it: as torch's
    allocator counts it on a CPU (through the profiler, so that it is the same every time, and holds neither Python
    objects nor what libraries allocate for themselves), and as ``torch.cuda.max_memory_allocated`` says on a GPU.

    Returns
    -------
    dict
        ``"evaluations_per_structure"``: in structure scope of the whole structure, in atom scope environments of all
        its atoms; ``"evaluations_per_center"``: how many times the backbone looks at an atom; ``"evaluations_max"``: of
        any owner (atom or structure); ``"time_ratio"``, ``"seconds_bare"`` (of a batch), ``"peak_memory_ratio"``,
        ``"peak_memory_mib"``, ``"n_structures"``, ``"n_atoms"``, ``"threads"``.
    """
    batch = cell.batch(max(1, size_of(cell, "structures")))
    n_structures, n_atoms = batch[keys.PTR].shape[0] - 1, batch[keys.POS].shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)  # what it costs is measured here
        plan = cell.model.explain(batch)
    shortest = {"bare": float("inf"), "symmetrized": float("inf")}
    models = {"bare": cell.bare, "symmetrized": cell.model}
    for model in models.values():
        _evaluate(cell, model, batch)  # what is made once is not counted
    for _ in range(max(1, size_of(cell, "repeats"))):
        for label, model in models.items():
            start = time.process_time()
            _evaluate(cell, model, batch)
            shortest[label] = min(shortest[label], time.process_time() - start)
    memory = {label: _peak_memory(cell, model, batch) for label, model in models.items()}
    return {
        "evaluations_per_structure": plan.n_evaluations / n_structures,
        "evaluations_per_center": plan.n_evaluations / (n_atoms if cell.model.scope == "atom" else n_structures),
        "evaluations_max": plan.evaluations_max,
        "time_ratio": shortest["symmetrized"] / shortest["bare"],
        "seconds_bare": shortest["bare"],
        "peak_memory_ratio": memory["symmetrized"] / memory["bare"] if memory["bare"] else math.nan,
        "peak_memory_mib": memory["symmetrized"] / 2**20,
        "n_structures": n_structures,
        "n_atoms": n_atoms,
        "threads": torch.get_num_threads(),
    }


def _evaluate(cell: PreparedCell, model: Symmetrizer, batch: Batch) -> None:
    forces = cell.energy is not None and "forces" not in cell.outputs
    with torch.set_grad_enabled(forces):
        model(copied(batch), forces=forces, energy=cell.energy or "energy", create_graph=False)
    if batch[keys.POS].device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(cell: PreparedCell, model: Symmetrizer, batch: Batch) -> float:
    """Bytes of tensors alive at one time, less those alive at the start; NaN where torch does not say."""
    if batch[keys.POS].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _evaluate(cell, model, batch)
        return float(torch.cuda.max_memory_allocated() - before)
    # It would announce itself on the terminal.
    quiet = os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler:
        _evaluate(cell, model, batch)
    if quiet == "99":
        os.environ.pop("KINETO_LOG_LEVEL", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    alive = peak = 0
    for _, size in steps:
        alive += size
        peak = max(peak, alive)
    return float(peak) if steps else math.nan
