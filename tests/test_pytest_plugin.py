"""The pytest plugin, in sessions of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

from symmetrize import pytest_plugin
from symmetrize.errors import DeclarationError, InvalidTypeError
from symmetrize.testing.fronts.front import check
from symmetrize.testing.fronts.parametrize import is_factory, merged, parametrize_with_checks, write_reports
from symmetrize.testing.running.serialize import report_to_dict
from symmetrize.testing.structures.geometries import ethanol

pytest_plugins = ["pytester"]

EXAMPLE = Path(__file__).parent.parent / "examples" / "testing-your-model"

HEAD = """
import pytest
from symmetrize import ECSE, Symmetrizer
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from symmetrize.testing.structures.geometries import ethanol, water
from symmetrize.testing.fronts.parametrize import parametrize_with_checks
from symmetrize.testing.subjects.subject import CLAIMS, of_backbone

SETTINGS = {"structures": lambda: [ethanol(), water()], "library": False}


def claiming():
    return of_backbone(ToyGlobal(), claims=frozenset(CLAIMS))
"""


def process(folder, *arguments, timeout=60):
    """One session of pytest in a process of its own: exit status and all it printed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs one session in this process, which has torch already: exit status and all it printed."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(*arguments, code=None):
        if code is not None:
            pytester.makepyfile(test_models=HEAD + code)
        # A second copy of pytest finds its plugins imported.
        found = pytester.runpytest_inprocess("-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments)
        return int(found.ret), found.stdout.str() + found.stderr.str()

    return run


# --- sessions that have nothing to do with us -----------------------------------------------------------------------


def test_a_session_without_our_tests_never_imports_torch(tmp_path):
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\ndef test_nothing(request):\n"
        "    assert request.config.pluginmanager.hasplugin('symmetrize')\n"
        "    heavy = {'torch', 'e3nn', 'ase', 'numpy', 'symmetrize.testing'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    status, text = process(tmp_path, "-q", "--symmetrize-report=report.html", "--symmetrize-profile=full")
    assert status == 0, text
    assert not (tmp_path / "report.html").exists() and "symmetrize" not in text.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--symmetrize-report=report.pdf"], ".html, .md or .json, got report.pdf"),
        (["--symmetrize-profile=thorough"], "thorough"),
        (["-o", "symmetrize_profile=thorough"], "expected one of quick, full, got 'thorough'"),
        (["--symmetrize-seed=x"], "invalid int value"),
    ],
)
def test_unusable_options_are_refused(session, arguments, words):
    status, text = session(*arguments)
    assert status == 4 and words in text, text
    assert "Traceback" not in text


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_every_verdict_is_an_outcome_of_pytest(session, pytester):
    code = """
def make():
    return Symmetrizer(ToyGlobal(), ECSE())


calls = []


def counted():
    calls.append(1)
    return claiming()


def broken():
    raise RuntimeError("no such weights")


ONLY = ["rotation_equivariance", "inversion_equivariance", "purity", "determinism", "periodicity"]


@parametrize_with_checks([make], only=ONLY, **SETTINGS)
def test_good(check):
    check()


@parametrize_with_checks(
    {"known": counted}, only=ONLY, expected_failures={"rotation_equivariance": "learned", "purity": "no"}, **SETTINGS
)
def test_known(check):
    check()


@parametrize_with_checks([ToyGlobal(), broken], only=["rotation_equivariance"], **SETTINGS)
def test_bare(check):
    check()


@parametrize_with_checks([ToyGlobal()], only=["determinism"], **SETTINGS)
def test_forgetful(check):
    pass


@pytest.mark.filterwarnings("error")
def test_calls():
    assert calls == [1]
"""
    status, text = session("-rA", "-q", "--junitxml=junit.xml", "--symmetrize-seed=5", code=code)
    assert status == 1, text
    summary = text[text.index("short test summary") :]
    expected = [
        "PASSED test_models.py::test_good[make-rotation_equivariance[yours]]",
        "PASSED test_models.py::test_good[make-purity]",
        "PASSED test_models.py::test_known[known-determinism]",
        "XFAIL test_models.py::test_known[known-rotation_equivariance[yours]] - learned",
        "FAILED test_models.py::test_known[known-inversion_equivariance[yours]]",
        "FAILED test_models.py::test_known[known-purity]",
        "PASSED test_models.py::test_bare[ToyGlobal-rotation_equivariance[yours]]",
        "FAILED test_models.py::test_bare[broken-construction]",
        "FAILED test_models.py::test_forgetful[ToyGlobal-determinism]",
        "PASSED test_models.py::test_calls",
        "nothing to run it on",
    ]
    for line in expected:
        assert line in summary, text
    for words in (
        "inversion_equivariance[yours]: failed",
        "probably: an output has another parity",
        "remove the announcement",
        "RuntimeError: no such weights",
        "the test has to call check()",
    ):
        assert words in text, text
    assert "run_task" not in text and "parametrize.py" not in text, "no frame of ours in a traceback"
    tree = xml.etree.ElementTree.parse(pytester.path / "junit.xml")
    found = {
        p.get("name"): float(p.get("value"))
        for case in tree.iter("testcase")
        if case.get("name") == "test_bare[ToyGlobal-rotation_equivariance[yours]]"
        for p in case.iter("property")
    }
    assert found["rotation_equivariance[yours]: energy"] > 1e-3, "what is recorded only is in the report of pytest"


