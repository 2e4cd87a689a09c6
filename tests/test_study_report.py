"""The report of a study: what is marked as best, what is said of refusals and failures, and the page itself."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest

from symmetrize.errors import InvalidInputError
from symmetrize.report.study import write_report
from symmetrize.report.study_figures import against_cost, dynamics, looks, scan_paths, scans
from symmetrize.report.study_tables import CONSTANT, make_table
from symmetrize.study.results import find_number

METHODS = {
    "bare": {"name": "Identity"},
    "ECSE": {"name": "ECSE"},
    "averaging, degree 1": {"name": "GroupAveraging", "options": {"degree": 1}, "curve": "averaging"},
    "averaging, degree 3": {"name": "GroupAveraging", "options": {"degree": 3}, "curve": "averaging"},
    "frame averaging": {"name": "FrameAveraging"},
}
ERRORS = {
    "bare": 0.2,
    "ECSE": 2e-14,
    "averaging, degree 1": 1e-2,
    "averaging, degree 3": 1e-4,
    "frame averaging": 5e-13,
}
COSTS = {"bare": 1.0, "ECSE": 4.0, "averaging, degree 1": 8.0, "averaging, degree 3": 48.0, "frame averaging": 8.0}


def record(method, data="ethanol", backbone="PET", seed=0, **changes):
    t = [k / 20 for k in range(21)]
    error, cost = ERRORS[method], COSTS[method]
    measures = {
        "accuracy": {
            which: {
                "energy": {"mae": 2.0 + error, "rmse": 3.0, "unit": "meV/atom"},
                "forces": {"mae": 70.0 + error, "rmse": 90.0, "unit": "meV/A"},
            }
            for which in ("bare", "symmetrized")
        }
        | {"seconds": 0.3},
        "equivariance": {
            "rotations": {"energy": {"max": error, "rms": error / 3}, "forces": {"max": error / 2, "rms": error / 5}},
            "inversion": {"energy": {"max": error, "rms": error / 3}},
            "seconds": 1.0,
        },
        "permutation": {"energy": 1e-15, "symmetric": {"methane": 1e-15}, "seconds": 7.0},
        "symmetric": {
            "structures": {
                "methane": {"error": error, "equivariance": error, "finite": True, "refused": None},
                "CO2": {"error": "nan", "equivariance": "nan", "finite": False, "refused": None},
            }
        },
        "smoothness": {
            "unit": "eV",
            "ratio": {"bending CO2": 1.0},
            "jump": {"bending CO2": 1e-13},
            "discontinuous": {"bending CO2": None},
            "refused": {},
            "scans": {"bending CO2": {"t": t, "bare": [x * x for x in t], "symmetrized": [x * x + error for x in t]}},
        },
        "dynamics": {
            "energy_rms": 0.1,
            "angular_momentum": error,
            "series": {"t": t, "energy": [math.sin(x) for x in t], "angular_momentum": [error * x for x in t]},
        },
        "cost": {"evaluations_per_center": cost, "time_ratio": cost, "peak_memory_ratio": 1.5},
    }
    cell = {"backbone": backbone, "method": method, "data": data, "seed": seed, "curve": METHODS[method].get("curve")}
    found = {
        "schema": "torch-symmetrize-study",
        "version": 1,
        "key": f"{hash((method, data, backbone, seed)) % 16**12:016x}",
        "cell": cell,
        "status": "ok",
        "error": None,
        "measures": measures,
        "environment": {"versions": {"torch": "2.0"}, "threads": 1, "machine": "Linux", "date": "2026-01-01T00:00:00"},
        "seconds": 2.0,
    }
    return {**found, **changes}


def refused(method, status="refused"):
    error = {"type": "NoFrameError", "message": "structure 3 is <collinear>", "traceback": ""}
    return record(method, status=status, error=error, measures={})


def write(folder, records):
    folder.mkdir(exist_ok=True)
    study = {"name": "trial", "methods": METHODS, "data": {"ethanol": {"path": "e.xyz", "source": "", "license": ""}}}
    cells = [{"key": r["key"], "cell": r["cell"]} for r in records]
    (folder / "study.json").write_text(json.dumps({"study": study, "cells": cells, "skipped": []}))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


class TestTable:
    def test_ties_and_rounding_are_marked_and_nothing_else(self):
        table = make_table([record(m) for m in METHODS], list(METHODS))
        column = [c.title[0] for c in table.columns].index("rotation")
        assert [row.cells[column].best for row in table.rows] == [False, True, False, False, True]
        assert [row.cells[column].exact for row in table.rows] == [False, True, False, False, True]
        same = [c.title[0] for c in table.columns].index("permutation")
        assert not any(row.cells[same].best for row in table.rows)  # all the same: nothing stands out

    def test_times_of_measures_are_no_results(self):
        measures = record("ECSE")["measures"]
        assert find_number(measures, "permutation.*") == 1e-15
        assert find_number(measures, "equivariance.rotations.*.max") == 2e-14

    def test_what_is_not_finite(self):
        measures = copy.deepcopy(record("ECSE")["measures"])
        measures["equivariance"]["rotations"]["energy"]["max"] = "inf"
        assert find_number(measures, "equivariance.rotations.*.max") == math.inf
        measures["equivariance"]["rotations"]["energy"]["max"] = "nan"
        assert math.isnan(find_number(measures, "equivariance.rotations.*.max"))
        # A refused structure is named in a note; the others count.
        assert find_number(measures, "symmetric.structures.*.equivariance") == 2e-14
        assert find_number(measures, "nothing.*") is None
        table = make_table([record("bare"), record("ECSE", measures=measures)], list(METHODS))
        cell = table.rows[1].cells[[c.title[0] for c in table.columns].index("rotation")]
        assert cell.bad and not cell.best and cell.text == "not finite"

    def test_seeds_are_averaged_and_their_range_is_noted(self):
        other = record("ECSE", seed=1)
        other["measures"]["accuracy"]["symmetrized"]["forces"]["mae"] = 80.0
        table = make_table([record("bare"), record("ECSE"), other], list(METHODS))
        column = [c.title[0] for c in table.columns].index("force MAE")
        cell = table.rows[1].cells[column]
        assert cell.text == "75.0" and "70.0 to 80.0 over 2 seeds" in cell.note.replace("70 ", "70.0 ").replace(
            "80 ", "80.0 "
        )

    def test_what_a_model_that_knows_nothing_would_do(self):
        """Shown above all methods, and no candidate for the best value."""
        records = [record("bare"), record("ECSE")]
        for r in records:
            r["measures"]["accuracy"]["constant"] = {"forces": {"mae": 1.0, "rmse": 1.0, "unit": "meV/A"}}
        table = make_table(records, list(METHODS))
        column = [c.title[0] for c in table.columns].index("force MAE")
        assert [row.label for row in table.rows] == [CONSTANT, "bare", "ECSE"]
        assert table.rows[0].cells[column].text == "1.00" and not table.rows[0].cells[column].best
        assert all(cell.text == "–" for n, cell in enumerate(table.rows[0].cells) if n != column)

    def test_a_network_that_knows_nothing_is_named(self):
        one = record("bare")
        one["measures"]["accuracy"]["constant"] = {
            "energy": {"mae": 1.0, "rmse": 1.0, "unit": "meV/atom"},
            "forces": {"mae": 900.0, "rmse": 1000.0, "unit": "meV/A"},
        }
        (note,) = make_table([one], list(METHODS)).rows[0].notes
        assert note.startswith("energies come out no better from the bare network")

    def test_refusals_and_failed_measures_are_said(self):
        broken = record("ECSE")
        broken["measures"]["dynamics"] = {"error": {"type": "ValueError", "message": "went wrong"}}
        broken["measures"]["smoothness"]["discontinuous"]["bending CO2"] = 0
        table = make_table([record("bare"), broken, refused("frame averaging")], list(METHODS))
        notes = " ".join(table.rows[1].notes)
        assert "dynamics failed: went wrong" in notes and "the energy jumps" in notes and "not finite on CO2" in notes
        assert table.rows[2].status == "refused" and "collinear" in table.rows[2].reason

    def test_every_seed_is_heard(self):
        """What is noted of any seed is noted, and a seed without results does not vanish in the mean of the others."""
        second = record("ECSE", seed=1)
        second["measures"]["smoothness"]["discontinuous"]["bending CO2"] = 1
        third = refused("ECSE", "failed") | {"cell": {**record("ECSE")["cell"], "seed": 2}}
        notes = make_table([record("bare"), record("ECSE"), second, third], list(METHODS)).rows[1].notes
        assert sum("its slope jumps" in note for note in notes) == 1
        assert sum("not finite on CO2" in note for note in notes) == 1
        assert any(note.startswith("seed 2 failed: structure 3") for note in notes)


def test_methods_of_a_curve_look_alike_and_all_others_do_not():
    style = looks(METHODS)
    assert style["averaging, degree 1"].color == style["averaging, degree 3"].color
    assert len({(look.color, look.marker) for look in style.values()}) == len(METHODS)
    assert len({(look.color, look.line) for look in style.values()}) == len(METHODS)


def test_small_differences_look_small():
    """No offset that has to be added to the labels in the head, and two percent of the value at least."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(layout="constrained")
    against_cost([record("bare"), record("ECSE")], looks(METHODS))(figure)
    axis = figure.axes[1]
    low, high = axis.get_ylim()
    assert high - low > 0.02 * 70.0 and low < 70.0 < high
    figure.draw_without_rendering()
    assert axis.yaxis.get_offset_text().get_text() == ""


