"""Reports of checks: JSON that can be read back, Markdown, and a page that stands alone."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk, molecule
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer
from symmetrize.errors import InvalidInputError
from symmetrize.report import chemiscope
from symmetrize.report.check import (
    check_markdown,
    read_check,
    render_check,
    reproduce,
    schema,
    summary,
    write_check,
)
from symmetrize.report.check_figures import drawing, merged
from symmetrize.testing.running.outcome import Finding, Outcome, Report, Result, Verdict
from symmetrize.testing.running.runner import run
from symmetrize.testing.subjects.subject import CLAIMS, Subject, of_backbone, of_symmetrizer

OUTPUTS = {"energy": OutputSpec("0e", reduce="sum", unit="eV"), "dipole": OutputSpec("1o", reduce="sum")}
ONLY = ["rotation_equivariance", "inversion_equivariance", "purity"]
COMMAND = "symmetrize check mine.py:model --only purity --seed=3 --profile full --report all.html --dtype float32"


def _backbone() -> ToyLocal:
    return ToyLocal(OUTPUTS, cutoff=4.0)


def _bare() -> Subject:
    return of_backbone(_backbone(), claims=frozenset(CLAIMS))


def _nan(batch: Any) -> dict[str, Any]:
    return {name: value * math.nan for name, value in _bare().model(batch).items()}


def _raising(batch: Any) -> dict[str, Any]:
    raise RuntimeError("no <weights> & no | bias in </script>")


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    bare = _bare()
    subjects = {
        "exact": of_symmetrizer(Symmetrizer(_backbone(), ECSE())),
        "bare": bare,
        "unclaimed": of_backbone(_backbone()),
        "nan": dataclasses.replace(bare, name="NaN", model=_nan),
        "raising": dataclasses.replace(bare, name="raises", model=_raising),
    }
    structures = [molecule("CH3CH2OH"), molecule("CO2"), bulk("Si")]
    return {
        name: run(subject, structures, only=ONLY, command=COMMAND, library=False) for name, subject in subjects.items()
    }


@pytest.fixture(scope="module")
def pages(reports: dict[str, Report]) -> dict[str, str]:
    return {name: render_check(report) for name, report in reports.items()}


def _plots(hole: Any = math.inf) -> list[dict[str, Any]]:
    """All kinds, with a number that is not finite in each."""
    return [
        {"kind": "histogram", "title": "h", "outputs": {"energy": [1e-3, 0.0, hole], "t: 2e": [1e-15]}, "limit": 1e-9},
        {
            "kind": "curve",
            "title": "$c",
            "x": [0, 1, 2],
            "series": {"_a": [1e-3, hole, 0.0], "b": [1, 2, 3]},
            "log": True,
        },
        {"kind": "curve", "title": "n", "x": [0, 1], "series": {"a": [hole, hole]}, "log": False},
        {
            "kind": "spectrum",
            "title": "s",
            "outputs": {"energy": {"even": [1.0, hole], "odd": [0.0, 1e-4]}},
            "limit": 1e-9,
        },
        {
            "kind": "scan",
            "title": "path <a>\\1",
            "t": [0.0, 0.5, 1.0],
            "series": {"component 0": [0.0, hole, 1.0]},
            "jumps": [
                {"order": 0, "t": 0.5, "size": 0.3, "limit": 1e-8, "ok": False},
                {"order": 1, "t": 0.2, "size": hole, "limit": None, "ok": True},
            ],
            "x_label": "t",
        },
        {
            "kind": "layers",
            "title": "l",
            "layers": [
                {"name": "a", "type": "Linear", "shape": [4, 3], "transforms_as": "1x1o", "residual": 1e-16},
                {"name": "b<c>", "type": "Tanh", "shape": [4, 3], "transforms_as": None, "residual": hole},
            ],
            "culprit": "b<c>",
        },
        {"kind": "bars", "title": "b", "labels": ["one", "two"], "values": [1.0, hole], "y_label": "s", "log": False},
        {"kind": "bars", "title": "b", "labels": ["one", "two"], "values": [1.0, hole], "y_label": "s", "log": True},
    ]


def _synthetic(*results: Result, **more: Any) -> Report:
    return Report({"name": "made <by> hand"}, results, **more)


def _result(verdict: Verdict, *found: Finding, check: str = "some_check", on: str = "", **more: Any) -> Result:
    outcome = Outcome(found, **{k: more.pop(k) for k in ("plots", "note", "seed") if k in more}) if found else None
    return Result(check, on, check.replace("_", " "), verdict, outcome, **more)


class _Page(HTMLParser):
    """Collects elements, checks that they are closed in order."""

    VOID = ("meta", "input", "br", "link", "img", "path", "use", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.found if name == tag]


def _validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


NAMES = ("exact", "bare", "unclaimed", "nan", "raising")


def test_the_runs_are_what_they_are_called(reports: dict[str, Report]) -> None:
    assert reports["exact"].ok and reports["unclaimed"].ok
    assert reports["bare"].failed_checks() == {"rotation_equivariance", "inversion_equivariance"}
    assert any(r.verdict is Verdict.RECORDED for r in reports["unclaimed"].results)
    assert any(r.verdict is Verdict.ERROR for r in reports["raising"].results)
    assert not reports["nan"].ok


@pytest.mark.parametrize("name", NAMES)
def test_json_follows_the_schema_and_reads_back_as_it_was(
    reports: dict[str, Report], pages: dict[str, str], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    write_check(reports[name], path)
    content = json.loads(path.read_text())
    _validator().validate(content)
    again = read_check(path)
    assert again.to_dict() == content == reports[name].to_dict()
    assert again.ok is reports[name].ok
    assert [r.verdict for r in again.results] == [r.verdict for r in reports[name].results]
    if name in ("exact", "bare"):
        assert again == reports[name]
        assert len(again.structures) > 0
    assert render_check(again) == pages[name]
    assert check_markdown(again) == check_markdown(reports[name])


def test_the_schema_accepts_every_kind_of_plot_and_refuses_what_lacks_something() -> None:
    validator = _validator()
    finding = Finding("energy", math.nan, 1.0)
    content = _synthetic(_result(Verdict.FAILED, finding, plots=(*_plots(), {"kind": "new"}))).to_dict()
    validator.validate(content)
    for spoil in (
        lambda c: c.pop("version"),
        lambda c: c.update(version=2),
        lambda c: c["results"][0].update(verdict="fine"),
        lambda c: c["results"][0].update(more=1),
        lambda c: c["results"][0]["outcome"]["findings"][0].update(number="large"),
        lambda c: c["results"][0]["outcome"]["findings"][0].pop("limit"),
        lambda c: c["results"][0]["outcome"]["plots"][0].pop("outputs"),
        lambda c: c["results"][0]["outcome"]["plots"][4]["jumps"][0].pop("t"),
    ):
        spoiled = json.loads(json.dumps(content))
        spoil(spoiled)
        assert not validator.is_valid(spoiled)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_stands_alone(reports: dict[str, Report], pages: dict[str, str], name: str) -> None:
    text = pages[name]
    page = _Page(text)
    for tag, attributes in page.found:
        for key in ("src", "href", "data", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or (tag == "a" and value.startswith("https://"))
    assert "@import" not in text and "url(http" not in text
    assert not page.of("link") and not page.of("img") and not page.of("iframe")
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")}
    assert targets <= set(ids)
    assert text.count("</script") == len(page.of("script"))
    for result in reports[name].results:
        assert result.verdict is Verdict.SKIPPED or shlex.quote(result.id).replace("'", "&#39;") in text
        assert result.title in text


def test_the_page_says_what_failed_and_what_to_suspect(pages: dict[str, str]) -> None:
    text = pages["bare"]
    assert ">Failed<" in text and "Probable cause:" in text and "results depend on it" in text
    assert text.index('id="failed"') < text.index('id="structures"') < text.index('id="passed"')
    fine = pages["exact"]
    assert ">Passed<" in fine and "Probable cause:" not in fine and 'id="failed"' not in fine
    assert 'id="recorded"' in pages["unclaimed"] and 'id="recorded"' not in fine


def test_what_a_model_says_cannot_leave_its_place(reports: dict[str, Report], pages: dict[str, str]) -> None:
    text = pages["raising"]
    assert "no &lt;weights&gt; &amp; no | bias in &lt;/script&gt;" in text
    assert "<weights>" not in text
    lines = [line for line in check_markdown(reports["raising"]).splitlines() if "weights" in line]
    assert lines and all(r"\<weights\>" in line and r"no \| bias" in line for line in lines)


@pytest.mark.parametrize("hole", [math.nan, "inf"])
def test_every_kind_of_figure_takes_numbers_that_are_not_finite(hole: Any) -> None:
    for k, plot in enumerate(_plots(hole)):
        drawn = drawing(plot, f"figure-{k}")
        assert drawn is not None
        _Page(drawn.body)
        assert "<svg" in drawn.body or plot["kind"] == "layers"
        if plot["kind"] == "histogram":
            assert "1 not finite" in drawn.body
        if plot["kind"] == "layers":
            assert "b&lt;c&gt;" in drawn.body and drawn.body.count("culprit") == 1
    assert drawing({"kind": "unheard of"}, "x") is None


def test_figures_without_data_are_left_out() -> None:
    for plot in _plots():
        empty = {k: type(v)() if isinstance(v, (list, dict)) else v for k, v in plot.items()}
        assert drawing(empty, "x") is None


def test_histograms_of_sets_become_one_and_each_keeps_its_limit() -> None:
    def histogram(error: float, limit: float) -> dict[str, Any]:
        return {"kind": "histogram", "title": "r", "outputs": {"energy": [error, 0.0]}, "limit": limit}

    (one,) = merged([histogram(1e-11, 1e-10), histogram(1e-11, 1e-12)])
    assert one["outputs"]["energy"] == [1e-11, 0.0, 1e-11, 0.0]
    assert one["beyond"] == {"energy": 1} and one["limits"] == {1e-10, 1e-12}
    (fine,) = merged([histogram(1e-13, 1e-10), histogram(1e-13, 1e-12)])
    assert fine["beyond"] == {"energy": 0}


def test_sentences_say_how_much_and_whether_it_matters() -> None:
    def told(number: float, **more: Any) -> str:
        finding = Finding("energy", number, 1e-12, scale=2.0, worst="ethanol", **more)
        report = _synthetic(_result(Verdict.FAILED, finding, on="generic"), scales={"energy": {"unit": "eV"}})
        return " ".join(summary(report))

    assert "as large as what the model predicts" in told(0.5) and "(1.00 eV)" in told(0.5)
    assert "visible part" in told(0.01) and "no rounding" in told(1e-4) and "Invisible" in told(1e-9)
    assert "not finite" in told(math.nan) and "will break" in told(math.inf)
    assert "Nothing was judged" in summary(_synthetic())[0]
    error = summary(_synthetic(_result(Verdict.ERROR, reason="ValueError: x")))
    assert error == ["1 check could not be run to the end: some check."]
    stale = summary(_synthetic(_result(Verdict.STALE, Finding("e", 0.0, 1.0), on="a")))
    assert stale == ["Announced as failures, and yet they pass: some_check[a]."]


def test_expected_failures_and_stale_ones_are_told_apart() -> None:
    bad = Finding("energy", 1.0, 1e-12, scale=1.0)
    expected = _synthetic(_result(Verdict.EXPECTED, bad, reason="issue 7"))
    assert expected.ok and 'id="expected"' in render_check(expected) and "issue 7" in render_check(expected)
    stale = _synthetic(_result(Verdict.STALE, Finding("energy", 0.0, 1e-12, scale=1.0), reason="remove it"))
    assert not stale.ok and 'id="failed"' in render_check(stale) and "remove it" in render_check(stale)


def test_the_command_repeats_one_result(reports: dict[str, Report]) -> None:
    report = reports["bare"]
    words = shlex.split(reproduce(report, report["rotation_equivariance[yours]"]))
    assert words == [
        *("symmetrize", "check", "mine.py:model", "--dtype", "float32", "--only", "rotation_equivariance[yours]"),
        *("--seed", "0", "--profile", "quick"),
    ]
    for other in ("", "pytest tests", "it's broken"):
        unknown = dataclasses.replace(report, environment={"command": other})
        assert shlex.split(reproduce(unknown, report["purity"]))[:5] == [
            "symmetrize",
            "check",
            "TARGET",
            "--only",
            "purity",
        ]


def test_markdown_has_the_tables(reports: dict[str, Report]) -> None:
    text = check_markdown(reports["bare"])
    assert text.startswith("## ToyLocal: FAILED") and "**Failed**" in text and "Probably:" in text
    assert "**Failed**" not in check_markdown(reports["exact"])
    assert "Measured, not judged" in check_markdown(reports["unclaimed"])
    for line in text.splitlines():
        if line.startswith("| rotation"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 7
    assert "profile quick, seed 0" in text.lower() and "torch" in text.splitlines()[-1]


def test_viewer_data_agrees_with_the_report(reports: dict[str, Report]) -> None:
    report = reports["bare"]
    data = chemiscope.dataset(report.structures, 1e-12)
    assert data is not None
    dataset = data["dataset"]
    sizes = [s["size"] for s in dataset["structures"]]
    assert sizes == [len(s["numbers"]) for s in report.structures]
    for choice in data["choices"]:
        values = np.array(dataset["properties"][choice["property"]]["values"])
        errors = np.concatenate([s["atom_errors"].get(choice["name"], [math.nan] * n) for s, n in zip(report.structures, sizes, strict=True)])  # fmt: skip  # noqa: E501
        known = errors > 1e-17
        np.testing.assert_allclose(values[known], np.log10(errors[known]), atol=1e-12)
        assert choice["min"] < choice["max"]
    for drawn, given in zip(dataset["structures"], report.structures, strict=True):
        # Turned as a whole: distances stay.
        positions, original = np.array([drawn["x"], drawn["y"], drawn["z"]]).T, np.array(given["positions"])
        apart = np.linalg.norm(positions[:, None] - positions, axis=-1)
        np.testing.assert_allclose(apart, np.linalg.norm(original[:, None] - original, axis=-1), atol=1e-12)
    assert any("cell" in s for s in dataset["structures"]) and not all("cell" in s for s in dataset["structures"])
    json.loads(chemiscope.embedded(data))


def test_viewer_data_takes_what_is_not_finite_and_leaves_out_what_cannot_be_drawn() -> None:
    structure: dict[str, Any] = {
        "name": "</script><b>",
        "set": "mine",
        "numbers": [6, 0, 8],
        "positions": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]],
        "cell": [[0.0] * 3] * 3,
        "pbc": [False] * 3,
        "atom_errors": {"forces": ["inf", 1e-3, "nan"]},
        "structure_errors": {"energy": "nan"},
    }
    broken = {**structure, "positions": [["nan", 0.0, 0.0]] * 3}
    data = chemiscope.dataset([structure, broken], None)
    assert data is not None and len(data["structures"]) == 1
    assert data["dataset"]["structures"][0]["names"] == ["C", "X", "O"]
    assert "</script" not in chemiscope.embedded(data)
    assert data["structures"][0]["errors"] == {"energy": "not finite"}
    text = render_check(_synthetic(_result(Verdict.FAILED, Finding("e", 1.0, 0.1)), structures=(structure,)))
    assert _Page(text).of("select") and "<b>" not in text.split('id="structures"')[1].split("</section>")[0]
    assert chemiscope.dataset([broken], None) is None


def test_the_viewer_travels_with_the_page_and_can_be_left_out(
    reports: dict[str, Report], pages: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("chemiscope")
    library = chemiscope.library()
    assert library is not None
    import base64

    assert b"Chemiscope" in gzip.decompress(base64.b64decode(library))
    text = pages["exact"]
    assert library in text and 'id="structures"' in text
    write_check(reports["exact"], tmp_path / "small.html", structures=False)
    small = (tmp_path / "small.html").read_text()
    assert 'id="structures"' not in small and len(small) < len(text) - len(library)


def test_without_chemiscope_the_page_says_how_to_get_it(
    reports: dict[str, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chemiscope, "library", lambda: None)
    text = render_check(reports["bare"])
    assert "pip install chemiscope" in text and "CO2" in text and 'id="scope-library"' not in text
    _Page(text)


def test_files_by_suffix_whole_or_not_at_all(
    reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = reports["exact"]
    for suffix, start in ((".html", "<!DOCTYPE html>"), (".md", "## "), (".json", "{"), (".HTML", "<!DOCTYPE html>")):
        path = tmp_path / "deep" / f"report{suffix}"
        write_check(report, path)
        assert path.read_text(encoding="utf-8").startswith(start)
    with pytest.raises(
        InvalidInputError, match=r"report: expected .*\.json, got '.*report\.jsn'; did you mean '\.json'"
    ):
        write_check(report, tmp_path / "report.jsn")
    path = tmp_path / "report.json"
    path.write_text("before")
    monkeypatch.setattr(Report, "to_dict", lambda self: {"number": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        write_check(report, path)
    assert path.read_text() == "before" and list(tmp_path.glob(".saving-*")) == []


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    whole = _synthetic(_result(Verdict.PASSED, Finding("e", 0.0, 1.0))).to_dict()
    spoiled = {
        "nothing": "expected JSON",
        "[]": "expected a JSON object",
        "{}": "expected schema",
        json.dumps({**whole, "version": 99}): "expected version",
        json.dumps({k: v for k, v in whole.items() if k != "results"}): "lacks something",
        json.dumps({**whole, "results": [{**whole["results"][0], "more": 1}]}): "lacks something or holds too much",
    }
    for text, message in spoiled.items():
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=message):
            read_check(path)
    path.write_text(json.dumps(whole))
    assert read_check(path).ok


def test_a_missing_library_is_named(reports: dict[str, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else found(name, *a))
    with pytest.raises(ImportError, match="pip install jinja2"):
        render_check(reports["exact"])
    assert check_markdown(reports["exact"])
