"""A model that is exactly equivariant by construction, and the faults that are planted in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symmetrize import Backbone, OutputSpec, keys
from symmetrize.data import edge_vectors
from symmetrize.data import replace as replace_fields
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import about_axis
from symmetrize.ops.switches import smooth_cutoff
from symmetrize.testing.subjects.subject import CLAIMS, Subject, of_backbone

CUTOFF = 4.0


class Pairwise(Backbone):
    """Sums over pairs of functions of the distance: energy, a vector and a tensor of every atom.

    Parameters
    ----------
    switch : callable
        How a neighbor leaves: (distance) -> weight.
    distance : callable
        What is made of the edge vectors before anything else: (edge_vec) -> (edge_vec).
    detached : bool
        Planted: the weights of the neighbors do not contribute to the gradient.
    nearest : bool
        Planted: the nearest neighbor alone decides.
    """

    def __init__(
        self,
        switch: Callable[[Tensor], Tensor] = lambda r: smooth_cutoff(r, CUTOFF, 2.0),
        prepare: Callable[[Tensor], Tensor] = lambda v: v,
        detached: bool = False,
        nearest: bool = False,
    ) -> None:
        super().__init__(
            outputs={
                "energy": OutputSpec("0e", reduce="sum"),
                "vector": OutputSpec("1o"),
                "tensor": OutputSpec(cartesian="ij=ji"),
            },
            cutoff=CUTOFF,
            receptive_field=1,
        )
        self.switch, self.prepare_edges, self.detached, self.nearest = switch, prepare, detached, nearest

    def forward(self, batch):
        edge_vec = batch[keys.EDGE_VEC] if batch.get(keys.EDGE_VEC) is not None else edge_vectors(batch)
        source, target = batch[keys.EDGE_INDEX]
        edge_vec = self.prepare_edges(edge_vec)
        n_atoms, r = batch[keys.POS].shape[0], edge_vec.norm(dim=1)
        weight = self.switch(r)
        if self.detached:
            weight = weight.detach()
        if self.nearest:
            shortest = r.new_full((n_atoms,), math.inf).scatter_reduce(0, target, r.detach(), "amin")
            weight = weight * (r.detach() == shortest[target]).to(weight.dtype)
        charge = 0.3 * batch[keys.Z].to(r.dtype).sqrt()
        pair = weight * charge[source] * torch.cos(1.1 * r + 0.4 * charge[target])
        density = segment_sum(pair, target, n_atoms)
        density = torch.sin(density) + 0.2 * charge
        vector = segment_sum((weight * charge[source])[:, None] * edge_vec, target, n_atoms)
        outer = edge_vec[:, :, None] * edge_vec[:, None, :]
        tensor = segment_sum(weight[:, None, None] * charge[source, None, None] * outer, target, n_atoms)
        out = {"energy": density, "vector": density[:, None] * vector, "tensor": density[:, None, None] * tensor}
        mask = batch.get(keys.CENTER_MASK)
        return out if mask is None else {name: value[mask] for name, value in out.items()}


def exact(**options) -> Subject:
    """The model without a fault, all claims made."""
    return replace(
        of_backbone(Pairwise(**options), claims=frozenset(CLAIMS) - {"locality"}),
        name="pairwise",
        kind="callable",
        backbone=None,
    )


def changing(change: Callable[[dict[str, Tensor], object], dict[str, Tensor]]) -> Subject:
    """The exact model with its outputs changed: (outputs, batch) -> outputs."""
    subject = exact()

    def f(batch):
        return change(dict(subject.model(batch)), batch)

    # Conversion to another precision has to take the fault along.
    def convert(dtype):
        converted = subject.convert(dtype)
        return replace(converted, model=lambda batch: change(dict(converted.model(batch)), batch))

    return replace(subject, model=f, convert=convert, module=None)


def given(change: Callable[[object], object]) -> Subject:
    """The exact model with its input changed."""
    subject = exact()
    return replace(subject, model=lambda batch: subject.model(change(batch)), convert=None, module=None)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def constant(out, batch):
    return {
        **out,
        "vector": torch.zeros_like(out["vector"]),
        "tensor": torch.eye(3).expand_as(out["tensor"]).to(out["tensor"]),
    }


def tiny(out, batch):
    """Wrong, but too small for an absolute tolerance to see."""
    lab = out["vector"].new_tensor([0.3, -0.5, 0.8])
    return {**out, "vector": 1e-9 * (out["vector"] + lab)}


def nan(out, batch):
    return {**out, "vector": out["vector"] * math.nan}


def nan_once(out, batch):
    """NaN in the orientation that the structures' own is turned into by 90 degrees about z."""
    pos, ptr = batch[keys.POS].detach(), batch[keys.PTR]
    many = ptr.diff() > 3
    first, last = ptr[:-1], ptr[1:] - 1
    direction = torch.nn.functional.normalize(pos[last] - pos[first], dim=1).to(torch.float64)
    known = _ETHANOL_TURNED.to(direction)
    hit = many & ((direction - known).norm(dim=1) < 1e-6)
    bad = hit[batch[keys.BATCH]]
    return {**out, "vector": torch.where(bad[:, None], torch.full_like(out["vector"], math.nan), out["vector"])}


