"""Copies of environments and structures against a breadth-first search written down plainly."""

from __future__ import annotations

import pytest
import torch
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.pet.edges import make_stages

from symmetrize import copies as module
from symmetrize import keys
from symmetrize.copies import (
    copied_sizes,
    copy_environments,
    copy_structures,
    count_environments,
    divide,
    edge_offsets,
    environment_sizes,
    gather_environments,
    reach,
)
from symmetrize.data import from_ase, validate, with_neighbors
from symmetrize.frames import FrameSet, Stratum
from symmetrize.testing.structures.geometries import ethanol, geometries

HOPS = (0, 1, 2, 3)


def graphs():
    """Structures of different kinds in one batch: finite, periodic in boxes smaller than the cutoff, lone atoms."""
    found = geometries()
    several = [ethanol(), found["rattled silicon"], found["isolated atom"], found["water"]]
    return {
        "one molecule": graph([ethanol()], 2.1),
        "images": graph([found["rattled silicon"]], 4.5),
        "several": graph(several, 2.6),
        "supercell": graph([found["rattled silicon"].repeat((2, 1, 2))], 2.9),
        "no edges": graph([found["isolated atom"], found["isolated atom"]], 2.0),
    }


def graph(structures, cutoff):
    return with_neighbors(validate(from_ase(structures)), cutoff)


def environment(batch, center, hops):
    """Atoms with the hop at which they are reached, and edges, in ascending order."""
    source, target = batch[keys.EDGE_INDEX]
    found, frontier, followed = {center: 0}, {center}, []
    for number in range(hops):
        edges = [e for atom in frontier for e in (target == atom).nonzero()[:, 0].tolist()]
        followed += edges
        frontier = set(source[edges].tolist()) - set(found)
        found |= dict.fromkeys(frontier, number + 1)
    return dict(sorted(found.items())), sorted(followed)


def problems(batch, centers, hops, got):
    """What is wrong with copies, as a list of words."""
    source, target = batch[keys.EDGE_INDEX]
    atoms, edges, atom_copy, edge_copy = [], [], [], []
    for number, center in enumerate(centers):
        found, followed = environment(batch, center, hops)
        atoms += found
        edges += followed
        atom_copy += [number] * len(found)
        edge_copy += [number] * len(followed)
    wrong = []
    wanted = {"atom": atoms, "edge": edges, "atom_copy": atom_copy, "edge_copy": edge_copy}
    wrong += [name for name, values in wanted.items() if getattr(got, name).tolist() != values]
    for name, ends in (("source", source), ("target", target)):
        row = getattr(got, name)
        if len(row) and int(row.max()) >= len(got.atom):
            wrong.append(name)
        elif got.atom[row].tolist() != ends[got.edge].tolist() or got.atom_copy[row].tolist() != got.edge_copy.tolist():
            wrong.append(name)
    if got.center.tolist() != [atom == centers[copy] for atom, copy in zip(atoms, atom_copy, strict=True)]:
        wrong.append("center")
    return wrong


