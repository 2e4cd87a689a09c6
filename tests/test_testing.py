"""The harness is tested harder than what it tests: planted faults have to be found, exact controls have to pass."""

from __future__ import annotations

import math

import pytest
import torch

from symmetrize import keys
from symmetrize import testing as st
from symmetrize.data import edge_vectors, from_ase, from_points, replace, validate, with_neighbors
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.switches import smooth_cutoff
from symmetrize.representations import OutputSpec

CUTOFF = 4.0
OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "dipole": OutputSpec("1o"),
    "tensor": OutputSpec(cartesian="ij=ji"),
    "chirality": OutputSpec("0o", per="structure"),
}
EVERYTHING = st.declared(OUTPUTS, forces=True, stress=True)


def exact(batch, cutoff_function=None, offset=0.0):
    """Pair functions of species, distance and direction, their gradients: exactly equivariant and smooth."""
    fc = cutoff_function or (lambda d: smooth_cutoff(d, CUTOFF, 1.0))
    batch = with_neighbors(validate(batch), CUTOFF)
    n_atoms, n_structures = batch.pos.shape[0], len(batch.ptr) - 1
    strain = torch.zeros(n_structures, 3, 3, dtype=batch.pos.dtype, requires_grad=True)
    pos = batch.pos.detach().requires_grad_()
    deform = torch.eye(3, dtype=pos.dtype) + 0.5 * (strain + strain.transpose(1, 2))
    moved = replace(
        batch, pos=torch.einsum("na,nab->nb", pos, deform[batch.batch]), cell=batch.cell @ deform, edge_vec=None
    )
    r = edge_vectors(moved)
    neighbor, center = batch.edge_index
    d = r.norm(dim=1)
    charge = 1.0 + 0.1 * batch.z.to(d.dtype)[neighbor]
    radial = [fc(d) * charge * torch.exp(-((d - shift) ** 2)) for shift in (0.8, 1.6, 2.4)]
    moments = [segment_sum(weight[:, None] * r, center, n_atoms) for weight in radial]
    density = segment_sum(radial[0], center, n_atoms)
    atomic = torch.sqrt(1.0 + density) + 0.3 * density**2 + offset * batch.z.to(d.dtype)
    total = segment_sum(atomic, batch.batch, n_structures)
    triple = (moments[0] * torch.linalg.cross(moments[1], moments[2])).sum(dim=1)
    gradient, virial = torch.autograd.grad(total.sum(), [pos, strain])
    volume = torch.linalg.det(batch.cell).abs()
    volume = torch.where(volume > 0, volume, torch.ones_like(volume))
    return {
        "energy": total.detach(),
        "atomic_energy": atomic.detach(),
        "dipole": moments[0].detach(),
        "tensor": segment_sum(radial[1][:, None, None] * r[:, :, None] * r[:, None, :], center, n_atoms).detach(),
        "chirality": segment_sum(triple, batch.batch, n_structures).detach(),
        "forces": -gradient,
        "stress": virial / volume[:, None, None],
    }


def molecular(batch, fc=lambda d: smooth_cutoff(d, CUTOFF, 1.0)):
    """Energies and forces like those of `exact`, for finite structures of equal composition: fast on paths."""
    n_structures = len(batch.ptr) - 1
    pos = batch.pos.reshape(n_structures, -1, 3).detach().requires_grad_()
    a, b = torch.triu_indices(pos.shape[1], pos.shape[1], offset=1)
    d = (pos[:, a] - pos[:, b]).norm(dim=2)
    charge = 1.0 + 0.1 * batch.z.reshape(n_structures, -1).to(d.dtype)
    pair = fc(d) * torch.exp(-((d - 0.8) ** 2) / 4)
    density = torch.zeros_like(charge).index_add(1, a, pair * charge[:, b]).index_add(1, b, pair * charge[:, a])
    energy = (torch.sqrt(1.0 + density) + 0.3 * density**2).sum(dim=1)
    return {"energy": energy.detach(), "forces": -torch.autograd.grad(energy.sum(), pos)[0].reshape(-1, 3)}


def sample(dtype=torch.float64):
    names = ("ethanol", "chiral center", "random cluster", "triclinic crystal", "methane", "silicon", "HCN")
    return from_ase([st.GEOMETRIES[name]() for name in names], dtype=dtype)


BATCH = sample()
LISTED = with_neighbors(BATCH, CUTOFF)
ELEMENTS = st.group_elements(torch.Generator().manual_seed(1), n_random=2)
TOL = st.tolerance(torch.float64)


def changed(change):
    """The exact model with its results changed by ``change(result, batch)``."""

    def f(batch):
        result = exact(batch)
        result.update(change(result, batch))
        return result

    return f


