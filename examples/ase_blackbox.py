"""A calculator with the error of a grid: energies that change as a cluster turns, and what they do to its dynamics.

Programs that integrate on a grid prefer directions: here EMT, plus a small energy that depends on how pairs lie in the
laboratory. Averaged over frames the energy is invariant, and since forces derive from it, angular momentum is kept.
Run: python examples/ase_blackbox.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from symmetrize.backbones.ase import ASEBackbone

from symmetrize import ECSE, Symmetrizer, from_ase
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.methods.identity import Identity
from symmetrize.report.style import COLORS


class OnGrid(Calculator):
    """EMT, and for every pair e exp(-r / 2) sum_a cos(2 pi r_a / h), as if space were a grid of spacing h."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's interface)

    def __init__(self, size: float = 0.003, spacing: float = 0.9) -> None:
        super().__init__()
        self.size, self.wave, self.exact = size, 2 * np.pi / spacing, EMT()

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        pairs = self.atoms.positions[None] - self.atoms.positions[:, None]  # from i to j
        length = np.linalg.norm(pairs, axis=2) + np.eye(len(pairs))
        fade = self.size * np.exp(-length / 2) * (1 - np.eye(len(pairs)))
        ripple = np.cos(self.wave * pairs).sum(axis=2)
        slopes = -(fade * ripple / (2 * length))[:, :, None] * pairs
        slopes -= fade[:, :, None] * self.wave * np.sin(self.wave * pairs)
        self.results["energy"] = self.exact.get_potential_energy(self.atoms) + 0.5 * (fade * ripple).sum()
        self.results["forces"] = self.exact.get_forces(self.atoms) + slopes.sum(axis=1)


def energies_by_angle(model: Symmetrizer, cluster: Atoms, angles: np.ndarray) -> np.ndarray:
    """Energies of the cluster turned about a skew axis."""
    turned = []
    for angle in angles:
        turned.append(cluster.copy())
        turned[-1].rotate(angle, (1.0, 2.0, 0.5))
    return model(from_ase(turned))["energy"].numpy()


def dynamics(model: Symmetrizer, cluster: Atoms, n_steps: int, step: float) -> dict[str, np.ndarray]:
    """Time (ps), and how far total energy (meV) and angular momentum (hbar) have moved, without a thermostat."""
    atoms = cluster.copy()
    atoms.calc = SymmetrizerCalculator(model)
    thermal = np.sqrt(300 * units.kB / atoms.get_masses())[:, None]
    atoms.set_velocities(thermal * np.random.default_rng(1).normal(size=(len(atoms), 3)))
    Stationary(atoms)
    rows, hbar = [], units._hbar * units.J * units.second
    md = VelocityVerlet(atoms, step * units.fs)
    md.attach(lambda: rows.append([atoms.get_total_energy(), *(atoms.get_angular_momentum() / hbar)]))
    md.run(n_steps)
    found = np.array(rows) - rows[0]
    time = np.arange(len(found)) * step / 1000
    return {"time": time, "energy": 1000 * found[:, 0], "angular momentum": np.linalg.norm(found[:, 1:], axis=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/ase_blackbox"))
    options = parser.parse_args()

    cluster = Atoms("Cu2AgAu", [[0, 0, 0], [2.4, 0, 0], [1.3, 2.2, 0.2], [3.6, 2.1, 0.9]], calculator=EMT())
    BFGS(cluster, logfile=None).run(fmax=0.05)
    backbone = ASEBackbone(OnGrid())
    models = {"bare": Symmetrizer(backbone, Identity()), "O(3)": Symmetrizer(backbone, ECSE())}
    angles = np.linspace(0, 180, 9 if options.small else 61)
    n_steps, step = 40 if options.small else 500, 4.0
    angular = {name: energies_by_angle(model, cluster, angles) for name, model in models.items()}
    moving = {name: dynamics(model, cluster, n_steps, step) for name, model in models.items()}

    print(f"{cluster.get_chemical_formula()}, {n_steps * step / 1000:g} ps of dynamics without a thermostat")
    print(f"{'':24}{'calculator':>14}{'symmetrised':>14}")
    evaluations = [model.explain(from_ase(cluster)).n_evaluations for model in models.values()]
    print(f"{'evaluations':24}{evaluations[0]:14d}{evaluations[1]:14d}")
    spreads = [1000 * float(np.ptp(values)) for values in angular.values()]
    print(f"{'turned: energy (meV)':24}{spreads[0]:14.2g}{spreads[1]:14.2g}")
    for name, unit in {"energy": "meV", "angular momentum": "hbar"}.items():
        worst = [float(np.abs(run[name]).max()) for run in moving.values()]
        print(f"{f'drift: {name} ({unit})':24}{worst[0]:14.2g}{worst[1]:14.2g}")
    draw(options.output, angles, angular, moving)


def draw(folder: Path, angles: np.ndarray, angular: dict, moving: dict) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, values in angular.items():
        label = {"bare": "calculator", "O(3)": "symmetrised"}[name]
        curves = (angles, 1000 * np.abs(values - values[0])), (moving[name]["time"], moving[name]["angular momentum"])
        for axis, (x, y) in zip(axes, curves, strict=True):
            axis.semilogy(x[1:], np.maximum(y[1:], 1e-14), color=COLORS[name], label=label)
    axes[0].set(title="The cluster turned", xlabel="angle (degrees)", ylabel="change of the energy (meV)")
    axes[1].set(title="Free dynamics", xlabel="time (ps)", ylabel="change of angular momentum (ħ)")
    axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "figure.png", dpi=150)
    print(f"figure: {folder / 'figure.png'}")


if __name__ == "__main__":
    main()
