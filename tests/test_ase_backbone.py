"""ASE calculators as black boxes: energies with their forces and stress as derivatives, direct outputs, bad input."""

from typing import Dict, List, Optional  # noqa: UP035 (TorchScript reads these)

import numpy as np
import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.ase import ASEBackbone, load

from symmetrize import ECSE, Symmetrizer
from symmetrize.data import from_ase, replace
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.metatomic import import_metatomic
from symmetrize.methods.group_averaging import GroupAveraging
from symmetrize.methods.identity import Identity
from symmetrize.ops.rotations import random_rotations
from symmetrize.ops.switches import smooth_cutoff
from symmetrize.registry import load_backbone
from symmetrize.testing import tolerance

EPS = torch.finfo(torch.float64).eps
FIELD = torch.tensor([0.9, -0.4, 1.3], dtype=torch.float64)


class Lab(Calculator):
    """Smooth pairs that prefer directions of the laboratory; forces and stress are exact derivatives."""

    implemented_properties = ["energy", "free_energy", "forces", "stress", "dipole", "charges"]  # noqa: RUF012

    def __init__(self, field: float = 1.0, wrong: float = 0.0, reach: float = 4.0) -> None:
        super().__init__()
        self.field, self.wrong, self.reach, self.asked = field, wrong, reach, []

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.asked.append(set(properties))
        i, j, shift = neighbor_list("ijS", self.atoms, self.reach)
        pos = torch.tensor(self.atoms.positions, requires_grad=True)
        cell = torch.tensor(np.array(self.atoms.cell))
        strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        deform = torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2
        edges = (pos[torch.tensor(j)] - pos[torch.tensor(i)] + torch.tensor(shift, dtype=torch.float64) @ cell) @ deform
        z = torch.tensor(self.atoms.numbers, dtype=torch.float64)
        charge = torch.tensor(self.atoms.get_initial_charges())
        scale = (0.2 + 0.1 * torch.cos(z[torch.tensor(i)] + 2.0 * z[torch.tensor(j)])) * (1.0 + charge[torch.tensor(i)])
        length = edges.norm(dim=1)
        pair = torch.exp(-length) + self.field * torch.sin(edges @ FIELD + 0.3) * torch.exp(-length / 2)
        energy = (scale * smooth_cutoff(length, self.reach, 2.0) * pair).sum()
        slopes, virial = torch.autograd.grad(energy, (pos, strain))
        self.results = {"energy": float(energy.detach()), "free_energy": float(energy.detach())}
        self.results["forces"] = -slopes.numpy() * (1.0 + self.wrong)
        self.results["dipole"] = (z[:, None] * (pos.detach() - pos.detach().mean(0)) * (1.0 + FIELD)).sum(0).numpy()
        self.results["charges"] = z.numpy() + self.atoms.positions[:, 0]
        if self.atoms.cell.rank == 3:
            stress = virial.numpy() / self.atoms.get_volume() * (1.0 + self.wrong)
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)


class Silent(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, results=None, error=None):
        super().__init__()
        self.given, self.error = results or {}, error

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.error is not None:
            raise self.error
        self.results = dict(self.given)


def rattled(atoms, seed=0, size=0.1):
    atoms = atoms.copy()
    atoms.positions += size * np.random.default_rng(seed).normal(size=(len(atoms), 3))
    return atoms


def molecules(seed=0):
    return [rattled(molecule(name), seed) for name in ("CH3CH2OH", "NH3", "H2O")]


def crystals(seed=0):
    skewed = bulk("Cu", "fcc", a=3.6) * (1, 1, 2)
    skewed.set_cell(skewed.cell.array @ (np.eye(3) + 0.05 * np.random.default_rng(seed).normal(size=(3, 3))), True)
    return [rattled(skewed, seed), rattled(bulk("NaCl", "rocksalt", a=4.0), seed)]


def turn(atoms, rotation):
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ rotation.numpy().T)
    atoms.positions = atoms.positions @ rotation.numpy().T
    return atoms


