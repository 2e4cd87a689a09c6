"""Frames that are drawn for training, computed ahead of the steps, with their derivatives, for many structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import replace
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum
from symmetrize.methods.draws import uniform_numbers
from symmetrize.methods.sampled import companions, draw
from symmetrize.ops.ragged import gather_rows, offsets
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.training.config import SymmetrizeRecipe
from symmetrize.training.dataset import StructureTable, generator_for

#: Fields of a training batch, a row per owner, or per site (the edges in atom scope, the atoms in structure scope).
# Frame. (n_owners, 3, 3).
ROTATION: Final = "frame_rotation"
# Whether it is that of the point stratum, without neighbors. (n_owners,), bool.
EMPTY: Final = "frame_empty"
# Derivative of its infinitesimal rotation, first index, by the site. (n_sites, 3, 3), 1 / length.
TURN: Final = "frame_turn"
# Derivative of the logarithm of its probability. (n_sites, 3), 1 / length.
SCORE: Final = "frame_score"
# Whether the companion is another frame. (n_owners,), bool.
DIFFERS: Final = "frame_differs"
COMPANION: Final = "companion_rotation"
COMPANION_EMPTY: Final = "companion_empty"

_OWNER_FIELDS = (ROTATION, EMPTY, DIFFERS, COMPANION, COMPANION_EMPTY)

#: Edges (atoms without any) of the structures whose frames are drawn at a time.
BLOCK = 20000


def draw_frames(
    method: FrameMethod, batch: Batch, *, group: str, scope: Scope, l_max: int, seed: int, n_samples: int
) -> list[dict[str, Tensor]]:
    """Frames that are drawn for every owner, with their derivatives.

    Parameters
    ----------
    method : FrameMethod
        Whose frames are drawn.
    batch : Batch
        Validated, in float64, with neighbor lists that reach everything an output depends on.
    group, scope, l_max
        See `FrameMethod.frames`.
    seed : int
        Together with a structure, it determines what is drawn.
    n_samples : int

    Returns
    -------
    list of dict of str to Tensor
        Of each sample, the fields named in this module.
    """
    frames, leaf = differentiable_frames(method, batch, group=group, scope=scope, l_max=l_max)
    uniform = uniform_numbers(batch, scope, seed, n_samples + 1)
    drawn = draw(frames, uniform[:n_samples])
    companion = companions(frames, drawn[0], uniform[-1]) if n_samples == 1 else None
    return [frame_fields(frames, leaf, chosen, companion) for chosen in drawn]


def differentiable_frames(
    method: FrameMethod, batch: Batch, *, group: str, scope: Scope, l_max: int
) -> tuple[FrameSet, Tensor]:
    """All frames, as functions of edge vectors (atom scope) or positions (structure scope), and these."""
    site = keys.EDGE_VEC if scope == "atom" else keys.POS
    leaf = batch[site].detach().requires_grad_()
    with torch.enable_grad():
        frames = method.frames(replace(batch, **{site: leaf}), group=group, scope=scope, l_max=l_max)
    return frames, leaf


def frame_fields(frames: FrameSet, leaf: Tensor, chosen: Tensor, companion: Tensor | None) -> dict[str, Tensor]:
    """Fields of one frame per owner, ``chosen`` of shape (n_owners,); those of its companion where there is one."""
    rotations = frames.rotations.detach()
    point = frames.stratum == int(Stratum.POINT)
    rows = []
    for axis in range(3):
        # <cotangent, dR> is this component of omega for dR = [omega]x R.
        cotangent = torch.zeros_like(rotations)
        cotangent[chosen] = _generator(axis, rotations) @ rotations[chosen] / 2.0
        rows.append(_gradient(frames.rotations, leaf, cotangent))
    with torch.enable_grad():
        probability = frames.normalized_weights[chosen]
    fields = {
        ROTATION: rotations[chosen],
        EMPTY: point[chosen],
        TURN: torch.stack(rows, dim=1),
        SCORE: _gradient(probability, leaf, 1.0 / probability.detach()),
    }
    if companion is not None:
        fields |= {
            DIFFERS: companion != chosen,
            COMPANION: rotations[companion],
            COMPANION_EMPTY: point[companion],
        }
    return fields


def _generator(axis: int, like: Tensor) -> Tensor:
    """[e_axis]x, the matrix of the cross product with a unit vector: Tensor of shape (3, 3)."""
    matrix = torch.zeros(3, 3, dtype=like.dtype, device=like.device)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[second, first], matrix[first, second] = 1.0, -1.0
    return matrix


def _gradient(of: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    if not of.requires_grad:
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(of, leaf, cotangent, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found


class DrawnFrames:
    """Drawn frames for the steps of an epoch, computed for many structures at a time.

    Parameters
    ----------
    table : StructureTable
    model : Symmetrizer
        With all frames.
    recipe : SymmetrizeRecipe
    seeds : tuple of int
        First numbers of all seeds; the epoch is the last one.
    """

    def __init__(
        self, table: StructureTable, model: Symmetrizer, recipe: SymmetrizeRecipe, seeds: tuple[int, ...]
    ) -> None:
        self.table, self.recipe, self.seeds = table, recipe, seeds
        self.method, self.scope, self.l_max = model.method, model.scope, model.l_max
        self._epoch = -1
        self._rows: dict[int, int] = {}
        self._fields: list[dict[str, Tensor]] = []
        self._ptr = {"owner": torch.zeros(1), "site": torch.zeros(1)}

    def select(
        self, structures: Sequence[int], dtype: torch.dtype, baseline: Tensor, epoch: int, order: Sequence[int]
    ) -> Batch:
        """Batch of some structures, once for every sample, with frames.

        Parameters
        ----------
        structures : sequence of int
        dtype, baseline
            See `StructureTable.select`.
        epoch : int
        order : sequence of int
            In which structures are asked for in this epoch.
        """
        if epoch != self._epoch or any(n not in self._rows for n in structures):
            start = order.index(structures[0])
            self._compute([*structures, *order[start:]], len(structures), epoch)
        picked, n_samples = torch.tensor(list(structures)), self.recipe.n_samples
        batch = self.table.select(picked.repeat(n_samples), dtype, baseline)
        rows = torch.tensor([self._rows[n] for n in structures])
        at = {level: gather_rows(ptr, rows)[0] for level, ptr in self._ptr.items()}
        fields = {}
        for name in self._fields[0]:
            index = at["owner" if name in _OWNER_FIELDS else "site"]
            values = torch.cat([sample[name][index] for sample in self._fields])
            fields[name] = values.to(dtype) if values.is_floating_point() else values
        return replace(batch, **fields)

    def _compute(self, structures: list[int], n_least: int, epoch: int) -> None:
        structures = list(dict.fromkeys(structures))
        picked = torch.tensor(structures)
        size = (self.table.edge_ptr if self.scope == "atom" else self.table.ptr).diff()[picked]
        n = max(n_least, int((torch.cumsum(size, 0) <= BLOCK).sum()))
        picked = picked[:n]
        batch = self.table.select(picked, torch.float64)
        seed = int(torch.randint(2**62, (), generator=generator_for(*self.seeds, epoch)))
        self._fields = draw_frames(
            self.method,
            batch,
            group=self.recipe.group,
            scope=self.scope,
            l_max=self.l_max,
            seed=seed,
            n_samples=self.recipe.n_samples,
        )
        atoms, one = self.table.ptr.diff()[picked], torch.ones_like(picked)
        owners, sites = (atoms, size[:n]) if self.scope == "atom" else (one, atoms)
        self._ptr = {"owner": offsets(owners), "site": offsets(sites)}
        self._rows = {s: row for row, s in enumerate(structures[:n])}
        self._epoch = epoch
