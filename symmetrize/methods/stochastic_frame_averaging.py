"""One principal-axis frame of a point cloud, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch_geometric.data import Data

from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods.clouds import clouds
from symmetrize.methods.draws import check_seed, seed_of, uniform_numbers
from symmetrize.methods.frame_averaging import check_width
from symmetrize.methods.principal_axes import axis_frames, principal_axes, second_moments


class StochasticFrameAveraging(FrameMethod):
    r"""One of the 4 (SO(3)) or 8 (O(3)) principal-axis frames, each with the same probability.

    .. math:: \hat F(x) = \rho(V S_s)\, f\big((V S_s)^T x\big), \qquad s \text{ uniform}, \qquad
              \mathbb{E}\,\hat F = F

    with the frames :math:`V S_s` and the average F of `FrameAveraging`.

    Source: Duval, Schmidt, Hernandez-Garcia, Miret, Malliaros, Bengio and Rolnick, "FAENet: frame averaging
    equivariant GNN for materials modeling", ICML 2023, arXiv 2305.05577 (stochastic frame averaging).

    Parameters
    ----------
    seed : int
        What is drawn where there is no ``generator``.
    cutoff_width : float, optional
        Of `FrameAveraging`.

    Raises
    ------
    DeclarationError
        For a seed that is not an integer, and a width that is not a positive number.

    Notes
    -----
    Group: O(3) and SO(3), in expectation, with the exceptions of `FrameAveraging` at equal eigenvalues; a single draw
    is as equivariant as the backbone is under the 8 or 4 reflections of its axes, which is what it has to learn.

    What is drawn is a function of the structure (its positions, in any order, and species) and of one number: the
    next one of the ``generator`` in every call, or the seed. Equal structures get equal frames in every batch; a turned
    structure is another one, and gets a new draw.

    Neither smooth nor conservative: every structure along a path has a draw of its own, so that the energy is not a
    function whose gradient the forces could be. They are the gradient at a fixed draw.

    Cost: 1 evaluation of the backbone for every owner.
    """

    stochastic = True
    limits: Mapping[str, str] = MappingProxyType(
        {
            **dict.fromkeys(
                (
                    "rotation_equivariance",
                    "inversion_equivariance",
                    "symmetric_sites",
                    "degeneracy_splitting",
                    "frame_equivariance",
                ),
                "one frame of the average stands for all: exact in expectation only",
            ),
            **dict.fromkeys(
                (
                    "translation_invariance",
                    "permutation_equivariance",
                    "periodicity",
                    "exactness",
                    "arithmetic",
                    "frame_permutation",
                    "frame_conditioning",
                ),
                "every change of the positions, one of rounding included, is followed by a new draw",
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
                "structures along a path are drawn for one by one, and forces belong to one draw",
            ),
        }
    )

    def __init__(self, seed: int = 0, cutoff_width: float | None = None) -> None:
        super().__init__()
        self.seed = check_seed("StochasticFrameAveraging", seed)
        self.cutoff_width = check_width("StochasticFrameAveraging", cutoff_width)

    def describe(self) -> dict[str, Any]:
        return {"seed": self.seed, "cutoff_width": self.cutoff_width}

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        InvalidInputError
            In structure scope for periodic structures.
        """
        around = clouds(batch, scope, type(self).__name__, self.cutoff_width)
        candidates = axis_frames(principal_axes(second_moments(around))[1], group)
        uniform = uniform_numbers(batch, scope, seed_of(generator, self.seed), 1)[0, around.owners.index]
        n_candidates = candidates.shape[1]
        chosen = (uniform * n_candidates).to(torch.int64).clamp(max=n_candidates - 1)
        rotations = candidates[torch.arange(around.n, device=chosen.device), chosen]
        return around.owners.frame_set(rotations, torch.ones_like(rotations[:, 0, 0]).detach())

    def extra_repr(self) -> str:
        width = "" if self.cutoff_width is None else f", cutoff_width={self.cutoff_width}"
        return f"seed={self.seed}{width}"
