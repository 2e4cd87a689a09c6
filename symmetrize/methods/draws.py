"""Random numbers of stochastic methods: the same for a structure in every batch that it is part of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import DeclarationError
from symmetrize.frames import Scope
from symmetrize.ops.ragged import segment_sum


def check_seed(method: str, seed: int) -> int:
    """A seed that 64-bit integers can hold, or a `DeclarationError`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise DeclarationError(f"{method}: seed: expected an integer of at most 64 bits, got {seed!r}")
    return seed


def seed_of(generator: torch.Generator | None, seed: int) -> int:
    """One number from the generator, or the seed where there is none."""
    if generator is None:
        return seed
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def uniform_numbers(batch: Data, scope: Scope, seed: int, n_draws: int) -> Tensor:
    """Pseudo-random numbers of all owners of a batch, the same in every batch that a structure is part of.

    A hash of the seed, the number of the draw, the positions and species of the structure (in any order) and, in atom
    scope, those of the atom. Equal structures get equal numbers, however their atoms are numbered.

    Returns
    -------
    Tensor of shape (n_draws, n_owners), float64, in [0, 1)
    """
    pos, structure, ptr = batch[keys.POS].detach(), batch[keys.BATCH], batch[keys.PTR]
    # Zero has two signs.
    bits = (pos.to(torch.float64) + 0.0).contiguous().view(torch.int64)
    species = batch.get(keys.Z)
    state = torch.zeros_like(structure) if species is None else species.to(torch.int64)
    for column in range(3):
        state = _mix(state + bits[:, column])
    whole = _mix(segment_sum(state, structure, ptr.shape[0] - 1))
    state = _mix(whole[structure] + state) if scope == "atom" else whole
    numbers = torch.arange(n_draws, device=state.device)[:, None]
    state = _mix(_mix(state + seed) + numbers)
    return _shifted(state, 11).to(torch.float64) / 2**53


def _mix(state: Tensor) -> Tensor:
    """A step of the generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in wrapping 64-bit integers."""
    state = state - 0x61C8864680B583EB
    state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, n: int) -> Tensor:
    """Bits shifted to the right, with zeros in front."""
    return (state >> n) & ((1 << (64 - n)) - 1)
