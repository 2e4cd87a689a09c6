"""Adapters: the network of `benchmarks.peers.network` inside of other tools, by their documented interfaces."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from benchmarks.peers.network import N_SPECIES, Clouds, Network
from symmetrize import ECSE, OutputSpec, Symmetrizer, keys
from symmetrize.backbone import Backbone


def _without_init(package: str) -> None:
    """Make the modules of a package importable without its ``__init__``, which imports what is not needed here.

    faenet's imports torch_scatter, pandas and mendeleev for its own network; equiadapt's imports torchvision, kornia
    and escnn for images.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    module.__spec__ = spec
    sys.modules[package] = module


# --- ours ---------------------------------------------------------------------------------------------------------


class NetworkBackbone(Backbone):
    """The network as a backbone of this package."""

    def __init__(self) -> None:
        outputs = {"energy": OutputSpec("0e", per="structure"), "vector": OutputSpec("1o")}
        super().__init__(outputs=outputs, cutoff=None, receptive_field=None)
        self.clouds = Clouds()

    def forward(self, batch: Data) -> dict[str, Tensor]:
        return self.clouds(batch)


def ecse() -> Symmetrizer:
    """``Symmetrizer(backbone, ECSE())`` with everything by default."""
    return Symmetrizer(NetworkBackbone(), ECSE()).eval()


# --- frame-averaging-pytorch --------------------------------------------------------------------------------------


class FrameAveraging(Clouds):
    """``FrameAverage(net)`` for vectors, and with ``invariant_output=True`` for the energy."""

    def __init__(self) -> None:
        from frame_averaging_pytorch import FrameAverage

        super().__init__()
        self.invariant = FrameAverage(_Part(self.network, 0), invariant_output=True)
        self.equivariant = FrameAverage(_Part(self.network, 1))

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.invariant(points, species)[:, 0], self.equivariant(points, species)


class _Part(torch.nn.Module):
    """One of the two outputs of the network."""

    def __init__(self, network: Network, which: int) -> None:
        super().__init__()
        self.network, self.which = network, which

    def forward(self, points: Tensor, species: Tensor) -> Tensor:
        out = self.network(points, species)[self.which]
        return out[:, None] if self.which == 0 else out


# --- torch_geometric ----------------------------------------------------------------------------------------------


class NormalizedRotation(Clouds):
    """``NormalizeRotation`` before the network."""

    has_vectors = False

    def __init__(self, sort: bool) -> None:
        from torch_geometric.transforms import NormalizeRotation

        super().__init__()
        self.transform = NormalizeRotation(sort=sort)

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        turned = torch.stack([self.transform(Data(pos=one)).pos for one in points])
        return self.network(turned, species)[0], None


# --- faenet -------------------------------------------------------------------------------------------------------


class FAENet(Clouds):
    """``FrameAveraging("3D", fa_method)`` and ``model_forward``, with the network where FAENet's would be.

    Parameters
    ----------
    fa_method : {"all", "det", "stochastic"}
    from_energy : bool
        Forces are the derivative of the energy within each frame, as with ``regress_forces="from_energy"``.
    """

    def __init__(self, fa_method: str, from_energy: bool = False) -> None:
        _without_init("faenet")
        from faenet.fa_forward import model_forward
        from faenet.transforms import FrameAveraging

        super().__init__()
        self.transform = FrameAveraging("3D", fa_method)
        self.model_forward, self.from_energy = model_forward, from_energy

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        graphs = [self.transform(Data(pos=p, species=s)) for p, s in zip(points.detach(), species, strict=True)]
        out = self.model_forward(
            Batch.from_data_list(graphs), self._predict, "3D", mode="inference", crystal_task=False
        )
        return out["energy"], out["forces"].reshape(points.shape)

    def _predict(self, batch: Batch, mode: str) -> dict[str, Tensor]:
        n_structures = len(batch.ptr) - 1
        pos = batch.pos.detach().requires_grad_(self.from_energy)
        with torch.set_grad_enabled(self.from_energy):
            energy, vectors = self.network(
                pos.reshape(n_structures, -1, 3), batch.species.reshape(n_structures, -1, N_SPECIES)
            )
            forces = -torch.autograd.grad(energy.sum(), pos)[0] if self.from_energy else vectors.reshape(-1, 3)
        return {"energy": energy.detach()[:, None], "forces": forces.detach()}

    def forward(self, batch: Data) -> dict[str, Tensor]:
        out = super().forward(batch)
        return {"energy": out["energy"], "forces": out["vector"]} if self.from_energy else out


# --- equiadapt ----------------------------------------------------------------------------------------------------

#: Neighbors in equiadapt's canonicalisation network; fewer in smaller structures.
N_KNN = 4


