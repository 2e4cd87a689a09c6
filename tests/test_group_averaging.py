"""Group averaging: rules integrate Wigner functions up to their degree and no further, cosets are unbiased, peers."""

# Without postponed annotations: metatomic compares those of ``forward`` with types.

import math
from typing import Dict, List, Optional  # noqa: UP035

import numpy as np
import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import Backbone, GroupAveraging, OutputSpec, Symmetrizer, from_ase, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.methods.group_averaging import RULES
from symmetrize.ops.finite_groups import DEGREES, rotation_group
from symmetrize.ops.quadrature import fewest_rotations, haar_rotations, rotation_quadrature
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import random_rotations
from symmetrize.ops.wigner import wigner
from symmetrize.storage import load, save
from symmetrize.testing import Verdict, of_symmetrizer, run

CASES = [*((d, "lebedev") for d in range(8)), *((d, "gauss") for d in range(8)), *((None, name) for name in DEGREES)]


OUTPUTS = {"energy": OutputSpec("0e", per="structure"), "dipole": OutputSpec("1o", per="structure")}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def integrals(rotations, weights, highest):
    """Largest entry of the integral of every D^l from 0 to ``highest``."""
    return [float(torch.einsum("k,kab->ab", weights, wigner(l, rotations)).abs().max()) for l in range(highest + 1)]


def exact(found, degree):
    return abs(found[0] - 1.0) < 1e-13 and all(value < 1e-13 for value in found[1 : degree + 1])


def molecules(n=3, seed=0):
    found = []
    for k in range(n):
        atoms = molecule("CH3OH")
        atoms.rattle(0.1, seed=seed + k)
        found.append(atoms)
    return found


class Polynomial(Backbone):
    """A scalar of degree 4 and a vector of degree 3 in the positions, from the centroid: degrees up to 4 for both."""

    def __init__(self):
        super().__init__(outputs=OUTPUTS, cutoff=None, receptive_field=None)

    def forward(self, batch):
        n = batch[keys.PTR].shape[0] - 1
        return dict(zip(("energy", "dipole"), polynomial(batch[keys.POS], batch[keys.Z], batch[keys.BATCH], n)))  # noqa: B905


def polynomial(pos, z, structure, n: int):
    counts = segment_sum(torch.ones_like(pos[:, 0]), structure, n)
    x, y, v = (pos - (segment_sum(pos, structure, n) / counts[:, None])[structure]).unbind(1)
    charge = 1.0 + 0.1 * z.to(pos.dtype)
    scalar = x + x * y + 0.5 * x**3 - 0.2 * x * y * v + 0.3 * x**3 * v - 0.1 * y**4 + 0.2 * v**2
    vector = torch.stack([x**3 + y, x * y * v, v**2 - 2.0 * x], dim=1)
    return segment_sum(charge * scalar, structure, n), segment_sum(charge[:, None] * vector, structure, n)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
