"""An evaluation as plain values, which any process can carry out part of."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms

from symmetrize import __version__
from symmetrize.data import from_ase
from symmetrize.errors import BackboneOutputError, InvalidInputError, InvalidTypeError, NoFrameError
from symmetrize.evaluate.parts import Part, Prediction
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.identity import Identity
from symmetrize.registry import load_backbone
from symmetrize.storage import is_saved_model, load
from symmetrize.symmetrizer import Symmetrizer, check_energy

# What one structure of a batch can be guilty of.
_OF_A_STRUCTURE = (InvalidInputError, InvalidTypeError, BackboneOutputError, NoFrameError)


@dataclass(frozen=True)
class Job:
    """Structures, a model by name, and what is wanted of it.

    Attributes
    ----------
    frames : list of ase.Atoms
        All structures of the file.
    keys : list of str
        What the predictions of each are filed under.
    backbone : str
        ``"name"``, ``"name:argument"`` or the folder of a saved model.
    group, scope : str, optional
    forces, stress, spread : bool
    dtype : {"float64", "float32"}
    """

    frames: list[Atoms]
    keys: list[str]
    backbone: str
    group: str | None
    scope: str | None
    forces: bool
    stress: bool
    spread: bool
    dtype: str

    def build(self) -> Symmetrizer:
        """The model, on the CPU."""
        model = _model(self.backbone, self.group, self.scope).to(getattr(torch, self.dtype)).eval()
        check_energy(model.backbone, "energy")
        return model

    def batch(self, members: Sequence[int]) -> Any:
        """Some of the structures as a batch, on the CPU."""
        return from_ase([self.frames[n] for n in members], dtype=getattr(torch, self.dtype))

    def predict(self, model: Symmetrizer, members: Sequence[int], device: torch.device) -> Part:
        """Evaluate a batch.

        Raises
        ------
        SymmetrizeError
            Naming the structure by its number in the file, wherever one alone is to blame.
        """
        try:
            return self._predict(model, members, device)
        except _OF_A_STRUCTURE as error:
            for n in members:
                try:
                    self._predict(model, [n], device)
                except _OF_A_STRUCTURE as alone:
                    # It calls the only structure that it knows number 0.
                    message, renamed = re.subn(r"\bstructure 0\b", f"structure {n}", str(alone))
                    raise type(alone)(message if renamed else f"structure {n}: {message}") from error
            raise type(error)(f"structures {members[0]} to {members[-1]} together: {error}") from error

    def describe(self, model: Symmetrizer) -> dict[str, Any]:
        """Everything that the numbers depend on, the structures aside; JSON-serialisable."""
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return {
            "version": __version__,
            "backbone": self.backbone,
            "method": type(model.method).__name__,
            "group": model.group,
            "scope": model.scope,
            "forces": self.forces,
            "stress": self.stress,
            "spread": self.spread,
            "dtype": self.dtype,
            "weights": digest.hexdigest(),
        }

    def _predict(self, model: Symmetrizer, members: Sequence[int], device: torch.device) -> Part:
        batch = self.batch(members).to(device)
        began = time.perf_counter()
        with torch.no_grad():
            out = model(batch, forces=self.forces, stress=self.stress, spread=self.spread, create_graph=False)
        wanted = ("energy", "forces", "stress", "energy_spread")
        # Copying them waits for the device, so that its time is counted.
        values = {name: out[name].detach().cpu().double().numpy() for name in wanted if name in out}
        seconds = time.perf_counter() - began
        ends = batch.ptr.tolist()
        found = {
            self.keys[member]: Prediction(
                energy=float(values["energy"][n]),
                forces=values["forces"][ends[n] : ends[n + 1]] if self.forces else None,
                stress=values["stress"][n] if self.stress else None,
                energy_spread=float(values["energy_spread"][n]) if self.spread else None,
            )
            for n, member in enumerate(members)
        }
        return Part(found, seconds)


def _model(name: str, group: str | None, scope: str | None) -> Symmetrizer:
    if is_saved_model(name):
        saved = load(name)
        method = Identity() if group == "none" else saved.method
        chosen = saved.group if group in (None, "none") else str(group)
        return Symmetrizer(saved.backbone, method, chosen, scope or saved.scope, saved.chunk_size)
    backbone, _, argument = name.partition(":")
    net = load_backbone(backbone, *([argument] if argument else [])).eval()
    method = Identity() if group == "none" else ECSE()
    return Symmetrizer(net, method, "O(3)" if group in (None, "none") else str(group), scope)
