"""The ASE calculator: properties, conventions, dynamics."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.vibrations import Vibrations
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.data import from_ase
from symmetrize.errors import (
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    SymmetrizeError,
    UnknownSpeciesError,
)
from symmetrize.ops.rotations import random_rotations
from symmetrize.representations import OutputSpec
from symmetrize.testing.structures.geometries import crystal, ethanol


def model_of(method=None, **options):
    return Symmetrizer(ToyLocal(cutoff=3.0, width=6), ECSE() if method is None else method, **options)


def with_calculator(atoms, *args, **options):
    atoms = atoms.copy()
    atoms.calc = SymmetrizerCalculator(*args, **options)
    return atoms


def distorted_water():
    return Atoms("OHH", positions=[[0.1, 0.0, 0.05], [0.98, 0.12, -0.1], [-0.3, 0.9, 0.2]])


@pytest.mark.parametrize("method", [ECSE(), Identity()], ids=["ECSE", "Identity"])
def test_forces_are_the_numerical_forces_of_ase(method):
    atoms = with_calculator(distorted_water(), model_of(method))
    forces = atoms.get_forces()
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    scale = np.sqrt(np.mean(forces**2))
    assert scale > 1e-2 and np.abs(forces - numerical).max() < 1e-5 * scale
    assert np.abs(forces + numerical).max() > scale, "the sign is that of a force"


@pytest.mark.parametrize("voigt", [True, False])
def test_stress_has_the_sign_and_order_of_ase(voigt):
    silicon = crystal("Si", "diamond", 5.43, rattle=0.1)
    silicon.set_cell(silicon.cell.array @ (np.eye(3) + 0.03 * np.arange(9.0).reshape(3, 3) / 8), scale_atoms=True)
    atoms = with_calculator(silicon, model_of())
    stress = atoms.get_stress(voigt=voigt)
    numerical = calculate_numerical_stress(atoms, eps=1e-5, voigt=voigt)
    scale = np.sqrt(np.mean(stress**2))
    assert scale > 1e-4 and np.abs(stress - numerical).max() < 1e-5 * scale
    assert np.ptp(stress) > 0.1 * scale, "not hydrostatic"


def test_energies_sum_to_the_energy():
    atoms = with_calculator(ethanol(), model_of())
    energies = atoms.get_potential_energies()
    assert energies.shape == (9,) and np.ptp(energies) > 1e-2
    assert np.isclose(energies.sum(), atoms.get_potential_energy(), rtol=1e-13)
    assert atoms.calc.results["free_energy"] == atoms.get_potential_energy()


def test_numbers_are_those_of_the_model():
    model = model_of(scope="structure")
    atoms = with_calculator(ethanol(), model)
    out = model(from_ase(ethanol()), forces=True)
    assert atoms.get_potential_energy() == float(out["energy"].detach())
    assert np.array_equal(atoms.get_forces(), out["forces"].detach().numpy())


def test_single_precision_models_get_single_precision_input():
    low, high = with_calculator(ethanol(), model_of().float()), with_calculator(ethanol(), model_of())
    assert low.get_forces().dtype == np.float64
    assert np.abs(low.get_forces() - high.get_forces()).max() < 1e-3 * np.abs(high.get_forces()).max()


def test_the_output_that_is_the_energy_has_a_name():
    net = ToyLocal(outputs={"heat": OutputSpec("0e", reduce="sum"), "dipole": OutputSpec("1o")}, cutoff=3.0)
    atoms = with_calculator(distorted_water(), Symmetrizer(net, ECSE()), energy="heat")
    assert np.isfinite(atoms.get_forces()).all() and atoms.get_potential_energies().shape == (3,)
    with pytest.raises(DeclarationError, match="energy"):
        SymmetrizerCalculator(Symmetrizer(net, ECSE()))


def test_an_output_that_is_no_energy_is_refused_before_anything_is_computed():
    net = ToyLocal(outputs={"heat": OutputSpec("0e", reduce="sum"), "dipole": OutputSpec("1o")}, cutoff=3.0)
    with pytest.raises(DeclarationError, match="dipole"):
        SymmetrizerCalculator(Symmetrizer(net, ECSE()), energy="dipole")


@pytest.mark.parametrize("wrong", [ToyLocal(), torch.nn.Linear(1, 1), "pet", None], ids=lambda x: type(x).__name__)
def test_a_model_of_the_wrong_kind(wrong):
    with pytest.raises(InvalidTypeError, match=f"Symmetrizer.*{type(wrong).__name__}.*Identity"):
        SymmetrizerCalculator(wrong)


def test_bad_structures_are_our_errors():
    with pytest.raises(InvalidInputError, match="structure 0, atom 1"):
        with_calculator(Atoms("H2", positions=[[0, 0, 0], [np.nan, 0, 0]]), model_of()).get_potential_energy()
    with pytest.raises(SymmetrizeError, match="cell"):
        with_calculator(ethanol(), model_of()).get_stress()


def test_results_are_not_aliased_between_calls():
    atoms = with_calculator(ethanol(), model_of())
    first = atoms.get_forces()
    kept, results = first.copy(), atoms.calc.results
    inner = results["forces"]
    atoms.positions[0] += 0.1
    second = atoms.get_forces()
    assert np.array_equal(first, kept) and np.array_equal(inner, kept) and not np.array_equal(second, kept)
    assert atoms.calc.results is not results
    second[:] = 0.0
    assert np.abs(atoms.get_forces()).max() > 0.0, "what a user does to an array stays there"


def test_what_was_computed_is_not_computed_again_and_what_moved_is():
    class Counting(SymmetrizerCalculator):
        calls = 0

        def calculate(self, *args, **options):
            self.calls += 1
            super().calculate(*args, **options)

    atoms = ethanol()
    atoms.calc = Counting(model_of())
    atoms.get_forces()
    atoms.get_potential_energy()
    assert atoms.calc.calls == 1
    atoms.positions[3, 1] += 1e-3
    atoms.get_potential_energy()
    assert atoms.calc.calls == 2


# --- dynamics -------------------------------------------------------------------------------------------------------


def trajectory(model, step, n_steps):
    """Energies and angular momenta of a short run from the same start."""
    atoms = with_calculator(distorted_water(), model)
    momenta = np.array([[1.0, -0.4, 0.3], [-0.5, 0.6, 0.4], [-0.5, -0.2, -0.7]]) * 0.6
    atoms.set_momenta(momenta)
    dynamics = VelocityVerlet(atoms, timestep=step * units.fs)
    rows = []

    def record():
        relative = atoms.positions - atoms.get_center_of_mass()
        momentum = np.cross(relative, atoms.get_momenta()).sum(axis=0)
        rows.append((atoms.get_total_energy(), atoms.get_kinetic_energy(), *momentum))

    dynamics.attach(record)
    dynamics.run(n_steps)
    rows = np.array(rows)
    return rows[:, 0], rows[:, 1], rows[:, 2:]


@pytest.mark.parametrize("net", [ToyLocal(cutoff=3.0, width=6), ToyGlobal(width=6)], ids=lambda net: type(net).__name__)
def test_dynamics_conserve_energy_and_with_symmetry_angular_momentum(net):
    total, kinetic, momentum = trajectory(Symmetrizer(net, ECSE()), step=0.02, n_steps=40)
    size = np.linalg.norm(momentum[0])
    assert size > 0.1 and np.ptp(kinetic) > 1e-3, "it turns, and forces do work"
    assert np.ptp(total) < 1e-3 * np.ptp(kinetic)
    assert np.abs(momentum - momentum[0]).max() < 1e-11 * size
    total, kinetic, momentum = trajectory(Symmetrizer(net, Identity()), step=0.02, n_steps=40)
    assert np.ptp(total) < 1e-2 * np.ptp(kinetic), "the bare model is conservative too"
    assert np.abs(momentum - momentum[0]).max() > 1e-4 * size, "but not isotropic"


def test_the_error_in_the_energy_is_that_of_the_integrator():
    """Second order: a fourth at half the step. A wrong gradient leaves an error that does not shrink like this."""
    errors = []
    for step, n in ((0.08, 12), (0.04, 24)):
        total, _, _ = trajectory(model_of(), step, n)
        errors.append(np.ptp(total[:: n // 12]))
    assert 3.0 < errors[0] / errors[1] < 5.0


# --- what is kept, and for how long ---------------------------------------------------------------------------------


class Counting(SymmetrizerCalculator):
    calls = 0

    def calculate(self, *args, **options):
        self.calls += 1
        super().calculate(*args, **options)


def strained_silicon(seed=0):
    silicon = crystal("Si", "diamond", 5.43, rattle=0.1)
    generator = np.random.default_rng(seed)
    silicon.set_cell(silicon.cell.array @ (np.eye(3) + 0.05 * generator.normal(size=(3, 3))), scale_atoms=True)
    return silicon


@pytest.mark.parametrize("first", ["forces", "stress"])
def test_forces_and_stress_of_a_structure_take_one_evaluation(first):
    atoms = strained_silicon()
    atoms.calc = Counting(model_of())
    atoms.calc.get_property(first, atoms)
    atoms.get_stress(), atoms.get_forces(), atoms.get_potential_energy(), atoms.get_potential_energies()
    assert atoms.calc.calls == 1
    separately = strained_silicon()
    for name in ("forces", "stress", "energy"):
        fresh = SymmetrizerCalculator(model_of())
        assert np.array_equal(fresh.get_property(name, separately), atoms.calc.results[name])


def test_what_was_known_is_kept_while_the_structure_is_the_same_and_no_longer():
    atoms = strained_silicon()
    atoms.calc = Counting(model_of(), forces=None)
    energy = atoms.get_potential_energy()
    assert "forces" not in atoms.calc.results, "nobody asked for them"
    atoms.get_forces()
    assert atoms.get_potential_energy() == energy and atoms.calc.calls == 2
    changes = {
        "positions": lambda a: a.positions.__iadd__([[0.0, 0.0, 0.01]] * (len(a) - 1) + [[0.0, 0.0, 0.0]]),
        "cell": lambda a: a.cell.__setitem__((0, 0), a.cell[0, 0] * 1.01),
        "numbers": lambda a: a.numbers.__setitem__(0, 6),
        "pbc": lambda a: a.pbc.__setitem__(0, False),
    }
    for name, change in changes.items():
        before = atoms.calc.results
        change(atoms)
        fresh = with_calculator(atoms, model_of())
        assert np.array_equal(atoms.get_forces(), fresh.get_forces()), name
        assert np.array_equal(atoms.get_stress(), fresh.get_stress()), name
        assert not np.array_equal(before["forces"], atoms.get_forces()), name
        assert atoms.calc.results is not before


def test_a_changed_model_counts_after_reset():
    model = model_of()
    atoms = with_calculator(ethanol(), model)
    before = atoms.get_potential_energy()
    with torch.no_grad():
        model.backbone.readout["energy"].mul_(2.0)
    assert atoms.get_potential_energy() == before
    atoms.calc.reset()
    assert np.isclose(atoms.get_potential_energy(), 2.0 * before, rtol=1e-12)


@pytest.mark.parametrize("pbc", [(True, True, False), (True, False, False), (False, False, False)])
def test_mixed_periodicity(pbc):
    slab = strained_silicon()
    slab.pbc = pbc
    atoms = with_calculator(slab, model_of())
    scale = np.abs(atoms.get_forces()).max()
    assert np.abs(atoms.get_forces() - calculate_numerical_forces(atoms, eps=1e-4)).max() < 1e-5 * scale
    stress = atoms.get_stress()
    assert np.abs(stress - calculate_numerical_stress(atoms, eps=1e-5)).max() < 1e-5 * np.abs(stress).max()


def test_a_cell_without_a_volume_gives_forces_but_no_stress():
    chain = Atoms("CC", positions=[[0.0, 0.0, 0.0], [1.1, 0.4, 0.2]], cell=[2.5, 0.0, 0.0], pbc=(True, False, False))
    atoms = with_calculator(chain, model_of())
    assert np.abs(atoms.get_forces()).max() > 0.0 and "stress" not in atoms.calc.results
    with pytest.raises(InvalidInputError, match="volume"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_forces()).all(), "the error leaves nothing behind"


# --- other outputs --------------------------------------------------------------------------------------------------


def many_outputs(**options):
    outputs = {
        "energy": OutputSpec("0e", reduce="sum"),
        "dipole": OutputSpec("1o", reduce="sum"),
        "shielding": OutputSpec(cartesian="ij"),
        "non_conservative_forces": OutputSpec("1o"),
    }
    return Symmetrizer(ToyLocal(outputs, cutoff=3.0, width=6), ECSE(), **options)


def test_other_outputs_are_properties_by_their_names():
    model = many_outputs()
    atoms = with_calculator(ethanol(), model)
    out = model(from_ase(ethanol()))
    assert np.array_equal(atoms.get_dipole_moment(), out["dipole"][0].detach().numpy())
    for name in ("atomic_dipole", "shielding", "non_conservative_forces"):
        assert np.array_equal(atoms.calc.get_property(name, atoms), out[name].detach().numpy())
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    other = ethanol()
    other.positions = other.positions @ rotation.T
    turned = with_calculator(other, model)
    dipole = atoms.get_dipole_moment()
    assert np.abs(dipole).max() > 1e-2 and np.allclose(turned.get_dipole_moment(), rotation @ dipole, atol=1e-12)
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("magmoms", atoms)


def test_a_dipole_per_structure():
    net = ToyGlobal({"energy": OutputSpec("0e", per="structure"), "dipole": OutputSpec("1o", per="structure")}, width=6)
    atoms = with_calculator(distorted_water(), Symmetrizer(net, ECSE()))
    assert atoms.get_dipole_moment().shape == (3,) and np.abs(atoms.get_dipole_moment()).max() > 1e-3
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energies()


def test_direct_forces_in_place_of_the_derivative():
    model = many_outputs()
    atoms = with_calculator(ethanol(), model, forces="non_conservative_forces")
    assert np.array_equal(atoms.get_forces(), model(from_ase(ethanol()))["non_conservative_forces"].detach().numpy())
    assert np.abs(atoms.get_forces() - with_calculator(ethanol(), model).get_forces()).max() > 1e-3
    for wrong, message in (("dipole", "per atom"), ("shielding", "'1o'"), ("nothing", "unknown")):
        with pytest.raises(DeclarationError, match=message):
            SymmetrizerCalculator(model, forces=wrong)


def test_the_spread_over_frames_on_request():
    atoms = with_calculator(ethanol(), many_outputs(), spread=True)
    spreads = {name: atoms.calc.get_property(f"{name}_spread", atoms) for name in ("energy", "energies", "dipole")}
    assert spreads["energy"] > 1e-3 and spreads["energies"].shape == (9,) and spreads["dipole"] > 1e-3
    with pytest.raises(PropertyNotImplementedError):
        with_calculator(ethanol(), many_outputs()).calc.get_property("energy_spread", ethanol())
    bare = with_calculator(ethanol(), model_of(Identity()), spread=True)
    assert bare.calc.get_property("energy_spread", bare) == 0.0, "one frame"


def test_double_precision_leaves_the_model_of_the_user_alone():
    model = model_of().float()
    low, high = with_calculator(ethanol(), model), with_calculator(ethanol(), model, dtype=torch.float64)
    assert model.backbone.dtype == torch.float32
    difference = np.abs(low.get_forces() - high.get_forces()).max()
    assert 0.0 < difference < 1e-3 * np.abs(high.get_forces()).max()
    numerical = calculate_numerical_forces(high, eps=1e-4)
    assert np.abs(high.get_forces() - numerical).max() < 1e-5 * np.abs(numerical).max()
    with pytest.raises(InvalidTypeError, match="dtype"):
        SymmetrizerCalculator(model, dtype=torch.float16)


def test_an_unknown_species_is_our_error():
    net = PET(PETConfig((1, 6), cutoff=3.0, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=2))
    with pytest.raises(UnknownSpeciesError, match=r"\[1, 6\].*8"):
        with_calculator(distorted_water(), Symmetrizer(net, ECSE()), dtype=torch.float64).get_forces()


# --- what ASE does with it ------------------------------------------------------------------------------------------


def bound(atoms, method=None, seed=0):
    """A toy with a stable minimum nearby: springs between the atoms hold it together."""
    return with_calculator(atoms, Symmetrizer(Springs(seed), ECSE() if method is None else method))


class Springs(ToyLocal):
    """Repulsion and attraction of pairs, plus a tenth of a toy that knows nothing of symmetry."""

    def __init__(self, seed=0):
        super().__init__(cutoff=3.4, width=6, seed=seed)

    def forward(self, batch):
        length = batch["edge_vec"].norm(dim=1)
        fade = (1.0 - (length / 3.4) ** 2).clamp(min=0.0) ** 4
        pair = 40.0 * ((1.0 / length) ** 4 - 0.35 * (1.0 / length) ** 2) * fade
        atomic = torch.zeros_like(batch["pos"][:, 0]).index_add(0, batch["edge_index"][1], pair)
        mask = batch.get("center_mask")
        atomic = atomic if mask is None else atomic[mask]
        return {"energy": atomic + 0.1 * super().forward(batch)["energy"]}


def turned(atoms, seed=0):
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0].numpy()
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ rotation.T)
    atoms.positions = atoms.positions @ rotation.T
    return atoms


def frequencies(atoms, folder):
    vibrations = Vibrations(atoms, name=str(folder), delta=1e-3)
    vibrations.run()
    return np.sort_complex(vibrations.get_frequencies())[::-1][:3]


def test_vibrations_do_not_depend_on_the_orientation(tmp_path):
    molecule = bound(distorted_water())
    assert BFGS(molecule, logfile=None).run(fmax=1e-5, steps=100)
    found, again, bare, bare_again = (
        frequencies(bound(atoms, method), tmp_path / name)
        for name, atoms, method in (
            ("a", molecule, ECSE()),
            ("b", turned(molecule), ECSE()),
            ("c", molecule, Identity()),
            ("d", turned(molecule), Identity()),
        )
    )
    top = abs(found).max()
    # Finite displacements along other directions: their anharmonic error is of the order of delta squared.
    assert top > 100.0 and abs(found - again).max() < 2e-4 * top
    assert abs(bare - bare_again).max() > 2e-3 * top


def test_relaxation_with_constraints():
    atoms = bound(distorted_water())
    atoms.set_constraint(FixAtoms([0]))
    start = atoms.positions[0].copy()
    assert BFGS(atoms, logfile=None).run(fmax=1e-5, steps=200)
    assert np.array_equal(atoms.positions[0], start) and np.abs(atoms.get_forces()).max() < 1e-5
    assert np.array_equal(atoms.get_forces(apply_constraint=False)[1:], atoms.get_forces()[1:])


def test_relaxation_of_positions_and_cell():
    atoms = bound(turned(bulk("C", "hcp", a=2.2, c=3.6)))
    atoms.positions[1] += 0.02
    before, stress = atoms.get_potential_energy(), np.abs(atoms.get_stress()).max()
    assert BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.05).run(fmax=1e-2, steps=60)
    assert atoms.get_potential_energy() < before
    assert np.abs(atoms.get_forces()).max() < 1e-2 and np.abs(atoms.get_stress()).max() < 1e-2 * stress


def test_phonons_of_ase(tmp_path):
    crystal = bound(turned(bulk("C", "fcc", a=2.9)))
    phonons = Phonons(crystal, crystal.calc, supercell=(2, 2, 2), delta=1e-3, name=str(tmp_path / "phonons"))
    phonons.run()
    phonons.read(acoustic=False)
    energies = np.real(phonons.band_structure([[0.5, 0.5, 0.5]])[0])
    assert abs(energies).max() > 1e-3
    # Two transverse branches at L, degenerate.
    gaps = np.diff(np.sort(energies))
    assert gaps.min() < 1e-5 * abs(energies).max() < gaps.max()


def test_langevin_dynamics_stay_finite_and_hot():
    atoms = bound(distorted_water())
    BFGS(atoms, logfile=None).run(fmax=0.5, steps=30)
    generator = np.random.default_rng(0)
    thermalize_momenta(atoms, temperature_K=300, rng=generator)
    dynamics = Langevin(atoms, 0.2 * units.fs, temperature_K=300, friction=0.05 / units.fs, rng=generator, fixcm=False)
    dynamics.run(20)
    assert np.isfinite(atoms.positions).all() and 10.0 < atoms.get_temperature() < 3000.0


# --- torch.compile --------------------------------------------------------------------------------------------------


def small_pet():
    widths = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8, "num_heads": 2, "num_attention_layers": 1}
    return Symmetrizer(PET(PETConfig((1, 6, 8), cutoff=3.5, **widths)).double(), ECSE()).eval()


@pytest.fixture(scope="module")
def compiled():
    """A PET whose transformer is compiled (tracing and derivatives; code is generated by what makes it fast only)."""
    model = small_pet()
    for block in model.backbone.network.gnn_layers:
        block.trans.compile(dynamic=True, backend=COMPILER)
    yield model
    torch.compiler.reset()


#: Generating code takes a C++ compiler and a minute; COMPILE_BACKEND=inductor asks for it.
COMPILER = os.environ.get("COMPILE_BACKEND", "aot_eager")
compiles = pytest.mark.skipif(
    COMPILER == "inductor" and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
quiet = pytest.mark.filterwarnings("ignore::Warning")  # torch.compile warns about itself


@compiles
@quiet
def test_a_compiled_network_gives_the_same_energies_forces_and_stress(compiled):
    plain = small_pet()
    for seed in range(3):
        molecule = ethanol()
        molecule.rattle(0.05, seed=seed)
        first, second = with_calculator(molecule, compiled), with_calculator(molecule, plain)
        scale = np.abs(second.get_forces()).max()
        assert scale > 1e-6 and np.abs(first.get_forces() - second.get_forces()).max() < 1e-12 * scale
        assert np.isclose(first.get_potential_energy(), second.get_potential_energy(), rtol=1e-13)
    graphite = Atoms("C2", positions=[[0, 0, 0], [1.4, 0.1, 0.0]], cell=np.diag([2.5, 2.6, 3.3]), pbc=True)
    first, second = with_calculator(graphite, compiled), with_calculator(graphite, plain)
    assert np.abs(first.get_stress() - second.get_stress()).max() < 1e-12 * np.abs(second.get_stress()).max()


@compiles
@quiet
def test_compiled_code_refuses_second_derivatives(compiled):
    batch = from_ase(ethanol())
    with pytest.raises(RuntimeError, match="create_graph"):
        compiled(batch, forces=True, create_graph=True)["forces"].square().sum().backward()
    assert compiled(batch, forces=True)["forces"].abs().max() > 0.0, "and inference goes on"


def test_a_compiled_symmetrizer_is_refused_with_a_hint():
    with pytest.raises(InvalidTypeError, match=r"model\.compile"):
        SymmetrizerCalculator(torch.compile(model_of()))
