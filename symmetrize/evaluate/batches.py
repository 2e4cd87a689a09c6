"""Which structures are evaluated together, and on which device."""

from __future__ import annotations

from collections.abc import Sequence


def make_batches(
    n_atoms: Sequence[int], structures: int, atoms: int, *, members: Sequence[int] | None = None, n_ranks: int = 1
) -> list[list[int]]:
    """Consecutive structures, as many as two limits allow; one that is larger than the limit is alone.

    Parameters
    ----------
    n_atoms : sequence of int
        Of every structure of the file.
    structures, atoms : int
        Largest number of both in a batch. With several devices also their share of the whole, so that as many batches
        as devices come out wherever there are as many structures.
    members : sequence of int, optional
        The structures to be evaluated, ascending; by default all.
    n_ranks : int
        Number of devices.

    Returns
    -------
    list of list of int
        Numbers of structures, each in one batch.
    """
    members = range(len(n_atoms)) if members is None else members
    structures = max(1, min(structures, len(members) // n_ranks))
    if n_ranks > 1:
        atoms = min(atoms, sum(n_atoms[n] for n in members) // n_ranks)
    batches: list[list[int]] = []
    filled = 0
    for n in members:
        if not batches or len(batches[-1]) == structures or filled + n_atoms[n] > atoms:
            batches.append([])
            filled = 0
        batches[-1].append(n)
        filled += n_atoms[n]
    return batches


def share_out(batches: Sequence[list[int]], n_atoms: Sequence[int], n_ranks: int) -> list[list[list[int]]]:
    """Batches of each device, such that their numbers of atoms, and so their costs, differ little.

    The largest batch that is left goes to the device that has the fewest atoms, which takes at most 4/3 of the shortest
    possible time. R. L. Graham, SIAM J. Appl. Math. 17, 416 (1969), theorem 2.
    """
    costs = [sum(n_atoms[n] for n in batch) for batch in batches]
    loads = [0] * n_ranks
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    for number in sorted(range(len(batches)), key=lambda i: -costs[i]):
        # Of devices that are equally loaded the one with fewer batches: none stays without one.
        rank = min(range(n_ranks), key=lambda r: (loads[r], len(shares[r])))
        shares[rank].append(number)
        loads[rank] += costs[number]
    return [[batches[number] for number in sorted(share)] for share in shares]
