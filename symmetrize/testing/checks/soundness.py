"""Without these, other numbers mean nothing: outputs that repeat, are finite, and depend on the input."""

from __future__ import annotations

import torch

from symmetrize.testing.checks.common import every_set, judged
from symmetrize.testing.measuring.measures import measure_determinism
from symmetrize.testing.measuring.scales import evaluate
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome


@check("Determinism", claim="determinism", cost=lambda bench, on: 5 * bench.main.n_structures)
def check_determinism(bench: Bench, on: str) -> Outcome:
    """The same input gives the same output: at once, with another global seed, and after other input.

    When it fails: nothing else that was measured can be relied on. Dropout or noise is on (was ``eval()`` called?);
    frames or neighbors are drawn at random; the model keeps state between calls.

    Number: max over repetitions, rows and components of the change, on the error scale.
    """
    found = bench.main
    measured = measure_determinism(
        bench.model, found.batch, bench.subject.declared(found.batch), scale=bench.scale(found)
    )
    return judged(measured, found, bench.limit(found))


@check(
    "Finite outputs",
    claim=None,
    targets=every_set,
    cost=lambda bench, on: bench[on].n_structures,
)
def check_finite_outputs(bench: Bench, on: str) -> Outcome:
    """Every output is a number, on degenerate structures too.

    When it fails: a division by a distance, a norm or an eigenvalue gap that vanishes; the square root of zero in a
    backward pass; an overflow.

    Number: how many components of an output are NaN or infinite.
    """
    found = bench[on]
    values = evaluate(bench.model, found.batch, bench.subject.declared(found.batch))
    out = []
    for name, value in values.items():
        bad = ~torch.isfinite(value.rows.reshape(len(value.rows), -1)).all(dim=1)
        owners = sorted({found.names[int(k)] for k in value.owner[bad]})
        out.append(Finding(name, float(bad.sum()), 0.0, unit="rows", worst=", ".join(owners)[:200]))
    return Outcome(tuple(out))


@check("Outputs depend on the input", claim=None, cost=lambda bench, on: 0)
def check_nontrivial_outputs(bench: Bench, on: str) -> Outcome:
    """Every output changes when the structures are deformed, beyond rounding: a constant is equivariant and useless.

    When it fails: the output is zero or depends on the composition only (a last layer initialised to zero, a detached
    branch, a parameter that was not loaded); or it is forced to vanish by the parity that was declared.

    Number: rounding of the output over its error scale; 1 where nothing but rounding is left.
    """
    eps = torch.finfo(bench.subject.dtype).eps
    out = []
    for name, scale in bench.scales.items():
        ratio = 1.0 if not scale.value > 0.0 else min(1.0, eps * scale.magnitude / scale.value)
        out.append(Finding(name, ratio, 0.1, scale=scale.value, worst=f"scale from {scale.kind}"))
    return Outcome(tuple(out))
