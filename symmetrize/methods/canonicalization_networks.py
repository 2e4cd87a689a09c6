"""Small equivariant networks from point clouds to vectors: where the frames of `LearnedCanonicalization` come from.

Both work on the points of each cloud and its pooled features, in linear time; they are invariant under permutations,
infinitely differentiable in all positions (points at the origin included) and, in exact arithmetic, equivariant under
O(3) whatever their parameters. Parameters come from a generator of their own, so that a seed fixes them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from symmetrize.ops.ragged import segment_sum

#: Rows of the tables of species: atomic numbers up to 118, and 0 for clouds without species.
N_SPECIES = 119
#: Vectors for every cloud.
N_VECTORS = 3
_N_RADIAL = 4


class VectorNeurons(torch.nn.Module):
    r"""Vectors from channels of vectors, which are only ever mixed linearly and bent by their invariants.

    With :math:`y = x / \sqrt{L^2 + |x|^2}`, points carry :math:`V_i = s(z_i, |y_i|^2)\, y_i`, one scalar s per
    channel. A layer concatenates the mean of the cloud, mixes channels, and bends every vector along a learned
    direction, with a softplus in place of the kink of the original,

    .. math:: V' = q + \frac{\mathrm{softplus}(-\langle q, k\rangle)}{1 + |k|^2}\, k, \qquad q = W V,\; k = U V.

    Deng et al., "Vector Neurons", ICCV 2021, arXiv 2104.12229: the linear layer, the direction-dependent ReLU and the
    PointNet with means. Cross products, which make pseudovectors, are not used.

    Parameters
    ----------
    channels, layers : int
    length_scale : float
        L, in the unit of the positions: further out, only directions count.
    generator : torch.Generator
        Of the initial parameters.
    """

    def __init__(self, channels: int, layers: int, length_scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.length_scale = length_scale
        self.species = _parameter(generator, N_SPECIES, channels, scale=1.0)
        self.scalars = _Perceptron(channels + _N_RADIAL, channels, channels, generator)
        self.mixing = torch.nn.ParameterList(_parameter(generator, channels, 2 * channels) for _ in range(layers))
        self.directions = torch.nn.ParameterList(_parameter(generator, channels, 2 * channels) for _ in range(layers))
        self.readout = _parameter(generator, N_VECTORS, channels)

    def forward(self, vectors: Tensor, weights: Tensor, species: Tensor, owner: Tensor, n_owners: int) -> Tensor:
        """Three polar vectors of every cloud.

        Parameters
        ----------
        vectors : Tensor of shape (n_points, 3)
            From the origin of the cloud.
        weights : Tensor of shape (n_points,)
            A point of weight 0 has no influence.
        species : Tensor of shape (n_points,), int64
            Atomic numbers, 0 without species.
        owner : Tensor of shape (n_points,), int64
            Which cloud a point belongs to.
        n_owners : int

        Returns
        -------
        Tensor of shape (n_owners, 3, 3)
            Dimensionless, one vector per row.
        """
        bounded, square = _bounded(vectors, self.length_scale)
        scalars = self.scalars(torch.cat([self.species[species], _radial(square)], dim=1))
        features = scalars[:, :, None] * bounded[:, None, :]
        for mixing, direction in zip(self.mixing, self.directions, strict=True):
            pooled = _mean(features, weights, owner, n_owners)
            features = torch.cat([features, pooled[owner]], dim=1)
            q, k = mixing @ features, direction @ features
            bend = torch.nn.functional.softplus(-(q * k).sum(dim=2)) / (1.0 + (k * k).sum(dim=2))
            features = q + bend[:, :, None] * k
        return self.readout @ _mean(features, weights, owner, n_owners)


class SphericalTensors(torch.nn.Module):
    r"""Vectors from products of spherical tensors (e3nn's conventions), with messages between a cloud and its points.

    Layer by layer, with Y the solid harmonics of :math:`y = x / \sqrt{L^2 + |x|^2}` and C the Clebsch-Gordan
    coefficients of true (not pseudo) tensors,

    .. math:: A_{c l m} = \langle R_{c l}(s_i)\, Y_{l m}(y_i) \rangle_i, \qquad
        B_{c l m} = A_{c l m} + \sum_{l_1 l_2} W^{l_1 l_2 l}_c
            \sum_{m_1 m_2} C^{l m}_{l_1 m_1 l_2 m_2} A_{c l_1 m_1} A_{c l_2 m_2}, \qquad
        s_i \leftarrow s_i + S\Big(s_i, \sum_m Y_{l m}(y_i) B_{c l m}\Big).

    The vectors are mixtures of the channels of degree 1. Tensor field networks (Thomas et al. 2018, arXiv 1802.08219),
    products on every site as in the atomic cluster expansion (Drautz, Phys. Rev. B 99, 014104, 2019).

    Parameters
    ----------
    channels, layers : int
    degree : int
        Highest degree of the harmonics, at least 1.
    length_scale : float
        L, in the unit of the positions: further out, only directions count.
    generator : torch.Generator
        Of the initial parameters.
    """

    def __init__(
        self, channels: int, layers: int, degree: int, length_scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.degree, self.length_scale, self.channels = degree, length_scale, channels
        n_paths, width = len(_paths(degree)), channels * (degree + 1)
        self.species = _parameter(generator, N_SPECIES, channels, scale=1.0)
        self.scalars = _Perceptron(channels + _N_RADIAL, channels, channels, generator)
        self.radial = torch.nn.ModuleList(_Perceptron(channels, channels, width, generator) for _ in range(layers))
        self.mixing = torch.nn.ParameterList(
            _parameter(generator, degree + 1, channels, channels) for _ in range(layers)
        )
        self.products = torch.nn.ParameterList(
            _parameter(generator, n_paths, channels, scale=1.0) for _ in range(layers)
        )
        self.messages = torch.nn.ModuleList(
            _Perceptron(channels + width, channels, channels, generator) for _ in range(layers - 1)
        )
        self.readout = _parameter(generator, N_VECTORS, channels)

    def forward(self, vectors: Tensor, weights: Tensor, species: Tensor, owner: Tensor, n_owners: int) -> Tensor:
        """Three polar vectors of every cloud: see `VectorNeurons.forward`."""
        from e3nn import o3

        bounded, square = _bounded(vectors, self.length_scale)
        scalars = self.scalars(torch.cat([self.species[species], _radial(square)], dim=1))
        degrees = list(range(self.degree + 1))
        harmonics = o3.spherical_harmonics(degrees, bounded, normalize=False, normalization="component")
        of_degree = torch.repeat_interleave(
            torch.arange(self.degree + 1, device=owner.device),
            2 * torch.arange(self.degree + 1, device=owner.device) + 1,
        )
        coupling = _couplings(self.degree).to(harmonics)
        tensors = harmonics.new_zeros(n_owners, self.channels, harmonics.shape[1])
        for layer, (radial, mixing, products) in enumerate(zip(self.radial, self.mixing, self.products, strict=True)):
            gains = radial(scalars).reshape(-1, self.channels, self.degree + 1)
            summed = _mean(gains[:, :, of_degree] * harmonics[:, None, :], weights, owner, n_owners)
            summed = torch.einsum("mcd,ndm->ncm", mixing[of_degree], summed)
            table = torch.einsum("pabm,pc->cabm", coupling, products)
            tensors = summed + torch.einsum("nca,ncb,cabm->ncm", summed, summed, table)
            if layer < len(self.messages):
                overlap = tensors[owner] * harmonics[:, None, :]
                invariants = overlap.new_zeros(*overlap.shape[:2], self.degree + 1).index_add(2, of_degree, overlap)
                scalars = scalars + self.messages[layer](torch.cat([scalars, invariants.flatten(1)], dim=1))
        return self.readout @ tensors[:, :, 1:4]


class _Perceptron(torch.nn.Module):
    """Two dense layers with a smooth nonlinearity between them."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.bias = _parameter(generator, n_in, n_hidden, scale=n_in**-0.5), _zeros(n_hidden)
        self.second, self.offset = _parameter(generator, n_hidden, n_out, scale=n_hidden**-0.5), _zeros(n_out)

    def forward(self, values: Tensor) -> Tensor:
        return torch.nn.functional.silu(values @ self.first + self.bias) @ self.second + self.offset


def _parameter(generator: torch.Generator, *shape: int, scale: float | None = None) -> torch.nn.Parameter:
    """Normal deviates; the default scale is for a product over the last axis."""
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scale = shape[-1] ** -0.5 if scale is None else scale
    return torch.nn.Parameter((scale * values).to(torch.get_default_dtype()))


def _zeros(n: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(n))


def _bounded(vectors: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Vectors of the same directions inside the unit ball, and their squared lengths (n_points, 1)."""
    square = (vectors * vectors).sum(dim=1, keepdim=True)
    total = length * length + square
    return vectors / torch.sqrt(total), square / total


def _radial(square: Tensor) -> Tensor:
    """Smooth functions of a squared length in [0, 1): Tensor of shape (n_points, n_radial)."""
    rates = math.pi * torch.arange(1, _N_RADIAL + 1, dtype=square.dtype, device=square.device)
    return torch.cos(square * rates)


def _mean(values: Tensor, weights: Tensor, owner: Tensor, n_owners: int) -> Tensor:
    """Weighted mean over the points of every cloud, smooth where the last weight vanishes."""
    total = segment_sum(weights, owner, n_owners)
    shape = (-1,) + (1,) * (values.dim() - 1)
    summed = segment_sum(values * weights.reshape(shape), owner, n_owners)
    return summed / (1.0 + total).reshape(shape)


@lru_cache
def _paths(degree: int) -> tuple[tuple[int, int, int], ...]:
    """Degrees (l1, l2, l) of products of true tensors that are true tensors."""
    degrees = range(degree + 1)
    return tuple(
        (a, b, c)
        for a in degrees
        for b in range(a, degree + 1)
        for c in degrees
        if b - a <= c <= a + b and (a + b + c) % 2 == 0
    )


@lru_cache
def _couplings(degree: int) -> Tensor:
    """Clebsch-Gordan coefficients of every path: Tensor of shape (n_paths, (degree + 1)^2 three times), float64.

    Not a buffer of the module, which a conversion to float32 would round.
    """
    from e3nn import o3

    size = (degree + 1) ** 2
    table = torch.zeros(len(_paths(degree)), size, size, size, dtype=torch.float64)
    for path, (a, b, c) in enumerate(_paths(degree)):
        block = o3.wigner_3j(a, b, c, dtype=torch.float64) * math.sqrt(2 * c + 1)
        table[path, a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2] = block
    return table
