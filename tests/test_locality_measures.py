"""Size consistency and local equivariance: local models pass, frames of whole structures and leaks do not."""

import math

import pytest
import torch
from torch_geometric.data import Data

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase, keys, load_backbone
from symmetrize.data import replace, with_neighbors
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing import Element, declared, geometries, measure_equivariance, of_symmetrizer, random_elements
from symmetrize.testing.measuring.locality import measure_local_equivariance, measure_size_consistency
from symmetrize.testing.structures.geometries import random_cluster

CUTOFF = 4.0
OUTPUTS = {
    "energy": OutputSpec("0e", per="atom", reduce="sum"),
    "dipole": OutputSpec("1o", per="atom", reduce="sum"),
    "tensor": OutputSpec(cartesian="ij=ji", per="atom", reduce="mean"),
    "charge": OutputSpec("0e", per="atom"),
}
LINE = ["CO2", "isolated atom", "two H2, skew", "methane"]


def clusters(*seeds):
    return from_ase([random_cluster(5 + seed % 3, seed) for seed in seeds])


def symmetrized(scope, method=None, outputs=OUTPUTS):
    return Symmetrizer(load_backbone("toy", outputs=outputs, cutoff=CUTOFF), method or ECSE(), scope=scope).eval()


def model_of(scope, method=None):
    subject = of_symmetrizer(symmetrized(scope, method))
    return subject.model, dict(subject.outputs)


BATCHES = {
    "random": lambda: clusters(1, 2, 3),
    "one alone": lambda: clusters(4),
    "degenerate": lambda: from_ase([geometries()[name] for name in LINE]),
    "single atoms": lambda: from_ase([geometries()["isolated atom"], geometries()["isolated atom at the origin"]]),
}


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_atom_scope_is_local(batch, periodic):
    f, outputs = model_of("atom")
    given = BATCHES[batch]()
    scale = dict.fromkeys([*outputs, "atomic_energy", "atomic_dipole", "atomic_tensor"], 1.0)
    options = dict(distance=CUTOFF + 0.5, periodic=periodic, scale=scale)
    assert measure_size_consistency(f, given, outputs, **options).relative < 1e-11
    measured = measure_local_equivariance(f, given, outputs, **options)
    assert measured.relative < 1e-11
    assert set(measured.outputs) == set(scale)


def test_bare_models_are_size_consistent_and_not_equivariant():
    f, outputs = model_of("atom", Identity())
    assert measure_size_consistency(f, clusters(1, 2), outputs, distance=CUTOFF + 0.5).relative < 1e-12
    measured = measure_local_equivariance(f, clusters(1, 2), outputs, distance=CUTOFF + 0.5)
    assert all(deviation.relative > 1e-2 for deviation in measured.outputs.values())


def test_structure_scope_is_equivariant_and_not_local():
    f, outputs = model_of("structure")
    batch = clusters(1, 2)
    assert (
        measure_equivariance(f, batch, outputs, random_elements(2, torch.Generator().manual_seed(0))).relative < 1e-10
    )
    assert measure_size_consistency(f, batch, outputs, distance=CUTOFF + 0.5)["energy"].relative > 1e-4
    assert measure_local_equivariance(f, batch, outputs, distance=CUTOFF + 0.5)["energy"].relative > 1e-4


def test_members_that_see_each_other_are_told():
    f, outputs = model_of("atom")
    near = measure_size_consistency(f, clusters(1, 2), outputs, distance=0.01)
    assert near["energy"].relative > 1e-3
    assert measure_local_equivariance(f, clusters(1, 2), outputs, distance=0.01).relative > 1e-3


def leaky(batch: Data):
    """The number of atoms of the whole structure in every row, and a moment about a fixed point."""
    structure, n = batch[keys.BATCH], batch[keys.PTR].shape[0] - 1
    counts = batch[keys.PTR].diff().to(batch[keys.POS].dtype)
    spread = segment_sum(batch[keys.POS].square().sum(dim=1).square(), structure, n) / counts
    return {"charge": counts[structure], "size": spread}


