r"""Copies that symmetry makes equal, evaluated once.

In a symmetric environment different frames give the same local coordinates up to the order of the neighbors: the 24
frames of a cubic lattice, a frame and its mirror image in a planar molecule, the n copies about the axis of a linear
one, the equivalent atoms of a crystal. For copies m of one class, with weights :math:`w_m`, orders :math:`P_m` and
local coordinates :math:`z_m`,

.. math:: \sum_m w_m f(z_m) = W f(\bar z), \qquad W = \sum_m w_m, \quad
          \bar z = \sum_m \frac{w_m}{W} P_m^{-1} z_m,

where the :math:`z_m` agree, and so do the first derivatives with respect to every :math:`z_m` and :math:`w_m`; second
derivatives do not. Classes are found by a number per copy that does not depend on the order of its rows, and verified
row by row: what only nearly agrees is evaluated on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.copies import pack
from symmetrize.evaluation import Source, turned
from symmetrize.ops.ragged import gather_rows, offsets, positions_in_rows, segment_max, segment_sum

# Fields of a batch whose rows are compared, or that do not differ inside a structure.
_KNOWN = frozenset(
    {
        keys.POS,
        keys.Z,
        keys.BATCH,
        keys.PTR,
        keys.CELL,
        keys.PBC,
        keys.EDGE_INDEX,
        keys.EDGE_VEC,
        keys.EDGE_CUTOFF,
        keys.CELL_SHIFT,
        keys.CENTER_MASK,
        keys.CHARGE,
        keys.SPIN_MULTIPLICITY,
    }
)
#: Numbers in a fingerprint: more make it rarer that copies that differ are gathered for one call.
N_NUMBERS = 4
#: Weight of what was derived from the geometry, and may be steep, when copies are compared.
DERIVED = 0.125
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, eq=False)
class Table:
    """What tells copies apart: their points in local coordinates.

    Attributes
    ----------
    features : Tensor of shape (n_rows, n_features), float64
    label : Tensor of shape (n_rows,), int64
    copy : Tensor of shape (n_rows,)
        The copy that each is part of.
    n_copies : int
    edge_features, edge_label : Tensor of shape (n_copied_edges, n), (n_copied_edges,), optional
        What is known of edges that are no rows of their own.
    """

    features: Tensor
    label: Tensor
    copy: Tensor
    n_copies: int
    edge_features: Tensor | None = None
    edge_label: Tensor | None = None

    def projection(self, n_numbers: int) -> Tensor:
        """Numbers per row by which rows are told apart: Tensor of shape (n_rows, n_numbers)."""
        generator = torch.Generator().manual_seed(5)
        directions = torch.randn(N_NUMBERS, self.features.shape[1], generator=generator, dtype=torch.float64)
        directions = torch.nn.functional.normalize(directions, dim=1)[:n_numbers].T
        return 8.0 * self.features @ directions.to(self.features.device)

    def fingerprint(self, n_numbers: int) -> Tensor:
        """Numbers per copy that do not depend on the order of its rows: Tensor of shape (n_copies, n_numbers)."""
        phase = torch.remainder(torch.remainder(self.label, 1000003).to(torch.float64) * _GOLDEN, 1.0) * (2.0 * math.pi)
        return segment_sum(torch.cos(self.projection(n_numbers) + phase[:, None]), self.copy, self.n_copies)


@dataclass(frozen=True, eq=False)
class Merge:
    """How the copies of a chunk reduce to one of each class.

    Attributes
    ----------
    chosen : Tensor of shape (n_classes,)
        Copies that stand for their class.
    copies : Copies
        The chosen ones.
    copy, atom, edge : Tensor of shape (n_copies,), (n_copied_atoms,), (n_copied_edges,)
        The chosen copy, atom and edge in ``copies`` that each one corresponds to.
    """

    chosen: Tensor
    copies: Copies
    copy: Tensor
    atom: Tensor
    edge: Tensor

    def rows(self, level: str) -> Tensor | None:
        """Correspondence at a level, None where there is none."""
        return self.atom if level == "atom" else self.edge if level == "edge" else None

    def output_rows(self, copies: Copies, per: str) -> Tensor:
        """Row of an output of the chosen copies that each row of an output of all copies equals."""
        if per == "structure":
            return self.copy
        number = torch.cumsum(self.copies.center.to(torch.int64), dim=0) - 1
        return number[self.atom[copies.center]]


def candidates(backbone: Backbone, source: Source, stars: bool) -> Tensor | None:
    """Structures in which copies can be compared: Tensor of shape (n_structures,), bool; None for none.

    Stars are compared edge by edge; other copies by the positions of their atoms, which define them only where there
    are no periodic images.
    """
    batch = source.batch
    if backbone.vectors or not _has_known_fields(batch) or any(module.training for module in backbone.modules()):
        return None
    if not all(name in source.levels for name in (*source.inputs, *source.constants)):
        # Of what was prepared: it may be anything, such as an order of the points.
        return None
    if stars:
        return torch.ones_like(batch[keys.PBC][:, 0])
    finite = ~batch[keys.PBC].any(dim=1)
    if not source.shared:
        finite = finite & (batch[keys.CELL] == 0.0).flatten(1).all(dim=1)
    return finite if bool(finite.any()) else None


def symmetric_owners(batch: Data, scope: str, comparable: Tensor, tolerance: float) -> Tensor:
    """Owners whose frames may have equal copies: what a symmetry of the environment, or an equal one, makes necessary.

    With v_1, v_2, v_3 sums over an environment of vectors times functions of their lengths: a symmetry other than the
    identity leaves all three unchanged, so that they lie in a plane or on a line, and det(v_1, v_2, v_3) = 0.
    Environments that are equal up to rotations have the same distances. Both are cheap to look at, once per owner.

    Parameters
    ----------
    batch : Data
    scope : str
    comparable : Tensor of shape (n_structures,)
        bool, see `candidates`.
    tolerance : float
        Largest difference of coordinates that are meant to be equal.

    Returns
    -------
    Tensor of shape (n_owners,), bool
    """
    structure, species = batch[keys.BATCH], batch.get(keys.Z)
    if scope == "atom":
        neighbor, owner = batch[keys.EDGE_INDEX]
        vectors = batch[keys.EDGE_VEC].detach().to(torch.float64)
        n_owners = structure.shape[0]
    else:
        neighbor = owner = structure
        n_owners = batch[keys.PTR].shape[0] - 1
        points = batch[keys.POS].detach().to(torch.float64)
        counts = torch.diff(batch[keys.PTR]).to(torch.float64)
        vectors = points - (segment_sum(points, structure, n_owners) / counts[:, None])[structure]
        neighbor = torch.arange(structure.shape[0], device=structure.device)
    label = torch.zeros_like(neighbor) if species is None else species[neighbor]
    phase = torch.remainder(label.to(torch.float64) * _GOLDEN, 1.0) * (2.0 * math.pi)
    length = torch.linalg.vector_norm(vectors, dim=1)
    waves = torch.stack([torch.cos(a * length + phase) for a in (0.0, 1.0, 1.9, 2.7)], dim=1)
    moments = segment_sum(waves[:, 1:, None] * vectors[:, None, :], owner, n_owners)
    size = segment_sum(torch.ones_like(length), owner, n_owners)
    largest = torch.linalg.vector_norm(moments, dim=2).amax(dim=1)
    symmetric = torch.linalg.det(moments).abs() <= 8.0 * tolerance * size * largest**2
    if scope == "structure":
        return comparable & symmetric
    kind = structure if species is None else structure * 1009 + species
    # Their number, too: alone, an atom is as good as any other of its species.
    fingerprint = torch.cat([segment_sum(waves, owner, n_owners), size[:, None]], dim=1)
    number = classes(fingerprint, kind, 16.0 * tolerance)
    return comparable[structure] & (symmetric | (torch.bincount(number) > 1)[number])


def _has_known_fields(batch: Data) -> bool:
    """Whether all that a backbone can read is compared, or is the same for all copies of a structure."""
    n_structures = batch[keys.PTR].shape[0] - 1
    for name in batch.keys():
        value = batch[name]
        number = isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.shape == (n_structures,))
        if name not in _KNOWN and not number:
            return False
    return True


def coordinate_sizes(batch: Data) -> Tensor:
    """Largest coordinate or periodic lattice vector, which rounding is relative to: Tensor of shape (n_structures,)."""
    cells = torch.where(batch[keys.PBC][:, :, None], batch[keys.CELL].detach(), torch.zeros_like(batch[keys.CELL]))
    farthest = segment_max(batch[keys.POS].detach().abs().amax(dim=1), batch[keys.BATCH], cells.shape[0], 0.0)
    return torch.maximum(farthest, cells.abs().flatten(1).amax(dim=1)).clamp(min=1.0).to(torch.float64)


def tabulate(
    source: Source,
    local: dict[str, Tensor],
    copies: Copies,
    rotations: Tensor,
    origins: Tensor,
    size: Tensor,
    stars: bool,
) -> Table:
    """The points of copies in local coordinates, relative to ``size``, with everything else that is known of them.

    ``size`` is that of the structure of each copy, see `coordinate_sizes`.
    """
    n_copies = rotations.shape[0]
    if not stars and keys.POS not in local:
        # Not an input of what reads edges, but what its edges follow from.
        pos = source.batch[keys.POS].detach()[copies.atom] - origins.detach()[copies.atom_copy]
        local = {**local, keys.POS: turned(pos, rotations.detach().to(pos.dtype), copies.atom_copy)}
    atoms, atom_label = _level(source, local, copies, "atom")
    atom_label = _mixed(atom_label, copies.center)
    species = source.batch.get(keys.Z)
    if species is not None:
        atom_label = _mixed(atom_label, species[copies.atom])
    atoms = atoms / size[copies.atom_copy, None]
    edges, edge_label = _level(source, local, copies, "edge")
    edges = edges / size[copies.edge_copy, None]
    if not stars:
        return Table(atoms, atom_label, copies.atom_copy, n_copies, edges, edge_label)
    if species is not None:
        edge_label = _mixed(edge_label, species[source.batch[keys.EDGE_INDEX][0, copies.edge]])
    width = max(atoms.shape[1], edges.shape[1])
    atoms, edges = (torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (atoms, edges))
    label = torch.cat([-1 - atom_label, edge_label])
    return Table(torch.cat([atoms, edges]), label, torch.cat([copies.atom_copy, copies.edge_copy]), n_copies)


def _level(source: Source, local: dict[str, Tensor], copies: Copies, level: str) -> tuple[Tensor, Tensor]:
    """Inputs of a level side by side, and its integers in one number."""
    rows = copies.rows(level)
    n = 0 if rows is None else rows.shape[0]
    device = source.batch[keys.POS].device
    parts = [torch.zeros(n, 0, dtype=torch.float64, device=device)]
    label = torch.zeros(n, dtype=torch.int64, device=device)
    for name, value in local.items():
        if not (level == "atom" if name == keys.POS else source.levels.get(name) == level):
            continue
        columns = value.detach().to(torch.float64).reshape(n, math.prod(value.shape[1:]))
        if name not in (keys.POS, keys.EDGE_VEC):
            # Functions of distances, which may be steep: of bounded size, and compared less strictly.
            columns = DERIVED * columns / (1.0 + columns.abs())
        parts.append(columns)
    for name, value in source.constants.items():
        if source.levels.get(name) == level and rows is not None:
            for column in value.index_select(0, rows).reshape(n, math.prod(value.shape[1:])).unbind(dim=1):
                label = _mixed(label, column)
    return torch.cat(parts, dim=1), label


def _mixed(label: Tensor, value: Tensor) -> Tensor:
    """A number that depends on both (a step of a linear congruential generator, modulo 2^64)."""
    return (label + value.to(torch.int64) + 1) * 6364136223846793005 + 1442695040888963407


def classes(fingerprint: Tensor, kind: Tensor, tolerance: float) -> Tensor:
    """Numbers of the classes of copies of one kind with equal fingerprints: Tensor of shape (n_copies,)."""
    number = kind
    for column in range(fingerprint.shape[1]):
        value = fingerprint[:, column]
        order = torch.argsort(value)
        order = order[torch.argsort(number[order], stable=True)]
        apart = (value[order].diff() > tolerance) | (number[order].diff() != 0)
        finer = torch.empty_like(number)
        finer[order] = torch.cat([torch.zeros_like(order[:1]), torch.cumsum(apart.to(torch.int64), dim=0)])
        number = finer
    return number


def pack_classes(number: Tensor, sizes: Tensor, limit: int, members: int) -> Iterator[Tensor]:
    """Indices of copies, call by call: classes together, one of each counted, and at most ``members`` times the limit.

    Parameters
    ----------
    number : Tensor of shape (n_copies,)
        Class of each copy.
    sizes : Tensor of shape (n_copies,)
        Atoms of each copy.
    limit, members : int
    """
    order = torch.argsort(number, stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = number[order].diff() != 0
    begin = torch.cummax(torch.where(new, torch.arange(order.shape[0], device=order.device), 0), dim=0).values
    # Classes that are too large for one call are cut.
    rank = torch.arange(order.shape[0], device=order.device) - begin
    new = new | (rank % (members * sizes[order].clamp(min=limit) // sizes[order]) == 0)
    starts = new.nonzero()[:, 0]
    counts = torch.diff(starts, append=starts.new_tensor([order.shape[0]]))
    load = torch.maximum(sizes[order[starts]], -(-sizes[order[starts]] * counts // members))
    ptr = offsets(counts)
    for some in pack(load, limit):
        yield order[gather_rows(ptr, some)[0]]


def correspondence(
    table: Table, number: Tensor, copies: Copies, tolerance: float, stars: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Verified classes of copies, and which rows correspond.

    Parameters
    ----------
    table : Table
    number : Tensor of shape (n_copies,)
        Supposed class of each copy.
    copies : Copies
    tolerance : float
        Largest difference of features, relative to the size of the structure.
    stars : bool

    Returns
    -------
    representative : Tensor of shape (n_copies,)
        The copy that stands for each one.
    atom, edge : Tensor of shape (n_copied_atoms,), (n_copied_edges,)
        Atom and edge of the representative that each one corresponds to.
    """
    device, n_copies = number.device, table.n_copies
    itself = torch.arange(n_copies, device=device)
    first = torch.full((int(number.max()) + 1,), n_copies, dtype=torch.int64, device=device)
    representative = first.scatter_reduce(0, number, itself, "amin")[number]

    order = torch.argsort(table.projection(1)[:, 0])
    order = order[torch.argsort(table.copy[order], stable=True)]
    counts = torch.bincount(table.copy, minlength=n_copies)
    starts = offsets(counts)
    copy = table.copy[order]
    partner = starts[representative[copy]] + positions_in_rows(copy, n_copies)
    partner = partner.clamp(max=max(0, copy.shape[0] - 1))
    features, label = table.features[order], table.label[order]
    unlike = (features - features[partner]).abs().amax(dim=1) > tolerance if features.shape[1] else label != label
    unlike = unlike | (label != label[partner])
    different = segment_sum(unlike.to(torch.int64), copy, n_copies) > 0
    different = different | (counts != counts[representative])
    representative = torch.where(different, itself, representative)

    matched = torch.empty_like(order)
    same = (representative == itself)[copy]
    matched[order] = torch.where(same, order, order[partner])
    if not stars:
        edge, different = _matching_edges(table, copies, representative, matched, tolerance)
        representative = torch.where(different, itself, representative)
        alone = (representative == itself)[copies.atom_copy]
        matched = torch.where(alone, torch.arange(alone.shape[0], device=device), matched)
        alone = (representative == itself)[copies.edge_copy]
        return representative, matched, torch.where(alone, torch.arange(alone.shape[0], device=device), edge)
    # Of a star the center is one row, its edges are others, behind the centers of all.
    return representative, representative, matched[n_copies:] - n_copies


