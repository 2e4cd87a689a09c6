"""Averaging over the group itself, by a rule of a stated degree: what the field's averaging tools do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods.clouds import owners
from symmetrize.methods.draws import check_seed, seed_of, uniform_numbers
from symmetrize.ops.finite_groups import DEGREES, rotation_group
from symmetrize.ops.quadrature import PRODUCT_RULES, haar_rotations, rotation_quadrature

#: Names of all rules.
RULES = (*PRODUCT_RULES, *DEGREES)

_TO_A_DEGREE = dict.fromkeys(
    (
        "rotation_equivariance",
        "inversion_equivariance",
        "frame_equivariance",
        "symmetric_sites",
        "torque",
        "exactness",
        "energy_conservation",
    ),
    "exact up to the degree of the rule: what depends on the orientation in higher degrees is left over",
)
_OF_A_RANDOM_COSET = {
    **_TO_A_DEGREE,
    **dict.fromkeys(
        (
            "translation_invariance",
            "periodicity",
            "exactness",
            "arithmetic",
            "frame_conditioning",
        ),
        "every change of the positions, one of rounding included, is followed by a new draw of the coset",
    ),
    **dict.fromkeys(
        (
            "smoothness",
            "degeneracy_splitting",
            "frame_continuity",
            "forces_are_gradient",
            "stress_is_gradient",
            "hessian_symmetry",
            "energy_conservation",
        ),
        "structures along a path are drawn for one by one, and forces belong to one draw",
    ),
}


class GroupAveraging(FrameMethod):
    r"""Average over fixed orientations with the weights of a rule on SO(3), with inversion for O(3).

    .. math:: F(x) = \sum_k w_k\, \rho(R_k)\, f(R_k^{-1} x), \qquad
        \sum_k w_k D^l(R_k) = \delta_{l0} \quad\text{for all } l \leq L

    with positive weights. As a function of the orientation, :math:`\rho(g) f(g^{-1} x)` is a sum of Wigner functions:
    those of degrees up to L, the ``degree`` of the rule, are averaged exactly, higher ones (of the backbone's output
    and of :math:`\rho` together) are left over as an error.

    With ``random=True`` one Haar-random rotation Q per structure (in atom scope: per atom) turns the whole rule: its
    elements are :math:`Q R_k`, for a finite group a random coset of it. Since :math:`D^l(Q R_k) = D^l(Q) D^l(R_k)`, the
    average stays exact up to L for every Q, and as every :math:`Q R_k` is Haar-distributed, its expectation is the
    average over the whole group for all degrees: what is left over becomes noise of mean zero. :math:`R_k Q` would do
    both as well. On the left, the draw amounts to turning the structure at random and the result back, so that the
    standard deviation of one draw is what `symmetrize.testing.measure_orientation_variance` finds for the fixed rule.

    Group: SO(3), or O(3) with every rotation also times the inversion, which is exact. Exact: up to the degree, to
    rounding; the finite groups are moreover exactly equivariant under their own elements. Smooth: as smooth as the
    backbone, forces are conservative; with ``random=True`` neither, since every structure along a path has a draw of
    its own, and forces are the gradient at a fixed draw. Fails: networks whose output contains high degrees (short
    bonds, sharp nonlinearities, several layers) need high degrees; `symmetrize.degree.find_degree` measures which.
    Periodic structures are as good as any.

    Cost: the same number of evaluations for every owner, twice as many for O(3):

    =============  ========================  ==========================================================================
    rule           degree                    rotations
    =============  ========================  ==========================================================================
    "lebedev"      any                       1, 4, 18, 24, 70, 84, 182, 208, 342, 380 for degree 0 to 9; about (L+1)^3/3
    "gauss"        any                       (L + 1)^2 (floor(L / 2) + 1): 32 for degree 3, 108 for 5, 500 for 9
    "tetrahedral"  2                         12
    "octahedral"   3                         24
    "icosahedral"  5                         60
    =============  ========================  ==========================================================================

    "lebedev" is minimal among products of a rule on the sphere of these two families with the same angles at every
    point; the groups, which are no such products or match the angles to the points, have fewer rotations for degrees
    2, 4 and 5. No rule with positive weights has fewer than (L + 1)(L + 2)(L + 3) / 6.

    Parameters
    ----------
    degree : int, optional
        That is wanted, by default 3 for "lebedev" and "gauss". For the groups it follows from the rule, and may be
        left out; asking for less than the rule gives is allowed.
    rule : {"lebedev", "gauss", "tetrahedral", "octahedral", "icosahedral"}
    random : bool
        A random coset for every structure.
    seed : int
        Of the random coset in calls without a ``generator``: what is drawn is then a function of the structure.

    Raises
    ------
    DeclarationError
        For a degree that is not an integer of at least 0 or that the rule cannot give, and for an unknown rule.

    References
    ----------
    Product rules: M. Gräf and D. Potts, Numer. Funct. Anal. Optim. 30, 665 (2009). Points on the sphere:
    V. I. Lebedev and D. N. Laikov, Dokl. Math. 59, 477 (1999). Averaging networks over such rules: M. F. Langer,
    S. N. Pozdnyakov and M. Ceriotti, Mach. Learn.: Sci. Technol. 5, 04LT01 (2024).
    """

    limits: Mapping[str, str] = MappingProxyType(_TO_A_DEGREE)

    def __init__(self, degree: int | None = None, rule: str = "lebedev", random: bool = False, seed: int = 0) -> None:
        super().__init__()
        if rule not in RULES:
            raise DeclarationError(f"GroupAveraging: rule: unknown rule {rule!r}, {did_you_mean(str(rule), RULES)}")
        if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int) or degree < 0):
            raise DeclarationError(f"GroupAveraging: degree: expected an integer of at least 0, got {degree!r}")
        if not isinstance(random, bool):
            raise DeclarationError(f"GroupAveraging: random: expected True or False, got {random!r}")
        if degree is not None and degree > DEGREES.get(rule, degree):
            able = [repr(name) for name in RULES if DEGREES.get(name, degree) >= degree]
            raise DeclarationError(
                f"GroupAveraging: degree: the rule {rule!r} is exact to degree {DEGREES[rule]}, got {degree}; "
                f"{' or '.join(able)} can do it"
            )
        self.degree: int = DEGREES.get(rule, 3 if degree is None else degree)
        self.rule, self.random, self.seed = rule, random, check_seed("GroupAveraging", seed)
        if random:
            self.stochastic = True
            self.limits = dict(_OF_A_RANDOM_COSET)  # can be copied, unlike a proxy

    def describe(self) -> dict[str, Any]:
        return {"degree": self.degree, "rule": self.rule, "random": self.random, "seed": self.seed}

    def elements(self, group: str) -> tuple[Tensor, Tensor]:
        """Orthogonal matrices (n, 3, 3) and weights (n,) of sum 1, float64: those of the rule, before any draw."""
        if self.rule in DEGREES:
            rotations = rotation_group(self.rule)
            weights = torch.full((len(rotations),), 1.0 / len(rotations), dtype=torch.float64)
        else:
            rotations, weights = rotation_quadrature(self.degree, self.rule)
        if group == "O(3)":
            rotations, weights = torch.cat([rotations, -rotations]), torch.cat([weights, weights]) / 2.0
        return rotations, weights

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`."""
        found = owners(batch, scope)
        n = found.index.shape[0]
        rotations, weights = (t.to(found.index.device) for t in self.elements(group))
        if self.random:
            uniform = uniform_numbers(batch, scope, seed_of(generator, self.seed), 3)[:, found.index]
            rotations = (haar_rotations(uniform.T)[:, None] @ rotations).reshape(-1, 3, 3)
        else:
            rotations = rotations.repeat(n, 1, 1)
        return found.frame_set(rotations, weights.repeat(n))

    def extra_repr(self) -> str:
        return f"degree={self.degree}, rule={self.rule!r}" + (f", random=True, seed={self.seed}" if self.random else "")