# --- controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1e-8, 1e8])
def test_exact_model_passes_whatever_its_size(factor):
    f = changed(lambda result, _: {name: factor * value for name, value in result.items()})
    found = st.measure_equivariance(f, BATCH, EVERYTHING, ELEMENTS)
    assert set(found.outputs) == {*EVERYTHING, "atomic_energy"}
    assert st.within(found.relative, TOL), str(found)
    assert all(d.scale.kind in ("baseline", "displacement") for d in found.outputs.values())
    for d in found.outputs.values():
        assert d.max.shape == d.rms.shape == (len(ELEMENTS), 7)
        assert d.relative_rms <= d.relative


def test_float32_error_scales_with_epsilon():
    batch = sample(torch.float32)
    found = st.measure_equivariance(exact, batch, EVERYTHING, ELEMENTS)
    assert found.dtype == torch.float32
    assert st.within(found.relative, st.tolerance(torch.float32)) and not st.within(found.relative, TOL)


def test_composition_offset_does_not_enter_the_scale():
    plain = st.error_scale(exact, BATCH, OUTPUTS)["atomic_energy"]
    shifted = st.error_scale(lambda b: exact(b, offset=1e3), BATCH, OUTPUTS)["atomic_energy"]
    assert shifted.value == pytest.approx(plain.value, rel=1e-8) and shifted.magnitude > 1e3 * plain.magnitude
    assert shifted.kind == "baseline"
    found = st.measure_equivariance(lambda b: exact(b, offset=1e3), BATCH, OUTPUTS, ELEMENTS)
    assert st.within(found.relative, TOL)


def test_single_structure_and_symmetric_structures_have_a_scale():
    single = st.error_scale(exact, from_ase(st.GEOMETRIES["ethanol"]()), EVERYTHING)
    assert single["energy"].kind == "displacement" and single["forces"].kind == "baseline"
    symmetric = st.error_scale(exact, from_ase(st.GEOMETRIES["methane"]()), EVERYTHING)
    assert symmetric["chirality"].kind == "displacement" and symmetric["chirality"].value > 1e-6
    assert st.error_scale(exact, from_ase(st.GEOMETRIES["silicon"]()), EVERYTHING)["forces"].kind == "displacement"


def test_all_other_measurements_pass_on_the_exact_model():
    for found in (
        st.measure_permutation(exact, BATCH, EVERYTHING),
        st.measure_translation(exact, BATCH, EVERYTHING),
        st.measure_periodicity(exact, BATCH, EVERYTHING),
        st.measure_batching(exact, BATCH, EVERYTHING),
    ):
        assert st.within(found.relative, TOL), str(found)
        assert set(found.outputs) == {*EVERYTHING, "atomic_energy"}
    assert st.measure_determinism(exact, BATCH, EVERYTHING).relative == 0.0
    assert st.measure_mutation(exact, BATCH) == {}


def test_given_lists_and_center_masks_are_handled():
    batch = with_neighbors(BATCH, CUTOFF)
    mask = torch.arange(batch.pos.shape[0]) % 3 != 1
    batch = replace(batch, center_mask=mask)
    per_atom = {"dipole": OutputSpec("1o")}

    def f(b):
        # Reads the list it is given, and returns the rows of the mask.
        vectors = edge_vectors(b)
        weight = smooth_cutoff(vectors.norm(dim=1), CUTOFF, 1.0) * b.z[b.edge_index[0]]
        return {"dipole": segment_sum(weight[:, None] * vectors, b.edge_index[1], len(b.pos))[b.center_mask]}

    for found in (
        st.measure_equivariance(f, batch, per_atom, ELEMENTS),
        st.measure_permutation(f, batch, per_atom),
        st.measure_translation(f, batch, per_atom),
        st.measure_periodicity(f, batch, per_atom),
        st.measure_batching(f, batch, per_atom),
    ):
        assert st.within(found.relative, TOL), str(found)


def test_vector_inputs_rotate():
    generator = torch.Generator().manual_seed(2)
    velocity = torch.randn(BATCH.pos.shape, dtype=torch.float64, generator=generator)
    batch = replace(BATCH, velocity=velocity)
    outputs = {"momentum": OutputSpec("1o", per="structure")}

    def f(b):
        return {"momentum": segment_sum(b.z[:, None] * b.velocity, b.batch, len(b.ptr) - 1)}

    assert st.within(st.measure_equivariance(f, batch, outputs, ELEMENTS, vectors={"velocity": "1o"}).relative, TOL)
    assert st.measure_equivariance(f, batch, outputs, ELEMENTS).relative > 0.1


# --- planted faults -----------------------------------------------------------------------------------------------


