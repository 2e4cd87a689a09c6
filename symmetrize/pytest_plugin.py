"""pytest: options, `symmetrize.testing.parametrize_with_checks`, reports at the end of the session.

Loaded in every session of pytest: it imports nothing heavy before a test uses it.

Options: ``--symmetrize-profile``, ``--symmetrize-report``, ``--symmetrize-seed``; ini: ``symmetrize_profile``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from symmetrize.testing.fronts.parametrize import Case, Group

#: The mark that `parametrize_with_checks` sets.
MARK = "symmetrize_checks"

#: The argument of a test function that takes one check after the other.
ARGUMENT = "check"

_SUFFIXES = (".html", ".md", ".json")
_PROFILES = ("quick", "full")


@dataclass
class Session:
    """What a session of pytest has collected and written."""

    groups: list[Group] = field(default_factory=list)
    #: Parts of reports from the workers of pytest-xdist.
    parts: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and ini entries."""
    group = parser.getgroup("symmetrize", "equivariance checks")
    group.addoption(
        "--symmetrize-profile",
        choices=_PROFILES,
        default=None,
        help="how thorough parametrize_with_checks is (default: what the test or the ini says, else quick)",
    )
    group.addoption(
        "--symmetrize-report",
        metavar="PATH",
        default=None,
        help="write a report (.html, .md or .json) of the checks that ran; with several models one file each, "
        "PATH-MODEL.html",
    )
    group.addoption("--symmetrize-seed", type=int, metavar="N", default=None, help="seed of the checks (default: 0)")
    parser.addini("symmetrize_profile", "profile of parametrize_with_checks: quick or full", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse unusable options before anything runs."""
    config.addinivalue_line("markers", f"{MARK}(plan): set by symmetrize.testing.parametrize_with_checks.")
    profile, report = config.getini("symmetrize_profile"), config.getoption("--symmetrize-report")
    if profile and profile not in _PROFILES:
        raise pytest.UsageError(f"symmetrize_profile: expected one of {', '.join(_PROFILES)}, got {profile!r}")
    if report is not None and not report.endswith(_SUFFIXES):
        raise pytest.UsageError(f"--symmetrize-report: expected a name that ends in .html, .md or .json, got {report}")
    config.stash[_SESSION] = Session()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check of each model."""
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None:
        return
    if ARGUMENT not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(
            f"parametrize_with_checks: expected {metafunc.function.__name__}({ARGUMENT}), which calls {ARGUMENT}()"
        )
    config, plan = metafunc.config, mark.args[0]
    try:
        groups = plan.groups(
            profile=config.getoption("--symmetrize-profile"),
            default_profile=config.getini("symmetrize_profile") or "quick",
            seed=config.getoption("--symmetrize-seed"),
        )
        cases = [case for group in groups for case in group.cases()]
    except plan.errors as error:
        raise pytest.Collector.CollectError(f"parametrize_with_checks: {error}") from error
    session = config.stash[_SESSION]
    session.groups += [group for group in groups if group not in session.groups]
    metafunc.parametrize(ARGUMENT, cases, ids=[case.id for case in cases])


def _case(item: pytest.Item) -> Case | None:
    if item.get_closest_marker(MARK) is None:
        return None
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(ARGUMENT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record the numbers; a test that never called its check has not passed."""
    case = _case(item)
    if case is None:
        return (yield)
    try:
        value = yield
    finally:
        item.user_properties.extend(case.properties())
    if not case.called:
        pytest.fail(f"{case.id}: the test has to call {ARGUMENT}()", pytrace=False)
    return value


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports, or hand them to the controller of pytest-xdist."""
    config = session.config
    path, state = config.getoption("--symmetrize-report"), config.stash.get(_SESSION, None)
    if path is None or state is None or not (state.groups or state.parts):
        return
    from symmetrize.testing.fronts.parametrize import merged, write_reports

    # Whatever goes wrong here must not hide what the tests have found.
    try:
        parts = [part for group in state.groups if (part := group.report()) is not None]
    except Exception as error:
        state.lines.append(f"no report: {type(error).__name__}: {error}")
        return
    output = getattr(config, "workeroutput", None)
    if output is not None:
        output[MARK] = parts
        return
    try:
        state.lines += [f"report: {written}" for written in write_reports(merged([*state.parts, *parts]), path)]
    except Exception as error:
        state.lines.append(f"no report: {type(error).__name__}: {error}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """pytest-xdist: a worker is done."""
    node.config.stash[_SESSION].parts += getattr(node, "workeroutput", {}).get(MARK, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the reports are."""
    state = config.stash.get(_SESSION, None)
    if state is not None and state.lines:
        terminalreporter.section("symmetrize")
        for line in state.lines:
            terminalreporter.write_line(line)
