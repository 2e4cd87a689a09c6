"""Frames and weights of ECSE: sums, counts, closure under the group, locality, what each stratum is for."""

from importlib.resources import files

import pytest
import torch
from ase import Atoms
from ase.io import read
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, DeclarationError, FrameSet, Identity, NoFrameError, OutputSpec, Symmetrizer, from_ase
from symmetrize.frames import Stratum
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import geometries

ALL = geometries()
FINITE = {name: atoms for name, atoms in ALL.items() if not atoms.pbc.any()}
NARROW = {"cutoff_width": 0.1, "collinearity_width": 0.1}
ENERGY = {"energy": OutputSpec("0e", reduce="sum")}


def frames(structures, method=None, *, cutoff=4.5, group="SO(3)", scope="atom", l_max=1) -> FrameSet:
    batch = from_ase(structures, cutoff=cutoff)
    return (method or ECSE()).frames(batch, group=group, scope=scope, l_max=l_max)


@pytest.fixture(scope="module")
def ethanol():
    found = read(str(files("symmetrize.demo").joinpath("data/ethanol-test.xyz")), ":")
    for atoms in found:
        atoms.pbc = False
    return found


@pytest.mark.parametrize("group", ["SO(3)", "O(3)"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_total_weight_is_at_least_one(scope, group):
    structures = list((FINITE if scope == "structure" else ALL).values())
    for method in (ECSE(), ECSE(**NARROW), ECSE(0.05, 0.02), ECSE(0.5, 0.5)):
        assert frames(structures, method, scope=scope, group=group).total_weight.min() >= 1.0 - 1e-12


def test_evaluations_per_center_on_ethanol(ethanol):
    """Two evaluations are enough for an atom of a molecule; its outer hydrogens take turns as the axis of the whole."""
    for method, limit in ((ECSE(**NARROW), 2.0), (ECSE(), 2.8)):
        per_atom = frames(ethanol, method)
        assert per_atom.n_evaluations <= 2.1 * per_atom.n_owners
        per_molecule = frames(ethanol, method, scope="structure")
        assert per_molecule.n_evaluations <= limit * per_molecule.n_owners


def test_o3_takes_twice_the_evaluations_except_at_the_point():
    for scope in ("atom", "structure"):
        structures = list((FINITE if scope == "structure" else ALL).values())
        proper, full = (frames(structures, scope=scope, group=g) for g in ("SO(3)", "O(3)"))
        n_point = int((proper.stratum == Stratum.POINT).sum())
        assert full.n_frames - n_point == 2 * (proper.n_frames - n_point)
        assert torch.allclose(full.total_weight, proper.total_weight, rtol=1e-13)
        determinant = torch.linalg.det(full.rotations)
        assert int((determinant < 0).sum()) == proper.n_frames - n_point


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_weights_are_invariant_and_frames_rotate(scope):
    """The weighted set of frames moves with the cloud: as a set, since degenerate geometries have no order."""
    structures = [ALL[name] for name in ("ethanol", "methane", "benzene", "random cluster")]
    g = random_rotations(1, torch.Generator().manual_seed(4))[0]
    before = frames(structures, scope=scope)
    turned = []
    for atoms in structures:
        copy = atoms.copy()
        copy.positions = copy.positions @ g.numpy().T
        turned.append(copy)
    after = frames(turned, scope=scope)
    assert before.n_frames == after.n_frames

    def moments(found, rotation):
        """Second and fourth moments of the frames around a random matrix, per owner: equal for equal weighted sets."""
        probe = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        overlap = torch.einsum("nij,ij->n", rotation @ found.rotations, probe)
        rows = torch.stack([found.weights * overlap**k for k in range(5)], dim=1)
        return torch.zeros(found.n_owners, 5, dtype=torch.float64).index_add(0, found.owner, rows)

    expected, got = moments(before, g), moments(after, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(expected, got, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(moments(before, torch.eye(3, dtype=torch.float64)), got, rtol=1e-3)


def test_strata_are_what_they_are_for():
    def kinds(atoms, scope="atom"):
        return set(Stratum(int(s)) for s in frames(atoms, scope=scope).stratum)

    assert kinds(Atoms("H")) == kinds(Atoms("H"), "structure") == {Stratum.POINT}
    for name in ("H2", "CO2", "C2H2"):
        assert kinds(ALL[name]) == kinds(ALL[name], "structure") == {Stratum.AXIS}
    for name in ("ethanol", "benzene", "methane"):
        assert kinds(ALL[name]) == {Stratum.FRAME}


def test_a_leaving_neighbor_hands_over_to_the_point():
    """The weight of the point stratum grows from 0 to 1 while the last neighbor leaves, and nothing jumps."""
    point = []
    for distance in torch.linspace(4.30, 4.5, 41):
        found = frames(Atoms("HH", [[0, 0, 0], [float(distance), 0, 0]]))
        point.append(float(found.normalized_weights[found.stratum == Stratum.POINT].sum()) / 2)
    assert point[0] == 0.0 and abs(point[-1] - 1.0) < 1e-12
    steps = torch.tensor(point).diff()
    assert (steps >= -1e-12).all() and steps.max() < 0.1


def test_order_of_the_axial_average_grows_with_the_degree():
    for l_max, n in ((0, 8), (4, 8), (5, 10), (6, 10), (9, 14)):
        found = frames(ALL["CO2"], scope="structure", l_max=l_max)
        assert found.n_frames == 2 * n  # two equidistant oxygens


def test_fallback_error_names_the_atom():
    f = Symmetrizer(ToyLocal(ENERGY), ECSE(fallback="error"))
    with pytest.raises(NoFrameError, match="structure 1, atom 0 is collinear"):
        f(from_ase([ALL["ethanol"], ALL["CO2"]]))
    assert torch.isfinite(f(from_ase(ALL["ethanol"]))["energy"]).all()


class Distances(ToyLocal):
    """An auxiliary model, invariant by construction."""

    def forward(self, batch):
        flat = torch.zeros_like(batch.edge_vec)
        flat[:, 0] = batch.edge_vec.norm(dim=1)
        from symmetrize.data import replace

        return super().forward(replace(batch, edge_vec=flat))


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_auxiliary_model_takes_over_where_there_is_no_frame(scope):
    backbone, auxiliary = ToyLocal(ENERGY, seed=0), Distances(ENERGY, seed=1)
    f = Symmetrizer(backbone, ECSE(fallback=auxiliary), scope=scope).eval()
    linear = from_ase(ALL["CO2"])
    expected = Symmetrizer(auxiliary, Identity()).eval()(linear, forces=True)
    got = f(linear, forces=True)
    assert torch.allclose(got["energy"], expected["energy"], rtol=1e-12)
    assert torch.allclose(got["forces"], expected["forces"], atol=1e-12)
    # A full coordinate system everywhere: the auxiliary model has no say.
    bent = from_ase(ALL["ethanol"])
    plain = Symmetrizer(backbone, ECSE(), scope=scope).eval()(bent, forces=True)
    assert torch.allclose(f(bent, forces=True)["forces"], plain["forces"], atol=1e-12)
    # In between both count, and the forces are still the gradient.
    from symmetrize.testing import conservative, measure_forces_fd
    from symmetrize.testing.structures.geometries import water

    found = measure_forces_fd(conservative(f), from_ase(water(160.0)), n_directions=3, step=4e-4)["forces"]
    assert found.relative < 1e-6, str(found)


def test_frame_set_checks_its_invariants():
    good = frames(ALL["ethanol"])
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for name, value in {
        "rotations": good.rotations * 1.1,
        "weights": -good.weights,
        "owner": good.owner + 100,
        "origins": good.origins[:, :2],
        "scope": "molecule",
    }.items():
        with pytest.raises(DeclarationError, match=name):
            FrameSet(**{**fields, name: value})
    with pytest.raises(NoFrameError):
        FrameSet(**{**fields, **{n: fields[n][:0] for n in ("rotations", "weights", "owner", "stratum", "origins")}})


def test_two_molecules_far_apart_give_the_sum():
    """Size consistency of atom scope; the twin in structure scope is not size-consistent."""
    a, b = ALL["ethanol"], ALL["chiral center"].copy()
    b.positions += [20.0, 3.0, -2.0]
    local = Symmetrizer(ToyLocal(ENERGY), ECSE()).eval()
    apart = local(from_ase([a, b]))["energy"].sum()
    together = local(from_ase(a + b))["energy"][0]
    assert abs(apart - together) < 1e-12
    whole = Symmetrizer(ToyLocal(ENERGY), ECSE(), scope="structure").eval()
    assert abs(whole(from_ase([a, b]))["energy"].sum() - whole(from_ase(a + b))["energy"][0]) > 1e-4


def test_rotating_one_molecule_in_a_fixed_box_changes_nothing():
    """Local equivariance: what a global average cannot give."""
    g = random_rotations(1, torch.Generator().manual_seed(3))[0].numpy()

    def box(rotated: bool, pbc: bool) -> Atoms:
        a, b = ALL["ethanol"].copy(), ALL["chiral center"].copy()
        if rotated:
            a.positions = a.positions @ g.T
        a.positions += [5.0, 5.0, 5.0]
        b.positions += [15.0, 15.0, 15.0]
        both = a + b
        both.cell, both.pbc = [30.0, 30.0, 30.0], pbc
        return both

    def change(f, pbc):
        before, after = (f(from_ase(box(rotated, pbc)))["energy"].detach()[0] for rotated in (False, True))
        return abs(float(before - after))

    backbone = ToyLocal(ENERGY)
    assert change(Symmetrizer(backbone, ECSE()).eval(), True) < 1e-12
    assert change(Symmetrizer(backbone, Identity()).eval(), True) > 1e-4
    assert change(Symmetrizer(backbone, ECSE(), scope="structure").eval(), False) > 1e-4


def test_structure_scope_has_a_frame_for_every_finite_structure():
    f = Symmetrizer(ToyGlobal({"energy": OutputSpec("0e", per="structure")}), ECSE())
    found = f.frames(from_ase(list(FINITE.values())))
    assert (found.evaluations > 0).all()
    single = torch.tensor([len(atoms) == 1 for atoms in FINITE.values()])
    point = torch.zeros(len(FINITE), dtype=torch.bool)
    point[found.owner[found.stratum == Stratum.POINT]] = True
    assert torch.equal(point, single)