def _matching_edges(
    table: Table, copies: Copies, representative: Tensor, atom: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Edges between the atoms that correspond to the ends of each edge, and copies whose edges are others.

    Rounding decides whether there is an edge between atoms whose distance is the cutoff.
    """
    n_atoms, n_copies = atom.shape[0], table.n_copies
    key = copies.target * n_atoms + copies.source
    order = torch.argsort(key)
    wanted = atom[copies.target] * n_atoms + atom[copies.source]
    place = torch.searchsorted(key[order], wanted).clamp(max=max(0, key.shape[0] - 1))
    edge = order[place]
    counts = torch.bincount(copies.edge_copy, minlength=n_copies)
    unlike = key[edge] != wanted
    if table.edge_features is not None and table.edge_features.shape[1]:
        moved = (table.edge_features - table.edge_features[edge]).abs()
        # Vectors follow from the positions of their ends, to a few times the rounding.
        unlike = unlike | (moved.amax(dim=1) > 4.0 * tolerance)
    if table.edge_label is not None:
        unlike = unlike | (table.edge_label != table.edge_label[edge])
    missing = segment_sum(unlike.to(torch.int64), copies.edge_copy, n_copies)
    return edge, (missing > 0) | (counts != counts[representative])


def reduced(representative: Tensor, copies: Copies, atom: Tensor, edge: Tensor, smaller: Copies) -> Merge:
    """The merge of copies, given the copies of the representatives alone."""
    n_copies = representative.shape[0]
    itself = torch.arange(n_copies, device=representative.device)
    chosen = (representative == itself).nonzero()[:, 0]
    slot = torch.empty_like(itself)
    slot[chosen] = torch.arange(chosen.shape[0], device=chosen.device)
    copy = slot[representative]

    def moved(rows: Tensor, of_copy: Tensor, of_smaller: Tensor) -> Tensor:
        before = offsets(torch.bincount(of_copy, minlength=n_copies))
        after = offsets(torch.bincount(of_smaller, minlength=chosen.shape[0]))
        return rows - before[representative[of_copy]] + after[copy[of_copy]]

    return Merge(
        chosen,
        smaller,
        copy,
        moved(atom, copies.atom_copy, smaller.atom_copy),
        moved(edge, copies.edge_copy, smaller.edge_copy),
    )


def averaged(
    source: Source, local: dict[str, Tensor], copies: Copies, weights: Tensor, merged: Merge
) -> dict[str, Tensor]:
    """Inputs of the chosen copies: weighted means over their classes, of equal numbers."""
    n_classes = merged.chosen.shape[0]
    share = weights / segment_sum(weights, merged.copy, n_classes)[merged.copy]
    sizes = {"atom": merged.copies.atom.shape[0], "edge": merged.copies.edge.shape[0]}
    of_copy = {"atom": copies.atom_copy, "edge": copies.edge_copy}
    out = {}
    for name, value in local.items():
        level = source.levels.get(name, "")
        rows = merged.rows(level)
        if rows is not None:
            factor = share.index_select(0, of_copy[level]).reshape((-1,) + (1,) * (value.dim() - 1))
            out[name] = segment_sum(value * factor.to(value.dtype), rows, sizes[level])
        else:
            out[name] = value.index_select(0, merged.chosen) if level == "structure" else value
    return out
