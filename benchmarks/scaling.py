"""Time against the number of atoms, in atom scope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, load

from benchmarks.datasets import BUNDLED
from benchmarks.overhead import random_pet
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import bare_forces, in_turns
from symmetrize import ECSE, Symmetrizer, from_ase

GROUP = "O(3)"
#: Between molecules of the gas, angstrom: they do not see each other.
SPACING = 14.0

COLUMNS = (
    Column("system", "system"),
    Column("n_atoms", "atoms"),
    Column("seconds", "symmetrised E+F (s)", digits(3)),
    Column("per_atom", "per atom (ms)", digits(3)),
    Column("slowdown", "symmetrised / bare", fixed(2)),
    Column("evaluations", "evaluations", fixed(2)),
    Column("exponent", "local exponent", fixed(2)),
)


def run(setting: Setting) -> Result:
    """Energy and forces of one structure of growing size."""
    series = [("ethanol gas", _gases(setting), load("ethanol").requires_grad_(False))]
    if "water" in setting.datasets:
        waters = _supercells(setting.datasets["water"][0], (1, 2, 4, 8) if setting.full else (1, 2, 4))
        series.append(("water", waters, random_pet(waters[:1])))
    sizes = [(name, atoms, backbone) for name, structures, backbone in series for atoms in structures]
    records = [_record(setting, *case) for case in setting.bar(sizes, "scaling")]
    notes = ["One structure, one-block PET (float32), O(3), atom scope. Local exponent: from the size before."]
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


def _supercells(atoms: Atoms, factors: Sequence[int]) -> list[Atoms]:
    return [atoms.repeat([2 if factor > 2**axis else 1 for axis in range(3)]) for factor in factors]


def _record(setting: Setting, name: str, atoms: Atoms, backbone: PET) -> dict[str, Any]:
    model = Symmetrizer(backbone, ECSE(), group=GROUP, scope="atom").eval().to(setting.device)
    batch = from_ase(atoms, dtype=torch.float32).to(setting.device)
    functions = {"bare": lambda: bare_forces(backbone, batch), "symmetrised": lambda: model(batch, forces=True)}
    times = in_turns(functions, 9 if setting.full else 4, setting.device)
    return {
        "system": name,
        "n_atoms": len(atoms),
        "seconds": times.seconds("symmetrised"),
        "seconds_bare": times.seconds("bare"),
        "per_atom": 1000.0 * times.seconds("symmetrised") / len(atoms),
        "slowdown": times.ratio("symmetrised", "bare"),
        "evaluations": model.explain(batch).evaluations_mean,
    }


def _exponent(records: Sequence[dict[str, Any]], key: str) -> float:
    x = np.log([record["n_atoms"] for record in records])
    y = np.log([record[key] for record in records])
    return float(np.polyfit(x, y, 1)[0])
