"""Point Transformer: declarations, features, rebuilding; exactness is tested with the other networks of clouds."""

import pytest
import torch
from symmetrize.backbones.pointcloud import (
    load_point_transformer,
    rebuild_point_transformer,
)

from symmetrize import ECSE, Anchored, Symmetrizer, from_points
from symmetrize.data import validate
from symmetrize.errors import DeclarationError, InvalidInputError
from symmetrize.ops.rotations import random_rotations


def small(**options):
    return load_point_transformer(dtype=torch.float64, **{"n_classes": 3, "widths": (8, 16), "k": 5, **options})


def cloud(n=40, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rebuilt_and_saved_weights(tmp_path):
    from safetensors.torch import save_file

    network = small(n_features=2, labels=("a", "b", "c"), seed=4)
    again = rebuild_point_transformer(network.describe())
    assert again.describe() == network.describe()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = small(n_features=2, weights=tmp_path / "weights.safetensors")
    batch = validate(from_points(cloud(), x=cloud(seed=1)[:, :2]))
    assert torch.equal(loaded(batch)["logits"], network(batch)["logits"])
    with pytest.raises(InvalidInputError, match="expected shape"):
        small(n_features=1, weights=tmp_path / "weights.safetensors")


def test_features_are_invariant():
    network = small(n_features=2)
    model = Symmetrizer(network, Anchored(ECSE(0.05), 8), group="SO(3)")
    points, features = cloud(), cloud(seed=1)[:, :2]
    turn = random_rotations(1, torch.Generator().manual_seed(2))[0]
    with torch.no_grad():
        a = model(from_points(points, x=features))["logits"]
        b = model(from_points(points @ turn.T, x=features))["logits"]
        other = model(from_points(points, x=features.flip(0)))["logits"]
    assert torch.allclose(a, b, atol=1e-12) and not torch.allclose(a, other, atol=1e-9)
    with pytest.raises(InvalidInputError, match="x: expected features"):
        model(from_points(points))


def test_stages_shrink_by_the_ratio_and_never_to_nothing():
    network = small(widths=(4, 4, 4), ratio=0.25)
    batch = validate(from_points(torch.cat([cloud(40), cloud(2)]), torch.tensor([0] * 40 + [1] * 2)))
    cache = network.prepare(batch)
    assert [torch.diff(cache[f"ptr{level}"]).tolist() for level in range(3)] == [[40, 2], [10, 1], [3, 1]]
    assert bool(torch.isfinite(network(batch)["logits"]).all())


@pytest.mark.parametrize("option", [{"widths": ()}, {"widths": (8, 0)}, {"k": 0}, {"ratio": 0.0}, {"n_features": -1}])
def test_wrong_options_are_refused(option):
    with pytest.raises(DeclarationError):
        small(**option)


def test_training_through_sampled_frames_learns_in_every_pose():
    """A step costs one evaluation in one frame; the symmetrized classifier then tells shapes apart in any pose."""
    generator = torch.Generator().manual_seed(0)
    network = small(n_classes=2, widths=(8, 16), seed=2)
    model = Symmetrizer(network, Anchored(ECSE(0.05), 6), group="SO(3)")
    scales = torch.tensor([[1.0, 1.0, 0.1], [1.0, 0.1, 0.1]], dtype=torch.float64)

    def draw():
        points = torch.randn(2, 24, 3, generator=generator, dtype=torch.float64) * scales[:, None]
        points = points @ random_rotations(2, generator)
        return from_points(points.reshape(-1, 3), torch.arange(2).repeat_interleave(24))

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        batch = draw()
        frames = model.frames(batch)
        owners = range(frames.n_owners)
        chosen = torch.stack(
            [(frames.weights * (frames.owner == n)).multinomial(1, generator=generator) for n in owners]
        )
        turn = frames.rotations[chosen[:, 0]][batch.batch]
        local = from_points(
            ((batch.pos - frames.origins[chosen[:, 0]][batch.batch])[:, None] @ turn)[:, 0], batch.batch
        )
        loss = torch.nn.functional.cross_entropy(network(local)["logits"], torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        answers = torch.stack([model(draw())["logits"].argmax(dim=1) for _ in range(10)])
    assert float((answers == torch.arange(2)).double().mean()) >= 0.9
