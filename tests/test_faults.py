"""The harness is tested: every planted fault is caught by the checks that are for it, and by no unrelated one."""

from dataclasses import replace

import pytest
import torch
from faults import EVERYTHING, FAULTS, exact

from symmetrize.testing.profile import PROFILES
from symmetrize.testing.runner import run

SMALL = replace(PROFILES["quick"], n_structures=2, n_elements=2, n_directions=2, n_steps=40, n_cover=600)


@pytest.fixture(autouse=True)
def _keep_the_global_generator():
    with torch.random.fork_rng():
        yield


def failed(report) -> tuple[set[str], set[str]]:
    """Names and ids of what failed."""
    return {r.check for r in report.failures}, {r.id for r in report.failures}


def test_without_a_fault_everything_passes():
    report = run(exact(), profile=SMALL)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_caught_by_what_is_for_it(name):
    fault = FAULTS[name]
    report = run(fault.make(), profile=SMALL)
    checks, ids = failed(report)
    missed = fault.must - checks - ids
    assert not missed, f"not caught by {sorted(missed)}\n{report}"
    if fault.may != EVERYTHING:
        allowed = fault.may | {m.split("[")[0] for m in fault.must}
        assert checks <= allowed, f"unrelated: {sorted(checks - allowed)}\n{report}"


def test_wrong_only_on_collinear_input_is_not_blamed_on_generic_input():
    report = run(FAULTS["wrong on collinear input"].make(), profile=SMALL, only=["rotation_equivariance"])
    assert {r.on for r in report.failures} == {"collinear"}


def test_a_cell_that_is_not_rotated_is_not_blamed_on_molecules():
    report = run(FAULTS["cell not rotated"].make(), profile=SMALL, only=["rotation_equivariance"])
    assert {r.on for r in report.failures} == {"periodic", "crystals"}
