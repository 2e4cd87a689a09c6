"""What `benchmarks.field` measures with: every tool averages the same network over what it says it does."""

from __future__ import annotations

import math

import pytest
import torch
from ase.build import bulk, molecule
from symmetrize.backbones.pet import PET, PETConfig

from benchmarks import field
from benchmarks import field_tools as tools
from benchmarks.field import COLUMNS, Effort, _errors, goals, measure, residual, turned
from benchmarks.field_cases import Case
from benchmarks.field_figures import draw
from benchmarks.field_tools import About
from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.ops.rotations import random_rotations

# torch 2.13 deprecates all of TorchScript, and metatomic's calculator asks in older ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]

WITH_METATOMIC = pytest.mark.skipif(bool(tools.installed("metatomic-ase")), reason="pip install metatomic-ase")
WITH_PRINCIPAL_AXES = pytest.mark.skipif(
    bool(tools.installed("frame-averaging-pytorch")), reason="pip install frame-averaging-pytorch"
)

#: Stands in for the proof of concept: around every atom, one frame of its first two edges, of weight |r1|.
FRAMES = """
import torch

class SPFramesCalculator:
    def __init__(self, hypers):
        self.limit = hypers.LIMIT

    def get_all_frames_global(self, environments, r_cut, n_species):
        frames, weights = [], []
        for vectors, species, center in environments:
            first = vectors[0] / vectors[0].norm()
            normal = torch.linalg.cross(vectors[0], vectors[1])
            normal = normal / normal.norm()
            frames.append(torch.stack([first, normal, torch.linalg.cross(first, normal)], dim=1))
            weights.append(vectors[0].norm())
        return frames, torch.stack(weights), self.limit
"""


def network(species=(1, 6, 8)):
    widths = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8, "num_heads": 2, "num_attention_layers": 1}
    return PET(PETConfig(species, cutoff=3.0, cutoff_width=0.5, **widths), seed=0)


def ethanols(n=2):
    found = []
    for seed in range(n):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.1, seed=seed)
        found.append(atoms)
    return found


def case(structures, finite=True):
    backbone = network(tuple(sorted(set(structures[0].numbers.tolist()))))
    return Case("tiny", "test", backbone, structures, False, finite, (1,), (1,))


def evaluated(tool, structures):
    return tool.evaluate(tool.prepare(structures))


def assert_equal(found, wanted, factor=1e3):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= factor * torch.finfo(torch.float64).eps * (
            1 + float(other.abs().max())
        )


def average(bare, structures, matrices, weights):
    """The definition: energies, and forces turned back."""
    energy, forces = 0.0, 0.0
    for matrix, weight in zip(matrices, weights, strict=True):
        e, f = evaluated(bare, [turned(atoms, matrix) for atoms in structures])
        energy, forces = energy + weight * e, forces + weight * (f @ matrix)
    return energy, forces


@pytest.fixture(scope="module")
def backbone():
    return network().double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def bare(backbone):
    return tools.Bare(About("bare", "bare", group=""), backbone)


@pytest.fixture(scope="module")
def model(backbone):
    return tools.exported(Symmetrizer(backbone, Identity(), scope="structure"))


