"""The networks of `benchmarks.practice`: labels from EMT, xTB and rigid ions, and small one-block PETs trained on them.

Everything is made here, from packages that pip installs: nothing has to be downloaded. The networks are as good as a
few minutes make them. What is asked of them is that they are not symmetric and that relaxations stay bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.io import read, write

from symmetrize.backbone import Backbone
from symmetrize.data import from_ase
from symmetrize.errors import MissingDependencyError


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on.

    Attributes
    ----------
    name : str
    labels : str
        What the energies and forces come from.
    structures : callable
        Random structures without end, given a generator.
    calculator : callable
        Makes the calculator of the labels.
    size : tuple of int
        Structures in the small and in the full profile.
    epochs : tuple of int
    cutoff : float
        Angstrom.
    """

    name: str
    labels: str
    structures: Callable[[np.random.Generator], Iterator[Atoms]]
    calculator: Callable[[], Calculator]
    size: tuple[int, int]
    epochs: tuple[int, int]
    cutoff: float


def perovskite(a: float, c: float | None = None, polar: float = 0.0) -> Atoms:
    """CsPbI3 with five atoms: Pm-3m; with another length c, P4/mmm; with lead displaced along z, P4mm (angstrom)."""
    scaled = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    atoms = Atoms("CsPbI3", scaled_positions=scaled, cell=[a, a, a if c is None else c], pbc=True)
    atoms.positions[1, 2] += polar
    return atoms


def _crystals(make: Callable[[], Atoms], strain: float, displacement: float) -> Callable[..., Iterator[Atoms]]:
    def generate(rng: np.random.Generator) -> Iterator[Atoms]:
        while True:
            atoms = make()
            # Volume changes beside shears: energies are all that the network learns about pressure from.
            deformation = np.eye(3) * (1.0 + rng.uniform(-strain, strain)) + rng.normal(scale=strain / 3, size=(3, 3))
            atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
            atoms.positions += rng.normal(scale=rng.uniform(0.0, displacement), size=atoms.positions.shape)
            yield atoms

    return generate


def _molecules(rng: np.random.Generator) -> Iterator[Atoms]:
    while True:
        for name in ("CH4", "CO2", "C2H2"):
            atoms = molecule(name)
            atoms.positions *= 1.0 + rng.uniform(-0.06, 0.10)
            # Softest first: bends of tens of degrees, everything else of a tenth of an angstrom.
            if name == "CO2":
                atoms.positions[0] += rng.normal(scale=0.25, size=3) * (1.0, 1.0, 0.0)
            if name == "C2H2":
                atoms.positions[2:] += rng.normal(scale=0.35, size=(2, 3)) * (1.0, 1.0, 0.0)
            atoms.positions += rng.normal(scale=rng.uniform(0.0, 0.12), size=atoms.positions.shape)
            yield atoms


