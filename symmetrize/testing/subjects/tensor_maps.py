"""Between batches and metatensor blocks: outputs in their declared representation, neighbor lists, further inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import edge_vectors, replace
from symmetrize.errors import DeclarationError
from symmetrize.ops.neighbors import neighbor_list
from symmetrize.ops.wigner import wigner
from symmetrize.representations import OutputSpec

#: Names that metatomic has replaced; a model answers to both.
RENAMED = {
    "features": "feature",
    "non_conservative_forces": "non_conservative_force",
    "positions": "position",
    "momenta": "momentum",
    "masses": "mass",
    "velocities": "velocity",
    "charges": "charge",
}


@dataclass(frozen=True)
class Part:
    """One declared output, and where it comes from.

    Attributes
    ----------
    source : str
        Output of the model.
    key : dict of str to int
        Its block.
    degree : int or None
        ``o3_lambda`` of a spherical block.
    column : int or None
        The only property that it consists of; None: all of them.
    spec : OutputSpec
    """

    source: str
    key: Mapping[str, int]
    degree: int | None
    column: int | None
    spec: OutputSpec


def quantity(name: str) -> str:
    """Without the variant and the block, and by its present name."""
    base = name.split("[")[0].split("/")[0]
    return RENAMED.get(base, base)


def parts_of(name: str, tensor: Any, unit: str) -> dict[str, Part]:
    """The outputs that a TensorMap consists of, by name.

    Raises
    ------
    DeclarationError
        With the reason, where it cannot be told how it transforms.
    """
    out: dict[str, Part] = {}
    blocks = [(dict(zip(key.names, [int(v) for v in key.values], strict=True)), block) for key, block in tensor.items()]
    for key, block in blocks:
        label = name
        if len(blocks) > 1:
            label += "[" + ",".join(f"{k}={v}" for k, v in key.items()) + "]"
        samples = tuple(block.samples.names)
        if samples not in (("system",), ("system", "atom")):
            raise DeclarationError(f"samples are {samples}")
        per = "atom" if samples == ("system", "atom") else "structure"
        components = [tuple(c.names) for c in block.components]
        n = block.values.shape[-1]
        common: dict[str, Any] = dict(per=per, unit=unit)
        if not components:
            if key.get("o3_lambda", 0) != 0:
                raise DeclarationError(f"o3_lambda is {key['o3_lambda']} and there is no component o3_mu")
            if name.split("/")[0] == "energy" and n == 1 and len(blocks) == 1:
                common = dict(reduce="sum", unit=unit)
            parity = "o" if key.get("o3_sigma", 1) == -1 else "e"
            out[label] = Part(name, key, None, None, OutputSpec(f"{n}x0{parity}", **common))
        elif components == [("xyz",)]:
            out[label] = Part(name, key, None, None, OutputSpec(f"{n}x1o", **common))
        elif components == [("o3_mu",)] and {"o3_lambda", "o3_sigma"} <= set(key):
            l, sigma = key["o3_lambda"], key["o3_sigma"]
            mu = block.components[0].values[:, 0].tolist()
            if mu != list(range(-l, l + 1)) or sigma not in (-1, 1):
                raise DeclarationError(f"o3_lambda is {l}, o3_sigma {sigma}, o3_mu {mu}")
            # A proper tensor (sigma = 1) of degree l has the parity of l vectors.
            parity = "e" if sigma * (-1) ** l == 1 else "o"
            out[label] = Part(name, key, l, None, OutputSpec(f"{n}x{l}{parity}", **common))
        elif components == [(f"xyz_{k + 1}",) for k in range(len(components))]:
            formula = "ijklmn"[: len(components)]
            if quantity(name) == "non_conservative_stress":
                formula = "ij=ji"
            for column in range(n):
                each = label if n == 1 else f"{label}[{column}]"
                out[each] = Part(name, key, None, column, OutputSpec(cartesian=formula, **common))
        else:
            raise DeclarationError(f"components are {components}, keys {key}")
    if not out:
        raise DeclarationError("there are no blocks")
    return out


def rows_of(part: Part, tensor: Any, ptr: Tensor) -> tuple[Tensor, bool]:
    """Rows of the structures or of the atoms (zero where the block has none), and whether of the atoms."""
    names = list(tensor.keys.names)
    block = None
    for key, candidate in tensor.items():
        if dict(zip(names, [int(v) for v in key.values], strict=True)) == part.key:
            block = candidate
    if block is None:
        # Such as a block for a species that is not there.
        per_atom = part.spec.per == "atom"
        n = int(ptr[-1]) if per_atom else len(ptr) - 1
        return torch.zeros(n, *part.spec.shape, dtype=torch.float64), per_atom
    per_atom = "atom" in block.samples.names
    index = block.samples.column("system").cpu().to(torch.int64)
    if per_atom:
        index = ptr[index] + block.samples.column("atom").cpu().to(torch.int64)
    values = block.values.detach().cpu()
    if part.column is not None:
        values = values[..., part.column]
    else:
        values = values.movedim(-1, 1)
        if part.degree is not None:
            values = values @ to_e3nn(part.degree).to(values)
    values = values.reshape(len(index), *part.spec.shape)
    n = int(ptr[-1]) if per_atom else len(ptr) - 1
    return torch.zeros(n, *part.spec.shape, dtype=values.dtype).index_add(0, index, values), per_atom


@lru_cache(maxsize=16)
def to_e3nn(l: int) -> Tensor:
    """Rows in the order m = -l ... l with z as the polar axis, times this, are in e3nn's basis: float64.

    e3nn has the same harmonics about the y axis: Y(x, y, z) here is e3nn's Y(y, z, x), as in metatomic an l = 1
    component is (y, z, x).
    """
    turn = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    return wigner(l, turn)[0]


def neighbor_blocks(batch: Batch, cutoff: float, full: bool, like: Tensor) -> list[Any]:
    """Neighbor lists of all structures as metatensor blocks: each pair in both directions, or once."""
    from metatensor.torch import Labels, TensorBlock

    edges, shift = neighbor_list(batch[keys.POS], batch[keys.PTR], batch[keys.CELL], batch[keys.PBC], cutoff)
    listed = replace(batch, **{keys.EDGE_INDEX: edges, keys.CELL_SHIFT: shift})
    vectors = edge_vectors(listed).detach()
    second, first = edges
    keep = torch.ones_like(first, dtype=torch.bool)
    if not full:
        # Of an atom and its own image, the one whose first nonzero translation is positive.
        sign = torch.sign(shift.to(torch.int64)) @ shift.new_tensor([9, 3, 1], dtype=torch.int64)
        keep = (first < second) | ((first == second) & (sign > 0))
    out = []
    owner = batch[keys.BATCH][first]
    for s, start in enumerate(batch[keys.PTR][:-1].tolist()):
        mine = ((owner == s) & keep).nonzero()[:, 0]
        samples = torch.cat([(first[mine] - start)[:, None], (second[mine] - start)[:, None], shift[mine]], dim=1)
        names = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
        block = TensorBlock(
            values=vectors[mine, :, None].to(like.device),
            samples=Labels(names, samples.to(like.device, torch.int32)),
            components=[Labels(["xyz"], torch.arange(3, dtype=torch.int32, device=like.device)[:, None])],
            properties=Labels(["distance"], torch.zeros(1, 1, dtype=torch.int32, device=like.device)),
        )
        out.append(block)
    return out


def input_map(name: str, sample_kind: str, batch: Batch, structure: int, like: Tensor) -> Any:
    """A further input of one structure: masses, velocities and momenta from the batch, charge 0, multiplicity 1."""
    from ase.data import atomic_masses
    from metatensor.torch import Labels, TensorBlock, TensorMap

    first, last = batch[keys.PTR][structure : structure + 2].tolist()
    n = last - first
    vector = name in ("velocity", "momentum")
    if sample_kind == "atom" and vector:
        values = batch[name][first:last]
    elif sample_kind == "atom" and name == "mass":
        values = torch.as_tensor(atomic_masses)[batch[keys.Z][first:last].cpu()]
    elif sample_kind == "atom" and name == "charge":
        values = torch.zeros(n)
    elif sample_kind == "system" and name in ("charge", "spin_multiplicity"):
        values = torch.full((1,), float(name == "spin_multiplicity"))
    else:
        raise DeclarationError(f"model: it needs {name!r} per {sample_kind}, which cannot be provided")
    device = like.device
    rows = torch.zeros(len(values), 1) if sample_kind == "system" else torch.stack([torch.zeros(n), torch.arange(n)], 1)
    labels = ["system"] if sample_kind == "system" else ["system", "atom"]
    xyz = Labels(["xyz"], torch.arange(3, dtype=torch.int32, device=device)[:, None])
    block = TensorBlock(
        values=values.to(like)[..., None],
        samples=Labels(labels, rows.to(device, torch.int32)),
        components=[xyz] if vector else [],
        properties=Labels([name], torch.zeros(1, 1, dtype=torch.int32, device=device)),
    )
    return TensorMap(Labels(["_"], torch.zeros(1, 1, dtype=torch.int32, device=device)), [block])
