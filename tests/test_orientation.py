"""Sizes of broken equivariance: planted dependences on orientation are found with the size and degree they have."""

from __future__ import annotations

import math

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase
from symmetrize import testing as st
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.ops.quadrature import orientation_cover, rotation_quadrature
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import about_axis, random_rotations
from symmetrize.ops.wigner import handedness, wigner
from symmetrize.testing.measuring import orientation as so

BATCH = from_ase([st.GEOMETRIES[name]() for name in ("ethanol", "random cluster", "chiral center")], cutoff=4.0)
CRYSTAL = from_ase([st.GEOMETRIES[name]() for name in ("ethanol", "triclinic crystal")], cutoff=4.0)
N = len(BATCH.ptr) - 1
TOL = st.tolerance(torch.float64)
TENSORS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "dipole": OutputSpec("1o"),
    "symmetric": OutputSpec(cartesian="ij"),
    "l3": OutputSpec("3e"),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def polar(batch):
    """A vector of each structure."""
    weight = 1.0 + 0.1 * batch.z.to(batch.pos.dtype)
    n = len(batch.ptr) - 1
    center = segment_sum(batch.pos, batch.batch, n) / batch.ptr.diff()[:, None]
    return segment_sum(weight[:, None] * (batch.pos - center[batch.batch]), batch.batch, n)


def axial(batch):
    """A pseudovector of each structure."""
    n = len(batch.ptr) - 1
    center = segment_sum(batch.pos, batch.batch, n) / batch.ptr.diff()[:, None]
    arm = batch.pos - center[batch.batch]
    longer = segment_sum(arm.norm(dim=1)[:, None] * arm, batch.batch, n)
    return torch.linalg.cross(polar(batch), longer)


def scalar(function, irreps="0e"):
    """A model of one number per structure, and its declaration."""
    return (lambda batch: {"y": function(batch)}), {"y": OutputSpec(irreps, per="structure")}


# --- quadrature and cover -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [*range(10), 12, 17])
def test_quadrature_is_exact_up_to_its_degree(degree):
    rotations, weights = rotation_quadrature(degree)
    assert rotations.dtype == weights.dtype == torch.float64
    assert float(weights.min()) > 0.0 and float(weights.sum()) == pytest.approx(1.0, abs=1e-14)
    assert torch.allclose(rotations @ rotations.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand_as(rotations))
    assert bool((handedness(rotations) == 1.0).all())
    highest = min(degree + 1, 11)
    integral = [float(torch.einsum("k,kab->ab", weights, wigner(l, rotations)).abs().max()) for l in range(highest + 1)]
    assert all(value < 1e-13 for value in integral[1 : degree + 1])
    # The twin: no rule is exact for everything.
    assert degree >= 11 or integral[degree + 1] > 1e-2


def test_quadrature_takes_few_rotations():
    assert len(rotation_quadrature(0)[0]) == 1
    for degree in (9, 17, 35):
        assert len(rotation_quadrature(degree)[0]) < 0.4 * (degree + 1) ** 3
    for wrong in (-1, 2.0, True):
        with pytest.raises(InvalidInputError, match="degree"):
            rotation_quadrature(wrong)


