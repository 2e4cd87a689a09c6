"""Learned canonicalization: exact off degeneracies, smooth through mirrors, trained with the backbone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import Identity, OutputSpec, Symmetrizer, from_ase, from_points, keys
from symmetrize.data import validate, with_neighbors
from symmetrize.errors import (
    BackboneOutputError,
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    NoFrameError,
    UnknownSpeciesError,
)
from symmetrize.frames import FrameMethod
from symmetrize.methods import make_method
from symmetrize.methods.canonicalization_networks import SphericalTensors, VectorNeurons
from symmetrize.methods.clouds import clouds
from symmetrize.methods.learned_canonicalization import NETWORKS, LearnedCanonicalization, orthonormalized
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import random_rotations
from symmetrize.storage import load, save
from symmetrize.testing import measure_equivariance, permute, random_elements

KINDS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "even": OutputSpec("0e + 1e + 2e + 3e"),
    "odd": OutputSpec("0o + 1o + 2o + 3o"),
    "tensor": OutputSpec(cartesian="ijk"),
}
PER_STRUCTURE = {
    "energy": OutputSpec("0e", per="structure"),
    "all": OutputSpec("0o + 1o + 1e + 2e + 3o", per="structure"),
}
SMALL = {"channels": 6, "layers": 2}
CASES = [
    (network, scope, group) for network in NETWORKS for scope in ("atom", "structure") for group in ("O(3)", "SO(3)")
]


def cluster(n_atoms, seed, spread=1.3):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 9, (n_atoms,), generator=generator)
    positions = spread * torch.randn(n_atoms, 3, generator=generator, dtype=torch.float64)
    return Atoms(numbers.numpy(), positions.numpy())


def local(seed=0, **options):
    return ToyLocal(options.pop("outputs", KINDS), cutoff=4.0, seed=seed, width=8, **options).to(torch.float64)


def whole(seed=0, outputs=None):
    return ToyGlobal(PER_STRUCTURE if outputs is None else outputs, seed=seed, width=8).to(torch.float64)


def model_of(network="vector-neuron", scope="structure", group="O(3)", backbone=None, **options):
    if backbone is None:
        backbone = local() if scope == "atom" else whole()
    options = {**SMALL, **options} if isinstance(network, str) else options
    return Symmetrizer(backbone, LearnedCanonicalization(network, **options), group=group, scope=scope).eval()


def worst(model, batch, group="O(3)", seed=0, elements=None):
    """Largest deviation from equivariance over all outputs, on their own scale."""
    if elements is None:
        elements = random_elements(2, torch.Generator().manual_seed(seed), group=group)
    with torch.no_grad():
        return measure_equivariance(model, batch, model.backbone.outputs, elements).relative


def gap(first, second):
    return float((first - second).detach().abs().max())


def conditioning(model, batch):
    """How far the frames of a batch are from having no direction: 0 where vectors vanish or are collinear, up to 1."""
    with torch.no_grad():
        graph = with_neighbors(validate(batch), 4.0)
        found = model.method._vectors(graph, clouds(graph, model.scope, "test"))
    size = found.flatten(1).norm(dim=1).clamp(min=1e-300)
    return float((torch.linalg.cross(found[:, 0], found[:, 1]).norm(dim=1) / size**2).min())


@pytest.mark.parametrize(("network", "scope", "group"), CASES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), n_atoms=st.integers(4, 9))
def test_exact_for_every_output_on_generic_clouds(network, scope, group, seed, n_atoms):
    batch = from_ase([cluster(n_atoms, seed), cluster(4, seed + 1)], cutoff=4.0)
    model = model_of(network, scope, group, seed=seed)
    assume(conditioning(model, batch) > 1e-3)
    assert worst(model, batch, group, seed) < 1e-10
    bare = Symmetrizer(model.backbone, Identity(), group=group, scope=scope).eval()
    assert worst(bare, batch, group, seed) > 1e-3


class LabVector(VectorNeurons):
    """Planted fault: a direction of the lab."""

    def forward(self, vectors, weights, species, owner, n_owners):
        found = super().forward(vectors, weights, species, owner, n_owners)
        return found + 0.01 * found.new_tensor([1.0, 0.0, 0.0])


class Pseudovectors(VectorNeurons):
    """Planted fault: vectors that do not change under inversion, right for SO(3) only."""

    def forward(self, vectors, weights, species, owner, n_owners):
        found = super().forward(vectors, weights, species, owner, n_owners)
        return torch.linalg.cross(found, found.roll(1, dims=1)) * 100.0


def test_faults_of_a_network_are_seen():
    batch = from_ase([cluster(6, 1), cluster(7, 2)])
    sizes = (6, 2, 2.0, torch.Generator().manual_seed(0))
    assert worst(model_of(VectorNeurons(*sizes)), batch) < 1e-10
    assert worst(model_of(LabVector(*sizes)), batch) > 1e-3
    assert worst(model_of(Pseudovectors(*sizes), group="SO(3)"), batch, "SO(3)") < 1e-10
    assert worst(model_of(Pseudovectors(*sizes)), batch) > 1e-3


class Moments(torch.nn.Module):
    """A network of somebody else's: moments of the cloud, with a parameter."""

    def __init__(self):
        super().__init__()
        self.power = torch.nn.Parameter(torch.tensor([0.5, 1.0, 1.7]))

    def forward(self, vectors, weights, species, owner, n_owners):
        square = (vectors * vectors).sum(dim=1, keepdim=True)
        gains = (1.0 + square) ** self.power * weights[:, None]
        rows = gains[:, :, None] * vectors[:, None, :]
        return rows.new_zeros(n_owners, 3, 3).index_add(0, owner, rows)


