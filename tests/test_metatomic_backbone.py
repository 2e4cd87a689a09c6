"""Exported metatomic models as backbones: against the same functions written as backbones of batches."""

# Without postponed annotations: metatomic compares those of ``forward`` with types.

import math
import pickle
import sys
import warnings
from dataclasses import replace as with_spec
from typing import Dict, List, Optional  # noqa: UP035

import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

import symmetrize
from symmetrize import ECSE, Backbone, GroupAveraging, Identity, OutputSpec, Symmetrizer, from_ase, keys
from symmetrize.data import validate, with_neighbors
from symmetrize.errors import (
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    MissingDependencyError,
    UnknownSpeciesError,
)
from symmetrize.metatomic import import_metatomic, import_metatrain
from symmetrize.metatomic.tensor_maps import to_e3nn
from symmetrize.ops.rotations import random_rotations

require_adapter("metatomic")
import_metatomic()

from metatensor.torch import Labels, TensorBlock, TensorMap  # noqa: E402
from metatomic.torch import (  # noqa: E402
    AtomisticModel,
    ModelCapabilities,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
)
from symmetrize.backbones.metatomic import MetatomicBackbone, load  # noqa: E402
from symmetrize.backbones.metatomic.edges import Edges, both_ways, one_way  # noqa: E402

CUTOFF = 4.0
INNER = 2.6
WAVES = torch.tensor([[0.9, -0.4, 0.7], [-0.3, 1.1, 0.5], [0.6, 0.8, -1.0]], dtype=torch.float64)


def _densities(d, z, first, n, cutoff: float):
    """Of each atom, three densities of its neighbors that depend on the orientation: (n, 3)."""
    x = (d * d).sum(dim=1, keepdim=True) / cutoff**2
    w = torch.clamp(1 - x, min=0.0) ** 4
    waves = torch.sin(d @ WAVES.to(d).T + 0.4 * z[:, None].to(d))
    return torch.zeros(n, 3, dtype=d.dtype).index_add(0, first, w * waves)


def _rows(values, components, samples, names=("system", "atom")):
    axes = [Labels([name], torch.arange(first, last)[:, None]) for name, first, last in components]
    properties = Labels(["n"], torch.arange(values.shape[-1])[:, None])
    return TensorBlock(values, Labels(list(names), samples), axes, properties)


def _one(block):
    return TensorMap(Labels(["_"], torch.tensor([[0]])), [block])


