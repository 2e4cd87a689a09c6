"""Averaging over the group itself, by a quadrature of a stated degree: what the field's averaging tools do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import DeclarationError
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum
from symmetrize.ops.quadrature import rotation_quadrature
from symmetrize.ops.ragged import segment_sum


class GroupAveraging(FrameMethod):
    r"""Average over fixed orientations with the weights of a quadrature of SO(3), with inversion for O(3).

    .. math:: F(x) = \sum_k w_k\, \rho(R_k)\, f(R_k^{-1} x)

    The rule integrates products of Wigner functions up to ``degree`` exactly: what the backbone's dependence on
    orientation has of higher degree (plus that of the output) is left over as an error. As smooth as the backbone; the
    same number of evaluations for every structure.

    Parameters
    ----------
    degree : int
        Of `symmetrize.ops.quadrature.rotation_quadrature`: 24 rotations for 3, 84 for 5 (Lebedev times
        equidistant angles), about (degree + 1)^3 / 3 in general; O(3) takes twice as many.

    Raises
    ------
    DeclarationError
        For a degree that is not an integer of at least 0.
    """

    def __init__(self, degree: int = 3) -> None:
        super().__init__()
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
            raise DeclarationError(f"GroupAveraging: degree: expected an integer of at least 0, got {degree!r}")
        self.degree = degree

    def describe(self) -> dict[str, Any]:
        return {"degree": self.degree}

    def elements(self, group: str) -> tuple[Tensor, Tensor]:
        """Orthogonal matrices (n, 3, 3) and weights (n,) of sum 1, float64."""
        rotations, weights = rotation_quadrature(self.degree)
        if group == "O(3)":
            rotations, weights = torch.cat([rotations, -rotations]), torch.cat([weights, weights]) / 2.0
        return rotations, weights

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`."""
        pos = batch[keys.POS]
        rotations, weights = (t.to(pos.device) for t in self.elements(group))
        n = weights.shape[0]
        if scope == "atom":
            mask = batch.get(keys.CENTER_MASK)
            n_owners = pos.shape[0]
            owners = torch.arange(n_owners, device=pos.device)
            owners, origins = (owners, pos) if mask is None else (owners[mask], pos[mask])
        else:
            structure, ptr = batch[keys.BATCH], batch[keys.PTR]
            n_owners = ptr.shape[0] - 1
            owners = torch.arange(n_owners, device=pos.device)
            # A backbone is invariant under translations: this only keeps coordinates small.
            points = pos.detach().to(torch.float64)
            counts = (ptr[1:] - ptr[:-1]).clamp(min=1)
            origins = (segment_sum(points, structure, n_owners) / counts[:, None]).to(pos.dtype)
        owner = owners.repeat_interleave(n)
        return FrameSet(
            rotations=rotations.repeat(len(owners), 1, 1),
            weights=weights.repeat(len(owners)),
            owner=owner,
            stratum=torch.full_like(owner, int(Stratum.FRAME)),
            origins=origins.repeat_interleave(n, dim=0),
            n_owners=n_owners,
            scope=scope,
        )

    def extra_repr(self) -> str:
        return f"degree={self.degree}"
