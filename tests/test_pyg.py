"""Networks of torch-geometric: any convolution exact under ECSE, the trained reference, and SchNet as the control."""

from __future__ import annotations

import json
from importlib.resources import files

import ase.io
import numpy as np
import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.pyg import (
    GNNConfig,
    PyGBackbone,
    ReferenceGNN,
    SchNetBackbone,
    load,
    load_schnet,
    rebuild,
    rebuild_schnet,
    reference,
    shipped,
)
from torch_geometric.nn import GATv2Conv, GINEConv, MessagePassing, NNConv, Sequential, TransformerConv, global_add_pool
from torch_geometric.nn.models import GAT, SchNet

from symmetrize import ECSE, OutputSpec, Symmetrizer
from symmetrize.data import from_ase, from_points, replace, with_neighbors
from symmetrize.errors import (
    BackboneOutputError,
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    UnknownSpeciesError,
)
from symmetrize.methods.identity import Identity
from symmetrize.ops.rotations import random_rotations
from symmetrize.registry import load_backbone, rebuild_backbone
from symmetrize.testing import assert_smooth, check_backbone, tolerance
from symmetrize.wrapping.probes import probe_backbone

SPECIES = (1, 5, 6, 7, 8, 9, 11, 17)
CUTOFF = 3.0
OUTPUTS = {
    "energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV"),
    "vector": OutputSpec("1o"),
    "tensor": OutputSpec(cartesian="ij=ji"),
}
WIDTH, EDGE_DIM, N_OUT = 8, 4, 13


class Stack(torch.nn.Module):
    """Convolutions with residuals, and a linear readout."""

    def __init__(self, convolutions, n_out=N_OUT):
        super().__init__()
        self.convolutions = torch.nn.ModuleList(convolutions)
        self.readout = torch.nn.Linear(WIDTH, n_out)

    def forward(self, x, edge_index, edge_attr):
        for convolution in self.convolutions:
            x = x + torch.tanh(convolution(x, edge_index, edge_attr=edge_attr))
        return self.readout(x)


def perceptron(n_in, n_out):
    return torch.nn.Sequential(torch.nn.Linear(n_in, 16), torch.nn.SiLU(), torch.nn.Linear(16, n_out))


CONVOLUTIONS = {
    "GINE": lambda: GINEConv(perceptron(WIDTH, WIDTH), edge_dim=EDGE_DIM),
    "NNConv": lambda: NNConv(WIDTH, WIDTH, perceptron(EDGE_DIM, WIDTH * WIDTH), aggr="add"),
    "Transformer": lambda: TransformerConv(WIDTH, WIDTH, heads=2, concat=False, edge_dim=EDGE_DIM),
    "GATv2": lambda: GATv2Conv(WIDTH, WIDTH, heads=2, concat=False, edge_dim=EDGE_DIM, add_self_loops=False),
}


def wrapped(kind="GINE", n_hops=1, seed=0, outputs=None, **options):
    outputs = OUTPUTS if outputs is None else outputs
    torch.manual_seed(seed)
    network = Stack([CONVOLUTIONS[kind]() for _ in range(n_hops)], sum(int(np.prod(s.shape)) for s in outputs.values()))
    options = {"species": SPECIES, "n_features": WIDTH, **options}
    return PyGBackbone(network.double(), outputs, CUTOFF, **options).eval()


def rattled(atoms, seed=0, size=0.1):
    atoms = atoms.copy()
    atoms.positions += size * np.random.default_rng(seed).normal(size=(len(atoms), 3))
    return atoms


def turn(batch, rotation):
    keep = {name: None for name in ("edge_vec", "edge_index", "cell_shift", "edge_cutoff")}
    return replace(batch, pos=batch.pos @ rotation.T, cell=batch.cell @ rotation.T, **keep)


def rotation_of(seed):
    return random_rotations(1, torch.Generator().manual_seed(seed))[0] * (1 - 2 * (seed % 2))


