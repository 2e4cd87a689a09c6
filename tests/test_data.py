"""Batches: conversion, validation, neighbor lists against a sum over images, edge vectors, collation."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import edge_vectors, from_ase, from_points, replace, validate, with_neighbors
from symmetrize.errors import InvalidInputError, InvalidTypeError
from symmetrize.testing.structures.geometries import ethanol, geometries

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
DTYPES = (torch.float64, torch.float32)


# --- a neighbor list that is obviously right ------------------------------------------------------------------------


def images_in_reach(atoms, cutoff):
    """Numbers of images along each vector beyond which nothing is within the cutoff, by the heights of the cell."""
    vectors = atoms.cell.array[atoms.pbc]
    counts = np.zeros(3, dtype=int)
    if len(vectors):
        diameter = max(np.linalg.norm(a - b) for a in atoms.positions for b in atoms.positions)
        inverse_heights = np.linalg.norm(np.linalg.pinv(vectors), axis=0)
        counts[atoms.pbc] = np.ceil((cutoff + diameter) * inverse_heights).astype(int)
    return counts


def brute_force(atoms, cutoff):
    """All (center, neighbor, shift) with a distance up to the cutoff, and all distances met on the way."""
    counts = images_in_reach(atoms, cutoff)
    shifts = np.array(list(itertools.product(*[range(-n, n + 1) for n in counts])))
    translations = shifts @ atoms.cell.array
    found, distances = set(), []
    for i, j in itertools.product(range(len(atoms)), repeat=2):
        d = np.linalg.norm(atoms.positions[j] + translations - atoms.positions[i], axis=1)
        for shift, length in zip(shifts, d, strict=True):
            if i == j and not shift.any():
                continue
            distances.append(length)
            if length <= cutoff:
                found.add((i, j, *shift.tolist()))
    return found, np.array(distances)


def as_set(batch, structure):
    """Edges of one structure in the same form; an edge listed twice is an error."""
    first = int(batch.ptr[structure])
    rows = [
        (int(c) - first, int(n) - first, *shift.tolist())
        for n, c, shift in zip(*batch.edge_index, batch.cell_shift, strict=True)
        if int(batch.batch[c]) == structure
    ]
    assert len(set(rows)) == len(rows)
    return set(rows)


@st.composite
def structures(draw):
    """Any cell (very skewed, left-handed), any periodicity, atoms far outside the cell."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n = draw(st.integers(1, 4))
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    cell = np.diag(rng.uniform(1.8, 4.5, 3)) + rng.normal(0, 0.3, (3, 3))
    skew = np.eye(3)
    skew[1, 0], skew[2, 0], skew[2, 1] = draw(st.tuples(*[st.integers(-3, 3)] * 3))
    cell = skew @ cell
    if draw(st.booleans()):
        cell[[0, 1]] = cell[[1, 0]]
    if draw(st.booleans()):
        cell[~np.array(pbc)] = 0.0  # as in files of slabs and wires
    positions = rng.uniform(-1.0, 1.0, (n, 3)) * draw(st.sampled_from([2.0, 6.0]))
    return Atoms(numbers=rng.integers(1, 9, n), positions=positions, cell=cell, pbc=pbc)


@PROPERTY
@given(st.lists(structures(), min_size=1, max_size=3), st.sampled_from([1.1, 2.7, 4.0]))
def test_neighbor_list_is_the_sum_over_images(items, cutoff):
    expected = []
    for atoms in items:
        edges, distances = brute_force(atoms, cutoff)
        assume(len(distances) == 0 or (distances.min() > 1e-3 and np.abs(distances - cutoff).min() > 1e-7))
        expected.append(edges)
    batch = from_ase(items, cutoff=cutoff)
    for s, edges in enumerate(expected):
        assert as_set(batch, s) == edges
    assert bool((batch.edge_index[1, 1:] >= batch.edge_index[1, :-1]).all()), "sorted by center"


def test_cutoffs_beyond_the_cell_hold_images_of_the_atom_itself():
    """The twin: the property above meets self-images, several images of one pair, and atoms without neighbors."""
    atoms = Atoms("C", positions=[[7.0, -9.0, 0.1]], cell=[[1.5, 0, 0], [4.4, 1.6, 0], [0, 3.1, 1.4]], pbc=True)
    edges, _ = brute_force(atoms, 4.0)
    batch = from_ase([atoms, Atoms("H")], cutoff=4.0)
    assert as_set(batch, 0) == edges and len(edges) > 50
    assert as_set(batch, 1) == set()


