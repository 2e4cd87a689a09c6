"""What checks return: findings (numbers beside their limits), outcomes, verdicts, and the report of a whole run."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

#: Name and version of the JSON layout; the version grows when a reader of older files would go wrong.
SCHEMA = "torch-symmetrize-check"
SCHEMA_VERSION = 1


class Verdict(str, enum.Enum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    #: It could not be run to its end: an exception, in the model or in the check.
    ERROR = "error"
    #: It failed, and the caller had said so with a reason.
    EXPECTED = "expected failure"
    #: It passed, although the caller had announced a failure: the announcement is out of date.
    STALE = "stale expectation"
    #: Measured, but nothing was claimed.
    RECORDED = "recorded"
    SKIPPED = "skipped"

    @property
    def good(self) -> bool:
        """Whether a run with this verdict may still pass."""
        return self not in (Verdict.FAILED, Verdict.ERROR, Verdict.STALE)


@dataclass(frozen=True)
class Finding:
    """A number and what it may be.

    Attributes
    ----------
    quantity : str
        Of what: an output, an irrep, a field.
    number : float
        Largest error, on the error scale unless ``unit`` says otherwise; inf where a value is not finite.
    limit : float or None
        None: recorded only.
    rms : float or None
        RMS error on the same scale.
    scale : float or None
        What an absolute error was divided by, in the unit of the output.
    unit : str
        Of ``number``: ``""`` for a multiple of the error scale.
    worst : str
        Where it is worst.
    """

    quantity: str
    number: float
    limit: float | None = None
    rms: float | None = None
    scale: float | None = None
    unit: str = ""
    worst: str = ""

    @property
    def ok(self) -> bool:
        """Finite and within the limit; NaN is not."""
        return self.limit is None or (math.isfinite(self.number) and self.number <= self.limit)

    @property
    def excess(self) -> float:
        """Number over limit: what findings are ordered by."""
        if not math.isfinite(self.number):
            return math.inf
        if self.limit is None:
            return 0.0
        return self.number / self.limit if self.limit > 0.0 else (math.inf if self.number > 0.0 else 0.0)

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" (limit {self.limit:.2g})"
        unit = f" {self.unit}" if self.unit else (" of the error scale" if self.scale is not None else "")
        worst = f", {self.worst}" if self.worst else ""
        return f"{self.quantity}: {self.number:.3g}{unit}{limit}{worst}"


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes
    ----------
    findings : tuple of Finding
    plots : tuple of dict
        JSON-ready data of figures; the key ``"kind"`` says which.
    note : str
    seed : int or None
        Of the generator that drew elements, permutations or directions.
    """

    findings: tuple[Finding, ...]
    plots: tuple[dict[str, Any], ...] = ()
    note: str = ""
    seed: int | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a finding, and every finding is within its limit."""
        return bool(self.findings) and all(f.ok for f in self.findings)

    def unjudged(self) -> Outcome:
        """The same numbers without limits."""
        return replace(self, findings=tuple(replace(f, limit=None) for f in self.findings))

    @property
    def worst(self) -> Finding | None:
        """The finding that exceeds its limit most; where there is no limit, the largest in the unit of the first."""
        judged = [f for f in self.findings if f.limit is not None]
        listed = judged or [f for f in self.findings if f.unit == self.findings[0].unit]
        return max(listed, key=lambda f: (f.excess, f.number), default=None)


@dataclass(frozen=True)
class Result:
    """A check of a subject on one set of structures, judged.

    Attributes
    ----------
    check, on : str
        Name of the check and of what it ran on; together they are the ``id``.
    title : str
    verdict : Verdict
    outcome : Outcome or None
        None where it did not run.
    reason : str
        Why it was skipped, is expected to fail, or what the exception said.
    meaning, suspicion, definition : str
        What the property is, what is probably wrong when it fails, and how the number is defined.
    seconds : float
    evaluations : int
        Structures that the model was called on.
    """

    check: str
    on: str
    title: str
    verdict: Verdict
    outcome: Outcome | None = None
    reason: str = ""
    meaning: str = ""
    suspicion: str = ""
    definition: str = ""
    seconds: float = 0.0
    evaluations: int = 0

    @property
    def id(self) -> str:
        """``check`` or ``check[on]``."""
        return f"{self.check}[{self.on}]" if self.on else self.check

    def explain(self) -> str:
        """Several lines: what failed, by how much, what is probably wrong."""
        lines = [f"{self.id}: {self.verdict.value}"]
        if self.outcome is not None:
            worst = sorted(self.outcome.findings, key=lambda f: (-f.excess, -f.number))[:4]
            lines += [f"  {finding}" for finding in worst]
            if self.outcome.note:
                lines.append(f"  {self.outcome.note}")
            if self.outcome.seed is not None:
                lines.append(f"  seed {self.outcome.seed}")
        if self.reason:
            lines.append(f"  {self.reason}")
        if self.verdict is Verdict.FAILED:
            lines += [f"  property: {self.meaning}", f"  probably: {self.suspicion}"]
        return "\n".join(line for line in lines if line.strip())


@dataclass(frozen=True)
class Report:
    """All results for one subject.

    Attributes
    ----------
    subject : dict
        Name, kind, group, claims, declared outputs.
    results : tuple of Result
    scales : dict
        Error scale of every output: value, kind, unit.
    structures : tuple of dict
        Structures with per-atom errors, for a viewer.
    profile : str
    seed : int
    environment : dict
        Versions, threads, date, command.
    """

    subject: Mapping[str, Any]
    results: tuple[Result, ...]
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    structures: tuple[Mapping[str, Any], ...] = ()
    profile: str = "quick"
    seed: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No failure, no error, no stale expectation, and something was judged."""
        judged = any(r.verdict in (Verdict.PASSED, Verdict.EXPECTED) for r in self.results)
        return judged and all(r.verdict.good for r in self.results)

    @property
    def failures(self) -> tuple[Result, ...]:
        """Results that do not let the run pass."""
        return tuple(r for r in self.results if not r.verdict.good)

    def __getitem__(self, key: str) -> Result:
        """Result by id."""
        for result in self.results:
            if result.id == key:
                return result
        raise KeyError(key)

    def failed_checks(self) -> set[str]:
        """Names of the checks with a failure or an error."""
        return {r.check for r in self.results if r.verdict in (Verdict.FAILED, Verdict.ERROR)}

    def count(self) -> dict[Verdict, int]:
        """How many results have each verdict."""
        return {v: sum(r.verdict is v for r in self.results) for v in Verdict}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {v.value}" for v, n in self.count().items() if n)
        lines = [f"{self.subject['name']}: {'PASSED' if self.ok else 'FAILED'} ({counts})"]
        lines += [result.explain() for result in self.failures]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become ``"inf"``."""
        from symmetrize.testing.running.serialize import report_to_dict

        return report_to_dict(self)


def worst_first(results: Sequence[Result]) -> list[Result]:
    """Failures first; checks as they ran, causes before consequences; the worst set of each first."""
    ran = list(dict.fromkeys(r.check for r in results))
    order = [Verdict.ERROR, Verdict.FAILED, Verdict.STALE, Verdict.EXPECTED, Verdict.PASSED]

    def key(result: Result) -> tuple[int, int, float]:
        rank = order.index(result.verdict) if result.verdict in order else len(order)
        worst = None if result.outcome is None else result.outcome.worst
        return rank, ran.index(result.check), 0.0 if worst is None else -worst.excess

    return sorted(results, key=key)