def test_a_line_for_every_seed_and_a_name_for_every_method():
    """Also for one whose name matplotlib would leave out of a legend."""
    figure_module = pytest.importorskip("matplotlib.figure")
    hidden = record("bare")
    hidden["cell"]["method"] = "_bare"
    style = looks({"_bare": METHODS["bare"], "ECSE": METHODS["ECSE"]})
    for seeds in (1, 2):
        records = [hidden, *(record("ECSE", seed=seed) for seed in range(seeds))]
        plots = {"scans": scans(records, style, "bending CO2")[0], "dynamics": dynamics(records, style)}
        axes = {}
        for name, plot in plots.items():
            figure = figure_module.Figure(layout="constrained")
            plot(figure)
            axes[name] = figure.axes
        assert len(axes["scans"][1].lines) == 1 + seeds  # and the line of no change
        assert len(axes["dynamics"][1].lines) == 1 + seeds
        (legend,) = axes["dynamics"][0].figure.legends
        assert [text.get_text().strip() for text in legend.get_texts()] == ["_bare", "ECSE"]
        figure = figure_module.Figure(layout="constrained")
        against_cost(records, style)(figure)
        assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_bare", "ECSE"]


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    records = [record(m, data, backbone) for data in ("ethanol", "water") for backbone in ("A", "B") for m in METHODS]
    records += [refused("frame averaging") | {"cell": {**record("frame averaging")["cell"], "backbone": "C"}}]
    run = write(tmp_path / "run", records)
    page = write_report(run, formats=("svg",))
    text = page.read_text(encoding="utf-8")
    assert page == run / "report.html"
    assert not re.search(r'(src|href)="(?!#)', text)
    assert text.count("<svg") == 4 * 3
    assert "structure 3 is &lt;collinear&gt;" in text and "<collinear>" not in text
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="([^"]+)"', text))
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    # All data sets at a glance, and a part of the page for each.
    glance = text[text.index('<section id="glance">') : text.index("</section>")]
    assert all(f">{label}</td>" in glance for label in METHODS) and glance.count("2.0e-14") == 4
    assert text.count('<article class="dataset"') == 2
    assert "### water: B" in markdown and "**2.0e-14**" in markdown
    assert len(list((run / "figures").glob("*.svg"))) == 4 * 3