@pytest.mark.parametrize("name", ["slab", "wire", "triclinic crystal", "diamond", "linear chain"])
def test_named_periodic_structures_have_all_their_neighbors(name):
    atoms = geometries()[name]
    edges, distances = brute_force(atoms, 4.0)
    assert np.abs(distances - 4.0).min() > 1e-9
    assert as_set(from_ase(atoms, cutoff=4.0), 0) == edges


def test_periodicity_matters_direction_by_direction():
    atoms = geometries()["triclinic crystal"]
    sizes = set()
    for pbc in itertools.product([False, True], repeat=3):
        atoms.pbc = pbc
        edges, _ = brute_force(atoms, 5.5)
        assert as_set(from_ase(atoms, cutoff=5.5), 0) == edges
        sizes.add(frozenset(edges))
    assert len(sizes) == 8, "all eight are different structures"


# --- edge vectors ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(structures(), min_size=1, max_size=3))
def test_edge_vectors_follow_the_formula(items):
    for atoms in items:
        assume(brute_force(atoms, 3.0)[1].min(initial=1.0) > 1e-3)
    batch = from_ase(items, cutoff=3.0)
    neighbor, center = batch.edge_index
    cells = batch.cell[batch.batch[center]]
    rows = [
        batch.pos[n] + s.to(torch.float64) @ h - batch.pos[c]
        for n, c, s, h in zip(neighbor, center, batch.cell_shift, cells, strict=True)
    ]
    expected = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)
    assert torch.allclose(batch.edge_vec, expected, rtol=0, atol=1e-12)
    # Every edge has its reverse, and that is exactly opposite: no rounding breaks the symmetry of a pair.
    key = {
        (int(n), int(c), *s.tolist()): v
        for n, c, s, v in zip(neighbor, center, batch.cell_shift, batch.edge_vec, strict=True)
    }
    for (n, c, *s), v in key.items():
        assert torch.equal(key[(c, n, *[-x for x in s])], -v)


def test_edge_vectors_are_differentiable_twice_in_positions_and_cell():
    batch = from_ase([geometries()["triclinic crystal"], ethanol()], cutoff=3.0)

    def scalars(pos, cell):
        vectors = edge_vectors(replace(batch, pos=pos, cell=cell))
        return torch.sin(vectors).sum(), vectors.square().sum(dim=1).mean()

    inputs = (batch.pos.clone().requires_grad_(), batch.cell.clone().requires_grad_())
    assert torch.autograd.gradcheck(scalars, inputs)
    assert torch.autograd.gradgradcheck(scalars, inputs)
    for gradient in torch.autograd.grad(scalars(*inputs)[1], inputs):
        assert float(gradient.abs().max()) > 1e-3, "depends on both"


# --- lists that come with the batch ---------------------------------------------------------------------------------


