"""Representations: O(3) acts, agreement with e3nn and with contractions, projectors, derivatives, declarations."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st

from symmetrize.errors import DeclarationError
from symmetrize.ops.rotations import about_axis, octahedral_group, random_rotations
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import special_elements

PROPERTY = settings(deadline=None, derandomize=True, max_examples=25)
EPS = torch.finfo(torch.float64).eps
IRREPS = [f"{l}{p}" for l in range(7) for p in "eo"]
MIXED = ["2x0e + 3x1o + 1e + 2x2e", "0o + 2x3o + 4e + 0e", "2x6o + 5e"]
CARTESIAN = ["i", "ij", "ij=ji", "ij=-ji", "ijk", "ijk=jik", "ijkl", "ijkl=jikl=ijlk"]
SPECS = [OutputSpec(irreps) for irreps in IRREPS + MIXED] + [OutputSpec(cartesian=f) for f in CARTESIAN]
INVERSION = -torch.eye(3, dtype=torch.float64)[None]


def name_of(spec):
    return str(spec.irreps or spec.cartesian)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def elements(n, seed):
    """Haar-random elements of O(3), the first improper, the second proper."""
    out = random_rotations(n, generator(seed), improper=None)
    out[0] = -out[0] * torch.sign(torch.linalg.det(out[0]))
    out[1] = out[1] * torch.sign(torch.linalg.det(out[1]))
    return out


def values_of(spec, n, seed):
    return torch.randn(n, *spec.shape, dtype=torch.float64, generator=generator(seed))


def representation_matrices(spec, g):
    """rho(g) as matrices, column by column: Tensor of shape (n, dim, dim)."""
    dim = math.prod(spec.shape)
    basis = torch.eye(dim, dtype=g.dtype).reshape(dim, *spec.shape)
    columns = [spec.rotate(b.expand(len(g), *spec.shape), g).reshape(len(g), dim) for b in basis]
    return torch.stack(columns, dim=2)


# --- a representation of O(3) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_rotating_twice_is_rotating_by_the_product(spec):
    g, h = elements(24, 1), elements(24, 2)
    y = values_of(spec, 24, 3)
    twice, once = spec.rotate(spec.rotate(y, g), h), spec.rotate(y, h @ g)
    assert twice.shape == y.shape
    assert torch.allclose(twice, once, rtol=0, atol=2000 * EPS)
    invariant = spec.irreps is not None and all(ir.l == 0 and ir.p == 1 for _, ir in o3.Irreps(spec.irreps))
    assert invariant or float((once - y).abs().max()) > 0.1, "and rotates"
    if spec.l_max >= 1:
        wrong = spec.rotate(y, g @ h)
        assert float((once - wrong).abs().max()) > 0.1, "the order matters"


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_group_acts_by_orthogonal_maps_and_the_identity_does_nothing(spec):
    g, y = elements(12, 4), values_of(spec, 12, 5)
    norms = spec.rotate(y, g).reshape(12, -1).norm(dim=1)
    assert torch.allclose(norms, y.reshape(12, -1).norm(dim=1), rtol=500 * EPS)
    assert torch.allclose(spec.rotate(y, torch.eye(3, dtype=torch.float64).expand(12, 3, 3)), y, rtol=0, atol=200 * EPS)
    assert torch.allclose(spec.rotate(spec.rotate(y, g), g.transpose(1, 2)), y, rtol=0, atol=2000 * EPS)


@PROPERTY
@given(st.sampled_from(range(len(SPECS))), st.integers(0, 10**6))
def test_homomorphism_holds_on_special_elements_too(number, seed):
    """Identity, 180 degrees, near-identity, mirrors: where Euler angles lose digits."""
    spec = SPECS[number]
    special = torch.stack([element.matrix for element in special_elements()])
    g, h = special, special[torch.randperm(len(special), generator=generator(seed))]
    y = values_of(spec, len(g), seed)
    assert torch.allclose(spec.rotate(spec.rotate(y, g), h), spec.rotate(y, h @ g), rtol=0, atol=2000 * EPS)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_index_says_which_element_acts_on_each_row(spec):
    g, y = elements(5, 6), values_of(spec, 11, 7)
    index = torch.tensor([0, 4, 4, 2, 1, 3, 0, 0, 2, 4, 1])
    assert torch.allclose(spec.rotate(y, g, index), spec.rotate(y, g[index]), rtol=0, atol=500 * EPS)
    one_by_one = torch.cat([spec.rotate(y[n : n + 1], g[k][None]) for n, k in enumerate(index)])
    assert torch.allclose(spec.rotate(y, g, index), one_by_one, rtol=0, atol=500 * EPS)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_no_rows_rotate_to_no_rows(spec):
    assert spec.rotate(values_of(spec, 0, 0), elements(2, 0)[:0]).shape == (0, *spec.shape)


def test_single_precision_differs_by_its_rounding_only():
    for spec in SPECS:
        g, y = elements(8, 8), values_of(spec, 8, 9)
        low = spec.rotate(y.float(), g)
        assert low.dtype == torch.float32
        assert torch.allclose(low.double(), spec.rotate(y, g), rtol=0, atol=50 * torch.finfo(torch.float32).eps)


# --- parity, e3nn, contraction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", range(7))
def test_parity_is_the_sign_under_inversion(l):
    for p, sign in (("e", 1.0), ("o", -1.0)):
        spec = OutputSpec(f"2x{l}{p}")
        y = values_of(spec, 3, l)
        assert torch.allclose(spec.rotate(y, INVERSION.expand(3, 3, 3)), sign * y, rtol=0, atol=200 * EPS)


@pytest.mark.parametrize("formula", CARTESIAN)
def test_a_cartesian_tensor_has_the_parity_of_its_rank(formula):
    spec = OutputSpec(cartesian=formula)
    y = values_of(spec, 3, 1)
    assert torch.equal(spec.rotate(y, INVERSION.expand(3, 3, 3)), (-1.0) ** spec.rank * y)


@pytest.mark.parametrize("irreps", IRREPS + MIXED)
def test_agrees_with_e3nn_to_the_accuracy_of_e3nn(irreps):
    """Its Wigner matrices go through Euler angles and are off by about 1e-6; ours, by the test below, by 1e-14."""
    g, spec = elements(20, 11), OutputSpec(irreps)
    theirs = o3.Irreps(irreps).D_from_matrix(g)
    assert torch.allclose(representation_matrices(spec, g), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("l", range(1, 7))
def test_agrees_with_the_definition_on_spherical_harmonics(l):
    """Y_l(R x) = D_l(R) Y_l(x), with parity (-1)^l for improper elements."""
    g = elements(10, l)
    x = torch.randn(10, 3, dtype=torch.float64, generator=generator(l))
    spec = OutputSpec(f"{l}{'eo'[l % 2]}")
    rotated = o3.spherical_harmonics(l, (g @ x[:, :, None])[:, :, 0], normalize=True)
    assert torch.allclose(rotated, spec.rotate(o3.spherical_harmonics(l, x, normalize=True), g), rtol=0, atol=1e-12)
    other = OutputSpec(f"{l}{'oe'[l % 2]}")
    assert not torch.allclose(rotated, other.rotate(o3.spherical_harmonics(l, x, normalize=True), g), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "formula, equation",
    [("i", "ia,a->i"), ("ij", "ia,jb,ab->ij"), ("ijk", "ia,jb,kc,abc->ijk"), ("ijkl", "ia,jb,kc,ld,abcd->ijkl")],
)
def test_a_cartesian_tensor_is_contracted_index_by_index(formula, equation):
    spec = OutputSpec(cartesian=formula)
    g, y = elements(6, 12), values_of(spec, 6, 13)
    expected = torch.stack([torch.einsum(equation, *[m] * spec.rank, row) for m, row in zip(g, y, strict=True)])
    assert torch.allclose(spec.rotate(y, g), expected, rtol=0, atol=200 * EPS)


def test_a_vector_is_the_same_thing_in_both_notations():
    g, y = elements(6, 14), values_of(OutputSpec("1o"), 6, 15)
    assert torch.allclose(OutputSpec("1o").rotate(y, g), OutputSpec(cartesian="i").rotate(y, g), rtol=0, atol=20 * EPS)
    assert not torch.allclose(OutputSpec("1e").rotate(y, g), OutputSpec("1o").rotate(y, g), rtol=0, atol=0.1)


@pytest.mark.parametrize("formula", ["ij=ji", "ij=-ji"])
def test_rotation_keeps_the_index_symmetry(formula):
    spec, sign = OutputSpec(cartesian=formula), -1.0 if "-" in formula else 1.0
    y = values_of(spec, 5, 16)
    y = y + sign * y.transpose(1, 2)
    out = spec.rotate(y, elements(5, 17))
    assert torch.allclose(out, sign * out.transpose(1, 2), rtol=0, atol=100 * EPS)


# --- the invariant part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_invariant_part_is_a_projection_that_commutes_with_the_group(spec, group):
    g = elements(10, 18) if group == "O(3)" else random_rotations(10, generator(18))
    y = values_of(spec, 10, 19)
    p = spec.project_invariant(y, group)
    assert torch.allclose(spec.project_invariant(p, group), p, rtol=0, atol=100 * EPS)
    assert torch.allclose(spec.rotate(p, g), p, rtol=0, atol=500 * EPS), "no element changes it"
    assert torch.allclose(spec.project_invariant(spec.rotate(y, g), group), p, rtol=0, atol=1000 * EPS)


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_invariant_part_is_the_haar_average(spec, group):
    """Product quadrature in Euler angles, exact to degree 8: z-rotations uniform, cos(beta) by Gauss."""
    import numpy as np

    degree = 8
    angles = torch.arange(degree + 1, dtype=torch.float64) * (2 * math.pi / (degree + 1))
    node, weight = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(degree // 2 + 1))
    z, x = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    about_z = about_axis(z.expand(len(angles), 3), angles)
    about_x = about_axis(x.expand(len(node), 3), torch.arccos(node))
    rotations = torch.einsum("aij,bjk,ckl->abcil", about_z, about_x, about_z).reshape(-1, 3, 3)
    weights = (weight[None, :, None] / 2).expand(len(angles), -1, len(angles)).reshape(-1) / len(angles) ** 2
    if group == "O(3)":
        rotations, weights = torch.cat([rotations, -rotations]), torch.cat([weights, weights]) / 2
    y = values_of(spec, 1, 20)
    average = torch.einsum("n,n...->...", weights, spec.rotate(y.expand(len(rotations), *spec.shape), rotations))
    assert torch.allclose(average, spec.project_invariant(y, group)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("improper", [False, True])
def test_the_octahedral_group_averages_to_the_invariant_part_below_degree_four(improper):
    group = octahedral_group(improper=improper)
    for spec in (OutputSpec("0e + 0o + 1e + 1o + 2e + 3o"), OutputSpec(cartesian="ijk"), OutputSpec(cartesian="ij")):
        y = values_of(spec, 1, 21)
        average = spec.rotate(y.expand(len(group), *spec.shape), group).mean(dim=0)
        expected = spec.project_invariant(y, "O(3)" if improper else "SO(3)")[0]
        assert torch.allclose(average, expected, rtol=0, atol=1e-13)
    spec = OutputSpec("4e")  # the twin: degree 4 has a cubic invariant
    average = spec.rotate(values_of(spec, 1, 21).expand(24, 9), octahedral_group()).mean(dim=0)
    assert float((average - spec.project_invariant(average[None], "SO(3)")[0]).abs().max()) > 1e-2


def test_what_is_invariant_under_rotations_alone():
    """Pseudoscalars and the Levi-Civita tensor: kept by SO(3), removed by O(3); the unit matrix by neither."""
    epsilon = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        epsilon[i, j, k], epsilon[i, k, j] = 1.0, -1.0
    for spec, tensor in (
        (OutputSpec(cartesian="ijk"), epsilon),
        (OutputSpec("0o"), torch.ones((), dtype=torch.float64)),
    ):
        assert torch.allclose(spec.project_invariant(tensor[None], "SO(3)")[0], tensor, atol=1e-14)
        assert torch.allclose(spec.project_invariant(tensor[None], "O(3)")[0], 0 * tensor, atol=1e-14)
    delta = torch.eye(3, dtype=torch.float64)[None]
    for group in ("O(3)", "SO(3)"):
        assert torch.allclose(OutputSpec(cartesian="ij").project_invariant(delta, group), delta, atol=1e-14)


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_derivatives_with_respect_to_the_element_are_finite_everywhere(spec):
    """Identity, 180 degrees, axis-aligned: an Euler-angle route gives NaN here."""
    g = torch.stack([element.matrix for element in special_elements()]).requires_grad_()
    y = values_of(spec, len(g), 22).requires_grad_()
    scalar = torch.sin(spec.rotate(y, g)).sum()
    first = torch.autograd.grad(scalar, (g, y), create_graph=True, allow_unused=True)
    assert bool(torch.isfinite(first[1]).all())
    if first[0] is None:
        assert spec.l_max == 0, "only scalars do not depend on the element"
        return
    assert bool(torch.isfinite(first[0]).all()) and (spec.l_max == 0 or float(first[0].detach().abs().max()) > 1e-2)
    if first[0].requires_grad:
        second = torch.autograd.grad(first[0].square().sum(), (g, y), allow_unused=True)
        assert all(bool(torch.isfinite(x).all()) for x in second if x is not None)


@pytest.mark.parametrize("spec", [OutputSpec("2e + 1o + 0o"), OutputSpec(cartesian="ij")], ids=name_of)
def test_derivatives_are_those_of_finite_differences_along_the_group(spec):
    g, y = elements(2, 23), values_of(spec, 2, 24)

    def along(angle):
        return spec.rotate(y, about_axis(torch.tensor([0.3, -0.5, 0.8]), angle) @ g)

    angle = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (angle,)) and torch.autograd.gradgradcheck(along, (angle,))


# --- reductions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [OutputSpec("0e", reduce="sum"), OutputSpec(cartesian="ij", reduce="mean")], ids=str)
def test_reduction_is_over_the_atoms_of_each_structure(spec):
    y, structure = values_of(spec, 6, 25), torch.tensor([0, 0, 0, 2, 2, 3])
    out = spec.reduce_atoms(y, structure, 5)
    for s in range(5):
        rows = y[structure == s]
        expected = rows.sum(dim=0) if spec.reduce == "sum" or not len(rows) else rows.mean(dim=0)
        assert torch.allclose(out[s], expected, rtol=0, atol=1e-15)


# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"irreps": "1o", "cartesian": "i"},
        {"irreps": "1"},
        {"irreps": "1x"},
        {"irreps": "vector"},
        {"irreps": ""},
        {"irreps": "0x1o"},
        {"irreps": 7},
        {"irreps": [1]},
        {"cartesian": ""},
        {"cartesian": "ii"},
        {"cartesian": "ij=jk"},
        {"cartesian": "i=j"},
        {"cartesian": "IJ"},
        {"cartesian": 3},
        {"irreps": "1o", "per": "molecule"},
        {"irreps": "1o", "reduce": "max"},
        {"irreps": "1o", "per": "structure", "reduce": "sum"},
    ],
    ids=str,
)
def test_wrong_declarations_are_refused(options):
    with pytest.raises(DeclarationError, match="OutputSpec"):
        OutputSpec(**options)


def test_shapes_follow_from_the_declaration():
    shapes = {"0e": (), "0o": (), "2x0e": (2,), "1o": (3,), "0e + 2e": (6,), "2x1e": (6,)}
    for irreps, shape in shapes.items():
        assert OutputSpec(irreps).shape == shape
        assert OutputSpec(o3.Irreps(irreps)) == OutputSpec(irreps), "objects and strings alike"
    for formula in CARTESIAN:
        assert OutputSpec(cartesian=formula).shape == (3,) * len(formula.split("=")[0])
    assert OutputSpec("0e").is_invariant_scalar and not OutputSpec("0o").is_invariant_scalar
    assert not OutputSpec("2x0e").is_invariant_scalar and OutputSpec("0e + 3o").l_max == 3


def test_a_declaration_is_a_value():
    a = OutputSpec("0e", reduce="sum", unit="eV")
    assert a == OutputSpec("1x0e", reduce="sum", unit="eV") and hash(a) == hash(
        OutputSpec("0e", reduce="sum", unit="eV")
    )
    with pytest.raises(AttributeError):
        a.unit = "meV"
    assert "eV" in str(a) and "sum" in str(a)