def nan_for_one_rotation(count=[0]):  # noqa: B006
    def f(batch):
        result = exact(batch)
        count[0] += 1
        if count[0] == 9:
            result["dipole"][3, 1] = math.nan
        return result

    count[0] = 0
    return f


def cell_not_rotated(batch):
    return exact(replace(batch, cell=BATCH.cell))


LAB = torch.tensor([1e-6, 2e-6, -1e-6], dtype=torch.float64)
FAULTS = {
    "dipole": [
        nan_for_one_rotation(),
        changed(lambda r, b: {"dipole": r["dipole"] * math.nan}),
        changed(lambda r, b: {"dipole": r["dipole"] + LAB}),
        changed(lambda r, b: {"dipole": r["dipole"].abs()}),
        changed(lambda r, b: {"dipole": r["dipole"] * 0.0}),
        changed(lambda r, b: {"dipole": r["dipole"] * 0.0 + LAB}),
        changed(lambda r, b: {"dipole": torch.linalg.cross(r["dipole"], r["forces"])}),
        changed(lambda r, b: {"dipole": r["dipole"].to(torch.float32)}),
        lambda b: exact(b) | {"dipole": 1e-8 * (exact(b)["dipole"] + LAB)},
    ],
    "tensor": [
        changed(lambda r, b: {"tensor": r["tensor"].triu()}),
        changed(lambda r, b: {"tensor": r["tensor"] + 1e-8 * torch.diag(LAB / 1e-6)}),
    ],
    "chirality": [
        changed(lambda r, b: {"chirality": r["chirality"].abs()}),
        changed(lambda r, b: {"chirality": 0.0 * r["chirality"] + 1.0}),
    ],
    "energy": [
        changed(lambda r, b: {"energy": 0.0 * r["energy"] + 7.0}),
        changed(lambda r, b: {"energy": r["energy"] + 1e-8 * b.pos[:, 0].max()}),
        # One structure only.
        changed(lambda r, b: {"energy": r["energy"] + 1e-9 * (b.pos[0, 2] - b.pos[1, 2]) * torch.eye(7)[0].double()}),
    ],
}


@pytest.mark.parametrize(("output", "k"), [(name, k) for name, faults in FAULTS.items() for k in range(len(faults))])
def test_equivariance_faults_are_found_in_the_right_output(output, k):
    found = st.measure_equivariance(FAULTS[output][k], LISTED, OUTPUTS, ELEMENTS)
    assert not st.within(found[output].relative, TOL)
    assert found.worst.name == output
    others = [d.relative for name, d in found.outputs.items() if name != output]
    assert st.within(max(others), TOL)


def test_nan_is_attributed_to_its_element_and_structure():
    f = nan_for_one_rotation()
    found = st.measure_equivariance(f, BATCH, OUTPUTS, ELEMENTS)
    assert found["dipole"].worst == (ELEMENTS[7].name, 0) and found["dipole"].relative == math.inf
    assert int(torch.isinf(found["dipole"].max).sum()) == 1


def test_unrotated_cell_and_transposed_rotation_are_found():
    found = st.measure_equivariance(cell_not_rotated, BATCH, OUTPUTS, ELEMENTS)
    assert not st.within(found.relative, TOL)
    # Only periodic structures are concerned.
    periodic = BATCH.pbc.any(dim=1)
    assert float(found["atomic_energy"].max[:, ~periodic].max()) < 1e-10 < float(found["atomic_energy"].max[:, 3].max())

    # A frame applied with its transpose: the output goes the wrong way.
    def wrong_way(batch):
        frame = torch.linalg.qr(batch.pos[:3].T)[0]
        return {"dipole": exact(batch)["dipole"] @ frame @ frame}

    found = st.measure_equivariance(wrong_way, BATCH, {"dipole": OutputSpec("1o")}, ELEMENTS)
    assert found.relative > 0.1


def test_wrong_parity_is_found_by_improper_elements_only():
    outputs = {"dipole": OutputSpec("1e"), "chirality": OutputSpec("0e", per="structure")}
    assert st.measure_equivariance(exact, BATCH, outputs).relative > 0.1
    assert st.within(st.measure_equivariance(exact, BATCH, outputs, group="SO(3)").relative, TOL)


