"""Models of other projects as subjects: ASE calculators, exported metatomic models, functions of tensors.

Sound ones pass every check that applies; one with a planted fault fails at the check that is about it.
"""

import sys
import warnings
from dataclasses import replace
from functools import cache
from typing import Dict, List, Optional  # noqa: UP035 (TorchScript reads these)

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.cluster import Octahedron
from e3nn import nn, o3

from symmetrize import OutputSpec, from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, MissingDependencyError
from symmetrize.metatomic import import_metatomic
from symmetrize.metatomic.tensor_maps import to_e3nn
from symmetrize.testing import displaced, measure_mutation, permute
from symmetrize.testing.running.outcome import Verdict
from symmetrize.testing.running.profile import PROFILES
from symmetrize.testing.running.runner import make_bench, run_task, tasks
from symmetrize.testing.structures.geometries import random_cluster
from symmetrize.testing.subjects.arguments import of_arguments
from symmetrize.testing.subjects.calculators import of_calculator
from symmetrize.testing.subjects.metatomic import of_metatomic

SYMMETRIES = ("rotation_equivariance", "inversion_equivariance")

#: Those that judge a model whatever it is.
CORE = (
    *SYMMETRIES,
    *("translation_invariance", "permutation_equivariance", "periodicity", "batch_independence", "determinism"),
    *("purity", "finite_outputs", "nontrivial_outputs", "forces_are_gradient", "stress_is_gradient"),
    *("hessian_symmetry", "exactness"),
)

SHORT = replace(PROFILES["quick"], name="short", n_structures=1, n_elements=2, n_permutations=1, n_directions=2)


def _verdicts(subject, structures=None, *, only=CORE, library=False):
    bench = make_bench(subject, structures, profile=SHORT, library=library)
    return {task.id: run_task(bench, task).verdict for task in tasks(bench, only)}


def _assert_passes(subject, structures=None, **options):
    verdicts = _verdicts(subject, structures, **options)
    bad = {name: v for name, v in verdicts.items() if v not in (Verdict.PASSED, Verdict.SKIPPED, Verdict.RECORDED)}
    assert not bad
    return {name.split("[")[0] for name, verdict in verdicts.items() if verdict is Verdict.PASSED}


def _assert_fails(check, subject, structures=None, **options):
    verdicts = _verdicts(subject, structures, only=[check], **options)
    assert Verdict.FAILED in verdicts.values(), verdicts


def _rattled(atoms, size, seed):
    atoms = atoms.copy()
    atoms.rattle(size, seed=seed)
    return atoms


@cache
def _built():
    slab = fcc111("Al", (2, 2, 2), vacuum=6.0)
    return [
        Octahedron("Cu", 3, 1),
        _rattled(Octahedron("Al", 2), 0.1, 1),
        _rattled(Octahedron("Au", 2), 0.05, 2),
        _rattled(slab, 0.05, 3),
        _rattled(bulk("Cu", cubic=True), 0.1, 4),
        bulk("Au"),
    ]


def _metals():
    return [atoms.copy() for atoms in _built()]


def _noble(periodic):
    if periodic:
        return [_rattled(bulk("Ar", "fcc", a=5.3, cubic=True), 0.1, 1), _rattled(bulk("Ar", "fcc", a=5.4), 0.1, 2)]
    out = []
    for n, seed in ((5, 1), (7, 2)):
        atoms = random_cluster(n, seed, symbols="HC")
        atoms.positions *= 3.4
        atoms.numbers = np.where(atoms.numbers == 1, 18, 36)
        out.append(atoms)
    return out


def _lennard_jones(smooth=True):
    return LennardJones(sigma=3.4, epsilon=0.01, rc=7.0, ro=5.9, smooth=smooth)


