"""What is done to a batch before it is evaluated again: group elements, permutations, translations, lattices.

Every function returns a new batch and leaves the given one alone. Positions are rows: ``pos @ g.T``. Group algebra is
done in float64, results have the dtype of the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import assemble, replace, validate, with_neighbors
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import gather_rows, offsets
from symmetrize.ops.rotations import about_axis, random_rotations
from symmetrize.representations import OutputSpec, check_group

_EDGE_FIELDS = (keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_CUTOFF, keys.EDGE_VEC)
_KNOWN = (keys.POS, keys.X, keys.Z, keys.BATCH, keys.PTR, keys.CELL, keys.PBC, keys.CENTER_MASK, *_EDGE_FIELDS)
_NOT_PER_ATOM = (keys.PTR, keys.CELL, keys.PBC, *_EDGE_FIELDS)


class Element(NamedTuple):
    """A named element of O(3): ``matrix`` is (3, 3), float64, and acts on column vectors."""

    name: str
    matrix: Tensor


def random_elements(n: int, generator: torch.Generator, *, group: str = "O(3)") -> list[Element]:
    """Haar-random elements; for O(3) every second one is improper, so that two already hold both kinds."""
    both = check_group(group) == "O(3)"
    proper = random_rotations(n, generator)
    return [
        Element(f"random improper {k}", -g) if both and k % 2 else Element(f"random proper {k}", g)
        for k, g in enumerate(proper)
    ]


def special_elements(*, group: str = "O(3)") -> list[Element]:
    """Identity, 90 and 180 degrees about the axes and a diagonal (exact entries), 120 degrees about the cube's
    diagonal, rotations near the identity; for O(3) also the inversion, mirrors and a rotation-reflection."""
    improper = check_group(group) == "O(3)"

    def exact(name: str, rows: Sequence[Sequence[float]]) -> Element:
        return Element(name, torch.tensor(rows, dtype=torch.float64))

    out = [
        exact("identity", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        exact("90 degrees about x", [[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
        exact("90 degrees about y", [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]),
        exact("90 degrees about z", [[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
        exact("180 degrees about x", [[1, 0, 0], [0, -1, 0], [0, 0, -1]]),
        exact("180 degrees about y", [[-1, 0, 0], [0, 1, 0], [0, 0, -1]]),
        exact("180 degrees about z", [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
        exact("180 degrees about x + y", [[0, 1, 0], [1, 0, 0], [0, 0, -1]]),
        exact("120 degrees about x + y + z", [[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    ]
    axis = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    out += [Element(f"near identity ({angle:g})", about_axis(axis, angle)) for angle in (1e-3, 1e-8)]
    out += [Element("near 180 degrees (1e-8)", about_axis(axis, math.pi - 1e-8))]
    if improper:
        out += [
            exact("inversion", [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]),
            exact("mirror x", [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]),
            exact("mirror y", [[1, 0, 0], [0, -1, 0], [0, 0, 1]]),
            exact("mirror z", [[1, 0, 0], [0, 1, 0], [0, 0, -1]]),
            exact("mirror x - y", [[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
            exact("rotation-reflection by 90 degrees about z", [[0, -1, 0], [1, 0, 0], [0, 0, -1]]),
        ]
    return out


def group_elements(generator: torch.Generator, *, group: str = "O(3)", n_random: int = 6) -> list[Element]:
    """All `special_elements` and ``n_random`` `random_elements`."""
    return special_elements(group=group) + random_elements(n_random, generator, group=group)


def transform(batch: Data, element: Tensor | Element, vectors: dict[str, str] | None = None) -> Batch:
    """Apply an element of O(3) to a batch: positions, cell and declared fields.

    Neighbor lists stay (atoms and lattice translations are the same), ``edge_vec`` is left out.

    Parameters
    ----------
    batch : Data
    element : Tensor of shape (3, 3), or Element
    vectors : dict of str to str, optional
        Further geometric fields, as field name -> e3nn irreps.
    """
    g = (element.matrix if isinstance(element, Element) else element).to(batch[keys.POS].device, torch.float64)

    def turned(rows: Tensor) -> Tensor:
        return (rows.detach().to(torch.float64) @ g.T).to(rows.dtype)

    fields: dict[str, Any] = {keys.POS: turned(batch[keys.POS]), keys.EDGE_VEC: None}
    if batch.get(keys.CELL) is not None:
        fields[keys.CELL] = turned(batch[keys.CELL])
    for name, irreps in (vectors or {}).items():
        value = batch[name]
        every = g.expand(value.shape[0], 3, 3)
        fields[name] = OutputSpec(irreps).rotate(value.detach().to(torch.float64), every).to(value.dtype)
    return replace(batch, **fields)


def permute(batch: Data, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Reorder the atoms within every structure, never by the identity where there are two or more.

    Edges are relabelled, shuffled, and sorted by center. A field counts as per-atom when its first axis is as long as
    ``pos`` and `symmetrize.keys` does not say otherwise.

    Returns
    -------
    permuted : Batch
    permutation : Tensor of shape (n_atoms,)
        Old number of each new atom.
    """
    batch = validate(batch)
    parts = []
    for first, last in _ranges(batch):
        order = torch.randperm(last - first, generator=generator)
        while last - first > 1 and torch.equal(order, torch.arange(last - first)):
            order = torch.randperm(last - first, generator=generator)
        parts.append(order + first)
    permutation = torch.cat(parts).to(batch[keys.POS].device)
    fields: dict[str, Any] = {name: batch[name][permutation] for name in _per_atom(batch)}
    if batch.get(keys.EDGE_INDEX) is not None:
        edges = torch.argsort(permutation)[batch[keys.EDGE_INDEX]]
        shuffled = torch.randperm(edges.shape[1], generator=generator).to(edges.device)
        order = shuffled[torch.argsort(edges[1, shuffled], stable=True)]
        fields[keys.EDGE_INDEX] = edges[:, order]
        for name in (keys.CELL_SHIFT, keys.EDGE_VEC):
            if batch.get(name) is not None:
                fields[name] = batch[name][order]
    return replace(batch, **fields), permutation


