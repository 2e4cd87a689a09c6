"""The exported file is the model: outputs, derivatives, domains, precision, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from scriptable_toy import ScriptableToy

from symmetrize import ECSE, OutputSpec, Symmetrizer, keys
from symmetrize.ops.rotations import random_rotations

require_adapter("metatomic")

# What needs the library that was asked for above.
from exporting import CASES, batch_of, conservative, errors, ethanol, expected, finite, in_memory, periodic, run  # noqa: E402

from symmetrize.export.metatomic import export  # noqa: E402
from symmetrize.export.rotating import Representation  # noqa: E402
from symmetrize.metatomic.tensor_maps import parts_of, rows_of  # noqa: E402

# torch 2.13 deprecates all of TorchScript, which the format consists of.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

#: Of the error scale, in float64.
TOLERANCE = 1e-10
MORE = {
    "mixture": OutputSpec("2x0e+0o+1o+2x2e"),
    "polarizability": OutputSpec(cartesian="ij=ji"),
    "dipole": OutputSpec("1o", reduce="sum"),
    "average": OutputSpec("0e", reduce="mean"),
}


@pytest.fixture(autouse=True)
def without_optimization():
    """TorchScript rewrites itself during the first calls, which takes longer than the calls."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def exported():
    cache = {}

    def get(name):
        if name not in cache:
            model = CASES[name]().eval()
            cache[name] = model, in_memory(model)
        return cache[name]

    return get


@pytest.mark.parametrize("case", CASES)
def test_file_is_the_model(exported, case):
    model, file = exported(case)
    crystals = [] if case == "structure" else list(periodic().values())
    structures = [*finite().values(), *crystals]
    found = errors(model, file, batch_of(structures))
    assert all(error <= TOLERANCE for error in found.values()), found
    # One at a time: a large structure does not hide a small one.
    for atoms in structures[1:5]:
        target, got = expected(model, batch_of([atoms])), conservative(file, batch_of([atoms]))
        assert torch.allclose(got["forces"], target["forces"], atol=1e-11, rtol=0.0)
    # Twin: with another width the same model is another function.
    if "averaging" not in case and case != "bare":
        other = Symmetrizer(model.backbone, ECSE(cutoff_width=0.3), group=model.group, scope=model.scope).eval()
        assert errors(other, file, batch_of([ethanol()]))["forces"] > 1e-6


@pytest.mark.parametrize("case", ["atom", "two hops", "structure"])
def test_file_is_invariant_and_the_bare_one_is_not(exported, case):
    elements = random_rotations(3, torch.Generator().manual_seed(3), improper=None).numpy()

    def variation(file):
        atoms = ethanol()
        values = [conservative(file, batch_of([atoms]))]
        for g in elements:
            turned = atoms.copy()
            turned.positions = atoms.positions @ g.T
            got = conservative(file, batch_of([turned]))
            got["forces"] = got["forces"] @ torch.as_tensor(g)
            values.append(got)
        return [max(float((v[n] - values[0][n]).abs().max()) for v in values) for n in ("energy", "forces")]

    assert max(variation(exported(case)[1])) < 1e-11
    assert min(variation(exported("bare")[1])) > 1e-3


@pytest.mark.parametrize("case", ["atom", "two hops"])
def test_energies_of_atoms_have_their_own_derivatives(exported, case):
    # As a heat flux needs them: any combination of them is differentiated, not only their sum.
    model, file = exported(case)
    batch = batch_of([ethanol(), periodic()["small cell"]])
    weights = torch.linspace(-1.0, 1.5, len(batch[keys.POS]), dtype=torch.float64)
    tensors, pos, _ = run(file, batch, "atom")
    got = torch.autograd.grad((tensors["energy"].block().values[:, 0] * weights).sum(), pos)[0]
    leaf = batch.clone()
    leaf[keys.POS] = batch[keys.POS].clone().requires_grad_()
    target = torch.autograd.grad((model(leaf)["atomic_energy"] * weights).sum(), leaf[keys.POS])[0]
    assert torch.allclose(got, target, atol=TOLERANCE * float(target.square().mean().sqrt()), rtol=0.0)
    total = torch.autograd.grad(run(file, batch)[0]["energy"].block().values.sum(), pos, allow_unused=True)[0]
    assert total is None and not torch.allclose(got, got.mean() + 0 * got)


