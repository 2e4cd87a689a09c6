"""ECSE as a `FrameMethod`: candidates of a scope, strata, fallback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import where
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.frames import NEGLIGIBLE_WEIGHT, FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.clouds import owners
from symmetrize.methods.ecse.candidates import (
    around_atoms,
    around_centroids,
    axial_order,
    collinear_square,
    outermost_first,
    rigid_square,
)
from symmetrize.methods.ecse.paper import PaperECSE
from symmetrize.methods.ecse.strata import stratify
from symmetrize.ops.ragged import segment_max, segment_sum
from symmetrize.ops.switches import smooth_step

#: Which weights these are, in descriptions of saved models. Before there was a name for them: "levels", axes first and
#: then partners for each of them.
WEIGHTS = "pairs"

#: Pooled: the largest total weight of full coordinate systems around any atom of a structure has to be at least this.
#: The step that switches them on near collinearity is about exp(-1 / x), whose slope relative to its value is ln^2 of
#: the value: here 21, ten times the steepest slope of the step itself. What is less is not worth its derivatives.
LEAST_POOLED = 0.01


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
    pooled : bool
        Structure scope with the coordinate systems around all atoms of a structure, finite or periodic, for backbones
        of any depth that read a neighbor list: the whole structure is evaluated in each of them. Only full coordinate
        systems cover a whole structure, so that the other strata are left out: a structure without an atom whose
        neighbors define one is an error (or, in a smooth way, left to an auxiliary model), which ``fallback="axial"``
        cannot help. The number of evaluations grows with the structure, the cost with its square. Of copies of a cell
        the energy per atom is the same; of two structures far from each other it is not the sum: what is exact is the
        rotation of everything together.

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
        pooled: bool = False,
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
        if not isinstance(pooled, bool):
            raise DeclarationError(f"ECSE: pooled: expected True or False, got {pooled!r}")
        self.pooled = pooled
        if pooled:
            self.scopes = ("structure",)

    @staticmethod
    def paper(
        cutoff: float | None = None,
        cutoff_width: float = 0.15,
        collinearity_threshold: float = 0.2,
        collinearity_width: float = 0.15,
        beta: float = 5.0,
        weight_beta: float = 1.0,
        linear: bool = True,
        pruning: int = 4,
        species_pruning: Sequence[int] | bool = False,
        auxiliary: Backbone | None = None,
    ) -> PaperECSE:
        """The protocol as it was published; see `symmetrize.methods.ecse.paper.PaperECSE`."""
        return PaperECSE(
            cutoff,
            cutoff_width,
            collinearity_threshold,
            collinearity_width,
            beta,
            weight_beta,
            linear,
            pruning,
            species_pruning,
            auxiliary,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "cutoff_width": self.cutoff_width,
            "collinearity_width": self.collinearity_width,
            "fallback": self.fallback,
            "weights": WEIGHTS,
            **({"pooled": True} if self.pooled else {}),
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
        DeclarationError
            Pooled, for atom scope.
        NoFrameError
            With ``fallback="error"``, for an environment that is collinear, nearly so, or empty; pooled, for a
            structure in which all are.
        InvalidInputError
            In structure scope, for a periodic structure: it has no centroid; pooled, without a neighbor list.
        """
        if self.pooled and scope == "atom":
            raise DeclarationError(
                "ECSE(pooled=True): frames of all atoms serve the whole structure: scope: expected 'structure', got "
                "'atom'"
            )
        per_atom = scope == "atom" or self.pooled
        if per_atom:
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
        if self.pooled:
            return self._pool(batch, rotations, weights, owner, stratum)
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
            raise InvalidInputError(
                "ECSE(pooled=True): frames are built from neighbors: expected a backbone with a cutoff, got none"
                if self.pooled
                else "ECSE: atom scope needs a neighbor list, expected edge_vec and edge_cutoff"
            )
        pos = batch[keys.POS]
        center, mask = batch[keys.EDGE_INDEX][1], batch.get(keys.CENTER_MASK)
        if mask is not None and not self.pooled:  # no work for atoms whose frames nobody wants
            wanted = mask.index_select(0, center).nonzero()[:, 0]
            center, vectors = center.index_select(0, wanted), vectors.index_select(0, wanted)
        vectors, ptr, available, lengths = around_atoms(vectors, center, pos.shape[0], float(radius), self.cutoff_width)
        return pos, vectors, ptr, available, available, lengths

    def _around_centroids(self, batch: Data) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        periodic = batch[keys.PBC].any(dim=1).nonzero()
        if len(periodic):
            raise InvalidInputError(
                f"ECSE: structure scope is built around the centroid of a finite structure, structure "
                f"{int(periodic[0])} is periodic; use scope='atom' where the backbone has per-atom outputs, "
                "ECSE(pooled=True) (backbones with a cutoff; the cost grows with the square of the structure), the "
                "method GroupAveraging (any backbone, exact up to its degree), or set pbc to False for a molecule in a "
                "box"
            )
        pos, structure, ptr = batch[keys.POS], batch[keys.BATCH], batch[keys.PTR]
        centroid, vectors, available = around_centroids(pos, structure, ptr)
        key, scale = outermost_first(vectors, structure, ptr.shape[0] - 1)
        return centroid.to(pos.dtype), vectors, ptr, available, torch.ones_like(available), key, scale

    def _pool(self, batch: Data, rotations: Tensor, weights: Tensor, owner: Tensor, stratum: Tensor) -> FrameSet:
        """The full coordinate systems around all atoms, as those of their structures."""
        structure = batch[keys.BATCH]
        found = owners(batch, "structure")
        full = stratum == int(Stratum.FRAME)
        rest = segment_sum(weights[~full], owner[~full], structure.shape[0])
        rotations, weights, owner = rotations[full], weights[full], owner[full]
        around = segment_sum(weights, owner, structure.shape[0])
        row = structure.index_select(0, owner)
        if self.auxiliary is None:
            best = segment_max(around.detach(), structure, found.n_owners, 0.0)
            bad = (~(best >= LEAST_POOLED)).nonzero()
            if len(bad):
                raise NoFrameError(
                    "ECSE(pooled=True): expected an atom with two neighbors in clearly different directions in every "
                    f"structure, the environments of structure {int(bad[0, 0])} are all collinear (or nearly so) or "
                    f"empty: expected a total weight of full coordinate systems of at least {LEAST_POOLED} around some "
                    f"atom, got {float(best[bad[0, 0]]):.1e}; what covers such structures is ECSE() with scope='atom', "
                    "or around the centroid of a finite structure, or fallback=Backbone, a model that is equivariant "
                    "by construction"
                )
            return found.frame_set(rotations, weights, row)
        # The auxiliary model has what no atom covers: with l_i the share of the other strata around atom i, prod l_i,
        # so that in total sum_i (1 - l_i) + prod l_i >= 1.
        share = rest / (around + rest)
        covered = segment_sum((share == 0.0).to(torch.int64), structure, found.n_owners) > 0
        safe = torch.where(covered.index_select(0, structure), torch.ones_like(share), share)
        left = torch.exp(segment_sum(torch.log(safe), structure, found.n_owners))
        left = left * smooth_step(left / (2.0 * NEGLIGIBLE_WEIGHT) - 1.0)
        needy = (~covered & (left.detach() > 0.0)).nonzero()[:, 0]
        identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device).expand(needy.shape[0], 3, 3)
        frames = torch.full_like(row, int(Stratum.FRAME))
        owner = torch.cat([row, needy])
        return FrameSet(
            rotations=torch.cat([rotations, identity]),
            weights=torch.cat([weights, left.index_select(0, needy)]),
            owner=owner,
            stratum=torch.cat([frames, torch.full_like(needy, int(Stratum.AUXILIARY))]),
            origins=found.origins.index_select(0, owner),
            n_owners=found.n_owners,
            scope="structure",
        )

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
        return f"{widths}, fallback={self.fallback!r}" + (", pooled=True" if self.pooled else "")


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