def lab_vector(out, batch):
    return {**out, "vector": out["vector"] + out["vector"].new_tensor([0.03, -0.05, 0.08])}


def transposed(out, batch):
    """Components in a body-fixed basis, where those in the lab are wanted."""
    cyclic = out["vector"].new_tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    return {**out, "vector": torch.einsum("nij,ni->nj", out["tensor"], out["vector"]) @ cyclic.T}


def atom_order(out, batch):
    number = torch.arange(len(batch[keys.POS])) - batch[keys.PTR][batch[keys.BATCH]]
    return {**out, "vector": out["vector"] * (1.0 + 0.1 * number.to(out["vector"]))[:, None]}


def batch_mean(out, batch):
    return {**out, "energy": out["energy"] + 0.1 * (out["energy"].mean() - out["energy"])}


def absolute(out, batch):
    """Depends on the distance from the origin, and on no direction."""
    n = len(batch[keys.PTR]) - 1
    center = segment_sum(batch[keys.POS], batch[keys.BATCH], n) / batch[keys.PTR].diff()[:, None]
    return {**out, "vector": out["vector"] * (1.0 + 0.1 * center.square().sum(dim=1)[batch[keys.BATCH], None])}


def cell_vectors(out, batch):
    length = batch[keys.CELL].norm(dim=2).square().sum(dim=1)
    return {**out, "vector": out["vector"] * (1.0 + 0.01 * length[batch[keys.BATCH], None])}


def squeezed(v):
    return v * v.new_tensor([1.0, 1.0, 1.05])


def stepped(v):
    return v * (1.0 + 0.05 * (v[:, 2:] > 0.0).to(v))


def noise(out, batch):
    return {**out, "vector": out["vector"] * (1.0 + 0.01 * torch.randn(3, dtype=out["vector"].dtype))}


def draws(out, batch):
    torch.rand(3)
    return out


def one_triangle(out, batch):
    return {**out, "stress": torch.triu(out["stress"])} if "stress" in out else out


def collinear(out, batch):
    """Wrong only where all atoms are on a line."""
    pos, structure, n = batch[keys.POS].detach(), batch[keys.BATCH], len(batch[keys.PTR]) - 1
    counts = batch[keys.PTR].diff()
    centered = pos - (segment_sum(pos, structure, n) / counts[:, None])[structure]
    moments = segment_sum(centered[:, :, None] * centered[:, None, :], structure, n)
    second = torch.linalg.eigvalsh(moments)[:, 1]
    line = (second < 1e-12 * moments.diagonal(dim1=1, dim2=2).sum(dim=1)) & (counts > 1) & ~batch[keys.PBC].any(dim=1)
    extra = out["vector"].new_tensor([0.0, 0.3, 0.1]) * line[structure][:, None]
    return {**out, "vector": out["vector"] + extra}


