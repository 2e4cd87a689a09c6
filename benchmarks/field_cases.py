"""Networks and structures of `benchmarks.field`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, load

from benchmarks.datasets import BUNDLED
from benchmarks.overhead import random_pet
from benchmarks.record import Setting
from symmetrize.testing import geometries

#: Degrees of quadratures, in ascending order, until the error is rounding.
DEGREES = (1, 3, 5, 7, 9, 11)

#: Displaced copies of a crystal.
N_CRYSTALS = 8


@dataclass(frozen=True)
class Case:
    """A network and structures.

    Attributes
    ----------
    network, system : str
    backbone : PET
        In float32; converted where needed.
    structures : list of ase.Atoms
        With energies and forces to compare with, if ``labeled``.
    labeled, finite : bool
    degrees, ase_degrees : tuple of int
        Of metatomic's two tools, at most.
    """

    network: str
    system: str
    backbone: PET
    structures: list[Atoms]
    labeled: bool
    finite: bool
    degrees: tuple[int, ...]
    ase_degrees: tuple[int, ...]

    def in_precision(self, dtype: torch.dtype) -> PET:
        """A copy of the backbone."""
        return copy.deepcopy(self.backbone).to(dtype).requires_grad_(False).eval()


def cases(setting: Setting, checkpoint: Path | None) -> list[Case]:
    """Trained networks, which are nearly invariant, and random ones, which are not; crystals with random ones."""
    ethanols = setting.datasets[BUNDLED]
    one, two = load("ethanol"), load("ethanol-2block")
    system = "ethanol"
    degrees: tuple[int, ...] = DEGREES
    brief, ase = degrees, degrees
    if not setting.full:
        degrees, brief, ase = DEGREES[:3], DEGREES[:2], DEGREES[:1]
    found = [Case("PET, 1 block, trained", system, one, ethanols, True, True, degrees, ase)]
    if setting.full:
        found.append(Case("PET, 2 blocks, trained", system, two, ethanols, True, True, degrees, ase))
    if checkpoint is not None:
        from symmetrize.backbones.pet.convert import convert

        # What the caller names on the command line is trusted.
        converted = convert(checkpoint, trust_pickle=True, targets=["energy"], dtype=torch.float32)
        found.append(Case("PET of metatrain", system, converted, ethanols, True, True, degrees, ase))
    untrained = PET(one.config, seed=0)
    found.append(Case("PET, 1 block, random", system, untrained, ethanols, False, True, degrees, ase))
    found.append(_random("silicon, 8 atoms", _rattled(geometries()["rattled silicon"], 0.05), brief, brief[:4]))
    if setting.full:
        aluminium = _rattled(geometries()["fcc Al, cubic cell"], 0.08)
        found.append(_random("aluminium, 4 atoms", aluminium, brief, brief[:4]))
        if "water" in setting.datasets:
            found.append(_random("liquid water", setting.datasets["water"][:4], (1, 3), (1,)))
    return found


def _random(system: str, crystals: list[Atoms], degrees: tuple[int, ...], ase: tuple[int, ...]) -> Case:
    network = random_pet(crystals)
    return Case("PET, 1 block, random", system, network, crystals, False, False, degrees, ase)


def _rattled(atoms: Atoms, width: float) -> list[Atoms]:
    found = []
    for seed in range(N_CRYSTALS):
        found.append(atoms.copy())
        found[-1].rattle(width, seed=seed)
    return found
