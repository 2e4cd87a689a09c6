"""Errors atom by atom: where in a structure equivariance breaks, for a viewer."""

from __future__ import annotations

from typing import Any

import torch

from symmetrize import keys
from symmetrize.testing.measuring.elements import random_elements, split, transform
from symmetrize.testing.measuring.scales import evaluate
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.structures.sets import YOURS, StructureSet


def structures_with_errors(bench: Bench, *, n_elements: int = 4, limit: int = 12) -> tuple[dict[str, Any], ...]:
    """Structures of the main set and one or two of every other, with the RMS error of each atom and structure.

    An error is the RMS over random elements of the group and over components of :math:`f(g x) - \\rho(g) f(x)`, on the
    error scale.
    """
    out: list[dict[str, Any]] = []
    for name, found in bench.sets.items():
        take = min(found.n_structures, 4 if found.name in (YOURS, bench.main.name) else 1)
        if len(out) < limit:
            out += _with_errors(bench, bench.part(found, range(take)), name, n_elements)
    return tuple(out)


def _with_errors(bench: Bench, found: StructureSet, set_name: str, n_elements: int) -> list[dict[str, Any]]:
    subject, batch = bench.subject, found.batch
    outputs = subject.declared(batch)
    try:
        reference = evaluate(bench.model, batch, outputs)
    except Exception:  # reported by the checks
        return []
    squares = {name: torch.zeros(len(v.rows), dtype=torch.float64) for name, v in reference.items()}
    for element in random_elements(n_elements, bench.generator("atoms"), group=subject.group):
        changed = evaluate(bench.model, transform(batch, element, dict(subject.vectors)), outputs)
        for name, value in reference.items():
            expected = value.spec.rotate(value.rows, element.matrix.expand(len(value.rows), 3, 3))
            squares[name] += (changed[name].rows - expected).reshape(len(value.rows), -1).square().mean(dim=1)
    scales = bench.scale(found)
    errors = {
        name: (s / n_elements).sqrt() / scales[name] for name, s in squares.items() if scales.get(name, 0.0) > 0.0
    }
    ptr = batch[keys.PTR].tolist()
    drawn = []
    for k, single in enumerate(split(batch)):
        atoms = slice(ptr[k], ptr[k + 1])
        species = single.get(keys.Z)
        drawn.append(
            {
                "name": found.names[k],
                "set": set_name,
                "numbers": [0] * single[keys.POS].shape[0] if species is None else species.tolist(),
                "positions": single[keys.POS].to(torch.float64).tolist(),
                "cell": single[keys.CELL][0].to(torch.float64).tolist(),
                "pbc": single[keys.PBC][0].tolist(),
                "atom_errors": {n: e[atoms].tolist() for n, e in errors.items() if reference[n].per == "atom"},
                "structure_errors": {n: float(e[k]) for n, e in errors.items() if reference[n].per == "structure"},
            }
        )
    return drawn