class Blind(torch.nn.Module):
    """Energies and tensors of the densities of neighbors, none of them equivariant.

    ``half``: the list has every pair once. ``inner``: a second list, of the other kind. ``positions``: vectors from
    positions, cell and shifts instead of the lists. ``hops``: densities of densities.
    """

    def __init__(self, *, half=False, inner=False, positions=False, hops=1, unit=1.0, composition=0.0, per_atom=True):
        super().__init__()
        self.half, self.positions, self.hops, self.unit = half, positions, hops, unit
        self.composition, self.per_atom = composition, per_atom
        self.lists = [NeighborListOptions(cutoff=CUTOFF / unit, full_list=not half, strict=True)]
        if inner:
            self.lists.append(NeighborListOptions(cutoff=INNER / unit, full_list=half, strict=True))
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen = []

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        return self.lists

    def pairs(self, system, options):
        block = system.get_neighbor_list(options)
        first, second = (block.samples.column(f"{k}_atom").to(torch.int64) for k in ("first", "second"))
        d = self.unit * block.values[:, :, 0]
        if self.positions:
            shift = block.samples.values[:, 2:].to(d)
            d = self.unit * (system.positions[second] - system.positions[first] + shift @ system.cell)
        if not options.full_list:
            first, second, d = torch.cat([first, second]), torch.cat([second, first]), torch.cat([d, -d])
        return first, second, d

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        self.seen.append((systems, selected_atoms))
        found, samples = [], []
        for number, system in enumerate(systems):
            n, z = len(system), system.types
            total = 0.0
            for options in self.lists:
                first, second, d = self.pairs(system, options)
                total = total + _densities(d, z[second], first, n, self.unit * options.cutoff)
            for _ in range(self.hops - 1):
                first, second, d = self.pairs(system, self.lists[0])
                x = (d * d).sum(dim=1, keepdim=True) / CUTOFF**2
                total = total.index_add(0, first, (1 - x) ** 4 * torch.tanh(total)[second])
            found.append(total)
            samples += [(number, atom) for atom in range(n)]
        u, samples = self.scale * torch.cat(found), torch.tensor(samples)
        energy = u[:, :1] * torch.tanh(u[:, 1:2]) + u[:, 2:] + self.composition
        second = u[:, :, None] * u.sin()[:, None]
        degree2 = torch.stack([u[:, 0], u[:, 1], u[:, 2], u[:, 0] * u[:, 1], u[:, 2] ** 2], dim=1)
        blocks = {
            "mtt::spherical": _rows(degree2[..., None], [("o3_mu", -2, 3)], samples),
            "energy": _rows(energy, [], samples),
            "energy/other": _rows(2 * energy, [], samples),
            "feature": _rows(u, [], samples),
            "non_conservative_force": _rows(torch.tanh(u)[..., None], [("xyz", 0, 3)], samples),
            "mtt::tensor": _rows(
                (u[:, :, None] * u.sin()[:, None])[..., None], [("xyz_1", 0, 3), ("xyz_2", 0, 3)], samples
            ),
            "mtt::strange": _rows(torch.tanh(u)[..., None], [("color", 0, 3)], samples),
        }
        if selected_atoms is not None:
            table = {tuple(row) for row in selected_atoms.values.tolist()}
            keep = torch.tensor([k for k, row in enumerate(samples.tolist()) if tuple(row) in table])
            blocks = {
                name: TensorBlock(b.values[keep], Labels(["system", "atom"], samples[keep]), b.components, b.properties)
                for name, b in blocks.items()
            }
        if not self.per_atom:
            total = torch.zeros(len(systems), 1, dtype=u.dtype).index_add(0, samples[:, 0], energy)
            blocks["energy"] = _rows(total, [], torch.arange(len(systems))[:, None], ("system",))
        maps = {name: _one(block) for name, block in blocks.items()}
        maps["mtt::spherical"] = TensorMap(
            Labels(["o3_lambda", "o3_sigma"], torch.tensor([[2, 1]])), [maps["mtt::spherical"].block().copy()]
        )
        return {name: maps[name] for name in outputs}


class Reference(Backbone):
    """The same as a backbone of batches."""

    def __init__(self, names, hops=1, inner=False):
        specs = {
            "energy": OutputSpec("0e", reduce="sum"),
            "non_conservative_force": OutputSpec("1o"),
            "mtt::tensor": OutputSpec(cartesian="ij"),
            "mtt::spherical": OutputSpec("2e"),
        }
        super().__init__(outputs={name: specs[name] for name in names}, cutoff=CUTOFF, receptive_field=hops)
        self.inner, self.hops = inner, hops

    def forward(self, batch):
        (second, first), d, z = batch[keys.EDGE_INDEX], batch[keys.EDGE_VEC], batch[keys.Z]
        n = len(z)
        u = _densities(d, z[second], first, n, CUTOFF)
        if self.inner:
            near = d.norm(dim=1) <= INNER
            u = u + _densities(d[near], z[second[near]], first[near], n, INNER)
        for _ in range(self.hops - 1):
            x = (d * d).sum(dim=1, keepdim=True) / CUTOFF**2
            u = u.index_add(0, first, (1 - x) ** 4 * torch.tanh(u)[second])
        mask = batch.get(keys.CENTER_MASK)
        u = u if mask is None else u[mask]
        degree2 = torch.stack([u[:, 0], u[:, 1], u[:, 2], u[:, 0] * u[:, 1], u[:, 2] ** 2], dim=1)
        out = {
            "energy": u[:, 0] * torch.tanh(u[:, 1]) + u[:, 2],
            "non_conservative_force": torch.tanh(u),
            "mtt::tensor": u[:, :, None] * u.sin()[:, None],
            "mtt::spherical": degree2 @ to_e3nn(2),
        }
        return {name: out[name] for name in self.outputs}