def test_a_network_of_your_own():
    batch = from_ase([cluster(6, 3), cluster(5, 4)])
    model = model_of(Moments()).train()
    assert worst(model, batch) < 1e-10
    out = model(batch, forces=True)
    out["forces"].square().sum().backward()
    assert bool((model.method.network.power.grad != 0.0).all())


@pytest.mark.parametrize("answer", ["not vectors", torch.zeros(1, 2, 3), torch.full((1, 3, 3), float("nan"))])
def test_a_network_that_answers_something_else(answer):
    class Odd(torch.nn.Module):
        def forward(self, *given):
            return answer

    with pytest.raises(BackboneOutputError, match="network: expected"):
        model_of(Odd())(from_ase([cluster(5, 0)]))


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_frames_do_not_see_order_place_or_company(network, seed):
    batch = from_ase([cluster(6, seed), cluster(4, seed + 1)])
    model = model_of(network, group="SO(3)")
    assume(conditioning(model, batch) > 1e-3)
    found = model.frames(batch).rotations
    permuted, _ = permute(batch, torch.Generator().manual_seed(seed))
    assert gap(model.frames(permuted).rotations, found) < 1e-13
    alone = model.frames(from_ase([cluster(4, seed + 1)])).rotations
    assert gap(alone[0], found[1]) < 1e-11
    moved = batch.clone()
    moved[keys.POS] = batch[keys.POS] + torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert gap(model.frames(moved).rotations, found) < 1e-10
    # Not by being constant: species, and a displacement of one atom, are seen.
    other = batch.clone()
    other[keys.Z] = batch[keys.Z].flip(0) + 3
    assert gap(model.frames(other).rotations, found) > 1e-4
    displaced = batch.clone()
    displaced[keys.POS] = batch[keys.POS].clone()
    displaced[keys.POS][0] += 0.2
    assert gap(model.frames(displaced).rotations, found) > 1e-4


