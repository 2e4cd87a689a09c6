"""Checking from Python: any model in, a report out; one-line assertions; declarations as text."""

from __future__ import annotations

import json
import math

import pytest
import torch
from ase.calculators.emt import EMT
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing import paths
from symmetrize.testing.fronts.assertions import assert_equivariant, assert_smooth
from symmetrize.testing.fronts.front import (
    CheckFailure,
    as_subject,
    check,
    check_backbone,
    check_calculator,
    check_callable,
    check_symmetrizer,
    explain_failures,
    raise_for_failures,
)
from symmetrize.testing.running.outcome import Finding, Outcome, Report, Result, Verdict
from symmetrize.testing.structures.geometries import crystal, ethanol, methane, water
from symmetrize.testing.subjects.declarations import read_declaration, read_declarations, with_rows
from symmetrize.testing.subjects.subject import of_callable


def total(rows, batch):
    return segment_sum(rows, batch.batch, batch.ptr.shape[0] - 1)


def dipole(batch):
    """Of charges that are the atomic numbers, about the centroid."""
    centroid = total(batch.pos, batch) / batch.ptr.diff()[:, None]
    return total(batch.z[:, None] * (batch.pos - centroid[batch.batch]), batch)


MOLECULES = [ethanol(), water()]
FEW = ["purity", "determinism", "rotation_equivariance"]


# --- check ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_model_is_recognised():
    symmetric = Symmetrizer(ToyLocal(), ECSE())
    found = {
        "symmetrizer": check(symmetric, MOLECULES, only=FEW, library=False),
        "backbone": check(ToyLocal(), MOLECULES, only=FEW, library=False),
        "callable": check(dipole, MOLECULES, outputs="1o", only=FEW),
        "calculator": check(EMT(), MOLECULES, only=FEW),
    }
    for kind, report in found.items():
        assert report.subject["kind"] == kind and report.ok, str(report)
    recorded = found["backbone"]["rotation_equivariance[yours]"]
    assert recorded.verdict is Verdict.RECORDED and recorded.outcome.worst.number > 1e-3, (
        "a backbone claims no rotations"
    )
    subject = of_callable(dipole, OutputSpec("1o", per="structure"))
    assert check(subject, MOLECULES, only=FEW).subject["outputs"] == {"output": "1x1o per structure"}


@pytest.mark.parametrize(
    "function, model",
    [(check_symmetrizer, ToyLocal()), (check_backbone, Symmetrizer(ToyLocal(), ECSE())), (check_calculator, dipole)],
)
def test_each_front_end_takes_its_kind_only(function, model):
    with pytest.raises(InvalidTypeError, match="expected a"):
        function(model)


def test_the_front_end_of_a_kind_passes_its_options_on():
    report = check_callable(
        dipole, "1o", MOLECULES, only=FEW, seed=3, group="SO(3)", expected_failures={"purity": "no"}, name="mine"
    )
    assert report.seed == 3 and report.subject["group"] == "SO(3)" and report.subject["name"] == "mine"
    assert report["purity"].verdict is Verdict.STALE and not report.ok


def test_a_failing_model_is_reported_and_not_raised():
    report = check_callable(lambda b: torch.tanh(dipole(b)), "1o", MOLECULES, only=FEW)
    assert not report.ok and report.failed_checks() == {"rotation_equivariance"}
    with pytest.raises(CheckFailure, match=r"rotation_equivariance\[yours\]: failed(.|\n)*probably"):
        raise_for_failures(report)
    raise_for_failures(check_callable(dipole, "1o", MOLECULES, only=FEW))


def test_a_report_in_which_nothing_was_judged_does_not_pass():
    report = check(dipole, MOLECULES, outputs="1o", only=["periodicity"])
    with pytest.raises(CheckFailure, match="nothing was judged"):
        raise_for_failures(report)


def test_mistakes_are_named():
    with pytest.raises(DeclarationError, match=r"outputs.*vector:atom"):
        as_subject(dipole)
    with pytest.raises(DeclarationError, match="'tolerence', did you mean 'tolerance'"):
        as_subject(dipole, outputs="1o", tolerence=1.0)
    with pytest.raises(DeclarationError, match="'profil', did you mean 'profile'"):
        check(dipole, outputs="1o", profil="full")
    with pytest.raises(DeclarationError, match="backbone declares its own: energy"):
        as_subject(ToyLocal(), outputs="1o")
    with pytest.raises(InvalidTypeError, match="class ToyLocal"):
        as_subject(ToyLocal)
    with pytest.raises(InvalidTypeError, match="got str"):
        as_subject("ToyLocal")
    with pytest.raises(InvalidTypeError, match="got int"):
        as_subject(3)