class Everything(torch.nn.Module):
    """An energy of all pairs, from positions alone, for whole structures only; ``double``: whatever is asked for."""

    def __init__(self, double: bool = False):
        super().__init__()
        self.double_only = double

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        energies = []
        for system in systems:
            d = system.positions[:, None] - system.positions[None]
            waves = torch.sin(d @ torch.tensor([0.9, -0.4, 0.7], dtype=d.dtype)) ** 2
            energies.append((waves * torch.exp(-(d * d).sum(dim=2) / 9.0)).sum())
        values = torch.stack(energies)[:, None]
        if self.double_only:
            values = values.to(torch.float64)
        block = TensorBlock(
            values=values,
            samples=Labels(["system"], torch.arange(len(systems)).reshape(-1, 1)),
            components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
            properties=Labels(["energy"], torch.tensor([[0]])),
        )
        return {"energy": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])}


ALL = ("energy", "non_conservative_force", "mtt::tensor", "mtt::spherical")
LOCAL = ALL[:3]


def _model(names=("energy",), *, reach=None, length="angstrom", energy="eV", dtype="float64", **options):
    unit = 10.0 if length == "nm" else 1.0
    module = Blind(unit=unit, **options).to(getattr(torch, dtype)).eval()
    outputs = {name: ModelOutput(sample_kind="atom") for name in names}
    outputs["energy"] = ModelOutput(unit=energy, sample_kind="atom" if module.per_atom else "system")
    capabilities = ModelCapabilities(
        outputs={name: outputs[name] for name in names},
        atomic_types=[1, 6, 7, 8, 14],
        interaction_range=(CUTOFF * options.get("hops", 1) if reach is None else reach) / unit,
        length_unit=length,
        supported_devices=["cpu"],
        dtype=dtype,
    )
    return AtomisticModel(module, ModelMetadata(), capabilities)


def _everything(double=False):
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV", sample_kind="system")},
        atomic_types=[1, 6, 8],
        interaction_range=math.inf,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    return AtomisticModel(Everything(double).eval(), ModelMetadata(), capabilities)


def _crystal(seed=0):
    atoms = bulk("Si", "diamond", 5.43)
    atoms.rattle(0.1, seed=seed)
    return atoms


def _structures():
    """A molecule, a linear one, a lone atom, a crystal whose atoms see their own images, a chain."""
    ethanol = molecule("CH3CH2OH")
    ethanol.rattle(0.05, seed=1)
    wire = Atoms("C", positions=[[0.0, 0.1, 0.2]], cell=[1.9, 0, 0], pbc=[True, False, False])
    return [ethanol, molecule("CO2"), Atoms("O"), _crystal(), wire]


def _same(got, expected, names=None):
    for name in names or expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def _turned(structures, element):
    out = [atoms.copy() for atoms in structures]
    for atoms in out:
        atoms.set_cell(atoms.cell.array @ element.numpy().T)
        atoms.positions = atoms.positions @ element.numpy().T
    return out


