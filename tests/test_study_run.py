"""Running a study: what is written, what is evaluated again, what happens when something dies."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

import symmetrize.study.measures
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.study import PreparedCell, load_study, read_run, run_study
from symmetrize.study import run as runner
from symmetrize.study.results import append, find_number, locked, read_records
from symmetrize.study.run import make_plan, preview
from symmetrize.study.structures import chosen
from symmetrize.testing.structures.geometries import ethanol

STUDY = {
    "name": "small",
    "data": {"molecules": {"path": "molecules.xyz", "test": 3}, "line": {"path": "line.xyz"}},
    "backbones": {"toy": {"name": "toy:local", "data": ["molecules"]}},
    "methods": {
        "bare": {"name": "Identity"},
        "ECSE": {"name": "ECSE", "fallback": "error"},
        "averaging": {"name": "GroupAveraging", "degree": 1, "curve": "averaging"},
    },
    "measures": ["accuracy", "cost"],
    "sizes": {"structures": 2},
}

#: Stand-ins that say what they were called for, and die or dawdle on demand; a program, so that it can be killed.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
import symmetrize.study.measures as measures
from symmetrize.study import run_study

folder = Path(os.environ["STUDY_FOLDER"])

def note(cell):
    method = type(cell.model.method).__name__
    with (folder / "calls.log").open("a") as log:
        log.write(method + "\\n")
    if method == os.environ.get("STUDY_DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("STUDY_SLEEP", "0")))
    return {"n": len(cell.structures)}

measures.MEASURES.clear()
measures.MEASURES.update(accuracy=note, cost=lambda cell: {"evaluations_per_center": 1.0})

if __name__ == "__main__":
    run_study(folder / "study.yaml", folder / "run", workers=int(sys.argv[1]), progress=False)
"""


