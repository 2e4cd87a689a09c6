"""Reports as JSON-ready dictionaries, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from symmetrize.errors import InvalidInputError
from symmetrize.testing.running.outcome import SCHEMA, SCHEMA_VERSION, Finding, Outcome, Report, Result, Verdict


def plain(value: Any) -> Any:
    """Tensors, tuples, enums and infinite numbers in JSON's terms: lists, strings, ``"inf"``, ``"-inf"``, ``"nan"``."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Verdict):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(v) for v in items]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def number(value: Any) -> Any:
    """The inverse of `plain` for one number."""
    return float(value) if value in ("inf", "-inf", "nan") else value


def report_to_dict(report: Report) -> dict[str, Any]:
    """JSON-ready dictionary with schema name and version."""
    content = plain(report)
    for entry, result in zip(content["results"], report.results, strict=True):
        entry["id"] = result.id
    return {"schema": SCHEMA, "version": SCHEMA_VERSION, "verdict": "passed" if report.ok else "failed", **content}


def report_from_dict(content: Mapping[str, Any]) -> Report:
    """A report as it was written.

    Raises
    ------
    InvalidInputError
        Not a report, or one of a later version.
    """
    if content.get("schema") != SCHEMA:
        raise InvalidInputError(f"report: expected schema {SCHEMA!r}, got {content.get('schema')!r}")
    if int(content.get("version", 0)) > SCHEMA_VERSION:
        raise InvalidInputError(f"report: expected version {SCHEMA_VERSION} or lower, got {content['version']}")

    def finding(entry: Mapping[str, Any]) -> Finding:
        return Finding(**{k: v if k in ("quantity", "unit", "worst") else number(v) for k, v in entry.items()})

    def result(entry: Mapping[str, Any]) -> Result:
        fields = {k: v for k, v in entry.items() if k != "id"}
        found = fields["outcome"]
        if found is not None:
            found = Outcome(
                tuple(finding(f) for f in found["findings"]), tuple(found["plots"]), found["note"], found["seed"]
            )
        return Result(**{**fields, "verdict": Verdict(fields["verdict"]), "outcome": found})

    return Report(
        subject=content["subject"],
        results=tuple(result(entry) for entry in content["results"]),
        scales=content["scales"],
        structures=tuple(content["structures"]),
        profile=content["profile"],
        seed=content["seed"],
        environment=content["environment"],
    )