# --- the function itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"half": True},
        {"inner": True},
        {"inner": True, "half": True},
        {"positions": True},
        {"hops": 2},
        {"hops": 2, "positions": True, "half": True},
        {"length": "nm", "energy": "kJ/mol"},
    ],
    ids=str,
)
def test_a_file_is_the_backbone_that_it_describes(options, scope):
    """Energies, forces and stress of an average over frames, in both scopes, with lists of every kind."""
    names = ("energy",) if "energy" in options else LOCAL
    model = Symmetrizer(load(_model(names, **options), names), ECSE(), scope=scope)
    twin = Reference(names, hops=options.get("hops", 1), inner="inner" in options)
    expected = Symmetrizer(twin, ECSE(), scope=scope)
    structures = _structures() if scope == "atom" else _structures()[:3]
    got, wanted = (each(from_ase(structures), forces=True) for each in (model, expected))
    if options.get("energy") == "kJ/mol":
        wanted = {name: value / 96.48533212331 for name, value in wanted.items()}
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9)
    else:
        _same(got, wanted)
    crystal = from_ase([_crystal(2)])
    if scope == "structure":  # of a crystal, it has no frames of its own
        model, expected = (Symmetrizer(f.backbone, GroupAveraging(3), scope=scope) for f in (model, expected))
    got, wanted = (each(crystal, forces=True, stress=True) for each in (model, expected))
    if "energy" not in options:
        _same(got, wanted)


def test_spherical_targets_are_in_the_basis_of_e3nn():
    model = load(_model(ALL), ALL)
    assert model.outputs["mtt::spherical"] == OutputSpec("2e", per="atom")
    batch = from_ase(_structures()[:2])
    got = Symmetrizer(model, ECSE(), scope="structure")(batch)
    _same(got, Symmetrizer(Reference(ALL), ECSE(), scope="structure")(batch))


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_symmetrised_it_is_equivariant_and_bare_it_is_not(scope):
    model = Symmetrizer(load(_model(LOCAL), LOCAL), ECSE(), scope=scope)
    structures = _structures()[:2] if scope == "structure" else _structures()
    batch = from_ase(structures)
    before, bare = model(batch, forces=True), model.backbone(with_neighbors(validate(batch), CUTOFF))
    for element in random_rotations(2, torch.Generator().manual_seed(0)) * torch.tensor([1.0, -1.0])[:, None, None]:
        turned = from_ase(_turned(structures, element))
        after = model(turned, forces=True)
        back = {
            name: spec.rotate(before[name], element.expand(len(before[name]), 3, 3))
            for name, spec in (
                ("energy", OutputSpec("0e")),
                ("forces", OutputSpec("1o")),
                ("non_conservative_force", OutputSpec("1o")),
                ("mtt::tensor", OutputSpec(cartesian="ij")),
            )
        }
        _same(after, back)
        change = model.backbone(with_neighbors(validate(turned), CUTOFF))["energy"] - bare["energy"]
        assert float(change.abs().max()) > 1e-3


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_and_stress_are_the_gradient(scope):
    method = ECSE() if scope == "atom" else GroupAveraging(3)
    model = Symmetrizer(load(_model(positions=True)), method, scope=scope)
    atoms = _crystal(5)
    out = model(from_ase([atoms]), forces=True, stress=True)
    step, direction = 1e-5, torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    strain = 0.5 * (direction[:, :2].T @ direction[:, :2])
    strain = torch.block_diag(torch.from_numpy(strain), torch.tensor([[0.7]], dtype=torch.float64)).numpy()

    def energy(displacement, deformation):
        moved = atoms.copy()
        moved.positions += displacement * direction
        moved.set_cell(moved.cell.array @ (torch.eye(3).numpy() + deformation * strain), scale_atoms=True)
        return float(model(from_ase([moved]))["energy"])

    slope = (energy(step, 0) - energy(-step, 0)) / (2 * step)
    assert slope == pytest.approx(-float((out["forces"].numpy() * direction).sum()), rel=1e-6, abs=1e-8)
    slope = (energy(0, step) - energy(0, -step)) / (2 * step)
    assert slope == pytest.approx(float((out["stress"][0].numpy() * strain).sum()) * atoms.get_volume(), rel=1e-6)


def test_forces_are_differentiable_once_more():
    model = Symmetrizer(load(_model()), ECSE(), scope="structure")
    batch = from_ase(_structures()[:1])
    direction = torch.randn(batch[keys.POS].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def forces(displacement):
        moved = from_ase(_structures()[:1])
        moved[keys.POS] = batch[keys.POS] + displacement * direction
        return model(moved, forces=True)["forces"]

    batch[keys.POS].requires_grad_()
    out = model(batch, forces=True)["forces"]
    got = torch.autograd.grad(out, batch[keys.POS], direction)[0]
    expected = (forces(2e-5) - forces(-2e-5)) / 4e-5
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-7)


