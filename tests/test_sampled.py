"""Sampled frames: expectations over all draws, by enumeration, equal the average; what is drawn from which seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.pet import PET, PETConfig

from symmetrize import ECSE, GroupAveraging, Symmetrizer, from_ase, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidTypeError
from symmetrize.frames import FrameMethod, FrameSet, Stratum
from symmetrize.methods.draws import uniform_numbers
from symmetrize.methods.sampled import SampledFrames, companions, draw, estimate
from symmetrize.storage import load, save
from symmetrize.training.config import SymmetrizeRecipe
from symmetrize.training.drawn import differentiable_frames, frame_fields
from symmetrize.training.gradients import energy_and_forces
from symmetrize.training.symmetrized import (
    frame_variance,
    in_place,
    make_symmetrizer,
    sampled_energy_and_forces,
    symmetrized_energy_and_forces,
)

SIZES = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8, "num_heads": 2, "num_attention_layers": 1}


def pet(**changes):
    backbone = PET(PETConfig((1, 6, 8), cutoff=3.0, **SIZES, **changes), seed=0).double()
    backbone.composition.copy_(torch.tensor([-1.0, -30.0, -70.0]))
    return backbone


def molecules():
    """Generic, nearly linear (axis stratum), diatomic and isolated (point stratum)."""
    generator = torch.Generator().manual_seed(6)  # two pairs of frames that share the weight in both scopes
    alcohol = molecule("CH3OH")
    alcohol.positions += 0.1 * torch.randn(6, 3, generator=generator, dtype=torch.float64).numpy()
    bent = Atoms("OCO", [[-1.16, 0.05, 0.0], [0, 0, 0], [1.15, 0.08, 0.1]])
    return [alcohol, bent, Atoms("OH", [[0, 0, 0], [0.1, 0.2, 0.95]]), Atoms("O", [[0.0, 0.0, 0.0]])]


def given_batch(picked=(0, 1, 2, 3)):
    return from_ase([molecules()[n] for n in picked], cutoff=3.0)


class Picked(FrameMethod):
    """The estimate for given draws: one number per draw, the place among the frames of each owner."""

    def __init__(self, method, places, companion=0, estimator=estimate):
        super().__init__()
        self.method, self.places, self.companion, self.estimator = method, places, companion, estimator

    def frames(self, batch, *, group, scope, l_max, generator=None):
        found = self.method.frames(batch, group=group, scope=scope, l_max=l_max)
        drawn = torch.stack([at_place(found, place)[0] for place in self.places])
        other = at_place(found, self.companion)[0] if len(self.places) == 1 else None
        return self.estimator(found, drawn, other)


def at_place(frames: FrameSet, place: int):
    """Frames at one place of every owner's list, and their probabilities: 0 beyond the end of a list."""
    owners = frames.owner.unique()
    rows = [(frames.owner == owner).nonzero()[:, 0] for owner in owners]
    chosen = torch.stack([row[min(place, len(row) - 1)] for row in rows])
    there = torch.tensor([place < len(row) for row in rows])
    return chosen, frames.normalized_weights.detach()[chosen] * there


def most_frames(frames: FrameSet) -> int:
    return int(frames.owner.bincount().max())


def without_score(frames, drawn, companion=None):
    """The fault: frames of constant weight."""
    found = estimate(frames, drawn, companion)
    return dataclasses.replace(found, weights=found.weights.detach())


def derivatives(energy, pos, direction):
    """Energy, forces, and the product of the Hessian with a vector."""
    gradient = torch.autograd.grad(energy, pos, create_graph=True)[0]
    hessian = torch.autograd.grad((gradient * direction).sum(), pos)[0]
    return energy.detach(), -gradient.detach(), hessian


def rows_of(model, batch):
    out = model(batch)
    return out["atomic_energy"] if model.scope == "atom" else out["energy"]


def expectation(backbone, scope, n_samples, estimator=estimate):
    """Expected energy, forces and Hessian-vector product, and those of the average."""
    method = ECSE()
    # All pairs of draws of one structure are few enough; its atoms would have too many.
    everything = (0, 1, 2, 3) if scope == "atom" else (0, 2)
    batch = given_batch(everything if n_samples == 1 else (0,))
    direction = torch.randn(batch[keys.POS].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pos = batch[keys.POS].clone().requires_grad_()
    moving = replace(batch, **{keys.POS: pos, keys.EDGE_VEC: None})
    whole = Symmetrizer(backbone, method, scope=scope, chunk_size=10**6)
    exact = derivatives(rows_of(whole, moving).sum(), pos, direction)
    frames = whole.frames(batch)
    n = most_frames(frames)
    places = [(k,) for k in range(n)] if n_samples == 1 else [(k, m) for k in range(n) for m in range(n)]
    total = [torch.zeros_like(value) for value in exact]
    for drawn in places:
        probability = torch.stack([at_place(frames, place)[1] for place in drawn]).prod(dim=0)
        if not bool((probability > 0).any()):
            continue
        picked = Picked(method, drawn, estimator=estimator)
        model = Symmetrizer(backbone, picked, scope=scope, chunk_size=10**6)
        energy = (probability * rows_of(model, moving)).sum()
        total = [a + b for a, b in zip(total, derivatives(energy, pos, direction), strict=True)]
    return total, exact


def error(found, exact):
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, exact, strict=True)]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