def molecules(count, seed=0):
    rng = np.random.default_rng(seed)
    items = []
    for n in range(count):
        atoms = ethanol()
        atoms.positions += 0.05 * rng.normal(size=(9, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=float(n), forces=rng.normal(size=(9, 3)))
        items.append(atoms)
    return items


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "molecules.xyz", molecules(6), format="extxyz")
    # No direction is off the axis: no frame, and the study asks for an error.
    write(tmp_path / "line.xyz", [Atoms("HCCH", [(0, 0, z) for z in (0.0, 1.06, 2.26, 3.32)])], format="extxyz")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the measures, and the cells that they were called for."""
    seen = []

    def accuracy(cell):
        assert isinstance(cell, PreparedCell)
        seen.append(cell)
        return {"n": len(cell.structures), "bare": {"forces": {"mae": math.nan}}}

    monkeypatch.setattr(
        symmetrize.study.measures, "MEASURES", {"accuracy": accuracy, "cost": lambda cell: {"time_ratio": math.inf}}
    )
    return seen


def save(folder, content=STUDY):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def changed(*path, to, base=STUDY):
    out = copy.deepcopy(base)
    inner = out
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return out


def run(folder, content=STUDY, **options):
    return run_study(save(folder, content), folder / "run", workers=0, progress=False, **options)


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_record_says_everything(folder, calls):
    found = run(folder)
    lines = (folder / "run" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3 == len(found.records) == len(calls)
    for line, cell, labels in zip(lines, calls, ("bare", "ECSE", "averaging"), strict=True):
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert record["schema"] == "torch-symmetrize-study" and record["version"] == 1
        assert record["status"] == "ok" and record["error"] is None and record["seconds"] > 0
        assert record["cell"] == {
            "backbone": "toy",
            "method": labels,
            "data": "molecules",
            "seed": 0,
            "curve": "averaging" if labels == "averaging" else None,
        }
        assert record["environment"]["versions"]["torch"] and record["environment"]["threads"] == 1
        assert record["measures"]["cost"]["time_ratio"] == "inf"
        assert record["measures"]["accuracy"]["bare"]["forces"]["mae"] == "nan"
        assert len(record["key"]) == 16 and int(record["key"], 16) >= 0
        assert str(folder) not in line
        assert cell.model.scope == cell.bare.scope == "atom" and cell.group == "O(3)" and cell.energy == "energy"
        assert cell.references["forces"].shape == (27, 3) and cell.units["energy"] == "eV"
        assert all(atoms.calc is None and not atoms.info for atoms in cell.structures)
        assert not any(p.requires_grad for p in cell.backbone.parameters()) and not cell.model.training
    assert found.counts == {"ok": 3, "refused": 0, "failed": 0, "pending": 0}
    assert found.select(method="ECSE", status="ok") == [found.records[1]]
    rows = found.table({"time": "cost.time_ratio", "mae": "accuracy.bare.*.mae", "none": "cost.nothing"})
    assert rows[1]["method"] == "ECSE" and rows[1]["time"] == math.inf and rows[1]["none"] is None
    assert math.isnan(rows[1]["mae"])
    assert find_number({"a": {"b": 1, "c": "nan"}, "d": True}, "a.b") == 1.0
    assert find_number({"d": True, "e": "word"}, "*") is None


def test_a_measure_that_raises_is_recorded_and_the_others_go_on(folder, calls, monkeypatch):
    def broken(cell):
        if type(cell.model.method).__name__ == "ECSE":
            raise RuntimeError("no such luck")
        if type(cell.model.method).__name__ == "Identity":
            raise NoFrameError("this structure")
        return {}

    monkeypatch.setitem(symmetrize.study.measures.MEASURES, "accuracy", broken)
    bare, ecse, averaging = run(folder).records
    assert averaging["status"] == "ok" and ecse["status"] == "failed"
    assert ecse["error"]["type"] == "RuntimeError" and "measure accuracy: no such luck" in ecse["error"]["message"]
    assert "in broken" in ecse["error"]["traceback"] and str(Path(__file__).parent.parent) not in str(ecse)
    assert ecse["measures"]["cost"]["time_ratio"] == "inf" and "error" in ecse["measures"]["accuracy"]
    # That a measure meets a structure that is refused is a finding.
    assert bare["status"] == "ok" and bare["measures"]["accuracy"]["error"]["refused"] is True
    # What failed stays so, until it is asked for again.
    monkeypatch.setitem(symmetrize.study.measures.MEASURES, "accuracy", lambda cell: {"n": 1})
    assert run(folder).select("failed") == [ecse]
    again = run(folder, retry_failed=True)
    assert again.counts["ok"] == 3 and len(read_records(folder / "run")) == 4
    assert again.records[0] == bare and again.records[2] == averaging


def test_what_a_method_refuses_is_a_finding(folder, calls):
    content = changed("backbones", "toy", "data", to=["molecules", "line"])
    content["methods"]["anchored"] = {"name": "Anchored", "method": "ECSE"}
    content["backbones"]["toy"]["scope"] = "atom"
    found = run(folder, content)
    refused = {(r["cell"]["method"], r["cell"]["data"]): r["error"]["type"] for r in found.select("refused")}
    assert refused == {
        ("ECSE", "line"): "NoFrameError",
        ("anchored", "molecules"): "DeclarationError",
        ("anchored", "line"): "DeclarationError",
    }
    assert all(r["measures"] == {} and r["error"]["message"] for r in found.select("refused"))
    assert found.counts["ok"] == 5 and len(calls) == 5


def test_what_the_bare_backbone_cannot_do_is_a_failure(folder, calls):
    content = changed("backbones", "toy", "name", to="pet:ethanol")
    write(folder / "molecules.xyz", [Atoms("AuHAu", [(0, 0, 0), (1, 0, 0), (0, 2, 0)])] * 3, format="extxyz")
    found = run(folder, content)
    assert found.counts["failed"] == 3 and not calls
    assert {r["error"]["type"] for r in found.records} == {"UnknownSpeciesError"}


# --- resuming --------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_evaluated_again(folder, calls):
    run(folder)
    before = (folder / "run" / "results.jsonl").read_bytes()
    run(folder)
    assert len(calls) == 3 and (folder / "run" / "results.jsonl").read_bytes() == before
    # An entry that does not concern them, and labels of plots.
    content = changed("methods", "more", to={"name": "GroupAveraging", "degree": 2, "curve": "averaging"})
    content["methods"]["averaging"]["curve"] = "another"
    found = run(folder, content)
    assert len(calls) == 4 and calls[-1].model.method.degree == 2
    assert (folder / "run" / "results.jsonl").read_bytes().startswith(before)
    assert [r["cell"]["curve"] for r in found.records] == [None, None, "another", "averaging"]
    # One that does.
    content["methods"]["averaging"]["degree"] = 3
    found = run(folder, content)
    assert len(calls) == 5 and calls[-1].model.method.degree == 3
    assert len(found.records) == 4 and len(read_records(folder / "run")) == 5
    # What is no longer part of the study is kept in the file, and left out of the run.
    del content["methods"]["bare"]
    assert len(run(folder, content).records) == 3 and len(calls) == 5


def test_a_torn_line_is_evaluated_again(folder, calls):
    run(folder)
    path = folder / "run" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert len(read_run(folder / "run").records) == 2
    found = run(folder)
    assert len(calls) == 4 and len(found.records) == 3
    lines = path.read_bytes().splitlines()
    assert lines[:2] == whole.splitlines()[:2] and len(lines) == 4
    json.loads(lines[3])


def test_records_of_other_formats_are_refused(folder):
    out = folder / "run"
    out.mkdir()
    append(out, {"schema": "something else"})
    with pytest.raises(InvalidInputError, match=r"line 1: expected a record"):
        read_records(out)
    (out / "results.jsonl").unlink()
    append(out, {"schema": "torch-symmetrize-study", "version": 99})
    with pytest.raises(InvalidInputError, match="expected version 1, got 99"):
        read_records(out)
    with pytest.raises(InvalidInputError, match="expected the folder of a study"):
        read_run(folder / "nowhere")


def test_some_cells_only(folder, calls):
    found = run(folder, only={"method": ["ECSE"]})
    assert len(calls) == 1 and found.counts == {"ok": 1, "refused": 0, "failed": 0, "pending": 2}
    assert run(folder).counts["ok"] == 3 and len(calls) == 3
    # Cells that are not selected keep their records, although their data is not looked for.
    content = changed("backbones", "other", to={"name": "toy:local", "data": ["line"]})
    run(folder, content)
    (folder / "molecules.xyz").unlink()
    found = run(folder, content, only={"backbone": ["other"]})
    assert len(found.records) == 6
    with pytest.raises(DeclarationError, match=r"--only-method: unknown 'ECES', did you mean 'ECSE'"):
        run(folder, only={"method": ["ECES"]})
    with pytest.raises(InvalidInputError, match="at least one cell"):
        run(folder, {**STUDY, "skip": [{"backbone": "toy", "reason": "none"}]})


def test_results_of_an_earlier_version_are_no_results_of_this_one(folder, calls):
    """They have the same labels: only what they were measured with tells them apart."""
    before = run(folder)
    assert before.counts["pending"] == 0 and before.outdated == 0
    changed_study = changed("data", "molecules", "test", to=2)
    found = run(folder, changed_study, only={"method": ["averaging"]})
    assert [record["cell"]["method"] for record in found.records] == ["averaging"]
    assert found.counts["pending"] == 2 and found.outdated == 2
    # The first version again: everything is there, also where only a part was asked for and the data is gone.
    assert run(folder, only={"method": ["bare"]}).counts["ok"] == 3
    (folder / "molecules.xyz").rename(folder / "elsewhere.xyz")
    assert read_run(folder / "run").counts["ok"] == 3


def test_cells_that_were_not_asked_for_keep_their_keys_without_their_data(folder, calls):
    content = copy.deepcopy(STUDY)
    content["backbones"]["other"] = {"name": "toy:local", "data": ["more"]}
    content["data"]["more"] = {"path": "more.xyz", "test": 2}
    write(folder / "more.xyz", molecules(4, 1), format="extxyz")
    assert run(folder, content).counts["ok"] == 6
    (folder / "more.xyz").unlink()
    found = run(folder, content, only={"backbone": ["toy"]})
    assert found.counts == {"ok": 6, "refused": 0, "failed": 0, "pending": 0} and found.outdated == 0
    content["sizes"] = {"structures": 1}
    found = run(folder, content, only={"backbone": ["toy"]})
    assert found.counts == {"ok": 3, "refused": 0, "failed": 0, "pending": 3} and found.outdated == 3


def test_a_folder_of_data_that_is_not_there(folder, calls):
    with pytest.raises(InvalidInputError, match=r"--data: expected a folder, got '.*nowhere'"):
        run(folder, data=folder / "nowhere")


def test_a_preview_evaluates_nothing(folder, calls):
    content = {**STUDY, "skip": [{"method": "averaging", "reason": "a reason"}]}
    run(folder, content, only={"method": ["ECSE"]})
    lines = preview(make_plan(load_study(save(folder, content)), folder / "run"))
    assert [state for _, state in lines] == ["pending", "ok", "skipped: a reason"] and len(calls) == 1
    part = preview(make_plan(load_study(save(folder, content)), folder / "run", only={"method": ["ECSE"]}))
    assert [state for _, state in part] == ["ok"]
    assert "toy | ECSE | molecules | seed 0" == lines[1][0]


def test_two_runs_in_one_folder(folder, calls):
    (folder / "run").mkdir()
    with locked(folder / "run"), pytest.raises(InvalidInputError, match="another process is running"):
        run(folder)
    run(folder)


# --- processes -------------------------------------------------------------------------------------------------------


def drive(folder, n_workers, **environment):
    """The study in another process, with stand-ins for the measures."""
    save(folder)
    (folder / "driver.py").write_text(DRIVER)
    names = {"STUDY_FOLDER": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "driver.py", str(n_workers)], cwd=folder, env=os.environ | names
    )


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def logged(folder):
    path = folder / "calls.log"
    return path.read_text().split() if path.is_file() else []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
def test_a_study_that_was_killed_goes_on(folder, calls):
    process = drive(folder, 1, STUDY_SLEEP="2")
    results = folder / "run" / "results.jsonl"
    try:
        wait_for(lambda: len(logged(folder)) == 2, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = results.read_bytes()
    assert len(before.splitlines()) == 1 and logged(folder) == ["Identity", "ECSE"]
    # The processes that it had started end with it.
    end = time.monotonic() + 60.0
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < end, "a worker outlives the study"
        time.sleep(0.05)
    assert children and results.read_bytes() == before
    found = run(folder)
    assert results.read_bytes().startswith(before) and len(found.records) == 3
    assert [type(cell.model.method).__name__ for cell in calls] == ["ECSE", "GroupAveraging"]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_dies_takes_no_other_cell_along(folder):
    process = drive(folder, 2, STUDY_DIES="ECSE")
    assert process.wait(timeout=240) == 0
    found = read_run(folder / "run")
    states = {r["cell"]["method"]: r["status"] for r in found.records}
    assert states == {"bare": "ok", "ECSE": "failed", "averaging": "ok"}
    (failed,) = found.select("failed")
    assert failed["error"]["type"] == "BrokenProcessPool" and "killed" in failed["error"]["message"]
    assert sorted(logged(folder)) == ["ECSE", "GroupAveraging", "Identity"]


@pytest.mark.filterwarnings("ignore")  # of the cluster's web server and event loop
def test_a_cluster_evaluates_the_cells(folder):
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp"
    ) as cluster:
        content = changed("methods", to={"bare": {"name": "Identity"}, "ECSE": {"name": "ECSE"}})
        content["measures"] = ["accuracy"]
        found = run_study(save(folder, content), folder / "run", scheduler=cluster.scheduler_address, progress=False)
    assert found.counts["ok"] == 2
    assert found.records[0]["measures"]["accuracy"]["bare"]["forces"]["mae"] > 0


def test_an_unreachable_cluster(folder, monkeypatch):
    pytest.importorskip("dask.distributed")
    from symmetrize.study.workers import Cluster

    with pytest.raises(InvalidInputError, match=r"scheduler: expected one at"):
        Cluster("tcp://127.0.0.1:9", timeout=0.5)


def test_a_cluster_without_its_library(folder, calls, monkeypatch):
    from symmetrize.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "dask", None)
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'torch-symmetrize\[cluster\]'"):
        run(folder, scheduler="tcp://127.0.0.1:8786")


# --- training --------------------------------------------------------------------------------------------------------

TRAINED = changed(
    "backbones",
    to={
        "net": {
            "train": {
                "data": {"set": "molecules", "train": 2, "validation": 1},
                "backbone": {"name": "pet", "hyperparameters": {"d_pet": 4, "d_node": 4, "d_head": 4, "num_heads": 1}},
                "epochs": 1,
            },
            "data": ["molecules"],
        },
        "toy": {"name": "toy:local", "data": ["molecules"]},
    },
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lightning
def test_backbones_are_trained_first_once_and_never_on_what_is_evaluated(folder, calls, monkeypatch):
    pytest.importorskip("lightning")
    trained, train = [], runner.train_backbone
    monkeypatch.setattr(runner, "train_backbone", lambda spec: trained.append(spec) or train(spec))
    study = load_study(save(folder, TRAINED))
    states = dict(preview(make_plan(study, folder / "run")))
    assert states["net | ECSE | molecules | seed 0"] == "pending; its backbone is trained first"
    found = run(folder, TRAINED)
    assert found.counts["ok"] == 6 and len(trained) == 1
    (out,) = (folder / "run" / "backbones").iterdir()
    result = json.loads((out / "result.json").read_text())
    assert set(result["test_structures"]) >= set(chosen(study.data["molecules"], 6, "molecules"))
    assert [type(cell.backbone).__name__ for cell in calls] == ["PET"] * 3 + ["ToyLocal"] * 3
    run(folder, TRAINED)
    assert len(calls) == 6 and len(trained) == 1
    # Another method needs the same weights.
    run(folder, changed("methods", "more", to={"name": "GroupAveraging", "degree": 0}, base=TRAINED))
    assert len(calls) == 8 and len(trained) == 1


def with_auxiliary():
    """A network of lengths alone stands in where the published frames give out; both networks are trained."""
    net = TRAINED["backbones"]["net"]
    lengths = copy.deepcopy(net) | {"data": []}
    lengths["train"]["backbone"]["hyperparameters"]["inputs"] = "lengths"
    paper = {"name": "ECSE.paper", "cutoff": 5.0, "scope": "structure", "auxiliary": {"backbone": "lengths"}}
    methods = {"bare": {"name": "Identity"}, "paper": paper}
    return TRAINED | {"backbones": {"net": net, "lengths": lengths}, "methods": methods}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lightning
def test_methods_refer_to_backbones_of_the_study(folder, calls, monkeypatch):
    pytest.importorskip("lightning")
    trained, train = [], runner.train_backbone
    monkeypatch.setattr(runner, "train_backbone", lambda spec: trained.append(spec["label"]) or train(spec))
    found = run(folder, with_auxiliary())
    assert found.counts == {"ok": 2, "refused": 0, "failed": 0, "pending": 0}
    assert trained == ["net, seed 0", "lengths, seed 0"]
    (cell,) = (cell for cell in calls if cell.model.method.describe())
    assert cell.model.method.auxiliary.config.inputs == "lengths" and cell.backbone.config.inputs == "vectors"
    keys = {record["cell"]["method"]: record["key"] for record in found.records}
    other = copy.deepcopy(with_auxiliary())
    other["backbones"]["lengths"]["train"]["epochs"] = 2
    plan = make_plan(load_study(save(folder, other)), folder / "run")
    again = {spec["cell"]["method"]: spec["key"] for spec in plan.specs}
    assert again["bare"] == keys["bare"] and again["paper"] != keys["paper"]
    run(folder, with_auxiliary())
    assert len(trained) == 2


def test_a_training_that_fails_fails_the_cells_whose_methods_need_it(folder, calls, monkeypatch):
    """Once each, also where both of its trainings fail."""

    def fail(spec):
        raise ZeroDivisionError("no data")

    monkeypatch.setattr(runner, "train_backbone", fail)
    found = run(folder, with_auxiliary())
    assert found.counts == {"ok": 0, "refused": 0, "failed": 2, "pending": 0}
    assert len(read_records(folder / "run")) == 2 and not calls


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"auxiliary": {"backbone": "lengths", "inputs": "lengths"}},
            r"methods\.paper\.auxiliary\.inputs: expected none",
        ),
        ({"auxiliary": {"backbone": "toy:local"}}, r"backbones\.lengths\.data: expected at least one data set, or a"),
    ],
)
def test_references_that_make_no_sense(change, message):
    content = with_auxiliary()
    content["methods"]["paper"].update(change)
    with pytest.raises(DeclarationError, match=message):
        load_study(content)


def test_a_training_that_fails_fails_its_cells_only(folder, calls, monkeypatch):
    def fail(spec):
        raise ZeroDivisionError("no data")

    monkeypatch.setattr(runner, "train_backbone", fail)
    found = run(folder, TRAINED)
    assert found.counts == {"ok": 3, "refused": 0, "failed": 3, "pending": 0}
    for record in found.select("failed"):
        assert record["cell"]["backbone"] == "net" and record["error"]["type"] == "ZeroDivisionError"
        assert "training net, seed 0: no data" in record["error"]["message"]
