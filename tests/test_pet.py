"""Point Edge Transformer: agreement with metatrain, the promises of a backbone, shared work, derivatives, storage."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from symmetrize.backbones.pet import PET, PETConfig, Target, load, rebuild
from symmetrize.backbones.pet.adaptive import adaptive_cutoffs
from symmetrize.backbones.pet.attention import attend
from symmetrize.backbones.pet.edges import cutoff_weights, reverse_edges
from symmetrize.backbones.pet.pointwise import gate, rms_normalize, silu
from symmetrize.backbones.pet.storage import metatrain_name

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.backbone import Copies
from symmetrize.data import edge_vectors, from_ase, from_points
from symmetrize.errors import (
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    MissingDependencyError,
    UnknownSpeciesError,
)
from symmetrize.metatomic import import_metatrain
from symmetrize.ops.rotations import random_rotations

SPECIES = (1, 6, 8)
CUTOFF = 3.0


def tiny(**changes):
    fields = dict(
        atomic_types=SPECIES,
        cutoff=CUTOFF,
        cutoff_width=1.0,
        normalization_epsilon=None,  # as metatrain
        d_pet=8,
        d_node=12,
        d_head=6,
        d_feedforward=10,
        num_heads=2,
    )
    return PETConfig(**{**fields, **changes})


def model_of(seed=0, **changes):
    model = PET(tiny(**changes), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # nothing at its neutral value: biases, gains
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def random_batch(counts=(5, 7), seed=1, box=3.0):
    generator = torch.Generator().manual_seed(seed)
    pos = []
    for n in counts:  # rejection keeps atoms apart
        points = torch.zeros(0, 3, dtype=torch.float64)
        while len(points) < n:
            new = box * torch.rand(1, 3, generator=generator, dtype=torch.float64)
            if not len(points) or float((points - new).norm(dim=1).min()) > 0.8:
                points = torch.cat([points, new])
        pos.append(points)
    structure = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    z = torch.tensor(SPECIES)[torch.randint(3, (sum(counts),), generator=generator)]
    return from_points(torch.cat(pos), batch=structure, z=z, cutoff=CUTOFF)


def periodic_batch():
    from ase import Atoms

    small = Atoms("CO", positions=[[0.1, 0.0, 0.2], [1.3, 1.1, 1.4]], cell=[2.6, 2.7, 2.9], pbc=True)
    return from_ase([small, small * (2, 1, 1)], cutoff=CUTOFF)


def energy(model, batch):
    return model(batch)["energy"]


def with_pos(batch, pos):
    out = copy.copy(batch)
    out["pos"] = pos
    if "edge_vec" in out:
        del out["edge_vec"]
    return out


ARCHITECTURES = [
    dict(featurizer_type=featurizer, num_gnn_layers=blocks)
    for featurizer in ("residual", "feedforward")
    for blocks in (1, 2, 3)
]

ADAPTIVE = [
    dict(num_neighbors_adaptive=3.0, adaptive_cutoff_method=method, **blocks)
    for method in ("solver", "grid")
    for blocks in (ARCHITECTURES[0], ARCHITECTURES[1], ARCHITECTURES[3])
]


@pytest.fixture(scope="module")
def metatrain_backend():
    try:
        return import_metatrain("metatrain.pet.modules.backend").PETBackend
    except MissingDependencyError as error:
        if {"metatrain", "all"} & set(os.environ.get("REQUIRE_ADAPTERS", "").split(",")):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.parametrize("blocks", ARCHITECTURES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        dict(normalization="LayerNorm", activation="SiLU", transformer_type="PostLN", cutoff_function="cosine"),
        dict(d_node=8, attention_temperature=1.3),
    ],
    ids=["default", "paper", "narrow"],
)
def test_same_function_as_metatrain(metatrain_backend, blocks, kind):
    model = model_of(**blocks, **kind)
    hypers = model.config.to_dict() | {
        "long_range": {"enable": False},
    }
    other = metatrain_backend(hypers, list(SPECIES))
    other.add_output("energy", {"energy___0": [1]})
    other = other.double().train()
    names = {metatrain_name(name): value for name, value in model.network.state_dict().items()}
    missing, unexpected = other.load_state_dict(names, strict=False)
    assert missing == ["species_to_species_index"] and not unexpected
    for batch in (random_batch(), periodic_batch()):
        source, target = batch.edge_index
        data = other.preprocess(
            batch.pos, target, source, batch.z, batch.cell, batch.cell_shift.long(), batch.batch, 1.0
        )
        predictions, _, _ = other.predict(*other.calculate_features(data), data, batch.cell, batch.batch, ["energy"])
        torch.testing.assert_close(energy(model, batch), predictions["energy"][0][:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", ARCHITECTURES + ADAPTIVE[:3], ids=str)
def test_receptive_field_is_what_is_declared(blocks):
    # A chain in which each atom sees its two neighbors: the gradient ends exactly at the receptive field.
    model = model_of(**blocks)
    pos = torch.zeros(12, 3, dtype=torch.float64)
    pos[:, 0] = torch.arange(12) * 2.0
    pos += 0.1 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = from_points(pos, z=torch.full((12,), 6), cutoff=CUTOFF)
    pos = pos.requires_grad_()
    gradient = torch.autograd.grad(energy(model, with_pos(batch, pos))[0], pos)[0].norm(dim=1)
    hops = model.receptive_field
    assert float(gradient[1 : hops + 1].min()) > 1e-12 and float(gradient[hops + 1 :].max()) == 0.0


@pytest.mark.parametrize("blocks", ARCHITECTURES + ADAPTIVE, ids=str)
@pytest.mark.parametrize("make", [random_batch, periodic_batch])
def test_whole_copies_equal_rotated_batches(blocks, make):
    model, batch = model_of(**blocks), make()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    edge_vec = batch.edge_vec
    n_atoms, n_edges = batch.pos.shape[0], edge_vec.shape[0]
    cache = model.prepare(batch)
    plain = model.forward_frames(cache, edge_vec)["energy"]
    assert torch.equal(plain, energy(model, batch))
    n_structures = len(batch.ptr) - 1
    atom, edge = torch.arange(n_atoms).repeat(2), torch.arange(n_edges).repeat(2)
    structure_of_edge = batch.batch[batch.edge_index[1]]
    copies = Copies(
        atom=atom,
        edge=edge,
        atom_copy=torch.cat([batch.batch, batch.batch + n_structures]),
        edge_copy=torch.cat([structure_of_edge, structure_of_edge + n_structures]),
        source=torch.cat([batch.edge_index[0], batch.edge_index[0] + n_atoms]),
        target=torch.cat([batch.edge_index[1], batch.edge_index[1] + n_atoms]),
        center=torch.ones(2 * n_atoms, dtype=torch.bool),
    )
    cache = copies.gather(cache, model.cache_rows)
    both = model.forward_frames(cache, torch.cat([edge_vec, edge_vec @ rotation]), copies)["energy"]
    rotated = copy.copy(batch)
    rotated["edge_vec"] = edge_vec @ rotation
    torch.testing.assert_close(both, torch.cat([plain, energy(model, rotated)]), rtol=1e-12, atol=1e-13)
    assert float((both[:n_atoms] - both[n_atoms:]).detach().abs().max()) > 1e-4  # no invariant model


@pytest.mark.parametrize("blocks", ARCHITECTURES + ADAPTIVE, ids=str)
def test_environments_equal_rows_of_the_batch(blocks):
    model, batch = model_of(**blocks), random_batch((9, 4), box=5.0)
    source, target = batch.edge_index
    n_atoms = batch.pos.shape[0]
    everything = energy(model, batch)
    pieces: dict[str, list] = {name: [] for name in Copies._fields}
    offset = 0
    for number in range(n_atoms):
        inside = torch.zeros(n_atoms, dtype=torch.bool)
        inside[number] = True
        kept = torch.zeros(0, dtype=torch.int64)
        for _ in range(model.oriented_field):  # what an adaptive cutoff sees beyond was prepared
            kept = inside[target].nonzero().view(-1)
            inside[source[kept]] = True
        if model.oriented_field == 1:
            atom, row = torch.tensor([number]), torch.zeros(n_atoms, dtype=torch.int64)
        else:
            atom = inside.nonzero().view(-1)
            row = torch.cumsum(inside, 0) - 1
            pieces["source"].append(row[source[kept]] + offset)
        pieces["atom"].append(atom)
        pieces["edge"].append(kept)
        pieces["atom_copy"].append(torch.full_like(atom, number))
        pieces["edge_copy"].append(torch.full_like(kept, number))
        pieces["target"].append(row[target[kept]] + offset)
        pieces["center"].append(atom == number)
        offset += len(atom)
    empty = [torch.zeros(0, dtype=torch.int64)]
    copies = Copies(**{name: torch.cat(value or empty) for name, value in pieces.items()})
    cache = copies.gather(model.prepare(batch), model.cache_rows)
    local = model.forward_frames(cache, batch.edge_vec[copies.edge], copies)["energy"]
    torch.testing.assert_close(local, everything, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("blocks", ARCHITECTURES[:4] + ADAPTIVE, ids=str)
def test_center_mask_permutation_translation_batching(blocks):
    model, batch = model_of(**blocks), random_batch()
    reference = energy(model, batch)
    mask = torch.arange(len(batch.pos)) % 3 == 1
    masked = copy.copy(batch)
    masked["center_mask"] = mask
    torch.testing.assert_close(energy(model, masked), reference[mask], rtol=1e-12, atol=1e-13)
    assert model.baseline(masked)["energy"].shape == (int(mask.sum()),)
    # unsorted edges
    order = torch.randperm(batch.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = copy.copy(batch)
    for key in ("cell_shift", "edge_vec"):
        shuffled[key] = batch[key][order]
    shuffled["edge_index"] = batch.edge_index[:, order]
    torch.testing.assert_close(energy(model, shuffled), reference, rtol=1e-12, atol=1e-13)
    # order of the atoms, translation, other structures in the batch
    first = from_points(batch.pos[:5], z=batch.z[:5], cutoff=CUTOFF)
    torch.testing.assert_close(energy(model, first), reference[:5], rtol=1e-12, atol=1e-13)
    permutation = torch.tensor([3, 0, 4, 1, 2])
    moved = from_points(batch.pos[:5][permutation] + 1.7, z=batch.z[:5][permutation], cutoff=CUTOFF)
    torch.testing.assert_close(energy(model, moved), reference[:5][permutation], rtol=1e-11, atol=1e-12)
    assert float((reference[:5][permutation] - reference[:5]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("function", ["bump", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cutoff_weights(function, dtype):
    length = torch.linspace(0.5, 3.5, 6001, dtype=dtype, requires_grad=True)
    weight, log_weight = cutoff_weights(length, 3.0, 1.0, function)
    assert bool((weight[length <= 2.0] == 1).all()) and bool((weight[length >= 3.0] == 0).all())
    assert bool((weight[1:] <= weight[:-1] + 1e-6).all())
    visible = weight > 1e-30
    torch.testing.assert_close(log_weight[visible], weight[visible].log(), rtol=1e-4, atol=1e-6)
    first = torch.autograd.grad(weight.sum() + log_weight.sum(), length, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), length)[0]
    assert bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())


@pytest.mark.parametrize("blocks", ARCHITECTURES[:4] + ADAPTIVE[::2], ids=str)
def test_smooth_at_the_cutoff(blocks):
    model = model_of(**blocks)
    base = random_batch((4,), box=2.0)

    def force(distance, n_atoms):
        pos = torch.cat([base.pos, base.pos[:1] - torch.tensor([[distance, 0.0, 0.0]])])[:n_atoms]
        z = torch.cat([base.z, torch.tensor([8])])[:n_atoms]
        batch = from_points(pos, z=z, cutoff=20.0)  # a list with a skin: edges beyond the cutoff are there
        pos = pos.requires_grad_()
        values = energy(model, with_pos(batch, pos))
        return values.detach()[:4], torch.autograd.grad(values[:4].sum(), pos)[0][:4]

    alone_energy, alone_force = force(0.0, 4)
    outside = force(CUTOFF + 3.0, 5)
    torch.testing.assert_close(outside[0], alone_energy, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(outside[1], alone_force, rtol=1e-13, atol=1e-13)
    leftmost = float(base.pos[:, 0].min() - base.pos[0, 0])
    just = force(CUTOFF - 0.02 + max(0.0, -leftmost), 5)
    torch.testing.assert_close(just[1], alone_force, rtol=1e-9, atol=1e-9)
    inside = force(CUTOFF - 1.0, 5)
    assert float((inside[0] - alone_energy).abs().max()) > 1e-4


@pytest.mark.parametrize("blocks", ARCHITECTURES[:5] + ADAPTIVE[::2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isolated_atoms(blocks, dtype):
    model = model_of(**blocks).to(dtype)
    pos = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [9.0, 0, 0]], dtype=dtype)
    for points in (pos, pos[:1]):
        batch = from_points(points, z=torch.full((len(points),), 6), cutoff=CUTOFF)
        points = points.clone().requires_grad_()
        values = energy(model, with_pos(batch, points))
        gradient = torch.autograd.grad(values.sum() + 0 * points.sum(), points, create_graph=True)[0]
        (gradient.square().sum() + values.sum()).backward()
        assert values.dtype == dtype and bool(torch.isfinite(values).all()) and bool(torch.isfinite(gradient).all())
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "blocks", [ARCHITECTURES[0], ARCHITECTURES[1], ARCHITECTURES[3], ADAPTIVE[0], ADAPTIVE[3]], ids=str
)
def test_second_derivatives_of_the_model(blocks):
    sizes = dict(d_pet=4, d_node=6, d_head=3, d_feedforward=4, num_heads=2, num_attention_layers=1)
    model = model_of(**sizes, **blocks)
    batch = random_batch((4,), box=2.0)

    def function(pos):
        return energy(model, with_pos(batch, pos))

    pos = batch.pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (pos,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (pos,), fast_mode=True)


@pytest.mark.parametrize(
    "function", [lambda x: rms_normalize(x, 1e-5), silu, gate], ids=["rms_normalize", "silu", "gate"]
)
def test_derivatives_of_pointwise_functions(function):
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))

    def gradient(x):
        return torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x,), fast_mode=True)  # third derivatives


def test_derivatives_of_attention():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: attend(a, b, 2), (qkv, bias))
    assert torch.autograd.gradgradcheck(lambda a, b: attend(a, b, 2), (qkv, bias))

    def gradient(a, b):
        return torch.autograd.grad(attend(a, b, 2).square().sum(), (a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (qkv, bias), fast_mode=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("blocks", [ARCHITECTURES[0], ARCHITECTURES[1], ARCHITECTURES[4]], ids=str)
@pytest.mark.parametrize("kind", [{}, dict(normalization="LayerNorm", activation="SiLU", transformer_type="PostLN")])
def test_torchscript(blocks, kind):
    model, batch = model_of(direct_forces=True, **blocks, **kind), random_batch()
    scripted = torch.jit.script(model.network)
    lengths = torch.linspace(1.0, 4.0, 50, dtype=torch.float64)
    for function in ("bump", "cosine"):
        expected = torch.stack(cutoff_weights(lengths, 3.0, 1.0, function))
        assert torch.equal(torch.stack(torch.jit.script(cutoff_weights)(lengths, 3.0, 1.0, function)), expected)
    cache = model.prepare(batch)
    arguments = [batch.edge_vec, cache["edge_scalars"], cache["neighbor_species"], cache["species"], cache["source"]]
    arguments += [cache["target"], cache["reverse"], torch.arange(len(batch.pos)) > 2]
    for name, value in model.network(*arguments).items():
        torch.testing.assert_close(scripted(*arguments)[name], value, rtol=1e-12, atol=1e-12)


SCRIPTED = {
    "plain": ARCHITECTURES[0],
    "two blocks": ARCHITECTURES[1],
    "feedforward": ARCHITECTURES[3],
    "solver": ADAPTIVE[0],
    "grid": ADAPTIVE[4],
    "repulsion": dict(zbl=(0.31, 0.76, 0.66)),
    "targets": dict(
        targets=(
            Target("energy", irreps="0e", reduce="sum", unit="eV"),
            Target("charges", irreps="3x0e"),
            Target("non_conservative_stress", cartesian="ij=ji", reduce="sum", per_volume=True),
            Target("a[0]", irreps="2e", head="a"),
            Target("a[1]", cartesian="ij", head="a"),
        )
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", SCRIPTED)
def test_scriptable_form_is_the_same_function(case, tmp_path):
    model = model_of(**SCRIPTED[case])
    generator = torch.Generator().manual_seed(4)
    model.factor.copy_(torch.rand(model.factor.shape, generator=generator, dtype=torch.float64) + 0.5)
    model.composition.copy_(torch.tensor([-13.6, -1029.123456789012, -2041.0], dtype=torch.float64))
    if case == "targets":
        model.offset[:, 2] = 3.0
    form = model.scriptable()
    assert {id(p) for p in form.parameters()} == {id(p) for p in model.parameters()}
    torch.jit.script(form).save(str(tmp_path / "form.pt"))
    scripted = torch.jit.load(str(tmp_path / "form.pt"))
    for batch in (random_batch((9, 4), box=5.0), periodic_batch()):
        for center in (torch.ones_like(batch.z, dtype=torch.bool), torch.arange(len(batch.z)) % 3 == 1):
            pos = batch.pos.clone().requires_grad_()
            masked = with_pos(batch, pos)
            masked["center_mask"] = center
            expected = model(masked)
            gradient = torch.autograd.grad(expected["energy"].sum(), pos, retain_graph=True)[0]
            edge_vec = edge_vectors(masked)
            shift = batch.cell_shift.to(torch.int64)
            arguments = (pos, batch.z, batch.batch, len(batch.ptr) - 1, batch.edge_index, shift, edge_vec, center)
            out = scripted(*arguments, cell=batch.cell)
            assert list(out) == list(expected) == list(model.outputs)
            for name, value in expected.items():
                torch.testing.assert_close(out[name], value, rtol=1e-12, atol=1e-13)
            again = torch.autograd.grad(out["energy"].sum(), pos)[0]
            torch.testing.assert_close(again, gradient, rtol=1e-10, atol=1e-12)
            assert float(gradient.norm()) > 1e-6
            baseline, other = model.baseline(masked), scripted.baseline(batch.z[center])
            assert list(other) == list(baseline)
            assert all(
                torch.equal(other[name], value) and value.dtype == torch.float64 for name, value in baseline.items()
            )
            without = scripted(*arguments)
            assert set(out) - set(without) == ({"non_conservative_stress"} if case == "targets" else set())
    with pytest.raises(torch.jit.Error, match="species that this model was built for"):
        scripted(pos, torch.full_like(batch.z, 92), *arguments[2:])


@pytest.mark.parametrize("blocks", [*ADAPTIVE[::3], dict(zbl=(0.31, 0.76, 0.66))], ids=str)
@pytest.mark.parametrize("stars", [False, True])
def test_invariants_of_what_lies_beyond_leave_symmetrisation_exact(blocks, stars):
    """An adaptive cutoff sees two hops; the copies need to hold one, since that reaches no further than distances."""
    model = model_of(cutoff=4.0, **blocks)
    assert model.receptive_field == (2 if "num_neighbors_adaptive" in blocks else 1) and model.oriented_field == 1
    if stars:
        model.receptive_field = model.oriented_field
    batch = random_batch((6, 4), box=4.0)
    batch = from_points(batch.pos, batch=batch.batch, z=batch.z)
    rotation = random_rotations(1, torch.Generator().manual_seed(3))[0]
    turned = from_points(batch.pos @ rotation.T, batch=batch.batch, z=batch.z)
    errors = {}
    for method in (ECSE(), Identity()):
        symmetrized = Symmetrizer(model.eval(), method, scope="atom")
        out, other = symmetrized(batch, forces=True), symmetrized(turned, forces=True)
        errors[type(method).__name__] = max(
            float((other["energy"] - out["energy"]).abs().max()),
            float((other["forces"] - out["forces"] @ rotation.T).abs().max()),
        )
        step, pair = 1e-4, []
        for sign in (1.0, -1.0):
            pos = batch.pos.clone()
            pos[2, 1] += sign * step
            pair.append(float(symmetrized(from_points(pos, batch=batch.batch, z=batch.z))["energy"].detach().sum()))
        assert abs((pair[1] - pair[0]) / (2 * step) - float(out["forces"][2, 1])) < 1e-6
    assert errors["ECSE"] < 1e-12 < 1e-5 < errors["Identity"]


def test_training_reaches_all_parameters():
    """Gradients of a loss on forces, through frames and through what was prepared, against finite differences."""
    extras = dict(zbl=(0.31, 0.76, 0.66), system_conditioning=True, **ADAPTIVE[0])
    model = model_of(**extras)
    symmetrized = Symmetrizer(model, ECSE(), scope="atom", chunk_size=8)  # several chunks
    batch = random_batch((4,), box=2.0)
    batch = from_points(batch.pos, z=batch.z)
    batch["charge"] = torch.tensor([2])
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return (symmetrized(batch, forces=True)["forces"] * target).square().sum()

    loss().backward()
    project = model.network.system_conditioning.project[0].weight
    for parameter in (project, model.network.edge_embedder.weight, model.network.gnn_layers[0].edge_embedder.weight):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        place, step = int(gradient.abs().argmax()), 1e-4
        values = []
        for sign in (1.0, -1.0):
            flat[place] += sign * step
            values.append(float(loss().detach()))
            flat[place] -= sign * step
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
        assert float(gradient[place].abs()) > 1e-6


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_all_outputs_turn_with_the_structure(scope):
    """Several outputs of one readout, a stress that is divided by the volume, a rank-2 tensor, an irrep of degree 2."""
    model = model_of(**SCRIPTED["targets"]).eval()
    listed = periodic_batch() if scope == "atom" else random_batch()
    boxed = scope == "structure"
    if boxed:  # molecules in a box, which is not a volume to divide by
        listed["cell"] = 4.0 * torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    batch = copy.copy(listed)
    for key in ("edge_index", "cell_shift", "edge_vec", "edge_cutoff"):
        del batch[key]
    rotation = random_rotations(1, torch.Generator().manual_seed(3))
    turned = copy.copy(batch)
    turned["pos"], turned["cell"] = batch.pos @ rotation[0].T, batch.cell @ rotation[0].T
    errors = {}
    for method in (ECSE(), Identity()):
        symmetrized = Symmetrizer(model, method, scope=scope)
        out, other = symmetrized(batch), symmetrized(turned)
        if isinstance(method, Identity):
            direct = model(listed)
            torch.testing.assert_close(out["charges"] - model.baseline(batch).get("charges", 0), direct["charges"])
            stress = direct["non_conservative_stress"].detach()
            assert torch.equal(stress, stress.transpose(1, 2)) and (float(stress.abs().max()) > 1e-6) != boxed
            torch.testing.assert_close(out["atomic_non_conservative_stress"], direct["non_conservative_stress"])
        for name, spec in model.outputs.items():
            if boxed and name == "non_conservative_stress":
                continue
            rows = len(out[name])
            expected = spec.rotate(out[name], rotation.expand(rows, 3, 3))
            scale = float(out[name].detach().abs().max())
            errors.setdefault(name, []).append(float((other[name] - expected).detach().abs().max()) / scale)
    for name, (exact, bare) in errors.items():
        assert exact < 1e-11 < 1e-6 < bare, name


@pytest.mark.parametrize("method", ["solver", "grid"])
def test_adaptive_cutoffs(method):
    """About as many neighbors as wanted, in a crystal and around an atom without any."""
    from ase.build import bulk

    batch = from_ase(bulk("Al", "fcc", 4.05), cutoff=9.0)
    length = batch.edge_vec.norm(dim=1)
    found = []
    for wanted in (6.0, 16.0, 40.0):
        arguments = (*batch.edge_index, 1, wanted, 9.0, 0.5, method)
        cutoff = adaptive_cutoffs(length, *arguments)
        assert bool((cutoff == cutoff[0]).all())
        found.append(int((length < cutoff).sum()))
        moved = length[:30].clone().requires_grad_()

        def function(moved, arguments=arguments):
            return adaptive_cutoffs(torch.cat([moved, length[30:]]), *arguments)[0]

        assert torch.autograd.gradcheck(function, (moved,), atol=1e-4, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (moved,), atol=1e-3, fast_mode=True)
    assert 6 <= found[0] <= 18 <= found[1] <= 43 and found[1] < found[2] <= 79
    empty = torch.zeros(0, dtype=torch.int64)
    assert adaptive_cutoffs(length[:0], empty, empty, 1, 6.0, 9.0, 0.5, method).shape == (0,)


def test_edges_beyond_an_adaptive_cutoff_count_for_nothing():
    """They are dropped, and kept (twin) they would have no influence."""
    model, batch = model_of(**ADAPTIVE[1]), random_batch((9, 4), box=4.0)
    cache = model.prepare(batch)
    visible = cache["edge_scalars"][:, 1] > 0
    assert 0 < int(visible.sum()) < len(visible)
    order = ("edge_scalars", "neighbor_species", "species", "source", "target", "reverse", "center")
    kept = model.network(batch.edge_vec, *(cache[name] for name in order))["energy"][:, 0]
    torch.testing.assert_close(energy(model, batch), kept, rtol=1e-12, atol=1e-13)
    cache["edge_scalars"][:, 1:] = 0.0
    wrong = model.network(batch.edge_vec, *(cache[name] for name in order))["energy"][:, 0]
    assert float((wrong - kept).detach().abs().max()) > 1e-4


def test_charge_and_spin_multiplicity():
    model, batch = model_of(system_conditioning=True, max_charge=2, max_spin_multiplicity=3), random_batch()
    assert "condition" in model.prepare(batch)
    neutral = energy(model, batch)
    batch["charge"], batch["spin_multiplicity"] = torch.tensor([0, 1]), torch.tensor([1, 2])
    charged = energy(model, batch)
    torch.testing.assert_close(charged[:5], neutral[:5], rtol=1e-12, atol=1e-13)
    assert float((charged[5:] - neutral[5:]).detach().abs().min()) > 1e-6
    bare = from_points(batch.pos, batch=batch.batch, z=batch.z)
    with torch.no_grad():
        once = Symmetrizer(model, Identity(), scope="atom")
        bare["charge"], bare["spin_multiplicity"] = batch.charge, batch.spin_multiplicity
        torch.testing.assert_close(once(bare)["atomic_energy"], charged.detach(), rtol=1e-12, atol=1e-12)
    for name, value, message in (
        ("charge", [0, 3], r"charge: structure 1: expected a whole number from -2 to 2.*got 3"),
        ("spin_multiplicity", [0, 1], "spin_multiplicity: structure 0: expected a whole number from 1 to 3"),
        ("charge", [0.5, 0.0], "got 0.5"),
        ("charge", [0], "one entry per structure"),
    ):
        wrong = copy.copy(batch)
        wrong[name] = torch.tensor(value)
        with pytest.raises(InvalidInputError, match=message):
            model(wrong)
    with pytest.raises(DeclarationError, match="charge and the spin multiplicity"):
        model.scriptable()


@pytest.mark.parametrize("case", SCRIPTED)
def test_description(case, tmp_path):
    """What `describe` says is enough to make the model again, but for its parameters."""
    model, batch = model_of(**SCRIPTED[case]), periodic_batch()
    model.metadata["recipe"] = {"epochs": 3}
    again = rebuild(json.loads(json.dumps(model.describe())))
    assert again.config == model.config and again.outputs == model.outputs and again.metadata == model.metadata
    again.double().load_state_dict(model.state_dict())
    model.save(tmp_path / "model")
    for name, value in model(batch).items():
        assert torch.equal(again(batch)[name], value)
        assert torch.equal(load(tmp_path / "model")(batch)[name], value)
    assert PET.adapter == "pet"
    with pytest.raises(InvalidInputError, match="entry 'config'"):
        rebuild({})


def test_files_of_the_first_version_still_load(tmp_path):
    model = model_of(direct_forces=True)
    model.scale.fill_(2.0)
    model.save(tmp_path / "model")
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["version"] == 2
    new = [field.name for field in dataclasses.fields(PETConfig)][-9:]
    assert new[0] == "targets"
    description["version"] = 1
    description["config"] = {name: value for name, value in description["config"].items() if name not in new}
    (tmp_path / "model.json").write_text(json.dumps(description))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in ("factor", "offset")}, tmp_path / "model.safetensors")
    batch = random_batch()
    for name, value in load(tmp_path / "model")(batch).items():
        assert torch.equal(value, model(batch)[name])
    description["version"] = 3
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(InvalidInputError, match="version 2 or an earlier one, got 3: it was written by a newer"):
        load(tmp_path / "model")


def test_direct_forces():
    model, batch = model_of(direct_forces=True), random_batch()
    out = model(batch)
    assert out["non_conservative_forces"].shape == (12, 3) and out["energy"].shape == (12,)


def test_storage(tmp_path):
    model = model_of(num_gnn_layers=2).float()
    model.metadata["recipe"] = {"epochs": 3}
    model.scale.fill_(0.3)
    model.composition.copy_(torch.tensor([-13.6, -1029.123456789012, -2041.0], dtype=torch.float64))
    batch = random_batch()
    model.save(tmp_path / "deep" / "some.model")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["some.model.json", "some.model.safetensors"]
    for name in ("some.model", "some.model.json", "some.model.safetensors"):
        again = load(tmp_path / "deep" / name)
        assert again.metadata == model.metadata and again.config == model.config and again.dtype == torch.float32
        assert torch.equal(energy(again, batch), energy(model, batch))
        assert torch.equal(again.composition, model.composition) and again.composition.dtype == torch.float64
    double = load(tmp_path / "deep" / "some.model", dtype=torch.float64)
    torch.testing.assert_close(energy(double, batch).float(), energy(model, batch), rtol=1e-4, atol=1e-5)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(energy(other, batch), energy(model, batch))
    model.metadata["bad"] = object()
    with pytest.raises(TypeError):
        model.save(tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
    description = json.loads((tmp_path / "deep" / "some.model.json").read_text())
    description["config"]["num_layers"] = 3
    (tmp_path / "deep" / "some.model.json").write_text(json.dumps(description))
    with pytest.raises(DeclarationError, match="unknown entry 'num_layers'"):
        load(tmp_path / "deep" / "some.model")


def test_composition_stays_exact():
    model = PET(tiny())
    model.composition.fill_(-4209.784941392146)
    model.float().double().half().float()
    assert model.composition.dtype == torch.float64 and float(model.composition[0]) == -4209.784941392146
    batch = random_batch()
    assert model.baseline(batch)["energy"].dtype == torch.float64
    model, double = model_of(), model_of()
    double.scale.fill_(2.0)
    torch.testing.assert_close(energy(double, batch), 2.0 * energy(model, batch))


def test_seed_decides_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    a, b, c = PET(tiny(), seed=1), PET(tiny(), seed=1), PET(tiny(), seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    batch = random_batch()
    assert torch.equal(energy(a, batch), energy(b, batch)) and not torch.equal(energy(a, batch), energy(c, batch))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(cutoff_function="bumb"), "did you mean 'bump'"),
        (dict(num_heads=3), "divisor of d_pet"),
        (dict(atomic_types=(8, 1)), "ascending"),
        (dict(atomic_types=()), "at least one"),
        (dict(cutoff=-1.0), "cutoff: expected a positive number"),
        (dict(cutoff_width=4.0), "cutoff_width"),
        (dict(num_gnn_layers=0), "num_gnn_layers"),
        (dict(num_neighbors_adaptive=-1.0), "num_neighbors_adaptive: expected a positive number"),
        (dict(adaptive_cutoff_method="solve"), "did you mean 'solver'"),
        (dict(zbl=(0.3,)), "a positive radius for each"),
        (dict(max_charge=-1), "max_charge: expected a whole number"),
        (dict(targets=()), "at least one Target"),
        (dict(targets=(Target("a", irreps="0e"), Target("a", irreps="1o"))), "distinct names"),
        (dict(targets=(Target("a", irreps="0e"),), direct_forces=True), "direct_forces"),
        (dict(targets=(Target("a", irreps="0e"),), zbl=(0.3, 0.7, 0.6)), "scalar output 'energy'"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises((DeclarationError, InvalidTypeError), match=message):
        tiny(**changes)


def test_errors():
    model, batch = model_of(num_gnn_layers=2), random_batch()
    stranger = copy.copy(batch)
    stranger["z"] = batch.z.clone()
    stranger["z"][7] = 92
    with pytest.raises(UnknownSpeciesError, match=r"structure 1, atom 2.*\[1, 6, 8\].*92"):
        model(stranger)
    half = copy.copy(batch)
    keep = batch.edge_index[0] < batch.edge_index[1]
    for key in ("cell_shift", "edge_vec"):
        half[key] = batch[key][keep]
    half["edge_index"] = batch.edge_index[:, keep]
    with pytest.raises(InvalidInputError, match="has its reverse"):
        model(half)
    with pytest.raises(InvalidInputError, match="neighbor list"):
        model(from_points(batch.pos, batch=batch.batch, z=batch.z))
    with pytest.raises(InvalidTypeError, match="PETConfig"):
        PET({"atomic_types": (1,)})
    with pytest.raises(DeclarationError, match="'ethanil'"):
        load("ethanil")
    assert dataclasses.replace(model.config, num_gnn_layers=1).receptive_field == 1


def test_reverse_edges_of_periodic_images():
    batch = periodic_batch()
    source, target = batch.edge_index
    reverse = reverse_edges(source, target, batch.cell_shift, len(batch.pos))
    assert torch.equal(reverse[reverse], torch.arange(len(source)))
    torch.testing.assert_close(batch.edge_vec[reverse], -batch.edge_vec, rtol=0, atol=1e-12)
    assert torch.equal(source[reverse], target)


def test_shipped_weights_are_the_same_function_in_both_precisions():
    """Also where features are so small that the epsilon of a normalization counts."""
    from ase.build import molecule
    from symmetrize.backbones.pet import load

    from symmetrize import Identity, Symmetrizer, from_ase

    for name in ("ethanol", "ethanol-2block"):
        out = {}
        for dtype in (torch.float32, torch.float64):
            model = Symmetrizer(load(name, dtype=dtype), Identity())
            out[dtype] = model(from_ase(molecule("CH3CH2OH"), dtype=dtype), forces=True)["forces"].double()
        scale = out[torch.float64].square().mean().sqrt()
        assert (out[torch.float32] - out[torch.float64]).abs().max() < 1e-3 * scale


@pytest.mark.parametrize("width", [0.1, 0.25, 1.0])
def test_adaptive_cutoffs_are_solutions(width):
    """Also where Newton's steps land on the ends of the bracket, and in shells between which the count hardly rises."""
    from symmetrize.backbones.pet.adaptive import count, solve

    generator = torch.Generator().manual_seed(0)
    n = 500
    target = torch.arange(n).repeat_interleave(20)
    shells = 6.0 * torch.rand(n, 4, generator=generator, dtype=torch.float64)
    length = shells[target, torch.randint(0, 4, (20 * n,), generator=generator)]
    length = (length + 0.02 * torch.randn(20 * n, generator=generator, dtype=torch.float64)).abs()
    radius = solve(length, target, n, 8.0, 6.0, width)
    inside = (radius > 6.0 / 16.0 + 1e-9) & (radius < 6.0 - 1e-9)
    missed = (count(radius, length, target, 8.0, 6.0, width)[0] - 8.0).abs()
    assert int(inside.sum()) > 0.9 * n and float(missed[inside].max()) < 1e-11
    # Half of the neighbors within half of the largest radius, and half as many too many within all of it.
    cycle = torch.tensor([1.2, 1.3, 1.4, 1.5, *torch.linspace(3.6, 4.8, 8).tolist()], dtype=torch.float64)
    there = torch.zeros(12, dtype=torch.int64)
    root = solve(cycle, there, 1, 8.0, 6.0, 1.0)
    assert float((count(root, cycle, there, 8.0, 6.0, 1.0)[0] - 8.0).abs().max()) < 1e-11
    start = count(torch.full((1,), 6.0, dtype=torch.float64), cycle, there, 8.0, 6.0, 1.0)[0]
    assert float((start - 8.0).abs().max()) > 1.0, "or this shows nothing"