class RigidIons(Calculator):
    """Ions of CsPbI3: Born-Mayer repulsion and Coulomb forces, damped and shifted to zero at 5.6 angstrom.

    Fennell and Gezelter, J. Chem. Phys. 124, 234104 (2006). Charges are 0.7 of the formal ones, radii Shannon's; the
    strength of the repulsion is chosen for a lattice constant of about 6.3 angstrom.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's interface)

    charge = {55: 0.7, 82: 1.4, 53: -0.7}  # noqa: RUF012
    radius = {55: 1.88, 82: 1.19, 53: 2.20}  # noqa: RUF012
    strength, softness, damping, cutoff = 0.10, 0.38, 0.2, 5.6

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        batch = from_ase(atoms, cutoff=self.cutoff)
        pos = batch["pos"].requires_grad_()
        source, target = batch["edge_index"]
        r = (pos[source] + batch["cell_shift"].to(pos.dtype) @ batch["cell"][0] - pos[target]).norm(dim=1)
        charge, radius = (
            torch.tensor([table[z] for z in batch["z"].tolist()], dtype=pos.dtype)
            for table in (self.charge, self.radius)
        )
        repulsion = self.strength * torch.exp((radius[source] + radius[target] - r) / self.softness)
        repulsion = repulsion * torch.clamp(1.0 - (r / self.cutoff) ** 4, min=0.0) ** 2
        a, end = self.damping, torch.tensor(self.cutoff, dtype=pos.dtype)
        slope = torch.erfc(a * end) / end**2 + 2.0 * a / math.pi**0.5 * torch.exp(-((a * end) ** 2)) / end
        shape = torch.erfc(a * r) / r - torch.erfc(a * end) / end + slope * (r - end)
        # One term for either direction of a pair; the constant of Coulomb's law in eV angstrom.
        energy = 0.5 * (repulsion + 14.3996 * charge[source] * charge[target] * shape).sum()
        (gradient,) = torch.autograd.grad(energy, pos)
        self.results = {"energy": float(energy.detach()), "forces": -gradient.numpy()}


def _tblite(method: str) -> Callable[[], Calculator]:
    def make() -> Calculator:
        try:
            from tblite.ase import TBLite
        except ImportError as error:
            raise MissingDependencyError("labels need tblite; install it with: pip install tblite") from error
        return TBLite(method=method, verbosity=0)

    return make


CASES = {
    case.name: case
    for case in (
        Case(
            "copper",
            "EMT",
            _crystals(lambda: bulk("Cu", "fcc", a=3.60).repeat(2), 0.05, 0.15),
            EMT,
            (100, 200),
            (10, 50),
            4.2,
        ),
        Case(
            "diamond",
            "GFN1-xTB, 2 x 2 x 2 cells at Γ",
            _crystals(lambda: bulk("C", "diamond", a=3.56).repeat(2), 0.05, 0.10),
            _tblite("GFN1-xTB"),
            (40, 160),
            (10, 50),
            3.3,
        ),
        Case(
            "perovskite",
            "rigid ions",
            _crystals(lambda: perovskite(6.30), 0.05, 0.15),
            RigidIons,
            (60, 300),
            (10, 24),
            5.8,
        ),
        Case("molecules", "GFN2-xTB", _molecules, _tblite("GFN2-xTB"), (90, 600), (20, 60), 4.5),
    )
}


def label(case: Case, n: int, path: Path, seed: int = 0) -> None:
    """Write ``n`` structures with energies and forces as extended xyz."""
    rng = np.random.default_rng(seed)
    labelled: list[Atoms] = []
    for atoms in case.structures(rng):
        if len(labelled) == n:
            break
        calculator = case.calculator()
        atoms.calc = calculator
        try:
            energy, forces = float(atoms.get_potential_energy()), np.array(atoms.get_forces())
        except (CalculationFailed, RuntimeError):  # the self-consistent field did not converge
            continue
        if not np.isfinite(energy) or np.abs(forces).max() > 60.0:
            continue
        atoms.calc = None
        atoms.info["energy"], atoms.arrays["forces"] = energy, forces
        labelled.append(atoms)
    write(path, labelled, format="extxyz")


def recipe(case: Case, path: Path, n: int, epochs: int) -> dict[str, Any]:
    """What `symmetrize.training.train` takes."""
    held_out = max(4, n // 10)
    return {
        "data": {"path": str(path), "train": n - 2 * held_out, "validation": held_out, "test": held_out},
        "backbone": {
            "name": "pet",
            "hyperparameters": {
                "cutoff": case.cutoff,
                "cutoff_width": 0.8,
                "d_pet": 32,
                "d_node": 32,
                "d_head": 32,
                "d_feedforward": 48,
                "num_heads": 4,
                "num_attention_layers": 2,
                "num_gnn_layers": 1,
            },
        },
        "loss": {"kind": "norm", "energy": 10.0, "forces": 1.0},
        "optimizer": {"name": "muon", "lr": 5e-3, "weight_decay": 0.02},
        "schedule": {"warmup": 1, "decay": epochs // 2},
        "epochs": epochs,
        "batch_size": 8 if case.name == "molecules" else 4,
        "validate_every": max(1, epochs // 10),
        "ema": 0.99,
        "trainer": {"accelerator": "cpu", "devices": 1},
    }


def network(case: Case, folder: Path, full: bool) -> tuple[Backbone, dict[str, Any]]:
    """The trained network in float64, and what is known of its accuracy; made once, then read from the folder."""
    from symmetrize.training import train

    size, epochs = case.size[full], case.epochs[full]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}-{size}.xyz"
    if not path.is_file():
        label(case, size, path)
    result = train(recipe(case, path, size, epochs), output=folder / f"{case.name}-{size}", progress=False)
    errors = result.errors["test"]
    labelled = read(path, ":")
    n_atoms = np.mean([len(atoms) for atoms in labelled])
    forces = np.concatenate([atoms.get_forces() for atoms in labelled])
    facts = {
        "network": case.name,
        "labels": case.labels,
        "structures": size,
        "epochs": result.epochs,
        "forces_rms": float(np.sqrt(np.mean(forces**2))),
        "forces_mae": errors.forces_mae,
        "energy_mae": errors.energy_mae / float(n_atoms),
    }
    return result.backbone.to(torch.float64).requires_grad_(False).eval(), facts