def translate(batch: Data, generator: torch.Generator, size: float = 3.0) -> Batch:
    """Shift every structure by its own random vector, of ``size`` times a standard normal per component."""
    batch = validate(batch)
    shift = size * torch.randn(batch[keys.PTR].shape[0] - 1, 3, dtype=torch.float64, generator=generator)
    pos = batch[keys.POS].detach()
    moved = pos.to(torch.float64) + shift.to(pos.device)[batch[keys.BATCH]]
    return replace(batch, **{keys.POS: moved.to(pos.dtype), keys.EDGE_VEC: None})


def wrap(batch: Data, generator: torch.Generator | None = None) -> Batch:
    """Move atoms by lattice vectors: into the cell, or with a generator by random ones (-2 to 2) along each periodic
    direction. ``cell_shift`` is kept consistent."""
    batch = validate(batch)
    pos, structure = batch[keys.POS].detach(), batch[keys.BATCH]
    cell, pbc = batch[keys.CELL].detach().to(torch.float64), batch[keys.PBC]
    if generator is None:
        from symmetrize.ops.neighbors import complete_cell

        boxes = torch.stack([complete_cell(c, p) for c, p in zip(cell.cpu(), pbc.cpu(), strict=True)]).to(pos.device)
        fraction = torch.linalg.solve(boxes[structure].transpose(1, 2), pos.to(torch.float64))
        steps = -torch.floor(fraction).to(torch.int64)
    else:
        steps = torch.randint(-2, 3, pos.shape, generator=generator).to(pos.device)
    steps = steps * pbc[structure]
    moved = pos.to(torch.float64) + torch.einsum("na,nab->nb", steps.to(torch.float64), cell[structure])
    fields: dict[str, Any] = {keys.POS: moved.to(pos.dtype), keys.EDGE_VEC: None}
    if batch.get(keys.EDGE_INDEX) is not None and batch.get(keys.CELL_SHIFT) is not None:
        neighbor, center = batch[keys.EDGE_INDEX]
        shift = batch[keys.CELL_SHIFT]
        fields[keys.CELL_SHIFT] = shift + (steps[center] - steps[neighbor]).to(shift.dtype)
    return replace(batch, **fields)


