"""The fast construction of frames against its formulas, and joint neighbor lists against one list per structure."""

from itertools import pairwise, permutations

import pytest
import torch
from ase import Atoms

import symmetrize.methods.ecse.weights as weights_module
from benchmarks.frames import Counter
from symmetrize import ECSE, DeclarationError, FrameSet, InvalidInputError, from_ase, from_points
from symmetrize.data import validate
from symmetrize.methods.ecse.strata import stratify
from symmetrize.methods.ecse.weights import stick_breaking
from symmetrize.ops.neighbors import neighbor_list
from symmetrize.ops.switches import smooth_step
from symmetrize.testing import geometries

D, W, R = 0.15, 0.45, 2.5


def step(x):
    """The smooth step, for one number."""
    if x.item() <= 0.002:
        return 0.0 * x
    return 1.0 + 0.0 * x if x.item() >= 0.998 else 1.0 / (1.0 + torch.exp(1.0 / x - 1.0 / (1.0 - x)))


def clouds():
    """Generic, symmetric, collinear, nearly collinear and lonely environments, in random orientations."""
    generator = torch.Generator().manual_seed(3)
    octahedron = torch.cat([torch.eye(3), -torch.eye(3)]).to(torch.float64)
    line = torch.tensor([[1.0, 0, 0], [-1.05, 0, 0], [2.0, 0, 0]], dtype=torch.float64)
    bent = line + torch.tensor([[0.0, 0.0, 0], [0, 0.08, 0], [0, 0, 0.1]], dtype=torch.float64)
    random = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (2, 5, 9, 14)]
    edge = torch.tensor([[2.42, 0, 0], [0.3, 2.41, 0]], dtype=torch.float64)
    return [*random, octahedron, 1.2 * octahedron[:2], bent, line, edge, line[:1]]


def availability(vectors):
    return smooth_step((R - vectors.norm(dim=1)) / D)


def built(vectors, sizes):
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    g = availability(vectors)
    return stratify(vectors, g, g, ptr, D, W, 8, False, 1e-28, 1e-20, 1e-13)


def by_formula(vectors, sizes, wrong=False):
    """Sums over the weights of full frames and of the point times a polynomial of the frame, written out in loops."""
    sums = []
    for first, last in pairwise(torch.tensor([0, *sizes]).cumsum(0).tolist()):
        r = vectors[first:last]
        n, d, g = len(r), r.norm(dim=1), [step((R - x.norm()) / D) for x in r]
        total, one = 0.0 * r.sum(), torch.ones((), dtype=r.dtype)
        found, share = {}, list(g)
        for j, m in permutations(range(n), 2):
            share[j] = share[j] * (1.0 - g[m] * step((d[j] - d[m]) / (1.7 * D)))
        for j, k in permutations(range(n), 2):
            cosine = r[j] @ r[k] / (d[j] * d[k])
            cross = torch.linalg.cross(r[j] / d[j], r[k] / d[k])
            sine = (cross @ cross).clamp(min=1e-30).sqrt()
            key = 1.5 * d[j] + d[k] + d[j] * (0.6 * cosine**2 - 0.12 * cosine)
            frame = torch.stack([r[j] / d[j], cross / sine, torch.linalg.cross(r[j] / d[j], cross / sine)], dim=1)
            found[j, k] = (g[k] * step(sine / W), key, frame)

        def free(axis, key, n=n, found=found, one=one):
            """The part of the pairs of an axis that are not before a key."""
            left = one
            for m in range(n):
                if m != axis:
                    a, other, _ = found[axis, m]
                    left = left * (1.0 - a * (one if key is None else step((key - other) / D)))
            return left

        left = one
        for j in range(n):
            left = left * (1.0 - share[j] * (1.0 - free(j, None)))
        point = one
        for j in range(n):
            point = point * (1.0 - g[j])
        for (j, _), (a, key, frame) in found.items():
            weight = share[j] * a * free(j, key)
            for other in range(n):
                if weight.item() != 0.0 and other != j:
                    weight = weight * (1.0 - share[other] * (1.0 - free(other, key)))
            if weight.item() != 0.0:
                total = total + weight * (g[j] if wrong else 1.0) * polynomial(frame[None])[0]
        sums.append(torch.stack([total, point * left]))
    return torch.stack(sums)


def polynomial(frames):
    probe = torch.tensor([[0.3, -1.1, 0.4], [0.7, 0.2, -0.5], [-0.9, 0.6, 1.3]], dtype=frames.dtype)
    overlap = (frames * probe).sum(dim=(1, 2))
    return overlap + overlap**2