@pytest.mark.parametrize("case", ["atom", "two hops", "structure"])
def test_selected_atoms(exported, case):
    model, file = exported(case)
    batch = batch_of([ethanol(), finite()["linear"]])
    rows = [[0, 2], [0, 7], [1, 1]]
    flat = torch.tensor([2, 7, 10])
    everything = conservative(file, batch)["atomic_energy"]
    atomic = run(file, batch, "atom", rows)[0]["energy"].block()
    assert atomic.samples.values.tolist() == rows
    assert torch.allclose(atomic.values[:, 0], everything[flat], atol=1e-10, rtol=0.0)
    tensors, pos, _ = run(file, batch, "system", rows)
    total = tensors["energy"].block().values[:, 0]
    assert torch.allclose(total, torch.stack([everything[flat[:2]].sum(), everything[10]]), atol=1e-10, rtol=0.0)
    leaf = batch.clone()
    leaf[keys.POS] = batch[keys.POS].clone().requires_grad_()
    target = torch.autograd.grad(model(leaf)["atomic_energy"][flat].sum(), leaf[keys.POS])[0]
    gradient = torch.autograd.grad(total.sum(), pos)[0]
    assert torch.allclose(gradient, target, atol=1e-10, rtol=0.0) and float(target.abs().max()) > 1e-3
    # None at all, as for a domain without atoms of its own.
    tensors, pos, _ = run(file, batch, "system", [])
    total = tensors["energy"].block().values
    assert float(total.detach().abs().max()) == 0.0
    assert float(torch.autograd.grad(total.sum(), pos)[0].abs().max()) == 0.0


def domains(atoms, reach):
    """Two halves of a cell along x as LAMMPS would have them: own atoms, then ghosts (images), nothing periodic."""
    size = atoms.cell.lengths()[0]
    images = [np.array([i, j, k]) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    inside = atoms.get_scaled_positions()[:, 0] < 0.5
    for owned in (inside, ~inside):
        own = np.nonzero(owned)[0]
        rows, places = list(own), list(atoms.positions[own])
        for shift in images:
            for n, place in enumerate(atoms.positions + shift @ atoms.cell.array):
                if (shift == 0).all() and owned[n]:
                    continue
                if np.linalg.norm(atoms.positions[own] - place, axis=1).min() <= reach:
                    rows.append(n)
                    places.append(place)
        assert len(rows) > len(own) and size > 0
        yield Atoms(atoms.numbers[rows], positions=places), rows, len(own)


def by_domains(file, atoms, reach):
    energy, forces = 0.0, torch.zeros(len(atoms), 3, dtype=torch.float64)
    for part, rows, n_own in domains(atoms, reach):
        tensors, pos, _ = run(file, batch_of([part]), "system", [[0, k] for k in range(n_own)])
        total = tensors["energy"].block().values.sum()
        energy += float(total.detach())
        # Forces on ghosts go back to the atoms that they are images of.
        forces.index_add_(0, torch.tensor(rows), -torch.autograd.grad(total, pos)[0])
    return energy, forces


@pytest.mark.parametrize("case", ["atom", "two hops"])
def test_domain_decomposition(exported, case):
    model, file = exported(case)
    random = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (4, 3, 3)], indexing="ij"), axis=-1).reshape(-1, 3)
    atoms = Atoms(random.choice([1, 6, 8], len(grid)), positions=2.0 * grid, cell=[8.0, 6.0, 6.0], pbc=True)
    atoms.positions += random.normal(scale=0.25, size=atoms.positions.shape)
    reach = float(file.capabilities().interaction_range)
    assert reach == pytest.approx(model.backbone.cutoff * model.backbone.receptive_field)
    whole = conservative(file, batch_of([atoms]))
    energy, forces = by_domains(file, atoms, reach)
    scale = float(whole["forces"].square().mean().sqrt())
    assert abs(energy - float(whole["energy"])) < 1e-9 * scale
    assert float((forces - whole["forces"]).abs().max()) < TOLERANCE * scale
    # Twin: ghosts that do not reach as far as the file says are not enough.
    energy, forces = by_domains(file, atoms, 0.8 * reach)
    assert float((forces - whole["forces"]).abs().max()) > 1e-4 * scale


def test_precisions():
    model = Symmetrizer(ScriptableToy(width=4), ECSE()).eval()
    batch = batch_of([ethanol(), finite()["linear"]])
    target = expected(model, batch)
    bound = {}
    for dtype in ("float32", "mixed", "float64"):
        file = in_memory(model, dtype=dtype)
        got = conservative(file, batch)
        assert got["energy"].dtype == (torch.float32 if dtype == "float32" else torch.float64)
        bound[dtype] = float((got["energy"].to(torch.float64) - target["energy"]).abs().max())
        scale = float(target["forces"].square().mean().sqrt())
        eps = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
        assert float((got["forces"].to(torch.float64) - target["forces"]).abs().max()) < 500 * eps * scale
    # A total energy of thousands of eV does not fit into float32; in mixed precision only the network is rounded.
    size = float(target["energy"].abs().max())
    assert size > 2000.0 and bound["float32"] < 4 * torch.finfo(torch.float32).eps * size
    assert bound["mixed"] < 0.1 * torch.finfo(torch.float32).eps * size and bound["float64"] < 1e-10