@pytest.mark.parametrize(("network", "scope"), [(n, s) for n in NETWORKS for s in ("atom", "structure")])
def test_forces_are_the_gradient(network, scope):
    backbone = local(outputs={"energy": KINDS["energy"]}) if scope == "atom" else None
    model = model_of(network, scope, backbone=backbone, mirror_width=0.6)
    batch = from_ase([cluster(6, 5, 0.9), cluster(5, 7, 0.9)], cutoff=4.0)
    weights = model.frames(batch).normalized_weights
    assert bool(((weights > 1e-3) & (weights < 0.999)).any())  # some through weights that change
    direction = torch.randn(11, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def energy(step):
        moved = from_ase([cluster(6, 5, 0.9), cluster(5, 7, 0.9)])
        moved[keys.POS] = moved[keys.POS] + step * direction
        with torch.no_grad():
            return float(model(moved)["energy"].sum())

    expected = -sum(w * (energy(k * 1e-3) - energy(-k * 1e-3)) for k, w in STENCIL) / 1e-3
    got = model(batch, forces=True)["forces"]
    assert abs(float((got * direction).sum()) - expected) < 1e-5 * float(got.norm())
    # The frames matter: the gradient at fixed frames is another one.
    frozen = Symmetrizer(model.backbone, Frozen(model.method), scope=scope)
    fixed = frozen(batch, forces=True)["forces"]
    assert float((fixed - got).norm()) > 1e-2 * float(got.norm())


#: First derivative to sixth order.
STENCIL = ((1, 3.0 / 4.0), (2, -3.0 / 20.0), (3, 1.0 / 60.0))


class Frozen(FrameMethod):
    """Planted fault: frames without derivatives."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def frames(self, batch, **options):
        found = self.method.frames(batch, **options)
        return dataclasses.replace(found, rotations=found.rotations.detach(), weights=found.weights.detach())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_gradients_reach_the_network_through_outputs_and_forces(network, group):
    model = model_of(network, group=group, mirror_width=0.6).train()
    batch = from_ase([cluster(6, 5), cluster(5, 7)])
    parameters = dict(model.method.network.named_parameters())

    def loss(forces):
        out = model(batch, forces=forces)
        return out["forces"].square().sum() if forces else out["all"].square().sum()

    for forces in (False, True):
        gradients = torch.autograd.grad(loss(forces), list(parameters.values()))
        direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in parameters.values()]
        expected = 0.0
        with torch.no_grad():
            for step, weight in STENCIL:
                for sign in (1.0, -1.0):
                    shift(parameters, direction, sign * step * 1e-3)
                    expected += sign * weight * float(loss(forces).detach()) / 1e-3
                    shift(parameters, direction, -sign * step * 1e-3)
        got = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert abs(got) > 1e-6
        assert abs(got - expected) < 2e-3 * abs(got), (forces, got, expected)


def shift(parameters, direction, by):
    for parameter, change in zip(parameters.values(), direction, strict=True):
        parameter.add_(by * change)


def test_backbone_and_network_are_trained_together():
    torch.manual_seed(0)
    structures = [cluster(5, seed, 1.0) for seed in range(4)]
    batch = from_ase(structures)
    # Nothing of what the backbone is, but equivariant.
    target = -segment_sum(batch.pos.square().sum(dim=1), batch.batch, 4) / 10.0
    model = model_of(backbone=whole(3, {"energy": PER_STRUCTURE["energy"]})).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        out = model(batch, forces=True)
        loss = (out["energy"] - target).square().mean() + 0.01 * (out["forces"] - batch.pos / 5.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value.detach(), before[name])}
    assert any(name.startswith("method.network") for name in moved)
    assert any(name.startswith("backbone") for name in moved)
    assert worst(model.eval(), batch) < 1e-10


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_model_is_the_same_one(network, dtype, tmp_path):
    model = model_of(network, degree=3, mirror_width=0.2, seed=4)
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.mul_(1.1)
    model = model.to(dtype)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    batch = from_ase([cluster(6, 1)], dtype=dtype)
    assert torch.equal(model(batch)["all"], again(batch)["all"])
    assert repr(again.method) == repr(model.method)
    untrained = model_of(network, degree=3, mirror_width=0.2, seed=4).to(dtype)
    assert not torch.equal(model(batch)["all"], untrained(batch)["all"])


def test_a_saved_model_with_a_network_of_your_own(tmp_path):
    model = model_of(Moments())
    with torch.no_grad():
        model.method.network.power.mul_(1.2)
    save(model, tmp_path / "model")
    with pytest.raises(DeclarationError, match="one of yours"):
        load(tmp_path / "model")
    again = load(tmp_path / "model", method=LearnedCanonicalization(Moments()))
    batch = from_ase([cluster(6, 1)])
    assert torch.equal(model(batch)["all"], again(batch)["all"])


@pytest.mark.parametrize("network", [*NETWORKS, "yours"])
def test_frames_are_float64_in_any_precision(network):
    single = model_of(Moments() if network == "yours" else network).to(torch.float32)
    double = copy.deepcopy(single).to(torch.float64)
    batch = from_ase([cluster(6, 1), cluster(7, 2)], dtype=torch.float32)
    found = single.frames(batch)
    assert found.rotations.dtype == found.weights.dtype == torch.float64
    assert {p.dtype for p in single.method.parameters()} == {torch.float32}
    wide = batch.clone()
    wide[keys.POS], wide[keys.CELL] = batch[keys.POS].to(torch.float64), batch[keys.CELL].to(torch.float64)
    assert gap(double.frames(wide).rotations, found.rotations) < 1e-12
    single.train()(batch, forces=True)["forces"].sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in single.method.parameters())
    assert any(p.grad is not None for p in single.method.parameters())


MIRRORED = {
    "planar": lambda: flat(cluster(6, 8)),
    "ethanol": lambda: molecule("CH3CH2OH"),
    "propene": lambda: molecule("C3H6_Cs"),
    "methanol": lambda: molecule("CH3OH"),
}


def flat(atoms):
    atoms.positions[:, 2] = 0.0
    return atoms


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [0.0, 0.1])
@pytest.mark.parametrize("name", MIRRORED)
def test_exact_on_clouds_with_a_mirror_plane(network, width, name):
    atoms = MIRRORED[name]()
    model = model_of(network, mirror_width=width)
    batch = from_ase([atoms])
    weights = model.frames(batch).weights
    if width == 0.0 and len(weights) == 1:
        return  # the coordinates are symmetric to fewer digits than are computed with
    assert float((weights - 0.5).detach().abs().max()) < 1e-4
    assert worst(model, batch) < 1e-10
    # One of the two frames alone is not: outputs that tell the sides apart change with the mirror image.
    assert worst(Symmetrizer(model.backbone, OneSide(model.method), scope="structure"), batch) > 1e-3


class OneSide(FrameMethod):
    """Planted fault: always the right-handed frame."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def frames(self, batch, *, group, scope, l_max, generator=None):
        return self.method.frames(batch, group="SO(3)", scope=scope, l_max=l_max, generator=generator)


def test_smooth_through_a_mirror_plane_unless_that_is_switched_off():
    def curve(model, t):
        structures = []
        for step in t:
            atoms = flat(cluster(6, 8))
            atoms.positions[0, 2] = step
            structures.append(atoms)
        with torch.no_grad():
            return model(from_ase(structures))["all"]

    for width, smooth in ((0.1, True), (0.0, False)):
        model = model_of(mirror_width=width)
        near = curve(model, [-1e-7, 1e-7])
        jump = float((near[1] - near[0]).abs().max())
        assert jump < 1e-4 if smooth else jump > 1e-2
        far = curve(model, [-0.5, 0.5])
        assert float((far[1] - far[0]).abs().max()) > 1e-2


DEGENERATE = {
    "methane": lambda: molecule("CH4"),
    "carbon dioxide": lambda: molecule("CO2"),
    "hydrogen cyanide": lambda: molecule("HCN"),
    "water": lambda: molecule("H2O"),
    "benzene": lambda: molecule("C6H6"),
    "atom": lambda: Atoms("Fe", [[1.0, 2.0, 3.0]]),
}


@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_finite_where_no_network_has_directions(scope, network, group):
    batch = from_ase([make() for make in DEGENERATE.values()], cutoff=4.0)
    model = model_of(network, scope, group).train()
    found = model.frames(batch)
    assert torch.equal(found.total_weight > 0.99, torch.ones(found.n_owners, dtype=torch.bool))
    out = model(batch, forces=True)
    assert all(bool(torch.isfinite(value.detach()).all()) for value in out.values())
    out["forces"].square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["methane", "carbon dioxide", "hydrogen cyanide", "water", "benzene"])
