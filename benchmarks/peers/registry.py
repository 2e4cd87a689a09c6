"""Which tools are run, with which options, on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from benchmarks.peers import tools
from benchmarks.peers.network import Clouds, WithGradient
from symmetrize import OutputSpec
from symmetrize.testing.subjects.arguments import of_arguments
from symmetrize.testing.subjects.subject import CLAIMS, Subject, of_callable, of_symmetrizer

_ENERGY = {"energy": OutputSpec("0e", per="structure")}

#: Nothing else is claimed of any tool than what the checks that are run are about.
_CLAIMS = frozenset(CLAIMS) - {"locality", "periodicity"}


@dataclass(frozen=True)
class Subjects:
    """A tool around the network.

    Attributes
    ----------
    values : Subject
        Energy and vectors.
    gradients : Subject or None
        Energy and forces.
    module : torch.nn.Module or None
        What holds the `Network`, whose evaluations are counted.
    passes : int
        How often the network is evaluated for each output separately.
    batch : Batch or None
        What to run on where it is not the named geometries.
    """

    values: Subject
    gradients: Subject | None = None
    module: torch.nn.Module | None = None
    passes: int = 1
    batch: Batch | None = None


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes
    ----------
    key, title : str
    package : str
        Distribution whose version is recorded.
    options : str
        What was chosen.
    build : callable
        () -> Subjects.
    smooth, thorough : bool
        Whether smoothness is measured; whether anything is but rotations of generic structures and exactness.
    family : str
        Tools that differ by a degree, which are run together, in ascending degree.
    """

    key: str
    title: str
    package: str
    options: str
    build: Callable[[], Subjects]
    smooth: bool = True
    thorough: bool = True
    family: str = ""


def _clouds(name: str, make: Callable[[], Clouds], group: str = "O(3)", passes: int = 1) -> Subjects:
    values, gradients = make().requires_grad_(False), make().requires_grad_(False)
    outputs = {**_ENERGY, **({"vector": OutputSpec("1o")} if values.has_vectors else {})}
    common: dict[str, Any] = dict(group=group, periodic=False, claims=_CLAIMS, smooth=1, dtype=torch.float64)
    return Subjects(
        of_callable(values, outputs, name=name, **common),
        of_callable(_differentiated(gradients), {**_ENERGY, "forces": OutputSpec("1o")}, name=name, **common),
        values,
        passes,
    )


def _differentiated(model: Clouds) -> torch.nn.Module:
    """FAENet has forces of its own."""
    return tools.FAENet(model.transform.fa_method, True) if isinstance(model, tools.FAENet) else WithGradient(model)


def _ours() -> Subjects:
    model = tools.ecse()
    options: dict[str, Any] = dict(name="Symmetrizer", smooth=1, claims=_CLAIMS)
    return Subjects(
        of_symmetrizer(model, forces=False, **options), of_symmetrizer(model, forces=True, **options), model.backbone
    )


def _gate() -> Subjects:
    model = tools.GateNetwork().requires_grad_(False)
    common: dict[str, Any] = dict(periodic=False, claims=_CLAIMS, smooth=1, dtype=torch.float64)
    return Subjects(
        of_callable(model, {**_ENERGY, "vector": OutputSpec("1o")}, name="gates", **common),
        of_callable(WithGradient(model), {**_ENERGY, "forces": OutputSpec("1o")}, name="gates", **common),
    )


def _metatomic(degree: int) -> Subjects:
    from symmetrize.testing.subjects.metatomic import of_metatomic

    wrapped, _ = tools.symmetrized_metatomic(degree)
    options: dict[str, Any] = dict(periodic=False, smooth=1, claims=_CLAIMS, name=f"degree {degree}")
    gradients = of_metatomic(wrapped, outputs=["energy"], **options)
    values = of_metatomic(wrapped, outputs=["energy", "non_conservative_force"], **options)
    # Without derivatives: they would triple the time of every check.
    values.model.energy = None  # type: ignore[attr-defined]
    values = dataclasses.replace(values, outputs=values.model.declared(periodic=False), energy=None)  # type: ignore[attr-defined]
    return Subjects(values, gradients, values.model.model)  # type: ignore[attr-defined]


def _layer(make: Callable[[], tuple[torch.nn.Module, dict[str, str], str]]) -> Callable[[], Subjects]:
    def build() -> Subjects:
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(torch.float64)
            layer, inputs, output = make()
        finally:
            torch.set_default_dtype(before)
        generator = torch.Generator().manual_seed(2)
        samples: list[dict[str, tuple[Tensor, str]]] = [
            {name: (torch.randn(6, _dim(i), dtype=torch.float64, generator=generator), i) for name, i in inputs.items()}
            for _ in range(3)
        ]
        subject, batch = of_arguments(layer.requires_grad_(False), samples, output, name=type(layer).__name__)
        return Subjects(subject, batch=batch)

    return build


