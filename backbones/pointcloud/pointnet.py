"""`PointNet`: the same dense layers on every point, a maximum over the cloud, a classifier."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError
from symmetrize.ops.sampling import structure_sizes, unit_sphere
from symmetrize.representations import OutputSpec
from symmetrize.weights import fill

from .clouds import check_positive, clouds_of, dense, grouped_max
from .weights import SHIPPED, flat, read_tensors

#: Classes of ModelNet40, in the order of its files.
MODELNET40 = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone",
    "cup", "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp",
    "laptop", "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink",
    "sofa", "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip

_WIDTHS = (3, 64, 64, 64, 128, 1024)


class PointNet(Backbone):
    """PointNet without transformation networks (Qi et al., CVPR 2017, arXiv:1612.00593), in the sizes of learning3d.

    ``logits`` (n_clouds, n_classes) do not change sign or size under any rotation by declaration; the network itself
    knows the pose in which it was trained and no other (shipped weights: y up). Clouds are centered and scaled to the
    unit sphere, in a way that commutes with rotations. Maxima over points have kinks: continuous, not smooth. Batch
    normalization makes the answer depend on the other clouds of the batch in training mode; evaluation mode does not.

    Parameters
    ----------
    n_classes : int
    labels : sequence of str, optional
        Names of the classes.
    dropout : float
        In the classifier, in training mode only.
    seed : int
        Seed of the initial weights.
    """

    adapter = "pointnet"

    def __init__(
        self, n_classes: int = 40, labels: tuple[str, ...] | None = None, dropout: float = 0.3, seed: int = 0
    ) -> None:
        check_positive("n_classes", n_classes)
        if labels is not None and len(labels) != n_classes:
            raise DeclarationError(f"labels: expected {n_classes} names, got {len(labels)}")
        super().__init__(
            outputs={"logits": OutputSpec(f"{n_classes}x0e", per="structure")}, cutoff=None, receptive_field=None
        )
        self.n_classes = n_classes
        self.labels = None if labels is None else tuple(labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.points = torch.nn.Sequential(*(dense(a, b, torch.nn.ReLU) for a, b in pairwise(_WIDTHS)))
            self.hidden = torch.nn.Sequential(dense(_WIDTHS[-1], 512, torch.nn.ReLU), dense(512, 256, torch.nn.ReLU))
            self.dropout = torch.nn.Dropout(dropout)
            self.last = torch.nn.Linear(256, n_classes)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``logits`` in the orientation given."""
        features = self.descriptor(batch)
        for layer in self.hidden:
            features = self.dropout(layer(features))
        return {"logits": self.last(features).reshape((-1,) + self.outputs["logits"].shape)}

    def descriptor(self, batch: Data) -> Tensor:
        """The maxima over the cloud, before the classifier: Tensor of shape (n_clouds, 1024)."""
        clouds = clouds_of(batch)
        sizes = structure_sizes(clouds.ptr)
        return grouped_max(self.points(unit_sphere(clouds.pos, clouds.structure, sizes.shape[0])), sizes)

    def describe(self) -> dict[str, Any]:
        """Arguments of `rebuild_pointnet`."""
        labels = None if self.labels is None else list(self.labels)
        return {"n_classes": self.n_classes, "labels": labels, "dropout": self.dropout.p}


def rebuild_pointnet(description: dict[str, Any]) -> PointNet:
    """An untrained `PointNet` from what `PointNet.describe` returned."""
    labels = description.get("labels")
    return PointNet(**{**description, "labels": None if labels is None else tuple(labels)})


def load_pointnet(
    weights: str | os.PathLike[str] | None = None, *, dtype: torch.dtype = torch.float32, trust_pickle: bool = False
) -> PointNet:
    """A trained classifier, in evaluation mode.

    Parameters
    ----------
    weights : str or path, optional
        A state dict with the names of learning3d, as safetensors or as a checkpoint of tensors alone. By default the
        one that comes with the package: ModelNet40, trained by learning3d on upright shapes (MIT license, see
        ``weights/README.md``).
    dtype : torch.dtype
    trust_pickle : bool
        See `read_tensors`.

    Raises
    ------
    InvalidInputError
        For files that are damaged, incomplete, or would run code.
    """
    path = SHIPPED / "pointnet-modelnet40.safetensors" if weights is None else weights
    tensors = {_renamed(name): flat(value) for name, value in read_tensors(path, trust_pickle).items()}
    last = tensors.get("last.weight")
    n_classes = 40 if last is None else int(last.shape[0])
    model = PointNet(n_classes, labels=MODELNET40 if n_classes == 40 else None)
    fill(model, tensors, path)
    return model.to(dtype).eval()


def _renamed(name: str) -> str:
    """Names of learning3d to those here."""
    name = name.removeprefix("module.").replace("linear3.", "last.")
    name = re.sub(r"^feature_model\.conv(\d)\.", lambda m: f"points.{int(m[1]) - 1}.0.", name)
    name = re.sub(r"^feature_model\.bn(\d)\.", lambda m: f"points.{int(m[1]) - 1}.1.", name)
    name = re.sub(r"^linear(\d)\.", lambda m: f"hidden.{int(m[1]) - 1}.0.", name)
    return re.sub(r"^bn(\d)\.", lambda m: f"hidden.{int(m[1]) - 1}.1.", name)
