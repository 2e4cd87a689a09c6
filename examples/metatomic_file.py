"""Symmetrise a model from its exported metatomic file alone, and turn a molecule around before and after.

    python examples/metatomic_file.py --model model.pt --structure molecule.xyz

Without --model, a small one is exported first.
"""

# Without postponed annotations: metatomic compares those of ``forward`` with types.

import argparse
import warnings
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035

import numpy as np
import torch
from ase.build import molecule
from ase.io import read
from matplotlib.figure import Figure
from symmetrize.backbones.metatomic import load

from symmetrize import ECSE, Identity, Symmetrizer, from_ase
from symmetrize.metatomic import import_metatomic

metatomic = import_metatomic()

from metatensor.torch import Labels, TensorBlock, TensorMap  # noqa: E402
from metatomic.torch import ModelOutput, NeighborListOptions, System  # noqa: E402


class Waves(torch.nn.Module):
    """Energy of an atom: sum over its neighbors of sin(k . d) times a cutoff function. Any model could be here."""

    def __init__(self) -> None:
        super().__init__()
        self.options = NeighborListOptions(cutoff=4.0, full_list=True, strict=True)
        self.register_buffer("wave", torch.tensor([0.8, -0.5, 1.1], dtype=torch.float64))

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        return [self.options]

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        energies: List[torch.Tensor] = []  # noqa: UP006
        for system in systems:
            d = system.get_neighbor_list(self.options).values[:, :, 0]
            x = torch.sum(d * d, dim=1) / 16.0
            energies.append(0.01 * torch.sum((1 - x) ** 4 * torch.sin(d @ self.wave) ** 2).reshape(1, 1))
        block = TensorBlock(
            values=torch.cat(energies),
            samples=Labels(["system"], torch.arange(len(systems)).reshape(-1, 1)),
            components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
            properties=Labels(["energy"], torch.tensor([[0]])),
        )
        return {"energy": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])}


def export(path: Path) -> Path:
    """The waves as a file."""
    capabilities = metatomic.ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="system")},
        atomic_types=[1, 6, 7, 8],
        interaction_range=4.0,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which the format is made of
        metatomic.AtomisticModel(Waves().eval(), metatomic.ModelMetadata(), capabilities).save(str(path))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="exported metatomic model")
    parser.add_argument("--structure", type=Path, help="a molecule, in any format of ASE")
    parser.add_argument("--small", action="store_true", help="fewer angles")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/metatomic_file"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    backbone = load(args.model or export(args.output / "model.pt"), ["energy"], dtype=torch.float64)
    models = {"bare": Symmetrizer(backbone, Identity()), "symmetrised": Symmetrizer(backbone, ECSE())}
    print(f"{backbone}\nscope: {models['bare'].scope}\n")

    atoms = read(args.structure) if args.structure else molecule("CH3CH2OH")
    angles, axis = np.linspace(0, 360, 25 if args.small else 73), np.array([1.0, 2.0, 3.0])
    energies, errors = {}, {}
    for name, model in models.items():
        found, rows = [], []
        for angle in angles:
            turned = atoms.copy()
            turned.rotate(angle, axis)
            found.append(model(from_ase(turned), forces=True))
            turned.positions = found[-1]["forces"].numpy()
            turned.rotate(-angle, axis)  # back: forces turn as positions do
            rows.append(np.abs(turned.positions - found[0]["forces"].numpy()).max())
        energies[name] = 1e3 * (torch.cat([out["energy"] for out in found]) - found[0]["energy"]).numpy()
        errors[name] = np.abs(energies[name]).max(), 1e3 * max(rows)
    print(f"largest change {'energy (meV)':>14s} {'forces (meV/Å)':>16s}")
    for name, (energy, force) in errors.items():
        print(f"{name:14s} {energy:14.1e} {force:16.1e}")

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(energies.items(), ("#e07b24", "#179a6e"), strict=True):
        axes.plot(angles, values, color=color, label=name)
    axes.set(xlabel="the molecule, turned by (degrees)", ylabel="change of the energy (meV)", xlim=(0, 360))
    axes.set_xticks(range(0, 361, 90))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
    figure.savefig(args.output / "energy.svg")


if __name__ == "__main__":
    main()