class _Emt(EMT):
    """EMT with a fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.n_calls, self.noise = fault, 0, np.random.default_rng(0)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        if self.fault == "centers":
            atoms.positions -= atoms.positions.mean(axis=0)
        super().calculate(atoms, properties, system_changes)
        self.n_calls += 1
        if self.fault == "noise":
            self.results["energy"] += 1e-6 * self.noise.standard_normal()
        if self.fault == "state":
            self.results["energy"] += 1e-6 * self.n_calls
        if self.fault == "field":
            self.results["energy"] += 0.01 * self.atoms.positions[:, 2].max()
        if self.fault == "voigt" and "stress" in self.results:
            self.results["stress"] = self.results["stress"][[0, 1, 2, 5, 4, 3]]


# --- calculators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [slice(0, 2), slice(3, 5)], ids=["clusters", "slab and crystal"])
def test_emt_passes(chosen):
    structures = _metals()[chosen]
    subject = of_calculator(EMT(), structures)
    passed = _assert_passes(subject, structures)
    assert {*SYMMETRIES, "forces_are_gradient", "purity", "determinism", "permutation_equivariance"} <= passed
    assert ("stress_is_gradient" in passed) == (chosen == slice(3, 5))


@pytest.mark.parametrize("periodic", [False, True])
def test_lennard_jones_passes(periodic):
    structures = _noble(periodic)
    passed = _assert_passes(of_calculator(_lennard_jones(), structures), structures)
    assert {*SYMMETRIES, "forces_are_gradient", "translation_invariance"} <= passed


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("centers", "purity"),
        ("noise", "determinism"),
        ("state", "determinism"),
        ("field", "rotation_equivariance"),
        ("field", "forces_are_gradient"),
        ("voigt", "stress_is_gradient"),
        ("voigt", "rotation_equivariance"),
    ],
)
def test_planted_faults_are_found(fault, check):
    structures = _metals()[:2] if fault != "voigt" else _metals()[4:]
    _assert_fails(check, of_calculator(_Emt(fault), structures), structures)
    _assert_passes(of_calculator(_Emt(""), structures), structures, only=[check])


def test_a_cache_cannot_hide_noise():
    """Asked twice, the calculator returns what it has kept; the model of the subject does not."""
    calc, atoms = _Emt("noise"), _metals()[0]
    assert calc.get_property("energy", atoms) == calc.get_property("energy", atoms)
    subject, batch = of_calculator(calc, atoms), from_ase(atoms)
    assert float(subject.model(batch)["energy"]) != float(subject.model(batch)["energy"])


def test_values_are_those_of_ase():
    structures = _metals()[4:]
    out = of_calculator(EMT(), structures).model(from_ase(structures))
    for s, atoms in enumerate(structures):
        atoms.calc = EMT()
        assert float(out["energy"][s]) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(out["stress"][s], atoms.get_stress(voigt=False), atol=1e-14)
    forces = np.concatenate([atoms.get_forces() for atoms in structures])
    np.testing.assert_allclose(out["forces"], forces, atol=1e-13)


def test_what_is_declared_comes_from_the_structures():
    clusters, crystals = of_calculator(EMT(), _metals()[:3]), of_calculator(EMT(), _metals()[4:])
    assert (clusters.finite, clusters.periodic, crystals.finite, crystals.periodic) == (True, False, False, True)
    assert not clusters.periodic_outputs and set(crystals.periodic_outputs) == {"stress"}
    assert clusters.species == (29, 13, 79)
    assert set(clusters.outputs) == {"energy", "forces", "energies"} and clusters.energy == "energy"
    # Without structures, what the class is known for.
    assert {6, 13, 79} <= set(of_calculator(EMT).species)


class _Promises(Calculator):
    """Lists more than it can do."""

    implemented_properties = ["energy", "dipole", "charges", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        center = atoms.positions - atoms.positions.mean(axis=0)
        self.results = {"energy": float((center**2).sum()), "dipole": atoms.numbers @ center}


def test_properties_that_are_not_there_are_dropped():
    atoms = [molecule("CH3CH2OH"), molecule("H2O")]
    subject = of_calculator(_Promises(), atoms)
    assert set(subject.outputs) == {"energy", "dipole"} and subject.energy is None
    assert {*SYMMETRIES} <= _assert_passes(subject, atoms)
    with pytest.raises(PropertyNotImplementedError):
        of_calculator(_Promises(), atoms, outputs=["charges"])
    wrong = of_calculator(_Promises(), atoms, outputs={"dipole": OutputSpec("1e", per="structure")})
    _assert_fails("inversion_equivariance", wrong, atoms)


def test_factories_and_instances_agree():
    structures = _metals()[:2]
    batch = from_ase(structures)
    made = [of_calculator(calc, structures).model(batch)["forces"] for calc in (EMT(), EMT, lambda: EMT())]
    assert all(torch.equal(made[0], other) for other in made)


def test_errors_of_calculators_are_their_own():
    with pytest.raises(NotImplementedError, match="No EMT-potential for Fe"):
        of_calculator(EMT(), bulk("Fe"))
    with pytest.raises(InvalidTypeError, match="expected an ASE calculator"):
        of_calculator(3)
    with pytest.raises(DeclarationError, match="did you mean 'forces'"):
        of_calculator(EMT(), _metals(), outputs=["force"])
    with pytest.raises(InvalidTypeError, match=r"structures\[0\]"):
        of_calculator(EMT(), ["Cu"])


def test_cutoffs_of_real_calculators_are_seen():
    """EMT is cut off where its switch is still 7e-6; a smooth Lennard-Jones is not, the shifted one in its forces."""

    def jump(calc, symbol, radius, output):
        def build(distance):
            return Atoms([symbol] * 2, [[0, 0, 0], [distance, 0, 0]])

        subject = of_calculator(calc, build(0.5 * radius))
        inside, outside, span = radius - 1e-12, radius + 1e-12, radius - 0.6
        values = subject.model(from_ase([build(d) for d in (inside, outside, span)]))[output].reshape(3, -1)
        return float((values[0] - values[1]).abs().max() / (values[2] - values[1]).abs().max())

    emt = EMT()
    emt.initialize(Octahedron("Cu", 2))
    assert jump(emt, "Cu", emt.rc_list, "energy") > 1e-5
    assert jump(_lennard_jones(True), "Ar", 7.0, "forces") < 1e-8
    assert jump(_lennard_jones(False), "Ar", 7.0, "energy") < 1e-8
    assert jump(_lennard_jones(False), "Ar", 7.0, "forces") > 1e-2


def test_tblite_passes():
    tblite = pytest.importorskip("tblite.ase", reason="tblite is not installed")
    structures = [molecule("H2O"), molecule("CH3OH")]
    calc = tblite.TBLite(method="GFN2-xTB", verbosity=0, accuracy=1e-3)
    # Self-consistent to a threshold.
    passed = _assert_passes(of_calculator(calc, structures, tolerance=1e-6), structures, only=[*SYMMETRIES, "purity"])
    assert {*SYMMETRIES} <= passed


# --- metatomic ----------------------------------------------------------------------------------------------------

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
except ImportError:
    HAS_METATOMIC = False
else:
    HAS_METATOMIC = True

needs_metatomic = pytest.mark.skipif(not HAS_METATOMIC, reason="metatomic is not installed")

if HAS_METATOMIC:

    class Pairs(torch.nn.Module):
        """A smooth pair energy, and one that prefers pairs along z."""

        def __init__(self, cutoff: float, field: float, full: bool, per_atom: bool):
            super().__init__()
            self.cutoff, self.field, self.per_atom = cutoff, field, per_atom
            self.options = NeighborListOptions(cutoff=cutoff, full_list=full, strict=True)
            self.share = 0.5 if full else 1.0

        def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
            return [self.options]

        def forward(
            self,
            systems: List[System],  # noqa: UP006
            outputs: Dict[str, ModelOutput],  # noqa: UP006
            selected_atoms: Optional[Labels] = None,  # noqa: UP045
        ) -> Dict[str, TensorMap]:  # noqa: UP006
            energies: List[torch.Tensor] = []  # noqa: UP006
            rows: List[torch.Tensor] = []  # noqa: UP006
            for number, system in enumerate(systems):
                pairs = system.get_neighbor_list(self.options)
                vectors = pairs.values[:, :, 0]
                # Without a unit, so that the unit of the model makes no difference.
                z = (vectors[:, 2] / self.cutoff) ** 2
                x = torch.sum(vectors * vectors, dim=1) / self.cutoff**2
                e = self.share * (1 - x) ** 4 * (1.0 + 0.3 * torch.sin(3 * torch.sqrt(x)) + self.field * z)
                first = pairs.samples.column("first_atom").to(torch.int64)
                atoms = torch.zeros(len(system), dtype=e.dtype).index_add(0, first, e)
                # In another order than that of the atoms.
                index = torch.arange(len(system)).flip(0)
                energies.append(atoms.flip(0) if self.per_atom else atoms.sum().reshape(1))
                if self.per_atom:
                    rows.append(torch.stack([torch.full_like(index, number), index], dim=1))
                else:
                    rows.append(torch.tensor([[number]]))
            names = ["system", "atom"] if self.per_atom else ["system"]
            block = TensorBlock(
                values=torch.cat(energies).reshape(-1, 1),
                samples=Labels(names, torch.cat(rows)),
                components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
                properties=Labels(["energy"], torch.tensor([[0]])),
            )
            return {"energy": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])}

    class Densities(torch.nn.Module):
        """Neighbor densities in every representation, all of which are sums of products of pair vectors."""

        def __init__(self, fault: str = ""):
            super().__init__()
            self.fault = fault
            self.options = NeighborListOptions(cutoff=4.0, full_list=True, strict=True)

        def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
            return [self.options]

        def forward(
            self,
            systems: List[System],  # noqa: UP006
            outputs: Dict[str, ModelOutput],  # noqa: UP006
            selected_atoms: Optional[Labels] = None,  # noqa: UP045
        ) -> Dict[str, TensorMap]:  # noqa: UP006
            samples, vectors, seconds, harmonics, spins = [], [], [], [], []
            for number, system in enumerate(systems):
                pairs = system.get_neighbor_list(self.options)
                d = pairs.values[:, :, 0]
                w = (1 - (d * d).sum(dim=1, keepdim=True) / 16.0) ** 3
                first = pairs.samples.column("first_atom").to(torch.int64)

                n = len(system)

                def gathered(values, n=n, first=first):
                    return values.new_zeros(n, *values.shape[1:]).index_add(0, first, values)

                samples += [(number, atom) for atom in range(len(system))]
                u, v = gathered(w * d), gathered(w**2 * d)
                vectors.append(torch.stack([u, v], dim=-1))
                spins.append(_yzx(torch.linalg.cross(u, v))[..., None])
                seconds.append(gathered(w[..., None] * d[:, :, None] * d[:, None, :])[..., None])
                harmonics.append([gathered(w * h)[..., None] for h in _harmonics(d)])
            if self.fault == "order":
                harmonics = [[h.flip(1) for h in each] for each in harmonics]

            def block(values, components, names=("system", "atom")):
                return TensorBlock(
                    values=values,
                    samples=Labels(list(names), torch.tensor(samples)[:, : len(names)]),
                    components=components,
                    properties=Labels(["n"], torch.arange(values.shape[-1])[:, None]),
                )

            def one(values, components):
                return TensorMap(Labels(["_"], torch.tensor([[0]])), [block(values, components)])

            def axis(name):
                return Labels([name], torch.arange(3)[:, None])

            def mu(l):
                return Labels(["o3_mu"], torch.arange(-l, l + 1)[:, None])

            sigma = -1 if self.fault == "parity" else 1
            degrees = [1, 2, 3]
            spherical = [block(torch.cat([h[k] for h in harmonics]), [mu(l)]) for k, l in enumerate(degrees)]
            tensors = torch.cat(seconds)
            return {
                "mtt::vectors": one(torch.cat(vectors), [axis("xyz")]),
                "mtt::tensor": one(tensors, [axis("xyz_1"), axis("xyz_2")]),
                "mtt::count": one(tensors.diagonal(dim1=1, dim2=2).sum(dim=-1), []),
                "mtt::spherical": TensorMap(
                    Labels(["o3_lambda", "o3_sigma"], torch.tensor([[l, sigma] for l in degrees])), spherical
                ),
                "mtt::spin": TensorMap(
                    Labels(["o3_lambda", "o3_sigma"], torch.tensor([[1, -1]])), [block(torch.cat(spins), [mu(1)])]
                ),
                "mtt::strange": one(torch.cat(vectors), [axis("color")]),
            }

    class Moving(torch.nn.Module):
        """Needs masses, velocities and a charge beside the positions."""

        def __init__(self, asked: str = ""):
            super().__init__()
            self.asked = asked

        def requested_inputs(self) -> Dict[str, ModelOutput]:  # noqa: UP006
            atom, system = ModelOutput(sample_kind="atom"), ModelOutput(sample_kind="system")
            inputs = {"mass": atom, "velocity": atom, "charge": system}
            return {**inputs, self.asked: atom} if self.asked else inputs

        def forward(
            self,
            systems: List[System],  # noqa: UP006
            outputs: Dict[str, ModelOutput],  # noqa: UP006
            selected_atoms: Optional[Labels] = None,  # noqa: UP045
        ) -> Dict[str, TensorMap]:  # noqa: UP006
            totals = []
            for system in systems:
                mass, velocity, charge = (
                    system.get_data(name).block().values[..., 0] for name in ("mass", "velocity", "charge")
                )
                center = system.positions - system.positions.mean(dim=0)
                totals.append((1.0 + charge[0]) * torch.linalg.cross(center, mass[:, None] * velocity).sum(dim=0))
            rows = TensorBlock(
                values=torch.stack(totals)[..., None],
                samples=Labels(["system"], torch.arange(len(systems))[:, None]),
                components=[Labels(["o3_mu"], torch.tensor([[-1], [0], [1]]))],
                properties=Labels(["l"], torch.tensor([[0]])),
            )
            rows.values[:] = _yzx(rows.values[..., 0])[..., None]
            keys = Labels(["o3_lambda", "o3_sigma"], torch.tensor([[1, -1]]))
            return {"mtt::angular_momentum": TensorMap(keys, [rows])}


def _yzx(v):
    return v.roll(-1, dims=-1)


def _harmonics(d):
    """Real solid harmonics of degree 1, 2, 3 as tabulated, m = -l ... l, up to a factor for each degree."""
    x, y, z = d.unbind(dim=1)
    r2 = (d * d).sum(dim=1)
    second = [x * y, y * z, (3 * z**2 - r2) / 12**0.5, x * z, (x**2 - y**2) / 2]
    third = [
        (35 / 2) ** 0.5 * y * (3 * x**2 - y**2),
        105**0.5 * 2 * x * y * z,
        (21 / 2) ** 0.5 * y * (5 * z**2 - r2),
        7**0.5 * z * (5 * z**2 - 3 * r2),
        (21 / 2) ** 0.5 * x * (5 * z**2 - r2),
        105**0.5 * z * (x**2 - y**2),
        (35 / 2) ** 0.5 * x * (x**2 - 3 * y**2),
    ]
    return [torch.stack(each, dim=1) for each in ([y, z, x], second, third)]


def _export(folder, *, field=0.0, full=True, per_atom=False, dtype="float64", unit="angstrom"):
    cutoff = 4.0 if unit == "angstrom" else 0.4
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="atom" if per_atom else "system")},
        atomic_types=[1, 6, 7, 8],
        interaction_range=cutoff,
        length_unit=unit,
        supported_devices=["cpu"],
        dtype=dtype,
    )
    path = folder / "model.pt"
    AtomisticModel(Pairs(cutoff, field, full, per_atom).eval(), ModelMetadata(), capabilities).save(str(path))
    return path


FEW = [
    *(f"{check}[{on}]" for check in SYMMETRIES for on in ("generic", "periodic")),
    *("permutation_equivariance[generic]", "periodicity[periodic]", "batch_independence", "determinism", "purity"),
    *("forces_are_gradient", "stress_is_gradient", "nontrivial_outputs", "arithmetic", "exactness"),
]


@needs_metatomic
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}], ids=["float64", "float32"])
def test_an_exported_model_passes(tmp_path, options):
    subject = of_metatomic(_export(tmp_path, **options))
    assert subject.energy == "energy" and set(subject.outputs) == {"energy", "forces"}
    assert subject.reach == pytest.approx(4.0) and subject.species == (1, 6, 7, 8)
    assert str(subject.dtype) == f"torch.{options.get('dtype', 'float64')}"
    passed = _assert_passes(subject, library=True, only=FEW)
    assert passed == {name.split("[")[0] for name in FEW}


@needs_metatomic
@pytest.mark.parametrize("options", [{"full": False}, {"per_atom": True}, {"unit": "nm"}])
def test_lists_and_units_make_no_difference(tmp_path, options):
    reference, other = (tmp_path / name for name in "ab")
    reference.mkdir(), other.mkdir()
    batch = from_ase([bulk("C", "diamond", a=3.57), _rattled(bulk("C", "fcc", a=2.5), 0.1, 1)])
    expected = of_metatomic(_export(reference)).model(batch)
    got = of_metatomic(_export(other, **options)).model(batch)
    assert set(got) - set(expected) == ({"atomic_energy"} if "per_atom" in options else set())
    for name in ("energy", "forces", "stress"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-12)


@needs_metatomic
def test_a_planted_field_is_found(tmp_path):
    subject = of_metatomic(_export(tmp_path, field=0.5, full=False))
    verdicts = _verdicts(subject, library=True, only=FEW)
    assert verdicts["rotation_equivariance[generic]"] is Verdict.FAILED
    assert verdicts["rotation_equivariance[periodic]"] is Verdict.FAILED
    # It is as conservative and as even as before.
    assert verdicts["forces_are_gradient"] is verdicts["stress_is_gradient"] is Verdict.PASSED


def _densities(fault=""):
    names = ("vectors", "tensor", "count", "spherical", "spin", "strange")
    capabilities = ModelCapabilities(
        outputs={f"mtt::{name}": ModelOutput(sample_kind="atom") for name in names},
        atomic_types=[1, 6, 7, 8],
        interaction_range=4.0,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    return AtomisticModel(Densities(fault).eval(), ModelMetadata(), capabilities)


def _molecule_and_crystal():
    return [molecule("CH3CH2OH"), _rattled(bulk("C", "diamond", a=3.57), 0.1, 1)]


@needs_metatomic
def test_representations_are_read_from_the_blocks():
    with pytest.warns(UserWarning, match="mtt::strange"):
        subject = of_metatomic(_densities())
    assert set(subject.model.left_out) == {"mtt::strange"}
    spherical = {f"mtt::spherical[o3_lambda={l},o3_sigma=1]": f"1x{l}{'eo'[l % 2]}" for l in (1, 2, 3)}
    expected = {"mtt::vectors": "2x1o", "mtt::count": "1x0e", "mtt::spin": "1x1e", **spherical}
    assert {name: spec.irreps for name, spec in subject.outputs.items() if spec.cartesian is None} == expected
    assert subject.outputs["mtt::tensor"].cartesian == "ij"
    assert {*SYMMETRIES, "periodicity", "batch_independence"} <= _assert_passes(subject, _molecule_and_crystal())


@needs_metatomic
@pytest.mark.parametrize(("fault", "check"), [("order", "rotation_equivariance"), ("parity", "inversion_equivariance")])
def test_wrong_blocks_are_found(fault, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = of_metatomic(_densities(fault))
    _assert_fails(check, subject, _molecule_and_crystal())


@needs_metatomic
def test_outputs_that_were_asked_for_are_there_or_an_error():
    assert list(of_metatomic(_densities(), outputs=["mtt::spin"]).outputs) == ["mtt::spin"]
    with pytest.raises(DeclarationError, match="components are"):
        of_metatomic(_densities(), outputs=["mtt::strange"])
    with pytest.raises(DeclarationError, match="did you mean 'mtt::spin'"):
        of_metatomic(_densities(), outputs=["mtt::spins"])
    with pytest.raises(InvalidTypeError, match="AtomisticModel"):
        of_metatomic(torch.nn.Linear(3, 3))


def _moving(asked=""):
    capabilities = ModelCapabilities(
        outputs={"mtt::angular_momentum": ModelOutput(sample_kind="system")},
        atomic_types=[1, 6, 8],
        interaction_range=0.0,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    return AtomisticModel(Moving(asked).eval(), ModelMetadata(), capabilities)


@needs_metatomic
def test_further_inputs_turn_with_the_structure():
    structures = [molecule("CH3CH2OH"), molecule("H2O")]
    subject = of_metatomic(_moving())
    assert dict(subject.vectors) == {"velocity": "1o"} and subject.reach is None
    assert subject.outputs["mtt::angular_momentum"] == OutputSpec("1e", per="structure")
    assert {*SYMMETRIES, "permutation_equivariance"} <= _assert_passes(subject, structures)
    _assert_fails("rotation_equivariance", replace(subject, vectors={"velocity": "3x0e"}), structures)
    with pytest.raises(DeclarationError, match="it needs 'ase::tags' per atom"):
        of_metatomic(_moving("ase::tags"))


def test_without_metatomic_there_is_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    select = torch.index_select
    with pytest.raises(MissingDependencyError, match="pip install metatomic-torch"):
        of_metatomic("model.pt")
    assert torch.index_select is select


@pytest.mark.parametrize("l", [1, 2, 3])
def test_spherical_components_are_mapped_to_e3nn(l):
    points = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = _harmonics(points)[l - 1] @ to_e3nn(l)
    expected = o3.spherical_harmonics(l, points, normalize=False)
    factor = (got * expected).sum() / (got * got).sum()
    assert float(factor) > 0.1
    torch.testing.assert_close(factor * got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(factor * _harmonics(points)[l - 1], expected)


# --- functions of tensors -----------------------------------------------------------------------------------------


def _randn(irreps, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, o3.Irreps(irreps).dim, dtype=torch.float64, generator=generator), irreps


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _double(build):
    """e3nn keeps its coupling coefficients in the precision in which a layer is built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def _linear():
    a, b = "8x0e+4x1o+2x2e", "3x0e+5x1o+1x2e"
    return _double(lambda: o3.Linear(a, b)), {"x": _randn(a, 7)}, b