def test_quadrature_without_lebedev_and_beyond_it(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("symmetrize.ops.quadrature._LEBEDEV", ())
        rotations, weights = rotation_quadrature(9)
    assert len(rotations) == 5 * 10 * 10
    for l in range(1, 10):
        assert float(torch.einsum("k,kab->ab", weights, wigner(l, rotations)).abs().max()) < 1e-13


def holes(rotations, probes):
    """Largest angle (degrees) from any probe to the nearest rotation."""
    trace = probes.flatten(1) @ rotations.flatten(1).T
    return float(torch.rad2deg(torch.arccos(((trace.amax(dim=1) - 1) / 2).clamp(-1, 1))).max())


@pytest.mark.parametrize("n", [100, 500, 1000])
def test_cover_has_smaller_holes_than_random_rotations(n):
    cover = orientation_cover(n)
    assert cover.shape == (n, 3, 3) and torch.equal(cover, orientation_cover(n))
    assert torch.allclose(cover @ cover.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand_as(cover))
    probes = random_rotations(20_000, rng(1))
    largest = holes(cover, probes)
    for seed in range(5):
        assert largest < 0.9 * holes(random_rotations(n, rng(seed + 2)), probes)
    angle = math.radians(largest)
    assert (angle - math.sin(angle)) / math.pi < 4 / n


# --- variance and its spectrum ------------------------------------------------------------------------------------


def test_exact_model_has_no_variance():
    f = Symmetrizer(ToyLocal(TENSORS, cutoff=4.0, seed=1), ECSE(), scope="atom").eval()
    for group, columns in (("O(3)", 2), ("SO(3)", 1)):
        found = so.measure_orientation_variance(f, BATCH, TENSORS, group=group, degree=4, l_max=2)
        assert set(found) == {*TENSORS, "atomic_energy"}
        for s in found.values():
            assert s.power.shape == (N, 3, columns) and s.n_elements == 70 * columns
            assert st.within(s.relative, TOL), str(s)
            rest = s.power.clone()
            rest[:, 0, 0] = 0.0
            assert st.within((rest + s.remainder[:, None, None]).sqrt() / s.scale.value, TOL)
            assert float(s.power[:, 0, 0].min()) > 0.0
    bare = ToyLocal(TENSORS, cutoff=4.0, seed=1).eval()
    for s in so.measure_orientation_variance(bare, BATCH, TENSORS, degree=4, l_max=2).values():
        assert s.relative > 0.1


def test_a_large_constant_costs_no_digits():
    f, outputs = scalar(lambda b: 1e6 + 1e-4 * polar(b)[:, 2])
    found = so.measure_orientation_variance(f, BATCH, outputs, scale={"y": 1.0})["y"]
    torch.testing.assert_close(found.variance, 1e-8 * polar(BATCH).square().sum(dim=1) / 3, rtol=1e-4, atol=0.0)


def quadrupole(v):
    return v[:, 2] ** 2 - v.square().sum(dim=1) / 3


AXIAL, POLAR = axial(BATCH).norm(dim=1), polar(BATCH).norm(dim=1)
# Function, declaration, degree, column (even, odd), variance.
PLANTED = {
    "vector component": (lambda b: polar(b)[:, 2], "0e", 1, 1, POLAR**2 / 3),
    "pseudovector component": (lambda b: axial(b)[:, 0], "0e", 1, 0, AXIAL**2 / 3),
    "tensor component": (lambda b: quadrupole(polar(b)), "0e", 2, 0, POLAR**4 * 4 / 45),
    # The product of perpendicular vectors: no trace, so nothing of degree 0.
    "odd tensor component": (lambda b: polar(b)[:, 0] * axial(b)[:, 0], "0e", 2, 1, (POLAR * AXIAL) ** 2 / 15),
    "vector component as a pseudoscalar": (lambda b: polar(b)[:, 2], "0o", 1, 0, POLAR**2 / 3),
    "pseudoscalar as a scalar": (lambda b: polar(b).square().sum(dim=1) * chirality(b), "0e", 0, 1, POLAR**4),
}


def chirality(batch):
    """+1 for the structures as they are, -1 for their mirror images."""
    now, given = (b.pos[b.ptr[:-1, None] + torch.arange(1, 4)] - b.pos[b.ptr[:-1, None]] for b in (batch, BATCH))
    sign = torch.sign(torch.linalg.det(given))
    return torch.sign(torch.linalg.det(now)) * sign.repeat(len(now) // len(given))


@pytest.mark.parametrize(
    ("name", "degree", "l_max"), [*((name, 9, 4) for name in PLANTED), ("odd tensor component", 17, 8)]
)
def test_a_planted_irrep_is_found_where_it_is(name, degree, l_max):
    function, irreps, l, column, variance = PLANTED[name]
    f, outputs = scalar(function, irreps)
    found = so.measure_orientation_variance(f, BATCH, outputs, degree=degree, l_max=l_max)["y"]
    power = found.power.clone()
    torch.testing.assert_close(found.variance, variance, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(power[:, l, column], variance, rtol=1e-10, atol=0.0)
    power[:, l, column] = 0.0
    assert float((power.sum(dim=(1, 2)) / variance).max()) < 1e-20
    assert float((found.remainder / variance).max()) < 1e-12
    assert found.relative == pytest.approx(math.sqrt(float(variance.mean())) / found.scale.value)


def test_without_improper_elements_there_is_no_parity():
    f, outputs = scalar(PLANTED["pseudoscalar as a scalar"][0])
    assert float(so.measure_orientation_variance(f, BATCH, outputs, group="SO(3)")["y"].variance.max()) < 1e-20
    f, outputs = scalar(PLANTED["vector component"][0])
    found = so.measure_orientation_variance(f, BATCH, outputs, group="SO(3)")["y"]
    torch.testing.assert_close(found.power[:, 1, 0], POLAR**2 / 3)


def test_parts_add_up_and_what_is_above_l_max_remains():
    backbone = ToyGlobal({"y": OutputSpec("1o + 2e", per="structure")}, seed=3).eval()
    low, high = (
        so.measure_orientation_variance(backbone, BATCH, backbone.outputs, degree=9, l_max=l_max)["y"]
        for l_max in (1, 4)
    )
    # E|F|^2 = E|f|^2, since rho is orthogonal, by the same rule.
    rotations, weights = rotation_quadrature(9)
    copies = st.batched([st.transform(BATCH, sign * g) for sign in (1.0, -1.0) for g in rotations])
    squares = backbone(copies)["y"].detach().square().mean(dim=1).reshape(-1, N)
    total = (weights.repeat(2)[:, None] * squares).sum(dim=0) / 2
    for s in (low, high):
        torch.testing.assert_close(s.power.sum(dim=(1, 2)) + s.remainder, total)
    torch.testing.assert_close(high.power[:, :2], low.power)
    torch.testing.assert_close(low.variance, high.variance)
    assert bool((low.remainder > 1.2 * high.remainder).all()) and float(high.remainder.min()) > 0.0


def test_the_mean_is_the_symmetrized_output():
    def f(batch):
        p = polar(batch)
        return {"y": p * (2.0 + p[:, :1] / POLAR.max())}

    outputs = {"y": OutputSpec("1o", per="structure")}
    found = so.measure_orientation_variance(f, BATCH, outputs)["y"]
    torch.testing.assert_close(found.mean, 2.0 * polar(BATCH))
    assert not torch.allclose(f(BATCH)["y"], found.mean)


def test_non_finite_outputs_are_infinite_errors():
    def f(batch):
        y = polar(batch)[:, 2].clone()
        y[1::N] = math.nan
        return {"y": y}

    _, outputs = scalar(None)
    found = so.measure_orientation_variance(f, BATCH, outputs, degree=3, l_max=1, scale={"y": 1.0})["y"]
    assert torch.isinf(found.variance).tolist() == [False, True, False] and found.relative == math.inf
    assert bool(torch.isinf(found.power[1]).all()) and bool(torch.isfinite(found.power[[0, 2]]).all())
    options = {"scale": {"y": 1.0}}
    assert math.inf in so.measure_angle_dependence(f, BATCH, outputs, **options)["y"].max.tolist()
    assert so.measure_lie_derivative(f, BATCH, outputs, **options)["y"].deviation.relative == math.inf
    assert so.measure_cover(f, BATCH, outputs, n=5, **options).relative == math.inf
    assert so.measure_loss_share(f, BATCH, outputs, {"y": torch.zeros(N)})["y"].share == math.inf
    forces = so.measure_torque(lambda b: {"forces": b.pos * math.nan}, BATCH, scale=1.0)
    assert bool(torch.isinf(forces.relative_force).all()) and bool(torch.isinf(forces.relative_torque).all())


def test_wrong_arguments():
    f, outputs = scalar(lambda b: polar(b)[:, 2])
    with pytest.raises(InvalidInputError, match="l_max"):
        so.measure_orientation_variance(f, BATCH, outputs, degree=7, l_max=4)
    with pytest.raises(DeclarationError, match="group"):
        so.measure_cover(f, BATCH, outputs, group="O(2)")
    with pytest.raises(InvalidInputError, match="n_elements"):
        so.measure_loss_share(f, BATCH, outputs, {"y": torch.zeros(N)}, n_elements=1)
    with pytest.raises(DeclarationError, match="references"):
        so.measure_loss_share(f, BATCH, outputs, {"z": torch.zeros(N)})
    with pytest.raises(InvalidInputError, match="references"):
        so.measure_loss_share(f, BATCH, outputs, {"y": torch.zeros(N, 3)})
    with pytest.raises(InvalidInputError, match="center_mask"):
        mask = torch.arange(len(BATCH.pos)) > 0
        so.measure_torque(lambda b: {"forces": b.pos[b.center_mask]}, replace(BATCH, center_mask=mask))


def test_no_call_is_large_and_every_field_turns():
    velocity = torch.randn(CRYSTAL.pos.shape, dtype=torch.float64, generator=rng(4))
    batch = replace(CRYSTAL, velocity=velocity)
    outputs = {"momentum": OutputSpec("1o", per="structure"), "dipole": OutputSpec("1o")}
    backbone = Symmetrizer(ToyLocal({"dipole": OutputSpec("1o")}, cutoff=4.0), ECSE(), scope="atom").eval()
    sizes = []

    def f(b):
        sizes.append(len(b.ptr) - 1)
        total = segment_sum(b.z[:, None] * b.velocity, b.batch, len(b.ptr) - 1)
        return {"momentum": total, **backbone(b)}

    found = so.measure_orientation_variance(f, batch, outputs, vectors={"velocity": "1o"}, degree=5, l_max=2)
    assert max(sizes) <= 256 and max(sizes) > 50
    assert all(st.within(s.relative, TOL) for s in found.values())
    forgotten = so.measure_orientation_variance(f, batch, outputs, degree=5, l_max=2)
    assert forgotten["momentum"].relative > 0.1 and st.within(forgotten["dipole"].relative, TOL)


# --- angles and derivatives ---------------------------------------------------------------------------------------


def test_angle_dependence():
    f, outputs = scalar(lambda b: polar(b)[:, 2])
    found = so.measure_angle_dependence(f, BATCH, outputs, generator=rng(5))["y"]
    axes = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64, generator=rng(5)), dim=1)
    assert found.angles[0] == 0.0 and found.angles[-1] == math.pi and len(found.angles) == 13
    p = polar(BATCH)
    turned = torch.stack([torch.stack([p @ about_axis(a, t).T for t in found.angles]) for a in axes])[..., 2] - p[:, 2]
    torch.testing.assert_close(found.rms * found.scale.value, turned.square().mean(dim=(0, 2)).sqrt())
    torch.testing.assert_close(found.max * found.scale.value, turned.abs().amax(dim=(0, 2)))
    assert float(found.rms[0]) < 1e-14 < float(found.rms[1])
    exact = so.measure_angle_dependence(lambda b: {"y": polar(b)}, BATCH, {"y": OutputSpec("1o", per="structure")})["y"]
    assert st.within(exact.max, TOL)


def test_lie_derivative():
    f, outputs = scalar(lambda b: polar(b)[:, 2] + quadrupole(polar(b)))
    found = so.measure_lie_derivative(f, BATCH, outputs, generator=rng(6))["y"]
    turned = polar(BATCH) @ random_rotations(4, rng(6), improper=None).transpose(1, 2)
    for case, k in ((0, 0), (5, 1), (10, 3)):
        x, y, z = turned[k].T
        # d(x, y, z)/dt = axis x r
        expected = {0: (1 + 2 * z) * y, 1: -(1 + 2 * z) * x, 2: 0 * z}[case % 3]
        torch.testing.assert_close(found.deviation.max[case], expected.abs(), rtol=1e-8, atol=1e-9)
    assert found.deviation.cases[5] == "about z, orientation 1" and found.deviation.max.shape == (12, N)
    assert 0.0 < found.uncertainty < 1e-7 and found.deviation.relative > 0.1


def test_lie_derivative_of_an_exact_model_is_zero():
    f = Symmetrizer(ToyLocal(TENSORS, cutoff=4.0, seed=1), ECSE(), scope="atom").eval()
    for s in so.measure_lie_derivative(f, BATCH, TENSORS, n_orientations=1).values():
        assert s.deviation.relative < 1e-8 and s.uncertainty < 1e-8
    bare = ToyLocal(TENSORS, cutoff=4.0, seed=1).eval()
    for s in so.measure_lie_derivative(bare, BATCH, TENSORS, n_orientations=2).values():
        assert s.deviation.relative > 0.1 > s.uncertainty


# --- torque -------------------------------------------------------------------------------------------------------


def pair_forces(batch):
    """Springs between all atoms of finite structures."""
    out = torch.zeros_like(batch.pos)
    for first, last in zip(batch.ptr[:-1], batch.ptr[1:], strict=True):
        r = batch.pos[first:last] - batch.pos[first:last, None]
        out[first:last] = (r * (r.norm(dim=2, keepdim=True) - 1.5)).sum(dim=1)
    return out


def test_torque():
    exact = so.measure_torque(lambda b: {"forces": pair_forces(b)}, BATCH)
    assert exact.finite.tolist() == [0, 1, 2]
    assert st.within(exact.relative_torque, TOL) and st.within(exact.relative_force, TOL)

    def lab(batch):
        # The gradient of a potential that knows the lab frame: c x^2 / 2 summed over atoms, and a uniform field.
        field = torch.tensor([0.0, 0.0, 0.2], dtype=torch.float64)
        return pair_forces(batch) - 0.3 * batch.pos * torch.tensor([1.0, 0.0, 0.0]) + field

    found = so.measure_torque(lambda b: {"f": lab(b)}, BATCH, forces="f")
    for s, (first, last) in enumerate(zip(BATCH.ptr[:-1], BATCH.ptr[1:], strict=True)):
        r = BATCH.pos[first:last]
        arm = r - r.mean(dim=0)
        # x-component of r times a force along x, about the mean: the mixed second moments.
        moment = -0.3 * torch.stack([0 * arm[:, 0], arm[:, 2] * r[:, 0], -arm[:, 1] * r[:, 0]]).sum(dim=1)
        torch.testing.assert_close(found.torque[s], moment, atol=1e-10, rtol=1e-8)
        force = torch.tensor([-0.3 * float(r[:, 0].sum()), 0.0, 0.2 * len(r)], dtype=torch.float64)
        torch.testing.assert_close(found.force[s], force, atol=1e-10, rtol=1e-8)
        n, size = len(r), math.sqrt(3) * found.scale.value
        assert float(found.relative_force[s]) == pytest.approx(float(force.norm()) / size / math.sqrt(n))
        radius = float(arm.square().sum(dim=1).mean().sqrt())
        assert float(found.relative_torque[s]) == pytest.approx(float(moment.norm()) / size / radius / math.sqrt(n))


def test_torque_of_random_forces_is_about_one_and_crystals_have_none():
    forces = torch.randn(CRYSTAL.pos.shape, dtype=torch.float64, generator=rng(7))
    found = so.measure_torque(lambda b: {"forces": forces}, CRYSTAL, scale=1.0)
    assert found.finite.tolist() == [0] and found.torque.shape == (1, 3) and found.force.shape == (2, 3)
    assert 0.1 < float(found.relative_torque[0]) < 3.0 and bool(torch.isfinite(found.relative_force).all())


# --- share of the loss --------------------------------------------------------------------------------------------


def lab_noise(noise, bias):
    """Truth plus noise of a standard deviation that depends on the orientation like a component of a vector, and an
    error that the symmetrized model has too."""

    def function(batch):
        p = polar(batch)
        return p.square().sum(dim=1) + bias + noise * math.sqrt(3) * p[:, 0] / p.norm(dim=1)

    return scalar(function)[0]


TRUTH, ENERGY = {"y": POLAR**2}, {"y": OutputSpec("0e", per="structure")}


def test_share_of_the_loss():
    f = lab_noise(0.4, 0.3)
    found = so.measure_loss_share(f, BATCH, ENERGY, TRUTH, n_elements=4000)["y"]
    assert found.rmse == pytest.approx(0.5, rel=0.05) and found.rmse_symmetrized == pytest.approx(0.3, rel=0.05)
    assert found.deviation == pytest.approx(0.4, rel=0.05) and found.share == pytest.approx(0.64, rel=0.05)
    assert found.rmse**2 == pytest.approx(found.rmse_symmetrized**2 + found.deviation**2)
    assert 0.0 < found.standard_error < 0.1
    exact = so.measure_loss_share(lab_noise(0.0, 0.3), BATCH, ENERGY, TRUTH)["y"]
    assert exact.share < 1e-20 and exact.rmse == pytest.approx(0.3) == exact.rmse_symmetrized
    single = st.split(BATCH)[0]
    alone = so.measure_loss_share(f, single, ENERGY, {"y": TRUTH["y"][:1]})["y"]
    assert alone.standard_error is None and alone.share > 0.1
    perfect = so.measure_loss_share(lab_noise(0.0, 0.0), BATCH, ENERGY, TRUTH)["y"]
    assert perfect.share >= 0.0 and perfect.rmse < 1e-12


def test_share_does_not_depend_on_the_number_of_orientations():
    f = lab_noise(0.4, 0.3)
    for n, repeats in ((2, 400), (32, 25)):
        found = [
            so.measure_loss_share(f, BATCH, ENERGY, TRUTH, n_elements=n, generator=rng(seed))["y"]
            for seed in range(repeats)
        ]
        variance = torch.tensor([s.deviation**2 for s in found])
        mse = torch.tensor([s.rmse**2 for s in found])
        for estimate, expected in ((variance, 0.16), (mse, 0.25)):
            standard_error = float(estimate.std()) / math.sqrt(repeats)
            assert standard_error < 0.06 * expected
            assert abs(float(estimate.mean()) - expected) < 4.0 * standard_error
        # The twin: with n in the denominator a share of 1 / n would be lost, half of it for two.
        if n == 2:
            assert abs(float(variance.mean()) / 2 - 0.16) > 4.0 * float(variance.std()) / math.sqrt(repeats)


def test_share_of_vectors_turns_back():
    f, outputs = (lambda b: {"y": polar(b)}), {"y": OutputSpec("1o", per="structure")}
    found = so.measure_loss_share(f, BATCH, outputs, {"y": polar(BATCH) + 1.0})["y"]
    assert found.share < 1e-20 and found.rmse == pytest.approx(1.0)
    scalars = {"y": OutputSpec("3x0e", per="structure")}
    assert so.measure_loss_share(f, BATCH, scalars, {"y": polar(BATCH)})["y"].share > 0.2


# --- cover --------------------------------------------------------------------------------------------------------


def ball(measure):
    """Radius of the ball of rotations of a Haar measure: (w - sin w) / pi."""
    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle - math.sin(middle)) / math.pi < measure else (low, middle)
    return low


