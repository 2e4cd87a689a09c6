"""The harness is tested: every planted fault is caught by the checks that are for it, and by no unrelated one."""

from dataclasses import replace

import pytest
import torch
from faults import EVERYTHING, FAULTS, PATCH, exact, orientation

from symmetrize import from_ase
from symmetrize.ops.rotations import about_axis
from symmetrize.testing.running.profile import PROFILES
from symmetrize.testing.running.runner import run

SMALL = replace(
    PROFILES["quick"],
    n_structures=2,
    n_elements=2,
    n_directions=2,
    n_steps=40,
    n_cover=600,
    paths=("bending CO2", "pair crosses the cutoff", "exchange of nearest neighbors"),
)
#: Measured and never judged, at some cost.
RECORDED = ("orientation_spectrum", "angle_dependence", "lie_derivative", "layers", "cost")


@pytest.fixture(autouse=True)
def _keep_the_global_generator():
    with torch.random.fork_rng():
        yield


def failed(report) -> tuple[set[str], set[str]]:
    """Names and ids of what failed."""
    return {r.check for r in report.failures}, {r.id for r in report.failures}


def test_without_a_fault_everything_passes():
    report = run(exact(), profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_caught_by_what_is_for_it(name):
    fault = FAULTS[name]
    report = run(fault.make(), profile=SMALL, skip=RECORDED)
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


def test_a_trajectory_through_the_patch_finds_it():
    """Tumbling ethanol, seven frames, that a random rotation of any one frame would show nothing for."""
    from symmetrize.testing.structures.geometries import ethanol

    start = ethanol()
    own = orientation(from_ase(start))[1][0]
    frames = []
    for angle in torch.linspace(-1.5, 1.5, 7, dtype=torch.float64):
        g = about_axis(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), float(angle)) @ PATCH @ own.T
        frames.append(start.copy())
        frames[-1].positions = start.positions @ g.numpy().T
    subject = FAULTS["patch of orientations"].make()
    report = run(subject, start, profile=SMALL, only=["trajectory_smoothness"], trajectory=frames, library=False)
    found = report["trajectory_smoothness[trajectory]"]
    assert not report.ok and found.outcome.worst.quantity.endswith(": value")
    # The ball has a radius of 0.456: the jump is where the axis of the tumbling crosses its surface.
    frame = float(found.outcome.worst.worst.rsplit(" ", 1)[1])
    assert abs(abs(0.5 * frame - 1.5) - 0.456) < 0.05
    clean = run(exact(), start, profile=SMALL, only=["trajectory_smoothness"], trajectory=frames, library=False)
    assert clean.ok, str(clean)
