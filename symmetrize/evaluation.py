"""Evaluating a backbone in rotated copies: what copies are made from, their inputs, what came back.

Everything here concerns one chunk of copies. Its inputs are rows gathered from the batch and from what the backbone
prepared, so that the work for a chunk is proportional to what it holds, whatever the size of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.errors import BackboneOutputError
from symmetrize.ops.ragged import offsets
from symmetrize.representations import OutputSpec

#: Parameters that may be narrower than the positions: frames and rotations keep the precision of the latter.
HALVES = (torch.bfloat16, torch.float16)


def call_size(chunk_size: int, n_atoms: int, n_edges: int, stars: bool, listed: bool, on_cpu: bool) -> int:
    """Atoms, rotated copies included, in one call of the backbone.

    By default a call holds about 4096 atoms and edges on a CPU, where smaller calls are dominated by their overhead
    and larger ones leave the caches, and 131072 elsewhere.

    Parameters
    ----------
    chunk_size : int
        What the user wants, 0 for the default.
    n_atoms, n_edges : int
        Of the batch.
    stars : bool
        Whether copies hold centers and their neighbors, whose own edges are not evaluated.
    listed : bool
        Whether the backbone reads a neighbor list. One that does not is taken for one of three neighbors per atom.
    on_cpu : bool
    """
    if chunk_size > 0:
        return chunk_size
    size = 4096 if on_cpu else 131072
    if stars:
        return size
    per_atom = 1.0 + n_edges / n_atoms if listed else 4.0
    return max(1, int(size / per_atom))


@dataclass(frozen=True, eq=False)
class Source:
    """What copies are made from.

    Attributes
    ----------
    batch : Data
        Validated, with neighbor list and edge vectors where the backbone wants them.
    inputs : dict of str to Tensor
        The differentiable inputs, by field name (generic backbones) or by cache entry (sharing ones).
    constants : dict of str to Tensor
        Cache entries that are not differentiable.
    levels : dict of str to str
        What the rows of an input or of a constant are: "atom", "edge" or "structure"; others are handed over whole.
    shared : bool
        Whether ``inputs`` and ``constants`` are the cache of a backbone that shares work between frames.
    """

    batch: Data
    inputs: dict[str, Tensor]
    constants: dict[str, Tensor]
    levels: dict[str, str]
    shared: bool

    def rows(self, name: str, copies: Copies, structure: Tensor) -> Tensor | None:
        """Rows of an input that copies of these structures hold, None for all of it."""
        level = self.levels.get(name, "")
        return structure if level == "structure" else copies.rows(level)


def make_source(backbone: Backbone, batch: Data) -> Source:
    """Split a batch (or what the backbone prepares from it) into differentiable inputs and constants."""
    if backbone.shares_work:
        cache = backbone.prepare(batch)
        inputs = {name: value for name, value in cache.items() if value.is_floating_point()}
        constants = {name: value for name, value in cache.items() if name not in inputs}
        # What rotates: edge vectors, or the positions where no neighbor list is read.
        geometry, level = (keys.POS, "atom") if backbone.cutoff is None else (keys.EDGE_VEC, "edge")
        levels = {**backbone.cache_rows, geometry: level}
        return Source(batch, {**inputs, geometry: batch[geometry]}, constants, levels, True)
    levels = {keys.POS: "atom", keys.CELL: "structure", keys.EDGE_VEC: "edge"} | dict.fromkeys(backbone.vectors, "atom")
    return Source(batch, {name: batch[name] for name in levels if batch.get(name) is not None}, {}, levels, False)


def rotated_inputs(
    backbone: Backbone, source: Source, inputs: dict[str, Tensor], copies: Copies, rotations: Tensor, origins: Tensor
) -> dict[str, Tensor]:
    """Gathered inputs in local coordinates, ``x_local = R^T (x - origin)``."""
    local = dict(inputs)
    rotations = rotations.to(source.batch[keys.POS].dtype)
    if keys.POS in local:
        local[keys.POS] = turned(local[keys.POS] - origins[copies.atom_copy], rotations, copies.atom_copy)
    if keys.EDGE_VEC in local:
        local[keys.EDGE_VEC] = turned(local[keys.EDGE_VEC], rotations, copies.edge_copy)
    if source.shared:
        return local
    local[keys.CELL] = local[keys.CELL] @ rotations
    for name, irreps in backbone.vectors.items():
        local[name] = OutputSpec(irreps).rotate(local[name], rotations.transpose(1, 2), copies.atom_copy)
    return local


def turned(vectors: Tensor, rotations: Tensor, copy: Tensor) -> Tensor:
    """Every vector times the matrix of its copy, ``v^T R``: Tensor of shape (n, 3)."""
    return (vectors[:, None, :] @ rotations.index_select(0, copy))[:, 0]


def run_backbone(backbone: Backbone, source: Source, local: dict[str, Tensor], copies: Copies) -> dict[str, Tensor]:
    """Outputs of the backbone in local coordinates."""
    if backbone.dtype in HALVES:
        local = {name: value.to(backbone.dtype) for name, value in local.items()}
    if not source.shared:
        return backbone(_local_batch(backbone, source, local, copies))
    geometry = keys.POS if backbone.cutoff is None else keys.EDGE_VEC
    cache = copies.gather(source.constants, source.levels)
    return backbone.forward_frames({**local, **cache}, local[geometry], copies)


def _local_batch(backbone: Backbone, source: Source, local: dict[str, Tensor], copies: Copies) -> Batch:
    batch, atom, copy = source.batch, copies.atom, copies.atom_copy
    n_atoms, n_copies = batch[keys.POS].shape[0], local[keys.CELL].shape[0]
    first = torch.searchsorted(copy, torch.arange(n_copies, device=copy.device))
    structure = batch[keys.BATCH][atom[first]]
    fields: dict[str, Any] = {}
    # Fields travel with their atom or structure; everything geometric is set below.
    special = {keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC, keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_VEC}
    for name in batch.keys():
        value = batch[name]
        if name in special or name in backbone.vectors:
            continue
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == n_atoms:
            value = value[atom]
        elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch[keys.PTR].shape[0] - 1:
            value = value[structure]
        fields[name] = value
    counts = torch.bincount(copy, minlength=n_copies)
    fields |= {name: local[name] for name in (keys.POS, keys.CELL, *backbone.vectors)}
    fields[keys.PBC] = batch[keys.PBC][structure]
    if keys.EDGE_VEC in local:
        fields[keys.EDGE_VEC] = local[keys.EDGE_VEC]
        fields[keys.EDGE_INDEX] = torch.stack([copies.source, copies.target])
        fields[keys.CELL_SHIFT] = batch[keys.CELL_SHIFT][copies.edge]
    fields[keys.CENTER_MASK] = copies.center
    return Batch(**{keys.BATCH: copy, keys.PTR: offsets(counts)}, **fields)


def check_outputs(backbone: Backbone, got: Any, copies: Copies, n_copies: int, batch: Data) -> dict[str, Tensor]:
    """The declared outputs, or an error that says what is wrong with them and where."""
    if not isinstance(got, dict):
        raise BackboneOutputError(f"backbone: expected a dict of outputs, got {type(got).__name__}")
    checked = {}
    for name, spec in backbone.outputs.items():
        value = got.get(name)
        if not isinstance(value, Tensor):
            raise BackboneOutputError(f"backbone: expected an output {name!r}, got {sorted(got)}")
        n_rows = int(copies.center.sum()) if spec.per == "atom" else n_copies
        if tuple(value.shape) != (n_rows, *spec.shape):
            raise BackboneOutputError(
                f"backbone: output {name!r} ({spec}): expected shape {(n_rows, *spec.shape)} "
                f"({n_rows} {'centers' if spec.per == 'atom' else 'copies of structures'}), got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value.detach()).all()):
            bad = int((~torch.isfinite(value.detach())).reshape(n_rows, -1).any(dim=1).nonzero()[0, 0])
            if spec.per == "atom":
                atom = int(copies.atom[copies.center][bad])
            else:
                atom = int(copies.atom[(copies.atom_copy == bad).nonzero()[0, 0]])
            structure = int(batch[keys.BATCH][atom])
            where = f", atom {atom - int(batch[keys.PTR][structure])}" if spec.per == "atom" else ""
            raise BackboneOutputError(
                f"backbone: output {name!r}: expected finite values, got {value.detach()[bad].tolist()} for "
                f"structure {structure}{where}"
            )
        checked[name] = value
    return checked
