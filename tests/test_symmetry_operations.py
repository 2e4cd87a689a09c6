"""Symmetry operations of structures, and what they demand of models: exact models obey, the bare backbone does not."""

from __future__ import annotations

import builtins
import itertools
import math

import pytest
import torch
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase, keys
from symmetrize.data import from_points, replace, with_neighbors
from symmetrize.errors import BackboneOutputError, InvalidInputError, MissingDependencyError
from symmetrize.testing import GEOMETRIES, conservative, declared, geometries, tolerance, transform, within
from symmetrize.testing.measuring.elements import random_elements
from symmetrize.testing.measuring.sites import measure_degeneracies, measure_symmetric_sites
from symmetrize.testing.structures.symmetry_operations import idealized, symmetry_operations

ALL = geometries()
EYE = torch.eye(3, dtype=torch.float64)


def lattice_of(batch):
    return batch.cell[0][batch.pbc[0]]


def violation(batch, operation):
    """Largest distance between the image of an atom and the atom that it should fall on, after one translation."""
    lattice = lattice_of(batch)
    off = batch.pos[operation.permutation] - batch.pos @ operation.matrix.T
    off = off - off[0]
    off = off - torch.round(off @ torch.linalg.pinv(lattice)) @ lattice
    return float(off.norm(dim=1).max())


def keeps_lattice(batch, operation):
    lattice = lattice_of(batch)
    whole = lattice @ operation.matrix.T @ torch.linalg.pinv(lattice)
    return (whole - whole.round()).abs().max() < 1e-6 if len(lattice) else True


def keys_of(operations):
    return {(tuple((1e5 * o.matrix).round().flatten().tolist()), tuple(o.permutation.tolist())) for o in operations}


@pytest.mark.parametrize("name", list(ALL))
def test_every_operation_maps_the_structure_onto_itself(name):
    batch = from_ase(ALL[name])
    operations = symmetry_operations(batch)
    assert operations[0].name == "identity" and torch.equal(operations[0].matrix, EYE)
    assert torch.equal(operations[0].permutation, torch.arange(len(batch.pos)))
    for o in operations:
        assert (o.matrix @ o.matrix.T - EYE).abs().max() < 1e-13
        assert torch.equal(o.permutation.sort().values, torch.arange(len(batch.pos)))
        assert torch.equal(batch.z[o.permutation], batch.z)
        assert violation(batch, o) < 4e-6 and keeps_lattice(batch, o), o.name
    assert len(keys_of(operations)) == len(operations)
    assert ("generic" in GEOMETRIES[name].tags and name != "rattled carbon") <= (len(operations) == 1)
    # Twin: a permutation of the wrong atoms, or its inverse, is a violation.
    for o in operations:
        inverse = torch.argsort(o.permutation)
        if len(batch.pos) > 1 and not batch.pbc.any():
            assert violation(batch, o._replace(permutation=torch.roll(o.permutation, 1))) > 0.1
            if not torch.equal(inverse, o.permutation):
                assert violation(batch, o._replace(permutation=inverse)) > 0.1


ORDERS = {
    "methane": 24,
    "rotated methane": 24,
    "SF6": 48,
    "benzene": 24,
    "ammonia": 6,
    "water": 4,
    "propyne": 6,
    "pentagon": 20,
    "square": 16,
    "ethanol": 1,
    "chiral center": 1,
    "third atom at the cutoff": 2,
    "fcc Al": 48,
    "bcc Fe": 48,
    "sc Po": 48,
    "diamond": 48,
    "rattled silicon": 1,
    "triclinic crystal": 1,
    "slab": 1,
    "wire": 1,
}