def test_a_model_of_everything_is_in_structure_scope():
    model = Symmetrizer(load(_everything()), ECSE())
    assert model.scope == "structure" and model.backbone.cutoff is None and model.backbone.receptive_field is None
    assert model.backbone.outputs["energy"].per == "structure"
    structures = _structures()[:2]
    out = model(from_ase(structures), forces=True)
    element = -random_rotations(1, torch.Generator().manual_seed(4))[0]
    turned = from_ase(_turned(structures, element))
    _same(model(turned, forces=True), {"energy": out["energy"], "forces": out["forces"] @ element.T})
    assert float((model.backbone(turned)["energy"] - model.backbone(from_ase(structures))["energy"]).abs().max()) > 1e-3
    with pytest.raises(DeclarationError, match="per structure"):
        Symmetrizer(load(_everything()), ECSE(), scope="atom")


# --- lists and calls ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 12), lost=st.floats(0, 1))
def test_lists_are_completed_and_halved(seed, n, lost):
    generator = torch.Generator().manual_seed(seed)
    forth = torch.cat(
        [torch.randint(0, 4, (n, 2), generator=generator), torch.randint(-2, 3, (n, 3), generator=generator)], 1
    )
    # No pair of an atom with itself.
    forth = torch.unique(forth[(forth[:, 0] != forth[:, 1]) | forth[:, 2:].any(dim=1)], dim=0)
    vector = {}
    for row in map(tuple, forth.tolist()):
        back = (row[1], row[0], *(-k for k in row[2:]))
        vector.setdefault(row, torch.randn(3, generator=generator))
        vector[back] = -vector[row]
    full = list(vector)
    keep = (torch.rand(len(full), generator=generator) >= lost).tolist()
    some = [row for row, stays in zip(full, keep, strict=True) if stays]

    def edges(rows):
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        vectors = torch.stack([vector[row] for row in rows]) if rows else torch.zeros(0, 3)
        return Edges(table[:, :2].T, table[:, 2:], vectors)

    def listed(e):
        rows = [tuple(row) for row in torch.cat([e.pairs.T, e.shift], dim=1).tolist()]
        assert len(set(rows)) == len(rows)
        assert all(torch.equal(v, vector[row]) for row, v in zip(rows, e.vectors, strict=True))
        return set(rows)

    backward = {(row[1], row[0], *(-k for k in row[2:])) for row in some}
    assert listed(both_ways(edges(some))) == set(some) | backward
    once = listed(one_way(edges(some)))
    flipped = {(row[1], row[0], *(-k for k in row[2:])) for row in once}
    assert not once & flipped and once | flipped == set(some) | backward


def test_copies_go_through_one_call_with_complete_lists():
    wrapped = load(_model())
    model = Symmetrizer(wrapped, ECSE())
    module = wrapped.model.module
    batch = from_ase([_structures()[0], _crystal()])
    frames = model.frames(batch)
    module.seen.clear()
    model(batch)
    assert len(module.seen) == 1
    systems, selected = module.seen[0]
    assert len(systems) == frames.n_evaluations and len(selected) == len(systems)
    lone = 0
    for system in systems:
        samples = system.get_neighbor_list(module.lists[0]).samples.values
        forth = {tuple(row) for row in samples.tolist()}
        assert forth == {(j, i, -a, -b, -c) for i, j, a, b, c in forth}
        lone += len(forth)
    assert lone
    # The same through as many calls as there are environments, as chunks that are too small for more make it.
    small = Symmetrizer(wrapped, ECSE(), chunk_size=1)
    _same(small(batch, forces=True), model(batch, forces=True))


