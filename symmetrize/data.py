"""From structures to validated batches: conversion, checks, neighbor lists, edge vectors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.errors import InvalidInputError, InvalidTypeError, UnknownSpeciesError
from symmetrize.ops.neighbors import neighbor_list
from symmetrize.ops.ragged import offsets

if TYPE_CHECKING:
    from ase import Atoms


def from_ase(
    structures: Atoms | Iterable[Atoms], cutoff: float | None = None, dtype: torch.dtype = torch.float64
) -> Batch:
    """Batch of ASE structures.

    Parameters
    ----------
    structures : ase.Atoms or iterable of ase.Atoms
        Positions and cells in angstrom.
    cutoff : float, optional
        Also build the neighbor list of this radius (angstrom).
    dtype : torch.dtype
        Precision of positions and cells.

    Returns
    -------
    torch_geometric.data.Batch
        With ``pos``, ``z``, ``cell``, ``pbc`` and, with a cutoff, ``edge_index``, ``cell_shift``, ``edge_cutoff``.
        Where a structure has them, also its initial charges and (collinear) magnetic moments, and ``charge`` and
        ``spin_multiplicity`` (or ``spin``, 2S + 1) of its ``info``, 0 and 1 for those without.

    Raises
    ------
    InvalidInputError
        For an empty list, and for structures that `validate` refuses.
    """
    from ase import Atoms

    if not isinstance(structures, Iterable):
        raise InvalidTypeError(f"from_ase: expected ase.Atoms or several of them, got {type(structures).__name__}")
    items = [structures] if isinstance(structures, Atoms) else list(structures)
    if not items:
        raise InvalidInputError("from_ase: expected at least one structure, got none")
    for n, atoms in enumerate(items):
        if not isinstance(atoms, Atoms):
            raise InvalidTypeError(f"from_ase: structure {n}: expected ase.Atoms, got {type(atoms).__name__}")
    batch = assemble(
        pos=torch.cat([torch.as_tensor(atoms.positions).to(dtype) for atoms in items]),
        counts=torch.tensor([len(atoms) for atoms in items]),
        z=torch.cat([torch.as_tensor(atoms.numbers, dtype=torch.int64) for atoms in items]),
        cell=torch.stack([torch.as_tensor(atoms.cell.array).to(dtype) for atoms in items]),
        pbc=torch.stack([torch.as_tensor(atoms.pbc) for atoms in items]),
        **_electronic_state(items, dtype),
    )
    batch = validate(batch)
    return batch if cutoff is None else with_neighbors(batch, cutoff)


def _electronic_state(items: list[Atoms], dtype: torch.dtype) -> dict[str, Tensor]:
    """Charges and spins, where any of the structures has them."""
    fields: dict[str, Tensor] = {}
    per_atom = {keys.INITIAL_CHARGES: "get_initial_charges", keys.INITIAL_MAGMOMS: "get_initial_magnetic_moments"}
    for name, getter in per_atom.items():
        values = [getattr(atoms, getter)() for atoms in items]
        if any(atoms.has(name) for atoms in items) and all(value.ndim == 1 for value in values):
            fields[name] = torch.cat([torch.as_tensor(value).to(dtype) for value in values])
    per_structure = {keys.CHARGE: (("charge",), 0), keys.SPIN_MULTIPLICITY: (("spin_multiplicity", "spin"), 1)}
    for name, (entries, default) in per_structure.items():
        found = [next((atoms.info[entry] for entry in entries if entry in atoms.info), None) for atoms in items]
        if all(value is None for value in found):
            continue
        for n, value in enumerate(found):
            if value is not None and not isinstance(value, (int, float, np.number)):
                raise InvalidInputError(f"{name}: structure {n}: expected a number in atoms.info, got {value!r}")
        fields[name] = torch.tensor([float(default if value is None else value) for value in found], dtype=dtype)
    return fields


def read_structures(path: str | os.PathLike[str], name: str = "structures") -> list[Atoms]:
    """All structures of a file in any format that ASE reads.

    Parameters
    ----------
    path : path
    name : str
        What an error calls the file: the option or entry that names it.

    Raises
    ------
    InvalidInputError
        There is no such file, ASE cannot read it, or it is empty.
    """
    from ase.io import read

    try:
        found = read(os.fspath(path), ":")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{name}: expected a file of structures, there is none at {str(path)!r}") from error
    except Exception as error:  # whatever ASE's many readers raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InvalidInputError(f"{name}: expected structures that ASE reads, got {str(path)!r}: {what}") from error
    frames = found if isinstance(found, list) else [found]
    if not frames:
        raise InvalidInputError(f"{name}: expected at least one structure, got none in {str(path)!r}")
    return frames


def from_points(pos: Tensor, batch: Tensor | None = None, cutoff: float | None = None, **features: Any) -> Batch:
    """Batch of finite point clouds.

    Parameters
    ----------
    pos : Tensor of shape (n_points, 3)
    batch : Tensor of shape (n_points,), optional
        Cloud that each point belongs to, ascending from 0; by default all points form one cloud.
    cutoff : float, optional
        Also build the neighbor list of this radius.
    **features : Tensor of shape (n_points, ...)
        Further per-point fields: species ``z``, features ``x``, vectors.

    Returns
    -------
    torch_geometric.data.Batch
    """
    if not isinstance(pos, Tensor):
        raise InvalidTypeError(f"from_points: pos: expected a Tensor, got {type(pos).__name__}")
    if batch is None:
        batch = torch.zeros(pos.shape[0], dtype=torch.int64, device=pos.device)
    for name, value in features.items():
        if not isinstance(value, Tensor) or value.shape[:1] != pos.shape[:1]:
            raise InvalidInputError(f"from_points: {name}: expected a Tensor with one row per point")
    if batch.shape != pos.shape[:1] or batch.dtype != torch.int64:
        raise InvalidInputError(
            f"from_points: batch: expected int64 of shape {tuple(pos.shape[:1])}, "
            f"got {batch.dtype} {tuple(batch.shape)}"
        )
    if batch.numel() and int(batch.min()) < 0:
        raise InvalidInputError(f"from_points: batch: expected cloud numbers from 0 on, got {int(batch.min())}")
    counts = torch.bincount(batch) if batch.numel() else torch.zeros(0, dtype=torch.int64)
    out = assemble(pos=pos, counts=counts, **features)
    if not torch.equal(out[keys.BATCH], batch):
        raise InvalidInputError("from_points: batch: expected ascending cloud numbers without gaps")
    out = validate(out)
    return out if cutoff is None else with_neighbors(out, cutoff)


def assemble(*, pos: Tensor, counts: Tensor, **fields: Any) -> Batch:
    """A `Batch` from flat fields and the number of atoms of each structure, without copying."""
    ptr = offsets(counts.to(pos.device))
    structure = torch.repeat_interleave(torch.arange(counts.shape[0], device=pos.device), counts.to(pos.device))
    return Batch(pos=pos, batch=structure, ptr=ptr, **fields)


def validate(batch: Data) -> Batch:
    """Check a batch and return a shallow copy in which ``batch``, ``ptr``, ``cell`` and ``pbc`` are present.

    Raises
    ------
    InvalidTypeError
        Wrong kind of object or dtype.
    InvalidInputError
        Wrong shape, empty batch, non-finite or coincident positions, singular cell with periodicity; the message names
        the field, the structure and the atom.
    """
    if not isinstance(batch, Data):
        raise InvalidTypeError(f"batch: expected a torch_geometric Data or Batch, got {type(batch).__name__}")
    pos = batch.get(keys.POS)
    if not isinstance(pos, Tensor):
        raise InvalidInputError("batch: expected a field 'pos', got none")
    if not pos.is_floating_point() or pos.dtype not in (torch.float32, torch.float64):
        raise InvalidTypeError(f"pos: expected float32 or float64, got {pos.dtype}")
    if pos.dim() != 2 or pos.shape[1] != 3:
        raise InvalidInputError(f"pos: expected shape (n_atoms, 3), got {tuple(pos.shape)}")
    if pos.shape[0] == 0:
        raise InvalidInputError("batch: expected at least one atom, got an empty batch")
    for name in (keys.BATCH, keys.PTR, keys.CELL, keys.PBC):
        if batch.get(name) is not None and not isinstance(batch[name], Tensor):
            raise InvalidTypeError(f"{name}: expected a Tensor, got {type(batch[name]).__name__}")
    structure, ptr = _structures(batch, pos)
    n_structures = ptr.shape[0] - 1
    empty = (ptr[1:] == ptr[:-1]).nonzero()
    if len(empty):
        raise InvalidInputError(
            f"batch: expected at least one atom in every structure, structure {int(empty[0])} is empty"
        )

    # Never a silent NaN: this comes before anything is computed from positions.
    bad = (~torch.isfinite(pos.detach())).any(dim=1).nonzero()
    if len(bad):
        raise InvalidInputError(
            f"pos: expected finite positions, got {pos[bad[0, 0]].tolist()} at {_where(bad[0, 0], ptr)}"
        )

    fields: dict[str, Any] = {keys.BATCH: structure, keys.PTR: ptr}
    fields |= _cells(batch, pos, n_structures)
    for name in (keys.Z, keys.X, keys.CENTER_MASK):
        value = batch.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.shape[:1] != pos.shape[:1]):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(f"{name}: expected one row per atom ({pos.shape[0]}), got {got}")
    species = batch.get(keys.Z)
    if species is not None and (species.is_floating_point() or species.dim() != 1):
        raise InvalidTypeError(f"z: expected integers of shape (n_atoms,), got {species.dtype} {tuple(species.shape)}")
    mask = batch.get(keys.CENTER_MASK)
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 1):
        raise InvalidTypeError(f"center_mask: expected bool of shape (n_atoms,), got {mask.dtype} {tuple(mask.shape)}")
    if mask is not None and not bool(mask.any()):
        raise InvalidInputError("center_mask: expected at least one center, got none")
    _refuse_coincident(pos, structure, ptr)
    return replace(batch, **fields)


def replace(batch: Data, /, **fields: Any) -> Batch:
    """Shallow copy of a batch with some fields replaced; a field given as None is left out."""
    kept = {name: batch[name] for name in batch.keys() if name not in fields}
    return Batch(**kept, **{name: value for name, value in fields.items() if value is not None})


def _structures(batch: Data, pos: Tensor) -> tuple[Tensor, Tensor]:
    structure = batch.get(keys.BATCH)
    if structure is None:
        structure = torch.zeros(pos.shape[0], dtype=torch.int64, device=pos.device)
    if structure.shape != pos.shape[:1] or structure.dtype != torch.int64:
        raise InvalidInputError(
            f"batch: expected int64 of shape {tuple(pos.shape[:1])}, got {structure.dtype} {tuple(structure.shape)}"
        )
    if bool((structure[1:] < structure[:-1]).any()) or int(structure[0]) < 0:
        raise InvalidInputError("batch: expected ascending structure numbers")
    ptr = batch.get(keys.PTR)
    n_structures = int(structure[-1]) + 1 if ptr is None else ptr.shape[0] - 1
    if int(structure[-1]) >= n_structures:
        raise InvalidInputError(f"ptr: expected {int(structure[-1]) + 1} structures as in batch, got {n_structures}")
    expected = offsets(torch.bincount(structure, minlength=n_structures))
    if ptr is not None and not torch.equal(ptr, expected):
        raise InvalidInputError("ptr: expected the offsets of the structures in batch, got others")
    return structure, expected


def _cells(batch: Data, pos: Tensor, n_structures: int) -> dict[str, Tensor]:
    cell, pbc = batch.get(keys.CELL), batch.get(keys.PBC)
    if cell is None:
        cell = torch.zeros(n_structures, 3, 3, dtype=pos.dtype, device=pos.device)
    if pbc is None:
        pbc = torch.zeros(n_structures, 3, dtype=torch.bool, device=pos.device)
    hint = "; in a single Data a cell is (1, 3, 3) and pbc (1, 3), or collating goes wrong"
    if cell.shape != (n_structures, 3, 3):
        raise InvalidInputError(f"cell: expected shape ({n_structures}, 3, 3), got {tuple(cell.shape)}{hint}")
    if pbc.shape != (n_structures, 3):
        raise InvalidInputError(f"pbc: expected shape ({n_structures}, 3), got {tuple(pbc.shape)}{hint}")
    if pbc.dtype != torch.bool:
        raise InvalidTypeError(f"pbc: expected bool, got {pbc.dtype}")
    if cell.dtype != pos.dtype:
        raise InvalidTypeError(f"cell: expected the dtype of pos ({pos.dtype}), got {cell.dtype}")
    bad = (~torch.isfinite(cell.detach())).flatten(1).any(dim=1).nonzero()
    if len(bad):
        raise InvalidInputError(f"cell: expected finite lattice vectors, structure {int(bad[0])} has others")
    if bool(pbc.any()):
        # Volume spanned by the periodic directions alone, relative to their lengths.
        vectors = torch.where(pbc[:, :, None], cell.detach(), torch.zeros_like(cell))
        lengths = vectors.norm(dim=2)
        unit = vectors / torch.where(lengths > 0, lengths, torch.ones_like(lengths))[:, :, None]
        gram = unit @ unit.transpose(1, 2) + torch.diag_embed((~pbc).to(cell.dtype))
        singular = (torch.linalg.det(gram.to(torch.float64)) < 1e-10).nonzero()
        if len(singular):
            s = int(singular[0])
            raise InvalidInputError(
                f"cell: structure {s} is periodic along {pbc[s].tolist()}, expected linearly independent lattice "
                f"vectors there, got {cell[s].tolist()}"
            )
    return {keys.CELL: cell, keys.PBC: pbc}


def where(batch: Data, owner: int, scope: str) -> str:
    """Name of an atom or a structure in messages."""
    return _where(owner, batch[keys.PTR]) if scope == "atom" else f"structure {owner}"


def _where(atom: Tensor | int, ptr: Tensor) -> str:
    structure = int(torch.searchsorted(ptr, torch.as_tensor(int(atom), device=ptr.device), right=True)) - 1
    return f"structure {structure}, atom {int(atom) - int(ptr[structure])}"


def refuse_unknown_species(batch: Data, rows: Tensor, species: Sequence[int]) -> None:
    """Raise an `UnknownSpeciesError` if there are negative numbers among the rows of a model's species.

    Parameters
    ----------
    rows : Tensor of shape (n_atoms,)
        What a model found for each atomic number, -1 for those that it does not know.
    species : sequence of int
        What it knows.
    """
    unknown = (rows < 0).nonzero()
    if not len(unknown):
        return
    atom = int(unknown[0, 0])
    structure, first = 0, 0
    if batch.get(keys.BATCH) is not None:
        structure = int(batch[keys.BATCH][atom])
        first = int(torch.searchsorted(batch[keys.BATCH].contiguous(), structure))
    raise UnknownSpeciesError(
        f"z: structure {structure}, atom {atom - first}: expected one of the species {list(species)} that this model "
        f"was built for, got {int(batch[keys.Z][atom])}"
    )


def _refuse_coincident(pos: Tensor, structure: Tensor, ptr: Tensor) -> None:
    # Equal positions have equal projections; equal projections may be chance, and are looked at in full.
    x, y, z = pos.detach().to(torch.float64).unbind(dim=1)
    projection = torch.sort(x + y * 0.7548776662466927 + z * 0.5698402909980532 + structure * 0.3819660112501051)[0]
    if not bool((projection[1:] == projection[:-1]).any()):
        return
    rows = torch.cat([structure.to(pos.dtype)[:, None], pos.detach()], dim=1)
    unique, index = torch.unique(rows, dim=0, return_inverse=True)
    if unique.shape[0] < rows.shape[0]:
        twice = (torch.bincount(index) > 1).nonzero()[0, 0]
        first, second = (index == twice).nonzero()[:2, 0].tolist()
        raise InvalidInputError(
            f"pos: expected distinct positions, got coincident atoms: {_where(first, ptr)} and {_where(second, ptr)}"
        )


def edge_vectors(batch: Data) -> Tensor:
    """``pos[neighbor] + cell_shift @ cell - pos[center]``, differentiable: Tensor of shape (n_edges, 3)."""
    pos = batch[keys.POS]
    neighbor, center = batch[keys.EDGE_INDEX]
    vectors = pos.index_select(0, neighbor) - pos.index_select(0, center)
    shift = batch.get(keys.CELL_SHIFT)
    if shift is None or batch.get(keys.CELL) is None:
        return vectors
    structure = batch.get(keys.BATCH)
    cell = batch[keys.CELL]
    if cell.shape[0] == 1:
        return vectors + shift.to(pos.dtype) @ cell[0]
    cells = cell[structure[center]] if structure is not None else cell.expand(center.shape[0], 3, 3)
    return vectors + (shift.to(pos.dtype)[:, None, :] @ cells).squeeze(1)


def with_neighbors(batch: Data, cutoff: float) -> Batch:
    """Copy of a validated batch with the neighbor list of a radius, sorted by center, and its edge vectors.

    A list that the batch brings along is verified and used if it reaches far enough, otherwise a new one is built.

    Raises
    ------
    InvalidInputError
        A given list refers to atoms that do not exist, crosses structures, holds longer or half as many edges as it
        should, or two atoms (images included) coincide.
    """
    if not cutoff > 0.0:
        raise InvalidInputError(f"cutoff: expected a positive length, got {cutoff}")
    given = batch.get(keys.EDGE_INDEX)
    radius = batch.get(keys.EDGE_CUTOFF)
    if given is not None:
        _check_edges(batch)
    reach = None if radius is None else torch.as_tensor(radius, dtype=torch.float64).cpu()
    usable = given is not None and reach is not None and bool((reach >= cutoff).all())
    if given is None or not usable:
        edge_index, shift = neighbor_list(
            batch[keys.POS], batch[keys.PTR], batch[keys.CELL], batch[keys.PBC], float(cutoff)
        )
        out = replace(batch, **{keys.EDGE_INDEX: edge_index, keys.CELL_SHIFT: shift, keys.EDGE_VEC: None})
    else:
        order = torch.argsort(given[1], stable=True)
        shift = batch.get(keys.CELL_SHIFT)
        if shift is None:
            shift = torch.zeros(given.shape[1], 3, dtype=torch.int64, device=given.device)
        out = replace(batch, **{keys.EDGE_INDEX: given[:, order], keys.CELL_SHIFT: shift[order], keys.EDGE_VEC: None})
    vectors = edge_vectors(out)
    lengths = vectors.detach().norm(dim=1)
    if lengths.numel():
        shortest = int(lengths.argmin())
        # Images at the same place differ by the rounding of positions and lattice translations.
        pair = out[keys.EDGE_INDEX][:, shortest].tolist()
        shift = out[keys.CELL_SHIFT][shortest].to(vectors.dtype) @ out[keys.CELL].detach()[out[keys.BATCH][pair[1]]]
        size = torch.cat([out[keys.POS].detach()[pair].flatten(), shift]).abs().max()
        if not bool(lengths[shortest] > 32 * torch.finfo(vectors.dtype).eps * size):
            raise InvalidInputError(
                "pos: expected distinct positions, got coincident atoms (or periodic images): "
                + " and ".join(_where(atom, out[keys.PTR]) for atom in pair)
            )
    if usable and reach is not None:
        # A list with a skin: what lies beyond the cutoff is not for the backbone to see.
        allowed = reach.to(lengths) if reach.dim() == 0 else reach.to(lengths)[out[keys.BATCH][out[keys.EDGE_INDEX][1]]]
        excess = lengths - allowed * (1 + 1e-6)
        if bool((excess > 0.0).any()):
            worst = int(excess.argmax())
            raise InvalidInputError(
                f"edge_index: expected edges no longer than edge_cutoff = {reach.tolist()}, got one of length "
                f"{float(lengths[worst])} at {_where(out[keys.EDGE_INDEX][1, worst], out[keys.PTR])}; "
                "rebuild the neighbor list when the atoms move"
            )
        keep = lengths <= cutoff
        out = replace(
            out,
            **{keys.EDGE_INDEX: out[keys.EDGE_INDEX][:, keep], keys.CELL_SHIFT: out[keys.CELL_SHIFT][keep]},
        )
        vectors = vectors[keep]
        _refuse_stale(out, cutoff)
    return replace(out, **{keys.EDGE_VEC: vectors, keys.EDGE_CUTOFF: float(cutoff)})


def _refuse_stale(batch: Data, cutoff: float) -> None:
    """A list that was built before the atoms moved lacks edges: found by counting those that should be there."""
    n_atoms = batch[keys.POS].shape[0]
    # A little less than the cutoff, so that an atom exactly on it is not decided by rounding.
    expected, _ = neighbor_list(
        batch[keys.POS], batch[keys.PTR], batch[keys.CELL], batch[keys.PBC], cutoff * (1 - 1e-6)
    )
    found = torch.bincount(batch[keys.EDGE_INDEX][1], minlength=n_atoms)
    short = (found < torch.bincount(expected[1], minlength=n_atoms)).nonzero()
    if len(short):
        raise InvalidInputError(
            f"edge_index: expected all neighbors within {cutoff}, some are missing at "
            f"{_where(short[0, 0], batch[keys.PTR])}; rebuild the neighbor list when the atoms move, or leave it out"
        )


def _check_edges(batch: Data) -> None:
    edges, shift = batch[keys.EDGE_INDEX], batch.get(keys.CELL_SHIFT)
    n_atoms = batch[keys.POS].shape[0]
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise InvalidInputError(
            f"edge_index: expected int64 of shape (2, n_edges), got {edges.dtype} {tuple(edges.shape)}"
        )
    if shift is not None and shift.shape != (edges.shape[1], 3):
        raise InvalidInputError(f"cell_shift: expected shape ({edges.shape[1]}, 3), got {tuple(shift.shape)}")
    if not edges.numel():
        return
    if int(edges.min()) < 0 or int(edges.max()) >= n_atoms:
        raise InvalidInputError(
            f"edge_index: expected atoms 0 to {n_atoms - 1}, got {int(edges.min())} to {int(edges.max())}"
        )
    structure = batch[keys.BATCH]
    if bool((structure[edges[0]] != structure[edges[1]]).any()):
        raise InvalidInputError("edge_index: expected neighbors from the same structure, got a pair across structures")
    shift = torch.zeros(edges.shape[1], 3, dtype=edges.dtype, device=edges.device) if shift is None else shift
    forth = torch.cat([edges.T, shift.to(edges.dtype)], dim=1)
    back = torch.cat([edges.flip(0).T, -shift.to(edges.dtype)], dim=1)
    unique, counts = torch.unique(forth, dim=0, return_counts=True)
    if bool((counts > 1).any()):
        twice = unique[counts > 1][0]
        raise InvalidInputError(
            f"edge_index: expected every edge once, one is repeated at {_where(twice[1], batch[keys.PTR])}"
        )
    both, counts = torch.unique(torch.cat([forth, back]), dim=0, return_counts=True)
    if both.shape[0] > forth.shape[0]:
        lonely = both[counts == 1][0]
        raise InvalidInputError(
            "edge_index: expected a full neighbor list (every pair in both directions), "
            f"it is not at {_where(lonely[1], batch[keys.PTR])}"
        )