@pytest.fixture
def source(tmp_path):
    for folder in ("src", "default_hypers"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src" / "sp_frames_calculator.py").write_text(FRAMES)
    (tmp_path / "default_hypers" / "sp_default_hypers.yaml").write_text("LIMIT: 0.5\n")
    return tmp_path


def test_bare_is_the_network(bare, backbone):
    plain = tools.Averaged(About("identity", "identity"), backbone, Identity(), "structure")
    assert_equal(evaluated(bare, ethanols()), evaluated(plain, ethanols()))


@WITH_METATOMIC
def test_symmetrized_model_averages_the_network(bare, backbone, model):
    tool = tools.symmetrized_model(backbone, model, 1)
    buffers = dict(tool.model.named_buffers())
    (weights,) = (value for name, value in buffers.items() if name.endswith("_rotation_weights"))
    matrices = torch.cat([value for name, value in buffers.items() if name.endswith("_matrices")])
    matrices, weights = torch.cat([matrices, -matrices]), torch.cat([weights, weights]) / 2.0
    found, wanted = evaluated(tool, ethanols(1)), average(bare, ethanols(1), matrices, weights)
    assert tool.evaluations(ethanols(1)) == len(weights)
    assert_equal(found, wanted)
    assert float((found[1] - evaluated(bare, ethanols(1))[1]).abs().max()) > 1e-3


@WITH_METATOMIC
@pytest.mark.parametrize(
    "structures", [ethanols(2), [bulk("C", "diamond", 3.57, cubic=True)]], ids=["finite", "crystal"]
)
def test_symmetrized_calculator_averages_the_network(structures):
    backbone = case(structures).in_precision(torch.float64)
    bare = tools.Bare(About("bare", "bare", group=""), backbone)
    structures = [turned(atoms, random_rotations(1, torch.Generator().manual_seed(1))[0]) for atoms in structures]
    tool = tools.AseSymmetrized(backbone, tools.exported(Symmetrizer(backbone, Identity(), scope="structure")), 1)
    matrices = torch.from_numpy(tool.calculator.quadrature_rotations)
    weights = torch.from_numpy(tool.calculator.quadrature_weights)
    found = evaluated(tool, structures)
    assert_equal(found, average(bare, structures, matrices, weights))
    assert tool.evaluations(structures) == 1 + len(matrices)
    assert float((found[0] - evaluated(bare, structures)[0]).abs().max()) > 1e-4


@WITH_METATOMIC
def test_exported_is_the_model_in_memory(backbone):
    native = tools.Averaged(About("ECSE", "ECSE O(3)"), backbone, ECSE(), "atom")
    tool = tools.Exported(About("ECSE, exported", "exported"), backbone, tools.exported(native.model), native)
    assert_equal(evaluated(tool, ethanols()), evaluated(native, ethanols()))
    assert tool.evaluations(ethanols()) == native.evaluations(ethanols())


@WITH_PRINCIPAL_AXES
def test_principal_axes(bare, backbone):
    tool = tools.PrincipalAxes(backbone)
    _invariant(tool, bare, "O(3)")
    together = evaluated(tool, ethanols(3))
    each = [evaluated(tool, [atoms]) for atoms in ethanols(3)]
    assert_equal(together, tuple(torch.cat(parts) for parts in zip(*each, strict=True)))


def test_frames_of_the_proof_of_concept(bare, backbone, source):
    tool = tools.ProofOfConcept(backbone, source)
    _invariant(tool, bare, "SO(3)")
    assert tool.evaluations(ethanols()) == 9
    assert torch.get_default_dtype() == torch.float32


def test_frames_of_the_proof_of_concept_in_a_crystal(source):
    atoms = bulk("C", "diamond", 3.57, cubic=True)
    atoms.rattle(0.1, seed=0)
    backbone = network((6,)).double().requires_grad_(False).eval()
    _invariant(tools.ProofOfConcept(backbone, source), tools.Bare(About("bare", "bare"), backbone), "SO(3)", [atoms])


def _invariant(tool, bare, group, structures=None):
    """Equivariant where the network alone is not, and forces that are the gradient."""
    structures = ethanols(1) if structures is None else structures
    matrix = random_rotations(1, torch.Generator().manual_seed(0))[0] * (-1.0 if group == "O(3)" else 1.0)
    for each, exact in ((tool, True), (bare, False)):
        before, after = (evaluated(each, s) for s in (structures, [turned(atoms, matrix) for atoms in structures]))
        error = float((after[1] - before[1] @ matrix.T).abs().max())
        assert (error < 1e-11) == exact
        assert (float((after[0] - before[0]).abs().max()) < 1e-11) == exact
    step = 1e-4
    energies = []
    for sign in (1, -1):
        moved = [atoms.copy() for atoms in structures]
        moved[0].positions[1, 2] += sign * step
        energies.append(float(evaluated(tool, moved)[0][0]))
    slope = -(energies[0] - energies[1]) / (2 * step)
    assert slope == pytest.approx(float(evaluated(tool, structures)[1][1, 2]), rel=1e-5, abs=1e-7)


def test_errors_tell_exact_from_not(bare, backbone):
    chosen, effort = case(ethanols(3)), Effort(60.0, 0.1, 3, 1)
    exact = tools.Averaged(About("ECSE", "ECSE O(3)"), backbone, ECSE(), "atom")
    found = {tool: _errors(tool, chosen, (1.0, 1.0), effort) for tool in (bare, exact)}
    assert residual(found[exact]) < 1e-11 < 1e-4 < residual(found[bare])
    assert found[exact]["n_pairs"] == 24


def test_errors_that_are_not_numbers_stay(backbone):
    class Undefined(tools.Bare):
        def evaluate(self, prepared):
            energy, forces = super().evaluate(prepared)
            return energy, forces * float("nan")

    found = _errors(Undefined(About("NaN", "NaN"), backbone), case(ethanols(1)), (1.0, 1.0), Effort(9.0, 1.0, 1, 1))
    assert math.isnan(found["rotation_forces"]) and math.isnan(residual(found))


def test_goal_is_judged_on_what_is_smooth_and_within():
    def row(family, ms, error, smooth="yes"):
        where = {"network": "n", "structures": "s", "tool": family, "family": family, "group": "O(3)", "smooth": smooth}
        times = {"ms": ms, "over_ours": ms / 2.0, "ms_together": None, "evaluations": 1.0}
        return {**where, **times, "rotation_energy": error, "rotation_forces": error, "inversion": 0.0}

    rows = [row("ECSE O(3)", 2.0, 1e-14), row("jumps", 4.0, 1e-14, "no"), row("coarse", 6.0, 1e-3)]
    (line,) = goals(rows)
    assert "no other smooth tool" in line and "coarse" in line
    (line,) = goals([*rows, row("slow", 300.0, 1e-9), row("fine", 200.0, 1e-7), row("undefined", 1.0, float("nan"))])
    assert "fine takes 100 times" in line


@WITH_METATOMIC
def test_a_case_is_measured_and_drawn(source, tmp_path, monkeypatch):
    monkeypatch.setattr(field, "N_TOGETHER", 2)
    records = measure(case(ethanols(2)), Effort(0.0, 0.0, 1, 1), source, tools.installed("frame-averaging-pytorch"))
    families = {record["family"] for record in records}
    assert {"bare", "ECSE O(3)", "ECSE proof of concept", "metatomic SymmetrizedModel", "GroupAveraging"} <= families
    assert all(record["ms"] > 0.0 and record["ms_float32"] > 0.0 for record in records)
    assert not {column.key for column in COLUMNS} - set().union(*records)
    draw(records, tmp_path / "field.svg")
    assert (tmp_path / "field.svg").read_text().startswith("<?xml")
