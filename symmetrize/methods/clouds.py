"""What frames are built from: the owners of frames, and the points around each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import where
from symmetrize.errors import InvalidInputError
from symmetrize.frames import FrameSet, Scope, Stratum
from symmetrize.ops.ragged import offsets, segment_sum
from symmetrize.ops.switches import smooth_cutoff


@dataclass(frozen=True, eq=False)
class Owners:
    """The structures or atoms that need frames.

    Attributes
    ----------
    index : Tensor of shape (n,)
        Their numbers in the batch, ascending: in atom scope those of ``center_mask``.
    origins : Tensor of shape (n, 3)
        The atom, or the centroid of the structure: a constant, since backbones are invariant under translations, and
        it only keeps coordinates small.
    n_owners : int
        All structures or atoms of the batch.
    scope : {"atom", "structure"}
    """

    index: Tensor
    origins: Tensor
    n_owners: int
    scope: Scope

    def frame_set(self, rotations: Tensor, weights: Tensor, row: Tensor | None = None) -> FrameSet:
        """Full coordinate systems of these owners.

        Parameters
        ----------
        rotations : Tensor of shape (n_frames, 3, 3), float64
        weights : Tensor of shape (n_frames,), float64
        row : Tensor of shape (n_frames,), optional
            Which entry of ``index`` each frame belongs to; by default equally many of each, in order.
        """
        n_frames = weights.shape[0]
        if row is None:
            n = self.index.shape[0]
            row = torch.arange(n, device=weights.device).repeat_interleave(n_frames // max(n, 1))
        owner = self.index.index_select(0, row)
        return FrameSet(
            rotations=rotations,
            weights=weights,
            owner=owner,
            stratum=torch.full_like(owner, int(Stratum.FRAME)),
            origins=self.origins.index_select(0, row),
            n_owners=self.n_owners,
            scope=self.scope,
        )


@dataclass(frozen=True, eq=False)
class Clouds:
    """Points around every owner.

    Attributes
    ----------
    owners : Owners
    vectors : Tensor of shape (n_points, 3), float64
        From the atom, or from the centroid of the structure; differentiable.
    row : Tensor of shape (n_points,)
        Which entry of ``owners.index`` a point belongs to, ascending.
    ptr : Tensor of shape (n_owners_with_frames + 1,)
        Offsets of the points of each owner.
    weight : Tensor of shape (n_points,), float64
        In atom scope a smooth cutoff function of the distance, 1 in structure scope.
    species : Tensor of shape (n_points,) or None
        Atomic numbers.
    atom : Tensor of shape (n_points,)
        Number of the atom in the batch.
    """

    owners: Owners
    vectors: Tensor
    row: Tensor
    ptr: Tensor
    weight: Tensor
    species: Tensor | None
    atom: Tensor

    @property
    def n(self) -> int:
        """Number of owners."""
        return self.owners.index.shape[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a value of every point over the points of each owner: Tensor of shape (n, ...)."""
        return segment_sum(values, self.row, self.n)


def owners(batch: Data, scope: Scope) -> Owners:
    """Structures, or atoms of ``center_mask``, with their origins."""
    pos = batch[keys.POS]
    if scope == "atom":
        mask = batch.get(keys.CENTER_MASK)
        index = torch.arange(pos.shape[0], device=pos.device)
        index = index if mask is None else index[mask]
        return Owners(index, pos.detach().index_select(0, index), pos.shape[0], scope)
    structure, ptr = batch[keys.BATCH], batch[keys.PTR]
    n = ptr.shape[0] - 1
    counts = (ptr[1:] - ptr[:-1]).clamp(min=1)
    centroid = segment_sum(pos.detach().to(torch.float64), structure, n) / counts[:, None]
    return Owners(torch.arange(n, device=pos.device), centroid.to(pos.dtype), n, scope)


def clouds(batch: Data, scope: Scope, method: str, width: float | None = None) -> Clouds:
    """The points that the frames of every owner are built from.

    Parameters
    ----------
    batch : Data
        Validated; in atom scope with a neighbor list.
    scope : {"atom", "structure"}
        ``"structure"``: all atoms of a finite structure, from its centroid. ``"atom"``: the neighbors of an atom, of
        which several may be images of one atom.
    method : str
        Name of who asks, for messages.
    width : float, optional
        Atom scope: the distance over which the weight of a neighbor falls from 1 to 0 at the cutoff, by default half
        of the cutoff.

    Raises
    ------
    InvalidInputError
        For periodic structures in structure scope, and for atom scope without a neighbor list.
    """
    found, species = owners(batch, scope), batch.get(keys.Z)
    if scope == "structure":
        periodic = batch[keys.PBC].any(dim=1).nonzero()
        if len(periodic):
            raise InvalidInputError(
                f"{method}: structure scope is built around the centroid of a finite structure, structure "
                f"{int(periodic[0])} is periodic; use scope='atom' where the backbone has per-atom outputs, the method "
                "GroupAveraging (any backbone, exact up to its degree), or set pbc to False for a molecule in a box"
            )
        points, row, ptr = batch[keys.POS].to(torch.float64), batch[keys.BATCH], batch[keys.PTR]
        counts = (ptr[1:] - ptr[:-1]).clamp(min=1)
        centroid = segment_sum(points, row, found.n_owners) / counts[:, None]
        vectors = points - centroid.index_select(0, row)
        atom = torch.arange(points.shape[0], device=points.device)
        return Clouds(found, vectors, row, ptr, torch.ones_like(vectors[:, 0]), species, atom)
    edges, radius = batch.get(keys.EDGE_INDEX), batch.get(keys.EDGE_CUTOFF)
    if batch.get(keys.EDGE_VEC) is None or radius is None or edges is None:
        raise InvalidInputError(f"{method}: atom scope needs a neighbor list, expected edge_vec and edge_cutoff")
    vectors, (atom, center) = batch[keys.EDGE_VEC].to(torch.float64), edges
    place = torch.full((found.n_owners,), -1, dtype=torch.int64, device=center.device)
    place[found.index] = torch.arange(found.index.shape[0], device=center.device)
    wanted = (place[center] >= 0).nonzero()[:, 0]
    vectors, atom, row = vectors[wanted], atom[wanted], place[center[wanted]]
    square = (vectors * vectors).sum(dim=1)
    coincident = square == 0.0
    lengths = torch.where(coincident, 0.0, torch.sqrt(torch.where(coincident, torch.ones_like(square), square)))
    weight = smooth_cutoff(lengths, float(radius), 0.5 * float(radius) if width is None else width)
    ptr = offsets(torch.bincount(row, minlength=found.index.shape[0]))
    return Clouds(found, vectors, row, ptr, weight, None if species is None else species[atom], atom)


def where_owner(batch: Data, found: Owners, row: int) -> str:
    """Words for the owner of a row, for messages."""
    return where(batch, int(found.index[row]), found.scope)
