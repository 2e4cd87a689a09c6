"""Wigner matrices of real spherical harmonics, polynomial in the rotation matrix.

Going through Euler angles loses half of the digits near their pole and has no gradient there, which is exactly where
bonds along a coordinate axis end up. Instead ``D_l(R)`` is read off the defining property ``Y_l(R x) = D_l(R) Y_l(x)``
at fixed points ``x_p`` by a constant pseudo-inverse. The convention is that of e3nn.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from e3nn import o3
from torch import Tensor


@lru_cache(maxsize=64)
def _points(l: int) -> tuple[Tensor, Tensor]:
    """Fixed unit vectors, and the pseudo-inverse of the harmonics on them (float64)."""
    generator = torch.Generator().manual_seed(20 + l)
    points = torch.randn(4 * (2 * l + 1), 3, dtype=torch.float64, generator=generator)
    points = torch.nn.functional.normalize(points, dim=-1)
    return points, torch.linalg.pinv(o3.spherical_harmonics(l, points, normalize=False))


def wigner(l: int, rotations: Tensor) -> Tensor:
    """D_l of the proper part of ``rotations``.

    Parameters
    ----------
    l : int
        Degree.
    rotations : Tensor of shape (n, 3, 3)
        Proper or improper; an improper matrix R enters as -R (parity is the business of the caller).

    Returns
    -------
    Tensor of shape (n, 2 l + 1, 2 l + 1), differentiable, in the dtype of ``rotations``
    """
    proper = rotations * handedness(rotations)[:, None, None]
    if l == 0:
        return torch.ones_like(proper[:, :1, :1])
    if l == 1:
        return proper
    points, inverse = _points(l)
    points, inverse = points.to(rotations), inverse.to(rotations)
    harmonics = o3.spherical_harmonics(l, points @ proper.transpose(1, 2), normalize=False)
    return (inverse @ harmonics).transpose(1, 2)


def handedness(rotations: Tensor) -> Tensor:
    """+1 for proper, -1 for improper matrices; a constant as far as derivatives go: Tensor of shape (n,)."""
    return torch.sign(torch.linalg.det(rotations.detach().to(torch.float64))).to(rotations.dtype)
