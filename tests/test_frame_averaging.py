"""Principal-axis frames: exact where the eigenvalues differ, and the published faults where they do not."""

from __future__ import annotations

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Backbone, Identity, OutputSpec, Symmetrizer, from_ase, from_points, keys
from symmetrize.data import replace, validate, with_neighbors
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.methods import make_method, stochastic_frame_averaging
from symmetrize.methods.clouds import clouds
from symmetrize.methods.frame_averaging import FrameAveraging
from symmetrize.methods.principal_axes import axis_frames, principal_axes, second_moments
from symmetrize.methods.stochastic_frame_averaging import StochasticFrameAveraging
from symmetrize.testing import (
    conservative,
    error_scale,
    geometries,
    measure_batching,
    measure_equivariance,
    measure_forces_fd,
    measure_permutation,
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
GENERIC = geometries("generic")
FINITE = {name: atoms for name, atoms in GENERIC.items() if not atoms.pbc.any()}
ALL = geometries()
SINGLE = tolerance(torch.float64)


def model(method, scope="structure", group="O(3)", outputs=None):
    if scope == "atom":
        backbone = ToyLocal(outputs or OUTPUTS, cutoff=CUTOFF, seed=2)
    else:
        backbone = ToyGlobal(outputs or PER_STRUCTURE, seed=1)
    return Symmetrizer(backbone.double(), method, scope=scope, group=group).eval()


def smallest_gap(atoms, scope):
    """Between eigenvalues (shares of the trace) of any owner: rounding in the axes is that much larger."""
    batch = with_neighbors(validate(from_ase(atoms)), CUTOFF)
    return float(principal_axes(second_moments(clouds(batch, scope, "test")))[0].diff(dim=1).min())


def untied(scope):
    """Structures of which no owner has eigenvalues that are nearly equal, and the precision that they leave."""
    gaps = {name: smallest_gap(a, scope) for name, a in GENERIC.items() if scope == "atom" or name in FINITE}
    chosen = [GENERIC[name] for name, gap in gaps.items() if gap > 1e-3]
    assert len(chosen) >= 3
    return chosen, SINGLE / min(gap for gap in gaps.values() if gap > 1e-3)


def scales(scope):
    f = model(FrameAveraging(), scope)
    chosen = GENERIC if scope == "atom" else FINITE
    return {name: s.value for name, s in error_scale(f, from_ase(list(chosen.values())), f.backbone.outputs).items()}


SCALES = {scope: scales(scope) for scope in ("atom", "structure")}


def equivariance(f, structures, group="O(3)", n=4):
    elements = random_elements(n, torch.Generator().manual_seed(5), group=group)
    scale = {
        name: value for name, value in SCALES[f.scope].items() if name.removeprefix("atomic_") in f.backbone.outputs
    }
    return measure_equivariance(f, from_ase(structures), f.backbone.outputs, elements, scale=scale)


class Missing(FrameAveraging):
    """The fault: one of the senses is forgotten."""

    def frames(self, batch, *, group, scope, l_max, generator=None):
        found = super().frames(batch, group=group, scope=scope, l_max=l_max, generator=generator)
        kept = torch.arange(found.n_frames) % (8 if group == "O(3)" else 4) > 0
        fields = ("rotations", "weights", "owner", "stratum", "origins")
        return type(found)(*(getattr(found, name)[kept] for name in fields), found.n_owners, scope)


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_all_degrees_and_parities_are_exact_on_generic_structures(scope, group):
    chosen, limit = untied(scope)
    found = equivariance(model(FrameAveraging(), scope, group), chosen, group)
    assert within(found.relative, limit), str(found)
    for fault in (Identity(), Missing()):
        assert equivariance(model(fault, scope, group), chosen, group).relative > 1e-2


def test_rotations_alone_do_not_make_parity():
    chosen = [FINITE["chiral center"]]
    assert equivariance(model(FrameAveraging(), group="SO(3)"), chosen, "O(3)").relative > 1e-2


@pytest.mark.parametrize(("group", "n"), [("O(3)", 8), ("SO(3)", 4)])
def test_numbers_and_handedness_of_frames(group, n):
    for scope, chosen in (("atom", GENERIC), ("structure", FINITE)):
        batch = from_ase(list(chosen.values()))
        found = model(FrameAveraging(), scope, group).frames(batch)
        n_owners = batch[keys.POS].shape[0] if scope == "atom" else len(chosen)
        assert found.n_evaluations == n * n_owners
        proper = (torch.linalg.det(found.rotations) > 0).to(torch.float64)
        assert float(proper.mean()) == (0.5 if group == "O(3)" else 1.0)


def symmetric(n, seed):
    values = torch.randn(n, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = values @ values.transpose(1, 2)
    return matrix / matrix.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_principal_axes_diagonalise_and_have_the_derivatives_of_perturbation_theory(seed):
    matrix = symmetric(2, seed)
    values, vectors = principal_axes(matrix)
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.transpose(1, 2), matrix, atol=1e-14)
    assume(float(values.diff(dim=1).min()) > 0.05)
    # An axis perpendicular to the direction that decides its sense turns around within the finite difference.
    assume(float((torch.tensor([0.5309, 0.6180, 0.5799]).double() @ vectors).abs().min()) > 1e-3)
    matrix.requires_grad_()

    def axes(m):
        return principal_axes((m + m.transpose(1, 2)) / 2)

    assert torch.autograd.gradcheck(axes, (matrix,), eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(axes, (matrix,), eps=1e-6, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_part_of_the_derivative_that_has_no_tie_stays(seed):
    """Of a matrix with one tied pair, the untied axis has its full derivative, and nothing is infinite."""
    turn = axis_frames(principal_axes(symmetric(1, seed))[1], "SO(3)")[0, 0]
    tied = (turn * torch.tensor([0.2, 0.2, 0.6]).double()) @ turn.T
    direction = symmetric(1, seed + 7)[0]

    def third(m):
        return (principal_axes(((m + m.T) / 2)[None])[1][0, :, 2] * turn[:, 0]).sum()

    matrix = tied.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(third(matrix), matrix, create_graph=True)
    numeric = (third(tied + 1e-6 * direction) - third(tied - 1e-6 * direction)) / 2e-6
    assert abs(float(((gradient * direction).sum() - numeric).detach())) < 1e-7
    (second,) = torch.autograd.grad((gradient * direction).sum(), matrix)
    assert bool(torch.isfinite(second).all())
    # The twin: what the library returns there.
    (plain,) = torch.autograd.grad(torch.linalg.eigh((matrix + matrix.T) / 2)[1][0, :2].sum(), matrix)
    (ours,) = torch.autograd.grad(principal_axes(((matrix + matrix.T) / 2)[None])[1][0, 0, :2].sum(), matrix)
    assert bool(torch.isfinite(ours).all()) and float(ours.abs().max()) < 1e3
    assert not float(plain.abs().max()) < 1e10


def test_everything_is_finite_where_eigenvalues_are_equal():
    for scope, outputs in (("atom", {"energy": OUTPUTS["energy"]}), ("structure", {"energy": PER_STRUCTURE["energy"]})):
        f = model(FrameAveraging(), scope, outputs=outputs)
        chosen = [a for a in ALL.values() if scope == "atom" or not a.pbc.any()]
        batch = from_ase(chosen)
        pos = batch[keys.POS].clone().requires_grad_()
        out = f(replace(batch, **{keys.POS: pos}), forces=True, create_graph=True)
        (curvature,) = torch.autograd.grad(out["forces"].square().sum(), pos)
        for values in (out["energy"], out["forces"], curvature):
            assert bool(torch.isfinite(values).all())


@given(gap=st.floats(-16.0, -0.5))
@settings(max_examples=25, deadline=None)
def test_neighbors_that_fade_leave_finite_forces(gap):
    """Weights down to the smallest float64, just inside of the cutoff."""
    f = model(FrameAveraging(), "atom", outputs={"energy": OUTPUTS["energy"]})
    far = CUTOFF - 10.0**gap
    for points in ([[0, 0, 0], [far, 0, 0]], [[0, 0, 0], [0, far, 0], [0, 0.1, -far]]):
        out = f(from_ase(Atoms("COC"[: len(points)], points)), forces=True)
        assert bool(torch.isfinite(out["forces"]).all()) and bool(torch.isfinite(out["energy"]).all())


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_forces_are_the_gradient_off_degeneracies(scope, group):
    outputs = {"energy": (OUTPUTS if scope == "atom" else PER_STRUCTURE)["energy"]}
    f = model(FrameAveraging(), scope, group, outputs)
    names = ["ethanol", "random cluster"] + ["triclinic crystal"] * (scope == "atom")
    batch = from_ase([GENERIC[name] for name in names])
    found = measure_forces_fd(conservative(f), batch, n_directions=3, step=1e-4)["forces"]
    assert found.relative < max(1e-6, 20 * found.uncertainty) < 1e-3, str(found)

    class Constant(FrameAveraging):
        """The fault: axes without a derivative."""

        def frames(self, batch, **options):
            constant = {name: batch[name].detach() for name in (keys.POS, keys.EDGE_VEC) if name in batch}
            return super().frames(replace(batch, **constant), **options)

    broken = model(Constant(), scope, group, outputs)
    assert measure_forces_fd(conservative(broken), batch, n_directions=3, step=1e-4)["forces"].relative > 1e-2


def test_stress_of_a_crystal_is_the_gradient():
    f = model(FrameAveraging(), "atom", outputs={"energy": OUTPUTS["energy"]})
    batch = from_ase(GENERIC["triclinic crystal"])
    found = measure_forces_fd(conservative(f, stress=True), batch, stress=True, n_directions=2, step=4e-4)
    assert max(d.relative / max(1e-6, 20 * d.uncertainty) for d in found.values()) < 1.0


# What the method is known for.


def turned(structures, seed=3):
    turn = random_elements(1, torch.Generator().manual_seed(seed), group="SO(3)")[0].matrix.numpy()
    out = [atoms.copy() for atoms in structures]
    for atoms in out:
        atoms.positions = atoms.positions @ turn.T
    return out


@pytest.mark.parametrize("name", ["methane", "benzene", "SF6"])
def test_energies_of_symmetric_molecules_depend_on_the_orientation(name):
    f, exact = model(FrameAveraging()), model(ECSE())
    structures = turned([ALL[name]])
    assert equivariance(f, structures)["energy"].relative > 1e-3
    assert equivariance(exact, structures)["energy"].relative < SINGLE


def test_lines_and_points_are_exact_for_scalars_and_vectors_only():
    structures = turned([ALL["CO2"], ALL["H2"], ALL["C2H2"], ALL["isolated atom"]])
    for group in ("O(3)", "SO(3)"):
        found = equivariance(model(FrameAveraging(), group=group), structures, "SO(3)")
        for name, deviation in found.outputs.items():
            if name == "energy" or int(name[1]) <= 1:
                assert within(deviation.relative, SINGLE), (group, name)
        assert found["l2e"].relative > 1e-2


def stretched(t: float) -> Atoms:
    """An asymmetric cloud, diagonal second moment with entries 3, 2 + t and 2.5: two of them cross at t = 0.5."""
    generator = np.random.default_rng(4)
    points = generator.normal(size=(7, 3))
    points -= points.mean(axis=0)
    values, vectors = np.linalg.eigh(points.T @ points)
    points = points @ vectors / np.sqrt(values) * np.sqrt([3.0, 2.0 + t, 2.5])
    return turned([Atoms("CHONFSP", points)])[0]


def test_the_energy_jumps_where_eigenvalues_cross():
    def change(method, t, step=1e-7):
        energy = model(method)(from_ase([stretched(t - step), stretched(t + step)]))["energy"].detach()
        return float((energy[1] - energy[0]).abs()) / SCALES["structure"]["energy"]

    assert change(FrameAveraging(), 0.5) > 1e-2
    assert change(FrameAveraging(), 0.4) < 1e-4 and change(ECSE(), 0.5) < 1e-4


def test_permutations_are_exact_off_degeneracies():
    for scope in ("atom", "structure"):
        f = model(FrameAveraging(), scope)
        chosen, limit = untied(scope)
        found = measure_permutation(f, from_ase(chosen), f.backbone.outputs, scale=SCALES[scope])
        assert within(found.relative, limit), str(found)


def test_periodic_structures_are_refused_in_structure_scope():
    with pytest.raises(InvalidInputError, match=r"FrameAveraging: structure scope .* structure 1 is periodic"):
        model(FrameAveraging()).frames(from_ase([ALL["CO2"], ALL["silicon"]]))


@pytest.mark.parametrize("width", [0.0, -1.0, float("inf"), True, "wide"])
def test_widths_that_are_none(width):
    for method in (FrameAveraging, StochasticFrameAveraging):
        with pytest.raises(DeclarationError, match="cutoff_width: expected a positive number or None"):
            method(cutoff_width=width)


def test_the_width_changes_axes_of_environments():
    batch = from_ase(GENERIC["rattled silicon"])
    a, b = (model(FrameAveraging(width), "atom").frames(batch).rotations for width in (None, 0.5))
    assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "method", [FrameAveraging(), FrameAveraging(1.5), StochasticFrameAveraging(), StochasticFrameAveraging(5, 0.7)]
)
def test_methods_are_made_again_from_their_description(method):
    again = type(method).rebuild(json.loads(json.dumps(method.describe())), None)
    named = make_method(type(method).__name__, **method.describe())
    batch = from_ase(GENERIC["rattled silicon"])
    frames = [model(m, "atom").frames(batch).rotations for m in (method, again, named, copy.deepcopy(method))]
    assert all(torch.equal(frames[0], other) for other in frames[1:])


# One frame, drawn.


def test_draws_are_frames_of_the_average_and_all_are_drawn_equally_often():
    points = torch.randn(300, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = from_points(points.reshape(-1, 3), torch.arange(300).repeat_interleave(5))
    for group, n in (("O(3)", 8), ("SO(3)", 4)):
        all_frames = model(FrameAveraging(), group=group).frames(batch).rotations.reshape(300, n, 3, 3)
        drawn = model(StochasticFrameAveraging(), group=group).frames(batch)
        assert drawn.n_evaluations == 300
        same = (all_frames == drawn.rotations[:, None]).all(dim=3).all(dim=2)
        assert bool((same.sum(dim=1) == 1).all())
        counts = same.sum(dim=0)
        # Five standard deviations of a fair draw.
        assert bool(((counts - 300 / n).abs() < 5 * (300 / n) ** 0.5).all())


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_draws_differ_between_generators_and_not_between_batches(scope):
    f = model(StochasticFrameAveraging(), scope)
    batch = from_ase([FINITE["ethanol"], FINITE["chiral center"], FINITE["random cluster"]])

    def drawn(seed):
        return f(batch, generator=torch.Generator().manual_seed(seed))["l1o"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.allclose(drawn(1), drawn(2))
    generator = torch.Generator().manual_seed(1)
    assert not torch.allclose(f(batch, generator=generator)["l1o"], f(batch, generator=generator)["l1o"])
    assert torch.equal(f(batch)["l1o"], f(batch)["l1o"])
    assert not torch.allclose(f(batch)["l1o"], model(StochasticFrameAveraging(seed=1), scope)(batch)["l1o"])
    seeded = partial(lambda b, g: f(b, generator=torch.Generator().manual_seed(g)), g=3)
    for call in (f, seeded):
        found = measure_batching(call, batch, f.backbone.outputs, scale=SCALES[scope])
        assert within(found.relative, tolerance(torch.float64))


def test_a_draw_is_not_equivariant_and_its_forces_are_the_gradient_only_at_a_fixed_draw(monkeypatch):
    outputs = {"energy": PER_STRUCTURE["energy"]}
    f = model(StochasticFrameAveraging(), outputs=outputs)
    batch = from_ase(FINITE["ethanol"])
    assert equivariance(f, [FINITE["ethanol"]]).relative > 1e-2
    free = measure_forces_fd(conservative(f), batch, n_directions=2, step=1e-4)["forces"]
    assert free.relative > 1.0

    def fixed(batch, scope, seed, n_draws):
        return torch.full((n_draws, batch[keys.PTR].shape[0] - 1), 0.3, dtype=torch.float64)

    monkeypatch.setattr(stochastic_frame_averaging, "uniform_numbers", fixed)
    found = measure_forces_fd(conservative(f), batch, n_directions=2, step=1e-4)["forces"]
    assert found.relative < max(1e-6, 20 * found.uncertainty) < 1e-3


@pytest.mark.parametrize("seed", [1.0, True, "a"])
def test_seeds_that_are_none(seed):
    with pytest.raises(DeclarationError, match="seed: expected an integer"):
        StochasticFrameAveraging(seed=seed)


# Against the published package.


class Points(torch.nn.Module):
    """A random function of (n_clouds, n_points, 3): scalars or vectors."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(3, 24, generator=generator, dtype=torch.float64)
        self.second = torch.randn(24, width, generator=generator, dtype=torch.float64)

    def forward(self, points):
        hidden = torch.sin(points @ self.first)
        return torch.tanh(hidden + hidden.mean(dim=1, keepdim=True)).mean(dim=1) @ self.second


class Peer(Backbone):
    def __init__(self, net, n_points, spec):
        super().__init__(outputs={"y": spec}, cutoff=None, receptive_field=None)
        self.net, self.n_points = net, n_points

    def forward(self, batch):
        points = batch[keys.POS].reshape(-1, self.n_points, 3)
        out = self.net(points - points.mean(dim=1, keepdim=True))
        return {"y": out.reshape(-1, *self.outputs["y"].shape)}


# The package indexes with a list where torch wants a tuple.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("invariant", [True, False])
def test_equal_to_frame_averaging_pytorch(group, invariant):
    pytest.importorskip("frame_averaging_pytorch", reason="needs: pip install frame-averaging-pytorch einops")
    from frame_averaging_pytorch import FrameAverage

    points = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = Points(1 if invariant else 3, seed=3)
    expected = []
    for cloud in points:
        peer = FrameAverage(net, dim=3, invariant_output=invariant)
        if group == "SO(3)":
            # It has no proper frames: those of its operations that make its eigenvectors right-handed.
            centered = cloud - cloud.mean(dim=0)
            handed = torch.linalg.det(torch.linalg.eigh(centered.T @ centered)[1])
            peer.operations = peer.operations[peer.operations.prod(dim=1) * handed > 0]
            peer.num_frames = 4
        expected.append(peer(cloud[None])[0])
    spec = OutputSpec("0e" if invariant else "1o", per="structure")
    batch = from_points(points.reshape(-1, 3), torch.arange(6).repeat_interleave(7))
    ours = Symmetrizer(Peer(net, 7, spec), FrameAveraging(), group=group)(batch)["y"]
    assert torch.allclose(ours.reshape(6, -1), torch.stack(expected), atol=1e-13, rtol=0)
    other = Symmetrizer(Peer(net, 7, spec), Identity(), group=group)(batch)["y"]
    assert not torch.allclose(other.reshape(6, -1), torch.stack(expected), atol=1e-2, rtol=0)


def test_second_moments_are_shares_and_zero_for_nothing():
    batch = validate(from_ase([ALL["isolated atom"], FINITE["ethanol"]]))
    moments = second_moments(clouds(batch, "structure", "test"))
    assert torch.equal(moments[0], torch.zeros(3, 3, dtype=torch.float64))
    assert abs(float(moments[1].trace()) - 1.0) < 1e-14
