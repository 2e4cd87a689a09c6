"""What the symmetry of a structure forbids, and what it makes degenerate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symmetrize import keys
from symmetrize.testing.measuring.sites import measure_degeneracies, measure_symmetric_sites
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome


def _symmetric(bench: Bench) -> Sequence[str]:
    """Sets in which a structure has a symmetry operation besides the identity."""
    return [name for name, found in bench.sets.items() if _chosen(bench, name)]


def _chosen(bench: Bench, on: str) -> list[int]:
    both = bench.subject.judged_group == "O(3)"
    counts = [sum(both or float(torch.linalg.det(o.matrix)) > 0.0 for o in ops) for ops in bench.operations(bench[on])]
    return [k for k, count in enumerate(counts) if count > 1]


@check(
    "What symmetry forbids",
    claim="rotations",
    targets=_symmetric,
    cost=lambda bench, on: bench[on].n_structures,
    unclaimed="record",
)
def check_symmetric_sites(bench: Bench, on: str) -> Outcome:
    """Outputs have the symmetry of the structure: no forces in a perfect crystal, no dipole of methane, equal energies
    of equivalent atoms.

    When it fails: relaxations leave the space group, phonon branches split, spectra show forbidden lines. A preferred
    direction, a frame that breaks ties, or an average over too few orientations.

    Number: max over rows and components of |f(x) - 1/|G| sum_g rho(g) P_g f(x)| over the symmetry operations g of the
    structure, from a single evaluation, on the error scale.
    """
    bench = bench.double()
    found, subject = bench[on], bench.subject
    part = bench.part(found, _chosen(bench, on))
    measured = measure_symmetric_sites(
        bench.model,
        part.batch,
        subject.declared(part.batch),
        group=subject.judged_group,
        scale=bench.scale(found),
        vectors=dict(subject.vectors),
    )
    if not measured:
        return Outcome((Finding("outputs that symmetry demands something of", 0.0, unit="outputs"),))
    # The structures are symmetric to rounding only: operations are found to 1e-6, and positions carry errors of 1e-16.
    limit, eps = 10.0 * bench.limit(found), torch.finfo(subject.dtype).eps
    return Outcome(
        tuple(
            Finding(
                name,
                one.relative,
                limit + 8.0 * eps * one.scale.relative(one.scale.magnitude),
                rms=one.relative_rms,
                scale=one.scale.value,
                worst=f"{part.names[one.worst]}, {one.n_operations[int(one.max.argmax())]} operations",
            )
            for name, one in measured.items()
        )
    )


def _molecules(bench: Bench) -> Sequence[str]:
    if "forces" not in bench.subject.outputs:
        return []
    return [name for name in ("symmetric", "crystals", "yours") if name in bench.sets and _small(bench, name)]


def _small(bench: Bench, on: str) -> list[int]:
    counts = bench[on].batch[keys.PTR].diff().tolist()
    return [k for k in _chosen(bench, on) if 2 < counts[k] <= 12]


@check(
    "Degenerate vibrations",
    claim="rotations",
    targets=_molecules,
    cost=lambda bench, on: 24 * int(bench[on].batch[keys.PTR].diff()[_small(bench, on)[0]]),
    unclaimed="record",
)
def check_degeneracy_splitting(bench: Bench, on: str) -> Outcome:
    """Vibrational modes that symmetry makes degenerate have equal frequencies.

    When it fails: the energy depends on orientation, and the dynamical matrix has lost the symmetry of the structure.

    Number: largest spread of the eigenvalues of the Hessian within a space that symmetry makes degenerate, over the
    RMS eigenvalue. Hessian by finite differences of the forces, unit masses.
    """
    bench = bench.double()
    chosen = _small(bench, on)[0]
    part = bench.part(bench[on], [chosen])
    measured = measure_degeneracies(bench.model, part.batch)
    note = ", ".join(f"{c.eigenvalue:.4g} (x{c.multiplicity})" for c in measured.clusters)
    if not any(c.multiplicity > 1 for c in measured.clusters):
        return Outcome((Finding("splitting", 0.0, 1e-3, worst=f"{part.names[0]}: nothing degenerate"),))
    limit = min(max(1e-6, 20.0 * measured.uncertainty), 1e-2)
    if bench.subject.tolerance is not None:
        limit = max(limit, 10.0 * bench.subject.tolerance)
    worst = f"{part.names[0]}; finite differences good to {measured.uncertainty:.1g}"
    return Outcome(
        (Finding("splitting", measured.relative, limit, unit="of the RMS eigenvalue", worst=worst),),
        note=f"eigenvalues: {note}"[:300],
    )
