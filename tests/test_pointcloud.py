"""Networks of point clouds: loading, sampling and neighbors, exactness over poses, shared work."""

import os
import pickle

import pytest
import torch
from symmetrize.backbones.pointcloud import (
    DGCNN,
    MODELNET40,
    PointNet,
    PointTransformer,
    load_dgcnn,
    load_point_transformer,
    load_pointnet,
    rebuild_dgcnn,
    rebuild_pointnet,
)
from symmetrize.backbones.pointcloud.dgcnn import ROOM
from symmetrize.backbones.pointcloud.weights import SHIPPED

from symmetrize import ECSE, Anchored, Symmetrizer, from_points
from symmetrize.copies import copy_structures, edge_offsets
from symmetrize.data import validate
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError
from symmetrize.ops.rotations import octahedral_group, random_rotations
from symmetrize.ops.sampling import anchor_points, farthest_points, nearest_neighbors
from symmetrize.registry import load_backbone, rebuild_backbone

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_cloud(n=60, seed=0):
    return torch.randn(n, 3, generator=generator(seed), dtype=F64) * torch.tensor([1.0, 0.7, 0.4], dtype=F64)


def lattice(n):
    axis = torch.arange(n, dtype=F64)
    return torch.cartesian_prod(axis, axis, axis)


def cross():
    """Nearly everything on a line, and two points just off it: the frames have to see these."""
    line = torch.zeros(15, 3, dtype=F64)
    line[:, 0] = torch.linspace(-1.0, 1.3, 15, dtype=F64)
    return torch.cat([line, torch.tensor([[0.1, 0.02, 0.0], [0.3, 0.0, 0.03]], dtype=F64)])


def mirrored():
    half = random_cloud(20, 5)
    return torch.cat([half, half * torch.tensor([-1.0, 1.0, 1.0], dtype=F64)])


def polygon(n):
    angle = 2.0 * torch.pi * torch.arange(n, dtype=F64) / n
    return torch.stack([torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)], dim=1)


CLOUDS = {
    "random": random_cloud(),
    "point": torch.zeros(1, 3, dtype=F64),
    "pair": torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.2, 0.1]], dtype=F64),
    "line": torch.linspace(-1.0, 2.0, 25, dtype=F64)[:, None] ** 3 * torch.tensor([[0.3, 0.5, -0.7]], dtype=F64),
    "cube": lattice(2),
    "lattice": lattice(3),
    "octahedron": torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]),
    "polygon": polygon(12),
    "prism": torch.cat([polygon(6), polygon(6) + torch.tensor([0.0, 0.0, 1.5], dtype=F64)]),
    "mirrored": mirrored(),
    "cross": cross(),
}


def make(name):
    """Networks with random weights, small, in double precision."""
    networks = {
        "pointnet": lambda: PointNet(5, seed=1),
        "dgcnn": lambda: DGCNN(4, k=6, seed=1),
        "point-transformer": lambda: PointTransformer(5, widths=(8, 16, 16), k=6, seed=1),
    }
    network = networks[name]().to(F64).eval()
    # Default weights hardly see the coordinates: the first layer is made to.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
    return network


NAMES = ("pointnet", "dgcnn", "point-transformer")


def batch_of(*clouds, **fields):
    counts = torch.tensor([len(cloud) for cloud in clouds])
    return validate(from_points(torch.cat(clouds), torch.arange(len(clouds)).repeat_interleave(counts), **fields))


def logits(model, *clouds):
    with torch.no_grad():
        return model(batch_of(*clouds))["logits"]


def model_of(network, group="SO(3)"):
    return Symmetrizer(network, Anchored(ECSE(0.05), 6), group=group)


# Loading.


def test_shipped_pointnet_is_complete_and_recognizes_a_cone():
    model = load_pointnet()
    assert model.labels == MODELNET40 and not model.training
    u = torch.rand(1024, 2, generator=generator(1))
    angle, height = 2.0 * torch.pi * u[:, 0], u[:, 1].sqrt()
    cone = torch.stack([height * torch.cos(angle), 1.5 * (1.0 - height), height * torch.sin(angle)], dim=1)
    out = model(from_points(cone))["logits"]
    assert MODELNET40[int(out.argmax())] in ("cone", "tent", "lamp")


