"""What the symmetry of a structure demands of one evaluation: components that vanish or agree, degenerate modes.

No input is rotated here. An equivariant model returns zero forces in a perfect crystal, no dipole for methane and
triply degenerate vibrations, in every orientation; a model that is not misses it in the one orientation it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import replace, validate
from symmetrize.errors import BackboneOutputError, InvalidInputError
from symmetrize.representations import OutputSpec, check_group
from symmetrize.testing.measuring.elements import batched, copied, moved_to, split
from symmetrize.testing.measuring.scales import Model, Scale, Values, evaluate, resolve_scale
from symmetrize.testing.structures.symmetry_operations import Operation, idealized

#: A cluster of eigenvalues is degenerate below this spread, relative to the RMS eigenvalue.
_DEGENERATE = 1e-8

#: No more structures than this in one call of a model, and no more atoms unless a single batch has them.
_MAX_STRUCTURES, _MAX_ATOMS = 256, 8192


@dataclass(frozen=True)
class SiteDeviation:
    """Part of an output that the symmetry of the structures forbids.

    Attributes
    ----------
    name : str
    structures : tuple of int
        Those of the batch in which symmetry demands something of this output.
    max, rms : Tensor of shape (len(structures),), float64
        Largest absolute and RMS residual over rows and components, in the unit of the output; inf where a value is not
        finite.
    n_operations : tuple of int
        Symmetry operations of each of the structures, the identity included.
    scale : Scale
    dtype : torch.dtype
        Of the positions: what the errors are to be judged by.
    """

    name: str
    structures: tuple[int, ...]
    max: Tensor
    rms: Tensor
    n_operations: tuple[int, ...]
    scale: Scale
    dtype: torch.dtype

    @property
    def relative(self) -> float:
        """Largest absolute residual on the error scale."""
        return self.scale.relative(float(self.max.max()) if self.max.numel() else math.inf)

    @property
    def relative_rms(self) -> float:
        """RMS over structures of the RMS residuals, on the error scale."""
        return self.scale.relative(float(self.rms.square().mean().sqrt()) if self.rms.numel() else math.inf)

    @property
    def worst(self) -> int:
        """Structure of the largest residual."""
        return self.structures[int(self.max.argmax())]

    def __str__(self) -> str:
        return (
            f"{self.name}: forbidden part {float(self.max.max()):.3g} = {self.relative:.3g} x scale "
            f"{self.scale.value:.3g} ({self.scale.kind}), worst in structure {self.worst} "
            f"({self.n_operations[int(self.max.argmax())]} operations)"
        )


def measure_symmetric_sites(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    tolerance: float = 1e-6,
    group: str = "O(3)",
    scale: Mapping[str, Scale | float] | None = None,
    vectors: dict[str, str] | None = None,
) -> dict[str, SiteDeviation]:
    r"""Components that symmetry forces to vanish or to agree, from one evaluation and without rotating anything.

    With the symmetry operations g of a structure (`symmetry_operations`) and the permutations :math:`P_g` of its atoms
    that they amount to, the residual is

    .. math:: f(x) - \frac{1}{|G|} \sum_{g \in G} \rho(g) P_g f(x),

    zero for forces in a perfect crystal, the dipole of methane, the anisotropy of a tensor on a cubic site, differences
    between energies of equivalent atoms. Structures are first made exactly symmetric (`idealized`), which moves atoms
    by no more than about ``tolerance``.

    Parameters
    ----------
    f : callable
    batch : Data
        Structures without symmetry take part in the error scale only.
    outputs : dict of str to OutputSpec
    tolerance : float
        Of the symmetry operations, in the unit of the positions.
    group : {"O(3)", "SO(3)"}
        For SO(3), proper operations only.
    scale : dict of str to Scale or float, optional
        Error scales; by default `error_scale` of this batch, where outputs that vanish by symmetry are compared with
        their response to a small displacement.
    vectors : dict of str to str, optional
        Further geometric fields, as field name -> e3nn irreps: operations have to leave them as they are.

    Returns
    -------
    dict of str to SiteDeviation
        Without outputs of which symmetry demands nothing, such as a total energy; there may be none left.
    """
    proper = check_group(group) == "SO(3)"
    ideal, operations = [], []
    for single in split(validate(batch)):
        structure, found = idealized(single, tolerance=tolerance, vectors=vectors)
        ideal.append(structure)
        operations.append([o for o in found if not proper or float(torch.linalg.det(o.matrix)) > 0])
    together = batched(ideal)
    reference = evaluate(f, together, outputs)
    mask = together.get(keys.CENTER_MASK)
    masks = torch.ones(len(together[keys.BATCH]), dtype=torch.bool) if mask is None else mask.cpu()
    parts = [masks[together[keys.BATCH].cpu() == s] for s in range(len(ideal))]
    probe = torch.Generator().manual_seed(0)
    demanded: dict[str, list[tuple[int, float, float]]] = {}
    for name, value in reference.items():
        for s, found in enumerate(operations):
            rows = value.rows[value.owner == s]
            if len(found) < 2 or not rows.numel():
                continue
            anything = torch.randn(rows.shape, dtype=torch.float64, generator=probe)
            if float(_forbidden(anything, value, found, parts[s]).abs().max()) < 1e-6:
                continue
            residual = _forbidden(rows, value, found, parts[s]).abs()
            # A NaN is no small error.
            residual = torch.where(torch.isfinite(residual), residual, torch.full_like(residual, math.inf))
            demanded.setdefault(name, []).append((s, float(residual.max()), float(residual.square().mean().sqrt())))
    if not demanded:
        return {}
    scales = resolve_scale(f, together, outputs, reference, scale)
    out = {}
    for name, entries in demanded.items():
        structures, largest, rms = zip(*entries, strict=True)
        out[name] = SiteDeviation(
            name,
            structures,
            torch.tensor(largest, dtype=torch.float64),
            torch.tensor(rms, dtype=torch.float64),
            tuple(len(operations[s]) for s in structures),
            scales[name],
            together[keys.POS].dtype,
        )
    return out


def _forbidden(rows: Tensor, value: Values, operations: Sequence[Operation], mask: Tensor) -> Tensor:
    """Rows minus their mean over rho(g) P_g."""
    row_of_atom = torch.cumsum(mask, dim=0) - 1
    mean = torch.zeros_like(rows)
    for operation in operations:
        turned = value.spec.rotate(rows, operation.matrix.expand(len(rows), 3, 3))
        if value.per == "atom":
            turned = torch.empty_like(turned).index_copy(0, row_of_atom[operation.permutation[mask]], turned)
        mean += turned / len(operations)
    return rows - mean


# --- degenerate modes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Modes that symmetry makes degenerate.

    Attributes
    ----------
    eigenvalue : float
        Of the symmetrized Hessian, force / length (and per mass).
    multiplicity : int
    splitting : float
        Largest minus smallest eigenvalue of the Hessian in the space of these modes.
    """

    eigenvalue: float
    multiplicity: int
    splitting: float


