"""The search for a degree: what is measured is the orientation variance, and the lowest good degree is taken."""

from __future__ import annotations

import math

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from symmetrize.backbones.toy import ToyLocal

from symmetrize import Backbone, GroupAveraging, OutputSpec, Symmetrizer, from_ase, keys
from symmetrize.degree import DegreeNotFoundError, DegreeSearch, find_degree
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing import measure_orientation_variance

TENSORS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "dipole": OutputSpec("1o"),
    "pseudo": OutputSpec("0o + 1e"),
    "symmetric": OutputSpec(cartesian="ij=ji"),
    "l3": OutputSpec("3e"),
}


def structures(n=3):
    found = []
    for seed in range(n):
        atoms = molecule("CH3OH")
        atoms.rattle(0.1, seed=seed)
        found.append(atoms)
    return found


class Polynomial(Backbone):
    """A scalar of degree ``degree`` in the positions from the centroid: what no lower degree makes exact.

    Its gradient is of the same degree as a function of the orientation; times a fixed vector, one degree higher.
    """

    def __init__(self, degree=2, vector=False, constant=False):
        outputs = {"energy": OutputSpec("0e", per="structure")}
        if vector:
            outputs["vector"] = OutputSpec("1o", per="structure")
        if constant:
            outputs["constant"] = OutputSpec("0e", per="structure")
        super().__init__(outputs=outputs, cutoff=None, receptive_field=None)
        self.degree, self.modes = degree, []

    def forward(self, batch):
        self.modes.append(self.training)
        n = batch[keys.PTR].shape[0] - 1
        structure, pos = batch[keys.BATCH], batch[keys.POS]
        center = segment_sum(pos, structure, n) / batch[keys.PTR].diff()[:, None]
        r = pos - center[structure]
        charge = 1.0 + 0.1 * batch[keys.Z].to(pos.dtype)
        # Sectoral harmonics contain one degree only; the invariant part makes the structures differ.
        wave = sum((torch.complex(r[:, 0], r[:, 1]) ** l).real for l in range(1, self.degree + 1))
        energy = segment_sum(charge * (wave + 2.0 * (r * r).sum(dim=1)), structure, n)
        out = {"energy": energy}
        if "vector" in self.outputs:
            fixed = torch.tensor([0.0, 0.3, 1.0], dtype=pos.dtype)
            out["vector"] = segment_sum((charge * wave)[:, None] * fixed + charge[:, None] ** 2 * r, structure, n)
        if "constant" in self.outputs:
            out["constant"] = torch.full_like(energy, 7.0)
        return out


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
@pytest.mark.parametrize(("degree", "rule"), [(2, "lebedev"), (3, "lebedev"), (2, "gauss")])
def test_the_degree_of_a_polynomial_is_found(degree, rule, group):
    # Odd degrees cancel with the inversion: 3 is left with what is even in it, 2.
    expected = degree if group == "SO(3)" else 2
    found = find_degree(
        Polynomial(degree), structures(), 1e-10, group=group, rule=rule, forces=False, start=0, progress=False
    )
    assert isinstance(found, DegreeSearch)
    assert found.degree == found.method.degree == expected and found.method.rule == rule
    assert [p.degree for p in found.points] == list(range(expected + 1))
    assert all(p.deviations["energy"] > 1e-3 for p in found.points[:-1])
    assert found.points[-1].deviations["energy"] < 1e-13
    assert found.points[-1].evaluations == found.model.frames(from_ase(structures(1))).n_evaluations
    assert found.model.group == group and found.targets == {"energy": 1e-10}


def test_vectors_need_more():
    """Their own rotation is of degree one; degrees that are tried in steps are not found between them."""
    backbone, given = Polynomial(2, vector=True), structures()
    options = {"group": "SO(3)", "progress": False}
    assert find_degree(backbone, given, {"energy": 1e-10}, **options).degree == 2
    whole = find_degree(backbone, given, 1e-10, **options)
    assert whole.degree == 3 and set(whole.targets) == {"energy", "forces", "vector"}
    at_two = whole.points[1]
    assert at_two.degree == 2 and at_two.deviations["energy"] < 1e-13 < 1e-3 < at_two.deviations["vector"]
    assert find_degree(backbone, given, 1e-10, start=0, step=2, **options).degree == 4
    assert find_degree(backbone, given, {"forces": 1e-10}, **options).degree == 2


