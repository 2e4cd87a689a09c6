r"""Jumps in a function along a path, and in its first two derivatives, located by step halving.

Order 0 is a jump of the value, 1 a kink, 2 a jump of the curvature. Around a place c, polynomials through points on
either side are extrapolated to c, and their q-th derivatives there are compared:

.. math:: J_q(h) = \left| p_+^{(q)}(c) - p_-^{(q)}(c) \right|

with points at c ± (k + 1/2) h. On halving h this tends to the jump where there is one, and otherwise falls like
:math:`h^{m - q}` for m points per side, until rounding stops it. From level to level, c follows the gap between two
points that leaves the smoothest points to either side. What is reported is the smallest
:math:`\max(J_q(h), J_q(h/2))` over the levels: an upper bound of the jump.

None of these points is c itself. At places that are named as events, where a structure may be degenerate and its
neighbors are not, the value there is compared with the mean of the two extrapolations as well: order 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from symmetrize.errors import InvalidInputError

if TYPE_CHECKING:
    from symmetrize.testing.measuring.scales import Model
    from symmetrize.testing.structures.paths import Path

#: (n,) float64 -> (n, ...): a function along a path, any number of components.
Curve = Callable[[Tensor], Tensor]

_N_FIT = 5  # points per side of the extrapolations
_N_SIDE = 7  # points per side of which the smoothness is judged
_N_MARGIN = 3  # gaps to either side of the middle that a jump may be in
_N_LEVELS = 30


@dataclass(frozen=True)
class Jump:
    """The largest jump of one derivative.

    Attributes
    ----------
    order : int
        0 value, 1 first, 2 second derivative.
    size : float
        Largest over the components, per unit of t to the power ``order``; inf where the function is not finite.
    location : float
        t.
    noise : float
        What rounding of the function amounts to in ``size``.
    step : float
        Width of the gap that the jump was seen across.
    """

    order: int
    size: float
    location: float
    noise: float
    step: float

    def __str__(self) -> str:
        what = ("value", "first derivative", "second derivative")[self.order]
        return f"{what} jumps by {self.size:.3g} (noise {self.noise:.1g}) at t = {self.location:.9g}"


@dataclass(frozen=True)
class Smoothness:
    """What `measure_smoothness` found.

    Attributes
    ----------
    jumps : tuple of Jump
        The largest of order 0, 1, 2 (up to the highest that was asked for).
    max_first, max_second : float
        Largest |f'| and |f''| on the scan (see `max_derivatives`).
    span : float
        Largest range of values of a component on the scan; 0 for a function that does not depend on t.
    t, values : Tensor of shape (n,), (n, n_components)
        The scan.
    """

    jumps: tuple[Jump, ...]
    max_first: float
    max_second: float
    span: float
    t: Tensor
    values: Tensor

    def jump(self, order: int) -> float:
        """Size of the largest jump of an order."""
        return self.jumps[order].size

    def relative(self, order: int) -> float:
        """Jump of an order over the largest range of values; infinite where the function is constant."""
        size = self.jumps[order].size
        return size / self.span if self.span > 0.0 and math.isfinite(size) else math.inf

    def __str__(self) -> str:
        numbers = f"span {self.span:.3g}, max |f'| {self.max_first:.3g}, max |f''| {self.max_second:.3g}"
        return "\n  ".join([f"smoothness: {numbers}", *map(str, self.jumps)])


def along(
    f: Model, path: Path, output: str, *, cutoff: float | None = None, dtype: torch.dtype = torch.float64
) -> Curve:
    """One output of a model along a path, as a function of t.

    Parameters
    ----------
    f : callable
        Batch -> dict of outputs. All points of a call are evaluated as one batch.
    path : Path
    output : str
    cutoff : float, optional
        Radius of the neighbor list that the batch shall bring along.
    """
    from symmetrize.data import from_ase

    def curve(t: Tensor) -> Tensor:
        structures = [path(float(x)) for x in t]
        values = f(from_ase(structures, cutoff=cutoff, dtype=dtype))[output].detach().to("cpu", torch.float64)
        return values.reshape(len(structures), -1)

    return curve


def measure_smoothness(
    curve: Curve,
    *,
    events: Sequence[float] = (),
    n_points: int = 201,
    n_candidates: int = 3,
    interval: tuple[float, float] = (0.0, 1.0),
    highest: int = 2,
) -> Smoothness:
    """Largest jumps of value, first and second derivative along a path.

    Parameters
    ----------
    curve : callable
        Tensor of shape (n,), float64 -> Tensor of shape (n, ...); has to be float64 inside, too.
    events : sequence of float
        Places to look at whatever the scan shows there.
    n_points : int
        Points of the scan.
    n_candidates : int
        How many places to refine per order, of two kinds: the largest differences on the scan, and those largest
        against their surroundings.
    interval : tuple of float
        Range of t.
    highest : int
        Highest derivative to look at.
    """
    first, last = interval
    if n_points < 16 or not last > first:
        raise InvalidInputError(f"expected n_points >= 16 and an increasing interval, got {n_points} and {interval}")
    t = torch.linspace(first, last, n_points, dtype=torch.float64)
    values = _call(curve, t)
    bad = ~torch.isfinite(values).all(dim=1)
    for event in events:
        at_event = _call(curve, torch.tensor([event], dtype=torch.float64))
        if not bool(torch.isfinite(at_event).all()):
            bad, t = torch.cat([bad, bad.new_ones(1)]), torch.cat([t, t.new_tensor([event])])
    if bool(bad.any()):
        where = float(t[bad.nonzero()[0, 0]])
        jumps = tuple(Jump(order, math.inf, where, math.inf, 0.0) for order in range(highest + 1))
        return Smoothness(jumps, math.inf, math.inf, math.inf, t, values)
    step = (last - first) / (n_points - 1)
    noise = _noise(curve, t, values)
    jumps = tuple(
        _largest(curve, values, t, step, order, noise, events, n_candidates, interval) for order in range(highest + 1)
    )
    span = float((values.amax(dim=0) - values.amin(dim=0)).max())
    slope, curvature = max_derivatives(curve, n_points=n_points, interval=interval)
    return Smoothness(jumps, slope, curvature, span, t, values)


def max_derivatives(
    curve: Curve, *, n_points: int = 201, step: float = 1e-4, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Largest |f'| and |f''| over components and a scan, by central differences: per unit of t and t squared."""
    first, last = interval
    t = torch.linspace(first + step, last - step, n_points, dtype=torch.float64)
    values = _call(curve, torch.cat([t - step, t, t + step])).reshape(3, n_points, -1)
    slope = (values[2] - values[0]) / (2 * step)
    curvature = (values[2] - 2 * values[1] + values[0]) / step**2
    if not bool(torch.isfinite(values).all()):
        return math.inf, math.inf
    return float(slope.abs().max()), float(curvature.abs().max())


