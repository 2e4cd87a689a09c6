"""Principal axes of point clouds: eigenvectors of their second moments, with derivatives that stay finite at ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symmetrize.methods.clouds import Clouds

#: Eigenvalues that differ by less, relative to the trace, are tied: the sum over the points rounds as much.
TIED = 1e-12

#: A cloud of a smaller second moment has no axes: squares and reciprocals would leave the range of float64.
_NO_CLOUD = 1e-100

#: Where eigenvectors point is decided by a direction that no axis is perpendicular to except by chance.
_SENSE = (0.5309, 0.6180, 0.5799)


def second_moments(around: Clouds) -> Tensor:
    r"""Second moment of every cloud, as a share of its trace: Tensor of shape (n, 3, 3), float64.

    .. math:: C = \sum_j w_j\, r_j r_j^T \Big/ \operatorname{tr} \sum_j w_j\, r_j r_j^T

    with :math:`r_j` from the centroid (structure scope, all weights 1) or from the atom (atom scope, smooth cutoff
    weights). The trace is a constant here: it has no influence on eigenvectors. Zero for a cloud without extension.
    """
    moments = around.sum(around.weight[:, None, None] * around.vectors[:, :, None] * around.vectors[:, None, :])
    trace = moments.detach().diagonal(dim1=1, dim2=2).sum(dim=1)
    present = (trace > _NO_CLOUD)[:, None, None]
    shares = moments / trace.clamp(min=_NO_CLOUD)[:, None, None]
    return torch.where(present, shares, torch.zeros_like(shares))


def principal_axes(moments: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues, ascending, and eigenvectors of symmetric matrices of trace 1 (or 0), differentiable twice.

    With :math:`C v_i = \lambda_i v_i`,

    .. math:: \mathrm d\lambda_i = v_i^T \mathrm dC\, v_i, \qquad
              \mathrm dv_i = \sum_{j \ne i} v_j \frac{v_j^T \mathrm dC\, v_i}{\lambda_i - \lambda_j}.

    Terms of a pair that is tied (a difference of at most `TIED`) are left out: there the eigenvectors that are
    returned are one choice out of a continuum, the derivative does not exist, and the one given is that of the
    rest. Close to a tie the derivative is the true one, and grows like 1 / (difference).

    Parameters
    ----------
    moments : Tensor of shape (n, 3, 3), float64

    Returns
    -------
    values : Tensor of shape (n, 3)
    vectors : Tensor of shape (n, 3, 3)
        Columns; of the two senses of an eigenvector the one along a fixed direction, so that the choice depends
        neither on the library nor on what else is in the batch.
    """
    values, vectors = _PrincipalAxes.apply(moments)
    return values, vectors


class _PrincipalAxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moments: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(moments)
        along = moments.new_tensor(_SENSE) @ vectors
        vectors = torch.where((along < 0.0)[:, None, :], -vectors, vectors)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Saved outputs keep their history: what is differentiable here has a second derivative.
        values, vectors = ctx.saved_tensors
        by_values, by_vectors = gradients
        difference = values[:, None, :] - values[:, :, None]
        tied = difference.detach().abs() <= TIED
        inverse = torch.where(tied, 0.0, torch.where(tied, torch.ones_like(difference), difference).reciprocal())
        inner = inverse * (vectors.transpose(1, 2) @ by_vectors) + torch.diag_embed(by_values)
        gradient = vectors @ inner @ vectors.transpose(1, 2)
        return (gradient + gradient.transpose(1, 2)) / 2.0


def axis_frames(vectors: Tensor, group: str) -> Tensor:
    """All coordinate systems along given axes, with either sense of each.

    Parameters
    ----------
    vectors : Tensor of shape (n, 3, 3)
        Orthogonal, of either handedness.
    group : {"O(3)", "SO(3)"}

    Returns
    -------
    Tensor of shape (n, 8, 3, 3), or (n, 4, 3, 3) with the right-handed ones only
    """
    ones = vectors.new_tensor([1.0, -1.0])
    signs = torch.cartesian_prod(ones, ones, ones)
    if group == "SO(3)":
        signs = signs[signs.prod(dim=1) > 0.0]
        handed = torch.sign(torch.linalg.det(vectors.detach()))
        vectors = vectors * torch.stack([torch.ones_like(handed), torch.ones_like(handed), handed], dim=1)[:, None, :]
    return vectors[:, None] * signs[:, None, :]
