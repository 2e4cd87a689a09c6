"""How much a symmetrised evaluation costs beyond the backbone's own evaluations that it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, PETConfig, load

from benchmarks.datasets import BUNDLED
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import bare_energy, bare_forces, in_turns
from symmetrize import ECSE, Symmetrizer, from_ase
from symmetrize.testing import geometries

N_MOLECULES = 64
GROUP = "O(3)"
#: Atoms per call: the default on a CPU, and one that hardly splits anything.
CHUNK_SIZES = (None, 16384)

COLUMNS = (
    Column("system", "system"),
    Column("network", "network"),
    Column("scope", "scope"),
    Column("chunk_size", "chunk size"),
    Column("n_atoms", "atoms"),
    Column("evaluations", "evaluations", fixed(2)),
    Column("seconds_bare", "bare E+F (s)", digits(3)),
    Column("slowdown", "symmetrised / bare", fixed(2)),
    Column("overhead", "per evaluation", fixed(2)),
    Column("energy_overhead", "energy only", fixed(2)),
    Column("frames_fraction", "frames / bare forward pass", digits(2)),
)


@dataclass(frozen=True)
class _Case:
    system: str
    structures: list[Atoms]
    network: str
    backbone: PET
    scope: str
    chunk_size: int | None


def run(setting: Setting) -> Result:
    """Energy and forces, float32, in O(3)."""
    rounds = 15 if setting.full else 7
    records = [_record(setting, case, rounds) for case in setting.bar(_cases(setting), "overhead")]
    notes = [
        "Per evaluation: time(energy and forces, symmetrised) / (mean evaluations × time(energy and forces, bare)). "
        "1 means that nothing but the backbone costs time; below 1, what does not depend on orientation (neighbor "
        "list, species, lengths, cutoffs) is shared between frames. Energy only: the same without forces.",
        "Bare: the backbone called directly, all structures in one call, neighbor list included. Frames: neighbor "
        "list, candidates, weights and rotations, without gradients, over one bare forward pass.",
        f"{GROUP}, default widths, float32. Ratios are of the least times of {rounds} rounds, all timed in turns. "
        "'Random' weights: the shipped architecture at a cutoff of 4.5 Å.",
    ]
    parameters = {"group": GROUP, "dtype": "float32", "n_rounds": rounds}
    return Result("Overhead", records, COLUMNS, parameters, notes)


def _cases(setting: Setting) -> list[_Case]:
    ethanols = setting.datasets[BUNDLED][:N_MOLECULES]
    systems: list[tuple[str, list[Atoms], str, PET, str]] = [
        (f"{len(ethanols)} ethanols", ethanols, "PET, 1 block, trained", load("ethanol"), "atom"),
        (f"{len(ethanols)} ethanols", ethanols, "PET, 2 blocks, trained", load("ethanol-2block"), "structure"),
    ]
    if "water" in setting.datasets:
        water = setting.datasets["water"][:1]
        systems.append(("liquid water", water, "PET, 1 block, random", random_pet(water), "atom"))
    if "silicon" in setting.datasets:
        silicon = setting.datasets["silicon"][:3]
    else:
        silicon = [geometries()["rattled silicon"].repeat((3, 3, 3))]
    systems.append(("silicon", silicon, "PET, 1 block, random", random_pet(silicon), "atom"))
    return [
        _Case(system, structures, network, backbone.requires_grad_(False).eval(), scope, chunk_size)
        for system, structures, network, backbone, scope in systems
        for chunk_size in CHUNK_SIZES
    ]


def random_pet(structures: list[Atoms]) -> PET:
    """A one-block PET of the shipped size for the species of some structures."""
    species = tuple(sorted({int(z) for atoms in structures for z in atoms.numbers}))
    config = PETConfig(species, cutoff=4.5, d_pet=64, d_node=64, d_head=64, d_feedforward=128)
    return PET(config, seed=0).requires_grad_(False).eval()


def _record(setting: Setting, case: _Case, rounds: int) -> dict[str, Any]:
    backbone = case.backbone.to(setting.device)
    model = Symmetrizer(backbone, ECSE(), group=GROUP, scope=case.scope, chunk_size=case.chunk_size).eval()
    batch = from_ase(case.structures, dtype=torch.float32).to(setting.device)

    def energy() -> object:
        with torch.no_grad():
            return model(batch)

    def frames() -> object:
        with torch.no_grad():
            return model.frames(batch)

    times = in_turns(
        {
            "bare": lambda: bare_forces(backbone, batch),
            "forces": lambda: model(batch, forces=True),
            "bare energy": lambda: bare_energy(backbone, batch),
            "energy": energy,
            "frames": frames,
        },
        rounds,
        setting.device,
    )
    plan = model.explain(batch)
    evaluations = plan.evaluations_mean
    return {
        "system": case.system,
        "network": case.network,
        "scope": case.scope,
        "chunk_size": "default" if case.chunk_size is None else str(case.chunk_size),
        "n_atoms": plan.n_atoms,
        "n_calls": plan.n_chunks,
        "evaluations": evaluations,
        "seconds_bare": times.seconds("bare"),
        "seconds_symmetrised": times.seconds("forces"),
        "seconds_frames": times.seconds("frames"),
        "slowdown": times.ratio("forces", "bare"),
        "overhead": times.ratio("forces", "bare") / evaluations,
        "energy_overhead": times.ratio("energy", "bare energy") / evaluations,
        "frames_fraction": times.ratio("frames", "bare energy"),
    }