PATCH = about_axis(torch.tensor([0.3, 0.8, -0.5], dtype=torch.float64), 1.9)


def orientation(batch) -> tuple[Tensor, Tensor]:
    """A right-handed basis of the first three atoms of structures of nine: (structures, (n, 3, 3))."""
    nine = (batch[keys.PTR].diff() == 9).nonzero()[:, 0]
    first = batch[keys.PTR][:-1][nine]
    pos = batch[keys.POS].detach().to(torch.float64)
    a = torch.nn.functional.normalize(pos[first + 1] - pos[first], dim=1)
    b = pos[first + 2] - pos[first]
    b = torch.nn.functional.normalize(b - (a * b).sum(dim=1, keepdim=True) * a, dim=1)
    return nine, torch.stack([a, b, torch.linalg.cross(a, b)], dim=2)


def patch(out, batch):
    """Another energy in a ball of orientations of Haar measure 1/200: an angle of 0.456 around `PATCH`."""
    nine, basis = orientation(batch)
    cosine = 0.5 * (torch.einsum("nij,ij->n", basis, PATCH) - 1.0)
    inside = nine[cosine > math.cos(0.456)]
    extra = torch.zeros_like(out["energy"])
    extra[inside] = 0.5
    return {**out, "energy": out["energy"] + extra}


def in_place(batch):
    batch[keys.POS] -= batch[keys.POS].mean(dim=0)
    return batch


def cell_not_rotated(batch):
    """Positions are turned into another frame, and the cell is forgotten: its translations stay where they were."""
    if not bool(batch[keys.PBC].any()):
        return batch
    turn = about_axis(torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64), 0.7).to(batch[keys.POS])
    pos = batch[keys.POS]
    return replace_fields(batch, **{keys.POS: pos @ turn.T})


def linear_switch(r):
    """Continuous, with a kink."""
    return ((CUTOFF - r) / 2.0).clamp(0.0, 1.0)


def step_switch(r):
    return (r < CUTOFF).to(r.dtype)


def single(v):
    return v.to(torch.float32).to(torch.float64)


def wrong_parity() -> Subject:
    subject = exact()
    return replace(subject, outputs={**subject.outputs, "vector": OutputSpec("1e")}, convert=None)


def _turned_ethanol() -> Tensor:
    from symmetrize.testing.structures.geometries import ethanol

    pos = torch.as_tensor(ethanol().positions)
    x, y, z = torch.nn.functional.normalize(pos[-1] - pos[0], dim=0)
    return torch.stack([-y, x, z])


_ETHANOL_TURNED = _turned_ethanol()

#: Any check may fail beside it: the fault spoils every number.
EVERYTHING = frozenset({"*"})

#: What compares an equivariant value with another one, by some way or other.
TURNS = frozenset(
    {"rotation_equivariance", "inversion_equivariance", "exactness", "symmetric_sites", "orientation_cover"}
)

