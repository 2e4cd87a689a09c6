"""What it costs: recorded, never judged."""

from __future__ import annotations

import sys
import time

import torch
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.testing.measuring.elements import copied
from symmetrize.testing.measuring.scales import Model
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome


def _peak() -> float:
    """Largest resident memory of this process so far, MiB; 0 where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2.0**20


@check("Cost", claim=None, judged=False, cost=lambda bench, on: 6 * bench.main.n_structures)
def check_cost(bench: Bench, on: str) -> Outcome:
    """Time and memory of an evaluation, and their ratio to the model without symmetrisation.

    When it fails: this is recorded and cannot fail.

    Number: the shortest of three evaluations of the main structures as one batch, per atom; memory is how far that
    raised the peak of the process (of the device, on CUDA).
    """
    found, subject = bench.main, bench.subject
    n_atoms = found.batch[keys.POS].shape[0]
    cuda = found.batch[keys.POS].device.type == "cuda"
    before = _peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = _shortest(bench.model, found.batch)
    out = [
        Finding("time per atom", 1e3 * seconds / n_atoms, unit="ms"),
        Finding("time per evaluation of all", 1e3 * seconds, unit="ms"),
    ]
    if cuda:
        out.append(Finding("peak memory of the device", torch.cuda.max_memory_allocated() / 2.0**20, unit="MiB"))
    else:
        out.append(Finding("growth of the peak memory", max(0.0, _peak() - before), unit="MiB"))
    if subject.bare is not None:
        bare = _shortest(subject.bare, found.batch)
        out.append(Finding("time over the bare model's", seconds / bare, unit="times"))
    if subject.symmetrizer is not None:
        with torch.no_grad():
            frames = subject.symmetrizer.frames(found.batch)
        per = frames.n_evaluations / frames.n_owners
        out.append(Finding(f"evaluations per {subject.symmetrizer.scope}", per, unit="evaluations"))
    return Outcome(
        tuple(out), note=f"{n_atoms} atoms in {found.n_structures} structures, {torch.get_num_threads()} threads"
    )


def _shortest(model: Model, batch: Batch) -> float:
    times = []
    for _ in range(3):
        given = copied(batch)
        start = time.perf_counter()
        model(given)
        if given[keys.POS].device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
