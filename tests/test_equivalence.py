"""Copies that symmetry makes equal are evaluated once, and nothing else changes."""

import math

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, GroupAveraging, OutputSpec, Symmetrizer, from_ase, weighted_sum
from symmetrize.weighted_sum import WeightedSum

OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "vector": OutputSpec("1o"),
    "tensor": OutputSpec(cartesian="ij=ij"),
}
SPECIES = (1, 2, 6, 8, 11, 12, 13, 14, 17)


def turned(atoms, seed=0):
    """In a general orientation, where no coordinate is special."""
    matrix = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    out = atoms.copy()
    out.positions = atoms.positions @ matrix.T
    out.cell = atoms.cell.array @ matrix.T
    return out


CRYSTALS = {
    "fcc": ase.build.bulk("Al", cubic=True),
    "diamond": ase.build.bulk("Si", cubic=True) * (2, 1, 1),
    "rock salt": ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True),
    "hcp": ase.build.bulk("Mg"),
}
MOLECULES = {name: ase.build.molecule(name) for name in ("CO2", "CH4", "C6H6", "H2O", "CH3CH2OH")} | {
    "atom": Atoms("He"),
    "mixed": Atoms("HeH2OHe", positions=[[9, 9, 9], [0, 0.8, -0.5], [0, -0.8, -0.5], [0, 0, 0.1], [-9, 0, 0]]),
}
# The published positions of ethanol have a mirror plane; these have nothing.
GENERAL = {"rattled": CRYSTALS["fcc"] * (2, 1, 1), "bent": ase.build.molecule("CH3CH2OH")}
for _atoms in GENERAL.values():
    _atoms.rattle(0.05, seed=1)


def pet(blocks, dtype=torch.float64):
    sizes = dict(d_pet=16, d_node=16, d_head=8, d_feedforward=16, num_heads=2)
    return PET(PETConfig(atomic_types=SPECIES, cutoff=4.0, num_gnn_layers=blocks, **sizes)).to(dtype)


def local():
    return ToyLocal(OUTPUTS, cutoff=4.0)


class Counter:
    """Copies that the network is evaluated on."""

    def __init__(self, monkeypatch):
        self.n, run = 0, weighted_sum.run_backbone

        def spy(backbone, source, inputs, copies):
            self.n += int(copies.atom_copy.max()) + 1
            return run(backbone, source, inputs, copies)

        monkeypatch.setattr(weighted_sum, "run_backbone", spy)


def both(model, batch, monkeypatch, **options):
    """Outputs and evaluations with and without merging."""
    model = model.eval().requires_grad_(False)
    counter = Counter(monkeypatch)
    merged = model(batch, create_graph=False, **options)
    n_merged, counter.n = counter.n, 0
    with monkeypatch.context() as patch:
        patch.setattr(WeightedSum, "_classes", lambda self, tensors: None)
        plain = model(batch, create_graph=False, **options)
    return merged, n_merged, plain, counter.n


def difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) / max(1.0, float(b[n].abs().max())) for n in b)


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
def test_perfect_crystals_are_evaluated_once_per_class(name, group, monkeypatch):
    atoms = turned(CRYSTALS[name])
    model = Symmetrizer(pet(1), ECSE(), group=group, scope="atom")
    merged, n_merged, plain, n_plain = both(model, from_ase(atoms), monkeypatch, forces=True, stress=True)
    assert difference(merged, plain) < 1e-13
    # Every species has the symmetry of its site: at least 12 proper rotations, 6 in hcp.
    assert n_merged * (6 if name == "hcp" else 12) <= n_plain


@pytest.mark.parametrize("name", MOLECULES)
@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("make", [lambda: pet(1), lambda: pet(2), local, lambda: ToyGlobal(OUTPUTS)])
def test_symmetric_molecules(name, scope, make, monkeypatch):
    backbone = make()
    if scope == "atom" and backbone.receptive_field is None:
        pytest.skip("sees everything")
    batch = from_ase([turned(MOLECULES[name]), MOLECULES["H2O"], turned(MOLECULES[name], 1)])
    model = Symmetrizer(backbone, ECSE(), scope=scope)
    merged, n_merged, plain, n_plain = both(model, batch, monkeypatch, forces=True, spread=True)
    # A spread is the square root of a difference that rounding leaves.
    exact = {n: v for n, v in plain.items() if not n.endswith("spread")}
    assert difference(merged, exact) < 1e-12
    assert difference(merged, plain) < 1e-6
    assert n_merged < n_plain


def test_one_evaluation_of_what_is_collinear(monkeypatch):
    model = Symmetrizer(pet(2), ECSE(), scope="structure")
    merged, n_merged, _, n_plain = both(model, from_ase(turned(MOLECULES["CO2"])), monkeypatch, forces=True)
    assert n_merged == 1 < 16 <= n_plain
    assert float(merged["forces"].abs().max()) > 1e-4


