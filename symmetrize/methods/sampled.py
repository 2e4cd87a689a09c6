"""Some frames of another method, drawn with their weights as probabilities: an unbiased estimate of its average."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidTypeError
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods import METHODS, find_method
from symmetrize.methods.draws import seed_of, uniform_numbers
from symmetrize.ops.ragged import offsets, segment_sum


class SampledFrames(FrameMethod):
    r"""Monte Carlo estimate of a frame average: n frames of every owner, drawn with their weights as probabilities.

    With the normalized weights p_k of the frames of an owner (an atom or a structure), frames k_1 ... k_n are drawn
    independently, and the average is estimated, at the cost of n evaluations, by

    .. math:: \hat y = \frac{1}{n} \sum_i \left[ y_{k_i}
              + \left(\frac{p_{k_i}}{\bar p_{k_i}} - 1\right) (y_{k_i} - b_i) \right],

    where a bar stands for a constant: the second term vanishes, and its derivatives are those of the probabilities.
    For any b_i that does not depend on k_i, the expectation of the estimate and of all its derivatives (forces, and
    their gradient) are those of the average itself: exactly equivariant in expectation, though no single draw is. The
    control variate b_i keeps the second term as small as the differences between frames: the mean over the other
    draws where there are any; for n = 1 one further draw, the companion, which enters with weight 0. The evaluator
    leaves out what has weight 0 (b = 0): unbiased as well, but the forces of a single sample vary much more than
    those of training (`symmetrize.training.symmetrized`), which evaluates the energies of companions.

    A function of the estimate that is not linear, such as a squared error, has another expectation than that of the
    average: the squared error exceeds it by the variance over frames. Training on it penalises what depends on the
    orientation.

    Stochastic frame averaging (Duval et al., FAENet, ICML 2023, arXiv 2305.05577) for weights that depend on the
    structure; the derivative is that of DiCE (Foerster et al., ICML 2018, arXiv 1802.05098), the control variate for
    n > 1 that of Kool, van Hoof and Welling (2019).

    Parameters
    ----------
    method : FrameMethod
        Whose frames are drawn, such as `symmetrize.ECSE`.
    n_samples : int
        Frames of every owner; one that is drawn twice is evaluated once.

    Raises
    ------
    DeclarationError
        For fewer than one sample.

    Notes
    -----
    Without a ``generator`` nothing is drawn: all frames of the method are returned, and the average is exact. With one,
    each call takes one number from it (and what the method takes); what is drawn in a structure depends on that number
    and on the structure itself, not on the batch that it comes in.
    """

    def __init__(self, method: FrameMethod, n_samples: int = 1) -> None:
        if not isinstance(method, FrameMethod):
            raise InvalidTypeError(f"SampledFrames: method: expected a FrameMethod, got {type(method).__name__}")
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise DeclarationError(f"SampledFrames: n_samples: expected an integer of at least 1, got {n_samples!r}")
        super().__init__(auxiliary=method.auxiliary)
        self.method = method
        self.n_samples = n_samples
        # It can do what the method can, and without a generator it is the method.
        self.groups, self.scopes, self.limits = method.groups, method.scopes, dict(method.limits)

    def describe(self) -> dict[str, Any]:
        name = type(self.method).__name__
        if name not in METHODS:
            raise DeclarationError(f"SampledFrames: a {name} is not a method of this package and has no description")
        return {"method": name, "description": self.method.describe(), "n_samples": self.n_samples}

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> SampledFrames:
        inner = find_method(description["method"]).rebuild(description["description"], auxiliary)
        return cls(inner, description["n_samples"])

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`; without a generator, all frames of the method."""
        found = self.method.frames(batch, group=group, scope=scope, l_max=l_max, generator=generator)
        if generator is None:
            return found
        seed = seed_of(generator, 0)
        owners = (found.owner.bincount(minlength=found.n_owners) > 0).nonzero()[:, 0]
        uniform = uniform_numbers(batch, scope, seed, self.n_samples + 1)[:, owners]
        drawn = draw(found, uniform[: self.n_samples])
        return estimate(found, drawn, companions(found, drawn[0], uniform[-1]) if self.n_samples == 1 else None)

    def extra_repr(self) -> str:
        return f"n_samples={self.n_samples}"


