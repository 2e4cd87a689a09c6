"""Rotation groups of the polyhedra: the smallest averages over orientations that are exact to low degrees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symmetrize.errors import InvalidInputError, did_you_mean
from symmetrize.ops.rotations import about_axis, octahedral_group

#: Degree up to which the mean over each group integrates all Wigner functions. The next degree has an invariant:
#: xyz for the tetrahedron, x^4 + y^4 + z^4 for the octahedron, one of degree 6 for the icosahedron.
DEGREES = {"tetrahedral": 2, "octahedral": 3, "icosahedral": 5}


def rotation_group(name: str) -> Tensor:
    r"""All rotations of a regular polyhedron: 12, 24 or 60.

    The mean of :math:`D^l` over a finite group projects on what the group leaves invariant in degree l, so that equal
    weights integrate exactly up to the degree before the first nontrivial invariant (see `DEGREES`).

    Parameters
    ----------
    name : {"tetrahedral", "octahedral", "icosahedral"}
        The axes of order two of all three are x, y and z; the tetrahedral group is part of both others.

    Returns
    -------
    Tensor of shape (n, 3, 3), float64
        The first is the identity.

    Raises
    ------
    InvalidInputError
        For another name.

    References
    ----------
    F. Klein, Vorlesungen über das Ikosaeder (1884), chapters I and II: groups and invariants.
    """
    if name not in DEGREES:
        raise InvalidInputError(f"group: unknown group {name!r}, {did_you_mean(str(name), DEGREES)}")
    group = octahedral_group()
    if name == "octahedral":
        return group
    # Rotations that permute the axes cyclically; the others turn by a quarter about an axis, or by a half about a
    # diagonal of a face.
    permutation = group.abs().round()
    tetrahedral = group[torch.linalg.det(permutation) > 0.0]
    if name == "tetrahedral":
        return tetrahedral
    # A vertex (0, 1, phi) has a stabilizer of order 5, which shares the identity alone with the tetrahedral group: the
    # 60 products are all different.
    vertex = torch.tensor([0.0, 1.0, 0.5 * (1.0 + math.sqrt(5.0))], dtype=torch.float64)
    angle = torch.arange(5, dtype=torch.float64) * (2.0 * math.pi / 5.0)
    fivefold = about_axis(vertex.expand(5, 3), angle)
    return (tetrahedral[:, None] @ fivefold[None]).reshape(-1, 3, 3)
