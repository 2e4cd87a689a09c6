"""`wrap`: real modules of every layout become exactly equivariant, with forces; bare they are not."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import GINEConv, NNConv, TransformerConv, global_add_pool, global_mean_pool

from symmetrize import ECSE, Identity, Symmetrizer, from_ase, from_points, keys
from symmetrize.data import replace, with_neighbors
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.representations import OutputSpec
from symmetrize.testing import (
    NEAR_COLLINEAR_FACTOR,
    geometries,
    measure_batching,
    measure_equivariance,
    measure_forces_fd,
    random_elements,
    tolerance,
    within,
)
from symmetrize.wrapping import Wrapped, wrap

DIPOLE = OutputSpec("1o", per="structure")
#: Everything a layout can return: scalar, vector, tensor, of atoms and of structures.
WIDTH = 1 + 3 + 9


@pytest.fixture(autouse=True)
def seeded():
    """Parameters of torch's layers come from the global generator."""
    torch.manual_seed(1)


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 16), nn.Tanh(), nn.Linear(16, n_out))


def parts(rows):
    """A scalar, a vector and a tensor from WIDTH numbers along the last axis."""
    return {"energy": rows[..., 0], "vector": rows[..., 1:4], "tensor": rows[..., 4:]}


def specs(per):
    return {
        "energy": OutputSpec("0e", per=per),
        "vector": OutputSpec("1o", per=per),
        "tensor": OutputSpec(cartesian="ij", per=per),
    }


def both(atoms, structures):
    return {f"atom_{k}": v for k, v in parts(atoms).items()} | parts(structures)


BOTH = {f"atom_{k}": v for k, v in specs("atom").items()} | specs("structure")


class PaddedTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.atoms, self.structures = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)

    def forward(self, points, features, mask):
        hidden = self.encode(torch.tanh(self.embed(torch.cat([points, features], -1))), src_key_padding_mask=~mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return both(self.atoms(hidden), self.structures(pooled))


class PointNet(nn.Module):
    """Channels first, as the original; outputs of points channels first as well."""

    def __init__(self):
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(5, 16, 1), nn.Tanh(), nn.Conv1d(16, 16, 1))
        self.atoms, self.structures = nn.Conv1d(32, WIDTH, 1), nn.Linear(16, WIDTH)

    def forward(self, x):
        local = self.local(x)
        pooled = torch.logsumexp(local, -1)
        atoms = self.atoms(torch.cat([local, pooled[..., None].expand_as(local)], 1))
        energy, vector, tensor = atoms[:, :1], atoms[:, 1:4], atoms[:, 4:]
        found = {"atom_energy": energy, "atom_vector": vector, "atom_tensor": tensor}
        return found | parts(self.structures(pooled))


class Graph(nn.Module):
    """Message passing of torch_geometric on raw edge vectors."""

    def __init__(self, kind="gine", width=8):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.edges = mlp(3, width)
        self.conv = {
            "gine": lambda: GINEConv(mlp(width, width), edge_dim=width),
            "nnconv": lambda: NNConv(width, width, mlp(width, width * width)),
            "transformer": lambda: TransformerConv(width, width, edge_dim=width),
        }[kind]()
        self.atoms, self.structures = nn.Linear(width, WIDTH), nn.Linear(width, WIDTH)

    def hidden(self, z, edge_index, edge_attr):
        return torch.tanh(self.conv(self.embed(z), edge_index, self.edges(edge_attr)))

    def forward(self, z, edge_index, edge_attr, batch):
        hidden = self.hidden(z, edge_index, edge_attr)
        return both(self.atoms(hidden), self.structures(global_mean_pool(hidden, batch)))


class Flat(nn.Module):
    """Positions of all structures in one tensor, as PyG-style modules take them."""

    def __init__(self):
        super().__init__()
        self.local, self.mixed = mlp(5, 16), mlp(32, 16)
        self.atoms, self.structures = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)

    def forward(self, x, pos, batch):
        local = self.local(torch.cat([pos, x], 1))
        hidden = self.mixed(torch.cat([local, global_add_pool(local, batch)[batch]], 1))
        return both(self.atoms(hidden), self.structures(global_add_pool(hidden, batch)))


class OneStructure(nn.Module):
    """No notion of batches; returns a tuple."""

    def __init__(self):
        super().__init__()
        self.local = mlp(5, 16)
        self.atoms, self.structures = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)

    def forward(self, pos, x):
        hidden = self.local(torch.cat([pos, x], 1))
        mixed = hidden * torch.tanh(hidden.mean(0))
        return tuple(both(self.atoms(mixed), self.structures(mixed.sum(0))).values())


