"""Frame methods as TorchScript modules: group elements and weights of every owner from plain tensors.

Each has the same ``forward``, and calls the functions that its method calls.
"""

# No "from __future__ import annotations" here: TorchScript reads the annotations of attributes.

import math

import torch
from torch import Tensor

from symmetrize.errors import DeclarationError
from symmetrize.frames import NEGLIGIBLE_WEIGHT, FrameMethod
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.ecse.candidates import (
    around_atoms,
    around_centroids,
    axial_order,
    collinear_square,
    outermost_first,
    rigid_square,
)
from symmetrize.methods.ecse.strata import stratify
from symmetrize.methods.group_averaging import GroupAveraging
from symmetrize.methods.identity import Identity
from symmetrize.ops.ragged import segment_sum


def frames_module(
    method: FrameMethod, *, group: str, scope: str, l_max: int, epsilon: float, radius: float | None
) -> torch.nn.Module:
    """The scriptable form of a method.

    Parameters
    ----------
    method : FrameMethod
    group, scope : str
    l_max : int
        Highest degree among the outputs.
    epsilon : float
        Machine epsilon of the precision in which the backbone is evaluated.
    radius : float or None
        Atom scope: how far candidates are looked for.

    Raises
    ------
    DeclarationError
        There is none.
    """
    if type(method) is ECSE:
        if method.pooled:
            raise DeclarationError("export: ECSE(pooled=True) cannot be exported; use scope='atom' with ECSE()")
        if method.auxiliary is not None:
            raise DeclarationError("export: an auxiliary model as fallback cannot be exported; use fallback='axial'")
        if scope == "atom" and radius is None:
            raise DeclarationError("export: atom scope needs a radius to look for candidates in, got None")
        return ECSEFrames(method, group, scope == "atom", l_max, epsilon, radius or 0.0)
    if type(method) is GroupAveraging:
        if method.random:
            raise DeclarationError(
                "export: GroupAveraging(random=True) draws anew for every structure and cannot be exported; "
                "use random=False"
            )
        return FixedFrames(*method.elements(group), scope == "atom")
    if type(method) is Identity:
        return FixedFrames(torch.eye(3, dtype=torch.float64)[None], torch.ones(1, dtype=torch.float64), scope == "atom")
    raise DeclarationError(f"export: {type(method).__name__} cannot be exported; ECSE, GroupAveraging, Identity can")


class ECSEFrames(torch.nn.Module):
    """`symmetrize.ECSE`."""

    def __init__(self, method: ECSE, group: str, per_atom: bool, l_max: int, epsilon: float, radius: float) -> None:
        super().__init__()
        self.per_atom, self.radius, self.width = per_atom, radius, method.cutoff_width
        self.sine_width = math.sqrt(method.collinearity_width)
        self.order = axial_order(l_max)
        self.mirror = group == "O(3)"
        self.collinear = collinear_square(epsilon)
        self.rigid_below = rigid_square(epsilon, self.order, l_max)
        self.threshold = 2.0 * NEGLIGIBLE_WEIGHT
        self.refuses = method.fallback == "error"
        self.needs_finite = not per_atom

    def forward(
        self, pos: Tensor, structure: Tensor, ptr: Tensor, center: Tensor, vectors: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Frames of every owner that is wanted.

        Parameters
        ----------
        pos : Tensor of shape (n_atoms, 3)
        structure, ptr : Tensor of shape (n_atoms,), (n_structures + 1,)
        center, vectors : Tensor of shape (n_edges,), (n_edges, 3)
            Candidates of atom scope, sorted by center.
        wanted : Tensor of shape (n_atoms,)
            bool.

        Returns
        -------
        rotations, weights : Tensor of shape (n_frames, 3, 3), (n_frames,), float64
            Weights sum to one over every owner.
        owner, stratum : Tensor of shape (n_frames,)
        origins : Tensor of shape (n_frames, 3)
        """
        if self.per_atom:
            keep = wanted[center].nonzero()[:, 0]
            vectors, candidates_ptr, available, lengths = around_atoms(
                vectors[keep], center[keep], pos.shape[0], self.radius, self.width
            )
            origins, reach = pos, available
            known: Tensor | None = lengths
            key, scale = lengths, lengths
        else:
            centroid, vectors, available = around_centroids(pos, structure, ptr)
            origins, reach, candidates_ptr = centroid.to(pos.dtype), torch.ones_like(available), ptr
            known = None
            key, scale = outermost_first(vectors, structure, ptr.shape[0] - 1)
        rotations, weights, owner, stratum = stratify(
            vectors,
            available,
            reach,
            candidates_ptr,
            self.width,
            self.sine_width,
            self.order,
            self.mirror,
            self.collinear,
            self.rigid_below,
            self.threshold,
            lengths=known,
            key=key,
            scale=scale,
        )
        if self.per_atom:
            kept = wanted[owner].nonzero()[:, 0]
            rotations, weights, owner, stratum = rotations[kept], weights[kept], owner[kept], stratum[kept]
        if self.refuses and bool((stratum != 0).any()):
            raise RuntimeError("ECSE(fallback='error'): an environment is collinear (or nearly so) or empty")
        total = segment_sum(weights, owner, origins.shape[0])
        return rotations, weights / total[owner], owner, stratum, origins[owner]


class FixedFrames(torch.nn.Module):
    """The same elements and weights for every owner: `symmetrize.GroupAveraging`, `symmetrize.Identity`."""

    rotations: Tensor
    weights: Tensor

    def __init__(self, rotations: Tensor, weights: Tensor, per_atom: bool) -> None:
        super().__init__()
        self.per_atom = per_atom
        self.needs_finite = False
        self.register_buffer("rotations", rotations)
        self.register_buffer("weights", weights / weights.sum())

    def forward(
        self, pos: Tensor, structure: Tensor, ptr: Tensor, center: Tensor, vectors: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `ECSEFrames.forward`."""
        if self.per_atom:
            owners = wanted.nonzero()[:, 0]
            origins = pos[owners]
        else:
            n_structures = ptr.shape[0] - 1
            owners = torch.arange(n_structures, device=pos.device)
            points = pos.detach().to(torch.float64)
            counts = (ptr[1:] - ptr[:-1]).clamp(min=1)
            origins = (segment_sum(points, structure, n_structures) / counts[:, None]).to(pos.dtype)
        n = self.weights.shape[0]
        owner = owners.repeat_interleave(n)
        return (
            self.rotations.to(torch.float64).repeat(owners.shape[0], 1, 1),
            self.weights.to(torch.float64).repeat(owners.shape[0]),
            owner,
            torch.zeros_like(owner),
            origins.repeat_interleave(n, dim=0),
        )
