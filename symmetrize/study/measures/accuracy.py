"""How far the models of a cell are from reference values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.errors import InvalidInputError
from symmetrize.ops.ragged import segment_sum
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
        ``{"bare": {quantity: {"mae", "rmse", "unit"}}, "symmetrized": {...}, "constant": {...}}``: the energy in meV
        per atom, components of forces in meV/A, other quantities component by component in their unit. A value that is
        not finite makes both errors so. ``"constant"`` is what a model is measured by: the errors of no forces, of an
        energy per atom beside the composition baseline that is the mean over these very structures, and of the mean of
        all rows of other quantities.
    """
    if not cell.references:
        return {"skipped": "the data set has no reference values"}
    found: dict[str, Any] = {}
    for label, model in (("bare", cell.bare), ("symmetrized", cell.model)):
        forces = "forces" in cell.references and cell.energy is not None and "forces" not in cell.outputs
        subject = of_symmetrizer(model, forces=forces, energy=cell.energy or "energy")
        found[label], found["constant"] = _errors(cell, subject)
    if not found["bare"]:
        return {"skipped": f"the backbone predicts none of {', '.join(sorted(cell.references))}"}
    return found


def _errors(cell: PreparedCell, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors of a model, and of constants in its place."""
    batch = subject.prepare(cell.batch())
    counts = batch[keys.PTR].diff().cpu().to(torch.float64)
    wanted = {name: spec for name, spec in subject.declared(batch).items() if name in cell.references}
    errors: dict[str, Any] = {}
    constant: dict[str, Any] = {}
    for name, value in (evaluate(subject.model, batch, wanted) if wanted else {}).items():
        if name not in cell.references:
            continue
        target = cell.references[name].to(torch.float64)
        if target.shape != value.rows.shape:
            raise InvalidInputError(
                f"references: {name}: expected shape {tuple(value.rows.shape)}, got {tuple(target.shape)}"
            )
        error, rest, unit = value.rows - target, target, cell.units.get(name, value.spec.unit)
        if name == cell.energy:
            size = torch.ones_like(target) if value.per == "atom" else counts
            rest = (target - _baseline(cell, batch, name, value.per).reshape(target.shape)) / size
            error, rest, unit = _MILLI * error / size, _MILLI * rest, "meV/atom"
        if name == "forces":
            error, rest, unit = _MILLI * error, _MILLI * rest, "meV/A"
        else:
            rest = rest - rest.mean(dim=0)
        for found, deviation in ((errors, error), (constant, rest)):
            found[name] = {"mae": _mean(deviation.abs()), "rmse": _mean(deviation.square()) ** 0.5, "unit": unit}
    return errors, constant


def _baseline(cell: PreparedCell, batch: Batch, name: str, per: str) -> Tensor:
    """Composition energies: Tensor of shape (n_atoms,) or (n_structures,), float64."""
    rows = cell.backbone.baseline(batch).get(name)
    if rows is None:
        rows = torch.zeros(batch[keys.POS].shape[0])
    rows = rows.detach().to("cpu", torch.float64)
    return rows if per == "atom" else segment_sum(rows, batch[keys.BATCH].cpu(), batch[keys.PTR].shape[0] - 1)


def _mean(values: Tensor) -> float:
    return float(values.mean())