STALE = '''
class Odd(ToyGlobal):
    """Good for ethanol only."""


@parametrize_with_checks(
    {"good": lambda: Symmetrizer(ToyGlobal(), ECSE())},
    only=["finite_outputs"],
    expected_failures={"finite_outputs": "I thought so"},
    structures=ethanol,
    library=True,
)
def test_model(check):
    check()
'''


def test_a_stale_announcement_fails_once(session):
    """It names a check with several sets: the last one tells, and none does where not all have run."""
    status, text = session("-q", code=STALE)
    assert status == 1 and " 1 failed" in " " + text.splitlines()[-1] and "remove the announcement" in text, text
    status, text = session("-q", "-k", "yours or planar", code=STALE)
    assert status == 0 and "2 passed" in text, text


def test_failing_checks_can_be_selected_by_name(session):
    code = """
@parametrize_with_checks({"a": ToyGlobal, "b": ToyLocal}, profile="full", **SETTINGS)
def test_model(check):
    check()
"""
    status, text = session("--collect-only", "-q", "-k", "b-determinism or a-purity", code=code)
    assert status == 0, text
    selected = [line for line in text.splitlines() if "::" in line]
    assert selected == ["test_models.py::test_model[a-purity]", "test_models.py::test_model[b-determinism]"]


@pytest.mark.parametrize(
    "code, words",
    [
        (
            "@parametrize_with_checks([ToyGlobal], only=['purty'])\ndef test_a(check):\n    check()",
            "did you mean 'purity'",
        ),
        (
            "@parametrize_with_checks([ToyGlobal], structures=ethanol, library=False, "
            "expected_failures={'rotation_equivariance[planar]': 'x'})\ndef test_a(check):\n    check()",
            "unknown id 'rotation_equivariance[planar]', did you mean 'rotation_equivariance[yours]'",
        ),
        ("@parametrize_with_checks([lambda batch: batch])\ndef test_a(check):\n    check()", "outputs: a function"),
        ("@parametrize_with_checks([ToyGlobal])\ndef test_a():\n    pass", "expected test_a(check)"),
    ],
)
def test_mistakes_are_errors_of_the_collection_in_one_line(session, code, words):
    status, text = session("-q", code=code)
    assert status == 2 and words in text, text
    assert "Traceback" not in text and "parametrize.py" not in text


def test_mistakes_in_the_decorator_itself():
    with pytest.raises(InvalidTypeError, match="list or a dict"):
        parametrize_with_checks(ethanol)
    with pytest.raises(DeclarationError, match="at least one"):
        parametrize_with_checks([])


# --- profile, seed, reports -----------------------------------------------------------------------------------------

REPORTED = """
@parametrize_with_checks([lambda: Symmetrizer(ToyGlobal(), ECSE())], only=["purity"], **SETTINGS)
def test_one(check):
    check()
"""


