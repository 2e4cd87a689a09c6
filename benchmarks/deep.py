"""Deep networks in periodic matter: what K layers of message passing cost in atom scope, and what alternatives lose.

An output depends on an environment of K hops, and every atom's environment is evaluated in frames of its own. Counted:
atoms and edges of the copies; measured: time relative to one bare evaluation; for comparison, averaging the whole box
over fixed orientations, which costs as many bare evaluations as there are, and leaves a residual.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from symmetrize.backbones.pet import PET, PETConfig
from torch import Tensor

from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import bare_forces
from symmetrize import ECSE, GroupAveraging, Symmetrizer, from_ase, keys
from symmetrize.data import validate, with_neighbors
from symmetrize.errors import CostWarning
from symmetrize.ops.quadrature import rotation_quadrature
from symmetrize.ops.rotations import random_rotations

GROUP = "O(3)"
LAYERS = (1, 2, 3)
#: Centers that are evaluated for the time of all: what the larger number takes beyond the smaller one.
N_CENTERS = (4, 16)
#: Degrees of the averages over fixed orientations that the exact average is compared with.
DEGREES = (1, 3, 5, 7, 9, 11, 13)

COLUMNS = (
    Column("system", "system"),
    Column("cutoff", "cutoff (Å)", fixed(1)),
    Column("n_layers", "K"),
    Column("neighbors", "neighbors", fixed(1)),
    Column("evaluations", "evaluations", fixed(2)),
    Column("atoms", "atoms per copy", fixed(0)),
    Column("edges", "edges per copy", fixed(0)),
    Column("layer_ratio", "predicted / bare, at least", digits(3)),
    Column("edge_ratio", "at most", digits(3)),
    Column("measured", "measured / bare", digits(3)),
    Column("local", "one layer of K times the cutoff", digits(3)),
    Column("degree", "degree at that cost"),
    Column("residual", "residual at degree 3", digits(2)),
)


def run(setting: Setting) -> Result:
    """Energy and forces of PET with K layers and random weights."""
    cases = [
        (name, atoms, cutoff, layers)
        for name, atoms, cutoffs in _systems(setting)
        for cutoff in cutoffs
        for layers in LAYERS
    ]
    records = [_record(setting, *case) for case in setting.bar(cases, "deep")]
    notes = [
        f"ECSE in {GROUP}, atom scope, PET of K layers with random weights (float32). Evaluations: frames per atom. "
        "Predicted from counts: at least, for a network whose layers narrow to what the centers depend on (PET); at "
        "most, for one that evaluates every layer everywhere. Measured: energy and forces over those of the bare "
        f"network, from what {N_CENTERS[1]} centers take beyond {N_CENTERS[0]} (without what is done once per batch).",
        "One layer of K times the cutoff: edges of all copies of a strictly local network that sees as far, over "
        "those of the bare K-layer network. Degree at that cost: the highest degree of GroupAveraging of the "
        "whole box whose rotations cost at most as much as measured (- : not even degree 1). Residual: RMS change of "
        "its atomic energies under a random rotation, over that of the bare network.",
        "GroupAveraging has the same rotations everywhere: size-consistent, and as local as the network, but exact to "
        "its degree only. ECSE in structure scope needs a finite structure, and its frames depend on all of it.",
    ]
    return Result("Deep networks", records, COLUMNS, {"group": GROUP, "scope": "atom", "dtype": "float32"}, notes)


def _systems(setting: Setting) -> list[tuple[str, Atoms, tuple[float, ...]]]:
    aluminum = bulk("Al", cubic=True).repeat(4 if setting.full else 3)
    aluminum.rattle(0.1, seed=0)
    silicon = bulk("Si", cubic=True).repeat(3 if setting.full else 2)
    silicon.rattle(0.1, seed=0)
    found = [
        ("fcc aluminum", aluminum, (3.5, 4.5) if setting.full else (3.5,)),
        ("silicon", silicon, (3.0, 4.5) if setting.full else (3.0,)),
    ]
    if "water" in setting.datasets:
        found.append(("water", setting.datasets["water"][0], (3.0, 4.5) if setting.full else (3.0,)))
    return found


def _pet(atoms: Atoms, cutoff: float, n_layers: int) -> PET:
    species = tuple(sorted({int(z) for z in atoms.numbers}))
    config = PETConfig(
        species, cutoff=cutoff, num_gnn_layers=n_layers, d_pet=64, d_node=64, d_head=64, d_feedforward=128
    )
    return PET(config, seed=0).requires_grad_(False).eval()


def _record(setting: Setting, name: str, atoms: Atoms, cutoff: float, n_layers: int) -> dict[str, Any]:
    backbone = _pet(atoms, cutoff, n_layers).to(setting.device)
    model = Symmetrizer(backbone, ECSE(), group=GROUP, scope="atom").eval()
    batch = from_ase(atoms, dtype=torch.float32).to(setting.device)
    n_atoms = len(atoms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)
        plan = model.explain(batch)
    few, many = (_centers(batch, n) for n in N_CENTERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)
        share = (model.explain(many).n_evaluations - model.explain(few).n_evaluations) / plan.n_evaluations
    seconds = _in_turns(
        {
            "bare": lambda: bare_forces(backbone, batch),
            "few": lambda: model(few, forces=True),
            "many": lambda: model(many, forces=True),
        },
        4 if setting.full else 3,
    )
    measured = (seconds["many"] - seconds["few"]) / share / seconds["bare"]
    edges = plan.n_edges
    wide = with_neighbors(validate(from_ase(atoms)), n_layers * cutoff)[keys.EDGE_INDEX].shape[1]
    costs = {degree: 2 * len(rotation_quadrature(degree)[1]) for degree in DEGREES}
    affordable = [degree for degree, n in costs.items() if n <= measured]
    return {
        "system": name,
        "n_atoms": n_atoms,
        "cutoff": cutoff,
        "n_layers": n_layers,
        "neighbors": edges / n_atoms,
        "evaluations": plan.evaluations_mean,
        "atoms": plan.copied_atoms / plan.n_evaluations,
        "edges": plan.copied_edges / plan.n_evaluations,
        "layer_ratio": plan.layer_ratio,
        "edge_ratio": plan.edge_ratio,
        "measured": measured,
        "seconds_bare": seconds["bare"],
        "local": plan.evaluations_mean * wide / (n_layers * edges),
        "degree": str(max(affordable)) if affordable else None,
        "residual": _residual(backbone, batch, 3),
        "warnings": len(plan.warnings),
    }


def _centers(batch: Any, n: int) -> Any:
    """A batch of which n atoms are wanted."""
    n_atoms = len(batch.pos)
    mask = torch.zeros(n_atoms, dtype=torch.bool, device=batch.pos.device)
    mask[torch.linspace(0, n_atoms - 1, n).long()] = True
    some = batch.clone()
    some[keys.CENTER_MASK] = mask
    return some


def _in_turns(functions: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Least processor time of each over some rounds: evaluations that take seconds are many calls of the backbone."""
    best: dict[str, float] = {}
    for n in range(n_rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds = time.process_time() - start
            if n:  # the first round warms up
                best[name] = min(best.get(name, float("inf")), seconds)
    return best


def _residual(backbone: PET, batch: Any, degree: int) -> float:
    """What a rotation changes of averaged atomic energies, over what it changes of bare ones."""
    rotation = random_rotations(1, generator=torch.Generator().manual_seed(0))[0].to(batch.pos)
    turned = batch.clone()
    turned.pos, turned.cell = batch.pos @ rotation.T, batch.cell @ rotation.T
    averaged = Symmetrizer(backbone, GroupAveraging(degree), group=GROUP, scope="structure").eval()

    def change(function: Callable[[Any], Tensor]) -> float:
        with torch.no_grad():
            return float((function(batch) - function(turned)).double().square().mean().sqrt())

    def bare(graph: Any) -> Tensor:
        return backbone(with_neighbors(validate(graph), float(backbone.cutoff or 0.0)))["energy"]

    return change(lambda graph: averaged(graph)["atomic_energy"]) / float(np.clip(change(bare), 1e-30, None))
