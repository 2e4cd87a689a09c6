"""Networks of point clouds: PointNet, DGCNN and Point Transformer, and frames for clouds of many points."""

from __future__ import annotations

from .anchors import Anchored
from .dgcnn import DGCNN, load_dgcnn, rebuild_dgcnn
from .point_transformer import PointTransformer, load_point_transformer, rebuild_point_transformer
from .pointnet import MODELNET40, PointNet, load_pointnet, rebuild_pointnet
from .sampling import anchor_points, farthest_points, nearest_neighbors, unit_sphere
from .weights import read_tensors

__all__ = [
    "DGCNN",
    "MODELNET40",
    "Anchored",
    "PointNet",
    "PointTransformer",
    "anchor_points",
    "farthest_points",
    "load_dgcnn",
    "load_point_transformer",
    "load_pointnet",
    "nearest_neighbors",
    "read_tensors",
    "rebuild_dgcnn",
    "rebuild_point_transformer",
    "rebuild_pointnet",
    "unit_sphere",
]
