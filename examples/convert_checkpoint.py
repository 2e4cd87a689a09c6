"""A checkpoint of metatrain's PET: converted, compared with metatrain's own answers, and made exactly equivariant.

    python examples/convert_checkpoint.py --checkpoint model.ckpt --trust-pickle --structures test.xyz

Without a checkpoint a tiny model is trained first, by metatrain itself, on a few frames of ethanol.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import warnings
from pathlib import Path

import ase.io
import matplotlib
import torch
from matplotlib.figure import Figure
from symmetrize.backbones.pet.convert import convert

from symmetrize import ECSE, Identity, MissingDependencyError, Symmetrizer, from_ase
from symmetrize.metatomic import compilable, import_metatomic, import_metatrain
from symmetrize.ops.rotations import about_axis

DATA = Path(__file__).parent / "data" / "ethanol_1000.xyz"
TRAINING = """
architecture:
  name: pet
  model: {{cutoff: 4.0, d_pet: 16, d_node: 16, d_head: 16, d_feedforward: 16, num_heads: 2, num_attention_layers: 1,
           num_gnn_layers: 1, featurizer_type: residual}}
  training: {{batch_size: 5, num_epochs: {epochs}, learning_rate: 3.e-3, num_workers: 0}}
training_set:
  systems: {{read_from: frames.xyz, length_unit: angstrom}}
  targets: {{energy: {{key: energy, unit: eV, forces: {{key: forces}}}}}}
validation_set: 0.2
"""


def train(folder: Path, n_frames: int, epochs: int) -> Path:
    """A checkpoint that metatrain's command line writes (``mtt train options.yaml``)."""
    ase.io.write(folder / "frames.xyz", ase.io.read(DATA, f":{n_frames}"))
    (folder / "options.yaml").write_text(TRAINING.format(epochs=epochs))
    command = [sys.executable, "-m", "metatrain", "train", "options.yaml", "-o", "model.pt"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "model.ckpt"


def answers_of_metatrain(checkpoint: Path, frames) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy per atom and forces, as metatrain computes them."""
    metatomic, lists = import_metatomic(), import_metatrain("metatrain.utils.neighbor_lists")
    with compilable():
        model = import_metatrain("metatrain.utils.io").load_model(checkpoint).double().eval()
    systems = []
    for system in metatomic.systems_to_torch(frames, dtype=torch.float64):
        system.positions.requires_grad_()
        systems.append(lists.get_system_with_neighbor_lists(system, model.requested_neighbor_lists()))
    energy = model(systems, {"energy": metatomic.ModelOutput(sample_kind="atom")})["energy"].block().values[:, 0]
    gradients = torch.autograd.grad(energy.sum(), [system.positions for system in systems])
    return energy.detach(), -torch.cat(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="model.ckpt, as mtt train writes it")
    parser.add_argument("--trust-pickle", action="store_true", help="run the code that the checkpoint may contain")
    parser.add_argument("--structures", type=Path, default=DATA, help="to compare on; the last 20 are read")
    parser.add_argument("--small", action="store_true", help="less training, fewer angles")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/convert_checkpoint"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="torch|metat")
    try:
        import_metatrain()
    except MissingDependencyError as error:
        sys.exit(str(error))
    own = options.checkpoint is None
    checkpoint = train(options.output, 20, 2 if options.small else 40) if own else options.checkpoint
    model = convert(checkpoint, options.output / "pet", trust_pickle=own or options.trust_pickle, dtype=torch.float64)
    print(f"wrote {options.output / 'pet'}.safetensors and .json")

    frames = ase.io.read(options.structures, ":")[-20:]
    batch = from_ase(frames)
    out, composition = Symmetrizer(model, Identity())(batch, forces=True), model.baseline(batch)["energy"]
    energy, forces = answers_of_metatrain(checkpoint, frames)
    print("largest difference from metatrain, over the RMS")
    pairs = {"forces": (out["forces"], forces)}
    pairs["energies without composition"] = (out["atomic_energy"] - composition, energy - composition)
    for name, (ours, theirs) in pairs.items():
        print(f"  {name:30s} {float((ours - theirs).abs().max() / theirs.square().mean().sqrt()):.1e}")

    # One molecule, turned: the network's forces depend on the orientation, the symmetrized ones turn with it.
    axis, molecule, curves = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), from_ase(frames[0]), {}
    angles = list(range(10, 360, 50 if options.small else 10))
    for label, method in (("bare", Identity()), ("ECSE", ECSE())):
        symmetrized, changes = Symmetrizer(model, method), []
        for angle in angles:
            rotation, turned = about_axis(axis, math.radians(angle)), molecule.clone()
            turned.pos = molecule.pos @ rotation.T
            ours, upright = (symmetrized(b, forces=True)["forces"] for b in (turned, molecule))
            changes.append((ours @ rotation - upright).abs().max())
        curves[label] = torch.stack(changes)
        print(f"{label}: forces change by {float(curves[label].max()):.1e} eV/Å when the molecule is turned")

    path = options.output / "convert_checkpoint.svg"
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(forces.flatten(), out["forces"].flatten(), ".", ms=3, color="#4186d8")
        left.set(title="converted model", xlabel="force by metatrain (eV/Å)", ylabel="force (eV/Å)", aspect="equal")
        for (label, values), color in zip(curves.items(), ("#e07b24", "#179a6e"), strict=True):
            right.semilogy(angles, values.clamp(min=1e-17), color=color, lw=1.8, label=label)
        right.set(title="one molecule, turned", xlabel="rotated by (degrees)", xticks=range(0, 361, 90))
        right.set(ylabel="largest change of a force (eV/Å)", ylim=(1e-17, 10))
        right.legend(frameon=False, loc="center")
        figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
