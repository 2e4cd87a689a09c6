"""Representations of outputs as TorchScript modules: the same action as `symmetrize.representations.OutputSpec`."""

# No "from __future__ import annotations" here: TorchScript reads the annotations of attributes.

import math

import torch
from e3nn import o3
from torch import Tensor

from symmetrize.representations import OutputSpec


class Wigner(torch.nn.Module):
    """``symmetrize.ops.wigner.wigner`` for one degree, without the library: harmonics are polynomials.

    D_l is read off Y_l(R x) = D_l(R) Y_l(x) at fixed points x_p, where Y_l(x) = sum_a c_a x^a over the monomials of
    degree l.
    """

    powers: Tensor
    points: Tensor
    coefficients: Tensor
    inverse: Tensor

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree
        powers = [(a, b, degree - a - b) for a in range(degree + 1) for b in range(degree + 1 - a)]
        generator = torch.Generator().manual_seed(20 + degree)
        points = torch.randn(4 * len(powers), 3, dtype=torch.float64, generator=generator)
        points = torch.nn.functional.normalize(points, dim=-1)
        self.register_buffer("powers", torch.tensor(powers))
        self.register_buffer("points", points)
        harmonics = o3.spherical_harmonics(degree, points, normalize=False)
        self.register_buffer("coefficients", torch.linalg.pinv(self.monomials(points)) @ harmonics)
        self.register_buffer("inverse", torch.linalg.pinv(harmonics))

    def monomials(self, points: Tensor) -> Tensor:
        """x^a y^b z^c of degree l: Tensor of shape (..., n_monomials)."""
        table = [torch.ones_like(points)]
        for _ in range(self.degree):
            table.append(table[-1] * points)
        power = torch.stack(table)
        a, b, c = self.powers[:, 0], self.powers[:, 1], self.powers[:, 2]
        parts = power[a, ..., 0] * power[b, ..., 1] * power[c, ..., 2]
        return parts.movedim(0, -1)

    def forward(self, proper: Tensor) -> Tensor:
        """D_l of rotations: Tensor of shape (n, 2 l + 1, 2 l + 1), float64."""
        proper = proper.to(torch.float64)
        points = self.points.to(torch.float64) @ proper.transpose(1, 2)
        harmonics = self.monomials(points) @ self.coefficients.to(torch.float64)
        return (self.inverse.to(torch.float64) @ harmonics).transpose(1, 2)


class Representation(torch.nn.Module):
    """An `OutputSpec` in a form that TorchScript accepts: rotation and invariant part of rows."""

    shape: list[int]
    degrees: list[int]
    parities: list[bool]
    lengths: list[int]
    projector: Tensor

    def __init__(self, spec: OutputSpec, group: str) -> None:
        super().__init__()
        self.rank = spec.rank
        self.trivial = True
        self.per_atom = spec.per == "atom"
        self.shape = list(spec.shape)
        degrees: list[int] = []
        parities: list[bool] = []
        lengths: list[int] = []
        wigners = []
        if spec.cartesian is None:
            for mul, ir in o3.Irreps(spec.irreps):
                degrees.append(ir.l)
                parities.append(ir.p == -1)
                lengths.append(mul)
                wigners.append(Wigner(ir.l) if ir.l > 1 else torch.nn.Identity())
                self.trivial = self.trivial and ir.l == 0 and ir.p == 1
        else:
            self.trivial = False
        self.cartesian = spec.cartesian is not None
        self.degrees, self.parities, self.lengths = degrees, parities, lengths
        self.wigners = torch.nn.ModuleList(wigners)
        self.width = width = math.prod(spec.shape)
        unit = torch.eye(width, dtype=torch.float64).reshape(width, *spec.shape)
        self.register_buffer("projector", spec.project_invariant(unit, group).reshape(width, width))

    def rotate(self, values: Tensor, elements: Tensor) -> Tensor:
        """rho(g) of every row; ``elements`` of shape (n_rows, 3, 3), float64."""
        if self.trivial:
            return values
        if self.cartesian:
            matrices = elements.to(values.dtype)
            for axis in range(1, self.rank + 1):
                moved = values.transpose(1, axis)
                shape = moved.shape
                turned = matrices @ moved.reshape(shape[0], 3, self.width // 3)
                values = turned.reshape(shape).transpose(1, axis)
            return values
        sign = torch.sign(torch.linalg.det(elements))
        proper = elements * sign[:, None, None]
        flat = values.reshape(values.shape[0], self.width)
        blocks: list[Tensor] = []
        start = 0
        for number, module in enumerate(self.wigners):
            degree, length = self.degrees[number], self.lengths[number]
            dim = 2 * degree + 1
            block = flat[:, start : start + length * dim].reshape(values.shape[0], length, dim)
            start += length * dim
            if degree > 0:
                block = block @ module(proper).to(values.dtype).transpose(1, 2)
            if self.parities[number]:
                block = block * sign.to(values.dtype)[:, None, None]
            blocks.append(block.reshape(values.shape[0], length * dim))
        return torch.cat(blocks, dim=1).reshape(values.shape)

    def project_invariant(self, values: Tensor) -> Tensor:
        """The part of every row that no element of the group changes."""
        flat = values.reshape(values.shape[0], self.width)
        return (flat @ self.projector.to(values.dtype)).reshape(values.shape)

    def forward(self, values: Tensor, elements: Tensor) -> Tensor:
        """See `rotate`."""
        return self.rotate(values, elements)
