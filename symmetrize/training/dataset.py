"""Reference structures as flat arrays: read once, neighbor lists built once, batches gathered by index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import from_ase, replace
from symmetrize.data import read_structures as read_file
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import gather_rows, offsets
from symmetrize.ops.rotations import random_rotations
from symmetrize.training.config import DataRecipe

if TYPE_CHECKING:
    from ase import Atoms

# Reference energy minus its composition baseline. (n_structures,), floating, eV.
TARGET_ENERGY: Final = "target_energy"
# Reference forces. (n_atoms, 3), floating, eV/angstrom.
TARGET_FORCES: Final = "target_forces"


@dataclass(frozen=True)
class StructureTable:
    """Structures, their neighbor lists and reference values, one flat array per quantity.

    Attributes
    ----------
    batch : Batch
        All structures, in float64, with neighbor lists.
    edge_ptr : Tensor of shape (n_structures + 1,)
        First edge of each structure.
    energy : Tensor of shape (n_structures,), float64
        Reference energies (eV).
    forces : Tensor of shape (n_atoms, 3), float64
        Reference forces (eV/angstrom).
    """

    batch: Batch
    edge_ptr: Tensor
    energy: Tensor
    forces: Tensor

    def __len__(self) -> int:
        return self.energy.shape[0]

    @property
    def ptr(self) -> Tensor:
        """First atom of each structure: Tensor of shape (n_structures + 1,)."""
        return self.batch[keys.PTR]

    @property
    def atomic_types(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(int(z) for z in torch.unique(self.batch[keys.Z]))

    def select(self, structures: Tensor, dtype: torch.dtype, baseline: Tensor | None = None) -> Batch:
        """Batch of some structures with their targets.

        Parameters
        ----------
        structures : Tensor of shape (n_picked,), int64
            Which structures, in any order.
        dtype : torch.dtype
            Precision of everything that is returned.
        baseline : Tensor of shape (n_structures,), optional
            Composition energies (eV), subtracted in float64 before the energies are rounded.

        Returns
        -------
        Batch
        """
        source = self.batch
        atom, owner = gather_rows(self.ptr, structures)
        edge, edge_owner = gather_rows(self.edge_ptr, structures)
        ptr = offsets(self.ptr[structures + 1] - self.ptr[structures])
        shift = (ptr[:-1] - self.ptr[structures])[edge_owner]
        energy = self.energy if baseline is None else self.energy - baseline
        return Batch(
            **{
                keys.POS: source[keys.POS][atom].to(dtype),
                keys.Z: source[keys.Z][atom],
                keys.BATCH: owner,
                keys.PTR: ptr,
                keys.CELL: source[keys.CELL][structures].to(dtype),
                keys.PBC: source[keys.PBC][structures],
                keys.EDGE_INDEX: source[keys.EDGE_INDEX][:, edge] + shift,
                keys.CELL_SHIFT: source[keys.CELL_SHIFT][edge],
                keys.EDGE_VEC: source[keys.EDGE_VEC][edge].to(dtype),
                keys.EDGE_CUTOFF: source[keys.EDGE_CUTOFF],
                TARGET_ENERGY: energy[structures].to(dtype),
                TARGET_FORCES: self.forces[atom].to(dtype),
            }
        )


def tabulate(
    structures: Sequence[Atoms],
    cutoff: float | None,
    energy_key: str,
    forces_key: str,
    numbers: Sequence[int] | None = None,
) -> StructureTable:
    """Structures and reference values as a `StructureTable`.

    Parameters
    ----------
    structures : sequence of ase.Atoms
    cutoff : float or None
        Radius of the neighbor lists (angstrom); None: no edges.
    energy_key, forces_key : str
        Names of the reference values, looked up in ``info`` and ``arrays`` and then in the attached calculator.
    numbers : sequence of int, optional
        What messages call the structures; by default, their positions in the sequence.

    Raises
    ------
    InvalidInputError
        A reference value is missing, has the wrong shape or is not finite.
    """
    named = list(zip(range(len(structures)) if numbers is None else numbers, structures, strict=True))
    energy = torch.tensor([float(_reference(atoms, energy_key, n, ())) for n, atoms in named], dtype=torch.float64)
    forces = np.concatenate([_reference(atoms, forces_key, n, (len(atoms), 3)) for n, atoms in named])
    batch = from_ase(structures, cutoff=cutoff)
    n_structures = len(structures)
    if cutoff is None:
        none = torch.zeros(0, 3, dtype=torch.float64)
        batch = replace(
            batch,
            **{
                keys.EDGE_INDEX: torch.zeros(2, 0, dtype=torch.int64),
                keys.CELL_SHIFT: none.to(torch.int64),
                keys.EDGE_VEC: none,
                keys.EDGE_CUTOFF: 0.0,
            },
        )
    counts = torch.bincount(batch[keys.BATCH][batch[keys.EDGE_INDEX][1]], minlength=n_structures)
    return StructureTable(batch, offsets(counts), energy, torch.as_tensor(forces, dtype=torch.float64))


def read_structures(recipe: DataRecipe) -> list[Atoms]:
    """Structures of a recipe's file, all of them, in order.

    Raises
    ------
    InvalidInputError
        There is no such file (the message says where it can be had), or it holds too few structures.
    """
    path = Path(recipe.path)
    if not path.is_file():
        hint = f"; get it from {recipe.source}" if recipe.source else ""
        raise InvalidInputError(f"data.path: expected a file of structures, there is none at {path}{hint}")
    structures = read_file(path, "data.path")
    wanted = recipe.train + recipe.validation + recipe.test
    if len(structures) < wanted:
        raise InvalidInputError(
            f"data: expected at least {wanted} structures (train + validation + test) in {path}, got {len(structures)}"
        )
    return structures


@dataclass(frozen=True)
class Split:
    """Structures of each part: Tensors of shape (n_train,), (n_validation,), (n_test,), int64, without overlap."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(n_structures: int, recipe: DataRecipe) -> Split:
    """Seeded random split; the test set does not depend on the other sizes."""
    order = torch.randperm(n_structures, generator=torch.Generator().manual_seed(recipe.split_seed))
    first = recipe.test + recipe.validation
    return Split(order[first : first + recipe.train], order[recipe.test : first], order[: recipe.test])


