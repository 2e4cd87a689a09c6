"""How far the models of a cell are from reference values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symmetrize import keys
from symmetrize.errors import InvalidInputError
from symmetrize.study.prepared import PreparedCell
from symmetrize.testing import Subject, of_symmetrizer
from symmetrize.testing.measuring.scales import evaluate

#: eV to meV.
_MILLI = 1e3


def accuracy(cell: PreparedCell) -> dict[str, Any]:
    """Mean absolute and root mean square errors of all structures of the cell, bare and symmetrised.

    Returns
    -------
    dict
        ``{"bare": {quantity: {"mae", "rmse", "unit"}}, "symmetrized": {...}}``: the energy in meV per atom, components
        of forces in meV/A, other quantities component by component in their unit. A value that is not finite makes
        both errors so.
    """
    if not cell.references:
        return {"skipped": "the data set has no reference values"}
    found: dict[str, Any] = {}
    for label, model in (("bare", cell.bare), ("symmetrized", cell.model)):
        forces = "forces" in cell.references and cell.energy is not None and "forces" not in cell.outputs
        subject = of_symmetrizer(model, forces=forces, energy=cell.energy or "energy")
        found[label] = _errors(cell, subject)
    if not found["bare"]:
        return {"skipped": f"the backbone predicts none of {', '.join(sorted(cell.references))}"}
    return found


def _errors(cell: PreparedCell, subject: Subject) -> dict[str, dict[str, Any]]:
    batch = subject.prepare(cell.batch())
    wanted = {name: spec for name, spec in subject.declared(batch).items() if name in cell.references}
    out = {}
    for name, value in (evaluate(subject.model, batch, wanted) if wanted else {}).items():
        if name not in cell.references:
            continue
        target = cell.references[name].to(torch.float64)
        if target.shape != value.rows.shape:
            raise InvalidInputError(
                f"references: {name}: expected shape {tuple(value.rows.shape)}, got {tuple(target.shape)}"
            )
        error = value.rows - target
        if name == cell.energy:
            counts = batch[keys.PTR].diff().cpu().to(torch.float64)
            error, unit = _MILLI * (error if value.per == "atom" else error / counts), "meV/atom"
        elif name == "forces":
            error, unit = _MILLI * error, "meV/A"
        else:
            unit = cell.units.get(name, value.spec.unit)
        out[name] = {"mae": _mean(error.abs()), "rmse": _mean(error.square()) ** 0.5, "unit": unit}
    return out


def _mean(values: Tensor) -> float:
    return float(values.mean())