class TestUnbiased:
    """Sums over all draws with their probabilities: no statistics."""

    @pytest.mark.parametrize("scope", ["atom", "structure"])
    def test_one_sample(self, scope):
        backbone = pet() if scope == "atom" else pet(num_gnn_layers=2)
        found, exact = expectation(backbone, scope, 1)
        assert max(error(found, exact)) < 1e-9

    def test_two_samples(self):
        found, exact = expectation(pet(num_gnn_layers=2), "structure", 2)
        assert max(error(found, exact)) < 1e-9

    @pytest.mark.parametrize("n_samples", [1, 2])
    def test_without_the_score_forces_are_biased(self, n_samples):
        scope, backbone = ("atom", pet()) if n_samples == 1 else ("structure", pet(num_gnn_layers=2))
        energy, forces, hessian = error(*expectation(backbone, scope, n_samples, without_score))
        assert energy < 1e-9  # the value does not show it
        assert forces > 1e-5 and hessian > 1e-5


def in_place_expectation(backbone, scope, batch, change=None):
    """Expected energies of owners and forces of the training step, and those of the average, with parameters."""
    settings_ = SymmetrizeRecipe(scope=scope)
    whole = make_symmetrizer(backbone, settings_)
    arguments = {"group": "O(3)", "scope": scope, "l_max": 0}
    exact = symmetrized_energy_and_forces(whole, batch, create_graph=True)
    frames, leaf = differentiable_frames(whole.method, batch, **arguments)
    n = most_frames(frames)
    energy, forces = torch.zeros_like(exact[0]), torch.zeros_like(exact[1])
    # An owner's contribution is linear in its own probability: weights of the others are those of their own frames.
    for place in range(n):
        chosen, probability = at_place(frames, place)
        # Any companion that does not depend on the draw.
        other, _ = at_place(frames, 1)
        fields = frame_fields(frames, leaf, chosen, other)
        if change is not None:
            fields[change] = torch.zeros_like(fields[change])
        weighted = Weighted(backbone, probability, scope)
        e, f = sampled_energy_and_forces(weighted, replace(batch, **fields), scope, 1, create_graph=True)
        energy, forces = energy + e, forces + f
    return (energy, forces), exact


class Weighted(torch.nn.Module):
    """A backbone whose energies are multiplied by a factor per owner."""

    def __init__(self, backbone, factor, scope):
        super().__init__()
        self.backbone, self.factor, self.scope = backbone, factor, scope

    def forward(self, batch):
        mask = batch.get(keys.CENTER_MASK)
        factor = self.factor if self.scope == "atom" else self.factor[batch[keys.BATCH]]
        factor = factor if mask is None else factor[mask]
        return {"energy": self.backbone(batch)["energy"] * factor}