def patch(places):
    """Wrong within a ball of measure 1/200 around each of the given rotations, one output for each."""
    given = BATCH.pos[BATCH.ptr[0] + torch.arange(3)] - BATCH.pos[3]
    limit = 1.0 + 2.0 * math.cos(ball(1 / 200))

    def f(batch):
        now = batch.pos[batch.ptr[:-1, None] + torch.arange(3)] - batch.pos[batch.ptr[:-1] + 3][:, None]
        g = torch.linalg.solve(given, now).transpose(1, 2)
        near = torch.einsum("nij,pij->pn", g, places) > limit
        return {f"y{p}": row.to(torch.float64) for p, row in enumerate(near)}

    return f, {f"y{p}": OutputSpec("0e", per="structure") for p in range(len(places))}


def test_cover_finds_every_patch():
    single = st.split(BATCH)[0]
    places = random_rotations(60, rng(8), improper=None)
    f, outputs = patch(places)
    scale = dict.fromkeys(outputs, 1.0)
    found = so.measure_cover(f, single, outputs, scale=scale)
    assert all(d.relative == 1.0 for d in found.outputs.values())
    assert len(found["y0"].cases) == 2000
    case, structure = found["y0"].worst
    number = int(case.split()[1])
    assert case == f"cover {number} of 1000" + ("" if torch.linalg.det(places[0]) > 0 else ", inverted")
    element = orientation_cover(1000)[number - 1] * torch.linalg.det(places[0])
    assert float((element * places[0]).sum()) > 1.0 + 2.0 * math.cos(ball(1 / 200)) and structure == 0
    # The twin: a few random elements miss most of them.
    few = st.random_elements(5, rng(9))
    missed = st.measure_equivariance(f, single, outputs, few, scale=scale)
    assert sum(d.relative > 0.0 for d in missed.outputs.values()) < 12


def test_cover_agrees_with_the_measurement_of_equivariance():
    backbone = ToyLocal(TENSORS, cutoff=4.0, seed=1).eval()
    found = so.measure_cover(backbone, CRYSTAL, TENSORS, n=7)
    elements = [st.Element(str(k), s * g) for s in (1, -1) for k, g in enumerate(orientation_cover(7))]
    expected = st.measure_equivariance(backbone, CRYSTAL, TENSORS, elements)
    for name, d in found.outputs.items():
        torch.testing.assert_close(d.max, expected[name].max)
        torch.testing.assert_close(d.rms, expected[name].rms)
        assert d.scale == expected[name].scale and d.relative > 0.1
    assert found["dipole"].cases[8] == "cover 2 of 7, inverted"
    assert so.measure_cover(backbone, CRYSTAL, TENSORS, n=7, group="SO(3)")["dipole"].max.shape == (7, 2)
    exact = so.measure_cover(Symmetrizer(backbone, ECSE(), scope="atom").eval(), CRYSTAL, TENSORS, n=20)
    assert st.within(exact.relative, TOL), str(exact)