@pytest.mark.parametrize("name", list(ORDERS))
def test_point_groups_in_any_orientation(name):
    given = from_ase(ALL[name])
    element = random_elements(2, torch.Generator().manual_seed(4))[1]
    for batch in (given, transform(given, element), from_ase(ALL[name], dtype=torch.float32)):
        operations = symmetry_operations(batch)
        assert len(operations) == ORDERS[name] == len({k[0] for k in keys_of(operations)})
        known = keys_of(operations)
        for a, b in itertools.product(operations[:12], operations):
            # First b, then a.
            product = a._replace(matrix=a.matrix @ b.matrix, permutation=a.permutation[b.permutation])
            assert keys_of([product]) <= known
        improper = sum(float(torch.linalg.det(o.matrix)) < 0 for o in operations)
        assert improper in (0, len(operations) // 2)


def test_distortion_beyond_the_tolerance_leaves_the_identity():
    batch = from_ase(ALL["methane"])
    step = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size, tol, order in ((1e-3, 1e-6, 1), (1e-9, 1e-6, 24), (1e-3, 2e-2, 24)):
        moved = replace(batch, pos=batch.pos + size * step)
        ideal, operations = idealized(moved, tolerance=tol)
        assert len(operations) == order
        assert (ideal.pos - moved.pos).abs().max() < 4 * size
        assert max(violation(ideal, o) for o in operations) < 1e-13
    # Heavy hydrogen: a three-fold axis is left; another one: a mirror.
    for z, order in (([6, 1, 1, 1, 9], 6), ([6, 1, 1, 8, 9], 2), ([6, 1, 7, 8, 9], 1)):
        assert len(symmetry_operations(replace(batch, z=torch.tensor(z)))) == order


def test_a_tolerance_in_the_middle_of_the_noise_still_gives_a_group():
    step = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = from_ase(ALL["SF6"])
    for size in torch.logspace(-2, -0.5, 12).tolist():
        known = keys_of(
            operations := symmetry_operations(replace(batch, pos=batch.pos + size * 0.1 * step), tolerance=0.02)
        )
        for a, b in itertools.product(operations, operations):
            product = a._replace(matrix=a.matrix @ b.matrix, permutation=a.permutation[b.permutation])
            assert {p for _, p in keys_of([product])} <= {p for _, p in known}


def test_fields_have_to_agree_and_vectors_to_turn_along():
    square = from_ase(ALL["square in the xy plane"])
    assert len(symmetry_operations(square)) == 16
    feature = replace(square, x=torch.tensor([[1.0], [2.0], [1.0], [2.0]], dtype=torch.float64))
    assert len(symmetry_operations(feature)) == 8
    mask = replace(square, center_mask=torch.tensor([True, False, False, False]))
    assert len(symmetry_operations(mask)) == 4
    axis = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    # A polar vector along the axis leaves C4v, an axial one C4h, spins tangential to the ring (axial) break more.
    assert len(symmetry_operations(replace(square, field=axis), vectors={"field": "1o"})) == 8
    assert len(symmetry_operations(replace(square, field=axis), vectors={"field": "1e"})) == 8
    both = replace(square, field=axis, magnet=axis)
    assert len(symmetry_operations(both, vectors={"field": "1o", "magnet": "1e"})) == 4
    spins = replace(square, spin=torch.linalg.cross(axis.expand(4, 3), square.pos))
    assert len(symmetry_operations(spins, vectors={"spin": "1o"})) == 8
    assert len(symmetry_operations(spins)) < 8
    with pytest.raises(InvalidInputError, match="no such field"):
        symmetry_operations(square, vectors={"spin": "1o"})


def test_names_and_infinite_groups():
    names = [o.name for o in symmetry_operations(from_ase(ALL["SF6"]))]
    assert names[0] == "identity" and "inversion" in names and "mirror normal to (1, 0, 0)" in names
    assert "4-fold about (0, 0, 1)" in names and "4-fold about (0, 0, -1)" in names
    assert sum(n.startswith("3-fold about") for n in names) == 8
    assert sum(n.startswith("6-fold rotation-reflection") for n in names) == 8
    for o in symmetry_operations(from_ase(ALL["pentagon"])):
        if o.name.startswith("5-fold (2 times)"):
            assert float(torch.trace(o.matrix)) == pytest.approx(1 + 2 * math.cos(4 * math.pi / 5))
    assert any("(2 times)" in o.name for o in symmetry_operations(from_ase(ALL["pentagon"])))
    assert len(symmetry_operations(from_ase(ALL["isolated atom"]))) == 49
    for name, flips in (("CO2", True), ("HCN", False), ("linear chain", True)):
        batch = from_ase(ALL[name])
        axis = torch.linalg.svd(batch.pos - batch.pos[0] if len(batch.pos) > 1 else batch.cell[0])[2][0]
        along = [float(axis @ o.matrix @ axis) for o in symmetry_operations(batch)]
        assert all(abs(abs(a) - 1) < 1e-12 for a in along) and any(a < 0 for a in along) is flips
        assert any(o.name.startswith("rotation by 114.592") for o in symmetry_operations(batch))


def test_periodic_in_one_and_two_directions():
    along = torch.tensor([[[3.0, 0, 0], [0, 0, 0], [0, 0, 0]]], dtype=torch.float64)
    angles = 2 * math.pi / 5 * torch.arange(5, dtype=torch.float64)
    ring = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    points = torch.cat([torch.full((5, 1), 0.4, dtype=torch.float64), ring], dim=1)
    wire = replace(from_points(points), cell=along, pbc=torch.tensor([[True, False, False]]))
    assert len(symmetry_operations(wire)) == 20
    # A five-fold screw: atoms climb by a fifth of the period.
    screw = replace(wire, pos=points + torch.arange(5)[:, None] * torch.tensor([[0.6, 0, 0]], dtype=torch.float64))
    operations = symmetry_operations(screw)
    assert len(operations) == 10 and all(float(torch.linalg.det(o.matrix)) > 0 for o in operations)
    assert sum("shifted" in o.name for o in operations) >= 4
    assert all(violation(screw, o) < 1e-9 and keeps_lattice(screw, o) for o in operations)
    cell = torch.tensor([[[2.5, 0, 0], [0, 0, 0], [1.25, 0, 1.25 * math.sqrt(3.0)]]], dtype=torch.float64)
    flat = torch.tensor([[0.1, 0.2, 0.3], [1.35, 0.2, 0.3 + 1.25 / math.sqrt(3.0)]], dtype=torch.float64)
    sheet = replace(from_points(flat), cell=cell, pbc=torch.tensor([[True, False, True]]))
    for batch in (sheet, transform(sheet, random_elements(1, torch.Generator().manual_seed(2))[0])):
        operations = symmetry_operations(batch)
        assert len(operations) == 24 and all(violation(batch, o) < 1e-9 for o in operations)
    # Graphene on something: the mirror that holds the plane is lost.
    asymmetric = replace(sheet, z=torch.tensor([5, 7]))
    assert len(symmetry_operations(asymmetric)) == 12


def test_cells_that_are_not_primitive_and_left_handed():
    assert len(symmetry_operations(from_ase(ALL["fcc Al, cubic cell"]))) == 4 * 48
    names = [o.name for o in symmetry_operations(from_ase(ALL["bcc Fe, cubic cell"]))]
    assert names[:2] == ["identity", "translation by (0.5, 0.5, 0.5) of the lattice vectors"]
    batch = from_ase(ALL["diamond"])
    mirrored = replace(batch, cell=batch.cell[:, [1, 0, 2]])
    assert torch.linalg.det(batch.cell[0]) * torch.linalg.det(mirrored.cell[0]) < 0
    operations = symmetry_operations(mirrored)
    assert len(operations) == 48 and max(violation(mirrored, o) for o in operations) < 1e-9


def test_unusable_input(monkeypatch):
    two = from_ase([ALL["methane"], ALL["water"]])
    with pytest.raises(InvalidInputError, match="expected one structure, got 2"):
        symmetry_operations(two)
    with pytest.raises(InvalidInputError, match="tolerance"):
        symmetry_operations(from_ase(ALL["methane"]), tolerance=0.0)
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "spglib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert len(symmetry_operations(from_ase(ALL["methane"]))) == 24
    with pytest.raises(MissingDependencyError, match="pip install spglib"):
        symmetry_operations(from_ase(ALL["diamond"]))


# --- what symmetry demands ----------------------------------------------------------------------------------------

OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "vector": OutputSpec("1o"),
    "pseudovector": OutputSpec("1e"),
    "pseudoscalar": OutputSpec("0o"),
    "tensor": OutputSpec(cartesian="ij"),
    "l4e": OutputSpec("4e"),
    "l5o": OutputSpec("5o"),
}
EVERYTHING = declared(OUTPUTS, forces=True)
NAMES = ("rotated methane", "ammonia", "CO2", "ethanol", "diamond", "bcc Fe, cubic cell", "isolated atom")
SAMPLE = from_ase([ALL[name] for name in NAMES])


