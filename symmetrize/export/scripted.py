"""Symmetrised models behind metatomic's interface, as modules that TorchScript compiles."""

# No "from __future__ import annotations" here: metatomic compares the types of ``forward`` with its own.

from typing import Dict, List, Optional  # noqa: UP035  (the same)

import torch
from torch import Tensor

from symmetrize.export.averaging import Average
from symmetrize.export.blocks import Writer, atom_samples, flat_atoms, flat_edges, mask_of, system_samples
from symmetrize.ops.ragged import segment_sum
from symmetrize.representations import OutputSpec

from metatensor.torch import Labels, TensorMap  # isort: skip
from metatomic.torch import ModelOutput, NeighborListOptions, System  # isort: skip


class Output(torch.nn.Module):
    """One output: how its rows are reduced, and how they are written.

    Parameters
    ----------
    spec : OutputSpec
    name : str
        Under which it is exported.
    """

    shape: List[int]  # noqa: UP006

    def __init__(self, spec: OutputSpec, name: str) -> None:
        super().__init__()
        self.name = name
        self.per_atom = spec.per == "atom"
        self.reduce = spec.reduce or ""
        self.shape = list(spec.shape)
        self.writer = Writer(spec, name)

    def forward(
        self,
        rows: Tensor,
        change: Optional[Tensor],  # noqa: UP045
        wanted: Tensor,
        structure: Tensor,
        ptr: Tensor,
        as_atoms: bool,
        dtype: torch.dtype,
    ) -> TensorMap:
        """Rows of all atoms or structures as an engine wants them; ``change`` is added to the rows of structures."""
        n_systems = ptr.shape[0] - 1
        if self.per_atom and as_atoms:
            return self.writer(rows[wanted].to(dtype), atom_samples(structure, ptr, wanted))
        if self.per_atom:
            if self.reduce == "":
                raise ValueError("output '" + self.name + "' is per atom, it cannot be computed per system")
            rows = segment_sum(rows[wanted], structure[wanted], n_systems)
            if self.reduce == "mean":
                counts = torch.bincount(structure[wanted], minlength=n_systems).clamp(min=1).to(rows.dtype)
                rows = rows / counts.reshape([n_systems] + [1] * len(self.shape))
        if change is not None:
            rows = rows + change
        return self.writer(rows.to(dtype), system_samples(n_systems, rows.device))

    def nothing(self, as_atoms: bool, dtype: torch.dtype, device: torch.device) -> TensorMap:
        """The output of no systems."""
        empty = torch.zeros([0] + self.shape, dtype=dtype, device=device)
        zero = torch.zeros(0, dtype=torch.int64, device=device)
        if self.per_atom and as_atoms:
            return self.writer(empty, atom_samples(zero, zero, zero.to(torch.bool)))
        return self.writer(empty, system_samples(0, device))


class SymmetrizedModel(torch.nn.Module):
    """A symmetrised backbone behind metatomic's interface.

    Parameters
    ----------
    average : Average
    outputs : dict of str to Output
    requests : list of NeighborListOptions
        Neighbor lists of the backbone and, where they are others, of the frames.
    dtype : torch.dtype
        Of the systems.
    """

    requests: List[NeighborListOptions]  # noqa: UP006

    def __init__(
        self,
        average: Average,
        outputs: dict[str, Output],
        requests: list[NeighborListOptions],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.average = average
        self.outputs = torch.nn.ModuleDict(outputs)
        self.requests, self.dtype = requests, dtype

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """See ``metatomic.torch.ModelInterface``."""
        return self.requests

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels],  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """See ``metatomic.torch.ModelInterface``."""
        results: Dict[str, TensorMap] = {}  # noqa: UP006
        if len(systems) == 0:
            device = torch.device("cpu")
            for output in self.outputs.values():
                called: str = output.name  # type: ignore[assignment]
                if called in outputs:
                    as_atoms = outputs[called].sample_kind == "atom"
                    results[called] = output.nothing(as_atoms, self.dtype, device)  # type: ignore[operator]
            return results
        pos, z, structure, ptr = flat_atoms(systems)
        cell = torch.stack([system.cell for system in systems])
        n_systems = len(systems)
        wanted = mask_of(selected_atoms, ptr)
        if self.average.frames.needs_finite:
            for system in systems:
                if bool(system.pbc.any()):
                    raise ValueError(
                        "this model is symmetrized around the centroid of a finite structure, and got one that is "
                        "periodic; export it with scope='atom', or set pbc to False for a molecule in a box"
                    )
        edge_index = torch.zeros(2, 0, dtype=torch.int64, device=pos.device)
        shift = torch.zeros(0, 3, dtype=torch.int64, device=pos.device)
        vectors = torch.zeros(0, 3, dtype=pos.dtype, device=pos.device)
        if len(self.requests) > 0:
            edge_index, shift, vectors = flat_edges(systems, self.requests[0], ptr)
        far_center, far_vectors = edge_index[1], vectors
        if len(self.requests) > 1:
            far_index, _, far_vectors = flat_edges(systems, self.requests[1], ptr)
            far_center = far_index[1]

        derivative = 0
        shared = False
        for name, output in self.outputs.items():
            asked: str = output.name  # type: ignore[assignment]
            if name == self.average.energy and asked in outputs:
                if torch.is_grad_enabled() and (pos.requires_grad or vectors.requires_grad):
                    derivative = 1
                    if output.per_atom and outputs[asked].sample_kind == "atom":
                        shared = not self.average.per_atom
                        derivative = 1 if shared else 2
        sums, change = self.average(
            pos, z, structure, ptr, cell, edge_index, shift, vectors, far_center, far_vectors, wanted, derivative
        )
        baseline: Dict[str, Tensor] = self.average.backbone.baseline(z)  # noqa: UP006
        for name, output in self.outputs.items():
            file_name: str = output.name  # type: ignore[assignment]
            if file_name in outputs:
                rows = sums[name]
                if name in baseline:
                    added = baseline[name]
                    rows = rows + (added if output.per_atom else segment_sum(added, structure, n_systems))
                extra: Optional[Tensor] = None  # noqa: UP045
                if derivative > 0 and name == self.average.energy:
                    if shared:
                        # Only the derivative of their sum is known: the atoms of a structure share it.
                        share = torch.bincount(structure[wanted], minlength=n_systems).clamp(min=1)
                        rows = rows + (change / share)[structure]
                    elif derivative == 2:
                        rows = rows + change
                    else:
                        extra = change
                as_atoms = outputs[file_name].sample_kind == "atom"
                results[file_name] = output(rows, extra, wanted, structure, ptr, as_atoms, pos.dtype)
        return results