def by_strata(vectors, sizes):
    rotations, weights, owner, stratum = built(vectors, sizes)
    zero = torch.zeros(len(sizes), dtype=vectors.dtype)
    full, point = (stratum == 0).nonzero()[:, 0], (stratum == 2).nonzero()[:, 0]
    total = zero.index_add(0, owner[full], weights[full] * polynomial(rotations[full]))
    return torch.stack([total, zero.index_add(0, owner[point], weights[point])], dim=1)


def derivatives(function, vectors, sizes):
    """Values, gradient, and the product of the Hessian with a vector."""
    v = vectors.clone().requires_grad_()
    value = function(v, sizes)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=v.dtype)
    (first,) = torch.autograd.grad((value * value).sum(), v, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), v)
    return value.detach(), first.detach(), second


def test_frames_are_those_of_the_formulas_with_two_derivatives():
    parts = clouds()
    vectors, sizes = torch.cat(parts), [len(p) for p in parts]
    got, expected = derivatives(by_strata, vectors, sizes), derivatives(by_formula, vectors, sizes)
    for n, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert torch.isfinite(x).all()
        assert (x - y).abs().max() <= 1e-11 * 100.0**n * y.abs().max(), n
    # One factor too many at the edge of what is seen is noticed.
    planted = by_formula(vectors, sizes, wrong=True)
    assert (planted - got[0]).abs().max() > 1e-3


def test_a_batch_in_which_everything_has_a_frame_takes_the_short_way_to_the_same():
    parts = clouds()
    together = by_strata(torch.cat(parts), [len(p) for p in parts])
    alone = torch.cat([by_strata(p, [len(p)]) for p in parts])
    assert torch.allclose(together, alone, rtol=1e-13, atol=1e-15)
    *_, stratum = built(parts[2], [len(parts[2])])
    assert (stratum == 0).all() and set(built(torch.cat(parts), [len(p) for p in parts])[3].tolist()) == {0, 1, 2}


def test_known_lengths_change_nothing():
    vectors = torch.cat(clouds())
    g, ptr = availability(vectors), torch.tensor([0, vectors.shape[0]])
    numbers = (D, W, 8, True, 1e-28, 1e-20, 1e-10)
    expected = stratify(vectors, g, g, ptr, *numbers)
    got = stratify(vectors, g, g, ptr, *numbers, lengths=vectors.norm(dim=1))
    for x, y in zip(got, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_change_nothing(block):
    generator = torch.Generator().manual_seed(block)
    sizes = [1, 0, 40, 2, 3, 0, 5, 1, 17, 33]
    row = torch.repeat_interleave(torch.tensor(sizes))
    a, key = torch.rand(2, row.shape[0], generator=generator, dtype=torch.float64)
    a[::3], key[::5] = 1.0, 0.5
    results = []
    for b in (2**20, block):
        x, y = a.clone().requires_grad_(), key.clone().requires_grad_()
        weights, rest = stick_breaking(x, y, row, len(sizes), 0.3, block=b)
        gradient = torch.autograd.grad((weights.sin().sum() + (rest * rest).sum()), (x, y))
        results.append([weights.detach(), rest.detach(), *gradient])
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(expected, got, rtol=1e-13, atol=1e-15)


def test_memory_of_blocks_is_bounded(monkeypatch):
    """A few long rows do not make the rectangle of all the short ones long."""
    sizes = [300] * 2 + [2] * 5000
    row = torch.repeat_interleave(torch.tensor(sizes))
    largest = []
    plain = weights_module.smooth_step
    monkeypatch.setattr(weights_module, "smooth_step", lambda x: largest.append(x.numel()) or plain(x))
    key = torch.rand(row.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stick_breaking(torch.full_like(key, 0.5), key, row, len(sizes), 0.3, block=20000)
    assert max(largest) <= 20000 and sum(largest) <= 4 * sum(n * n for n in sizes)


def test_step_is_exact_outside_its_window_and_has_finite_derivatives():
    x = torch.tensor([-torch.inf, -1.0, 0.0, 1e-300, 1e-9, 0.001, 0.0013, 0.3, 0.999, 1.0, 2.0], dtype=torch.float64)
    value = smooth_step(x)
    assert (value[:6] == 0.0).all() and (value[8:] == 1.0).all() and 0.0 < value[7] < 1.0
    y = x[1:].clone().requires_grad_()
    derivative = smooth_step(y)
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), y, create_graph=True)
        assert torch.isfinite(derivative).all() and (derivative[[0, 1, 2, 3, 4, 7, 8, 9]] == 0.0).all()