def test_order_dependence_batch_mean_and_absolute_positions_are_found():
    first = changed(lambda r, b: {"energy": r["energy"] + 1e-6 * b.z[b.ptr[:-1]]})
    assert not st.within(st.measure_permutation(first, BATCH, OUTPUTS).relative, TOL)
    assert st.within(st.measure_equivariance(first, BATCH, OUTPUTS, ELEMENTS).relative, TOL)

    by_index = changed(lambda r, b: {"dipole": r["dipole"] * (1 + 1e-6 * torch.arange(len(b.pos)))[:, None]})
    assert not st.within(st.measure_permutation(by_index, BATCH, OUTPUTS).relative, TOL)

    mean = changed(lambda r, b: {"energy": r["energy"] + 1e-6 * r["energy"].mean()})
    assert not st.within(st.measure_batching(mean, BATCH, OUTPUTS).relative, TOL)
    assert st.within(st.measure_permutation(mean, BATCH, OUTPUTS).relative, TOL)

    # Leaks that depend on the order of the structures.
    position = changed(lambda r, b: {"energy": r["energy"] + 1e-6 * torch.arange(len(r["energy"]))})
    assert not st.within(st.measure_batching(position, BATCH, OUTPUTS).relative, TOL)

    absolute = changed(lambda r, b: {"energy": r["energy"] + 1e-6 * segment_sum(b.pos.norm(dim=1), b.batch, 7)})
    assert not st.within(st.measure_translation(absolute, BATCH, OUTPUTS).relative, TOL)
    assert not st.within(st.measure_periodicity(absolute, BATCH, OUTPUTS).relative, TOL)


def test_lattice_dependence_and_intensive_sums_are_found():
    lattice = changed(lambda r, b: {"stress": r["stress"] + 1e-6 * b.cell.norm(dim=(1, 2))[:, None, None]})
    assert not st.within(st.measure_periodicity(lattice, BATCH, EVERYTHING)["stress"].relative, TOL)
    averaged = changed(lambda r, b: {"energy": r["energy"] / b.ptr.diff()})
    found = st.measure_periodicity(averaged, BATCH, OUTPUTS)["energy"]
    assert not st.within(found.relative, TOL) and found.worst[0].startswith("supercell")
    assert st.within(st.measure_periodicity(averaged, BATCH, OUTPUTS, repeats=None)["energy"].relative, TOL)


def test_randomness_and_state_are_found():
    noisy = changed(lambda r, b: {"energy": r["energy"] + 1e-9 * torch.rand(())})
    assert not st.within(st.measure_determinism(noisy, BATCH, OUTPUTS).relative, TOL)
    assert "global generator" in st.measure_mutation(noisy, BATCH)
    before = torch.get_rng_state()
    st.measure_determinism(exact, BATCH, OUTPUTS)
    assert torch.equal(before, torch.get_rng_state())

    memory = {"last": None}

    def stateful(batch):
        result = exact(batch)
        old, memory["last"] = memory["last"], result["energy"]
        return result if old is None else result | {"energy": result["energy"] + 1e-6 * old}

    found = st.measure_determinism(stateful, BATCH, OUTPUTS)["energy"]
    assert not st.within(found.relative, TOL)


def test_mutation_is_found():
    def in_place(batch):
        batch.pos.sub_(batch.pos.mean(dim=0))
        return exact(batch)

    def gradient(batch):
        batch.pos.requires_grad_()
        return exact(batch)

    def fields(batch):
        batch["cache"], batch["z"] = 1, batch.z.clone()
        return exact(batch)

    assert st.measure_mutation(in_place, BATCH) == {"pos": "changed in place"}
    assert st.measure_mutation(gradient, BATCH) == {"pos": "made to require a gradient"}
    assert st.measure_mutation(fields, BATCH) == {"cache": "added", "z": "replaced"}
    assert not BATCH.pos.requires_grad and "cache" not in BATCH


def test_declarations_are_enforced():
    with pytest.raises(BackboneOutputError, match="declared, but"):
        st.measure_equivariance(exact, BATCH, {"energie": OutputSpec("0e")})
    with pytest.raises(BackboneOutputError, match="expected shape"):
        st.measure_equivariance(exact, BATCH, {"dipole": OutputSpec("2e")})
    with pytest.raises(InvalidInputError, match="two or more"):
        st.measure_permutation(exact, from_ase(st.GEOMETRIES["isolated atom"]()), OUTPUTS)
    with pytest.raises(InvalidInputError, match="got one"):
        st.measure_batching(exact, from_ase(st.GEOMETRIES["water"]()), OUTPUTS)
    with pytest.raises(DeclarationError, match="did you mean"):
        st.measure_equivariance(exact, BATCH, OUTPUTS, ELEMENTS, scale={"enrgy": 1.0})


def test_scale_can_be_given_where_nothing_varies():
    atom = from_ase(st.GEOMETRIES["isolated atom"]())
    assert st.measure_equivariance(exact, atom, OUTPUTS, ELEMENTS).relative == math.inf
    scale = st.error_scale(exact, BATCH, OUTPUTS)
    found = st.measure_equivariance(exact, atom, OUTPUTS, ELEMENTS, scale=scale)
    assert st.within(found.relative, TOL) and found["dipole"].scale.kind == "given"


# --- tolerances, elements -----------------------------------------------------------------------------------------