def test_no_list_is_built_for_a_copy(monkeypatch):
    model = Symmetrizer(load(_model(positions=True)), ECSE(), scope="structure")
    batch = with_neighbors(validate(from_ase(_structures()[:2])), CUTOFF)
    calls = []
    import symmetrize.data as data

    build = data.neighbor_list
    monkeypatch.setattr(data, "neighbor_list", lambda *args: calls.append(1) or build(*args))
    model(batch)
    once = len(calls)
    Symmetrizer(model.backbone, ECSE(), scope="structure", chunk_size=1)(batch)
    assert len(calls) == 2 * once


# --- scope ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names", "scope", "hops"),
    [
        ({}, ("energy",), "atom", 1),
        ({"reach": CUTOFF * (1 + 1e-9)}, LOCAL, "atom", 1),
        ({"hops": 2}, ("energy",), "structure", 2),
        ({"reach": math.inf}, ("energy",), "structure", None),
        ({"per_atom": False}, ("energy",), "structure", 1),
        ({"length": "nm"}, ("energy",), "atom", 1),
    ],
    ids=str,
)
def test_the_declared_range_decides_on_the_scope(options, names, scope, hops):
    backbone = load(_model(names, **options), names)
    assert backbone.receptive_field == hops and backbone.cutoff == pytest.approx(CUTOFF)
    assert Symmetrizer(backbone, ECSE()).scope == scope


def test_a_range_that_is_not_kept_is_found():
    with pytest.warns(UserWarning, match=r"no more than 4 angstrom as declared.*2 hops"):
        backbone = load(_model(hops=2, reach=CUTOFF))
    assert backbone.receptive_field == 2
    batch = from_ase([_crystal()])
    whole = Symmetrizer(backbone, Identity(), scope="structure")(batch)
    _same(Symmetrizer(backbone, Identity(), scope="atom")(batch), whole)
    backbone.receptive_field = 1
    wrong = Symmetrizer(backbone, Identity(), scope="atom")(batch)
    assert float((wrong["energy"] - whole["energy"]).abs().max()) > 1e-4


# --- precision ------------------------------------------------------------------------------------------------------


def test_large_constants_cost_no_precision():
    """Energies of -1000 eV per atom in a file in float32: the average is as good as the numbers that come back."""
    composition = -1000.25  # a number in float32
    exact = Symmetrizer(load(_model(composition=composition)), ECSE())
    single = Symmetrizer(load(_model(composition=composition, dtype="float32")), ECSE())
    structures = [_crystal(seed) * (2, 2, 2) for seed in range(12)]
    reference = exact(from_ase(structures))["energy"]
    batch = from_ase(structures, dtype=torch.float32)
    got = single(batch)["energy"]
    assert got.dtype == torch.float64 and exact.backbone.constants["energy"][14] == pytest.approx(composition)
    # Each number that the model returns is rounded at 1000 eV; 16 atoms have some 60 of them.
    rounding = 1000 * torch.finfo(torch.float32).eps
    assert float((got - reference).abs().max()) < 16 * rounding
    single.backbone.constants = {}
    assert float((single(batch)["energy"] - reference).norm()) > 2 * float((got - reference).norm())


def test_baselines_are_of_the_composition_alone():
    for backbone in (
        load(_model(composition=-7.0)),
        load(_model(composition=-7.0, per_atom=False)),
        load(_everything()),
    ):
        batch = from_ase(_structures()[:2] + [Atoms("O")])
        batch = validate(batch) if backbone.cutoff is None else with_neighbors(validate(batch), CUTOFF)
        out, base, raw = backbone(batch), backbone.baseline(batch), backbone.raw(batch)
        _same({"energy": out["energy"] + base["energy"]}, raw)
        assert out["energy"][-1].abs() < 1e-12
        turned = from_ase(_turned(_structures()[:2] + [Atoms("O")], random_rotations(1)[0]))
        assert torch.equal(backbone.baseline(turned)["energy"], base["energy"])