@pytest.mark.parametrize("make", [lambda: pet(1), lambda: pet(2), local, lambda: ToyLocal(OUTPUTS, 3.0, n_hops=2)])
def test_with_and_without_symmetry_and_images_in_one_batch(make, monkeypatch):
    primitive = ase.build.bulk("Si")
    primitive.rattle(0.05, seed=1)
    batch = from_ase([primitive, turned(MOLECULES["CO2"]), GENERAL["bent"], turned(CRYSTALS["hcp"]), MOLECULES["CH4"]])
    model = Symmetrizer(make(), ECSE(), group="SO(3)", scope="atom")
    merged, n_merged, plain, n_plain = both(model, batch, monkeypatch, forces=True)
    assert difference(merged, plain) < 1e-12
    assert n_merged < n_plain


@pytest.mark.parametrize("name", GENERAL)
def test_nothing_is_merged_without_symmetry(name, monkeypatch):
    model = Symmetrizer(pet(1), ECSE(), scope="atom")
    merged, n_merged, plain, n_plain = both(model, from_ase(GENERAL[name]), monkeypatch, forces=True)
    assert n_merged == n_plain
    assert all(torch.equal(merged[key], plain[key]) for key in plain)


@pytest.mark.parametrize("displacement", [1e-3, 1e-6, 1e-9, 1e-11])
def test_nearly_symmetric_is_not_symmetric(displacement, monkeypatch):
    atoms = turned(CRYSTALS["diamond"])
    atoms.positions[0] += displacement * np.array([0.3, 0.5, -0.8])
    model = Symmetrizer(pet(1), ECSE(), group="SO(3)", scope="atom")
    merged, _, plain, _ = both(model, from_ase(atoms), monkeypatch, forces=True, stress=True)
    assert difference(merged, plain) < 1e-12


def test_a_tolerance_that_is_too_large_is_seen(monkeypatch):
    """The twin: with differences of 0.02 angstrom taken for rounding the results change."""
    atoms = turned(CRYSTALS["diamond"])
    atoms.rattle(0.002, seed=3)
    model = Symmetrizer(pet(1), ECSE(), group="SO(3)", scope="atom")
    create = WeightedSum.__init__

    def careless(self, *args):
        create(self, *args)
        self.tolerance = 0.002

    monkeypatch.setattr(WeightedSum, "__init__", careless)
    merged, n_merged, plain, n_plain = both(model, from_ase(atoms), monkeypatch, forces=True)
    assert n_merged < n_plain
    assert difference(merged, plain) > 1e-7


def test_neighbors_in_another_order_are_matched(monkeypatch):
    """The twin: copies that are merged row by row as they come give something else."""
    batch, model = from_ase(turned(MOLECULES["CH4"])), Symmetrizer(pet(2), ECSE(), scope="structure")
    match = weighted_sum.correspondence

    def unordered(table, number, copies, tolerance, stars):
        representative, atom, edge = match(table, number, copies, tolerance, stars)
        size = atom.shape[0] // table.n_copies
        return representative, representative[copies.atom_copy] * size + torch.arange(atom.shape[0]) % size, edge

    merged, _, plain, _ = both(model, batch, monkeypatch, forces=True)
    assert difference(merged, plain) < 1e-12
    monkeypatch.setattr(weighted_sum, "correspondence", unordered)
    merged, _, plain, _ = both(model, batch, monkeypatch, forces=True)
    assert difference({"a": merged["atomic_energy"]}, {"a": plain["atomic_energy"]}) > 1e-6


def test_species_centers_and_features_tell_copies_apart(monkeypatch):
    batch = from_ase(turned(MOLECULES["C6H6"]))
    model = Symmetrizer(local(), ECSE(), scope="atom")
    _, n_same, _, _ = both(model, batch, monkeypatch, forces=True)
    other = batch.clone()
    other.z = batch.z.clone()
    other.z[int((batch.z == 1).nonzero()[0])] = 8
    merged, n_other, plain, _ = both(model, other, monkeypatch, forces=True)
    assert difference(merged, plain) < 1e-12 and n_other > n_same
    masked = batch.clone()
    masked.center_mask = torch.arange(12) < 3
    merged, n_masked, plain, _ = both(model, masked, monkeypatch)
    assert difference(merged, plain) < 1e-12 and n_masked < n_other
    # A field that is not compared: nothing is merged.
    batch.x = torch.ones(12, 1, dtype=torch.float64)
    _, n_merged, _, n_plain = both(model, batch, monkeypatch)
    assert n_merged == n_plain


@pytest.mark.parametrize("name", ["CH4", "H2O"])
def test_fixed_grids_on_symmetric_molecules(name, monkeypatch):
    model = Symmetrizer(ToyGlobal(OUTPUTS), GroupAveraging(3), scope="structure")
    merged, n_merged, plain, n_plain = both(model, from_ase(MOLECULES[name]), monkeypatch, forces=True)
    assert difference(merged, plain) < 1e-12
    assert n_merged <= n_plain