def test_tolerance_and_within():
    assert st.tolerance(torch.float64) == 1e4 * torch.finfo(torch.float64).eps
    assert st.tolerance(torch.float32) / torch.finfo(torch.float32).eps == 1e4
    assert st.within(1.0, 1.0) and st.within(torch.tensor([0.0, 1.0]), 1.0)
    for bad in (math.nan, math.inf, 1.1, -math.inf, torch.tensor([0.0, math.nan]), torch.zeros(0)):
        assert not st.within(bad, 1.0)
    assert not st.within(0.5, math.nan)


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_elements_are_orthogonal_and_of_both_kinds(group):
    chosen = st.group_elements(torch.Generator().manual_seed(0), group=group)
    matrices = torch.stack([e.matrix for e in chosen])
    assert float((matrices @ matrices.transpose(1, 2) - torch.eye(3)).abs().max()) < 1e-15
    signs = torch.linalg.det(matrices).round()
    assert set(signs.tolist()) == ({1.0, -1.0} if group == "O(3)" else {1.0})
    for element, sign in zip(chosen, signs, strict=True):
        improper = any(word in element.name for word in ("improper", "inversion", "mirror", "reflection"))
        assert improper == bool(sign < 0)
        assert ("identity" == element.name) == torch.equal(element.matrix, torch.eye(3, dtype=torch.float64))
    assert len({e.name for e in chosen}) == len(chosen)
    again = st.group_elements(torch.Generator().manual_seed(0), group=group)
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(chosen, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transform_keeps_lists_and_dtype(dtype):
    batch = with_neighbors(sample(dtype), CUTOFF)
    g = ELEMENTS[-1].matrix
    moved = st.transform(batch, g)
    assert moved.pos.dtype == moved.cell.dtype == dtype and "edge_vec" not in moved
    rotated = (batch.edge_vec.to(torch.float64) @ g.T).to(dtype)
    assert torch.allclose(edge_vectors(moved), rotated, atol=1e3 * torch.finfo(dtype).eps, rtol=0)
    assert batch.get("edge_vec") is not None


def test_changes_of_description_keep_every_edge():
    batch = with_neighbors(BATCH, CUTOFF)
    generator = torch.Generator().manual_seed(5)
    for moved in (st.wrap(batch), st.wrap(batch, generator), st.change_lattice(batch, generator)):
        assert torch.allclose(edge_vectors(moved), batch.edge_vec, atol=1e-12, rtol=0)
        assert not (torch.equal(moved.pos, batch.pos) and torch.equal(moved.cell, batch.cell))
        volumes = [torch.linalg.det(b.cell).abs() for b in (moved, batch)]
        assert torch.allclose(*volumes)
        rebuilt = with_neighbors(replace(moved, edge_index=None, edge_cutoff=None), CUTOFF)
        assert rebuilt.edge_index.shape == batch.edge_index.shape
    permuted, permutation = st.permute(batch, generator)
    for first, last in zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True):
        assert sorted(permutation[first:last].tolist()) == list(range(first, last))
        assert permutation[first:last].tolist() != list(range(first, last))
    assert torch.equal(permuted.z, batch.z[permutation])
    assert torch.allclose(edge_vectors(permuted), permuted.edge_vec, atol=1e-12, rtol=0)
    assert bool((permuted.edge_index[1].diff() >= 0).all())
    repeated, origin, factor = st.supercell(batch, (2, 1, 3))
    assert factor.tolist() == [1, 1, 1, 6, 1, 6, 1] and torch.equal(repeated.z, batch.z[origin])
    again = st.batched(st.split(batch))
    for name in (keys.POS, keys.CELL, keys.PTR, keys.BATCH, keys.EDGE_INDEX, keys.CELL_SHIFT):
        assert torch.equal(again[name], batch[name])


def test_wrapped_atoms_lie_in_the_cell():
    batch = st.wrap(from_ase(st.GEOMETRIES["triclinic crystal"]()))
    fraction = torch.linalg.solve(batch.cell[0].T, batch.pos.T).T
    assert bool(((fraction >= -1e-12) & (fraction < 1 + 1e-12)).all())


def test_point_clouds_without_species_work():
    generator = torch.Generator().manual_seed(8)
    cloud = from_points(torch.randn(9, 3, dtype=torch.float64, generator=generator))
    outputs = {"size": OutputSpec("0e", per="structure")}
    found = st.measure_equivariance(lambda b: {"size": torch.pdist(b.pos).sum()[None]}, cloud, outputs)
    assert st.within(found.relative, TOL) and found["size"].scale.kind == "displacement"


# --- smoothness ---------------------------------------------------------------------------------------------------


