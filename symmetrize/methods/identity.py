"""No symmetrisation: the baseline of every comparison."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum


class Identity(FrameMethod):
    """One frame per owner: the lab frame. ``Symmetrizer(backbone, Identity())`` is the bare backbone."""

    limits = MappingProxyType(
        dict.fromkeys(
            (
                "degeneracy_splitting",
                "energy_conservation",
                "exactness",
                "inversion_equivariance",
                "rotation_equivariance",
                "symmetric_sites",
                "torque",
            ),
            "nothing is symmetrised: outputs depend on the orientation as those of the backbone do",
        )
    )

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        pos = batch[keys.POS]
        n_owners = pos.shape[0] if scope == "atom" else batch[keys.PTR].shape[0] - 1
        owner = torch.arange(n_owners, device=pos.device)
        mask: Tensor | None = batch.get(keys.CENTER_MASK)
        if scope == "atom" and mask is not None:
            owner = owner[mask]
        n = owner.shape[0]
        return FrameSet(
            rotations=torch.eye(3, dtype=torch.float64, device=pos.device).expand(n, 3, 3),
            weights=torch.ones(n, dtype=torch.float64, device=pos.device),
            owner=owner,
            stratum=torch.full((n,), int(Stratum.FRAME), device=pos.device),
            origins=torch.zeros(n, 3, dtype=pos.dtype, device=pos.device),
            n_owners=n_owners,
            scope=scope,
        )