def gather(
    structures: Sequence[Atoms], cutoff: float | None, recipe: DataRecipe
) -> tuple[StructureTable, Split, Tensor]:
    """Split structures and tabulate those that are in a part of the split; the others are left alone.

    Parameters
    ----------
    structures : sequence of ase.Atoms
        All structures of the recipe's file.
    cutoff : float or None
        See `tabulate`.
    recipe : DataRecipe

    Returns
    -------
    table : StructureTable
        In the order of the file.
    parts : Split
        Rows of the table.
    numbers : Tensor of shape (n_rows,), int64
        Place in the file of each row.
    """
    parts = split(len(structures), recipe)
    numbers = torch.cat([parts.train, parts.validation, parts.test]).sort().values
    kept = numbers.tolist()
    table = tabulate([structures[n] for n in kept], cutoff, recipe.energy_key, recipe.forces_key, kept)
    rows = (torch.searchsorted(numbers, part) for part in (parts.train, parts.validation, parts.test))
    return table, Split(*rows), numbers


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def generator_for(*numbers: int) -> torch.Generator:
    """Random generator that depends on nothing but these non-negative integers (seed, epoch, step, ...)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Every structure in a Haar-random orientation of O(3), reflections included; targets follow.

    Parameters
    ----------
    batch : Batch
        With neighbor lists and targets.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Batch
        Shallow copy with positions, cells, edge vectors and target forces x' = g x.
    """
    pos, owner = batch[keys.POS], batch[keys.BATCH]
    elements = random_rotations(batch[keys.PTR].shape[0] - 1, generator, improper=None)
    return transform(batch, elements.to(dtype=pos.dtype, device=pos.device), owner)


def transform(batch: Batch, elements: Tensor, owner: Tensor) -> Batch:
    """Apply one orthogonal matrix per structure, ``elements`` of shape (n_structures, 3, 3), to a batch."""
    center = batch[keys.EDGE_INDEX][1]
    return replace(
        batch,
        **{
            keys.POS: _apply(elements[owner], batch[keys.POS]),
            keys.CELL: batch[keys.CELL] @ elements.transpose(1, 2),
            keys.EDGE_VEC: _apply(elements[owner[center]], batch[keys.EDGE_VEC]),
            TARGET_FORCES: _apply(elements[owner], batch[TARGET_FORCES]),
        },
    )


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.einsum("nij,nj->ni", matrices, vectors)


def _reference(atoms: Atoms, key: str, n: int, shape: tuple[int, ...]) -> np.ndarray:
    found = atoms.info.get(key, atoms.arrays.get(key))
    if found is None and atoms.calc is not None:
        found = atoms.calc.results.get(key)
    if found is None:
        known = sorted({*atoms.info, *atoms.arrays, *(atoms.calc.results if atoms.calc is not None else ())})
        raise InvalidInputError(f"data: structure {n}: expected a reference value {key!r}, got {known}")
    values = np.asarray(found, dtype=np.float64)
    if values.shape != shape:
        raise InvalidInputError(f"data: structure {n}: {key}: expected shape {shape}, got {values.shape}")
    if not np.isfinite(values).all():
        raise InvalidInputError(f"data: structure {n}: {key}: expected finite numbers, got others")
    return values
