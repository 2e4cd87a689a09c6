"""The evaluator in TorchScript: chunks of copies, their weighted average, and its gradient.

The same average as in `symmetrize.averaging`, from the same functions for frames, weights and copies. Memory is bounded
without recomputation: every chunk of copies is differentiated at once, and only numbers are kept. What an engine
differentiates is the energy to first order in every input a of the chunks (edge vectors, positions, frames, origins,
weights),

    E = sum_k w_k e_k + sum_a (a - const(a)) . dE/da,

which has the right value and the right first derivatives, and no others.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from symmetrize.copies import environment_sizes, gather_environments, gather_structures, packed
from symmetrize.evaluation import call_size
from symmetrize.export.rotating import Representation
from symmetrize.ops.ragged import offsets, segment_sum

#: What the energy is differentiated as: not at all, a number per structure, a number per atom.
CONSTANT, PER_STRUCTURE, PER_ATOM = 0, 1, 2


def first_order(tensor: Tensor, gradient: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Zeros of shape (n_rows,), float64, whose derivative by the rows of ``tensor`` is ``gradient``."""
    change = ((tensor - tensor.detach()) * gradient).to(torch.float64)
    return segment_sum(change.flatten(1).sum(dim=1), row, n_rows)


def or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient, zeros where there is none."""
    return torch.zeros_like(like) if gradient is None else gradient


class WithCell(torch.nn.Module):
    """A scriptable backbone that takes cells."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        pos: Tensor,
        z: Tensor,
        structure: Tensor,
        n_structures: int,
        edge_index: Tensor,
        shift: Tensor,
        vectors: Tensor,
        center: Tensor,
        cell: Tensor,
    ) -> dict[str, Tensor]:
        """See `Backbone.scriptable`."""
        return self.backbone(pos, z, structure, n_structures, edge_index, shift, vectors, center, cell)

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        """See `Backbone.scriptable`."""
        return self.backbone.baseline(z)  # type: ignore[operator]


