"""The measures of a study cell: what they say of models that have a property, and of models that do not."""

import copy
import json
import math

import pytest
import torch

from symmetrize import ECSE, GroupAveraging, Identity, OutputSpec, Symmetrizer, from_ase, keys, load_backbone
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.frames import FrameMethod, FrameSet, Stratum
from symmetrize.methods import make_method
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import about_axis
from symmetrize.study.measures import MEASURES, SIZES, dynamics, symmetry
from symmetrize.study.measures.common import Interaction, are_crystals, size_of, stage, without_baseline
from symmetrize.study.prepared import PreparedCell
from symmetrize.study.results import encode
from symmetrize.testing import geometries
from symmetrize.testing.structures.geometries import crystal, random_cluster

ENERGY = {"energy": OutputSpec("0e", per="atom", reduce="sum", unit="eV")}
DIPOLE = {"dipole": OutputSpec("1o", per="atom", reduce="sum", unit="e A")}
SMALL = {
    **{"structures": 3, "elements": 2, "variance_structures": 1, "permutations": 1, "paths": 1, "points": 31},
    **{"sites": 4, "steps": 8, "nve_steps": 4, "directions": 1, "pairs": 2, "turns": 2, "repeats": 1},
}
EXACT = 1e-10


def toy(outputs=None, **options):
    backbone = load_backbone("toy", outputs=outputs or ENERGY, cutoff=4.0, **options)
    return backbone.requires_grad_(False).eval()


def cell_of(method, *, backbone=None, scope=None, group="O(3)", structures=None, references=None, dtype=None, **sizes):
    backbone = toy() if backbone is None else backbone
    dtype = torch.float64 if dtype is None else dtype
    model = Symmetrizer(backbone, method, group, scope).eval()
    return PreparedCell(
        model=model,
        bare=Symmetrizer(backbone, Identity(), group, model.scope).eval(),
        backbone=backbone,
        structures=[random_cluster(5, seed) for seed in range(4)] if structures is None else structures,
        references=references or {},
        outputs=dict(backbone.outputs),
        species=(1, 6, 7, 8),
        energy="energy" if "energy" in backbone.outputs else None,
        seed=0,
        sizes={**SMALL, **sizes},
        dtype=dtype,
        group=group,
    )


class OfFirstTwo(FrameMethod):
    """A frame along the first two atoms: exact, and dependent on the numbering."""

    def frames(self, batch, *, group, scope, l_max, generator=None):
        first = batch[keys.PTR][:-1]
        rotations = self.axes(batch[keys.POS].to(torch.float64), first)
        pos, owner = batch[keys.POS], torch.arange(len(first))
        means = segment_sum(pos, batch[keys.BATCH], len(first)) / batch[keys.PTR].diff()[:, None]
        if group == "O(3)":
            rotations, owner = torch.cat([rotations, -rotations]), torch.cat([owner, owner])
        n = len(owner)
        weights = self.weights(batch)[owner] if n == len(first) else torch.ones(n, dtype=torch.float64)
        return FrameSet(
            rotations, weights, owner, torch.full((n,), int(Stratum.FRAME)), means[owner], len(first), "structure"
        )

    def weights(self, batch):
        return torch.ones(batch[keys.PTR].shape[0] - 1, dtype=torch.float64)

    def axes(self, pos, first):
        if bool((torch.diff(first) < 3).any()) or len(pos) - int(first[-1]) < 3:
            raise NoFrameError("frames: expected three atoms")
        a = torch.nn.functional.normalize(pos[first + 1] - pos[first], dim=1)
        b = pos[first + 2] - pos[first]
        b = torch.nn.functional.normalize(b - (a * b).sum(dim=1, keepdim=True) * a, dim=1)
        return torch.stack([a, b, torch.linalg.cross(a, b)], dim=2)