@pytest.mark.parametrize(("degree", "rule"), CASES)
def test_a_rule_is_exact_up_to_its_degree_and_no_further(degree, rule, group):
    method = GroupAveraging(degree, rule)
    rotations, weights = method.elements(group)
    assert rotations.dtype == weights.dtype == torch.float64
    assert float(weights.min()) > 0.0 and float(weights.sum()) == pytest.approx(1.0, abs=1e-14)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3, dtype=torch.float64).expand_as(rotations))
    signs = torch.linalg.det(rotations).round()
    assert float((weights * signs).sum()) == pytest.approx(1.0 if group == "SO(3)" else 0.0, abs=1e-14)
    # Over O(3), functions odd under the inversion vanish; even ones are those of the rotation alone.
    found = integrals(rotations, weights, method.degree + 1)
    assert exact(found, method.degree)
    assert found[method.degree + 1] > 1e-2


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
def test_number_of_elements(group):
    factor = {"SO(3)": 1, "O(3)": 2}[group]

    def count(degree, rule):
        return len(GroupAveraging(degree, rule).elements(group)[1]) // factor

    assert [count(d, "lebedev") for d in range(10)] == [1, 4, 18, 24, 70, 84, 182, 208, 342, 380]
    assert [count(d, "gauss") for d in range(6)] == [(d + 1) ** 2 * (d // 2 + 1) for d in range(6)]
    assert [count(None, name) for name in DEGREES] == [12, 24, 60]
    for degree, rule in CASES:
        method = GroupAveraging(degree, rule)
        assert count(degree, rule) >= fewest_rotations(method.degree)
    for d in range(12):
        assert count(d, "lebedev") <= count(d, "gauss")


@pytest.mark.parametrize("degree", range(1, 6))
def test_fewer_than_the_bound_cannot_be_exact(degree):
    """The bound is the number of functions that have to stay independent, of unit quaternions of one parity."""
    assert fewest_rotations(degree) == sum((twice + 1) ** 2 for twice in range(degree + 1) if (degree - twice) % 2 == 0)
    rotations = random_rotations(fewest_rotations(degree) - 1, rng(degree))
    # The best weights of any sign, for random rotations.
    design = torch.cat([wigner(l, rotations).flatten(1) for l in range(degree + 1)], dim=1).T
    wanted = torch.zeros(len(design), dtype=torch.float64)
    wanted[0] = 1.0
    weights = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution
    assert float((design @ weights - wanted[:, None]).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "orders"), [
    ("tetrahedral", {1: 1, 2: 3, 3: 8}),
    ("octahedral", {1: 1, 2: 9, 3: 8, 4: 6}),
    ("icosahedral", {1: 1, 2: 15, 3: 20, 5: 24}),
])  # fmt: skip
def test_finite_groups_are_groups(name, orders):
    group = rotation_group(name)
    n = len(group)
    torch.testing.assert_close(group[0], torch.eye(3, dtype=torch.float64))
    distance = (group[:, None] - group[None]).abs().amax(dim=(2, 3))
    assert float((distance + torch.eye(n)).min()) > 0.1  # all different
    products = (group[:, None] @ group[None]).reshape(-1, 1, 3, 3)
    nearest = torch.cat([(p - group).abs().amax(dim=(2, 3)).amin(dim=1) for p in products.split(256)])
    assert float(nearest.max()) < 1e-14
    angles = torch.arccos(((group.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2).clamp(-1, 1))
    found: dict[int, int] = {}
    for angle in angles.tolist():
        order = next(
            k for k in range(1, 7) if abs((k * angle / (2 * math.pi)) - round(k * angle / (2 * math.pi))) < 1e-6
        )
        found[order] = found.get(order, 0) + 1
    assert found == orders
    # The tetrahedral group is part of all of them.
    part = rotation_group("tetrahedral")
    assert float((part[:, None] - group[None]).abs().amax(dim=(2, 3)).amin(dim=1).max()) < 1e-14


def test_a_set_that_is_no_group_is_seen():
    group = rotation_group("icosahedral") @ random_rotations(1, rng())[0]
    product = group[1] @ group[2]
    assert float((product - group).abs().amax(dim=(1, 2)).min()) > 1e-3


@pytest.mark.parametrize("wrong", [{"random": True}, {}])
def test_what_is_announced(wrong):
    """A random coset gives up more than the fixed rule, all of which it gives up as well."""
    fixed, drawn = GroupAveraging().limits, GroupAveraging(random=True).limits
    assert set(fixed) < set(drawn) and "smoothness" in drawn and "smoothness" not in fixed
    assert dict(GroupAveraging(**wrong).limits) == dict(drawn if wrong else fixed)


# --- random cosets --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), case=st.sampled_from(CASES[2:8] + CASES[-3:]), left=st.booleans())
def test_a_coset_on_either_side_is_exact_to_the_degree(seed, case, left):
    method = GroupAveraging(*case)
    rotations, weights = method.elements("SO(3)")
    (turn,) = random_rotations(1, rng(seed))
    rotations = turn @ rotations if left else rotations @ turn
    found = integrals(rotations, weights, method.degree + 1)
    assert exact(found, method.degree) and found[-1] > 1e-4


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("degree", "rule"), [(None, "tetrahedral"), (None, "icosahedral"), (1, "lebedev")])
def test_the_expectation_over_cosets_is_unbiased_beyond_the_degree(degree, rule, left):
    """The expectation over the random rotation is taken exactly, by another rule of a high degree."""
    rotations, weights = GroupAveraging(degree, rule).elements("SO(3)")
    above = GroupAveraging(degree, rule).degree + 1
    turns, probabilities = rotation_quadrature(above)
    products = turns[:, None] @ rotations if left else rotations @ turns[:, None]
    both = (probabilities[:, None] * weights).flatten()
    mean = torch.einsum("k,kab->ab", both, wigner(above, products.reshape(-1, 3, 3)))
    assert float(mean.abs().max()) < 1e-13
    assert integrals(rotations, weights, above)[above] > 1e-2


def test_haar_rotations_of_uniform_numbers():
    """The map from the cube is integrated exactly: its angles by equidistant points, the radius by Gauss."""
    heights, weights = np.polynomial.legendre.leggauss(5)
    radius = torch.from_numpy((heights + 1.0) / 2.0)
    angle = (torch.arange(13, dtype=torch.float64) + 0.3) / 13
    grid = torch.cartesian_prod(radius, angle, angle)
    weights = torch.from_numpy(weights / 2.0).repeat_interleave(169) / 169
    assert exact(integrals(haar_rotations(grid), weights, 6), 6)
    grid[:, 0] = grid[:, 0] ** 2  # the twin: another density
    assert not exact(integrals(haar_rotations(grid), weights, 2), 2)
    edges = haar_rotations(torch.tensor([[0.0, 0.0, 0.0], [1.0 - 2**-53, 0.5, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(edges @ edges.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def turn_of(method, frames, group, per_owner):
    """The rotation of every owner's coset, after checking that there is one."""
    rotations = frames.rotations.reshape(-1, per_owner, 3, 3)
    turns = rotations @ method.elements(group)[0].mT
    torch.testing.assert_close(turns, turns[:, :1].expand_as(turns))
    assert bool((torch.linalg.det(turns) > 0.0).all())
    return turns[:, 0]


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
def test_random_coset_is_the_fixed_rule_on_a_turned_structure(group):
    backbone = Polynomial()
    method, fixed = GroupAveraging(rule="tetrahedral", random=True, seed=5), GroupAveraging(rule="tetrahedral")
    batch = from_ase(molecules())
    model, plain = Symmetrizer(backbone, method, group=group), Symmetrizer(backbone, fixed, group=group)
    frames = model.frames(batch)
    turns = turn_of(method, frames, group, 12 if group == "SO(3)" else 24)
    assert float((turns[0] - turns[1]).abs().max()) > 0.1
    back = torch.einsum("nij,ni->nj", turns[batch.batch], batch.pos)
    out, expected = model(batch, forces=True), plain(replace(batch, pos=back), forces=True)
    torch.testing.assert_close(out["energy"], expected["energy"])
    for name, turn in (("forces", turns[batch.batch]), ("dipole", turns)):
        torch.testing.assert_close(out[name], torch.einsum("nij,nj->ni", turn, expected[name]))
    assert (
        float((out["energy"] - plain(batch)["energy"]).detach().abs().max()) > 1e-4
    )  # another coset, another residual


def test_draws_belong_to_structures_not_to_batches():
    model = Symmetrizer(Polynomial(), GroupAveraging(rule="octahedral", random=True))
    structures = molecules()
    whole = model.frames(from_ase(structures)).rotations.reshape(3, -1, 3, 3)
    for n, atoms in enumerate(structures):
        torch.testing.assert_close(model.frames(from_ase(atoms)).rotations, whole[n], rtol=0, atol=0)
    drawn = [model.frames(from_ase(structures), rng(seed)).rotations for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    generator = rng(1)
    again = [model.frames(from_ase(structures), generator).rotations for _ in range(2)]
    assert torch.equal(again[0], drawn[0]) and not torch.equal(again[0], again[1])
    other = Symmetrizer(Polynomial(), GroupAveraging(rule="octahedral", random=True, seed=1))
    assert not torch.equal(other.frames(from_ase(structures)).rotations.reshape(3, -1, 3, 3), whole)


def test_every_wanted_atom_has_a_coset_of_its_own():
    method = GroupAveraging(rule="tetrahedral", random=True)
    model = Symmetrizer(ToyLocal(cutoff=3.0), method, scope="atom", group="SO(3)")
    batch = from_ase(molecules(2), cutoff=3.0)
    frames = model.frames(batch)
    turns = turn_of(method, frames, "SO(3)", 12)
    assert len(turns) == len(batch.pos) and len(torch.unique(turns[:, 0, 0])) == len(turns)
    mask = torch.arange(len(batch.pos)) % 3 == 0
    some = model.frames(replace(batch, **{keys.CENTER_MASK: mask}))
    torch.testing.assert_close(turn_of(method, some, "SO(3)", 12), turns[mask])
    assert torch.equal(some.owner.unique(), mask.nonzero()[:, 0])


# --- models ---------------------------------------------------------------------------------------------------------


def change(model, batch, turn):
    """Largest change of scalar and vector with the orientation."""
    with torch.no_grad():
        now, then = model(batch), model(replace(batch, pos=batch.pos @ turn.T))
    return max(
        float((then["energy"] - now["energy"]).abs().max()),
        float((then["dipole"] - now["dipole"] @ turn.T).abs().max()),
    )


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), random=st.booleans(), group=st.sampled_from(["SO(3)", "O(3)"]))
def test_a_polynomial_network_is_made_exact(seed, random, group):
    improper = None if group == "O(3)" else False
    (turn,) = random_rotations(1, rng(seed), improper=improper)
    batch = from_ase([*molecules(2, seed % 1000), Atoms("HH", [[0, 0, 0], [0, 0, 0.7]]), Atoms("O")])
    for degree, rule in ((4, "lebedev"), (4, "gauss"), (None, "icosahedral")):
        model = Symmetrizer(Polynomial(), GroupAveraging(degree, rule, random=random), group=group)
        assert change(model, batch, turn) < 1e-12
    for degree, rule in ((3, "lebedev"), (None, "octahedral")):
        model = Symmetrizer(Polynomial(), GroupAveraging(degree, rule, random=random), group=group)
        assert change(model, batch, random_rotations(1, rng(seed))[0]) > 1e-8


def test_finite_groups_are_exactly_equivariant_under_themselves():
    model = Symmetrizer(ToyGlobal(OUTPUTS), GroupAveraging(rule="icosahedral"), group="SO(3)")
    batch = from_ase(molecules(1))
    assert max(change(model, batch, g) for g in rotation_group("icosahedral")[::7]) < 1e-12
    assert change(model, batch, random_rotations(1, rng())[0]) > 1e-6


def test_periodic_structures():
    atoms = bulk("C", "diamond", 3.57, cubic=True)
    atoms.rattle(0.05, seed=1)
    batch = from_ase(atoms)
    for random in (False, True):
        model = Symmetrizer(ToyLocal(cutoff=3.0), GroupAveraging(2, random=random), scope="structure")
        out = model(batch, forces=True, stress=True)
        assert bool(torch.isfinite(out["forces"]).all() & torch.isfinite(out["stress"]).all())


def test_a_random_coset_fails_what_it_announces():
    """Of the checks that take no time; the default method runs through all of them with the other methods."""
    quick = ["translation_invariance", "permutation_equivariance", "batch_independence", "determinism", "purity"]
    quick += ["frame_equivariance", "frame_permutation", "frame_weights", "rotation_equivariance"]
    for random in (True, False):
        method = GroupAveraging(1, random=random)
        backbone = ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=4.0, seed=2)
        subject = of_symmetrizer(Symmetrizer(backbone, method, scope="atom").eval())
        report = run(subject, profile="quick", only=quick)
        failed = {r.check for r in report.results if r.verdict in (Verdict.FAILED, Verdict.ERROR)}
        assert failed == set(method.limits) & set(quick)


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_described_saved_and_loaded(rule, tmp_path):
    method = GroupAveraging(rule=rule, random=True, seed=3)
    again = GroupAveraging.rebuild(method.describe(), None)
    assert again.describe() == method.describe() and repr(again) == repr(method)
    save(Symmetrizer(ToyGlobal(), method), tmp_path / "model")
    assert load(tmp_path / "model").method.describe() == method.describe()
    assert method.stochastic and not GroupAveraging(rule=rule).stochastic
    assert not GroupAveraging.stochastic


def test_descriptions_of_older_models():
    method = GroupAveraging.rebuild({"degree": 5}, None)
    assert (method.degree, method.rule, method.random) == (5, "lebedev", False)
    assert GroupAveraging().degree == 3


def test_degrees_that_a_group_can_give():
    assert GroupAveraging(4, "icosahedral").degree == 5 and GroupAveraging(0, "tetrahedral").degree == 2
    with pytest.raises(DeclarationError, match=r"'octahedral' is exact to degree 3, got 4; .*'icosahedral' can do it"):
        GroupAveraging(4, "octahedral")
    with pytest.raises(DeclarationError, match="got 6; 'gauss' or 'lebedev' can do it"):
        GroupAveraging(6, "icosahedral")
    with pytest.raises(DeclarationError, match="unknown rule 'lebedef', did you mean 'lebedev'"):
        GroupAveraging(3, "lebedef")
    for options in ({"degree": -1}, {"degree": True}, {"degree": 2.0}, {"random": 1}, {"seed": 0.5}):
        with pytest.raises(DeclarationError, match=next(iter(options))):
            GroupAveraging(**options)
    with pytest.raises(InvalidInputError, match="unknown group 'cubic'"):
        rotation_group("cubic")
    with pytest.raises(InvalidInputError, match="unknown rule 'octahedral'"):
        rotation_quadrature(3, "octahedral")


def test_random_cosets_are_not_exported():
    from symmetrize.export.frames import frames_module

    arguments = {"group": "O(3)", "scope": "structure", "l_max": 1, "epsilon": 1e-16, "radius": None}
    with pytest.raises(DeclarationError, match="random=True"):
        frames_module(GroupAveraging(3, random=True), **arguments)
    fixed = frames_module(GroupAveraging(rule="icosahedral"), **arguments)
    assert len(fixed.weights) == 120


# --- peers ----------------------------------------------------------------------------------------------------------


# i-PI reads its table in a way that Python 3.11 deprecates.
@pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("peer", "size", "ours"), [("lebedev", 5, 4), ("lebedev", 7, 6), ("legendre", 3, 4)])
def test_rules_of_i_pi(peer, size, ours):
    tools = pytest.importorskip("ipi.utils.mathtools")
    theirs = getattr(tools, f"get_rotation_quadrature_{peer}")(size)
    rotations = torch.stack([torch.as_tensor(np.asarray(entry[0])) for entry in theirs]).to(torch.float64)
    weights = torch.tensor([float(entry[1]) for entry in theirs], dtype=torch.float64)
    weights = weights / weights.sum()
    rule = "lebedev" if peer == "lebedev" else "gauss"
    own, own_weights = rotation_quadrature(ours, rule)
    assert len(own) == len(rotations)
    for found, w in ((rotations, weights), (own, own_weights)):
        values = integrals(found, w, ours + 1)
        # Their table of points has twelve digits.
        assert all(value < 1e-11 for value in values[1:-1]) and values[-1] > 1e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated")
class TestSymmetrizedModel:
    """metatomic's model averaged over its own rule, around the same function."""

    @pytest.fixture(scope="class")
    def metatomic(self):
        require_adapter("metatomic")
        from symmetrize.metatomic import import_metatomic

        return import_metatomic()

    def pair(self, wave, degree):
        """Theirs and ours, as functions of structures."""
        from metatensor.torch import Labels, TensorBlock, TensorMap
        from metatomic.torch import (
            AtomisticModel,
            ModelCapabilities,
            ModelEvaluationOptions,
            ModelMetadata,
            ModelOutput,
            System,
            systems_to_torch,
        )
        from metatomic.torch.o3 import SymmetrizedModel

        class Function(torch.nn.Module):
            def __init__(self, wave: float):
                super().__init__()
                self.wave = wave

            def forward(
                self,
                systems: List[System],  # noqa: UP006
                outputs: Dict[str, ModelOutput],  # noqa: UP006
                selected_atoms: Optional[Labels] = None,  # noqa: UP045
            ) -> Dict[str, TensorMap]:  # noqa: UP006
                rows = [energy_of(s.positions, s.types, self.wave) for s in systems]
                samples = Labels(["system"], torch.arange(len(rows)).reshape(-1, 1))
                values = torch.stack(rows).reshape(-1, 1)
                block = TensorBlock(values, samples, [], Labels(["energy"], torch.tensor([[0]])))
                return {"energy": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])}

        class Ours(Backbone):
            def __init__(self):
                super().__init__(
                    outputs={"energy": OutputSpec("0e", per="structure")}, cutoff=None, receptive_field=None
                )

            def forward(self, batch):
                bounds = batch.ptr.tolist()
                parts = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:])]  # noqa: B905, RUF007
                return {"energy": torch.stack([energy_of(batch.pos[p], batch.z[p], wave) for p in parts])}

        asked = ModelOutput(quantity="energy", unit="eV", sample_kind="system")
        capabilities = ModelCapabilities(
            outputs={"energy": asked}, atomic_types=[1, 6, 8], interaction_range=math.inf, length_unit="angstrom",
            supported_devices=["cpu"], dtype="float64",
        )  # fmt: skip
        model = AtomisticModel(Function(wave).eval(), ModelMetadata(), capabilities)
        wrapped = SymmetrizedModel.wrap(model, max_angular_momentum_grid=degree, batch_size=512)
        options = ModelEvaluationOptions(length_unit="angstrom", outputs={"energy": asked})

        def theirs(structures):
            systems = systems_to_torch(structures, dtype=torch.float64)
            return wrapped(systems, options, check_consistency=False)["energy"].block().values[:, 0].detach()

        own = Symmetrizer(Ours(), GroupAveraging(degree))
        return theirs, lambda structures: own(from_ase(structures))["energy"]

    @pytest.mark.parametrize("degree", [4, 5])
    def test_equal_where_both_are_exact(self, metatomic, degree):
        theirs, ours = self.pair(0.0, degree)
        torch.testing.assert_close(theirs(molecules()), ours(molecules()), rtol=1e-12, atol=1e-12)
        # The twin: the function does depend on the orientation.
        theirs, ours = self.pair(0.0, 1)
        exactly = self.pair(0.0, 4)[1](molecules())
        assert float((ours(molecules()) - exactly).abs().min()) > 1e-6

    def test_residuals_are_comparable(self, metatomic):
        (theirs, ours), (_, exactly) = self.pair(2.0, 3), self.pair(2.0, 15)
        turns = random_rotations(6, rng(3))
        structures = []
        for turn in turns:
            for atoms in molecules():
                atoms.positions = atoms.positions @ turn.numpy().T
                structures.append(atoms)
        wanted = exactly(molecules()).repeat(len(turns))
        residuals = [float((f(structures) - wanted).square().mean().sqrt()) for f in (theirs, ours)]
        assert min(residuals) > 1e-4 and max(residuals) < 3.0 * min(residuals)


def energy_of(pos, types, wave: float):
    """A polynomial of degree 4 of the positions from their mean, and a wave of all degrees."""
    p = pos - pos.mean(dim=0)
    x, y, v = p[:, 0], p[:, 1], p[:, 2]
    value = x + x * y + 0.5 * x**3 - 0.2 * x * y * v + 0.3 * x**3 * v - 0.1 * y**4 + 0.2 * v**2
    if wave > 0.0:
        value = value + torch.sin(wave * (x - 0.5 * y + 0.8 * v) + 0.4)
    return ((1.0 + 0.1 * types.to(pos.dtype)) * value).sum()
