"""The loop over checks: what it counts, what it promises beforehand, what it repeats."""

import math
from dataclasses import replace

import pytest
import torch
from faults import changing, constant, exact, lab_vector

from symmetrize import DeclarationError, from_ase
from symmetrize.testing import PROFILES, Verdict, geometries, run
from symmetrize.testing.running.runner import estimate, known_check, make_bench, run_task, task_cost, tasks
from symmetrize.testing.running.serialize import plain

SMALL = replace(
    PROFILES["quick"], n_structures=2, n_elements=2, n_directions=2, n_steps=20, n_cover=100, paths=("bending CO2",)
)
CHEAP = ("rotation_equivariance", "translation_invariance", "finite_outputs", "determinism")


def test_the_cost_that_is_announced_is_about_what_is_counted():
    bench = make_bench(exact(), profile=SMALL)
    chosen = list(tasks(bench))
    bench.main, bench.scales  # noqa: B018 (evaluated once, whatever runs first)
    for on in bench.sets:
        bench.scale(bench[on])
    announced, counted = {}, {}
    for task in chosen:
        before = bench.evaluations
        announced[task.check.name] = announced.get(task.check.name, 0) + task_cost(bench, task)
        run_task(bench, task)
        counted[task.check.name] = counted.get(task.check.name, 0) + bench.evaluations - before
    total = sum(announced.values()), sum(counted.values())
    assert 0.5 < total[0] / total[1] < 2.0, (announced, counted)
    for name, n in counted.items():
        if n > 50:
            assert 0.3 < announced[name] / n < 3.5, (name, announced[name], n)
    assert 0.0 < estimate(bench, chosen) < math.inf


def test_a_seed_repeats_everything_and_another_one_does_not():
    first, second, third = (run(exact(), profile=SMALL, only=CHEAP, seed=seed) for seed in (3, 3, 4))
    numbers = [[[f.number for f in r.outcome.findings] for r in one.results] for one in (first, second, third)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_check_draws_the_same_whatever_ran_before():
    every = run(exact(), profile=SMALL, only=CHEAP)
    alone = run(exact(), profile=SMALL, only=["translation_invariance[planar]"])
    assert plain(alone.results[0].outcome) == plain(every["translation_invariance[planar]"].outcome)


def test_only_skip_and_unknown_names():
    report = run(exact(), profile=SMALL, only=["finite_outputs", "purity"], skip=["finite_outputs[planar]"])
    ids = {r.id for r in report.results}
    assert "purity" in ids and "finite_outputs[generic]" in ids and "finite_outputs[planar]" not in ids
    for wrong in ("finite", "finite_outputs[plane]"):
        with pytest.raises(DeclarationError, match="finite_outputs"):
            run(exact(), profile=SMALL, only=[wrong])
    with pytest.raises(DeclarationError, match="rotation_equivariance"):
        known_check("rotations_equivariance")


def test_expected_failures_are_strict():
    wrong = changing(lab_vector)
    known = {"rotation_equivariance": "a vector of the laboratory"}
    report = run(wrong, profile=SMALL, only=["rotation_equivariance", "purity"], expected_failures=known)
    assert report.ok and report["rotation_equivariance[generic]"].verdict is Verdict.EXPECTED
    stale = run(exact(), profile=SMALL, only=["rotation_equivariance"], expected_failures=known)
    assert not stale.ok and {r.verdict for r in stale.results} == {Verdict.STALE}
    assert "remove the announcement" in stale.results[0].reason


def test_a_model_that_raises_is_an_error_and_not_a_pass():
    def raising(batch):
        raise RuntimeError("out of order")

    report = run(replace(exact(), model=raising), profile=SMALL, only=["rotation_equivariance", "purity"])
    assert not report.ok and {r.verdict for r in report.results} == {Verdict.ERROR}
    assert "out of order" in report.results[0].reason


def test_nothing_judged_is_not_a_pass():
    subject = replace(exact(), claims=frozenset())
    report = run(subject, profile=SMALL, only=["rotation_equivariance"])
    assert not report.ok and {r.verdict for r in report.results} == {Verdict.RECORDED}


def test_a_constant_output_fails_one_check_and_is_compared_with_itself_in_the_others():
    report = run(changing(constant), profile=SMALL, only=["nontrivial_outputs", "rotation_equivariance"])
    assert report.failed_checks() == {"nontrivial_outputs"}
    names = {f.quantity for f in report["nontrivial_outputs"].outcome.findings if not f.ok}
    assert names == {"vector", "tensor"}


def test_own_structures_references_and_tolerance():
    structures = [geometries()[name] for name in ("ethanol", "chiral center", "water")]
    subject = changing(lab_vector)
    truth = exact().model(exact().prepare(from_ase(structures)))
    noisy = truth["vector"].detach() + 0.01
    report = run(subject, structures, references={"vector": noisy}, library=False, only=["loss_share"])
    share = report["loss_share"].outcome.findings[0].number
    # The fixed vector of the fault is turned back from all sides: its square is the variance.
    variance = float(torch.tensor([0.03, -0.05, 0.08]).square().mean())
    assert 0.7 * variance / (variance + 1e-4) < share <= 1.1
    scale = run(subject, structures, library=False, only=["rotation_equivariance"])
    error = max(f.number for f in scale.results[0].outcome.findings)
    loose = run(replace(subject, tolerance=1.1 * error), structures, library=False, only=["rotation_equivariance"])
    assert not scale.ok and loose.ok
