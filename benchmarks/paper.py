"""``ECSE.paper()`` and the authors' code, number by number: ``python -m benchmarks.paper --pet-source PATH``.

PATH is a clone of github.com/spozdn/pet, of which ``src/sp_frames_calculator.py`` and the default options are loaded.
``--freeze tests/data/paper_ecse.json`` writes what that code computes, so that tests compare without it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import read
from symmetrize.backbones.pet import PET, PETConfig
from torch import Tensor

from benchmarks.field_tools import ProofOfConcept, _default_dtype
from benchmarks.record import Column, Result
from symmetrize import ECSE, Symmetrizer, from_ase, keys
from symmetrize.data import validate, with_neighbors
from symmetrize.files import write_text

SOURCE = "github.com/spozdn/pet (MIT), src/sp_frames_calculator.py, SPFramesCalculator.get_all_frames_global"


@dataclass(frozen=True)
class Case:
    """A structure and the options of the two.

    Attributes
    ----------
    name : str
    atoms : Atoms
    cutoff : float
    theirs : dict
        Entries of ``sp_default_hypers.yaml`` that are replaced.
    ours : dict
        The same as arguments of `ECSE.paper`.
    """

    name: str
    atoms: Atoms
    cutoff: float
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def species(self) -> list[int]:
        """Atomic numbers, ascending."""
        return sorted({int(z) for z in self.atoms.numbers})


def cases() -> list[Case]:
    """Molecules, crystals and a liquid-like cell; with and without pruning; nearly collinear; at the outer cutoff."""
    ethanol = read(str(files("symmetrize.demo").joinpath("data/ethanol-test.xyz")), "0")
    ethanol.pbc = False
    methane = molecule("CH4")
    methane.positions += np.random.default_rng(0).normal(scale=0.2, size=(5, 3))
    silicon = bulk("Si", cubic=True)
    silicon.rattle(0.1, seed=1)
    water = molecule("H2O")
    cell = Atoms(cell=[5.0, 5.2, 5.5], pbc=True)
    for n, place in enumerate([(1.0, 1.0, 1.0), (3.3, 1.8, 3.9), (1.2, 3.9, 3.0)]):
        one = water.copy()
        one.rotate(70.0 * n + 10.0, (1.0, 0.4 * n, 0.3))
        one.translate(np.array(place) - one.positions[0])
        cell += one
    bent = Atoms("OHH", [[0.0, 0.0, 0.0], [0.95, 0.18, 0.0], [-0.94, 0.165, 0.0]])
    leaving = Atoms("OHH", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 4.99, 0.0]])
    found = [
        Case("ethanol", ethanol, 4.5),
        Case("ethanol, not pruned", ethanol, 3.0, {"NUM_PRUNNINGS": 0}, {"pruning": 0}),
        Case("ethanol, species pruning", ethanol, 4.5, {"SPECIES_PRUNNING": True}, {"species_pruning": [1, 6, 8]}),
        Case("ethanol, no linear factor", ethanol, 4.5, {"ADD_LINEAR_MULTIPLIER_Q_FUNC": False}, {"linear": False}),
        Case("methane, random", methane, 4.0),
        Case("silicon, 8 atoms", silicon, 4.0),
        Case("water cell", cell, 4.5),
        Case("water, nearly linear", bent, 4.5),
        Case("atom at the cutoff", leaving, 5.0),
    ]
    for case in found:  # exactly what is frozen
        case.atoms.positions = case.atoms.positions.round(6)
        case.atoms.cell = np.asarray(case.atoms.cell).round(6)
    return found


class Authors(ProofOfConcept):
    """The authors' frames, weights and auxiliary weight; energies and forces of a network averaged with them."""

    def __init__(self, backbone: PET, source: Path, replaced: dict[str, Any]) -> None:
        super().__init__(backbone, source)
        options = yaml.safe_load((source / "default_hypers/sp_default_hypers.yaml").read_text())
        self.calculator.sp_hypers = SimpleNamespace(**{**options, **replaced})

    def everything(self, atoms: Atoms) -> tuple[Tensor, Tensor, float]:
        """Rotations (n, 3, 3), weights (n,), weight of the auxiliary model."""
        batch = with_neighbors(validate(from_ase([atoms])), float(self.backbone.cutoff or 0.0))
        (source, target), vectors, z = batch[keys.EDGE_INDEX], batch[keys.EDGE_VEC], batch[keys.Z]
        kinds = torch.searchsorted(torch.tensor(self.backbone.species), z)
        around = [[vectors[target == n], kinds[source[target == n]], kinds[n]] for n in range(len(z))]
        with _default_dtype(vectors.dtype), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using torch.cross without specifying the dim arg")
            axes, weights, other = self.calculator.get_all_frames_global(
                around, float(self.backbone.cutoff or 0.0), self.n_species
            )
        return torch.stack(axes), torch.as_tensor(weights), float(other)


