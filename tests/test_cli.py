"""The command line, and the functions behind it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from click.testing import CliRunner

from symmetrize.cli import main
from symmetrize.testing.structures.geometries import crystal, ethanol

WEIGHTS = Path(importlib.util.find_spec("symmetrize.backbones").submodule_search_locations[0]) / "pet" / "weights"
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "ethanol.json").is_file(), reason="the trained PET is not shipped with this installation"
)


def run(*args):
    """One command, with its output and without a traceback."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.fixture
def molecules(tmp_path):
    """Three ethanols with reference energies and forces."""
    rng = np.random.default_rng(0)
    items = []
    for n in range(3):
        atoms = ethanol()
        atoms.positions += 0.05 * rng.normal(size=(9, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-4209.0 - n, forces=rng.normal(size=(9, 3)))
        items.append(atoms)
    path = tmp_path / "molecules.xyz"
    write(path, items, format="extxyz")
    return path


# --- without torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["evaluate", "--help"], ["train", "-h"]])
def test_help_does_not_import_the_heavy_libraries(arguments):
    heavy = ["torch", "e3nn", "lightning", "torch_geometric", "matplotlib", "vesin_torch", "ase", "numpy"]
    code = (
        "import sys\nfrom symmetrize.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_names_every_command():
    text = run("--help").output
    for command in ("demo", "train", "evaluate", "list"):
        assert command in text and run(command, "--help").exit_code == 0


def test_list_names_backbones_and_methods():
    result = run("list")
    assert result.exit_code == 0
    for word in ("pet", "toy", "ECSE", "Identity", "BSD-3-Clause"):
        assert word in result.output


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_prints_errors_and_writes_what_it_predicts(molecules, tmp_path):
    output = tmp_path / "new" / "predicted.xyz"
    result = run("evaluate", molecules, "--backbone", "toy:local", "--output", output, "--spread")
    assert result.exit_code == 0, result.output
    for word in ("3 structures, 27 atoms", "O(3)", "energy MAE", "force  MAE", "RMSE", "wrote"):
        assert word in result.output
    references, predictions = read(molecules, ":"), read(output, ":")
    assert [p.name for p in output.parent.iterdir()] == ["predicted.xyz"], "no half-written file is left"
    assert len(predictions) == 3
    errors = []
    for reference, prediction in zip(references, predictions, strict=True):
        assert np.allclose(prediction.positions, reference.positions)
        assert np.isfinite(prediction.get_forces()).all() and prediction.info["energy_spread"] > 0.0
        errors.append(abs(prediction.get_potential_energy() - reference.get_potential_energy()))
    assert f"energy MAE {1e3 * np.mean(errors):.3f} meV" in result.output


def test_evaluate_is_what_the_library_gives(molecules, tmp_path):
    import torch

    from symmetrize import ECSE, Symmetrizer, from_ase, load_backbone

    output = tmp_path / "predicted.xyz"
    run("evaluate", molecules, "--backbone", "toy:local", "--group", "SO(3)", "--batch-size", "2", "--output", output)
    model = Symmetrizer(load_backbone("toy").double(), ECSE(), group="SO(3)")
    out = model(from_ase(read(molecules, ":")), forces=True)
    predictions = read(output, ":")
    energies = torch.tensor([p.get_potential_energy() for p in predictions], dtype=torch.float64)
    forces = torch.as_tensor(np.concatenate([p.get_forces() for p in predictions]))
    assert torch.allclose(energies, out["energy"].detach(), rtol=0, atol=1e-8)
    assert torch.allclose(forces, out["forces"].detach(), rtol=0, atol=1e-7)


def test_the_bare_backbone_is_another_model(molecules):
    bare = run("evaluate", molecules, "--backbone", "toy:local", "--group", "none").output
    symmetric = run("evaluate", molecules, "--backbone", "toy:local").output
    assert "bare" in bare and "bare" not in symmetric
    assert bare.splitlines()[1] != symmetric.splitlines()[1]


def test_evaluate_does_not_warn(molecules):
    """A warning about gradients in the middle of a table is a bug of ours."""
    import warnings

    import torch

    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run("evaluate", molecules, "--backbone", "toy:local", "--spread").exit_code == 0
    finally:
        torch.set_warn_always(False)


@needs_weights
def test_evaluate_with_the_trained_model(molecules, tmp_path):
    output = tmp_path / "predicted.xyz"
    result = run("evaluate", molecules, "--output", output)
    assert result.exit_code == 0 and "pet:ethanol" in result.output, result.output
    predictions = read(output, ":")
    assert all(-4300 < p.get_potential_energy() < -4100 for p in predictions), "the composition is included, in eV"


def test_explain_predicts_without_evaluating(molecules):
    result = run("evaluate", molecules, "--backbone", "toy:local", "--explain")
    assert result.exit_code == 0
    assert "evaluations" in result.output and "27 atoms" in result.output and "MAE" not in result.output


def test_structures_without_references(tmp_path):
    path = tmp_path / "plain.xyz"
    write(path, ethanol())
    result = run("evaluate", path, "--backbone", "toy:local", "--no-forces")
    assert result.exit_code == 0 and "no reference" in result.output


def test_stress_of_crystals(tmp_path):
    path, output = tmp_path / "crystal.xyz", tmp_path / "out.xyz"
    write(path, crystal("C", "diamond", 3.6, rattle=0.1))
    assert run("evaluate", path, "--backbone", "toy:local", "--stress", "--output", output).exit_code == 0
    assert np.abs(read(output).get_stress()).max() > 1e-4


# --- mistakes -------------------------------------------------------------------------------------------------------


def one_line(result, *words):
    """Exit status 1 and a message that fits on one line."""
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: ") and len(result.output.strip().splitlines()) == 1, result.output
    for word in words:
        assert word in result.output, result.output


@pytest.mark.parametrize(
    "backbone, words", [("pett", ["pett", "did you mean 'pet'"]), ("toy:lokal", ["lokal", "did you mean 'local'"])]
)
def test_unknown_backbones_get_a_suggestion(molecules, backbone, words):
    one_line(run("evaluate", molecules, "--backbone", backbone), *words)


def test_impossible_combinations_are_one_line(molecules):
    one_line(run("evaluate", molecules, "--backbone", "toy:global", "--scope", "atom"), "scope", "receptive_field")
    one_line(run("evaluate", molecules, "--backbone", "toy:local", "--stress"), "stress", "cell", "structure 0")


def test_unusable_structures_are_one_line(tmp_path):
    path = tmp_path / "bad.xyz"
    write(path, [ethanol(), Atoms("H2", positions=[[0, 0, 0], [0, 0, 0]])])
    one_line(run("evaluate", path, "--backbone", "toy:local"), "structure 1", "coincident")


def test_a_missing_file_is_a_usage_error(tmp_path):
    result = run("evaluate", tmp_path / "nothing.xyz")
    assert result.exit_code == 2 and "nothing.xyz" in result.output and "does not exist" in result.output


@pytest.mark.parametrize(
    "content", ["", "3\ncut off\nC 0 0\n", "not a structure at all\n"], ids=["empty", "cut", "text"]
)
def test_an_unreadable_file_is_one_line(tmp_path, content):
    path = tmp_path / "broken.xyz"
    path.write_text(content)
    one_line(run("evaluate", path, "--backbone", "toy:local"), "broken.xyz")


def test_unknown_commands_and_options_are_usage_errors(molecules):
    for arguments in (
        ["evaluat"],
        ["evaluate", molecules, "--group", "O3"],
        ["evaluate"],
        ["evaluate", molecules, "--x"],
    ):
        assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["recipe"]),
        ("data: {path: a.xyz, train: 1, validation: 1}\nbackbone: {name: pet}\nepoch: 3\n", ["epoch", "did you mean"]),
        ("data: {path: nowhere.xyz, train: 1, validation: 1}\nbackbone: {name: pet}\n", ["nowhere.xyz"]),
    ],
    ids=["empty", "unknown entry", "no data"],
)
def test_a_bad_recipe_is_one_line(tmp_path, content, words):
    pytest.importorskip("lightning", reason="training needs lightning")
    config = tmp_path / "recipe.yaml"
    config.write_text(content)
    one_line(run("train", config, "--output", tmp_path / "run", "--quiet"), *words)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_recipe_that_is_no_yaml_says_where(tmp_path):
    pytest.importorskip("lightning", reason="training needs lightning")
    config = tmp_path / "recipe.yaml"
    config.write_text("seed: 1\ndata: [")
    result = run("train", config, "--output", tmp_path / "run", "--quiet")
    assert result.exit_code == 1 and result.output.startswith("Error: ")
    assert "YAML" in result.output and "recipe.yaml" in result.output and "line 2" in result.output


def test_a_missing_recipe_is_a_usage_error(tmp_path):
    result = run("train", tmp_path / "nothing.yaml")
    assert result.exit_code == 2 and "nothing.yaml" in result.output
