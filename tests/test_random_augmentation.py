"""Random augmentation: elements of the group, the same for a structure in every batch, unbiased, noise of 1 / n."""

from __future__ import annotations

import math

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import GroupAveraging, Identity, OutputSpec, RandomAugmentation, Symmetrizer, from_ase, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError
from symmetrize.methods import random_augmentation
from symmetrize.ops.quadrature import haar_rotations
from symmetrize.storage import load, save

OUTPUTS = {
    "energy": OutputSpec("0e", per="structure"),
    "chirality": OutputSpec("0o", per="structure"),
    "dipole": OutputSpec("1o", per="structure"),
    "tensor": OutputSpec(cartesian="ij", per="structure"),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def structures():
    alcohol = molecule("CH3OH")
    alcohol.rattle(0.1, seed=0)
    return [alcohol, Atoms("OH", [[0, 0, 0], [0.1, 0.2, 0.95]]), Atoms("O", [[0.0, 0.0, 0.0]])]


def model(n_samples=4, seed=0, group="O(3)", **options):
    backbone = ToyGlobal(OUTPUTS, length=2.0, seed=1)
    return Symmetrizer(backbone, RandomAugmentation(n_samples, seed), group=group, **options).eval()


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
def test_frames_are_elements_of_the_group(group):
    frames = model(40, group=group).frames(from_ase(structures()))
    assert frames.evaluations.tolist() == [40, 40, 40]
    assert torch.equal(frames.weights, torch.full((120,), 1 / 40, dtype=torch.float64))
    signs = torch.linalg.det(frames.rotations).round().reshape(3, 40).mean(dim=1)
    if group == "SO(3)":
        assert signs.tolist() == [1.0, 1.0, 1.0]
    else:  # five standard deviations of the mean of 40 signs
        assert bool((signs.abs() < 5 / math.sqrt(40)).all())
    assert len(torch.unique(frames.rotations[:, 0, 0])) == 120


def test_draws_belong_to_structures_not_to_batches():
    averaged, listed = model(), structures()
    together = averaged.frames(from_ase(listed)).rotations.reshape(3, 4, 3, 3)
    for n, atoms in enumerate(listed):
        assert torch.equal(averaged.frames(from_ase(atoms)).rotations, together[n])
        given = averaged.frames(from_ase(listed), rng(4)).rotations.reshape(3, 4, 3, 3)
        assert torch.equal(averaged.frames(from_ase(atoms), rng(4)).rotations, given[n])
    # Renumbered atoms, the same draws; turned ones, others.
    first = listed[0][[3, 1, 0, 2, 5, 4]]
    assert torch.equal(averaged.frames(from_ase(first)).rotations, together[0])
    first.rotate(40, "x")
    assert not torch.equal(averaged.frames(from_ase(first)).rotations, together[0])


def test_generators_and_seeds():
    batch, generator = from_ase(structures()), rng(1)
    first, second = (model().frames(batch, generator).rotations for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, model().frames(batch, rng(1)).rotations)
    default, other = (model(seed=seed).frames(batch).rotations for seed in (0, 1))
    assert torch.equal(default, model().frames(batch).rotations) and not torch.equal(default, other)
    # More samples begin with the same ones.
    more = model(6).frames(batch).rotations.reshape(3, 6, 3, 3)
    assert torch.equal(more[:, :4], default.reshape(3, 4, 3, 3))


def test_every_wanted_atom_has_draws_of_its_own():
    local = Symmetrizer(ToyLocal(cutoff=3.0), RandomAugmentation(2), scope="atom")
    batch = from_ase(structures(), cutoff=3.0)
    frames = local.frames(batch)
    assert frames.n_frames == 2 * len(batch.pos) == len(torch.unique(frames.rotations[:, 0, 0]))
    mask = batch.z == 8
    some = local.frames(replace(batch, **{keys.CENTER_MASK: mask}))
    assert torch.equal(some.rotations, frames.rotations[mask[frames.owner]])


# Enough for what the fixed rule leaves over to be below the noise: checked below.
EXACT = 17


def draws(averaged, batch, n):
    found = [averaged(batch, forces=True, generator=rng(seed)) for seed in range(n)]
    return {name: torch.stack([out[name] for out in found]).flatten(1) for name in found[0]}


def test_unbiased_with_noise_of_one_over_n():
    """For every output and the forces; what has a bias is far away."""
    batch = from_ase(structures()[0])
    backbone = model().backbone
    exact, almost = (Symmetrizer(backbone, GroupAveraging(d)).eval()(batch, forces=True) for d in (EXACT, EXACT - 4))
    bare = Symmetrizer(backbone, Identity()).eval()(batch, forces=True)
    n, few, many = 200, 1, 9
    one, nine = draws(model(few), batch, n), draws(model(many), batch, n)
    far = 0.0
    for name in exact:
        wanted = exact[name].detach().flatten()
        for found, samples in ((one, few), (nine, many)):
            error = found[name].std(dim=0) / math.sqrt(n)
            assert float((exact[name] - almost[name]).detach().abs().max()) < 0.2 * float(error.max())
            assert bool(((found[name].mean(dim=0) - wanted).abs() < 5.0 * error + 1e-12).all()), (name, samples)
        distance = (bare[name].detach().flatten() - wanted).abs()
        far = max(far, float((distance / (nine[name].std(dim=0) / math.sqrt(n))).max()))
        # A ratio of two variances of 200 numbers each, mean over components.
        ratio = float(one[name].var(dim=0).mean() / nine[name].var(dim=0).mean())
        assert 9.0 / 1.7 < ratio < 9.0 * 1.7, (name, ratio)
    assert far > 15.0  # the twin: the network itself is many standard errors away


def test_the_inversion_is_drawn(monkeypatch):
    """Without it a pseudoscalar would keep what the network has of a scalar."""
    batch = from_ase(structures()[0])
    backbone = model().backbone
    over = {
        group: Symmetrizer(backbone, GroupAveraging(13), group=group).eval()(batch)["chirality"].detach()
        for group in ("SO(3)", "O(3)")
    }
    assert float((over["SO(3)"] - over["O(3)"]).abs()) > 0.1
    averaged = Symmetrizer(backbone, RandomAugmentation(64), group="O(3)").eval()

    def mean_and_error():
        found = torch.stack([averaged(batch, generator=rng(seed))["chirality"].detach() for seed in range(150)])
        return found.mean(), found.std() / math.sqrt(150)

    mean, error = mean_and_error()
    assert abs(float(mean - over["O(3)"])) < 5 * float(error)
    # The fault: never inverted.
    plain = random_augmentation.uniform_numbers

    def without(batch, scope, seed, n_draws):
        numbers = plain(batch, scope, seed, n_draws)
        numbers[3::4] = 0.9
        return numbers

    monkeypatch.setattr(random_augmentation, "uniform_numbers", without)
    mean, error = mean_and_error()
    assert abs(float(mean - over["SO(3)"])) < 5 * float(error)
    assert abs(float(mean - over["O(3)"])) > 5 * float(error)


def test_forces_are_the_mean_over_elements():
    batch = from_ase(structures())
    averaged = model(3)
    frames = averaged.frames(batch)
    out = averaged(batch, forces=True)
    bare = Symmetrizer(averaged.backbone, Identity()).eval()
    energy, forces = 0.0, 0.0
    for k in range(3):
        g = frames.rotations.reshape(3, 3, 3, 3)[:, k][batch.batch]
        turned = bare(replace(batch, pos=torch.einsum("nji,nj->ni", g, batch.pos)), forces=True)
        energy = energy + turned["energy"] / 3
        forces = forces + torch.einsum("nij,nj->ni", g, turned["forces"]) / 3
    torch.testing.assert_close(out["energy"], energy)
    torch.testing.assert_close(out["forces"], forces)


def test_elements_are_those_of_the_numbers():
    """The first draw of a structure, from its numbers."""
    batch = from_ase(structures())
    numbers = random_augmentation.uniform_numbers(batch, "structure", 0, 4)
    frames = model(1).frames(batch).rotations
    expected = haar_rotations(numbers[:3].T)
    expected = torch.where(numbers[3][:, None, None] < 0.5, -expected, expected)
    assert torch.equal(frames, expected)


def test_options(tmp_path):
    for options, match in (
        ({"n_samples": 0}, "n_samples: expected an integer of at least 1, got 0"),
        ({"n_samples": 2.0}, "n_samples: expected an integer of at least 1, got 2.0"),
        ({"seed": True}, "seed: expected an integer of at most 64 bits, got True"),
    ):
        with pytest.raises(DeclarationError, match=match):
            RandomAugmentation(**options)
    assert RandomAugmentation.stochastic
    save(model(5, 7), tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.method.describe() == {"n_samples": 5, "seed": 7}
    batch = from_ase(structures())
    assert torch.equal(again.frames(batch).rotations, model(5, 7).frames(batch).rotations)