def model(method, dtype=torch.float64, outputs=None, **options):
    backbone = ToyLocal(OUTPUTS if outputs is None else outputs, cutoff=4.0, seed=2)
    return conservative(Symmetrizer(backbone.to(dtype), method, scope="atom", **options).eval())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exact_model_has_no_forbidden_components(dtype):
    found = measure_symmetric_sites(model(ECSE(), dtype), from_ase([ALL[n] for n in NAMES], dtype=dtype), EVERYTHING)
    # Nothing is demanded of total energies, and never of structures without symmetry.
    assert set(found) == {*EVERYTHING, "atomic_energy"} - {"energy"}
    for d in found.values():
        assert within(d.relative, tolerance(d.dtype)) and d.relative_rms <= d.relative, str(d)
        assert d.dtype == dtype and NAMES.index("ethanol") not in d.structures
        assert len(d.max) == len(d.rms) == len(d.structures) == len(d.n_operations)
    assert found["forces"].structures == (0, 1, 2, 4, 5, 6)
    assert found["atomic_energy"].structures == (0, 1, 2, 4, 5)
    assert found["forces"].n_operations[0] == 24


def test_bare_backbone_has_forbidden_components():
    found = measure_symmetric_sites(model(Identity()), SAMPLE, EVERYTHING)
    assert all(d.relative > 1e-2 for d in found.values())
    assert all(float(d.max[d.structures.index(0)]) > 1e-2 for d in found.values())