def test_other_outputs_are_read_back():
    model = Symmetrizer(ScriptableToy(more=MORE), ECSE()).eval()
    file = export(model)
    batch = batch_of([ethanol(), finite()["linear"], finite()["atom"]])
    out = model(batch)
    asked = [("mixture", "atom"), ("polarizability", "atom"), ("dipole", "system"), ("average", "system")]
    tensors, _, _ = run(file, batch, others=[(f"symmetrize::{name}", kind) for name, kind in asked])
    ptr = batch[keys.PTR]
    for name, _ in asked[1:]:
        parts = parts_of(f"symmetrize::{name}", tensors[f"symmetrize::{name}"], "")
        (part,) = parts.values()
        rows, _ = rows_of(part, tensors[f"symmetrize::{name}"], ptr)
        assert torch.allclose(rows, out[name].detach(), atol=1e-12, rtol=0.0)
    # Blocks by degree and parity: 0e (two), 0o, 1o, 2e (two), back in e3nn's order.
    tensor = tensors["symmetrize::mixture"]
    rows = {}
    for part in parts_of("symmetrize::mixture", tensor, "").values():
        l = part.degree if part.degree is not None else 0
        rows[l, part.spec.irreps[-1]] = rows_of(part, tensor, ptr)[0]
    got = torch.cat(
        [rows[l, p].reshape(len(batch[keys.POS]), -1) for l, p in [(0, "e"), (0, "o"), (1, "o"), (2, "e")]], dim=1
    )
    assert torch.allclose(got, out["mixture"].detach(), atol=1e-12, rtol=0.0)
    assert float(got.abs().min(dim=0).values.max()) >= 0.0 and float(got[:, 2:3].abs().max()) > 1e-6
    with pytest.raises(torch.jit.Error, match="cannot be computed per system"):
        run(file, batch, others=[("symmetrize::mixture", "system")])


@settings(max_examples=25, deadline=None)
@given(
    spec=st.sampled_from(["0e", "0o", "1o", "1e", "3x1o+2e", "2o+4e+0o", "i", "ij", "ij=ji", "ijk=jik"]),
    seed=st.integers(0, 2**20),
    group=st.sampled_from(["O(3)", "SO(3)"]),
)
def test_representations_agree_with_output_specs(spec, seed, group):
    declared = OutputSpec(cartesian=spec) if spec[0] == "i" else OutputSpec(spec)
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(4, *declared.shape, dtype=torch.float64, generator=random)
    elements = random_rotations(4, random, improper=None)
    scripted = Representation(declared, group)
    turned = declared.rotate(values, elements)
    assert torch.allclose(scripted(values, elements), turned, atol=1e-12, rtol=0.0)
    assert torch.allclose(scripted.project_invariant(values), declared.project_invariant(values, group), atol=1e-12)
    if not declared.is_invariant_scalar and declared.l_max:
        assert not torch.allclose(turned, values, atol=1e-3), "or this shows nothing"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_frames():
    # Peaks of one process only grow: few frames first, then many, then many at once.
    script = """
        import pathlib, re, warnings
        warnings.simplefilter("ignore")
        import torch
        from ase import Atoms
        from scriptable_toy import ScriptableToy
        from symmetrize import GroupAveraging, Symmetrizer, from_ase
        from symmetrize.export.metatomic import export
        from symmetrize.export.verify import evaluate

        torch.set_num_threads(1)
        grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3).numpy()
        batch = from_ase(Atoms(["C"] * len(grid), positions=1.6 * grid))
        for degree, chunk_size in ((1, 200), (5, 200), (5, 10**9)):
            method = GroupAveraging(degree)
            model = Symmetrizer(ScriptableToy(width=24), method, scope="structure", chunk_size=chunk_size)
            file = export(model, verify=False)
            with torch.jit.optimized_execution(False):
                evaluate(file, batch, "energy", ("energy",))
            # Of this program alone: ru_maxrss may start at the peak of the process that started it.
            peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)
            print(len(method.elements("O(3)")[1]), peak)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (few, small), (many, large), (_, unbounded) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert many > 10 * few
    # Kilobytes; what a copy of the model and the allocator add is not the frames'.
    assert unbounded - large > 30_000 and large - small < 0.2 * (unbounded - large)
