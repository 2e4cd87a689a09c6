"""Any torch module: a padded transformer and a torch_geometric network become exactly equivariant, in one call each.

    python examples/any_module.py --output runs/examples/any_module

Neither network knows anything about rotations. The figure shows how wrong their answers are when a molecule is turned,
before and after; the last lines show what a wrong declaration looks like.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from ase.build import molecule
from torch import nn
from torch_geometric.nn import GINEConv, global_add_pool

from symmetrize import ECSE, DeclarationError, Identity, OutputSpec, Symmetrizer, from_ase, wrap
from symmetrize.ops.rotations import about_axis
from symmetrize.testing import Element, measure_equivariance

DIPOLE = {"dipole": OutputSpec("1o", per="structure")}


class PaddedTransformer(nn.Module):
    """Attention over the atoms of a molecule: (n_molecules, n_max, 3) and a mask, as most transformers have it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.species, self.place = nn.Embedding(10, width), nn.Linear(3, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.readout = nn.Linear(width, 3)

    def forward(self, positions, z, mask):
        hidden = self.encoder(self.place(positions) + self.species(z), src_key_padding_mask=~mask)
        return (self.readout(hidden) * mask[..., None]).sum(dim=1)


class GraphNetwork(nn.Module):
    """Message passing with raw edge vectors as edge features, as for any torch_geometric layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.species, self.edge = nn.Embedding(10, width), nn.Sequential(nn.Linear(3, width), nn.Tanh())
        mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.conv, self.readout = GINEConv(mlp, edge_dim=width), nn.Linear(width, 3)

    def forward(self, z, edge_index, edge_attr, batch):
        hidden = self.conv(self.species(z), edge_index, self.edge(edge_attr))
        return global_add_pool(self.readout(torch.tanh(hidden)), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer angles")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/any_module"))
    options = parser.parse_args()
    torch.manual_seed(0)
    transformer, graph = PaddedTransformer().double().eval(), GraphNetwork().double().eval()

    # The names of the arguments of forward say what each of them is; `layout` says how several molecules are put
    # together. Both declarations are tried at once, on random clusters.
    backbones = {
        "padded transformer": wrap(transformer, DIPOLE, layout="padded", center="centroid"),
        "graph network": wrap(graph, DIPOLE, cutoff=3.0, receptive_field=1),
    }

    batch = from_ase([molecule(name) for name in ("CH3CH2OH", "H2CO", "CH3CONH2")])
    angles = [360.0 * k / (12 if options.small else 72) for k in range(1, 12 if options.small else 72)]
    axis = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    turns = [Element(f"{a:.0f} degrees", about_axis(axis, math.radians(a))) for a in angles]
    curves = {}
    print(f"{'network':20s} {'error, bare':>12s} {'symmetrized':>12s} {'evaluations per molecule':>25s}")
    for name, backbone in backbones.items():
        exact = Symmetrizer(backbone, ECSE())
        errors = {}
        for label, model in (("bare", Symmetrizer(backbone, Identity())), ("ECSE", exact)):
            scale = {"dipole": model(batch)["dipole"].square().mean().sqrt().item()}
            found = measure_equivariance(model, batch, DIPOLE, turns, scale=scale)["dipole"]
            errors[label] = found.max.amax(dim=1) / scale["dipole"]
        curves[name] = errors
        cost = exact.frames(batch).n_evaluations / batch.num_graphs
        print(f"{name:20s} {errors['bare'].max():12.1e} {errors['ECSE'].max():12.1e} {cost:25.1f}")

    print("\nA wrong declaration, without center='centroid':")
    try:
        wrap(transformer, DIPOLE, layout="padded")
    except DeclarationError as error:
        print(f"  {error}")

    options.output.mkdir(parents=True, exist_ok=True)
    print(f"\nwrote {draw(angles, curves, options.output / 'any_module.svg')}")


def draw(angles, curves, path: Path) -> Path:
    """Errors against the angle of rotation, one panel per network."""
    from matplotlib.figure import Figure

    colors = {"bare": "#e07b24", "ECSE": "#179a6e"}
    with matplotlib.rc_context({"svg.hashsalt": "any_module", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        for axes, (name, errors) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
            for label, values in errors.items():
                axes.semilogy(angles, values.clamp(min=1e-17), color=colors[label], label=label, lw=1.8)
                axes.annotate(label, (angles[-1], values[-1]), (4, 0), textcoords="offset points", color=colors[label],
                              va="center")  # fmt: skip
            axes.set(title=name, xlabel="rotated by (degrees)", xticks=range(0, 361, 90), ylim=(1e-17, 10))
            axes.grid(color="#d0d8e0", lw=0.7)
        figure.axes[0].set_ylabel("error of the dipole (relative)")
        figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    main()
