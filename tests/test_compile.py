"""`Symmetrizer.compile`: same results, no graph breaks, few compilations, and plain code wherever it cannot serve."""

from __future__ import annotations

import copy

import pytest
import torch
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyLocal
from torch._dynamo.testing import CompileCounterWithBackend

from symmetrize import ECSE, Symmetrizer, from_ase, keys
from symmetrize.errors import DeclarationError
from symmetrize.methods.ecse.coordinate_systems import axis_frames, frames_from_normals, pair_frames, unit_vectors
from symmetrize.methods.ecse.weights import lowest_key, pair_key
from symmetrize.ops.switches import smooth_step
from symmetrize.testing.structures.geometries import ethanol

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # torch.compile warns about itself

WIDTHS = {"d_pet": 8, "d_node": 12, "d_head": 8, "d_feedforward": 8, "num_heads": 2}
TINY = {**WIDTHS, "num_attention_layers": 1, "num_gnn_layers": 1}


def plain_model():
    return Symmetrizer(PET(PETConfig((1, 6, 8), cutoff=3.5, **TINY)).double(), ECSE()).eval()


def molecules(n, seed=0):
    atoms = ethanol()
    atoms.rattle(0.05, seed=seed)
    return from_ase(atoms[:n])


def far(first, second):
    return float((first - second).abs().max() / second.abs().max())


@pytest.fixture(scope="module")
def pair():
    """A plain model, a compiled one, and what counts the graphs (tracing and derivatives; no code is generated)."""
    counter = CompileCounterWithBackend("aot_eager")
    plain = plain_model()
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True, backend=counter)
    yield plain, compiled, counter
    torch.compiler.reset()


def test_energies_and_forces_are_those_of_the_plain_model_in_few_compilations(pair):
    plain, compiled, counter = pair
    for seed in range(20):
        batch = molecules(3 + seed % 7, seed)
        first, second = compiled(batch, forces=True), plain(batch, forces=True)
        for name in ("energy", "forces"):
            assert far(first[name], second[name]) < 1e-12
    with torch.no_grad():
        for seed in range(5):
            batch = molecules(3 + seed, seed)
            assert far(compiled(batch)["energy"], plain(batch)["energy"]) < 1e-12
    # With and without derivatives, each once more where sizes agree by chance.
    assert 2 <= counter.frame_count <= 4


def test_the_comparison_sees_other_parameters(pair):
    plain, compiled, _ = pair
    batch = molecules(6)
    weight = next(compiled.backbone.network.gnn_layers[0].trans.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    changed = far(compiled(batch, forces=True)["forces"], plain(batch, forces=True)["forces"])
    with torch.no_grad():
        weight.copy_(kept)
    assert changed > 1e-6, "compiled code reads parameters where they are"
    assert far(compiled(batch, forces=True)["forces"], plain(batch, forces=True)["forces"]) < 1e-12


def test_what_is_differentiated_again_is_plain(pair):
    plain, compiled, _ = pair
    batch = molecules(6)
    found = []
    for model in (plain, compiled):
        model.zero_grad()
        model(batch, forces=True, create_graph=True)["forces"].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert torch.equal(*found)


def test_training_reaches_the_parameters(pair):
    plain, compiled, _ = pair
    batch = molecules(6)
    found = []
    for model in (plain, compiled):
        model.zero_grad()
        model(batch)["energy"].sum().backward()
        found.append([p.grad.clone() for p in model.backbone.network.gnn_layers[0].trans.parameters()])
        model.zero_grad()
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
    compiled.train()
    assert compiled(batch, forces=True)["forces"].requires_grad
    compiled.eval()


def test_copies_are_plain(pair):
    _, compiled, counter = pair
    before = counter.frame_count
    duplicate = copy.deepcopy(compiled).float()
    assert duplicate(from_ase(ethanol(), dtype=torch.float32), forces=True)["forces"].dtype == torch.float32
    assert counter.frame_count == before


def test_a_backbone_without_such_parts_is_refused():
    backbone = ToyLocal()
    with pytest.raises(DeclarationError, match="names no parts"):
        Symmetrizer(backbone, ECSE()).compile()


def breaking(x):
    return x * 2.0 if bool((x > 0.0).any()) else x


@pytest.mark.parametrize(
    ("function", "n_vectors"),
    [
        (unit_vectors, 1),
        (axis_frames, 1),
        (pair_frames, 2),
        (frames_from_normals, 2),
        (smooth_step, 1),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_frames_are_made_of_compiles_without_breaks(function, n_vectors):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 7, 12):
        generator = torch.Generator().manual_seed(n)
        vectors = [torch.randn(n, 3, dtype=torch.float64, generator=generator) for _ in range(n_vectors)]
        vectors = [v / v.norm(dim=1, keepdim=True) for v in vectors]
        first, second = run(*vectors), function(*vectors)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, second)), strict=True):
            assert (a - b).abs().max() < 1e-12
    assert counter.frame_count == 1


def test_keys_of_pairs_compile_without_breaks():
    for function, n in ((pair_key, 4), (lowest_key, 3)):
        torch.compiler.reset()
        run = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        values = list(torch.rand(n, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
        assert (run(*values) - function(*values)).abs().max() < 1e-12


def test_a_break_would_be_seen():
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(breaking, fullgraph=True, backend="aot_eager")(torch.ones(3))


def test_an_empty_neighborhood_is_evaluated(pair):
    plain, compiled, _ = pair
    batch = molecules(1)
    assert batch[keys.POS].shape[0] == 1
    assert torch.equal(compiled(batch)["energy"], plain(batch)["energy"])
