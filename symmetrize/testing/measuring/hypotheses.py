"""How a tensor of unknown meaning transforms under the orthogonal group: hypotheses, from the simple to the general."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.tolerances import tolerance

#: Numbers that are kept of a tensor (random rows of larger ones), and features up to which a matrix is fitted.
_NUMBERS, _FEATURES = 2**16, 512
#: Variation below this fraction of the RMS is not what errors are compared with.
_SMALL = 1e-3
#: Rows beyond twice the number of features that a fit needs.
_SPARE = 16

LINEAR, OFFSET = "linear representation", "vector + constant"
BREAKS, MISLABELED, NOT_FINITE, RANDOM, NOT_COMPARABLE = (
    "breaks",
    "not as declared",
    "not finite",
    "not deterministic",
    "not comparable",
)

#: Hypothesis: its label, and which axes it is about.
_Name = tuple[str, tuple[int, ...]]


class Verdict(NamedTuple):
    """``transforms_as`` (None: cannot be told), residuals (all, proper and improper elements) and a remark."""

    transforms_as: str | None
    residual: float
    residual_proper: float
    residual_improper: float
    note: str = ""


class Track:
    """Values of a tensor, and how those of transformed input differ from what each hypothesis expects.

    Parameters
    ----------
    tensor : Tensor of shape (n_rows, ...)
        Kept in float64 on the CPU.
    spec : OutputSpec, optional
        What it is declared to be.
    binding : bool
        Whether it has to be that.
    """

    def __init__(self, tensor: Tensor, spec: OutputSpec | None = None, binding: bool = False) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype.to_real()
        self.spec, self.binding = spec, binding
        self.status: str | None = None
        self.difference = 0.0
        self.chosen: Tensor | None = None
        n_rows = tensor.shape[0] if tensor.dim() else 1
        width = tensor.numel() // n_rows
        # Never fewer than a fit can do with.
        kept = max(64, _NUMBERS // width, 4 * width if width <= _FEATURES else 0)
        if kept < n_rows:
            self.chosen = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))[:kept].sort().values
        self.reference = self._rows(tensor)
        flat = self.reference.reshape(len(self.reference), -1)
        size, spread = _rms(flat), _rms(flat - flat.mean(dim=0)) if len(flat) > 1 else _rms(flat)
        self.ratio = max(spread / size, _SMALL) if size > 0.0 else 1.0
        self.scale = size * self.ratio
        self.constant = len(flat) > 1 and spread <= 100 * torch.finfo(self.dtype).eps * size
        # Worst residual of each hypothesis for [improper, proper] elements.
        self.residuals: dict[_Name, list[float]] = {}
        self._fits: list[_Fit] | None = None
        self._excludable = False
        if not bool(torch.isfinite(flat).all()):
            self.status, self.difference = NOT_FINITE, math.inf

    def _rows(self, tensor: Tensor) -> Tensor:
        value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        value = value if tensor.dim() else value.reshape(1, -1)
        if self.chosen is not None:
            value = value[self.chosen.to(value.device)]
        # A copy: what follows in the model may work in place.
        return value.to("cpu", torch.float64, copy=True)

    def compare(self, tensor: Tensor, g: Tensor | None) -> None:
        """Take the values for input transformed by ``g`` (3, 3), or by nothing where None, into account."""
        if self.status is not None:
            return
        if tuple(tensor.shape) != self.shape:
            self.status, self.difference = NOT_COMPARABLE, math.inf
            return
        value = self._rows(tensor)
        if not bool(torch.isfinite(value).all()):
            self.status, self.difference = NOT_FINITE, math.inf
            return
        if g is None:
            self.difference = self._relative(value - self.reference)
            if not self.difference <= _limit(self.dtype):
                self.status = RANDOM
            return
        proper = bool(torch.linalg.det(g) > 0.0)
        found = {name: self._relative(value - x) for name, x in self._expected(value, g, 1.0 if proper else -1.0)}
        smallest = min(error for (label, _), error in found.items() if label != OFFSET)
        if smallest <= _limit(self.dtype):
            found[LINEAR, ()] = smallest  # what is simple is linear, too
        else:
            fits = self._fitted()
            found[LINEAR, ()] = min((self._relative(fit.error(value)) for fit in fits), default=math.inf)
        for name, error in found.items():
            self.residuals.setdefault(name, [math.nan, math.nan])[proper] = _worst(
                self.residuals.get(name, [math.nan, math.nan])[proper], error
            )

    def missing(self) -> None:
        """There was no such tensor for transformed input."""
        if self.status is None:
            self.status, self.difference = NOT_COMPARABLE, math.inf

    def _relative(self, difference: Tensor) -> float:
        error = _rms(difference)
        if error == 0.0:
            return 0.0
        return error / self.scale if self.scale > 0.0 else math.inf

    def _expected(self, value: Tensor, g: Tensor, sign: float) -> Iterator[tuple[_Name, Tensor]]:
        h = self.reference
        yield ("invariant", ()), h
        # Component by component, whichever sign is better.
        flip = (value + h).square().sum(dim=0) < (value - h).square().sum(dim=0)
        yield ("pseudo-invariant", ()), torch.where(flip, -h, h) if sign < 0.0 else h
        if self.spec is not None:
            yield (_label(self.spec), ()), _rotated(h, self.spec, g)
        axes = [axis for axis in range(1, h.dim()) if h.shape[axis] == 3]
        for axis in axes:
            turned = _turned(h, g, axis)
            yield ("vector", (axis,)), turned
            yield ("pseudovector", (axis,)), sign * turned
        if h.dim() > 1 and h.shape[-1] % 3 == 0 and h.shape[-1] > 3:
            for n, axis in (((-1, 3), -1), ((3, -1), -2)):
                turned = _turned(h.unflatten(-1, n), g, axis).flatten(-2)
                yield ("vector", (0, axis)), turned
                yield ("pseudovector", (0, axis)), sign * turned
        for a, b in itertools.combinations(axes, 2):
            turned = _turned(_turned(h, g, a), g, b)
            yield ("tensor", (a, b)), turned
            yield ("pseudotensor", (a, b)), sign * turned
        if len(h) > 1:
            for axis in axes:
                yield (OFFSET, (axis,)), _turned(h - h.mean(dim=0), g, axis) + value.mean(dim=0)

    def _fitted(self) -> list[_Fit]:
        if self._fits is None:
            h = self.reference
            wide = [None] if h.dim() <= 2 else [None, *(axis for axis in range(1, h.dim()) if h.shape[axis] > 1)]
            rcond = 100 * torch.finfo(self.dtype).eps / self.ratio
            fits = {axis: _Fit(h, axis, rcond) for axis in wide if _fittable(h, axis)}
            # All features together are the general case; per axis is what layers do in practice.
            self._excludable = None in fits or (len(wide) > 1 and all(axis in fits for axis in wide[1:]))
            self._fits = list(fits.values())
        return self._fits

    def verdict(self, limit: float) -> Verdict:
        """The first hypothesis whose residual is within the limit."""
        if self.status is not None:
            return Verdict(self.status, self.difference, self.difference, self.difference)
        totals = {name: _worst(*pair) for name, pair in self.residuals.items()}
        fitting = [name for name, total in totals.items() if total <= limit]

        def about(name: _Name, label: str | None, note: str = "") -> Verdict:
            label = "constant" if self.constant and label == "invariant" else label
            improper, proper = self.residuals[name]
            return Verdict(label, totals[name], proper, improper, note)

        if self.binding and self.spec is not None:
            name: _Name = (_label(self.spec), ())
            if name in fitting:
                return about(name, name[0])
            others = [label for label, _ in fitting if label != OFFSET]
            if not others:
                return about(name, BREAKS, f"declared as {name[0]}")
            return about(name, MISLABELED, f"declared as {name[0]}, transforms as {others[0]}")
        if fitting:
            name = fitting[0]
            if name[0] == OFFSET:  # a vector in all but a fixed vector: no linear map was meant here
                return about(("vector", name[1]), BREAKS, "a vector, but for a constant one")
            return about(name, name[0])
        best = min((name for name in totals if name[0] != OFFSET), key=lambda name: totals[name])
        return about(best, BREAKS if self._excludable else None)


class _Fit:
    """Least squares ``h(g x) - c = M (h(x) - c)`` on some rows, with the residual on others.

    Directions in which h varies by less than ``rcond`` of the largest are rounding, and are left out.
    """

    def __init__(self, h: Tensor, axis: int | None, rcond: float) -> None:
        self.axis = axis
        x = _matrix(h, axis)
        n, width = x.shape
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.train = order[: min(n // 2, 2 * width + 64)]
        self.test = order[n // 2 :][: width + 512]
        mean = x[self.train].mean(dim=0)
        u, s, v = torch.linalg.svd(x[self.train] - mean, full_matrices=False)
        kept = s > rcond * s[0]
        self.u = u[:, kept]
        self.basis = (x[self.test] - mean) @ v[kept].T / s[kept]

    def error(self, value: Tensor) -> Tensor:
        """Differences on the test rows."""
        y = _matrix(value, self.axis)
        mean = y[self.train].mean(dim=0)
        return y[self.test] - mean - self.basis @ (self.u.T @ (y[self.train] - mean))


def _matrix(h: Tensor, axis: int | None) -> Tensor:
    return h.reshape(len(h), -1) if axis is None else h.movedim(axis, -1).reshape(-1, h.shape[axis])


def _fittable(h: Tensor, axis: int | None) -> bool:
    n, width = _matrix(h, axis).shape
    return width <= _FEATURES and n >= 2 * width + _SPARE


def _turned(h: Tensor, g: Tensor, axis: int) -> Tensor:
    return (h.movedim(axis, -1) @ g.T).movedim(-1, axis)


def _rotated(h: Tensor, spec: OutputSpec, g: Tensor) -> Tensor:
    rows = h if spec.irreps is None else h.reshape(-1, o3.Irreps(spec.irreps).dim)
    return spec.rotate(rows, g[None], torch.zeros(len(rows), dtype=torch.int64)).reshape(h.shape)


def _label(spec: OutputSpec) -> str:
    if spec.irreps is None:
        return f"cartesian {spec.cartesian}"
    irreps = o3.Irreps(spec.irreps)
    return "invariant" if all(ir.l == 0 and ir.p == 1 for _, ir in irreps) else f"irreps {spec.irreps}"


def _limit(dtype: torch.dtype) -> float:
    # Half precision: errors of a tenth are no rounding any more.
    return min(tolerance(dtype), 0.1)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _worst(*errors: float) -> float:
    """The largest; nan stands for none."""
    return max((error for error in errors if not math.isnan(error)), default=math.nan)
