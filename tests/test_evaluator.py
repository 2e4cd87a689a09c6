"""The evaluator as a machine: against a naive loop over frames, in chunks, differentiated, copied, distributed."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from torch.autograd.graph import saved_tensors_hooks

from symmetrize import ECSE, Identity, Symmetrizer
from symmetrize.backbone import Backbone
from symmetrize.data import from_ase, from_points, replace, validate
from symmetrize.frames import FrameMethod, FrameSet, Stratum
from symmetrize.ops.rotations import random_rotations
from symmetrize.representations import OutputSpec
from symmetrize.testing.structures.geometries import crystal, ethanol, geometries, linear, off_axis

EPS = torch.finfo(torch.float64).eps
OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "dipole": OutputSpec("1o", reduce="mean"),
    "axial": OutputSpec("1e"),
    "quadrupole": OutputSpec(cartesian="ij=ji"),
    "mixed": OutputSpec("0o + 0e + 2e"),
}
WHOLE = {**OUTPUTS, "gap": OutputSpec("0e", per="structure"), "torque": OutputSpec("1e", per="structure")}
CUTOFF = 2.6


def pet(seed=0, **changes):
    sizes = dict(d_pet=6, d_node=6, d_head=6, d_feedforward=6, num_heads=1)
    model = PET(PETConfig(atomic_types=(1, 6, 8), cutoff=CUTOFF, cutoff_width=1.0, **sizes, **changes), seed=seed)
    with torch.no_grad():
        for p in model.parameters():  # well away from the small values of a fresh network
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        model.composition.copy_(torch.tensor([-13.0, -1030.0, -2040.0]))
    return model.double()


def local(hops=1, outputs=None, width=6):
    return ToyLocal(outputs=outputs, cutoff=CUTOFF, n_hops=hops, width=width)


#: Name -> (backbone, scope); every path through the evaluator.
MACHINES = {
    "local, atom": lambda: (local(1), "atom"),
    "two hops, atom": lambda: (local(2), "atom"),
    "two hops, structure": lambda: (local(2), "structure"),
    "global, structure": lambda: (ToyGlobal(width=6), "structure"),
    "pet, atom": lambda: (pet(num_gnn_layers=1), "atom"),
    "pet, two blocks, atom": lambda: (pet(num_gnn_layers=2), "atom"),
    "pet, two blocks, structure": lambda: (pet(num_gnn_layers=2), "structure"),
}


def machine(name, method=None, **options):
    backbone, scope = MACHINES[name]()
    return Symmetrizer(backbone, ECSE() if method is None else method, scope=scope, **options)


def bent():
    """Four atoms without any symmetry."""
    return Atoms("CHOH", positions=[[0.0, 0.1, 0.0], [1.05, 0.3, -0.2], [-0.4, 1.1, 0.5], [-0.6, -0.5, -0.9]])


def molecules():
    """Different sizes, nobody alone, so that without chunks there is one call."""
    return from_ase([ethanol(), geometries()["water"], bent()])


def strata():
    """Frames, axes, the point, and mixtures: a pair that fades out at the cutoff, a line that is almost one."""
    return [
        bent(),
        linear("OCO", [-1.16, 0.0, 1.16]),
        Atoms("C"),
        linear("CO", [0.0, CUTOFF - 0.07]),
        off_axis(0.3),
    ]


def relative(a, b):
    """Largest difference over the RMS; NaN counts as infinite."""
    if a.numel() == 0:
        return 0.0
    error = (a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-3)
    return float(error.detach()) if bool(torch.isfinite(error)) else float("inf")


# --- the formula, evaluated naively -------------------------------------------------------------------------------


def turned_back(spec, row, frame):
    """rho(F) y, written out for vectors and matrices."""
    sign = torch.sign(torch.linalg.det(frame))
    if spec.irreps == "1x0e":
        return row
    if spec.irreps == "1x1o":
        return frame @ row
    if spec.irreps == "1x1e":
        return sign * (frame @ row)
    if spec.cartesian is not None:
        return frame @ row @ frame.T
    return spec.rotate(row[None], frame[None])[0]


def naive(model, items):
    """Loop over frames: rotate the structure, call the backbone, rotate back, average. Means and spreads by name."""
    batch = from_ase(items)
    frames, ptr = model.frames(batch), batch.ptr.tolist()
    backbone, cutoff, outputs = model.backbone, model.backbone.cutoff, model.backbone.outputs
    n_rows = {"atom": ptr[-1], "structure": len(items)}
    found = {name: [[] for _ in range(n_rows[spec.per])] for name, spec in outputs.items()}
    copies = {name: [[] for _ in items] for name, spec in outputs.items() if spec.reduce}
    for frame, weight, owner, stratum, origin in zip(
        frames.rotations, frames.weights, frames.owner.tolist(), frames.stratum.tolist(), frames.origins, strict=True
    ):
        structure = owner if model.scope == "structure" else int(batch.batch[owner])
        first, last = ptr[structure], ptr[structure + 1]
        alone = stratum == int(Stratum.POINT)
        if alone and model.scope == "atom":
            first, last = owner, owner + 1
        pos = (batch.pos[first:last] - origin) @ frame
        here = from_points(pos, z=batch.z[first:last])
        here = replace(
            here, cell=batch.cell[structure : structure + 1] @ frame, pbc=batch.pbc[structure : structure + 1]
        )
        if alone:
            here = replace(here, pbc=torch.zeros_like(here.pbc))
        if cutoff is not None:
            from symmetrize.data import with_neighbors

            here = with_neighbors(validate(here), cutoff)
        got = backbone(here)
        for name, spec in outputs.items():
            rows = [turned_back(spec, row, frame) for row in got[name]]
            if alone:
                rows = list(spec.project_invariant(got[name], model.group))
            if spec.per == "structure":
                found[name][structure].append((weight, rows[0]))
            elif model.scope == "atom":
                found[name][owner].append((weight, rows[owner - first]))
            else:
                for atom, row in enumerate(rows, start=first):
                    found[name][atom].append((weight, row))
                if spec.reduce:
                    total = sum(rows) if spec.reduce == "sum" else sum(rows) / len(rows)
                    copies[name][structure].append((weight, total))
    out = {}
    for name, spec in outputs.items():
        rows = [average(pairs) for pairs in found[name]]
        own = f"atomic_{name}" if spec.reduce else name
        out[own], out[f"{own}_spread"] = (torch.stack(x) for x in zip(*rows, strict=True))
        if spec.reduce:
            per_structure = [out[own][a:b] for a, b in pairwise(ptr)]
            out[name] = torch.stack([x.sum(0) if spec.reduce == "sum" else x.mean(0) for x in per_structure])
            if model.scope == "structure":
                out[f"{name}_spread"] = torch.stack([average(pairs)[1] for pairs in copies[name]])
            else:
                quadrature = [out[f"{own}_spread"][a:b].square().sum().sqrt() for a, b in pairwise(ptr)]
                counts = torch.tensor([b - a for a, b in pairwise(ptr)])
                out[f"{name}_spread"] = torch.stack(quadrature) / (counts if spec.reduce == "mean" else 1)
    return {name: value.detach() for name, value in out.items()}


def small_crystal():
    return crystal("C", "diamond", 3.6, rattle=0.1)


def average(pairs):
    total = sum(w for w, _ in pairs)
    mean = sum(w * y for w, y in pairs) / total
    return mean, torch.sqrt(sum(w * (y - mean).square().sum() for w, y in pairs) / total)


CASES = {
    "local, atom": (lambda: local(1, OUTPUTS), "atom", strata),
    "local, atom, crystals": (
        lambda: local(1, OUTPUTS),
        "atom",
        lambda: [geometries()["slab"], bent(), small_crystal()],
    ),
    "two hops, atom": (lambda: local(2, OUTPUTS), "atom", strata),
    "two hops, atom, crystal": (lambda: local(2, OUTPUTS), "atom", lambda: [geometries()["wire"], bent()]),
    "local, structure": (lambda: local(1, WHOLE), "structure", strata),
    "two hops, structure": (lambda: local(2, WHOLE), "structure", strata),
    "global, structure": (lambda: ToyGlobal(outputs=WHOLE, width=6), "structure", strata),
    "pet, atom": (lambda: pet(num_gnn_layers=1), "atom", strata),
    "pet, two blocks, structure": (lambda: pet(num_gnn_layers=2), "structure", strata),
}


@pytest.mark.parametrize(
    "case, group",
    [(case, "O(3)") for case in CASES] + [(case, "SO(3)") for case in ("local, atom", "global, structure")],
)
def test_the_average_is_the_formula(case, group):
    """Means and spreads equal those of a loop over frames that knows nothing of copies, chunks and environments."""
    make, scope, items = CASES[case]
    backbone, items = make(), items()
    model = Symmetrizer(backbone, ECSE(), group=group, scope=scope, chunk_size=50)
    got, expected = model(from_ase(items), spread=True), naive(model, items)
    assert set(got) == set(expected)
    baseline = backbone.baseline(from_ase(items)).get("energy")
    if baseline is not None:
        structure = from_ase(items).batch
        expected["atomic_energy"] += baseline
        expected["energy"] = expected["energy"].index_add(0, structure, baseline)
    for name, value in expected.items():
        # The square root of a variance that is zero but for rounding is of order sqrt(eps).
        limit = 1e-6 if name.endswith("_spread") else 1e-11
        assert got[name].shape == value.shape, name
        assert relative(got[name], value) <= limit, name
    bare = Symmetrizer(backbone, Identity(), group=group, scope=scope)(from_ase(items), spread=True)
    assert bool(((bare["atomic_energy"] - got["atomic_energy"]).abs() > 1e-2).any())
    assert float(got["energy_spread"].max()) > 1e-3, "frames differ"
    assert float(bare["energy_spread"].max()) == 0.0, "one frame has no spread"


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_one_wrong_frame_would_be_seen(scope):
    """The planted fault: the naive loop with one frame turned by a tenth of a degree."""
    model = Symmetrizer(local(1), ECSE(), scope=scope)
    got, frames = model(from_ase([ethanol()])), model.frames(from_ase([ethanol()]))
    angle = torch.tensor(1e-3, dtype=torch.float64)
    turn = torch.eye(3, dtype=torch.float64)
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    rotations = frames.rotations.detach().clone()
    rotations[0] = turn @ rotations[0]
    wrong = Symmetrizer(model.backbone, Given(rotations, frames), scope=scope)
    assert relative(wrong(from_ase([ethanol()]))["atomic_energy"], got["atomic_energy"]) > 1e-8
    same = Symmetrizer(model.backbone, Given(frames.rotations, frames), scope=scope)
    assert relative(same(from_ase([ethanol()]))["atomic_energy"], got["atomic_energy"]) <= 1e-14


class Given(FrameMethod):
    """Frames from somewhere else."""

    def __init__(self, rotations, frames, weights=None):
        super().__init__()
        self.rotations, self.given, self.weights = rotations, frames, frames.weights if weights is None else weights

    def frames(self, batch, *, group, scope, l_max, generator=None):
        f = self.given
        return FrameSet(self.rotations, self.weights, f.owner, f.stratum, f.origins, f.n_owners, scope)


# --- chunks ---------------------------------------------------------------------------------------------------------


class Counting(Backbone):
    """Another backbone, and how often, with how many copies and atoms it was called."""

    def __init__(self, inner):
        super().__init__(outputs=inner.outputs, cutoff=inner.cutoff, receptive_field=inner.receptive_field)
        self.inner, self.calls = inner, []

    def forward(self, batch):
        self.calls.append((len(batch["ptr"]) - 1, len(batch["pos"])))
        return self.inner(batch)


def everything(model, batch, stress=False, third=False):
    """Outputs, forces, stress, gradients of a training loss, products with the second and third derivatives."""
    pos = batch.pos.clone().requires_grad_()
    out = model(replace(batch, pos=pos), forces=True, stress=stress)
    weights = torch.randn(pos.shape, dtype=pos.dtype, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = (out["forces"] - weights).square().sum() + (out["energy"] - 1.0).square().sum()
    if stress:
        loss = loss + out["stress"].square().sum()
    found = {name: value.detach() for name, value in out.items()}
    found["training"] = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    product = torch.autograd.grad((out["forces"] * weights).sum(), pos, create_graph=third)[0]
    found["hessian"] = product.detach()
    if third:
        found["third"] = flat(torch.autograd.grad(product.square().sum(), [pos, *parameters]))
    return found


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


@pytest.mark.parametrize("name", MACHINES)
def test_chunks_change_nothing(name):
    batch = molecules()
    reference, got = everything(machine(name), batch), everything(machine(name, chunk_size=23), batch)
    assert set(got) == set(reference)
    for key, value in reference.items():
        assert relative(got[key], value) <= 1e-12, key
        assert float(value.abs().max()) > 1e-4, key


@pytest.mark.parametrize("name", ["local, atom", "two hops, structure", "global, structure"])
def test_chunks_change_nothing_in_third_derivatives(name):
    """Backward passes that keep a graph, of the loss of a Hessian: those of the frames must not be counted twice."""
    batch = molecules()
    reference, got = (everything(machine(name, chunk_size=c), batch, third=True) for c in (None, 23))
    for key, value in reference.items():
        assert relative(got[key], value) <= 1e-11, key


@pytest.mark.parametrize("chunk_size", [None, 23])
@pytest.mark.parametrize("name", ["local, atom", "two hops, structure", "global, structure", "pet, atom"])
def test_gradients_with_a_graph_are_those_without(name, chunk_size):
    """Users differentiate the energy themselves; asking for a graph must not change what they get."""
    batch = molecules()
    pos = batch.pos.clone().requires_grad_()
    energy = machine(name, chunk_size=chunk_size)(replace(batch, pos=pos))["energy"].sum()
    with_graph = torch.autograd.grad(energy, pos, create_graph=True)[0].detach()
    without = torch.autograd.grad(energy, pos)[0]
    forces = machine(name, chunk_size=chunk_size)(batch, forces=True)["forces"].detach()
    assert relative(without, -forces) <= 1e-12
    assert relative(with_graph, without) <= 1e-12


@pytest.mark.parametrize("chunk_size", [1, 13, 100, 10**6])
def test_any_size_of_a_chunk_gives_the_same_outputs(chunk_size):
    backbone = local(1, OUTPUTS)
    batch = from_ase(strata())
    expected = Symmetrizer(backbone, ECSE(), scope="atom")(batch, forces=True, spread=True)
    got = Symmetrizer(backbone, ECSE(), scope="atom", chunk_size=chunk_size)(batch, forces=True, spread=True)
    for key, value in expected.items():
        assert relative(got[key], value) <= (1e-6 if key.endswith("spread") else 1e-12), key


@pytest.mark.parametrize("name", ["local, atom", "two hops, atom", "pet, atom"])
def test_chunks_change_nothing_in_a_crystal_under_stress(name):
    batch = from_ase(small_crystal())
    reference = everything(machine(name), batch, stress=True)
    got = everything(machine(name, chunk_size=19), batch, stress=True)
    assert float(reference["stress"].abs().max()) > 1e-4
    for key, value in reference.items():
        assert relative(got[key], value) <= 1e-12, key


def test_chunks_are_really_made():
    """The twin: without a size one call, with one many, and none larger than the size unless it has to be."""
    backbone = Counting(local(1))
    sizes = {}
    for chunk_size in (None, 60, 1):
        backbone.calls.clear()
        Symmetrizer(backbone, ECSE(), chunk_size=chunk_size)(molecules())
        sizes[chunk_size] = list(backbone.calls)
    assert len(sizes[None]) == 1 < len(sizes[60]) < len(sizes[1])
    assert all(atoms <= 60 for _, atoms in sizes[60]) and all(copies == 1 for copies, _ in sizes[1])
    for calls in sizes.values():
        assert sum(copies for copies, _ in calls) == sum(copies for copies, _ in sizes[None])


@pytest.mark.parametrize("name", ["pet, atom", "pet, two blocks, atom", "pet, two blocks, structure"])
def test_sharing_work_changes_nothing(name):
    shared, generic = machine(name), machine(name)
    assert shared.backbone.shares_work
    generic.backbone.shares_work = False
    batch = from_ase(geometries()["water"]) if "two" in name else molecules()
    expected, got = everything(generic, batch), everything(shared, batch)
    for key, value in expected.items():
        assert relative(got[key], value) <= 1e-11, key
    items = [ethanol(), linear("OCO", [-1.16, 0.0, 1.16]), Atoms("C")]
    assert relative(shared(from_ase(items))["energy"], generic(from_ase(items))["energy"]) <= 1e-12


@pytest.mark.parametrize("name", MACHINES)
def test_single_precision_is_double_precision_up_to_rounding(name):
    """Same frames, same numbers; results have the precision of the input, those with a composition baseline double."""
    low = replace(molecules(), pos=molecules().pos.float(), cell=molecules().cell.float())
    got = machine(name, chunk_size=40).float()(low, forces=True)
    expected = machine(name, chunk_size=40)(replace(molecules(), pos=low.pos.double()), forces=True)
    assert got["forces"].dtype == torch.float32
    assert got["energy"].dtype == (torch.float64 if "pet" in name else torch.float32)
    for key in ("energy", "forces"):
        error = (got[key].double() - expected[key]).abs().max() / expected["forces"].square().mean().sqrt()
        assert float(error.detach()) <= 1e4 * torch.finfo(torch.float32).eps, key


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", ["local, atom", "global, structure"])
def test_second_derivatives_are_those_of_finite_differences(name, chunk_size):
    atoms = geometries()["water"]
    atoms.positions[2] *= 1.2
    model, batch = machine(name, chunk_size=chunk_size), from_ase(atoms)

    def energy(pos):
        return model(replace(batch, pos=pos))["energy"]

    def forces(pos):
        return model(replace(batch, pos=pos), forces=True)["forces"]

    pos = batch.pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(energy, (pos,), fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, (pos,), fast_mode=True)
    assert torch.autograd.gradcheck(forces, (pos,), fast_mode=True)
    assert torch.allclose(forces(pos), -torch.autograd.grad(energy(pos).sum(), pos)[0], rtol=0, atol=1e-11)
    hessian = torch.autograd.functional.jacobian(forces, pos.detach()).reshape(9, 9)
    assert relative(hessian, hessian.T) <= 1e-11 and float(hessian.abs().max()) > 1e-2


def test_forces_without_a_graph_are_those_with_one():
    for name in MACHINES:
        model, batch = machine(name, chunk_size=40), molecules()
        kept = model(batch, forces=True, create_graph=True)["forces"]
        # Copies that look the same are evaluated once, in evaluation mode only.
        dropped = model.eval()(batch, forces=True, create_graph=False)["forces"]
        with torch.no_grad():
            quiet = model(batch, forces=True)["forces"]
        assert kept.requires_grad and not dropped.requires_grad and not quiet.requires_grad
        assert relative(dropped, kept.detach()) <= 1e-12 and torch.equal(quiet, dropped)


def test_nothing_without_a_graph_pretends_to_have_one():
    """An energy that is differentiable through the weights alone would give wrong gradients, and keeps memory."""
    model = machine("local, atom").eval()
    with torch.no_grad():
        for name, value in model(molecules(), forces=True).items():
            assert not value.requires_grad, name
    for name, value in model(molecules(), forces=True, create_graph=False).items():
        assert not value.requires_grad, name


# --- state, copies --------------------------------------------------------------------------------------------------


def snapshot(module):
    """Attributes of all submodules and their tensors."""
    attributes = {name: dict(vars(m)) for name, m in module.named_modules()}
    return attributes, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", MACHINES)
def test_no_state_between_calls_and_the_same_bits_again(name):
    model = machine(name, chunk_size=40)
    attributes, tensors = snapshot(model)
    batch, other = molecules(), from_ase([geometries()["water"]])
    first = model(batch, forces=True)
    model(other, forces=True, spread=True)
    model.explain(other)
    second = model(batch, forces=True)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    after, tensors_after = snapshot(model)
    assert after == attributes
    assert set(tensors_after) == set(tensors) and all(torch.equal(tensors_after[k], v) for k, v in tensors.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("with_edges", [False, True])
@pytest.mark.parametrize("name", ["local, atom", "two hops, atom", "global, structure", "pet, atom"])
def test_the_batch_is_not_mutated(name, with_edges):
    items = [ethanol(), geometries()["water"]]
    batch = from_ase(items, cutoff=4.0 if with_edges else None)
    before = {key: copy.deepcopy(batch[key]) for key in batch.keys()}
    objects = {key: batch[key] for key in before}
    machine(name, chunk_size=40)(batch, forces=True, spread=True)
    assert sorted(batch.keys()) == sorted(before)
    for key, value in before.items():
        assert batch[key] is objects[key], key
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value) and not batch[key].requires_grad and batch[key].grad is None, key


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", MACHINES)
def test_copies_and_pickles_work_and_are_independent(name, duplicate):
    model = machine(name, chunk_size=40)
    twin = duplicate(model)
    expected = model(molecules(), forces=True)
    for key, value in twin(molecules(), forces=True).items():
        assert torch.equal(value, expected[key]), key
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert not torch.equal(twin(molecules())["energy"], expected["energy"])
    assert torch.equal(model(molecules())["energy"], expected["energy"])


def test_an_auxiliary_model_is_part_of_the_model():
    """Registered once, moved with it, and used: on a linear molecule it is all there is."""
    auxiliary = ToyLocal(cutoff=CUTOFF, width=4, seed=9)
    model = Symmetrizer(local(1), ECSE(fallback=auxiliary), scope="structure")
    assert model.method.auxiliary is auxiliary
    assert {id(p) for p in auxiliary.parameters()} <= {id(p) for p in model.parameters()}
    batch = from_ase([linear("CO", [0.0, 1.1]), ethanol()], cutoff=CUTOFF)
    out, bare = model(batch, forces=True), auxiliary(batch)["energy"]
    assert relative(out["atomic_energy"][:2].detach(), bare[:2].detach()) <= 1e-13
    assert relative(out["atomic_energy"][2:].detach(), bare[2:].detach()) > 1e-2, "not where there are frames"


@pytest.mark.parametrize("chunk_size", [None, 9])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_with_an_auxiliary_model_are_the_gradient(scope, chunk_size):
    """Where frames and the auxiliary model share the weight; gradients reach its parameters too."""
    auxiliary = ToyLocal(cutoff=3.1, width=4, seed=9)
    model = Symmetrizer(local(1), ECSE(fallback=auxiliary), scope=scope, chunk_size=chunk_size)
    batch = from_ase([off_axis(0.5), off_axis(0.8), bent(), linear("CO", [0.0, 1.1])])
    frames = model.frames(batch)
    strata = {(int(o), int(s)) for o, s in zip(frames.owner, frames.stratum, strict=True)}
    assert any((o, int(Stratum.FRAME)) in strata and (o, int(Stratum.AUXILIARY)) in strata for o, _ in strata)
    pos = batch.pos.clone().requires_grad_()
    energy = model(replace(batch, pos=pos))["energy"].sum()
    expected = -torch.autograd.grad(energy, pos)[0]
    out = model(batch, forces=True)
    assert relative(out["forces"].detach(), expected) <= 1e-12
    assert relative(model(batch, forces=True, create_graph=False)["forces"], expected) <= 1e-12
    gradients = torch.autograd.grad(out["forces"].square().sum(), list(auxiliary.parameters()))
    assert all(float(g.abs().max()) > 0.0 for g in gradients)


# --- distributed ----------------------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from distributed_case import gradients
gradients(1, sys.argv[2])
"""

