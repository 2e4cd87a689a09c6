"""Learned canonicalization: a network chooses the orientation that a plain one works in, and both are trained together.

Conservative forces of ethanol in random orientations, by a network on raw coordinates: as it is, in the frame of a
random equivariant network that stays as it is, and in that of one that learns with it. The second panel turns the
hydroxyl group through the mirror plane of the molecule, where the side of the third axis is not defined.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from ase.build import molecule
from ase.io import read
from matplotlib.figure import Figure
from torch import nn

from symmetrize import Identity, LearnedCanonicalization, OutputSpec, Symmetrizer, from_ase, wrap
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import measure_equivariance

ENERGY = {"energy": OutputSpec("0e", per="structure", unit="eV")}
COLORS = {"bare": "#e07b24", "frozen": "#4186d8", "learned": "#179a6e"}


class PointNetwork(nn.Module):
    """A function of a sum over atoms of a function of their coordinates: nothing about rotations."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.species, self.place = nn.Embedding(10, width), nn.Linear(3, width)
        self.atom = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.readout = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, pos, z, batch, num_graphs):
        atoms = self.atom(torch.sin(3.0 * (self.place(pos) + self.species(z))))
        return self.readout(atoms.new_zeros(num_graphs, atoms.shape[1]).index_add(0, batch, atoms / 3.0))[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer structures and steps")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/learned_canonicalization"))
    options = parser.parse_args()
    n_train, n_test, n_steps = (160, 50, 160) if options.small else (800, 200, 2000)

    frames = read(Path(__file__).parent / "data" / "ethanol_1000.xyz", f":{n_train + n_test}")
    turns = random_rotations(len(frames), torch.Generator().manual_seed(0))
    forces = [torch.tensor(atoms.get_forces()) @ turn.T for atoms, turn in zip(frames, turns, strict=True)]
    for atoms, turn in zip(frames, turns, strict=True):
        atoms.positions = atoms.positions @ turn.T.numpy()
    batches = [(from_ase(frames[k : k + 16]), torch.cat(forces[k : k + 16])) for k in range(0, n_train, 16)]
    test = (from_ase(frames[n_train:]), torch.cat(forces[n_train:]))

    torch.manual_seed(0)
    backbone = wrap(PointNetwork().double(), ENERGY, center="centroid")
    curves = {}
    print(f"{'frame':8s} {'error of forces':>16s} {'error of symmetry':>18s} {'evaluations':>12s}")
    for name in COLORS:
        method = Identity() if name == "bare" else LearnedCanonicalization("vector-neuron")
        method.requires_grad_(name == "learned")
        model = Symmetrizer(copy.deepcopy(backbone), method)
        curves[name] = train(model, batches, test, n_steps)
        symmetry = measure_equivariance(model, test[0], ENERGY).relative
        n_evaluations = model.frames(test[0]).n_evaluations
        print(f"{name:8s} {curves[name][-1][1]:10.3f} eV/Å {symmetry:18.1e} {n_evaluations / n_test:12.2f}")

    options.output.mkdir(parents=True, exist_ok=True)
    draw(curves, *torsion(model), options.output / "learned_canonicalization.svg")


def train(model, batches, test, n_steps):
    """Mean absolute errors of the forces on the test set while training, as (step, error)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    curve = []
    for step in range(n_steps + 1):
        if step % (n_steps // 8) == 0:
            curve.append((step, float((model.eval()(test[0], forces=True)["forces"] - test[1]).abs().mean())))
        batch, expected = batches[step % len(batches)]
        optimizer.zero_grad()
        (model.train()(batch, forces=True)["forces"] - expected).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # frames may turn fast
        optimizer.step()
    return curve


def torsion(model):
    """Energies while the hydroxyl group turns through the mirror plane, with and without a smooth change of side."""
    angles, out = torch.linspace(-40.0, 40.0, 161), {}
    scans = [molecule("CH3CH2OH") for _ in angles]
    for angle, atoms in zip(angles.tolist(), scans, strict=True):
        atoms.set_dihedral(0, 1, 2, 3, 180.0 + angle, indices=[3])  # C-C-O-H
    for width in (0.0, 0.05):
        model.method.mirror_width = width
        out[width] = 1000.0 * model(from_ase(scans))["energy"].detach()
    return angles, out


def draw(curves, angles, scans, path: Path) -> None:
    """Test errors while training, and the scan through the mirror plane."""
    with matplotlib.rc_context({"svg.hashsalt": "canon", "axes.spines.top": False, "axes.spines.right": False}):
        left, right = Figure(figsize=(8.4, 3.4), layout="constrained").subplots(1, 2)
        for name, curve in curves.items():
            left.plot(*zip(*curve, strict=True), color=COLORS[name], label=name, lw=1.8)
        left.set(title="ethanol, any orientation", xlabel="step of training", ylabel="error of the forces (eV/Å)")
        for width, energies in scans.items():
            right.plot(angles, energies - energies.mean(), lw=1.8, label=f"mirror_width={width}")
        right.set(title="through the mirror plane", xlabel="torsion of O-H (degrees from trans)", ylabel="energy (meV)")
        for axes in (left, right):
            axes.legend(frameon=False)
            axes.grid(color="#d0d8e0", lw=0.7)
        left.figure.savefig(path, metadata={"Date": None})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
