"""How an output transforms under the orthogonal group: declaration, rotation, invariant part.

This is the only place where parity is decided: an irrep of parity p picks up p under an improper element, and an index
of a Cartesian tensor is a true (polar) vector index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from e3nn import o3
from torch import Tensor

from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import random_rotations
from symmetrize.ops.wigner import handedness, wigner

GROUPS = ("O(3)", "SO(3)")


def check_group(group: str) -> str:
    """The name of a supported group, or a `DeclarationError`."""
    if group not in GROUPS:
        raise DeclarationError(f"group: unknown group {group!r}, {did_you_mean(str(group), GROUPS)}")
    return group


@dataclass(frozen=True)
class OutputSpec:
    """Declaration of an output: its representation, what it belongs to, and its unit.

    Parameters
    ----------
    irreps : str or e3nn.o3.Irreps, optional
        Representation in e3nn notation, such as ``"0e"``, ``"1o"``, ``"0e + 2e"``. Values are in e3nn's basis; a
        single ``"0e"`` or ``"0o"`` has no trailing axis.
    cartesian : str, optional
        Cartesian tensor of any rank as an e3nn formula: ``"i"``, ``"ij"``, ``"ij=ji"``, ``"ijk=jik"``. Values are full
        tensors with one axis of length 3 per index. Exactly one of ``irreps`` and ``cartesian`` is given.
    per : {"atom", "structure"}
        One row per atom or one per structure.
    reduce : {None, "sum", "mean"}
        For ``per="atom"``: also return the sum or mean over the atoms of each structure, under the name of the output;
        the rows of the atoms are then called ``atomic_<name>``. ``"sum"`` declares an extensive quantity.
    unit : str
        Unit of the values, for reports and exports.

    Examples
    --------
    >>> OutputSpec("1o").shape, OutputSpec(cartesian="ij=ji").shape, OutputSpec("0e").shape
    ((3,), (3, 3), ())
    """

    irreps: str | None = None
    cartesian: str | None = None
    per: Literal["atom", "structure"] = "atom"
    reduce: Literal["sum", "mean"] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.irreps is None) == (self.cartesian is None):
            raise DeclarationError("OutputSpec: expected exactly one of irreps= and cartesian=")
        if self.per not in ("atom", "structure"):
            raise DeclarationError(f"OutputSpec: per: expected 'atom' or 'structure', got {self.per!r}")
        if self.reduce not in (None, "sum", "mean"):
            raise DeclarationError(f"OutputSpec: reduce: expected None, 'sum' or 'mean', got {self.reduce!r}")
        if self.reduce is not None and self.per != "atom":
            raise DeclarationError("OutputSpec: reduce needs per='atom'; a per-structure output is reduced already")
        if self.irreps is not None:
            try:
                normalized = str(o3.Irreps(self.irreps))
            except (ValueError, TypeError) as error:
                raise DeclarationError(
                    f"OutputSpec: irreps: expected e3nn irreps with explicit parity such as '1o', got {self.irreps!r}"
                ) from error
            if o3.Irreps(normalized).dim == 0:
                raise DeclarationError(f"OutputSpec: irreps: {self.irreps!r} is empty")
            object.__setattr__(self, "irreps", normalized)
        else:
            _check_formula(str(self.cartesian))

    @property
    def rank(self) -> int:
        """Number of indices of a Cartesian tensor."""
        return 0 if self.cartesian is None else len(self.cartesian.split("=")[0].strip())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        if self.cartesian is not None:
            return (3,) * self.rank
        dim = o3.Irreps(self.irreps).dim
        return () if dim == 1 else (dim,)

    @property
    def l_max(self) -> int:
        """Highest degree in the representation."""
        return self.rank if self.cartesian is not None else o3.Irreps(self.irreps).lmax

    @property
    def is_invariant_scalar(self) -> bool:
        """A single number that no element of O(3) changes."""
        return self.irreps == "1x0e"

    def rotate(self, values: Tensor, elements: Tensor, index: Tensor | None = None) -> Tensor:
        """Apply rho(g) to every row.

        Parameters
        ----------
        values : Tensor of shape (n_rows, *shape)
        elements : Tensor of shape (n, 3, 3)
            Proper or improper orthogonal matrices.
        index : Tensor of shape (n_rows,), optional
            Which element acts on each row; by default row by row.

        Returns
        -------
        Tensor of shape (n_rows, *shape)
        """
        pick = (lambda matrices: matrices) if index is None else (lambda matrices: matrices[index])
        if self.cartesian is not None:
            matrices = pick(elements.to(values.dtype))
            for axis in range(1, self.rank + 1):
                values = torch.einsum("nij,nj...->ni...", matrices, values.transpose(1, axis)).transpose(1, axis)
            return values
        irreps = o3.Irreps(self.irreps)
        if all(ir.l == 0 and ir.p == 1 for _, ir in irreps):
            return values
        flat = values.reshape(values.shape[0], irreps.dim)
        sign = handedness(elements).to(values.dtype)
        degrees = {ir.l for _, ir in irreps if ir.l > 0}
        matrices_of = {l: wigner(l, elements).to(values.dtype) for l in degrees}
        blocks = []
        for (mul, ir), window in zip(irreps, irreps.slices(), strict=True):
            block = flat[:, window].reshape(-1, mul, ir.dim)
            if ir.l > 0:
                block = block @ pick(matrices_of[ir.l]).transpose(1, 2)
            if ir.p == -1:  # D_l covers the proper part of g, parity the rest
                block = block * pick(sign)[:, None, None]
            blocks.append(block.reshape(-1, mul * ir.dim))
        return torch.cat(blocks, dim=-1).reshape(values.shape)

    def project_invariant(self, values: Tensor, group: str) -> Tensor:
        """The part that no element of the group changes: degree 0, and for O(3) even parity, only."""
        if self.cartesian is not None:
            projector = _cartesian_invariants(self.rank, group).to(values)
            return (values.reshape(values.shape[0], -1) @ projector).reshape(values.shape)
        irreps = o3.Irreps(self.irreps)
        keep = [float(ir.l == 0 and (ir.p == 1 or group == "SO(3)")) for mul, ir in irreps for _ in range(mul * ir.dim)]
        mask = torch.tensor(keep, dtype=values.dtype, device=values.device)
        return values * mask.reshape(self.shape)

    def reduce_atoms(self, values: Tensor, structure: Tensor, n_structures: int) -> Tensor:
        """Sum or mean of per-atom rows over each structure: Tensor of shape (n_structures, *shape)."""
        total = segment_sum(values, structure, n_structures)
        if self.reduce == "sum":
            return total
        counts = torch.bincount(structure, minlength=n_structures).clamp(min=1).to(values.dtype)
        return total / counts.reshape((-1,) + (1,) * len(self.shape))

    def __str__(self) -> str:
        what = self.irreps if self.cartesian is None else f"cartesian {self.cartesian}"
        reduced = "" if self.reduce is None else f", {self.reduce}"
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{what} per {self.per}{reduced}{unit}"


def _check_formula(formula: str) -> None:
    indices = formula.split("=")[0].strip()
    if not re.fullmatch(r"[a-z]+(\s*=\s*-?[a-z]+)*", formula) or len(set(indices)) != len(indices):
        raise DeclarationError(
            f"OutputSpec: cartesian: expected an e3nn formula such as 'i', 'ij' or 'ij=ji', got {formula!r}"
        )
    for term in formula.split("=")[1:]:
        if sorted(term.strip().lstrip("-")) != sorted(indices):
            raise DeclarationError(
                f"OutputSpec: cartesian: every term of {formula!r} has to be a permutation of {indices!r}"
            )


@lru_cache(maxsize=32)
def _cartesian_invariants(rank: int, group: str) -> Tensor:
    """Orthogonal projector onto the invariant Cartesian tensors of a rank: Tensor of shape (3^rank, 3^rank)."""
    if rank == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    if group == "O(3)" and rank % 2 == 1:
        return torch.zeros(3**rank, 3**rank, dtype=torch.float64)
    # Two generic rotations generate a dense subgroup: what both leave alone is invariant.
    constraints = []
    for rotation in random_rotations(2, torch.Generator().manual_seed(1)):
        matrix = rotation
        for _ in range(rank - 1):
            matrix = torch.kron(matrix, rotation)
        constraints.append(matrix - torch.eye(3**rank, dtype=torch.float64))
    _, singular, right = torch.linalg.svd(torch.cat(constraints))
    basis = right[singular < 1e-8]
    return basis.T @ basis
