"""Predictions of a plan against what the evaluator then does, and what it says about expensive evaluations."""

from __future__ import annotations

import warnings
from dataclasses import replace as changed

import pytest
import torch
from symmetrize.backbones.pet import PET, PETConfig, network
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from torch.utils._python_dispatch import TorchDispatchMode

from symmetrize import ECSE, GroupAveraging, Symmetrizer, forecast, from_ase, from_points, keys
from symmetrize import plan as plan_module
from symmetrize.errors import CostWarning
from symmetrize.testing.structures.geometries import ethanol, geometries

CUTOFF = 2.6


class Calls:
    """What a backbone was called with."""

    def __init__(self):
        self.copies, self.atoms, self.edges = [], [], []

    def add(self, copies, atoms, edges):
        self.copies.append(copies)
        self.atoms.append(atoms)
        self.edges.append(edges)


class Plain(ToyLocal):
    """Called with batches of copies."""

    def forward(self, batch):
        self.calls.add(len(batch[keys.PTR]) - 1, len(batch[keys.POS]), batch[keys.EDGE_INDEX].shape[1])
        return super().forward(batch)


class Sharing(PET):
    """Called with copies of what it prepared."""

    def forward_frames(self, cache, edge_vec, copies=None):
        self.calls.add(int(copies.center.sum()), len(copies.atom), len(copies.edge))
        return super().forward_frames(cache, edge_vec, copies)


def plain(hops):
    backbone = Plain(cutoff=CUTOFF, n_hops=hops, width=6)
    backbone.calls = Calls()
    return backbone


def sharing(hops, cutoff=CUTOFF):
    sizes = dict(d_pet=6, d_node=6, d_head=6, d_feedforward=6, num_heads=1)
    config = PETConfig((1, 6, 7, 8, 14), cutoff=cutoff, cutoff_width=1.0, num_gnn_layers=hops, **sizes)
    backbone = Sharing(config, seed=0).double()
    backbone.calls = Calls()
    return backbone


def rattled(atoms, seed=0):
    """Without symmetry: the evaluator evaluates what looks the same only once, and a plan counts it every time."""
    atoms.rattle(0.05, seed=seed)
    return atoms


def molecules():
    return from_ase([rattled(ethanol(), 1), rattled(ethanol(), 2), geometries()["isolated atom"]])


def crystal():
    return from_ase([rattled(geometries()["rattled silicon"].repeat((2, 2, 2)))])


def degenerate():
    return from_ase([ethanol(), *geometries("collinear").values(), geometries()["isolated atom"]])


def explained(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)
        return model.explain(batch)


@pytest.mark.parametrize("make", [plain, sharing])
@pytest.mark.parametrize("batch", [molecules, crystal])
@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 200])
def test_copies_in_atom_scope_are_those_predicted(make, batch, hops, chunk_size):
    model = Symmetrizer(make(hops), ECSE(), scope="atom", chunk_size=chunk_size)
    plan = explained(model, batch())
    calls = model.backbone.calls
    assert calls.copies == [], "a prediction, without evaluating"
    with torch.no_grad():
        model(batch())
    # Frames whose weight is being switched off are evaluated, and not counted.
    assert (sum(plan.strata.values()), plan.n_chunks) == (sum(calls.copies), len(calls.copies))
    assert plan.n_evaluations == model.frames(batch()).n_evaluations <= sum(calls.copies)
    assert (plan.copied_atoms, plan.copied_edges) == (sum(calls.atoms), sum(calls.edges))
    largest = max(a + e for a, e in zip(calls.atoms, calls.edges, strict=True))
    assert plan.call_ratio == largest / (plan.n_atoms + plan.n_edges)
    assert plan.exact and plan.hops == hops


@pytest.mark.parametrize("make", [plain, sharing])
def test_copies_in_structure_scope_are_those_predicted(make):
    model = Symmetrizer(make(2), ECSE(), scope="structure", chunk_size=40)
    batch = from_ase([rattled(ethanol(), 1), rattled(ethanol(), 2)])
    plan = model.explain(batch)
    calls = model.backbone.calls
    model(batch)
    assert (plan.n_chunks, plan.copied_atoms, plan.copied_edges) == (
        len(calls.atoms),
        sum(calls.atoms),
        sum(calls.edges),
    )
    assert plan.hops is None and plan.layer_ratio == plan.edge_ratio == plan.copied_edges / plan.n_edges


def test_only_wanted_centers_are_counted():
    batch = molecules()
    batch[keys.CENTER_MASK] = torch.arange(len(batch[keys.POS])) % 3 == 0
    model = Symmetrizer(sharing(2), ECSE(), scope="atom")
    plan = explained(model, batch)
    model(batch)
    calls = model.backbone.calls
    assert (plan.copied_atoms, plan.copied_edges) == (sum(calls.atoms), sum(calls.edges))
    assert plan.n_owners == int(batch[keys.CENTER_MASK].sum())


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_the_work_of_layers_that_narrow_is_that_of_pet(hops, monkeypatch):
    rows = []

    def counted(*arguments):
        stages = plain_stages(*arguments)
        rows.append([len(stage.edge) for stage in stages])
        return stages

    plain_stages = network.make_stages
    monkeypatch.setattr(network, "make_stages", counted)
    model = Symmetrizer(sharing(hops), ECSE(), scope="atom")
    batch = crystal()
    plan = explained(model, batch)
    with torch.no_grad():
        model(batch)
    assert plan.layer_ratio == pytest.approx(sum(map(sum, rows)) / (hops * plan.n_edges), rel=1e-12)
    assert plan.edge_ratio == pytest.approx(sum(stages[0] for stages in rows) / plan.n_edges, rel=1e-12)
    assert (plan.layer_ratio < plan.edge_ratio) == (hops > 1)