def curve_with(order, size, where, width=math.inf):
    """Smooth background with a jump of one derivative."""

    def curve(t):
        kick = torch.where(t > where, (t - where) ** order / math.factorial(order), torch.zeros_like(t))
        return torch.stack([torch.sin(5 * t) + torch.exp(t), torch.cos(3 * t) + size * kick], dim=1)

    return curve


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_jumps_are_found_where_they_are(order, size):
    where = 0.3141592
    found = st.measure_smoothness(curve_with(order, size, where))
    jump = found.jumps[order]
    assert jump.size == pytest.approx(size, rel=0.2) and jump.location == pytest.approx(where, abs=1e-4)
    assert all(found.jump(lower) < 1e-4 * size for lower in range(order))


def test_smooth_curves_have_no_jump():
    found = st.measure_smoothness(curve_with(0, 0.0, 0.5))
    assert found.jump(0) < 1e-12 and found.jump(1) < 1e-9 and found.jump(2) < 1e-6
    assert found.max_first == pytest.approx(6.0, rel=0.01) and found.max_second == pytest.approx(27.57, rel=0.01)
    # Steep, but infinitely smooth.
    steep = st.measure_smoothness(lambda t: smooth_cutoff(t, 0.55, 0.05))
    assert steep.relative(0) < 1e-10 and steep.relative(1) < 1e-6 * steep.max_first
    assert steep.relative(2) < 1e-5 * steep.max_second


def test_small_jumps_are_found_at_known_events_and_nan_anywhere():
    # Too small to be seen between the points of a scan of a steep function.
    def hidden(t):
        return 1e3 * torch.sin(40 * t) + torch.where(t > 0.5, 1e-7, 0.0)

    assert st.measure_smoothness(hidden, events=[0.5]).jump(0) == pytest.approx(1e-7, rel=0.05)
    only_there = st.measure_smoothness(lambda t: torch.where(t == 1 / 3, math.nan, t), events=[1 / 3])
    assert only_there.jump(0) == math.inf and only_there.relative(2) == math.inf
    assert st.measure_smoothness(lambda t: 0 * t).relative(0) == math.inf
    root = st.measure_smoothness(lambda t: (t - 0.4).abs().sqrt())
    assert root.jump(1) > 10.0 and root.jump(0) < 1e-3


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0])
def test_a_value_that_is_alone_is_found_at_a_known_event(size):
    """Continuous on either side and from side to side: only the place itself says so."""

    def alone(t):
        return torch.stack([torch.sin(40 * t), torch.exp(t) + torch.where(t == 0.5, size, 0.0)], dim=1)

    found = st.measure_smoothness(alone, events=[0.5], n_points=64)
    assert found.jump(0) == pytest.approx(size, rel=1e-3) and found.jumps[0].location == 0.5
    assert st.measure_smoothness(alone, events=[0.25], n_points=64).jump(0) < 1e-12
    # Where an event is an end of the scan there is no other side.
    assert st.measure_smoothness(alone, events=[0.0, 1.0], n_points=64).jump(0) < 1e-12


@pytest.mark.parametrize("name", list(st.paths(CUTOFF)))
def test_exact_model_is_smooth_on_every_path(name):
    path = st.paths(CUTOFF)[name]
    # Forces vanish by symmetry on the periodic path.
    curve = st.along(exact, path, "energy") if name == "through bcc" else st.along(molecular, path, "forces")
    found = st.measure_smoothness(curve, events=path.events, n_points=33, n_candidates=1)
    assert found.span > 1e-4
    assert found.relative(0) < 1e-9 and found.relative(1) < 1e-6 * max(1.0, found.max_first / found.span)


def test_hard_cutoff_and_kink_are_found_at_the_event():
    path = st.paths(CUTOFF)["pair crosses the cutoff"]
    hard = lambda b: molecular(b, lambda d: (d < CUTOFF).to(d.dtype))  # noqa: E731
    found = st.measure_smoothness(st.along(hard, path, "energy"), n_points=49, n_candidates=1)
    assert found.relative(0) > 0.01 and found.jumps[0].location == pytest.approx(0.5, abs=1e-9)
    kinked = lambda b: molecular(b, lambda d: (CUTOFF - d).clamp(min=0.0))  # noqa: E731
    found = st.measure_smoothness(st.along(kinked, path, "energy"), n_points=49, n_candidates=1)
    assert found.relative(0) < 1e-9 and found.relative(1) > 0.01
    assert found.jumps[1].location == pytest.approx(0.5, abs=1e-3)


# --- derivatives --------------------------------------------------------------------------------------------------


def test_forces_and_stress_agree_with_finite_differences():
    batch = from_ase([st.GEOMETRIES[name]() for name in ("triclinic crystal", "rattled carbon")])
    found = st.measure_forces_fd(exact, batch, stress=True, n_directions=4)
    for error in found.values():
        assert error.relative < 1e-8 and error.uncertainty < 1e-6
    assert st.measure_hessian_symmetry(exact, BATCH).relative < 1e-8