def network(case: Case) -> PET:
    """A small PET with random weights, float64."""
    config = PETConfig(tuple(case.species), cutoff=case.cutoff, d_pet=16, d_node=16, d_head=16, d_feedforward=16)
    return PET(config, seed=0).to(torch.float64).requires_grad_(False).eval()


def compare(case: Case, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Largest differences, and what the authors' code computes."""
    backbone = network(case)
    authors = Authors(backbone, source, case.theirs)
    rotations, weights, other = authors.everything(case.atoms)
    energy, forces = authors.evaluate(authors.prepare([case.atoms]))
    lengths = PETConfig(tuple(case.species), cutoff=case.cutoff, d_pet=8, num_heads=2, inputs="lengths")
    auxiliary = PET(lengths).to(torch.float64)
    batch = from_ase([case.atoms])
    model = Symmetrizer(backbone, ECSE.paper(**case.ours), group="SO(3)", scope="structure").eval()
    ours, out = model.frames(batch), model(batch, forces=True)
    total = Symmetrizer(backbone, ECSE.paper(**case.ours, auxiliary=auxiliary), group="SO(3)", scope="structure")
    with_auxiliary = float(total.frames(batch).total_weight.detach()) - float(ours.total_weight.detach())
    # Frames as a set: by the nearest one.
    same = (rotations[:, None] - ours.rotations[None]).abs().amax(dim=(2, 3))
    nearest = same.argmin(dim=1)
    record = {
        "structure": case.name,
        "n_atoms": len(case.atoms),
        "n_frames": len(weights),
        "n_ours": ours.n_frames,
        "total_weight": float(weights.sum()),
        "auxiliary": other,
        "frames": float(same.min(dim=1).values.max()),
        "weights": float((weights - ours.weights.detach()[nearest]).abs().max()),
        "auxiliary_difference": abs(with_auxiliary - other),
        "energy": float((energy - out["energy"]).abs().max()),
        "forces": float((forces - out["forces"]).abs().max()),
    }
    frozen = {
        "name": case.name,
        "numbers": case.atoms.numbers.tolist(),
        "positions": case.atoms.positions.tolist(),
        "cell": np.asarray(case.atoms.cell).tolist(),
        "pbc": case.atoms.pbc.tolist(),
        "cutoff": case.cutoff,
        "options": case.ours,
        "weights": weights.tolist(),
        "auxiliary_weight": other,
        "rotations": rotations.tolist(),
    }
    return record, frozen


_COLUMNS = (
    Column("structure", "structure"),
    Column("n_atoms", "atoms"),
    Column("n_frames", "frames, theirs"),
    Column("n_ours", "ours"),
    Column("total_weight", "total weight", "{:.4g}".format),
    Column("auxiliary", "w_aux", "{:.3g}".format),
    *(
        Column(key, f"difference: {title}", "{:.1e}".format)
        for key, title in (
            ("frames", "frames"),
            ("weights", "weights"),
            ("auxiliary_difference", "w_aux"),
            ("energy", "energy (eV)"),
            ("forces", "forces (eV/A)"),
        )
    ),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--pet-source", type=click.Path(exists=True, path_type=Path), required=True, help="A clone of spozdn/pet."
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/paper"), show_default=True)
@click.option("--freeze", type=click.Path(path_type=Path), help="Also write the authors' numbers to this file.")
def main(pet_source: Path, output: Path, freeze: Path | None) -> None:
    """Compare frames, weights and averaged energies and forces of ECSE.paper() with the authors' code."""
    torch.set_num_threads(1)
    found = [compare(case, pet_source) for case in cases()]
    result = Result("ECSE.paper() and the authors' code", [record for record, _ in found], _COLUMNS)
    click.echo(result.table())
    worst = max(record[key] for record, _ in found for key in ("frames", "weights", "auxiliary_difference"))
    click.echo(f"largest difference of frames and weights: {worst:.1e}")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", json.dumps([record for record, _ in found], indent=1))
    if freeze is not None:
        about = f"Frames and weights that {SOURCE} computes with its default options in float64; facts, no code."
        made = "python -m benchmarks.paper --pet-source CLONE --freeze tests/data/paper_ecse.json"
        structures = "ethanol: MD17 (symmetrize/demo/data/README.md); the others are made by benchmarks/paper.py"
        # Frames of unpruned weights add little: weights alone.
        kept = [{**case, "rotations": case["rotations"] if len(case["weights"]) <= 24 else None} for _, case in found]
        document = {
            "about": about,
            "made_by": made,
            "structures": structures,
            "torch": torch.__version__,
            "cases": kept,
        }
        lines = json.dumps(document, indent=1)
        write_text(freeze, _compact(lines) + "\n")


def _compact(text: str) -> str:
    """JSON with lists of numbers on one line."""
    document = json.loads(text)
    given = document.pop("cases")
    head = json.dumps(document, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(case) for case in given)
    return f'{head},\n "cases": [\n{body}\n ]\n}}'


if __name__ == "__main__":
    main()
