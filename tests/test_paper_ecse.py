"""The published protocol of ECSE: the authors' numbers, its exactness, and each of its known faults by name."""

import json
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, DeclarationError, InvalidInputError, NoFrameError, OutputSpec, Symmetrizer, from_ase
from symmetrize.data import validate, with_neighbors
from symmetrize.frames import Stratum
from symmetrize.methods import make_method
from symmetrize.methods.ecse.paper import PaperECSE
from symmetrize.ops.rotations import random_rotations

FROZEN = json.loads((Path(__file__).parent / "data/paper_ecse.json").read_text())["cases"]
ENERGY = {"energy": OutputSpec("0e", reduce="sum"), "vector": OutputSpec("1o")}


def structure(case) -> Atoms:
    return Atoms(case["numbers"], case["positions"], cell=case["cell"], pbc=case["pbc"])


def pet(species=(1, 6, 8), cutoff=4.5, seed=0, **options) -> PET:
    config = PETConfig(
        tuple(species), cutoff=cutoff, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=2, **options
    )
    return PET(config, seed=seed).to(torch.float64).requires_grad_(False).eval()


def lengths(**options) -> PET:
    return pet(inputs="lengths", **options)


def model_of(method=None, *, scope="structure", cutoff=4.5, n_hops=1, outputs=ENERGY, seed=2) -> Symmetrizer:
    backbone = ToyLocal(outputs, cutoff=cutoff, n_hops=n_hops, seed=seed).to(torch.float64)
    return Symmetrizer(backbone, method or ECSE.paper(), group="SO(3)", scope=scope).eval()


def frames(atoms, method=None, *, cutoff=4.5, scope="structure"):
    batch = with_neighbors(validate(from_ase(atoms)), cutoff)
    return (method or ECSE.paper()).frames(batch, group="SO(3)", scope=scope, l_max=0)


def turned(atoms: Atoms, rotation) -> Atoms:
    out = atoms.copy()
    out.positions = atoms.positions @ rotation.numpy().T
    out.cell = atoms.cell[:] @ rotation.numpy().T
    return out


def energy_of(model, atoms) -> float:
    with torch.no_grad():
        return float(model(from_ase(atoms))["energy"])


def close(got, expected, tolerance=1e-11) -> bool:
    """Relative to the largest entry: pruned weights are steep, and forces with them large."""
    return bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def chiral() -> Atoms:
    positions = [[0, 0, 0], [1.1, 0, 0.1], [-0.2, 1.2, 0], [0.1, -0.3, 1.3], [1.4, 1.5, 0.2]]
    return Atoms("CHOHH", positions)


# --- the authors' numbers ---------------------------------------------------------------------------------------------


def differences(case, **options) -> tuple[float, float]:
    """Largest difference of weights and of rotations, infinite where even the number of frames differs."""
    method = ECSE.paper(**{**case["options"], **options})
    found = frames(structure(case), method, cutoff=case["cutoff"])
    weights = torch.tensor(case["weights"], dtype=torch.float64)
    if weights.shape != found.weights.shape:
        return float("inf"), float("inf")
    if case["rotations"] is None:
        return float((weights.sort()[0] - found.weights.sort()[0]).abs().max()), 0.0
    same = (torch.tensor(case["rotations"], dtype=torch.float64)[:, None] - found.rotations[None]).abs().amax((2, 3))
    nearest = same.argmin(dim=1)
    assert len(set(nearest.tolist())) == len(nearest)
    return float((weights - found.weights[nearest]).abs().max()), float(same.amin(dim=1).max())


@pytest.mark.parametrize("case", FROZEN, ids=[case["name"] for case in FROZEN])
def test_frames_and_weights_are_those_of_the_authors_code(case):
    weights, rotations = differences(case)
    assert weights <= 1e-10
    assert rotations <= 1e-10