def test_reports_are_written_where_the_suffix_is_known(tmp_path):
    path = tmp_path / "new" / "report.json"
    report = check(dipole, MOLECULES, outputs="1o", only=FEW, report=path)
    content = json.loads(path.read_text())
    assert content["verdict"] == "passed" and len(content["results"]) == len(report.results)

    def never(batch):
        raise AssertionError("the model was called")

    with pytest.raises(InvalidInputError, match=r"report.*\.html.*report\.pdf"):
        check(never, MOLECULES, outputs="1o:structure", report=["a.json", "report.pdf"])


def test_failures_are_explained_once_per_check_and_per_exception():
    worst = Finding("energy", 1.0, 1e-6, scale=1.0, worst="inversion, SF6")
    small = Finding("energy", 1e-3, 1e-6, scale=1.0, worst="mirror, water")

    def result(name, on, verdict, found=None, reason=""):
        outcome = None if found is None else Outcome((found,))
        return Result(name, on, name, verdict, outcome, reason=reason, meaning="what it is", suspicion="a sign")

    results = (
        result("parity", "planar", Verdict.FAILED, small),
        result("parity", "symmetric", Verdict.FAILED, worst),
        result("purity", "", Verdict.ERROR, reason="ValueError: no"),
        result("cost", "", Verdict.ERROR, reason="ValueError: no"),
        result("determinism", "", Verdict.PASSED, Finding("energy", 0.0, 1.0)),
    )
    text = explain_failures(Report({"name": "mine"}, results))
    assert "parity[symmetric]: failed" in text and "SF6" in text, "the worst one is shown"
    assert "parity[planar]" not in text and "the same on: planar" in text
    assert text.count("ValueError: no") == 1 and "the same on: cost" in text
    assert text.count("probably: a sign") == 1, "an exception needs no guess"
    assert "determinism" not in text


# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, spec, known",
    [
        ("0e:structure", OutputSpec("0e", per="structure"), True),
        ("1o", OutputSpec("1o"), False),
        ("0e + 2e:atom:eV/A", OutputSpec("0e + 2e", unit="eV/A"), True),
        ("ij=ji:structure", OutputSpec(cartesian="ij=ji", per="structure"), True),
        ("ij=-ji", OutputSpec(cartesian="ij=-ji"), False),
        ("0e:sum:eV", OutputSpec("0e", reduce="sum", unit="eV"), True),
        ("vector:mean", OutputSpec(cartesian="i", reduce="mean"), True),
        ("symmetric-tensor", OutputSpec(cartesian="ij=ji"), False),
        ("pseudovector:atom", OutputSpec("1e"), True),
    ],
)
def test_declarations_as_text(text, spec, known):
    found = read_declaration(text)
    assert found.spec == spec and found.rows_known is known
    assert read_declaration(spec).spec == spec and read_declaration(spec).rows_known


@pytest.mark.parametrize(
    "text, words",
    [("vectr", "did you mean 'vector'"), ("1o:atoms", "did you mean 'atom'"), ("1x", "1x"), ("", "expected irreps")],
)
def test_unusable_declarations_are_named(text, words):
    with pytest.raises(DeclarationError, match=words):
        read_declaration(text)


def test_declarations_of_the_wrong_kind():
    with pytest.raises(InvalidTypeError, match="int"):
        read_declarations({"energy": 3})
    with pytest.raises(InvalidTypeError, match="list"):
        read_declarations(["1o"])
    with pytest.raises(InvalidTypeError, match="none"):
        read_declarations({})


def test_open_rows_are_counted():
    batch = from_ase(MOLECULES)
    declared = read_declarations({"dipole": "1o", "forces": "1o", "energy": "0e:sum"})
    n_atoms = batch.pos.shape[0]

    def model(batch):
        return {"dipole": dipole(batch), "forces": batch.pos, "energy": batch.pos[:, 0]}

    specs = with_rows(model, batch, declared)
    assert specs["dipole"].per == "structure" and specs["forces"].per == "atom" and specs["energy"].reduce == "sum"
    with pytest.raises(BackboneOutputError, match=f"2 rows.*or {n_atoms} "):
        with_rows(lambda b: {"dipole": b.pos[:3]}, batch, {"dipole": declared["dipole"]})
    with pytest.raises(BackboneOutputError, match="did you mean 'dipole'"):
        with_rows(lambda b: {"dipole": b.pos}, batch, {"dipol": declared["dipole"]})
    assert as_subject(lambda b: b.pos, outputs="1o").outputs["output"].per == "atom", "geometries of the library serve"


# --- assert_equivariant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs", [MOLECULES, ethanol(), from_ase(MOLECULES, dtype=torch.float32), [from_ase(water())]]
)
def test_what_is_equivariant_passes(inputs):
    assert_equivariant(dipole, inputs, "1o")
    assert_equivariant(dipole, inputs, OutputSpec(cartesian="i", per="structure"))
    assert_equivariant(lambda b: {"d": dipole(b), "n": dipole(b).norm(dim=1)}, inputs, {"d": "vector", "n": "scalar"})


