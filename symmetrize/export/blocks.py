"""Systems of metatomic as flat tensors, and results as blocks, inside TorchScript."""

# No "from __future__ import annotations" here: TorchScript reads the annotations of attributes.

import math
from typing import Optional

import torch
from e3nn import o3
from torch import Tensor

from symmetrize.metatomic import import_metatomic
from symmetrize.metatomic.tensor_maps import to_e3nn
from symmetrize.representations import OutputSpec

import_metatomic()

from metatensor.torch import Labels, TensorBlock, TensorMap  # noqa: E402  (what compiles on import comes first)
from metatomic.torch import NeighborListOptions, System  # noqa: E402


def flat_atoms(systems: list[System]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Atoms of all systems.

    Returns
    -------
    pos : Tensor of shape (n_atoms, 3)
    z, structure : Tensor of shape (n_atoms,), int64
    ptr : Tensor of shape (n_systems + 1,), int64
    """
    pos = torch.cat([system.positions for system in systems])
    z = torch.cat([system.types for system in systems]).to(torch.int64)
    counts = torch.tensor([len(system) for system in systems], dtype=torch.int64, device=pos.device)
    structure = torch.repeat_interleave(torch.arange(len(systems), device=pos.device), counts)
    zero = torch.zeros(1, dtype=torch.int64, device=pos.device)
    return pos, z, structure, torch.cat([zero, torch.cumsum(counts, dim=0)])


def flat_edges(systems: list[System], request: NeighborListOptions, ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbor lists of all systems, sorted by center.

    Returns
    -------
    edge_index : Tensor of shape (2, n_edges), int64
        Neighbor, center.
    shift : Tensor of shape (n_edges, 3), int64
    vectors : Tensor of shape (n_edges, 3)
        From the center to the neighbor.
    """
    pairs: list[Tensor] = []
    vectors: list[Tensor] = []
    for number, system in enumerate(systems):
        block = system.get_neighbor_list(request)
        samples = block.samples.values.to(torch.int64)
        first = ptr[number]
        pairs.append(torch.cat([samples[:, :2] + first, samples[:, 2:]], dim=1))
        vectors.append(block.values[:, :, 0])
    samples, vector = torch.cat(pairs), torch.cat(vectors)
    order = torch.argsort(samples[:, 0], stable=True)
    samples = samples[order]
    return torch.stack([samples[:, 1], samples[:, 0]]), samples[:, 2:], vector[order]


def mask_of(selected: Optional[Labels], ptr: Tensor) -> Tensor:  # noqa: UP045  (a class of TorchScript)
    """Atoms that results are wanted for: Tensor of shape (n_atoms,), bool."""
    n_atoms = int(ptr[-1])
    if selected is None:
        return torch.ones(n_atoms, dtype=torch.bool, device=ptr.device)
    chosen = selected.values.to(ptr.device, torch.int64)
    mask = torch.zeros(n_atoms, dtype=torch.bool, device=ptr.device)
    mask[ptr[chosen[:, 0]] + chosen[:, 1]] = True
    return mask


def atom_samples(structure: Tensor, ptr: Tensor, wanted: Tensor) -> Labels:
    """Labels of the rows of wanted atoms."""
    atom = wanted.nonzero()[:, 0]
    values = torch.stack([structure[atom], atom - ptr[structure[atom]]], dim=1)
    return Labels(["system", "atom"], values.to(torch.int32), assume_unique=True)


def system_samples(n_systems: int, device: torch.device) -> Labels:
    """Labels of the rows of all systems."""
    return Labels(["system"], torch.arange(n_systems, device=device)[:, None].to(torch.int32), assume_unique=True)


class Writer(torch.nn.Module):
    """Rows of an output as a TensorMap in the conventions of metatomic.

    Scalars of even parity have no components, polar vectors and Cartesian tensors have ``xyz`` ones, everything else
    is spherical, with one block for each degree and parity.

    Parameters
    ----------
    spec : OutputSpec
    name : str
        Of the output as it is exported; standard ones call their property like this.
    """

    columns: list[Tensor]
    bases: list[Tensor]

    def __init__(self, spec: OutputSpec, name: str) -> None:
        super().__init__()
        self.name = name
        self.property = name.split("::")[-1].split("/")[0]
        self.rank = spec.rank
        self.width = math.prod(spec.shape)
        self.kind = "cartesian"
        keys: list[tuple[int, int]] = []
        columns: list[Tensor] = []
        bases: list[Tensor] = []
        if spec.cartesian is None:
            irreps = o3.Irreps(spec.irreps)
            kinds = {(ir.l, ir.p) for _, ir in irreps}
            plain = {frozenset({(0, 1)}): "scalar", frozenset({(1, -1)}): "vector"}
            self.kind = plain.get(frozenset(kinds), "spherical")
            for l, p in sorted(kinds):
                windows = [
                    torch.arange(window.start, window.stop).reshape(mul, ir.dim)
                    for (mul, ir), window in zip(irreps, irreps.slices(), strict=True)
                    if (ir.l, ir.p) == (l, p)
                ]
                keys.append((l, p * (-1) ** l))
                columns.append(torch.cat(windows).T.contiguous())
                bases.append(to_e3nn(l).clone())
        self.keys = torch.tensor(keys if keys else [(0, 1)], dtype=torch.int32)
        self.columns = columns
        self.bases = bases

    def forward(self, values: Tensor, samples: Labels) -> TensorMap:
        """Rows (n_rows, *shape) as blocks."""
        device = values.device
        if self.kind != "spherical":
            components: list[Labels] = []
            axis = torch.arange(3, dtype=torch.int32, device=device)[:, None]
            if self.kind == "scalar":
                data = values.reshape(values.shape[0], self.width)
            elif self.kind == "vector":
                data = values.reshape(values.shape[0], self.width // 3, 3).transpose(1, 2)
                components.append(Labels(["xyz"], axis))
            else:
                data = values[..., None]
                for k in range(self.rank):
                    components.append(Labels(["xyz" if self.rank == 1 else "xyz_" + str(k + 1)], axis))
            key = Labels(["_"], torch.zeros(1, 1, dtype=torch.int32, device=device))
            return TensorMap(key, [self._block(data, samples, components)])
        flat = values.reshape(values.shape[0], self.width)
        blocks: list[TensorBlock] = []
        for number, columns in enumerate(self.columns):
            data = flat[:, columns.to(device).reshape(-1)].reshape([flat.shape[0]] + list(columns.shape))
            basis = self.bases[number].to(device).to(values.dtype)
            data = torch.einsum("mc,ncp->nmp", basis, data)
            l = (columns.shape[0] - 1) // 2
            mu = torch.arange(-l, l + 1, dtype=torch.int32, device=device)[:, None]
            blocks.append(self._block(data, samples, [Labels(["o3_mu"], mu)]))
        return TensorMap(Labels(["o3_lambda", "o3_sigma"], self.keys.to(device)), blocks)

    def _block(self, data: Tensor, samples: Labels, components: list[Labels]) -> TensorBlock:
        n = data.shape[-1]
        names = torch.arange(n, dtype=torch.int32, device=data.device)[:, None]
        return TensorBlock(data.contiguous(), samples, components, Labels([self.property], names))
