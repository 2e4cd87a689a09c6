"""What is exact has to pass, whatever its unit, its offset, and whoever wrote it."""

from dataclasses import replace

import pytest
import torch
from e3nn import o3
from e3nn.nn import Gate
from faults import exact
from test_faults import RECORDED, SMALL, failed

from symmetrize import keys
from symmetrize.testing.running.catalog import all_checks
from symmetrize.testing.running.runner import run
from symmetrize.testing.subjects.arguments import of_arguments
from symmetrize.testing.subjects.calculators import of_calculator
from symmetrize.testing.subjects.subject import CLAIMS


def rescaled(factor: float = 1.0, offset: float = 0.0):
    """The exact model in another unit, its energies with another zero."""
    subject = exact()

    def change(model):
        def f(batch):
            out = {name: factor * value for name, value in model(batch).items()}
            out["energy"] = out["energy"] + offset * batch[keys.PTR].diff().to(out["energy"])
            return {**out, "atomic_energy": out["atomic_energy"] + offset}

        return f

    def convert(dtype):
        converted = subject.convert(dtype)
        return replace(converted, model=change(converted.model))

    return replace(subject, model=change(subject.model), convert=convert, module=None)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_unit_does_not_matter(factor):
    report = run(rescaled(factor), profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


def test_a_large_constant_does_not_matter():
    """A million per atom, where energies vary by one: what rounding is left of it is not held against the model."""
    report = run(rescaled(offset=1e6), profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


def test_float32_passes_as_float32():
    report = run(exact().convert(torch.float32), profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


@pytest.fixture
def double():
    """e3nn computes its constants in the default precision when a layer is made."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(irreps: str, seed: int) -> torch.Tensor:
    return torch.randn(6, o3.Irreps(irreps).dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers():
    mixed = "4x0e + 2x0o + 3x1o + 2x1e + 1x2e"
    gate = Gate("4x0e", [torch.tanh], "3x0e", [torch.sigmoid], "2x1o + 1x2e")
    return {
        "linear": (o3.Linear(mixed, "3x0e + 2x1o + 1x2e"), {"x": mixed}, "3x0e + 2x1o + 1x2e"),
        "tensor product": (
            o3.FullyConnectedTensorProduct(mixed, "1x0e + 1x1o", "2x0e + 2x1o + 1x1e"),
            {"x": mixed, "y": "1x0e + 1x1o"},
            "2x0e + 2x1o + 1x1e",
        ),
        "gate": (gate, {"features": str(gate.irreps_in)}, str(gate.irreps_out)),
        "spherical harmonics": (
            o3.SphericalHarmonics("0e + 1o + 2e + 3o", normalize=False),
            {"x": "1o"},
            "0e + 1o + 2e + 3o",
        ),
    }


@pytest.mark.parametrize("name", ["linear", "tensor product", "gate", "spherical harmonics"])
def test_layers_of_e3nn(name, double):
    layer, inputs, outputs = layers()[name]
    samples = [{k: (rows(irreps, seed), irreps) for k, irreps in inputs.items()} for seed in range(3)]
    subject, batch = of_arguments(layer, samples, outputs)
    report = run(subject, batch, library=False, profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)
    swapped = outputs.replace("1o", "1e") if "1o" in outputs else outputs
    subject, batch = of_arguments(layer, samples, swapped)
    wrong = run(subject, batch, library=False, profile=SMALL, skip=RECORDED)
    assert "inversion_equivariance" in failed(wrong)[0], str(wrong)


def metals():
    from ase.build import bulk, fcc111, molecule
    from ase.cluster import Octahedron

    rattled = bulk("Cu", "fcc", a=3.6, cubic=True)
    rattled.rattle(0.05, seed=1)
    surface = fcc111("Al", (2, 2, 2), vacuum=6.0)
    cluster = Octahedron("Au", 3)
    cluster.rattle(0.05, seed=2)
    gas = molecule("H2O")
    return [rattled, bulk("Al", "fcc", a=4.05), surface, cluster, gas]


def noble_gas():
    from ase import Atoms
    from ase.build import bulk

    crystal = bulk("Ar", "fcc", a=1.6, cubic=True)
    crystal.rattle(0.03, seed=1)
    triangle = Atoms("Ar3", [[0, 0, 0], [1.1, 0, 0], [0.3, 1.0, 0.2]])
    line = Atoms("Ar3", [[0, 0, 0], [1.1, 0, 0], [2.2, 0, 0]])
    return [triangle, line, crystal]


def test_effective_medium_theory():
    from ase.calculators.emt import EMT

    report = run(of_calculator(EMT(), metals()), metals(), library=False, profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


def test_lennard_jones():
    from ase.calculators.lj import LennardJones

    subject = of_calculator(LennardJones(rc=3.0, smooth=True), noble_gas())
    report = run(subject, noble_gas(), library=False, profile=SMALL, skip=RECORDED)
    assert report.ok, str(report)


def test_every_check_says_what_it_means():
    for check in all_checks().values():
        assert len(check.meaning) > 20 and len(check.suspicion) > 20 and len(check.definition) > 10, check.name
        assert check.claim is None or check.claim in CLAIMS


def test_the_page_about_the_checks_is_up_to_date():
    import importlib.util
    from pathlib import Path

    folder = Path(__file__).parent.parent / "docs"
    spec = importlib.util.spec_from_file_location("checks_page", folder / "checks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (folder / "checks.md").read_text(encoding="utf-8"), "run: python docs/checks.py"
