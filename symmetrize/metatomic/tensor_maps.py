"""Outputs of metatomic models: what each block declares about how it transforms, and its rows in that representation.

Components ``xyz`` (or ``xyz_1``, ``xyz_2``, ...) are Cartesian, ``o3_mu`` with the keys ``o3_lambda`` and ``o3_sigma``
spherical, nothing is invariant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from symmetrize.errors import DeclarationError, did_you_mean
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

#: Units that are asked for; other outputs come in their own.
UNITS = {
    "energy": "eV",
    "energy_ensemble": "eV",
    "energy_uncertainty": "eV",
    "non_conservative_force": "eV/Angstrom",
    "non_conservative_stress": "eV/Angstrom^3",
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
    """Rows of the structures or of the atoms (zero where the block has none), and whether of the atoms.

    Differentiable, on the device of the block; ``ptr``, of shape (n_structures + 1,), holds the first atom of each
    structure.
    """
    names = list(tensor.keys.names)
    block = None
    for key, candidate in tensor.items():
        if dict(zip(names, [int(v) for v in key.values], strict=True)) == part.key:
            block = candidate
    if block is None:
        # Such as a block for a species that is not there.
        per_atom = part.spec.per == "atom"
        n = int(ptr[-1]) if per_atom else len(ptr) - 1
        dtype = tensor.block(0).values.dtype if len(tensor) else torch.float64
        return torch.zeros(n, *part.spec.shape, dtype=dtype, device=ptr.device), per_atom
    per_atom = "atom" in block.samples.names
    values = block.values
    index = block.samples.column("system").to(values.device, torch.int64)
    if per_atom:
        index = ptr.to(values.device)[index] + block.samples.column("atom").to(values.device, torch.int64)
    if part.column is not None:
        values = values[..., part.column]
    else:
        values = values.movedim(-1, 1)
        if part.degree is not None:
            values = values @ to_e3nn(part.degree).to(values)
    values = values.reshape(len(index), *part.spec.shape)
    n = int(ptr[-1]) if per_atom else len(ptr) - 1
    return values.new_zeros(n, *part.spec.shape).index_add(0, index, values), per_atom


@lru_cache(maxsize=16)
def to_e3nn(l: int) -> Tensor:
    """Rows in the order m = -l ... l with z as the polar axis, times this, are in e3nn's basis: float64.

    e3nn has the same harmonics about the y axis: Y(x, y, z) here is e3nn's Y(y, z, x), as in metatomic an l = 1
    component is (y, z, x).
    """
    turn = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    return wigner(l, turn)[0]


def wanted_outputs(known: Mapping[str, Any], asked: Iterable[str] | None) -> list[str]:
    """Outputs that are evaluated: those asked for, or all but auxiliary ones and variants of others that are there.

    Raises
    ------
    DeclarationError
        Unknown output.
    """
    if asked is not None:
        listed = [asked] if isinstance(asked, str) else list(asked)
        for name in listed:
            if name not in known:
                raise DeclarationError(f"outputs: unknown output {name!r}, {did_you_mean(name, known)}")
        return listed
    out = []
    for name in known:
        base, _, variant = name.partition("/")
        renamed = base in RENAMED and name.replace(base, RENAMED[base], 1) in known
        if renamed or (variant and base in known) or quantity(name) == "feature" or name.startswith("mtt::aux::"):
            continue
        out.append(name)
    return out