@dataclass(frozen=True)
class Degeneracies:
    """Splittings of vibrational modes that symmetry makes degenerate.

    Attributes
    ----------
    clusters : tuple of Cluster
        All modes, by ascending eigenvalue, those of multiplicity 1 included.
    scale : float
        RMS eigenvalue.
    forbidden : float
        RMS eigenvalue of the Hessian minus its symmetrized form, over ``scale``: everything that symmetry forbids.
    antisymmetric : float
        RMS element of the antisymmetric part of the Hessian over that of the symmetric part; it is left out otherwise.
    uncertainty : float
        Of the finite differences, over ``scale``: an upper bound for step size and rounding.
    n_operations : int
    """

    clusters: tuple[Cluster, ...]
    scale: float
    forbidden: float
    antisymmetric: float
    uncertainty: float
    n_operations: int

    @property
    def relative(self) -> float:
        """Largest splitting over the RMS eigenvalue; infinite where nothing is degenerate."""
        largest = max((c.splitting for c in self.clusters if c.multiplicity > 1), default=math.inf)
        return largest / self.scale if math.isfinite(largest) and 0.0 < self.scale < math.inf else math.inf

    def __str__(self) -> str:
        listed = ", ".join(f"{c.eigenvalue:.4g} (x{c.multiplicity})" for c in self.clusters)
        return (
            f"degeneracies: largest splitting {self.relative:.3g} of the RMS eigenvalue {self.scale:.3g} (finite "
            f"differences: {self.uncertainty:.1g}, {self.n_operations} operations); eigenvalues {listed}"
        )