def given_list(atoms, radius, keep=None, **changes):
    """A batch whose neighbor list is somebody else's, in random order and without edge vectors."""
    batch = from_ase(atoms, cutoff=radius)
    order = torch.randperm(batch.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
    order = order if keep is None else order[keep(batch)[order]]
    fields = {keys.EDGE_INDEX: batch.edge_index[:, order], keys.CELL_SHIFT: batch.cell_shift[order]}
    return replace(batch, **{**fields, keys.EDGE_VEC: None, **changes})


def sorted_vectors(batch):
    rows = torch.cat([batch.edge_index[1][:, None], batch.edge_index[0][:, None], batch.cell_shift], dim=1)
    order = np.lexsort(rows.T.numpy()[::-1])
    return rows[order], batch.edge_vec[order]


@pytest.mark.parametrize("name", ["ethanol", "triclinic crystal", "slab"])
def test_a_list_with_a_skin_is_filtered_to_the_cutoff(name):
    atoms = geometries()[name]
    skin = given_list(atoms, 4.7)
    used, fresh = with_neighbors(validate(skin), 3.3), from_ase(atoms, cutoff=3.3)
    for a, b in zip(sorted_vectors(used), sorted_vectors(fresh), strict=True):
        assert torch.equal(a, b)
    assert skin.edge_index.shape[1] > used.edge_index.shape[1] > 0
    assert used.edge_cutoff == 3.3


def test_a_list_that_is_long_enough_has_to_be_complete_and_one_that_is_short_is_rebuilt():
    """A missing pair is what moving the atoms after building the list leaves behind."""

    def without_first_pair(batch):
        n, c = batch.edge_index
        return ~(((n == 0) & (c == 1)) | ((n == 1) & (c == 0)))

    full = from_ase(ethanol(), cutoff=3.0).edge_index.shape[1]
    marked = given_list(ethanol(), 3.0, without_first_pair)
    with pytest.raises(InvalidInputError, match="structure 0, atom 0; rebuild"):
        with_neighbors(validate(marked), 3.0)
    assert with_neighbors(validate(given_list(ethanol(), 2.0)), 3.0).edge_index.shape[1] == full


def test_a_list_of_unknown_radius_is_rebuilt():
    short = given_list(ethanol(), 1.2, edge_cutoff=None)
    used = with_neighbors(validate(short), 3.0)
    assert used.edge_index.shape[1] == from_ase(ethanol(), cutoff=3.0).edge_index.shape[1] > short.edge_index.shape[1]


def test_a_radius_that_is_not_a_number_is_not_trusted():
    nan = given_list(ethanol(), 1.2, edge_cutoff=float("nan"))
    try:
        used = with_neighbors(validate(nan), 3.0)
    except InvalidInputError:
        return
    assert used.edge_index.shape[1] == from_ase(ethanol(), cutoff=3.0).edge_index.shape[1]


def test_lists_of_different_radii_in_one_batch():
    """``edge_cutoff`` may be one radius per structure, as collating makes it."""
    both = from_ase([ethanol(), ethanol()], cutoff=5.0)
    length = both.edge_vec.norm(dim=1)
    keep = (both.batch[both.edge_index[1]] == 1) | (length <= 3.0)
    mixed = replace(
        both,
        edge_index=both.edge_index[:, keep],
        cell_shift=both.cell_shift[keep],
        edge_vec=None,
        edge_cutoff=torch.tensor([3.0, 5.0], dtype=torch.float64),
    )
    used, fresh = with_neighbors(validate(mixed), 3.0), from_ase([ethanol(), ethanol()], cutoff=3.0)
    for a, b in zip(sorted_vectors(used), sorted_vectors(fresh), strict=True):
        assert torch.equal(a, b)


def test_a_stale_list_is_refused_where_it_is_stale():
    batch = given_list([Atoms("H"), ethanol()], 3.0)
    moved = batch.pos.clone()
    moved[3] += torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"edge_cutoff = 3\.0.*structure 1, atom.*rebuild") as error:
        with_neighbors(validate(replace(batch, pos=moved)), 3.0)
    assert "length" in str(error.value)
    with_neighbors(validate(batch), 3.0)


def test_a_half_list_is_refused():
    half = given_list(ethanol(), 3.0, lambda batch: batch.edge_index[0] < batch.edge_index[1])
    with pytest.raises(InvalidInputError, match=r"full neighbor list.*structure 0, atom"):
        with_neighbors(validate(half), 3.0)


def test_a_half_list_in_which_every_atom_is_as_often_source_as_target_is_refused():
    """Edges around a ring in one sense: counting ends does not see that the reverse edges are missing."""
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.8, 0.0]], dtype=torch.float64)
    ring = Data(pos=pos, edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]), edge_cutoff=3.0)
    with pytest.raises(InvalidInputError):
        with_neighbors(validate(ring), 3.0)