def test_outputs_that_vanish_by_symmetry_have_a_scale():
    crystal = from_ase([ALL["diamond"], ALL["fcc Al"]], cutoff=4.0)
    found = measure_symmetric_sites(model(ECSE()), crystal, {"forces": EVERYTHING["forces"]})["forces"]
    assert found.scale.kind == "displacement" and within(found.relative, tolerance(found.dtype))
    dipole = {"dipole": OutputSpec("1o", reduce="sum")}
    exact = model(ECSE(), outputs=OUTPUTS | dipole)
    result = measure_symmetric_sites(exact, from_ase(ALL["methane"]), dipole)
    assert within(result["dipole"].relative, tolerance(torch.float64))

    def leaking(batch):
        result = exact(batch)
        result["dipole"] = result["dipole"] + 1e-6
        return result

    result = measure_symmetric_sites(leaking, from_ase(ALL["methane"]), dipole)
    assert result["dipole"].relative > 1e-7 and within(result["atomic_dipole"].relative, tolerance(torch.float64))


def test_structures_are_made_exactly_symmetric_first():
    """The library's ammonia is symmetric to eight digits only, and the tolerance allows more."""
    step = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = from_ase(ALL["ammonia"])
    noisy = replace(batch, pos=batch.pos + 1e-7 * step)
    found = measure_symmetric_sites(model(ECSE()), noisy, EVERYTHING)
    assert all(within(d.relative, tolerance(torch.float64)) for d in found.values())
    assert measure_symmetric_sites(model(ECSE()), noisy, EVERYTHING, tolerance=1e-9) == {}


def test_proper_operations_only_for_so3():
    outputs = {"pseudoscalar": OUTPUTS["pseudoscalar"]}
    f = model(ECSE(), outputs=OUTPUTS, group="SO(3)")
    batch = from_ase([ALL["rotated methane"], ALL["benzene"]])
    strict = measure_symmetric_sites(f, batch, outputs)["pseudoscalar"]
    proper = measure_symmetric_sites(f, batch, outputs, group="SO(3)")["pseudoscalar"]
    assert strict.relative > 1e-3 and within(proper.relative, tolerance(torch.float64))
    assert proper.n_operations == (12, 12)


def test_masked_centers_and_vectors():
    batch = from_ase([ALL[name] for name in ("rotated methane", "ethanol", "ammonia")])
    mask = torch.ones(len(batch.pos), dtype=torch.bool)
    mask[0] = mask[int(batch.ptr[1])] = False
    outputs = {name: OUTPUTS[name] for name in ("vector", "tensor")}
    masked = replace(batch, center_mask=mask)
    exact, bare = (Symmetrizer(ToyLocal(outputs), m, scope="atom").eval() for m in (ECSE(), Identity()))
    for d in measure_symmetric_sites(exact, masked, outputs).values():
        assert within(d.relative, tolerance(d.dtype))
    assert measure_symmetric_sites(bare, masked, outputs)["vector"].relative > 1e-2

    # Equivariant in the positions and a field: only operations that keep the field are demanded.
    def polarized(batch):
        return {"dipole": batch.field * (1.0 + batch.pos.square().sum()) + batch.pos.sum(dim=0)}

    field = replace(from_ase(ALL["SF6"]), field=torch.tensor([[0.0, 0.3, 0.0]], dtype=torch.float64))
    spec = {"dipole": OutputSpec("1o", per="structure")}
    given = measure_symmetric_sites(polarized, field, spec, vectors={"field": "1o"}, scale={"dipole": 1.0})
    assert given["dipole"].n_operations == (8,) and within(given["dipole"].relative, tolerance(torch.float64))
    ignored = measure_symmetric_sites(polarized, field, spec, scale={"dipole": 1.0})
    assert ignored["dipole"].n_operations == (48,) and ignored["dipole"].relative > 0.1