def test_the_documented_fault(name):
    batch = from_ase([DEGENERATE[name]()])
    assert worst(model_of(), batch) > 1e-3
    with pytest.raises(NoFrameError, match=r"not collinear.*structure 0"):
        model_of(fallback="error")(batch)
    model_of(fallback="error")(from_ase([cluster(5, 0)]))


@pytest.mark.parametrize("name", ["methane", "carbon dioxide", "hydrogen cyanide", "water", "benzene"])
def test_the_documented_fault_is_seen_in_single_precision(name):
    """Vectors of rounding errors have no direction, wherever the structure is turned to."""
    atoms = DEGENERATE[name]()
    for turn in random_rotations(5, generator=torch.Generator().manual_seed(3)):
        atoms.positions = atoms.positions @ turn.numpy().T
        batch = from_ase([atoms], dtype=torch.float32)
        with pytest.raises(NoFrameError, match=r"not collinear.*structure 0"):
            LearnedCanonicalization(fallback="error").frames(batch, group="O(3)", scope="structure", l_max=1)
    found = from_ase([cluster(5, 0)], dtype=torch.float32)
    LearnedCanonicalization(fallback="error").frames(found, group="O(3)", scope="structure", l_max=1)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_axes_are_smooth_functions_of_vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    assume(float(torch.linalg.cross(vectors[:, 0], vectors[:, 1]).norm(dim=1).min()) > 0.2)
    axes, chirality, degenerate = orthonormalized(vectors)
    assert not bool(degenerate.any())
    assert torch.allclose(axes.transpose(1, 2) @ axes, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-13)
    assert torch.allclose(torch.linalg.det(axes), torch.ones(2, dtype=torch.float64))
    # The Gram-Schmidt process: spans of the first one and of the first two, on their side.
    assert torch.allclose(axes[:, :, 0], torch.nn.functional.normalize(vectors[:, 0]), atol=1e-13)
    assert bool(((vectors[:, 1] * axes[:, :, 1]).sum(dim=1) > 0.0).all())
    assert float((vectors[:, 1] * axes[:, :, 2]).sum(dim=1).abs().max()) < 1e-12
    assert torch.equal(chirality > 0.0, torch.linalg.det(vectors) > 0.0)
    inputs = vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: orthonormalized(v)[:2], inputs)
    assert torch.autograd.gradgradcheck(lambda v: orthonormalized(v)[0], inputs)


