"""How much steeper symmetrisation makes a network: second derivatives along paths through critical geometries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from ase import Atoms
from symmetrize.backbones.pet import load, shipped
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from torch_geometric.data import Data

from benchmarks.record import Column, Result, Setting, digits
from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer
from symmetrize.backbone import Backbone
from symmetrize.demo.subjects import BARE, Subject
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import Path, along, max_derivatives, paths

#: Orientations of a path in which the bare network is measured (small, full profile): it has no preferred one, and the
#: largest curvature over all of them is approached slowly.
N_ORIENTATIONS = (8, 32)
N_POINTS = 41
GROUP = "O(3)"


@dataclass(frozen=True)
class _Network:
    """Networks of one kind that differ by their seed."""

    name: str
    scope: str
    members: tuple[Subject, ...]
    species: frozenset[int] | None


def run(setting: Setting) -> Result:
    """Largest |f''| of the symmetrised energy over that of the bare one."""
    networks = _networks(4 if setting.full else 2)
    cases = [(path, network) for network in networks for path in _paths(network)]
    cases.sort(key=lambda case: (not case[0].name.startswith("bending"), list(paths()).index(case[0].name)))
    records = [_record(setting, *case) for case in setting.bar(cases, "smoothness")]
    bending = [r for r in records if r["path"].startswith("bending")]
    worst = {network.name: max(r["ratio_max"] for r in bending if r["network"] == network.name) for network in networks}
    notes = [
        f"Largest |f″| of the energy along the path after symmetrisation ({GROUP}, default widths), over the largest "
        f"of the bare network in {N_ORIENTATIONS[setting.full]} random orientations of the path; the worst of "
        f"{max(len(n.members) for n in networks)} seeds where weights are random. PET: shipped weights, where they "
        "know the species.",
        "The toys are meant to be hard: degrees up to 6 and more, larger variations under rotations than along most "
        "paths. The JSON has the median over seeds, the ratio of slopes, and the standard deviation over orientations "
        "relative to the span of the path.",
        "Largest ratio on the bending paths: " + "; ".join(f"{k} {v:.2g}" for k, v in worst.items()) + ".",
    ]
    parameters = {"n_orientations": N_ORIENTATIONS[setting.full], "n_points": N_POINTS, "group": GROUP, "step": 1e-4}
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(record["path"], {"path": record["path"]})[record["network"]] = record["ratio_max"]
    columns = [Column("path", "path"), *(Column(n.name, f"{n.name} ({n.scope})", digits(2)) for n in networks)]
    title = "Smoothness: second derivative, symmetrised over bare"
    return Result(title, records, columns, parameters, notes, list(rows.values()))


def _networks(n_seeds: int) -> list[_Network]:
    found = []
    for cutoff in (4.0, 8.0):
        toys = tuple(Subject(f"seed {s}", ToyLocal(cutoff=cutoff, seed=s), "atom") for s in range(n_seeds))
        found.append(_Network(f"toy, cutoff {cutoff:g} Å", "atom", toys, None))
    per_structure = {"energy": OutputSpec("0e", per="structure")}
    toys = tuple(Subject(f"seed {s}", ToyGlobal(per_structure, seed=s), "structure") for s in range(n_seeds))
    found.append(_Network("toy, global", "structure", toys, None))
    for name in shipped():
        pet = load(name, dtype=torch.float64).requires_grad_(False)
        scope = "atom" if pet.oriented_field == 1 else "structure"
        subject = Subject(name, pet, scope)
        found.append(_Network(f"PET {name}", scope, (subject,), frozenset(pet.config.atomic_types)))
    return found


def _paths(network: _Network) -> Iterator[Path]:
    cutoff = network.members[0].backbone.cutoff or 4.0
    for path in paths(cutoff).values():
        atoms = path(0.5)
        known = network.species is None or network.species.issuperset(atoms.numbers.tolist())
        if known and not (network.scope == "structure" and atoms.pbc.any()):
            yield path


def _record(setting: Setting, path: Path, network: _Network) -> dict[str, Any]:
    ratios, slopes, spreads = [], [], []
    rotations = random_rotations(N_ORIENTATIONS[setting.full], generator=torch.Generator().manual_seed(0))
    turned = [_turned(path, matrix) for matrix in rotations]
    t = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    for member in network.members:
        bare, symmetrised = _models(member, setting.device)
        curves = [along(_on(setting.device, bare), p, "energy") for p in turned]
        after = along(_on(setting.device, symmetrised), path, "energy")
        # The same points for all: on even paths the slope is largest at the ends.
        before = [max_derivatives(curve, n_points=N_POINTS) for curve in curves]
        slope, curvature = max_derivatives(after, n_points=N_POINTS)
        ratios.append(curvature / max(entry[1] for entry in before))
        slopes.append(slope / max(entry[0] for entry in before))
        values, reference = torch.stack([curve(t)[:, 0] for curve in curves]), after(t)[:, 0]
        spreads.append(float(values.std(dim=0).mean() / (reference.max() - reference.min())))
    return {
        "path": path.name,
        "network": network.name,
        "scope": network.scope,
        "ratio_median": median(ratios),
        "ratio_max": max(ratios),
        "ratios": ratios,
        "slope_ratio_max": max(slopes),
        "anisotropy": median(spreads),
    }


def _models(member: Subject, device: torch.device) -> tuple[Symmetrizer, Symmetrizer]:
    backbone: Backbone = member.backbone
    if isinstance(backbone, (ToyLocal, ToyGlobal)):
        pair = tuple(
            Symmetrizer(backbone, method, group=GROUP, scope=member.scope, chunk_size=4096)
            for method in (Identity(), ECSE())
        )
    else:
        # Without the composition energy, which would leave few digits to second differences.
        pair = tuple(member.model(treatment, baseline=False) for treatment in (BARE, GROUP))
    return pair[0].eval().to(device), pair[1].eval().to(device)


def _on(device: torch.device, model: Symmetrizer) -> Callable[[Data], dict[str, torch.Tensor]]:
    def evaluate(batch: Data) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return model(batch.to(device))

    return evaluate


def _turned(path: Path, matrix: torch.Tensor) -> Path:
    rotation = matrix.numpy()

    def build(t: float) -> Atoms:
        atoms = path(t)
        atoms.positions = atoms.positions @ rotation.T
        atoms.set_cell(atoms.cell.array @ rotation.T)
        return atoms

    return Path(path.name, build, path.events, path.what)
