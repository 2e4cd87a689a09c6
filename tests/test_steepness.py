"""The weights that the steepness benchmark differentiates, and what bounds those of the package."""

import pytest
import torch
from ase.build import bulk, molecule

from benchmarks.steepness import CUTOFF, FORMS, frame_weights
from symmetrize import ECSE, DeclarationError, from_ase
from symmetrize.frames import Stratum
from symmetrize.methods.ecse.weights import lowest_key, pair_key, shared_stick_breaking, stick_breaking
from symmetrize.testing import geometries

SHIPPED = FORMS[-1]
LATTICES = {"fcc": 24, "bcc": 24, "sc": 24, "diamond": 12}


def lattice(name):
    return bulk("X", name, a=2.7 if name == "sc" else {"fcc": 3.6, "bcc": 2.9, "diamond": 5.4}[name])


def of_package(atoms, width):
    return ECSE(cutoff_width=width).frames(from_ase([atoms], cutoff=CUTOFF), group="SO(3)", scope="atom", l_max=1)


@pytest.mark.parametrize("width", [0.08, 0.15, 0.4])
@pytest.mark.parametrize("name", ["ethanol", "methane", "H2O2", "C2H2", "CO2", "water dimer", "random cluster"])
def test_written_out_weights_are_those_of_the_package(name, width):
    atoms = geometries()[name] if name in geometries() else molecule("H2O2")
    found = of_package(atoms, width)
    positions = torch.as_tensor(atoms.positions)
    for n in range(len(atoms)):
        vectors = torch.cat([positions[:n], positions[n + 1 :]]) - positions[n]
        expected = frame_weights(vectors, SHIPPED, width)
        pairs = expected[: len(vectors) ** 2]
        own = (found.owner == n) & (found.stratum == int(Stratum.FRAME))
        # The package switches off what is below 1e-9.
        got = found.normalized_weights[own]
        got = got[got > 1e-8].sort().values
        expected = pairs[pairs > 1e-8].sort().values
        assert len(got) == len(expected) and torch.allclose(got, expected, rtol=1e-8, atol=1e-13)
        if len(vectors) > 2 and len(got) > 1 and len(set(got.tolist())) > 2:
            # Other weights would be noticed.
            other = frame_weights(vectors, FORMS[0], width)[: len(vectors) ** 2]
            other = other[other > 1e-8].sort().values
            assert len(other) != len(got) or not torch.allclose(got, other, rtol=1e-6)


@pytest.mark.parametrize("name", LATTICES)
def test_perfect_lattices_take_as_many_frames_as_their_symmetry_asks_for(name):
    atoms = lattice(name)
    found = of_package(atoms, 0.15)
    assert set(found.evaluations.tolist()) == {LATTICES[name]}
    # One frame of each rotation of the site: what continuity asks for at least.
    weights = found.normalized_weights[found.owner == 0]
    assert torch.allclose(weights, weights[:1], rtol=1e-9)


def random_groups(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (24,), generator=generator)
    group = torch.repeat_interleave(sizes)
    row = torch.randint(0, 8, (24,), generator=generator).sort().values[group]
    shared, available = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (24, len(group)))
    available[torch.rand(len(group), generator=generator) < 0.3] = 1.0
    shared[torch.rand(24, generator=generator) < 0.3] = 1.0
    key = (3.0 * torch.rand(len(group), generator=generator, dtype=torch.float64)).round(decimals=1)
    return shared[group], available, key, group, row


@pytest.mark.parametrize("seed", range(20))
def test_total_is_at_least_one_with_groups(seed):
    shared, available, key, group, row = random_groups(seed)
    weights, rest = shared_stick_breaking(shared, available, key, group, row, 8, 0.3)
    total = rest.index_add(0, row, weights)
    assert (total >= 1.0 - 1e-12).all() and (weights >= 0.0).all() and (rest >= 0.0).all()
    # Without keys in the way: exactly what is there of each group, in any order.
    everything, rest = shared_stick_breaking(shared, available, torch.zeros_like(key), group, row, 8, 0.3)
    assert torch.allclose(everything, shared * available, rtol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_mean_over_groups_that_are_there_or_not(seed):
    """The definition by probabilities, enumerated."""
    shared, available, key, group, row = random_groups(seed)
    own = row == row[0]
    shared, available, key, group = shared[own], available[own], key[own], group[own]
    numbers = group.unique().tolist()
    expected, left = torch.zeros_like(key), torch.zeros(1, dtype=key.dtype)
    for mask in range(2 ** len(numbers)):
        present = [g for n, g in enumerate(numbers) if mask >> n & 1]
        probability = torch.ones(1, dtype=key.dtype)
        for g in numbers:
            p = shared[group == g][0]
            probability = probability * (p if g in present else 1.0 - p)
        chosen = torch.tensor([int(g) in present for g in group])
        zero = torch.zeros(int(chosen.sum()), dtype=torch.int64)
        weights, rest = stick_breaking(available[chosen], key[chosen], zero, 1, 0.3)
        expected = expected.index_add(0, chosen.nonzero()[:, 0], probability * weights)
        left = left + probability * rest
    got, rest = shared_stick_breaking(shared, available, key, group, torch.zeros_like(group), 1, 0.3)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-14) and torch.allclose(rest, left, atol=1e-14)
    ungrouped, _ = stick_breaking(shared * available, key, torch.zeros_like(group), 1, 0.3)
    assert len(numbers) == len(group) or not torch.allclose(got, ungrouped, rtol=1e-3)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_groups_change_nothing(block):
    arguments = random_groups(0)
    results = []
    for b in (2**20, block):
        x, y, z = (v.clone().requires_grad_() for v in arguments[:3])
        weights, rest = shared_stick_breaking(x, y, z, *arguments[3:], 8, 0.3, block=b)
        results.append([weights, rest, *torch.autograd.grad(weights.sin().sum() + (rest * rest).sum(), (x, y, z))])
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(expected, got, rtol=1e-12, atol=1e-14)


def test_lowest_key_is_a_bound():
    axis, partner = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    cosine = torch.linspace(-1.0, 1.0, 1000, dtype=torch.float64)
    least = lowest_key(axis, partner, axis)
    found = pair_key(axis, partner, axis, cosine)
    assert (found >= least - 1e-12).all() and (found - least).min() < 1e-4


def test_models_with_other_weights_are_refused():
    description = ECSE(cutoff_width=0.2).describe()
    again = ECSE.rebuild(description, None)
    assert again.describe() == description
    old = {name: value for name, value in description.items() if name != "weights"}
    with pytest.raises(DeclarationError, match="weights: expected 'pairs', got 'levels'"):
        ECSE.rebuild(old, None)
