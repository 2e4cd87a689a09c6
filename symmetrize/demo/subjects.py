"""What the demo measures: backbones with their scope, and each of them bare and symmetrised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.identity import Identity
from symmetrize.registry import load_backbone
from symmetrize.study.measures.common import Interaction
from symmetrize.symmetrizer import Symmetrizer

BARE, ROTATIONS, ALL = "bare", "SO(3)", "O(3)"

#: What is done to each backbone, in the order of the table.
TREATMENTS = (BARE, ROTATIONS, ALL)

#: Shipped models of the demo: label, name of the weights, scope.
SHIPPED = (("PET, 1 block", "ethanol", "atom"), ("PET, 2 blocks", "ethanol-2block", "structure"))

#: Atoms per call of the backbone: memory stays near 1 GB, and larger chunks are hardly faster on a CPU.
CHUNK_SIZE = 1024


@dataclass(frozen=True)
class Subject:
    """A backbone to be measured.

    Attributes
    ----------
    label : str
        Name in tables and figures.
    backbone : Backbone
        With an output ``energy`` in eV.
    scope : {"atom", "structure"}
    """

    label: str
    backbone: Backbone
    scope: str

    def __post_init__(self) -> None:
        if "energy" not in self.backbone.outputs:
            raise DeclarationError(f"{self.label}: expected an output 'energy', got {sorted(self.backbone.outputs)}")

    def model(self, treatment: str, *, baseline: bool = True) -> Symmetrizer:
        """The backbone bare, or symmetrised with `ECSE` in a group.

        Parameters
        ----------
        treatment : str
            One of `TREATMENTS`.
        baseline : bool
            Without it, the constant composition energy is left out, which no orientation can change and which would
            cost differences of energies their last digits.
        """
        backbone = self.backbone if baseline else Interaction(self.backbone)
        if treatment == BARE:
            return Symmetrizer(backbone, Identity(), scope=self.scope, chunk_size=CHUNK_SIZE)
        return Symmetrizer(backbone, ECSE(), group=treatment, scope=self.scope, chunk_size=CHUNK_SIZE)


def shipped_subjects(dtype: torch.dtype) -> list[Subject]:
    """The trained models that come with the package."""
    return [
        Subject(label, load_backbone("pet", name, dtype=dtype).requires_grad_(False), scope)
        for label, name, scope in SHIPPED
    ]