@pytest.mark.parametrize(
    "changed",
    [{"beta": 5.01}, {"collinearity_threshold": 0.21}, {"cutoff_width": 0.16}, {"weight_beta": 1.1}, {"pruning": 3}],
    ids=str,
)
def test_every_constant_matters_to_that_comparison(changed):
    assert max(differences(case, **{**case["options"], **changed})[0] for case in FROZEN) > 1e-6


@pytest.mark.parametrize("case", FROZEN, ids=[case["name"] for case in FROZEN])
def test_the_auxiliary_weight_is_that_of_the_authors_code(case):
    auxiliary = lengths(species=sorted(set(case["numbers"])))
    found = frames(structure(case), ECSE.paper(**case["options"], auxiliary=auxiliary), cutoff=case["cutoff"])
    weight = found.weights[found.stratum == Stratum.AUXILIARY].sum()
    assert abs(float(weight) - case["auxiliary_weight"]) <= 1e-10


def test_some_frozen_auxiliary_weight_is_neither_0_nor_1():
    assert any(0.1 < case["auxiliary_weight"] < 0.9 for case in FROZEN)
    assert any(case["auxiliary_weight"] == 0.0 for case in FROZEN)


def test_energies_are_the_weighted_mean_over_the_authors_frames():
    case = next(case for case in FROZEN if case["name"] == "silicon, 8 atoms")
    model, atoms = model_of(cutoff=case["cutoff"]), structure(case)
    weights, rotations = (torch.tensor(case[name], dtype=torch.float64) for name in ("weights", "rotations"))
    copies = from_ase([turned(atoms, rotation.T) for rotation in rotations], cutoff=case["cutoff"])
    energies = model.backbone(copies)["energy"].new_zeros(len(weights))
    energies = energies.index_add(0, copies.batch, model.backbone(copies)["energy"])
    expected = (weights * energies).sum() / weights.sum()
    assert torch.allclose(model(from_ase(atoms))["energy"], expected[None], rtol=0, atol=1e-10)
    assert energies.std() > 1e-3


# --- what it promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["structure", "atom"])
def test_rotations_are_exact(scope):
    structures = [chiral(), molecule("CH3CH2OH"), structure(FROZEN[6])]
    model = model_of(scope=scope)
    rotations = random_rotations(3, torch.Generator().manual_seed(0))
    out = model(from_ase(structures), forces=True)
    for rotation in rotations:
        other = model(from_ase([turned(atoms, rotation) for atoms in structures]), forces=True)
        assert close(other["energy"], out["energy"])
        assert close(other["vector"], out["vector"] @ rotation.T)
        assert close(other["forces"], out["forces"] @ rotation.T)
    bare = [
        model.backbone(from_ase([turned(atoms, rotation) for atoms in structures], cutoff=4.5))["energy"].sum()
        for rotation in rotations[:2]
    ]
    assert abs(bare[0] - bare[1]) > 1e-3


@pytest.mark.parametrize("scope", ["structure", "atom"])
def test_order_and_batch_do_not_matter(scope):
    model, atoms = model_of(scope=scope), chiral()
    alone = model(from_ase(atoms), forces=True)
    order = [3, 0, 4, 2, 1]
    permuted = model(from_ase(atoms[order]), forces=True)
    assert close(permuted["energy"], alone["energy"])
    assert close(permuted["forces"], alone["forces"][order])
    together = model(from_ase([molecule("CH3CH2OH"), atoms]), forces=True)
    assert close(together["energy"][1:], alone["energy"])
    assert close(together["forces"][9:], alone["forces"])


@pytest.mark.parametrize("scope", ["structure", "atom"])
def test_forces_and_stress_are_derivatives(scope):
    atoms = structure(FROZEN[6])
    model = model_of(scope=scope)
    out = model(from_ase(atoms), forces=True, stress=True)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64)
    strain = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    strain = strain + strain.T

    def energy(step, kind):
        moved = atoms.copy()
        if kind == "forces":
            moved.positions = moved.positions + step * direction.numpy()
        else:
            moved.set_cell(moved.cell[:] @ (torch.eye(3) + step * strain).numpy(), scale_atoms=True)
        return energy_of(model, moved)

    h = 1e-5
    for kind, slope in (
        ("forces", -(out["forces"] * direction).sum()),
        ("stress", (out["stress"][0] * strain).sum() * atoms.get_volume()),
    ):
        numeric = (energy(h, kind) - energy(-h, kind)) / (2 * h)
        assert abs(numeric - float(slope)) <= 1e-5 * (1 + abs(numeric)), kind


