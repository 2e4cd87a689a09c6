"""Minimal frames: one frame in general, exact on degenerate clouds too; not continuous, and the numbering decides."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase, from_points, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.frames import Stratum
from symmetrize.methods import make_method
from symmetrize.methods.minimal_frame_averaging import MinimalFrameAveraging
from symmetrize.testing import (
    conservative,
    error_scale,
    geometries,
    measure_batching,
    measure_equivariance,
    measure_forces_fd,
    measure_periodicity,
    measure_permutation,
    random_elements,
    tolerance,
    within,
)

OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    **{f"l{l}{p}": OutputSpec(f"{l}{p}") for l in range(4) for p in "eo"},
}
PER_STRUCTURE = {name: OutputSpec(spec.irreps, per="structure") for name, spec in OUTPUTS.items()}
ALL = geometries()
GENERIC = geometries("generic")
FINITE = {name: atoms for name, atoms in GENERIC.items() if not atoms.pbc.any()}
#: Directions of the nearly collinear ones are lost to rounding: the documented limit.
SOUND = geometries(exclude=("near-collinear",))
SOUND_FINITE = {name: atoms for name, atoms in SOUND.items() if not atoms.pbc.any()}
ORDERS = ("atoms", "invariants")
EXACT = tolerance(torch.float64)


def model(method, scope="structure", group="O(3)", outputs=None):
    if scope == "atom":
        backbone = ToyLocal(outputs or OUTPUTS, cutoff=4.0, seed=2)
    else:
        backbone = ToyGlobal(outputs or PER_STRUCTURE, seed=1)
    return Symmetrizer(backbone.double(), method, scope=scope, group=group).eval()


def scales(scope):
    f = model(ECSE(), scope)
    chosen = GENERIC if scope == "atom" else FINITE
    return {name: s.value for name, s in error_scale(f, from_ase(list(chosen.values())), f.backbone.outputs).items()}


SCALES = {scope: scales(scope) for scope in ("atom", "structure")}


def equivariance(f, structures, group="O(3)", n=4):
    elements = random_elements(n, torch.Generator().manual_seed(5), group=group)
    return measure_equivariance(f, from_ase(structures), f.backbone.outputs, elements, scale=SCALES[f.scope])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_all_degrees_and_parities_are_exact_degenerate_structures_included(scope, group, order):
    chosen = list((SOUND if scope == "atom" else SOUND_FINITE).values())
    found = equivariance(model(MinimalFrameAveraging(order), scope, group), chosen, group)
    # The first atom of one of them is 1e-4 from the centroid, and has no better known direction than that.
    assert within(found.relative, (1e3 if (order, scope) == ("atoms", "structure") else 10) * EXACT), str(found)


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_the_bare_backbone_and_half_of_a_stabilizer_are_not_exact(scope):
    chosen = list((GENERIC if scope == "atom" else FINITE).values())
    assert equivariance(model(Identity(), scope), chosen).relative > 1e-2

    class First(MinimalFrameAveraging):
        """The fault: one element of every stabilizer."""

        def frames(self, batch, **options):
            found = super().frames(batch, **options)
            kept = torch.cat([torch.ones(1, dtype=torch.bool), found.owner.diff() > 0])
            fields = ("rotations", "weights", "owner", "stratum", "origins")
            return type(found)(*(getattr(found, name)[kept] for name in fields), found.n_owners, found.scope)

    for name in ("CO2", "water", "benzene"):
        assert equivariance(model(First(), scope), [ALL[name]]).relative > 1e-2, name


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    rank=st.integers(0, 3),
    shift=st.floats(-50.0, 50.0),
    order=st.sampled_from(ORDERS),
    group=st.sampled_from(["O(3)", "SO(3)"]),
)
@settings(max_examples=40, deadline=None)
def test_clouds_of_every_rank_anywhere(seed, n, rank, shift, order, group):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    points[:, rank:] = 0.0
    # No two at one place.
    points[:, 0] = torch.arange(n) * 0.7 + 0.1 * points[:, 0]
    turn = random_elements(1, generator, group="SO(3)")[0].matrix
    batch = from_points(points @ turn.T + shift)
    f = model(MinimalFrameAveraging(order), group=group)
    elements = random_elements(2, generator, group=group)
    found = measure_equivariance(f, batch, f.backbone.outputs, elements, scale=SCALES["structure"])
    # Points far from the origin of coordinates, and nearly independent ones, have larger rounding errors.
    assert within(found.relative, 1e4 * EXACT), str(found)


@given(seed=st.integers(0, 2**31), n=st.integers(5, 9))
@settings(max_examples=20, deadline=None)
def test_the_frame_is_the_orthogonal_factor_of_the_first_independent_points(seed, n):
    """Against the QR decomposition of the library, made unique by a positive diagonal, or by the handedness."""
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The second point lies on the line of the first (from the centroid), and counts for nothing.
    points -= points.mean(dim=0)
    points[1] = -0.7 * points[0]
    points[3:] -= points.sum(dim=0) / (n - 3)
    expected, r = torch.linalg.qr(points[[0, 2, 3]].T)
    expected = expected * torch.sign(r.diagonal())
    batch = from_points(points)
    found = {g: model(MinimalFrameAveraging(), group=g).frames(batch).rotations[0] for g in ("O(3)", "SO(3)")}
    smallest = float((r.diagonal() / points.norm(dim=1).max()).abs().min())
    assert float((found["O(3)"] - expected).abs().max()) < 1e-13 / smallest**2
    expected[:, 2] *= torch.linalg.det(expected)
    assert float((found["SO(3)"] - expected).abs().max()) < 1e-13 / smallest**2


def test_sizes_of_frames():
    """The order of the stabilizer: 1 in general, 2 for a plane in O(3), n about a line."""
    batch = from_ase([ALL[name] for name in ("ethanol", "water", "CO2", "isolated atom")])
    for group, expected in (("SO(3)", [1, 1, 4, 1]), ("O(3)", [1, 2, 8, 1])):
        found = model(MinimalFrameAveraging(), group=group).frames(batch)
        assert found.evaluations.tolist() == expected
        kinds = [Stratum(int(found.stratum[found.owner == k][0])) for k in range(4)]
        assert kinds == [Stratum.FRAME, Stratum.FRAME, Stratum.AXIS, Stratum.POINT]
        assert torch.allclose(found.total_weight, torch.ones(4, dtype=torch.float64))
        proper = torch.linalg.det(found.rotations) > 0
        assert bool(proper.all()) if group == "SO(3)" else int(proper.sum()) < found.n_frames


def test_pairs_of_equal_invariants_are_the_symmetry_of_the_molecule():
    """With SO(3), as many frames as the group of rotations has elements: no more than are needed."""
    names = {"ethanol": 1, "methane": 12, "benzene": 12, "square": 8, "SF6": 24}
    found = model(MinimalFrameAveraging("invariants"), group="SO(3)").frames(from_ase([ALL[name] for name in names]))
    assert found.evaluations.tolist() == list(names.values())


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_renumbering_changes_the_result_with_the_order_of_atoms_only(scope):
    chosen = list((SOUND if scope == "atom" else SOUND_FINITE).values())
    for order in ORDERS:
        f = model(MinimalFrameAveraging(order), scope)
        batch = from_ase(chosen)
        found = measure_permutation(f, batch, f.backbone.outputs, n_permutations=2, scale=SCALES[scope])
        assert within(found.relative, 10 * EXACT) if order == "invariants" else found["l1o"].relative > 1e-1, str(found)
    ethanol = from_ase(ALL["ethanol"])
    f = model(MinimalFrameAveraging(), scope)
    assert measure_permutation(f, ethanol, f.backbone.outputs, scale=SCALES[scope])["energy"].relative > 1e-2


def test_other_descriptions_of_a_crystal():
    batch = from_ase([ALL["silicon"], ALL["triclinic crystal"], ALL["slab"]])
    invariant, ordered = (model(MinimalFrameAveraging(order), "atom") for order in ("invariants", "atoms"))
    found = measure_periodicity(invariant, batch, invariant.backbone.outputs, scale=SCALES["atom"])
    assert within(found.relative, 100 * EXACT), str(found)
    assert measure_periodicity(ordered, batch, ordered.backbone.outputs, scale=SCALES["atom"]).relative > 1e-2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_are_the_gradient(scope, order):
    outputs = {"energy": (OUTPUTS if scope == "atom" else PER_STRUCTURE)["energy"]}
    names = ["ethanol", "random cluster"] + ["triclinic crystal"] * (scope == "atom")
    batch = from_ase([GENERIC[name] for name in names])
    for group in ("O(3)", "SO(3)"):
        f = model(MinimalFrameAveraging(order), scope, group, outputs)
        found = measure_forces_fd(conservative(f), batch, n_directions=2, step=1e-4)["forces"]
        assert found.relative < max(1e-6, 20 * found.uncertainty) < 1e-3, str(found)

    class Constant(MinimalFrameAveraging):
        """The fault: axes without a derivative."""

        def frames(self, batch, **options):
            constant = {name: batch[name].detach() for name in (keys.POS, keys.EDGE_VEC) if name in batch}
            return super().frames(replace(batch, **constant), **options)

    broken = model(Constant(order), scope, outputs=outputs)
    assert measure_forces_fd(conservative(broken), batch, n_directions=2, step=1e-4)["forces"].relative > 1e-2


@pytest.mark.parametrize("order", ORDERS)
def test_values_forces_and_second_derivatives_are_finite_everywhere(order):
    for scope, outputs in (("atom", {"energy": OUTPUTS["energy"]}), ("structure", {"energy": PER_STRUCTURE["energy"]})):
        f = model(MinimalFrameAveraging(order), scope, outputs=outputs)
        batch = from_ase([a for a in ALL.values() if scope == "atom" or not a.pbc.any()])
        pos = batch[keys.POS].clone().requires_grad_()
        out = f(replace(batch, **{keys.POS: pos}), forces=True, create_graph=True)
        (curvature,) = torch.autograd.grad(out["forces"].square().sum(), pos)
        for values in (out["energy"], out["forces"], curvature):
            assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("order", ORDERS)
def test_the_energy_jumps_where_the_points_of_the_frame_become_collinear(order):
    def change(method, height, step=1e-7):
        # The second atom crosses the line through the first and the centroid; the last one keeps the centroid in place.
        clouds = [
            Atoms("OFCN", [[1.6, 0, 0], [-1.3, t, 0], [0.2, 0.9, 0.3], [-0.5, -0.9 - t, -0.3]])
            for t in (height - step, height + step)
        ]
        energy = model(method, group="SO(3)")(from_ase(clouds))["energy"].detach()
        return float(energy.diff().abs()) / SCALES["structure"]["energy"]

    assert change(MinimalFrameAveraging(order), 0.0) > 1e-2
    assert change(MinimalFrameAveraging(order), 0.25) < 1e-4 and change(ECSE(), 0.0) < 1e-4


@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("order", ORDERS)
def test_batches_change_nothing(scope, order):
    f = model(MinimalFrameAveraging(order), scope)
    chosen = [a for a in ALL.values() if scope == "atom" or not a.pbc.any()]
    found = measure_batching(f, from_ase(chosen), f.backbone.outputs, scale=SCALES[scope])
    assert within(found.relative, EXACT), str(found)


def test_centers_alone_get_frames():
    batch = from_ase(GENERIC["triclinic crystal"])
    mask = torch.tensor([False, True, False, True])
    for order in ORDERS:
        f = model(MinimalFrameAveraging(order), "atom")
        whole, part = f(batch), f(replace(batch, **{keys.CENTER_MASK: mask}))
        assert torch.allclose(whole["l2e"][mask], part["l2e"], atol=1e-14, rtol=0)


def test_single_precision_decides_ranks_by_its_own_rounding():
    chosen = [SOUND_FINITE[name] for name in ("CO2", "water", "ethanol", "methane")]
    for order in ORDERS:
        f = model(MinimalFrameAveraging(order)).to(torch.float32)
        batch = from_ase(chosen, dtype=torch.float32)
        elements = random_elements(4, torch.Generator().manual_seed(5))
        found = measure_equivariance(f, batch, f.backbone.outputs, elements, scale=SCALES["structure"])
        assert within(found.relative, tolerance(torch.float32)), str(found)


def test_periodic_structures_are_refused_in_structure_scope():
    with pytest.raises(InvalidInputError, match=r"MinimalFrameAveraging: structure scope .* structure 1 is periodic"):
        model(MinimalFrameAveraging()).frames(from_ase([ALL["CO2"], ALL["silicon"]]))


def test_orders_that_are_none():
    with pytest.raises(DeclarationError, match="unknown order 'atom', did you mean 'atoms'"):
        MinimalFrameAveraging("atom")


@pytest.mark.parametrize("order", ORDERS)
def test_methods_are_made_again_from_their_description(order):
    method = MinimalFrameAveraging(order)
    again = MinimalFrameAveraging.rebuild(json.loads(json.dumps(method.describe())), None)
    named = make_method("MinimalFrameAveraging", **method.describe())
    batch = from_ase(GENERIC["rattled silicon"])
    frames = [model(m, "atom").frames(batch).rotations for m in (method, again, named, copy.deepcopy(method))]
    assert all(torch.equal(frames[0], other) for other in frames[1:])
