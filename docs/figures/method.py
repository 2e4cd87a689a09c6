"""Draws ``method.svg``: how ECSE works. Every number in it comes from the package.

python docs/figures/method.py [--png PATH]
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_points
from symmetrize.frames import Stratum

INK, MUTED, FAINT = "#16222e", "#5a6876", "#dde4ea"
FRAMES = ("#d9622b", "#2f78c4", "#179a6e", "#8a63c9")
AXIS, POINT = "#e0a526", "#9aa7b3"
CUTOFF, WIDTH = 2.6, 0.5
#: A planar environment: the center, and neighbors at these distances and angles.
NEIGHBORS = ((1.0, 22.0), (1.2, 118.0), (1.45, -108.0), (2.0, 178.0), (2.35, 66.0), (2.2, -40.0))

_RC: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "symmetrize",
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "mathtext.fontset": "dejavusans",
}


def environment() -> np.ndarray:
    """Positions of the neighbors around a center at the origin."""
    return np.array([[d * math.cos(math.radians(a)), d * math.sin(math.radians(a)), 0.0] for d, a in NEIGHBORS])


def evaluate(neighbors: np.ndarray) -> dict[str, np.ndarray]:
    """Frames of the center with their weights, and a vector output in each: largest weight first."""
    pos = torch.cat([torch.zeros(1, 3, dtype=torch.float64), torch.as_tensor(neighbors)])
    backbone = ToyLocal({"vector": OutputSpec("1o")}, cutoff=CUTOFF, seed=SEED)
    model = Symmetrizer(backbone, ECSE(cutoff_width=WIDTH), group="SO(3)", scope="atom")
    batch = from_points(pos, cutoff=CUTOFF)
    frames = model.frames(batch)
    own = (frames.owner == 0).nonzero()[:, 0]
    own = own[torch.argsort(frames.normalized_weights[own], descending=True)]
    local, turned = [], []
    with torch.no_grad():
        for k in own:
            rotation = frames.rotations[k]
            value = backbone(from_points(pos @ rotation, cutoff=CUTOFF))["vector"][0]
            local.append(value.numpy())
            turned.append((rotation @ value).numpy())
        mean = model(batch)["vector"][0].numpy()
    weights = frames.normalized_weights[own].numpy()
    if not np.allclose(weights @ np.array(turned), mean, atol=1e-12):
        raise RuntimeError("the figure's average is not the package's")
    return {
        "rotations": frames.rotations[own].numpy(),
        "weights": weights,
        "local": np.array(local),
        "turned": np.array(turned),
        "mean": mean,
    }


SEED = 35


def strata(clouds: list[np.ndarray], cutoff: float, width: float) -> np.ndarray:
    """Share of the weight of the first atom in each stratum: (n_clouds, 3)."""
    shares = []
    for points in clouds:
        batch = from_points(torch.as_tensor(points), cutoff=cutoff)
        model = Symmetrizer(ToyLocal(cutoff=cutoff), ECSE(cutoff_width=width), group="SO(3)", scope="atom")
        frames = model.frames(batch)
        own = frames.owner == 0
        share = [float(frames.normalized_weights[own & (frames.stratum == int(s))].sum()) for s in STRATA]
        shares.append(share)
    return np.array(shares)


STRATA = (Stratum.FRAME, Stratum.AXIS, Stratum.POINT)


def arrow(axes: Any, start: np.ndarray, end: np.ndarray, color: str, width: float = 1.8, **options: Any) -> None:
    style = f"-|>,head_length={2.0 + 1.2 * width},head_width={1.0 + 0.7 * width}"
    options = {"zorder": 5, "shrinkA": 0.0, "shrinkB": 0.0, **options}
    axes.add_patch(
        FancyArrowPatch(tuple(start[:2]), tuple(end[:2]), arrowstyle=style, color=color, linewidth=width, **options)
    )


def molecule(axes: Any, points: np.ndarray, weights: np.ndarray, size: float, offset: np.ndarray, scale: float) -> None:
    """Center and neighbors; the more weight as an axis, the darker."""
    for point, weight in zip(points, weights, strict=True):
        place = offset + scale * point[:2]
        axes.plot(*np.stack([offset, place]).T, color=FAINT, linewidth=1.6, zorder=2, solid_capstyle="round")
        shade = 0.82 - 0.55 * min(1.0, float(weight) ** 0.5)
        axes.add_patch(Circle(tuple(place), size, facecolor=str(shade), edgecolor="white", linewidth=0.8, zorder=4))
    axes.add_patch(Circle(tuple(offset), 1.15 * size, facecolor=INK, edgecolor="white", linewidth=0.8, zorder=4))


def draw(figure: Figure) -> None:
    points = environment()
    found = evaluate(points)
    # Weight of each neighbor as the primary axis, e1 = u_j.
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    axis_of = np.array([int(np.argmax(units @ rotation[:, 0])) for rotation in found["rotations"]])
    shown = [k for k in range(len(found["weights"])) if found["weights"][k] > 0.02][:4]
    per_axis = np.bincount(axis_of, found["weights"], minlength=len(points))

    _candidates(figure.add_axes((0.005, 0.455, 0.315, 0.48)), points, found, axis_of, per_axis, shown)
    _evaluations(figure.add_axes((0.335, 0.455, 0.325, 0.48)), points, found, per_axis, shown)
    _average(figure.add_axes((0.675, 0.43, 0.32, 0.50)), points, found, per_axis, shown)
    for x, title in (
        (0.012, "1  Frames from neighbors"),
        (0.345, "2  Backbone in each frame"),
        (0.69, "3  Rotate back, average"),
    ):
        figure.text(x, 0.955, title, weight="bold", size=11.5, va="center")
    captions = (
        (0.16, "solid: axis, dashed: its partner;\nnumbers: weight as axis"),
        (0.497, "local coordinates $F_k^{\\mathsf{T}} x$ in, output out"),
    )
    for x, text in captions:
        figure.text(x, 0.438, text, size=8.5, color=MUTED, ha="center", va="top")
    _strata(figure)


def _empty(axes: Any, limit: float) -> None:
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_aspect("equal")
    axes.axis("off")


def _candidates(
    axes: Any, points: np.ndarray, found: dict, axis_of: np.ndarray, per_axis: np.ndarray, shown: list
) -> None:
    _empty(axes, 2.95)
    axes.add_patch(Circle((0, 0), CUTOFF, facecolor="#f4f7f9", edgecolor=MUTED, linewidth=1.0, linestyle=(0, (4, 3))))
    axes.text(0.0, -CUTOFF + 0.12, "cutoff", size=8.5, color=MUTED, ha="center", va="bottom")
    molecule(axes, points, per_axis, 0.15, np.zeros(2), 1.0)
    for j in sorted({int(axis_of[k]) for k in shown}):
        color = FRAMES[shown.index(next(k for k in shown if axis_of[k] == j))]
        unit = points[j] / np.linalg.norm(points[j])
        arrow(axes, 0.2 * unit, points[j] - 0.17 * unit, color, 1.0 + 3.0 * per_axis[j])
    for row, k in enumerate(shown):
        j = int(axis_of[k])
        # e2 = u_j x u_k / |...| and e3 = e1 x e2: the partner is on the far side of e3.
        partner = _partner(points, j, found["rotations"][k])
        bend = math.copysign(0.28 + 0.1 * row, float(np.cross(points[j], points[partner])[2]))
        arrow(
            axes,
            points[j],
            points[partner],
            FRAMES[row],
            0.9 + found["weights"][k],
            connectionstyle=f"arc3,rad={bend}",
            linestyle=(0, (3, 2)),
            shrinkA=6.0,
            shrinkB=6.0,
            zorder=3,
        )
    for j, point in enumerate(points):
        unit = point / np.linalg.norm(point)
        weight = per_axis[j]
        outward = 0.42 if abs(unit[0]) > 0.8 else 0.33
        place = point + outward * unit if np.linalg.norm(point) < 2.1 else point - 0.36 * unit
        kept = weight > 0.005
        text = f"{weight:.2f}" if kept else "0"
        axes.text(*place[:2], text, size=9, ha="center", va="center", color=INK if kept else MUTED)


def _partner(points: np.ndarray, axis: int, rotation: np.ndarray) -> int:
    """The nearest neighbor whose coordinate system with the axis is this one (weights fade with the distance)."""
    normals = np.cross(points[axis], points) @ rotation[:, 1]
    fits = [k for k in range(len(points)) if k != axis and normals[k] > 0.05]
    return min(fits, key=lambda k: float(np.linalg.norm(points[k])))


def _evaluations(axes: Any, points: np.ndarray, found: dict, per_axis: np.ndarray, shown: list) -> None:
    axes.set_xlim(0, 6.4)
    axes.set_ylim(0, 6.4 * 0.5 / 0.325 * 0.6)
    axes.axis("off")
    height = axes.get_ylim()[1]
    step = height / len(shown)
    box = FancyBboxPatch(
        (3.05, 0.25),
        1.05,
        height - 0.5,
        boxstyle="round,pad=0.0,rounding_size=0.2",
        facecolor="#eaf0f5",
        edgecolor=MUTED,
        linewidth=1.0,
    )
    axes.add_patch(box)
    axes.text(3.575, height / 2, "backbone  $f$", rotation=90, ha="center", va="center", size=11)
    for row, k in enumerate(shown):
        y = height - step * (row + 0.5)
        rotation, color = found["rotations"][k], FRAMES[row]
        local = points @ rotation
        flat = np.stack([local[:, 0], local[:, 2]], axis=1)
        scale = 0.46 * step / 2.0
        offset = np.array([1.35, y])
        molecule(axes, flat, per_axis, 0.1, offset, scale)
        arrow(axes, offset, offset + np.array([0.40 * step, 0.0]), color, 1.8)
        arrow(axes, offset, offset + np.array([0.0, 0.40 * step]), color, 1.0)
        arrow(axes, np.array([2.45, y]), np.array([3.0, y]), MUTED, 0.9)
        arrow(axes, np.array([4.15, y]), np.array([4.7, y]), MUTED, 0.9)
        value = np.array([found["local"][k][0], found["local"][k][2]])
        value = value / OUTPUT * 0.45 * step
        arrow(axes, np.array([5.15, y]) - value / 2, np.array([5.15, y]) + value / 2, color, 2.2)
        axes.text(5.72, y, f"w = {found['weights'][k]:.2f}", size=9, va="center", ha="left", color=color)


def _average(axes: Any, points: np.ndarray, found: dict, per_axis: np.ndarray, shown: list) -> None:
    _empty(axes, 2.95)
    molecule(axes, points, per_axis, 0.12, np.zeros(2), 0.9)
    for row, k in enumerate(shown):
        arrow(
            axes,
            np.zeros(2),
            found["turned"][k] / OUTPUT * 2.2,
            FRAMES[row],
            0.8 + 3.0 * found["weights"][k],
            alpha=0.85,
        )
    arrow(axes, np.zeros(2), found["mean"] / OUTPUT * 2.2, INK, 3.2, zorder=7)
    axes.text(
        0.0,
        -2.85,
        r"$\frac{1}{\sum_k w_k}\;\sum_k\; w_k\, F_k\, f(F_k^{\mathsf{T}} x)$",
        size=12,
        ha="center",
        va="bottom",
    )


OUTPUT = 1.0


def _strata(figure: Figure) -> None:
    figure.text(
        0.012,
        0.345,
        "The strata: what covers an environment fades smoothly into the next",
        weight="bold",
        size=11.5,
        va="center",
    )
    angles = np.linspace(120.0, 240.0, 161)
    bent = []
    for angle in angles:
        a = math.radians(angle)
        bent.append(np.array([[0, 0, 0], [1.16, 0, 0], [1.25 * math.cos(a), 1.25 * math.sin(a), 0]]))
    left = figure.add_axes((0.065, 0.105, 0.40, 0.165))
    _stack(left, angles, strata(bent, 4.5, 0.15))
    left.set_xlabel("bond angle at the center (degrees)", size=9)
    left.set_xticks([120, 150, 180, 210, 240])
    left.set_ylabel("weight", size=9)
    factors = np.linspace(1.5, 4.6, 161)
    apart = [s * np.array([[0, 0, 0], [1.0, 0, 0], [-0.5, 1.2, 0]]) for s in factors]
    right = figure.add_axes((0.565, 0.105, 0.40, 0.165))
    _stack(right, factors, strata(apart, 4.5, 0.5))
    right.set_xlabel("distance of the nearer neighbor (Å), cutoff 4.5", size=9)
    right.set_xticks([2, 3, 4])
    for axes, texts in (
        (left, ((132, 0.5, "frame"), (180, 0.5, "axis"), (228, 0.5, "frame"))),
        (right, ((2.3, 0.5, "frame"), (3.82, 0.5, "axis"), (4.535, 0.5, "point"))),
    ):
        for x, y, text in texts:
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                size=9.5,
                weight="bold",
                color="white" if text != "axis" else INK,
                rotation=90 if text == "point" else 0,
            )
    for x, text in ((0.265, "bending to a line"), (0.765, "neighbors leave one after another")):
        figure.text(x, 0.29, text, ha="center", va="center", size=9.5, color=MUTED)


def _stack(axes: Any, x: np.ndarray, shares: np.ndarray) -> None:
    axes.stackplot(x, shares.T, colors=(FRAMES[1], AXIS, POINT), linewidth=0)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 1])
    axes.tick_params(labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, help="also write an image, to look at")
    options = parser.parse_args()
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(8.0, 5.6))
        figure.patch.set_facecolor("white")
        draw(figure)
        target = Path(__file__).with_name("method.svg")
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        if options.png is not None:
            figure.savefig(options.png, dpi=100)
    # Coordinates of paths need two decimals; scales keep all of theirs.
    text = target.read_text(encoding="utf-8")
    text = re.sub(r'\bd="[^"]*"', lambda found: re.sub(r"(\.\d{2})\d+", r"\1", found.group()), text)
    target.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
