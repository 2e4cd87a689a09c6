"""Blocks of any metatomic output under rotations, inside TorchScript: what a block says about itself decides.

Components ``xyz`` (or ``xyz_1``, ``xyz_2``, ...) are Cartesian, ``o3_mu`` with the keys ``o3_lambda`` and ``o3_sigma``
spherical, nothing is invariant: as in `symmetrize.metatomic.tensor_maps`.
"""

# No "from __future__ import annotations" here: TorchScript reads the annotations of attributes.

import torch
from torch import Tensor

from symmetrize.export.rotating import Wigner
from symmetrize.metatomic.tensor_maps import to_e3nn


class BlockRotation(torch.nn.Module):
    """Rotation and invariant part of the values of blocks.

    Parameters
    ----------
    l_max : int
        Highest degree of spherical blocks.
    improper : bool
        Whether the group has improper elements.
    """

    bases: list[Tensor]

    def __init__(self, l_max: int, improper: bool) -> None:
        super().__init__()
        self.wigners = torch.nn.ModuleList([Wigner(l) for l in range(1, l_max + 1)])
        self.bases = [to_e3nn(l).clone() for l in range(1, l_max + 1)]
        self.improper = improper

    def rotate(self, values: Tensor, elements: Tensor, spherical: bool, sigma: int) -> Tensor:
        """Rows of a block, (n_rows, components..., n_properties), under elements of shape (n_rows, 3, 3), float64."""
        sign = torch.sign(torch.linalg.det(elements))
        n_components = values.dim() - 2
        if not spherical:
            matrices = elements.to(values.dtype)
            for axis in range(1, n_components + 1):
                moved = values.transpose(1, axis)
                turned = matrices @ moved.flatten(2)
                values = turned.reshape(moved.shape).transpose(1, axis)
            if n_components == 0 and sigma == -1:
                values = values * sign.to(values.dtype)[:, None]
            return values
        degree = (values.shape[1] - 1) // 2
        proper = elements * sign[:, None, None]
        for number, module in enumerate(self.wigners):
            if number + 1 == degree:
                basis = self.bases[number].to(values.device)
                values = (basis @ module(proper) @ basis.T).to(values.dtype) @ values
        odd = sigma * (1 if degree % 2 == 0 else -1) == -1
        return values * sign.to(values.dtype)[:, None, None] if odd else values

    def project_invariant(self, values: Tensor, spherical: bool, sigma: int) -> Tensor:
        """The part that no element of the group changes."""
        n_components = values.dim() - 2
        if spherical or n_components == 0:
            scalar = n_components == 0 or values.shape[1] == 1
            return values if scalar and (sigma == 1 or not self.improper) else torch.zeros_like(values)
        if n_components == 2:
            eye = torch.eye(3, dtype=values.dtype, device=values.device)
            trace = (values * eye[None, :, :, None]).sum(dim=1).sum(dim=1)
            return trace[:, None, None, :] * eye[None, :, :, None] / 3.0
        # Tensors of higher rank are refused when they are exported.
        return torch.zeros_like(values)

    def forward(self, values: Tensor, elements: Tensor, spherical: bool, sigma: int, invariant: bool) -> Tensor:
        """Either of both."""
        if invariant:
            return self.project_invariant(values, spherical, sigma)
        return self.rotate(values, elements, spherical, sigma)
