"""Energies and forces with ``Symmetrizer.compile``, against the same model without it."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from symmetrize.backbones.pet import PET, PETConfig

from benchmarks.datasets import BUNDLED
from benchmarks.record import Column, Result, Setting, digits
from benchmarks.timing import in_turns
from symmetrize import ECSE, Symmetrizer, from_ase

#: PET as it is by default, and in the size that metatrain has by default.
NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "large": {"d_pet": 128, "d_node": 256, "d_head": 128, "d_feedforward": 256, "num_heads": 8, "num_gnn_layers": 2},
}

COLUMNS = (
    Column("network", "network"),
    Column("n_molecules", "molecules"),
    Column("seconds_eager", "eager (s)", digits(3)),
    Column("seconds_compiled", "compiled (s)", digits(3)),
    Column("ratio", "compiled / eager", digits(3)),
    Column("compilation", "compilation (s)", digits(3)),
    Column("difference", "largest difference of forces", digits(2)),
)


def run(setting: Setting) -> Result:
    """Energy and forces of batches of molecules, in float32."""
    full = setting.full
    rounds, sizes = (7, (1, 8)) if full else (3, (1,))
    records = []
    for name in NETWORKS if full else ("default",):
        species = tuple(sorted({int(z) for atoms in setting.datasets[BUNDLED] for z in atoms.numbers}))
        eager = Symmetrizer(PET(PETConfig(species, **NETWORKS[name])).float(), ECSE()).to(setting.device).eval()
        compiled = copy.deepcopy(eager)
        compiled.compile()
        for size in sizes:
            atoms = setting.datasets[BUNDLED][:size]
            batch = from_ase(atoms, dtype=torch.float32).to(setting.device)
            start = time.perf_counter()
            first = compiled(batch, forces=True)["forces"]
            once = time.perf_counter() - start
            expected = eager(batch, forces=True)["forces"]
            times = in_turns(
                {
                    "eager": lambda batch=batch, model=eager: model(batch, forces=True),
                    "compiled": lambda batch=batch, model=compiled: model(batch, forces=True),
                },
                rounds,
                setting.device,
            )
            records.append(
                {
                    "network": name,
                    "n_molecules": size,
                    "seconds_eager": times.seconds("eager"),
                    "seconds_compiled": times.seconds("compiled"),
                    "ratio": times.ratio("compiled", "eager"),
                    "compilation": once - times.seconds("compiled"),
                    "difference": float((first - expected).abs().max() / expected.abs().max()),
                }
            )
    notes = ["Compilation: what the first call takes longer; sizes that come later reuse the code."]
    return Result("Compiled inference", records, COLUMNS, {"rounds": rounds, "dtype": "float32"}, notes)
