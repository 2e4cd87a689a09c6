"""`PointTransformer`: vector attention among nearest neighbors, on fewer and fewer points."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import PointTransformerConv

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.errors import DeclarationError
from symmetrize.ops.sampling import structure_sizes, unit_sphere
from symmetrize.representations import OutputSpec
from symmetrize.weights import fill

from .clouds import (
    Level,
    build_levels,
    check_positive,
    clouds_of,
    dense,
    edge_counts,
    features_of,
    grouped_max,
    grouped_mean,
    select_levels,
)
from .weights import read_tensors


class _Attention(torch.nn.Module):
    """Residual block of Zhao et al.: linear, vector attention (torch-geometric's), linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = dense(width, width, torch.nn.ReLU)
        self.attention = PointTransformerConv(
            width,
            width,
            pos_nn=torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, width)),
            attn_nn=torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width)),
            # Every point is its own nearest neighbor already.
            add_self_loops=False,
        )
        self.normalization = torch.nn.BatchNorm1d(width)
        self.after = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width))

    def forward(self, features: Tensor, pos: Tensor, graph: Tensor) -> Tensor:
        hidden = torch.relu(self.normalization(self.attention(self.before(features), pos, graph)))
        return torch.relu(features + self.after(hidden))


class PointTransformer(Backbone):
    """Point Transformer for classification (Zhao et al., ICCV 2021, arXiv:2012.09164).

    ``logits`` (n_clouds, n_classes). Each stage but the first samples a quarter of the points (farthest points first),
    takes maxima over their k nearest neighbors, and lets them attend to their k nearest neighbors with
    torch-geometric's ``PointTransformerConv``; a mean over the last points feeds the classifier. Samples and neighbors
    depend on distances alone, and are found once for all frames.

    Clouds are scaled to the unit sphere. Sampling and neighbors jump as points move, and maxima have kinks: this
    network is not smooth. Batch normalization: clouds of a batch are independent in evaluation mode only.

    Parameters
    ----------
    n_classes : int
    n_features : int
        Invariant features ``x`` of every point.
    widths : sequence of int
        Of the stages; the paper's are 32, 64, 128, 256, 512.
    k : int
        Number of neighbors, the point itself included; ties are kept.
    ratio : float
        Points of a stage over those of the one before.
    labels : sequence of str, optional
        Names of the classes.
    seed : int
    """

    adapter = "point-transformer"
    shares_work = True

    def __init__(
        self,
        n_classes: int = 40,
        n_features: int = 0,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
        k: int = 16,
        ratio: float = 0.25,
        labels: tuple[str, ...] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            outputs={"logits": OutputSpec(f"{check_positive('n_classes', n_classes)}x0e", per="structure")},
            cutoff=None,
            receptive_field=None,
        )
        self.widths = tuple(check_positive("widths", width) for width in widths)
        if not self.widths:
            raise DeclarationError("widths: expected at least one stage, got none")
        if isinstance(n_features, bool) or not isinstance(n_features, int) or n_features < 0:
            raise DeclarationError(f"n_features: expected an integer of at least 0, got {n_features!r}")
        if not 0.0 < ratio <= 1.0:
            raise DeclarationError(f"ratio: expected a number in (0, 1], got {ratio!r}")
        if labels is not None and len(labels) != n_classes:
            raise DeclarationError(f"labels: expected {n_classes} names, got {len(labels)}")
        self.n_classes, self.n_features = n_classes, n_features
        self.k, self.ratio = check_positive("k", k), float(ratio)
        self.labels = None if labels is None else tuple(labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = dense(3 + n_features, self.widths[0], torch.nn.ReLU)
            self.down = torch.nn.ModuleList(dense(a, b, torch.nn.ReLU) for a, b in pairwise(self.widths))
            self.blocks = torch.nn.ModuleList(_Attention(width) for width in self.widths)
            last = self.widths[-1]
            self.head = torch.nn.Sequential(
                torch.nn.Linear(last, last), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(last, n_classes)
            )

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``logits`` in the orientation given."""
        return self.forward_frames(self.prepare(batch), batch[keys.POS])

    def prepare(self, batch: Data) -> dict[str, Tensor]:
        """Samples and neighbors of every stage, and features."""
        cache = build_levels(clouds_of(batch), self.k, len(self.widths), self.ratio)
        if self.n_features:
            cache["features"] = features_of(batch, self.n_features)
        return cache

    def forward_frames(
        self, cache: dict[str, Tensor], edge_vec: Tensor, copies: Copies | None = None
    ) -> dict[str, Tensor]:
        """``logits`` of copies, from the rotated positions of their points (there are no edges)."""
        levels = select_levels(cache, copies, len(self.widths))
        sizes = structure_sizes(levels[0].ptr)
        cloud = torch.repeat_interleave(torch.arange(sizes.shape[0], device=sizes.device), sizes)
        pos = unit_sphere(edge_vec, cloud, sizes.shape[0])
        features = pos
        if self.n_features:
            given = cache["features"] if copies is None else cache["features"][copies.atom]
            features = torch.cat([pos, given], dim=1)
        features = self.first(features)
        features = self.blocks[0](features, pos, levels[0].graph)
        for level, down, block in zip(levels[1:], self.down, self.blocks[1:], strict=True):
            pos, features = pos[level.sample], _pooled(down(features), level)
            features = block(features, pos, level.graph)
        logits = self.head(grouped_mean(features, structure_sizes(levels[-1].ptr)))
        return {"logits": logits.reshape((-1,) + self.outputs["logits"].shape)}

    def describe(self) -> dict[str, Any]:
        """Arguments of `rebuild_point_transformer`."""
        return {
            "n_classes": self.n_classes,
            "n_features": self.n_features,
            "widths": list(self.widths),
            "k": self.k,
            "ratio": self.ratio,
            "labels": None if self.labels is None else list(self.labels),
        }


def _pooled(features: Tensor, level: Level) -> Tensor:
    return grouped_max(features[level.down[0]], edge_counts(level.down, level.sample.shape[0]))


def rebuild_point_transformer(description: dict[str, Any]) -> PointTransformer:
    """An untrained `PointTransformer` from what `PointTransformer.describe` returned."""
    labels = description.get("labels")
    return PointTransformer(
        **{
            **description,
            "widths": tuple(description["widths"]),
            "labels": None if labels is None else tuple(labels),
        }
    )


def load_point_transformer(
    weights: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    trust_pickle: bool = False,
    **options: Any,
) -> PointTransformer:
    """A `PointTransformer` with the given options, in evaluation mode; untrained unless ``weights`` are given.

    Parameters
    ----------
    weights : str or path, optional
        Its state dict, as safetensors or as a checkpoint of tensors alone.
    dtype : torch.dtype
    trust_pickle : bool
        See `read_tensors`.
    **options
        Those of `PointTransformer`.

    Raises
    ------
    InvalidInputError
        For files that are damaged, incomplete, or would run code.
    """
    model = PointTransformer(**options)
    if weights is not None:
        fill(model, read_tensors(weights, trust_pickle), weights)
    return model.to(dtype).eval()