def test_planted_leaks():
    outputs = {"charge": OutputSpec("0e")}
    scale = {"charge": 1.0}
    assert measure_size_consistency(leaky, clusters(1, 2), outputs, distance=9.0, scale=scale).relative >= 5.0
    # The number of atoms is the same however they are turned; the fourth moment about a fixed point is not.
    assert measure_local_equivariance(leaky, clusters(1, 2), outputs, distance=9.0, scale=scale).relative == 0.0
    outputs = {"size": OutputSpec("0e", per="structure")}
    turned = measure_local_equivariance(leaky, clusters(1, 2), outputs, distance=9.0, scale={"size": 1.0})
    assert turned.relative > 1e-3


def test_outputs_that_nobody_can_add_up_are_left_out():
    outputs = {"size": OutputSpec("0e", per="structure"), "arm": OutputSpec("1o", per="structure")}

    def f(batch):
        return {"size": leaky(batch)["size"], "arm": batch[keys.POS][batch[keys.PTR][:-1]]}

    scale = dict.fromkeys(outputs, 1.0)
    assert measure_size_consistency(f, clusters(1, 2), outputs, distance=9.0, scale=scale).outputs == {}
    assert math.isinf(measure_size_consistency(f, clusters(1, 2), outputs, distance=9.0, scale=scale).relative)
    assert set(measure_local_equivariance(f, clusters(1, 2), outputs, distance=9.0, scale=scale).outputs) == {"size"}


def test_further_vectors_turn_with_their_structure():
    outputs = {"along": OutputSpec("1o"), "work": OutputSpec("0e", reduce="sum")}

    def f(batch):
        edges = with_neighbors(replace(batch), 2.0)
        center = edges[keys.EDGE_INDEX][1]
        steps = segment_sum(edges[keys.EDGE_VEC], center, len(batch[keys.POS]))
        work = (steps * batch["wind"]).sum(dim=1)
        total = segment_sum(work, batch[keys.BATCH], batch[keys.PTR].shape[0] - 1)
        return {"along": batch["wind"] + steps, "work": total, "atomic_work": work}

    batch = clusters(1, 2)
    wind = torch.randn(len(batch[keys.POS]), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    batch = replace(batch, wind=wind)
    vectors = {"wind": "1o"}
    assert measure_size_consistency(f, batch, outputs, distance=4.0).relative < 1e-12
    assert measure_local_equivariance(f, batch, outputs, distance=4.0, vectors=vectors).relative < 1e-12
    assert measure_local_equivariance(f, batch, outputs, distance=4.0)["work"].relative > 1e-2


def test_given_neighbor_lists_are_built_anew():
    model = symmetrized("atom", outputs={"energy": OUTPUTS["energy"]})
    batch = with_neighbors(clusters(1, 2), CUTOFF)
    outputs = declared(model.backbone.outputs, forces=True)
    seen = []

    def f(given):
        seen.append(given.get(keys.EDGE_INDEX) is not None)
        return model(given, forces=True)

    assert measure_size_consistency(f, batch, outputs, distance=5.0).relative < 1e-11
    assert measure_local_equivariance(f, batch, outputs, distance=5.0).relative < 1e-11
    assert all(seen)


def test_numbers_that_are_not_finite_are_infinite_errors():
    def f(batch):
        return {"charge": torch.full((len(batch[keys.POS]),), math.nan)}

    outputs = {"charge": OutputSpec("0e")}
    for measure in (measure_size_consistency, measure_local_equivariance):
        assert math.isinf(measure(f, clusters(1), outputs, distance=4.0, scale={"charge": 1.0}).relative)


def test_elements_and_cases_by_name():
    f, outputs = model_of("atom", Identity())
    turn = Element("half a turn", torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)))
    measured = measure_local_equivariance(f, clusters(1, 2), outputs, [turn], distance=5.0)
    assert measured["energy"].cases == ("half a turn",)
    assert measured["energy"].max.shape == (1, 2)


@pytest.mark.parametrize("measure", [measure_size_consistency, measure_local_equivariance])
def test_bad_input(measure):
    f, outputs = model_of("atom")
    with pytest.raises(InvalidInputError, match="structure 1 has it"):
        measure(f, from_ase([geometries()["methane"], geometries()["silicon"]]), outputs, distance=5.0)
    with pytest.raises(InvalidInputError, match=r"expected a positive distance, got 0\.0"):
        measure(f, clusters(1), outputs, distance=0.0)
