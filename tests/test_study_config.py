"""Studies as files: what is refused and where, which structures are evaluated, what a cell depends on."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from hypothesis import given, settings
from hypothesis import strategies as st

from symmetrize.errors import InvalidInputError
from symmetrize.methods import SUMMARIES
from symmetrize.representations import OutputSpec
from symmetrize.study import DataEntry, StudyError, load_study
from symmetrize.study.backbones import training_recipe
from symmetrize.study.run import make_plan
from symmetrize.study.specs import Specs, list_cells
from symmetrize.study.structures import chosen, find_file, references
from symmetrize.testing.structures.geometries import ethanol
from symmetrize.training.config import DataRecipe
from symmetrize.training.dataset import split

STUDY = {
    "name": "small",
    "seeds": [0, 1],
    "data": {"molecules": {"path": "molecules.xyz", "test": 3}, "others": {"path": "others.xyz"}},
    "backbones": {"toy": {"name": "toy:local"}, "wide": {"name": "toy", "options": {"seed": 1}, "data": ["others"]}},
    "methods": {
        "bare": {"name": "Identity"},
        "ECSE": {"name": "ECSE", "group": "O(3)"},
        "averaging": {"name": "GroupAveraging", "degree": 2, "curve": "averaging"},
    },
    "measures": ["accuracy", "cost"],
    "sizes": {"structures": 2},
}
RECIPE = {
    "data": {"set": "molecules", "train": 2, "validation": 1},
    "backbone": {"name": "pet"},
    "epochs": 1,
}


def changed(*path, to=None, base=STUDY):
    """The study with one entry replaced, or left out."""
    out = copy.deepcopy(base)
    inner = out
    for name in path[:-1]:
        inner = inner[name]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return out


@pytest.fixture
def folder(tmp_path):
    """A folder with both data sets of the study."""
    for n, name in enumerate(("molecules", "others")):
        write_molecules(tmp_path / f"{name}.xyz", 6, seed=n)
    return tmp_path


def write_molecules(path, count, seed=0, **results):
    rng = np.random.default_rng(seed)
    items = []
    for n in range(count):
        atoms = ethanol()
        atoms.positions += 0.05 * rng.normal(size=(9, 3))
        values = {"energy": float(n), "forces": rng.normal(size=(9, 3))} | results
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in values.items() if v is not None})
        items.append(atoms)
    write(path, items, format="extxyz")


def save(folder, content):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where", "hint"),
    [
        (changed("mehtods", to={}), "mehtods", "methods"),
        (changed("data", "molecules", "pth", to="a"), "data.molecules.pth", "path"),
        (changed("data", "molecules", "test", to=-1), "data.molecules.test", "positive"),
        (changed("data", "molecules", "test", to="3"), "data.molecules.test", "int"),
        (changed("data", "molecules", "held_out", to=1), "data.molecules.held_out", "3"),
        (changed("data", to={}), "data", "at least one"),
        (changed("backbones", "toy", "nmae", to="a"), "backbones.toy.nmae", "name"),
        (changed("backbones", "toy", "name"), "backbones.toy", "either a name or a section train"),
        (changed("backbones", "toy", "data", to=["molecule"]), "backbones.toy.data[0]", "'molecules'"),
        (changed("backbones", "toy", "data", to=[]), "backbones.toy.data", "at least one"),
        (changed("backbones", "toy", "scope", to="atoms"), "backbones.toy.scope", "'atom'"),
        (changed("methods", "ECSE", "name", to="ESCE"), "methods.ECSE.name", "'ECSE'"),
        (changed("methods", "ECSE", "name"), "methods.ECSE.name", "expected an entry"),
        (changed("methods", "averaging", "degre", to=3), "methods.averaging.degre", "'degree'"),
        (changed("methods", "averaging", "degree", to=-1), "methods.averaging", "integer of at least 0"),
        (changed("methods", "ECSE", "group", to="O3"), "methods.ECSE.group", "'O(3)'"),
        (changed("measures", to=["acuracy"]), "measures[0]", "'accuracy'"),
        (changed("measures", to=3), "measures", "list"),
        (changed("sizes", "structure", to=3), "sizes.structure", "'structures'"),
        (changed("seeds", to=[0, 0]), "seeds", "different"),
        (changed("seeds", to=[True]), "seeds[0]", "int"),
        (changed("dtype", to="float16"), "dtype", "'float64'"),
        (changed("name", to="a/b"), "name", "folder"),
        (changed("skip", to=[{"method": "ECES", "reason": "r"}]), "skip[0].method", "'ECSE'"),
        (changed("skip", to=[{"method": "ECSE"}]), "skip[0].reason", "expected an entry"),
        (changed("skip", to=[{"reason": "r"}]), "skip[0]", "a reason only"),
        (changed("profiles", to={"small": {"sizes": {"structre": 1}}}), "profiles.small: sizes.structre", "structures"),
    ],
)
def test_mistakes_are_named_with_their_place(content, where, hint):
    load_study(STUDY)
    with pytest.raises(StudyError) as caught:
        load_study(content)
    assert str(caught.value).startswith(where) and hint in str(caught.value)


def test_mistakes_of_the_study_are_not_put_down_to_its_profiles():
    content = changed("sizes", "structure", to=3)
    content["profiles"] = {"small": {"sizes": {"points": 16}}}
    for profile in (None, "small"):
        with pytest.raises(StudyError, match=r"^sizes\.structure: unknown size"):
            load_study(content, profile)


def with_recipe(**changes):
    return changed("backbones", "toy", to={"train": {**RECIPE, **changes}})


@pytest.mark.parametrize(
    ("content", "where", "hint"),
    [
        (with_recipe(epoch=3), "backbones.toy.train.epoch", "'epochs'"),
        (with_recipe(seed=3), "backbones.toy.train.seed", "every seed"),
        (with_recipe(data={"set": "molecule", "train": 1, "validation": 1}), "backbones.toy.train.data.set", "molecu"),
        (with_recipe(data={"train": 1, "validation": 1}), "backbones.toy.train.data.set", "expected an entry"),
        (with_recipe(data={**RECIPE["data"], "path": "x"}), "backbones.toy.train.data.path", "unknown entry"),
        (with_recipe(data={**RECIPE["data"], "train": 0}), "backbones.toy.train.data.train", "positive"),
        (changed("data", "molecules", "test", base=with_recipe()), "data.molecules.test", "hold out"),
    ],
)
def test_mistakes_in_recipes_are_named_with_their_place(content, where, hint):
    load_study(with_recipe())
    with pytest.raises(StudyError) as caught:
        load_study(content)
    assert str(caught.value).startswith(where) and hint in str(caught.value)


def test_files_that_are_no_studies(tmp_path):
    path = tmp_path / "study.yaml"
    with pytest.raises(StudyError, match="there is none"):
        load_study(path)
    path.write_text("name: [")
    with pytest.raises(StudyError, match="no valid YAML"):
        load_study(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(StudyError, match="expected sections"):
        load_study(path)
    path.write_text("name: a\nmethods:\n  x: {name: Identity}\n  x: {name: ECSE}\n")
    with pytest.raises(StudyError, match="x: expected one entry of this name, got another one in line 4"):
        load_study(path)


def test_numbers_in_exponential_notation_are_numbers(tmp_path):
    path = save(tmp_path, STUDY)
    path.write_text(path.read_text().replace("group: O(3)", "cutoff_width: 5e-1"), encoding="utf-8")
    assert load_study(path).methods["ECSE"].options == {"cutoff_width": 0.5}


def test_profiles_replace_entries_and_null_removes_them():
    profiles = {
        "small": {"seeds": [0], "sizes": {"elements": 2}, "data": {"molecules": {"test": 1}}, "methods": {"bare": None}}
    }
    plain = load_study({**STUDY, "profiles": profiles})
    small = load_study({**STUDY, "profiles": profiles}, "small")
    assert plain.seeds == [0, 1] and small.seeds == [0] and small.profile == "small"
    assert small.sizes == {"structures": 2, "elements": 2}
    assert small.data["molecules"] == DataEntry("molecules.xyz", test=1)
    assert list(small.methods) == ["ECSE", "averaging"]
    with pytest.raises(StudyError, match="profiles: unknown profile 'smal', did you mean 'small'"):
        load_study({**STUDY, "profiles": profiles}, "smal")


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_missing_file_says_where_to_get_it(folder):
    (folder / "others.xyz").unlink()
    content = changed("data", "others", "source", to="https://example.org/others.xyz")
    with pytest.raises(InvalidInputError, match=r"data\.others\.path: .*https://example\.org/others\.xyz.*--data"):
        make_plan(load_study(save(folder, content)), folder / "run")


def test_a_missing_property_names_file_key_and_what_there_is(folder):
    content = changed("data", "others", "properties", to={"energy": "energie"})
    with pytest.raises(InvalidInputError, match=r"others\.xyz: structure \d: .*'energie', got \['energy', 'forces'\]"):
        make_plan(load_study(save(folder, content)), folder / "run")
    write_molecules(folder / "others.xyz", 2, forces=None)
    make_plan(load_study(save(folder, STUDY)), folder / "run")  # nobody asked for forces
    with pytest.raises(InvalidInputError, match=r"expected a reference value 'forces', got \['energy'\]"):
        make_plan(load_study(save(folder, changed("data", "others", "forces", to="forces"))), folder / "run")


def test_too_few_structures(folder):
    with pytest.raises(InvalidInputError, match=r"data\.molecules\.test: expected at most 6 structures, got 7"):
        make_plan(load_study(save(folder, changed("data", "molecules", "test", to=7))), folder / "run")


def test_unknown_backbones_and_their_options(folder):
    with pytest.raises(StudyError, match=r"backbones\.toy\.name: .*unknown backbone 'tyo', did you mean 'toy'"):
        make_plan(load_study(save(folder, changed("backbones", "toy", "name", to="tyo"))), folder / "run")
    for options in ({"knd": "local"}, {"kind": 1}):
        content = changed("backbones", "wide", "options", to=options)
        with pytest.raises(StudyError, match=r"backbones\.wide.*: TypeError: "):
            make_plan(load_study(save(folder, content)), folder / "run")


def test_properties_that_no_backbone_predicts(folder):
    content = changed("data", "others", "properties", to={"dipole": "energy"})
    with pytest.raises(StudyError, match=r"data\.others\.properties\.dipole: expected an output of one of"):
        make_plan(load_study(save(folder, content)), folder / "run")


def test_data_is_searched_in_subfolders_and_has_to_be_the_right_file(folder):
    inner = folder / "data" / "deep"
    inner.mkdir(parents=True)
    (folder / "molecules.xyz").rename(inner / "molecules.xyz")
    entry = DataEntry("molecules.xyz")
    with pytest.raises(InvalidInputError, match="there is none"):
        find_file("m", entry, folder)
    found = find_file("m", entry, folder, folder / "data")
    assert found.path.name == "molecules.xyz"
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert find_file("m", DataEntry("molecules.xyz", sha256=found.sha256[:8]), folder, folder / "data") == found
    with pytest.raises(InvalidInputError, match=r"data\.m\.sha256: expected 1234"):
        find_file("m", DataEntry("molecules.xyz", sha256="1234"), folder, folder / "data")
    write_molecules(folder / "data" / "molecules2.xyz", 2, seed=7)
    (folder / "data" / "other").mkdir()
    (folder / "data" / "molecules2.xyz").rename(folder / "data" / "other" / "molecules.xyz")
    with pytest.raises(InvalidInputError, match="expected one file"):
        find_file("m", entry, folder, folder / "data")
    with pytest.raises(InvalidInputError, match="--data: expected a folder"):
        find_file("m", entry, folder, folder / "nowhere")
    with pytest.raises(InvalidInputError, match="unknown bundled data 'ethnol', did you mean 'ethanol'"):
        find_file("m", DataEntry("bundled:ethnol"), folder)
    assert find_file("m", DataEntry("bundled:ethanol"), folder).path.is_file()


def test_references_are_rows_of_outputs():
    atoms = [ethanol(), ethanol()]
    for n, a in enumerate(atoms):
        a.info.update(energy=float(n), mu=np.arange(3.0) + n, alpha=np.arange(9.0))
        a.arrays["charge"] = np.ones(9)
        a.calc = SinglePointCalculator(a, forces=np.full((9, 3), float(n)))
    outputs = {
        "energy": OutputSpec("0e", per="atom", reduce="sum"),
        "dipole": OutputSpec("1o", per="structure", unit="D"),
        "polarizability": OutputSpec(cartesian="ij=ji", per="structure"),
        "q": OutputSpec("0e", per="atom"),
    }
    entry = DataEntry("", properties={"dipole": "mu", "polarizability": "alpha", "q": "charge", "absent": "mu"})
    found, units = references("d", entry, atoms, outputs)
    shapes = {name: tuple(rows.shape) for name, rows in found.items()}
    assert shapes["energy"] == (2,) and shapes["forces"] == (18, 3) and shapes["polarizability"] == (2, 3, 3)
    assert shapes["dipole"] == (2, 3) and shapes["q"] == (18,) and "absent" not in shapes
    assert units == {"energy": "eV", "forces": "eV/angstrom", "dipole": "D", "polarizability": "", "q": ""}
    assert torch.equal(found["dipole"][1], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    without = {name: spec for name, spec in outputs.items() if name != "energy"}
    assert set(references("d", entry, atoms, without)[0]) == {"dipole", "polarizability", "q"}
    atoms[1].info["mu"] = np.arange(4.0)
    with pytest.raises(InvalidInputError, match=r"data\.d: structure 1 .*: mu: expected shape"):
        references("d", entry, atoms, outputs)


# --- held out --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    n_structures=st.integers(9, 60),
    test=st.integers(1, 4),
    more=st.integers(0, 2),
    seed=st.integers(0, 5),
    other=st.integers(1, 4),
)
def test_what_is_evaluated_is_never_trained_on(n_structures, test, more, seed, other):
    data = {
        "molecules": {"path": "m.xyz", "test": test, "held_out": test + more, "split_seed": seed},
        "again": {"path": "m.xyz", "test": other, "split_seed": seed},
    }
    content = {**STUDY, "data": data, "backbones": {"net": {"train": RECIPE}}}
    study = load_study(content)
    recipe = DataRecipe(**training_recipe(study, "net", 0)["data"])
    parts = split(n_structures, recipe)
    seen = {*parts.train.tolist(), *parts.validation.tolist()}
    assert len(seen) == 3
    for entry in study.data.values():
        assert not seen & set(chosen(entry, n_structures, "m"))
    # Twin: with nothing held out, training takes what is evaluated.
    careless = split(n_structures, DataRecipe(path="", train=2, validation=1, test=0, split_seed=seed))
    assert set(careless.validation.tolist()) <= set(chosen(study.data["molecules"], n_structures, "m"))


def test_data_sets_of_one_file_have_to_be_split_alike():
    data = {
        "molecules": {"path": "m.xyz", "test": 2, "split_seed": 0},
        "again": {"path": "m.xyz", "test": 2, "split_seed": 1},
    }
    with pytest.raises(StudyError, match=r"data\.again\.split_seed: expected 0"):
        load_study({**STUDY, "data": data, "backbones": {"net": {"train": RECIPE}}})


def test_training_structures_are_found_in_any_file(folder):
    frames = read(folder / "molecules.xyz", ":")
    recipe = training_recipe(load_study(with_recipe()), "toy", 0)
    parts = split(len(frames), DataRecipe(**recipe["data"]))
    held_out = [frames[n] for n in parts.test.tolist()]
    content = changed("data", "others", to={"path": "copy.xyz"}, base=with_recipe())
    write(folder / "copy.xyz", held_out, format="extxyz")
    make_plan(load_study(save(folder, content)), folder / "run")
    for leaked in (parts.train, parts.validation):
        write(folder / "copy.xyz", [*held_out, frames[int(leaked[0])]], format="extxyz")
        with pytest.raises(StudyError, match=r"backbones\.toy\.train: .* structure 3 of 'others' in it \(1 in all\)"):
            make_plan(load_study(save(folder, content)), folder / "run")


# --- cells and keys --------------------------------------------------------------------------------------------------


def keys(folder, content):
    study = load_study(save(folder, content))
    maker = Specs(study, folder / "run")
    return {cell.title: maker.spec(cell)["key"] for cell in list_cells(study) if not cell.skip}


def test_cells_are_all_combinations_that_are_not_skipped():
    skip = [{"method": ["ECSE"], "data": "others", "reason": "too slow"}, {"backbone": "wide", "reason": "no"}]
    cells = list_cells(load_study({**STUDY, "skip": skip}))
    assert len(cells) == 2 * (2 * 3 + 1 * 3) and len({cell.title for cell in cells}) == len(cells)
    for cell in cells:
        expected = "no" if cell.labels["backbone"] == "wide" else ""
        if cell.labels["method"] == "ECSE" and cell.labels["data"] == "others":
            expected = "too slow"
        assert cell.skip == expected
    assert {cell.labels["curve"] for cell in cells if cell.labels["method"] == "averaging"} == {"averaging"}


@pytest.mark.parametrize(
    ("path", "to", "affected"),
    [
        (("methods", "new"), {"name": "GroupAveraging", "degree": 1}, lambda title: False),
        (("methods", "averaging", "curve"), "other", lambda title: False),
        (("data", "others", "source"), "https://example.org", lambda title: False),
        (("data", "others", "held_out"), 3, lambda title: False),
        (("methods", "averaging", "degree"), 3, lambda title: "averaging" in title),
        (("methods", "averaging", "group"), "SO(3)", lambda title: "averaging" in title),
        (("data", "molecules", "test"), 2, lambda title: "molecules" in title),
        (("data", "molecules", "split_seed"), 2, lambda title: "molecules" in title),
        (("data", "others", "forces"), "forces", lambda title: "others" in title),
        (("backbones", "wide", "options"), {"seed": 2}, lambda title: "wide" in title),
        (("backbones", "toy", "scope"), "structure", lambda title: title.startswith("toy")),
        (("measures",), ["accuracy"], lambda title: True),
        (("sizes", "structures"), 3, lambda title: True),
        (("dtype",), "float32", lambda title: True),
    ],
)
def test_a_key_depends_on_what_concerns_the_cell_and_on_nothing_else(folder, path, to, affected):
    before, after = keys(folder, STUDY), keys(folder, changed(*path, to=to))
    assert len(set(before.values())) == len(before) and set(before) <= set(after)
    for title, key in before.items():
        assert (after[title] != key) == affected(title), title


def test_a_key_depends_on_the_content_of_files_and_not_on_their_place(folder, tmp_path_factory):
    before = keys(folder, STUDY)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("molecules.xyz", "others.xyz"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    assert keys(elsewhere, STUDY) == before
    write_molecules(elsewhere / "others.xyz", 6, seed=9)
    after = keys(elsewhere, STUDY)
    assert {title for title in before if before[title] != after[title]} == {t for t in before if "others" in t}


def test_a_trained_backbone_is_one_per_seed_and_recipe(folder):
    def folders(content):
        study = load_study(save(folder, content))
        maker = Specs(study, folder / "run")
        return [maker.spec(cell)["backbone"].get("folder") for cell in list_cells(study)]

    found = [name for name in folders(with_recipe()) if name is not None]
    assert len(found) == 2 * 2 * 3 and len(set(found)) == 2
    assert set(found) == set(folders(with_recipe(trainer={"accelerator": "cpu"}))) - {None}
    assert not set(found) & set(folders(with_recipe(epochs=2)))


def test_an_option_may_be_a_backbone(folder):
    content = changed("methods", "ECSE", "fallback", to={"backbone": "toy:local", "seed": 3})
    study = load_study(save(folder, content))
    before, other = (
        keys(folder, content),
        changed("methods", "ECSE", "fallback", to={"backbone": "toy:local", "seed": 4}),
    )
    assert study.methods["ECSE"].options == {"fallback": {"backbone": "toy:local", "seed": 3}}
    after = keys(folder, other)
    assert all((before[title] != after[title]) == ("ECSE" in title) for title in before)


@pytest.mark.parametrize("profile", [None, "small", "full"])
def test_the_study_that_is_shipped_can_be_read(profile):
    folder = Path(__file__).parent.parent / "examples" / "studies" / "methods-2026"
    study = load_study(folder / "study.yaml", profile)
    assert {entry.name for entry in study.methods.values()} >= set(SUMMARIES) - {"SampledFrames", "Anchored"}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(entry.path.removeprefix("bundled:") in readme for entry in study.data.values())