def _product():
    a, b, c = "4x0e+3x1o", "1x0e+1x1o+1x2e", "2x0e+2x1o+1x1e+1x2e"
    return _double(lambda: o3.FullyConnectedTensorProduct(a, b, c)), {"x": _randn(a, 7), "y": _randn(b, 7, 1)}, c


def _sphere():
    return o3.SphericalHarmonics([0, 1, 2, 3], True), {"x": _randn("1o", 7)}, "0e+1o+2e+3o"


def _gate():
    gate = _double(lambda: nn.Gate("3x0e", [torch.tanh], "2x0e", [torch.sigmoid], "1x1o+1x2e"))
    return gate, {"features": _randn(str(gate.irreps_in), 7)}, str(gate.irreps_out)


@pytest.mark.parametrize("build", [_linear, _product, _sphere, _gate])
def test_layers_of_e3nn_pass(build):
    layer, inputs, irreps = build()
    passed = _assert_passes(*of_arguments(layer, inputs, irreps))
    assert {*SYMMETRIES, "permutation_equivariance", "nontrivial_outputs", "purity", "exactness"} <= passed


@pytest.mark.parametrize("build", [_linear, _product, _sphere, _gate])
@pytest.mark.parametrize("fault", ["parity", "components", "constant"])
def test_broken_layers_do_not(build, fault):
    layer, inputs, irreps = build()
    constant = torch.linspace(-1, 1, o3.Irreps(irreps).dim, dtype=torch.float64)

    def broken(*tensors):
        out = layer(*tensors)
        if fault == "components":
            return out.roll(1, dims=-1)
        return out + constant if fault == "constant" else out

    if fault == "parity":
        irreps = str(o3.Irreps([(n, (ir.l, -ir.p)) for n, ir in o3.Irreps(irreps)]))
    _assert_fails("inversion_equivariance" if fault == "parity" else "rotation_equivariance",
                  *of_arguments(broken, inputs, irreps))  # fmt: skip