class Canonicalized(Clouds):
    """``EquivariantPointcloudCanonicalization`` with its network ``VNSmall`` before ours, on centered points."""

    has_vectors = False

    def __init__(self) -> None:
        _without_init("equiadapt")
        from equiadapt.pointcloud.canonicalization import EquivariantPointcloudCanonicalization
        from equiadapt.pointcloud.canonicalization_networks import VNSmall
        from omegaconf import DictConfig

        super().__init__()
        torch.manual_seed(0)
        chosen = DictConfig({"n_knn": N_KNN, "pooling": "mean"})
        self.canonicalization = EquivariantPointcloudCanonicalization(VNSmall(chosen), chosen).double().eval()

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        self.canonicalization.canonicalization_network.n_knn = min(N_KNN, points.shape[1])
        centered = points - points.mean(dim=1, keepdim=True)
        return self.network(self.canonicalization(centered.transpose(1, 2)).transpose(1, 2), species)[0], None


# --- lloca --------------------------------------------------------------------------------------------------------


class LocalCanonicalization(Clouds):
    """``LearnedSO3Frames`` with ``MLPVectors`` and one frame per structure, on centered points as momenta of mass 1."""

    def __init__(self) -> None:
        from lloca.equivectors.mlp import MLPVectors
        from lloca.framesnet.equi_frames import LearnedSO3Frames

        super().__init__()
        torch.manual_seed(0)
        vectors = partial(MLPVectors, num_scalars=N_SPECIES, hidden_channels=32, num_layers_mlp=1)
        self.frames = LearnedSO3Frames(vectors, is_global=True).double().eval()
        self.frames.equivectors.init_standardization(_momenta(_cloud(8, 2)))

    def evaluate(self, points: Tensor, species: Tensor) -> tuple[Tensor, Tensor | None]:
        momenta = _momenta(points)
        rotation = self.frames(momenta, scalars=species).matrices[..., 1:, 1:].to(points.dtype)
        energy, vectors = self.network(torch.einsum("bnij,bnj->bni", rotation, momenta[..., 1:]), species)
        return energy, torch.einsum("bnji,bnj->bni", rotation, vectors)


def _momenta(points: Tensor) -> Tensor:
    centered = points - points.mean(dim=1, keepdim=True)
    return torch.cat([(1.0 + centered.square().sum(dim=-1, keepdim=True)).sqrt(), centered], dim=-1)


def _cloud(n: int, n_structures: int) -> Tensor:
    return 1.5 * torch.randn(n_structures, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- metatomic ----------------------------------------------------------------------------------------------------


def symmetrized_metatomic(degree: int) -> tuple[Any, Network]:
    """``SymmetrizedModel.wrap`` of the network as a metatomic model, with ``max_angular_momentum_grid=degree``."""
    from symmetrize.metatomic import import_metatomic

    metatomic = import_metatomic()
    from metatomic.torch.o3 import SymmetrizedModel

    from benchmarks.peers.exported import NetworkModule

    module = NetworkModule()
    capabilities = metatomic.ModelCapabilities(
        outputs={
            "energy": metatomic.ModelOutput(unit="eV", sample_kind="system"),
            "non_conservative_force": metatomic.ModelOutput(unit="eV/Angstrom", sample_kind="atom"),
        },
        atomic_types=list(range(1, 119)),
        interaction_range=float("inf"),
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    wrapped = SymmetrizedModel.wrap(
        metatomic.AtomisticModel(module.eval(), metatomic.ModelMetadata(), capabilities),
        max_angular_momentum_grid=degree,
        batch_size=512,
    )
    return wrapped, module.network


# --- e3nn ---------------------------------------------------------------------------------------------------------


class GateNetwork(torch.nn.Module):
    """e3nn's own ``SimpleNetwork`` (convolutions and gates) from ``e3nn.nn.models.v2106``, built in float64."""

    IRREPS_OUT = "0e + 1o"

    def __init__(self) -> None:
        super().__init__()
        from e3nn.nn.models.v2106.gate_points_networks import SimpleNetwork

        before = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            # Constants such as Wigner 3j symbols have the precision of the default dtype.
            torch.set_default_dtype(torch.float64)
            self.inner = SimpleNetwork(
                f"{N_SPECIES}x0e",
                self.IRREPS_OUT,
                max_radius=5.0,
                num_neighbors=4.0,
                num_nodes=8.0,
                mul=4,
                layers=2,
                lmax=2,
                pool_nodes=False,
            )
        finally:
            torch.set_default_dtype(before)
        # Zero at first, which keeps neighbors out of the scalars: an untrained network would prove nothing about them.
        with torch.no_grad():
            for name, parameter in self.inner.named_parameters():
                if ".alpha." in name:
                    parameter.normal_()

    def forward(self, batch: Data) -> dict[str, Tensor]:
        from benchmarks.peers.network import species_features

        pos, structure = batch[keys.POS], batch[keys.BATCH]
        features = species_features(batch[keys.Z], pos.dtype)
        parts = []
        # Its neighbor search looks at all pairs of a call.
        for first in range(0, len(batch[keys.PTR]) - 1, 32):
            rows = (structure >= first) & (structure < first + 32)
            parts.append(self.inner({"x": features[rows], "pos": pos[rows], "batch": structure[rows] - first}))
        out = torch.cat(parts)
        energy = out.new_zeros(len(batch[keys.PTR]) - 1).index_add(0, structure, out[:, 0])
        return {"energy": energy, "vector": out[:, 1:]}
