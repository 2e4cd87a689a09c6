"""Statements about the harness that hold for all representations, group elements and sizes of error."""

import math

import hypothesis.strategies as st
import torch
from e3nn import o3
from faults import exact
from hypothesis import given, settings

from symmetrize import OutputSpec, from_ase, keys
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import (
    Element,
    Finding,
    Outcome,
    geometries,
    measure_equivariance,
    random_elements,
    symmetry_operations,
    within,
)
from symmetrize.testing.checks.common import by_irrep
from symmetrize.testing.measuring.elements import split, transform
from symmetrize.testing.running.serialize import plain, report_from_dict, report_to_dict

IRREPS = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 4), st.sampled_from("eo")), min_size=1, max_size=4).map(
    lambda parts: "+".join(f"{n}x{l}{p}" for n, l, p in parts)
)
SPECS = st.one_of(
    IRREPS.map(lambda irreps: OutputSpec(irreps)),
    st.sampled_from(["i", "ij", "ij=ji", "ij=-ji", "ijk", "ijk=jik"]).map(lambda f: OutputSpec(cartesian=f)),
)
SEEDS = st.integers(0, 10_000)
FINITE = {name: atoms for name, atoms in geometries(exclude=["periodic"]).items() if len(atoms) <= 12}
SUBJECT = exact()


def matrix(seed: int) -> torch.Tensor:
    g = random_rotations(1, torch.Generator().manual_seed(seed))[0]
    return -g if seed % 2 else g


def covariant(spec: OutputSpec):
    """A function of a batch that transforms as declared: spherical harmonics, or products, of vectors of the atoms."""
    harmonics = {l: o3.SphericalHarmonics(l, normalize=False).to(torch.float64) for l in range(5)}

    def f(batch):
        pos = batch[keys.POS]
        size = pos.square().sum(dim=1)
        if spec.cartesian is not None:
            out = pos
            for _ in range(spec.rank - 1):
                out = out[..., None] * pos.reshape(len(pos), *[1] * (out.dim() - 1), 3)
            return {"y": out * torch.sin(size).reshape(-1, *[1] * (spec.rank))}
        columns = []
        for n, ir in o3.Irreps(spec.irreps):
            # Polar harmonics have parity (-1)^l; a pseudoscalar of three vectors has the other one.
            a, b, c = pos, pos.roll(1, dims=0), pos.roll(2, dims=0)
            triple = torch.linalg.det(torch.stack([a, b, c], dim=1))[:, None]
            values = torch.sin(size)[:, None] * harmonics[ir.l](pos) * (1.0 if ir.p == (-1) ** ir.l else triple)
            columns += [values * (k + 1.0) for k in range(n)]
        return {"y": torch.cat(columns, dim=1).reshape(len(pos), *spec.shape)}

    return f


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, seed=SEEDS)
def test_what_transforms_as_declared_has_no_error_and_what_does_not_has_one(spec, seed):
    batch = from_ase(FINITE["random cluster"])
    elements = [Element("g", matrix(seed)), Element("h", matrix(seed + 1))]
    outputs = {"y": spec}
    f = covariant(spec)
    sound = measure_equivariance(f, batch, outputs, elements)
    assert within(sound.relative, 1e-9), str(sound)
    size = sound["y"].scale.value
    lab = torch.randn(spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size

    def wrong(batch):
        return {"y": f(batch)["y"] + lab}

    invariant = spec.project_invariant(lab[None], "O(3)")[0]
    found = measure_equivariance(wrong, batch, outputs, elements, scale={"y": size})
    expected = max(float((lab - spec.rotate(lab[None], e.matrix[None])[0]).abs().max()) for e in elements) / size
    assert math.isclose(found.relative, expected, rel_tol=1e-6, abs_tol=1e-9)
    if not torch.allclose(invariant, lab):
        assert found.relative > 1e-3


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, seed=SEEDS)
def test_irreducible_parts_add_up_and_commute_with_rotations(spec, seed):
    rows = torch.randn(5, *spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    f, outputs = by_irrep(lambda batch: {"y": rows}, {"y": spec})
    parts = {name: f(None)[name] for name in outputs if name != "y"}
    if not parts:
        return
    assert torch.allclose(sum(parts.values()), rows, atol=1e-12)
    g = matrix(seed).expand(5, 3, 3)
    turned, _ = by_irrep(lambda batch: {"y": spec.rotate(rows, g)}, {"y": spec})
    for name, part in parts.items():
        assert torch.allclose(outputs[name].rotate(part, g), turned(None)[name], atol=1e-11)
    products = [float((a * b).sum()) for n, a in parts.items() for m, b in parts.items() if n < m]
    assert all(abs(p) < 1e-9 for p in products)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(FINITE)), seed=SEEDS)
def test_the_exact_model_is_exact_on_any_geometry_under_any_element(name, seed):
    batch = SUBJECT.prepare(from_ase(FINITE[name]))
    outputs = SUBJECT.declared(batch)
    elements = random_elements(2, torch.Generator().manual_seed(seed))
    scale = dict.fromkeys([*outputs, "atomic_energy"], 1.0)
    measured = measure_equivariance(SUBJECT.model, batch, outputs, elements, scale=scale)
    assert within(measured.relative, 1e-11), str(measured)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(FINITE)), seed=SEEDS)
def test_symmetry_operations_turn_with_the_structure(name, seed):
    """The group of a turned structure is conjugate to the group: as many operations, and they map it on itself."""
    single = split(from_ase(FINITE[name]))[0]
    turned = transform(single, matrix(seed))
    before, after = symmetry_operations(single), symmetry_operations(turned)
    assert len(before) == len(after)
    center = turned[keys.POS].mean(dim=0)
    pos = turned[keys.POS] - center
    for operation in after:
        assert torch.allclose(pos @ operation.matrix.T, pos[operation.permutation], atol=1e-5)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(number=NUMBERS, limit=st.none() | st.floats(0.0, 1e300))
def test_a_finding_passes_only_with_a_finite_number_within_its_limit(number, limit):
    finding = Finding("x", number, limit)
    assert finding.ok == (limit is None or (math.isfinite(number) and number <= limit))
    assert Outcome((finding,)).ok == finding.ok
    assert not Outcome(()).ok


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(NUMBERS, max_size=5), seed=st.none() | SEEDS, text=st.text(max_size=20))
def test_reports_survive_json(numbers, seed, text):
    import json

    from symmetrize.testing import Report, Result, Verdict

    findings = tuple(Finding("y", x, 1.0, worst=text) for x in numbers)
    result = Result("c", text, "t", Verdict.FAILED, Outcome(findings, ({"kind": "other", "x": [1.0]},), text, seed))
    report = Report({"name": text}, (result,))
    again = report_from_dict(json.loads(json.dumps(report_to_dict(report), allow_nan=False)))
    assert plain(again) == plain(report) and again.ok == report.ok