def test_missing_surplus_and_misshapen_parameters_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(SHIPPED / "pointnet-modelnet40.safetensors")
    lacking = {name: value for name, value in tensors.items() if name != "linear2.bias"}
    for changed, message in (
        (lacking, "lacks"),
        ({**tensors, "linear9.bias": torch.zeros(3)}, "unexpected"),
        ({**tensors, "linear2.bias": torch.zeros(3)}, "expected shape"),
        ({**tensors, "linear2.bias": tensors["linear2.bias"] * float("nan")}, "finite"),
    ):
        save_file(changed, tmp_path / "weights.safetensors")
        with pytest.raises(InvalidInputError, match=message):
            load_pointnet(tmp_path / "weights.safetensors")
    torch.save(tensors, tmp_path / "weights.t7")
    again = load_pointnet(tmp_path / "weights.t7")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load_pointnet().parameters(), strict=True))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path, writer):
    trap, file = tmp_path / "executed", tmp_path / "weights.t7"
    content = {"weight": Malicious(trap)}
    if writer == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file)
    for load in (load_pointnet, load_dgcnn, lambda path: load_point_transformer(path, widths=(4,))):
        with pytest.raises(InvalidInputError, match="run code"):
            load(file)
        assert not trap.exists()
    # The twin: this is what happens to those who trust it.
    if writer == "pickle":
        pickle.loads(file.read_bytes())
    else:
        with pytest.raises(InvalidInputError, match="state dict"):
            load_pointnet(file, trust_pickle=True)
    assert trap.exists()