def helicity(batch):
    """A pseudoscalar of the first four atoms of every structure."""
    first = batch.ptr[:-1]
    a, b, c = (batch.pos[first + k] - batch.pos[first] for k in (1, 2, 3))
    return (a * torch.linalg.cross(b, c)).sum(dim=1)


PLANTED = {
    "nonlinear": (lambda b: torch.tanh(dipole(b)), "Rotation equivariance(.|\n)*180|90|120|random|identity"),
    "tiny": (lambda b: 1e-30 * torch.tanh(dipole(b)), "Rotation equivariance"),
    "slightly": (lambda b: dipole(b) + 1e-9 * dipole(b) ** 2, "Rotation equivariance"),
    "large constant": (lambda b: dipole(b) + 1e6, "Rotation equivariance"),
    "parity": (lambda b: dipole(b) * helicity(b)[:, None], "Parity"),
    "nan": (lambda b: dipole(b) * math.nan, "(?s)proves nothing.*Finite outputs.*2 rows"),
    "one nan": (lambda b: dipole(b) / (b.ptr.diff() - 5)[:, None], "Finite outputs(.|\n)*1 rows(.|\n)*CH4"),
    "zero": (lambda b: 0.0 * dipole(b), "(?s)proves nothing.*does not change"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_not_equivariant_fails(fault):
    f, words = PLANTED[fault]
    with pytest.raises(CheckFailure, match=words) as caught:
        assert_equivariant(f, [ethanol(), methane()], "1o:structure")
    text = str(caught.value)
    assert "seed=0" in text and "probably: " in text


def test_a_constant_proves_nothing():
    with pytest.raises(CheckFailure, match="proves nothing"):
        assert_equivariant(lambda b: b.ptr.diff().to(b.pos.dtype), MOLECULES, "0e:structure")


def test_the_message_has_the_error_its_scale_and_the_element():
    with pytest.raises(CheckFailure) as caught:
        assert_equivariant(lambda b: torch.tanh(dipole(b)), MOLECULES, "1o", seed=7)
    text = str(caught.value)
    for words in ("seed=7", "error scale", "limit", "worst at: ", "C2H6O 0", "x error"):
        assert words in text


def test_the_group_decides_about_parity():
    f = lambda b: dipole(b) * helicity(b)[:, None]  # noqa: E731
    assert_equivariant(f, [ethanol()], "1o", group="SO(3)")
    assert_equivariant(f, [ethanol()], "1e")
    with pytest.raises(CheckFailure, match="Parity"):
        assert_equivariant(f, [ethanol()], "1o", group="O(3)")


def test_a_tolerance_is_the_limit():
    f = lambda b: dipole(b) * (1.0 + 1e-7 * b.pos[b.ptr[:-1], :1])  # noqa: E731
    assert_equivariant(f, MOLECULES, "1o", tolerance=1e-4)
    with pytest.raises(CheckFailure):
        assert_equivariant(f, MOLECULES, "1o", tolerance=1e-10)
    with pytest.raises(CheckFailure):
        assert_equivariant(f, MOLECULES, "1o")


def test_precision_is_that_of_the_input():
    single = from_ase(MOLECULES, dtype=torch.float32)
    f = lambda b: dipole(b) * (1.0 + 1e-6 * b.pos[b.ptr[:-1], :1])  # noqa: E731
    assert_equivariant(f, single, "1o")
    with pytest.raises(CheckFailure):
        assert_equivariant(f, MOLECULES, "1o")


def test_models_that_declare_their_outputs():
    assert_equivariant(Symmetrizer(ToyLocal(), ECSE()), MOLECULES)
    with pytest.raises(CheckFailure, match="Rotation"):
        assert_equivariant(ToyLocal(), MOLECULES)
    with pytest.raises(CheckFailure, match="Parity"):
        assert_equivariant(Symmetrizer(ToyLocal(), ECSE(), group="SO(3)"), MOLECULES)


def test_further_vectors_turn():
    batch = from_ase(MOLECULES)
    batch["velocity"] = torch.randn(batch.pos.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def momentum(b):
        return total(torch.linalg.cross(b.pos, b.velocity), b)

    assert_equivariant(momentum, batch, "1e", vectors={"velocity": "1o"})
    with pytest.raises(CheckFailure, match="Rotation"):
        assert_equivariant(momentum, batch, "1e")


def test_functions_of_tensors():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    s = torch.randn(5, dtype=torch.float64, generator=generator)
    inputs = {"x": (x, "1o"), "y": (y, "1o"), "s": s}
    assert_equivariant(lambda x, y, s: s[:, None] * torch.linalg.cross(x, y), inputs, "1e")
    assert_equivariant(lambda x, y, s: (x + y, s * (x * y).sum(1)), inputs, ["vector", "0e"])
    assert_equivariant(lambda x, y, s: {"t": x[:, :, None] * y[:, None]}, inputs, {"t": "ij:atom"})
    with pytest.raises(CheckFailure, match="Parity"):
        assert_equivariant(lambda x, y, s: s[:, None] * torch.linalg.cross(x, y), inputs, "1o")
    with pytest.raises(CheckFailure, match="Rotation"):
        assert_equivariant(lambda x, y, s: x * y, inputs, "1o")
    with pytest.raises(DeclarationError, match="ij:atom"):
        assert_equivariant(lambda x, y, s: x[:, :, None] * y[:, None], inputs, "ij")
    with pytest.raises(DeclarationError, match="representation"):
        assert_equivariant(lambda x, y, s: x, inputs)


def test_exceptions_of_the_model_arrive_as_they_are():
    def broken(batch):
        raise ZeroDivisionError("in the model")

    for outputs in ("1o", "1o:structure"):
        with pytest.raises(ZeroDivisionError, match="in the model"):
            assert_equivariant(broken, MOLECULES, outputs)
    with pytest.raises(BackboneOutputError, match="expected shape"):
        assert_equivariant(dipole, MOLECULES, "1o:atom")


def test_the_input_is_left_alone():
    batch = from_ase(MOLECULES)
    before = batch.pos.clone()

    def shifting(b):
        b.pos -= b.pos.mean(dim=0)
        return dipole(b)

    assert_equivariant(shifting, batch, "1o")
    assert torch.equal(batch.pos, before)


# --- assert_smooth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "curve, order, words",
    [
        (lambda t: torch.sign(t - 0.3), 0, "value jumps(.|\n)*t = 0.3"),
        (lambda t: 1e-6 * torch.sign(t - 0.3) + t, 0, "value jumps"),
        (lambda t: (t - 0.3).abs(), 1, "first derivative jumps(.|\n)*t = 0.3"),
        (lambda t: torch.where(t > 0.7, math.nan, t), 0, "not finite(.|\n)*t = 0.7"),
    ],
)
def test_jumps_are_found_and_located(curve, order, words):
    with pytest.raises(CheckFailure, match=words):
        assert_smooth(curve, order=order)
    if order:
        assert_smooth(curve, order=order - 1)


def test_smooth_curves_pass():
    for scale in (1.0, 1e-12, 1e9):
        assert_smooth(lambda t: scale * torch.stack([t.sin(), t**3, torch.ones_like(t)], dim=1), order=2)  # noqa: B023


def test_smooth_models_pass_along_a_path():
    few = {"n_points": 33, "n_candidates": 1}
    path = paths()["umbrella inversion"]
    assert_smooth(ToyGlobal(), path, **few)
    assert_smooth(ToyGlobal().float(), path, **few)
    assert_smooth(Symmetrizer(ToyGlobal(), ECSE()), path, **few)


def nearest(batch):
    """Distance of the first atom of every structure to its nearest neighbor: a kink where neighbors exchange."""
    out = []
    for k in range(batch.ptr.shape[0] - 1):
        pos = batch.pos[batch.ptr[k] : batch.ptr[k + 1]]
        out.append((pos[1:] - pos[0]).norm(dim=1).min())
    return torch.stack(out)


def test_a_kink_along_a_path_and_along_frames():
    path = paths()["exchange of nearest neighbors"]
    with pytest.raises(CheckFailure, match=r"exchange of nearest neighbors(.|\n)*first derivative(.|\n)*t = 0.5"):
        assert_smooth(nearest, path)
    with pytest.raises(CheckFailure, match="first derivative"):
        assert_smooth(nearest, path, "0e:structure")
    with pytest.raises(CheckFailure, match=r"between frames: 2\.0000"):
        assert_smooth(nearest, [path(k / 4) for k in range(5)])
    assert_smooth(nearest, path, order=0)


def test_only_what_is_named_is_looked_at():
    both = lambda b: {"kink": nearest(b), "smooth": dipole(b)}  # noqa: E731
    path = paths()["exchange of nearest neighbors"]
    with pytest.raises(CheckFailure):
        assert_smooth(both, path)
    assert_smooth(both, path, {"smooth": "1o"})


def test_unusable_arguments_of_assert_smooth():
    with pytest.raises(InvalidInputError, match="order"):
        assert_smooth(torch.sin, order=3)
    with pytest.raises(InvalidInputError, match="one row for each"):
        assert_smooth(lambda t: t.sum())
    with pytest.raises(InvalidTypeError, match="function"):
        assert_smooth(3)
    with pytest.raises(InvalidInputError, match="same atoms"):
        assert_smooth(dipole, [ethanol(), crystal("C", "diamond", 3.6)])
