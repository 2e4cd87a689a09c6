"""What is known about each tool, with reasons: strict, in both directions."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.measure import COLUMNS

_DEGENERATE = (
    "where eigenvalues of the covariance coincide (methane, SF6, propyne, benzene, the square), eigenvectors are "
    "arbitrary within their plane or in all directions, and an average over signs is none over those"
)
_GAPS = "the derivative of an eigenvector divides by the gaps between eigenvalues"
_ROUNDING = "in degenerate structures, rounding decides about the frame, and rounding depends on the order of the atoms"
_JUMPS = "the frame jumps where eigenvalues cross"
_NETWORK = "nothing makes the network equivariant"
_SIGN = "eigenvectors have no sign: which of the two comes out depends on the orientation"
_ONE_SIGN = (
    "one of the eight choices of signs, by the sign of the sum of the components of each eigenvector, which depends on "
    "the orientation"
)
_RANDOM = "one of the eight frames is drawn at random in every call"
_WITHIN = "the energy is differentiated within each frame, and how the frame moves with the atoms is left out"
_VANISH = (
    "the vectors that the frame is made of vanish or become parallel in symmetric, planar and collinear structures, "
    "and rounding decides; so it does about which of several equally near neighbors count"
)
_NOISE = (
    "where the vectors that the frame is made of are parallel or vanish, random noise is added to them, new in every "
    "call"
)
_NORMS = "the division by a length or an area that vanishes is as steep as rounding allows"
_FIXED = (
    "a sum over a fixed set of orientations is exact for what varies with no more than its degree, and not beyond it"
)
_PROPER = "its frames are rotations: only SO(3) is claimed"

Expectation = tuple[str, str]


def _all(verdict: str, reason: str, *columns: str) -> dict[str, Expectation]:
    return dict.fromkeys(columns, (verdict, reason))


_ROTATIONS = ("generic", "symmetric", "planar", "collinear")
_EVERY = (*_ROTATIONS, "inversion")
_LEFT_OUT = {
    "features": "it acts on features, not on structures",
    "smooth": "not measured: it would take hours, and the same sum of fewer terms is smooth",
    "degree": "only the error on generic structures is measured, to see it fall with the degree",
    "own": "it is a network of its own",
}

_EIGENVECTORS = (
    _all("fail", _DEGENERATE, "symmetric", "planar")
    | _all("fail", _JUMPS, "smooth")
    | _all("fail", _GAPS, "gradients")
    | _all("fail", _ROUNDING, "permutation")
)
_LEARNED = _all("not claimed", _PROPER, "inversion") | _all("fail", _NORMS, "gradients") | _all("exact", "", "kind")
_LAYER = _all(
    "not run",
    _LEFT_OUT["features"],
    "symmetric",
    "planar",
    "collinear",
    "smooth",
    "gradients",
    "conservative",
    "evaluations",
)

#: Tool -> column -> (verdict, reason), where it is not a pass; "exact" is expected where nothing else is.
EXPECTED: dict[str, dict[str, Expectation]] = {
    "network": _all("fail", _NETWORK, *_EVERY) | _all("neither", _NETWORK, "kind"),
    "ecse": {},
    "frame-averaging": _EIGENVECTORS,
    "faenet-all": _EIGENVECTORS | {"gradients": ("pass", "")} | _all("fail", _WITHIN, "conservative"),
    "faenet-det": _all("fail", _ONE_SIGN, *_EVERY)
    | _all("fail", _JUMPS, "smooth")
    | _all("fail", _ROUNDING, "permutation")
    | _all("fail", _WITHIN, "conservative")
    | _all("neither", _ONE_SIGN, "kind"),
    "faenet-stochastic": _all("fail", _RANDOM, *_EVERY, "smooth", "permutation", "conservative")
    | _all("neither", _RANDOM, "kind"),
    "normalize-rotation": _all("fail", _SIGN, *_EVERY)
    | {name: _EIGENVECTORS[name] for name in ("smooth", "gradients", "permutation")}
    | _all("neither", _SIGN, "kind"),
    "normalize-rotation-sort": _all("fail", _SIGN, "generic", "inversion", "symmetric", "planar")
    | {name: _EIGENVECTORS[name] for name in ("smooth", "gradients", "permutation")}
    | _all("neither", _SIGN, "kind"),
    "equiadapt": _LEARNED | _all("fail", _VANISH, "symmetric", "planar", "collinear", "smooth", "permutation"),
    "lloca": _LEARNED | _all("fail", _NOISE, "symmetric", "planar", "collinear", "smooth", "permutation"),
    "metatomic-3": _all("fail", _FIXED, *_EVERY) | _all("approximate", _FIXED, "kind"),
    "metatomic-7": _all("fail", _FIXED, *_EVERY)
    | _all("approximate", _FIXED, "kind")
    | _all("not run", _LEFT_OUT["smooth"], "smooth"),
    "metatomic-11": _all("fail", _FIXED, "generic", "inversion")
    | _all("approximate", _FIXED, "kind")
    | _all(
        "not run",
        _LEFT_OUT["degree"],
        *("symmetric", "planar", "collinear", "smooth", "gradients", "conservative", "permutation"),
    ),
    "e3nn-linear": _LAYER,
    "e3nn-product": _LAYER,
    "e3nn-gate": _LAYER,
    "e3nn-network": _all("not run", _LEFT_OUT["own"], "evaluations"),
}

#: Tool -> result that is in no column -> reason of its failure.
OTHERS: dict[str, dict[str, str]] = {
    "faenet-stochastic": dict.fromkeys(
        ("translation_invariance[generic]", "determinism", "batch_independence"), _RANDOM
    ),
}

#: Model -> judge -> whether it should accept in every run (True), in none (False), or in some (None), as is known.
JUDGED: dict[str, dict[str, bool | None]] = {
    "sound": dict.fromkeys(("e3nn assert_equivariant", "symmetrize assert_equivariant", "symmetrize check"), True),
    "NaN": {"e3nn assert_equivariant": True, "symmetrize assert_equivariant": False, "symmetrize check": False},
    "zero": {"e3nn assert_equivariant": True, "symmetrize assert_equivariant": False, "symmetrize check": False},
    "small": {"e3nn assert_equivariant": True, "symmetrize assert_equivariant": False, "symmetrize check": False},
    "patch": {"e3nn assert_equivariant": None, "symmetrize assert_equivariant": False, "symmetrize check": False},
}

#: Columns that a result outside of which is compared by `OTHERS`.
_IN_COLUMNS = (
    "rotation_equivariance",
    "inversion_equivariance",
    "permutation_equivariance",
    "smoothness",
    "exactness",
    "forces: ",
)


def compare_peer(key: str, row: dict[str, Any]) -> list[str]:
    """Mark every cell with what was expected; returns what is not as expected."""
    unexpected = []
    for column in COLUMNS:
        cell = row["columns"][column]
        default = {"kind": "exact", "evaluations": "recorded"}.get(column, "pass")
        wanted, reason = EXPECTED[key].get(column, (default, ""))
        cell["expected"] = wanted
        if reason:
            cell["reason"] = reason
        if cell["verdict"] != wanted:
            unexpected.append(f"{row['title']}, {COLUMNS[column]}: expected {wanted}, got {cell['verdict']} ({cell})")
    for name, result in row["results"].items():
        if name.startswith(_IN_COLUMNS):
            continue
        bad, known = result["verdict"] in ("failed", "error"), name in OTHERS.get(key, {})
        if bad != known:
            unexpected.append(f"{row['title']}, {name}: expected {'a failure' if known else 'a pass'}, got {result}")
    return unexpected


def compare_judges(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as expected of the judges."""
    unexpected = []
    for row in rows:
        for judge, wanted in JUDGED[row["key"]].items():
            share = row[judge]["accepted"] / row[judge]["runs"]
            accepts = None if 0.0 < share < 1.0 else share == 1.0
            if wanted is None:
                # By chance; most of the time, since the patch is small.
                as_expected = share > 0.5
            else:
                as_expected = accepts is wanted
            row[judge]["as_expected"] = as_expected
            if not as_expected:
                unexpected.append(f"{judge} on {row['model']}: {row[judge]}")
    return unexpected
