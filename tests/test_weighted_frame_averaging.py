"""Weighted frames: exact everywhere, degenerate clouds included, and continuous where plain frame averaging jumps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import Backbone, FrameMethod, FrameSet, Identity, OutputSpec, Symmetrizer, from_ase, from_points, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.frames import Stratum
from symmetrize.methods import make_method
from symmetrize.methods import weighted_frame_averaging as module
from symmetrize.methods.clouds import clouds
from symmetrize.methods.weighted_frame_averaging import WeightedFrameAveraging
from symmetrize.testing import (
    Path,
    conservative,
    error_scale,
    geometries,
    measure_batching,
    measure_equivariance,
    measure_forces_fd,
    measure_permutation,
    measure_smoothness,
    paths,
    random_elements,
    tolerance,
    within,
)

CUTOFF = 4.0
OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    **{f"l{l}{p}": OutputSpec(f"{l}{p}") for l in range(4) for p in "eo"},
}
PER_STRUCTURE = {name: OutputSpec(spec.irreps, per="structure") for name, spec in OUTPUTS.items()}
ENERGY = {"atom": {"energy": OUTPUTS["energy"]}, "structure": {"energy": PER_STRUCTURE["energy"]}}
ALL = geometries()
FINITE = {name: atoms for name, atoms in ALL.items() if not atoms.pbc.any()}
GENERIC = ["ethanol", "chiral center", "random cluster", "two-hop collinear"]
SYMMETRIC = ["methane", "methane, almost", "hexagon", "square in the xy plane", "SF6", "water", "ammonia"]
LINES = ["isolated atom", "H2", "CO2", "CO2 along x", "C2H2", "HCN", "CO2, 1e-3 off the line", "CO2, 1e-8 off the line"]
CRYSTALS = ["triclinic crystal", "diamond", "wire", "linear chain", "simple cubic with cutoff neighbors"]
CUBE = Atoms("H8", [[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
LIMIT = tolerance(torch.float64)
PATHS = paths(CUTOFF)


def model(method, scope="structure", group="O(3)", outputs=None):
    if scope == "atom":
        backbone = ToyLocal(outputs or OUTPUTS, cutoff=CUTOFF, seed=2)
    else:
        backbone = ToyGlobal(outputs or PER_STRUCTURE, seed=1)
    return Symmetrizer(backbone.double(), method, scope=scope, group=group).eval()


def scales(scope):
    f = model(WeightedFrameAveraging(), scope)
    chosen = [ALL[name] for name in GENERIC]
    return {name: s.value for name, s in error_scale(f, from_ase(chosen), f.backbone.outputs).items()}


SCALES = {scope: scales(scope) for scope in ("atom", "structure")}


def equivariance(f, structures, group="O(3)", n=3):
    elements = random_elements(n, torch.Generator().manual_seed(5), group=group)
    return measure_equivariance(f, from_ase(structures), f.backbone.outputs, elements, scale=SCALES[f.scope])


def select(found, kept):
    fields = ("rotations", "weights", "owner", "stratum", "origins")
    return FrameSet(*(getattr(found, name)[kept] for name in fields), found.n_owners, found.scope)


class Leaning(WeightedFrameAveraging):
    """The fault: weights that know the coordinate axes."""

    def frames(self, batch, **options):
        found = super().frames(batch, **options)
        return changed(found, weights=found.weights * (1.5 + found.rotations[:, 0, 0]))


class Unturned(WeightedFrameAveraging):
    """The fault: nothing is averaged about the axes of clouds on a line or near one."""

    def frames(self, batch, **options):
        found = super().frames(batch, **options)
        weights = found.weights.clone()
        turned = torch.zeros_like(found.owner, dtype=torch.bool)
        turned[1:] = (found.stratum[1:] == int(Stratum.AXIS)) & (found.owner[1:] == found.owner[:-1])
        weights[turned] = 0.0
        return changed(found, weights=weights)


class PrincipalAxes(FrameMethod):
    """Plain frame averaging, the twin: all signs of the eigenvectors of the second moment, with equal weights."""

    def frames(self, batch, *, group, scope, l_max, generator=None):
        around = clouds(batch, scope, "PrincipalAxes")
        moments = around.sum(around.vectors[:, :, None] * around.vectors[:, None, :])
        axes = torch.linalg.eigh(moments.detach())[1]
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0]).double()] * 3)
        rotations = (axes[:, None] * signs[:, None, :]).flatten(0, 1)
        if group == "SO(3)":
            rotations = rotations[torch.linalg.det(rotations) > 0]
        return around.owners.frame_set(rotations, torch.ones_like(rotations[:, 0, 0]))


# Exact.


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("kind", ["generic", "symmetric", "lines", "crystals"])
def test_all_degrees_and_parities_are_exact(kind, scope, group):
    names = {"generic": GENERIC, "symmetric": SYMMETRIC, "lines": LINES, "crystals": CRYSTALS}[kind]
    if kind == "crystals" and scope == "structure":
        names = ["propyne", "benzene", "two H2, skew", "random point cloud"]
    chosen = [ALL[name] for name in names] + [CUBE] * (kind == "symmetric")
    found = equivariance(model(WeightedFrameAveraging(), scope, group), chosen, group)
    assert within(found.relative, LIMIT), str(found)
    for fault in (Identity(), Leaning()):
        assert equivariance(model(fault, scope, group), chosen, group, n=1).relative > 1e-3


@pytest.mark.parametrize("method", [WeightedFrameAveraging(0.0, 0.5), WeightedFrameAveraging(0.95, 0.05, 2.5)])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_exact_for_other_options_as_well(scope, method):
    chosen = [ALL[name] for name in ("methane", "ammonia", "CO2", "water at 150 degrees", "third atom at the cutoff")]
    found = equivariance(model(method, scope), chosen, n=2)
    assert within(found.relative, LIMIT), str(found)


@pytest.mark.parametrize("height", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-12])
def test_exact_at_every_distance_from_a_line(height):
    bent = Atoms("OCNH", [[-1.2, 0, 0], [0, height, 0], [1.1, 0, 0.5 * height], [2.2, -height, height]])
    for scope in ("atom", "structure"):
        found = equivariance(model(WeightedFrameAveraging(), scope), [bent])
        assert within(found.relative, LIMIT), (scope, str(found))
    if height <= 1e-2:
        assert equivariance(model(Identity()), [bent]).relative > 1e-2


class Abrupt(Backbone):
    """Per-atom sums over neighbors that are switched off linearly, up to the very cutoff."""

    def __init__(self):
        specs = {name: OUTPUTS[name] for name in ("l0e", "l1o", "l2e")}
        super().__init__(outputs=specs, cutoff=CUTOFF, receptive_field=1)
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(3, 9, generator=generator, dtype=torch.float64)
        self.second = torch.randn(9, 9, generator=generator, dtype=torch.float64)

    def forward(self, batch):
        vectors, (_, center) = batch[keys.EDGE_VEC], batch[keys.EDGE_INDEX]
        terms = torch.sin(vectors @ self.first + 1.0) * (1.0 - vectors.norm(dim=1, keepdim=True) / CUTOFF)
        sums = torch.zeros(batch[keys.POS].shape[0], 9).to(terms).index_add(0, center, terms)
        if keys.CENTER_MASK in batch:
            sums = sums[batch[keys.CENTER_MASK]]
        scalar, vector, tensor = torch.tanh(sums @ self.second).split([1, 3, 5], dim=1)
        return {"l0e": scalar[:, 0], "l1o": vector, "l2e": tensor}


@given(gap=st.floats(-15.0, -0.5), angle=st.floats(0.2, np.pi - 0.2))
@settings(max_examples=15, deadline=None)
def test_exact_while_the_only_neighbor_off_a_line_leaves(gap, angle):
    """However little of it is left, the backbone sees it."""
    far = CUTOFF - 10.0**gap
    atoms = Atoms("CNHO", [[0, 0, 0], [1.2, 0, 0], [-1.1, 0, 0], [far * np.cos(angle), far * np.sin(angle), 0]])
    f = Symmetrizer(Abrupt(), WeightedFrameAveraging(), scope="atom")
    elements = random_elements(2, torch.Generator().manual_seed(5), group="O(3)")
    ones = dict.fromkeys(f.backbone.outputs, 1.0)
    found = measure_equivariance(f, from_ase([atoms]), f.backbone.outputs, elements, scale=ones)
    assert within(found.relative, LIMIT), str(found)


def test_lines_need_the_average_about_them():
    chosen = [ALL["CO2"], ALL["H2"]]
    for scope in ("atom", "structure"):
        assert equivariance(model(Unturned(), scope), chosen)["l2e"].relative > 1e-3


def test_rotations_alone_do_not_make_parity():
    f = model(WeightedFrameAveraging(), group="SO(3)")
    assert equivariance(f, [ALL["chiral center"]], "O(3)").relative > 1e-3


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_permutations_and_batches_change_nothing(scope):
    f = model(WeightedFrameAveraging(), scope)
    batch = from_ase([ALL[name] for name in (*GENERIC, *SYMMETRIC[:4], *LINES[:4])])
    for measured in (measure_permutation, measure_batching):
        found = measured(f, batch, f.backbone.outputs, scale=SCALES[scope])
        assert within(found.relative, LIMIT), str(found)

    class FirstPair(WeightedFrameAveraging):
        """The fault: the first frame stands for all."""

        def frames(self, batch, **options):
            found = super().frames(batch, **options)
            first = torch.ones_like(found.owner, dtype=torch.bool)
            first[1:] = found.owner[1:] != found.owner[:-1]
            return select(found, first)

    broken = model(FirstPair(), scope)
    assert measure_permutation(broken, batch, f.backbone.outputs, scale=SCALES[scope]).relative > 1e-3


class Shells(Backbone):
    """Equivariant by construction: radial functions times polynomials in the vectors from the centroid."""

    def __init__(self, tilt=0.0):
        outputs = {"energy": PER_STRUCTURE["energy"], "dipole": OutputSpec(cartesian="i", per="structure")}
        outputs["tensor"] = OutputSpec(cartesian="ij=ji", per="structure")
        super().__init__(outputs=outputs, cutoff=None, receptive_field=None)
        self.tilt = tilt

    def forward(self, batch):
        n = batch[keys.PTR].shape[0] - 1
        pos, structure = batch[keys.POS], batch[keys.BATCH]
        counts = torch.bincount(structure, minlength=n)[:, None]
        r = pos - (torch.zeros(n, 3).to(pos).index_add(0, structure, pos) / counts)[structure]
        radial = torch.sin((r * r).sum(dim=1) + batch[keys.Z] + self.tilt * r[:, 0])[:, None]
        sums = [radial, radial * r, (radial[:, :, None] * r[:, :, None] * r[:, None, :]).flatten(1)]
        energy, dipole, tensor = (torch.zeros(n, s.shape[1]).to(pos).index_add(0, structure, s) for s in sums)
        return {"energy": energy[:, 0], "dipole": dipole, "tensor": tensor.reshape(n, 3, 3)}


def test_an_equivariant_backbone_is_unchanged():
    batch = from_ase([ALL[name] for name in (*GENERIC, *SYMMETRIC, *LINES)])
    for tilt in (0.0, 0.3):
        backbone = Shells(tilt).double()
        plain, averaged = backbone(batch), Symmetrizer(backbone, WeightedFrameAveraging())(batch)
        change = max(float((averaged[name] - plain[name]).abs().max()) for name in plain)
        assert change < 1e-12 if tilt == 0.0 else change > 1e-2


# Frames and weights.


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_weights_are_not_negative_and_add_up_to_one(scope, group):
    chosen = list((ALL if scope == "atom" else FINITE).values())
    for method in (WeightedFrameAveraging(), WeightedFrameAveraging(0.3, 0.6, 1.0)):
        found = method.frames(from_ase(chosen, cutoff=CUTOFF), group=group, scope=scope, l_max=2)
        assert float(found.weights.min()) >= 0.0
        assert float((found.total_weight - 1.0).abs().max()) < 1e-12
        n_point = int((found.stratum == int(Stratum.POINT)).sum())
        improper = int((torch.linalg.det(found.rotations) < 0).sum())
        assert improper == ((found.n_frames - n_point) // 2 if group == "O(3)" else 0)


@given(
    sizes=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30),
    threshold=st.sampled_from([0.0, 0.5, 0.8, 0.99]),
    exponent=st.integers(-90, 90),
)
@settings(max_examples=100, deadline=None)
def test_shares_never_degenerate_and_do_not_depend_on_the_order(sizes, threshold, exponent):
    values = torch.tensor(sizes, dtype=torch.float64) * 10.0**exponent
    row = torch.zeros(len(sizes), dtype=torch.int64)
    shares, mean = module._shares(values, row, 1, threshold)
    if float(values.max()) < 1e-200:
        assert not bool(shares.any())
        return
    assert float((shares.sum() - 1.0).abs()) < 1e-12 and float(shares.min()) >= 0.0
    # The mean is not above the maximum: the largest has (1 - threshold)^2 before normalization.
    assert float(values.max() / mean[0]) >= 1.0 - 1e-12
    turned = module._shares(values.flip(0), row, 1, threshold)[0].flip(0)
    assert torch.allclose(turned, shares, rtol=1e-9, atol=1e-12)


def test_thresholds_choose_pairs():
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = from_points(points, torch.zeros(6, dtype=torch.int64))
    numbers = [
        WeightedFrameAveraging(t).frames(batch, group="SO(3)", scope="structure", l_max=1).n_evaluations
        for t in (0.0, 0.3, 0.6, 0.9)
    ]
    assert numbers[0] == 6 * 5 and numbers == sorted(numbers, reverse=True) and numbers[-1] < 6


@pytest.mark.parametrize(("name", "n"), [("methane", 12), ("SF6", 24), ("square", 8)])
def test_symmetric_molecules_have_the_frames_of_their_group(name, n):
    found = WeightedFrameAveraging().frames(from_ase(ALL[name]), group="SO(3)", scope="structure", l_max=1)
    assert found.n_evaluations == n
    assert torch.allclose(found.weights, torch.full_like(found.weights, 1.0 / n), rtol=1e-9)


def test_atoms_outside_of_the_mask_have_no_frames():
    batch = from_ase(ALL["ethanol"], cutoff=CUTOFF)
    mask = torch.arange(9) % 2 == 0
    masked = replace(batch, **{keys.CENTER_MASK: mask})
    every, some = (WeightedFrameAveraging().frames(b, group="O(3)", scope="atom", l_max=1) for b in (batch, masked))
    kept = mask[every.owner]
    assert torch.equal(some.owner, every.owner[kept]) and torch.allclose(some.weights, every.weights[kept])


def test_lone_neighbors_fade_into_the_isolated_atom():
    f = model(WeightedFrameAveraging(), "atom")
    at = [CUTOFF - 0.4 * x for x in (1.0, 0.5, 1e-3, -1e-3)]
    found = f.frames(from_ase([Atoms("CO", [[0, 0, 0], [d, 0, 0]]) for d in at], cutoff=CUTOFF))
    point = torch.zeros(8, dtype=torch.float64).index_add(
        0, found.owner, found.weights * (found.stratum == int(Stratum.POINT))
    )
    assert float(point[0]) == 0.0 and 0.0 < float(point[2]) < 1.0 and float(point[4]) > 0.99 and float(point[6]) == 1.0


# Continuous.


def turned(structures, seed=3):
    turn = random_elements(1, torch.Generator().manual_seed(seed), group="SO(3)")[0].matrix.numpy()
    out = [atoms.copy() for atoms in structures]
    for atoms in out:
        atoms.positions = atoms.positions @ turn.T
    return out


def stretched(t: float) -> Atoms:
    """An asymmetric cloud, diagonal second moment with entries 3, 2 + t and 2.5: two of them cross at t = 0.5."""
    generator = np.random.default_rng(4)
    points = generator.normal(size=(7, 3))
    points -= points.mean(axis=0)
    values, vectors = np.linalg.eigh(points.T @ points)
    points = points @ vectors / np.sqrt(values) * np.sqrt([3.0, 2.0 + t, 2.5])
    return Atoms("CHONFSP", points)


def two_ways(t: float, path, other: float) -> Atoms:
    """A degenerate cloud (t = 0.5) and how it is left: in two directions for the two signs of t - 0.5."""
    atoms, middle = path(t), path(0.5)
    if t > 0.5:
        turn = np.array([[1.0, 0, 0], [0, np.cos(other), -np.sin(other)], [0, np.sin(other), np.cos(other)]])
        atoms.positions = middle.positions + (atoms.positions - middle.positions) @ turn.T
    return atoms


CROSSINGS = {
    "equal eigenvalues": stretched,
    "tetrahedron": lambda t: two_ways(t, PATHS["through the tetrahedron"], 1.0),
    "line": lambda t: two_ways(t, PATHS["bending CO2"], 0.7),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_values_are_continuous_where_those_of_plain_frames_jump(name):
    @torch.no_grad()
    def change(method, step):
        out = model(method)(from_ase(turned([CROSSINGS[name](0.5 - step), CROSSINGS[name](0.5 + step)])))
        return max(float((y[1] - y[0]).abs().max()) / SCALES["structure"][k] for k, y in out.items())

    for step in (1e-4, 1e-6):
        # What is differentiable changes by the step times a slope.
        assert change(WeightedFrameAveraging(), step) < 300 * step
        assert change(PrincipalAxes(), step) > 1e-2
    if name == "line":
        assert change(Unturned(), 1e-4) > 1e-2


EVENTS = [
    *(("structure", name) for name in ("bending CO2", "through the centroid", "through the tetrahedron")),
    *(("atom", name) for name in ("bending HCN", "pair crosses the cutoff", "right angle")),
    ("atom", "exchange of nearest neighbors"),
]


def smoothness(method, scope, path):
    specs = OUTPUTS if scope == "atom" else PER_STRUCTURE
    f = model(method, scope, "SO(3)", {name: specs[name] for name in ("energy", "l1o")})

    @torch.no_grad()
    def curve(t):
        out = f(from_ase([path(float(x)) for x in t]))
        return torch.cat([(out[name] / SCALES[scope][name]).reshape(len(t), -1) for name in ("energy", "l1o")], 1)

    return measure_smoothness(curve, events=path.events, n_points=20, n_candidates=1, highest=1)


@pytest.mark.parametrize(("scope", "name"), EVENTS)
def test_values_and_first_derivatives_are_continuous_through_every_event(scope, name):
    found = smoothness(WeightedFrameAveraging(), scope, PATHS[name])
    assert found.jump(0) < 1e-9 and found.jump(1) < 1e-5 * found.max_first, str(found)


class Kinked(WeightedFrameAveraging):
    """The fault: weights that are linear at the thresholds."""

    def frames(self, batch, **options):
        found = super().frames(batch, **options)
        return changed(found, weights=found.weights.sqrt())


def test_a_jump_or_a_kink_along_a_path_would_be_seen():
    crossing = Path("crossing", stretched, (0.5,), "two eigenvalues cross")
    assert smoothness(PrincipalAxes(), "structure", crossing).jump(0) > 1e-3
    found = smoothness(Kinked(), "structure", PATHS["through the tetrahedron"])
    assert found.jump(1) > 1e-2 * found.max_first


# Forces.


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_are_the_gradient(scope, group):
    f = model(WeightedFrameAveraging(), scope, group, ENERGY[scope])
    names = ["ethanol", "methane", "CO2", "water at 150 degrees", "random cluster", "two N2, skew"]
    batch = from_ase([ALL[name] for name in names])
    found = measure_forces_fd(conservative(f), batch, n_directions=2, step=1e-4)["forces"]
    assert found.relative < max(1e-6, 20 * found.uncertainty) < 1e-3, str(found)

    class Constant(WeightedFrameAveraging):
        """The fault: frames and weights without a derivative."""

        def frames(self, batch, **options):
            constant = {name: batch[name].detach() for name in (keys.POS, keys.EDGE_VEC) if name in batch}
            return super().frames(replace(batch, **constant), **options)

    broken = model(Constant(), scope, group, ENERGY[scope])
    assert measure_forces_fd(conservative(broken), batch, n_directions=2, step=1e-4)["forces"].relative > 1e-3


def test_stress_of_a_crystal_is_the_gradient():
    f = model(WeightedFrameAveraging(), "atom", outputs=ENERGY["atom"])
    batch = from_ase(ALL["triclinic crystal"])
    found = measure_forces_fd(conservative(f, stress=True), batch, stress=True, n_directions=2, step=4e-4)
    assert max(d.relative / max(1e-6, 20 * d.uncertainty) for d in found.values()) < 1.0


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_turn_with_symmetric_and_degenerate_clouds(scope):
    """Exactly on ties and lines a derivative is easily that of one choice out of several."""
    f = model(WeightedFrameAveraging(), scope, outputs=ENERGY[scope])
    chosen = [ALL[name] for name in (*SYMMETRIC, *LINES, "benzene")] + [CUBE]
    g = random_elements(1, torch.Generator().manual_seed(2), group="SO(3)")[0].matrix
    before = f(from_ase(chosen), forces=True)["forces"]
    after = f(from_ase(turned(chosen, seed=2)), forces=True)["forces"]
    size = float(before.abs().max())
    assert float((after - before @ g.T).abs().max()) < 1e-9 * size
    bare = model(Identity(), scope, outputs=ENERGY[scope])
    before, after = (bare(from_ase(c), forces=True)["forces"] for c in (chosen, turned(chosen, seed=2)))
    assert float((after - before @ g.T).abs().max()) > 1e-2 * size


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_second_derivatives_are_finite_everywhere(scope):
    f = model(WeightedFrameAveraging(), scope, outputs=ENERGY[scope])
    names = [name for name in (*GENERIC, *SYMMETRIC, *LINES)] + (["diamond", "wire"] if scope == "atom" else [])
    batch = from_ase([ALL[name] for name in names])
    pos = batch[keys.POS].clone().requires_grad_()
    out = f(replace(batch, **{keys.POS: pos}), forces=True, create_graph=True)
    (curvature,) = torch.autograd.grad(out["forces"].square().sum(), pos)
    for values in (out["energy"], out["forces"], curvature):
        assert bool(torch.isfinite(values).all())
    assert float(curvature.abs().max()) > 0.0


@given(gap=st.floats(-16.0, -0.5))
@settings(max_examples=15, deadline=None)
def test_neighbors_that_fade_leave_finite_forces(gap):
    f = model(WeightedFrameAveraging(), "atom", outputs=ENERGY["atom"])
    far = CUTOFF - 10.0**gap
    for points in (
        [[0, 0, 0], [far, 0, 0]],
        [[0, 0, 0], [0, far, 0], [0, 0.1, -far]],
        [[0, 0, 0], [0, 1, 0], [far, 0, 0]],
    ):
        batch = from_ase(Atoms("COC"[: len(points)], points))
        pos = batch[keys.POS].clone().requires_grad_()
        out = f(replace(batch, **{keys.POS: pos}), forces=True, create_graph=True)
        (curvature,) = torch.autograd.grad(out["forces"].square().sum(), pos)
        for values in (out["energy"], out["forces"], curvature):
            assert bool(torch.isfinite(values).all())


# The class.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold: expected a number from 0 to below 1, got 1.0"),
        ({"threshold": "high"}, "threshold: expected .* got 'high'"),
        ({"threshold": True}, "threshold: expected"),
        ({"collinearity": 0.0}, "collinearity: expected a number between 0 and 1, got 0.0"),
        ({"collinearity": float("nan")}, "collinearity: expected"),
        ({"cutoff_width": 0.0}, "cutoff_width: expected a positive number or None, got 0.0"),
        ({"cutoff_width": float("inf")}, "cutoff_width: expected"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(DeclarationError, match=f"WeightedFrameAveraging: {message}"):
        WeightedFrameAveraging(**options)


def test_periodic_structures_are_refused_in_structure_scope():
    with pytest.raises(InvalidInputError, match=r"WeightedFrameAveraging: structure scope .* structure 1 is periodic"):
        model(WeightedFrameAveraging()).frames(from_ase([ALL["CO2"], ALL["silicon"]]))


@pytest.mark.parametrize("method", [WeightedFrameAveraging(), WeightedFrameAveraging(0.4, 0.3, 1.5)])
def test_made_again_from_its_description(method):
    again = WeightedFrameAveraging.rebuild(json.loads(json.dumps(method.describe())), None)
    named = make_method("WeightedFrameAveraging", **method.describe())
    batch = from_ase([ALL["ethanol"], ALL["rattled silicon"]])
    frames = [model(m, "atom").frames(batch) for m in (method, again, named, copy.deepcopy(method))]
    assert all(torch.equal(frames[0].weights, other.weights) for other in frames[1:])
    assert repr(method) == repr(again)