def _call(curve: Curve, t: Tensor) -> Tensor:
    return curve(t).detach().to("cpu", torch.float64).reshape(len(t), -1)


def _noise(curve: Curve, t: Tensor, values: Tensor) -> float:
    """Rounding noise of the function: RMS of its sixth differences over small steps, median over places.

    The larger step is for functions that round their input to float32, which the smaller one does not get through.
    """
    found = [torch.finfo(torch.float64).eps * float(values.abs().max())]
    for step in (1e-13, 1e-7):
        levels = []
        for place in t[torch.linspace(3, len(t) - 4, 5).round().long()]:
            points = place + step * torch.arange(12, dtype=torch.float64)
            differences = torch.diff(_call(curve, points), n=6, dim=0)
            levels.append(float(differences.square().mean(dim=0).max().sqrt()) / math.sqrt(math.comb(12, 6)))
        found.append(sorted(levels)[2])
    return max(found)


def _one_sided(order: int) -> Tensor:
    """Weights of the q-th derivative at 0 of the polynomial through k + 1/2, k = 0 .. _N_FIT - 1."""
    nodes = torch.arange(_N_FIT, dtype=torch.float64) + 0.5
    powers = nodes[None, :] ** torch.arange(_N_FIT, dtype=torch.float64)[:, None]
    wanted = torch.zeros(_N_FIT, dtype=torch.float64)
    wanted[order] = math.factorial(order)
    return torch.linalg.solve(powers, wanted)


def _largest(
    curve: Curve,
    values: Tensor,
    t: Tensor,
    step: float,
    order: int,
    noise: float,
    events: Sequence[float],
    n_candidates: int,
    interval: tuple[float, float],
) -> Jump:
    chosen: list[tuple[float, bool]] = [(float(event), True) for event in events]
    chosen += [(place, False) for place in _suspects(values, t, step, order, noise, n_candidates)]
    jumps = [_refine(curve, center, fixed, step, order, noise, interval) for center, fixed in chosen]
    if order == 0:
        jumps += [_isolated(curve, float(event), step, noise, interval) for event in events]
    return max(jumps, key=lambda jump: jump.size)


def _suspects(values: Tensor, t: Tensor, step: float, order: int, noise: float, n_candidates: int) -> list[float]:
    """Where on the scan to look: the largest differences, and those that stick out most from their surroundings."""
    chosen: list[float] = []
    for n, in_contrast in ((order + 2, False), (order + 4, True)):
        score = torch.diff(values, n=n, dim=0).abs().amax(dim=1)
        middles = t[: len(score)] + 0.5 * n * step
        if in_contrast:
            # A jump is felt by n differences: the median of three times as many is that of the surroundings.
            reach = 2 * n
            padded = torch.nn.functional.pad(score[None], (reach, reach), mode="replicate")[0]
            score = score / (padded.unfold(0, 2 * reach + 1, 1).median(dim=1).values + 2.0**n * noise)
        for _ in range(n_candidates):
            worst = int(score.argmax())
            chosen.append(float(middles[worst]))
            score[max(0, worst - n) : worst + n + 1] = -1.0
    return chosen


