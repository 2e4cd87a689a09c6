"""Composition energies and the energy scale of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symmetrize import keys
from symmetrize.errors import UnknownSpeciesError
from symmetrize.ops.ragged import segment_sum
from symmetrize.training.dataset import StructureTable


def count_species(z: Tensor, structure: Tensor, n_structures: int, atomic_types: Sequence[int]) -> Tensor:
    """Atoms of each species in each structure: Tensor of shape (n_structures, n_species), float64.

    Raises
    ------
    UnknownSpeciesError
        An atom is of none of the species.
    """
    types = torch.as_tensor(list(atomic_types), dtype=z.dtype)
    matches = z[:, None] == types
    unknown = (~matches.any(dim=1)).nonzero()
    if len(unknown):
        raise UnknownSpeciesError(
            f"z: expected one of the species {list(atomic_types)}, got {int(z[unknown[0, 0]])} "
            f"in structure {int(structure[unknown[0, 0]])}"
        )
    return segment_sum(matches.to(torch.float64), structure, n_structures)


def fit_composition(counts: Tensor, energy: Tensor) -> Tensor:
    """Energy per atom of each species, by least squares.

    E_s is approximated by the sum over species a of N_sa e_a. All species share the mean energy per atom; what is left
    is fitted with the smallest correction, so that compositions that the data cannot tell apart (a single molecule,
    say) share the energy evenly instead of cancelling each other.

    Parameters
    ----------
    counts : Tensor of shape (n_structures, n_species), float64
    energy : Tensor of shape (n_structures,), float64
        eV.

    Returns
    -------
    Tensor of shape (n_species,), float64
        eV.
    """
    mean = energy.sum() / counts.sum()
    rest = energy - counts.sum(dim=1) * mean
    return mean + torch.linalg.pinv(counts, rtol=1e-10) @ rest


def energy_scale(forces: Tensor, residual: Tensor) -> float:
    """Energy that a network's output of 1 stands for (eV): the RMS force component times one angstrom.

    Forces are the larger part of the information and hold their size from molecule to molecule, unlike the spread of
    total energies. Without forces, the RMS of what the composition leaves unexplained.

    Parameters
    ----------
    forces : Tensor of shape (n_atoms, 3)
        eV/angstrom.
    residual : Tensor of shape (n_structures,)
        Energies minus composition energies (eV).
    """
    for values in (forces, residual):
        rms = float(values.square().mean().sqrt())
        if rms > 0.0:
            return rms
    return 1.0


def baseline_of(table: StructureTable, composition: Tensor, atomic_types: Sequence[int]) -> Tensor:
    """Composition energy of every structure: Tensor of shape (n_structures,), float64, eV."""
    counts = count_species(table.batch[keys.Z], table.batch[keys.BATCH], len(table), atomic_types)
    return counts @ composition.to(torch.float64)