def test_second_derivatives_are_finite():
    model = model_of()
    batch = from_ase([chiral(), structure(FROZEN[6])])
    batch.pos.requires_grad_()
    out = model(batch, forces=True)
    (gradient,) = torch.autograd.grad((out["forces"] ** 2).sum(), batch.pos)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_only_wanted_atoms_have_frames_in_atom_scope():
    batch = with_neighbors(validate(from_ase(chiral())), 4.5)
    everything = ECSE.paper().frames(batch, group="SO(3)", scope="atom", l_max=0)
    batch.center_mask = torch.tensor([True, False, True, False, False])
    found = ECSE.paper().frames(batch, group="SO(3)", scope="atom", l_max=0)
    assert set(found.owner.tolist()) == {0, 2}
    same = (everything.owner == 0) | (everything.owner == 2)
    assert torch.equal(everything.weights[same], found.weights)


def test_a_cutoff_of_its_own_builds_or_narrows_the_list():
    atoms = molecule("CH3CH2OH")
    near = frames(atoms, cutoff=3.0)
    for method, cutoff in ((ECSE.paper(cutoff=3.0), 5.0), (ECSE.paper(cutoff=3.0), 2.0)):
        found = frames(atoms, method, cutoff=cutoff)
        assert torch.allclose(found.weights, near.weights, rtol=0, atol=1e-12)
        assert torch.allclose(found.rotations, near.rotations, rtol=0, atol=1e-12)
    with pytest.raises(InvalidInputError, match="expected a cutoff"):
        ECSE.paper().frames(validate(from_ase(atoms)), group="SO(3)", scope="structure", l_max=0)


# --- its faults, by name ----------------------------------------------------------------------------------------------


def at_the_cutoff(distance: float) -> Atoms:
    return Atoms("OHH", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, distance, 0.0]])


def test_fault_1_jump_at_the_outer_cutoff():
    """The only two frames have weight 12.67 until their atom leaves the neighbor list, and are gone then."""
    inside = frames(at_the_cutoff(5.0 - 1e-9), cutoff=5.0)
    assert 12.66 < float(inside.total_weight) < 12.67
    with pytest.raises(NoFrameError):
        frames(at_the_cutoff(5.0 + 1e-9), cutoff=5.0)
    # The energy jumps where the auxiliary model takes over; the stratified weights have no such place.
    species = (1, 8)
    jumps = {}
    for name, method in (("paper", ECSE.paper(auxiliary=lengths(cutoff=5.0, species=species))), ("ours", ECSE())):
        backbone = pet(cutoff=5.0, species=species, cutoff_width=0.5)
        model = Symmetrizer(backbone, method, group="SO(3)", scope="structure" if name == "paper" else "atom").eval()
        inside, outside = (energy_of(model, at_the_cutoff(5.0 + side)) for side in (-1e-9, 1e-9))
        jumps[name] = abs(inside - outside)
    assert jumps["paper"] > 1e-4
    assert jumps["ours"] < 1e-9


def test_fault_2_steep_where_a_pair_fades_in():
    """While one pair takes over from another the weights change completely within a hundredth of an angstrom."""

    def share(distance):
        # A second partner of the first bond comes nearer than the one that is there, far outside.
        atoms = Atoms("OHHH", [[0, 0, 0], [1.0, 0, 0], [0, 4.95, 0], [0, 0, distance]])
        found = frames(atoms, ECSE.paper(pruning=0), cutoff=5.0)
        return float(found.total_weight)

    scan = [share(4.84 + 0.001 * n) for n in range(160)]
    steepest = max(abs(a - b) for a, b in zip(scan[1:], scan[:-1], strict=True)) / 0.001
    # A switch over the width of 0.15 A of a weight of 6.33 has a slope of 2 / 0.15 * 6.33 = 84 per angstrom at most.
    assert steepest > 84