#: What a jump of energy or forces does to derivatives and dynamics.
JUMPS = frozenset(
    {"forces_are_gradient", "stress_is_gradient", "hessian_symmetry", "closed_loops", "energy_conservation"}
)


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes
    ----------
    make : callable
        () -> Subject.
    must : frozenset of str
        Checks (or ids) that have to fail.
    may : frozenset of str
        Checks that the same fault also touches; all others have to pass.
    """

    make: Callable[[], Subject]
    must: frozenset[str]
    may: frozenset[str] = frozenset()


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


FAULTS: dict[str, Fault] = {
    "constant and zero outputs": Fault(lambda: changing(constant), _set("nontrivial_outputs")),
    "tiny outputs": Fault(lambda: changing(tiny), _set("rotation_equivariance", "inversion_equivariance"), TURNS),
    "NaN always": Fault(lambda: changing(nan), _set("finite_outputs", "rotation_equivariance"), EVERYTHING),
    "NaN for one rotation": Fault(lambda: changing(nan_once), _set("rotation_equivariance[generic]"), TURNS),
    "lab-frame vector": Fault(lambda: changing(lab_vector), _set("rotation_equivariance", "symmetric_sites"), TURNS),
    "wrong parity": Fault(wrong_parity, _set("inversion_equivariance"), _set("symmetric_sites")),
    "rotation transposed": Fault(lambda: changing(transposed), _set("rotation_equivariance"), TURNS),
    "cell not rotated": Fault(
        lambda: given(cell_not_rotated),
        _set("rotation_equivariance[periodic]", "rotation_equivariance[crystals]"),
        TURNS | _set("periodicity", "stress_is_gradient", "permutation_equivariance", "degeneracy_splitting"),
    ),
    "atom order": Fault(
        lambda: changing(atom_order),
        _set("permutation_equivariance"),
        _set("periodicity", "symmetric_sites"),
    ),
    "mean over the batch": Fault(lambda: changing(batch_mean), _set("batch_independence")),
    "hard cutoff": Fault(
        lambda: exact(switch=step_switch), _set("smoothness[pair crosses the cutoff]"), _set("smoothness", *JUMPS)
    ),
    "C0 weight": Fault(
        lambda: exact(switch=linear_switch),
        _set("smoothness[pair crosses the cutoff]"),
        _set("smoothness", *JUMPS),
    ),
    "detached weights": Fault(
        lambda: exact(detached=True),
        _set(
            *("forces_are_gradient", "hessian_symmetry", "stress_is_gradient"), *("closed_loops", "energy_conservation")
        ),
    ),
    "absolute positions": Fault(
        lambda: changing(absolute), _set("translation_invariance"), _set("periodicity", "symmetric_sites")
    ),
    "cell vectors as input": Fault(lambda: changing(cell_vectors), _set("periodicity")),
    "preferred direction, conservative": Fault(
        lambda: exact(prepare=squeezed),
        _set(
            *("rotation_equivariance", "exactness", "torque", "symmetric_sites"),
            *("degeneracy_splitting", "energy_conservation", "orientation_cover"),
        ),
        TURNS,
    ),
    "preferred direction, with a step": Fault(
        lambda: replace(exact(prepare=stepped), claims=frozenset(CLAIMS) - {"locality", "rotations", "inversion"}),
        _set("rotation_smoothness"),
        _set("smoothness", *JUMPS),
    ),
    "global random state": Fault(lambda: changing(noise), _set("determinism", "purity"), EVERYTHING),
    "advances the global generator": Fault(lambda: changing(draws), _set("purity")),
    "mutation of positions": Fault(lambda: given(in_place), _set("purity")),
    "float32 inside float64": Fault(
        lambda: exact(prepare=single),
        _set("arithmetic", "rotation_equivariance", "exactness"),
        EVERYTHING,
    ),
    "one triangle of the stress": Fault(
        lambda: changing(one_triangle),
        _set("stress_is_gradient", "rotation_equivariance[periodic]"),
        _set("rotation_equivariance", "inversion_equivariance", "symmetric_sites"),
    ),
    "argmax": Fault(
        lambda: exact(nearest=True),
        _set("smoothness[exchange of nearest neighbors]"),
        # Ties, which symmetric structures are full of, are decided by rounding.
        _set("smoothness", "degeneracy_splitting", "permutation_equivariance", "translation_invariance", "periodicity")
        | TURNS
        | JUMPS,
    ),
    "wrong on collinear input": Fault(
        lambda: changing(collinear),
        _set("rotation_equivariance[collinear]"),
        _set("inversion_equivariance", "smoothness", "symmetric_sites"),
    ),
    "patch of orientations": Fault(
        lambda: changing(patch),
        _set("orientation_cover"),
        _set("rotation_equivariance", "inversion_equivariance", "exactness", "forces_are_gradient"),
    ),
}
