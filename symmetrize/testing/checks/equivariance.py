"""Do outputs turn with the input?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symmetrize.testing.checks.common import by_irrep, every_set, judged
from symmetrize.testing.measuring.elements import Element, random_elements, special_elements
from symmetrize.testing.measuring.measures import measure_equivariance
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Outcome


def _cost(bench: Bench, on: str) -> int:
    return (14 + bench.profile.n_elements) * bench[on].n_structures


def _measure(bench: Bench, on: str, elements: Sequence[Element], name: str) -> Outcome:
    bench = bench.double()
    found, subject = bench[on], bench.subject
    model, outputs = by_irrep(bench.model, subject.declared(found.batch))
    generator = bench.generator(name)
    measured = measure_equivariance(
        model,
        found.batch,
        outputs,
        elements,
        vectors=dict(subject.vectors),
        generator=generator,
        scale=bench.component_scale(found, outputs),
    )
    return judged(measured, found, bench.limit(found))


def _elements(bench: Bench, on: str, name: str, proper: bool) -> list[Element]:
    generator = bench.generator(name)
    chosen = special_elements() + bench.own_elements(bench[on])
    drawn = random_elements(bench.profile.n_elements, generator, group="SO(3)")
    chosen += drawn if proper else [Element(f"random improper {k}", -e.matrix) for k, e in enumerate(drawn)]
    return [e for e in chosen if (float(torch.linalg.det(e.matrix)) > 0.0) == proper]


@check("Rotation equivariance", claim="rotations", targets=every_set, cost=_cost, unclaimed="record")
def check_rotation_equivariance(bench: Bench, on: str) -> Outcome:
    """Turning the input turns every output by its declared representation.

    When it fails: raw coordinates reach a nonlinear layer; a vector, a tensor or the cell is not rotated, or rotated
    the wrong way round; an output does not transform as declared. If only degenerate sets fail (collinear,
    symmetric), a frame or an ordering is ill-defined there.

    Number: max over elements, rows and components of |f(g x) - rho(g) f(x)|, over the RMS over structures of the
    output minus its composition baseline. Elements: identity, 90, 120 and 180 degrees, near the identity, the
    structures' own symmetry operations, and Haar-random ones; parts of reducible outputs are listed by irrep.
    """
    name = "rotations"
    return _measure(bench, on, _elements(bench, on, name, True), name)


@check("Parity", claim="inversion", targets=every_set, cost=_cost, unclaimed="record")
def check_inversion_equivariance(bench: Bench, on: str) -> Outcome:
    """Inversion, mirrors and rotation-reflections change every output by its declared parity.

    When it fails: an output has another parity than declared (a cross product is a pseudovector, a triple product a
    pseudoscalar), or the model tells a molecule from its mirror image.

    Number: as for rotations, over improper elements.
    """
    found = _measure(bench, on, _elements(bench, on, "inversion", False), "inversion")
    return found if bench.subject.group == "O(3)" else found.unjudged()
