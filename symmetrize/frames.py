"""Group elements with weights: the value ``FrameSet`` and the base class of everything that produces one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.errors import DeclarationError, NoFrameError, did_you_mean
from symmetrize.ops.ragged import segment_sum

if TYPE_CHECKING:
    from symmetrize.backbone import Backbone

Scope = Literal["atom", "structure"]
SCOPES: tuple[Scope, ...] = ("atom", "structure")

#: A frame of smaller weight than this does not count as an evaluation. Methods switch weights off smoothly there: a cut
#: by the evaluator would be visible in derivatives.
NEGLIGIBLE_WEIGHT = 1e-10


class Stratum(IntEnum):
    """The kind of stabiliser that a frame was built for."""

    #: A full coordinate system: two directions that are not collinear.
    FRAME = 0
    #: One member of the n-fold average about an axis.
    AXIS = 1
    #: No direction at all: the center without its neighbors, invariant part of the outputs.
    POINT = 2
    #: Evaluated by the auxiliary backbone of the method, unrotated.
    AUXILIARY = 3


def check_scope(scope: str) -> Scope:
    """The name of a scope, or a `DeclarationError`."""
    if scope not in SCOPES:
        raise DeclarationError(f"scope: unknown scope {scope!r}, {did_you_mean(str(scope), SCOPES)}")
    return "atom" if scope == "atom" else "structure"


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Weighted group elements of every owner: what a symmetrisation method is, as a value.

    Attributes
    ----------
    rotations : Tensor of shape (n_frames, 3, 3), float64
        Orthogonal; the columns are the axes of the coordinate system.
    weights : Tensor of shape (n_frames,), float64
        Not normalized, >= 0.
    owner : Tensor of shape (n_frames,), int64
        The structure (scope ``"structure"``) or atom (scope ``"atom"``) that each frame belongs to.
    stratum : Tensor of shape (n_frames,), int64
        See `Stratum`.
    origins : Tensor of shape (n_frames, 3)
        Origin of the coordinate system.
    n_owners : int
        Number of structures or atoms of the batch.
    scope : {"atom", "structure"}
    """

    rotations: Tensor
    weights: Tensor
    owner: Tensor
    stratum: Tensor
    origins: Tensor
    n_owners: int
    scope: Scope

    def __post_init__(self) -> None:
        n = self.weights.shape[0]
        shapes = {"rotations": (n, 3, 3), "weights": (n,), "owner": (n,), "stratum": (n,), "origins": (n, 3)}
        for name, expected in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != expected:
                raise DeclarationError(f"FrameSet: {name}: expected shape {expected}, got {got}")
        check_scope(self.scope)
        if n == 0:
            raise NoFrameError("FrameSet: expected at least one frame, got none")
        with torch.no_grad():
            # All numbers that decide, read at once: the host waits for the device only here.
            rows = self.rotations.reshape(n, 9)
            ones = torch.ones(3, dtype=rows.dtype, device=rows.device)
            extremes = [
                *torch.aminmax(torch.mv((rows * rows).view(-1, 3), ones)),
                *torch.aminmax(torch.mv((rows[:, :6] * rows[:, 3:]).view(-1, 3), ones)),
                *torch.aminmax(torch.mv(rows[:, :3] * rows[:, 6:], ones)),
                *torch.aminmax(self.weights),
                *torch.aminmax(self.owner),
            ]
            least, most, *products = torch.stack([x.to(torch.float64) for x in extremes]).tolist()
            *products, low_weight, high_weight, low_owner, high_owner = products
            errors = [abs(least - 1.0), abs(most - 1.0), *map(abs, products)]
            # One by one: a maximum would pass over a NaN.
            if not all(error <= 1e-10 for error in errors):
                raise DeclarationError(f"FrameSet: rotations: expected orthogonal matrices, off by {max(errors):.1e}")
            if not (low_weight >= 0.0 and high_weight < float("inf")):
                raise DeclarationError("FrameSet: weights: expected finite numbers >= 0")
            if low_owner < 0 or high_owner >= self.n_owners:
                raise DeclarationError(f"FrameSet: owner: expected numbers from 0 to {self.n_owners - 1}")

    def __repr__(self) -> str:
        counts = torch.bincount(self.stratum, minlength=len(Stratum)).tolist()
        strata = ", ".join(f"{counts[s]} {s.name.lower()}" for s in Stratum if counts[s])
        return f"FrameSet({self.n_frames} frames ({strata}) of {self.n_owners} {self.scope}s)"

    @property
    def n_frames(self) -> int:
        """Number of frames, axis copies and mirrors included."""
        return self.weights.shape[0]

    @property
    def total_weight(self) -> Tensor:
        """Sum of the weights of every owner: Tensor of shape (n_owners,)."""
        return segment_sum(self.weights, self.owner, self.n_owners)

    @property
    def normalized_weights(self) -> Tensor:
        """Weights that sum to one over every owner: Tensor of shape (n_frames,)."""
        return self.weights / self.total_weight[self.owner]

    @property
    def evaluations(self) -> Tensor:
        """Backbone evaluations of every owner: Tensor of shape (n_owners,), int64."""
        counted = (self.weights.detach() > NEGLIGIBLE_WEIGHT).to(torch.int64)
        return segment_sum(counted, self.owner, self.n_owners)

    @property
    def n_evaluations(self) -> int:
        """Backbone evaluations in total, axis copies and mirrors included: the unit of cost everywhere."""
        return int(self.evaluations.sum())

    @property
    def effective_number(self) -> Tensor:
        """(sum w)^2 / sum w^2 of every owner, 0 where it has no frame: Tensor of shape (n_owners,)."""
        squares = segment_sum(self.weights**2, self.owner, self.n_owners)
        return self.total_weight**2 / torch.where(squares > 0, squares, torch.ones_like(squares))


class FrameMethod(torch.nn.Module, ABC):
    """A symmetrisation method: one function from a batch to a `FrameSet`.

    Parameters
    ----------
    auxiliary : Backbone, optional
        The model that evaluates frames of `Stratum.AUXILIARY`, if the method uses one.
    """

    #: What it can do; a Symmetrizer that asks for something else is refused when it is made.
    groups: tuple[str, ...] = ("O(3)", "SO(3)")
    scopes: tuple[Scope, ...] = SCOPES
    #: Whether frames are drawn at random: with a ``generator`` every call draws anew, without one what is drawn in a
    #: structure is a function of the structure.
    stochastic: bool = False
    #: Checks of `symmetrize.testing` that the method does not pass for every backbone and structure, with the reason.
    limits: Mapping[str, str] = MappingProxyType({})

    def __init__(self, auxiliary: Backbone | None = None) -> None:
        super().__init__()
        self.auxiliary = auxiliary

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable arguments that make this method again: all but its parameters and an auxiliary model."""
        return {}

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> FrameMethod:
        """The method that was described, with the auxiliary model that it had."""
        return cls(**description)

    @abstractmethod
    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """Frames of every owner of a validated batch.

        Parameters
        ----------
        batch : Data
            Validated; in atom scope with a neighbor list that reaches everything an atom's output depends on
            (``edge_vec``, ``edge_cutoff``, sorted by center). Atoms outside ``center_mask`` need no frames.
        group : {"O(3)", "SO(3)"}
        scope : {"atom", "structure"}
        l_max : int
            Highest degree among the outputs to be symmetrised.
        generator : torch.Generator, optional
            Source of randomness of stochastic methods.
        """
