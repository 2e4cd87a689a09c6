"""Symmetry in practice: ``python -m benchmarks.practice --output runs/practice``.

What users of a potential run into when it is not symmetric: relaxations that leave the space group, forces in perfect
crystals, split phonons, a molecule in free space that changes its angular momentum. The same network three ways: bare,
averaged over the group by a quadrature of degree 3, and symmetrised by ECSE.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from benchmarks import practice_experiments as experiments
from benchmarks.practice_figures import draw_all
from benchmarks.practice_models import CASES, network, perovskite
from benchmarks.record import Column, Result, Setting, digits, provenance, save
from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.backbone import Backbone
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.data import from_ase
from symmetrize.frames import FrameMethod
from symmetrize.methods.group_averaging import GroupAveraging

METHODS: dict[str, Callable[[], FrameMethod]] = {
    "bare": Identity,
    "GroupAveraging(3)": lambda: GroupAveraging(3),
    "ECSE": ECSE,
}
GROUP = "O(3)"
FMAX = 1e-6
DISPLACEMENTS = (1e-2, 1e-4)  # of phonons, angstrom

#: Where relaxations of crystals start: network and structure.
STARTS: dict[str, tuple[str, Callable[[], Atoms]]] = {
    "Cu, fcc": ("copper", lambda: bulk("Cu", "fcc", a=3.70)),
    "C, diamond": ("diamond", lambda: bulk("C", "diamond", a=3.62)),
    "CsPbI3, tetragonal": ("perovskite", lambda: perovskite(6.25, 6.45)),
    "CsPbI3, polar": ("perovskite", lambda: perovskite(6.25, 6.45, 0.15)),
}

#: Wave vectors that the supercell holds, with the sizes of the sets of equal frequencies; see `splitting`.
PHONONS: dict[str, tuple[str, int, dict[str, tuple[tuple[float, ...], tuple[int, ...]]]]] = {
    "Cu, fcc": ("copper", 2, {"X": ((0.5, 0.5, 0.0), (2, 1)), "L": ((0.5, 0.5, 0.5), (2, 1))}),
    "C, diamond": ("diamond", 2, {"Γ": ((0.0, 0.0, 0.0), (3,)), "X": ((0.5, 0.5, 0.0), (2, 2, 2))}),
    "CsPbI3, cubic": ("perovskite", 1, {"Γ": ((0.0, 0.0, 0.0), (3, 3, 3, 3))}),
}
BONDS = {"CO2": 1.16, "C2H2": 1.20}


def model(backbone: Backbone, method: str) -> Symmetrizer:
    """The network of a case, three ways."""
    return Symmetrizer(backbone, METHODS[method](), group=GROUP)


def crystal(name: str, volume: float) -> Atoms:
    """A perfect crystal of a volume per atom (cubic angstrom), in a random orientation."""
    atoms = {
        "Cu, fcc": lambda: bulk("Cu", "fcc", a=3.60),
        "C, diamond": lambda: bulk("C", "diamond", a=3.56),
        "CsPbI3, cubic": lambda: perovskite(6.30),
    }[name]()
    scale = (volume * len(atoms) / atoms.get_volume()) ** (1.0 / 3.0)
    atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
    return experiments.turned(atoms, seed=1)


class Practice:
    """All experiments with the networks of `CASES`."""

    def __init__(self, networks: dict[str, Backbone], setting: Setting) -> None:
        self.networks, self.setting = networks, setting
        self.volumes: dict[str, float] = {}
        self.curves: dict[str, Any] = {}

    def calculator(self, case: str, method: str) -> Calculator:
        """By method; ``"EMT"`` is the control, symmetric by construction."""
        return EMT() if method == "EMT" else SymmetrizerCalculator(model(self.networks[case], method))

    def evaluations(self, case: str, method: str, atoms: Atoms) -> float | None:
        """Backbone evaluations per atom."""
        if method == "EMT":
            return None
        return model(self.networks[case], method).explain(from_ase(atoms)).evaluations_mean

    def methods(self, case: str) -> list[str]:
        return [*METHODS, "EMT"] if case == "copper" else list(METHODS)

    def relaxations(self) -> Result:
        """Space group before and after; also sets the volumes of the perfect crystals."""
        records = []
        tasks = [(name, method) for name, (case, _) in STARTS.items() for method in self.methods(case)]
        for name, method in self.setting.bar(tasks, "relaxations"):
            case, make = STARTS[name]
            atoms = experiments.turned(make())
            calculator = self.calculator(case, method)
            steps = 300 if self.setting.full else 60
            found = experiments.relax_crystal(atoms, calculator, fmax=FMAX, steps=steps)
            if method == "ECSE":
                self.volumes.setdefault(case, found["volume"])
            count = self.evaluations(case, method, atoms)
            records.append({"structure": name, "method": method, **found, "evaluations": count})
        self._methane(records)
        columns = [
            Column("structure", "structure"),
            Column("method", "method"),
            Column("before", "before"),
            Column("after", "after"),
            Column("broken", "off by (Å)", digits(2)),
            Column("steps", "steps"),
            Column("converged", "converged", lambda value: "yes" if value else "no"),
            Column("evaluations", "evaluations per atom", digits(3)),
        ]
        notes = [
            f"Positions and cell (FrechetCellFilter, BFGS to {FMAX:g} eV/Å), from a random orientation; space groups "
            f"by spglib at {experiments.TOLERANCE:g} Å. A structure may gain symmetry, but not lose it.",
            "Off by: how far the operations of the start miss in the end. Methane: order of the point group, "
            "number of permutations that leave all distances alone (24: Td).",
            "Evaluations: at the start, each of an atom with its neighbors.",
        ]
        return Result("Relaxation", records, columns, {"fmax": FMAX, "group": GROUP}, notes)

    def _methane(self, records: list[dict[str, Any]]) -> None:
        start = molecule("CH4")
        start.positions *= 1.05
        start = experiments.turned(start)
        for method in METHODS:
            end, found = experiments.relax_molecule(start, self.calculator("molecules", method), FMAX, 300)
            records.append(
                {
                    "structure": "CH4",
                    "method": method,
                    "before": f"order {experiments.point_group_order(start)}",
                    "after": f"order {experiments.point_group_order(end)}",
                    "broken": experiments.spread_of_bonds(end),
                    **found,
                    "evaluations": self.evaluations("molecules", method, start),
                }
            )

    def perfect(self) -> Result:
        """Forces and stress that symmetry forbids."""
        records = []
        for name, (case, _, _) in PHONONS.items():
            atoms = crystal(name, self.volumes[case])
            for method in self.methods(case):
                found = experiments.perfect_crystal(atoms, self.calculator(case, method))
                count = self.evaluations(case, method, atoms)
                records.append({"crystal": name, "method": method, **found, "evaluations": count})
        columns = [
            Column("crystal", "crystal"),
            Column("method", "method"),
            Column("force", "largest force (eV/Å)", digits(2)),
            Column("stress", "anisotropic stress (GPa)", digits(2)),
            Column("pressure", "pressure (GPa)", digits(2)),
            Column("evaluations", "evaluations per atom", digits(3)),
        ]
        notes = [
            "Primitive cells in a random orientation, at the volume that ECSE relaxed to. With one atom in the cell "
            "the force vanishes by translation alone, and only the stress tells.",
        ]
        return Result("Perfect crystals", records, columns, {"group": GROUP}, notes)

    def phonons(self) -> Result:
        """Splitting of degenerate branches."""
        records = []
        tasks = [(name, method) for name, (case, _, _) in PHONONS.items() for method in self.methods(case)]
        for name, method in self.setting.bar(tasks, "phonons"):
            case, repeat, points = PHONONS[name]
            atoms = crystal(name, self.volumes[case])
            wanted = {point: q for point, (q, _) in points.items()}
            calculator = self.calculator(case, method)
            usual, small = (experiments.phonons(atoms, calculator, repeat, wanted, d) for d in DISPLACEMENTS)
            for point, (_, sizes) in points.items():
                records.append(
                    {
                        "crystal": name,
                        "point": point,
                        "method": method,
                        "usual": experiments.splitting(usual[point], sizes),
                        "splitting": experiments.splitting(small[point], sizes),
                        "highest": max(map(abs, small[point])),
                        "frequencies": small[point],
                    }
                )
        columns = [
            Column("crystal", "crystal"),
            Column("point", "q"),
            Column("method", "method"),
            Column("usual", f"splitting (THz), {DISPLACEMENTS[0]:g} Å", digits(2)),
            Column("splitting", f"{DISPLACEMENTS[1]:g} Å", digits(2)),
            Column("highest", "highest frequency (THz)", digits(3)),
        ]
        notes = [
            "Phonopy with is_symmetry=False: all atoms displaced both ways along the lattice vectors, by the usual "
            "distance and by a small one; wave vectors that the supercell holds. Largest difference between "
            "frequencies that symmetry makes equal.",
            "EMT is the control, symmetric by construction: what it has left, and what falls with the square of the "
            "displacement, is anharmonicity in finite differences, not a lack of symmetry. The weights of ECSE add to "
            "the anharmonicity (frames change within a tenth of an angstrom or so): in float64, displace less than "
            "0.01 Å.",
        ]
        return Result("Phonons", records, columns, {"group": GROUP, "displacements": DISPLACEMENTS}, notes)

    def dynamics(self) -> Result:
        """Angular momentum of methane in free space."""
        step, n_steps = 0.25, 800 if self.setting.full else 100
        start = experiments.turned(molecule("CH4"))
        records = []
        for method in self.setting.bar(list(METHODS), "dynamics"):
            calculator = self.calculator("molecules", method)
            found = experiments.dynamics(start, calculator, step, n_steps, temperature=500.0, every=10)
            self.curves.setdefault("dynamics", {})[method] = found
            energies = np.array(found["energy"])
            records.append(
                {
                    "method": method,
                    "angular": max(found["change"]),
                    "energy": float(np.ptp(energies)),
                    "evaluations": self.evaluations("molecules", method, start),
                }
            )
        columns = [
            Column("method", "method"),
            Column("angular", "largest change of the angular momentum, relative", digits(2)),
            Column("energy", "range of the total energy (eV)", digits(2)),
            Column("evaluations", "evaluations per atom", digits(3)),
        ]
        parameters = {"step": step, "n_steps": n_steps, "temperature": 500.0, "group": GROUP}
        notes = [f"CH4, {n_steps * step / 1000:g} ps of NVE (velocity Verlet, {step:g} fs) from 500 K, once."]
        return Result("Dynamics of a molecule", records, columns, parameters, notes)

    def bends(self) -> Result:
        """CO2 and C2H2 through the straight geometry."""
        records = []
        angles = np.linspace(-12.0, 12.0, 49)
        tasks = [(name, method) for name in BONDS for method in METHODS]
        for name, method in self.setting.bar(tasks, "bends"):
            calculator = self.calculator("molecules", method)
            found = experiments.through_the_line(name, BONDS[name], calculator, angles)
            self.curves.setdefault("bends", {}).setdefault(name, {})[method] = found.pop("energy")
            end, relaxed = experiments.relax_molecule(experiments.bend(name, BONDS[name], 50.0), calculator, FMAX, 300)
            records.append(
                {
                    "molecule": name,
                    "method": method,
                    **found,
                    **relaxed,
                    "angle": experiments.bending_angle(end),
                    "evaluations": self.evaluations("molecules", method, experiments.bend(name, BONDS[name], 0.0)),
                }
            )
        self.curves["angles"] = list(angles)
        columns = [
            Column("molecule", "molecule"),
            Column("method", "method"),
            Column("work", "energy without work (eV)", digits(2)),
            Column("force_jump", "jump of forces (eV/Å)", digits(2)),
            Column("across", "force across the straight molecule (eV/Å)", digits(2)),
            Column("angle", "bend after relaxation (°)", digits(2)),
            Column("steps", "steps"),
            Column("converged", "converged", lambda value: "yes" if value else "no"),
            Column("evaluations", "evaluations per atom", digits(3)),
        ]
        notes = [
            "Energy without work: largest change of the energy between neighboring points of the path that the forces "
            "do not account for. Jump of forces: largest change over 1e-9 degrees, at the straight geometry and up to "
            "5 degrees from it. Forces across a straight molecule are forbidden by symmetry.",
            f"Relaxed from 50° (BFGS to {FMAX:g} eV/Å).",
        ]
        return Result("Through collinear geometries", records, columns, {"group": GROUP}, notes)

    def all(self) -> dict[str, Callable[[], Result]]:
        """Experiments by name, in the order in which they run."""
        return {
            "relaxations": self.relaxations,
            "perfect": self.perfect,
            "phonons": self.phonons,
            "dynamics": self.dynamics,
            "bends": self.bends,
        }


def networks_table(facts: list[dict[str, Any]]) -> Result:
    """What was trained, and how good it is."""
    columns = [
        Column("network", "network"),
        Column("labels", "labels"),
        Column("structures", "structures"),
        Column("epochs", "epochs"),
        Column("forces_rms", "RMS force (eV/Å)", digits(2)),
        Column("forces_mae", "force MAE (eV/Å)", digits(2)),
        Column("energy_mae", "energy MAE (eV per atom)", digits(2)),
    ]
    notes = [
        "One-block PETs (strictly local, widths of 32, two attention layers), trained in float32 on random "
        "orientations and used in float64. Labels are made on the spot. Errors: bare, on held-out structures."
    ]
    return Result("Networks", facts, columns, {}, notes)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/practice"), show_default=True, help="Folder."
)
@click.option("--profile", type=click.Choice(["small", "full"]), default="small", show_default=True)
@click.option("--networks", type=click.Path(path_type=Path), help="Folder of labels and networks, kept between runs.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(output: Path, profile: str, networks: Path | None, threads: int, quiet: bool) -> None:
    """Relaxations, perfect crystals, phonons, dynamics: bare, averaged at degree 3, ECSE.

    The small profile (some minutes) shows that it runs; its networks know little. The full one takes about half an hour
    and what it takes is mostly labels and training.
    """
    torch.set_num_threads(threads)
    full = profile == "full"
    setting = Setting({}, [], torch.device("cpu"), full, threads, not quiet)
    origin = provenance(setting)
    for package in ("phonopy", "spglib", "tblite"):
        origin["packages"][package] = version(package)
    backbones, facts = {}, []
    start = time.perf_counter()
    for name in setting.bar(list(CASES), "networks"):
        backbones[name], found = network(CASES[name], networks or output / "networks", full)
        facts.append(found)
    results, seconds = {"networks": networks_table(facts)}, {"networks": time.perf_counter() - start}
    click.echo(results["networks"].text())
    practice = Practice(backbones, setting)
    for name, measure in practice.all().items():
        start = time.perf_counter()
        results[name] = measure()
        seconds[name] = time.perf_counter() - start
        click.echo(results[name].text())
        save(output, setting, results, seconds, origin)
    (output / "curves.json").write_text(json.dumps(practice.curves), encoding="utf-8")
    for path in draw_all(results["phonons"].records, practice.curves, output):
        click.echo(path)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.practice")
