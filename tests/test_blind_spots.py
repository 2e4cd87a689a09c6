"""Wrong models that are easily let through, and right ones that are easily refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from faults import changing, exact
from test_faults import RECORDED, SMALL, failed

from symmetrize import DeclarationError, OutputSpec, keys
from symmetrize.errors import BackboneOutputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing import Verdict, geometries, measure_mutation, of_calculator, of_callable, run
from symmetrize.testing.subjects.subject import CLAIMS

SCALAR = OutputSpec("0e", per="structure")


def rattled(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms.rattle(0.05, seed=seed)
    return atoms


def inverse_distances(batch, power: int = 1):
    """Sum over pairs of every structure: a distance-only network with one scalar output, and no forces."""
    energies = []
    for k in range(batch.ptr.shape[0] - 1):
        pos = batch.pos[batch.ptr[k] : batch.ptr[k + 1]]
        r = torch.nn.functional.pdist(pos)
        energies.append(torch.exp(-(r**power)).sum() + 0.1 * len(pos))
    return torch.stack(energies)


class Stressed(Calculator):
    """Springs between all atoms; in crystals a stress with a preferred direction."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, lab: bool) -> None:
        super().__init__()
        self.lab = lab

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        from ase.calculators.lj import LennardJones

        inner = LennardJones(sigma=2.2, rc=6.0, smooth=True)
        copy = atoms.copy()
        copy.calc = inner
        self.results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces()}
        if all(atoms.pbc):
            lab = np.array([0.1, 0, 0, 0, 0, 0]) if self.lab else 0.0
            self.results["stress"] = copy.get_stress() + lab


@pytest.mark.parametrize("lab", [False, True])
def test_the_stress_of_crystals_among_molecules_is_judged(lab):
    structures = [
        molecule("H2O"),
        rattled(molecule("CH4")),
        rattled(bulk("Cu", cubic=True)),
        rattled(bulk("Al", cubic=True), 1),
    ]
    report = run(of_calculator(Stressed(lab), structures), structures, only=["rotation_equivariance"], profile=SMALL)
    assert {r.on for r in report.results} == {"yours", "yours, crystals"}
    assert {r.on for r in report.failures} == ({"yours, crystals"} if lab else set()), str(report)


def test_complex_numbers_are_no_output():
    subject = of_callable(lambda batch: torch.complex(inverse_distances(batch), batch.pos[batch.ptr[:-1], 0]), SCALAR)
    report = run(subject, profile=SMALL, only=["rotation_equivariance"])
    assert not report.ok and "expected real numbers" in report.results[0].reason
    assert BackboneOutputError.__name__ in report.results[0].reason


class Leaving(torch.nn.Module):
    """Does something beside returning a value."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.what(self)
        return inverse_distances(batch)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (lambda m: (torch.manual_seed(0), torch.rand(3)), "global generator"),
        (lambda m: np.random.rand(), "numpy's generator"),  # noqa: NPY002
        (lambda m: m.calls.add_(1.0), "buffer calls"),
        (lambda m: torch.set_default_dtype(torch.float64), "default dtype"),
        (lambda m: None, None),
    ],
)
def test_state_that_a_call_leaves_behind_is_found(what, found):
    batch = exact().prepare(run_batch())
    for _ in range(2):  # the first call must not hide the second one's
        assert set(measure_mutation(Leaving(what), batch)) == ({found} if found else set())
    assert torch.get_default_dtype() == torch.float32


def run_batch():
    from symmetrize import from_ase

    return from_ase([geometries()["ethanol"], geometries()["water"]])


@pytest.mark.parametrize("cutoff", [4.7, 6.0, 8.3])
def test_a_hard_cutoff_at_an_unknown_distance_is_found(cutoff):
    def f(batch):
        out = []
        for k in range(batch.ptr.shape[0] - 1):
            r = torch.nn.functional.pdist(batch.pos[batch.ptr[k] : batch.ptr[k + 1]])
            out.append((torch.where(r < cutoff, 1.0 / (0.3 + r), torch.zeros_like(r))).sum())
        return torch.stack(out)

    report = run(of_callable(f, SCALAR, periodic=False), only=["smoothness"])
    assert not report.ok
    distance = (cutoff - 1.0) / 12.0
    assert f"t = {distance:.4f}"[:9] in str(report["smoothness[pair pulled apart]"].outcome.worst)


class Drifting(torch.nn.Module):
    """float32, and translation invariant to half a percent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.drift = 3e-3

    def forward(self, batch):
        n = len(batch.ptr) - 1
        center = segment_sum(batch.pos, batch.batch, n) / batch.ptr.diff()[:, None].to(batch.pos)
        return self.weight * inverse_distances(batch) + self.drift * torch.sin(center.square().sum(dim=1))


