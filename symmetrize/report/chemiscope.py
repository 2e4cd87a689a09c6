"""Structures colored by the error of each atom, in a chemiscope viewer inside the page.

Chemiscope has no export as a page of its own; its library is taken from the installed package and travels compressed.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symmetrize.report.check_figures import numbers

#: log10 of the smallest error that is told from zero.
FLOOR = -17.0

_LIBRARY = "sphinx/static/chemiscope.min.js"


@functools.lru_cache(maxsize=1)
def library() -> str | None:
    """Chemiscope's JavaScript with the licenses of what it contains, gzipped, as base64; None where not installed."""
    found = importlib.util.find_spec("chemiscope")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    script = folder / _LIBRARY
    if not script.is_file():
        return None
    licenses = [*sorted(folder.glob("static/*LICENSE*")), *sorted(folder.parent.glob("chemiscope-*/licenses/LICENSE"))]
    notices = "".join(
        "/*! " + path.read_text(encoding="utf-8").replace("*/", "* /") + " */\n" for path in reversed(licenses)
    )
    text = notices + script.read_text(encoding="utf-8")
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def dataset(structures: Sequence[Mapping[str, Any]], limit: float | None) -> dict[str, Any] | None:
    """What the viewer is given: chemiscope's dataset, what atoms can be colored by, and errors of whole structures.

    Parameters
    ----------
    structures : sequence of dict
        As in `symmetrize.testing.running.outcome.Report.structures`.
    limit : float or None
        Error that rounding explains; sets the range of colors.
    """
    drawable = [s for s in structures if len(s["numbers"]) and _finite(s["positions"])]
    if not drawable:
        return None
    names = list(dict.fromkeys(name for s in drawable for name in s.get("atom_errors", {})))
    properties: dict[str, dict[str, Any]] = {}
    choices: list[dict[str, Any]] = []
    worst: dict[str, float] = {}
    for name in names:
        values: list[float | None] = []
        for s in drawable:
            errors = s.get("atom_errors", {}).get(name)
            values += [None] * len(s["numbers"]) if errors is None else [_log(e) for e in numbers(errors)]
        known = [v for v in values if v is not None]
        label = f"log10 error of {name}"
        low, high = _range(known, limit)
        # The viewer has no color for what is missing or not finite: missing is lowest, not finite is highest.
        properties[label] = {
            "target": "atom",
            "values": [low if v is None else min(v, high + 1.0) for v in values],
            "description": "RMS over rotations, on the error scale",
        }
        choices.append({"name": name, "property": label, "min": low, "max": high})
        worst[name] = max(known, default=FLOOR)
    choices.sort(key=lambda choice: -worst[choice["name"]])
    return {
        "dataset": {
            "meta": {"name": "structures of the check"},
            "structures": [_structure(s) for s in drawable],
            "properties": properties or {"structure": {"target": "structure", "values": list(range(len(drawable)))}},
            "environments": [
                {"structure": k, "center": i, "cutoff": 0.0}
                for k, s in enumerate(drawable)
                for i in range(len(s["numbers"]))
            ],
        },
        "choices": choices,
        "structures": [
            {
                "name": str(s.get("name", k + 1)),
                "set": str(s.get("set", "")),
                "cell": "cell" in _structure(s),
                "errors": {n: _word(e) for n, e in s.get("structure_errors", {}).items()},
                "atoms": {n: _word(_largest(e)) for n, e in s.get("atom_errors", {}).items()},
                "worst": _word(_worst(s)),
            }
            for k, s in enumerate(drawable)
        ],
        "first": max(range(len(drawable)), key=lambda k: _worst(drawable[k])),
    }


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", "")


def _finite(positions: Sequence[Sequence[Any]]) -> bool:
    return all(math.isfinite(x) for row in positions for x in numbers(row))


def _structure(entry: Mapping[str, Any]) -> dict[str, Any]:
    from ase.data import chemical_symbols

    x, y, z = (np.array([numbers(row) for row in entry["positions"]]) @ _TILT).T.tolist()
    out = {
        "size": len(entry["numbers"]),
        "names": [chemical_symbols[n] if 0 <= n < len(chemical_symbols) else "X" for n in entry["numbers"]],
        "x": x,
        "y": y,
        "z": z,
    }
    cell = np.array([numbers(row) for row in entry.get("cell") or []])
    if cell.shape == (3, 3) and all(entry.get("pbc", ())) and abs(float(np.linalg.det(cell))) > 1e-8:
        out["cell"] = (cell @ _TILT).ravel().tolist()
    return out


def _turn(axis: int, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


#: The first view is along z; in planes and axes of symmetry, where structures like to lie, atoms hide each other.
_TILT = _turn(2, 8.0) @ _turn(1, 28.0) @ _turn(0, 17.0)


def _log(error: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return math.log10(error) if error > 10.0**FLOOR else FLOOR


def _range(values: Sequence[float], limit: float | None) -> tuple[float, float]:
    """Colors: one calm range for rounding; otherwise up to the largest error, over two decades at most."""
    finite = [v for v in values if math.isfinite(v)]
    top = max(finite, default=0.0)
    rounding = math.log10(limit) if limit is not None and limit > 0.0 else -10.0
    if top <= rounding and len(finite) == len(values):
        return FLOOR, rounding
    high = math.ceil(2.0 * top) / 2.0
    low = math.floor(2.0 * min(finite, default=high)) / 2.0
    return min(max(low, high - 2.0), high - 1.0), high


def _largest(errors: Sequence[Any]) -> float:
    values = [e if math.isfinite(e) else math.inf for e in numbers(errors)]
    return max(values, default=0.0)


def _worst(entry: Mapping[str, Any]) -> float:
    every = [e for errors in entry.get("atom_errors", {}).values() for e in errors]
    return _largest([*every, *entry.get("structure_errors", {}).values()])


def _word(value: Any) -> str:
    from symmetrize.report.tables import number

    return number(float(value))
