"""Right-handed coordinate systems from directions: the geometry behind the frames.

The frame of an ordered pair (j, k) of neighbors has the columns

    e1 = u_j,    e2 = u_j x u_k / |u_j x u_k|,    e3 = e1 x e2        (arXiv 2305.19302, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and lengths; a zero vector has the direction 0, with finite derivatives.

    Returns
    -------
    Tensor of shape (n, 3), Tensor of shape (n,)
    """
    square = (vectors * vectors).sum(dim=1)
    zero = square == 0.0
    length = torch.sqrt(torch.where(zero, torch.ones_like(square), square))
    return vectors / length[:, None], torch.where(zero, torch.zeros_like(length), length)


def pair_frames(axis: Tensor, partner: Tensor) -> Tensor:
    """Coordinate systems of an axis and a partner that is not collinear with it.

    Parameters
    ----------
    axis, partner : Tensor of shape (n, 3)
        Unit vectors; their cross product has to be nonzero.

    Returns
    -------
    Tensor of shape (n, 3, 3)
        Orthogonal to rounding however nearly parallel the two are.
    """
    # The part of the partner orthogonal to the axis, twice: of two nearly parallel vectors a single projection
    # leaves rounding along the axis that is not small relative to what remains.
    across = partner - (partner * axis).sum(dim=1, keepdim=True) * axis
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True)
    across = across - (across * axis).sum(dim=1, keepdim=True) * axis
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True)
    normal = torch.linalg.cross(axis, across)
    return torch.stack([axis, normal, torch.linalg.cross(axis, normal)], dim=2)


def frames_from_normals(axis: Tensor, normal: Tensor) -> Tensor:
    """Coordinate systems of an axis and a normal that is orthogonal to it up to rounding.

    Parameters
    ----------
    axis, normal : Tensor of shape (n, 3)
        Unit vectors, e1 and e2.

    Returns
    -------
    Tensor of shape (n, 3, 3)
        Orthogonal to rounding: what the normal has along the axis is left out.
    """
    third = torch.linalg.cross(axis, normal)
    return torch.stack([axis, torch.linalg.cross(third, axis), third], dim=2)


def axis_frames(axis: Tensor) -> Tensor:
    """Some coordinate system with a given first axis, for environments that do not care which.

    Returns
    -------
    Tensor of shape (n, 3, 3)
    """
    least = axis.detach().abs().argmin(dim=1)
    helper = torch.nn.functional.one_hot(least, 3).to(axis.dtype)
    return pair_frames(axis, helper)


def with_mirrors(frames: Tensor) -> Tensor:
    """F and F diag(1, -1, 1): closed under inversion, which maps the pair to {-F M, -F}.

    Returns
    -------
    Tensor of shape (2, n, 3, 3)
    """
    mirror = torch.tensor([1.0, -1.0, 1.0], dtype=frames.dtype, device=frames.device)
    return torch.stack([frames, frames * mirror])