def test_precision_is_that_of_the_file_unless_asked_for():
    model = _model(dtype="float32")
    assert load(model).dtype == torch.float32
    double = load(model, dtype=torch.float64)
    assert double.dtype == torch.float64 and load(model).to(torch.float64).dtype == torch.float64
    batch = from_ase([_crystal()])
    _same(double(with_neighbors(validate(batch), CUTOFF)), load(_model())(with_neighbors(validate(batch), CUTOFF)))
    with pytest.raises(InvalidTypeError, match=r"pos: expected .*float32"):
        load(model)(batch)
    with pytest.raises(InvalidTypeError, match="dtype"):
        load(model, dtype=torch.float16)
    with pytest.raises(DeclarationError, match=r"can be evaluated in the precision torch.float32, .* is torch.float64"):
        load(_everything(double=True), dtype=torch.float32)


def test_the_model_stays_in_evaluation():
    backbone = load(_model())
    assert Symmetrizer(backbone, ECSE()).train().backbone.model.training is False


# --- declarations and bad input -------------------------------------------------------------------------------------


def test_outputs_without_a_representation_are_named():
    names = ("energy", "mtt::strange")
    with pytest.warns(UserWarning, match=r"left out mtt::strange \(components are"):
        backbone = load(_model(names))
    assert set(backbone.outputs) == {"energy"} and "color" in backbone.left_out["mtt::strange"]
    assert "mtt::strange" in repr(backbone)
    with pytest.raises(DeclarationError, match=r"'mtt::strange'.*outputs={'mtt::strange': OutputSpec"):
        load(_model(names), ["mtt::strange"])


def test_features_and_variants_are_there_on_demand():
    model = _model(("energy", "energy/other", "feature"))
    with pytest.warns(UserWarning, match=r"left out .*energy/other \(a variant.*feature \(features"):
        backbone = load(model)
    assert set(backbone.outputs) == {"energy"} and set(backbone.left_out) == {"energy/other", "feature"}
    out = Symmetrizer(load(model, ["energy", "energy/other"]), ECSE())(from_ase(_structures()[:2]), forces=True)
    _same({"energy": out["energy/other"]}, {"energy": 2 * out["energy"]})
    assert load(model, ["feature"]).outputs["feature"] == OutputSpec("3x0e")


def test_a_representation_can_be_declared():
    names = ("energy", "mtt::strange", "non_conservative_force")
    spec = OutputSpec("1o", unit="D")
    backbone = load(_model(names), {"energy": None, "mtt::strange": spec, "non_conservative_force": OutputSpec("1o")})
    assert backbone.outputs["mtt::strange"] == spec
    out = Symmetrizer(backbone, ECSE())(from_ase(_structures()[:2]))
    _same({"x": out["mtt::strange"]}, {"x": out["non_conservative_force"]})
    with pytest.raises(DeclarationError, match=r"expected an OutputSpec per atom"):
        load(_model(names, per_atom=True), {"mtt::strange": with_spec(spec, per="structure")})
    with pytest.raises(DeclarationError, match=r"\(3,\) components of 1 properties"):
        load(_model(names), {"mtt::strange": OutputSpec("2e")})
    with pytest.raises(InvalidTypeError, match="OutputSpec or None"):
        load(_model(names), {"mtt::strange": "1o"})


