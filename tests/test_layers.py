"""Where equivariance breaks: planted faults are named, equivariant networks have no culprit, models stay untouched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase
from symmetrize.data import edge_vectors
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.ops.ragged import segment_sum
from symmetrize.registry import load_backbone
from symmetrize.testing import GEOMETRIES, tolerance
from symmetrize.testing.measuring.hypotheses import Track
from symmetrize.testing.measuring.layers import measure_layers

CUTOFF = 4.0
EXACT = tolerance(torch.float64)


def sample(*names, dtype=torch.float64):
    return from_ase([GEOMETRIES[name]() for name in names or ("ethanol", "chiral center")], cutoff=CUTOFF, dtype=dtype)


def seeded(build):
    # In double precision from the start: constants of e3nn stay as accurate as they were made.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()
    finally:
        torch.set_default_dtype(before)


def pooled(values, batch):
    return segment_sum(values, batch.edge_index[1], batch.pos.shape[0])


class OnEdges(torch.nn.Module):
    """A network on edge vectors, summed over the edges of each atom."""

    def __init__(self, network, features=lambda r: r):
        super().__init__()
        self.network = network
        self.features = features

    def forward(self, batch):
        return pooled(self.network(self.features(edge_vectors(batch))), batch)


def mlp(n_in=3, width=24):
    return torch.nn.Sequential(
        torch.nn.Linear(n_in, width),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 1),
    )


def distance(r):
    return r.norm(dim=1, keepdim=True)


class VectorGate(torch.nn.Module):
    """Channels of vectors, mixed, and multiplied by a function of their lengths: (n, width, 3)."""

    def __init__(self, width=6, offset=None):
        super().__init__()
        self.mix = torch.nn.Linear(width, width, bias=False)
        self.gate = torch.nn.Linear(width, width)
        self.offset = offset

    def forward(self, v):
        v = self.mix(v.transpose(1, 2)).transpose(1, 2)
        if self.offset is not None:
            v = v + self.offset
        return v * torch.sigmoid(self.gate(v.square().sum(dim=2)))[:, :, None]


class VectorNet(torch.nn.Module):
    def __init__(self, offsets=(None, None, None, None)):
        super().__init__()
        self.layers = torch.nn.ModuleList([VectorGate(offset=offset) for offset in offsets])

    def forward(self, batch):
        r = edge_vectors(batch)
        d = distance(r)
        v = pooled(torch.cat([r * torch.exp(-(d**2) / k) for k in range(1, 7)], dim=1), batch).reshape(-1, 6, 3)
        for layer in self.layers:
            v = v + layer(v)
        return v.square().sum(dim=(1, 2))


class E3NN(torch.nn.Module):
    """Linear, tensor product and gate of e3nn, on harmonics of the edges."""

    def __init__(self, wrong=False):
        super().__init__()
        hidden = o3.Irreps("4x0e + 4x1o + 2x1e + 2x2e")
        self.harmonics = o3.SphericalHarmonics("1x0e + 1x1o + 1x2e", normalize=False)
        self.linear = o3.Linear(self.harmonics.irreps_out, hidden)
        gates = o3.Irreps("8x0e")
        scalars, gated = o3.Irreps("4x0e"), o3.Irreps("4x1o + 2x1e + 2x2e")
        self.gate = e3nn_nn.Gate(scalars, [torch.tanh], gates, [torch.sigmoid], gated)
        self.product = o3.FullyConnectedTensorProduct(hidden, self.harmonics.irreps_out, self.gate.irreps_in)
        self.last = o3.Linear(self.gate.irreps_out, "1x0e + 1x1o")
        self.wrong = wrong

    def forward(self, batch):
        r = edge_vectors(batch)
        y = self.harmonics(r) * torch.exp(-distance(r))
        if self.wrong:  # a pseudovector where the harmonics have a vector
            other = torch.linalg.cross(r, r.roll(1, dims=0))
            y = torch.cat([y[:, :1], other, y[:, 4:]], dim=1)
        return pooled(self.last(self.gate(self.product(self.linear(y), y))), batch)


# --- networks that break ----------------------------------------------------------------------------------------------


def test_the_first_nonlinearity_of_a_network_on_positions_is_named():
    model = seeded(lambda: OnEdges(mlp()))
    report = measure_layers(model, sample())
    assert [report[f"network.{k}"].transforms_as for k in range(2)] == ["linear representation"] * 2
    assert report.culprit is report["network.2"]
    assert report["network"].transforms_as == report[""].transforms_as == "breaks"
    assert report.culprit.residual > 1e-6 and report["network.1"].residual < EXACT
    assert "network.2" in str(report) and str(report).count("<-- culprit") == 1


def test_without_the_nonlinearities_the_same_network_is_in_order():
    linear = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(3, 24), torch.nn.Linear(24, 24)))
    report = measure_layers(OnEdges(linear), sample())
    assert report.culprit is None and all(layer.equivariant for layer in report.layers)


def test_a_linear_layer_that_keeps_part_of_a_vector_breaks():
    report = measure_layers(seeded(lambda: OnEdges(torch.nn.Linear(3, 2))), sample())
    assert report.culprit is report["network"]


class LabFrame(torch.nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.first, self.second, self.third = mlp(1), mlp(1), mlp(1)
        self.inject = Inject(strength)

    def forward(self, batch):
        d = distance(edge_vectors(batch))
        h = pooled(self.second(self.first(d)), batch)
        return self.third(self.inject(h, batch.pos))


class Inject(torch.nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, h, pos):
        return h + self.strength * pos[:, 2:]


@pytest.mark.parametrize("strength", [1.0, 1e-6])
def test_coordinates_of_the_laboratory_are_found_where_they_enter(strength):
    report = measure_layers(seeded(lambda: LabFrame(strength)), sample())
    assert report.culprit is report["inject"]
    assert report["first"].transforms_as == report["second"].transforms_as == "invariant"
    assert 0.01 * strength < report.culprit.residual < 1e4 * strength
    assert measure_layers(seeded(lambda: LabFrame(0.0)), sample()).culprit is None


def test_a_fixed_vector_in_the_third_layer_is_named():
    offset = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)
    report = measure_layers(seeded(lambda: VectorNet((None, None, offset, None))), sample())
    # The leaf behind it has an input that breaks: it happens in the code of the container.
    assert report.culprit.name == "layers.2"
    assert "code of layers.2 itself" in report.note and "layers.2.gate" in report.note
    assert [report[f"layers.{k}"].transforms_as for k in range(4)] == ["vector", "vector", "breaks", "breaks"]


class PlusVector(torch.nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, r):
        return r + self.offset


def test_a_vector_plus_a_constant_one_breaks_unless_it_is_removed_again():
    offset = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)

    class Length(torch.nn.Module):
        def forward(self, r):
            return distance(r)

    bad = OnEdges(torch.nn.Sequential(PlusVector(offset), Length()))
    report = measure_layers(bad, sample())
    assert report.culprit is report["network.0"] and "constant" in report.culprit.note
    good = OnEdges(torch.nn.Sequential(PlusVector(offset), PlusVector(-offset), Length()))
    report = measure_layers(good, sample())
    assert report["network.0"].broken and report.culprit is None and "what contains them does not" in report.note


def test_functional_code_is_attributed_to_its_container():
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 16), torch.nn.Linear(16, 16)

        def forward(self, r):
            return self.b(torch.tanh(self.a(r)))

    report = measure_layers(seeded(lambda: OnEdges(Functional())), sample())
    assert report["network.b"].order < report["network"].order and report["network.b"].broken
    assert report.culprit is report["network"]


# --- networks that do not ---------------------------------------------------------------------------------------------


def test_a_network_on_distances_is_invariant_throughout():
    report = measure_layers(seeded(lambda: OnEdges(mlp(1), distance)), sample())
    assert report.culprit is None
    assert {layer.transforms_as for layer in report.layers} == {"invariant"}
    assert max(layer.residual for layer in report.layers) < EXACT


def test_a_network_of_gated_vectors_is_in_order():
    report = measure_layers(seeded(VectorNet), sample())
    assert report.culprit is None
    assert report["layers.1"].transforms_as == "vector" and report["layers.1.gate"].transforms_as == "invariant"
    assert report["layers.1.mix"].transforms_as == "vector"
    assert report[""].transforms_as == "invariant"


def test_e3nn_is_in_order_and_its_irreps_are_read():
    report = measure_layers(seeded(E3NN), sample())
    assert report.culprit is None
    assert not any(layer.broken for layer in report.layers)
    for name in ("harmonics", "linear", "product", "gate", "last"):
        assert report[name].transforms_as.startswith("irreps"), name


def test_a_wrong_parity_is_seen_by_improper_elements_only():
    report = measure_layers(seeded(lambda: E3NN(wrong=True)), sample())
    assert report.culprit is report["linear"] and report.culprit.transforms_as == "not as declared"
    assert report["linear"].residual_proper < EXACT < 0.01 < report["linear"].residual_improper
    assert measure_layers(seeded(lambda: E3NN(wrong=True)), sample(), group="SO(3)").culprit is None


def test_a_labelled_cross_product_is_named_with_what_it_is():
    class Cross(torch.nn.Module):
        def __init__(self, irreps):
            super().__init__()
            self.irreps_out = o3.Irreps(irreps)

        def forward(self, r):
            return torch.linalg.cross(r, r.roll(1, dims=0))

    wrong = measure_layers(OnEdges(Cross("1x1o")), sample())
    assert wrong["network"].broken and "transforms as pseudovector" in wrong["network"].note
    assert wrong["network"].residual_proper < EXACT < wrong["network"].residual_improper
    assert measure_layers(OnEdges(Cross("1x1e")), sample())["network"].transforms_as == "irreps 1x1e"


def test_irreps_of_the_fields_of_a_dictionary():
    class Fields(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.irreps_out = {"dipole": o3.Irreps("1x1o"), "axis": o3.Irreps("1x1o"), "unknown": None}

        def forward(self, batch):
            r = edge_vectors(batch)
            return {"dipole": pooled(r, batch), "axis": torch.linalg.cross(r, r.roll(1, dims=0)), "unknown": r}

    report = measure_layers(Fields(), sample())
    assert report.culprit.output == "axis"
    assert [x.transforms_as for x in report.layers] == ["irreps 1x1o", "not as declared", "vector"]


def test_further_vectors_turn_with_the_positions_when_told():
    class Field(torch.nn.Module):
        def forward(self, batch):
            return (pooled(edge_vectors(batch), batch) * batch.field).sum(dim=1)

    batch = sample()
    batch.field = torch.randn(len(batch.pos), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert measure_layers(Field(), batch, vectors={"field": "1o"}).culprit is None
    assert measure_layers(Field(), batch).culprit is not None
    wrong = measure_layers(Field(), batch, vectors={"field": "1e"})
    assert wrong.culprit is None and wrong[""].transforms_as == "pseudo-invariant"


def test_pseudoscalars_and_tensors_have_names():
    class Several(torch.nn.Module):
        def forward(self, batch):
            r = edge_vectors(batch)
            a, b = r.roll(1, dims=0), r.roll(2, dims=0)
            triple = (r * torch.linalg.cross(a, b)).sum(dim=1)
            return {
                "chiral": torch.stack([triple, distance(r)[:, 0]], dim=1),
                "moments": (r[:, :, None] * r[:, None, :], triple[:, None, None] * a[:, :, None] * b[:, None, :]),
                "edges": batch.edge_index,
                "one": torch.ones(len(r), 2),
                "axial": torch.linalg.cross(a, b),
            }

    report = measure_layers(Several(), sample())
    got = {layer.output: layer.transforms_as for layer in report.layers}
    assert got == {
        "chiral": "pseudo-invariant",
        "moments.0": "tensor",
        "moments.1": "pseudotensor",
        "one": "constant",
        "axial": "pseudovector",
    }


# --- backbones --------------------------------------------------------------------------------------------------------


def test_a_toy_without_modules_is_its_own_culprit():
    report = measure_layers(ToyLocal(), sample())
    assert report.culprit is report[""] and report.culprit.output == "energy"
    assert measure_layers(ToyGlobal(), from_ase(GEOMETRIES["ethanol"]())).culprit is not None


def test_of_a_symmetrizer_the_outputs_are_walked():
    batch = from_ase(GEOMETRIES["ethanol"]())
    model = Symmetrizer(ToyLocal({"energy": OutputSpec("0e", reduce="sum"), "dipole": OutputSpec("1o")}), ECSE())
    report = measure_layers(model, batch, n_copies=2)
    assert {layer.name for layer in report.layers} == {""} and report.culprit is None
    assert {x.output: x.transforms_as for x in report.layers}["dipole"] == "irreps 1x1o"
    assert measure_layers(model.backbone, batch, n_copies=4).culprit is not None


def test_pet_breaks_early_on():
    model = load_backbone("pet", "ethanol", dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    report = measure_layers(model, from_ase(GEOMETRIES["ethanol"]()), n_copies=32)
    # The first thing that is done to the linear embedding of the geometry.
    assert report.culprit.name == "network.gnn_layers.0.compress.1"
    before_it = [layer for layer in report.layers if layer.order < report.culprit.order]
    assert all(layer.transforms_as == "invariant" for layer in before_it), "lengths and cutoffs"
    assert report[""].note == "declared as invariant" and report[""].residual < 1e-2
    assert "network.gnn_layers.0.edge_embedder" in report.never_called
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_single_precision_is_judged_as_such():
    model = seeded(lambda: OnEdges(mlp())).float()
    report = measure_layers(model, sample(dtype=torch.float32))
    assert report.culprit is report["network.2"]
    assert report["network.1"].tolerance == tolerance(torch.float32) > report["network.1"].residual
    fine = measure_layers(seeded(lambda: OnEdges(mlp(1), distance)).float(), sample(dtype=torch.float32))
    assert fine.culprit is None and "float64" in fine.note


# --- odd modules ------------------------------------------------------------------------------------------------------


class Planted(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


def planted(change):
    return seeded(lambda: OnEdges(torch.nn.Sequential(mlp(1), Planted(change), torch.nn.Linear(1, 1)), distance))


def test_a_nan_is_no_small_error():
    report = measure_layers(planted(lambda x: torch.where(x > x.median(), x, math.nan)), sample())
    assert report.culprit is report["network.1"] and report.culprit.transforms_as == "not finite"
    assert report.culprit.residual == math.inf


def test_noise_is_not_taken_for_a_break():
    report = measure_layers(planted(lambda x: x + 0.1 * torch.randn_like(x)), sample())
    assert report["network.0"].transforms_as == "invariant"
    assert report["network.1"].transforms_as == "not deterministic" and report["network.1"].equivariant is None
    assert report.culprit is None and "network.1 is not deterministic" in report.note


def test_a_shape_that_depends_on_the_orientation_is_not_compared():
    class Above(torch.nn.Module):
        def forward(self, batch):
            return batch.pos[batch.pos[:, 2] > 0]

    assert measure_layers(Above(), sample())[""].transforms_as == "not comparable"


def test_a_shared_module_has_one_entry_per_call():
    shared = torch.nn.Linear(8, 8, dtype=torch.float64)
    model = seeded(lambda: OnEdges(torch.nn.Sequential(torch.nn.Linear(3, 8), shared, torch.nn.Tanh(), shared)))
    report = measure_layers(model, sample())
    calls = {layer.call: layer for layer in report.layers if layer.name == "network.1"}
    assert set(calls) == {1, 2} and not calls[1].broken and calls[2].broken
    assert report.culprit is report["network.2"]
    assert "#2" in str(report)


def test_modules_in_place_and_idle_ones():
    model = seeded(lambda: OnEdges(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(inplace=True))))
    model.idle = torch.nn.Linear(2, 2)
    model.list = torch.nn.ModuleList()
    report = measure_layers(model, sample())
    assert report["network.0"].transforms_as == "linear representation" and report.culprit is report["network.1"]
    assert report.never_called == ("idle",)
    with pytest.raises(InvalidInputError, match="did you mean 'network'"):
        report["netwrk"]


def test_torchscript_is_left_out():
    inner = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh()).double())
    report = measure_layers(OnEdges(torch.nn.Sequential(inner, torch.nn.Linear(8, 8).double())), sample())
    assert report.not_walked == ("network.0",)
    assert report.culprit.name == "network" and report["network.1"].broken  # between its input and its second layer
    closed = measure_layers(lambda batch: inner(edge_vectors(batch)), sample(), module=inner)
    assert closed.layers == () and closed.culprit is None and closed.not_walked == ("(model)",)


def test_too_few_rows_are_said_to_be_too_few():
    model = seeded(lambda: OnEdges(torch.nn.Linear(3, 64)))
    batch = from_ase(GEOMETRIES["ethanol"](), cutoff=CUTOFF)
    few = measure_layers(model, batch, n_copies=1)
    assert few["network"].transforms_as is None and few["network"].equivariant is None
    assert few.culprit is None and "n_copies" in few.note
    assert measure_layers(model, batch)["network"].transforms_as == "linear representation"


def test_the_model_is_left_as_it_was():
    model = seeded(
        lambda: OnEdges(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh()))
    )
    model.train()
    before = copy.deepcopy(model.state_dict())
    buffers = {name: id(b) for name, b in model.named_buffers()}
    measure_layers(model, sample())
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_hooks_are_gone_after_an_exception():
    def fail(x):
        raise ZeroDivisionError

    model = planted(fail)
    with pytest.raises(ZeroDivisionError):
        measure_layers(model, sample())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_an_exception_that_the_model_catches_does_not_confuse_the_walk():
    def fail(x):
        raise ZeroDivisionError

    class Careful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = Planted(fail), Planted(torch.tanh)

        def forward(self, x):
            try:
                return self.bad(x)
            except ZeroDivisionError:
                return self.good(x)

    report = measure_layers(OnEdges(Careful()), sample())
    assert report.culprit is report["network.good"]


def test_any_callable_with_its_module():
    model = seeded(lambda: OnEdges(mlp()))
    report = measure_layers(lambda batch: {"energy": model(batch)}, sample(), module=model.network)
    assert report.culprit is report["2"]
    with pytest.raises(InvalidTypeError, match="expected a torch"):
        measure_layers(lambda batch: model(batch), sample())
    with pytest.raises(InvalidInputError, match="positive"):
        measure_layers(model, sample(), n_elements=0)
    with pytest.raises(DeclarationError, match="group"):
        measure_layers(model, sample(), group="O(2)")


def test_many_structures_are_evaluated_as_at_most_256():
    seen = []

    class Counting(torch.nn.Module):
        def forward(self, batch):
            seen.append(len(batch.ptr) - 1)
            return batch.pos

    measure_layers(Counting(), from_ase([GEOMETRIES["HCN"]()] * 300))
    assert set(seen) == {256}
    seen.clear()
    measure_layers(Counting(), from_ase(GEOMETRIES["HCN"]()))
    assert max(seen) <= 256


def test_seeds_decide():
    model, batch = seeded(lambda: OnEdges(mlp())), sample()
    a, b = (measure_layers(model, batch) for _ in range(2))
    c = measure_layers(model, batch, generator=torch.Generator().manual_seed(5))
    assert a == b and a.seed == 0 and c.seed == 5 and c.culprit.residual != a.culprit.residual


# --- hypotheses alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 40])
def test_a_linear_representation_of_random_numbers_is_only_seen_where_there_is_one(n):
    generator = torch.Generator().manual_seed(1)
    g = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    x = torch.randn(n, 12, dtype=torch.float64, generator=generator)
    matrix = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    yes, no = Track(x), Track(x)
    yes.compare(x @ matrix + 3.0, g)
    no.compare(torch.randn(n, 12, dtype=torch.float64, generator=generator), g)
    assert yes.verdict(EXACT).transforms_as == "linear representation"
    assert no.verdict(EXACT).transforms_as == "breaks" and no.verdict(EXACT).residual > 0.1


def test_large_tensors_are_thinned_out_consistently():
    x = torch.randn(4096, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    track = Track(x)
    track.compare(x.clone(), torch.eye(3, dtype=torch.float64))
    verdict = track.verdict(EXACT)
    assert len(track.reference) < len(x) and verdict.transforms_as == "invariant" and verdict.residual == 0.0