def test_labels_of_any_kind(tmp_path):
    """Names are the users': quotes, markup, mathematics, and ones that differ only in what a link cannot hold."""
    names = ['PET, "local" <b>', "PET local $x^", "Nätz|werk", "网络"]
    records = [record(m, backbone=name) for name in names for m in METHODS]
    for r in records:
        if r["cell"]["method"] == "bare":
            del r["measures"]["smoothness"]
        if r["cell"]["method"] == "frame averaging":
            r["measures"]["equivariance"]["rotations"]["energy"]["max"] = "inf"
    page = write_report(write(tmp_path / "run", records), formats=())
    text = page.read_text(encoding="utf-8")
    assert 'aria-label="energy along bending CO2, ethanol, PET, &quot;local&quot; &lt;b&gt;"' in text
    assert "<b>," not in text and text.count("<section class") == 4
    assert len(set(re.findall(r'<section class="cellset" id="([^"]+)"', text))) == 4
    assert "change of the energy (meV)" in text
    assert "Nätz" in page.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("status", ["refused", "failed"])
def test_only_cells_without_results(tmp_path, status):
    page = write_report(write(tmp_path / "run", [refused("ECSE", status)]), tmp_path / "page.html", formats=())
    assert "1 refused" in page.read_text() if status == "refused" else "1 failed" in page.read_text()
    assert scan_paths([refused("ECSE", status)]) == []


def test_nothing_to_report(tmp_path):
    with pytest.raises(InvalidInputError, match="run: expected the folder of a study"):
        write_report(tmp_path)
    with pytest.raises(InvalidInputError, match="expected results of a study"):
        write_report(write(tmp_path / "run", []))
