"""Whether far things leave each other alone."""

from __future__ import annotations

import math
from typing import Any

from symmetrize import keys
from symmetrize.errors import SymmetrizeError
from symmetrize.study.measures.common import Stage, generator_of, refusal, relative, size_of, stage
from symmetrize.study.prepared import PreparedCell
from symmetrize.testing import measure_periodicity, random_elements
from symmetrize.testing.measuring.locality import measure_local_equivariance, measure_size_consistency

#: Between structures where the backbone does not say how far it sees, angstrom.
_FAR = 20.0


def locality(cell: PreparedCell) -> dict[str, Any]:
    """Size consistency, and equivariance when one structure turns and another one, far away, does not.

    Pairs of finite structures are further apart than the backbone sees: their energies have to add up, the forces of
    each to stay those of the isolated structure, and to turn with it alone; the same in a periodic box, for backbones
    that read neighbor lists. Crystals are compared with their supercells instead; they cannot turn by parts.

    Returns
    -------
    dict
        ``"size_consistency"``, ``"local_equivariance"``: largest relative error of any output; ``"outputs"``: both by
        output; ``"refused"``: what the method says where it refuses a pair; ``"box"``: these entries in a periodic box;
        ``"distance"`` (angstrom). NaN where there is no number.
    """
    on = stage(cell, size_of(cell, "pairs"))
    pbc = on.batch[keys.PBC]
    if bool(pbc.all()):
        return _supercells(on)
    if bool(pbc.any()):
        return {"skipped": "structures that are neither finite nor periodic in all directions"}
    backbone = cell.backbone
    reach = None if backbone.cutoff is None or backbone.receptive_field is None else backbone.receptive_field
    distance = _FAR if reach is None else max(reach, 1) * float(backbone.cutoff or 0.0) + 1.0
    isolated = _pair_errors(cell, on, distance, periodic=False)
    box = None if backbone.cutoff is None else _pair_errors(cell, on, distance, periodic=True)
    return {
        "size_consistency": isolated["size_consistency"],
        "local_equivariance": isolated["local_equivariance"],
        "outputs": isolated["outputs"],
        "box": box,
        "distance": distance,
        "refused": isolated["refused"],
    }


def _pair_errors(cell: PreparedCell, on: Stage, distance: float, *, periodic: bool) -> dict[str, Any]:
    generator = generator_of(cell)
    elements = random_elements(max(1, size_of(cell, "turns")), generator, group=cell.group)
    found: dict[str, Any] = {"outputs": {}, "refused": None}
    for name in ("size_consistency", "local_equivariance"):
        try:
            if name == "size_consistency":
                measured = measure_size_consistency(
                    on.model.model, on.batch, on.outputs, distance=distance, periodic=periodic, scale=on.scale
                )
            else:
                measured = measure_local_equivariance(
                    on.model.model,
                    on.batch,
                    on.outputs,
                    elements,
                    distance=distance,
                    periodic=periodic,
                    vectors=on.vectors,
                    scale=on.scale,
                )
            found[name], found["outputs"][name] = measured.relative, relative(measured)
        except SymmetrizeError as error:
            found[name], found["refused"] = math.nan, refusal(error)
    return found


def _supercells(on: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {"size_consistency": math.nan, "local_equivariance": math.nan, "refused": None}
    try:
        measured = measure_periodicity(on.model.model, on.batch, on.outputs, repeats=(2, 1, 1), scale=on.scale)
    except SymmetrizeError as error:
        return {**found, "refused": refusal(error)}
    by_output = {}
    for name, one in measured.outputs.items():
        case = next((n for n, label in enumerate(one.cases) if label.startswith("supercell")), None)
        if case is not None:
            by_output[name] = one.scale.relative(float(one.max[case].max()))
    largest = max(by_output.values(), default=math.nan)
    return {**found, "size_consistency": largest, "outputs": {"size_consistency": by_output}}
