"""Networks of point clouds: PointNet, DGCNN and Point Transformer; `symmetrize.Anchored` has frames for them."""

from __future__ import annotations

from .dgcnn import DGCNN, load_dgcnn, rebuild_dgcnn
from .point_transformer import PointTransformer, load_point_transformer, rebuild_point_transformer
from .pointnet import MODELNET40, PointNet, load_pointnet, rebuild_pointnet
from .weights import read_tensors

__all__ = [
    "DGCNN",
    "MODELNET40",
    "PointNet",
    "PointTransformer",
    "load_dgcnn",
    "load_point_transformer",
    "load_pointnet",
    "read_tensors",
    "rebuild_dgcnn",
    "rebuild_point_transformer",
    "rebuild_pointnet",
]