def test_wrong_forces_and_stress_are_found():
    batch = from_ase([st.GEOMETRIES[name]() for name in ("triclinic crystal", "rattled carbon")])
    swirl = torch.tensor([[0, 1, 0], [-1, 0, 0], [0, 0, 0]], dtype=torch.float64)

    def wrong(r, b):
        return {"forces": r["forces"] + 1e-4 * b.pos @ swirl, "stress": r["stress"].triu()}

    found = st.measure_forces_fd(changed(wrong), batch, stress=True, n_directions=3)
    assert found["forces"].relative > 1e-5 and found["stress"].relative > 1e-3
    assert st.measure_hessian_symmetry(changed(wrong), batch).relative > 1e-6
    half = st.measure_forces_fd(changed(lambda r, b: {"stress": 0.5 * r["stress"]}), batch, stress=True, n_directions=2)
    assert half["stress"].relative > 0.1 and half["forces"].relative < 1e-8
    bad = st.measure_forces_fd(changed(lambda r, b: {"forces": r["forces"] * math.nan}), batch, n_directions=1)
    assert bad["forces"].relative == math.inf
    zero = st.measure_forces_fd(lambda b: {k: 0.0 * v for k, v in exact(b).items()}, batch, n_directions=1)
    assert zero["forces"].relative == math.inf


# --- structures and paths -----------------------------------------------------------------------------------------


def rank_of(atoms, tolerance=1e-9):
    """Dimension of the space that the atoms span."""
    pos = torch.as_tensor(atoms.positions)
    values = torch.linalg.svdvals(pos - pos.mean(dim=0))
    return int((values > tolerance * max(1.0, float(values.max()))).sum())


def symmetry_order(atoms):
    """Number of proper and of improper elements of O(3) that map a finite structure onto itself."""
    pos = torch.as_tensor(atoms.positions)
    pos = pos - pos.mean(dim=0)
    z = torch.as_tensor(atoms.numbers)
    far = [int(k) for k in torch.argsort(pos.norm(dim=1), descending=True)]
    base = next([a, b, far[0]] for a in far for b in far if torch.linalg.cross(pos[a], pos[b]).norm() > 0.1)[:2]
    frame = lambda a, b: torch.stack([a, b, torch.linalg.cross(a, b)], dim=1)  # noqa: E731
    found = {1: 0, -1: 0}
    for i in range(len(pos)):
        for j in range(len(pos)):
            for sign in (1, -1):
                image = torch.stack([pos[i], pos[j], sign * torch.linalg.cross(pos[i], pos[j])], dim=1)
                g = image @ torch.linalg.inv(frame(pos[base[0]], pos[base[1]]))
                if (g @ g.T - torch.eye(3)).abs().max() > 1e-6:
                    continue
                distance = torch.cdist(pos @ g.T, pos)
                if float(distance.min(dim=1).values.max()) < 1e-6 and torch.equal(z[distance.argmin(dim=1)], z):
                    found[sign] += 1
    return found[1], found[-1]


def test_library_holds_what_its_tags_say():
    everything = st.geometries()
    assert len(everything) == len(st.GEOMETRIES) > 60
    for name, atoms in everything.items():
        tags = st.GEOMETRIES[name].tags
        assert atoms.info["name"] == name
        from_ase(atoms)  # valid: distinct atoms, usable cells
        assert ("periodic" in tags) == bool(atoms.pbc.any()), name
        if not atoms.pbc.any():
            rank = rank_of(atoms, 1e-13 if "near-collinear" in tags else 1e-9)
            exactly = {"isolated": 0, "collinear": 1, "planar": 2}
            expected = next((r for tag, r in exactly.items() if tag in tags), None)
            if "1e-14 off" not in name and "1e-12 off" not in name:
                assert rank == expected if expected is not None else rank >= 3, name
        if "cutoff" in tags:
            cell, pbc = atoms.cell.array, atoms.pbc
            d = atoms.get_all_distances()
            at_cutoff = (d == 4.0).any() or (pbc.all() and 2 * cell[0, 0] == 4.0)
            assert at_cutoff, name
    assert set(st.geometries("periodic", exclude=("generic",))) == {
        n for n, g in st.GEOMETRIES.items() if "periodic" in g.tags and "generic" not in g.tags
    }
    with pytest.raises(DeclarationError, match="did you mean 'planar'"):
        st.geometries("plannar")