class TestInPlace:
    """The training step: edges turned in place, derivatives of frames computed ahead."""

    def test_atom_scope(self):
        backbone = pet()
        batch = given_batch()
        found, exact = in_place_expectation(backbone, "atom", batch)
        assert max(error(found, exact)) < 1e-9
        # Gradients of a function of the forces with respect to the parameters, too.
        direction = torch.randn(exact[1].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        parameters = list(backbone.parameters())
        gradients = [
            torch.autograd.grad((forces * direction).sum() + energy.sum(), parameters, allow_unused=True)
            for energy, forces in (found, exact)
        ]
        for a, b in zip(*gradients, strict=True):
            if b is not None:
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-9 * float(exact[1].detach().abs().max()))

    @pytest.mark.parametrize("field", ["frame_score", "frame_turn"])
    def test_faults_are_seen(self, field):
        energy, forces = error(*in_place_expectation(pet(), "atom", given_batch(), field))
        assert energy < 1e-9 and forces > 1e-5

    def test_structure_scope(self):
        backbone = pet(num_gnn_layers=2)
        for n in (0, 2):
            batch = given_batch((n,))
            found, exact = in_place_expectation(backbone, "structure", batch)
            assert max(error(found, exact)) < 1e-9

    def test_score_in_some_steps(self):
        """Twice the derivative of the probabilities in one step and none in another: on average, as in every step."""
        backbone, batch = pet(), given_batch()
        frames, leaf = differentiable_frames(ECSE(), batch, group="O(3)", scope="atom", l_max=0)
        drawn, companion = (at_place(frames, place)[0] for place in (0, 1))
        fields = frame_fields(frames, leaf, drawn, companion)
        one, two, none = (
            sampled_energy_and_forces(backbone, replace(batch, **fields), "atom", 1, create_graph=False, score=score)[1]
            for score in (1.0, 2.0, 0.0)
        )
        assert torch.allclose((two + none) / 2, one, atol=1e-12)
        assert float((two - none).detach().abs().max()) > 1e-4

    def test_several_samples_average(self):
        """Two samples of the same frame are one sample of it, whose control variate is its own energy."""
        backbone, batch = pet(), given_batch()
        frames, leaf = differentiable_frames(ECSE(), batch, group="O(3)", scope="atom", l_max=0)
        chosen, _ = at_place(frames, 0)
        one = frame_fields(frames, leaf, chosen, chosen)
        two = {name: torch.cat([value, value]) for name, value in one.items()}
        twice = from_ase(molecules() * 2, cutoff=3.0)
        first = sampled_energy_and_forces(backbone, replace(batch, **one), "atom", 1, create_graph=False)
        second = sampled_energy_and_forces(backbone, replace(twice, **two), "atom", 2, create_graph=False)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(first, second, strict=True))

    def test_where(self):
        assert in_place(pet(), "atom") and in_place(pet(num_gnn_layers=2), "structure")
        assert not in_place(pet(num_gnn_layers=2), "atom")