def test_damaged_files_and_missing_paths_are_refused(tmp_path):
    for name in ("weights.safetensors", "weights.t7"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(InvalidInputError, match="weights"):
            load_pointnet(tmp_path / name)
    with pytest.raises(InvalidInputError, match="expected a file"):
        load_pointnet(tmp_path / "absent.t7")
    with pytest.raises(DeclarationError, match=r"dgcnn\.pytorch"):
        load_dgcnn()


def test_state_dict_of_the_reference_dgcnn_loads(tmp_path):
    network = DGCNN(seed=3)
    there = {}
    for name, value in network.state_dict().items():
        if name == "last.weight":
            there["module.conv9.weight"] = value[:, :, None]
            continue
        _, layer, part, what = name.split(".")
        if part == "0":
            there[f"module.conv{layer}.0.{what}"] = value[(...,) + (None,) * (2 if int(layer) < 6 else 1)]
        else:
            there[f"module.conv{layer}.1.{what}"] = there[f"module.bn{layer}.{what}"] = value
    torch.save(there, tmp_path / "model.t7")
    loaded = load_dgcnn(tmp_path / "model.t7")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    there["module.bn3.bias"] = there["module.bn3.bias"] + 1.0
    torch.save(there, tmp_path / "model.t7")
    with pytest.raises(InvalidInputError, match="same numbers"):
        load_dgcnn(tmp_path / "model.t7")


def test_loaded_and_rebuilt_by_name():
    for name, options in (("pointnet", {}), ("point-transformer", {"widths": (4, 8)})):
        network = load_backbone(name, **options)
        assert network.adapter == name and rebuild_backbone(name, network.describe()).describe() == network.describe()
    assert isinstance(rebuild_backbone("dgcnn", DGCNN().describe()), DGCNN)


def test_description_rebuilds():
    for network, rebuild in ((PointNet(3, labels=("a", "b", "c")), rebuild_pointnet), (DGCNN(k=7), rebuild_dgcnn)):
        again = rebuild(network.describe())
        assert again.describe() == network.describe()
        again.load_state_dict(network.state_dict())


# Sampling and neighbors.


def spread(cloud, rows):
    """Largest distance of a point to the sample, and smallest inside the sample."""
    return torch.cdist(cloud, cloud[rows]).amin(dim=1).max(), torch.pdist(cloud[rows]).min()


def test_farthest_points_are_the_greedy_cover():
    clouds = [random_cloud(50, 1), random_cloud(9, 2), random_cloud(31, 3)]
    batch = batch_of(*clouds)
    counts = torch.tensor([12, 9, 1])
    rows = farthest_points(batch.pos, batch.ptr, counts)
    for cloud, part, start in zip(clouds, rows.split(counts.tolist()), batch.ptr, strict=False):
        part = part - start
        assert part.unique().shape == part.shape
        first = (cloud - cloud.mean(dim=0)).norm(dim=1).argmax()
        assert part[0] == first
        for k in range(1, len(part)):
            assert part[k] == torch.cdist(cloud, cloud[part[:k]]).amin(dim=1).argmax()
        if len(part) > 1:
            cover, separation = spread(cloud, part)
            assert cover <= separation + 1e-12
    with pytest.raises(InvalidInputError):
        farthest_points(batch.pos, batch.ptr, torch.tensor([12, 10, 1]))


def up_to_rotations(cloud, rows):
    """Sorted distances of the sample to the cloud and to itself: the same for samples that a rotation exchanges."""
    near = torch.cdist(cloud, cloud[rows])
    return torch.cat([near.amin(dim=1).sort().values, torch.pdist(cloud[rows]).sort().values])


@pytest.mark.parametrize("name", CLOUDS)
def test_sample_does_not_depend_on_pose_or_order(name):
    cloud = CLOUDS[name]
    counts = torch.tensor([max(1, len(cloud) // 3)])
    ptr = torch.tensor([0, len(cloud)])
    expected = up_to_rotations(cloud, farthest_points(cloud, ptr, counts))
    for seed in range(4):
        order = torch.randperm(len(cloud), generator=generator(seed))
        turned = (cloud @ random_rotations(1, generator(seed))[0].T)[order] + 3.0
        rows = order[farthest_points(turned, ptr, counts)]
        assert torch.allclose(up_to_rotations(cloud, rows), expected, atol=1e-9)


def test_anchors_span_what_the_cloud_spans():
    cloud = CLOUDS["cross"]
    ptr = torch.tensor([0, len(cloud)])

    def thickness(rows):
        return torch.linalg.svdvals(cloud[rows] - cloud[rows].mean(dim=0))[1]

    assert thickness(anchor_points(cloud, ptr, 3)[0]) > 0.01
    # Farthest points alone stay on the line.
    assert thickness(farthest_points(cloud, ptr, torch.tensor([3]))) < 1e-12


@pytest.mark.parametrize("name", CLOUDS)
def test_anchors_turn_with_the_cloud(name):
    cloud, other = CLOUDS[name], random_cloud(17, 9)
    batch = batch_of(other, cloud)
    rows, counts = anchor_points(batch.pos, batch.ptr, 8)
    assert counts.tolist()[0] == 8 and counts[1] >= min(8, len(cloud)) and counts.sum() == len(rows)
    order = torch.randperm(len(cloud), generator=generator(1))
    turned = batch_of(other, (cloud @ random_rotations(1, generator(2))[0].T)[order] - 1.0)
    again, _ = anchor_points(turned.pos, turned.ptr, 8)
    assert torch.equal(torch.cat([again[:8], 17 + order[again[8:] - 17].sort().values]), rows)
    if name in ("cube", "octahedron", "polygon"):  # all or none
        assert counts[1] == len(cloud)


@pytest.mark.parametrize("limit", [1 << 22, 500])
def test_nearest_neighbors_are_the_nearest_and_ties_are_kept(monkeypatch, limit):
    import symmetrize.ops.sampling as sampling

    monkeypatch.setattr(sampling, "N_DISTANCES", limit)
    clouds = [random_cloud(70, 1), lattice(3), random_cloud(3, 2)]
    batch = batch_of(*clouds)
    edges = nearest_neighbors(batch.pos, batch.ptr, batch.pos, batch.ptr, 5)
    assert bool((edges[1][1:] >= edges[1][:-1]).all())
    for cloud, start in zip(clouds, batch.ptr[:-1], strict=True):
        distance = torch.cdist(cloud, cloud)
        kth = distance.sort(dim=1).values[:, min(5, len(cloud)) - 1]
        for point in range(len(cloud)):
            found = edges[0][edges[1] == start + point] - start
            assert set(found.tolist()) == set((distance[point] <= kth[point] + 1e-9).nonzero()[:, 0].tolist())


# Networks.


@pytest.mark.parametrize("name", NAMES)
def test_permutations_and_batches(name):
    network = make(name)
    clouds = [random_cloud(40, 1), lattice(3), random_cloud(7, 2)]
    together = logits(network, *clouds)
    order = torch.randperm(40, generator=generator(3))
    permuted = logits(network, clouds[0][order], *clouds[1:])
    if network.outputs["logits"].per == "atom":
        assert torch.allclose(permuted[:40], together[:40][order], atol=1e-12)
    else:
        assert torch.allclose(permuted, together, atol=1e-12)
        assert not torch.allclose(together[0], together[1], atol=1e-3)
    alone = torch.cat([logits(network, cloud + 2.0) for cloud in clouds])
    assert torch.allclose(alone, together, atol=1e-11)


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("name", NAMES)
def test_answer_is_the_same_in_every_pose(name, cloud):
    network, points = make(name), CLOUDS[cloud]
    model = model_of(network)
    poses = [points @ r.T for r in random_rotations(3, generator(7))]
    answers = [logits(model, pose) for pose in poses]
    scale = float(answers[0].abs().max())
    assert all(float((a - answers[0]).abs().max()) <= 1e-9 * scale for a in answers[1:])
    if len(points) > 1:  # the twin: the bare network sees the pose
        bare = [logits(network, pose) for pose in poses]
        assert max(float((b - bare[0]).abs().max()) for b in bare[1:]) > 1e-6 * scale
    if network.outputs["logits"].per == "structure":
        order = torch.randperm(len(points), generator=generator(8))
        assert float((logits(model, poses[0][order]) - answers[0]).abs().max()) <= 1e-9 * scale


@pytest.mark.parametrize("name", NAMES)
def test_mirror_images(name):
    network, points = make(name), CLOUDS["random"]
    reflected = points * torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    full = model_of(network, "O(3)")
    a, b = logits(full, points), logits(full, reflected)
    assert torch.allclose(a, b, atol=1e-10)
    proper = model_of(network)
    assert not torch.allclose(logits(proper, points), logits(proper, reflected), atol=1e-6)


@pytest.mark.parametrize("cloud", ["random", "line", "cube", "pair"])
def test_without_anchors_too(cloud):
    network, points = make("pointnet"), CLOUDS[cloud]
    model = Symmetrizer(network, ECSE(0.05), group="SO(3)")
    answers = [logits(model, points @ r.T) for r in random_rotations(3, generator(1))]
    assert all(torch.allclose(a, answers[0], atol=1e-10) for a in answers[1:])


def test_octahedral_poses_of_a_lattice():
    model, bare, points = model_of(make("point-transformer")), make("point-transformer"), CLOUDS["lattice"]
    answers = torch.cat([logits(model, points @ g.T) for g in octahedral_group()[:8]])
    assert float((answers - answers[0]).abs().max()) <= 1e-9 * float(answers.abs().max())
    assert not torch.allclose(logits(bare, points), logits(bare, points @ random_rotations(1, generator(0))[0].T))


@pytest.mark.parametrize("name", ["dgcnn", "point-transformer"])
def test_shared_work_equals_plain_evaluation(name):
    network = make(name)
    assert network.shares_work
    # Not a cloud with symmetries: there samples differ by one of them (averages over frames do not notice).
    clouds = [random_cloud(40, 1), mirrored(), random_cloud(5, 2)]
    batch = batch_of(*clouds)
    with torch.no_grad():
        cache = network.prepare(batch)
        assert torch.equal(network.forward_frames(cache, batch.pos)["logits"], network(batch)["logits"])
        # Copies of different sizes, out of order and repeated, each turned in its own way.
        structures = torch.tensor([2, 0, 1, 0])
        rotations = random_rotations(4, generator(2))
        copies = copy_structures(batch, edge_offsets(batch), structures)
        pos = (batch.pos[copies.atom][:, None] @ rotations[copies.atom_copy])[:, 0]
        shared = network.forward_frames(cache, pos, copies)["logits"]
        turned = [clouds[s] @ rotation for s, rotation in zip(structures.tolist(), rotations, strict=True)]
        assert torch.allclose(shared, logits(network, *turned), atol=1e-12)
        # The twin: the copies of cloud 0 differ, because they are turned differently.
        assert not torch.allclose(shared, logits(network, *[clouds[s] for s in structures.tolist()]), atol=1e-6)


@pytest.mark.parametrize("name", ["dgcnn", "point-transformer"])
def test_symmetrizer_with_and_without_shared_work(name):
    network = make(name)
    clouds = [random_cloud(40, 1), random_cloud(23, 2)]
    shared = logits(model_of(network), *clouds)
    network.shares_work = False
    assert torch.allclose(logits(model_of(network), *clouds), shared, atol=1e-12)


def test_gradients_reach_positions_and_parameters():
    network = make("point-transformer")
    batch = batch_of(random_cloud(30, 1), random_cloud(20, 2))
    batch.pos.requires_grad_()
    model_of(network)(batch)["logits"].sum().backward()
    assert bool(torch.isfinite(batch.pos.grad).all()) and float(batch.pos.grad.abs().max()) > 0.0
    assert all(p.grad is not None for p in network.parameters())


def test_gradient_of_positions_is_that_of_the_value():
    network = make("pointnet")
    model = model_of(network)
    points = random_cloud(30, 4)
    batch = batch_of(points)
    batch.pos.requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch)["logits"][0, 0], batch.pos)
    step = torch.randn(points.shape, generator=generator(5), dtype=F64)
    h = 1e-7
    numeric = (logits(model, points + h * step)[0, 0] - logits(model, points - h * step)[0, 0]) / (2.0 * h)
    assert abs(float((gradient * step).sum() - numeric)) < 1e-5 * (1.0 + abs(float(numeric)))


# DGCNN: which channels rotate.


def test_room_position_rotates_as_a_vector():
    network = DGCNN(4, k=6, room="field", seed=1).to(F64).eval()
    points = random_cloud(40, 1)
    room = (points - points.min(dim=0).values) / torch.tensor([4.0, 5.0, 3.0], dtype=F64)
    colors = torch.rand(40, 3, generator=generator(2), dtype=F64)
    model = model_of(network)

    def answer(call, turn, turn_room):
        with torch.no_grad():
            batch = batch_of(points @ turn.T, **{ROOM: room @ turn_room.T, "x": colors})
            return call(batch)["logits"]

    first, second = random_rotations(2, generator(3))
    identity = torch.eye(3, dtype=F64)
    assert torch.allclose(answer(model, first, first), answer(model, identity, identity), atol=1e-10)
    # The field matters, and it is not enough to turn the positions.
    assert not torch.allclose(answer(model, first, second), answer(model, first, first), atol=1e-6)
    with pytest.raises(InvalidInputError, match=ROOM):
        model(batch_of(points))
    line = CLOUDS["line"]
    with pytest.raises(NoFrameError):
        model(batch_of(line, **{ROOM: line.clone()}))


def test_colors_are_invariant_features():
    model = model_of(make("dgcnn"))
    points = random_cloud(30, 1)
    turn = random_rotations(1, generator(3))[0]
    colors = torch.rand(30, 3, generator=generator(2), dtype=F64)
    with torch.no_grad():
        a = model(batch_of(points, x=colors))["logits"]
        b = model(batch_of(points @ turn.T, x=colors))["logits"]
        other = model(batch_of(points, x=1.0 - colors))["logits"]
    assert torch.allclose(a, b, atol=1e-10) and not torch.allclose(a, other, atol=1e-6)
    with pytest.raises(InvalidInputError, match="x: expected features"):
        model(batch_of(points, x=colors[:, :2]))


# Anchors.


def test_evaluations_do_not_grow_with_the_cloud():
    method = Anchored(ECSE(0.02), 12)
    base = random_cloud(3000, 1)
    few, many = (
        method.frames(batch_of(base[:n]), group="SO(3)", scope="structure", l_max=0).n_evaluations for n in (300, 3000)
    )
    assert many <= 4 * few + 20
    # On a sphere all points are as far out: each is as good an axis as any, but for the anchors.
    shell = torch.nn.functional.normalize(base[:80], dim=1)
    plain, anchored = (
        m.frames(batch_of(shell), group="SO(3)", scope="structure", l_max=0).n_evaluations for m in (ECSE(0.02), method)
    )
    assert plain > 2 * anchored


def test_frames_scale_with_the_cloud_and_small_clouds_use_all_points():
    points = random_cloud(9, 1)
    method = Anchored(ECSE(0.05), 16)
    small, large = (
        method.frames(batch_of(scale * points), group="SO(3)", scope="structure", l_max=0) for scale in (1.0, 1000.0)
    )
    assert torch.allclose(small.rotations, large.rotations) and torch.allclose(small.weights, large.weights)
    radius = (points - points.mean(dim=0)).norm(dim=1).max()
    plain = ECSE(0.05).frames(batch_of(points / radius), group="SO(3)", scope="structure", l_max=0)
    # Anchors are in another order than the points.
    assert torch.allclose(small.weights.sort().values, plain.weights.sort().values)


def test_wrong_use_of_anchors_is_refused():
    with pytest.raises(DeclarationError, match="n_anchors"):
        Anchored(ECSE(), 2)
    with pytest.raises(TypeError, match="FrameMethod"):
        Anchored("ECSE")
    with pytest.raises(InvalidInputError, match="scope"):
        Anchored(ECSE()).frames(batch_of(random_cloud()), group="SO(3)", scope="atom", l_max=0)