def test_unknown_outputs_species_and_devices_are_refused():
    with pytest.raises(DeclarationError, match="did you mean 'energy'"):
        load(_model(), ["enrgy"])
    with pytest.raises(DeclarationError, match="at least one"):
        load(_model(), [])
    with pytest.raises(DeclarationError, match=r"device: expected one of \['cpu'\]"):
        load(_model(), device="cuda")
    model = Symmetrizer(load(_model()), ECSE())
    with pytest.raises(UnknownSpeciesError, match=r"of the model \(1, 6, 7, 8, 14\), got 79"):
        model(from_ase([Atoms("Au")]))
    with pytest.raises(DeclarationError, match="species in 'z'"):
        model(symmetrize.from_points(torch.randn(4, 3, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda path: path.write_bytes(bytes(range(256))), "another kind of file"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "another kind of file"),
        (lambda path: torch.save({"model": torch.zeros(1)}, path), "mtt export"),
        (
            lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
            "that metatomic did not write",
        ),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: None, "no such file"),
    ],
    ids=["bytes", "pickle", "checkpoint", "torchscript", "folder", "nothing"],
)
def test_other_files_are_refused(tmp_path, content, what):
    path = tmp_path / "model.pt"
    content(path)
    with pytest.raises(InvalidInputError, match=f"expected an exported metatomic model, got .*{what}"):
        load(path)


def test_a_pickle_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (sys.exit, (1,))

    path = tmp_path / "model.pt"
    torch.save(Trap(), path)
    with pytest.raises(InvalidInputError, match="not read here"):
        load(path)


def test_without_metatomic_there_is_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with pytest.raises(MissingDependencyError, match="pip install metatomic-torch"):
        load("model.pt")
    with pytest.raises(InvalidTypeError, match="path or an AtomisticModel"):
        monkeypatch.undo()
        load(torch.nn.Linear(2, 2))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.pt"
    _everything().save(str(path))
    return path


def test_a_file_is_found_again(file, tmp_path):
    from symmetrize.storage import load as load_saved
    from symmetrize.storage import save

    backbone = load(file, ["energy"])
    assert isinstance(backbone, MetatomicBackbone) and backbone.adapter == "metatomic"
    model, batch = Symmetrizer(backbone, ECSE()), from_ase(_structures()[:2])
    save(model, tmp_path / "saved")
    assert torch.equal(load_saved(tmp_path / "saved")(batch)["energy"], model(batch)["energy"])
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InvalidInputError, match="the file has changed"):
        load_saved(tmp_path / "saved")
    file.unlink()
    with pytest.raises(InvalidInputError, match="no such file"):
        load_saved(tmp_path / "saved")
    assert load(_model()).adapter is None


def test_a_pet_of_metatrain(tmp_path):
    """One and two blocks, untrained, through a file; metatrain says less than two blocks see, which is found."""
    pytest.importorskip("metatrain")
    pet, data, information, defaults = (
        import_metatrain(f"metatrain.{name}")
        for name in ("pet", "utils.data", "utils.data.target_info", "utils.architectures")
    )
    small = dict(cutoff=3.0, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=1, num_attention_layers=1)
    targets = {"energy": information.get_energy_target_info("energy", {"unit": "eV"})}
    batch, turned = (from_ase(_turned(_structures()[:1], e)) for e in (torch.eye(3).double(), -random_rotations(1)[0]))
    for blocks, kind, scope in ((1, "residual", "atom"), (2, "feedforward", "structure")):
        torch.manual_seed(0)
        hypers = defaults.get_default_hypers("pet")["model"] | small
        hypers |= {"num_gnn_layers": blocks, "featurizer_type": kind}
        exported = pet.__model__(hypers, data.DatasetInfo("angstrom", [1, 6, 8], targets)).eval().export()
        path = tmp_path / f"{blocks}.pt"
        exported.save(str(path))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backbone = load(path, ["energy"], dtype=torch.float64)
        assert bool([w for w in caught if "as declared" in str(w.message)]) == (blocks == 2)
        model = Symmetrizer(backbone, ECSE())
        assert model.scope == scope
        size = float(backbone(batch)["energy"].abs().max())
        before, after = (model(each)["energy"] for each in (batch, turned))
        assert float((before - after).abs().max()) < 1e-12 * max(size, 1.0)
        bare = [backbone(each)["energy"].sum() for each in (batch, turned)]
        assert float((bare[0] - bare[1]).abs()) > 1e-5 * size
        whole = Symmetrizer(backbone, Identity(), scope="structure")(batch)
        _same(Symmetrizer(backbone, Identity(), scope="atom")(batch), whole)