def measure_degeneracies(
    f: Model,
    batch: Data,
    *,
    forces: str = "forces",
    step: float | None = None,
    masses: Tensor | None = None,
    tolerance: float = 1e-6,
) -> Degeneracies:
    r"""Splitting of vibrational modes that the symmetry of a structure makes degenerate.

    The Hessian H, by central differences of the forces with one step of Richardson extrapolation, is projected onto
    the matrices that commute with all symmetry operations, :math:`H_G = \frac{1}{|G|} \sum_g T_g H T_g^T`. Within the
    space of every cluster of equal eigenvalues of :math:`H_G`, an exact model has equal eigenvalues of H; their spread
    is the splitting. No minimum of the energy is needed. Eigenvalues that are equal for another reason, such as those
    of translations, form a cluster as well, and are equal in an exact model for that reason.

    Parameters
    ----------
    f : callable
    batch : Data
        One structure. In a periodic one, all images of an atom move together (modes at the zone center of the cell).
    forces : str
        Name of the output, (n_atoms, 3).
    step : float, optional
        Unit of the positions; by default 1e-3 in float64 and 5e-2 in float32.
    masses : Tensor of shape (n_atoms,), optional
        By default all 1. Atoms of different mass are different atoms.
    tolerance : float
        Of the symmetry operations, in the unit of the positions.

    Raises
    ------
    InvalidInputError
        More than one structure, or one without symmetry.
    BackboneOutputError
        No such forces.
    """
    batch = validate(batch)
    n_atoms, pos = len(batch[keys.POS]), batch[keys.POS]
    weights = torch.ones(n_atoms, dtype=torch.float64) if masses is None else masses.to("cpu", torch.float64)
    if weights.shape != (n_atoms,) or not bool((weights > 0.0).all()):
        raise InvalidInputError(f"masses: expected {n_atoms} positive numbers, got {tuple(weights.shape)}")
    ideal, operations = idealized(replace(batch, masses=weights.to(pos.device)), tolerance=tolerance)
    if len(operations) < 2:
        raise InvalidInputError("measure_degeneracies: expected a structure with symmetry, got one without")
    ideal = replace(ideal, masses=batch.get("masses"))
    h = step if step is not None else (1e-3 if pos.dtype == torch.float64 else 5e-2)
    root = weights.sqrt().repeat_interleave(3)
    first, second, third = (_hessian(f, ideal, h / 2**k, forces) / (root[:, None] * root) for k in range(3))
    coarse, full = (4 * second - first) / 3, (4 * third - second) / 3
    hessian, skew = 0.5 * (full + full.T), 0.5 * (full - full.T)
    if not bool(torch.isfinite(full).all()):
        cluster = Cluster(math.nan, 3 * n_atoms, math.inf)
        return Degeneracies((cluster,), math.nan, math.inf, math.inf, math.inf, len(operations))
    projected = _commuting(hessian, operations)
    values, modes = torch.linalg.eigh(projected)
    scale = float(values.square().mean().sqrt())
    starts = [k for k in range(len(values)) if k == 0 or float(values[k] - values[k - 1]) > _DEGENERATE * scale]
    clusters = []
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        space = modes[:, start:end]
        inside = torch.linalg.eigvalsh(space.T @ hessian @ space)
        clusters.append(Cluster(float(values[start:end].mean()), end - start, float(inside[-1] - inside[0])))

    def relative(matrix: Tensor, size: float) -> float:
        return float(matrix.norm()) / size if size > 0.0 else math.inf

    size = scale * math.sqrt(len(values))
    return Degeneracies(
        tuple(clusters),
        scale,
        relative(hessian - projected, size),
        relative(skew, float(hessian.norm())),
        relative(full - coarse, size),
        len(operations),
    )


def _hessian(f: Model, batch: Batch, h: float, name: str) -> Tensor:
    """-dF/dx by central differences: Tensor of shape (3 n_atoms, 3 n_atoms), column by displaced coordinate."""
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    n_atoms = len(pos)
    steps = h * torch.eye(3 * n_atoms, dtype=torch.float64).reshape(-1, n_atoms, 3)
    positions = pos + torch.cat([steps, -steps])
    plus, minus = forces_at(f, batch, positions, name).flatten(1).chunk(2)
    # The steps that were really made: in float32 they are rounded.
    made = positions.to(batch[keys.POS].dtype).to(torch.float64).reshape(2, 3 * n_atoms, -1)
    lengths = torch.diagonal(made[0] - made[1])
    return ((minus - plus) / lengths[:, None]).T


def forces_at(f: Model, batch: Batch, positions: Tensor, name: str = "forces") -> Tensor:
    """Forces of a batch at many positions, as many of them in one call as a model should be asked for.

    Parameters
    ----------
    f : callable
    batch : Batch
        Validated; its neighbor list is built anew where there is one.
    positions : Tensor of shape (n, n_atoms, 3)
    name : str
        Of the output.

    Returns
    -------
    Tensor of shape (n, n_atoms, 3), float64, on the CPU
    """
    n_structures, n_atoms = batch[keys.PTR].shape[0] - 1, positions.shape[1]
    parts = positions.split(max(1, min(_MAX_STRUCTURES // n_structures, _MAX_ATOMS // n_atoms)))
    copies = {n: batched([batch] * n) for n in {len(part) for part in parts}}
    out = []
    for part in parts:
        moved = moved_to(copies[len(part)], part.reshape(-1, 3).to(batch[keys.POS].device))
        result = f(copied(moved))
        shape = tuple(result[name].shape) if name in result else None
        if shape != (len(part) * n_atoms, 3):
            raise BackboneOutputError(f"{name}: expected shape {(len(part) * n_atoms, 3)}, got {shape}")
        out.append(result[name].detach().to("cpu", torch.float64).reshape(part.shape))
    return torch.cat(out)


def _commuting(hessian: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Mean of T_g H T_g^T, again and again until nothing changes: the operations may be a part of a group only."""
    n_atoms = len(hessian) // 3
    blocks = hessian.reshape(n_atoms, 3, n_atoms, 3)
    for _ in range(1000):
        mean = torch.zeros_like(blocks)
        for operation in operations:
            turned = torch.einsum("ab,ibjd,cd->iajc", operation.matrix, blocks, operation.matrix)
            back = torch.argsort(operation.permutation)
            mean += turned[back][:, :, back] / len(operations)
        change = float((mean - blocks).norm())
        blocks = mean
        if not change > 1e-14 * float(blocks.norm()):
            break
    matrix = blocks.reshape(3 * n_atoms, 3 * n_atoms)
    return 0.5 * (matrix + matrix.T)
