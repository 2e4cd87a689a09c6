"""Networks of point clouds on meshes: what depends on the pose, what symmetrization gives, and what fine-tuning adds.

python -m benchmarks.pointcloud --data FOLDER --output runs/pointcloud

A part that is finished is not run again in the same output folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from symmetrize.backbones.pointcloud import (
    PointTransformer,
    load_dgcnn,
    load_point_transformer,
    load_pointnet,
)
from torch import Tensor
from torch_geometric.data import Batch
from tqdm import tqdm

from benchmarks.meshes import Mesh, batched, load, sample
from benchmarks.record import Column, Result, digits, fixed
from symmetrize import ECSE, Anchored, Symmetrizer
from symmetrize.backbone import Backbone
from symmetrize.data import replace, validate
from symmetrize.files import write_text
from symmetrize.ops.rotations import about_axis, random_rotations

#: Anchors, and width in units of the cloud's radius.
N_ANCHORS, WIDTH = 16, 0.02


def symmetrized(backbone: Backbone) -> Symmetrizer:
    """The model that the study is about."""
    return Symmetrizer(backbone, Anchored(ECSE(WIDTH), N_ANCHORS), group="SO(3)", scope="structure", chunk_size=8192)


def turned(batch: Batch, rotations: Tensor) -> Batch:
    """Every cloud in a pose of its own."""
    pos = (rotations.to(batch.pos.dtype)[batch.batch] @ batch.pos[:, :, None])[:, :, 0]
    return replace(batch, pos=pos)


def in_sampled_frames(model: Symmetrizer, batch: Batch, generator: torch.Generator) -> Batch:
    """Every cloud in the coordinates of one of its frames, drawn with the probability that is its weight.

    A step of training on it costs one evaluation per cloud, as plain training does, and its expected loss bounds that
    of the average over frames from above (the loss is convex in the logits).
    """
    with torch.no_grad():
        frames = model.frames(batch)
        # The largest of log w + Gumbel noise is distributed as the weights.
        noise = -torch.log(-torch.log(torch.rand(frames.n_frames, generator=generator, dtype=torch.float64)))
        score = torch.log(frames.weights) + noise
        best = score.new_full((frames.n_owners,), -torch.inf).scatter_reduce(0, frames.owner, score, "amax")
        chosen = (score == best[frames.owner]).nonzero()[:, 0]
        chosen = chosen[torch.argsort(frames.owner[chosen])]
        local = replace(batch, pos=batch.pos - frames.origins[chosen][batch.batch].to(batch.pos.dtype))
        return turned(local, frames.rotations[chosen].transpose(1, 2))


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """In double precision, without gradients: (n_clouds or n_points, n_classes)."""
    with torch.no_grad():
        out: Tensor = model(validate(batch))["logits"].to(torch.float64)
    return out


def interval(hits: Tensor, mesh: Tensor, n_meshes: int) -> tuple[float, float, float]:
    """Accuracy in percent and its 95 % interval: a bootstrap over meshes, since clouds of one mesh are alike."""
    count = torch.bincount(mesh, minlength=n_meshes).to(torch.float64)
    rate = torch.zeros(n_meshes, dtype=torch.float64).index_add(0, mesh, hits.to(torch.float64)) / count
    draws = torch.randint(n_meshes, (4000, n_meshes), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(rate[draws].mean(dim=1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return 100.0 * float(rate.mean()), 100.0 * low, 100.0 * high


def spread_of(logits: Tensor) -> float:
    """Standard deviation of centered logits over poses (the first axis), relative to their RMS."""
    centered = logits - logits.mean(dim=-1, keepdim=True)
    deviation = centered - centered.mean(dim=0, keepdim=True)
    return float(deviation.square().mean().sqrt() / centered.square().mean().sqrt())


class Study:
    """Data, and what is computed from them, part by part."""

    def __init__(self, meshes: list[Mesh], data: Path, output: Path, small: bool) -> None:
        self.meshes, self.data, self.output, self.small = meshes, data, output, small
        self.target = torch.arange(len(meshes))

    def clouds(self, n_points: int, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
        """A fresh cloud of every mesh."""
        generator = torch.Generator().manual_seed(seed)
        return batched([sample(mesh, n_points, generator) for mesh in self.meshes], dtype)

    # Part 1: what it costs.

    def frames(self) -> Result:
        """Evaluations per cloud of plain ECSE and of anchored ones."""
        cases: list[tuple[int, int | None, float]] = [(256, None, 0.02), (256, None, 0.001)]
        cases += [(1024, None, width) for width in (0.01, 0.003, 0.001, 0.00001)]
        cases += [(1024, n, width) for n in (8, 16, 32) for width in (0.05, WIDTH, 0.01)]
        cases += [(10000, n, width) for n in (8, 16, 32) for width in (0.05, WIDTH, 0.01)]
        records = []
        for n_points, n_anchors, width in tqdm(cases, desc="frames", leave=False):
            method = ECSE(width) if n_anchors is None else Anchored(ECSE(width), n_anchors)
            found, seconds = [], []
            for mesh in self.meshes[:: 4 if n_anchors is None else 1]:
                batch = validate(batched([sample(mesh, n_points, torch.Generator().manual_seed(1))]))
                start = time.perf_counter()
                found.append(method.frames(batch, group="SO(3)", scope="structure", l_max=0).n_evaluations)
                seconds.append(time.perf_counter() - start)
            ordered = sorted(found)
            records.append(
                {
                    "n_points": n_points,
                    "frames": "all pairs" if n_anchors is None else f"{n_anchors} anchors",
                    "width": width,
                    "n_clouds": len(found),
                    "mean": sum(found) / len(found),
                    "median": ordered[len(found) // 2],
                    "max": ordered[-1],
                    "ms": 1e3 * sum(seconds) / len(seconds),
                }
            )
        return Result(
            "Evaluations per cloud, SO(3)",
            records,
            (
                Column("n_points", "points"),
                Column("frames", "frames from"),
                Column("width", "D / radius"),
                Column("n_clouds", "clouds"),
                Column("mean", "mean", fixed(1)),
                Column("median", "median"),
                Column("max", "max"),
                Column("ms", "ms per cloud", fixed(0)),
            ),
            notes=[
                "All pairs of points are what `ECSE` does without anchors. No width brings its largest numbers down "
                "(planar clouds are dense at the centroid), and its memory is cubic in the number of points within D: "
                "10,000 points are left out."
            ],
        )

    def cost(self) -> Result:
        """Time of clouds of 1024 and 10,000 points."""
        networks: dict[str, Backbone] = {
            "PointNet": load_pointnet(),
            "DGCNN": load_dgcnn(self._file("dgcnn_s3dis_area1.t7")),
            "Point Transformer": load_point_transformer(),
        }
        mesh = next(mesh for mesh in self.meshes if mesh.name == "3d_torus_fat")
        records = []
        for name, network in tqdm(networks.items(), desc="cost", leave=False):
            for n_points in (1024, 10000):
                batch = batched([sample(mesh, n_points, torch.Generator().manual_seed(1))], torch.float32)
                model = symmetrized(network)
                best = {"bare": float("inf"), "all": float("inf")}
                for _ in range(2 if n_points > 5000 else 5):
                    for key, call in (("bare", network), ("all", model)):
                        start = time.perf_counter()
                        logits_of(call, batch)
                        best[key] = min(best[key], time.perf_counter() - start)
                n = model.explain(batch).n_evaluations
                ratio = best["all"] / best["bare"]
                records.append({"network": name, "n_points": n_points, "bare": best["bare"], "n": n, "ratio": ratio})
        return Result(
            "Time of one cloud (3d_torus_fat), float32",
            records,
            (
                Column("network", "network"),
                Column("n_points", "points"),
                Column("bare", "bare (s)", digits(2)),
                Column("n", "evaluations"),
                Column("ratio", "symmetrized / bare", fixed(2)),
            ),
            notes=[
                "The most expensive part of Point Transformer at 10,000 points, samples and neighbors in space, is "
                "found once for all frames. DGCNN searches neighbors between features in every frame. Best of five "
                "(1024 points) and of two."
            ],
        )

    # Part 2: pretrained networks as they are.

    def poses(self) -> Result:
        """Answers of pretrained networks in many poses, bare and symmetrized."""
        records = []
        generator = torch.Generator().manual_seed(2)
        for name in ("PointNet, ModelNet40", "DGCNN, S3DIS"):
            whole = name.startswith("PointNet")
            network: Backbone
            if whole:
                network, batch = load_pointnet(dtype=torch.float64), self.clouds(1024, 3)
            else:
                network = load_dgcnn(self._file("dgcnn_s3dis_area1.t7"), dtype=torch.float64)
                chosen = torch.Generator().manual_seed(3)
                batch = batched([sample(mesh, 1024, chosen) for mesh in self.meshes[::5]])
                # z is up in rooms.
                batch = replace(batch, pos=torch.stack([batch.pos[:, 0], -batch.pos[:, 2], batch.pos[:, 1]], dim=1))
            n_clouds, n_poses = batch.num_graphs, 6 if whole else 3
            up = torch.tensor([0.0, 1.0, 0.0] if whole else [0.0, 0.0, 1.0], dtype=torch.float64)
            for label, model in (("bare", network), ("symmetrized", symmetrized(network))):
                upright = logits_of(model, batch)
                for kind in ("vertical axis", "SO(3)"):
                    logits = []
                    for _ in tqdm(range(n_poses), desc=f"{name}, {label}", leave=False):
                        angles = 2.0 * torch.pi * torch.rand(n_clouds, generator=generator, dtype=torch.float64)
                        about = torch.stack([about_axis(up, angle) for angle in angles])
                        rotations = about if kind == "vertical axis" else random_rotations(n_clouds, generator)
                        logits.append(logits_of(model, turned(batch, rotations)))
                    answers = torch.stack(logits)
                    changed = (answers.argmax(dim=2) != upright.argmax(dim=1)).to(torch.float64)
                    records.append(
                        {
                            "network": name,
                            "model": label,
                            "rotations": kind,
                            "n": changed.numel(),
                            "changed": 100.0 * float(changed.mean()),
                            "spread": spread_of(answers),
                            "largest": float((answers - upright).abs().max()),
                        }
                    )
        return Result(
            "Pretrained networks in other poses",
            records,
            (
                Column("network", "network"),
                Column("model", "model"),
                Column("rotations", "rotations about"),
                Column("n", "answers"),
                Column("changed", "class changes (%)", fixed(1)),
                Column("spread", "relative spread of logits", digits(2)),
                Column("largest", "largest change of a logit", digits(2)),
            ),
            notes=[
                "Clouds of 1024 points, float64; changes relative to the upright pose. PointNet: 40 meshes, one answer "
                "each; DGCNN: 4 meshes, one answer per point. There are no labels: the meshes are not of ModelNet40 or "
                "S3DIS."
            ],
        )

    # Part 3: fine-tuning.

    def finetuning(self) -> Result:
        """A classifier of the meshes from pretrained weights, upright first."""
        n_first, n_more = (8, 8) if self.small else (80, 120)
        upright = load_pointnet()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            upright.last.reset_parameters()  # other classes
        self._train("upright", upright, n_first, lambda model, batch, generator: batch)
        records = [*self._judge(f"upright ({n_first} steps)", upright)]
        for name, pose in (
            ("sampled frames", in_sampled_frames),
            ("random rotations", lambda model, batch, g: turned(batch, random_rotations(batch.num_graphs, g))),
        ):
            network = load_pointnet()
            network.load_state_dict(upright.state_dict())
            self._train(name, network, n_more, pose)
            records += self._judge(f"then {name} ({n_more} steps)", network)
        return Result("PointNet, fine-tuned on the meshes", records, _ACCURACY, notes=_HONEST)

    # Part 4: from scratch.

    def scratch(self) -> Result:
        """A small Point Transformer, from random weights."""
        n_steps = 8 if self.small else 240
        network = PointTransformer(len(self.meshes), widths=(32, 64, 128), k=8, seed=1)
        self._train("scratch", network, n_steps, in_sampled_frames, batch_statistics=True)
        return Result(
            "Point Transformer, trained from scratch on the meshes",
            self._judge(f"sampled frames ({n_steps} steps)", network, n_points=256),
            _ACCURACY,
            notes=[f"Widths 32, 64, 128; {sum(p.numel() for p in network.parameters())} parameters; 256 points."],
        )

    def _train(
        self,
        name: str,
        network: Backbone,
        n_steps: int,
        pose: Callable[[Symmetrizer, Batch, torch.Generator], Batch],
        n_points: int = 256,
        batch_statistics: bool = False,
        rate: float = 3e-3,
    ) -> None:
        """Adam, one fresh cloud of every mesh per step; finished weights are kept in the output folder."""
        path = self.output / f"{name.replace(' ', '-')}.safetensors"
        if path.is_file():
            network.load_state_dict(load_file(path))
            network.eval()
            return
        model = symmetrized(network)
        # Pretrained statistics of batch normalization are kept: a batch of 40 clouds has none to offer.
        network.train(batch_statistics)
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=n_steps)
        generator = torch.Generator().manual_seed(4)
        with torch.random.fork_rng(devices=[]), tqdm(range(n_steps), desc=name, leave=False) as bar:
            torch.manual_seed(5)
            for step in bar:
                batch = pose(model, self.clouds(n_points, 1000 + step, torch.float32), generator)
                loss = torch.nn.functional.cross_entropy(network(batch)["logits"], self.target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        network.eval()
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)

    def _judge(self, name: str, network: Backbone, n_points: int = 1024, n_clouds: int = 3) -> list[dict[str, Any]]:
        """Accuracies on fresh clouds."""
        model = symmetrized(network)
        batches = [self.clouds(n_points, 100_000 + seed, torch.float32) for seed in range(n_clouds)]
        generator = torch.Generator().manual_seed(6)
        n = len(self.meshes)

        def one(call: torch.nn.Module, rotate: bool, repeat: int) -> tuple[float, float, float]:
            hits = []
            for batch in batches * repeat:
                given = turned(batch, random_rotations(n, generator)) if rotate else batch
                hits.append(logits_of(call, given).argmax(dim=1) == self.target)
            return interval(torch.cat(hits), self.target.repeat(len(hits)), n)

        rows = []
        for label, call, rotate, repeat in (
            ("bare", network, False, 1),
            ("bare", network, True, 4),
            ("symmetrized", model, True, 1),
        ):
            accuracy, low, high = one(call, rotate, repeat)
            poses = "random" if rotate else "upright"
            row = {"training": name, "model": label, "poses": poses, "accuracy": accuracy, "low": low, "high": high}
            rows.append(row)
        # The symmetrized answer is the same in every pose: shown in double precision.
        network.double()
        batch = self.clouds(n_points, 100_000)
        answers = [logits_of(symmetrized(network), turned(batch, random_rotations(n, generator))) for _ in range(2)]
        rows[-1]["largest"] = float((answers[0] - answers[1]).abs().max())
        network.float()
        return rows

    def _file(self, name: str) -> Path:
        paths = sorted(self.data.rglob(name))
        if not paths:
            raise click.ClickException(f"expected {name} in {self.data}; see benchmarks/README.md")
        return paths[0]


_ACCURACY = (
    Column("training", "training"),
    Column("model", "model"),
    Column("poses", "poses"),
    Column("accuracy", "accuracy (%)", fixed(1)),
    Column("low", "95 % from", fixed(1)),
    Column("high", "to", fixed(1)),
    Column("largest", "largest change of a logit with the pose", digits(2)),
)
_HONEST = [
    "40 classes, chance 2.5 %. One mesh per class: training (clouds of 256 points) and test differ in the sampled "
    "points (120 fresh clouds), not in the mesh, so that these are accuracies of recognizing known shapes. Intervals: "
    "bootstrap over meshes.",
    "Two of the meshes (3d_wedge, 3d_pyramid_4_asym) are, within 1 % of their lengths, one shape in two poses: an "
    "answer that does not depend on the pose can hardly tell them apart.",
    "Symmetrization makes the answer independent of the pose, whatever it is. It cannot make poses familiar: a network "
    "that was trained upright only sees frames that it has not been shown.",
]

PARTS = ("frames", "cost", "poses", "finetuning", "scratch")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]...")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/pointcloud"), show_default=True)
@click.option("--small", is_flag=True, help="A few training steps only.")
def main(parts: tuple[str, ...], data: Path, output: Path, small: bool) -> None:
    """Run PARTs (all by default): frames, cost, poses, finetuning, scratch."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    study = Study(load(data), data, output, small)
    done = output / "parts.json"
    kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    for part in parts or PARTS:
        if part not in kept:
            start = time.perf_counter()
            result: Result = getattr(study, part)()
            seconds = round(time.perf_counter() - start, 1)
            records = json.loads(json.dumps(result.records, default=float))
            kept[part] = {"title": result.title, "seconds": seconds, "records": records, "text": result.text()}
            write_text(done, json.dumps(kept, indent=1) + "\n")
        click.echo(f"{kept[part]['text']}\n({kept[part]['seconds']} s)\n")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    head = (
        f"# Networks of point clouds\n\n{time.strftime('%Y-%m-%d', time.gmtime())}; {cores} cores, 1 thread, CPU; "
        f"torch {torch.__version__}; {len(study.meshes)} meshes; frames: ECSE, D = {WIDTH} radii, {N_ANCHORS} anchors, "
        "SO(3).\n"
    )
    texts = [f"{kept[part]['text']}\n({kept[part]['seconds']} s)\n" for part in PARTS if part in kept]
    write_text(output / "pointcloud.md", "\n".join([head, *texts]))
    saved = {part: {k: v for k, v in kept[part].items() if k != "text"} for part in PARTS if part in kept}
    content = {"head": head, "parts": saved}
    write_text(output / "pointcloud.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.pointcloud")
