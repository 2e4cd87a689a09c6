"""Geometry and bookkeeping of directed edges: cutoffs, reverse edges, which edges a block needs, the padded layout."""

# No "from __future__ import annotations" here: TorchScript cannot read the fields of a NamedTuple through it.
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Added to the attention logits of what is to have no influence: exp(-1e9) is an exact zero in every dtype. (Functions
# take it as a default, since TorchScript reads no globals.)
NEVER = -1e9


def cutoff_weights(
    length: Tensor, cutoff: float, width: float, function: str, never: float = NEVER
) -> tuple[Tensor, Tensor]:
    """Smooth cutoff f_c of each edge and its logarithm, both with full relative precision.

    The functions are those of metatrain, written such that small values and the logarithm are not rounded off: from
    the cutoff on the weight is an exact zero, and so is the influence of the edge on the attention.

    Parameters
    ----------
    length : Tensor of shape (n_edges,)
    cutoff, width : float
        f_c is 1 for ``length <= cutoff - width`` and 0 for ``length >= cutoff``.
    function : str
        "bump": [1 + tanh(cot(pi x))] / 2, or "cosine": [1 + cos(pi x)] / 2, with x = (length - cutoff + width) / width.
    never : float
        Stands for the logarithm of 0.
    """
    return step((length - (cutoff - width)) / width, function, never)


def step(x: Tensor, function: str, never: float = NEVER) -> tuple[Tensor, Tensor]:
    """The cutoff function and its logarithm at x, which runs from 0 to 1 while they fall from 1 to 0 (see above)."""
    if function == "bump":
        # Within 1e-3 of either end f_c equals 0 or 1 up to exp(-600), in float32 up to exp(-60) within 1e-2.
        margin = 1e-3 if x.dtype == torch.float64 else 1e-2
        inside = (x > margin) & (x < 1.0 - margin)
        safe = torch.where(inside, x, torch.full_like(x, 0.5))
        logit = 2.0 / torch.tan(math.pi * safe)
        log_weight = torch.nn.functional.logsigmoid(logit)
        weight = torch.sigmoid(logit)
    else:
        margin = 1e-7 if x.dtype == torch.float64 else 1e-5
        inside = (x > 0.0) & (x < 1.0 - margin)
        safe = torch.where(inside, x, torch.full_like(x, 0.5))
        root = torch.cos(0.5 * math.pi * safe)
        weight = root * root
        log_weight = 2.0 * torch.log(root)
    below = x < 0.5
    weight = torch.where(inside, weight, below.to(weight.dtype))
    edge_value = torch.where(below, torch.zeros_like(x), torch.full_like(x, never))
    return weight, torch.where(inside, log_weight, edge_value)


def reverse_edges(source: Tensor, target: Tensor, shift: Tensor, n_atoms: int) -> Tensor:
    """For each edge i -> j with image shift S the number of the edge j -> i with -S; -1 where there is none.

    Parameters
    ----------
    source, target : Tensor of shape (n_edges,), int64
    shift : Tensor of shape (n_edges, 3), integer
    n_atoms : int

    Returns
    -------
    Tensor of shape (n_edges,), int64
        Where two edges are the same (atoms and shift), every entry is -2.
    """
    n_edges = source.shape[0]
    if n_edges == 0:
        return torch.zeros(0, dtype=torch.int64, device=source.device)
    shift = shift.to(torch.int64)
    reach = int(shift.abs().max())
    base = 2 * reach + 1
    cubed = base * base * base  # base**3 is a float to TorchScript
    here = torch.zeros_like(source)
    there = torch.zeros_like(source)
    for axis in range(3):
        here = here * base + (shift[:, axis] + reach)
        there = there * base + (reach - shift[:, axis])
    here = (target * n_atoms + source) * cubed + here
    there = (source * n_atoms + target) * cubed + there
    ordered, order = torch.sort(here)
    if bool((ordered[1:] == ordered[:-1]).any()):
        return torch.full_like(source, -2)
    return find(ordered, there, order)


def drop_edges(
    keep: Tensor, edge_vec: Tensor, scalars: Tensor, species: Tensor, source: Tensor, target: Tensor, reverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The edges in ``keep`` (bool) alone; ``source`` and ``reverse`` may be empty."""
    kept = torch.nonzero(keep).view(-1)
    if source.shape[0] > 0:
        source = source.index_select(0, kept)
    if reverse.shape[0] > 0:
        number = torch.where(keep, torch.cumsum(keep.to(torch.int64), dim=0) - 1, torch.full_like(target, -1))
        partner = reverse.index_select(0, kept)
        reverse = torch.where(partner < 0, partner, number.index_select(0, partner.clamp(min=0)))
    return (
        edge_vec.index_select(0, kept),
        scalars.index_select(0, kept),
        species.index_select(0, kept),
        source,
        target.index_select(0, kept),
        reverse,
    )


def find(ordered: Tensor, wanted: Tensor, number: Tensor) -> Tensor:
    """Entries of ``number`` at which ``ordered`` (ascending) equals ``wanted``, -1 where nowhere."""
    if ordered.shape[0] == 0:
        return torch.full_like(wanted, -1)
    position = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[0] - 1)
    hit = ordered.index_select(0, position) == wanted
    return torch.where(hit, number.index_select(0, position), torch.full_like(wanted, -1))


def needed_atoms(center: Tensor, source: Tensor, target: Tensor, n_hops: int) -> list[Tensor]:
    """Atoms whose edges matter at each stage, given the atoms whose output is wanted.

    Parameters
    ----------
    center : Tensor of shape (n_atoms,), bool
    source, target : Tensor of shape (n_edges,)
    n_hops : int
        Exchanges of messages.

    Returns
    -------
    list of Tensor of shape (n_atoms,), bool
        ``n_hops + 1`` masks, each within the one before; the last is ``center``.
    """
    masks = [center]
    for _ in range(n_hops):
        inner = masks[0]
        reached = source.index_select(0, torch.nonzero(inner.index_select(0, target)).view(-1))
        masks.insert(0, inner.index_fill(0, reached, True))
    return masks


class Layout(NamedTuple):
    """Edges of some atoms, as a list and as a rectangle with one row per atom.

    Attributes
    ----------
    n_rows, width : int
        Atoms, and edges of the atom that has most.
    row : Tensor of shape (n_edges,)
        Row of each edge; ascending.
    slot : Tensor of shape (n_edges,)
        Position of each edge in the flattened rectangle.
    """

    n_rows: int
    width: int
    row: Tensor
    slot: Tensor


def layout(row: Tensor, n_rows: int) -> Layout:
    """Layout of edges that are sorted by row."""
    counts = torch.bincount(row, minlength=n_rows)
    width = int(counts.max()) if n_rows > 0 else 0
    start = torch.cumsum(counts, dim=0) - counts
    position = torch.arange(row.shape[0], device=row.device) - start.index_select(0, row)
    return Layout(n_rows, width, row, row * width + position)


def to_rows(values: Tensor, places: Layout, fill: float) -> Tensor:
    """List of edges to rectangle: (n_edges, ...) to (n_rows, width, ...), ``fill`` where there is no edge."""
    shape = [places.n_rows, places.width] + list(values.shape[1:])
    if values.shape[0] == places.n_rows * places.width:
        return values.reshape(shape)
    flat = torch.full(
        [places.n_rows * places.width] + list(values.shape[1:]), fill, dtype=values.dtype, device=values.device
    )
    return flat.index_copy(0, places.slot, values).view(shape)


def to_list(values: Tensor, places: Layout) -> Tensor:
    """Rectangle to list of edges: (n_rows, width, n) to (n_edges, n)."""
    flat = values.reshape(places.n_rows * places.width, values.shape[2])
    if places.slot.shape[0] == flat.shape[0]:
        return flat
    return flat.index_select(0, places.slot)


def sum_rows(values: Tensor, places: Layout) -> Tensor:
    """Sum over the edges of each row: (n_edges, n) to (n_rows, n)."""
    if places.slot.shape[0] == places.n_rows * places.width:
        return values.reshape(places.n_rows, places.width, values.shape[1]).sum(dim=1)
    out = torch.zeros(places.n_rows, values.shape[1], dtype=values.dtype, device=values.device)
    return out.index_add(0, places.row, values)


class Stage(NamedTuple):
    """The atoms and edges that one block sees.

    Attributes
    ----------
    everything : bool
        Whether these are all, so that numbers within the stage are the original ones.
    atom : Tensor of shape (n_rows,)
        Original number of each atom of the stage.
    edge : Tensor of shape (n_stage_edges,)
        Original number of each edge of the stage.
    row_of : Tensor of shape (n_atoms,)
        Row of each original atom.
    place_of : Tensor of shape (n_edges,)
        Position of each original edge in the list of the stage, -1 for those not in it.
    places : Layout
    """

    everything: bool
    atom: Tensor
    edge: Tensor
    row_of: Tensor
    place_of: Tensor
    places: Layout


def make_stage(mask: Tensor, target: Tensor) -> Stage:
    """Stage of the atoms in ``mask`` and the edges that point at them; ``target`` is ascending."""
    atom = torch.nonzero(mask).view(-1)
    row_of = torch.cumsum(mask.to(torch.int64), dim=0) - 1
    if atom.shape[0] == mask.shape[0]:
        edge = torch.arange(target.shape[0], device=target.device)
        return Stage(True, atom, edge, row_of, edge, layout(target, atom.shape[0]))
    edge = torch.nonzero(mask.index_select(0, target)).view(-1)
    places = layout(row_of.index_select(0, target.index_select(0, edge)), atom.shape[0])
    place_of = torch.full_like(target, -1)
    place_of[edge] = torch.arange(edge.shape[0], device=edge.device)
    return Stage(False, atom, edge, row_of, place_of, places)


def make_stages(center: Tensor, source: Tensor, target: Tensor, n_exchanges: int) -> list[Stage]:
    """Stages of successive blocks with an exchange of messages after each; the last is that of ``center``."""
    if bool(center.all()):
        whole = make_stage(center, target)
        return [whole for _ in range(n_exchanges + 1)]
    return [make_stage(mask, target) for mask in needed_atoms(center, source, target, n_exchanges)]


def select(values: Tensor, index: Tensor, stage: Stage) -> Tensor:
    """Rows of a stage, where ``index`` is its ``atom`` or its ``edge``."""
    return values if stage.everything else values.index_select(0, index)


def narrow_atoms(values: Tensor, before: Stage, after: Stage) -> Tensor:
    """Rows of atoms of a stage that are in a later one."""
    return values if after.everything else values.index_select(0, before.row_of.index_select(0, after.atom))


def narrow_edges(values: Tensor, before: Stage, after: Stage) -> Tensor:
    """Entries in the list of edges of a stage that are in a later one."""
    return values if after.everything else values.index_select(0, before.place_of.index_select(0, after.edge))


def receive(values: Tensor, before: Stage, after: Stage, reverse: Tensor) -> Tensor:
    """What each edge of ``after`` gets from its reverse edge in ``before``; zeros where there is none.

    Parameters
    ----------
    values : Tensor of shape (n_rows, width, n)
        Rectangle of ``before``.
    reverse : Tensor of shape (n_edges,)
        Original number of the reverse of each original edge, -1 for none.
    """
    partner = select(reverse, after.edge, after)
    place = torch.where(partner < 0, partner, before.place_of.index_select(0, partner.clamp(min=0)))
    flat = values.reshape(before.places.n_rows * before.places.width, values.shape[2])
    missing = place < 0
    if not bool(missing.any()):
        return flat.index_select(0, before.places.slot.index_select(0, place))
    there = torch.nonzero(~missing).view(-1)
    slots = before.places.slot.index_select(0, place.index_select(0, there))
    out = torch.zeros(place.shape[0], values.shape[2], dtype=values.dtype, device=values.device)
    return out.index_copy(0, there, flat.index_select(0, slots))
