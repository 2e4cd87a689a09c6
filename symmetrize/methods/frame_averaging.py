"""Averaging over the principal-axis frames of a point cloud."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch_geometric.data import Data

from symmetrize.errors import DeclarationError
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods.clouds import clouds
from symmetrize.methods.principal_axes import axis_frames, principal_axes, second_moments

_TIES = "equal eigenvalues (symmetric, collinear or empty surroundings) leave the choice of axes to rounding"
_JUMPS = "where two eigenvalues cross, their axes exchange or turn at full weight"
_STEEP = "axes of nearly equal eigenvalues turn by 1 / (difference of the eigenvalues) per displacement"


class FrameAveraging(FrameMethod):
    r"""Average over the 4 (SO(3)) or 8 (O(3)) frames along the principal axes of the cloud, with equal weights.

    .. math:: F(x) = \frac{1}{n} \sum_{s} \rho(V S_s)\, f\big((V S_s)^T x\big), \qquad
              C = \sum_j r_j r_j^T = V \operatorname{diag}(\lambda_1 \le \lambda_2 \le \lambda_3)\, V^T

    with :math:`S_s = \operatorname{diag}(\pm 1, \pm 1, \pm 1)`, all eight for O(3) and those that make
    :math:`V S_s` a rotation for SO(3), and :math:`r_j` from the centroid.

    Source: Puny, Atzmon, Ben-Hamu, Misra, Grover, Smith and Lipman, "Frame averaging for invariant and equivariant
    network design", ICLR 2022, arXiv 2110.03336, the frames from principal components for E(d) and SE(d) in the
    section on point clouds.

    In atom scope, the extension to environments that is used here (not in the paper), C is the second moment of the
    neighbors about the atom, each weighted with a smooth function of its distance that vanishes at the cutoff; so
    periodic structures have frames, too.

    Parameters
    ----------
    cutoff_width : float, optional
        Atom scope: the distance over which the weight of a neighbor in C falls from 1 to 0, by default half of the
        cutoff. Unit of the positions.

    Raises
    ------
    DeclarationError
        For a width that is not a positive number.

    Notes
    -----
    Group: O(3) and SO(3). Exact (to rounding, for every output and degree), deterministic and independent of the order
    of the points wherever the three eigenvalues differ. Forces are the exact gradient there.

    Where eigenvalues are equal the axes of their eigenspace are one choice of the eigensolver out of a continuum:

    * symmetric clouds (CH4, a ring): the result depends on the orientation, invariant outputs included;
    * collinear clouds: the cloud is the same in all choices, and the signs average out what a vector has across the
      line; scalars and vectors are exact, outputs of degree 2 and higher are not in general;
    * a single point: the lab frame with all its signs; scalars and vectors exact, the others not;
    * derivatives through the tied pair are taken as zero (`symmetrize.methods.principal_axes`), so that forces are
      finite.

    Not continuous: the value jumps where two eigenvalues cross, and the derivative grows like 1 / (difference of
    eigenvalues) towards it. Equal weights are the reason: frames without weights cannot keep averages continuous (Dym,
    Lawrence and Siegel, "Equivariant frames and the impossibility of continuous canonicalization", ICML 2024, arXiv
    2402.16077); `symmetrize.methods.weighted_frame_averaging` does.

    Cost: 8 or 4 evaluations of the backbone for every owner.
    """

    limits: Mapping[str, str] = MappingProxyType(
        {
            **dict.fromkeys(
                (
                    "rotation_equivariance",
                    "inversion_equivariance",
                    "symmetric_sites",
                    "translation_invariance",
                    "permutation_equivariance",
                    "periodicity",
                    "frame_equivariance",
                    "frame_permutation",
                ),
                _TIES,
            ),
            "frame_conditioning": _STEEP,
            "smoothness": _JUMPS,
            "frame_continuity": _JUMPS,
        }
    )

    def __init__(self, cutoff_width: float | None = None) -> None:
        super().__init__()
        self.cutoff_width = check_width(type(self).__name__, cutoff_width)

    def describe(self) -> dict[str, Any]:
        return {"cutoff_width": self.cutoff_width}

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
        rotations = axis_frames(principal_axes(second_moments(around))[1], group).flatten(0, 1)
        return around.owners.frame_set(rotations, torch.ones_like(rotations[:, 0, 0]).detach())

    def extra_repr(self) -> str:
        return "" if self.cutoff_width is None else f"cutoff_width={self.cutoff_width}"


def check_width(method: str, width: float | None) -> float | None:
    """A positive width or None, or a `DeclarationError`."""
    if width is None:
        return None
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0.0 < width < float("inf"):
        raise DeclarationError(f"{method}: cutoff_width: expected a positive number or None, got {width!r}")
    return float(width)
