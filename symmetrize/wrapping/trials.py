"""A backbone on a few small structures of different sizes: evaluated, changed, compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone, n_centers
from symmetrize.data import assemble, replace, validate, with_neighbors
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidInputError, SymmetrizeError
from symmetrize.representations import OutputSpec

#: Rounding relative to the variation of an output, and to its size, in units of eps.
VARIATION_FACTOR, SIZE_FACTOR = 1e4, 1e3

EDGE_FIELDS = (keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC, keys.EDGE_CUTOFF)


class ProbeFailure(DeclarationError):
    """A backbone does not do what was declared; ``property`` names what was tried."""

    def __init__(self, property: str, message: str) -> None:
        super().__init__(message)
        self.property = property


def synthetic_batch(backbone: Backbone, sizes: tuple[int, ...] = (7, 4, 6), seed: int = 0) -> Batch:
    """Random clusters with species and the vectors that a backbone declares, some of them within its cutoff.

    Parameters
    ----------
    backbone : Backbone
        Species are those that it knows, or H, C and O.
    sizes : tuple of int
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, spacing = backbone.dtype, 1.4 if backbone.cutoff is None else 0.45 * backbone.cutoff
    points = []
    for n in sizes:
        side = 1 + int((n - 1e-9) ** (1 / 3))
        axis = torch.arange(side, dtype=torch.float64)
        lattice = torch.cartesian_prod(axis, axis, axis)
        chosen = lattice[torch.randperm(len(lattice), generator=generator)[:n]]
        jitter = 0.4 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
        points.append(spacing * (chosen + jitter))
    n_atoms = sum(sizes)
    known = torch.tensor(backbone.species or (1, 6, 8))
    fields = {keys.Z: known[torch.arange(n_atoms) % len(known)]}
    for name, irreps in backbone.vectors.items():
        fields[name] = torch.randn(n_atoms, *OutputSpec(irreps).shape, generator=generator, dtype=torch.float64)
    fields = {name: v.to(dtype) if v.is_floating_point() else v for name, v in fields.items()}
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    batch = assemble(pos=torch.cat(points).to(dtype), counts=torch.tensor(sizes), **fields)
    return validate(batch.to(device))


@dataclass(frozen=True)
class Scale:
    """RMS of an output, and of its change when atoms move: what errors are judged by."""

    size: float
    variation: float

    def limit(self, dtype: torch.dtype) -> float:
        """Largest difference that rounding explains."""
        eps = torch.finfo(dtype).eps
        # An output that depends on nothing is judged by its size.
        return eps * (VARIATION_FACTOR * (self.variation or self.size) + SIZE_FACTOR * self.size)