CASE = """
import torch
import torch.distributed as dist
from symmetrize.backbones.toy import ToyLocal
from symmetrize import ECSE, Symmetrizer, from_ase
from symmetrize.testing.structures.geometries import ethanol, geometries


def parts():
    return [[ethanol()], [geometries()["water"], geometries()["chiral center"]]]


def model():
    return Symmetrizer(ToyLocal(cutoff=2.6, width=6), ECSE(), chunk_size=40)


def loss_of(model, items):
    out = model(from_ase(items), forces=True)
    return (out["energy"] - 1.0).square().mean() + (out["forces"] - 0.1).square().mean()


def gradients(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model())
        loss_of(wrapped, parts()[rank]).backward()
        out = [p.grad.clone() for p in wrapped.parameters()]
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return out
"""


def test_distributed_gradients_are_the_average_over_processes(tmp_path, monkeypatch):
    """Energies and forces, different structures in two processes, one of them this one."""
    (tmp_path / "distributed_case.py").write_text(CASE)
    monkeypatch.syspath_prepend(tmp_path)
    import distributed_case as case

    other = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        got = flat(case.gradients(0, tmp_path))
        message = other.communicate(timeout=60)[1]
    finally:
        other.kill()
    assert other.returncode == 0, message
    model = case.model()
    each = [flat(torch.autograd.grad(case.loss_of(model, part), list(model.parameters()))) for part in case.parts()]
    assert relative(got, (each[0] + each[1]) / 2) <= 1e-12
    assert relative(got, each[0]) > 1e-2 and relative(got, each[1]) > 1e-2, "each alone has other gradients"