def _refine(
    curve: Curve, center: float, fixed: bool, step: float, order: int, noise: float, interval: tuple[float, float]
) -> Jump:
    weights = _one_sided(order)
    half = _N_SIDE + _N_MARGIN - 0.5
    offsets = torch.arange(2 * (_N_SIDE + _N_MARGIN), dtype=torch.float64) - half
    sign = (-1.0) ** order
    amplification = math.sqrt(2.0 * float(weights.square().sum()))
    h = min(step, (interval[1] - interval[0]) / (4.0 * half))
    track: list[Jump] = []
    for _ in range(_N_LEVELS):
        floor = amplification * noise / h**order
        if _is_noise(track):
            break
        if h < 64 * torch.finfo(torch.float64).eps * max(abs(center), 1.0):
            break
        # Near the ends of the range there is no room for the points of both sides.
        center = min(max(center, interval[0] + half * h), interval[1] - half * h)
        values = _call(curve, center + h * offsets)
        if not bool(torch.isfinite(values).all()):
            return Jump(order, math.inf, center, math.inf, h)
        gap = 0 if fixed else _best_gap(values)
        center += h * gap
        cut = _N_SIDE + _N_MARGIN + gap
        left, right = values[cut - _N_FIT : cut].flip(0), values[cut : cut + _N_FIT]
        size = float((weights @ right - sign * (weights @ left)).abs().max()) / h**order
        track.append(Jump(order, size, center, floor, h))
        h *= 0.5
    best = _upper_bound(track)
    # The place is known best where the jump is still itself and the step is smallest.
    finest = [j for j in track if 10.0 * j.noise <= j.size and 0.5 * best.size <= j.size <= 2.0 * best.size]
    if not finest:
        return best
    # Where it was seen most clearly: the noise of the finest step says where looking closer stopped, and no more.
    return replace(finest[-1], size=best.size, noise=min(j.noise for j in finest))


def _is_noise(track: Sequence[Jump]) -> bool:
    """Whether halving further shows rounding only."""
    return len(track) > 1 and all(10.0 * jump.noise >= jump.size for jump in track[-2:])


def _upper_bound(track: Sequence[Jump]) -> Jump:
    """The least that two levels in a row stay below, lest a change of sign pass for a small jump."""
    pairs = [max(pair, key=lambda jump: jump.size) for pair in itertools.pairwise(track)]
    return min(pairs or track, key=lambda jump: jump.size)


def _isolated(curve: Curve, place: float, step: float, noise: float, interval: tuple[float, float]) -> Jump:
    """How far the value at a place is from what it tends to from either side, by halving as in `_refine`."""
    weights = _one_sided(0)
    offsets = torch.arange(_N_FIT, dtype=torch.float64) + 0.5
    room = min(place - interval[0], interval[1] - place)
    h = min(step, room / _N_FIT)
    track: list[Jump] = []
    while (
        not _is_noise(track)
        and len(track) < _N_LEVELS
        and h > 64 * torch.finfo(torch.float64).eps * max(abs(place), 1.0)
    ):
        values = _call(curve, torch.cat([place - h * offsets, place + h * offsets, offsets.new_tensor([place])]))
        if not bool(torch.isfinite(values).all()):
            return Jump(0, math.inf, place, math.inf, h)
        left, right, middle = values[:_N_FIT], values[_N_FIT:-1], values[-1]
        size = float((middle - 0.5 * (weights @ left + weights @ right)).abs().max())
        track.append(Jump(0, size, place, (1.0 + float(weights.norm())) * noise, h))
        h *= 0.5
    # At an end of the scan there is no other side to compare with.
    return _upper_bound(track) if track else Jump(0, 0.0, place, noise, 0.0)


def _best_gap(values: Tensor) -> int:
    """Which gap, counted from the middle, leaves the smoothest points beside it; the middle unless twice as good."""
    differences = torch.diff(values, n=5, dim=0).abs().amax(dim=1)
    roughness = {}
    for gap in range(-_N_MARGIN, _N_MARGIN + 1):
        cut = _N_SIDE + _N_MARGIN + gap
        sides = [differences[cut - _N_SIDE : cut - 5], differences[cut : cut + _N_SIDE - 5]]
        roughness[gap] = float(torch.cat(sides).max())
    best = min(roughness, key=lambda gap: (roughness[gap], abs(gap)))
    return best if 2.0 * roughness[best] < roughness[0] else 0