def test_float32_is_no_excuse():
    model = Drifting()
    options = {"profile": SMALL, "only": ["translation_invariance", "rotation_equivariance", "exactness"]}
    assert "translation_invariance" in failed(run(of_callable(model, SCALAR, periodic=False), **options))[0]
    model.drift = 0.0
    assert run(of_callable(model, SCALAR, periodic=False), **options).ok


def test_an_exception_is_no_announced_failure_unless_announced_as_one():
    def raising(batch):
        raise RuntimeError("out of memory")

    subject = replace(exact(), model=raising)
    only, announced = ["rotation_equivariance"], {"rotation_equivariance": "known to be wrong"}
    assert not run(subject, profile=SMALL, only=only, expected_failures=announced).ok
    crash = {"rotation_equivariance": "error: needs more memory"}
    report = run(subject, profile=SMALL, only=only, expected_failures=crash)
    assert {r.verdict for r in report.results} == {Verdict.EXPECTED}


def test_announcements_of_nothing_are_refused_and_of_what_is_not_judged_are_stale():
    with pytest.raises(DeclarationError, match="planar"):
        run(exact(), profile=SMALL, expected_failures={"rotation_equivariance[plannar]": "?"})
    subject = exact().without("rotations")
    report = run(
        subject, profile=SMALL, only=["rotation_equivariance"], expected_failures={"rotation_equivariance": "?"}
    )
    assert not report.ok and {r.verdict for r in report.results} == {Verdict.STALE}


def test_what_is_declared_about_a_subject_survives_conversion():
    subject = replace(exact(), group="SO(3)", tolerance=1e-2, smooth=0, name="mine").without("purity")
    single = subject.converted(torch.float32)
    assert single.dtype == torch.float32
    for name in ("group", "tolerance", "smooth", "name", "claims"):
        assert getattr(single, name) == getattr(subject, name), name


def test_a_network_of_distances_with_one_scalar_passes():
    report = run(of_callable(inverse_distances, SCALAR, periodic=False), profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)
    column = of_callable(lambda batch: inverse_distances(batch)[:, None], SCALAR, periodic=False)
    assert run(column, profile=SMALL, skip=RECORDED).ok


def test_atoms_without_forces_do_not_matter():
    """An atom of its own, and a pair that has fallen apart, beside others."""
    from ase.calculators.lj import LennardJones

    structures = [
        Atoms("Ar3", [[0, 0, 0], [1.1, 0, 0], [0.3, 1.0, 0.2]]),
        Atoms("Ar"),
        Atoms("Ar2", [[0, 0, 0], [8.0, 0, 0]]),
    ]
    subject = of_calculator(LennardJones(rc=3.0, smooth=True), structures)
    report = run(subject, structures, library=False, profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


def test_single_atoms_alone_prove_nothing_and_accuse_nothing():
    from ase.calculators.lj import LennardJones

    subject = of_calculator(LennardJones(), [Atoms("Ar")])
    report = run(subject, [Atoms("Ar")], library=False, profile=SMALL, skip=RECORDED)
    assert report.failed_checks() == {"nontrivial_outputs"}, str(report)


def handed(out, batch):
    """A right model that tells left from right: by a pseudoscalar of each structure."""
    structure, n = batch[keys.BATCH], len(batch[keys.PTR]) - 1
    vector, charge = out["vector"], torch.sin(batch[keys.Z].to(out["vector"]))[:, None]
    rows = [vector, vector * charge, vector * vector.norm(dim=1, keepdim=True)]
    triple = torch.linalg.det(torch.stack([segment_sum(r, structure, n) for r in rows], dim=1))
    return {**out, "tensor": out["tensor"] * (1.0 + 0.1 * torch.tanh(triple))[structure, None, None]}


def test_without_the_claim_of_inversion_mirror_images_may_differ():
    subject = replace(changing(handed), periodic=False)
    everything = run(subject, profile=SMALL, skip=RECORDED)
    assert "inversion_equivariance" in failed(everything)[0]
    rotations = replace(subject, claims=frozenset(CLAIMS) - {"inversion", "locality"})
    report = run(rotations, profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)
