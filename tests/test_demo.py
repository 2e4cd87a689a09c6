"""The demo: what it measures, what it writes, and that it leaves nothing half done."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from symmetrize.backbones.pet import PET, PETConfig, shipped

import symmetrize.demo.run as running
from symmetrize.demo import SCHEMA, SCHEMA_VERSION, DemoResult, Subject, run_demo
from symmetrize.demo.results import Trajectory
from symmetrize.demo.subjects import SHIPPED
from symmetrize.demo.table import all_tables, as_markdown, as_text
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.files import write_text
from symmetrize.report import Table, number, render_demo

SECTIONS = ("summary", "table", "histograms", "frames", "scan", "dynamics", "provenance")


def _subjects(dtype: torch.dtype = torch.float64) -> list[Subject] | None:
    """The shipped models, or small random ones where there are none yet."""
    if {name for _, name, _ in SHIPPED} <= set(shipped()):
        return None
    sizes = {"d_pet": 16, "d_node": 16, "d_head": 16, "d_feedforward": 16, "num_attention_layers": 1}
    return [
        Subject(label, PET(PETConfig((1, 6, 8), num_gnn_layers=n, **sizes), seed=n).to(dtype).eval(), scope)
        for n, (label, _, scope) in enumerate(SHIPPED, start=1)
    ]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(
        tmp_path_factory.mktemp("runs") / "demo",
        n_structures=3,
        n_elements=2,
        n_steps=20,
        progress=False,
        subjects=_subjects(),
    )


@pytest.fixture(scope="module")
def page(result: DemoResult) -> str:
    assert result.report is not None
    return result.report.read_text(encoding="utf-8")


def test_symmetrized_models_are_exact_and_bare_ones_far_from_it(result: DemoResult) -> None:
    assert result.exact
    assert len(result.rows) == 6
    for row in result.rows:
        for kind in ("rotation", "inversion"):
            error = getattr(row, kind)
            assert error.energy.shape == error.force.shape == (2, 3)
            exact = row.treatment == "O(3)" or (row.treatment, kind) == ("SO(3)", "rotation")
            for value in (error.energy_max_relative, error.force_max_relative):
                assert np.isfinite(value)
                assert value <= result.tolerance if exact else value > 1e6 * result.tolerance


def test_units_and_scales_agree(result: DemoResult) -> None:
    for row in result.rows:
        error = row.rotation
        assert error.energy_max == pytest.approx(error.energy_max_relative * result.scales["energy"])
        assert error.force_rms == pytest.approx(error.force_rms_relative * result.scales["force"])
        assert error.energy_max == pytest.approx(error.energy.max())
        assert error.force_rms == pytest.approx(np.sqrt(np.mean(error.force**2)))
        assert error.force_max >= error.force_rms > 0.0


def test_costs_are_counted(result: DemoResult) -> None:
    for label in result.labels:
        bare, proper, full = (result.row(label, t) for t in ("bare", "SO(3)", "O(3)"))
        assert bare.evaluations == 1.0 and bare.ratio == 1.0
        assert proper.evaluations >= 1.0
        assert full.evaluations == pytest.approx(2.0 * proper.evaluations)
    for counts in result.counts:
        assert counts.weight_min >= 1.0 - 1e-12
        owners = sum(map(len, counts.evaluations.values()))
        assert owners == (27 if counts.scope == "atom" else 3)
        total = sum(map(sum, counts.evaluations.values()))
        assert total / owners == pytest.approx(result.row(counts.label, "SO(3)").evaluations)


def test_dynamics_conserve_angular_momentum_only_when_symmetrized(result: DemoResult) -> None:
    bare, full = result.dynamics["bare"], result.dynamics["O(3)"]
    np.testing.assert_array_equal(bare.angular_momentum[0], full.angular_momentum[0])
    assert np.linalg.norm(bare.angular_momentum[0]) > 1.0
    assert len(bare.time) == 21 and bare.time[-1] == pytest.approx(10.0)
    assert full.turned < 1e-10 and full.stretched < 1e-12
    assert bare.turned > 1e4 * full.turned
    assert np.abs(full.energy).max() < 100.0


def test_scan_is_flat_where_it_should_be(result: DemoResult) -> None:
    curves = {curve.treatment: curve for curve in result.scan.curves}
    spread = {name: np.ptp(curve.energy, axis=1) for name, curve in curves.items()}
    limit = result.tolerance * result.scales["energy"]
    assert (spread["bare"] > 1e6 * limit).all()
    assert (spread["SO(3)"] < limit).all() and (spread["O(3)"] < limit).all()
    assert np.abs(curves["SO(3)"].energy[1]).max() > 1e6 * limit
    assert np.abs(curves["O(3)"].energy).max() < limit


def test_drawing_holds_frames_of_atoms_and_centroid(result: DemoResult) -> None:
    drawing = result.drawing
    assert len(drawing.owners) == len(drawing.symbols) + 1
    assert len(drawing.bonds) == 8  # ethanol
    for owner in drawing.owners:
        assert sum(frame["weight"] for frame in owner["frames"]) == pytest.approx(1.0)
        for frame in owner["frames"]:
            axes = frame["axes"]
            np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
            first = drawing.positions[int(re.sub(r"\D", "", frame["made_from"][0])) - 1] - owner["origin"]
            np.testing.assert_allclose(axes[0], first / np.linalg.norm(first), atol=1e-9)


def test_results_are_complete_json(result: DemoResult) -> None:
    assert result.output is not None
    content = json.loads((result.output / "results.json").read_text(encoding="utf-8"))
    assert (content["schema"], content["schema_version"]) == (SCHEMA, SCHEMA_VERSION)
    assert content["exact"] is True
    assert len(content["rows"]) == 6
    assert content["rows"][0]["rotation"]["force_max"] == result.rows[0].rotation.force_max
    assert content["provenance"]["seed"] == 0
    assert str(result.output) not in json.dumps(content)


def test_tables_show_every_model(result: DemoResult) -> None:
    text, markdown = as_text(result), as_markdown(result)
    assert max(map(len, text.splitlines())) <= 120
    for row in result.rows:
        name = row.treatment if row.treatment == "bare" else f"ECSE {row.treatment}"
        assert text.count(f"{row.label}, {row.scope}: {name} ") == 3
    assert markdown.count("| :-- |") == len(all_tables(result))
    assert result.output is not None
    assert (result.output / "table.md").read_text(encoding="utf-8") == markdown


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.loaded: list[str] = []
        self.identifiers: list[str] = []
        self.figures = self.captions = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.identifiers += [values["id"] or ""] if "id" in values else []
        self.sections += [values.get("id") or ""] if tag == "section" else []
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"
        self.loaded += [
            value or "" for name, value in attributes if name in ("src", "href", "data") and tag not in ("a", "use")
        ]


def test_page_has_every_section_and_loads_nothing(page: str) -> None:
    found = _Page()
    found.feed(page)
    assert tuple(found.sections) == SECTIONS
    assert found.figures == found.captions >= 11
    assert found.loaded == []
    assert len(found.identifiers) == len(set(found.identifiers))
    assert "url(" not in page.replace("url(#", "") and "@import" not in page
    assert set(re.findall(r"https?://[^\"<\s]+", page)) <= {
        "https://github.com/metatensor/metatrain",
        "https://arxiv.org/abs/2305.19302",
    }
    assert re.sub(r'<a href="https?://[^"]+">', "", page).count('"http') == 0
    assert not re.search(r"\b(nan|not finite)\b", page.lower())
    json.loads(re.search(r'id="molecule-data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]


def test_page_says_so_when_a_model_is_not_exact(result: DemoResult, page: str) -> None:
    worse = dataclasses.replace(result, tolerance=1e-30)
    assert not worse.exact
    failed = render_demo(worse, all_tables(worse))
    assert "Not exact." in failed and 'class="tile failed"' in failed
    assert "Not exact." not in page and 'class="tile failed"' not in page


def test_an_error_that_is_no_number_is_not_exact(result: DemoResult) -> None:
    row = result.row(result.labels[0], "O(3)")
    broken = dataclasses.replace(row, rotation=dataclasses.replace(row.rotation, force_max_relative=float("nan")))
    assert not dataclasses.replace(result, rows=[broken]).exact
    assert not dataclasses.replace(result, rows=[]).exact


def test_nothing_is_written_when_interrupted(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    options = {"n_structures": 2, "n_elements": 1, "n_steps": 1, "progress": False, "subjects": _subjects()}
    monkeypatch.setattr(running, "scan_rotation", interrupt)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", **options)
    assert torch.get_num_threads() == before
    assert list((tmp_path / "demo").iterdir()) == []


def test_files_are_written_at_once_or_not_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "report.html"
    write_text(path, "old")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("symmetrize.files.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_structures": 1}, "n_structures"),
        ({"n_elements": 0}, "n_elements"),
        ({"n_steps": 0}, "n_steps"),
        ({"dtype": "float16"}, "float16"),
        ({"subjects": []}, "subjects"),
    ],
)
def test_arguments_out_of_range(tmp_path, options: dict, message: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    with pytest.raises(DeclarationError, match=message):
        run_demo(tmp_path, progress=False, **options)


def test_structures_without_reference(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from importlib.resources import files

    structures = read(str(files("symmetrize.demo") / "data" / "ethanol-test.xyz"), ":2")
    for atoms in structures:
        atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    write(tmp_path / "no-forces.xyz", structures)
    with pytest.raises(InvalidInputError, match="structure 0: expected a finite reference 'forces'"):
        run_demo(tmp_path / "demo", structures=tmp_path / "no-forces.xyz", progress=False)
    with pytest.raises(InvalidInputError, match="expected a file"):
        run_demo(tmp_path / "demo", structures=tmp_path / "absent.xyz", progress=False)
    (tmp_path / "cut.xyz").write_text("3\ncut off\nC 0 0\n")
    with pytest.raises(InvalidInputError, match=r"cut\.xyz"):
        run_demo(tmp_path / "demo", structures=tmp_path / "cut.xyz", progress=False)
    with pytest.raises(InvalidInputError, match="output: expected a folder"):
        run_demo(tmp_path / "cut.xyz", progress=False)
    with pytest.raises(InvalidInputError, match="at least two"):
        write(tmp_path / "one.xyz", structures[:1])
        run_demo(tmp_path / "demo", structures=tmp_path / "one.xyz", progress=False)


def test_numbers_and_tables_are_readable() -> None:
    assert [number(x) for x in (0.0, 1.0, 12.345, 1234.5, 0.0123, 3.21e-13, -2e5)] == [
        "0",
        "1.00",
        "12.3",
        "1234",
        "0.0123",
        "3.2e-13",
        "-2.0e5",
    ]
    assert number(float("nan")) == "not finite"
    table = Table("title", [("model",), ("error", "meV")], [["a", "1.0"], ["longer", "20.0"]])
    assert table.text().splitlines()[2:4] == ["        error", "model     meV"]
    assert table.markdown().splitlines()[2] == "| model | error meV |"


def test_trajectory_angles_are_exact_for_small_turns() -> None:
    momentum = np.array([[0.0, 0.0, 2.0], [2e-9, 0.0, 2.0], [0.0, 3.0, 0.0]])
    flat = np.zeros(3)
    trajectory = Trajectory("bare", np.arange(3.0), flat, momentum, flat)
    np.testing.assert_allclose(trajectory.angle, [0.0, np.degrees(1e-9), 90.0], rtol=1e-12)
    np.testing.assert_allclose(trajectory.magnitude_change, [0.0, 0.0, 0.5], atol=1e-12)
    assert trajectory.turned == pytest.approx(90.0)
