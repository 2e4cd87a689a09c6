"""The one tolerance policy: a multiple of the machine epsilon of the input's dtype, the same in every precision.

An exact method evaluated in finite precision errs by its condition number times epsilon, so the factor must not depend
on the dtype: this is what tells an exact method from one that is merely accurate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Roundings of a network of a few thousand operations per output, on the scale of the output.
EXACT_FACTOR = 1e4

#: Near-collinear input: one digit more, since a direction perpendicular to nearly parallel vectors is a small
#: difference.
NEAR_COLLINEAR_FACTOR = 1e5


def tolerance(dtype: torch.dtype, factor: float = EXACT_FACTOR) -> float:
    """``factor * eps(dtype)``: 2e-12 in float64 and 1e-3 in float32 for the default factor."""
    return factor * torch.finfo(dtype).eps


def within(error: float | Tensor, limit: float) -> bool:
    """Whether an error (every entry of a Tensor) is finite and at most ``limit``; NaN and no entry at all are not."""
    if isinstance(error, Tensor):
        return error.numel() > 0 and bool((torch.isfinite(error) & (error <= limit)).all())
    return math.isfinite(error) and error <= limit
