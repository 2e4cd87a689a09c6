"""ECSE as a `FrameMethod`: candidates of a scope, strata, fallback."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import where
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.frames import NEGLIGIBLE_WEIGHT, FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.ecse.candidates import (
    around_atoms,
    around_centroids,
    axial_order,
    collinear_square,
    outermost_first,
    rigid_square,
)
from symmetrize.methods.ecse.strata import stratify
from symmetrize.ops.ragged import segment_sum

#: Which weights these are, in descriptions of saved models. Before there was a name for them: "levels", axes first and
#: then partners for each of them.
WEIGHTS = "pairs"


class ECSE(FrameMethod):
    r"""Equivariant coordinate system ensemble, stratified: exact, smooth, deterministic, without an auxiliary model.

    Coordinate systems are built from pairs of neighbors (in atom scope around every atom, in structure scope around
    the centroid), and weighted by closed-form C-infinity weights that vanish before a system becomes ill-defined. What
    has no coordinate system - collinear environments, isolated atoms - is covered by an n-fold average about the axis
    and by the invariant part of the isolated center; the three strata share the weight smoothly:

    .. math:: y(X) = \frac{\sum_k w_k \rho(F_k)\, f(F_k^T X)}{\sum_k w_k}, \qquad \sum_k w_k \ge 1.

    The idea is that of Pozdnyakov and Ceriotti (NeurIPS 2023, arXiv 2305.19302); the stratified weights are this
    package's own, see `symmetrize.methods.ecse.strata`.

    Parameters
    ----------
    cutoff_width : float
        D, the distance (unit of the positions) over which pairs of neighbors of similar key share their weight, and
        over which a neighbor is switched off at the cutoff. Smaller: fewer evaluations and steeper weights (derivative
        with respect to the key up to 2 / D per competitor).
    collinearity_width : float
        sin^2 of the angle between two directions from which on their coordinate system counts fully (0.2: 27
        degrees); it is switched on from collinearity to there, as a function of the sine. Smaller: fewer axial
        averages on bent environments, steeper outputs near collinearity.
    fallback : {"axial", "error"} or Backbone
        What covers environments without a full coordinate system: the strata above; an error; or an auxiliary model
        that is equivariant by construction and gives the same outputs, as in the paper.

    Raises
    ------
    DeclarationError
        For widths that are not positive, and for an unknown fallback.

    Notes
    -----
    The defaults are the widths of the paper: D_R = 0.15 angstrom, W = 0.2. Nothing else is to be chosen: all other
    numbers in the weights are pure ones.
    """

    def __init__(
        self,
        cutoff_width: float = 0.15,
        collinearity_width: float = 0.2,
        fallback: Literal["axial", "error"] | Backbone = "axial",
    ) -> None:
        super().__init__(auxiliary=fallback if isinstance(fallback, Backbone) else None)
        for name, value in {"cutoff_width": cutoff_width, "collinearity_width": collinearity_width}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
                raise DeclarationError(f"ECSE: {name}: expected a positive number, got {value!r}")
        if not collinearity_width < 1.0:
            raise DeclarationError(
                f"ECSE: collinearity_width: expected less than 1 (sin^2 cannot exceed it), got {collinearity_width}"
            )
        if not isinstance(fallback, Backbone) and fallback not in ("axial", "error"):
            raise DeclarationError(f"ECSE: fallback: expected 'axial', 'error' or a Backbone, got {fallback!r}")
        self.cutoff_width = float(cutoff_width)
        self.collinearity_width = float(collinearity_width)
        self.fallback = "auxiliary" if isinstance(fallback, Backbone) else fallback

    def describe(self) -> dict[str, Any]:
        return {
            "cutoff_width": self.cutoff_width,
            "collinearity_width": self.collinearity_width,
            "fallback": self.fallback,
            "weights": WEIGHTS,
        }

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> ECSE:
        """See `FrameMethod.rebuild`.

        Raises
        ------
        DeclarationError
            For a description of other weights than today's: they would change what a model gives.
        """
        arguments = dict(description)
        weights = arguments.pop("weights", "levels")
        if weights != WEIGHTS:
            raise DeclarationError(
                f"ECSE: weights: expected {WEIGHTS!r}, got {weights!r}: the model was saved with weights that this "
                "version does not have; read it with the version that wrote it, or give it today's, which changes its "
                "outputs where several frames count: load(folder, method=ECSE())"
            )
        return cls(**(arguments if auxiliary is None else {**arguments, "fallback": auxiliary}))

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        NoFrameError
            With ``fallback="error"``, for an environment that is collinear, nearly so, or empty.
        InvalidInputError
            In structure scope, for a periodic structure: it has no centroid.
        """
        if scope == "atom":
            origins, vectors, ptr, available, reach, lengths = self._around_atoms(batch)
            key, scale = lengths, lengths
        else:
            origins, vectors, ptr, available, reach, key, scale = self._around_centroids(batch)
            lengths = None
        order = axial_order(l_max)
        precision = torch.finfo(batch[keys.POS].dtype).eps
        rotations, weights, owner, stratum = stratify(
            vectors,
            available,
            reach,
            ptr,
            width=self.cutoff_width,
            sine_width=math.sqrt(self.collinearity_width),
            order=order,
            mirror=group == "O(3)",
            collinear=collinear_square(precision),
            rigid_below=rigid_square(precision, order, l_max),
            threshold=2.0 * NEGLIGIBLE_WEIGHT,
            lengths=lengths,
            key=key,
            scale=scale,
        )
        mask = batch.get(keys.CENTER_MASK)
        if scope == "atom" and mask is not None:
            wanted = mask[owner]
            rotations, weights, owner, stratum = rotations[wanted], weights[wanted], owner[wanted], stratum[wanted]
        if self.fallback == "error":
            self._refuse_degenerate(batch, scope, owner, stratum)
        if self.auxiliary is not None:
            rotations, weights, owner, stratum = _hand_over(rotations, weights, owner, stratum, origins.shape[0])
        return FrameSet(
            rotations=rotations,
            weights=weights,
            owner=owner,
            stratum=stratum,
            origins=origins.index_select(0, owner),
            n_owners=origins.shape[0],
            scope=scope,
        )

    def _around_atoms(self, batch: Data) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        vectors, radius = batch.get(keys.EDGE_VEC), batch.get(keys.EDGE_CUTOFF)
        if vectors is None or radius is None:
            raise InvalidInputError("ECSE: atom scope needs a neighbor list, expected edge_vec and edge_cutoff")
        pos = batch[keys.POS]
        center, mask = batch[keys.EDGE_INDEX][1], batch.get(keys.CENTER_MASK)
        if mask is not None:  # no work for atoms whose frames nobody wants
            wanted = mask.index_select(0, center).nonzero()[:, 0]
            center, vectors = center.index_select(0, wanted), vectors.index_select(0, wanted)
        vectors, ptr, available, lengths = around_atoms(vectors, center, pos.shape[0], float(radius), self.cutoff_width)
        return pos, vectors, ptr, available, available, lengths

    def _around_centroids(self, batch: Data) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        periodic = batch[keys.PBC].any(dim=1).nonzero()
        if len(periodic):
            raise InvalidInputError(
                f"ECSE: structure scope is built around the centroid of a finite structure, structure "
                f"{int(periodic[0])} is periodic; use scope='atom' where the backbone has per-atom outputs, the method "
                "GroupAveraging (any backbone, exact up to its degree), or set pbc to False for a molecule in a box"
            )
        pos, structure, ptr = batch[keys.POS], batch[keys.BATCH], batch[keys.PTR]
        centroid, vectors, available = around_centroids(pos, structure, ptr)
        key, scale = outermost_first(vectors, structure, ptr.shape[0] - 1)
        return centroid.to(pos.dtype), vectors, ptr, available, torch.ones_like(available), key, scale

    @staticmethod
    def _refuse_degenerate(batch: Data, scope: Scope, owner: Tensor, stratum: Tensor) -> None:
        bad = (stratum != int(Stratum.FRAME)).nonzero()
        if not len(bad):
            return
        kind = "collinear (or nearly so)" if int(stratum[bad[0, 0]]) == int(Stratum.AXIS) else "empty"
        raise NoFrameError(
            f"ECSE(fallback='error'): expected a full coordinate system everywhere, the environment of "
            f"{where(batch, int(owner[bad[0, 0]]), scope)} is "
            f"{kind}; fallback='axial' covers it exactly"
        )

    def extra_repr(self) -> str:
        widths = f"cutoff_width={self.cutoff_width}, collinearity_width={self.collinearity_width}"
        return f"{widths}, fallback={self.fallback!r}"


def _hand_over(
    rotations: Tensor, weights: Tensor, owner: Tensor, stratum: Tensor, n_owners: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the weight of the axis and point strata to one unrotated evaluation of the auxiliary model."""
    full = stratum == int(Stratum.FRAME)
    left = segment_sum(weights[~full], owner[~full], n_owners)
    needy = (left > 0.0).nonzero()[:, 0]
    identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device).expand(needy.shape[0], 3, 3)
    return (
        torch.cat([rotations[full], identity]),
        torch.cat([weights[full], left[needy]]),
        torch.cat([owner[full], needy]),
        torch.cat([stratum[full], torch.full_like(needy, int(Stratum.AUXILIARY))]),
    )