def test_reports_are_written_at_the_end(session, pytester):
    status, text = session("-q", "--symmetrize-report=out/r.json", "--symmetrize-seed=5", code=REPORTED)
    assert status == 0 and "report: out/r.json" in text, text
    content = json.loads((pytester.path / "out" / "r.json").read_text())
    assert content["seed"] == 5 and content["profile"] == "quick" and content["verdict"] == "passed"
    assert [r["id"] for r in content["results"]] == ["purity"]


def test_several_models_have_a_report_each(session, pytester):
    code = (
        REPORTED
        + """
@parametrize_with_checks({"bare": ToyGlobal}, only=["purity"], profile="full", **SETTINGS)
def test_two(check):
    check()
"""
    )
    (pytester.path / "pytest.ini").write_text("[pytest]\nsymmetrize_profile = full\n")
    status, text = session("-q", "--symmetrize-report=r.json", code=code)
    assert status == 0, text
    assert sorted(p.name for p in pytester.path.glob("r*.json")) == ["r-bare.json", "r-lambda.json"]
    assert json.loads((pytester.path / "r-lambda.json").read_text())["profile"] == "full", "from the ini"
    status, text = session("-q", "--symmetrize-report=q.json", "--symmetrize-profile=quick", code=code)
    assert json.loads((pytester.path / "q-bare.json").read_text())["profile"] == "quick", "the command line wins"


def test_a_report_that_cannot_be_written_does_not_hide_the_results(session, pytester):
    (pytester.path / "taken").write_text("")
    status, text = session("-q", "--symmetrize-report=taken/r.json", code=REPORTED)
    assert status == 0 and "no report: " in text and "1 passed" in text, text


def part(*only):
    content = report_to_dict(check(TOY, ethanol(), library=False, only=only))
    content["subject"]["test_name"] = "toy"
    return content


TOY = None


@pytest.fixture(autouse=True, scope="module")
def _toy():
    from symmetrize.backbones.toy import ToyGlobal

    global TOY
    TOY = ToyGlobal()


def test_parts_of_workers_become_one_report(tmp_path):
    config = SimpleNamespace(stash={pytest_plugin._SESSION: pytest_plugin.Session()})
    for found in (part("purity"), part("determinism")):
        node = SimpleNamespace(config=config, workeroutput={pytest_plugin.MARK: [found]})
        pytest_plugin.pytest_testnodedown(node, None)
    pytest_plugin.pytest_testnodedown(SimpleNamespace(config=config), "crashed")
    reports = merged(config.stash[pytest_plugin._SESSION].parts)
    assert list(reports) == ["toy"] and {r.id for r in reports["toy"].results} == {"purity", "determinism"}
    assert write_reports(reports, str(tmp_path / "r.json")) == [tmp_path / "r.json"]
    twice = merged([part("purity"), part("purity")])
    assert list(twice) == ["toy", "toy-2"], "the same check twice is two models of one name"
    assert [p.name for p in write_reports(twice, str(tmp_path / "r.md"))] == ["r-toy.md", "r-toy-2.md"]


# --- factories ------------------------------------------------------------------------------------------------------


def test_what_is_called_to_make_a_model():
    from symmetrize.backbones.toy import ToyGlobal

    assert is_factory(lambda: 3) and is_factory(ToyGlobal) and is_factory(lambda scale=1.0: scale)
    assert not is_factory(lambda batch: batch) and not is_factory(ToyGlobal()) and not is_factory(3)


# --- the example ----------------------------------------------------------------------------------------------------


def test_the_example_runs(tmp_path):
    """As a user would, outside of this repository; checks of minutes of dynamics aside."""
    import shutil

    folder = tmp_path / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    slow = "energy_conservation or closed_loops or orientation_cover or orientation_spectrum"
    status, text = process(folder, "-q", "-rx", "-k", f"not ({slow})", "--symmetrize-report=report.md", timeout=240)
    assert status == 0 and "2 xfailed" in text and "learn this from rotated copies" in text, text
    assert (folder / "report-symmetrized.md").exists() and (folder / "report-bare.md").exists()
