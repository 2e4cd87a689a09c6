"""Figures of the study of point clouds, from its output folder.

python -m benchmarks.pointcloud_figures --data FOLDER --run runs/pointcloud --output docs/figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from symmetrize.backbones.pointcloud import load_pointnet
from torch import Tensor
from tqdm import tqdm

from benchmarks.meshes import load
from benchmarks.pointcloud import Study, logits_of, symmetrized, turned
from symmetrize.ops.rotations import about_axis

ORANGE, BLUE, GREEN = "#e07b24", "#4186d8", "#179a6e"


def about_random_axes(n: int, angle: float) -> Tensor:
    """Rotations by one angle, about axes that do not change with it: Tensor of shape (n, 3, 3)."""
    axes = torch.randn(n, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return torch.stack([about_axis(axis, angle) for axis in axes])


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("runs/pointcloud"))
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/figures"), show_default=True)
def main(data: Path, run: Path, output: Path) -> None:
    """Accuracy and logits against the angle of rotation, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    study = Study(load(data), data, run, small=False)
    batch = study.clouds(1024, 100_000, torch.float32)
    degrees = torch.linspace(0.0, 180.0, 10, dtype=torch.float64)
    poses = [turned(batch, about_random_axes(len(study.meshes), angle)) for angle in torch.deg2rad(degrees).tolist()]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "symmetrize", "font.size": 10}):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        cases = (
            ("upright", "trained upright", ORANGE),
            ("random-rotations", "then random rotations", GREEN),
            ("sampled-frames", "then sampled frames", BLUE),
        )
        for name, label, color in tqdm(cases, leave=False):
            network = load_pointnet()
            network.load_state_dict(load_file(run / f"{name}.safetensors"))
            for call, style in ((network, "-"), (symmetrized(network), "--")):
                hits = [(logits_of(call, pose).argmax(dim=1) == study.target).double().mean() for pose in poses]
                which = "symmetrized" if style == "--" else "bare"
                left.plot(degrees, 100.0 * torch.stack(hits), style, color=color, label=f"{label}, {which}")
        network = load_pointnet(dtype=torch.float64)
        clouds = study.clouds(1024, 100_000)
        names = [mesh.name for mesh in study.meshes]
        row = names.index("3d_cone")
        for call, style in ((network, "-"), (symmetrized(network), "--")):
            answers = torch.stack(
                [
                    logits_of(call, turned(clouds, about_random_axes(len(names), angle)))[row]
                    for angle in torch.deg2rad(degrees).tolist()
                ]
            )
            for what, color in (("cone", ORANGE), ("vase", GREEN), ("tent", BLUE)):
                which = "symmetrized" if style == "--" else "bare"
                column = (network.labels or ()).index(what)
                right.plot(degrees, answers[:, column], style, color=color, label=f"{what}, {which}")
        left.set(xlabel="rotated by (degrees)", ylabel="accuracy (%)", title="40 meshes", ylim=(-3, 103))
        right.set(xlabel="rotated by (degrees)", ylabel="logit", title="A cone, pretrained PointNet")
        for axes in (left, right):
            _clean(axes)
        figure.savefig(output / "pointcloud-poses.svg", metadata={"Date": None, "Creator": None})
    click.echo(f"{output / 'pointcloud-poses.svg'}")


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d0d8e0", linewidth=0.6)
    axes.set_xticks([0, 45, 90, 135, 180])
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.pointcloud_figures")
