"""Candidates of the two scopes: directions, how far each of them is available, and the numbers of the strata.

Pure tensor code, accepted by ``torch.jit.script``: the method and what it is exported to share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.switches import smooth_step

#: Structure scope: an atom offers a direction fully from this distance to the centroid on, in units of the RMS
#: distance. Well below 1, the ratio that some atom always reaches.
CENTRAL = 0.35


def axial_order(l_max: int) -> int:
    """n of the n-fold average of the axis stratum, even, for outputs up to degree ``l_max``."""
    return max(8, l_max + 4 + l_max % 2)


def collinear_square(epsilon: float) -> float:
    """sin^2 below which rounding decides the direction of a partner about the axis."""
    return (32.0 * epsilon) ** 2


def rigid_square(epsilon: float, order: int, l_max: int) -> float:
    """sin^2 below which the angle about an axis is held constant in derivatives.

    What is neglected below it is O(sin^(n - l - 1)), rounding above it eps / sin: about equal here.
    """
    return (0.1 * epsilon ** (1.0 / (order - l_max))) ** 2


def around_atoms(
    vectors: Tensor, center: Tensor, n_atoms: int, radius: float, width: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates of atom scope: the neighbors of every atom.

    Parameters
    ----------
    vectors : Tensor of shape (n_edges, 3)
        From the centers to their neighbors.
    center : Tensor of shape (n_edges,)
        Ascending.
    n_atoms : int
    radius, width : float
        A neighbor is available fully at ``radius - width``, and not at all at ``radius``.

    Returns
    -------
    vectors : Tensor of shape (n_edges, 3), float64
    ptr : Tensor of shape (n_atoms + 1,)
    available, lengths : Tensor of shape (n_edges,), float64
    """
    ptr = torch.searchsorted(center.contiguous(), torch.arange(n_atoms + 1, device=center.device))
    vectors = vectors.to(torch.float64)
    # As a matrix product: several times faster than a reduction of rows of three.
    lengths = torch.sqrt(torch.mv(vectors * vectors, torch.ones([3], dtype=vectors.dtype, device=vectors.device)))
    return vectors, ptr, smooth_step((radius - lengths) / width), lengths


def around_centroids(
    pos: Tensor, structure: Tensor, ptr: Tensor, central: float = CENTRAL
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of structure scope: the atoms of every finite structure, seen from its centroid.

    Parameters
    ----------
    pos : Tensor of shape (n_atoms, 3)
    structure : Tensor of shape (n_atoms,)
    ptr : Tensor of shape (n_structures + 1,)
    central : float
        Distance from the centroid, relative to the RMS distance, from which on an atom is available fully.

    Returns
    -------
    centroid : Tensor of shape (n_structures, 3), float64
    vectors : Tensor of shape (n_atoms, 3), float64
    available : Tensor of shape (n_atoms,), float64
    """
    points = pos.to(torch.float64)
    n_structures = ptr.shape[0] - 1
    counts = (ptr[1:] - ptr[:-1]).clamp(min=1).to(points.dtype)
    centroid = segment_sum(points, structure, n_structures) / counts[:, None]
    vectors = points - centroid[structure]
    square = (vectors * vectors).sum(dim=1)
    mean = segment_sum(square, structure, n_structures) / counts
    # An atom at the centroid has no direction. "At" is relative to the size, so that no structure of two or more
    # atoms ends up without one.
    ratio = square / torch.where(mean > 0.0, mean, torch.ones_like(mean))[structure]
    zero = ratio == 0.0
    ratio = torch.where(zero, torch.zeros_like(ratio), torch.sqrt(torch.where(zero, torch.ones_like(ratio), ratio)))
    return centroid, vectors, smooth_step(ratio / central)


def outermost_first(vectors: Tensor, structure: Tensor, n_structures: int) -> tuple[Tensor, Tensor]:
    """Ordering of the candidates of structure scope: the atom farthest from the centroid comes first.

    Directions to far atoms turn least when an atom moves, and whether an atom at the centroid is available does not
    matter to anything. Outermost atoms are often nearly tied (hydrogens of methyl groups), while the angles between
    them are not: the preference for an angle is measured in the diameter of the structure, not in its radius.

    Returns
    -------
    key : Tensor of shape (n_atoms,)
        Minus the distance from the centroid.
    scale : Tensor of shape (n_atoms,)
        Twice the RMS distance from the centroid in the structure of each atom.
    """
    square = (vectors * vectors).sum(dim=1)
    counts = torch.bincount(structure, minlength=n_structures).clamp(min=1).to(square.dtype)
    # Of one atom at its centroid both are 0, and nothing is ordered by them.
    mean = segment_sum(square, structure, n_structures) / counts
    key = torch.sqrt(torch.where(square > 0.0, square, torch.ones_like(square)))
    scale = torch.sqrt(torch.where(mean > 0.0, mean, torch.ones_like(mean)))
    return -key, 2.0 * scale.index_select(0, structure)
