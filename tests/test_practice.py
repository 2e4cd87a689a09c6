"""What symmetry is for: relaxations, perfect crystals, phonons, molecules in free space, straight molecules.

Each statement holds for the symmetrised network and fails for the same network bare. The networks have random weights,
on top of pair forces that hold the structures together.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from symmetrize.backbones.pet import PET, PETConfig

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.calculators import SymmetrizerCalculator
from symmetrize.ops.rotations import random_rotations

METHODS = pytest.mark.parametrize(("method", "exact"), [(ECSE(), True), (Identity(), False)], ids=["ECSE", "bare"])
CUTOFF = 3.2


class Bound(PET):
    """A small PET with random weights, plus a pair potential with its minimum at 1.5 angstrom."""

    shares_work = False

    def __init__(self, seed=0):
        widths = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8, "num_heads": 2, "num_attention_layers": 1}
        super().__init__(PETConfig((1, 6, 8, 29), cutoff=CUTOFF, cutoff_width=0.8, **widths), seed=seed)
        self.double().eval().requires_grad_(False)

    def forward(self, batch):
        length = batch["edge_vec"].norm(dim=1)
        fade = (1.0 - (length / CUTOFF) ** 2).clamp(min=0.0) ** 3
        pair = 8.0 * (torch.exp(-4.0 * (length - 1.5)) - 2.0 * torch.exp(-2.0 * (length - 1.5))) * fade
        atomic = torch.zeros_like(batch["pos"][:, 0]).index_add(0, batch["edge_index"][1], pair)
        mask = batch.get("center_mask")
        atomic = atomic if mask is None else atomic[mask]
        return {"energy": atomic + super().forward(batch)["energy"]}


def turned(atoms, seed=0):
    """Cells that are aligned with the axes hide what a network gets wrong."""
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0].numpy()
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ rotation.T)
    atoms.positions = atoms.positions @ rotation.T
    return atoms


def with_calculator(atoms, method):
    atoms = atoms.copy()
    atoms.calc = SymmetrizerCalculator(Symmetrizer(Bound(), method))
    return atoms


def tetragonal():
    """A perovskite longer along z, with its central atom displaced along it: P4mm."""
    scaled = [(0, 0, 0), (0.5, 0.5, 0.55), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    return Atoms("CuCO3", scaled_positions=scaled, cell=[2.8, 2.8, 2.95], pbc=True)


CRYSTALS = {
    "fcc": (lambda: bulk("Cu", "fcc", a=2.45), 225),
    "diamond": (lambda: bulk("C", "diamond", a=3.5), 227),
    "perovskite": (tetragonal, 99),
}


def tetrahedron(bond=1.4):
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3.0**0.5
    return turned(Atoms("CH4", positions=[[0.0, 0.0, 0.0], *(bond * corners)]))


def is_kept(operations, atoms, tolerance=1e-5):
    """Whether the operations of a space group (fractional) are operations of a structure."""
    cell, scaled = atoms.cell.array, atoms.get_scaled_positions(wrap=False)
    scaled = scaled - scaled[0]
    for rotation, translation in zip(operations["rotations"], operations["translations"], strict=True):
        image = rotation.T @ cell
        if np.abs(image @ image.T - cell @ cell.T).max() > tolerance * np.linalg.norm(cell):
            return False
        apart = (scaled @ rotation.T + translation)[:, None] - scaled
        distance = np.linalg.norm((apart - np.round(apart)) @ cell, axis=-1)
        if distance.min(axis=1).max() > tolerance:
            return False
    return True


@METHODS
@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # spglib announces other error handling
def test_relaxing_a_crystal_keeps_its_space_group(name, method, exact):
    spglib = pytest.importorskip("spglib")
    make, number = CRYSTALS[name]
    start = turned(make())
    description = (start.cell.array, start.get_scaled_positions(), start.numbers)
    assert spglib.get_spacegroup(description, symprec=1e-5).endswith(f"({number})")
    operations = spglib.get_symmetry(description, symprec=1e-5)
    assert is_kept(operations, start)
    atoms = with_calculator(start, method)
    # Symmetry is kept at every step: how many there are does not matter.
    BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.05).run(fmax=1e-4, steps=8)
    assert abs(atoms.get_volume() / start.get_volume() - 1.0) > 1e-3, "it moved"
    assert is_kept(operations, atoms) == exact
    # The group found at this tolerance is the one of the start, or a larger one that contains it.
    order = len(operations["rotations"])
    found = spglib.get_symmetry((atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=1e-5)
    assert (len(found["rotations"]) >= order) == exact


@METHODS
def test_relaxing_methane_keeps_its_point_group(method, exact):
    atoms = with_calculator(tetrahedron(), method)
    BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=1e-5, steps=15)
    distances = atoms.get_all_distances()
    assert abs(distances[0, 1] - 1.4) > 1e-3, "it moved"
    order = sum(
        np.abs(distances[np.ix_([0, *p], [0, *p])] - distances).max() < 1e-5
        for p in itertools.permutations(range(1, 5))
    )
    assert (order == 24) == exact


@METHODS
@pytest.mark.parametrize("name", ["fcc", "diamond"])
def test_forces_and_anisotropic_stress_of_a_perfect_crystal_vanish(name, method, exact):
    atoms = with_calculator(turned(CRYSTALS[name][0]()), method)
    stress = atoms.get_stress(voigt=False)
    pressure = np.trace(stress) / 3.0
    assert (np.abs(stress - pressure * np.eye(3)).max() < 1e-12) == exact
    force = np.abs(atoms.get_forces()).max()
    if name == "fcc":  # one atom in the cell: translation alone forbids a force
        assert force < 1e-12
    else:
        assert (force < 1e-12) == exact


@METHODS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # phonopy
def test_degenerate_phonons_stay_degenerate(method, exact):
    """Diamond at the zone center: three optical branches of one frequency."""
    phonopy = pytest.importorskip("phonopy")
    from phonopy.structure.atoms import PhonopyAtoms

    diamond = turned(CRYSTALS["diamond"][0]())
    cell = PhonopyAtoms(symbols=diamond.get_chemical_symbols(), cell=diamond.cell.array, positions=diamond.positions)
    phonon = phonopy.Phonopy(cell, np.eye(3, dtype=int), primitive_matrix="P", is_symmetry=False)
    phonon.generate_displacements(distance=1e-3, is_plusminus=True)
    forces = []
    for image in phonon.supercells_with_displacements:
        atoms = with_calculator(Atoms(image.symbols, cell=image.cell, positions=image.positions, pbc=True), method)
        forces.append(atoms.get_forces())
    phonon.forces = forces
    phonon.produce_force_constants()
    phonon.run_qpoints([[0.0, 0.0, 0.0]])
    frequencies = np.array(phonon.get_qpoints_dict()["frequencies"][0])
    optical = frequencies[np.argsort(np.abs(frequencies))[3:]]
    assert np.abs(optical).min() > 1.0
    # What finite displacements leave is of the order of their square.
    assert (np.ptp(optical) < 1e-5 * np.abs(optical).max()) == exact
    assert exact or np.ptp(optical) > 1e-4 * np.abs(optical).max()


@METHODS
def test_a_molecule_in_free_space_keeps_its_angular_momentum(method, exact):
    atoms = with_calculator(tetrahedron(1.5), method)
    thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(0))
    start = atoms.get_angular_momentum()
    VelocityVerlet(atoms, timestep=0.3 * units.fs).run(30)
    change = np.linalg.norm(atoms.get_angular_momentum() - start) / np.linalg.norm(start)
    assert (change < 1e-12) == exact
    assert exact or change > 1e-5


def bent(name, angle):
    """CO2 or C2H2 (trans), bent by an angle in degrees."""
    along, across = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    if name == "CO2":
        return turned(Atoms("COO", positions=[[0, 0, 0], [-1.3, 0, 0], [1.3 * along, 1.3 * across, 0]]), seed=2)
    hydrogen = 1.2 * np.array([along, across, 0.0])
    carbon = np.array([0.65, 0.0, 0.0])
    return turned(Atoms("CCHH", positions=[carbon, -carbon, carbon + hydrogen, -carbon - hydrogen]), seed=2)


def energy_and_forces(atoms, method):
    atoms = with_calculator(atoms, method)
    return atoms.get_potential_energy(), atoms.get_forces()


@pytest.mark.parametrize("name", ["CO2", "C2H2"])
def test_energy_and_forces_pass_through_the_straight_molecule_without_a_jump(name):
    sizes = []
    for step in (1e-2, 1e-3, 1e-4):
        values = [energy_and_forces(bent(name, angle), ECSE()) for angle in (-step, 0.0, step)]
        forces = [value[1] for value in values]
        sizes.append(max(np.abs(b - a).max() for a, b in itertools.pairwise(forces)))
        # Bending either way is the same.
        assert abs(values[0][0] - values[2][0]) < 1e-12
    assert 5.0 < sizes[0] / sizes[1] < 20.0 and 5.0 < sizes[1] / sizes[2] < 20.0, "a jump would not shrink"


@METHODS
@pytest.mark.parametrize("name", ["CO2", "C2H2"])
def test_nothing_pushes_a_straight_molecule_aside(name, method, exact):
    atoms = bent(name, 0.0)
    axis = atoms.positions[1] - atoms.positions[0]
    axis /= np.linalg.norm(axis)
    _, forces = energy_and_forces(atoms, method)
    across = np.abs(forces - np.outer(forces @ axis, axis)).max()
    assert np.abs(forces).max() > 1e-2 and (across < 1e-12) == exact


@pytest.mark.parametrize("name", ["CO2", "C2H2"])
def test_relaxing_a_bent_molecule_is_a_descent(name):
    """A jump of the energy, or forces that are not its gradient, would make the line search or the energies stumble."""
    atoms = with_calculator(bent(name, 8.0), ECSE())
    energies = []
    optimizer = BFGS(atoms, logfile=None, maxstep=0.03)
    optimizer.attach(lambda: energies.append(atoms.get_potential_energy()))
    optimizer.run(fmax=1e-3, steps=25)
    assert energies[-1] < energies[0] - 1e-3
    assert max(b - a for a, b in itertools.pairwise(energies)) < 0.05 * (energies[0] - energies[-1])
