"""Are the frames of a method what they have to be? For subjects made by our own symmetrizer.

The weighted set of frames of a structure or atom is compared through its moments

.. math:: M_{ak} = \\sum_j w_j \\, \\mathrm{tr}(A_a^T R_j)^k / \\sum_j w_j, \\qquad k = 1 \\ldots 4,

with fixed random matrices A: equal for equal weighted sets whatever their order, and polynomials of a degree that the
n-fold averages about an axis make independent of the choice of the azimuth. Frames without orientation (of the point
stratum, and of an auxiliary model) count with their weight only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import from_ase
from symmetrize.frames import FrameSet, Stratum
from symmetrize.methods.identity import Identity
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing.checks.common import every_set
from symmetrize.testing.checks.smoothness import judge_smoothness, usable_paths
from symmetrize.testing.measuring.elements import moved_to, permute, random_elements, shortest_distances, transform
from symmetrize.testing.measuring.smoothness import measure_smoothness
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome
from symmetrize.testing.structures.paths import Path

_N_PROBES = 3
_DEGREE = 4


def _framed(bench: Bench) -> str:
    if bench.subject.symmetrizer is None:
        return "not a Symmetrizer: no frames"
    if isinstance(bench.subject.symmetrizer.method, Identity):
        return "the method has one frame and makes no promise"
    return ""


def _frames(bench: Bench, batch: Batch) -> FrameSet:
    if bench.subject.symmetrizer is None:
        raise RuntimeError("frames: expected a Symmetrizer")
    with torch.no_grad():
        return bench.subject.symmetrizer.frames(batch)


def moments(found: FrameSet, rotation: Tensor | None = None) -> Tensor:
    """Moments of the weighted frames of every owner: Tensor of shape (n_owners, 1 + n_probes * degree).

    ``rotation`` is applied to the frames first. The first column is the share of frames without orientation.
    """
    probes = torch.randn(_N_PROBES, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotations = found.rotations.detach().cpu()
    if rotation is not None:
        rotations = rotation @ rotations
    weights = found.normalized_weights.detach().cpu()
    plain = ((found.stratum == int(Stratum.POINT)) | (found.stratum == int(Stratum.AUXILIARY))).cpu()
    overlap = torch.einsum("nij,aij->na", rotations, probes) / 3.0
    powers = torch.stack([overlap**k for k in range(1, _DEGREE + 1)], dim=2).reshape(len(weights), -1)
    powers = torch.where(plain[:, None], torch.zeros_like(powers), powers)
    rows = torch.cat([plain.to(torch.float64)[:, None], powers], dim=1) * weights[:, None]
    return segment_sum(rows, found.owner.cpu(), found.n_owners)


def _compare(bench: Bench, on: str, expected: Sequence[Tensor], got: Sequence[Tensor], cases: Sequence[str]) -> Outcome:
    found = bench[on]
    limit = bench.subject.tolerance or 100.0 * found.factor * torch.finfo(torch.float64).eps
    worst, where = 0.0, ""
    for name, a, b in zip(cases, expected, got, strict=True):
        difference = (a - b).abs()
        error = float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")
        if not error <= worst:
            worst, where = error, f"{name}, {_owner(bench, on, int(difference.amax(dim=1).argmax()))}"
    return Outcome((Finding("moments of the frames", worst, limit, unit="of order 1", worst=where),))


def _owner(bench: Bench, on: str, owner: int) -> str:
    found = bench[on]
    if bench.subject.symmetrizer is not None and bench.subject.symmetrizer.scope == "structure":
        return found.names[owner]
    structure = int(found.batch[keys.BATCH][owner])
    return f"{found.names[structure]}, atom {owner - int(found.batch[keys.PTR][structure])}"


@check(
    "Frames turn with the structure",
    claim="rotations",
    targets=every_set,
    cost=lambda bench, on: 0,
    needs=_framed,
)
def check_frame_equivariance(bench: Bench, on: str) -> Outcome:
    """The weighted set of frames of g x is g times that of x.

    When it fails: a frame depends on a fixed direction or on the sign of an eigenvector; weights are not invariant;
    for improper g, mirror images are missing.

    Number: largest change of a moment of the weighted frames beyond the one expected, over random elements.
    """
    bench = bench.double()
    found, subject = bench[on], bench.subject
    before = _frames(bench, found.batch)
    elements = random_elements(4, bench.generator("frames"), group=subject.judged_group)
    after = [moments(_frames(bench, transform(found.batch, e, dict(subject.vectors)))) for e in elements]
    return _compare(bench, on, [moments(before, e.matrix) for e in elements], after, [e.name for e in elements])


@check(
    "Frames do not see the order of the atoms",
    claim="permutation",
    targets=every_set,
    cost=lambda bench, on: 0,
    needs=_framed,
)
def check_frame_permutation(bench: Bench, on: str) -> Outcome:
    """The weighted set of frames stays the same when the atoms are renumbered.

    When it fails: ties between distances or eigenvalues are broken by index.

    Number: largest change of a moment of the weighted frames, over random permutations.
    """
    bench = bench.double()
    found, generator = bench[on], bench.generator("frame permutation")
    before, scope = moments(_frames(bench, found.batch)), bench.subject.symmetrizer
    expected, got = [], []
    for _ in range(2):
        permuted, old = permute(found.batch, generator)
        got.append(moments(_frames(bench, permuted)))
        expected.append(before[old.cpu()] if scope is not None and scope.scope == "atom" else before)
    return _compare(bench, on, expected, got, ["permutation 0", "permutation 1"])


@check(
    "Weights stay away from zero",
    claim="smoothness",
    targets=every_set,
    cost=lambda bench, on: 0,
    needs=_framed,
)
def check_frame_weights(bench: Bench, on: str) -> Outcome:
    """The total weight of the frames, which the average is divided by, is bounded below on every geometry.

    When it fails: the weights of all candidates vanish together (collinear or empty environments): outputs are then
    ratios of rounding errors, or NaN.

    Number: the inverse of the smallest total weight of a structure or atom.
    """
    found = bench[on]
    total = _frames(bench, found.batch).total_weight
    owner = int(total.argmin())
    smallest = float(total[owner])
    inverse = 1.0 / smallest if smallest > 0.0 else float("inf")
    return Outcome(
        (Finding("1 / total weight", inverse, 1e3, unit="of order 1", worst=_owner(bench, on, owner)),),
    )


@check(
    "No weight on an ill-defined frame",
    claim="smoothness",
    targets=every_set,
    cost=lambda bench, on: 0,
    needs=_framed,
)
def check_frame_conditioning(bench: Bench, on: str) -> Outcome:
    """A frame has lost its weight before it becomes ill-defined: no weighted frame turns fast when atoms move a
    little.

    When it fails: a pair of nearly collinear neighbors, or a nearly degenerate pair of eigenvalues, still has weight;
    the forces are unbounded there.

    Number: w |R(x + d) - R(x)| / |d| times the shortest distance, the largest over frames of the full stratum, for a
    random displacement d of 1e-7 of that distance.
    """
    found = bench[on]
    generator = bench.generator("conditioning")
    pos = found.batch[keys.POS]
    lengths = shortest_distances(found.batch)
    step = 1e-7 if pos.dtype == torch.float64 else 1e-3
    direction = torch.randn(pos.shape, dtype=torch.float64, generator=generator).to(pos.device)
    moved = pos.to(torch.float64) + step * lengths[found.batch[keys.BATCH]][:, None] * direction
    before, after = _frames(bench, found.batch), _frames(bench, moved_to(found.batch, moved))
    if before.n_frames != after.n_frames or not torch.equal(before.owner, after.owner):
        same = torch.zeros(0, dtype=torch.bool)
    else:
        same = (before.stratum == int(Stratum.FRAME)) & (after.stratum == int(Stratum.FRAME))
    note = "" if bool(same.any()) else "no full coordinate systems, or not the same ones after the displacement"
    if not bool(same.any()):
        return Outcome((Finding("w |dR/dx|", 0.0, 1e3, unit="of order 1"),), note=note)
    turn = (after.rotations - before.rotations).flatten(1).norm(dim=1) / step
    number = torch.minimum(before.normalized_weights, after.normalized_weights) * turn
    number = torch.where(same, number, torch.zeros_like(number))
    worst = int(number.argmax())
    return Outcome(
        (
            Finding(
                "w |dR/dx|",
                float(number[worst]),
                1e3,
                unit="of order 1",
                worst=_owner(bench, on, int(before.owner[worst])),
            ),
        ),
        seed=generator.initial_seed(),
    )


def _paths(bench: Bench) -> dict[str, Path]:
    if _framed(bench):
        return {}
    out = usable_paths(bench)
    # Outputs are scanned along all of them.
    return out if bench.profile.paths is None else dict(list(out.items())[:2])


@check(
    "Frames change smoothly",
    claim="smoothness",
    targets=lambda bench: list(_paths(bench)),
    cost=lambda bench, on: 0,
    needs=_framed,
)
def check_frame_continuity(bench: Bench, on: str) -> Outcome:
    """The weighted set of frames, and its derivatives, are continuous through critical geometries.

    When it fails: a frame appears or disappears with weight left; frames swap at a degeneracy.

    Number: jumps of the moments of the weighted frames, as for outputs.
    """
    bench = bench.double()
    path = _paths(bench)[on]
    structure = bench.turned(path)

    def curve(t: Tensor) -> Tensor:
        batch = bench.subject.prepare(from_ase([structure(float(x)) for x in t], dtype=torch.float64))
        return moments(_frames(bench, batch)).reshape(len(t), -1)

    found = measure_smoothness(
        curve, events=path.events, n_points=bench.profile.n_points, n_candidates=bench.profile.n_candidates
    )
    listed = judge_smoothness(found, bench.subject.smooth)
    return Outcome(tuple(dataclasses.replace(f, quantity=f"frames: {f.quantity}") for f in listed), note=path.what)


@check("Frame statistics", claim=None, judged=False, targets=every_set, cost=lambda bench, on: 0, needs=_framed)
def check_frame_statistics(bench: Bench, on: str) -> Outcome:
    """How many backbone evaluations a structure or atom takes, and what kind of frames they are.

    When it fails: this is recorded and cannot fail.

    Number: evaluations (frames of weight above 1e-10, copies about an axis and mirror images included) per owner, and
    the effective number of frames.
    """
    found = _frames(bench, bench[on].batch)
    scope = bench.subject.symmetrizer.scope if bench.subject.symmetrizer is not None else "owner"
    evaluations = found.evaluations.to(torch.float64)
    strata = torch.bincount(found.stratum.cpu(), minlength=len(Stratum)).tolist()
    kinds = ", ".join(f"{strata[s]} {s.name.lower()}" for s in Stratum if strata[s])
    plot = {
        "kind": "bars",
        "title": f"evaluations per {scope}, {on}",
        "labels": [str(n) for n in sorted(set(found.evaluations.tolist()))],
        "values": [found.evaluations.tolist().count(n) for n in sorted(set(found.evaluations.tolist()))],
        "y_label": f"number of {scope}s",
        "log": False,
    }
    return Outcome(
        (
            Finding(f"evaluations per {scope}, mean", float(evaluations.mean()), unit="evaluations"),
            Finding(f"evaluations per {scope}, largest", float(evaluations.max()), unit="evaluations"),
            Finding("effective number of frames, mean", float(found.effective_number.mean()), unit="frames"),
        ),
        (plot,),
        note=f"frames by stratum: {kinds}",
    )