class TestDraws:
    def model(self, n_samples=1, scope="atom"):
        return Symmetrizer(pet() if scope == "atom" else pet(num_gnn_layers=2), SampledFrames(ECSE(), n_samples))

    def test_without_a_generator_all_frames(self):
        batch = given_batch()
        sampled, whole = self.model(), Symmetrizer(pet(), ECSE())
        assert torch.equal(sampled(batch)["energy"], whole(batch)["energy"])
        drawn = sampled(batch, generator=torch.Generator().manual_seed(0))["energy"].detach()
        assert float((drawn - whole(batch)["energy"].detach()).abs().max()) > 1e-5

    def test_seeds(self):
        batch, model = given_batch(), self.model()
        generator = torch.Generator().manual_seed(5)
        first, second = (model(batch, generator=generator)["energy"] for _ in range(2))
        again = model(batch, generator=torch.Generator().manual_seed(5))["energy"]
        assert torch.equal(first, again) and not torch.equal(first, second)

    @pytest.mark.parametrize("scope", ["atom", "structure"])
    def test_batching_changes_nothing(self, scope):
        model, structures = self.model(scope=scope), molecules()
        together = model(from_ase(structures), forces=True, generator=torch.Generator().manual_seed(3))
        order = [2, 0, 3, 1]
        other = model(from_ase([structures[n] for n in order]), forces=True, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(other["energy"], together["energy"][order], rtol=1e-13, atol=1e-12)
        for n, atoms in enumerate(structures):
            alone = model(from_ase(atoms), forces=True, generator=torch.Generator().manual_seed(3))
            mine = from_ase(structures)[keys.BATCH] == n
            assert torch.allclose(alone["forces"], together["forces"][mine], atol=1e-12)

    def test_numbers_are_uniform_and_independent(self):
        batch = from_ase([molecule("CH3CH2OH")] * 2)
        numbers = torch.stack([uniform_numbers(batch, "atom", seed, 3) for seed in range(2000)])
        assert torch.equal(numbers[:, :, :9], numbers[:, :, 9:])  # equal structures draw alike
        numbers = numbers[:, :, :9].reshape(2000, -1)
        assert bool((numbers >= 0.0).all() & (numbers < 1.0).all())
        # Five standard errors of a mean of 2000, and of the covariance of two uniform numbers.
        assert float((numbers.mean(dim=0) - 0.5).abs().max()) < 5 * (1 / 12 / 2000) ** 0.5
        covariance = torch.cov(numbers.T)
        off = covariance - torch.diag(covariance.diag())
        assert float(off.abs().max()) < 5 / 12 / 2000**0.5
        turned = replace(batch, **{keys.POS: -batch[keys.POS]})
        assert not torch.equal(uniform_numbers(batch, "atom", 0, 1), uniform_numbers(turned, "atom", 0, 1))

    @settings(max_examples=60, deadline=None)
    @given(
        counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
        seed=st.integers(0, 10**6),
        zeros=st.booleans(),
    )
    def test_draws_are_owners_frames_with_the_right_probability(self, counts, seed, zeros):
        generator = torch.Generator().manual_seed(seed)
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        owner = owner[torch.randperm(len(owner), generator=generator)]
        weights = torch.rand(len(owner), generator=generator, dtype=torch.float64) + 0.01
        if zeros:  # all but one frame of every owner
            kept = torch.zeros(len(counts), dtype=torch.int64).scatter(0, owner, torch.arange(len(owner)))
            weights = torch.zeros_like(weights).index_put((kept,), torch.ones(len(kept), dtype=torch.float64))
        eye = torch.eye(3, dtype=torch.float64).expand(len(owner), 3, 3)
        frames = FrameSet(eye, weights, owner, torch.zeros_like(owner), torch.zeros(len(owner), 3), len(counts), "atom")
        n = 400
        grid = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, len(counts))
        drawn = draw(frames, grid)
        assert torch.equal(owner[drawn], torch.arange(len(counts)).expand(n, len(counts)))
        shares = drawn.reshape(-1).bincount(minlength=len(owner)) / n
        assert float((shares - frames.normalized_weights).abs().max()) <= 1.01 / n

    @pytest.mark.parametrize("n_samples", [1, 2, 3])
    def test_values_of_the_weights(self, n_samples):
        pos = given_batch()[keys.POS].requires_grad_()
        batch = replace(given_batch(), **{keys.POS: pos, keys.EDGE_VEC: None})
        model = self.model(n_samples)
        found = model.frames(batch, torch.Generator().manual_seed(0))
        multiples = found.weights.detach() * n_samples
        assert torch.equal(multiples, multiples.round())
        assert torch.allclose(found.total_weight, torch.ones(found.n_owners, dtype=torch.float64), rtol=1e-14)
        assert found.n_evaluations <= n_samples * found.n_owners
        assert found.n_evaluations < model.frames(batch).n_evaluations
        # Their derivatives cancel, which is why normalizing does no harm.
        gradient = torch.autograd.grad((found.total_weight * torch.rand(found.n_owners)).sum(), pos)[0]
        assert float(gradient.abs().max()) < 1e-12

    def test_companions(self):
        model = self.model()
        frames = model.frames(given_batch())
        owners = frames.owner.unique()
        uniform = torch.rand(2, len(owners), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = draw(frames, uniform[:1])[0]
        other = companions(frames, drawn, uniform[1])
        assert torch.equal(frames.owner[other], owners)
        full = frames.stratum[drawn] == Stratum.FRAME
        handedness = torch.linalg.det(frames.rotations)
        assert bool(full.any()) and torch.allclose(handedness[other][full], handedness[drawn][full])

    def test_fixed_frames(self):
        """Frames that do not depend on the structure have no score: one of a quadrature at random."""
        model = Symmetrizer(pet(), SampledFrames(GroupAveraging(3)))
        out = model(given_batch(), forces=True, generator=torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(out["forces"]).all())

    def test_errors(self):
        with pytest.raises(DeclarationError, match="n_samples: expected an integer of at least 1, got 0"):
            SampledFrames(ECSE(), 0)
        with pytest.raises(InvalidTypeError, match="expected a FrameMethod, got str"):
            SampledFrames("ecse")

    def test_saved_and_loaded(self, tmp_path):
        model = Symmetrizer(pet(), SampledFrames(ECSE(cutoff_width=0.2), 3))
        save(model, tmp_path / "model")
        again = load(tmp_path / "model")
        assert again.method.n_samples == 3 and again.method.method.cutoff_width == 0.2
        batch = given_batch()
        drawn = [m(batch, generator=torch.Generator().manual_seed(1))["energy"] for m in (model, again)]
        assert torch.equal(*drawn)


class TestVariance:
    def test_vanishes_for_an_invariant_network(self):
        """Forces of what does not depend on the orientation are the same in all frames; those of PET are not."""
        batch = given_batch()
        recipe = SymmetrizeRecipe(scope="atom")
        varying = frame_variance(pet(), batch, recipe, "atom", 0)
        assert float(varying.max()) > 1e-10
        constant = frame_variance(Distances(), batch, recipe, "atom", 0)
        assert float(constant.max()) < 1e-24
        plain = energy_and_forces(Distances(), batch, create_graph=False)[1]
        assert float(plain.abs().max()) > 1e-3


class Distances(torch.nn.Module):
    """Energies from distances alone."""

    outputs = pet().outputs

    def forward(self, batch):
        center = batch[keys.EDGE_INDEX][1]
        pairs = torch.exp(-batch[keys.EDGE_VEC].norm(dim=1))
        energy = torch.zeros_like(batch[keys.POS][:, 0]).index_add(0, center, pairs)
        mask = batch.get(keys.CENTER_MASK)
        return {"energy": energy if mask is None else energy[mask]}
