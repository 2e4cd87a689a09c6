"""The catalog of checks: one function per property, registered with what it is about."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.outcome import Outcome

#: What a check runs on, given the workbench: names of structure sets or of paths, [""] for one run, [] for none.
Targets = Callable[[Bench], Sequence[str]]


@dataclass(frozen=True)
class Check:
    """A registered check.

    Attributes
    ----------
    name : str
    title : str
    function : callable
        (Bench, target) -> Outcome.
    claim : str or None
        Claim of the subject that it judges; None: it applies to everything.
    targets : callable
    needs : callable
        Bench -> reason why it cannot run, or "".
    unclaimed : {"skip", "record"}
        What to do where the subject does not make the claim.
    cost : callable
        (Bench, target) -> structures that the model will be evaluated on, roughly.
    meaning, suspicion, definition : str
        From the docstring.
    judged : bool
        False: numbers are recorded whatever they are, and what cannot be measured is left out.
    """

    name: str
    title: str
    function: Callable[[Bench, str], Outcome]
    claim: str | None
    targets: Targets
    needs: Callable[[Bench], str]
    unclaimed: str
    cost: Callable[[Bench, str], int]
    meaning: str
    suspicion: str
    definition: str
    judged: bool = True


#: All checks by name, in the order in which they run.
CHECKS: dict[str, Check] = {}


def _once(bench: Bench) -> Sequence[str]:
    return [""]


def _nothing(bench: Bench) -> str:
    return ""


def check(
    title: str,
    *,
    claim: str | None,
    cost: Callable[[Bench, str], int],
    targets: Targets = _once,
    needs: Callable[[Bench], str] = _nothing,
    unclaimed: str = "skip",
    judged: bool = True,
) -> Callable[[Callable[[Bench, str], Outcome]], Callable[[Bench, str], Outcome]]:
    """Register a check; its docstring says what it means, ``When it fails:`` and ``Number:``."""

    def register(function: Callable[[Bench, str], Outcome]) -> Callable[[Bench, str], Outcome]:
        name = function.__name__.removeprefix("check_")
        meaning, suspicion, definition = _paragraphs(inspect.getdoc(function) or "")
        CHECKS[name] = Check(
            name, title, function, claim, targets, needs, unclaimed, cost, meaning, suspicion, definition, judged
        )
        return function

    return register


def _paragraphs(doc: str) -> tuple[str, str, str]:
    parts = {"meaning": "", "When it fails": "", "Number": ""}
    for paragraph in re.split(r"\n\s*\n", doc):
        text = " ".join(paragraph.split())
        head, _, rest = text.partition(": ")
        if head in parts:
            parts[head] = rest
        else:
            parts["meaning"] = f"{parts['meaning']} {text}".strip()
    return parts["meaning"], parts["When it fails"], parts["Number"]


def all_checks() -> dict[str, Check]:
    """`CHECKS`, complete."""
    import symmetrize.testing.checks  # noqa: F401 (registers them)

    return CHECKS
