"""Averaging over random elements of the group: augmentation at evaluation time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch_geometric.data import Data

from symmetrize.errors import DeclarationError
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods.clouds import owners
from symmetrize.methods.draws import check_seed, seed_of, uniform_numbers
from symmetrize.ops.quadrature import haar_rotations

_LIMITS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "rotation_equivariance",
                "inversion_equivariance",
                "frame_equivariance",
                "symmetric_sites",
                "degeneracy_splitting",
                "torque",
            ),
            "an average over a few random elements: exact in expectation only, with noise of 1 / sqrt(n_samples)",
        ),
        **dict.fromkeys(
            (
                "translation_invariance",
                "periodicity",
                "exactness",
                "arithmetic",
                "frame_conditioning",
            ),
            "every change of the positions, one of rounding included, is followed by new draws",
        ),
        **dict.fromkeys(
            (
                "smoothness",
                "frame_continuity",
                "forces_are_gradient",
                "stress_is_gradient",
                "hessian_symmetry",
                "closed_loops",
                "energy_conservation",
            ),
            "structures along a path are drawn for one by one, and forces belong to one set of draws",
        ),
    }
)


class RandomAugmentation(FrameMethod):
    r"""Mean over n independent Haar-random elements of the group.

    .. math:: F(x) = \frac1n \sum_{k=1}^n \rho(g_k)\, f(g_k^{-1} x), \qquad g_k \sim \text{Haar}

    Group: SO(3), or O(3), where every rotation is times the inversion with probability one half. Exact: in expectation,
    :math:`E\,F(x) = \int \rho(g) f(g^{-1} x)\, dg`, for every n and every backbone; one call is off by noise whose
    variance is the orientation variance of the backbone (`symmetrize.testing.measure_orientation_variance`) over n.
    Smooth: for fixed draws as the backbone is. But what is drawn is a function of the structure (its positions, in any
    order, and species) and of one number, the next one of the ``generator`` in every call or else the ``seed``: every
    structure along a path has draws of its own, and the forces, which are the gradient at fixed draws, belong to no
    energy. Equal structures get equal draws in every batch; a turned structure is another one. Periodic structures are
    as good as any. Fails: wherever reproducibility under rotation, smoothness or conservation matter; the error falls
    with the square root of the cost only, where `GroupAveraging` (also with ``random=True``) removes low degrees.

    Cost: n evaluations for every owner, whatever the group.

    Parameters
    ----------
    n_samples : int
        Elements for every structure, or in atom scope for every atom.
    seed : int
        Of calls without a ``generator``.

    Raises
    ------
    DeclarationError
        For numbers of samples below 1, and anything that is not an integer.

    References
    ----------
    Random rotations of the input, at training and evaluation time, as a substitute for equivariance: S. N. Pozdnyakov
    and M. Ceriotti, NeurIPS 2023 (arXiv 2305.19302). The estimator is that of S. Chen, E. Dobriban and
    J. H. Lee, J. Mach. Learn. Res. 21 (245), 1 (2020).
    """

    stochastic = True
    limits = _LIMITS

    def __init__(self, n_samples: int = 8, seed: int = 0) -> None:
        super().__init__()
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise DeclarationError(
                f"RandomAugmentation: n_samples: expected an integer of at least 1, got {n_samples!r}"
            )
        self.n_samples, self.seed = n_samples, check_seed("RandomAugmentation", seed)

    def describe(self) -> dict[str, Any]:
        return {"n_samples": self.n_samples, "seed": self.seed}

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`."""
        found, n = owners(batch, scope), self.n_samples
        uniform = uniform_numbers(batch, scope, seed_of(generator, self.seed), 4 * n)[:, found.index]
        # The samples of one owner follow each other.
        uniform = uniform.reshape(n, 4, -1).permute(2, 0, 1).reshape(-1, 4)
        elements = haar_rotations(uniform[:, :3])
        if group == "O(3)":
            elements = torch.where(uniform[:, 3, None, None] < 0.5, -elements, elements)
        return found.frame_set(elements, torch.full_like(uniform[:, 0], 1.0 / n))

    def extra_repr(self) -> str:
        return f"n_samples={self.n_samples}, seed={self.seed}"
