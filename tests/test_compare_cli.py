"""``symmetrize compare``, ``symmetrize report`` and ``symmetrize check --method``."""

from __future__ import annotations

import json

import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.io import write
from click.testing import CliRunner

import symmetrize.study.measures
from symmetrize.cli import main
from symmetrize.errors import DeclarationError
from symmetrize.methods.text import read_method
from symmetrize.study.command import table

STUDY = {
    "name": "small",
    "data": {
        "ethanol": {"path": "bundled:ethanol", "test": 2},
        "line": {"path": "line.xyz", "source": "https://example.org/line.xyz"},
    },
    "backbones": {"toy": {"name": "toy:local", "data": ["ethanol"]}},
    "methods": {"bare": {"name": "Identity"}, "ECSE": {"name": "ECSE", "fallback": "error"}},
    "measures": ["accuracy"],
    "profiles": {"both": {"backbones": {"toy": {"data": ["ethanol", "line"]}}}},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study as a file, with a stand-in for its measure."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    write(tmp_path / "line.xyz", [Atoms("HCCH", [(0, 0, z) for z in (0.0, 1.06, 2.26, 3.32)])], format="extxyz")
    numbers = {"accuracy": lambda cell: {"symmetrized": {"forces": {"mae": 12.34}}}}
    monkeypatch.setattr(symmetrize.study.measures, "MEASURES", numbers)
    return path


def run(*args):
    """One command, with its output and without a traceback."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def compare(study, *args):
    return run("compare", study, "--output", study.parent / "out", "--workers", 0, *args)


def test_a_study_prints_a_table_and_where_everything_is(study):
    result = compare(study)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["ECSE", "ok", "12.34"] in lines and ["bare", "ok", "12.34"] in lines
    assert "[2/2] toy | ECSE | ethanol | seed 0: ok" in result.output
    assert "2 cells: 2 ok" in result.output and f"symmetrize report {study.parent / 'out'}" in result.output
    assert len((study.parent / "out" / "results.jsonl").read_text().splitlines()) == 2
    again = compare(study)
    assert again.exit_code == 0 and "2 of 2 cells were finished before" not in again.output
    assert ["ECSE", "ok", "12.34"] in [line.split() for line in again.output.splitlines()]
    assert "[" not in compare(study, "--quiet").output


def test_what_is_refused_counts_as_a_result(study):
    result = compare(study, "--profile", "both")
    assert result.exit_code == 0 and "4 cells: 3 ok, 1 refused" in result.output
    assert "collinear" in result.output


def test_a_cell_that_fails_is_told_by_the_exit_status(study, monkeypatch):
    def broken(cell):
        raise RuntimeError("no such luck")

    working = symmetrize.study.measures.MEASURES
    monkeypatch.setattr(symmetrize.study.measures, "MEASURES", {"accuracy": broken})
    result = compare(study, "--only-method", "ECSE")
    assert result.exit_code == 1 and "no such luck" in result.output and "--retry-failed" in result.output
    assert "1 cells: 1 failed; 1 not evaluated yet" in result.output
    monkeypatch.setattr(symmetrize.study.measures, "MEASURES", working)
    assert compare(study).exit_code == 1
    assert compare(study, "--only-method", "bare").exit_code == 0
    assert compare(study, "--retry-failed").exit_code == 0 == compare(study).exit_code


def test_a_dry_run_lists_cells_and_writes_nothing(study):
    result = compare(study, "--dry-run")
    assert result.exit_code == 0 and result.output.count("pending") == 2 and "2 to be evaluated" in result.output
    assert not (study.parent / "out").exists()
    compare(study, "--only-method", "bare")
    assert "1 to be evaluated" in compare(study, "--dry-run").output


def test_the_default_folder_is_that_of_the_name(study, monkeypatch):
    monkeypatch.chdir(study.parent)
    assert run("compare", study, "--workers", 0, "--quiet").exit_code == 0
    assert (study.parent / "runs" / "small" / "results.jsonl").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesures": []}, "mesures: unknown entry, did you mean 'measures'?"),
        ({"methods": {"E": {"name": "ECSE", "fallbak": "error"}}}, "methods.E.fallbak: "),
        ({"backbones": {"toy": {"name": "tyo"}}}, "did you mean 'toy'?"),
        ({"data": {"ethanol": {"path": "nowhere.xyz", "source": "https://e.org"}}}, "https://e.org"),
        ({"data": {"ethanol": {"path": "bundled:ethanol", "forces": "f"}}}, "expected a reference value 'f'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(study, change, message):
    content = {**STUDY, **change, "profiles": {}}
    if "data" in change:
        content["backbones"] = {"toy": {"name": "toy:local"}}
    study.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    result = compare(study)
    assert result.exit_code == 2 and message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (study.parent / "out").exists()


def test_more_bad_input(study):
    for arguments, message in (
        (("--profile", "bth"), "did you mean 'both'?"),
        (("--only-method", "ESCE"), "did you mean 'ECSE'?"),
        (("--only-data", "lin"), "did you mean 'line'?"),
        (("--data", study.parent / "nowhere", "--profile", "both"), "--data: expected a folder"),
        (("--output", study), "expected a folder"),
    ):
        result = compare(study, *arguments)
        assert result.exit_code == 2 and message in result.output, arguments
    result = run("compare", study.parent / "nothing.yaml")
    assert result.exit_code == 2 and "there is none" in result.output


def test_data_is_found_in_subfolders(study):
    (study.parent / "deep" / "er").mkdir(parents=True)
    (study.parent / "line.xyz").rename(study.parent / "deep" / "er" / "line.xyz")
    result = compare(study, "--profile", "both", "--dry-run")
    assert result.exit_code == 2 and "https://example.org/line.xyz" in result.output
    result = compare(study, "--profile", "both", "--dry-run", "--data", study.parent / "deep")
    assert result.exit_code == 0 and "4 to be evaluated" in result.output


def test_the_table_shows_several_seeds_and_what_is_not_finite():
    def record(method, seed, status="ok", **measures):
        cell = {"backbone": "b", "method": method, "data": "d", "seed": seed, "curve": None}
        error = None if status == "ok" else {"type": "E", "message": "m" * 200, "traceback": ""}
        return {"cell": cell, "status": status, "error": error, "measures": measures}

    rotations = {"rotations": {"energy": {"max": "nan"}, "forces": {"max": 0.5}}}
    lines = table([record("a", 0, equivariance=rotations), record("a", 1, cost={"time_ratio": "inf"})])
    assert lines[2].split() == ["a", "(0)", "ok", "nan", "-"] and lines[3].split() == ["a", "(1)", "ok", "-", "inf"]
    assert all(len(line) < 120 for line in table([record("a", 0, "failed")]))
    assert table([]) == []


# --- report ----------------------------------------------------------------------------------------------------------


def test_a_report_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("report", tmp_path)
    assert result.exit_code == 1 and "expected the folder of a study" in result.output


def test_a_report_of_a_run(study):
    pytest.importorskip("matplotlib")
    compare(study)
    result = run("report", study.parent / "out")
    assert result.exit_code == 0 and "report.html" in result.output
    assert "ECSE" in (study.parent / "out" / "report.html").read_text(encoding="utf-8")


# --- check --method --------------------------------------------------------------------------------------------------


def test_methods_are_read_from_one_word():
    assert type(read_method("Identity")).__name__ == "Identity"
    assert read_method("GroupAveraging:degree=5").describe()["degree"] == 5
    assert read_method("ECSE: cutoff_width=5e-1, fallback=error").describe()["cutoff_width"] == 0.5
    assert read_method("ECSE:fallback=error").fallback == "error"
    for text, message in (
        ("ESCE", "unknown method 'ESCE', did you mean 'ECSE'"),
        ("GroupAveraging:degre=5", "unknown option 'degre', did you mean 'degree'"),
        ("GroupAveraging:degree", "expected NAME:OPTION=VALUE"),
        ("GroupAveraging:degree=1,degree=2", "every option once"),
        ("GroupAveraging:degree=five", "expected an integer"),
        ("Anchored", "expected the option 'method'"),
    ):
        with pytest.raises(DeclarationError, match=message):
            read_method(text)


def test_check_takes_any_method(tmp_path):
    path, structures = tmp_path / "report.json", tmp_path / "structures.xyz"
    write(structures, [molecule("CH3OH"), molecule("NH3")], format="extxyz")
    common = ["toy:local", "--structures", structures, "--no-library", "--quiet", "--only", "rotation_equivariance"]
    exact = run("check", *common, "--method", "ECSE")
    assert exact.exit_code == 0
    assert exact.output == run("check", *common, "--symmetrize").output
    bare = run("check", *common, "--method", "Identity", "--group", "O(3)", "--report", path)
    assert bare.exit_code == 1 and json.loads(path.read_text())
    rough = run("check", *common, "--method", "GroupAveraging:degree=0")
    assert rough.exit_code == 1
    wrong = run("check", "toy:local", "--method", "GroupAveraging:degre=0")
    assert wrong.exit_code == 2 and "did you mean 'degree'" in wrong.output
