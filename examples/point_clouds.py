"""A trained PointNet says "cone" to an upright cone and something else to a tilted one. Symmetrized, it cannot.

    python examples/point_clouds.py --small

The shapes are made here, the weights (ModelNet40) come with the package. What it then says is the same in every pose,
but not what it says upright: frames show it poses that it was never trained on. Fine-tuning in sampled frames
(benchmarks/pointcloud.py) makes them familiar.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from symmetrize.backbones.pointcloud import load_pointnet

from symmetrize import ECSE, Anchored, Symmetrizer, from_points
from symmetrize.data import validate
from symmetrize.ops.rotations import about_axis

matplotlib.use("Agg")
from matplotlib.figure import Figure


def boxes(sizes_and_centers, n, generator):
    """n points on the surfaces of boxes, evenly spread."""
    sizes, centers = torch.tensor(sizes_and_centers, dtype=torch.float64).unbind(1)
    x, y, z = sizes.unbind(1)
    areas = torch.stack([y * z, y * z, z * x, z * x, x * y, x * y], dim=1).flatten()
    face = torch.multinomial(areas, n, replacement=True, generator=generator)
    box, side = face // 6, face % 6
    points = torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5
    points[torch.arange(n), side // 2] = (side % 2).double() - 0.5
    return points * sizes[box] + centers[box]


def turned(profile, n, generator):
    """n points on the surface of revolution of a line of (radius, height) corners, about y."""
    corners = torch.tensor(profile, dtype=torch.float64)
    first, step = corners[:-1], corners[1:] - corners[:-1]
    areas = step.norm(dim=1) * (corners[:-1, 0] + corners[1:, 0])
    piece = torch.multinomial(areas, n, replacement=True, generator=generator)
    u, v = torch.rand(2, n, generator=generator, dtype=torch.float64)
    a, b = corners[piece, 0], corners[piece + 1, 0]
    # Wider rings hold more points.
    t = torch.where((a - b).abs() < 1e-9, u, (torch.sqrt(a**2 + u * (b**2 - a**2)) - a) / (b - a + 1e-300))
    radius, height = (first[piece] + t[:, None] * step[piece]).unbind(1)
    return torch.stack([radius * torch.cos(2 * torch.pi * v), height, radius * torch.sin(2 * torch.pi * v)], dim=1)


def legs(width, height, thickness=0.08):
    return [[[thickness, height, thickness], [x, height / 2, z]] for x in (-width, width) for z in (-width, width)]


SEAT = [[[1.0, 0.1, 1.0], [0, 0.9, 0]], [[0.1, 0.8, 1.0], [-0.45, 1.3, 0]]]
SHAPES = {
    "chair": lambda n, g: boxes([*SEAT, *legs(0.45, 0.9, 0.15)], n, g),
    "table": lambda n, g: boxes([[[2.4, 0.08, 2.4], [0, 1.0, 0]], *legs(1.05, 1.0)], n, g),
    "bottle": lambda n, g: turned([[0.0, 0.0], [0.4, 0.0], [0.4, 1.3], [0.13, 1.7], [0.13, 2.2], [0.0, 2.2]], n, g),
    "cone": lambda n, g: turned([[0.0, 0.0], [0.8, 0.0], [0.0, 2.0]], n, g),
}


def draw_cloud(axes, points, frames):
    """The cloud, y up, and the axes of its frames, thicker where they weigh more."""
    axes.scatter(points[:, 0], -points[:, 2], points[:, 1], s=5, color="#6a7a8c", linewidths=0)
    for rotation, weight in zip(frames.rotations, frames.normalized_weights, strict=True):
        for axis, color in zip(rotation.T, ("#d1495b", "#179a6e", "#4186d8"), strict=True):
            x, y, z = (0.8 * axis).tolist()
            axes.plot([0, x], [0, -z], [0, y], color=color, linewidth=0.8 + 3.0 * float(weight))
    axes.set(xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), zlim=(-0.6, 0.6), title=f"Chair with {frames.n_frames} frames")
    axes.set_box_aspect((1, 1, 1))
    axes.view_init(elev=18, azim=-60)
    axes.set_axis_off()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer angles and points")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/point_clouds"))
    options = parser.parse_args()
    n_points, n_angles = (512, 9) if options.small else (1024, 37)
    bare = load_pointnet(dtype=torch.float64)
    # Frames from 16 far points; where two frames compete is a matter of 2 % of the radius.
    model = Symmetrizer(bare, Anchored(ECSE(0.02), 16), group="SO(3)")
    generator = torch.Generator().manual_seed(0)
    angles = torch.linspace(0.0, torch.pi, n_angles, dtype=torch.float64)
    axis = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left = figure.add_subplot(1, 3, 1, projection="3d")
    panels = {"bare": figure.add_subplot(1, 3, 2), "symmetrized": figure.add_subplot(1, 3, 3)}

    print(f"{'shape':8} {'model':12} {'upright':12} {'answers while it is tilted':48} largest change of a logit")
    for shape, make in SHAPES.items():
        points = make(n_points, generator)
        points = (points - points.mean(dim=0)) / (points - points.mean(dim=0)).norm(dim=1).max()
        if shape == "chair":
            draw_cloud(left, points, model.frames(from_points(points)))
        for name, call in (("bare", bare), ("symmetrized", model)):
            with torch.no_grad():
                poses = (points @ about_axis(axis, angle).T for angle in angles)
                logits = torch.cat([call(validate(from_points(pose)))["logits"] for pose in poses])
            answers = [bare.labels[k] for k in logits.argmax(dim=1).tolist()]
            others = ", ".join(dict.fromkeys(answers[1:]))
            change = float((logits - logits[0]).abs().max())
            print(f"{shape:8} {name:12} {answers[0]:12} {others[:47]:48} {change:.1e}")
            top = torch.softmax(logits, dim=1)[:, bare.labels.index(shape)]
            panels[name].plot(torch.rad2deg(angles), top, label=shape, linewidth=1.8)
    for name, panel in panels.items():
        panel.grid(color="#d0d8e0", linewidth=0.6)
        panel.set(title=name, xlabel="tilted by (degrees)", ylim=(-0.03, 1.03), xticks=[0, 45, 90, 135, 180])
        panel.spines[["top", "right"]].set_visible(False)
    panels["bare"].set_ylabel("probability of its name")
    panels["bare"].legend(frameon=False)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "point_clouds.png", dpi=130)
    print(f"figure: {options.output / 'point_clouds.png'}")


if __name__ == "__main__":
    main()