def change_lattice(batch: Data, generator: torch.Generator) -> Batch:
    """Other lattice vectors for the same lattice: a random unimodular combination of the periodic ones.

    Left-handed cells occur. ``cell_shift`` is kept consistent; structures without periodicity are unchanged.
    """
    batch = validate(batch)
    cell, pbc = batch[keys.CELL].detach().to(torch.float64), batch[keys.PBC]
    changes = []
    for periodic in pbc.tolist():
        matrix = torch.eye(3, dtype=torch.float64)
        axes = [axis for axis in range(3) if periodic[axis]]
        for a in axes:
            for b in axes:
                if a != b:
                    matrix[a] += float(torch.randint(-1, 2, (), generator=generator)) * matrix[b]
        if axes:
            order = torch.tensor(axes)[torch.randperm(len(axes), generator=generator)]
            matrix[axes] = matrix[order]
            matrix[axes[0]] *= -1.0  # never the identity, and both handednesses
        changes.append(matrix)
    change = torch.stack(changes).to(cell.device)
    fields: dict[str, Any] = {keys.CELL: (change @ cell).to(batch[keys.CELL].dtype), keys.EDGE_VEC: None}
    shift = batch.get(keys.CELL_SHIFT)
    if batch.get(keys.EDGE_INDEX) is not None and shift is not None:
        inverse = torch.linalg.inv(change).round()[batch[keys.BATCH][batch[keys.EDGE_INDEX][1]]]
        fields[keys.CELL_SHIFT] = torch.einsum("ea,eab->eb", shift.to(torch.float64), inverse).to(shift.dtype)
    return replace(batch, **fields)


def supercell(batch: Data, repeats: Sequence[int] = (2, 1, 1)) -> tuple[Batch, Tensor, Tensor]:
    """Repeat every structure along its periodic directions.

    Returns
    -------
    repeated : Batch
        Neighbor lists are built anew where there were any.
    origin : Tensor of shape (n_repeated_atoms,)
        Atom of ``batch`` that each atom is an image of.
    factor : Tensor of shape (n_structures,)
        How many copies of itself each structure holds now.
    """
    batch = validate(batch)
    cells, pbc, device = batch[keys.CELL].detach(), batch[keys.PBC], batch[keys.POS].device
    pos, origin, counts, boxes, factors = [], [], [], [], []
    for s, (first, last) in enumerate(_ranges(batch)):
        n = torch.where(pbc[s].cpu(), torch.tensor(list(repeats)), torch.ones(3, dtype=torch.int64)).to(device)
        images = torch.cartesian_prod(*[torch.arange(int(k), device=device) for k in n]).to(torch.float64)
        shift = images @ cells[s].to(torch.float64)
        rows = batch[keys.POS][first:last].detach().to(torch.float64)
        pos.append((rows[None] + shift[:, None]).reshape(-1, 3).to(cells.dtype))
        origin.append(torch.arange(first, last, device=device).repeat(len(images)))
        counts.append(len(origin[-1]))
        boxes.append(cells[s] * n[:, None].to(cells.dtype))
        factors.append(len(images))
    source = torch.cat(origin)
    fields = {name: batch[name][source] for name in _per_atom(batch) if name not in (keys.POS, keys.BATCH)}
    others = {name: batch[name] for name in batch.keys() if name not in (*_per_atom(batch), *_NOT_PER_ATOM)}
    out = assemble(
        pos=torch.cat(pos), counts=torch.tensor(counts), **fields, **others, cell=torch.stack(boxes), pbc=pbc.clone()
    )
    out = _rebuilt(out, batch)
    return out, source, torch.tensor(factors, device=device)


def displaced(batch: Data, generator: torch.Generator, size: float = 0.05) -> Batch:
    """Random strain and displacements of relative size ``size``, which break every symmetry of a structure.

    The strain is ``size / 2`` times a symmetric standard normal matrix, the displacements are ``size`` times a
    standard normal times the shortest distance in the structure. Further floating-point fields, such as vectors, are
    multiplied by one plus ``size`` times a standard normal. Neighbor lists are built anew where there were any.
    """
    batch = validate(batch)
    pos, n_structures = batch[keys.POS].detach().to(torch.float64), batch[keys.PTR].shape[0] - 1
    noise = torch.randn(n_structures, 3, 3, dtype=torch.float64, generator=generator).to(pos.device)
    strain = torch.eye(3, dtype=torch.float64, device=pos.device) + 0.25 * size * (noise + noise.transpose(1, 2))
    lengths = shortest_distances(batch)
    structure = batch[keys.BATCH]
    step = torch.randn(pos.shape, dtype=torch.float64, generator=generator).to(pos.device)
    moved = torch.einsum("na,nab->nb", pos, strain[structure]) + size * lengths[structure][:, None] * step
    out = moved_to(batch, moved, batch[keys.CELL].detach().to(torch.float64) @ strain)
    further = {}
    for name in sorted(batch.keys()):
        value = batch[name]
        if name not in _KNOWN and isinstance(value, Tensor) and value.is_floating_point():
            factor = 1.0 + size * torch.randn(value.shape, dtype=torch.float64, generator=generator)
            further[name] = value.detach() * factor.to(value)
    return replace(out, **further)


