"""The ASE calculator: properties, conventions, dynamics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md.verlet import VelocityVerlet
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, SymmetrizeError
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