# What is checked of a FrameSet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", range(9))
@pytest.mark.parametrize("wrong", [1e-8, float("nan"), float("inf")])
def test_every_entry_of_a_rotation_is_checked(entry, wrong):
    found = ECSE().frames(from_ase(geometries()["ethanol"], cutoff=4.5), group="O(3)", scope="atom", l_max=1)
    rotations = found.rotations.clone()
    rotations[-1].view(-1)[entry] += wrong
    fields = {name: getattr(found, name) for name in ("weights", "owner", "stratum", "origins", "n_owners", "scope")}
    FrameSet(rotations=found.rotations, **fields)
    with pytest.raises(DeclarationError, match="orthogonal"):
        FrameSet(rotations=rotations, **fields)


# Host synchronisations -----------------------------------------------------------------------------------------------


def test_operations_do_not_depend_on_the_size_of_a_batch():
    ethanol = geometries()["ethanol"]
    counts = []
    for n in (1, 2, 16):
        batch = from_ase([ethanol] * n, cutoff=4.5)
        with Counter() as counter:
            ECSE().frames(batch, group="O(3)", scope="atom", l_max=1)
        counts.append((counter.operations, counter.synchronisations))
    assert len(set(counts)) == 1 and counts[0][1] > 0
    with Counter() as counter:
        for x in torch.ones(3):
            float(x)
    assert counter.synchronisations == 3


# Neighbor lists ------------------------------------------------------------------------------------------------------


def pairs(found):
    edges, shift = found
    assert (edges[1].diff() >= 0).all()
    rows = torch.cat([edges.T, shift], dim=1).tolist()
    assert len(rows) == len(set(map(tuple, rows)))
    return set(map(tuple, rows))


def one_by_one(batch, cutoff):
    found = set()
    for s, (first, last) in enumerate(pairwise(batch.ptr.tolist())):
        ptr = torch.tensor([0, last - first])
        part = pairs(neighbor_list(batch.pos[first:last], ptr, batch.cell[s][None], batch.pbc[s][None], cutoff))
        found |= {(i + first, j + first, *shift) for i, j, *shift in part}
    return found


@pytest.mark.parametrize("cutoff", [1.3371, 4.3371, 9.1371])
def test_joint_lists_are_those_of_the_structures(cutoff):
    structures = [*geometries().values(), Atoms("H"), Atoms("H2", [[0, 0, 0], [1e6, 0, 0]])]
    for n, offset in ((1, 1e3), (5, -1e6)):
        far = geometries()["ethanol"]
        far.positions += offset * n
        structures.insert(3 * n, far)
    batch = from_ase(structures)
    assert pairs(neighbor_list(batch.pos, batch.ptr, batch.cell, batch.pbc, cutoff)) == one_by_one(batch, cutoff)


def test_joint_lists_against_all_distances():
    generator = torch.Generator().manual_seed(1)
    sizes = [1, 7, 2, 30, 1, 12]
    owner = torch.repeat_interleave(torch.tensor(sizes))
    pos = 3.0 * torch.randn(len(owner), 3, generator=generator, dtype=torch.float64)
    batch = from_points(pos, owner)
    distance = torch.cdist(pos, pos)
    near = (distance < 2.2) & (owner[:, None] == owner) & ~torch.eye(len(owner), dtype=torch.bool)
    got = pairs(neighbor_list(batch.pos, batch.ptr, batch.cell, batch.pbc, 2.2))
    assert {(i, j) for i, j, *_ in got} == set(map(tuple, near.nonzero().tolist()))
    # The structures do overlap: without being moved apart they would see each other.
    assert len(got) < int((distance < 2.2).sum()) - len(owner)


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e300])
def test_coincident_atoms_are_found_among_equal_projections(scale):
    generator = torch.Generator().manual_seed(0)
    pos = scale * torch.randint(-3, 4, (60, 3), generator=generator).unique(dim=0).to(torch.float64)
    validate(from_points(pos))
    validate(from_points(torch.cat([pos, pos]), torch.repeat_interleave(torch.tensor([len(pos)] * 2))))
    with pytest.raises(InvalidInputError, match="coincident atoms: structure 0, atom 7 and structure 0, atom"):
        from_points(torch.cat([pos, pos[7:8]]))