def shortest_distances(batch: Batch) -> Tensor:
    """Shortest distance between atoms, or lattice vector, of every structure of a validated batch; 1 where there is
    none: Tensor of shape (n_structures,), float64."""
    pos = batch[keys.POS].detach().to(torch.float64)
    lengths = pos.new_ones(batch[keys.PTR].shape[0] - 1)
    for s, (first, last) in enumerate(_ranges(batch)):
        candidates = torch.nn.functional.pdist(pos[first:last])
        sides = batch[keys.CELL][s][batch[keys.PBC][s]].detach().to(torch.float64).norm(dim=1)
        candidates = torch.cat([candidates[candidates > 0], sides])
        if len(candidates):
            lengths[s] = candidates.min()
    return lengths


def moved_to(batch: Data, pos: Tensor, cell: Tensor | None = None) -> Batch:
    """The batch at other positions (and cells), its neighbor list built anew where there was one."""
    fields: dict[str, Any] = {name: None for name in _EDGE_FIELDS} | {keys.POS: pos.to(batch[keys.POS].dtype)}
    if cell is not None:
        fields[keys.CELL] = cell.to(batch[keys.POS].dtype)
    return _rebuilt(replace(batch, **fields), batch)


def split(batch: Data) -> list[Batch]:
    """Every structure as a batch of its own, with its part of the neighbor list."""
    batch = validate(batch)
    ptr, n_structures = batch[keys.PTR], batch[keys.PTR].shape[0] - 1
    per_atom = [name for name in _per_atom(batch) if name != keys.BATCH]
    edges = batch.get(keys.EDGE_INDEX)
    out = []
    for s in range(n_structures):
        atoms, _ = gather_rows(ptr, torch.tensor([s], device=ptr.device))
        fields: dict[str, Any] = {name: batch[name][atoms] for name in per_atom}
        for name in batch.keys():
            if name in fields or name in (keys.BATCH, keys.PTR, keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC):
                continue
            value = batch[name]
            rows = isinstance(value, Tensor) and value.shape[:1] == (n_structures,)
            fields[name] = value[s : s + 1] if rows else value
        if edges is not None:
            mine = batch[keys.BATCH][edges[1]] == s
            fields[keys.EDGE_INDEX] = edges[:, mine] - ptr[s]
            for name in (keys.CELL_SHIFT, keys.EDGE_VEC):
                if batch.get(name) is not None:
                    fields[name] = batch[name][mine]
        out.append(assemble(counts=torch.tensor([len(atoms)]), **fields))
    return out


def copied(batch: Data) -> Batch:
    """The batch with every tensor copied and detached, so that what a model does to it stays without consequence."""
    return replace(
        batch,
        **{k: v.detach().clone() for k in batch.keys() if isinstance(v := batch[k], Tensor)},
    )


def _ranges(batch: Data) -> list[tuple[int, int]]:
    ptr = batch[keys.PTR].tolist()
    return list(itertools.pairwise(ptr))


def _per_atom(batch: Data) -> list[str]:
    n_atoms = batch[keys.POS].shape[0]
    return [
        name
        for name in batch.keys()
        if name not in _NOT_PER_ATOM and isinstance(batch[name], Tensor) and batch[name].shape[:1] == (n_atoms,)
    ]


def _rebuilt(batch: Batch, like: Data) -> Batch:
    if like.get(keys.EDGE_INDEX) is None:
        return batch
    if like.get(keys.EDGE_CUTOFF) is None:
        raise InvalidInputError("batch: a neighbor list can only be built anew where edge_cutoff is given")
    return with_neighbors(batch, float(torch.as_tensor(like[keys.EDGE_CUTOFF]).min()))


def batched(batches: Sequence[Data]) -> Batch:
    """One batch of several, the inverse of `split` for fields that each of them has; neighbor lists included."""
    valid = [validate(batch) for batch in batches]
    counts = torch.cat([batch[keys.PTR].diff() for batch in valid])
    starts = offsets(torch.tensor([batch[keys.POS].shape[0] for batch in valid])).tolist()
    fields: dict[str, Any] = {}
    for name in valid[0].keys():
        values = [batch[name] for batch in valid]
        if name in (keys.BATCH, keys.PTR):
            continue
        if name == keys.EDGE_INDEX:
            fields[name] = torch.cat([v + start for v, start in zip(values, starts[:-1], strict=True)], dim=1)
        elif isinstance(values[0], Tensor) and values[0].dim():
            fields[name] = torch.cat(values)
        else:
            fields[name] = values[0]
    return assemble(counts=counts, **fields)
