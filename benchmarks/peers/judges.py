"""Two judges of equivariance on models that they should reject: e3nn's ``assert_equivariant`` and ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Points of the input, and repetitions with different random numbers.
N_POINTS = 10
N_E3NN = 200
N_OURS = 20

#: Share of all orientations in which the fourth model is another one.
PATCH = 1.0 / 200.0

_Model = Callable[[Tensor], Tensor]


def points() -> Tensor:
    """The input: Tensor of shape (N_POINTS, 3), float64."""
    return torch.randn(N_POINTS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _sound(x: Tensor) -> Tensor:
    centered = x - x.mean(dim=0)
    return centered * torch.exp(-centered.square().sum(dim=1, keepdim=True))


def _patchy(x: Tensor) -> Tensor:
    """The sound one, plus a constant where the first point lies in a cap about x of the given share of the sphere."""
    centered = x - x.mean(dim=0)
    direction = centered[0] / centered[0].norm()
    inside = direction[0] > 1.0 - 2.0 * PATCH
    return _sound(x) + torch.where(inside, 1.0, 0.0).to(x) * x.new_tensor([0.0, 0.0, 1.0])


#: Short name, what it is, and the model. All but the first should be rejected.
MODELS: tuple[tuple[str, str, _Model], ...] = (
    ("sound", "an equivariant model", _sound),
    ("NaN", "returns NaN", lambda x: x * float("nan")),
    ("zero", "returns zero", torch.zeros_like),
    ("small", "not equivariant, outputs of 1e-12", lambda x: 1e-12 * torch.sin(3.0 * (x - x.mean(dim=0)))),
    ("patch", f"another model in 1/{round(1 / PATCH)} of all orientations", _patchy),
)


def compare() -> list[dict[str, Any]]:
    """How often each judge accepts each model."""
    out = []
    for key, name, model in MODELS:
        row: dict[str, Any] = {"key": key, "model": name}
        for judge, (accept, n) in JUDGES.items():
            row[judge] = {"accepted": sum(accept(model, seed) for seed in range(n)), "runs": n}
        out.append(row)
    return out


def _e3nn(model: _Model, seed: int) -> bool:
    from e3nn.util.test import assert_equivariant

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    try:
        # Its tolerance is that of the default dtype: 1e-9.
        torch.set_default_dtype(torch.float64)
        assert_equivariant(model, args_in=[points()], irreps_in=["cartesian_points"], irreps_out=["1x1o"])
    except AssertionError:
        return False
    finally:
        torch.set_default_dtype(before)
    return True


def _ours(model: _Model, seed: int) -> bool:
    from symmetrize.testing import assert_equivariant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert_equivariant(model, {"x": (points(), "1o")}, "1o", positions="x", seed=seed)
        except AssertionError:
            return False
    return True


def _check(model: _Model, seed: int) -> bool:
    from symmetrize.testing.running.runner import run
    from symmetrize.testing.subjects.arguments import of_arguments

    subject, batch = of_arguments(model, {"x": (points(), "1o")}, "1o", positions="x")
    only = [
        "finite_outputs",
        "nontrivial_outputs",
        "rotation_equivariance",
        "inversion_equivariance",
        "orientation_cover",
    ]
    return run(subject, batch, library=False, only=only, seed=seed).ok


#: Name -> (model, seed -> accepted, number of runs).
JUDGES: dict[str, tuple[Callable[[_Model, int], bool], int]] = {
    "e3nn assert_equivariant": (_e3nn, N_E3NN),
    "symmetrize assert_equivariant": (_ours, N_OURS),
    "symmetrize check": (_check, N_OURS),
}
