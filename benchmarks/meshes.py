"""Meshes of simple shapes, and clouds sampled from their surfaces."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import from_points

ARCHIVE = "geometric_shapes_raw.zip"


@dataclass(frozen=True)
class Mesh:
    """Triangles of a surface: corners (n_triangles, 3, 3), y up."""

    name: str
    corners: Tensor


def read_off(text: str, name: str) -> Mesh:
    """A mesh in the Object File Format; polygons are cut into triangles, z becomes y.

    Raises
    ------
    ValueError
        If the text is something else.
    """
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    words = " ".join(line for line in lines if line).split()
    if not words or not words[0].startswith("OFF"):
        raise ValueError(f"{name}: expected a file that starts with OFF")
    words = [words[0][3:], *words[1:]] if words[0] != "OFF" else words[1:]
    n_vertices, n_faces = int(words[0]), int(words[1])
    end = 3 + 3 * n_vertices
    vertices = torch.tensor([float(word) for word in words[3:end]], dtype=torch.float64).reshape(n_vertices, 3)
    triangles = []
    for _ in range(n_faces):
        n = int(words[end])
        face = [int(word) for word in words[end + 1 : end + 1 + n]]
        triangles += [[face[0], face[k], face[k + 1]] for k in range(1, n - 1)]
        end += 1 + n
    x, y, z = vertices.unbind(1)
    return Mesh(name, torch.stack([x, z, -y], dim=1)[torch.tensor(triangles)])


def load(folder: Path) -> list[Mesh]:
    """One mesh of every class, sorted by name.

    The archive holds a training and a test mesh of every class, which are the same file: generalization from one mesh
    to another cannot be measured with it, from one sampled cloud to another it can.

    Raises
    ------
    FileNotFoundError
        If the archive is not in the folder or its subfolders.
    """
    paths = sorted(folder.rglob(ARCHIVE))
    if not paths:
        raise FileNotFoundError(f"expected {ARCHIVE} (github.com/Yannick-S/geometric_shapes) in {folder}")
    with zipfile.ZipFile(paths[0]) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".off") and "/train/" in name)
        return [read_off(archive.read(name).decode(), Path(name).stem) for name in names]


def sample(mesh: Mesh, n_points: int, generator: torch.Generator) -> Tensor:
    """Points spread evenly at random over the surface, in the unit sphere: Tensor of shape (n_points, 3), float64."""
    first, second, third = mesh.corners.unbind(1)
    area = torch.linalg.vector_norm(torch.linalg.cross(second - first, third - first), dim=1)
    pick = torch.multinomial(area, n_points, replacement=True, generator=generator)
    u = torch.rand(n_points, 2, dtype=torch.float64, generator=generator)
    root = u[:, :1].sqrt()
    points = (1.0 - root) * first[pick] + root * (1.0 - u[:, 1:]) * second[pick] + root * u[:, 1:] * third[pick]
    points = points - points.mean(dim=0)
    return points / torch.linalg.vector_norm(points, dim=1).max()


def batched(clouds: Iterable[Tensor], dtype: torch.dtype = torch.float64) -> Batch:
    """A batch of clouds."""
    clouds = list(clouds)
    counts = torch.tensor([len(cloud) for cloud in clouds])
    return from_points(torch.cat(clouds).to(dtype), torch.arange(len(clouds)).repeat_interleave(counts))