def draw(batch, n, seed):
    """Centers with repetitions, in any order, as frames of a chunk have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(batch[keys.POS].shape[0], (n,), generator=generator)


@pytest.mark.parametrize("hops", HOPS)
@pytest.mark.parametrize("name", graphs())
def test_environments_are_those_of_a_plain_search(name, hops):
    batch = graphs()[name]
    for seed, n in ((0, 1), (1, 7), (2, 40)):
        centers = draw(batch, n, seed)
        got = copy_environments(batch, edge_offsets(batch), centers, hops)
        assert problems(batch, centers.tolist(), hops, got) == []
    none = copy_environments(batch, edge_offsets(batch), centers[:0], hops)
    assert [len(field) for field in none] == [0] * 7


@pytest.mark.parametrize("hops", HOPS)
@pytest.mark.parametrize("seed", range(4))
def test_environments_of_random_graphs(seed, hops):
    """Any graph, not only those of points in space: directed, with several edges between two atoms, with loops."""
    generator = torch.Generator().manual_seed(seed)
    n_atoms, n_edges = 30, (0, 20, 60, 200)[seed]
    edges = torch.randint(n_atoms, (2, n_edges), generator=generator)
    batch = from_ase([ethanol()]).clone()
    batch[keys.POS] = torch.zeros(n_atoms, 3)
    batch[keys.EDGE_INDEX] = edges[:, torch.argsort(edges[1], stable=True)]
    centers = draw(batch, 12, seed)
    got = copy_environments(batch, edge_offsets(batch), centers, hops)
    assert problems(batch, centers.tolist(), hops, got) == []


def test_the_comparison_sees_faults(monkeypatch):
    batch = graphs()["several"]
    centers = draw(batch, 9, 0)

    def wrong(hops=2):
        return problems(batch, centers.tolist(), hops, copy_environments(batch, edge_offsets(batch), centers, hops))

    def impatient(edge_index, edge_ptr, n_atoms, owners, hops):
        shells = reach(edge_index, edge_ptr, n_atoms, owners, hops - 1)
        return [shells[0], *shells]

    def forgetful(edge_index, edge_ptr, n_atoms, owners, hops):
        return [pairs[:-1] for pairs in reach(edge_index, edge_ptr, n_atoms, owners, hops)]

    def overdone(edge_index, edge_ptr, n_atoms, owners, hops):
        shells = reach(edge_index, edge_ptr, n_atoms, owners, hops)
        return [*shells[:-2], shells[-1], shells[-1]]

    assert wrong() == []
    for fault in (impatient, forgetful, overdone):
        with monkeypatch.context() as patch:
            patch.setattr(module, "reach", fault)
            assert wrong() != [], fault.__name__
    plain = gather_environments

    def unshifted(edge_index, edge_ptr, n_atoms, centers, hops):
        atom, edge, atom_copy, edge_copy, source, target = plain(edge_index, edge_ptr, n_atoms, centers, hops)
        return atom, edge, atom_copy, edge_copy, source.remainder(7), target

    with monkeypatch.context() as patch:
        patch.setattr(module, "gather_environments", unshifted)
        assert wrong() == ["source"]


@pytest.mark.parametrize("block", [1, 50, 1000, 10**6])
@pytest.mark.parametrize("hops", HOPS)
def test_sizes_are_exact_without_making_copies(hops, block):
    batch = graphs()["several"]
    degree = torch.bincount(batch[keys.EDGE_INDEX][1], minlength=len(batch[keys.POS])).tolist()
    everyone = torch.arange(len(batch[keys.POS]))
    arguments = (batch[keys.EDGE_INDEX], edge_offsets(batch), len(everyone), everyone, hops)
    atoms, edges, nested = (values.tolist() for values in count_environments(*arguments, block=block))
    for atom in everyone.tolist():
        found, followed = environment(batch, atom, hops)
        assert (atoms[atom], edges[atom]) == (len(found), len(followed))
        layers = [sum(degree[a] for a, hop in found.items() if hop <= hops - k) for k in range(1, hops + 1)]
        assert nested[atom] == sum(layers)


@pytest.mark.parametrize("name", graphs())
def test_sizes_that_chunks_are_cut_by(name):
    batch = graphs()[name]
    owners = draw(batch, 20, 0)
    for hops in HOPS:
        sizes = copied_sizes(batch, owners, "atom", hops).tolist()
        exact = [len(environment(batch, atom, hops)[0]) for atom in owners.tolist()]
        # One hop counts images one by one.
        assert all(s >= e for s, e in zip(sizes, exact, strict=True)) if hops == 1 else sizes == exact
        every = environment_sizes(batch[keys.EDGE_INDEX], batch[keys.PTR], batch[keys.BATCH], hops)
        assert every[owners].tolist() == sizes


def test_the_functions_are_scriptable():
    batch = graphs()["several"]
    arguments = (batch[keys.EDGE_INDEX], edge_offsets(batch), len(batch[keys.POS]), draw(batch, 9, 0), 2)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(gather_environments)
        sizes = torch.jit.script(environment_sizes)
    for got, expected in zip(scripted(*arguments), gather_environments(*arguments), strict=True):
        assert torch.equal(got, expected)
    rest = (batch[keys.EDGE_INDEX], batch[keys.PTR], batch[keys.BATCH], 2)
    assert torch.equal(sizes(*rest), environment_sizes(*rest))


def test_structures_are_copied_whole():
    batch = graphs()["several"]
    structures = torch.tensor([3, 0, 0, 2, 1])
    got = copy_structures(batch, edge_offsets(batch), structures)
    ptr, (source, target) = batch[keys.PTR], batch[keys.EDGE_INDEX]
    for copy, structure in enumerate(structures.tolist()):
        assert got.atom[got.atom_copy == copy].tolist() == list(range(ptr[structure], ptr[structure + 1]))
        edges = (batch[keys.BATCH][target] == structure).nonzero()[:, 0]
        assert got.edge[got.edge_copy == copy].tolist() == edges.tolist()
    assert torch.equal(got.atom[got.source], source[got.edge]) and torch.equal(got.atom[got.target], target[got.edge])
    assert torch.equal(got.atom_copy[got.source], got.edge_copy) and bool(got.center.all())


def test_an_environment_is_looked_for_once_for_all_frames_of_its_owner(monkeypatch):
    """Frames of one owner, mirrors included, are neighbors in a chunk, whatever their order in the set."""
    batch = graph([ethanol()] * 3, 2.6)
    n = len(batch[keys.POS])
    owner = torch.randperm(4 * n, generator=torch.Generator().manual_seed(0)) % n
    frames = FrameSet(
        rotations=torch.eye(3, dtype=torch.float64).expand(4 * n, 3, 3),
        weights=torch.ones(4 * n, dtype=torch.float64),
        owner=owner,
        stratum=torch.full_like(owner, int(Stratum.FRAME)),
        origins=batch[keys.POS][owner],
        n_owners=n,
        scope="atom",
    )
    searched = []

    def counted(edge_index, edge_ptr, n_atoms, owners, hops):
        searched.append(len(owners))
        return reach(edge_index, edge_ptr, n_atoms, owners, hops)

    parts = [frame for frame, _, _ in divide(batch, frames, 2, 40)]
    assert sorted(torch.cat(parts).tolist()) == list(range(4 * n)) and len(parts) > 5
    monkeypatch.setattr(module, "reach", counted)
    for frame in parts:
        copy_environments(batch, edge_offsets(batch), owner[frame], 2)
    # An owner is searched again only where a chunk ends between its frames.
    assert n <= sum(searched) < n + len(parts)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_deep_layers_see_what_the_centers_depend_on(n_layers):
    """PET narrows its rows block by block: the last one evaluates centers only, the one before their neighbors, ..."""
    batch = graphs()["supercell"]
    centers = torch.arange(0, len(batch[keys.POS]), 5)
    got = copy_environments(batch, edge_offsets(batch), centers, n_layers)
    stages = make_stages(got.center, got.source, got.target, n_layers - 1)
    everyone = batch[keys.EDGE_INDEX], edge_offsets(batch), len(batch[keys.POS]), centers
    for number, stage in enumerate(stages):
        atoms = count_environments(*everyone, n_layers - 1 - number)[0]
        edges = count_environments(*everyone, n_layers - number)[1]
        assert (len(stage.atom), len(stage.edge)) == (int(atoms.sum()), int(edges.sum()))
    assert len(stages[-1].atom) == len(centers)
    assert sum(len(stage.edge) for stage in stages) == int(count_environments(*everyone, n_layers)[2].sum())
    config = PETConfig(atomic_types=(14,), cutoff=2.9, num_gnn_layers=n_layers, d_pet=4, d_node=4, d_head=4)
    assert PET(config, seed=0).network.n_exchanges == n_layers - 1