# --- centers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_only_the_centers_asked_for_and_the_same_rows(name):
    batch = molecules()
    mask = torch.rand(len(batch.pos), generator=torch.Generator().manual_seed(3)) < 0.4
    assert 0 < int(mask.sum()) < len(mask)
    model = machine(name)
    full, some = model(batch), model(replace(batch, center_mask=mask), forces=True)
    assert relative(some["atomic_energy"], full["atomic_energy"][mask]) <= 1e-13
    totals = torch.zeros(3, dtype=torch.float64).index_add(0, batch.batch[mask], full["atomic_energy"][mask])
    assert relative(some["energy"], totals) <= 1e-13
    pos = batch.pos.clone().requires_grad_()
    rows = model(replace(batch, pos=pos))["atomic_energy"][mask]
    assert relative(some["forces"], -torch.autograd.grad(rows.sum(), pos)[0]) <= 1e-11
    assert not torch.allclose(some["forces"], model(batch, forces=True)["forces"], atol=1e-3)


@pytest.mark.parametrize("name", ["local, atom", "global, structure"])
def test_the_spread_of_one_structure_does_not_hear_of_centers_elsewhere(name):
    batch = from_ase([ethanol(), geometries()["water"]])
    mask = batch.batch == 0
    some = machine(name)(replace(batch, center_mask=mask), spread=True)["energy_spread"]
    full = machine(name)(batch, spread=True)["energy_spread"]
    assert relative(some[:1], full[:1]) <= 1e-10 and float(full[0]) > 1e-4
    assert float(some[1].abs()) == 0.0, "no row, no spread"


