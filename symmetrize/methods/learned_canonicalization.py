"""One frame from the vectors of a small equivariant network, which is trained together with the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import where
from symmetrize.errors import (
    BackboneOutputError,
    DeclarationError,
    InvalidTypeError,
    NoFrameError,
    UnknownSpeciesError,
    did_you_mean,
)
from symmetrize.frames import FrameMethod, FrameSet, Scope
from symmetrize.methods.canonicalization_networks import N_SPECIES, N_VECTORS, SphericalTensors, VectorNeurons
from symmetrize.methods.clouds import Clouds, clouds, where_owner
from symmetrize.methods.draws import check_seed
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.switches import smooth_step

NETWORKS = ("vector-neuron", "e3nn")
FALLBACKS = ("lab", "error")

#: Vectors shorter than this are the rounding errors of a sum of terms of order 1, and have no direction: positions in
#: float64.
VANISHING = 1e-9
#: The same for positions in other precisions, in units of their rounding error.
_ROUNDING = 30.0

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_DEGENERATE = "the vectors of any equivariant network vanish or are collinear where the symmetry of the cloud says so"
_NEARBY = "one frame cannot be continuous everywhere: it turns without bound where the vectors become collinear"


class LearnedCanonicalization(FrameMethod):
    r"""One frame of every structure or atom, by orthonormalising the vectors of a small equivariant network.

    .. math:: F(x) = \rho(R(x))\, f(R(x)^{-1} x), \qquad R(x) = \mathrm{GramSchmidt}(v_1(x), v_2(x), v_3(x)),
        \qquad v_k(g x) = g\, v_k(x)

    Kaba, Mondal, Zhang, Bengio and Ravanbakhsh, "Equivariance with Learned Canonicalization Functions", ICML 2023,
    arXiv 2211.06489: their direct approach for the Euclidean group, an equivariant network followed by the Gram-Schmidt
    process. The network is a part of the model: gradients of outputs, and of forces, reach its parameters, and it
    learns the orientation in which the backbone works best.

    Group
        SO(3): two vectors, the third axis makes the frame right-handed. O(3): the third axis is on the side of the
        polar vector :math:`v_3`, so that frames of mirror images are mirror images (determinant -1 for one of each
        pair of enantiomers).
    Handedness
        In a cloud with a mirror plane, planar ones among them, all three vectors lie in it, and neither side is
        distinguished. The handedness is decided by the pseudoscalar :math:`\chi = v_3 \cdot (e_1 \times e_2) / v` with
        :math:`v^2 = \sum_k |v_k|^2 / 3`. For :math:`|\chi| <` ``mirror_width`` both sides are evaluated, with
        weights smooth_step((1 ± χ / mirror_width) / 2): exact on clouds with a mirror plane, and smooth through them.
        ``mirror_width=0`` is the single frame of the paper: at such clouds energies have kinks (forces jump), and
        outputs that tell the two sides apart jump; exactly there both sides get the weight 1/2.
    Exactness
        Exact for every output, wherever the first two vectors are not collinear.
    Smoothness
        As the backbone there, with a steepness inversely proportional to the lengths of :math:`v_1` and of the part of
        :math:`v_2` orthogonal to it.
    Where it fails
        An equivariant vector is invariant under the symmetries of the cloud: all vectors vanish at CH4, SF6, CO2,
        benzene or the sites of cubic crystals, and are collinear for any axis of symmetry (water, ammonia) and any
        line. No training changes this. There, directions that are missing are those of the lab: values and forces are
        finite, but not equivariant; ``fallback="error"`` refuses such clouds. Close to them the frame turns fast:
        forces are steep, and rounding errors of the positions are amplified.
    Cost
        One evaluation of the backbone, two in O(3) where :math:`|\chi| <` ``mirror_width`` (training may lead there: an
        average of two is smoother), and a small network that is linear in the number of points.

    Parameters
    ----------
    network : {"vector-neuron", "e3nn"} or torch.nn.Module
        `VectorNeurons`, `SphericalTensors`, or a network of yours with the same ``forward(vectors, weights, species,
        owner, n_owners)``: three polar vectors for every cloud, as a Tensor of shape (n_owners, 3, 3) whose rows turn
        with the input; of lengths around 1, those below 1e-9 (4e-6 for positions in float32) count as none. Tensors
        are float64, and floating-point parameters and buffers are handed over as float64, whatever they are kept in.
    channels, layers : int
        Size of the networks of this package.
    degree : int
        Highest degree of the harmonics of ``"e3nn"``.
    length_scale : float
        In the unit of the positions: beyond it, the networks of this package see directions more than distances.
    mirror_width : float
        See above; between 0 and 1.
    fallback : {"lab", "error"}
        What happens where vectors vanish or are collinear.
    seed : int
        Of the initial parameters.

    Raises
    ------
    DeclarationError
        Unknown names, sizes that are not positive.
    InvalidTypeError
        For a network that is no module.
    """

    limits: Mapping[str, str] = MappingProxyType(
        {
            "rotation_equivariance": _DEGENERATE,
            "inversion_equivariance": _DEGENERATE,
            "symmetric_sites": _DEGENERATE,
            "degeneracy_splitting": _DEGENERATE,
            "frame_equivariance": _DEGENERATE,
            "translation_invariance": "rounding errors of the positions turn the frame where vectors nearly vanish",
            "smoothness": _NEARBY,
            "frame_continuity": _NEARBY,
            "frame_conditioning": _NEARBY,
            "energy_conservation": "near symmetric structures forces are as steep as the frame turns fast",
        }
    )

    def __init__(
        self,
        network: str | torch.nn.Module = "vector-neuron",
        *,
        channels: int = 16,
        layers: int = 2,
        degree: int = 2,
        length_scale: float = 2.0,
        mirror_width: float = 0.05,
        fallback: str = "lab",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number in {"channels": channels, "layers": layers, "degree": degree}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise DeclarationError(f"LearnedCanonicalization: {name}: expected a positive integer, got {number!r}")
        if not _is_number(length_scale) or not 0.0 < length_scale < float("inf"):
            raise DeclarationError(
                f"LearnedCanonicalization: length_scale: expected a positive length, got {length_scale!r}"
            )
        if not _is_number(mirror_width) or not 0.0 <= mirror_width <= 1.0:
            raise DeclarationError(
                f"LearnedCanonicalization: mirror_width: expected a number from 0 to 1, got {mirror_width!r}"
            )
        if fallback not in FALLBACKS:
            raise DeclarationError(
                f"LearnedCanonicalization: fallback: unknown fallback {fallback!r}, "
                f"{did_you_mean(str(fallback), FALLBACKS)}"
            )
        generator = torch.Generator().manual_seed(check_seed("LearnedCanonicalization", seed))
        if isinstance(network, torch.nn.Module):
            self.network: torch.nn.Module = network
        elif not isinstance(network, str):
            raise InvalidTypeError(
                f"LearnedCanonicalization: network: expected a name or a torch.nn.Module, got {type(network).__name__}"
            )
        elif network == "vector-neuron":
            self.network = VectorNeurons(channels, layers, length_scale, generator)
        elif network == "e3nn":
            self.network = SphericalTensors(channels, layers, degree, length_scale, generator)
        else:
            raise DeclarationError(
                f"LearnedCanonicalization: network: unknown network {network!r}, {did_you_mean(network, NETWORKS)}"
            )
        self.mirror_width = float(mirror_width)
        self.fallback = fallback
        self._options: dict[str, Any] = {
            "network": network if isinstance(network, str) else None,
            "channels": channels,
            "layers": layers,
            "degree": degree,
            "length_scale": length_scale,
            "mirror_width": mirror_width,
            "fallback": fallback,
            "seed": seed,
        }

    def describe(self) -> dict[str, Any]:
        """See `FrameMethod.describe`; a network of your own is not described, only its numbers are saved."""
        return dict(self._options)

    @classmethod
    def rebuild(cls, description: dict[str, Any], auxiliary: Backbone | None) -> LearnedCanonicalization:
        """The method that was described; the parameters of its network are filled in by whoever saved them."""
        if description["network"] is None:
            raise DeclarationError(
                "LearnedCanonicalization: network: expected one of this package, got one of yours; make the method "
                "yourself and pass it: load(folder, method=LearnedCanonicalization(your_network))"
            )
        return cls(**description)

    def frames(
        self, batch: Data, *, group: str, scope: Scope, l_max: int, generator: torch.Generator | None = None
    ) -> FrameSet:
        """See `FrameMethod.frames`.

        Raises
        ------
        InvalidInputError
            For periodic structures in structure scope.
        UnknownSpeciesError
            For numbers that are no atomic numbers.
        NoFrameError
            Where vectors vanish or are collinear, with ``fallback="error"``.
        """
        around = _ordered(batch, clouds(batch, scope, type(self).__name__))
        vectors = self._vectors(batch, around)
        vanishing = max(VANISHING, _ROUNDING * torch.finfo(batch[keys.POS].dtype).eps)
        axes, chirality, degenerate = orthonormalized(vectors, vanishing)
        if self.fallback == "error" and bool(degenerate.any()):
            row = int(degenerate.nonzero()[0, 0])
            raise NoFrameError(
                f"LearnedCanonicalization: expected two vectors that are not collinear, got "
                f"{vectors[row, :2].tolist()} for {where_owner(batch, around.owners, row)}: it is too symmetric for "
                "one frame (or the network sees too little); the method ECSE covers such clouds"
            )
        if group == "SO(3)":
            return around.owners.frame_set(axes, torch.ones_like(chirality))
        mirrored = axes * axes.new_tensor([1.0, 1.0, -1.0])
        right = self._share(chirality, vanishing)
        weights = torch.stack([right, self._share(-chirality, vanishing)], dim=1).reshape(-1)
        rotations = torch.stack([axes, mirrored], dim=1).reshape(-1, 3, 3)
        # A weight of 0 has no derivatives either: the step underflows.
        used = (weights > 0.0).nonzero()[:, 0]
        return around.owners.frame_set(rotations[used], weights[used], used // 2)

    def _vectors(self, batch: Data, around: Clouds) -> Tensor:
        if around.species is None:
            species = torch.zeros_like(around.row)
        else:
            species = around.species.to(torch.int64)
            odd = ((species < 0) | (species >= N_SPECIES)).nonzero()[:, 0]
            if len(odd):
                raise UnknownSpeciesError(
                    f"z: {where(batch, int(around.atom[odd[0]]), 'atom')}: LearnedCanonicalization expected an atomic "
                    f"number from 0 to {N_SPECIES - 1}, got {int(species[odd[0]])}"
                )
        arguments = (around.vectors, around.weight, species, around.row, around.n)
        # Frames are float64 whatever the parameters are kept in.
        state = [*self.network.named_parameters(), *self.network.named_buffers()]
        narrow = {name: t.to(torch.float64) for name, t in state if t.dtype in _NARROW}
        found = torch.func.functional_call(self.network, narrow, arguments) if narrow else self.network(*arguments)
        expected = (around.n, N_VECTORS, 3)
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise BackboneOutputError(f"LearnedCanonicalization: network: expected vectors {expected}, got {got}")
        if not bool(torch.isfinite(found.detach()).all()):
            row = int((~torch.isfinite(found.detach())).flatten(1).any(dim=1).nonzero()[0, 0])
            raise BackboneOutputError(
                f"LearnedCanonicalization: network: expected finite vectors, got {found[row].tolist()} for "
                f"{where_owner(batch, around.owners, row)}"
            )
        return found.to(torch.float64)

    def _share(self, chirality: Tensor, vanishing: float) -> Tensor:
        """Weight of the frame on this side: Tensor of shape (n,)."""
        if self.mirror_width == 0.0:
            return torch.where(chirality.abs() < vanishing, 0.5, (chirality > 0.0).to(chirality.dtype))
        return smooth_step((1.0 + chirality / self.mirror_width) / 2.0)

    def extra_repr(self) -> str:
        return f"mirror_width={self.mirror_width}, fallback={self.fallback!r}"


def _ordered(batch: Data, around: Clouds) -> Clouds:
    """The same clouds, with the points of each in the order of their coordinates.

    Where vectors nearly vanish, rounding errors decide about the frame: they must not depend on the order of the atoms.
    """
    structures = around.owners.scope == "structure"
    points = batch[keys.POS].to(torch.float64) if structures else around.vectors
    order = torch.arange(points.shape[0], device=points.device)
    for values in (*points.detach().unbind(1)[::-1], around.row):
        order = order[torch.argsort(values[order], stable=True)]
    points, row = points[order], around.row[order]
    if structures:
        counts = (around.ptr[1:] - around.ptr[:-1]).clamp(min=1)
        points = points - (segment_sum(points, row, around.n) / counts[:, None])[row]
    species = None if around.species is None else around.species[order]
    return Clouds(around.owners, points, row, around.ptr, around.weight[order], species, around.atom[order])


def orthonormalized(vectors: Tensor, vanishing: float = VANISHING) -> tuple[Tensor, Tensor, Tensor]:
    """Right-handed axes by the Gram-Schmidt process, and the side of their plane that the third vector is on.

    Parameters
    ----------
    vectors : Tensor of shape (n, 3, 3), float64
        One vector per row.
    vanishing : float
        Vectors shorter than this, in units of their root mean square length, count as none.

    Returns
    -------
    axes : Tensor of shape (n, 3, 3)
        As columns. Where the first vector vanishes, the first axis is the lab's x; where the second one has no part
        orthogonal to it, the second axis is orthogonal to an axis of the lab that is far from the first.
    chirality : Tensor of shape (n,)
        Component of the third vector along the third axis, in units of the root mean square length of the vectors.
    degenerate : Tensor of shape (n,), bool
        Where axes of the lab were used.
    """
    size, empty = _length(vectors.reshape(-1, 9) / N_VECTORS**0.5, vanishing)
    scaled = torch.where(empty[:, None, None], 0.0, vectors / size[:, None, None])
    first, second, third = scaled.unbind(1)
    lab = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    length, no_first = _length(first, vanishing)
    e1 = torch.where(no_first[:, None], lab[0], first / length[:, None])
    across = second - (second * e1).sum(dim=1, keepdim=True) * e1
    length, no_second = _length(across, vanishing)
    # Orthogonal once more: where little is left of the second vector, its rounding errors along the first show.
    e2 = across / length[:, None]
    e2 = e2 - (e2 * e1).sum(dim=1, keepdim=True) * e1
    # Not decided by rounding where two axes of the lab are equally far from the first axis.
    farthest = (e1.detach().abs() + e1.new_tensor([0.0, 0.1, 0.2])).argmin(dim=1)
    away = torch.linalg.cross(e1, lab[farthest])
    e2 = torch.where(no_second[:, None], away, e2)
    e2 = e2 / e2.norm(dim=1, keepdim=True)
    e3 = torch.linalg.cross(e1, e2)
    return torch.stack([e1, e2, e3], dim=2), (third * e3).sum(dim=1), empty | no_first | no_second


def _length(vectors: Tensor, vanishing: float) -> tuple[Tensor, Tensor]:
    """Lengths, 1 for vectors that vanish, and which ones do."""
    square = (vectors * vectors).sum(dim=1)
    none = square.detach() < vanishing**2
    return torch.sqrt(torch.where(none, torch.ones_like(square), square)), none


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