def test_the_comparison_sees_a_wrong_number_of_hops():
    """The twin of the tests above."""
    model = Symmetrizer(sharing(3), ECSE(), scope="atom")
    shallow = explained(Symmetrizer(sharing(2), ECSE(), scope="atom"), crystal())
    with torch.no_grad():
        model(crystal())
    assert shallow.copied_edges != sum(model.backbone.calls.edges)


@pytest.mark.parametrize("hops", [1, 2])
def test_counting_in_blocks_changes_nothing(hops, monkeypatch):
    model = Symmetrizer(sharing(hops), ECSE(), scope="atom")
    for batch in (crystal(), degenerate()):
        whole = explained(model, batch)
        with monkeypatch.context() as patch:
            patch.setattr(forecast, "BLOCK", 30)
            found = list(make(model, batch).blocks)
            assert len(found) > 2 and sum(map(int, map(torch.sum, found))) == len(batch[keys.POS])
            blocks = explained(model, batch)
        # Calls are cut block by block.
        assert changed(blocks, n_chunks=0, call_ratio=0.0, effective_mean=0.0) == changed(
            whole, n_chunks=0, call_ratio=0.0, effective_mean=0.0
        )
        assert blocks.effective_mean == pytest.approx(whole.effective_mean)


def make(model, batch):
    around = model._surroundings(model._with_edges(model._checked(batch)))
    return forecast.make_forecast(model.method, around, model.scope, model._found)


# --- warnings -------------------------------------------------------------------------------------------------------


def test_deep_networks_in_dense_matter_are_announced():
    batch = crystal()
    deep = Symmetrizer(sharing(2, cutoff=5.0), ECSE(), scope="atom")
    with pytest.warns(CostWarning, match="2 hops of message passing copy") as caught:
        plan = deep.explain(batch)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert plan.layer_ratio > 50 and "GroupAveraging" in plan.warnings[0] and plan.warnings[0] in str(plan)
    # Neither does a strictly local network warn, nor the evaluation itself.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Symmetrizer(sharing(1, cutoff=5.0), ECSE(), scope="atom").explain(batch).warnings == ()
        batch[keys.CENTER_MASK] = torch.arange(len(batch[keys.POS])) < 1
        deep(batch)


def test_environments_that_hold_the_structure_are_announced(monkeypatch):
    monkeypatch.setattr(plan_module, "NOTABLE", 1.0)
    batch = from_ase([geometries()["water"], ethanol()])
    with pytest.warns(CostWarning, match="% of its structure: scope='structure' evaluates .* as exact"):
        Symmetrizer(sharing(2), ECSE(), scope="atom").explain(batch)
    assert Symmetrizer(sharing(2), ECSE(), scope="structure").explain(batch).warnings == ()


def cloud(n, radius=1.0):
    """Points near a sphere: thousands at nearly the same distance from the centroid."""
    generator = torch.Generator().manual_seed(n)
    points = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    shell = 1.0 + 0.3 * torch.rand(n, 1, dtype=torch.float64, generator=generator)
    return from_points(radius * shell * points / points.norm(dim=1, keepdim=True))


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= one.numel():
                self.numel = max(self.numel, one.numel())
        return out


def test_a_dense_cloud_is_announced_and_not_tried():
    model = Symmetrizer(ToyGlobal(width=4), ECSE())
    n = 10000
    with Largest() as most, pytest.warns(CostWarning, match="evaluations per structure.*cutoff_width.*Anchored"):
        plan = model.explain(cloud(n))
    assert not plan.exact and plan.n_evaluations > 50 and "about" in str(plan)
    assert plan.copied_atoms == n * plan.n_evaluations
    # Far less than what is predicted for making the frames, which of fewer points is made.
    assert 8 * most.numel < plan.frame_bytes / 10
    with Largest() as most:
        assert explained(model, cloud(100)).exact
    assert most.numel > 1000


@pytest.mark.parametrize("radius", [0.3, 2.0])
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_estimates_are_near_what_is_counted(radius, group, monkeypatch):
    model = Symmetrizer(ToyGlobal(width=4), ECSE(), group=group)
    monkeypatch.setattr(forecast, "THINNED", (48, 96))
    batch = cloud(130, radius)
    exact = explained(model, batch)
    monkeypatch.setattr(forecast, "DENSE", 0)
    estimated = explained(model, batch)
    assert exact.exact and not estimated.exact
    assert 0.5 < estimated.n_evaluations / exact.n_evaluations < 2.0
    assert estimated.group == group


def test_estimates_in_atom_scope_replace_dense_owners_only(monkeypatch):
    model = Symmetrizer(sharing(1, cutoff=5.0), ECSE(), scope="atom")
    batch = crystal()
    exact = explained(model, batch)
    pairs = make(model, batch).pairs / len(batch[keys.POS])
    monkeypatch.setattr(forecast, "DENSE", int(pairs))
    some = make(model, batch)
    assert 0 < len(some.dense) < len(batch[keys.POS]) and len(some.estimates) == len(some.dense)
    estimated = explained(model, batch)
    assert estimated.n_owners == exact.n_owners and not estimated.exact
    assert 0.7 < estimated.n_evaluations / exact.n_evaluations < 1.5


def test_a_number_that_the_user_chose_is_no_news():
    model = Symmetrizer(ToyGlobal(width=4), GroupAveraging(5))
    plan = model.explain(from_ase([ethanol()]))
    assert plan.evaluations_mean > 50 and plan.warnings == () and plan.frame_bytes == 0