@pytest.mark.parametrize("offset", [0.0, 1e-20, 1e-9, 1e-6])
def test_axes_of_vanishing_and_collinear_vectors(offset):
    generator = torch.Generator().manual_seed(0)
    noise = offset * torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    along = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.3, -0.4, 0.0]], dtype=torch.float64)
    vectors = (along[:, None, :] * torch.tensor([1.0, -0.5, 0.2])[:, None] + noise).requires_grad_()
    axes, chirality, _ = orthonormalized(vectors)
    assert torch.allclose(axes.transpose(1, 2) @ axes, torch.eye(3, dtype=torch.float64).expand(4, 3, 3), atol=1e-12)
    (gradient,) = torch.autograd.grad(axes.sum() + chirality.sum(), vectors, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum() + 0.0 * vectors.sum(), vectors)
    assert bool(torch.isfinite(gradient.detach()).all() and torch.isfinite(second).all())


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_come_from_the_seed_alone(network):
    state = torch.get_rng_state()
    first, second, other = (LearnedCanonicalization(network, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "network", [VectorNeurons(6, 2, 2.0, torch.Generator()), SphericalTensors(6, 3, 3, 2.0, torch.Generator())]
)
def test_networks_are_equivariant_and_smooth(network):
    network = network.to(torch.float64)
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    points[0] = 0.0  # where directions are not defined
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    species = torch.randint(1, 9, (7,), generator=generator)
    owner = torch.tensor([0, 0, 0, 0, 2, 2, 2])

    def vectors(x, w=weights):
        return network(x, w, species, owner, 3)

    found = vectors(points)
    turn = -random_rotations(1, generator)[0]
    assert float((vectors(points @ turn.T) - found @ turn.T).detach().abs().max()) < 1e-13
    assert float(found[1].detach().abs().max()) == 0.0  # a cloud without points
    without = weights.clone()
    without[3] = 0.0
    moved = points.clone()
    moved[3] += 1.0
    assert float((vectors(moved, without) - vectors(points, without)).detach().abs().max()) < 1e-14
    assert float((vectors(moved) - found).detach().abs().max()) > 1e-4
    assert torch.autograd.gradcheck(vectors, points.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: vectors(x)[0, 0], points)


def test_clouds_without_species():
    generator = torch.Generator().manual_seed(0)
    batch = from_points(
        torch.randn(9, 3, generator=generator, dtype=torch.float64), batch=torch.tensor([0] * 4 + [1] * 5)
    )
    assert worst(model_of(), batch) < 1e-10


def test_periodic_structures_in_atom_scope_only():
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.2, seed=1)
    batch = from_ase([crystal], cutoff=4.0)
    model = model_of(scope="atom")
    assert conditioning(model, batch) > 1e-4
    assert worst(model, batch) < 1e-9
    with pytest.raises(InvalidInputError, match="LearnedCanonicalization: structure scope"):
        Symmetrizer(local(), LearnedCanonicalization(), scope="structure")(batch)


