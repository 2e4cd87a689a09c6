"""Sets of rotations: quadrature rules of SO(3), exact up to a degree, and evenly spread covers of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from symmetrize.errors import InvalidInputError, did_you_mean
from symmetrize.ops.rotations import about_axis, from_quaternions

#: Degrees of the rules of Lebedev and Laikov (1999) with positive weights; 13, 25 and 27 have negative ones.
_LEBEDEV = (3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 29, 31, *range(35, 132, 6))

#: Product rules: what integrates over the sphere.
PRODUCT_RULES = ("gauss", "lebedev")

#: Real root of x^4 = x + 4, and the square root of 2: the two irrational steps of the spiral (Alexa 2022).
_STEPS = (math.sqrt(2.0), 1.533751168755204288118041)


def rotation_quadrature(degree: int, rule: str = "lebedev") -> tuple[Tensor, Tensor]:
    r"""Rotations and positive weights with :math:`\sum_k w_k D^l_{mm'}(R_k) = \delta_{l0}` for all l up to ``degree``.

    Every rotation is :math:`R = S(p) R_z(\gamma)`, where S(p) takes the z axis to the point p of the unit sphere. In a
    basis in which rotations about z are diagonal, :math:`D^l_{mm'}(R)` holds :math:`e^{-i m' \gamma}`, so that its mean
    over ``degree + 1`` equidistant angles is zero unless m' = 0 (or :math:`|m'| > degree`). What is left,
    :math:`D^l_{m0}(S(p))`, is a spherical harmonic of p whatever S is, and is integrated by a rule on the sphere: that
    of Lebedev or, where this has more points or ends (degree 131), Gauss-Legendre in cos(theta) times ``degree + 1``
    equidistant azimuths. Lebedev rules with a negative weight are skipped, because with positive weights a variance is
    never negative, and the power found in some Wigner functions is never more than there is.

    With L = ``degree`` this takes :math:`(L + 1)` times the points on the sphere, for Lebedev about
    :math:`(L + 1)^3 / 3`: 24 rotations for L = 3, 380 for 9, 1980 for 17. A product of Wigner functions of degrees l
    and l' is a sum of those up to l + l', so that functions of degrees up to L / 2 have exact inner products.

    What is minimal here: the same angles at every point integrate all :math:`|m'| \leq L` only if there are L + 1 of
    them, and of the rules on the sphere with positive weights in the two families the one with the fewest points is
    taken. No rule with positive weights at all has fewer than :math:`\binom{L+3}{3}` rotations (`fewest_rotations`),
    about half as many as these. The rotation groups of the polyhedra (`symmetrize.ops.finite_groups`) come closer: 12
    for L = 2, 24 for 3 and 60 for 4 and 5, where products take 18, 24, 70 and 84. One angle less, with a phase of its
    own at every point, leaves 2 (2 L + 1) equations for m' = L in as many unknowns as there are points. Least squares
    over the phases, from 20 random starts, solves them on Lebedev's points for L = 2 (the tetrahedral group) and 11
    (550 rotations instead of 600), and not for 3, 4, 5, 7 and 9, where residuals are 1e-3 and above: a gain of
    1 / (L + 1) at most, which is not worth a table of phases.

    Parameters
    ----------
    degree : int
        At least 0.
    rule : {"lebedev", "gauss"}
        Lebedev where it has fewer points; or Gauss-Legendre for every degree.

    Returns
    -------
    rotations : Tensor of shape (n, 3, 3), float64
    weights : Tensor of shape (n,), float64
        Positive, of sum 1.

    References
    ----------
    Product rules on SO(3): M. Gräf and D. Potts, Numer. Funct. Anal. Optim. 30, 665 (2009). Rules on the sphere:
    V. I. Lebedev and D. N. Laikov, Dokl. Math. 59, 477 (1999), as tabulated in ``scipy.integrate.lebedev_rule``
    (scipy 1.15 or later; without it, Gauss-Legendre).
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise InvalidInputError(f"degree: expected an integer of at least 0, got {degree!r}")
    if rule not in PRODUCT_RULES:
        raise InvalidInputError(f"rule: unknown rule {rule!r}, {did_you_mean(str(rule), PRODUCT_RULES)}")
    points, on_sphere = _sphere(degree, rule)
    theta = torch.atan2(points[:, :2].norm(dim=1), points[:, 2])
    phi = torch.atan2(points[:, 1], points[:, 0])
    gamma = torch.arange(degree + 1, dtype=torch.float64) * (2.0 * math.pi / (degree + 1))
    _, y, z = torch.eye(3, dtype=torch.float64)
    tilt = about_axis(z.expand(len(phi), 3), phi) @ about_axis(y.expand(len(theta), 3), theta)
    spin = about_axis(z.expand(len(gamma), 3), gamma)
    rotations = (tilt[:, None] @ spin[None]).reshape(-1, 3, 3)
    weights = on_sphere.repeat_interleave(degree + 1)
    return rotations, weights / weights.sum()


