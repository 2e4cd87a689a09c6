"""Pages in a browser: no errors, nothing from the network, figures and structures visible, no sideways scrolling."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk, molecule
from symmetrize.backbones.toy import ToyLocal
from test_study_report import METHODS, record, write

from symmetrize import OutputSpec
from symmetrize.report.check import write_check
from symmetrize.report.study import write_report
from symmetrize.testing.running.outcome import Finding, Outcome, Report, Result, Verdict
from symmetrize.testing.running.runner import run
from symmetrize.testing.subjects.subject import CLAIMS, of_backbone

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    # Where a browser was asked for, its absence is a failure.
    pytest.mark.skipif(CHROMIUM is None and os.environ.get("REQUIRE_BROWSER") != "1", reason="needs chromium"),
    # Playwright leaves its event loop to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# WebGL in software: slow, every drawing of the structures counts.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader")
NARROW, WIDE = 400, 1280
LOCAL = ("file", "data", "blob")


def _plots() -> tuple[dict[str, Any], ...]:
    word = "a rather long name of an output, in one-word-without-any-place-to-break-it"
    t = [k / 20 for k in range(21)]
    wave = [math.sin(6 * x) for x in t]
    layers = [
        {
            "name": f"blocks.{k}.linear",
            "type": "Linear",
            "shape": [9, 64],
            "transforms_as": "16x0e+16x1o",
            "residual": r,
        }
        for k, r in enumerate((1e-16, 1e-15, 0.3, math.inf))
    ]
    jump = {"order": 0, "t": 0.6, "size": 0.3, "limit": 1e-8, "ok": False}
    return (
        {"kind": "histogram", "title": "errors", "outputs": {word: [1e-3, 0.0, math.nan], "b": [1e-15]}, "limit": 1e-9},
        {"kind": "curve", "title": "angle", "x": t, "series": {word: wave, "b": t}, "x_label": "degrees", "log": False},
        {"kind": "curve", "title": "angle", "x": t, "series": {"a": [x + 1e-9 for x in t]}, "log": True},
        {
            "kind": "spectrum",
            "title": "l",
            "outputs": {word: {"even": [1.0, 1e-3], "odd": [1e-9, 0.0]}},
            "limit": 1e-12,
        },
        {"kind": "scan", "title": "path", "t": t, "series": {"component 0": wave}, "jumps": [jump], "x_label": "t"},
        {"kind": "layers", "title": "layers", "layers": layers, "culprit": "blocks.2.linear"},
        {
            "kind": "bars",
            "title": "cost",
            "labels": [word, "b"],
            "values": [1.0, math.inf],
            "y_label": "s",
            "log": False,
        },
    )


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a model that fails, with figures of every kind and an exception."""
    outputs = {"energy": OutputSpec("0e", reduce="sum", unit="eV"), "dipole": OutputSpec("1o", reduce="sum")}
    subject = of_backbone(ToyLocal(outputs, cutoff=4.0), claims=frozenset(CLAIMS))
    structures = [molecule("CH3CH2OH"), molecule("CO2"), bulk("Si")]
    only = ["rotation_equivariance", "translation_invariance", "purity", "finite_outputs"]
    found = run(subject, structures, only=only, library=False, command="symmetrize check mine.py:model")
    long = "RuntimeError: " + "unbroken_" * 40
    made = (
        Result(
            "made", "here", "Made up", Verdict.FAILED, Outcome((Finding("e", math.inf, 1e-9, scale=1.0),), _plots())
        ),
        Result("raises", "", "Raises", Verdict.ERROR, reason=long, meaning="It works.", suspicion="It does not."),
        Result("measured", "", "Measured", Verdict.RECORDED, Outcome((Finding("e", 1.0, scale=1.0),), _plots()[1:3])),
    )
    return Report(found.subject, found.results + made, found.scales, found.structures, environment=found.environment)


@pytest.fixture(scope="module")
def page_path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_check(report, path)
    return path


@pytest.fixture(scope="module")
def small_path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without structures."""
    path = tmp_path_factory.mktemp("page") / "small.html"
    write_check(report, path, structures=False)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


class Opened:
    """A page with everything that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def clean(self) -> bool:
        """Nothing went wrong, and nothing was asked for from elsewhere."""
        return not self.complaints and all(url.split(":")[0] in LOCAL for url in self.requests)


def _start_viewer(opened: Opened) -> Any:
    opened.page.eval_on_selector("#structures", "element => element.scrollIntoView()")
    opened.page.wait_for_selector("#scope-wait", state="detached", timeout=60000)
    return opened.page.locator("#scope-structure canvas").first