def test_environments_cost_only_the_centers_asked_for():
    backbone = Counting(local(1))
    batch = from_ase([ethanol()])
    mask = torch.arange(9) == 4
    Symmetrizer(backbone, ECSE())(replace(batch, center_mask=mask))
    few = sum(copies for copies, _ in backbone.calls)
    backbone.calls.clear()
    Symmetrizer(backbone, ECSE())(batch)
    assert 0 < few < sum(copies for copies, _ in backbone.calls)


# --- fields of the batch --------------------------------------------------------------------------------------------


class Charged(Backbone):
    """Reads one number per structure and one per atom, besides the geometry."""

    def __init__(self, receptive_field=None):
        super().__init__(
            outputs={"energy": OutputSpec("0e", reduce="sum")}, cutoff=CUTOFF, receptive_field=receptive_field
        )
        self.inner = local(1)

    def forward(self, batch):
        mask = batch.get("center_mask")
        energy = self.inner(replace(batch, center_mask=None))["energy"]
        energy = batch["charge"][batch["batch"]] * energy + batch["site"]
        return {"energy": energy if mask is None else energy[mask]}


@pytest.mark.parametrize("scope, receptive_field", [("structure", None), ("atom", 1)])
def test_fields_of_structures_and_atoms_travel_with_their_copies(scope, receptive_field):
    """One number per structure (a charge, a temperature) has to reach every copy of that structure."""
    items = [ethanol(), geometries()["water"]]
    model = Symmetrizer(Charged(receptive_field), ECSE(), scope=scope)
    charge, site = torch.tensor([2.0, -0.5], dtype=torch.float64), torch.arange(12.0, dtype=torch.float64)
    both = model(replace(from_ase(items), charge=charge, site=site))["energy"]
    parts = torch.split(site, [9, 3])
    alone = [
        model(replace(from_ase(a), charge=q[None], site=s))["energy"][0]
        for a, q, s in zip(items, charge, parts, strict=True)
    ]
    plain = Symmetrizer(local(1), ECSE(), scope=scope)(from_ase(items))["energy"]
    expected = charge * plain + torch.stack([s.sum() for s in parts])
    assert relative(both.detach(), expected.detach()) <= 1e-12
    assert relative(torch.stack(alone).detach(), expected.detach()) <= 1e-12