def test_fault_3_inversion():
    model = model_of()
    assert model.method.groups == ("SO(3)",)
    energies = [energy_of(model, turned(chiral(), sign * torch.eye(3))) for sign in (1.0, -1.0)]
    assert abs(energies[0] - energies[1]) > 1e-3
    ours = Symmetrizer(model.backbone, ECSE(), group="O(3)", scope="structure").eval()
    energies = [energy_of(ours, turned(chiral(), sign * torch.eye(3))) for sign in (1.0, -1.0)]
    assert abs(energies[0] - energies[1]) < 1e-11
    with pytest.raises(DeclarationError, match="PaperECSE averages over SO"):
        Symmetrizer(model.backbone, ECSE.paper(), group="O(3)")
    with pytest.raises(DeclarationError, match="proper"):
        ECSE.paper().frames(from_ase(chiral(), cutoff=4.0), group="O(3)", scope="structure", l_max=0)


@pytest.mark.parametrize("scope", ["structure", "atom"])
def test_fault_4_linear_molecules_have_no_frame(scope):
    model = model_of(scope=scope)
    owner = "structure 1" if scope == "structure" else "structure 1, atom 0"
    with pytest.raises(NoFrameError, match=f"{owner} has none; .*auxiliary"):
        model(from_ase([chiral(), molecule("CO2")]))
    bent = Atoms("OHH", [[0, 0, 0], [0.95, 0.1, 0], [-0.95, 0.1, 0]])  # 168 degrees
    with pytest.raises(NoFrameError):
        model(from_ase(bent))


def test_fault_6_evaluations_grow_with_the_structure():
    cell = bulk("Si", cubic=True)
    counts = {}
    for repeat in (1, 2):
        atoms = cell.repeat((repeat, 1, 1))
        atoms.rattle(0.1, seed=1)
        counts[len(atoms)] = frames(atoms, cutoff=4.0).n_evaluations
    assert counts[16] > 1.5 * counts[8] > 15
    # Every structure in each of them: the work per atom grows. Per center it does not.
    atoms = cell.repeat((2, 1, 1))
    atoms.rattle(0.1, seed=1)
    per_center = frames(atoms, cutoff=4.0, scope="atom")
    assert per_center.n_evaluations < 12 * len(atoms)


# --- the auxiliary model ----------------------------------------------------------------------------------------------


def test_a_network_of_lengths_is_invariant():
    rotations = random_rotations(4, torch.Generator().manual_seed(3), improper=None)
    structures = [chiral(), molecule("CO2"), molecule("CH3CH2OH")]
    spread = {}
    for name, network in (("lengths", lengths(num_gnn_layers=2)), ("vectors", pet(num_gnn_layers=2))):
        rows = [
            network(from_ase([turned(atoms, rotation) for atoms in structures], cutoff=4.5))["energy"]
            for rotation in rotations
        ]
        spread[name] = float(torch.stack(rows).std(dim=0).max())
    assert spread["lengths"] < 1e-14
    assert spread["vectors"] > 1e-4


def test_a_network_of_lengths_sees_distances():
    network = lengths()
    batches = [from_ase(Atoms("CO", [[0, 0, 0], [d, 0, 0]]), cutoff=4.5) for d in (1.1, 1.2)]
    assert abs(network(batches[0])["energy"] - network(batches[1])["energy"]).max() > 1e-4


