"""Another model in the metatomic format, symmetrised: systems in, rotated systems to it, its blocks rotated back."""

# No "from __future__ import annotations" here: metatomic compares the types of ``forward`` with its own.

from typing import Dict, List, Optional  # noqa: UP035  (the same)

import torch
from torch import Tensor

from symmetrize.copies import packed
from symmetrize.export.averaging import first_order, or_zeros
from symmetrize.export.blocks import flat_atoms, flat_edges, mask_of
from symmetrize.export.generic import BlockRotation
from symmetrize.ops.ragged import offsets, segment_sum

from metatensor.torch import Labels, TensorBlock, TensorMap  # isort: skip
from metatomic.torch import (  # isort: skip
    ModelOutput,
    NeighborListOptions,
    System,
    register_autograd_neighbors,
)


class WrappedModel(torch.nn.Module):
    """A model of the metatomic format, averaged over frames.

    Parameters
    ----------
    module : torch.nn.Module
        What an ``AtomisticModel`` wraps.
    frames : torch.nn.Module
        See `symmetrize.export.frames`.
    rotation : BlockRotation
    per_atom : bool
        Atom scope: every atom's surroundings are evaluated as a finite cluster.
    chunk_size : int
        Atoms in the copies of a call; 0: by device.
    inner : list of NeighborListOptions
        What the module asks for.
    outer : list of NeighborListOptions
        What the engine is asked for: the same in structure scope, candidates and surroundings in atom scope.
    own_names : dict of str to str
        What the module itself calls its outputs, where the format has renamed them since.
    """

    inner: List[NeighborListOptions]  # noqa: UP006
    outer: List[NeighborListOptions]  # noqa: UP006
    own_names: Dict[str, str]  # noqa: UP006

    def __init__(
        self,
        module: torch.nn.Module,
        frames: torch.nn.Module,
        rotation: BlockRotation,
        per_atom: bool,
        chunk_size: int,
        inner: list[NeighborListOptions],
        outer: list[NeighborListOptions],
        own_names: dict[str, str],
    ) -> None:
        super().__init__()
        self.module, self.frames, self.rotation = module, frames, rotation
        self.per_atom, self.chunk_size = per_atom, chunk_size
        self.inner, self.outer = inner, outer
        self.own_names = own_names

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """See ``metatomic.torch.ModelInterface``."""
        return self.outer

    def ask(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels],  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """The module, by the names of outputs that it knows."""
        asked: Dict[str, ModelOutput] = {}  # noqa: UP006
        for name, output in outputs.items():
            asked[self.own_names.get(name, name)] = output
        got = self.module(systems, asked, selected_atoms)
        out: Dict[str, TensorMap] = {}  # noqa: UP006
        for name in outputs.keys():
            out[name] = got[self.own_names.get(name, name)]
        return out

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels],  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """See ``metatomic.torch.ModelInterface``."""
        if len(systems) == 0:
            return self.ask(systems, outputs, selected_atoms)
        if not self.per_atom:
            # Not even for fixed frames: copies are made of positions, and nothing would reach the strain of a cell.
            for system in systems:
                if bool(system.pbc.any()):
                    raise ValueError(
                        "this model is symmetrized as a whole, around the centroid, and got a structure that is "
                        "periodic; wrap it with scope='atom' if it is local, or set pbc to False for a molecule in a "
                        "box"
                    )
        pos, z, structure, ptr = flat_atoms(systems)
        n_atoms, n_systems = pos.shape[0], len(systems)
        wanted = mask_of(selected_atoms, ptr)
        edge_index = torch.zeros(2, 0, dtype=torch.int64, device=pos.device)
        vectors = torch.zeros(0, 3, dtype=pos.dtype, device=pos.device)
        if self.per_atom:
            edge_index, _, vectors = flat_edges(systems, self.outer[0], ptr)
        rotations, weights, owner, stratum, origins = self.frames(pos, structure, ptr, edge_index[1], vectors, wanted)
        edge_ptr = offsets(torch.bincount(edge_index[1], minlength=n_atoms))

        energy = ""
        asked: Dict[str, ModelOutput] = {}  # noqa: UP006
        for name, output in outputs.items():
            kind = "atom" if self.per_atom else output.sample_kind
            asked[name] = ModelOutput(unit="", sample_kind=kind)
            if name == "energy" and torch.is_grad_enabled() and (pos.requires_grad or vectors.requires_grad):
                energy = name
        atomic = self.per_atom and energy != "" and outputs[energy].sample_kind == "atom"
        n_rows = n_atoms if atomic else n_systems

        by_edge, by_pos = torch.zeros_like(vectors), torch.zeros_like(pos)
        by_rotation, by_origin = torch.zeros_like(rotations), torch.zeros_like(origins)
        by_weight = torch.zeros_like(weights)
        sums: Dict[str, Tensor] = {}  # noqa: UP006
        shapes: Dict[str, TensorMap] = {}  # noqa: UP006

        limit = self.chunk_size
        if limit == 0:
            limit = 1024 if pos.device.type == "cpu" else 16384
        for invariant in [False, True]:
            chosen = (((stratum == 2) == invariant) & (weights > 0.0)).nonzero()[:, 0]
            if self.per_atom:
                sizes = torch.ones_like(chosen)
                if not invariant:
                    sizes = sizes + (edge_ptr[1:] - edge_ptr[:-1])[owner[chosen]]
            else:
                sizes = (ptr[1:] - ptr[:-1])[owner[chosen]]
            order, stops = packed(sizes, limit)
            start = 0
            for stop in stops:
                frame = chosen[order[start:stop]]
                start = stop
                own = owner[frame]
                copies: List[System] = []  # noqa: UP006
                points: List[Tensor] = []  # noqa: UP006
                turns, shifts = rotations.detach()[frame], origins.detach()[frame]
                if energy != "":
                    turns, shifts = turns.requires_grad_(), shifts.requires_grad_()
                for k in range(own.shape[0]):
                    index = int(own[k])
                    if self.per_atom:
                        first, last = int(edge_ptr[index]), int(edge_ptr[index + 1])
                        last = first if invariant else last
                        point = vectors.detach()[first:last].clone()
                        if energy != "":
                            point = point.requires_grad_()
                        points.append(point)
                        types = torch.cat([z[index : index + 1], z[edge_index[0, first:last]]])
                        copies.append(self.cluster(point, types, turns[k]))
                    else:
                        point = pos.detach()[int(ptr[index]) : int(ptr[index + 1])].clone()
                        if energy != "":
                            point = point.requires_grad_()
                        points.append(point)
                        copies.append(self.turned(systems[index], point, turns[k], shifts[k]))
                center: Optional[Labels] = None  # noqa: UP045
                if self.per_atom:
                    center = self.labels(torch.stack([torch.arange(own.shape[0], device=own.device), 0 * own], dim=1))
                elif selected_atoms is not None:
                    center = self.selection(own, wanted, ptr)
                got = self.ask(copies, asked, center)
                elements, weight = turns.detach(), weights.detach()[frame]
                for name, tensor in got.items():
                    self.accumulate(
                        sums, shapes, name, tensor, own, elements, weight, ptr, n_atoms, n_systems, invariant
                    )
                if energy != "":
                    block = got[energy].block()
                    copy = block.samples.column("system").to(torch.int64)
                    energies = block.values[:, 0]
                    by_weight[frame] = segment_sum(energies.detach().to(torch.float64), copy, own.shape[0])
                    scalar = (energies.to(torch.float64) * weight[copy]).sum()
                    if scalar.requires_grad:
                        gradients = torch.autograd.grad([scalar], points + [turns, shifts], allow_unused=True)
                        by_rotation[frame] = or_zeros(gradients[-2], turns)
                        by_origin[frame] = or_zeros(gradients[-1], shifts)
                        for k in range(own.shape[0]):
                            index = int(own[k])
                            gradient = or_zeros(gradients[k], points[k])
                            if self.per_atom:
                                begin = int(edge_ptr[index])
                                by_edge[begin : begin + gradient.shape[0]] += gradient
                            else:
                                by_pos[int(ptr[index]) : int(ptr[index + 1])] += gradient

        change = torch.zeros(n_rows, dtype=torch.float64, device=pos.device)
        if energy != "":
            row = owner if atomic or not self.per_atom else structure[owner]
            change = change + first_order(rotations, by_rotation, row, n_rows)
            change = change + first_order(origins, by_origin, row, n_rows)
            change = change + first_order(weights[:, None], by_weight[:, None], row, n_rows)
            center_row = edge_index[1] if atomic else structure[edge_index[1]]
            change = change + first_order(vectors, by_edge, center_row, n_rows)
            atom_row = torch.arange(n_atoms, device=pos.device) if atomic else structure
            change = change + first_order(pos, by_pos, atom_row, n_rows)
        return self.results(systems, outputs, sums, shapes, energy, change, wanted, structure, ptr)

    def turned(self, system: System, point: Tensor, turn: Tensor, origin: Tensor) -> System:
        """A finite system in local coordinates, with its neighbor lists."""
        matrix = turn.to(point.dtype)
        local = (point - origin) @ matrix
        copy = System(system.types, local, torch.zeros_like(system.cell), system.pbc)
        for request in self.inner:
            given = system.get_neighbor_list(request)
            vectors = given.values.detach()[:, :, 0] @ matrix.detach()
            self.add_neighbors(copy, request, given.samples, vectors)
        return copy

    def cluster(self, point: Tensor, types: Tensor, turn: Tensor) -> System:
        """An atom, at the origin, and what surrounds it, as a finite system."""
        zero = torch.zeros(1, 3, dtype=point.dtype, device=point.device)
        unturned = torch.cat([zero, point.detach()])
        local = torch.cat([zero, point @ turn.to(point.dtype)])
        cell = torch.zeros(3, 3, dtype=point.dtype, device=point.device)
        copy = System(types.to(torch.int32), local, cell, torch.zeros(3, dtype=torch.bool, device=point.device))
        apart = torch.linalg.vector_norm(unturned[:, None] - unturned[None], dim=2)
        for request in self.inner:
            near = (apart <= request.cutoff).fill_diagonal_(False)
            if not request.full_list:
                near = torch.triu(near)
            pair = near.nonzero()
            samples = torch.cat([pair, torch.zeros_like(pair[:, :1]).expand(-1, 3)], dim=1).to(torch.int32)
            names = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
            vectors = local.detach()[pair[:, 1]] - local.detach()[pair[:, 0]]
            self.add_neighbors(copy, request, Labels(names, samples, assume_unique=True), vectors)
        return copy

    def add_neighbors(self, system: System, request: NeighborListOptions, samples: Labels, vectors: Tensor) -> None:
        """Give a system a neighbor list, through which gradients flow to its positions."""
        axis = torch.arange(3, dtype=torch.int32, device=vectors.device)[:, None]
        zero = torch.zeros(1, 1, dtype=torch.int32, device=vectors.device)
        block = TensorBlock(
            vectors[:, :, None].contiguous(), samples, [Labels(["xyz"], axis)], Labels(["distance"], zero)
        )
        if system.positions.requires_grad:
            register_autograd_neighbors(system, block, False)
        system.add_neighbor_list(request, block)

    def labels(self, values: Tensor) -> Labels:
        """Atoms of copies."""
        return Labels(["system", "atom"], values.to(torch.int32), assume_unique=True)

    def selection(self, own: Tensor, wanted: Tensor, ptr: Tensor) -> Labels:
        """The wanted atoms in copies of structures."""
        rows: List[Tensor] = []  # noqa: UP006
        for k in range(own.shape[0]):
            index = int(own[k])
            atom = wanted[int(ptr[index]) : int(ptr[index + 1])].nonzero()
            rows.append(torch.cat([torch.full_like(atom, k), atom], dim=1))
        return self.labels(torch.cat(rows))

    def accumulate(
        self,
        sums: Dict[str, Tensor],  # noqa: UP006
        shapes: Dict[str, TensorMap],  # noqa: UP006
        name: str,
        tensor: TensorMap,
        own: Tensor,
        elements: Tensor,
        weight: Tensor,
        ptr: Tensor,
        n_atoms: int,
        n_systems: int,
        invariant: bool,
    ) -> None:
        """Add the weighted blocks of a chunk, rotated back, to float64 rows of all atoms or structures."""
        if name not in shapes:
            shapes[name] = tensor
        names = tensor.keys.names
        for number in range(len(tensor.keys)):
            block = tensor.block_by_id(number)
            sigma = 1
            if "o3_sigma" in names:
                sigma = int(tensor.keys.values[number, names.index("o3_sigma")])
            spherical = False
            if len(block.components) == 1:
                spherical = block.components[0].names[0] == "o3_mu"
            copy = block.samples.column("system").to(torch.int64)
            row, n_rows = own[copy], n_systems
            if "atom" in block.samples.names:
                n_rows = n_atoms
                if not self.per_atom:
                    row = ptr[row] + block.samples.column("atom").to(torch.int64)
            values = self.rotation(block.values.detach(), elements[copy], spherical, sigma, invariant)
            factor = weight[copy].reshape([-1] + [1] * (values.dim() - 1))
            key = name + "#" + str(number)
            if key not in sums:
                shape = [n_rows] + list(values.shape[1:])
                sums[key] = torch.zeros(shape, dtype=torch.float64, device=values.device)
            sums[key].index_add_(0, row, values.to(torch.float64) * factor)

    def results(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        sums: Dict[str, Tensor],  # noqa: UP006
        shapes: Dict[str, TensorMap],  # noqa: UP006
        energy: str,
        change: Tensor,
        wanted: Tensor,
        structure: Tensor,
        ptr: Tensor,
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """Sums as blocks like those of the module."""
        out: Dict[str, TensorMap] = {}  # noqa: UP006
        n_systems = len(systems)
        atom = wanted.nonzero()[:, 0]
        atoms = self.labels(torch.stack([structure[atom], atom - ptr[structure[atom]]], dim=1))
        numbers = torch.arange(n_systems, device=ptr.device)[:, None].to(torch.int32)
        for name, like in shapes.items():
            blocks: List[TensorBlock] = []  # noqa: UP006
            as_atoms = outputs[name].sample_kind == "atom"
            for number in range(len(like.keys)):
                block = like.block_by_id(number)
                rows = sums[name + "#" + str(number)]
                by_atoms = "atom" in block.samples.names
                if by_atoms and not as_atoms:
                    rows = segment_sum(rows[atom], structure[atom], n_systems)
                if name == energy and as_atoms and not self.per_atom:
                    # Only the derivative of their sum is known: the atoms of a structure share it.
                    share = torch.bincount(structure[atom], minlength=n_systems).clamp(min=1)
                    rows = rows + (change / share)[structure][:, None]
                elif name == energy:
                    rows = rows + change[:, None]
                samples = Labels(["system"], numbers, assume_unique=True)
                if by_atoms and as_atoms:
                    rows = rows[atom]
                    samples = atoms
                values = rows.to(systems[0].positions.dtype)
                blocks.append(TensorBlock(values, samples, block.components, block.properties))
            out[name] = TensorMap(like.keys, blocks)
        return out