@pytest.mark.parametrize(
    ("name", "proper", "improper"),
    [
        ("methane", 12, 12),
        ("rotated methane", 12, 12),
        ("methane, almost", 1, 0),
        ("SF6", 24, 24),
        ("neighbors along the axes", 24, 24),
        ("propyne", 3, 3),
        ("ammonia", 3, 3),
        ("ethanol", 1, 0),
        ("chiral center", 1, 0),
        ("random cluster", 1, 0),
        ("random gas", 1, 0),
        ("random point cloud", 1, 0),
        ("two H2, skew", 1, 0),
        ("two N2, skew", 1, 0),
        ("bonds along the axes", 1, 0),
        ("two-hop collinear", 1, 0),
    ],
)
def test_named_geometries_have_their_symmetry(name, proper, improper):
    atoms = st.GEOMETRIES[name]()
    assert symmetry_order(atoms) == (proper, improper)
    tags = st.GEOMETRIES[name].tags
    assert not ("chiral" in tags and improper) and not ("generic" in tags and proper > 1)


def test_special_environments():
    from symmetrize.testing.structures.geometries import off_axis, two_hop_collinear, water

    for distance in (1e-3, 1e-8, 1e-12):
        assert off_axis(distance).positions[2, 1] == distance
    assert water(130.0).get_angle(1, 0, 2) == pytest.approx(130.0) and rank_of(water(180.0), 0.0) == 1
    atoms = two_hop_collinear(3.0)
    batch = from_ase(atoms, cutoff=3.0)
    first = batch.edge_vec[batch.edge_index[1] == 0]
    assert len(first) == 2 and float(torch.linalg.cross(first[0], first[1]).norm()) < 1e-12
    second = batch.edge_index[0][(batch.edge_index[1] == 1) | (batch.edge_index[1] == 2)]
    assert set(second.tolist()) == {0, 3, 4} and rank_of(atoms) == 3
    recolored = st.with_species(st.GEOMETRIES["ethanol"](), [1, 6])
    assert set(recolored.numbers.tolist()) == {1, 6}


def test_paths_pass_their_events():
    paths = st.paths(CUTOFF)
    for path in paths.values():
        assert path.what and all(0.0 < t < 1.0 for t in path.events)
        assert len({tuple(path(t).numbers) for t in (0.0, 0.3, 0.5, 1.0)}) == 1
        step = max(abs(path(t + 1e-6).positions - path(t).positions).max() for t in (0.1, 0.5, 0.75))
        assert 0.0 < step < 1e-5
    for name in ("bending CO2", "bending HCN", "bending C2H2, cis", "bending C2H2, trans"):
        assert rank_of(paths[name](0.5), 0.0) == 1 and rank_of(paths[name](0.4)) == 2
    carbons = paths["bending propyne"](0.5)[[0, 1, 2, 3]]
    assert rank_of(carbons, 0.0) == 1 and rank_of(paths["bending propyne"](0.4)[[0, 1, 2, 3]]) == 2
    assert rank_of(paths["methyl onto the axis"](0.5), 0.0) == 1
    assert paths["pair crosses the cutoff"](0.5).get_distance(0, 1) == CUTOFF
    right = paths["right angle"](0.5)
    assert right.get_distance(0, 2) == CUTOFF and right.get_distance(0, 1) == 1.0 and right.get_angle(1, 0, 2) == 90.0
    beside = paths["atom beside a dimer"]
    assert beside(0.25).get_distance(0, 2) == pytest.approx(CUTOFF) == beside(0.75).get_distance(1, 2)
    assert beside(0.5).get_distance(0, 2) > CUTOFF > beside(0.5).get_distance(1, 2)
    leaving = paths["atom leaves a cluster"](0.5).get_all_distances()[3]
    assert leaving[0] == CUTOFF and min(leaving[1:3]) > CUTOFF
    exchange = [paths["exchange of nearest neighbors"](t).get_all_distances()[0] for t in (0.4, 0.5, 0.6)]
    assert exchange[0][1] < exchange[0][2] and exchange[1][1] == exchange[1][2] and exchange[2][1] > exchange[2][2]
    three = paths["three-fold exchange"](0.5).get_all_distances()[0]
    assert three[1] == three[2] == three[3]
    center = paths["through the centroid"](0.5).positions
    assert abs(center[0] - center.mean(axis=0)).max() == 0.0
    assert rank_of(paths["umbrella inversion"](0.5)) == 2 and rank_of(paths["umbrella inversion"](0.45)) == 3
    assert symmetry_order(paths["through the tetrahedron"](0.5)) == (12, 12)
    assert symmetry_order(paths["through the tetrahedron"](0.45)) == (1, 0)
    assert symmetry_order(paths["through the square"](0.5)) == (8, 8)
    lengths = paths["through bcc"](0.5).cell.lengths()
    assert lengths[0] == lengths[2] and len(set(paths["through bcc"](0.4).cell.lengths())) == 2
