"""What symmetry demands: of turned, renumbered and repeated input, and of structures that are symmetric themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import from_ase
from symmetrize.errors import BackboneOutputError, SymmetrizeError
from symmetrize.ops.rotations import random_rotations
from symmetrize.representations import OutputSpec
from symmetrize.study.measures.common import Stage, are_crystals, generator_of, refusal, relative, size_of, stage
from symmetrize.study.prepared import PreparedCell
from symmetrize.testing import (
    GEOMETRIES,
    Element,
    Subject,
    measure_determinism,
    measure_equivariance,
    measure_orientation_variance,
    measure_permutation,
    measure_symmetric_sites,
    random_elements,
    transform,
)
from symmetrize.testing.measuring.scales import Model, evaluate
from symmetrize.testing.structures.sets import mapped

#: Symmetric structures, those with the best known failures first: for finite data, and for crystals.
SYMMETRIC = {
    "finite": (
        *("methane", "CO2", "benzene", "isolated atom", "SF6", "ammonia", "square", "propyne"),
        *("C2H2", "H2", "water", "water at 180 degrees", "triangle", "hexagon", "rotated methane", "CO2 along x"),
    ),
    "periodic": ("silicon", "fcc Al", "bcc Fe, cubic cell", "diamond", "bcc Fe", "sc Po", "fcc Al, cubic cell"),
}


def equivariance(cell: PreparedCell) -> dict[str, Any]:
    """Equivariance error under random rotations, and under as many with inversion.

    Returns
    -------
    dict
        ``{"rotations": {output: {"max", "rms"}}, "inversion": {...}}`` on the error scale. The inversion is measured
        for methods that average over rotations alone, too.
    """
    on = stage(cell)
    elements = random_elements(max(1, size_of(cell, "elements")), generator_of(cell), group="SO(3)")
    found = {}
    for label, chosen in (
        ("rotations", elements),
        ("inversion", [Element(f"{e.name}, inverted", -e.matrix) for e in elements]),
    ):
        measured = measure_equivariance(
            on.model.model, on.batch, on.outputs, chosen, vectors=on.vectors, scale=on.scale
        )
        found[label] = {name: {"max": d.relative, "rms": d.relative_rms} for name, d in measured.outputs.items()}
    return found


def variance(cell: PreparedCell) -> dict[str, Any]:
    """Standard deviation over orientations, by a quadrature of the group.

    The orientations are those of the quadrature behind one random rotation: average over the same rotations as the
    measure does, and you would seem exact.

    Returns
    -------
    dict
        ``{"bare": {output: number}, "symmetrized": {output: number}, "elements": int}``, relative to the error scale.
    """
    on = stage(cell, size_of(cell, "variance_structures"))
    degree = size_of(cell, "degree")
    behind = Element("random", random_rotations(1, generator_of(cell))[0])
    found: dict[str, Any] = {}
    for label, subject in (("bare", on.bare), ("symmetrized", on.model)):
        spectra = measure_orientation_variance(
            _conjugated(subject, on, behind),
            on.batch,
            on.outputs,
            group=cell.group,
            vectors=on.vectors,
            degree=degree,
            l_max=degree // 2,
            scale=on.scale,
        )
        found[label] = {name: spectrum.relative for name, spectrum in spectra.items()}
        found["elements"] = max((spectrum.n_elements for spectrum in spectra.values()), default=0)
    return found


def _conjugated(subject: Subject, on: Stage, behind: Element) -> Model:
    """rho(h)^-1 f(h x): as equivariant as f."""
    specs: dict[str, OutputSpec] = {**on.outputs, **{f"atomic_{name}": spec for name, spec in on.outputs.items()}}

    def f(batch: Data) -> dict[str, Tensor]:
        out = subject.model(transform(batch, behind, on.vectors))
        return {
            name: specs[name].rotate(rows.detach().to(torch.float64), behind.matrix.T.expand(len(rows), 3, 3))
            for name, rows in out.items()
            if name in specs
        }

    return f


def permutation(cell: PreparedCell) -> dict[str, Any]:
    """Largest change when atoms are renumbered, in the structures of the cell and in symmetric ones.

    Symmetric structures are where ties are broken by an order. Those that the method refuses are left out, and named
    by `symmetric`.

    Returns
    -------
    dict
        ``{output: number}`` relative to the error scale; ``"symmetric"`` holds, by structure, the largest of any
        output.
    """
    on = stage(cell)
    generator = generator_of(cell)
    n = max(1, size_of(cell, "permutations"))

    def errors(batch: Batch) -> dict[str, float]:
        outputs = {name: spec for name, spec in on.model.declared(batch).items() if name in on.outputs}
        measured = measure_permutation(
            on.model.model, batch, outputs, n_permutations=n, generator=generator, scale=_within(on.scale, outputs)
        )
        return relative(measured)

    found = errors(on.batch) if bool((on.batch[keys.PTR].diff() > 1).any()) else {}
    every: dict[str, Any] = dict(found)
    degenerate = {}
    for name, batch in _symmetric(cell, on).items():
        if bool((batch[keys.PTR].diff() < 2).any()):
            continue
        one, refused = _tried(lambda batch=batch: errors(batch))  # type: ignore[misc]
        if refused is None and one:
            degenerate[name] = max(one.values())
            for output, number in one.items():
                every[output] = max(every.get(output, 0.0), number)
    return {**every, "symmetric": degenerate}


def determinism(cell: PreparedCell) -> dict[str, Any]:
    """Largest change from call to call with the same input.

    Methods that draw something are called as they would be in sampling: each call with another generator.

    Returns
    -------
    dict
        ``{output: number}`` relative to the error scale: 0 for a function.
    """
    on = stage(cell)
    symmetrizer = on.model.symmetrizer
    if symmetrizer is None or not symmetrizer.method.stochastic:
        return dict(relative(measure_determinism(on.model.model, on.batch, on.outputs, scale=on.scale)))
    calls = iter(range(1000))
    forces = on.model.energy is not None

    def f(batch: Data) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * cell.seed + next(calls))
        with torch.set_grad_enabled(forces):
            return symmetrizer(
                batch,
                forces=forces,
                stress="stress" in on.outputs,
                energy=on.model.energy or "energy",
                generator=generator,
            )

    return dict(relative(measure_determinism(f, on.batch, on.outputs, scale=on.scale)))


def symmetric(cell: PreparedCell) -> dict[str, Any]:
    """What is forbidden by the symmetry of well-known structures: forces in a crystal, the dipole of methane.

    Each is turned at random first, the same for all methods: coordinate axes have a symmetry of their own.

    Returns
    -------
    dict
        ``{"structures": {name: {"error", "equivariance", "finite", "refused"}}}``: the largest forbidden part of any
        output, from one evaluation, and the largest equivariance error, which energies have too, both on the error
        scale (NaN where symmetry demands nothing, or where there is no number); whether all numbers are finite, and
        what the method says where it refuses the structure (else None).
    """
    on = stage(cell, double=True)
    generator = generator_of(cell)
    turn = random_elements(1, generator, group="SO(3)")[0]
    elements = random_elements(2, generator, group=cell.group)  # with O(3), the second one is improper
    found = {}
    for name, given in _symmetric(cell, on).items():
        batch = transform(given, turn, on.vectors)
        outputs = {k: spec for k, spec in on.model.declared(batch).items() if k in on.outputs}
        scale = _within(on.scale, outputs)
        entry: dict[str, Any] = {"error": math.nan, "equivariance": math.nan, "finite": False, "refused": None}
        try:
            values = evaluate(on.model.model, batch, outputs)
            entry["finite"] = all(bool(torch.isfinite(value.rows).all()) for value in values.values())
            sites = measure_symmetric_sites(
                on.model.model, batch, outputs, group=cell.group, vectors=on.vectors, scale=scale
            )
            entry["error"] = max((one.relative for one in sites.values()), default=math.nan)
            turned = measure_equivariance(on.model.model, batch, outputs, elements, vectors=on.vectors, scale=scale)
            entry["equivariance"] = turned.relative
        except BackboneOutputError:
            entry["finite"] = False  # a Symmetrizer hands on no numbers that are not finite
        except SymmetrizeError as error:
            entry["refused"] = refusal(error)
        found[name] = entry
    return {"structures": found}


def _symmetric(cell: PreparedCell, on: Stage) -> dict[str, Batch]:
    """Named symmetric structures of the species and the kind (molecules or crystals) that the cell is about."""
    kind = "periodic" if are_crystals(cell) else "finite"
    names = SYMMETRIC[kind][: size_of(cell, "sites")]
    return {
        name: on.model.prepare(from_ase([mapped(GEOMETRIES[name](), on.model)], dtype=on.batch[keys.POS].dtype))
        for name in names
    }


def _within(scale: dict[str, float], outputs: dict[str, OutputSpec]) -> dict[str, float]:
    """Scales of some of the outputs, with their rows of atoms."""
    return {name: value for name, value in scale.items() if name.removeprefix("atomic_") in outputs}


def _tried(measure: Callable[[], dict[str, float]]) -> tuple[dict[str, float], str | None]:
    try:
        return measure(), None
    except SymmetrizeError as error:
        return {}, refusal(error)