def error_of(model, batch, rotation, names=("energy", "vector", "tensor")):
    one, other = model(batch), model(turn(batch, rotation))
    worst = 0.0
    for name in names:
        turned = model.backbone.outputs[name].rotate(one[name], rotation[None], torch.zeros(len(one[name])).long())
        if name == "energy":
            turned = one[name]
        scale = 1.0 + float(one[name].detach().abs().max())
        worst = max(worst, float((turned - other[name]).detach().abs().max()) / scale)
    return worst


def bare_error(backbone, batch, rotation):
    return error_of(Symmetrizer(backbone, Identity()), batch, rotation)


FINITE = {
    "ethanol": rattled(molecule("CH3CH2OH")),
    "linear": molecule("CO2"),
    "long and linear": molecule("C2H2"),
    "planar": molecule("BF3"),
    "symmetric": molecule("CH4"),
    "dimer": molecule("N2"),
    "alone": Atoms("O"),
}
CRYSTALS = {
    "rattled": rattled(bulk("NaCl", "rocksalt", a=4.6)),
    "perfect": bulk("C", "diamond", a=3.2),
    "own images": Atoms("H", cell=[2.0, 2.3, 2.6], pbc=True),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("n_hops, scope", [(1, "atom"), (2, "atom"), (2, "structure")])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_every_convolution_is_exact(kind, n_hops, scope, seed):
    model = Symmetrizer(wrapped(kind, n_hops, seed % 5), ECSE(), scope=scope)
    structures = list(FINITE.values())
    names = sorted(FINITE) if scope == "structure" else sorted({**FINITE, **CRYSTALS})
    structures = [{**FINITE, **CRYSTALS}[name] for name in names[seed % 3 :: 3]]
    rotation = rotation_of(seed)
    for atoms in structures:
        assert error_of(model, from_ase(atoms), rotation) < tolerance(torch.float64)
    ethanol = from_ase(FINITE["ethanol"], cutoff=CUTOFF)
    assert bare_error(model.backbone, ethanol, rotation) > 1e-4


def test_forces_of_a_wrapped_network():
    model = Symmetrizer(wrapped("GATv2", 2), ECSE(), scope="structure")
    batch = from_ase(FINITE["ethanol"])
    forces = model(batch, forces=True)["forces"]
    step = 1e-5
    for atom, axis in [(0, 0), (3, 2), (8, 1)]:
        energies = []
        for sign in (1, -1):
            pos = batch.pos.clone()
            pos[atom, axis] += sign * step
            energies.append(float(model(replace(batch, pos=pos))["energy"].detach()))
        assert abs(-(energies[0] - energies[1]) / (2 * step) - float(forces[atom, axis])) < 1e-8


def test_ready_made_models_are_called_by_keywords():
    torch.manual_seed(0)
    network = GAT(3, WIDTH, num_layers=2, out_channels=1, v2=True, edge_dim=EDGE_DIM, add_self_loops=False).double()
    backbone = PyGBackbone(network, {"energy": OUTPUTS["energy"]}, CUTOFF, species=(1, 6, 8))
    assert backbone.receptive_field == 2 and backbone.node_dim == 3 and not backbone.smooth_sums
    model = Symmetrizer(backbone, ECSE(), scope="structure")
    assert error_of(model, from_ase(FINITE["ethanol"]), rotation_of(3), ["energy"]) < tolerance(torch.float64)


def test_features_of_points_and_other_arguments():
    torch.manual_seed(0)
    layers = [(GINEConv(perceptron(3, WIDTH), edge_dim=12), "x, e, a -> x"), (torch.nn.Linear(WIDTH, 3), "x -> x")]
    network = Sequential("x, e, a", layers).double()
    outputs = {"vector": OutputSpec("1o", per="structure")}
    backbone = PyGBackbone(network, outputs, CUTOFF, edge_features=["vector", "unit", "radial", "switch"], n_radial=5)
    assert backbone.edge_dim == 12 and backbone.node_dim is None
    generator = torch.Generator().manual_seed(1)
    pos = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    batch = from_points(pos, torch.arange(12) // 6, x=x)
    model = Symmetrizer(backbone, ECSE())
    assert error_of(model, batch, rotation_of(2), ["vector"]) < tolerance(torch.float64)
    assert float((model(batch)["vector"] - model(replace(batch, x=x + 1.0))["vector"]).detach().abs().max()) > 1e-3
    called = PyGBackbone(
        network,
        outputs,
        CUTOFF,
        edge_features=backbone.edge_features,
        n_radial=5,
        call=lambda f, x, e, a, _: f(x, e, a),
    )
    given = from_points(pos, torch.arange(12) // 6, x=x, cutoff=CUTOFF)
    assert torch.equal(called(given)["vector"], backbone(given)["vector"])


def approach(n_points=101):
    """An atom that comes within the cutoff of two others half-way."""
    return [Atoms("OCH", [[0, 0, 0], [1.2, 0.3, 0], [CUTOFF + 0.5 - t, 0.2, 0.1]]) for t in np.linspace(0, 1, n_points)]


def jump(backbone, eps=1e-7):
    """Difference of the energies on both sides of the cutoff."""
    energies = []
    for length in (CUTOFF - eps, CUTOFF + eps):
        batch = from_ase(Atoms("OCH", [[0, 0, 0], [-1.2, 0.3, 0], [length, 0, 0]]), cutoff=CUTOFF)
        energies.append(float(backbone(batch)["energy"].detach().sum()))
    return abs(energies[0] - energies[1])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_messages_fade_out_where_they_are_summed(kind):
    backbone = wrapped(kind, 2)
    assert backbone.smooth_sums == (kind in ("GINE", "NNConv"))
    assert (jump(backbone) < 1e-6) == backbone.smooth_sums
    # Without the switch on the messages, biases alone make every network jump.
    for convolution in backbone.network.convolutions:
        convolution.register_message_forward_hook(lambda module, inputs, out: out + 1.0)
    assert jump(backbone) < 1e-6 or not backbone.smooth_sums


def test_a_mean_jumps_and_is_said_to():
    torch.manual_seed(0)
    convolution = NNConv(WIDTH, WIDTH, perceptron(EDGE_DIM, WIDTH * WIDTH), aggr="mean")
    backbone = PyGBackbone(Stack([convolution]).double(), OUTPUTS, CUTOFF, species=SPECIES, n_features=WIDTH)
    assert not backbone.smooth_sums and jump(backbone) > 1e-4


def test_nothing_is_left_on_the_network():
    backbone = wrapped("GINE", 2)
    batch = from_ase(FINITE["ethanol"], cutoff=CUTOFF)
    x, attributes = backbone._atoms(batch), torch.cat([batch.edge_vec, batch.edge_vec.norm(dim=1)[:, None]], dim=1)
    before = backbone.network(x, batch.edge_index, attributes)
    backbone(batch)
    assert torch.equal(backbone.network(x, batch.edge_index, attributes), before)
    mask = torch.arange(9) % 2 == 0
    everything = backbone(batch)
    for name, value in backbone(replace(batch, center_mask=mask)).items():
        assert torch.equal(value, everything[name][mask])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_promises_of_a_backbone_are_kept(kind):
    probe_backbone(wrapped(kind, 2), from_ase([FINITE["ethanol"], FINITE["planar"]], cutoff=CUTOFF))


class Shared(torch.nn.Module):
    """One convolution, used twice."""

    def __init__(self):
        super().__init__()
        self.convolution = CONVOLUTIONS["GINE"]()
        self.readout = torch.nn.Linear(WIDTH, N_OUT)

    def forward(self, x, edge_index, edge_attr):
        return self.readout(self.convolution(self.convolution(x, edge_index, edge_attr), edge_index, edge_attr))


class Pooled(Shared):
    def forward(self, x, edge_index, edge_attr):
        x = self.convolution(x, edge_index, edge_attr)
        return self.readout(x + global_add_pool(x, torch.zeros(len(x)).long()))


class Backwards(MessagePassing):
    def __init__(self):
        super().__init__(aggr="sum", flow="target_to_source")


def pyg(network, **options):
    return PyGBackbone(network, OUTPUTS, CUTOFF, **{"species": SPECIES, "n_features": WIDTH, **options})


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: pyg(Shared()), DeclarationError, "n_hops: expected the number of rounds.*got 1.*2 neighbors away"),
        (lambda: pyg(Pooled(), n_hops=2), DeclarationError, "got 2: .* depends on an atom 4 neighbors away"),
        (lambda: pyg(torch.nn.Linear(1, 1)), DeclarationError, "expected torch_geometric.nn.MessagePassing"),
        (lambda: pyg("GINE"), InvalidTypeError, "expected a torch module, got str"),
        (lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), edge_features=["vectors"]), DeclarationError, "did you mean"),
        (lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), edge_features=[]), DeclarationError, "at least one, got none"),
        (
            lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), edge_features="unit"),
            DeclarationError,
            "8 numbers per atom and 3",
        ),
        (
            lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), species=None),
            DeclarationError,
            "species need species, got none",
        ),
        (lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), species=(1, 1)), DeclarationError, "different atomic numbers"),
        (lambda: pyg(Stack([CONVOLUTIONS["GINE"]()]), cutoff_width=4.0), DeclarationError, "length up to 3.0, got 4.0"),
        (lambda: pyg(Stack([CONVOLUTIONS["GINE"]()], 7)), BackboneOutputError, "expected 13 numbers for each of"),
        (lambda: pyg(Stack([GATv2Conv(8, 8, edge_dim=4)])), DeclarationError, "make it with add_self_loops=False"),
        (lambda: pyg(Stack([Backwards()])), DeclarationError, "expected the flow 'source_to_target'"),
    ],
)
def test_bad_declarations(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_batches():
    backbone = wrapped()
    with pytest.raises(UnknownSpeciesError, match=r"structure 1, atom 0: expected one of the species .* got 79"):
        backbone(from_ase([molecule("H2O"), Atoms("Au")], cutoff=CUTOFF))
    with pytest.raises(InvalidInputError, match="expected a neighbor list"):
        backbone(from_ase(molecule("H2O")))
    with pytest.raises(InvalidInputError, match="atomic numbers"):
        backbone(replace(from_ase(molecule("H2O"), cutoff=CUTOFF), z=None))


# --- the reference --------------------------------------------------------------------------------------------------


def tiny(seed=0, composition=0.0, **options):
    model = reference(**{"atomic_types": SPECIES, "cutoff": CUTOFF, "width": 8, "n_radial": 4, "seed": seed, **options})
    with torch.no_grad():  # far from linear, hence strongly dependent on orientation
        for p in model.network.parameters():
            p.mul_(2.0)
        model.scale.fill_(3.0)
        model.composition.copy_(composition * torch.linspace(-4000.0, -10.0, len(SPECIES)))
    return model.double()


@pytest.mark.parametrize("n_hops", [1, 2, 3])
def test_reference_is_exact_when_symmetrised(n_hops):
    backbone = tiny(n_hops=n_hops)
    model = Symmetrizer(backbone, ECSE(), scope="atom")
    for number, atoms in enumerate([*FINITE.values(), *CRYSTALS.values()]):
        assert error_of(model, from_ase(atoms), rotation_of(number), ["energy"]) < tolerance(torch.float64)
    batch = from_ase(FINITE["ethanol"])
    one, other = (backbone(from_ase_turned)["energy"].detach() for from_ase_turned in both(batch))
    assert float((one - other).abs().max()) > 1e-4


def both(batch):
    return with_neighbors(batch, CUTOFF), with_neighbors(turn(batch, rotation_of(1)), CUTOFF)


def test_reference_is_smooth_at_the_cutoff():
    assert_smooth(tiny(n_hops=1), approach(), order=2, n_points=21)
    assert jump(tiny()) < 1e-12
    with pytest.raises(AssertionError):
        assert_smooth(wrapped("GATv2", outputs={"energy": OUTPUTS["energy"]}), approach(), order=0, n_points=21)


def test_reference_keeps_the_promises_of_a_backbone():
    report = check_backbone(
        tiny(width=4), [rattled(molecule("H2O")), CRYSTALS["rattled"]], profile="quick", library=False
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scriptable_form_is_the_same_function(dtype, tmp_path):
    model = tiny(composition=1.0).to(dtype)
    scripted = torch.jit.script(model.scriptable())
    structures = [FINITE["ethanol"], CRYSTALS["rattled"], CRYSTALS["own images"], FINITE["alone"]]
    batch = from_ase(structures, cutoff=CUTOFF, dtype=dtype)
    center = torch.arange(len(batch.pos)) % 3 > 0
    arguments = (batch.pos, batch.z, batch.batch, 4, batch.edge_index, batch.cell_shift, batch.edge_vec, center)
    got, expected = scripted(*arguments)["energy"], model(replace(batch, center_mask=center))["energy"]
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(scripted.baseline(batch.z)["energy"], model.baseline(batch)["energy"])
    with torch.no_grad():  # parameters are shared, not copied
        model.network.embedding.weight.add_(1.0)
    assert torch.equal(model.scriptable()(*arguments)["energy"], model(replace(batch, center_mask=center))["energy"])
    assert float((scripted(*arguments)["energy"] - expected).detach().abs().max()) > 1e-4


def test_precision_of_large_energies_does_not_depend_on_the_network():
    model = tiny(composition=1.0).float()
    assert model.dtype == torch.float32
    assert model.scale.dtype == model.composition.dtype == torch.float64
    out = Symmetrizer(model, ECSE())(from_ase(FINITE["ethanol"], dtype=torch.float32))
    assert out["energy"].dtype == torch.float64


def test_save_load_and_rebuild(tmp_path):
    model = tiny(composition=1.0)
    model.metadata = {"made": "for a test"}
    model.save(tmp_path / "a.model")
    again = load(tmp_path / "a.model")
    batch = from_ase(FINITE["ethanol"], cutoff=CUTOFF)
    assert torch.equal(again(batch)["energy"], model(batch)["energy"])
    assert torch.equal(again.baseline(batch)["energy"], model.baseline(batch)["energy"])
    assert again.metadata == model.metadata and load(tmp_path / "a.model", torch.float32).dtype == torch.float32
    twin = rebuild(json.loads(json.dumps(model.describe()))).double()
    assert twin.config == model.config and not torch.equal(twin(batch)["energy"], model(batch)["energy"])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(batch)["energy"], model(batch)["energy"])
    description = json.loads((tmp_path / "a.model.json").read_text())
    for key, value, message in [
        ("version", 7, "expected version 1 or an earlier one, got 7"),
        ("format", "other", "expected the description of a"),
        ("dtype", "float16", "float32 or float64, got 'float16'"),
    ]:
        (tmp_path / "a.model.json").write_text(json.dumps({**description, key: value}))
        with pytest.raises(InvalidInputError, match=message):
            load(tmp_path / "a.model")
    description["config"]["width"] = 9
    (tmp_path / "a.model.json").write_text(json.dumps(description))
    with pytest.raises(InvalidInputError, match="expected shape"):
        load(tmp_path / "a.model")
    (tmp_path / "a.model.json").write_text("{")
    with pytest.raises(InvalidInputError, match="expected JSON"):
        load(tmp_path / "a.model")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: reference(atomic_types=[1], widht=3), DeclarationError, "did you mean 'width'"),
        (lambda: reference(width=3), DeclarationError, "expected an entry 'atomic_types', got none"),
        (lambda: reference(atomic_types=[1], width=0), DeclarationError, "width: expected a positive integer, got 0"),
        (lambda: reference(atomic_types=[1], cutoff_width=9.0), DeclarationError, "a length up to 5.0, got 9.0"),
        (lambda: ReferenceGNN({"atomic_types": [1]}), InvalidTypeError, "expected a GNNConfig, got dict"),
        (lambda: load("ethnol"), DeclarationError, "ethnol"),
        (lambda: load(dtype=torch.float16), InvalidTypeError, "float32 or torch.float64"),
    ],
)
def test_bad_arguments_of_the_reference(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_shipped_model_is_as_accurate_as_it_says():
    assert "ethanol" in shipped()
    model = load(dtype=torch.float64)
    assert model.config == GNNConfig.from_dict(model.describe())
    frames = ase.io.read(str(files("symmetrize.demo") / "data" / "ethanol-test.xyz"), ":")
    batch = from_ase(frames)
    out = Symmetrizer(model, Identity(), scope="structure")(batch, forces=True)
    stated = model.metadata["training"]["errors"]["test"]
    energies = torch.tensor([atoms.get_potential_energy() for atoms in frames], dtype=torch.float64)
    forces = torch.tensor(np.concatenate([atoms.get_forces() for atoms in frames]))
    bare = {
        "energy_mae": float((out["energy"] - energies).abs().mean()),
        "forces_mae": float((out["forces"] - forces).abs().mean()),
    }
    for name, value in bare.items():
        assert abs(value - stated[name]) < 0.01 * stated[name]
    assert bare["forces_mae"] < 0.2 * float(forces.abs().mean())


@pytest.mark.parametrize("name, options", [("gnn", {}), ("schnet", {"hidden_channels": 16})])
def test_adapters_are_found_by_name(name, options):
    require_adapter(name)
    model = load_backbone(name, **options)
    assert model.adapter == name
    twin = rebuild_backbone(name, json.loads(json.dumps(model.describe()))).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    batch = from_ase(molecule("CH3CH2OH"), cutoff=model.cutoff, dtype=model.dtype)
    assert torch.equal(twin(batch)["energy"], model(batch)["energy"])


# --- SchNet ---------------------------------------------------------------------------------------------------------


def test_schnet_is_invariant_and_averaging_changes_nothing():
    backbone = load_schnet(hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=8, cutoff=4.0).double()
    batch = from_ase(list(FINITE.values()), cutoff=4.0)
    bare = backbone(batch)["energy"].detach()
    turned = backbone(from_ase_cut(turn(batch, rotation_of(5)), 4.0))["energy"].detach()
    out = Symmetrizer(backbone.eval(), ECSE())(batch, forces=True)
    limit = tolerance(torch.float64)
    assert float((bare - turned).abs().max()) < limit and float((bare - out["energy"]).abs().max()) < limit
    assert float(bare.std()) > 1e-3
    pos = batch.pos.clone().requires_grad_()
    energy = backbone(from_ase_cut(replace(batch, pos=pos, edge_vec=None, edge_index=None, edge_cutoff=None), 4.0))
    gradient = torch.autograd.grad(energy["energy"].sum(), pos)[0]
    assert float((out["forces"] + gradient).abs().max()) < limit * (1 + float(gradient.abs().max()))


def from_ase_cut(batch, cutoff):
    return with_neighbors(replace(batch, cell_shift=None), cutoff)


def test_schnet_sees_cells_and_any_model_will_do():
    torch.manual_seed(0)
    model = SchNet(8, 8, 2, 6, cutoff=4.0, mean=0.5, std=2.0, atomref=torch.arange(100.0)[:, None]).double()
    backbone = SchNetBackbone(model)
    small = rattled(bulk("NaCl", "rocksalt", a=4.6))
    one, two = (backbone(from_ase(atoms, cutoff=4.0))["energy"] for atoms in (small, small * (2, 1, 1)))
    torch.testing.assert_close(2.0 * one, two, rtol=1e-12, atol=0)
    assert float((one - backbone(from_ase(Atoms(small, pbc=False), cutoff=4.0))["energy"]).detach().abs()) > 1e-4
    twin = rebuild_schnet(json.loads(json.dumps(backbone.describe()))).double()
    twin.load_state_dict(backbone.state_dict())
    assert torch.equal(twin(from_ase(small, cutoff=4.0))["energy"], one)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: SchNetBackbone(SchNet(8, 8, 1, 4, dipole=True)), DeclarationError, "got dipole=True"),
        (lambda: SchNetBackbone(torch.nn.Linear(1, 1)), InvalidTypeError, "SchNet, got Linear"),
        (lambda: load_schnet(width=3), DeclarationError, "unknown argument 'width'"),
        (lambda: load_schnet()(from_ase(Atoms("X"), cutoff=10.0)), UnknownSpeciesError, "from 1 to 99, got 0"),
        (lambda: load_schnet().model(torch.ones(2).long(), torch.rand(2, 3)), InvalidInputError, "expected edges"),
    ],
)
def test_bad_use_of_schnet(make, error, message):
    with pytest.raises(error, match=message):
        make()
