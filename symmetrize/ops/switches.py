"""Smooth switching functions, exactly constant outside their window and infinitely differentiable everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_step(x: Tensor) -> Tensor:
    r"""C-infinity step: 0 for x <= 0, 1 for x >= 1.

    .. math:: \mathrm{step}(x) = \tfrac12 \left[1 + \tanh\left(\frac{1}{2 - 2x} - \frac{1}{2x}\right)\right]

    for 0 < x < 1, which is the switch of the ECSE paper (arXiv 2305.19302, appendix on weighting functions) moved to
    the unit interval and turned upwards. ``|step'| <= 2`` and ``|step''| <= 9.8``.
    """
    # Where the step rounds to 0 or 1 in float64, with all its derivatives, the argument stops: the singular expression
    # never meets 1/0, and needs no mask behind it. exp(-798) underflows, so 0 is exactly 0.
    x = x.clamp(1.0 / 800.0, 799.0 / 800.0)
    # sigmoid(2 t) = (1 + tanh t) / 2 keeps full relative precision near 0, where 1 + tanh would cancel.
    return torch.sigmoid((1.0 - x).reciprocal() - x.reciprocal())


def smooth_cutoff(distance: Tensor, cutoff: float | Tensor, width: float) -> Tensor:
    """Smooth cutoff f_c(d | R, D): 1 for d <= R - D, 0 for d >= R (arXiv 2305.19302, eq. for f_c)."""
    return smooth_step((cutoff - distance) / width)
