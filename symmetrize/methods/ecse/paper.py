"""The published protocol of ECSE, number by number: adaptive inner cutoff, pruned weights, auxiliary model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import refuse_unknown_species, replace, where, with_neighbors
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.frames import NEGLIGIBLE_WEIGHT, FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.clouds import owners
from symmetrize.methods.ecse.published_weights import auxiliary_weight, prune, prune_species, weighted_frames

#: Why checks fail without an auxiliary model. The first one is about an exception, which is announced as such.
_COLLINEAR = "error: collinear or empty surroundings have no coordinate system, and there is no auxiliary model"
_STEEP = "weights turn over within 0.002-0.01 angstrom where a pair fades in or is pruned"


class PaperECSE(FrameMethod):
    r"""ECSE as published: all pairs of neighbors within an adaptive inner cutoff, pruned, with an auxiliary model.

    Every ordered pair (j, k) of neighbors of a center gives the coordinate system [u_j, u_j x u_k / |u_j x u_k|, e_3],
    the third axis completing it, with the weight

    .. math:: w_{jk} = f_c(d_j | R_{in}, D_R)\, f_c(d_k | R_{in}, D_R)\, q(z_{jk} | W - D_W, D_W), \qquad
              z_{jk} = |u_j \times u_k|^2

    where f_c is a smooth cutoff function, q a smooth step times :math:`(z - W + D_W) / D_W`, and the inner cutoff a
    smooth minimum over the pairs that are there,

    .. math:: R_{in} = D_R + \mathrm{SmoothMax}_{-\beta}\bigl(\{\mathrm{SmoothMax}_\beta(d_j, d_k) + T\} \cup
              \{R_{out}\}\bigr), \qquad T = W_0(1/e) / \beta,

    a pair counting :math:`f_c(d_j | R_{out}, D_R) f_c(d_k | R_{out}, D_R) q_0(z_{jk} | W, D_W)`, with q_0 the step
    alone. The weights of all centers of a structure are pooled (scope ``"structure"``, as published: the whole
    structure is evaluated in each frame) or those of a center kept to it (scope ``"atom"``). Several times over, what
    is below a smooth maximum of the weights is pruned. With an auxiliary model, equivariant by construction,

    .. math:: y = \frac{\sum_{k} w_k\, \rho(F_k) f(F_k^T x) + w_{aux}\, y_{aux}}{\sum_k w_k + w_{aux}}.

    Source: Pozdnyakov and Ceriotti, "Smooth, exact rotational symmetrization for deep learning on point clouds",
    NeurIPS 36 (2023), arXiv 2305.19302, section 4 and its appendices; constants are the defaults of the authors' code
    (github.com/spozdn/pet).

    Parameters
    ----------
    cutoff : float, optional
        Neighbors up to here are candidates, and R_out is the smaller one of this and ``largest_cutoff``. By default
        that of the backbone's neighbor list (in atom scope, of a list that reaches everything a center's output depends
        on); needed for backbones that read none.
    cutoff_width : float
        D_R.
    collinearity_threshold : float
        W: sin^2 of the angle between two directions from which on their frame counts fully, and above which a pair
        counts for the inner cutoff.
    collinearity_width : float
        D_W, over which both are switched on.
    beta : float
        Sharpness of the smooth extrema of distances, in the inverse of their unit.
    weight_beta : float
        Sharpness of the smooth maximum of weights.
    linear : bool
        Whether q has the linear factor. Weights reach (1 - W + D_W) / D_W = 6.33 with it, 1 without.
    pruning : int
        How often weights are pruned.
    species_pruning : False or sequence of int
        Atomic numbers, in the order in which the model numbers them: before other pruning keep the frames whose
        (center, first, second neighbor) comes last. False: no such pruning.
    auxiliary : Backbone, optional
        Model with the same outputs that is equivariant by construction; it covers structures, or environments, whose
        frames have small weight, and those that have none.
    largest_cutoff : float
        Upper bound of R_out.

    Raises
    ------
    DeclarationError
        For numbers out of range.

    Notes
    -----
    Group: SO(3) only: the coordinate systems are right-handed, and a chiral structure and its mirror image do not get
    mirrored frames.

    Exact for rotations wherever there is a frame or an auxiliary model; independent of the order of the atoms.

    Where it fails: (1) R_in may exceed R_out, by up to D_R + T: a frame whose neighbor leaves the list at the cutoff
    vanishes at full weight, and the output jumps. (2) Weights turn over within 0.002-0.01 angstrom where a pair fades
    in. (3) Inversion. (4) Collinear environments have no frame: without an auxiliary model an error. (5) Frames of
    weight below 1e-10 are dropped without a switch: a jump of that size. `ECSE` with its own weights has none of these.

    Cost: pooled over a structure the number of frames grows with the structure (8 thermal Si atoms about 24), so that
    the work is quadratic; per center it is 2-12 evaluations.
    """

    groups = ("SO(3)",)
    limits: Mapping[str, str] = MappingProxyType(
        {
            **dict.fromkeys(
                (
                    "finite_outputs",
                    "frame_conditioning",
                    "frame_continuity",
                    "frame_equivariance",
                    "frame_permutation",
                    "frame_weights",
                    "inversion_equivariance",
                    "permutation_equivariance",
                    "rotation_equivariance",
                    "smoothness",
                    "symmetric_sites",
                    "translation_invariance",
                ),
                _COLLINEAR,
            ),
            "closed_loops": _STEEP,
            "energy_conservation": _STEEP,
        }
    )

    def __init__(
        self,
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
        largest_cutoff: float = 10.0,
    ) -> None:
        if auxiliary is not None and not isinstance(auxiliary, Backbone):
            raise DeclarationError(f"PaperECSE: auxiliary: expected a Backbone or None, got {auxiliary!r}")
        super().__init__(auxiliary=auxiliary)
        self.cutoff = None if cutoff is None else _positive("cutoff", cutoff)
        self.cutoff_width = _positive("cutoff_width", cutoff_width)
        self.collinearity_threshold = _positive("collinearity_threshold", collinearity_threshold)
        self.collinearity_width = _positive("collinearity_width", collinearity_width)
        self.beta = _positive("beta", beta)
        self.weight_beta = _positive("weight_beta", weight_beta)
        self.largest_cutoff = _positive("largest_cutoff", largest_cutoff)
        if not collinearity_width <= collinearity_threshold:
            raise DeclarationError(
                f"PaperECSE: collinearity_width: expected at most collinearity_threshold = {collinearity_threshold}: a "
                f"frame of collinear directions does not exist, got {collinearity_width}"
            )
        if not collinearity_threshold + collinearity_width < 1.0:
            raise DeclarationError(
                "PaperECSE: collinearity_threshold + collinearity_width: expected less than 1 (sin^2 cannot exceed it),"
                f" got {collinearity_threshold + collinearity_width}"
            )
        if isinstance(pruning, bool) or not isinstance(pruning, int) or pruning < 0:
            raise DeclarationError(f"PaperECSE: pruning: expected a number of passes, got {pruning!r}")
        if species_pruning is True:
            raise DeclarationError(
                "PaperECSE: species_pruning: expected the atomic numbers that the model knows, in its order, got True"
            )
        self.linear = bool(linear)
        self.pruning = pruning
        self.species_pruning = tuple(int(z) for z in species_pruning) if species_pruning else ()

    def describe(self) -> dict[str, Any]:
        return {
            "cutoff": self.cutoff,
            "cutoff_width": self.cutoff_width,
            "collinearity_threshold": self.collinearity_threshold,
            "collinearity_width": self.collinearity_width,
            "beta": self.beta,
            "weight_beta": self.weight_beta,
            "linear": self.linear,
            "pruning": self.pruning,
            "species_pruning": list(self.species_pruning) or False,
            "largest_cutoff": self.largest_cutoff,
        }

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> PaperECSE:
        return cls(**description, auxiliary=auxiliary)

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        DeclarationError
            For the group O(3).
        InvalidInputError
            Without a neighbor list and without a cutoff to build one.
        NoFrameError
            Without an auxiliary model, for a structure (or environment) in which no two neighbors of an atom within
            the inner cutoff have directions that differ enough.
        """
        if group not in self.groups:
            raise DeclarationError(
                f"PaperECSE: group: expected 'SO(3)' (the published frames are proper), got {group!r}"
            )
        found = owners(batch, scope)
        vectors, source, center, radius = self._neighbors(batch, scope)
        rotations, weights, center, first, second = weighted_frames(
            vectors,
            center,
            batch[keys.POS].shape[0],
            cutoff=min(radius, self.largest_cutoff),
            cutoff_width=self.cutoff_width,
            threshold=self.collinearity_threshold,
            sine_width=self.collinearity_width,
            beta=self.beta,
            linear=self.linear,
            least=NEGLIGIBLE_WEIGHT,
        )
        row = center if scope == "atom" else batch[keys.BATCH].index_select(0, center)
        w_aux, onset = auxiliary_weight(weights, row, found.n_owners, self.weight_beta)
        kept = torch.arange(weights.shape[0], device=weights.device)
        if self.species_pruning:
            kinds = self._kinds(batch, center, source.index_select(0, first), source.index_select(0, second))
            weights = prune_species(weights, kinds, row, onset, self.weight_beta)
            weights, row, kept = _drop(weights, row, kept)
        for _ in range(self.pruning):
            weights = prune(weights, row, onset, self.weight_beta)
            weights, row, kept = _drop(weights, row, kept)
        rotations = rotations.index_select(0, kept)
        stratum = torch.full_like(row, int(Stratum.FRAME))
        if self.auxiliary is None:
            self._refuse_without_frames(batch, scope, row, found.index, found.n_owners)
        else:
            needy = found.index[w_aux.detach().index_select(0, found.index) > NEGLIGIBLE_WEIGHT]
            identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device).expand(needy.shape[0], 3, 3)
            rotations = torch.cat([rotations, identity])
            weights = torch.cat([weights, w_aux.index_select(0, needy)])
            row = torch.cat([row, needy])
            stratum = torch.cat([stratum, torch.full_like(needy, int(Stratum.AUXILIARY))])
        place = torch.zeros([found.n_owners], dtype=torch.int64, device=row.device)
        place[found.index] = torch.arange(found.index.shape[0], device=row.device)
        return FrameSet(
            rotations=rotations,
            weights=weights,
            owner=row,
            stratum=stratum,
            origins=found.origins.index_select(0, place.index_select(0, row)),
            n_owners=found.n_owners,
            scope=scope,
        )

    def _neighbors(self, batch: Data, scope: Scope) -> tuple[Tensor, Tensor, Tensor, float]:
        """Vectors to the neighbors, their numbers, those of the centers (ascending), and how far they reach."""
        radius = batch.get(keys.EDGE_CUTOFF)
        listed = batch.get(keys.EDGE_VEC) is not None and radius is not None
        if self.cutoff is None and not listed:
            raise InvalidInputError(
                "PaperECSE: frames are built from neighbors, and the backbone reads no neighbor list: expected a "
                "cutoff, as ECSE.paper(cutoff=5.0), got None"
            )
        if self.cutoff is not None and not (listed and float(radius) >= self.cutoff):
            nothing = dict.fromkeys((keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC, keys.EDGE_CUTOFF))
            batch = with_neighbors(replace(batch, **nothing), self.cutoff)
            radius = self.cutoff
        reach = float(radius) if self.cutoff is None else self.cutoff
        (source, center), vectors = batch[keys.EDGE_INDEX], batch[keys.EDGE_VEC].to(torch.float64)
        mask = batch.get(keys.CENTER_MASK)
        wanted = torch.ones_like(center, dtype=torch.bool)
        if scope == "atom" and mask is not None:
            wanted = mask.index_select(0, center)
        if reach < float(radius):
            wanted = wanted & (torch.linalg.vector_norm(vectors.detach(), dim=1) <= reach)
        if not bool(wanted.all()):
            source, center, vectors = source[wanted], center[wanted], vectors[wanted]
        return vectors, source, center, reach

    def _kinds(self, batch: Data, center: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Number of the triple of species of every frame, (center * n + first) * n + second, float64."""
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("PaperECSE: species_pruning: expected a field 'z' with atomic numbers, got none")
        table = torch.full((max(self.species_pruning) + 1,), -1, dtype=torch.int64, device=z.device)
        table[list(self.species_pruning)] = torch.arange(len(self.species_pruning), device=z.device)
        last = table.shape[0] - 1
        rows = torch.where((z < 0) | (z > last), -1, table[z.clamp(0, last)])
        refuse_unknown_species(batch, rows, self.species_pruning)
        n = len(self.species_pruning)
        return ((rows[center] * n + rows[first]) * n + rows[second]).to(torch.float64)

    def _refuse_without_frames(self, batch: Data, scope: Scope, row: Tensor, index: Tensor, n_owners: int) -> None:
        counts = torch.bincount(row, minlength=n_owners)
        bare = (counts.index_select(0, index) == 0).nonzero()
        if len(bare):
            around = "an atom with two neighbors" if scope == "structure" else "two neighbors"
            owner = int(index[bare[0, 0]])
            name = f"structure {owner}" if scope == "structure" else where(batch, owner, scope)
            raise NoFrameError(
                f"ECSE.paper: expected {around} in directions that differ within the inner cutoff, {name} has none; "
                "the published protocol covers that with an auxiliary model only, as ECSE.paper(auxiliary=...); ECSE() "
                "with its own weights does without"
            )

    def extra_repr(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.describe().items())
        return given


def _drop(weights: Tensor, row: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without negligible weights."""
    stay = (weights.detach() > NEGLIGIBLE_WEIGHT).nonzero()[:, 0]
    return weights.index_select(0, stay), row.index_select(0, stay), kept.index_select(0, stay)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise DeclarationError(f"PaperECSE: {name}: expected a positive number, got {value!r}")
    return float(value)