def test_single_precision(monkeypatch):
    batch = from_ase(turned(CRYSTALS["diamond"]), dtype=torch.float32)
    model = Symmetrizer(pet(1, torch.float32), ECSE(), scope="atom")
    merged, n_merged, plain, n_plain = both(model, batch, monkeypatch, forces=True, stress=True)
    assert difference(merged, plain) < 1e-4
    assert n_merged * 12 <= n_plain


@pytest.mark.parametrize("chunk_size", [1, 7, 40])
def test_classes_in_calls_of_any_size(chunk_size, monkeypatch):
    batch = from_ase([turned(CRYSTALS["rock salt"]), turned(CRYSTALS["fcc"])])
    model = Symmetrizer(pet(1), ECSE(), scope="atom", chunk_size=chunk_size)
    merged, n_merged, plain, n_plain = both(model, batch, monkeypatch, forces=True, stress=True)
    assert difference(merged, plain) < 1e-12
    assert n_merged < n_plain


def test_derivatives_of_forces_are_not_merged(monkeypatch):
    """Second derivatives of merged copies would be wrong: with a graph every copy is evaluated."""
    model = Symmetrizer(pet(2), ECSE(), scope="structure").eval()
    batch = from_ase(turned(MOLECULES["H2O"]))
    counter = Counter(monkeypatch)
    batch.pos = batch.pos.requires_grad_()
    forces = model(batch, forces=True, create_graph=True)["forces"]
    assert counter.n == model.explain(batch).n_evaluations
    row = torch.autograd.grad(forces[0, 0], batch.pos)[0]
    step, moved = 1e-4, []
    for sign in (1.0, -1.0):
        shifted = batch.clone()
        shifted.pos = batch.pos.detach().clone()
        shifted.pos[1, 2] += sign * step
        moved.append(float(model(shifted, forces=True, create_graph=False)["forces"][0, 0]))
    assert math.isclose(float(row[1, 2]), (moved[0] - moved[1]) / (2 * step), rel_tol=1e-5, abs_tol=1e-9)


def test_what_depends_on_more_than_the_star_is_compared(monkeypatch):
    """Adaptive cutoffs see neighbors of neighbors: the layers of a slab differ, in single precision too."""
    sizes = dict(d_pet=16, d_node=16, d_head=8, d_feedforward=16, num_heads=2)
    network = PET(PETConfig(atomic_types=SPECIES, cutoff=4.0, num_neighbors_adaptive=6.0, **sizes))
    atoms = turned(ase.build.fcc111("Al", (3, 3, 3), vacuum=10), 2)
    exact = Symmetrizer(network.double(), ECSE(), scope="atom").eval()(from_ase(atoms), forces=True)["forces"]
    model = Symmetrizer(network.float(), ECSE(), scope="atom")
    merged, n_merged, plain, n_plain = both(model, from_ase(atoms, dtype=torch.float32), monkeypatch, forces=True)
    error, rounding = (float((out["forces"] - exact).abs().max()) for out in (merged, plain))
    assert error < 4.0 * rounding and n_merged < n_plain


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_tolerance_is_that_of_the_structure(size, monkeypatch):
    """What is far away elsewhere in the batch makes nothing equal here."""
    benzene = turned(MOLECULES["C6H6"])
    benzene.rattle(1e-3, seed=2)
    batch = from_ase([benzene, Atoms("He", positions=[[size, 0, 0]])], dtype=torch.float32)
    model = Symmetrizer(pet(1, torch.float32), ECSE(), scope="atom")
    _, n_merged, _, n_plain = both(model, batch, monkeypatch, forces=True)
    assert n_merged == n_plain


def test_nothing_is_merged_that_is_not_known_to_be_equal(monkeypatch):
    batch = from_ase(turned(MOLECULES["C6H6"]))
    model = Symmetrizer(pet(1), ECSE(), scope="atom")

    def counts(batch):
        _, n_merged, _, n_plain = both(model, batch, monkeypatch)
        return n_merged < n_plain

    assert counts(batch)
    for name, value in {
        "bonds": torch.tensor([[0, 1, 2]]),
        "adjacency": torch.ones(1, 12, 12),
        "name": "benzene",
    }.items():
        extended = batch.clone()
        extended[name] = value
        assert not counts(extended), name
    labelled = batch.clone()
    labelled.charge, labelled.y = torch.tensor([0]), torch.tensor([1.5])
    assert counts(labelled)
    # A cache with an entry of which nothing is known.
    with monkeypatch.context() as patch:
        patch.setattr(PET, "cache_rows", {n: level for n, level in PET.cache_rows.items() if n != "source"})
        assert not counts(batch)
    # Random numbers and statistics of batches are those of every copy.
    counter = Counter(monkeypatch)
    with torch.no_grad():
        model.train()(batch)
        n_training, counter.n = counter.n, 0
        model.eval()(batch)
    assert counter.n < n_training
