"""What a check report says: results in groups, the sentences at its top, and how numbers stand to their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from symmetrize.report.check_figures import Drawing
from symmetrize.report.tables import number
from symmetrize.testing.running.outcome import Finding, Outcome, Report, Result, Verdict, worst_first

#: Checks that are shown first where all is well.
_FAMOUS = (
    "rotation_equivariance",
    "inversion_equivariance",
    "permutation_equivariance",
    "translation_invariance",
    "smoothness",
)


@dataclass
class Group:
    """The results of one check that stand together on the page."""

    check: str
    title: str
    results: list[Result]
    figures: list[Drawing] = field(default_factory=list)
    more: list[Drawing] = field(default_factory=list)

    @property
    def bad(self) -> list[Result]:
        """Those that do not let a run pass."""
        return [r for r in self.results if not r.verdict.good]

    @property
    def fine(self) -> list[Result]:
        """The others."""
        return [r for r in self.results if r.verdict.good]

    @property
    def worst(self) -> Result:
        """Furthest beyond its limit; where there is none, the largest number."""
        return max(self.results, key=badness)

    @property
    def about(self) -> Result:
        """A result with the words on the property."""
        return self.results[0]


def summary(report: Report) -> list[str]:
    """Sentences: what is broken, by how much, and whether it matters; or how far from its limits all is."""
    judged = [r for r in report.results if r.verdict in (Verdict.PASSED, Verdict.EXPECTED)]
    sentences = _broken(report)
    if not sentences and not judged:
        sentences.append("Nothing was judged: no check applied to what this model claims.")
    elif not sentences:
        numbers = [(f, r) for r in judged if r.outcome for f in r.outcome.findings if f.ok and f.limit]
        sentences.append(f"Everything that the model claims and that was checked holds, in {len(judged)} checks.")
        if numbers:
            found, result = max(numbers, key=lambda pair: pair[0].excess)
            sentences.append(
                f"Closest to its limit: {found.quantity} at {_percent(found.excess)} of it ({_name(result)})."
            )
    expected = [r for r in report.results if r.verdict is Verdict.EXPECTED]
    if expected:
        sentences.append(f"{_count(len(expected), 'failure')} had been announced with a reason.")
    sentences += _not_claimed(report)
    return sentences


def _broken(report: Report) -> list[str]:
    groups = grouped(report)["failed"]
    failed = [g for g in groups if any(r.verdict is Verdict.FAILED for r in g.results)]
    sentences = []
    if failed:
        parts = []
        for group in failed[:4]:
            n = sum(r.verdict is Verdict.FAILED for r in group.results)
            parts.append(group.title + (f" (on {n} of {len(group.results)})" if len(group.results) > 1 else ""))
        parts += [f"{len(failed) - 4} more"] if len(failed) > 4 else []
        sentences.append(f"Broken: {_and(parts)}.")
        result = max((r for g in failed for r in g.bad if r.outcome and r.outcome.worst), key=_telling, default=None)
        if result is not None and result.outcome is not None and result.outcome.worst is not None:
            found = result.outcome.worst
            sentences.append(f"Worst: {_described(report, found)} ({_name(result)}{_comma(found.worst)}).")
            sentences += _matters(found)
    errors = [r for r in report.results if r.verdict is Verdict.ERROR]
    if errors:
        names = list(dict.fromkeys(r.title for r in errors))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sentences.append(f"{_count(len(errors), 'check')} could not be run to the end: {', '.join(names[:3])}{more}.")
    stale = [r for r in report.results if r.verdict is Verdict.STALE]
    if stale:
        which = ", ".join(r.id for r in stale[:3])
        sentences.append(f"Announced as failures, and yet they pass: {which}{' and more' if len(stale) > 3 else ''}.")
    return sentences


def _telling(result: Result) -> tuple[bool, bool, float]:
    """Before all what is not finite, then what is on the error scale, which everyone can read."""
    found = None if result.outcome is None else result.outcome.worst
    if found is None:
        return (False, False, 0.0)
    return (not math.isfinite(found.number), not found.unit and found.scale is not None, found.excess)


def _described(report: Report, found: Finding) -> str:
    if not math.isfinite(found.number):
        return f"{found.quantity} is not finite"
    unit = f" {found.unit}" if found.unit else (" of its error scale" if found.scale is not None else "")
    absolute = absolute_of(report, found)
    text = f"{found.quantity} is off by {number(found.number)}{unit}{f' ({absolute})' if absolute else ''}"
    return text + (f", {ratio(found)} times the limit" if ratio(found) not in ("", "∞") else "")


def _matters(found: Finding) -> list[str]:
    if not math.isfinite(found.number):
        return ["Whatever uses these numbers will break."]
    if found.unit or found.scale is None:
        return []
    if found.number >= 0.3:
        return ["That is as large as what the model predicts: results depend on it."]
    if found.number >= 1e-3:
        return ["That is a visible part of what the model predicts: results depend on it."]
    if found.number >= 1e-6:
        return ["Small beside what the model predicts, but no rounding: it can show in derivatives and in long runs."]
    return ["Invisible in a single prediction, but more than rounding explains: something is not exact."]


def _not_claimed(report: Report) -> list[str]:
    recorded = [r for r in report.results if r.verdict is Verdict.RECORDED and r.outcome and r.outcome.worst]
    parts = []
    for title in dict.fromkeys(r.title for r in recorded):
        found = [f for r in recorded if r.title == title and r.outcome for f in r.outcome.findings]
        scaled = [f.number for f in found if not f.unit and f.scale is not None]
        if scaled:
            worst = max((v if math.isfinite(v) else math.inf for v in scaled), default=0.0)
            parts.append(f"{title} (up to {number(worst)} of the error scale)")
    return [f"Measured, not judged: {_and(parts[:4])}."] if parts else []


def grouped(report: Report) -> dict[str, list[Group]]:
    """Groups of results by what became of them; within each, worst first for failures and otherwise as run."""
    kinds: dict[str, list[Group]] = {k: [] for k in ("failed", "expected", "recorded", "passed", "skipped")}
    bad = {r.check for r in report.failures}
    of_verdict = {Verdict.EXPECTED: "expected", Verdict.RECORDED: "recorded", Verdict.SKIPPED: "skipped"}
    for result in worst_first(report.results) if bad else report.results:
        kind = of_verdict.get(result.verdict, "failed" if result.check in bad else "passed")
        known = next((g for g in kinds[kind] if g.check == result.check), None)
        if known is None:
            kinds[kind].append(Group(result.check, result.title, [result]))
        else:
            known.results.append(result)
    order = [r.check for r in report.results]
    for kind, groups in kinds.items():
        if kind != "failed":
            groups.sort(key=lambda group: order.index(group.check))
    return kinds


def key_numbers(report: Report) -> list[dict[str, Any]]:
    """Key numbers: failures first, then famous checks, then those closest to their limits."""
    groups: dict[str, Group] = {}
    ran = list(dict.fromkeys(r.check for r in report.results))
    for result in report.results:
        if result.verdict not in (Verdict.SKIPPED, Verdict.RECORDED):
            groups.setdefault(result.check, Group(result.check, result.title, [])).results.append(result)

    def rank(group: Group) -> tuple[int, float]:
        famous = _FAMOUS.index(group.check) if group.check in _FAMOUS else len(_FAMOUS)
        return (0, float(ran.index(group.check))) if group.bad else (1 + famous, -badness(group.worst)[0])

    tiles = []
    for group in sorted(groups.values(), key=rank)[:5]:
        result = max(group.bad or group.results, key=badness)
        found = result.outcome.worst if result.outcome is not None else None
        of = f"{len(group.bad)} of {len(group.results)} fail" if group.bad else f"all {len(group.results)} hold"
        tiles.append(
            {
                "title": group.title,
                "check": group.check,
                "ok": not group.bad,
                "value": "no result" if found is None else number(found.number),
                "of": "" if found is None else unit_of(report, found) or "of the error scale",
                "note": "" if found is None or found.limit is None else f"limit {number(found.limit)}",
                "sets": of if len(group.results) > 1 else "",
            }
        )
    return tiles


def badness(result: Result) -> tuple[float, float]:
    """Excess and number of the worst finding, to order results by."""
    found = None if result.outcome is None else result.outcome.worst
    if found is None:
        return (math.inf if not result.verdict.good else -1.0, 0.0)
    return (found.excess, found.number if math.isfinite(found.number) else math.inf)


def rounding_limit(report: Report) -> float | None:
    """Largest error that rounding explains, from the limits of what was judged on the error scale."""
    outcomes: list[Outcome] = [r.outcome for r in report.results if r.outcome is not None]
    limits = [f.limit for o in outcomes for f in o.findings if f.limit and not f.unit and f.scale is not None]
    return min(limits, default=None)


def unit_of(report: Report, found: Finding) -> str:
    return found.unit if found.unit else ("" if found.scale is not None else "absolute")


def absolute_of(report: Report, found: Finding) -> str:
    """The number in the unit of the output, where there is one."""
    scale: Mapping[str, Any] = report.scales.get(found.quantity.split(": ")[0], {})
    unit = scale.get("unit")
    if not unit or found.scale is None or found.unit or not math.isfinite(found.number):
        return ""
    return f"{number(found.number * found.scale)} {unit}"


def ratio(found: Finding) -> str:
    """Number over limit."""
    if found.limit is None or not math.isfinite(found.excess):
        return "" if found.limit is None else "∞"
    return number(found.excess, 2)


def place(found: Finding) -> float:
    """Percent of the width: six decades below the limit, which is at 30 percent, and fourteen above."""
    if not math.isfinite(found.excess):
        return 100.0
    return min(max(30.0 + 5.0 * math.log10(max(found.excess, 1e-30)), 0.0), 100.0)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{number(100 * share, 2)} %"


def _name(result: Result) -> str:
    return result.title + (f" on {result.on}" if result.on else "")


def _comma(text: str) -> str:
    return f": {text}" if text else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)