def test_measures_the_orientation_variance():
    """Against the quadrature: many orientations of many structures."""
    backbone, given = ToyLocal(cutoff=3.0, seed=1).eval(), structures(2)
    found = find_degree(backbone, given, {"energy": 10.0}, start=1, n_orientations=150, scope="structure", forces=False,
                        progress=False)  # fmt: skip
    model = Symmetrizer(backbone, GroupAveraging(1), scope="structure").eval()
    # Turned, so that no orientation of the quadrature is an element of the rule relative to another.
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]

    def turned(batch):
        batch = batch.clone()
        batch.pos, batch.edge_vec = batch.pos @ turn.T, None
        return {"energy": model(batch)["energy"]}

    wanted = measure_orientation_variance(
        turned, from_ase(given), {"energy": OutputSpec("0e", per="structure")}, degree=6, l_max=2, scale={"energy": 1.0}
    )["energy"]
    again = find_degree(backbone, given, {"energy": 10.0}, n_orientations=150, scope="structure", forces=False,
                        scale={"energy": 1.0, "atomic_energy": 1.0}, progress=False)  # fmt: skip
    # Five standard errors of a standard deviation of 2 x 150 numbers.
    assert again.points[0].deviations["energy"] == pytest.approx(wanted.relative, rel=5 / math.sqrt(2 * 149))
    assert found.points[0].deviations["energy"] != again.points[0].deviations["energy"]  # another scale


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_every_representation(scope):
    backbone = ToyLocal(TENSORS, cutoff=2.5, seed=1)
    target = {"dipole": 0.1, "symmetric": 0.1, "forces": 0.3, "l3": 2.0, "pseudo": 2.0}
    found = find_degree(backbone, structures(2), target, scope=scope, n_orientations=4, maximum=9, start=1, step=2)
    assert set(found.points[0].deviations) == {*TENSORS, "atomic_energy", "forces"}
    assert all(found.points[-1].deviations[name] <= size for name, size in target.items())
    assert any(found.points[0].deviations[name] > size for name, size in target.items())
    assert found.model.scope == scope
    first, *_, last = str(found).splitlines()
    assert first.split()[:2] == ["degree", "evaluations"] and int(last.split()[0]) == found.degree


def test_periodic_structures():
    atoms = bulk("C", "diamond", 3.57)
    atoms.rattle(0.1, seed=0)
    found = find_degree(ToyLocal(cutoff=2.5), [atoms], 0.5, scope="structure", n_orientations=2, step=2, progress=False)
    assert "forces" in found.targets


def test_not_reached():
    with pytest.raises(
        DegreeNotFoundError, match=r"energy: expected .* at most 1e-10 .* at degree 1; .*ECSE"
    ) as caught:
        find_degree(Polynomial(2), structures(), {"energy": 1e-10}, maximum=1, progress=False)
    assert [p.degree for p in caught.value.points] == [1] and "evaluations" in str(caught.value)


def test_constants_need_no_average():
    found = find_degree(Polynomial(2, constant=True), structures(), 1e-10, forces=False, progress=False)
    assert found.degree == 2 and found.points[0].deviations["constant"] == 0.0


def test_a_network_is_left_in_its_mode():
    backbone = Polynomial(1)
    backbone.train()
    found = find_degree(backbone, structures(1), 1e-10, group="SO(3)", forces=False, progress=False)
    assert backbone.training and found.model.training and not any(backbone.modes)
    backbone.eval()
    with pytest.raises(DegreeNotFoundError):
        find_degree(backbone, structures(1), 1e-10, start=0, maximum=0, group="SO(3)", progress=False)
    assert not backbone.training


def test_a_batch_or_structures():
    both = [
        find_degree(Polynomial(2), given, 1e-10, forces=False, progress=False).points
        for given in (structures(), from_ase(structures()))
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "icosahedral"}, "one with degrees to choose from, got 'icosahedral'"),
        ({"rule": "lebedef"}, "did you mean 'lebedev'"),
        ({"target": 0.0}, "expected a positive target, got 0.0"),
        ({"target": math.nan}, "positive target"),
        ({"target": {}}, "at least one output"),
        ({"target": {"enery": 0.1}}, "unknown output 'enery', did you mean 'energy'"),
        ({"start": -1}, "start: expected an integer of at least 0"),
        ({"start": 3, "maximum": 2}, "maximum: expected an integer of at least 3, got 2"),
        ({"step": 0}, "step"),
        ({"n_orientations": 1}, "n_orientations: expected an integer of at least 2"),
        ({"group": "O(2)"}, "group"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(DeclarationError, match=match):
        find_degree(Polynomial(1), structures(1), **{"target": 0.1, "progress": False, **options})


def test_no_structures():
    with pytest.raises(InvalidInputError, match="at least one, got none"):
        find_degree(Polynomial(1), [], 0.1)
    with pytest.raises(DeclarationError, match="energy"):
        find_degree(Polynomial(1), [Atoms("O")], 0.1, forces=True, energy="enegry")