def test_an_edge_given_twice_is_refused():
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    double = Data(pos=pos, edge_index=torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]), edge_cutoff=3.0)
    with pytest.raises(InvalidInputError):
        with_neighbors(validate(double), 3.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"edge_index": torch.tensor([[0, 9], [9, 0]])}, "pair across structures"),
        ({"edge_index": torch.tensor([[0, 99], [99, 0]])}, "expected atoms 0 to 17"),
        ({"edge_index": torch.tensor([[0, -1], [-1, 0]])}, "expected atoms 0 to 17"),
        ({"edge_index": torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)}, "int64"),
        ({"edge_index": torch.tensor([[0, 1, 1]])}, r"shape \(2, n_edges\)"),
        ({"edge_index": torch.tensor([[0, 1], [1, 0]]), "cell_shift": torch.zeros(3, 3)}, "cell_shift"),
    ],
)
def test_impossible_lists_are_refused(changes, message):
    batch = from_ase([ethanol(), ethanol()], cutoff=3.0)
    fields = {keys.CELL_SHIFT: None, keys.EDGE_VEC: None, **changes}
    with pytest.raises(InvalidInputError, match=message):
        with_neighbors(validate(replace(batch, **fields)), 3.0)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan")])
def test_cutoffs_are_positive(cutoff):
    with pytest.raises(InvalidInputError, match="cutoff"):
        from_ase(ethanol(), cutoff=cutoff)


def test_own_lists_in_single_precision_are_accepted_again():
    """Edges of exactly the cutoff across the boundary of a large cell: rounding must not make our own list stale."""
    rng, side, cutoff = np.random.default_rng(0), 300.0, 3.0
    pairs = []
    for _ in range(60):
        first = rng.uniform(0, 1, 3) * [1.0, side, side]
        pairs.append(Atoms("CO", positions=[first, first + [side - cutoff, 0, 0]], cell=[side] * 3, pbc=True))
    batch = from_ase(pairs, cutoff=cutoff, dtype=torch.float32)
    assert batch.edge_index.shape[1] > 20, "some pairs are inside"
    again = with_neighbors(validate(batch), cutoff)
    assert again.edge_index.shape[1] <= batch.edge_index.shape[1]


# --- conversion and validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_ase_keeps_every_number(dtype):
    items = [ethanol(), geometries()["slab"], Atoms("H")]
    batch = from_ase(items, dtype=dtype)
    assert batch.ptr.tolist() == [0, 9, 13, 14] and batch.pos.dtype == batch.cell.dtype == dtype
    assert batch.batch.tolist() == [0] * 9 + [1] * 4 + [2]
    for s, atoms in enumerate(items):
        mine = batch.batch == s
        assert torch.equal(batch.pos[mine], torch.as_tensor(atoms.positions).to(dtype))
        assert torch.equal(batch.cell[s], torch.as_tensor(atoms.cell.array).to(dtype))
        assert batch.z[mine].tolist() == atoms.numbers.tolist() and batch.pbc[s].tolist() == atoms.pbc.tolist()
    single = from_ase(ethanol(), dtype=dtype)
    assert single.ptr.tolist() == [0, 9] and torch.equal(single.pos, batch.pos[:9])
    assert from_ase(iter(items)).ptr.tolist() == batch.ptr.tolist()


def test_from_ase_owns_its_memory():
    atoms = ethanol()
    batch = from_ase(atoms, cutoff=3.0)
    positions, numbers = atoms.positions.copy(), atoms.numbers.copy()
    batch.pos += 1.0
    batch.z += 1
    batch.cell += 1.0
    assert np.array_equal(atoms.positions, positions) and np.array_equal(atoms.numbers, numbers)
    assert not atoms.cell.array.any()


@PROPERTY
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10**6))
def test_from_points_is_from_ase_without_chemistry(counts, seed):
    rng = np.random.default_rng(seed)
    items = [Atoms(f"C{n}", positions=rng.normal(0, 2, (n, 3))) for n in counts]
    expected = from_ase(items, cutoff=2.5)
    feature = torch.as_tensor(rng.normal(size=(sum(counts), 2)))
    batch = from_points(expected.pos, batch=expected.batch, cutoff=2.5, x=feature, z=expected.z)
    for name in (keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC, keys.EDGE_INDEX, keys.EDGE_VEC, keys.Z):
        assert torch.equal(batch[name], expected[name]), name
    assert torch.equal(batch.x, feature)


def test_from_points_makes_one_cloud_by_default():
    pos = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert from_points(pos).ptr.tolist() == [0, 5]


