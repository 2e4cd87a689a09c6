"""Systems of metatomic made from batches: neighbor lists as blocks, and further inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import edge_vectors, replace
from symmetrize.errors import DeclarationError
from symmetrize.ops.neighbors import neighbor_list


def systems_of(batch: Batch, model: Any, pos: Tensor, cell: Tensor) -> list[Any]:
    """The structures of a batch with the neighbor lists and inputs that a model asks for.

    Parameters
    ----------
    batch : Batch
        Validated.
    model : metatomic.torch.AtomisticModel
    pos, cell : Tensor of shape (n_atoms, 3), (n_structures, 3, 3)
        What the model differentiates by, on its device, instead of those of the batch; cells are zero along directions
        that are not periodic.

    Returns
    -------
    list of metatomic.torch.System
        Lengths in angstrom.

    Raises
    ------
    DeclarationError
        The batch has no species, or an input cannot be provided.
    """
    from metatomic.torch import register_autograd_neighbors

    systems = bare_systems(batch, pos, cell)
    for request in model.requested_neighbor_lists():
        blocks = neighbor_blocks(batch, request.engine_cutoff("angstrom"), request.full_list, pos)
        for system, block in zip(systems, blocks, strict=True):
            register_autograd_neighbors(system, block, check_consistency=False)
            system.add_neighbor_list(request, block)
    add_inputs(systems, batch, model, pos)
    return systems


def bare_systems(batch: Batch, pos: Tensor, cell: Tensor) -> list[Any]:
    """Systems without neighbor lists; arguments as for `systems_of`."""
    from metatomic.torch import System

    if batch.get(keys.Z) is None:
        raise DeclarationError("batch: expected species in 'z', a metatomic model needs them")
    types, pbc = batch[keys.Z].to(pos.device, torch.int32), batch[keys.PBC].to(pos.device)
    ptr = batch[keys.PTR].tolist()
    return [System(types[a:b], pos[a:b], cell[s], pbc[s]) for s, (a, b) in enumerate(pairwise(ptr))]


def add_inputs(systems: list[Any], batch: Batch, model: Any, like: Tensor) -> None:
    """Give every system the further inputs that a model asks for.

    Raises
    ------
    DeclarationError
        One cannot be provided.
    """
    for name, request in model.requested_inputs(True).items():
        for s, system in enumerate(systems):
            system.add_data(name, input_map(name, request.sample_kind, batch, s, like))


def neighbor_blocks(batch: Batch, cutoff: float, full: bool, like: Tensor) -> list[Any]:
    """Neighbor lists of all structures as metatensor blocks: each pair in both directions, or once."""
    edges, shift = neighbor_list(batch[keys.POS], batch[keys.PTR], batch[keys.CELL], batch[keys.PBC], cutoff)
    listed = replace(batch, **{keys.EDGE_INDEX: edges, keys.CELL_SHIFT: shift})
    vectors = edge_vectors(listed).detach()
    if not full:
        keep = once(edges, shift)
        edges, shift, vectors = edges[:, keep], shift[keep], vectors[keep]
    return blocks_of(edges, shift, vectors.to(like.device), batch[keys.BATCH], batch[keys.PTR])


def once(edges: Tensor, shift: Tensor) -> Tensor:
    """Which edges of a full list remain when each pair is to be listed once: Tensor of shape (n_edges,), bool.

    Of an atom and its own image, the one whose first nonzero translation is positive.
    """
    second, first = edges
    sign = torch.sign(shift.to(torch.int64)) @ shift.new_tensor([9, 3, 1], dtype=torch.int64)
    return (first < second) | ((first == second) & (sign > 0))


def blocks_of(edges: Tensor, shift: Tensor, vectors: Tensor, structure: Tensor, ptr: Tensor) -> list[Any]:
    """Edges as metatensor blocks, one for each structure.

    Parameters
    ----------
    edges, shift, vectors : Tensor of shape (2, n_edges), (n_edges, 3), (n_edges, 3)
        As ``edge_index``, ``cell_shift`` and ``edge_vec`` of a batch, in any order. Gradients flow to the vectors.
    structure, ptr : Tensor of shape (n_atoms,), (n_structures + 1,)
    """
    from metatensor.torch import Labels, TensorBlock

    second, first = edges
    owner = structure[first]
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=len(ptr) - 1).tolist()
    local = torch.stack([first, second], dim=1) - ptr[owner][:, None]
    samples = torch.cat([local, shift.to(local)], dim=1)[order].to(vectors.device, torch.int32)
    values = vectors[order.to(vectors.device), :, None]
    names = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
    xyz = Labels(["xyz"], torch.arange(3, dtype=torch.int32, device=vectors.device)[:, None])
    distance = Labels(["distance"], torch.zeros(1, 1, dtype=torch.int32, device=vectors.device))
    return [
        TensorBlock(values=v, samples=Labels(names, s, assume_unique=True), components=[xyz], properties=distance)
        for s, v in zip(samples.split(counts), values.split(counts), strict=True)
    ]


def input_map(name: str, sample_kind: str, batch: Batch, structure: int, like: Tensor) -> Any:
    """A further input of one structure: velocities and momenta from the batch, masses of the elements.

    A charge or spin multiplicity of the structures is read from the batch where it has a field of that name; otherwise
    the charge is 0 and the multiplicity 1.
    """
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
        given = batch.get(name)
        values = torch.full((1,), float(name == "spin_multiplicity")) if given is None else given[structure].reshape(1)
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
