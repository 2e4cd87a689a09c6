"""What must not matter: position in space, order of the atoms, description of the crystal, company, history."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from symmetrize import keys
from symmetrize.testing.checks.common import every_set, judged
from symmetrize.testing.measuring.elements import batched, displaced, split
from symmetrize.testing.measuring.measures import (
    measure_batching,
    measure_mutation,
    measure_periodicity,
    measure_permutation,
    measure_translation,
)
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome
from symmetrize.testing.structures.sets import StructureSet


def _two_atoms(bench: Bench) -> Sequence[str]:
    """Sets with structures of two or more atoms."""
    return [name for name, s in bench.sets.items() if bool((s.batch[keys.PTR].diff() > 1).any())]


def _periodic(bench: Bench) -> Sequence[str]:
    return [name for name, s in bench.sets.items() if not s.finite]


@check(
    "Translation invariance",
    claim="translation",
    targets=every_set,
    cost=lambda bench, on: 4 * bench[on].n_structures,
)
def check_translation_invariance(bench: Bench, on: str) -> Outcome:
    """Shifting a structure changes no output.

    When it fails: absolute positions reach the network without being centered; a centroid is taken over the whole
    batch; precision is lost far from the origin.

    Number: max over shifts, rows and components of |f(x + t) - f(x)|, on the error scale.
    """
    bench = bench.double()
    found = bench[on]
    measured = measure_translation(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        generator=bench.generator("translation"),
        scale=bench.scale(found),
    )
    # Shifted by some lengths, positions carry a rounding error of their own.
    return judged(measured, found, 10.0 * bench.limit(found))


@check(
    "Permutation equivariance",
    claim="permutation",
    targets=_two_atoms,
    cost=lambda bench, on: (1 + bench.profile.n_permutations) * bench[on].n_structures,
)
def check_permutation_equivariance(bench: Bench, on: str) -> Outcome:
    """Renumbering atoms and edges renumbers the rows of the outputs and changes nothing else.

    When it fails: a sequence model or a sort sees the order of atoms; ties (equal distances) are broken by index; a
    neighbor list is expected in a particular order.

    Number: max over random permutations (never the identity), rows and components of |f(P x) - P f(x)|, on the error
    scale.
    """
    bench = bench.double()
    found = bench[on]
    measured = measure_permutation(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        n_permutations=bench.profile.n_permutations,
        generator=bench.generator("permutation"),
        scale=bench.scale(found),
    )
    return judged(measured, found, bench.limit(found))


@check(
    "Periodicity",
    claim="periodicity",
    targets=_periodic,
    cost=lambda bench, on: 7 * bench[on].n_structures,
)
def check_periodicity(bench: Bench, on: str) -> Outcome:
    """Every description of the same crystal gives the same outputs.

    Atoms wrapped into the cell or moved to other images, other lattice vectors of the same lattice (left-handed ones
    too), and a supercell, in which extensive outputs double.

    When it fails: edges ignore the lattice translation of the neighbor (``cell_shift``), so that an image is taken for
    the atom in the cell; fractional coordinates or cell vectors are network inputs; the minimum-image convention is
    used where the cell is smaller than twice the cutoff; a sum is taken where a mean is declared.

    Number: max over descriptions, rows and components of the change, on the error scale (supercell: per original
    cell).
    """
    bench = bench.double()
    found = bench[on]
    periodic = [k for k, p in enumerate(found.batch[keys.PBC].any(dim=1).tolist()) if p]
    found = bench.part(found, periodic) if len(periodic) < found.n_structures else found
    measured = measure_periodicity(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        generator=bench.generator("periodicity"),
        scale=bench.scale(bench[on]),
    )
    return judged(measured, found, 10.0 * bench.limit(found))


@check(
    "Batch independence",
    claim="batching",
    cost=lambda bench, on: 3 * bench.main.n_structures,
)
def check_batch_independence(bench: Bench, on: str) -> Outcome:
    """A structure has the same outputs alone, in a batch, and in the batch in opposite order.

    When it fails: batch normalisation in training mode; a mean, a softmax or an attention over the whole batch;
    results returned in another order.

    Number: max over structures, rows and components of the change, on the error scale.
    """
    found = _several(bench)
    measured = measure_batching(
        bench.subject.model, found.batch, bench.subject.declared(found.batch), scale=bench.scale(bench.main)
    )
    return judged(measured, found, bench.limit(found))


def _several(bench: Bench) -> StructureSet:
    """The main set, with deformed copies where it has one structure only."""
    found = bench.main
    if found.n_structures > 1:
        return found
    copies = [displaced(found.batch, torch.Generator().manual_seed(k)) for k in range(2)]
    names = (*found.names, *(f"{found.names[0]}, deformed" for _ in copies))
    return dataclasses.replace(found, batch=batched([*split(found.batch), *copies]), names=names)


@check("No side effects", claim="purity", cost=lambda bench, on: bench.main.n_structures)
def check_purity(bench: Bench, on: str) -> Outcome:
    """A call changes neither its input nor torch's global random state, and leaves no gradients behind.

    When it fails: positions are centered or wrapped in place; fields are added to the caller's batch; ``backward()``
    is called inside; random numbers come from the global generator.

    Number: how many fields of the input, or parts of the global state, a call has changed.
    """
    subject = bench.subject
    # The backbone itself: the wrapper that adds gradients works on a copy.
    f = subject.backbone if subject.kind == "backbone" and subject.backbone is not None else subject.model
    changed = measure_mutation(f, bench.main.batch)
    text = "; ".join(f"{name}: {what}" for name, what in changed.items())
    return Outcome((Finding("side effects", float(len(changed)), 0.0, unit="changes", worst=text),))
