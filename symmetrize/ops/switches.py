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
    # Closer to either end than this the step differs from 0 or 1 by less than exp(-200): a safe argument is
    # substituted before the singular expression, so that neither value nor any derivative meets 1/0.
    edge = 0.005
    inside = (x > edge) & (x < 1.0 - edge)
    safe = torch.where(inside, x, torch.full_like(x, 0.5))
    # sigmoid(2 t) = (1 + tanh t) / 2 keeps full relative precision near 0, where 1 + tanh would cancel.
    value = torch.sigmoid(1.0 / (1.0 - safe) - 1.0 / safe)
    return torch.where(inside, value, (x >= 0.5).to(x.dtype))


def smooth_cutoff(distance: Tensor, cutoff: float | Tensor, width: float) -> Tensor:
    """Smooth cutoff f_c(d | R, D): 1 for d <= R - D, 0 for d >= R (arXiv 2305.19302, eq. for f_c)."""
    return smooth_step((cutoff - distance) / width)
