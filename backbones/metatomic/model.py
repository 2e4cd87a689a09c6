"""`MetatomicBackbone`: an exported model as a function of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import validate, with_neighbors
from symmetrize.errors import DeclarationError, InvalidTypeError, UnknownSpeciesError
from symmetrize.metatomic.systems import add_inputs, bare_systems, blocks_of
from symmetrize.metatomic.tensor_maps import UNITS, Part, quantity, rows_of

from .edges import Edges, both_ways, one_way

#: A range of so little more than a number of neighbor lists is rounding, such as that of a unit.
TINY = 1e-6

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class MetatomicBackbone(Backbone):
    """Outputs of an exported metatomic model, in eV and angstrom; `load` makes one.

    Systems are made from the batch as it is given: positions, cell and the vectors of the neighbor lists are those of
    the (rotated) copy, no list is built again, and all structures and copies go through one call.

    Where the model gives energies of atoms, ``energy`` is their sum and ``atomic_energy`` is returned as well. What the
    model returns for atoms on their own is subtracted in float64 and added back by `baseline`: an exported energy
    includes that of the composition, thousands of eV, which would cost an average in float32 its precision.

    Parameters
    ----------
    model : metatomic.torch.AtomisticModel
        Kept, in evaluation mode for good.
    parts : dict of str to Part
        Outputs by name.
    hops : int or None
        Receptive field (see `declared_hops`).
    dtype : torch.dtype, optional
        Precision that the model was converted to; by default that of its capabilities.
    left_out : dict of str to str
        Outputs of the model that are not here, and why.
    origin : dict
        What `describe` returns; empty for a model that was not loaded from a file.

    Attributes
    ----------
    constants : dict of str to Tensor
        For each output with a baseline, that of every species up to the largest: float64.
    """

    reference: Tensor

    def __init__(
        self,
        model: Any,
        parts: Mapping[str, Part],
        *,
        hops: int | None,
        dtype: torch.dtype | None = None,
        left_out: Mapping[str, str] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        capabilities = model.capabilities()
        cutoff = list_cutoff(model)
        inputs = model.requested_inputs(True)
        super().__init__(
            outputs={name: part.spec for name, part in parts.items()},
            cutoff=cutoff,
            receptive_field=hops if cutoff is not None else None,
            vectors={name: "1o" for name in ("velocity", "momentum") if name in inputs},
        )
        self.model = model
        self.parts, self.left_out, self.origin = dict(parts), dict(left_out or {}), dict(origin or {})
        # A model that was made in memory cannot be found again.
        self.adapter = "metatomic" if self.origin else None
        self.species = tuple(int(z) for z in capabilities.atomic_types)
        self.constants: dict[str, Tensor] = {}
        # The precision, also of a model whose numbers are all in its code.
        dtype = DTYPES[capabilities.dtype] if dtype is None else dtype
        self.register_buffer("reference", torch.zeros((), dtype=dtype), persistent=False)
        self._selects = all(spec.per == "atom" for spec in self.outputs.values())
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model."""
        return self.reference.dtype

    def train(self, mode: bool = True) -> MetatomicBackbone:
        """Nothing changes in an exported model, which is to be evaluated only."""
        super().train(mode)
        self.model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MetatomicBackbone:
        super()._apply(fn, recurse)
        self.constants = {name: value.to(self.reference.device) for name, value in self.constants.items()}
        return self

    def describe(self) -> dict[str, Any]:
        """The file, its hash and how it was loaded; without a file, there is no description."""
        if not self.origin:
            return super().describe()
        return {**self.origin, "dtype": str(self.dtype).removeprefix("torch.")}

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """What the atoms would have on their own, float64."""
        z, mask = batch[keys.Z], batch.get(keys.CENTER_MASK)
        out = {}
        for name, constants in self.constants.items():
            values = constants[self._known(z)]
            if self.outputs[name].per == "atom":
                out[name] = values if mask is None else values[mask]
            else:
                out[name] = values.new_zeros(_n_structures(batch)).index_add(0, _structure(batch), values)
        return out

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Outputs of the model, energies without their `baseline`."""
        raw = self.raw(batch)
        for name, part in self.baseline(batch).items():
            raw[name] = (raw[name].to(torch.float64) - part).to(raw[name].dtype)
        return raw

    def raw(self, batch: Data) -> dict[str, Tensor]:
        """What the model returns, row for row, baselines included.

        Raises
        ------
        UnknownSpeciesError, InvalidTypeError
            The species or the precision are not those of the model.
        """
        batch = self._prepared(batch)
        pos, mask, ptr = batch[keys.POS], batch.get(keys.CENTER_MASK), batch[keys.PTR]
        whole = mask is None or bool(mask.all())
        selected = None if whole or not self._selects else _labels(mask, batch)
        requests = {part.source: request(self.model, part.source, part.spec.per) for part in self.parts.values()}
        tensors = evaluate(self.model, copied_systems(self.model, batch), requests, selected)
        out = {}
        for name, part in self.parts.items():
            rows, per_atom = rows_of(part, tensors[part.source], ptr)
            if rows.dtype != pos.dtype:
                raise InvalidTypeError(
                    f"model: expected {name!r} in the precision it was converted to ({pos.dtype}), got {rows.dtype}"
                )
            if quantity(part.source) == "non_conservative_stress":
                # Nothing but a crystal has a stress; what the model returns for the rest may not be finite.
                solid = batch[keys.PBC].all(dim=1)
                solid = solid[batch[keys.BATCH]] if per_atom else solid
                rows = torch.where(solid[:, None, None], rows, torch.zeros_like(rows))
            out[name] = rows[mask] if per_atom and mask is not None else rows
        return out

    def _prepared(self, batch: Data) -> Batch:
        """Validated, with the edges that the model needs; rotated copies bring theirs along."""
        z = batch.get(keys.Z)
        if z is None:
            raise DeclarationError("batch: expected species in 'z', a metatomic model needs them")
        self._known(z)
        if batch[keys.POS].dtype != self.dtype:
            raise InvalidTypeError(
                f"pos: expected the precision of the model ({self.dtype}), got {batch[keys.POS].dtype}; convert one of "
                "them: load(..., dtype=torch.float64), or from_ase(..., dtype=torch.float32)"
            )
        if batch.get(keys.PTR) is None or batch.get(keys.CELL) is None or batch.get(keys.PBC) is None:
            batch = validate(batch)
        if self.cutoff is not None and batch.get(keys.EDGE_VEC) is None:
            batch = with_neighbors(validate(batch), self.cutoff)
        return batch

    def _known(self, z: Tensor) -> Tensor:
        species = self.species or ()
        unknown = ~torch.isin(z, torch.tensor(species, dtype=z.dtype, device=z.device))
        if bool(unknown.any()):
            got = sorted(set(z[unknown].tolist()))
            raise UnknownSpeciesError(f"z: expected species of the model {species}, got {', '.join(map(str, got))}")
        return z.to(torch.int64)

    def __repr__(self) -> str:
        # Not the whole tree of scripted modules.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        more = f", left_out={sorted(self.left_out)}" if self.left_out else ""
        return super().extra_repr() + more


def copied_systems(model: Any, batch: Batch) -> list[Any]:
    """Systems of metatomic from a batch with edges: its own vectors, so that gradients flow to them."""
    pos, cutoff = batch[keys.POS], list_cutoff(model)
    systems = bare_systems(batch, pos, batch[keys.CELL] * batch[keys.PBC][:, :, None])
    if cutoff is not None:
        edges = Edges(batch[keys.EDGE_INDEX], batch[keys.CELL_SHIFT].to(torch.int64), batch[keys.EDGE_VEC])
        made: dict[bool, Edges] = {}
        for asked in model.requested_neighbor_lists():
            full, radius = bool(asked.full_list), float(asked.engine_cutoff("angstrom"))
            if full not in made:
                made[full] = both_ways(edges) if full else one_way(edges)
            chosen = made[full]
            if radius < cutoff * (1 - TINY):
                chosen = chosen.pick((chosen.vectors.detach().norm(dim=1) <= radius).nonzero()[:, 0])
            blocks = blocks_of(*chosen, batch[keys.BATCH], batch[keys.PTR])
            for system, block in zip(systems, blocks, strict=True):
                system.add_neighbor_list(asked, block)
    add_inputs(systems, batch, model, pos)
    return systems


def evaluate(model: Any, systems: list[Any], requests: Mapping[str, Any], selected: Any = None) -> dict[str, Any]:
    """TensorMaps by name."""
    from metatomic.torch import ModelEvaluationOptions

    options = ModelEvaluationOptions(length_unit="angstrom", outputs=dict(requests), selected_atoms=selected)
    return model(systems, options, check_consistency=False)


def request(model: Any, name: str, per: str) -> Any:
    """What is asked of the model: an output in our unit, of atoms or of structures."""
    from metatomic.torch import ModelOutput

    declared = model.capabilities().outputs[name]
    unit = UNITS.get(quantity(name), declared.unit) if declared.unit else ""
    return ModelOutput(unit=unit, sample_kind="atom" if per == "atom" else "system")


def list_cutoff(model: Any) -> float | None:
    """Largest radius of the neighbor lists that a model asks for, in angstrom."""
    radii = [float(request.engine_cutoff("angstrom")) for request in model.requested_neighbor_lists()]
    return max(radii, default=None)


def declared_hops(model: Any) -> int | None:
    """Interaction range over the radius of the largest neighbor list, rounded up; None where it has no end."""
    cutoff = list_cutoff(model)
    reach = float(model.capabilities().engine_interaction_range("angstrom"))
    if cutoff is None or not math.isfinite(reach):
        return None
    return max(1, math.ceil(reach / cutoff - TINY))


def _structure(batch: Data) -> Tensor:
    structure = batch.get(keys.BATCH)
    return torch.zeros_like(batch[keys.Z]) if structure is None else structure


def _n_structures(batch: Data) -> int:
    ptr = batch.get(keys.PTR)
    return int(_structure(batch).max()) + 1 if ptr is None else len(ptr) - 1


def _labels(mask: Tensor, batch: Data) -> Any:
    """The atoms whose outputs are wanted, as metatomic selects them."""
    from metatensor.torch import Labels

    rows = mask.nonzero()[:, 0]
    structure = batch[keys.BATCH][rows]
    values = torch.stack([structure, rows - batch[keys.PTR][structure]], dim=1).to(torch.int32)
    return Labels(["system", "atom"], values, assume_unique=True)
