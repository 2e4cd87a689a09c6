"""A symmetrised network as one file for simulation engines: exported, and run by ASE (and i-PI) without this package.

An isolated molecule keeps its energy and its angular momentum. Forces of the bare network are a gradient too, so it
keeps the energy; but its energy depends on the orientation, which amounts to a torque from nowhere.

Run: python examples/export_model.py
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from symmetrize import ECSE, Identity, Symmetrizer, load_backbone
from symmetrize.export.metatomic import export
from symmetrize.report.style import COLORS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", message=".*(torch.jit|deprecated)")


def trajectory(path: Path, atoms: Atoms, n_steps: int) -> np.ndarray:
    """Time (ps), total energy (meV) and |angular momentum| (hbar) minus their start, from the file alone."""
    from metatomic_ase import MetatomicCalculator

    atoms = atoms.copy()
    atoms.calc = MetatomicCalculator(str(path))
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    rows, start = [], None
    for step in range(n_steps + 1):
        if step:
            dynamics.run(1)
        energy, momentum = atoms.get_total_energy(), atoms.get_angular_momentum()
        start = (energy, momentum) if start is None else start
        hbar = units._hbar * units.J * units.second
        rows.append([step * 0.5e-3, 1e3 * (energy - start[0]), np.linalg.norm(momentum - start[1]) / hbar])
    return np.array(rows)


def run_ipi(model: Path, atoms: Atoms, n_steps: int, folder: Path) -> float:
    """Wavering of the conserved energy (meV) in i-PI, with the input file that docs/engines.md shows."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (Path(__file__).parent.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    (given,) = re.findall(r"```xml\n(.*?)```", text, flags=re.DOTALL)
    given = given.replace("<total_steps> 30", f"<total_steps> {n_steps}")
    (folder / "input.xml").write_text(given.replace("model:model.pt", f"model:{model.resolve()}"))
    boxed = atoms.copy()
    boxed.center(vacuum=8.0)
    boxed.pbc = True
    write(folder / "structure.xyz", boxed)
    program = Path(sys.executable).parent / "i-pi"
    subprocess.run([str(program), "input.xml"], cwd=folder, check=True, capture_output=True)
    return 1e3 * float(np.ptp(np.loadtxt(folder / "nve.out")[:, 2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="A few steps, for continuous integration.")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/export_model"))
    arguments = parser.parse_args()
    n_steps = 12 if arguments.small else 1000
    arguments.output.mkdir(parents=True, exist_ok=True)

    atoms = molecule("CH3CH2OH")
    thermal = np.sqrt(300 * units.kB / atoms.get_masses())[:, None]
    atoms.set_velocities(thermal * np.random.default_rng(2).normal(size=(len(atoms), 3)))
    Stationary(atoms)
    ZeroRotation(atoms)

    backbone = load_backbone("pet", "ethanol")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    print(f"{'file':<16} {'size':>8} {'energy wavers by':>18} {'angular momentum moves by':>27}")
    for name, method, color in (("bare", Identity(), COLORS["bare"]), ("symmetrized", ECSE(), COLORS["O(3)"])):
        path = arguments.output / f"{name}.pt"
        # float64, since a total energy of -4209 eV does not fit into float32 ("mixed" is the cheaper remedy).
        export(Symmetrizer(backbone, method), path, dtype="float64", name=f"ethanol, {name}")
        table = trajectory(path, atoms, n_steps)
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        print(f"{path.name:<16} {size:>8} {np.ptp(table[:, 1]):>14.3f} meV {table[-1, 2]:>22.2e} hbar")
        # The two nearly coincide: one thick and pale, one thin.
        broad = {"linewidth": 4, "alpha": 0.4} if name == "bare" else {"linewidth": 1}
        axes[0].plot(table[:, 0], table[:, 1], color=color, label=name, **broad)
        axes[1].plot(table[1:, 0], table[1:, 2], color=color, label=name, linewidth=1)
    axes[0].set(title="Energy", xlabel="time (ps)", ylabel="change of the total energy (meV)")
    axes[1].set(title="Angular momentum", xlabel="time (ps)", ylabel="change (ħ)", yscale="log")
    axes[1].legend(frameon=False, loc="center right")
    figure.savefig(arguments.output / "conservation.png", dpi=150)

    if importlib.util.find_spec("ipi") is not None:
        wavering = run_ipi(arguments.output / "symmetrized.pt", atoms, n_steps, arguments.output / "ipi")
        print(f"i-PI, {n_steps} steps of symmetrized.pt: energy wavers by {wavering:.3f} meV")
    print(f"figure: {arguments.output / 'conservation.png'}")


if __name__ == "__main__":
    main()
