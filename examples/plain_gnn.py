"""Plain networks of torch-geometric on raw edge vectors: how wrong they are when a molecule turns, and how to mend it.

Two random ones (convolutions with attention and with perceptrons), wrapped as they are, and the trained reference
network of this package with its accuracy, which averaging over frames (ECSE) leaves as it is.
Run: python examples/plain_gnn.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from symmetrize.backbones.pyg import PyGBackbone, load
from torch_geometric.nn import GINEConv, Linear, Sequential, TransformerConv

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase
from symmetrize.methods.identity import Identity
from symmetrize.ops.rotations import random_rotations
from symmetrize.report.style import COLORS

SPECIES = (1, 6, 8)
DATA = Path(__file__).parent / "data" / "ethanol_1000.xyz"


def gine() -> torch.nn.Module:
    def mlp() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16))

    layers = [(GINEConv(mlp(), edge_dim=4), "x, edges, attr -> x") for _ in range(2)]
    return Sequential("x, edges, attr", [*layers, (Linear(16, 1), "x -> x")])


def attention() -> torch.nn.Module:
    layers = [(TransformerConv(16, 16, edge_dim=4), "x, edges, attr -> x") for _ in range(2)]
    return Sequential("x, edges, attr", [*layers, (Linear(16, 1), "x -> x")])


def change_by_angle(model: Symmetrizer, atoms: Atoms, angles: np.ndarray) -> np.ndarray:
    """How far the energy (eV) of a molecule that turns about a skew axis is from where it started."""
    turned = []
    for angle in angles:
        turned.append(atoms.copy())
        turned[-1].rotate(angle, (1.0, 2.0, 0.5))
    with torch.no_grad():
        energy = model(from_ase(turned))["energy"]
    return (energy - energy[0]).abs().numpy()


def errors(model: Symmetrizer, frames: list, rotations: torch.Tensor) -> tuple[float, float]:
    """Root mean square errors of energies (meV) and force components (meV/angstrom) of turned molecules."""
    turned = []
    for atoms, rotation in zip(frames, rotations, strict=True):
        turned.append(atoms.copy())
        turned[-1].positions = atoms.positions @ rotation.numpy().T
    out = model(from_ase(turned), forces=True)
    energies = torch.tensor([atoms.get_potential_energy() for atoms in frames], dtype=torch.float64)
    forces = [torch.tensor(a.get_forces()) @ r.T for a, r in zip(frames, rotations, strict=True)]
    differences = out["energy"] - energies, out["forces"] - torch.cat(forces)
    return 1000 * float(differences[0].square().mean().sqrt()), 1000 * float(differences[1].square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few seconds instead of a minute")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/plain_gnn"))
    options = parser.parse_args()

    torch.manual_seed(0)
    energy = {"energy": OutputSpec("0e", per="atom", reduce="sum")}
    trained = load(dtype=torch.float64)
    backbones = {
        "GINEConv": PyGBackbone(gine().double(), energy, 4.0, species=SPECIES, n_features=16),
        "TransformerConv": PyGBackbone(attention().double(), energy, 4.0, species=SPECIES, n_features=16),
        "reference, trained": trained,
    }
    test = trained.metadata["training"]["test_structures"][: 5 if options.small else 100]
    frames = [ase.io.read(DATA, index) for index in test]
    unturned = torch.eye(3, dtype=torch.float64).expand(len(frames), 3, 3)
    random = random_rotations(len(frames), torch.Generator().manual_seed(0))
    print(f"{len(frames)} test frames of ethanol: root mean square errors, energy (meV) and forces (meV/angstrom)")
    for label, method in {"bare": Identity(), "ECSE": ECSE()}.items():
        model = Symmetrizer(trained, method, scope="structure")
        given, turned = errors(model, frames, unturned), errors(model, frames, random)
        print(f"{label:6} as given {given[0]:8.4f} {given[1]:9.4f}    turned {turned[0]:8.4f} {turned[1]:9.4f}")

    # Changes alone matter from here on: energies of the composition would hide them behind their rounding.
    trained.composition.zero_()
    angles = np.linspace(0, 180, 10 if options.small else 61)
    curves = {}
    for name, backbone in backbones.items():
        for method, averaged in {"bare": Identity(), "O(3)": ECSE()}.items():
            model = Symmetrizer(backbone.eval(), averaged, scope="structure")
            curves[name, method] = change_by_angle(model, frames[0], angles)
        worst = [curves[name, method].max() for method in ("bare", "O(3)")]
        print(f"{name:20} turned: changes by {worst[0]:.1e} eV bare, {worst[1]:.1e} eV with ECSE")
    draw(options.output, angles, curves)


def draw(folder: Path, angles: np.ndarray, curves: dict) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), sharey=True, layout="constrained")
    for number, ((name, method), values) in enumerate(curves.items()):
        axis, label = axes[number // 2], {"bare": "bare", "O(3)": "with ECSE"}[method]
        axis.semilogy(angles[1:], np.maximum(values[1:], 1e-16), color=COLORS[method], label=label)
        axis.set(title=name, xlabel="angle (degrees)", xticks=[0, 60, 120, 180])
    axes[0].set(ylabel="change of the energy (eV)", ylim=(3e-17, 10))
    axes[1].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "figure.png", dpi=150)
    print(f"figure: {folder / 'figure.png'}")


if __name__ == "__main__":
    main()