class Trial:
    """A backbone, structures of different sizes, what it gives for them, and how much that varies."""

    def __init__(self, backbone: Backbone, batch: Data, seed: int) -> None:
        self.backbone = backbone
        self.generator = torch.Generator().manual_seed(seed)
        batch = validate(batch)
        counts = batch[keys.PTR].diff()
        if int(counts.max()) < 2:
            raise InvalidInputError("probe: expected a structure with two or more atoms, got single atoms")
        if len(counts) == 1:
            # Few atoms less: a network may need a minimal number of neighbors.
            fewer = torch.arange(int(counts) - max(1, int(counts) // 8), device=counts.device)
            everything = torch.arange(int(counts), device=counts.device)
            both = torch.zeros(2, dtype=torch.int64, device=counts.device)
            batch = taken(batch, torch.cat([everything, fewer]), both, torch.tensor([len(everything), len(fewer)]))
        self.batch = with_edges(backbone, batch)
        self.reference = self.run(self.batch)
        radii = [_radius(pos) for pos in self.batch[keys.POS].split(self.batch[keys.PTR].diff().tolist())]
        self.length = max(radii)
        moved = self.run(self.displaced(0.15 * self.length))
        self.scales = {name: Scale(rms(value), rms(moved[name] - value)) for name, value in self.reference.items()}

    def run(self, batch: Data) -> dict[str, Tensor]:
        """Outputs for a copy of a batch, checked."""
        return evaluate(self.backbone, copied(batch))

    def displaced(self, size: float) -> Batch:
        pos = self.batch[keys.POS]
        return with_edges(self.backbone, replace(self.batch, **{keys.POS: pos + size * self.normal(pos.shape)}))

    def normal(self, shape: Any) -> Tensor:
        pos = self.batch[keys.POS]
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(pos)

    def compare(
        self, property: str, got: dict[str, Tensor], expected: dict[str, Tensor], what: str, cause: str
    ) -> None:
        """A failure if any output differs by more than rounding."""
        dtype = self.batch[keys.POS].dtype
        for name, value in expected.items():
            scale, spec = self.scales[name], self.backbone.outputs[name]
            error = float((got[name] - value).abs().max()) if value.numel() else 0.0
            limit = scale.limit(dtype)
            if not error <= limit:
                raise ProbeFailure(
                    property,
                    f"{property}: output {name!r} ({spec}): expected {what} to change nothing, got a change of "
                    f"{error:.2g} where its size is {scale.size:.2g} and rounding allows {limit:.1g}. {cause}",
                )


def evaluate(backbone: Backbone, batch: Data) -> dict[str, Tensor]:
    """Outputs of a backbone without gradients, or a `ProbeFailure` that says what is wrong with them."""
    try:
        with torch.no_grad():
            got = backbone(batch)
    except BackboneOutputError as error:
        raise ProbeFailure("outputs", str(error)) from error
    except SymmetrizeError:
        raise
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        hint = ""
        if "dtype" in text or "same type" in text or "Double" in text:
            hint = f" Positions are {batch[keys.POS].dtype}: convert the module, .to(torch.float64), or the batch."
        elif isinstance(error, IndexError):
            hint = " Where species are looked up: declare those that the module knows, species=(...)."
        raise ProbeFailure(
            "call",
            f"call: expected the module to run on structures of {batch[keys.PTR].diff().tolist()} atoms, got "
            f"{type(error).__name__}: {text}.{hint}",
        ) from error
    if not isinstance(got, dict):
        raise ProbeFailure("outputs", f"outputs: expected a dict, got {type(got).__name__}")
    n_structures = batch[keys.PTR].shape[0] - 1
    for name, spec in backbone.outputs.items():
        value = got.get(name)
        if not isinstance(value, Tensor):
            raise ProbeFailure("outputs", f"outputs: expected a Tensor {name!r}, got {sorted(got)}")
        shape = (n_centers(batch) if spec.per == "atom" else n_structures, *spec.shape)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ProbeFailure(
                "outputs",
                f"output {name!r} ({spec}): expected floating-point values of shape {shape}, got {value.dtype} "
                f"{tuple(value.shape)}",
            )
        if not bool(torch.isfinite(value).all()):
            raise ProbeFailure(
                "finite", f"output {name!r}: expected finite values, got {int((~torch.isfinite(value)).sum())} others"
            )
    return {name: got[name].detach() for name in backbone.outputs}


def with_edges(backbone: Backbone, batch: Data) -> Batch:
    """The batch with the neighbor list of the backbone, or with none."""
    bare = validate(replace(batch, **dict.fromkeys(EDGE_FIELDS)))
    return bare if backbone.cutoff is None else with_neighbors(bare, backbone.cutoff)


def copied(batch: Data) -> Batch:
    """A batch that shares no tensor with this one."""
    return Batch(**{name: v.clone() if isinstance(v := batch[name], Tensor) else v for name in batch.keys()})


def taken(batch: Data, atoms: Tensor, structures: Tensor, counts: Tensor) -> Batch:
    """Some rows of a batch, in any order and any number of times, without its neighbor list."""
    n_atoms, n_structures = batch[keys.POS].shape[0], batch[keys.PTR].shape[0] - 1
    fields: dict[str, Any] = {}
    for name in batch.keys():
        value = batch[name]
        if name in (*EDGE_FIELDS, keys.BATCH, keys.PTR):
            continue
        if isinstance(value, Tensor) and value.dim() > 0 and name not in (keys.CELL, keys.PBC):
            rows = {n_structures: structures, n_atoms: atoms}.get(value.shape[0])
            fields[name] = value if rows is None else value[rows]
        else:
            fields[name] = value
    fields |= {name: batch[name][structures] for name in (keys.CELL, keys.PBC)}
    return assemble(counts=counts, **fields)


def alone(batch: Data, structure: int) -> Batch:
    first, last = batch[keys.PTR][structure : structure + 2].tolist()
    atoms = torch.arange(first, last, device=batch[keys.POS].device)
    return taken(batch, atoms, torch.full_like(atoms[:1], structure), torch.tensor([last - first]))


def rms(value: Tensor) -> float:
    return float(value.to(torch.float64).square().mean().sqrt()) if value.numel() else 0.0


def _radius(pos: Tensor) -> float:
    return float((pos - pos.mean(dim=0)).square().sum(dim=1).mean().sqrt())
