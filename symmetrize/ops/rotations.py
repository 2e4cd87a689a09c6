"""Rotations and reflections as matrices, always computed in float64.

Everywhere ``R`` acts on column vectors, ``x' = R x``; positions stored as rows transform as ``pos @ R.T``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_rotations(n: int, generator: torch.Generator | None = None, *, improper: bool | None = False) -> Tensor:
    """Haar-random elements of SO(3) or O(3).

    Parameters
    ----------
    n : int
        How many.
    generator : torch.Generator, optional
        Source of randomness.
    improper : bool or None
        False: rotations only; True: rotation times inversion only; None: either, with probability one half.

    Returns
    -------
    Tensor of shape (n, 3, 3), float64, on the CPU
    """
    quaternion = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    rotations = from_quaternions(quaternion)
    if improper is None:
        flip = torch.rand(n, dtype=torch.float64, generator=generator) < 0.5
    else:
        flip = torch.full((n,), improper)
    return torch.where(flip[:, None, None], -rotations, rotations)


def from_quaternions(quaternion: Tensor) -> Tensor:
    """Rotation matrices of quaternions (w, x, y, z) of any nonzero length: Tensor of shape (..., 3, 3)."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).reshape(quaternion.shape[:-1] + (3, 3))


def about_axis(axis: Tensor, angle: float | Tensor) -> Tensor:
    """Rotation by ``angle`` (radians) about ``axis`` of any nonzero length: Tensor of shape (..., 3, 3), float64."""
    axis = torch.nn.functional.normalize(axis.to(torch.float64), dim=-1)
    half = torch.as_tensor(angle, dtype=torch.float64, device=axis.device) / 2
    vector = axis * torch.sin(half)[..., None]
    scalar = torch.cos(half).expand(vector.shape[:-1])[..., None]
    return from_quaternions(torch.cat([scalar, vector], dim=-1))


def cyclic_group(n: int, device: torch.device | None = None) -> Tensor:
    """The n rotations R_1(2 pi m / n) about the first axis: Tensor of shape (n, 3, 3), float64."""
    angle = torch.arange(n, dtype=torch.float64, device=device) * (2.0 * math.pi / n)
    c, s = torch.cos(angle), torch.sin(angle)
    matrices = torch.zeros(n, 3, 3, dtype=torch.float64, device=device)
    matrices[:, 0, 0] = 1.0
    matrices[:, 1, 1], matrices[:, 1, 2] = c, -s
    matrices[:, 2, 1], matrices[:, 2, 2] = s, c
    return matrices


def octahedral_group(*, improper: bool = False) -> Tensor:
    """The 24 rotations of a cube, or its 48 symmetries: Tensor of shape (24 or 48, 3, 3), float64."""
    from itertools import permutations, product

    matrices = [
        torch.diag(torch.tensor(signs, dtype=torch.float64))[list(order)]
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    ]
    group = torch.stack(matrices)
    return group if improper else group[torch.linalg.det(group) > 0]