def test_one_evaluation_each():
    batch = from_ase([cluster(6, seed) for seed in range(5)])
    assert model_of(group="SO(3)").frames(batch).n_evaluations == 5
    assert model_of(mirror_width=0.0).frames(batch).n_evaluations == 5
    assert 5 <= model_of(mirror_width=1.0).frames(batch).n_evaluations <= 10
    improper = torch.linalg.det(model_of(mirror_width=0.0).frames(batch).rotations.detach()) < 0.0
    mirrored = batch.clone()
    mirrored[keys.POS] = -batch[keys.POS]
    found = torch.linalg.det(model_of(mirror_width=0.0).frames(mirrored).rotations.detach()) < 0.0
    assert torch.equal(found, ~improper)


def test_by_name():
    method = make_method("LearnedCanonicalization", network="e3nn", channels=4, layers=1)
    assert isinstance(method.network, SphericalTensors)
    with pytest.raises(DeclarationError, match=r"chanels.*channels"):
        make_method("LearnedCanonicalization", chanels=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "vector-neurons"}, "did you mean 'vector-neuron'"),
        ({"channels": 0}, "channels: expected a positive integer, got 0"),
        ({"layers": True}, "layers: expected a positive integer"),
        ({"degree": 1.5}, "degree: expected a positive integer"),
        ({"length_scale": 0.0}, "length_scale: expected a positive length"),
        ({"mirror_width": -0.1}, "mirror_width: expected a number from 0 to 1"),
        ({"fallback": "eror"}, "did you mean 'error'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DeclarationError, match=message):
        LearnedCanonicalization(**options)


def test_other_bad_input():
    with pytest.raises(InvalidTypeError, match=r"network: expected a name or a torch\.nn\.Module, got int"):
        LearnedCanonicalization(3)
    batch = from_ase([cluster(4, 0)])
    batch[keys.Z] = torch.tensor([1, 6, 119, 8])
    with pytest.raises(UnknownSpeciesError, match=r"structure 0, atom 2.*0 to 118, got 119"):
        model_of()(batch)