def points(dtype=torch.float64, seed=0, **more):
    """Three clouds of different sizes with features and a velocity."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([5, 4, 6])
    n = int(sizes.sum())
    return from_points(
        torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype),
        torch.repeat_interleave(torch.arange(3), sizes),
        x=torch.randn(n, 2, generator=g, dtype=torch.float64).to(dtype),
        z=torch.tensor([1, 6, 8])[torch.arange(n) % 3],
        velocity=torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype),
        **more,
    )


def made(module, seed=0):
    """Parameters large enough that outputs depend visibly on everything, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module.double().eval()


CENTERED = dict(center="centroid", math_attention=True)
MODULES = {
    "padded": lambda: wrap(made(PaddedTransformer()), BOTH, layout="padded", probe=points(), **CENTERED,
                           inputs={"features": "x"}),
    "channels first": lambda: wrap(made(PointNet()), BOTH, layout="dense", probe=points(), channels_first=True,
                                   inputs={"x": ("pos", "x")}, **CENTERED),
    "flat": lambda: wrap(made(Flat()), BOTH, probe=points(), **CENTERED),
    "single": lambda: wrap(made(OneStructure()), BOTH, layout="single", probe=points(), **CENTERED),
    **{
        f"graph {kind}": functools.partial(lambda kind: wrap(made(Graph(kind)), BOTH, cutoff=2.5), kind)
        for kind in ("gine", "nnconv", "transformer")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_exact_after_symmetrization_and_not_before(name):
    backbone = MODULES[name]()
    batch = points()
    exact, bare = Symmetrizer(backbone, ECSE()), Symmetrizer(backbone, Identity())
    error = measure_equivariance(exact, batch, BOTH)
    assert within(error.relative, tolerance(torch.float64)), error
    for output, deviation in measure_equivariance(bare, batch, BOTH).outputs.items():
        assert deviation.relative > 1e-3, output
    assert within(measure_batching(exact, batch, BOTH).relative, tolerance(torch.float64))


def test_exact_means_the_same_in_single_precision():
    backbone = MODULES["flat"]().float()
    error = measure_equivariance(Symmetrizer(backbone, ECSE()), points(torch.float32), BOTH)
    assert within(error.relative, tolerance(torch.float32)), error


def tanh_sums(pos, z, mask):
    """Scalar, vector and tensor of padded points, smooth and without any symmetry."""
    waves = torch.linspace(-1.5, 1.5, 3 * WIDTH, dtype=pos.dtype).reshape(3, WIDTH)
    rows = torch.sin(pos @ waves + z[..., None] * 0.3) * mask[..., None]
    return both(rows, torch.tanh(rows.sum(1)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=4), st.integers(0, 1000))
def test_exact_for_any_sizes(sizes, seed):
    backbone = wrap(tanh_sums, BOTH, layout="padded", center="centroid", probe=False)
    g = torch.Generator().manual_seed(seed)
    pos = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    batch = from_points(pos, owner, z=torch.randint(1, 9, (len(pos),), generator=g))
    elements = random_elements(3, g)
    error = measure_equivariance(Symmetrizer(backbone, ECSE()), batch, BOTH, elements, scale=dict.fromkeys(BOTH, 1.0))
    assert within(error.relative, tolerance(torch.float64, NEAR_COLLINEAR_FACTOR)), error
    bare = measure_equivariance(
        Symmetrizer(backbone, Identity()), batch, BOTH, elements, scale=dict.fromkeys(BOTH, 1.0)
    )
    assert bare.relative > 1e-3


@pytest.mark.parametrize("name", geometries(exclude=["periodic"]))
def test_exact_on_degenerate_structures(name):
    backbone = wrap(tanh_sums, BOTH, layout="padded", center="centroid", probe=False)
    batch = from_ase([geometries()[name], geometries()["water"]])
    elements = random_elements(2, torch.Generator().manual_seed(0))
    error = measure_equivariance(Symmetrizer(backbone, ECSE()), batch, BOTH, elements, scale=dict.fromkeys(BOTH, 1.0))
    assert within(error.relative, tolerance(torch.float64, NEAR_COLLINEAR_FACTOR)), error


@pytest.mark.parametrize("name", MODULES)
def test_forces_are_the_gradient(name):
    model = Symmetrizer(MODULES[name](), ECSE())
    batch = points()
    forces = model(batch, forces=True)["forces"]
    direction = torch.randn(forces.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def energy(h):
        return model(replace(batch, **{keys.POS: batch[keys.POS] + h * direction}))["energy"].sum()

    # A short step, since GINE has kinks (ReLU).
    h = 2e-6
    slope = (energy(h) - energy(-h)) / (2 * h)
    scale = float(forces.norm() * direction.norm())
    assert abs(slope + (forces * direction).sum()) < 1e-6 * scale
    assert abs(slope) > 1e-3 * scale


def test_forces_can_be_trained_on():
    for name in ("padded", "graph gine"):
        model = Symmetrizer(MODULES[name](), ECSE())
        forces = model(points(), forces=True, create_graph=True)["forces"]
        forces.square().sum().backward()
        assert any(p.grad is not None and bool((p.grad != 0).any()) for p in model.backbone.module.parameters())


def test_atom_scope_reads_edge_vectors_of_periodic_images():
    per_atom = specs("atom") | {"energy": OutputSpec("0e", reduce="sum")}
    net = made(Graph())

    def rows(net, z, edge_index, edge_vec, edge_length):
        smooth = (0.5 + 0.5 * torch.cos(torch.pi * edge_length / 3.0))[:, None] ** 3
        messages = torch.zeros(len(z), 8, dtype=edge_vec.dtype).index_add(
            0, edge_index[1], smooth * net.edges(edge_vec) * net.embed(z)[edge_index[0]]
        )
        return parts(net.atoms(torch.tanh(messages) + net.embed(z)))

    backbone = wrap(net, per_atom, cutoff=3.0, receptive_field=1, call=rows)
    model = Symmetrizer(backbone, ECSE())
    assert model.scope == "atom"
    crystals = from_ase(_crystals())
    error = measure_equivariance(model, crystals, per_atom)
    assert within(error.relative, tolerance(torch.float64)), error
    bare = measure_equivariance(Symmetrizer(backbone, Identity()), crystals, per_atom)
    assert all(d.relative > 1e-3 for d in bare.outputs.values())
    differences = measure_forces_fd(lambda b: model(b, forces=True), crystals)
    assert all(d.relative < 1e-6 for d in differences.values())


def _crystals():
    from ase.build import bulk

    one, two = bulk("C", "fcc", a=2.9), bulk("OH", "zincblende", a=3.4)
    one.rattle(0.1, seed=1)
    two.rattle(0.1, seed=2)
    return [one, two]


@pytest.mark.parametrize("irreps", ["1o", "1e"])
def test_vectors_rotate_along(irreps):
    def moment(pos, velocity, x):
        weights = torch.sin(pos @ pos.new_tensor([1.0, 0.3, -0.5]))[:, None] + x[:, :1]
        return (weights * velocity).sum(0), (velocity[:, 0] ** 2 * pos[:, 1] ** 2).sum()

    outputs = {"moment": OutputSpec(irreps, per="structure"), "scalar": OutputSpec("0e", per="structure")}
    options = dict(layout="single", center="centroid", probe=points())
    model = Symmetrizer(wrap(moment, outputs, vectors={"velocity": irreps}, **options), ECSE())
    vectors = {"velocity": irreps}
    error = measure_equivariance(model, points(), outputs, vectors=vectors)
    assert within(error.relative, tolerance(torch.float64)), error
    # Declared as something it is not, it does not rotate as it should.
    other = {"velocity": "1e" if irreps == "1o" else "1o"}
    assert measure_equivariance(model, points(), outputs, vectors=other).relative > 1e-2


def test_layouts_hand_in_the_same_points():
    """One function in all four layouts gives the same numbers."""

    def flat(pos, batch, n_structures):
        return torch.zeros(n_structures, 3, dtype=pos.dtype).index_add(0, batch, pos**3)

    layouts = {
        "flat": flat,
        "padded": lambda pos, mask: (pos**3 * mask[..., None]).sum(1),
        "dense": lambda pos: (pos**3).sum(1),
        "single": lambda pos: (pos**3).sum(0),
    }
    batch = points()
    got = [wrap(f, {"d": DIPOLE}, layout=k, center="centroid")(batch)["d"] for k, f in layouts.items()]
    assert all(torch.allclose(g, got[0], rtol=1e-13) for g in got) and len(got) == 4
    first = Wrapped(layouts["padded"], {"d": DIPOLE}, layout="padded", inputs={"mask": "padding_mask"})
    called = first.called_with(batch)
    assert called["pos"].shape == (3, 6, 3) and called["mask"].sum(1).tolist() == [1, 2, 0]
    assert not torch.allclose(first(batch)["d"], got[0])


def test_per_structure_fields_and_functions_of_the_batch():
    batch = points(temperature=torch.zeros(15), extra=torch.randn(15, 2, dtype=torch.float64))
    batch = replace(batch, temperature=torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64))

    def f(pos, temperature, species, counts):
        return (pos * species[:, :1]).sum(0) * temperature / counts

    net = wrap(
        f,
        {"d": DIPOLE},
        layout="single",
        center="centroid",
        per_structure=("temperature",),
        inputs={"species": lambda b: torch.nn.functional.one_hot(b.z, 10)[:, [6]].to(b.pos)},
        probe=batch,
    )
    pos = batch.pos - global_mean_pool(batch.pos, batch.batch)[batch.batch]
    expected = global_add_pool(pos * (batch.z == 6)[:, None], batch.batch) * batch.temperature
    assert torch.allclose(net(batch)["d"], expected / batch.ptr.diff()[:, None])
    joined = Wrapped(
        lambda x: x,
        {"v": OutputSpec("1o")},
        inputs={"x": ("pos", "temperature")},
        per_structure=("temperature",),
        returns={"v": lambda rows: rows[:, 1:]},
    )
    assert torch.equal(joined(batch)["v"][:, 2:], batch.temperature[batch.batch])
    with pytest.raises(DeclarationError, match=r"inputs\['x'\]: expected fields of the same rows"):
        Wrapped(lambda x: x, {"v": OutputSpec("1o")}, inputs={"x": ("pos", "batch")})(batch)
    with pytest.raises(InvalidInputError, match=r"temperature: expected one row per atom .* per_structure="):
        Wrapped(f, {"d": DIPOLE}, layout="single", inputs={"species": "z"})(batch)


def test_edges_of_one_structure_are_numbered_from_zero():
    def f(z, edge_index, edge_vec):
        assert int(edge_index.max()) < len(z)
        return torch.zeros(len(z), 3, dtype=edge_vec.dtype).index_add(0, edge_index[1], edge_vec**3)

    outputs = {"d": OutputSpec("1o")}
    batch = with_neighbors(points(), 2.5)
    single = wrap(f, outputs, layout="single", cutoff=2.5, receptive_field=1)
    flat = wrap(f, outputs, cutoff=2.5, receptive_field=1)
    assert torch.equal(single(batch)["d"], flat(batch)["d"])


def test_the_module_stays_as_it_is_and_is_visible():
    net = made(PaddedTransformer()).train()
    net.encode.layers[0].eval()
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    attributes = set(vars(net))
    with pytest.warns(UserWarning, match="training mode, where its outputs are random"):
        backbone = wrap(net, BOTH, layout="padded", inputs={"features": "x"}, probe=points(), **CENTERED)
    assert backbone.module is net and backbone.training
    assert set(vars(net)) == attributes and [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert set(backbone.state_dict()) == {f"module.{k}" for k in net.state_dict()}
    assert not Symmetrizer(wrap(net.eval(), BOTH, layout="padded", probe=False), ECSE()).training


def test_precision_follows_the_module():
    net = wrap(made(OneStructure()).float(), BOTH, layout="single", center="centroid", probe=points(torch.float32))
    batch = points(torch.float32)
    assert net.dtype == torch.float32 and net(batch)["vector"].dtype == torch.float32
    # Features of another precision travel along.
    assert net(replace(batch, x=batch.x.double()))["vector"].dtype == torch.float32
    with pytest.raises(InvalidTypeError, match=r"pos: expected the dtype .*float32.*, got .*float64; convert"):
        net(points())
    double = copy.deepcopy(net).double()
    assert double(points())["vector"].dtype == torch.float64 and net.dtype == torch.float32


class Counter:
    """A callable object that holds a module."""

    def __init__(self):
        self.net = made(OneStructure())

    def __call__(self, pos, x):
        return self.net(pos, x)


def test_parameters_behind_a_callable_are_found_or_refused():
    net = made(OneStructure())
    options = dict(layout="single", center="centroid", probe=points())
    for held in (net.forward, functools.partial(net, x=torch.zeros(1, 2)), Counter()):
        backbone = Wrapped(held, BOTH, layout="single")
        assert len(list(backbone.parameters())) == len(list(net.parameters()))
        assert copy.deepcopy(backbone).float().dtype == torch.float32 and backbone.dtype == torch.float64
    with pytest.raises(DeclarationError, match=r"uses 'net' \(OneStructure\) from outside.*call=lambda net"):
        wrap(lambda pos, x: net(pos, x), BOTH, **options)
    backbone = wrap(net, BOTH, call=lambda net, pos, x: net(pos, x), **options)
    assert torch.equal(backbone(points())["vector"], wrap(net, BOTH, **options)(points())["vector"])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")  # torch, about an odd number of heads
def test_torchs_own_transformer_and_its_padding_mask():
    layer = nn.TransformerEncoderLayer(3, 1, 8, dropout=0.0, batch_first=True)
    net = made(nn.TransformerEncoder(layer, 1))
    backbone = wrap(net, {"v": OutputSpec("1o")}, layout="padded", center="centroid")
    assert {a.name: a.source for a in backbone.convention.arguments} == {
        "src": "pos",
        "src_key_padding_mask": "padding_mask",
    }
    error = measure_equivariance(Symmetrizer(backbone, ECSE()), points(), backbone.outputs)
    assert within(error.relative, tolerance(torch.float64))


def test_a_scripted_module_and_a_chain_of_layers():
    scripted = torch.jit.script(made(Flat().local))
    batch = points()
    net = wrap(scripted, {"v": OutputSpec("1o")}, inputs={"input": ("pos", "x")}, center="centroid", probe=batch,
               returns={"v": lambda rows: rows[:, :3]})  # fmt: skip
    assert net(batch)["v"].shape == (15, 3)
    chain = made(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))
    assert wrap(chain, {"v": OutputSpec("1o")}, center="centroid")(batch)["v"].shape == (15, 3)


def test_positions_are_refused_where_neighbors_are_images():
    def f(pos, edge_index):
        d = pos[edge_index[0]] - pos[edge_index[1]]
        return torch.zeros_like(pos).index_add(0, edge_index[1], d**3)

    outputs = {"v": OutputSpec("1o")}
    net = wrap(f, outputs, cutoff=2.5, receptive_field=1)
    error = measure_equivariance(Symmetrizer(net, ECSE()), points(), outputs)
    assert within(error.relative, tolerance(torch.float64))
    with pytest.raises(InvalidInputError, match=r"structure 0 is periodic, and the module takes positions.*edge_vec"):
        Symmetrizer(net, ECSE())(from_ase(_crystals()))

    def g(pos, edge_index, cell, cell_shift, batch):
        d = pos[edge_index[0]] - pos[edge_index[1]]
        d = d + torch.einsum("ea,eab->eb", cell_shift.to(pos.dtype), cell[batch[edge_index[1]]])
        return torch.zeros_like(pos).index_add(0, edge_index[1], d**3)

    crystals = from_ase(_crystals())
    net = wrap(g, outputs, cutoff=2.5, receptive_field=1)
    error = measure_equivariance(Symmetrizer(net, ECSE()), crystals, outputs)
    assert within(error.relative, tolerance(torch.float64))
    assert measure_equivariance(Symmetrizer(net, Identity()), crystals, outputs).relative > 1e-3


def test_returned_values_by_name_by_place_and_by_function():
    def f(pos):
        return {"a": pos.sum(0) * pos.square().sum(), "b": [pos**3, 0.0]}

    outputs = {"d": DIPOLE, "v": OutputSpec("1o")}
    batch = points()
    net = wrap(f, outputs, layout="single", center="centroid", returns={"d": lambda r: r["b"][0].sum(0),
                                                                        "v": lambda r: r["b"][0]})  # fmt: skip
    assert net(batch)["d"].shape == (3, 3) and net(batch)["v"].shape == (15, 3)
    one = wrap(lambda pos: ((pos**3).sum(0), pos), {"d": DIPOLE}, layout="single", center="centroid", returns={"d": 0})
    assert torch.allclose(one(batch)["d"], net(batch)["d"])
    with pytest.raises(BackboneOutputError, match=r"expected 'c' for 'd' .* got a dict; known: 'a', 'b'"):
        Wrapped(f, {"d": DIPOLE}, layout="single", returns={"d": "c"})(batch)


def test_what_it_is_called_with_is_shown():
    net = MODULES["channels first"]()
    assert "layout=dense" in repr(net) and "x <- pos + x" in repr(net)