def _colors(opened: Opened, png: bytes) -> int:
    """How many different colors a picture has, counted by the browser."""
    count = """async bytes => {
      const image = await createImageBitmap(new Blob([new Uint8Array(bytes)], { type: "image/png" }));
      const canvas = new OffscreenCanvas(image.width, image.height), pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0);
      return new Set(new Uint32Array(pen.getImageData(0, 0, image.width, image.height).data.buffer)).size;
    }"""
    return opened.page.evaluate(count, list(png))


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_the_page_works_with_its_viewer(browser: Any, page_path: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, page_path, width, scheme)
    assert opened.page.inner_text(".banner .big") == "Failed"
    assert opened.overflow() <= 0
    canvas = _start_viewer(opened)
    box = canvas.bounding_box()
    assert box is not None and box["width"] > 200 and box["height"] > 200
    picture = canvas.screenshot()
    assert _colors(opened, picture) > 200
    if width == NARROW:
        others = opened.page.eval_on_selector_all("#scope-which option:not(:checked)", "list => list.map(o => o.value)")
        opened.page.select_option("#scope-which", value=others[0])
        opened.page.wait_for_timeout(200)
        assert canvas.screenshot() != picture
    opened.page.click("details.structures > summary")
    assert not canvas.is_visible()
    assert opened.overflow() <= 0 and opened.clean(), (opened.complaints, opened.requests)
    opened.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "dark"), (NARROW, "light")])
def test_everything_unfolds_and_every_figure_shows(browser: Any, small_path: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, small_path, width, scheme)
    row = opened.page.locator("#passed details.row").first
    assert not row.is_visible()
    opened.page.locator("#passed details.group > summary").first.click()
    assert row.is_visible() and not row.locator("table").is_visible()
    row.locator("summary").click()
    assert row.locator("table").is_visible()
    opened.page.click("#unfold")
    assert opened.page.locator("details:not([open])").count() == 0
    boxes = opened.page.eval_on_selector_all(
        "svg.figure, table.layers",
        "list => list.map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height, b.left, b.right]; })",
    )
    assert len(boxes) >= 10
    for wide, high, left, _ in boxes:
        assert wide > 200 and high > 80 and left >= 0
    assert opened.overflow() <= 0
    background, ink = opened.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (_brightness(background) > _brightness(ink)) is (scheme == "light")
    opened.page.click("#unfold")
    assert opened.page.locator("details:not([open])").count() > 0
    assert opened.clean(), (opened.complaints, opened.requests)
    opened.context.close()


def _brightness(color: str) -> int:
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])


def test_a_tile_leads_to_its_check(browser: Any, small_path: Path) -> None:
    opened = Opened(browser, small_path, WIDE, "light")
    opened.page.click("a.tile[href='#passed-translation-invariance']")
    assert opened.page.locator("#passed-translation-invariance .rows").is_visible()
    assert opened.clean()
    opened.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "dark"), (NARROW, "light")])
def test_the_page_of_a_study(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    records = [record(method, backbone=name) for name in ("A", "B") for method in METHODS]
    opened = Opened(browser, write_report(write(tmp_path / "run", records), formats=()), width, scheme)
    opened.page.eval_on_selector_all("details", "list => list.forEach(e => { e.open = true; })")
    boxes = opened.page.eval_on_selector_all(
        "svg.figure", "list => list.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
    )
    assert len(boxes) == 6 and all(wide > 200 and high > 80 for wide, high in boxes)
    for place, link in (("#data-0", "nav.data a[href='#data-0']"), ("#ethanol-b", "#glance a[href='#ethanol-b']")):
        opened.page.click(link)
        assert opened.page.locator(f"{place} table").first.is_visible()
    assert opened.overflow() <= 0 and opened.clean(), (opened.complaints, opened.requests)
    opened.context.close()


def test_these_tests_see_errors_requests_and_wide_pages(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    for body, what in (
        ("<script>throw new Error('planted')</script>", "complaints"),
        ("<script>console.error('planted')</script>", "complaints"),
        ("<img src='http://localhost:9/x.png'>", "requests"),
        ("<div style='width: 5000px'>wide</div>", "overflow"),
    ):
        path.write_text(f"<!DOCTYPE html><html><body>{body}</body></html>")
        opened = Opened(browser, path, WIDE, "light")
        opened.page.wait_for_load_state()
        assert (opened.overflow() > 0) is (what == "overflow")
        assert opened.clean() is (what == "overflow")
        if what == "requests":
            assert any("localhost" in url for url in opened.requests)
        opened.context.close()
