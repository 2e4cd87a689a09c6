"""The network as a metatomic model. Needs metatomic-torch."""

# No future annotations: the signatures are read when a model is exported.
from typing import Dict, List, Optional  # noqa: UP035 (as its interface spells them)

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import ModelOutput, System

from benchmarks.peers.network import Network, species_features


class NetworkModule(torch.nn.Module):
    """Energy and direct forces of systems that all have the same number of atoms, or one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        same = len({len(system) for system in systems}) == 1
        energies, vectors = [], []
        for part in [systems] if same else [[system] for system in systems]:
            points = torch.stack([system.positions for system in part])
            species = species_features(torch.stack([system.types for system in part]), points.dtype)
            energy, vector = self.network(points, species)
            energies.append(energy)
            vectors.append(vector.reshape(-1, 3))
        key = Labels(["_"], torch.tensor([[0]]))
        out = {}
        if "energy" in outputs:
            samples = Labels(["system"], torch.arange(len(systems))[:, None])
            properties = Labels(["energy"], torch.tensor([[0]]))
            out["energy"] = TensorMap(key, [TensorBlock(torch.cat(energies)[:, None], samples, [], properties)])
        if "non_conservative_force" in outputs:
            counts = torch.tensor([len(system) for system in systems])
            system = torch.repeat_interleave(torch.arange(len(systems)), counts)
            atom = torch.cat([torch.arange(n) for n in counts.tolist()])
            block = TensorBlock(
                torch.cat(vectors)[:, :, None],
                Labels(["system", "atom"], torch.stack([system, atom], dim=1)),
                [Labels(["xyz"], torch.arange(3)[:, None])],
                Labels(["non_conservative_force"], torch.tensor([[0]])),
            )
            out["non_conservative_force"] = TensorMap(key, [block])
        return out
