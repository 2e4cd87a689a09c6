"""ECSE(pooled=True): stratified frames of all atoms for the whole structure, finite or periodic."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, DeclarationError, InvalidInputError, NoFrameError, OutputSpec, Symmetrizer, from_ase
from symmetrize.data import validate, with_neighbors
from symmetrize.frames import FrameSet, Stratum
from symmetrize.methods.ecse.method import LEAST_POOLED
from symmetrize.ops.rotations import random_rotations

CUTOFF = 3.0
OUTPUTS = {"energy": OutputSpec("0e", reduce="sum"), "vector": OutputSpec("1o"), "tensor": OutputSpec(cartesian="ij")}


def backbone(n_hops=2, outputs=OUTPUTS, cutoff=CUTOFF):
    return ToyLocal(outputs, cutoff=cutoff, n_hops=n_hops, seed=4).to(torch.float64)


def model_of(group="O(3)", n_hops=2, method=None, **options) -> Symmetrizer:
    return Symmetrizer(backbone(n_hops, **options), method or ECSE(pooled=True), group=group).eval()


def silicon(seed=1) -> Atoms:
    atoms = bulk("Si")
    atoms.set_cell(atoms.cell[:] + np.random.default_rng(seed).normal(scale=0.1, size=(3, 3)), scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.set_cell([4.1, 4.3, 4.6])
    atoms.pbc = True
    atoms.rotate(40.0, (1.0, 0.3, 0.2))
    return atoms


def transformed(atoms: Atoms, element) -> Atoms:
    out = atoms.copy()
    out.set_cell(atoms.cell[:] @ element.numpy().T)
    out.positions = atoms.positions @ element.numpy().T
    return out


def energy_of(model, atoms) -> float:
    with torch.no_grad():
        return float(model(from_ase(atoms))["energy"])


def frames(atoms, method=None, *, group="SO(3)", cutoff=CUTOFF) -> FrameSet:
    batch = with_neighbors(validate(from_ase(atoms)), cutoff)
    return (method or ECSE(pooled=True)).frames(batch, group=group, scope="structure", l_max=1)


def close(got, expected, tolerance=1e-12) -> bool:
    return bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


STRUCTURES = {"ethanol": molecule("CH3CH2OH"), "silicon": silicon(), "water cell": water()}


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "n_hops"), [("SO(3)", 1), ("O(3)", 2), ("O(3)", 3)])
def test_every_element_of_the_group_is_exact(group, n_hops):
    model, structures = model_of(group, n_hops), list(STRUCTURES.values())
    assert model.scope == "structure"
    out = model(from_ase(structures), forces=True, stress=False)
    improper = None if group == "O(3)" else False
    elements = random_rotations(3, torch.Generator().manual_seed(n_hops), improper=improper)
    elements = torch.cat([elements, -torch.eye(3, dtype=torch.float64)[None]]) if group == "O(3)" else elements
    bare = []
    for g in elements:
        batch = from_ase([transformed(atoms, g) for atoms in structures])
        other = model(batch, forces=True)
        assert close(other["energy"], out["energy"])
        assert close(other["vector"], out["vector"] @ g.T)
        assert close(other["tensor"], g @ out["tensor"] @ g.T)
        assert close(other["forces"], out["forces"] @ g.T, 1e-10)
        bare.append(model.backbone(with_neighbors(validate(batch), CUTOFF))["energy"].sum())
    assert torch.stack(bare).std() > 1e-3


def test_proper_frames_alone_miss_inversion():
    model = model_of("SO(3)")
    atoms = silicon()
    atoms.numbers = [14, 6]
    atoms = Atoms(atoms) + Atoms("H", [[1.0, 0.7, 2.0]])
    energies = [energy_of(model, transformed(atoms, sign * torch.eye(3, dtype=torch.float64))) for sign in (1.0, -1.0)]
    assert abs(energies[0] - energies[1]) > 1e-6


def test_frames_are_those_of_the_atoms():
    atoms = STRUCTURES["ethanol"]
    batch = with_neighbors(validate(from_ase(atoms)), CUTOFF)
    pooled = frames(atoms)
    local = ECSE().frames(batch, group="SO(3)", scope="atom", l_max=1)
    full = local.stratum == Stratum.FRAME
    assert torch.equal(pooled.weights, local.weights[full])
    assert torch.equal(pooled.rotations, local.rotations[full])
    assert set(pooled.owner.tolist()) == {0}
    assert set(pooled.stratum.tolist()) == {int(Stratum.FRAME)}


def test_the_order_of_atoms_does_not_matter():
    model, atoms = model_of(), STRUCTURES["ethanol"]
    order = np.random.default_rng(0).permutation(len(atoms))
    out, other = model(from_ase(atoms), forces=True), model(from_ase(atoms[order]), forces=True)
    assert close(other["energy"], out["energy"])
    assert close(other["forces"], out["forces"][order], 1e-11)
    together = model(from_ase([STRUCTURES["silicon"], atoms]), forces=True)
    assert close(together["energy"][1:], out["energy"])


@pytest.mark.parametrize("repeat", [(2, 1, 1), (1, 2, 2)])
def test_a_supercell_has_the_same_energy_per_atom(repeat):
    model = model_of()
    for atoms in (STRUCTURES["silicon"], STRUCTURES["water cell"]):
        cell, supercell = (model(from_ase(a), forces=True) for a in (atoms, atoms.repeat(repeat)))
        n = int(np.prod(repeat))
        assert close(supercell["energy"] / n, cell["energy"], 1e-11)
        assert close(supercell["forces"], cell["forces"].repeat(n, 1), 1e-10)


def test_pooling_is_not_local():
    """What is rotated is everything together: another molecule far away takes part in the average."""
    model, atoms = model_of(), STRUCTURES["ethanol"]
    other = molecule("H2O")
    other.translate([30.0, 0.0, 0.0])
    parts = energy_of(model, atoms) + energy_of(model, other)
    assert abs(energy_of(model, atoms + other) - parts) > 1e-4


# --- smooth -----------------------------------------------------------------------------------------------------------


def leaving(distance: float) -> Atoms:
    """An oxygen that goes out of reach, and a nitrogen that is nearly as far: both make frames with the bond."""
    return Atoms("CHON", [[0, 0, 0], [1.1, 0, 0.1], [0, distance, 0], [0.1, -0.2, 2.9]])


class Sudden(ECSE):
    """Neighbors that are available fully until they are gone."""

    def _around_atoms(self, batch):
        *head, available, _, lengths = super()._around_atoms(batch)
        return *head, torch.ones_like(available), torch.ones_like(available), lengths


def second_differences(values) -> torch.Tensor:
    values = torch.tensor(values, dtype=torch.float64)
    return (values[2:] - 2 * values[1:-1] + values[:-2]).abs()


def test_smooth_where_a_pair_leaves_the_cutoff():
    """Halving the step quarters second differences, across the cutoff of 3 and the switch before it."""
    model = model_of()
    largest = []
    for n in (300, 600):
        scan = torch.linspace(2.75, 3.05, n + 1).tolist()
        with torch.no_grad():
            energies = model(from_ase([leaving(d) for d in scan]))["energy"]
        largest.append(float(second_differences(energies.tolist()).max()))
    assert largest[1] < 0.4 * largest[0]
    jumps = []
    for method in (ECSE(pooled=True), Sudden(pooled=True)):
        inside, outside = (energy_of(model_of(method=method), leaving(CUTOFF + side)) for side in (-1e-9, 1e-9))
        jumps.append(abs(inside - outside))
    assert jumps[0] < 1e-10
    assert jumps[1] > 1e-3


@pytest.mark.parametrize("name", STRUCTURES)
def test_forces_are_derivatives(name):
    model, atoms = model_of(), STRUCTURES[name]
    forces = model(from_ase(atoms), forces=True)["forces"]
    direction = np.random.default_rng(3).normal(size=(len(atoms), 3))
    h, energies = 1e-5, []
    for step in (-h, h):
        moved = atoms.copy()
        moved.positions = moved.positions + step * direction
        energies.append(energy_of(model, moved))
    numeric = (energies[0] - energies[1]) / (2 * h)
    exact = float((forces * torch.as_tensor(direction)).sum())
    assert abs(numeric - exact) < 1e-6 * (1 + abs(exact))


@pytest.mark.parametrize("name", ["silicon", "water cell"])
def test_stress_is_a_derivative(name):
    model, atoms = model_of(), STRUCTURES[name]
    stress = model(from_ase(atoms), stress=True)["stress"][0]
    strain = np.random.default_rng(5).normal(size=(3, 3))
    strain = strain + strain.T
    h, energies = 1e-5, []
    for step in (h, -h):
        moved = atoms.copy()
        moved.set_cell(moved.cell[:] @ (np.eye(3) + step * strain), scale_atoms=True)
        energies.append(energy_of(model, moved))
    numeric = (energies[0] - energies[1]) / (2 * h)
    exact = float((stress * torch.as_tensor(strain)).sum()) * atoms.get_volume()
    assert abs(numeric - exact) < 1e-6 * (1 + abs(exact))


def test_training_through_a_deep_network():
    config = PETConfig((1, 6, 8), cutoff=CUTOFF, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=2)
    config = PETConfig.from_dict({**config.to_dict(), "num_gnn_layers": 2})
    network = PET(config, seed=0).to(torch.float64)
    model = Symmetrizer(network, ECSE(pooled=True)).train()
    assert network.receptive_field == 2
    out = model(from_ase([STRUCTURES["ethanol"], STRUCTURES["water cell"]]), forces=True)
    (out["forces"] ** 2).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


# --- where there is no frame ------------------------------------------------------------------------------------------


def chain(height: float) -> Atoms:
    return Atoms("OHH", [[0, 0, 0], [0.95, height, 0], [-0.95, height, 0]])


@pytest.mark.parametrize("atoms", [molecule("CO2"), chain(0.02), Atoms("O", [[0, 0, 0]])], ids=["CO2", "bent", "atom"])
def test_a_structure_of_collinear_environments_is_an_error(atoms):
    with pytest.raises(NoFrameError, match="environments of structure 1 are all collinear"):
        model_of()(from_ase([STRUCTURES["ethanol"], atoms]))
    # Around the centroid, and around atoms, it is covered.
    Symmetrizer(backbone(1), ECSE(), scope="atom").eval()(from_ase([atoms]))


def test_the_bound_is_the_same_for_a_cell_and_its_copies():
    line = chain(0.0)
    line.set_cell([2.9, 8.0, 8.0])
    line.pbc = True

    def passes(atoms):
        try:
            found = frames(atoms)
        except NoFrameError:
            return False
        return bool(found.total_weight.min() >= LEAST_POOLED)

    answers = []
    for height in torch.linspace(0.0, 0.3, 31).tolist():
        line.positions[1:, 1] = height
        answers.append(passes(line))
        assert answers[-1] == passes(line.repeat((2, 1, 1)))
    assert True in answers
    assert False in answers


def test_an_auxiliary_model_takes_over_smoothly():
    config = dict(cutoff=CUTOFF, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=2)
    auxiliary = PET(PETConfig((1, 6, 8), inputs="lengths", **config), seed=3).to(torch.float64)
    network = PET(PETConfig((1, 6, 8), **config), seed=0).to(torch.float64).eval()
    model = Symmetrizer(network, ECSE(pooled=True, fallback=auxiliary)).eval()
    structures = [chain(h) for h in torch.linspace(0.0, 0.6, 121).tolist()]
    found = model.frames(from_ase(structures))
    assert found.total_weight.min() >= 1.0 - 1e-12
    chosen = found.stratum == Stratum.AUXILIARY
    share = torch.zeros(len(structures), dtype=torch.float64)
    share = share.index_add(0, found.owner[chosen], found.normalized_weights.detach()[chosen])
    assert share[0] == 1.0
    assert share[-1] == 0.0
    assert (share[1:] - share[:-1]).abs().max() < 0.2
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    for n in (0, 20, 30, 60):
        out = model(from_ase(structures[n]), forces=True)
        other = model(from_ase(transformed(structures[n], rotation)), forces=True)
        assert close(other["energy"], out["energy"])
        assert close(other["forces"], out["forces"] @ rotation.T, 1e-10)
        energies = []
        for step in (-1e-5, 1e-5):
            moved = structures[n].copy()
            moved.positions[0, 1] += step
            energies.append(energy_of(model, moved))
        assert abs((energies[0] - energies[1]) / 2e-5 - float(out["forces"][0, 1])) < 1e-6


# --- declarations -----------------------------------------------------------------------------------------------------


def test_descriptions():
    method = ECSE(0.2, pooled=True)
    description = json.loads(json.dumps(method.describe()))
    again = ECSE.rebuild(description, None)
    assert again.pooled
    assert again.describe() == description
    assert "pooled" in repr(method)
    assert "pooled" not in ECSE().describe()
    assert not ECSE.rebuild(ECSE().describe(), None).pooled


def test_scopes_and_lists_that_it_cannot_do():
    with pytest.raises(DeclarationError, match="scope: ECSE works in scope 'structure', got 'atom'"):
        Symmetrizer(backbone(1), ECSE(pooled=True), scope="atom")
    batch = with_neighbors(validate(from_ase(molecule("H2O"))), CUTOFF)
    with pytest.raises(DeclarationError, match="scope: expected 'structure', got 'atom'"):
        ECSE(pooled=True).frames(batch, group="SO(3)", scope="atom", l_max=0)
    everything = Symmetrizer(ToyGlobal({"energy": OutputSpec("0e", per="structure")}).double(), ECSE(pooled=True))
    with pytest.raises(InvalidInputError, match="a backbone with a cutoff"):
        everything(from_ase(molecule("H2O")))
    with pytest.raises(DeclarationError, match="pooled: expected True or False"):
        ECSE(pooled="yes")
    assert ECSE().scopes == ("atom", "structure")


def test_periodic_structures_are_told_about_it():
    model = Symmetrizer(backbone(), ECSE(), scope="structure").eval()
    with pytest.raises(InvalidInputError, match=r"structure 0 is periodic.*ECSE\(pooled=True\)"):
        model(from_ase(silicon()))


def test_a_plan_counts_its_frames():
    model = model_of()
    batch = from_ase([STRUCTURES["ethanol"], STRUCTURES["silicon"]])
    assert model.explain(batch).n_evaluations == model.frames(batch).n_evaluations