def test_validate_adds_what_is_missing_and_nothing_else():
    pos = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = Data(pos=pos, note="kept")
    out = validate(data)
    assert sorted(data.keys()) == ["note", "pos"], "the input is left alone"
    assert out.pos is pos and out.note == "kept", "a shallow copy"
    assert out.batch.tolist() == [0] * 5 and out.ptr.tolist() == [0, 5]
    assert not out.pbc.any() and not out.cell.any() and out.cell.shape == (1, 3, 3)
    again = validate(out)
    for name in (keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC):
        assert torch.equal(again[name], out[name])


# --- collation ------------------------------------------------------------------------------------------------------


def single(atoms, cutoff=None):
    """One structure as users of torch_geometric write it."""
    data = Data(
        pos=torch.as_tensor(atoms.positions),
        z=torch.as_tensor(atoms.numbers),
        cell=torch.as_tensor(atoms.cell.array)[None],
        pbc=torch.as_tensor(atoms.pbc)[None],
    )
    if cutoff is not None:
        edges = from_ase(atoms, cutoff=cutoff)
        data.edge_index, data.cell_shift, data.edge_cutoff = edges.edge_index, edges.cell_shift, cutoff
    return data


@pytest.mark.parametrize("cutoff", [None, 3.0])
def test_collated_data_equals_from_ase(cutoff):
    items = [ethanol(), geometries()["slab"], Atoms("H"), geometries()["triclinic crystal"]]
    collated = Batch.from_data_list([single(atoms, cutoff) for atoms in items])
    out, expected = with_neighbors(validate(collated), 3.0), from_ase(items, cutoff=3.0)
    for name in (keys.POS, keys.Z, keys.BATCH, keys.PTR, keys.CELL, keys.PBC):
        assert torch.equal(out[name], expected[name]), name
    for a, b in zip(sorted_vectors(out), sorted_vectors(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("field, shape", [("cell", (3, 3)), ("pbc", (3,))])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_wrongly_collated_cells_are_refused_with_a_hint(field, shape, n):
    items = [single(geometries()["slab"]) for _ in range(n)]
    for data in items:
        data[field] = data[field].reshape(shape)
    with pytest.raises(InvalidInputError, match=rf"{field}: expected shape \({n}, 3.*\(1, 3, 3\).*\(1, 3\)"):
        validate(Batch.from_data_list(items))


# --- nothing is mutated ---------------------------------------------------------------------------------------------


def test_neighbors_are_put_on_a_copy():
    batch = given_list([ethanol(), geometries()["slab"]], 4.0)
    before = {name: copy.deepcopy(batch[name]) for name in batch.keys()}
    out = with_neighbors(validate(batch), 3.0)
    assert sorted(batch.keys()) == sorted(before) and keys.EDGE_VEC not in before
    for name, value in before.items():
        same = torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
        assert same, name
    assert out.edge_index.shape[1] != batch.edge_index.shape[1]


def test_kinds_are_checked_first():
    with pytest.raises(InvalidTypeError, match="torch_geometric"):
        validate({"pos": torch.zeros(1, 3)})
    with pytest.raises(InvalidTypeError, match=r"structure 1: expected ase\.Atoms, got str"):
        from_ase([ethanol(), "ethanol"])


def test_charges_and_spins_travel_along():
    from ase.build import molecule

    plain, ion, radical = molecule("H2O"), molecule("NH3"), molecule("CH4")
    assert not {"charge", "spin_multiplicity", "initial_charges", "initial_magmoms"} & set(from_ase([plain]).keys())
    ion.set_initial_charges([1.0, 0.0, 0.0, 0.0])
    ion.info["charge"] = 1
    radical.set_initial_magnetic_moments([1.0, 0.0, 0.0, 0.0, 0.0])
    radical.info["spin"] = 2
    batch = from_ase([plain, ion, radical])
    assert batch.charge.tolist() == [0.0, 1.0, 0.0] and batch.spin_multiplicity.tolist() == [1.0, 1.0, 2.0]
    assert batch.initial_charges.tolist() == [0.0] * 3 + [1.0] + [0.0] * 8
    assert batch.initial_magmoms.tolist() == [0.0] * 7 + [1.0] + [0.0] * 4
    ion.info["charge"] = "+1"
    with pytest.raises(InvalidInputError, match=r"charge: structure 1: expected a number in atoms\.info, got '\+1'"):
        from_ase([plain, ion])