def forces_by_differences(model, batch, step=1e-4):
    """Central differences of fourth order for a few coordinates."""
    found = {}
    pos = batch.pos
    for atom, axis in [(0, 0), (1, 2), (len(pos) - 1, 1), (len(pos) // 2, 0)]:
        energies = []
        for k in (-2, -1, 1, 2):
            moved = pos.clone()
            moved[atom, axis] += k * step
            energies.append(float(model(replace(batch, pos=moved))["energy"].sum()))
        found[atom, axis] = -(energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
    return found


def stress_by_differences(model, batch, step=1e-4):
    """Two random strains, and the derivatives along them divided by the volumes: Tensor of shape (2, n_structures)."""
    strains = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    strains = strains + strains.transpose(1, 2)
    slopes = []
    for strain in strains:
        energies = []
        for k in (-2, -1, 1, 2):
            deform = torch.eye(3, dtype=torch.float64) + k * step * strain
            energies.append(model(replace(batch, pos=batch.pos @ deform, cell=batch.cell @ deform))["energy"])
        slopes.append((energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step))
    return strains, torch.stack(slopes) / torch.linalg.det(batch.cell).abs()


def error_of(stress, differences):
    strains, slopes = differences
    return float((torch.einsum("kab,nab->kn", strains, stress) - slopes).abs().max())


def worst(found, forces):
    return max(abs(float(forces[index]) - value) for index, value in found.items())


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("chunk_size", [None, 20])
def test_forces_are_the_gradient_of_the_averaged_energy(group, chunk_size):
    batch = from_ase(molecules())
    model = Symmetrizer(ASEBackbone(Lab()), ECSE(), group, chunk_size=chunk_size)
    out = model(batch, forces=True)
    found = forces_by_differences(model, batch)
    assert worst(found, out["forces"]) < 1e-9
    # Averaging the forces alone leaves out that frames and weights move with the atoms.
    direct = Symmetrizer(ASEBackbone(Lab(), properties=["energy", "forces"]), ECSE(), group)(batch)
    assert worst(found, direct["non_conservative_forces"]) > 1e-3
    # And a calculator whose forces are not the derivatives of its energy is noticed.
    wrong = Symmetrizer(ASEBackbone(Lab(wrong=1e-3)), ECSE(), group)(batch, forces=True)
    assert worst(found, wrong["forces"]) > 1e-5


@pytest.mark.parametrize("method", [GroupAveraging(1), Identity()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("chunk_size", [None, 10])
def test_stress_is_the_derivative_with_respect_to_strain(method, chunk_size):
    batch = from_ase(crystals())
    model = Symmetrizer(ASEBackbone(Lab()), method, chunk_size=chunk_size)
    out = model(batch, forces=True, stress=True)
    differences = stress_by_differences(model, batch)
    assert error_of(out["stress"], differences) < 1e-10
    assert torch.equal(model(batch, forces=True)["forces"], out["forces"])  # with less asked for
    wrong = Symmetrizer(ASEBackbone(Lab(wrong=1e-3)), method)(batch, stress=True)["stress"]
    assert error_of(wrong, differences) > 1e-6


def test_a_box_around_a_molecule_does_not_matter():
    atoms = molecules()[0]
    boxed = atoms.copy()
    boxed.set_cell([12.0, 13.0, 14.0])
    model = Symmetrizer(ASEBackbone(Lab()), ECSE())
    out, plain = model(from_ase(boxed), forces=True, stress=True), model(from_ase(atoms), forces=True)
    assert torch.equal(out["forces"], plain["forces"])
    assert error_of(out["stress"], stress_by_differences(model, from_ase(boxed))) < 1e-10


DEGENERATE = [molecule("CO2"), molecule("CH4"), molecule("C6H6"), molecule("BF3"), Atoms("H"), molecule("N2")]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), structure=st.sampled_from([*molecules(), *DEGENERATE]))
def test_symmetrised_results_turn_with_the_molecule(seed, structure):
    rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0] * (1 - 2 * (seed % 2))
    properties = ["energy", "forces", "dipole"]
    model = Symmetrizer(ASEBackbone(Lab(), properties=properties), ECSE())
    bare = ASEBackbone(Lab(), properties=properties)
    one, other = from_ase(structure), from_ase(turn(structure, rotation))
    out, turned = model(one, forces=True), model(other, forces=True)
    limit = tolerance(torch.float64)
    assert float((out["energy"] - turned["energy"]).abs()) < limit
    for name in ("forces", "non_conservative_forces", "dipole"):
        assert float((out[name] @ rotation.T - turned[name]).abs().max()) < 10 * limit * (
            1 + float(out[name].abs().max())
        )
    if len(structure) > 1:
        assert float((bare(one)["energy"] - bare(other)["energy"]).abs()) > 1e-6


@pytest.mark.parametrize("structures", [molecules(), DEGENERATE[:4]], ids=["rattled", "symmetric"])
def test_equivariant_calculator_is_left_as_it_is(structures):
    numbers = {1: 29, 5: 47, 6: 47, 7: 28, 8: 79, 9: 13}  # elements that EMT knows
    metals = []
    for atoms in structures:
        metal = atoms.copy()
        metal.numbers = [numbers[z] for z in metal.numbers]
        metal.positions *= 2.0
        metals.append(metal)
    batch = from_ase(metals)
    out = Symmetrizer(ASEBackbone(EMT()), ECSE())(batch, forces=True)
    for number, atoms in enumerate(metals):
        atoms.calc = EMT()
        assert abs(float(out["energy"][number]) - atoms.get_potential_energy()) < 1e-11
        rows = batch.batch == number
        assert np.abs(out["forces"][rows].numpy() - atoms.get_forces()).max() < 1e-10


def test_crystals_of_an_equivariant_calculator():
    metals = [
        rattled(bulk("Cu", cubic=True)),
        rattled(bulk("Al")),
        rattled(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=True)),
    ]
    slab = metals[2].copy()
    slab.pbc = [True, True, False]
    metals.append(slab)
    backbone = ASEBackbone(EMT(), properties=["energy", "forces", "stress"])
    out = Symmetrizer(backbone, GroupAveraging(1), chunk_size=30)(from_ase(metals), forces=True, stress=True)
    assert float(out["stress"].abs().max()) > 1e-3
    for number, atoms in enumerate(metals):
        atoms.calc = EMT()
        for name in ("stress", "non_conservative_stress"):
            stress = full_3x3_to_voigt_6_stress(out[name][number].numpy())
            assert np.abs(stress - atoms.get_stress()).max() < 1e-12
    torch.testing.assert_close(out["forces"], out["non_conservative_forces"], rtol=0, atol=1e-11)


def test_slab_without_a_third_lattice_vector():
    slab = rattled(fcc111("Cu", (2, 2, 2)))
    assert slab.cell.rank == 2 and slab.pbc.tolist() == [True, True, False]
    model = Symmetrizer(ASEBackbone(Lab()), GroupAveraging(1))
    batch = from_ase(slab)
    assert worst(forces_by_differences(model, batch), model(batch, forces=True)["forces"]) < 1e-8
    with pytest.raises(InvalidInputError, match="stress"):
        model(batch, stress=True)
    strained = replace(batch, cell=batch.cell.clone().requires_grad_())
    with pytest.raises(InvalidInputError, match="structure 0 is periodic along"):
        ASEBackbone(Lab())(strained)


def test_no_more_is_calculated_than_needed():
    calculator = Lab()
    molecular, periodic = from_ase(molecules()[:1]), from_ase(crystals()[:1])
    ecse, group = (Symmetrizer(ASEBackbone(calculator), m) for m in (ECSE(), GroupAveraging(1)))

    def asked(model, batch, **options):
        calculator.asked.clear()
        model(batch, **options)
        return set().union(*calculator.asked), len(calculator.asked)

    assert asked(ecse, molecular) == ({"energy"}, ecse.explain(molecular).n_evaluations)
    assert asked(ecse, molecular, forces=True)[0] == {"energy", "forces"}
    assert asked(ecse, molecular, forces=True)[1] == ecse.explain(molecular).n_evaluations
    assert asked(group, periodic, forces=True)[0] == {"energy", "forces"}
    assert asked(group, periodic, stress=True)[0] == {"energy", "forces", "stress"}


def test_gradient_without_asking_for_forces():
    batch = from_ase(molecules())
    for chunk_size in (None, 20):
        model = Symmetrizer(ASEBackbone(Lab()), ECSE(), chunk_size=chunk_size)
        pos = batch.pos.clone().requires_grad_()
        model(replace(batch, pos=pos))["energy"].sum().backward()
        torch.testing.assert_close(-pos.grad, model(batch, forces=True)["forces"], rtol=1e-12, atol=1e-13)


def test_second_derivatives_are_refused():
    pos = from_ase(molecules()).pos.requires_grad_()
    model = Symmetrizer(ASEBackbone(Lab()), ECSE())
    forces = model(replace(from_ase(molecules()), pos=pos), forces=True)["forces"]
    with pytest.raises(DeclarationError, match="first derivatives only"):
        forces.square().sum().backward()


def test_float32_positions_lose_no_more_than_their_rounding():
    model = Symmetrizer(ASEBackbone(Lab()), ECSE())
    exact, single = (model(from_ase(molecules(), dtype=d), forces=True) for d in (torch.float64, torch.float32))
    assert single["forces"].dtype == torch.float32
    error = (single["forces"].double() - exact["forces"]).abs().max()
    assert 0.0 < float(error) < 1e-4


def test_charges_reach_the_calculator():
    batch = from_ase(molecules())
    model = Symmetrizer(ASEBackbone(Lab()), ECSE())
    charged = replace(batch, initial_charges=0.1 * torch.arange(len(batch.pos), dtype=torch.float64))
    one, other = model(batch)["energy"], model(charged)["energy"]
    assert float((one - other).abs().min()) > 1e-3
    with pytest.raises(InvalidInputError, match="initial_charges: expected one number per atom"):
        model(replace(batch, initial_charges=torch.zeros(2, dtype=torch.float64)))


def test_centers_of_per_atom_outputs():
    batch = from_ase(molecules())
    mask = torch.arange(len(batch.pos)) % 2 == 0
    backbone = ASEBackbone(Lab(), properties=["charges"])
    everything = backbone(batch)["charges"]
    assert torch.equal(backbone(replace(batch, center_mask=mask))["charges"], everything[mask])


def test_one_calculator_for_many_structures_or_one_for_each():
    made = []

    def factory():
        made.append(Lab())
        return made[-1]

    batch = from_ase(molecules())
    one = Symmetrizer(ASEBackbone(Lab()), ECSE())(batch, forces=True)
    each = Symmetrizer(load(factory), ECSE())(batch, forces=True)
    assert torch.equal(one["forces"], each["forces"]) and torch.equal(one["energy"], each["energy"])
    assert max(len(calculator.asked) for calculator in made) == 1
    # Nothing is left over from what was evaluated before.
    again = ASEBackbone(made[0])
    first = again(batch)["energy"]
    again(from_ase(crystals()))
    assert torch.equal(again(batch)["energy"], first)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ASEBackbone(Lab(), properties="energy"), InvalidTypeError, "got the string 'energy'"),
        (lambda: ASEBackbone(Lab(), properties=["dipoles"]), DeclarationError, "did you mean 'dipole'"),
        (lambda: ASEBackbone(EMT(), properties=["dipole"]), DeclarationError, "EMT does not implement 'dipole'"),
        (lambda: ASEBackbone(Lab(), energy="free"), DeclarationError, "'energy' or 'free_energy', got 'free'"),
        (lambda: ASEBackbone("EMT"), InvalidTypeError, "expected an ASE calculator or a function"),
        (lambda: ASEBackbone(lambda: 3), InvalidTypeError, "function that makes a calculator, got"),
        (lambda: ASEBackbone(EMT(), properties=[]), DeclarationError, "at least one OutputSpec"),
        (lambda: ASEBackbone(Lab()).describe(), DeclarationError, "make the calculator yourself"),
        (lambda: Symmetrizer(ASEBackbone(Lab()), ECSE(), scope="atom"), DeclarationError, "per structure"),
    ],
)
def test_bad_declarations(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "calculator, forces, message",
    [
        (
            Silent(error=ValueError("no basis set")),
            False,
            r"structure 1 of the batch \(H3N\).*ValueError: no basis",
        ),
        (Silent({"forces": np.zeros((4, 3))}), False, "expected 'energy', got forces"),
        (Silent({"energy": np.nan}), False, "expected finite values, got nan for structure 0"),
        (Silent({"energy": 1.0, "forces": np.zeros((2, 3))}), True, r"forces: expected shape \(4, 3\), got \(2, 3\)"),
        (Silent({"energy": 1.0, "free_energy": 0.5, "forces": np.zeros((4, 3))}), True, "energy='free_energy'"),
    ],
)
def test_what_calculators_do_wrong(calculator, forces, message):
    structures = molecules()[1:2]
    if calculator.error is not None:
        calculator.error = None
        calculator.given = {"energy": 1.0}
        broken = calculator.calculate

        def calculate(atoms, *rest):
            calculator.error = ValueError("no basis") if len(atoms) == 4 else None
            broken(atoms, *rest)

        calculator.calculate = calculate
        structures = [molecule("H2O"), *structures]
    model = Symmetrizer(ASEBackbone(calculator), Identity())
    with pytest.raises(BackboneOutputError, match=message):
        model(from_ase(structures), forces=forces)