def _dim(irreps: str) -> int:
    from e3nn import o3

    return int(o3.Irreps(irreps).dim)


def _linear() -> tuple[torch.nn.Module, dict[str, str], str]:
    from e3nn import o3

    first, second = "4x0e+3x1o+2x2e", "2x0e+2x1o+3x2e"
    return o3.Linear(first, second), {"features": first}, second


def _product() -> tuple[torch.nn.Module, dict[str, str], str]:
    from e3nn import o3

    first, second, third = "4x0e+3x1o", "2x0e+1x1o+1x2e", "2x0e+2x1o+1x1e+1x2e"
    return o3.FullyConnectedTensorProduct(first, second, third), {"x": first, "y": second}, third


def _gated() -> tuple[torch.nn.Module, dict[str, str], str]:
    from e3nn import nn

    gate = nn.Gate("4x0e", [torch.nn.functional.silu], "3x0e", [torch.sigmoid], "2x1o+1x2e")
    return gate, {"features": str(gate.irreps_in)}, str(gate.irreps_out)


PEERS: tuple[Peer, ...] = (
    Peer(
        "network",
        "the network alone",
        "torch-symmetrize",
        "control: nothing is symmetrised",
        lambda: _clouds("network", Clouds),
    ),
    Peer("ecse", "torch-symmetrize", "torch-symmetrize", "Symmetrizer(backbone, ECSE()), O(3)", _ours),
    Peer(
        "frame-averaging",
        "frame-averaging-pytorch",
        "frame-averaging-pytorch",
        "FrameAverage(net); energy with invariant_output=True",
        lambda: _clouds("frame averaging", tools.FrameAveraging, passes=2),
    ),
    *(
        Peer(
            f"faenet-{method}",
            f"faenet, {method}",
            "faenet",
            f'FrameAveraging("3D", "{method}") and model_forward; forces from the energy within each frame',
            lambda method=method: _clouds(f"faenet {method}", lambda: tools.FAENet(method)),  # type: ignore[misc]
        )
        for method in ("all", "det", "stochastic")
    ),
    *(
        Peer(
            f"normalize-rotation{'-sort' if sort else ''}",
            f"torch_geometric NormalizeRotation{', sorted' if sort else ''}",
            "torch-geometric",
            f"NormalizeRotation(sort={sort}) before the network; invariant outputs only",
            lambda sort=sort: _clouds("normalised", lambda: tools.NormalizedRotation(sort)),  # type: ignore[misc]
        )
        for sort in (False, True)
    ),
    Peer(
        "equiadapt",
        "equiadapt",
        "equiadapt",
        f"EquivariantPointcloudCanonicalization(VNSmall), n_knn={tools.N_KNN} or the number of atoms, mean pooling, "
        "random weights, eval(); invariant outputs only",
        lambda: _clouds("equiadapt", tools.Canonicalized, "SO(3)"),
    ),
    Peer(
        "lloca",
        "lloca",
        "lloca",
        "LearnedSO3Frames(MLPVectors, is_global=True), random weights, eval()",
        lambda: _clouds("lloca", tools.LocalCanonicalization, "SO(3)"),
    ),
    *(
        Peer(
            f"metatomic-{degree}",
            f"metatomic-torch, degree {degree}",
            "metatomic-torch",
            f"SymmetrizedModel.wrap(model, max_angular_momentum_grid={degree}, batch_size=512)",
            lambda degree=degree: _metatomic(degree),  # type: ignore[misc]
            smooth=degree < 7,
            thorough=degree < 11,
            family="metatomic",
        )
        for degree in (3, 7, 11)
    ),
    Peer("e3nn-linear", "e3nn o3.Linear", "e3nn", "random weights", _layer(_linear)),
    Peer("e3nn-product", "e3nn o3.FullyConnectedTensorProduct", "e3nn", "random weights", _layer(_product)),
    Peer("e3nn-gate", "e3nn nn.Gate", "e3nn", "silu and sigmoid", _layer(_gated)),
    Peer(
        "e3nn-network",
        "e3nn v2106 SimpleNetwork",
        "e3nn",
        "mul=4, layers=2, lmax=2, max_radius=5; its own network, random weights",
        _gate,
    ),
)

#: What is known and not run, and why.
NOT_RUN: dict[str, str] = {
    "minimal frame averaging (divelab/MFA)": "not on PyPI, where there is no minimal_frame, the name in its setup.py",
}