# --- memory ---------------------------------------------------------------------------------------------------------


class RandomFrames(FrameMethod):
    """n frames of equal weight for every structure, constants as far as derivatives go."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def frames(self, batch, *, group, scope, l_max, generator=None):
        n_owners = len(batch["ptr"]) - 1
        total = self.n * n_owners
        return FrameSet(
            rotations=random_rotations(total, torch.Generator().manual_seed(0)),
            weights=torch.ones(total, dtype=torch.float64),
            owner=torch.arange(n_owners).repeat_interleave(self.n),
            stratum=torch.zeros(total, dtype=torch.int64),
            origins=torch.zeros(total, 3, dtype=torch.float64),
            n_owners=n_owners,
            scope=scope,
        )


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def held_bytes():
    """Bytes that autograd keeps alive: now, and at most since the beginning. Tensors that share memory count once."""
    alive, count = weakref.WeakSet(), {"now": 0, "peak": 0}
    storages = {}

    def release(key, size):
        storages[key] -= 1
        if storages[key] == 0:
            count["now"] -= size

    def pack(tensor):
        # A detached alias: holding the tensor itself could close a reference cycle with its own graph.
        held = _Held(tensor.detach() if not tensor.is_leaf else tensor)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if storages.get(key, 0) == 0:
            count["now"] += size
        storages[key] = storages.get(key, 0) + 1
        weakref.finalize(held, release, key, size)
        alive.add(held)
        count["peak"] = max(count["peak"], count["now"])
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        yield count


def memory(n_frames, chunk_size, method=None):
    """Bytes held after a forward pass with differentiable forces, and at most until the end of the backward pass."""
    model = Symmetrizer(ToyGlobal(), RandomFrames(n_frames) if method is None else method, chunk_size=chunk_size)
    batch = from_ase([ethanol()])
    with held_bytes() as count:
        out = model(batch, forces=True, create_graph=True)
        after = count["now"]
    loss = out["forces"].square().sum() + out["energy"].sum()
    torch.autograd.grad(loss, list(model.parameters()))
    return after, count["peak"]


def test_memory_of_force_training_does_not_grow_with_the_number_of_frames():
    """Per further frame, chunks keep a small part of what one copy's graph takes; without chunks they keep it all."""
    small, large = 8, 64
    free = [b - a for a, b in zip(memory(small, None), memory(large, None), strict=True)]
    bounded = [b - a for a, b in zip(memory(small, 18), memory(large, 18), strict=True)]
    assert free[0] > 0 and free[1] > 0
    assert bounded[0] < 0.03 * free[0], "held between forward and backward"
    assert bounded[1] < 0.03 * free[1], "at the worst moment of the forward pass"
    assert memory(large, 18)[1] < 0.2 * memory(large, None)[1]


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("chunk_size", [None, 1, 30, 100])
@pytest.mark.parametrize("scope, hops", [("atom", 1), ("structure", 1), ("structure", 2)])
def test_the_plan_is_what_happens(scope, hops, chunk_size, group):
    backbone = Counting(local(hops))
    model = Symmetrizer(backbone, ECSE(), group=group, scope=scope, chunk_size=chunk_size)
    batch = molecules()
    plan = model.explain(batch)
    assert backbone.calls == [], "a prediction, without evaluating"
    model(batch)
    copies, atoms = (sum(x) for x in zip(*backbone.calls, strict=True))
    assert copies > 3
    assert plan.n_evaluations == copies == model.frames(batch).n_evaluations == sum(plan.strata.values())
    assert plan.copied_atoms == atoms and plan.cost_ratio == atoms / len(batch.pos)
    assert plan.n_atoms == len(batch.pos) and plan.n_structures == 3 and plan.scope == scope and plan.group == group