class Blend(FrameMethod):
    """Two fixed orientations, exchanged when the distance of the first two atoms passes a value, over a width."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def frames(self, batch, *, group, scope, l_max, generator=None):
        first = batch[keys.PTR][:-1]
        pos = batch[keys.POS].to(torch.float64)
        x = (pos[first + 1] - pos[first]).norm(dim=1) - 1.0869
        share = (x > 0).to(torch.float64) if self.width == 0.0 else torch.sigmoid(x / self.width)
        n = len(first)
        axis = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        turned = about_axis(axis, 1.0).expand(n, 3, 3)
        means = segment_sum(pos, batch[keys.BATCH], n) / batch[keys.PTR].diff()[:, None]
        owner = torch.arange(n).repeat(2)
        return FrameSet(
            torch.cat([torch.eye(3, dtype=torch.float64).expand(n, 3, 3), turned]),
            torch.cat([1.0 - share, share]),
            owner,
            torch.full((2 * n,), int(Stratum.FRAME)),
            means[owner],
            n,
            "structure",
        )


class NoLines(Identity):
    """Refuses atoms on a line."""

    def frames(self, batch, *, group, scope, l_max, generator=None):
        for n, (first, last) in enumerate(zip(batch[keys.PTR][:-1], batch[keys.PTR][1:], strict=True)):
            arms = batch[keys.POS][first:last].detach() - batch[keys.POS][first].detach()
            if len(arms) > 1 and float(torch.linalg.svdvals(arms)[1]) < 1e-9:
                raise NoFrameError(f"frames: expected atoms that are not on a line, structure {n} is one")
        return super().frames(batch, group=group, scope=scope, l_max=l_max, generator=generator)


def plain(found):
    """As it is written down: strict JSON."""
    return json.loads(json.dumps(encode(found), allow_nan=False))


def worst(found):
    return max(value for value in found.values() if isinstance(value, float))


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_strict_json_and_the_same_again(name):
    cell = cell_of(ECSE())
    found = plain(MEASURES[name](cell))
    assert found
    if name in ("smoothness", "dynamics"):
        return  # long; of the same parts
    again = plain(MEASURES[name](cell))
    for one in (found, again):
        for key in ("time_ratio", "seconds_bare"):
            one.pop(key, None)
    assert found == again


@pytest.mark.parametrize("name", MEASURES)
def test_models_without_energies_get_what_applies(name):
    found = MEASURES[name](cell_of(ECSE(), backbone=toy(DIPOLE)))
    plain(found)
    if name in ("accuracy", "dynamics"):
        assert set(found) == {"skipped"}
    elif name in ("permutation", "determinism"):
        assert found["dipole"] < EXACT
    elif name == "equivariance":
        assert worst(found["rotations"]["dipole"]) < EXACT
    elif name == "smoothness":
        assert (found["output"], found["unit"]) == ("dipole", "e A")
        assert set(found["discontinuous"].values()) == {None}
    elif name == "locality":
        assert found["local_equivariance"] < EXACT


@pytest.mark.parametrize("name", [n for n in MEASURES if n not in ("dynamics", "smoothness")])
def test_crystals_and_single_precision(name):
    structures = [crystal("Si", "diamond", 5.43 + 0.1 * k, rattle=0.1, seed=k) for k in range(3)]
    backbone = toy().to(torch.float32)
    found = MEASURES[name](cell_of(ECSE(), backbone=backbone, structures=structures, dtype=torch.float32, sites=1))
    plain(found)
    if name == "equivariance":
        assert "stress" in found["rotations"]
        assert 1e-9 < worst(found["rotations"]["stress"]) < 1e-3
    elif name == "locality":
        assert found["size_consistency"] < 1e-3
        assert math.isnan(found["local_equivariance"])
    elif name == "symmetric":
        assert found["structures"]["silicon"]["error"] < EXACT


def test_sizes_are_checked():
    with pytest.raises(DeclarationError, match=r"sizes\.steps: expected a number of at least 0, got 1\.5"):
        size_of(cell_of(ECSE(), steps=1.5), "steps")
    with pytest.raises(DeclarationError, match="did you mean 'elements'"):
        size_of(cell_of(ECSE()), "element")
    cell = cell_of(ECSE())
    cell.sizes.clear()
    assert {name: size_of(cell, name) for name in SIZES} == dict(SIZES)


# --- accuracy -------------------------------------------------------------------------------------------------------


def own_values(cell):
    out = cell.model(cell.batch(), forces=True)
    return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


def test_accuracy_against_its_own_values():
    cell = cell_of(ECSE())
    references = own_values(cell)
    found = MEASURES["accuracy"](cell_of(ECSE(), references=references))
    assert found["symmetrized"]["energy"] == {"mae": 0.0, "rmse": 0.0, "unit": "meV/atom"}
    assert found["symmetrized"]["forces"]["rmse"] == 0.0
    assert found["bare"]["energy"]["mae"] > 1.0
    counts = torch.tensor([len(atoms) for atoms in cell.structures])
    shifted = {"energy": references["energy"] + 0.002 * counts.double(), "forces": references["forces"] + 0.003}
    found = MEASURES["accuracy"](cell_of(ECSE(), references=shifted))
    assert found["symmetrized"]["energy"]["mae"] == pytest.approx(2.0, rel=1e-9)
    assert found["symmetrized"]["forces"]["rmse"] == pytest.approx(3.0, rel=1e-9)


def test_accuracy_of_constants():
    """What a network has learned nothing beyond: no forces, the mean energy, the mean of anything else."""
    structures = [random_cluster(n, n) for n in (3, 4, 5)]
    counts = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    references = {
        "energy": counts * torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64),
        "forces": torch.tensor([[0.001, -0.002, 0.003]], dtype=torch.float64).repeat(12, 1),
    }
    found = MEASURES["accuracy"](cell_of(ECSE(), structures=structures, references=references))["constant"]
    assert found["energy"]["mae"] == pytest.approx(2000.0) and found["energy"]["unit"] == "meV/atom"
    assert found["forces"]["mae"] == pytest.approx(2.0)
    dipole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 3.0]], dtype=torch.float64)
    cell = cell_of(ECSE(), backbone=toy(DIPOLE), structures=structures, references={"dipole": dipole})
    found = MEASURES["accuracy"](cell)
    assert found["constant"]["dipole"]["mae"] == pytest.approx((2 / 3 + 4 / 3) / 3)
    assert found["bare"]["dipole"]["unit"] == found["constant"]["dipole"]["unit"]


def test_molecules_in_a_box_are_no_crystals():
    from ase.build import bulk, graphene, molecule

    boxed = molecule("CH4", vacuum=4.0, pbc=True)
    dimer = boxed.repeat((2, 1, 1))
    layer = graphene(vacuum=6.0)
    layer.pbc = True
    for atoms, expected in (
        (boxed, False),
        (dimer, False),
        (molecule("CH4"), False),
        (bulk("Cs"), True),
        (bulk("NaCl", "rocksalt", 5.64), True),
        (bulk("Si").repeat(2), True),
        (layer, True),
    ):
        assert are_crystals(cell_of(ECSE(), structures=[atoms])) == expected


def test_accuracy_of_other_quantities_and_of_nothing():
    cell = cell_of(ECSE(), backbone=toy(DIPOLE))
    dipole = cell.model(cell.batch())["dipole"] + 0.5
    cell = cell_of(ECSE(), backbone=toy(DIPOLE), references={"dipole": dipole, "forces": torch.zeros(1, 3)})
    found = MEASURES["accuracy"](cell)
    assert set(found["symmetrized"]) == {"dipole"}
    assert found["symmetrized"]["dipole"]["mae"] == pytest.approx(0.5)
    assert found["symmetrized"]["dipole"]["unit"] == "e A"
    assert "no reference" in MEASURES["accuracy"](cell_of(ECSE()))["skipped"]
    with pytest.raises(InvalidInputError, match=r"dipole: expected shape \(4, 3\), got \(4,\)"):
        MEASURES["accuracy"](cell_of(ECSE(), backbone=toy(DIPOLE), references={"dipole": dipole[:, 0]}))
    missing = {"energy": torch.full((4,), math.nan, dtype=torch.float64)}
    assert plain(MEASURES["accuracy"](cell_of(ECSE(), references=missing)))["bare"]["energy"]["mae"] == "nan"


# --- symmetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["atom", "structure"])
def test_equivariance_of_an_exact_method_and_of_none(scope):
    found = MEASURES["equivariance"](cell_of(ECSE(), scope=scope))
    bare = MEASURES["equivariance"](cell_of(Identity(), scope=scope))
    for kind in ("rotations", "inversion"):
        for output in ("energy", "forces"):
            assert 0.0 < found[kind][output]["rms"] <= found[kind][output]["max"] < EXACT
            assert bare[kind][output]["max"] > 1e-2


def test_rotations_alone_are_told_from_inversions():
    found = MEASURES["equivariance"](cell_of(ECSE(), group="SO(3)"))
    assert found["rotations"]["energy"]["max"] < EXACT
    assert found["inversion"]["energy"]["max"] > 1e-2


def test_variance():
    exact = MEASURES["variance"](cell_of(ECSE()))
    assert exact["symmetrized"]["energy"] < EXACT
    assert exact["bare"]["energy"] > 1e-2
    assert exact["elements"] == 48
    assert MEASURES["variance"](cell_of(ECSE(), group="SO(3)"))["elements"] == 24


def test_averaging_over_the_orientations_of_the_measure_does_not_look_exact(monkeypatch):
    cell = cell_of(GroupAveraging(degree=3))
    assert MEASURES["variance"](cell)["symmetrized"]["energy"] > 1e-3
    monkeypatch.setattr(symmetry, "_conjugated", lambda subject, on, behind: subject.model)
    assert MEASURES["variance"](cell)["symmetrized"]["energy"] < EXACT


def test_permutation():
    exact = MEASURES["permutation"](cell_of(ECSE()))
    assert worst(exact) < EXACT
    assert {"methane", "CO2"} <= set(exact["symmetric"])
    broken = MEASURES["permutation"](cell_of(OfFirstTwo(), scope="structure"))
    assert broken["energy"] > 1e-3
    assert MEASURES["equivariance"](cell_of(OfFirstTwo(), scope="structure"))["rotations"]["energy"]["max"] < EXACT


def test_symmetric_structures():
    found = MEASURES["symmetric"](cell_of(ECSE()))["structures"]
    bare = MEASURES["symmetric"](cell_of(Identity()))["structures"]
    assert list(found) == ["methane", "CO2", "benzene", "isolated atom"]
    for name, one in found.items():
        assert one["error"] < EXACT, name
        assert one["equivariance"] < EXACT, name
        assert (one["finite"], one["refused"]) == (True, None)
        if name != "isolated atom":  # has no direction that a toy could see
            assert bare[name]["error"] > 1e-3
            assert bare[name]["equivariance"] > 1e-3


def test_refused_structures_are_findings():
    found = MEASURES["symmetric"](cell_of(ECSE(fallback="error")))["structures"]
    assert found["methane"]["refused"] is None
    for name in ("CO2", "isolated atom"):
        assert found[name]["refused"].startswith("NoFrameError: ")
        assert math.isnan(found[name]["error"])
        assert not found[name]["finite"]
    left = MEASURES["permutation"](cell_of(ECSE(fallback="error"), structures=molecules()))
    assert "CO2" not in left["symmetric"]
    assert "methane" in left["symmetric"]


def test_frame_averaging_fails_on_methane():
    method = make_method("FrameAveraging")
    found = MEASURES["symmetric"](cell_of(method, scope="structure"))["structures"]["methane"]
    assert found["equivariance"] > 1e-3
    assert MEASURES["equivariance"](cell_of(method, scope="structure"))["rotations"]["energy"]["max"] < 1e-9


def test_determinism():
    assert worst(MEASURES["determinism"](cell_of(ECSE()))) == 0.0
    drawn = MEASURES["determinism"](cell_of(make_method("StochasticFrameAveraging"), scope="structure"))
    assert drawn["energy"] > 1e-3


# --- smoothness -----------------------------------------------------------------------------------------------------


def test_smooth_method_along_paths():
    found = MEASURES["smoothness"](cell_of(ECSE(), derivatives=1))
    assert list(found["ratio"]) == ["through the tetrahedron"]
    for name, scan in found["scans"].items():
        assert found["jump"][name] < 1e-8
        assert found["discontinuous"][name] is None
        assert found["ratio"][name] < 100.0
        assert found["kink"][name] < 1e-5
        assert len(scan["t"]) == len(scan["bare"]) == len(scan["symmetrized"]) == 31
        assert scan["bare"][0] == 0.0
        assert scan["bare"] != scan["symmetrized"]
    assert found["refused"] == {}


def test_the_bare_model_is_compared_with_itself():
    found = MEASURES["smoothness"](cell_of(Identity()))
    assert found["ratio"]["through the tetrahedron"] == pytest.approx(1.0, rel=1e-5)
    scan = found["scans"]["through the tetrahedron"]
    assert scan["symmetrized"] == pytest.approx(scan["bare"], abs=1e-12)


def test_frame_averaging_jumps_through_equal_eigenvalues():
    found = MEASURES["smoothness"](cell_of(make_method("FrameAveraging"), scope="structure"))
    assert found["discontinuous"]["through the tetrahedron"] == 0
    assert found["jump"]["through the tetrahedron"] > 1e-3
    assert found["ratio"]["through the tetrahedron"] > 1e3


def test_steep_is_not_a_jump():
    steep, sudden = (
        MEASURES["smoothness"](cell_of(Blend(width), scope="structure", group="SO(3)", points=61))
        for width in (3e-4, 0.0)
    )
    path = "through the tetrahedron"
    assert steep["discontinuous"][path] is None
    assert steep["jump"][path] < 1e-6
    assert steep["ratio"][path] > 10.0
    assert sudden["discontinuous"][path] == 0
    assert sudden["jump"][path] > 1e-3


def test_places_that_are_refused_are_nan_and_the_others_are_not():
    found = MEASURES["smoothness"](cell_of(NoLines(), scope="structure", paths=2, points=17))
    assert list(found["refused"]) == ["bending CO2"]
    assert "NoFrameError" in found["refused"]["bending CO2"]
    values = found["scans"]["bending CO2"]["symmetrized"]
    assert math.isnan(values[8])
    assert all(math.isfinite(x) for n, x in enumerate(values) if n != 8)
    assert all(math.isfinite(x) for x in found["scans"]["bending CO2"]["bare"])
    assert math.isnan(found["ratio"]["bending CO2"])
    assert math.isfinite(found["ratio"]["through the tetrahedron"])
    assert plain(found)["jump"]["bending CO2"] == "nan"


def test_scans_are_thinned():
    found = MEASURES["smoothness"](cell_of(Identity(), points=301))
    scan = found["scans"]["through the tetrahedron"]
    assert len(scan["t"]) == 200
    assert (scan["t"][0], scan["t"][-1]) == (0.0, 1.0)


# --- dynamics -------------------------------------------------------------------------------------------------------


def molecules(name="ethanol"):
    return [geometries()[name] for _ in range(2)]


def test_dynamics_of_an_exact_method_and_of_none():
    exact = MEASURES["dynamics"](cell_of(ECSE(), structures=molecules()))
    bare = MEASURES["dynamics"](cell_of(Identity(), structures=molecules()))
    assert exact["angular_momentum"] < 1e-9
    assert bare["angular_momentum"] > 1e-2
    for found in (exact, bare):
        assert found["forces"] < 1e-6
        assert len(found["series"]["t"]) == len(found["series"]["energy"]) == 9
        assert found["series"]["energy"][0] == 0.0
        assert found["extrapolated"] < 1e-2


def test_energies_that_jump_are_seen_by_the_forces():
    found = MEASURES["dynamics"](
        cell_of(make_method("StochasticFrameAveraging"), scope="structure", structures=molecules())
    )
    assert found["forces"] > 1e-2
    assert found["extrapolated"] > 1e-3


def test_series_are_thinned(monkeypatch):
    monkeypatch.setattr(dynamics, "_KEPT", 10)
    found = MEASURES["dynamics"](
        cell_of(Identity(), structures=molecules("water"), steps=41, nve_steps=0, directions=0)
    )
    assert 5 < len(found["series"]["t"]) <= 10
    assert "forces" not in found
    assert found["steps"] == 41


# --- locality and cost ----------------------------------------------------------------------------------------------


def test_locality_of_scopes():
    atom, structure = (MEASURES["locality"](cell_of(ECSE(), scope=scope)) for scope in ("atom", "structure"))
    assert atom["size_consistency"] < EXACT
    assert atom["local_equivariance"] < EXACT
    assert atom["box"]["size_consistency"] < EXACT
    assert atom["distance"] == 5.0
    assert structure["size_consistency"] > 1e-4
    assert structure["local_equivariance"] > 1e-4
    assert "is periodic" in structure["box"]["refused"]
    assert math.isnan(structure["box"]["size_consistency"])


def test_pairs_that_are_refused_are_findings():
    lines = [geometries()["CO2"], geometries()["HCN"]]
    found = MEASURES["locality"](cell_of(ECSE(fallback="error"), structures=lines))
    assert "NoFrameError" in found["refused"]
    assert math.isnan(found["size_consistency"])


def test_cost_counts_what_is_evaluated():
    cell = cell_of(ECSE(), structures=[random_cluster(6, seed) for seed in range(3)])
    found = MEASURES["cost"](cell)
    frames = cell.model.frames(cell.batch())
    assert found["evaluations_per_structure"] == frames.n_evaluations / 3
    assert found["evaluations_per_center"] == frames.n_evaluations / 18
    assert found["evaluations_max"] == int(frames.evaluations.max())
    assert found["time_ratio"] > 0.0
    whole = MEASURES["cost"](cell_of(GroupAveraging(degree=3), scope="structure"))
    assert whole["evaluations_per_structure"] == whole["evaluations_per_center"] == 48.0


def test_memory_is_counted_and_the_same_again():
    few, many = (MEASURES["cost"](cell_of(GroupAveraging(degree=d), scope="structure")) for d in (1, 5))
    again = MEASURES["cost"](cell_of(GroupAveraging(degree=5), scope="structure"))
    assert many["peak_memory_mib"] == again["peak_memory_mib"]
    assert 1.0 < few["peak_memory_ratio"] < many["peak_memory_ratio"]
    assert MEASURES["cost"](cell_of(Identity()))["peak_memory_ratio"] == pytest.approx(1.0)


# --- baselines ------------------------------------------------------------------------------------------------------


class WithBaseline(Interaction):
    """Plus a large constant for every atom."""

    def __init__(self, backbone, constant):
        super().__init__(backbone, lambda batch: {"energy": constant * torch.ones_like(batch[keys.POS][:, 0])})


def test_baselines_cost_no_digits():
    backbone = WithBaseline(toy(), 1e7)
    cell = cell_of(ECSE(), backbone=backbone)
    assert MEASURES["equivariance"](cell)["rotations"]["energy"]["max"] < EXACT
    batch = cell.batch()
    energies = [cell.model(batch)["energy"], without_baseline(cell.model)(batch)["energy"]]
    constant = 1e7 * torch.tensor([len(atoms) for atoms in cell.structures])
    torch.testing.assert_close(energies[0] - constant, energies[1], rtol=0.0, atol=1e-6)
    # What is left of the digits with the constant in it.
    shift = cell.model(batch)["energy"] - constant - energies[1]
    assert float(shift.detach().abs().max()) > 1e-12


def test_models_are_not_put_into_training_mode():
    cell = cell_of(ECSE())
    on = stage(cell)
    assert not any(module.training for module in cell.model.modules())
    assert on.model.symmetrizer is not None
    assert not on.model.symmetrizer.training


def test_auxiliary_models_keep_their_place():
    own, other = WithBaseline(toy(), 100.0), WithBaseline(toy(seed=5), 103.0)
    model = Symmetrizer(own, ECSE(fallback=other), scope="atom").eval()
    before = copy.deepcopy(model.method.state_dict())
    batch = from_ase([geometries()[name] for name in ("CO2", "methane", "isolated atom")])
    counts = torch.tensor([3.0, 5.0, 1.0], dtype=torch.float64)
    expected = model(batch)["energy"] - 100.0 * counts
    torch.testing.assert_close(without_baseline(model)(batch)["energy"], expected, rtol=0.0, atol=1e-9)
    assert model.method.auxiliary is other
    assert before.keys() == model.method.state_dict().keys()