def estimate(frames: FrameSet, drawn: Tensor, companion: Tensor | None = None) -> FrameSet:
    """The frames that were drawn, with weights of value 1 / n and derivatives that make their sum unbiased.

    The weights of every owner add up to 1, their derivatives to 0: normalizing changes nothing.

    Parameters
    ----------
    frames : FrameSet
        All of them.
    drawn : Tensor of shape (n_samples, n_owners_with_frames)
        Numbers of frames, the owners in ascending order.
    companion : Tensor of shape (n_owners_with_frames,), optional
        That of `companions`, for ``n_samples`` 1.

    Returns
    -------
    FrameSet
        Companions, of weight 0, included.
    """
    ratio = frames.normalized_weights[drawn]
    score = ratio / ratio.detach() - 1.0  # value 0
    n_samples = drawn.shape[0]
    if companion is not None:
        # Not merged where both are the same frame: whoever leaves out weight 0 has to leave it out everywhere.
        chosen, weights = torch.cat([drawn[0], companion]), torch.cat([1.0 + score[0], -score[0]])
    else:
        others = (score.sum(dim=0) - score) / (n_samples - 1)
        chosen, row = torch.unique(drawn.reshape(-1), return_inverse=True)
        weights = segment_sum(((1.0 + score - others) / n_samples).reshape(-1), row, chosen.shape[0])
    return FrameSet(
        rotations=frames.rotations[chosen],
        weights=weights,
        owner=frames.owner[chosen],
        stratum=frames.stratum[chosen],
        origins=frames.origins[chosen],
        n_owners=frames.n_owners,
        scope=frames.scope,
    )


def companions(frames: FrameSet, drawn: Tensor, uniform: Tensor) -> Tensor:
    """One more draw for every owner, independent of what the derivatives of the first draw's probability depend on.

    Where frames come with their mirror images at equal weight, the probability of a frame does not depend on which of
    the two it is: the companion has the handedness of the first draw, and is most often the same frame.

    Parameters
    ----------
    frames : FrameSet
    drawn, uniform : Tensor of shape (n_owners_with_frames,)
        The first draw, and numbers in [0, 1).

    Returns
    -------
    Tensor of shape (n_owners_with_frames,), int64
    """
    with torch.no_grad():
        proper = torch.linalg.det(frames.rotations) > 0.0
        share = segment_sum(frames.normalized_weights * proper, frames.owner, frames.n_owners)
        mirrored = (share - 0.5).abs() < 1e-12
        wanted = torch.zeros_like(mirrored)
        wanted[frames.owner[drawn]] = proper[drawn]
        allowed = ~mirrored[frames.owner] | (proper == wanted[frames.owner])
        restricted = dataclasses.replace(frames, weights=frames.weights * allowed)
        return draw(restricted, uniform[None])[0]


def draw(frames: FrameSet, uniform: Tensor) -> Tensor:
    """Frames of every owner, with their normalized weights as probabilities.

    Parameters
    ----------
    frames : FrameSet
    uniform : Tensor of shape (n_draws, n_owners_with_frames), float64
        Numbers in [0, 1), the owners in ascending order.

    Returns
    -------
    Tensor of shape (n_draws, n_owners_with_frames), int64
    """
    weights = frames.weights.detach()
    order = torch.argsort(frames.owner, stable=True)
    order = order[weights[order] > 0.0]
    counts = frames.owner[order].bincount(minlength=frames.n_owners)
    counts = counts[counts > 0]
    first = offsets(counts)
    reached = torch.cumsum(frames.normalized_weights.detach()[order], dim=0)
    before = torch.cat([torch.zeros_like(reached[:1]), reached])[first]
    at = torch.searchsorted(reached, before[:-1] + uniform * (before[1:] - before[:-1]), right=True)
    # Where rounding leads beyond the last frame of an owner.
    return order[torch.minimum(torch.maximum(at, first[:-1]), first[1:] - 1)]