def test_a_network_of_lengths_has_invariant_outputs_only():
    with pytest.raises(DeclarationError, match="inputs='lengths': expected invariant scalars"):
        lengths(direct_forces=True)
    with pytest.raises(DeclarationError, match="did you mean 'lengths'"):
        pet(inputs="length")
    config = PETConfig((1, 6), inputs="lengths")
    assert PETConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = {name: value for name, value in config.to_dict().items() if name != "inputs"}
    assert PETConfig.from_dict(old).inputs == "vectors"


@pytest.mark.parametrize("scope", ["structure", "atom"])
@pytest.mark.parametrize("make", [ECSE.paper, lambda auxiliary: ECSE(fallback=auxiliary)], ids=["paper", "ECSE"])
def test_linear_molecules_with_an_auxiliary_model(make, scope):
    method = make(auxiliary=lengths(seed=1))
    model = Symmetrizer(pet(), method, group="SO(3)", scope=scope).eval()
    structures = [chiral(), molecule("CO2"), Atoms("O", [[0, 0, 0]])]
    out = model(from_ase(structures), forces=True)
    rotation = random_rotations(1, torch.Generator().manual_seed(5))[0]
    other = model(from_ase([turned(atoms, rotation) for atoms in structures]), forces=True)
    assert close(other["energy"], out["energy"])
    assert close(other["forces"], out["forces"] @ rotation.T)
    # All there is of a linear molecule is the auxiliary model.
    alone = method.auxiliary(from_ase(molecule("CO2"), cutoff=4.5))["energy"].sum()
    assert torch.allclose(out["energy"][1], alone, rtol=0, atol=1e-12)
    assert out["forces"][5:8].abs().max() > 1e-6


@pytest.mark.parametrize("height", [0.11, 0.17, 0.2])
def test_forces_of_a_bent_molecule_with_an_auxiliary_model(height):
    """Half of the weight here is the auxiliary model's: its slope is part of the forces."""
    method = ECSE.paper(auxiliary=lengths(seed=1))
    model = Symmetrizer(pet(), method, group="SO(3)", scope="structure").eval()
    atoms = Atoms("OHH", [[0, 0, 0], [0.95, height, 0], [-0.95, height, 0]])
    force = model(from_ase(atoms), forces=True)["forces"][0, 1]
    energies = []
    for step in (-1e-5, 1e-5):
        moved = atoms.copy()
        moved.positions[0, 1] += step
        energies.append(energy_of(model, moved))
    assert abs((energies[0] - energies[1]) / 2e-5 - float(force)) < 1e-5 * (1 + abs(float(force)))


# --- descriptions and bad input ---------------------------------------------------------------------------------------


def test_description_and_registry():
    method = ECSE.paper(cutoff=4.0, beta=4.0, species_pruning=(1, 6, 8), pruning=2)
    assert isinstance(method, PaperECSE)
    again = PaperECSE.rebuild(json.loads(json.dumps(method.describe())), None)
    assert again.describe() == method.describe()
    auxiliary = lengths()
    assert PaperECSE.rebuild(ECSE.paper(auxiliary=auxiliary).describe(), auxiliary).auxiliary is auxiliary
    assert make_method("ECSE.paper", beta=4.0).describe() == make_method("PaperECSE", beta=4.0).describe()
    assert set(PaperECSE.limits) >= {"smoothness", "finite_outputs"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": -1.0}, "cutoff: expected a positive number, got -1.0"),
        ({"beta": float("nan")}, "beta: expected a positive number"),
        ({"collinearity_width": 0.3}, "collinearity_width: expected at most collinearity_threshold"),
        ({"collinearity_threshold": 0.9}, "expected less than 1"),
        ({"pruning": -1}, "pruning: expected a number of passes"),
        ({"species_pruning": True}, "species_pruning: expected the atomic numbers"),
        ({"auxiliary": "pet"}, "auxiliary: expected a Backbone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(DeclarationError, match=message):
        ECSE.paper(**options)


def test_species_pruning_names_unknown_species():
    with pytest.raises(InvalidInputError, match="structure 0"):
        frames(chiral(), ECSE.paper(species_pruning=[1, 6]))
