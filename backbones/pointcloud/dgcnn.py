"""`DGCNN`: edge convolutions on graphs of nearest neighbors, in space first and between features then."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.errors import DeclarationError, InvalidInputError, did_you_mean
from symmetrize.ops.ragged import offsets
from symmetrize.ops.sampling import centered, nearest_neighbors, structure_sizes
from symmetrize.representations import OutputSpec
from symmetrize.weights import fill

from .clouds import Clouds, build_levels, check_positive, clouds_of, dense, edge_counts, features_of, grouped_max
from .clouds import select_levels as select
from .weights import flat, read_tensors

#: Classes of S3DIS, in the order of its labels.
S3DIS = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board",
    "clutter",
)  # fmt: skip

#: Field of the position inside the room, (n_points, 3).
ROOM = "room_position"

_LEAKY = partial(torch.nn.LeakyReLU, negative_slope=0.2)
_GRAY = 0.5


class DGCNN(Backbone):
    """Dynamic graph CNN for segmentation (Wang et al., 2019, arXiv:1801.07829), in the sizes of antao97/dgcnn.pytorch.

    ``logits`` (n_points, n_classes). The nine input channels, and what each of them is under rotations:

    * 0 to 2, the position in meters, x and y from the center of the block, z (up) from the floor: *rotates*. Here the
      position relative to the centroid, with the floor one radius below it, where it is in every orientation.
    * 3 to 5, the color: *invariant*, the features ``x`` in [0, 1] (gray where there are none).
    * 6 to 8, the position inside the room, in [0, 1]: *rotates*. The reference divides by the extents of the room along
      the axes of its building, an anisotropic map that no rotation of the cloud alone knows about. Two readings are
      rotation-compatible. ``room="cloud"``: the cloud is the room, a cube of side 2 radii around it, the map isotropic
      and computed here. ``room="field"``: a per-point vector ``room_position`` ("1o") of the user's, from the corner of
      the room in its units, which rotates along with the positions and is part of what is symmetrised; clouds on a line
      are then refused.

    Neighbors in the first layer are those in channels 6 to 8, from distances alone, and shared by all frames; those of
    the other layers are neighbors between features, searched in every frame. Searching neighbors jumps, and maxima have
    kinks: this network is not smooth. Evaluation mode only keeps clouds of a batch apart (batch normalization).

    Parameters
    ----------
    n_classes : int
    k : int
        Number of neighbors, the point itself included; ties are kept.
    room : {"cloud", "field"}
    labels : sequence of str, optional
        Names of the classes.
    seed : int
    """

    adapter = "dgcnn"

    def __init__(
        self,
        n_classes: int = 13,
        k: int = 20,
        room: Literal["cloud", "field"] = "cloud",
        labels: tuple[str, ...] | None = None,
        seed: int = 0,
    ) -> None:
        if room not in ("cloud", "field"):
            raise DeclarationError(f"room: unknown choice {room!r}, {did_you_mean(str(room), ('cloud', 'field'))}")
        super().__init__(
            outputs={"logits": OutputSpec(f"{check_positive('n_classes', n_classes)}x0e", per="atom")},
            cutoff=None,
            receptive_field=None,
            vectors={ROOM: "1o"} if room == "field" else None,
        )
        if labels is not None and len(labels) != n_classes:
            raise DeclarationError(f"labels: expected {n_classes} names, got {len(labels)}")
        self.n_classes, self.k, self.room = n_classes, check_positive("k", k), room
        self.labels = None if labels is None else tuple(labels)
        # Rotated fields reach a network as fields of a batch only.
        self.shares_work = room == "cloud"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = {1: (18, 64), 2: (64, 64), 3: (128, 64), 4: (64, 64), 5: (128, 64), 6: (192, 1024)}
            sizes |= {7: (1216, 512), 8: (512, 256)}
            self.layers = torch.nn.ModuleDict({str(n): dense(*size, _LEAKY, bias=False) for n, size in sizes.items()})
            self.dropout = torch.nn.Dropout(0.5)
            self.last = torch.nn.Linear(256, n_classes, bias=False)

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """``logits`` of every wanted point, in the orientation given."""
        cache = self.prepare(batch)
        room = batch[ROOM] if self.room == "field" else None
        return self._evaluate(cache, batch[keys.POS], room, None)

    def prepare(self, batch: Data) -> dict[str, Tensor]:
        """Neighbors in space, and colors."""
        clouds = clouds_of(batch)
        if self.room == "field":
            if batch.get(ROOM) is None or batch[ROOM].shape != clouds.pos.shape:
                raise InvalidInputError(f"{ROOM}: expected a field of shape (n_atoms, 3), got none or another shape")
            clouds = Clouds(batch[ROOM], clouds.structure, clouds.ptr)
        mask = batch.get(keys.CENTER_MASK)
        center = torch.ones_like(clouds.structure, dtype=torch.bool) if mask is None else mask
        colors = {"colors": features_of(batch, 3, default=_GRAY), "center": center}
        return build_levels(clouds, self.k, 1, 1.0) | colors

    def forward_frames(
        self, cache: dict[str, Tensor], edge_vec: Tensor, copies: Copies | None = None
    ) -> dict[str, Tensor]:
        """``logits`` of copies, from the rotated positions of their points (there are no edges)."""
        return self._evaluate(cache, edge_vec, None, copies)

    def _evaluate(
        self, cache: dict[str, Tensor], pos: Tensor, room: Tensor | None, copies: Copies | None
    ) -> dict[str, Tensor]:
        level = select(cache, copies, 1)[0]
        colors = cache["colors"] if copies is None else cache["colors"][copies.atom]
        center = cache["center"] if copies is None else copies.center
        sizes = structure_sizes(level.ptr)
        n_clouds = sizes.shape[0]
        cloud = torch.repeat_interleave(torch.arange(n_clouds, device=pos.device), sizes)
        relative, radius, _ = centered(pos, cloud, n_clouds)
        radius = radius[cloud][:, None]
        up = pos.new_tensor([0.0, 0.0, 1.0])
        inside = 0.5 + relative / (2.0 * radius) if room is None else room
        features = torch.cat([relative + radius * up, colors, inside], dim=1)

        first = self._edge_convolution(features, level.graph, "1", "2")
        second = self._edge_convolution(first, self._neighbors(first, level.ptr), "3", "4")
        third = self._edge_convolution(second, self._neighbors(second, level.ptr), "5")
        local = torch.cat([first, second, third], dim=1)
        pooled = grouped_max(self.layers["6"](local), sizes)
        # The maximum over the cloud is the same for all its points: multiplied once.
        weight, rest = self._taken_apart("7")
        split = pooled.shape[1]
        mixed = local @ weight[:, split:].T + (pooled @ weight[:, :split].T)[cloud]
        hidden = self.layers["8"](rest(mixed))
        logits = self.last(self.dropout(hidden))[center]
        return {"logits": logits.reshape((-1,) + self.outputs["logits"].shape)}

    def _taken_apart(self, name: str) -> tuple[Tensor, torch.nn.Sequential]:
        """The matrix of a layer, and what follows it."""
        layer = cast(torch.nn.Sequential, self.layers[name])
        return cast(torch.nn.Linear, layer[0]).weight, cast(torch.nn.Sequential, layer[1:])

    def _neighbors(self, features: Tensor, ptr: Tensor) -> Tensor:
        return nearest_neighbors(features, ptr, features, ptr, self.k)

    def _edge_convolution(self, features: Tensor, graph: Tensor, first: str, second: str | None = None) -> Tensor:
        """Maximum over neighbors j of h(x_j - x_i, x_i); points in blocks, so that memory does not grow with edges."""
        weight, rest = self._taken_apart(first)
        half = features.shape[1]
        # W (x_j - x_i, x_i) = A x_j + (B - A) x_i, on points rather than edges.
        neighbor = features @ weight[:, :half].T
        center = features @ (weight[:, half:] - weight[:, :half]).T
        counts = edge_counts(graph, features.shape[0])
        ptr = offsets(counts)
        parts = []
        for start in range(0, features.shape[0], 4096):
            stop = min(start + 4096, features.shape[0])
            source, target = graph[:, int(ptr[start]) : int(ptr[stop])]
            edges = rest(neighbor[source] + center[target])
            edges = edges if second is None else self.layers[second](edges)
            parts.append(grouped_max(edges, counts[start:stop]))
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """Arguments of `rebuild_dgcnn`."""
        labels = None if self.labels is None else list(self.labels)
        return {"n_classes": self.n_classes, "k": self.k, "room": self.room, "labels": labels}


def rebuild_dgcnn(description: dict[str, Any]) -> DGCNN:
    """An untrained `DGCNN` from what `DGCNN.describe` returned."""
    labels = description.get("labels")
    return DGCNN(**{**description, "labels": None if labels is None else tuple(labels)})


def load_dgcnn(
    weights: str | os.PathLike[str] | None = None,
    *,
    room: Literal["cloud", "field"] = "cloud",
    k: int = 20,
    dtype: torch.dtype = torch.float32,
    trust_pickle: bool = False,
) -> DGCNN:
    """A trained segmentation network, in evaluation mode.

    Parameters
    ----------
    weights : str or path
        A state dict with the names of antao97/dgcnn.pytorch. None come with the package: its repository
        (https://github.com/antao97/dgcnn.pytorch, ``pretrained/semseg``, MIT license) offers ``model_1.t7`` and more.
    room, k : see `DGCNN`
    dtype : torch.dtype
    trust_pickle : bool
        See `read_tensors`.

    Raises
    ------
    DeclarationError
        Without a path.
    InvalidInputError
        For files that are damaged, incomplete, or would run code.
    """
    if weights is None:
        raise DeclarationError(
            "dgcnn: weights: expected the path of trained weights, got none; download pretrained/semseg/model_1.t7 of "
            "https://github.com/antao97/dgcnn.pytorch, or make an untrained network: DGCNN()"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in read_tensors(weights, trust_pickle).items():
        renamed = _renamed(name)
        # The reference registers every normalization twice.
        if renamed in tensors and not torch.equal(tensors[renamed], flat(value)):
            raise InvalidInputError(f"{weights}: {name}: expected the same numbers as under its other name")
        tensors[renamed] = flat(value)
    last = tensors.get("last.weight")
    n_classes = 13 if last is None else int(last.shape[0])
    model = DGCNN(n_classes, k=k, room=room, labels=S3DIS if n_classes == 13 else None)
    fill(model, tensors, weights)
    return model.to(dtype).eval()


def _renamed(name: str) -> str:
    """Names of dgcnn.pytorch to those here."""
    name = name.removeprefix("module.").replace("conv9.", "last.")
    name = re.sub(r"^conv(\d)\.(\d)\.", r"layers.\1.\2.", name)
    return re.sub(r"^bn(\d)\.", r"layers.\1.1.", name)