def test_a_layer_built_in_single_precision_is_found():
    a, b = "2x0e+2x1o", "1x1o+1x2e"
    inputs = {"x": _randn(a, 7), "y": _randn(b, 7, 1)}
    single = o3.FullyConnectedTensorProduct(a, b, a).double()
    double = _double(lambda: o3.FullyConnectedTensorProduct(a, b, a))
    _assert_fails("exactness", *of_arguments(single, inputs, a))
    assert "exactness" in _assert_passes(*of_arguments(double, inputs, a))


class _Message(torch.nn.Module):
    """A convolution on a graph, with attributes of the edges and positions; ``fault`` says what is wrong."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault = fault
        irreps = "4x0e+2x1o"
        self.product = _double(lambda: o3.FullyConnectedTensorProduct(irreps, "1x0e+1x1o+1x2e", irreps))

    def forward(self, x, pos, edge_index, edge_attr, edge_axis, species):
        source, target = edge_index
        d = pos[source] - pos[target]
        sphere = o3.spherical_harmonics([0, 1, 2], d, normalize=False)
        weight = (edge_attr[:, 0] + (edge_axis * d).sum(dim=1) + species[source])[:, None]
        out = torch.zeros_like(x).index_add(0, target, weight * self.product(x[source], sphere))
        if self.fault == "translation":
            out = out * pos.norm(dim=1, keepdim=True)
        if self.fault == "order":
            out = out * torch.arange(1.0, 1.0 + len(x)).to(out)[:, None]
        if self.fault == "in place":
            x -= x.mean(dim=0)
        if self.fault == "edge":
            out = out * edge_axis[:, :1].mean()
        return {"node": out, "total": out.sum(dim=0)[:4], "edges": weight[:, 0]}


def _graph(n, seed):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    edges = edges[:, (edges[0] - edges[1]).abs().remainder(n - 1) == 1]
    return {
        "x": _randn("4x0e+2x1o", n, seed),
        "pos": _randn("1o", n, seed + 1),
        "edge_index": edges,
        "edge_attr": torch.rand(edges.shape[1], 1, dtype=torch.float64, generator=generator),
        "edge_axis": _randn("1o", edges.shape[1], seed + 2),
        "species": torch.arange(n) % 3,
    }


def test_a_graph_network_passes():
    outputs = {"node": "4x0e+2x1o", "total": "4x0e"}
    samples = [_graph(6, 0), _graph(8, 10)]
    subject, batch = of_arguments(_Message(), samples, outputs, positions="pos")
    assert subject.outputs["node"].per == "atom" and subject.outputs["total"].per == "structure"
    passed = _assert_passes(subject, batch)
    assert {*SYMMETRIES, "permutation_equivariance", "translation_invariance"} <= passed
    # What comes out is what the function returns.
    direct = _Message.forward(subject.module, **{k: v[0] if isinstance(v, tuple) else v for k, v in samples[1].items()})
    assert torch.equal(subject.model(batch)["node"][6:], direct["node"])


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("translation", "translation_invariance"),
        ("order", "permutation_equivariance"),
        ("in place", "purity"),
        ("edge", "rotation_equivariance"),
    ],
)
def test_a_faulty_graph_network_does_not(fault, check):
    _assert_fails(check, *of_arguments(_Message(fault), _graph(6, 0), {"node": "4x0e+2x1o"}, positions="pos"))


def test_a_row_per_edge_is_one_of_the_sample():
    subject, batch = of_arguments(_Message(), _graph(6, 0), {"edges": "0e"}, positions="pos")
    assert subject.outputs["edges"].per == "structure"
    assert {*SYMMETRIES, "permutation_equivariance"} <= _assert_passes(subject, batch)
    with pytest.raises(DeclarationError, match="in all samples"):
        of_arguments(_Message(), [_graph(6, 0), _graph(8, 0)], {"edges": "0e"}, positions="pos")


def test_edge_index_follows_the_rows():
    seen = []

    def f(x, edge_index):
        seen.append((x, edge_index))
        return x.sum(dim=-1)

    x, edges = torch.randn(5, 2, dtype=torch.float64), torch.tensor([[0, 1, 4], [1, 2, 0]])
    subject, batch = of_arguments(f, {"x": x, "edge_index": edges}, "0e")
    seen.clear()
    permuted, order = permute(batch, torch.Generator().manual_seed(1))
    subject.model(permuted)
    ((rows, relabelled),) = seen
    assert torch.equal(rows, x[order]) and not torch.equal(relabelled, edges)
    # The same points are connected as before.
    assert torch.equal(rows[relabelled], x[edges])


def test_other_integers_take_the_claim_back():
    triples = torch.tensor([[0, 1, 2]])
    subject, batch = of_arguments(lambda x, triples: x[triples].sum(), {"x": _randn("1o", 5), "triples": triples}, "0e")
    assert "permutation" not in subject.claims and "rotations" in subject.claims
    assert Verdict.SKIPPED in _verdicts(subject, batch, only=["permutation_equivariance"]).values()


def test_channels_before_the_components():
    weights = torch.randn(4, 3, dtype=torch.float64)
    x = (torch.randn(6, 3, 3, dtype=torch.float64), "1o")
    subject, batch = of_arguments(lambda x: torch.einsum("kc,nci->nki", weights, x), {"x": x}, "1o")
    assert subject.outputs["output"].irreps == str(o3.Irreps("1o+1o+1o+1o"))
    assert {*SYMMETRIES} <= _assert_passes(subject, batch)
    _assert_fails("rotation_equivariance", *of_arguments(lambda x: x.transpose(1, 2), {"x": x}, "1o"))


@pytest.mark.parametrize("as_tuple", [False, True])
def test_several_outputs_in_order_or_by_name(as_tuple):
    def f(a, b):
        dot, cross = (a * b).sum(dim=1), torch.linalg.cross(a, b)
        return (dot, cross) if as_tuple else {"dot": dot, "cross": cross}

    inputs = {"a": _randn("1o", 5), "b": _randn("1o", 5, 1)}
    declared = ["0e", OutputSpec("1e")] if as_tuple else {"cross": "1e", "dot": "0e"}
    _assert_passes(*of_arguments(f, inputs, declared))
    wrong = ["0e", "1o"] if as_tuple else {"cross": "1o", "dot": "0e"}
    _assert_fails("inversion_equivariance", *of_arguments(f, inputs, wrong))


def test_names_that_do_not_fit_go_by_order():
    def f(first, second):
        return first - 2 * second

    inputs = {"u": _randn("1o", 4), "v": _randn("1o", 4, 1)}
    subject, batch = of_arguments(f, inputs, "1o")
    assert torch.equal(subject.model(batch)["output"], f(inputs["u"][0], inputs["v"][0]))
    swapped, batch = of_arguments(f, {"second": inputs["v"], "first": inputs["u"]}, "1o")
    assert torch.equal(swapped.model(batch)["output"], f(inputs["u"][0], inputs["v"][0]))


def test_distances_only_pass_everything():
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    def f(positions):
        squares = (positions[:, None] - positions[None]).square().sum(dim=-1, keepdim=True)
        return network(squares).sum(dim=(1, 2))

    cloud = {"positions": _randn("1o", 6)}
    passed = _assert_passes(*of_arguments(f, [cloud, {"positions": _randn("1o", 4, 3)}], "0e", positions="positions"))
    assert {*SYMMETRIES, "translation_invariance", "permutation_equivariance", "purity"} <= passed
    _assert_fails(
        "rotation_equivariance",
        *of_arguments(lambda positions: f(positions) + positions[:, 0], cloud, "0e", positions="positions"),
    )


def test_inputs_are_deformed_and_seen_to_be_written_into():
    def f(x):
        x += 1.0
        return x

    subject, batch = of_arguments(f, {"x": torch.ones(4, 2, dtype=torch.float64)}, "2x0e")
    moved = displaced(batch, torch.Generator().manual_seed(0))
    assert not torch.allclose(moved["argument_x"], batch["argument_x"])
    assert list(measure_mutation(subject.model, batch)) == ["argument_x"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "error", "match"),
    [
        ({}, "0e", InvalidInputError, "at least one"),
        ({"x": 3}, "0e", InvalidTypeError, r"inputs\['x'\]"),
        ({"x": (torch.ones(4, 2), "1o")}, "0e", InvalidInputError, r"shape \(\.\.\., 3\)"),
        ({"x": (torch.ones(4, 3), "1o")}, "2e", DeclarationError, r"shape \(\.\.\., 5\)"),
        ({"x": (torch.ones(4, 3), "1o")}, {"a": "1o", "b": "1o"}, DeclarationError, "'a' is declared"),
        ({"x": (torch.ones(4, 3), "1p")}, "1o", DeclarationError, "explicit parity"),
        ([], "1o", InvalidInputError, "at least one sample"),
    ],
)
def test_unusable_declarations_are_refused(inputs, outputs, error, match):
    with pytest.raises(error, match=match):
        of_arguments(lambda x: x, inputs, outputs)


def test_positions_have_to_be_an_input():
    with pytest.raises(DeclarationError, match="did you mean 'pos'"):
        of_arguments(lambda pos: pos, {"pos": _randn("1o", 4)}, "1o", positions="poss")