def fewest_rotations(degree: int) -> int:
    r"""A lower bound on the number of rotations of any rule of a degree L with positive weights: (L+1)(L+2)(L+3)/6.

    The Wigner functions :math:`D^j_{mm'}` with :math:`2j \leq L` and 2j even or odd as L is have products of integer
    degree up to L, which the rule integrates: on its rotations (lifted to unit quaternions, either of the two), scaled
    with the square roots of its weights, they are orthogonal, so that there cannot be more of them,
    :math:`\sum_j (2j+1)^2`, than rotations. The argument for designs of P. Delsarte, J. M. Goethals and J. J. Seidel,
    Geom. Dedicata 6, 363 (1977), for antipodal points on the sphere in four dimensions.
    """
    return math.comb(degree + 3, 3)


def haar_rotations(uniform: Tensor) -> Tensor:
    r"""Haar-random rotations from three uniform numbers each.

    .. math:: q = (\sqrt{u_1} \cos 2\pi u_3,\, \sqrt{1 - u_1} \sin 2\pi u_2,\, \sqrt{1 - u_1} \cos 2\pi u_2,\,
        \sqrt{u_1} \sin 2\pi u_3)

    Parameters
    ----------
    uniform : Tensor of shape (..., 3), float64
        In [0, 1).

    Returns
    -------
    Tensor of shape (..., 3, 3), float64

    References
    ----------
    K. Shoemake, Uniform random rotations, Graphics Gems III, 124 (1992).
    """
    radius, first, second = uniform.to(torch.float64).unbind(-1)
    inner, outer = radius.sqrt(), (1.0 - radius).sqrt()
    first, second = 2.0 * math.pi * first, 2.0 * math.pi * second
    parts = [inner * torch.cos(second), outer * torch.sin(first), outer * torch.cos(first), inner * torch.sin(second)]
    return from_quaternions(torch.stack(parts, dim=-1))


def _sphere(degree: int, rule: str) -> tuple[Tensor, Tensor]:
    """Points (n, 3) and positive weights (n,) that integrate the spherical harmonics up to a degree."""
    n_gauss = (degree // 2 + 1) * (degree + 1)
    order = next((k for k in _LEBEDEV if k >= degree), None) if rule == "lebedev" else None
    try:
        from scipy.integrate import lebedev_rule
    except ImportError:
        order = None
    if order is not None:
        points, weights = lebedev_rule(order)
        if weights.shape[0] <= n_gauss:
            return torch.from_numpy(points.T.copy()), torch.from_numpy(weights.copy())
    heights, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(degree // 2 + 1))
    azimuth = torch.arange(degree + 1, dtype=torch.float64) * (2.0 * math.pi / (degree + 1))
    radius = (1.0 - heights.square()).sqrt()
    x, y = radius[:, None] * torch.cos(azimuth), radius[:, None] * torch.sin(azimuth)
    points = torch.stack([x, y, heights[:, None].expand_as(x)], dim=-1).reshape(-1, 3)
    return points, weights.repeat_interleave(degree + 1)


def orientation_cover(n: int) -> Tensor:
    r"""``n`` rotations spread evenly over SO(3), always the same ones: a super-Fibonacci spiral.

    With :math:`s = k + 1/2`, :math:`t = s / n`, the quaternions are
    :math:`(\sqrt t \sin\alpha, \sqrt t \cos\alpha, \sqrt{1-t} \sin\beta, \sqrt{1-t} \cos\beta)` at
    :math:`\alpha = 2\pi s/\sqrt 2`, :math:`\beta = 2\pi s/\psi`, :math:`\psi^4 = \psi + 4`. The largest ball of
    rotations that holds none of them has a Haar measure of less than 4 / n (found numerically for n from 50 to 5000),
    which is a radius of 23 degrees for n = 1000; for random rotations it is about three times the measure. The measure
    of a ball of radius w is :math:`(w - \sin w)/\pi`.

    Parameters
    ----------
    n : int
        At least 1.

    Returns
    -------
    Tensor of shape (n, 3, 3), float64

    References
    ----------
    M. Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), CVPR 2022.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidInputError(f"n: expected an integer of at least 1, got {n!r}")
    s = torch.arange(n, dtype=torch.float64) + 0.5
    inner, outer = (s / n).sqrt(), (1.0 - s / n).sqrt()
    alpha, beta = (2.0 * math.pi * s / step for step in _STEPS)
    quaternions = [inner * torch.sin(alpha), inner * torch.cos(alpha), outer * torch.sin(beta), outer * torch.cos(beta)]
    return from_quaternions(torch.stack(quaternions, dim=1))
