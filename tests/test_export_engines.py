"""Engines that read the exported file: ASE and i-PI, with the input files that the documentation shows."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import require_adapter
from ase.build import molecule
from ase.io import read, write
from ase.optimize import BFGS

from symmetrize import ECSE, Identity, Symmetrizer, from_ase, load_backbone
from symmetrize.calculators import SymmetrizerCalculator

require_adapter("metatomic")

from symmetrize.export.metatomic import export  # noqa: E402  (needs what was asked for above)

# torch 2.13 deprecates all of TorchScript, and the engines still ask in metatomic's old ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]

DOCUMENT = Path(__file__).parent.parent / "docs" / "engines.md"


def shown(language, word):
    """The block of the documentation that contains a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.fixture(scope="module")
def model():
    return Symmetrizer(load_backbone("pet", "ethanol", dtype=torch.float64), ECSE()).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """With ``model.pt``, ``bare.pt``, and a structure in a box."""
    path = tmp_path_factory.mktemp("engines")
    export(model, path / "model.pt", name="ethanol")
    export(Symmetrizer(model.backbone, Identity()), path / "bare.pt")
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    atoms.center(vacuum=8.0)
    atoms.pbc = True
    write(path / "structure.xyz", atoms)
    return path


def calculator(path):
    from metatomic_ase import MetatomicCalculator

    return MetatomicCalculator(str(path), device="cpu")


def in_folder(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def forces_of(path, atoms):
    atoms = atoms.copy()
    atoms.calc = calculator(path)
    return atoms.get_potential_energy(), atoms.get_forces()


def test_ase_gives_what_the_model_gives(model, folder):
    atoms = read(folder / "structure.xyz")
    atoms.pbc = False
    other = atoms.copy()
    other.calc = SymmetrizerCalculator(model)
    energy, forces = forces_of(folder / "model.pt", atoms)
    scale = np.sqrt(np.mean(other.get_forces() ** 2))
    assert abs(energy - other.get_potential_energy()) < 1e-9
    assert np.abs(forces - other.get_forces()).max() < 1e-10 * scale
    assert np.abs(forces_of(folder / "bare.pt", atoms)[1] - forces).max() > 1e-4 * scale


def test_ase_relaxes(folder):
    atoms = read(folder / "structure.xyz")
    atoms.pbc = False
    atoms.calc = calculator(folder / "model.pt")
    before, start = atoms.get_potential_energy(), np.abs(atoms.get_forces()).max()
    BFGS(atoms, logfile=None).run(fmax=0.2, steps=25)
    assert atoms.get_potential_energy() < before - 0.05 and np.abs(atoms.get_forces()).max() < 0.2 < start


def test_ase_script_of_the_documentation(folder):
    script = shown("python", "MetatomicCalculator").replace("dynamics.run(100)", "dynamics.run(8)")
    assert "dynamics.run(8)" in script
    printed = in_folder([sys.executable, "-W", "ignore", "-c", script], folder)
    # Total energy of ethanol, with the composition's part.
    assert float(printed.split()[-2]) == pytest.approx(-4209.0, abs=10.0)


def conserved(folder):
    text = (folder / "nve.out").read_text().splitlines()
    return np.array([line.split() for line in text if not line.startswith("#")], dtype=float)


def test_ipi_input_of_the_documentation(model, folder, tmp_path):
    if importlib.util.find_spec("ipi") is None:
        pytest.skip("i-PI is not installed: pip install ipi")
    program = shutil.which("i-pi", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert program is not None

    def simulate(name, **replacements):
        place = tmp_path / name
        place.mkdir()
        shutil.copy(folder / "structure.xyz", place)
        shutil.copy(folder / "model.pt", place)
        text = shown("xml", "ffdirect")
        for old, new in replacements.values():
            assert old in text
            text = text.replace(old, new)
        (place / "input.xml").write_text(text)
        in_folder([program, "input.xml"], place)
        return place

    place = simulate("short")
    table = conserved(place)
    assert len(table) == 31 and np.isfinite(table).all()
    # Velocity Verlet: the energy wavers by far less than what the kinetic and potential parts exchange.
    wavering, exchanged = np.ptp(table[:, 2]), np.ptp(table[:, 3])
    assert exchanged > 0.1 and wavering < 0.05 * exchanged
    # And twice as finely, over the same time, by about a quarter: what remains is the integrator, not the model.
    fine = simulate(
        "fine", steps=("<total_steps> 30", "<total_steps> 60"), step=("'femtosecond'> 0.5", "'femtosecond'> 0.25")
    )
    assert np.ptp(conserved(fine)[:, 2]) < 0.4 * wavering


def test_ipi_moves_atoms_by_the_forces_of_the_model(model, folder):
    if importlib.util.find_spec("ipi") is None:
        pytest.skip("i-PI is not installed: pip install ipi")
    from ipi.pes.metatomic import MetatomicDriver
    from ipi.utils.units import unit_to_internal, unit_to_user

    driver = MetatomicDriver(str(folder / "structure.xyz"), str(folder / "model.pt"))
    atoms = read(folder / "structure.xyz")
    target = model(from_ase(atoms), forces=True, stress=True, create_graph=False)
    cell = unit_to_internal("length", "angstrom", atoms.cell.array.T)
    energy, forces, virial, _ = driver(cell, unit_to_internal("length", "angstrom", atoms.positions))
    forces = unit_to_user("force", "ev/ang", np.asarray(forces).reshape(-1, 3))
    expected = target["forces"].detach().numpy()
    assert np.abs(forces - expected).max() < 1e-9 * np.sqrt(np.mean(expected**2))
    assert float(unit_to_user("energy", "electronvolt", energy)) == pytest.approx(float(target["energy"]), abs=1e-8)
    # Its virial is minus the derivative by the strain.
    expected = -target["stress"][0].detach().numpy() * atoms.get_volume()
    assert np.abs(unit_to_user("energy", "electronvolt", np.asarray(virial)) - expected).max() < 1e-8
    assert np.abs(expected).max() > 0.1