def test_structures_need_species_and_stress_periodicity():
    with pytest.raises(InvalidInputError, match="atomic numbers"):
        ASEBackbone(Lab())(replace(from_ase(molecules()), z=None))
    with pytest.raises(BackboneOutputError, match="a stress needs periodicity"):
        ASEBackbone(Lab(), properties=["stress"])(from_ase(molecules()))


def test_free_energy_is_what_forces_derive_from():
    smeared = Silent({"energy": 1.0, "free_energy": 0.5, "forces": np.zeros((4, 3))})
    smeared.implemented_properties = ["energy", "free_energy", "forces"]
    out = Symmetrizer(ASEBackbone(smeared, energy="free_energy"), Identity())(from_ase(molecules()[1:2]), forces=True)
    assert float(out["energy"]) == 0.5


def test_adapter_is_found_by_name():
    require_adapter("ase")
    backbone = load_backbone("ase", EMT(), properties=["energy", "forces"])
    assert backbone.adapter == "ase" and sorted(backbone.outputs) == ["energy", "non_conservative_forces"]


def test_xtb():
    tblite = pytest.importorskip("tblite.ase")

    def factory():
        return tblite.TBLite(method="GFN2-xTB", verbosity=0, accuracy=1e-3)

    water = [rattled(molecule("H2O")), molecule("CO2")]
    shared = ASEBackbone(factory(), properties=["energy", "forces", "dipole", "charges"])
    backbone = ASEBackbone(factory, properties=["energy", "forces", "dipole", "charges"])
    batch = from_ase(water)
    out, bare = Symmetrizer(backbone, ECSE())(batch, forces=True), backbone(batch)
    # Self-consistent to a threshold.
    for name in ("energy", "non_conservative_forces", "dipole", "charges"):
        torch.testing.assert_close(out[name].detach(), bare[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(shared(batch)[name], bare[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(out["forces"], bare["non_conservative_forces"], rtol=0, atol=1e-6)
    one = from_ase(water[0])
    ion = replace(one, initial_charges=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert float((backbone(ion)["energy"] - backbone(one)["energy"]).abs()) > 5.0


try:
    import_metatomic()
    from metatensor.torch import Labels, TensorBlock, TensorMap
    from metatomic.torch import (
        AtomisticModel,
        ModelCapabilities,
        ModelMetadata,
        ModelOutput,
        NeighborListOptions,
        System,
    )
    from metatomic_ase import MetatomicCalculator
except ImportError:
    HAS_METATOMIC = False
else:
    HAS_METATOMIC = True

    class Pairs(torch.nn.Module):
        """A pair energy that prefers pairs along z."""

        def __init__(self):
            super().__init__()
            self.options = NeighborListOptions(cutoff=4.0, full_list=True, strict=True)

        def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
            return [self.options]

        def forward(
            self,
            systems: List[System],  # noqa: UP006
            outputs: Dict[str, ModelOutput],  # noqa: UP006
            selected_atoms: Optional[Labels] = None,  # noqa: UP045
        ) -> Dict[str, TensorMap]:  # noqa: UP006
            energies: List[torch.Tensor] = []  # noqa: UP006
            for system in systems:
                vectors = system.get_neighbor_list(self.options).values[:, :, 0]
                x = torch.sum(vectors * vectors, dim=1) / 16.0
                energies.append(torch.sum((1 - x) ** 4 * (1.0 + vectors[:, 2] ** 2)).reshape(1))
            block = TensorBlock(
                values=torch.cat(energies).reshape(-1, 1),
                samples=Labels(["system"], torch.arange(len(systems)).reshape(-1, 1)),
                components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
                properties=Labels(["energy"], torch.tensor([[0]])),
            )
            return {"energy": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])}


@pytest.mark.skipif(not HAS_METATOMIC, reason="metatomic is not installed")
def test_metatomic_calculator(tmp_path):
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="system")},
        atomic_types=[1, 6, 7, 8, 11, 17, 29],
        interaction_range=4.0,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    AtomisticModel(Pairs().eval(), ModelMetadata(), capabilities).save(str(tmp_path / "model.pt"))
    backbone = ASEBackbone(MetatomicCalculator(str(tmp_path / "model.pt"), do_gradients_with_energy=False))
    model = Symmetrizer(backbone, ECSE())
    rotation = random_rotations(1, torch.Generator().manual_seed(0))[0]
    atoms = molecules()[0]
    one, other = from_ase(atoms), from_ase(turn(atoms, rotation))
    out, turned = model(one, forces=True), model(other, forces=True)
    assert float((out["energy"] - turned["energy"]).abs()) < 1e-12
    assert float((out["forces"] @ rotation.T - turned["forces"]).abs().max()) < 1e-11
    assert worst(forces_by_differences(model, one), out["forces"]) < 1e-8
    assert float((backbone(one)["energy"] - backbone(other)["energy"]).abs()) > 1e-3
    # Of degree 2 in the direction: averaged over orientations it is the same in all of them.
    model = Symmetrizer(backbone, GroupAveraging(3))
    crystal = crystals()[1]
    one, other = from_ase(crystal), from_ase(turn(crystal, rotation))
    out, turned = model(one, stress=True)["stress"], model(other, stress=True)["stress"]
    assert float((rotation @ out[0] @ rotation.T - turned[0]).abs().max()) < 1e-12
    assert error_of(out, stress_by_differences(model, one)) < 1e-9
