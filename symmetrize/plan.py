"""What an evaluation will take, known before it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.copies import divide
from symmetrize.frames import FrameSet, Stratum


@dataclass(frozen=True)
class Plan:
    """Predicted cost of symmetrising one batch.

    Attributes
    ----------
    group, scope : str
    n_structures, n_atoms, n_owners : int
        Owners are the atoms or structures that have frames of their own.
    n_evaluations : int
        Backbone evaluations, axis copies and mirrors included.
    evaluations_mean, evaluations_max : float, int
        Per owner.
    effective_mean : float
        Mean over owners of (sum w)^2 / sum w^2.
    weight_min : float
        Smallest total weight of any owner before normalization.
    strata : dict of str to int
        Frames of each kind.
    copied_atoms : int
        Atoms in all rotated copies together.
    cost_ratio : float
        Copied atoms per atom of the batch: about the time relative to one bare evaluation for a backbone that does not
        share work between frames.
    n_chunks : int
        Calls of the backbone.
    """

    group: str
    scope: str
    n_structures: int
    n_atoms: int
    n_owners: int
    n_evaluations: int
    evaluations_mean: float
    evaluations_max: int
    effective_mean: float
    weight_min: float
    strata: dict[str, int]
    copied_atoms: int
    cost_ratio: float
    n_chunks: int

    def __str__(self) -> str:
        owner = "atom" if self.scope == "atom" else "structure"
        kinds = {"frame": "full frames", "axis": "about an axis", "point": "lone centers", "auxiliary": "auxiliary"}
        strata = ", ".join(f"{count} {kinds[name]}" for name, count in self.strata.items() if count)
        return "\n".join(
            [
                f"{self.n_structures} structures, {self.n_atoms} atoms; {self.group}, scope {self.scope}",
                f"evaluations   {self.n_evaluations} ({self.evaluations_mean:.2f} per {owner}, "
                f"at most {self.evaluations_max})",
                f"kinds         {strata}; effective {self.effective_mean:.2f} per {owner}",
                f"total weight  at least {self.weight_min:.3f}",
                f"copied atoms  {self.copied_atoms} ({self.cost_ratio:.1f} x the batch) in {self.n_chunks} calls",
            ]
        )


def make_plan(batch: Data, frames: FrameSet, hops: int | None, chunk_size: int, group: str) -> Plan:
    """Collect the numbers of a `Plan`."""
    evaluations = frames.evaluations
    busy = evaluations > 0
    sizes = [n_atoms for _, n_atoms, _ in divide(batch, frames, hops, chunk_size)]
    copied = sum(sizes)
    names = {int(stratum): stratum.name.lower() for stratum in Stratum}
    counts = torch.bincount(frames.stratum, minlength=len(names)).tolist()
    n_atoms = int(batch[keys.POS].shape[0])
    return Plan(
        group=group,
        scope=frames.scope,
        n_structures=int(batch[keys.PTR].shape[0]) - 1,
        n_atoms=n_atoms,
        n_owners=int(busy.sum()),
        n_evaluations=frames.n_evaluations,
        evaluations_mean=float(evaluations[busy].double().mean()),
        evaluations_max=int(evaluations.max()),
        effective_mean=float(frames.effective_number[busy].mean()),
        weight_min=float(frames.total_weight[busy].min()),
        strata={names[number]: int(count) for number, count in enumerate(counts)},
        copied_atoms=copied,
        cost_ratio=copied / n_atoms,
        n_chunks=len(sizes),
    )
