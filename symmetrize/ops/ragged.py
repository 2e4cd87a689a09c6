"""Index arithmetic on ragged arrays in CSR form (one flat array and the offset of each row)."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets(counts: Tensor) -> Tensor:
    """Start of each row, and the total at the end: Tensor of shape (n_rows + 1,)."""
    zero = torch.zeros(1, dtype=counts.dtype, device=counts.device)
    return torch.cat([zero, torch.cumsum(counts, dim=0)])


def gather_rows(ptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate rows of a ragged array.

    Parameters
    ----------
    ptr : Tensor of shape (n_rows + 1,)
        Offsets of the rows.
    rows : Tensor of shape (n_picked,)
        Rows to concatenate, repetitions allowed.

    Returns
    -------
    item : Tensor of shape (n_items,)
        Index into the flat array of every picked item.
    pick : Tensor of shape (n_items,)
        Which entry of ``rows`` each item comes from.
    """
    first = ptr.index_select(0, rows)
    counts = ptr.index_select(0, rows + 1) - first
    pick = torch.repeat_interleave(counts)
    # What has to be added to a running number to start again at the beginning of each row.
    jump = first + counts - torch.cumsum(counts, dim=0)
    item = torch.arange(pick.shape[0], device=rows.device) + jump.index_select(0, pick)
    return item, pick


def segment_sum(values: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Sum of the rows of ``values`` that share an index: Tensor of shape (n_segments, ...)."""
    out = torch.zeros([n_segments] + list(values.shape[1:]), dtype=values.dtype, device=values.device)
    return out.index_add(0, index, values)


def segment_min(values: Tensor, index: Tensor, n_segments: int, empty: float) -> Tensor:
    """Minimum of the values that share an index (``empty`` for none): Tensor of shape (n_segments,)."""
    out = torch.full([n_segments], empty, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, index, values, "amin")


def segment_max(values: Tensor, index: Tensor, n_segments: int, empty: float) -> Tensor:
    """Maximum of the values that share an index (``empty`` for none): Tensor of shape (n_segments,)."""
    out = torch.full([n_segments], empty, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, index, values, "amax")


def positions_in_rows(row: Tensor, n_rows: int) -> Tensor:
    """Position of every item inside its row, for ascending row numbers: Tensor of shape (n_items,)."""
    starts = offsets(torch.bincount(row, minlength=n_rows))
    return torch.arange(row.shape[0], device=row.device) - starts[row]


def pad_rows(values: Tensor, row: Tensor, position: Tensor, n_rows: int, width: int, fill: float) -> Tensor:
    """Ragged to rectangular, ``fill`` behind the end of a row: Tensor of shape (n_rows, width)."""
    out = torch.full([n_rows * width], fill, dtype=values.dtype, device=values.device)
    return out.index_put([row * width + position], values).reshape(n_rows, width)
