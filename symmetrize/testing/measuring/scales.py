"""The size that an error is compared with, and the rows that a declared output consists of.

Error scale of an output (see `Scale`): RMS over structures of (output minus its composition baseline). A plain relative
error of a total energy hides everything: the energy of ethanol is -4209 eV, and it varies by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import BackboneOutputError, DeclarationError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import copied, displaced

#: Anything that maps a batch to named outputs.
Model = Callable[[Data], dict[str, Tensor]]

#: Below this fraction of the response to a displacement, an output counts as zero by symmetry or by construction.
_SMALL = 1e-3


@dataclass(frozen=True)
class Values:
    """One output of one evaluation.

    Attributes
    ----------
    spec : OutputSpec
    per : {"atom", "structure"}
        What a row belongs to.
    rows : Tensor of shape (n_rows, *spec.shape), float64, on the CPU
    owner : Tensor of shape (n_rows,)
        Structure of each row.
    """

    spec: OutputSpec
    per: Literal["atom", "structure"]
    rows: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Scale:
    """What an error of an output is divided by.

    With y the output, b its composition baseline and y' the output of slightly deformed copies of the structures
    (`displaced`), RMS taken over all rows of all structures and over components,

    * ``"baseline"``: RMS(y - b). b is the least-squares fit to the invariant (0e) components alone: one constant per
      species and atom; for the output of a structure, a sum (``reduce="sum"``) or mean of them, plus a constant where
      no ``reduce`` is declared. RMS with n_rows - n_parameters in the denominator. Cartesian tensors and components
      of l > 0 or odd parity have no baseline: forces are compared with the RMS force.
    * ``"displacement"``: RMS(y' - y), where there are too few structures for the fit, or where RMS(y - b) is smaller
      than a thousandth of this: zero by symmetry (the dipole of methane, forces in a perfect crystal).
    * ``"given"``: by the caller.
    * ``"none"``: the output is zero, or invariant and untouched by the deformation: a constant as far as can be seen.
      ``value`` is 0 and nothing passes, because a constant proves nothing.

    Attributes
    ----------
    value : float
    kind : str
    magnitude : float
        Largest absolute value of the output: times epsilon it is what one rounding of the output amounts to.
    """

    value: float
    kind: str
    magnitude: float

    def relative(self, error: float) -> float:
        """``error / value``; infinite where that is not a finite number, or where the scale is zero."""
        if not math.isfinite(error) or not self.value > 0.0 or not math.isfinite(self.value):
            return math.inf
        return error / self.value


def declared(outputs: Mapping[str, OutputSpec], *, forces: bool = False, stress: bool = False) -> dict[str, OutputSpec]:
    """Declarations of the outputs of a model, conservative forces and stress included."""
    out = dict(outputs)
    if forces:
        out["forces"] = OutputSpec("1o")
    if stress:
        out["stress"] = OutputSpec(cartesian="ij=ji", per="structure")
    return out


def evaluate(f: Model, batch: Data, outputs: Mapping[str, OutputSpec]) -> dict[str, Values]:
    """Evaluate on a copy of a validated batch, and find the rows of every declared output.

    An output with ``reduce`` may come as rows of the structures, with or without ``atomic_<name>`` beside it, or (from
    a bare backbone) as rows of the atoms; the number of rows tells.

    Raises
    ------
    BackboneOutputError
        A declared output is missing or has another shape.
    """
    result = f(copied(batch))
    if not isinstance(result, Mapping):
        raise BackboneOutputError(f"model: expected a dict of outputs, got {type(result).__name__}")
    structure = batch[keys.BATCH].cpu()
    mask = batch.get(keys.CENTER_MASK)
    owners = {
        "atom": structure if mask is None else structure[mask.cpu()],
        "structure": torch.arange(batch[keys.PTR].shape[0] - 1),
    }
    out: dict[str, Values] = {}

    def take(name: str, spec: OutputSpec, allowed: tuple[Literal["atom", "structure"], ...]) -> None:
        value = result[name].detach()
        if value.is_complex():
            raise BackboneOutputError(f"{name}: expected real numbers, got {value.dtype}")
        value = value.to("cpu", torch.float64)
        if not spec.shape and value.dim() == 2 and value.shape[1] == 1:
            value = value[:, 0]  # scalars often come as columns
        for per in allowed:
            if value.shape == (len(owners[per]), *spec.shape):
                out[name] = Values(spec, per, value, owners[per])
                return
        expected = " or ".join(str((len(owners[per]), *spec.shape)) for per in allowed)
        raise BackboneOutputError(f"{name}: expected shape {expected} as declared ({spec}), got {tuple(value.shape)}")

    for name, spec in outputs.items():
        if name not in result:
            near = did_you_mean(name, result)
            raise BackboneOutputError(f"{name}: declared, but not among the outputs that the model returned; {near}")
        atomic = f"atomic_{name}"
        if spec.reduce is None:
            take(name, spec, (spec.per,))
        elif atomic in result and atomic not in outputs:
            take(name, spec, ("structure",))
            take(atomic, spec, ("atom",))
        else:
            take(name, spec, ("structure", "atom"))
    return out


def error_scale(
    f: Model, batch: Data, outputs: Mapping[str, OutputSpec], *, reference: dict[str, Values] | None = None
) -> dict[str, Scale]:
    """Error scale of every output (see `Scale`), for measurements on this or on other batches.

    Costs two evaluations; ``reference`` is the first of them where it is there already.
    """
    values = evaluate(f, batch, outputs) if reference is None else reference
    moved = evaluate(f, displaced(batch, torch.Generator().manual_seed(3)), outputs)
    eps = torch.finfo(batch[keys.POS].dtype).eps
    out = {}
    for name, value in values.items():
        magnitude = float(value.rows.abs().max()) if value.rows.numel() else 0.0
        # What could be rounding is no variation.
        floor = 100 * eps * magnitude
        own = _rms_residual(value, batch)
        response = _rms(moved[name].rows - value.rows)
        own, response = (x if x is not None and math.isfinite(x) and x > floor else 0.0 for x in (own, response))
        if response == 0.0:
            turning = _rms(value.rows - value.spec.project_invariant(value.rows, "SO(3)"))
            own = own if turning > floor else 0.0
        if own > 0.0 and own >= _SMALL * response:
            out[name] = Scale(own, "baseline", magnitude)
        elif response > 0.0:
            out[name] = Scale(response, "displacement", magnitude)
        else:
            out[name] = Scale(0.0, "none", magnitude)
    return out


def resolve_scale(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    reference: dict[str, Values],
    given: Mapping[str, Scale | float] | None,
) -> dict[str, Scale]:
    """`error_scale` for the outputs whose scale is not given."""
    given = given or {}
    if unknown := [name for name in given if name not in reference]:
        raise DeclarationError(f"scale: unknown output {unknown[0]!r}, {did_you_mean(unknown[0], reference)}")
    out = {} if all(name in given for name in reference) else error_scale(f, batch, outputs, reference=reference)
    for name, scale in given.items():
        rows = reference[name].rows
        magnitude = float(rows.abs().max()) if rows.numel() else 0.0
        value = scale.value if isinstance(scale, Scale) else float(scale)
        out[name] = Scale(value, "given", magnitude)
    return out


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _rms_residual(value: Values, batch: Data) -> float | None:
    """RMS(y - b), or None where there are not enough rows to tell b from y."""
    rows = value.rows.reshape(len(value.rows), -1)
    if value.spec.cartesian is not None:
        return _rms(rows)
    invariant = torch.tensor(
        [ir.l == 0 and ir.p == 1 for mul, ir in o3.Irreps(value.spec.irreps) for _ in range(mul * ir.dim)]
    )
    if not bool(invariant.any()):
        return _rms(rows)
    if not bool(torch.isfinite(rows).all()):
        return None
    rest = rows[:, ~invariant]
    design = _composition(value, batch)
    n_free = len(rows) - int(torch.linalg.matrix_rank(design))
    if n_free < 1:
        return _rms(rest) if rest.numel() else None
    y = rows[:, invariant]
    fit = design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    squares = float((y - fit).square().sum()) * len(rows) / n_free + float(rest.square().sum())
    return math.sqrt(squares / rows.numel())


def _composition(value: Values, batch: Data) -> Tensor:
    """Design matrix of the composition baseline: Tensor of shape (n_rows, n_parameters), float64."""
    species = batch.get(keys.Z)
    z = torch.zeros_like(batch[keys.BATCH]) if species is None else species
    structure = batch[keys.BATCH].cpu()
    one_hot = torch.nn.functional.one_hot(torch.unique(z.cpu(), return_inverse=True)[1]).to(torch.float64)
    if value.per == "atom":
        mask = batch.get(keys.CENTER_MASK)
        return one_hot if mask is None else one_hot[mask.cpu()]
    n_structures = batch[keys.PTR].shape[0] - 1
    counts = torch.zeros(n_structures, one_hot.shape[1], dtype=torch.float64).index_add(0, structure, one_hot)
    if value.spec.reduce == "sum":
        return counts
    if value.spec.reduce == "mean":
        return counts / counts.sum(dim=1, keepdim=True)
    return torch.cat([counts, torch.ones(n_structures, 1, dtype=torch.float64)], dim=1)
