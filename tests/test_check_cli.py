"""``symmetrize check``: targets, declarations, exit statuses, what is printed and written."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from click.testing import CliRunner

from symmetrize.check import check_target, exit_status, load_target, table
from symmetrize.cli import main
from symmetrize.testing.running.catalog import all_checks
from symmetrize.testing.running.outcome import Finding, Outcome, Report, Result, Verdict
from symmetrize.testing.structures.geometries import ethanol, water

MODELS = '''
import torch
from ase.calculators.emt import EMT
from symmetrize import ECSE, Symmetrizer
from symmetrize.backbones.toy import ToyLocal


class Net(torch.nn.Module):
    """Energies of pairs, in which x counts for more."""

    def __init__(self, x=2.0, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([x, 1.0, 1.0], dtype=torch.float64) * scale)

    def forward(self, batch):
        neighbor, center = batch.edge_index
        vectors = (batch.pos[neighbor] - batch.pos[center]) * self.scale
        rows = torch.exp(-vectors.square().sum(dim=1))
        n = batch.ptr.shape[0] - 1
        return {"energy": rows.new_zeros(n).index_add(0, batch.batch[center], rows)}


net, isotropic = Net(), Net(x=1.0)
symmetric = Symmetrizer(ToyLocal(), ECSE())
calculator = EMT()


def make():
    return symmetric


def dipole(batch):
    centroid = batch.pos.new_zeros(batch.ptr.shape[0] - 1, 3).index_add(0, batch.batch, batch.pos)
    moved = batch.pos - (centroid / batch.ptr.diff()[:, None])[batch.batch]
    return {"dipole": torch.zeros_like(centroid).index_add(0, batch.batch, batch.z[:, None] * moved)}


def broken():
    raise ValueError("two\\nlines")


def crashes(batch):
    raise RuntimeError("out of order")


number = 3
'''

FEW = ["--only", "rotation_equivariance", "--only", "purity", "--only", "periodicity"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with models and structures, to be in."""
    (tmp_path / "models_for_the_command.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    items = []
    for n in range(3):
        atoms = ethanol() if n else water()
        atoms.calc = SinglePointCalculator(atoms, energy=-10.0 - n, forces=rng.normal(size=(len(atoms), 3)))
        items.append(atoms)
    write(tmp_path / "molecules.xyz", items)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models_for_the_command", raising=False)
    return tmp_path


def run(*args):
    """One command, with its output and without a traceback."""
    result = CliRunner().invoke(main, ["check", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def target(name):
    return f"models_for_the_command.py:{name}"


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_a_good_model_passes_with_status_0(folder):
    result = run(target("make"), "--structures", "molecules.xyz", "--no-library", *FEW)
    assert result.exit_code == 0, result.output
    for words in ("ToyLocal with ECSE", "claims O(3)", "about", "rotation_equivariance", "skipped", ": passed ("):
        assert words in result.output, result.output
    assert "structures: 3 in molecules.xyz" in result.output


def test_a_bad_model_fails_with_status_1_and_an_explanation(folder):
    arguments = ("--outputs", "energy=0e:structure", "--cutoff", 4, "--structures", "molecules.xyz", *FEW)
    result = run(target("net"), *arguments)
    assert result.exit_code == 1, result.output
    for words in ("FAILED", "rotation_equivariance[yours]: failed", "probably: ", "seed", "of the error scale"):
        assert words in result.output, result.output
    assert run(target("isotropic"), *arguments).exit_code == 0, "the isotropic twin passes"


def test_a_module_name_is_looked_for_in_the_current_directory(folder):
    name = "models_for_the_command:dipole"
    assert run(name, "--outputs", "dipole=1o", "--no-library", "--structures", "molecules.xyz", *FEW).exit_code == 0
    assert run(
        name, "--outputs", "dipole=1e", "--structures", "molecules.xyz", "--only", "inversion_equivariance"
    ).exit_code
    tolerant = ("--tolerance", "1e3", "--group", "SO(3)")
    assert run(name, "--outputs", "dipole=1e", "--structures", "molecules.xyz", *tolerant, *FEW).exit_code == 0


def test_calculators_and_classes(folder):
    for name in (target("calculator"), "ase.calculators.emt:EMT"):
        result = run(name, "--structures", "molecules.xyz", *FEW)
        assert result.exit_code == 0 and "(calculator, float64)" in result.output, result.output


def test_a_backbone_bare_and_symmetrized(folder):
    bare = run("toy:local", "--structures", "molecules.xyz", "--no-library", *FEW)
    assert bare.exit_code == 0 and "recorded, not judged" in bare.output and "recorded" in bare.output
    other = run("toy:local", "--symmetrize", "--group", "SO(3)", "--dtype", "float32", "--no-library",
                "--structures", "molecules.xyz", *FEW)  # fmt: skip
    assert other.exit_code == 0 and "ECSE, SO(3)" in other.output and "float32" in other.output


def test_known_failures(folder):
    arguments = (target("net"), "--outputs", "energy=0e", "--cutoff", 4, "--structures", "molecules.xyz", *FEW)
    result = run(*arguments, "--expect-failure", "rotation_equivariance=x counts for more")
    assert result.exit_code == 0 and "x counts for more" in result.output, result.output
    stale = run(*arguments, "--expect-failure", "rotation_equivariance=known", "--expect-failure", "purity=why not")
    assert stale.exit_code == 1 and "STALE" in stale.output and "remove the announcement" in stale.output


def test_a_model_that_cannot_be_evaluated_gives_status_2(folder):
    result = run(target("crashes"), "--outputs", "energy=0e:structure", "--structures", "molecules.xyz", *FEW)
    assert result.exit_code == 2 and "RuntimeError: out of order" in result.output
    result = run(target("crashes"), "--outputs", "energy=0e", "--structures", "molecules.xyz", *FEW)
    assert result.exit_code == 2 and "could not be evaluated: RuntimeError: out of order" in result.output
    assert "models_for_the_command.py, line" in result.output


def test_reports_and_how_to_repeat_it(folder):
    arguments = [target("make"), "--structures", "molecules.xyz", "--no-library", *FEW, "--seed", "4"]
    result = run(*arguments, "--report", "a/report.json", "--report", "report.md")
    assert result.exit_code == 0 and "report: a/report.json" in result.output
    content = json.loads((folder / "a" / "report.json").read_text())
    assert content["seed"] == 4 and content["verdict"] == "passed"
    assert content["environment"]["command"].startswith(f"symmetrize check {target('make')} --structures")
    assert (folder / "report.md").read_text().strip()


def test_references_of_the_file(folder):
    loss = ["--only", "loss_share"]
    with_them = run(target("make"), "--structures", "molecules.xyz", "--references", "--no-library", *loss)
    without = run(target("make"), "--structures", "molecules.xyz", "--no-library", *loss)
    assert "no reference" in without.output and "no reference" not in with_them.output, with_them.output


def test_quiet_prints_the_table_alone(folder):
    arguments = (target("make"), "--structures", "molecules.xyz", "--no-library", *FEW)
    quiet, loud = run(*arguments, "--quiet").output, run(*arguments).output
    assert "about" not in quiet and quiet.startswith("check ") and "about" in loud
    assert quiet.splitlines() == loud.splitlines()[-len(quiet.splitlines()) :]


# --- lists and help -------------------------------------------------------------------------------------------------


def test_all_checks_are_listed_with_their_meaning():
    result = run("--list")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for entry in all_checks().values():
        assert entry.name in text and " ".join(entry.meaning.split()[:6]) in text


def test_the_checks_of_a_target_are_listed_without_running(folder):
    result = run(target("make"), "--structures", "molecules.xyz", "--no-library", "--list", "--skip", "purity")
    lines = result.output.split("\n")
    assert result.exit_code == 0 and "rotation_equivariance[yours]" in lines and "purity" not in lines


def test_help_explains_itself_without_importing_torch():
    code = (
        "import sys\nfrom symmetrize.cli import main\n"
        "try:\n    main(['check', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'e3nn', 'ase', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("module:object", "dipole", "Exit status", "--expect-failure", "symmetric-tensor"):
        assert words in done.stdout or words == "dipole"


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Missing argument 'TARGET'"),
        (["pett"], "did you mean 'pet'"),
        (["toy:lokal"], "did you mean 'local'"),
        (["models_for_the_comand:net"], "did you mean 'models_for_the_command'"),
        ([target("nett")], "did you mean 'net'"),
        ([target("broken")], "ValueError: two lines"),
        ([target("number")], "got int"),
        ([target("net")], "--outputs energy=scalar:structure"),
        ([target("make"), "--outputs", "energy=0e"], "declares its own"),
        (["nowhere.py:net"], "no such file: nowhere.py"),
        (["nowhere.pt"], "no such file: nowhere.pt"),
        ([target("net"), "--outputs", "energy"], "expected NAME="),
        ([target("net"), "--outputs", "energy=0e:atoms"], "did you mean 'atom'"),
        ([target("net"), "--outputs", "energy=0e:atom,energy=0e"], "declared twice"),
        ([target("make"), "--only", "purty"], "did you mean 'purity'"),
        ([target("make"), "--expect-failure", "purity"], "ID=REASON"),
        ([target("make"), "--expect-failure", "purty=why"], "did you mean 'purity'"),
        ([target("make"), "--species", "H,Xx"], "'Xx'"),
        ([target("make"), "--report", "report.pdf"], ".html, .md, .json"),
        ([target("make"), "--references"], "--structures FILE"),
        ([target("make"), "--no-library"], "expected --structures FILE"),
        ([target("make"), "--symmetrize"], "expected a symmetrize.Backbone"),
        ([target("make"), "--structures", "nothing.xyz"], "does not exist"),
        ([target("make"), "--structures", "models_for_the_command.py"], "structures that ASE reads"),
        ([target("make"), "--profile", "thorough"], "'thorough'"),
    ],
)
def test_mistakes_give_status_2_and_a_line_that_helps(folder, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split()), result.output
    assert sum(line.startswith("Error: ") for line in result.output.splitlines()) == 1


def test_a_registered_name_comes_before_a_module(folder):
    (folder / "toy.py").write_text("local = 3\n")
    assert type(load_target("toy:local")).__name__ == "ToyLocal"
    assert load_target("toy.py:local") == 3


# --- the pieces -----------------------------------------------------------------------------------------------------


def made(*verdicts, number=1.0):
    results = [
        Result(
            "parity", f"set {k}", "Parity", v, Outcome((Finding("energy", number * (k + 1), 0.1, worst=f"place {k}"),))
        )
        for k, v in enumerate(verdicts)
    ]
    return Report({"name": "mine"}, tuple(results))


@pytest.mark.parametrize(
    "verdicts, status",
    [
        ([Verdict.PASSED], 0),
        ([Verdict.PASSED, Verdict.EXPECTED, Verdict.RECORDED, Verdict.SKIPPED], 0),
        ([Verdict.PASSED, Verdict.FAILED], 1),
        ([Verdict.PASSED, Verdict.ERROR], 1),
        ([Verdict.STALE], 1),
        ([Verdict.ERROR, Verdict.SKIPPED], 2),
        ([Verdict.SKIPPED], 2),
        ([Verdict.RECORDED], 2),
        ([], 2),
    ],
)
def test_exit_status(verdicts, status):
    assert exit_status(made(*verdicts)) == status


def test_the_table_shows_the_worst_of_the_worst_verdict():
    lines = table(made(Verdict.PASSED, Verdict.FAILED, Verdict.FAILED, Verdict.PASSED))
    assert len(lines) == 2 and "FAILED (2 of 4)" in lines[1] and "place 2" in lines[1] and "[set 2]" in lines[1]
    assert all(len(line) <= 40 for line in table(made(Verdict.FAILED), width=40))


def test_the_function_returns_the_status(folder):
    lines: list[str] = []
    assert (
        check_target(target("make"), only=FEW[1::2], structures="molecules.xyz", library=False, echo=lines.append) == 0
    )
    assert any("rotation_equivariance" in line for line in lines)
    assert torch.is_grad_enabled()
