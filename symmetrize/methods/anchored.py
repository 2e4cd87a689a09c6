"""Frames of large clouds from a few of their points."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import assemble, validate
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods import METHODS, find_method
from symmetrize.ops.sampling import anchor_points, centered, structure_sizes


class Anchored(FrameMethod):
    """A frame method applied to a few points of every cloud, the anchors, chosen by farthest-point sampling.

    Frames from pairs of points are meant for molecules: in a dense cloud thousands of points are at nearly the same
    distance from the centroid, and all pairs of them would share the weight. Anchors turn with the cloud, so that
    averages over the frames of the anchors are exactly as equivariant as before, at a cost that does not grow with the
    number of points. The average is over what the network says about the whole cloud; only the frames come from the
    anchors.

    The anchors lie on a line only if the cloud does, and have all its symmetries, so that degenerate clouds are covered
    as the method covers them.
    Where farthest-point sampling exchanges one anchor for another, the result may jump, as it does in networks that
    sample or search neighbors themselves.

    Parameters
    ----------
    method : FrameMethod
        Such as `symmetrize.ECSE`. Its lengths are in units of the cloud's radius, the distance from the centroid to
        the farthest point.
    n_anchors : int
        At least 3; clouds of fewer points use all of them, and where points are equally far there may be more.

    Raises
    ------
    DeclarationError
        For fewer than 3 anchors.
    """

    scopes = ("structure",)
    limits = MappingProxyType(
        {
            "closed_loops": "outputs jump where one anchor is exchanged for another",
            **dict.fromkeys(
                (
                    "inversion_equivariance",
                    "permutation_equivariance",
                    "rotation_equivariance",
                    "symmetric_sites",
                    "translation_invariance",
                ),
                "where two points are equally far from all anchors but for rounding, rounding chooses the anchor",
            ),
        }
    )

    def __init__(self, method: FrameMethod, n_anchors: int = 16) -> None:
        if not isinstance(method, FrameMethod):
            raise InvalidTypeError(f"Anchored: method: expected a FrameMethod, got {type(method).__name__}")
        if isinstance(n_anchors, bool) or not isinstance(n_anchors, int) or n_anchors < 3:
            raise DeclarationError(f"Anchored: n_anchors: expected an integer of at least 3, got {n_anchors!r}")
        super().__init__(auxiliary=method.auxiliary)
        if "structure" not in method.scopes:
            raise DeclarationError(f"Anchored: expected a method of scope 'structure', got {type(method).__name__}")
        self.method = method
        self.groups = method.groups
        self.n_anchors = n_anchors

    def describe(self) -> dict[str, Any]:
        name = type(self.method).__name__
        if name not in METHODS:
            raise DeclarationError(f"Anchored: a {name} is not a method of this package and has no description")
        return {"method": name, "description": self.method.describe(), "n_anchors": self.n_anchors}

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> Anchored:
        inner = find_method(description["method"]).rebuild(description["description"], auxiliary)
        return cls(inner, description["n_anchors"])

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        InvalidInputError
            For periodic structures.
        """
        if bool(batch[keys.PBC].any()):
            raise InvalidInputError("Anchored: expected finite clouds, got a periodic structure")
        pos, structure, ptr = batch[keys.POS], batch[keys.BATCH], batch[keys.PTR]
        sizes = structure_sizes(ptr)
        n_clouds = int(sizes.shape[0])
        anchors, counts = anchor_points(pos, ptr, self.n_anchors)
        relative, radius, centroid = centered(pos, structure, n_clouds)
        few = validate(assemble(pos=(relative / radius[structure][:, None])[anchors], counts=counts))
        found = self.method.frames(few, group=group, scope=scope, l_max=l_max, generator=generator)
        return FrameSet(
            rotations=found.rotations,
            weights=found.weights,
            owner=found.owner,
            stratum=found.stratum,
            origins=centroid[found.owner],
            n_owners=found.n_owners,
            scope=scope,
        )

    def extra_repr(self) -> str:
        return f"n_anchors={self.n_anchors}"