class WithoutCell(torch.nn.Module):
    """A scriptable backbone that takes no cells, called like one that does."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        pos: Tensor,
        z: Tensor,
        structure: Tensor,
        n_structures: int,
        edge_index: Tensor,
        shift: Tensor,
        vectors: Tensor,
        center: Tensor,
        cell: Tensor,
    ) -> dict[str, Tensor]:
        """See `Backbone.scriptable`."""
        return self.backbone(pos, z, structure, n_structures, edge_index, shift, vectors, center)

    @torch.jit.export
    def baseline(self, z: Tensor) -> dict[str, Tensor]:
        """See `Backbone.scriptable`."""
        return self.backbone.baseline(z)  # type: ignore[operator]


class Average(torch.nn.Module):
    """Weighted averages of a scriptable backbone.

    Parameters
    ----------
    backbone : torch.nn.Module
        What `Backbone.scriptable` returns.
    frames : torch.nn.Module
        See `symmetrize.export.frames`.
    representations : dict of str to Representation
    energy : str
        The output that is differentiated; empty for none.
    per_atom : bool
        Atom scope.
    hops : int
        Of the environments in atom scope.
    chunk_size : int
        0: by device.
    dtype : torch.dtype
        Precision of the backbone.
    """

    def __init__(
        self,
        backbone: torch.nn.Module,
        frames: torch.nn.Module,
        representations: dict[str, Representation],
        energy: str,
        per_atom: bool,
        hops: int,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        takes_cell = "cell" in inspect.signature(backbone.forward).parameters
        self.backbone = WithCell(backbone) if takes_cell else WithoutCell(backbone)
        self.frames = frames
        self.representations = torch.nn.ModuleDict(representations)
        self.energy, self.per_atom, self.hops, self.chunk_size = energy, per_atom, hops, chunk_size
        # A buffer, so that whoever converts the file converts this too.
        self.register_buffer("like", torch.zeros(0, dtype=dtype))
        self.energy_per_atom = energy in representations and representations[energy].per_atom

    def forward(
        self,
        pos: Tensor,
        z: Tensor,
        structure: Tensor,
        ptr: Tensor,
        cell: Tensor,
        edge_index: Tensor,
        shift: Tensor,
        vectors: Tensor,
        far_center: Tensor,
        far_vectors: Tensor,
        wanted: Tensor,
        derivative: int,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Averages without baselines.

        Parameters
        ----------
        pos : Tensor of shape (n_atoms, 3)
        z, structure : Tensor of shape (n_atoms,), int64
        ptr, cell : Tensor of shape (n_structures + 1,), (n_structures, 3, 3)
        edge_index, shift, vectors : Tensor of shape (2, n_edges), (n_edges, 3), (n_edges, 3)
            Edges of the backbone, sorted by center.
        far_center, far_vectors : Tensor of shape (n_far,), (n_far, 3)
            Candidates of the frames.
        wanted : Tensor of shape (n_atoms,)
            bool.
        derivative : int
            ``CONSTANT``, ``PER_STRUCTURE`` or ``PER_ATOM`` (which structure scope does not know).

        Returns
        -------
        dict of str to Tensor
            Rows of all atoms (zeros where they are not wanted) or of all structures, float64, constants.
        Tensor of shape (n_structures,) or (n_atoms,), float64
            To be added to the energy: zeros with the right derivative.
        """
        n_atoms, n_structures = pos.shape[0], ptr.shape[0] - 1
        rotations, weights, owner, stratum, origins = self.frames(pos, structure, ptr, far_center, far_vectors, wanted)
        edge_ptr = offsets(torch.bincount(edge_index[1], minlength=n_atoms))
        sums = self._zeros(n_atoms, n_structures, pos.device)

        # The gradient of the energy by everything that chunks are made from.
        by_edge, by_pos = torch.zeros_like(vectors), torch.zeros_like(pos)
        by_rotation, by_origin = torch.zeros_like(rotations), torch.zeros_like(origins)
        by_weight = torch.zeros_like(weights)
        n_rows = n_atoms if derivative == 2 else n_structures
        change = torch.zeros(n_rows, dtype=torch.float64, device=pos.device)

        stars = self.per_atom and self.hops <= 1
        n_edges = edge_index.shape[1]
        limit = call_size(self.chunk_size, n_atoms, n_edges, stars, n_edges > 0, pos.device.type == "cpu")
        for invariant in [False, True]:
            chosen = (((stratum == 2) == invariant) & (weights > 0.0)).nonzero()[:, 0]
            hops = 0 if invariant else self.hops
            if self.per_atom:
                sizes = environment_sizes(edge_index, ptr, structure, hops)[owner[chosen]]
            else:
                sizes = (ptr[1:] - ptr[:-1])[owner[chosen]]
            order, stops = packed(sizes, limit)
            start = 0
            for stop in stops:
                frame = chosen[order[start:stop]]
                start = stop
                own = owner[frame]
                n_copies = own.shape[0]
                if self.per_atom:
                    atom, edge, atom_copy, edge_copy, source, target = gather_environments(
                        edge_index, edge_ptr, n_atoms, own, hops
                    )
                    center = atom == own[atom_copy]
                else:
                    atom, edge, atom_copy, edge_copy, source, target = gather_structures(edge_index, edge_ptr, ptr, own)
                    center = wanted[atom]

                edges, points = vectors.detach()[edge], pos.detach()[atom]
                turns, shifts = rotations.detach()[frame], origins.detach()[frame]
                weight = weights.detach()[frame]
                if derivative > 0:
                    edges, points = edges.requires_grad_(), points.requires_grad_()
                    turns, shifts = turns.requires_grad_(), shifts.requires_grad_()
                matrices = turns.to(pos.dtype)
                local_edges = (edges[:, None, :] @ matrices[edge_copy])[:, 0].to(self.like.dtype)
                local = ((points - shifts[atom_copy])[:, None, :] @ matrices[atom_copy])[:, 0].to(self.like.dtype)
                got = self.backbone(
                    local,
                    z[atom],
                    atom_copy,
                    n_copies,
                    torch.stack([source, target]),
                    shift[edge],
                    local_edges,
                    center,
                    (cell[structure[own] if self.per_atom else own].detach() @ matrices.detach()).to(self.like.dtype),
                )

                self._accumulate(sums, got, weight, turns.detach(), own, atom, atom_copy, center, invariant)
                if derivative > 0:
                    energies = got[self.energy]
                    row_copy = torch.arange(n_copies, device=own.device)
                    if self.energy_per_atom:
                        row_copy = atom_copy[center]
                    by_weight[frame] = segment_sum(energies.detach().to(torch.float64), row_copy, n_copies)
                    scalar = (energies.to(torch.float64) * weight[row_copy]).sum()
                    if scalar.requires_grad:
                        gradients = torch.autograd.grad([scalar], [edges, points, turns, shifts], allow_unused=True)
                        edge_gradient = or_zeros(gradients[0], edges)
                        point_gradient = or_zeros(gradients[1], points)
                        by_rotation[frame] = or_zeros(gradients[2], turns)
                        by_origin[frame] = or_zeros(gradients[3], shifts)
                        if derivative == 2:
                            # An edge can be part of the environments of several atoms, with a gradient for each.
                            pair, inverse = torch.unique(own[edge_copy] * n_edges + edge, return_inverse=True)
                            total = segment_sum(edge_gradient, inverse, pair.shape[0])
                            if n_edges > 0:
                                change = change + first_order(vectors[pair % n_edges], total, pair // n_edges, n_rows)
                            pair, inverse = torch.unique(own[atom_copy] * n_atoms + atom, return_inverse=True)
                            total = segment_sum(point_gradient, inverse, pair.shape[0])
                            change = change + first_order(pos[pair % n_atoms], total, pair // n_atoms, n_rows)
                        else:
                            by_edge.index_add_(0, edge, edge_gradient)
                            by_pos.index_add_(0, atom, point_gradient)

        if derivative > 0:
            row = owner if derivative == 2 or not self.per_atom else structure[owner]
            change = change + first_order(rotations, by_rotation, row, n_rows)
            change = change + first_order(origins, by_origin, row, n_rows)
            change = change + first_order(weights[:, None], by_weight[:, None], row, n_rows)
            if derivative == 1:
                change = change + first_order(vectors, by_edge, structure[edge_index[1]], n_rows)
                change = change + first_order(pos, by_pos, structure, n_rows)
        return sums, change

    def _zeros(self, n_atoms: int, n_structures: int, device: torch.device) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, representation in self.representations.items():
            n_rows = n_atoms if representation.per_atom else n_structures
            out[name] = torch.zeros([n_rows] + representation.shape, dtype=torch.float64, device=device)  # type: ignore[operator]
        return out

    def _accumulate(
        self,
        sums: dict[str, Tensor],
        got: dict[str, Tensor],
        weight: Tensor,
        turns: Tensor,
        own: Tensor,
        atom: Tensor,
        atom_copy: Tensor,
        center: Tensor,
        invariant: bool,
    ) -> None:
        """Add the weighted outputs of a chunk of copies, rotated back."""
        for name, representation in self.representations.items():
            if representation.per_atom:
                row_copy, row = atom_copy[center], atom[center]
            else:
                row_copy, row = torch.arange(own.shape[0], device=own.device), own
            values = got[name].detach()
            if invariant:
                values = representation.project_invariant(values)  # type: ignore[operator]
            else:
                values = representation.rotate(values, turns[row_copy])  # type: ignore[operator]
            factor = weight[row_copy].reshape([-1] + [1] * (values.dim() - 1))
            sums[name].index_add_(0, row, values.to(torch.float64) * factor)
