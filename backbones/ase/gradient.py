"""Numbers that come with their derivatives: an energy that autograd can differentiate once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symmetrize.errors import DeclarationError


def with_gradient(
    energy: Tensor, pos: Tensor, cell: Tensor, pos_slopes: Tensor, cell_slopes: Tensor, structure: Tensor
) -> Tensor:
    """``energy`` as a function of positions and cells with the given derivatives.

    Parameters
    ----------
    energy : Tensor of shape (n_structures,), float64
    pos : Tensor of shape (n_atoms, 3)
    cell : Tensor of shape (n_structures, 3, 3)
    pos_slopes, cell_slopes : Tensor of shapes of ``pos`` and ``cell``
        dE/dpos and dE/dcell.
    structure : Tensor of shape (n_atoms,)

    Returns
    -------
    Tensor of shape (n_structures,)
        Equal to ``energy``. Its second derivatives raise a `DeclarationError`.
    """
    return _WithGradient.apply(pos, cell, energy, pos_slopes, cell_slopes, structure)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pos: Tensor, cell: Tensor, energy: Tensor, pos_slopes: Tensor, cell_slopes: Tensor, structure: Tensor
    ) -> Tensor:
        ctx.save_for_backward(pos, cell, pos_slopes, cell_slopes, structure)
        return energy.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        pos, cell, pos_slopes, cell_slopes, structure = ctx.saved_tensors
        pos_gradient, cell_gradient = _Final.apply(pos, cell, cotangent, pos_slopes, cell_slopes, structure)
        wanted = ctx.needs_input_grad
        return pos_gradient if wanted[0] else None, cell_gradient if wanted[1] else None, None, None, None, None


class _Final(torch.autograd.Function):
    """The gradient, as a function of which no derivative is known."""

    @staticmethod
    def forward(
        ctx: Any,
        pos: Tensor,
        cell: Tensor,
        cotangent: Tensor,
        pos_slopes: Tensor,
        cell_slopes: Tensor,
        structure: Tensor,
    ) -> tuple[Tensor, Tensor]:
        of_pos = cotangent[structure][:, None] * pos_slopes
        of_cell = cotangent[:, None, None] * cell_slopes
        return of_pos.to(pos.dtype), of_cell.to(cell.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise DeclarationError(
            "ase: a calculator returns first derivatives only, so its forces and stress cannot be differentiated; for "
            "Hessians use finite differences of forces (ase.vibrations, phonopy), and no training on forces"
        )