@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("chunk_size", [None, 1, 30, 100])
def test_the_plan_knows_the_number_of_calls(scope, chunk_size):
    backbone = Counting(local(1))
    model = Symmetrizer(backbone, ECSE(), scope=scope, chunk_size=chunk_size)
    plan = model.explain(molecules())
    model(molecules())
    assert plan.n_chunks == len(backbone.calls)


def test_the_plan_of_deeper_environments_is_an_upper_bound():
    backbone = Counting(local(2))
    model = Symmetrizer(backbone, ECSE(), scope="atom")
    plan = model.explain(molecules())
    model(molecules())
    copies, atoms = (sum(x) for x in zip(*backbone.calls, strict=True))
    assert plan.n_evaluations == copies and plan.copied_atoms >= atoms


def test_the_plan_counts_every_stratum():
    backbone = Counting(local(1))
    model = Symmetrizer(backbone, ECSE(), scope="atom")
    plan = model.explain(from_ase(strata()))
    model(from_ase(strata()))
    assert plan.n_evaluations == sum(copies for copies, _ in backbone.calls)
    assert all(plan.strata[name] > 0 for name in ("frame", "axis", "point")) and plan.strata["auxiliary"] == 0
    assert plan.weight_min >= 1.0 - 1e-12


def test_frames_of_negligible_weight_are_not_counted_and_those_of_none_not_evaluated():
    """A hard cut at the counting threshold would be visible in derivatives; methods switch weights off themselves."""
    frames = RandomFrames(5).frames(validate(from_ase([ethanol()])), group="O(3)", scope="structure", l_max=0)
    weights = torch.tensor([1.0, 1e-12, 0.5, 1e-11, 0.0], dtype=torch.float64)
    backbone = Counting(ToyGlobal(width=4))
    model = Symmetrizer(backbone, Given(frames.rotations, frames, weights))
    model(from_ase([ethanol()]))
    assert model.explain(from_ase([ethanol()])).n_evaluations == 2
    assert sum(copies for copies, _ in backbone.calls) == 4