def test_a_nan_is_an_infinite_residual():
    f = model(ECSE())

    def broken(batch):
        result = f(batch)
        result["vector"] = result["vector"].clone()
        result["vector"][1] = math.nan
        return result

    found = measure_symmetric_sites(broken, SAMPLE, {"vector": OUTPUTS["vector"]}, scale={"vector": 1.0})["vector"]
    assert found.relative == math.inf and found.worst == 0


# --- degenerate modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "multiplicities"),
    [
        ("methane", [1, 2, 3, 3, 3, 3]),
        ("rotated methane", [1, 2, 3, 3, 3, 3]),
        ("ammonia", [1, 1, 1, 2, 2, 2, 3]),
        ("diamond", [3, 3]),
        ("CO2", [1, 1, 2, 2, 3]),
    ],
)
def test_degenerate_modes(name, multiplicities):
    energy = {"energy": OUTPUTS["energy"]}
    batch = from_ase(ALL[name], cutoff=4.0)
    exact = measure_degeneracies(model(ECSE(), outputs=energy), batch)
    # Translations count as one cluster; their degeneracy is that of zero.
    assert sorted(c.multiplicity for c in exact.clusters) == multiplicities
    assert exact.relative < 1e-7 and exact.forbidden < 1e-7 and exact.uncertainty < 1e-5, str(exact)
    assert exact.antisymmetric < 1e-7
    bare = measure_degeneracies(model(Identity(), outputs=energy), batch)
    assert bare.relative > 1e-2 and bare.forbidden > 1e-2 and bare.uncertainty < 1e-5


def test_benzene_and_masses():
    energy = {"energy": OUTPUTS["energy"]}
    batch = from_ase(ALL["methane"])
    f = model(ECSE(), outputs=energy)
    plain = measure_degeneracies(f, batch)
    heavy = measure_degeneracies(f, batch, masses=torch.full((5,), 4.0))
    assert heavy.scale == pytest.approx(plain.scale / 4) and heavy.relative < 1e-7
    isotope = measure_degeneracies(f, batch, masses=torch.tensor([12.0, 1.0, 1.0, 1.0, 2.0]))
    assert isotope.n_operations == 6 and max(c.multiplicity for c in isotope.clusters) == 3
    benzene = measure_degeneracies(f, from_ase(ALL["benzene"]))
    assert benzene.relative < 1e-7 and [c.multiplicity for c in benzene.clusters].count(2) >= 10


def test_degeneracies_of_unusable_input():
    f = model(ECSE(), outputs={"energy": OUTPUTS["energy"]})
    with pytest.raises(InvalidInputError, match="without"):
        measure_degeneracies(f, from_ase(ALL["ethanol"]))
    with pytest.raises(InvalidInputError, match="masses"):
        measure_degeneracies(f, from_ase(ALL["methane"]), masses=torch.ones(4))
    with pytest.raises(BackboneOutputError, match="push"):
        measure_degeneracies(f, from_ase(ALL["water"]), forces="push")
    nothing = measure_degeneracies(lambda b: {"forces": 0.0 * b.pos}, from_ase(ALL["methane"]))
    assert nothing.relative == math.inf
    broken = measure_degeneracies(lambda b: {"forces": math.nan * b.pos}, from_ase(ALL["methane"]))
    assert broken.relative == math.inf


def test_a_neighbor_list_is_kept_up_to_date():
    listed = with_neighbors(from_ase(ALL["ammonia"]), 4.0)
    ideal, _ = idealized(listed)
    assert keys.EDGE_INDEX in ideal.keys() and torch.equal(ideal.edge_index, listed.edge_index)
    mixed = with_neighbors(from_ase([ALL["ethanol"], ALL["ammonia"]]), 4.0)
    found = measure_symmetric_sites(model(ECSE()), mixed, EVERYTHING)
    assert all(within(d.relative, tolerance(torch.float64)) for d in found.values())
