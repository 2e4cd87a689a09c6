"""A symmetrised model as an ASE calculator."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from symmetrize.data import from_ase
from symmetrize.errors import InvalidInputError, InvalidTypeError
from symmetrize.symmetrizer import Symmetrizer, check_energy


class SymmetrizerCalculator(Calculator):
    """ASE calculator of a `Symmetrizer`: energy, energies, conservative forces and stress.

    Parameters
    ----------
    model : Symmetrizer
        With energies in eV and lengths in angstrom.
    energy : str
        The output that is the energy.
    **options
        Passed to ``ase.calculators.calculator.Calculator``.

    Notes
    -----
    Structures are converted to the dtype and device of the model's parameters. The model is used as it is: put it into
    evaluation mode if it behaves differently in training.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 (ASE's interface)

    def __init__(self, model: Symmetrizer, energy: str = "energy", **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(model, Symmetrizer):
            raise InvalidTypeError(
                f"model: expected a Symmetrizer, got {type(model).__name__}; the bare model is "
                "Symmetrizer(backbone, Identity())"
            )
        check_energy(model.backbone, energy)
        self.model, self.energy = model, energy

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate what is asked for; see ``ase.calculators.calculator.Calculator.calculate``."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        wanted = set(properties or ["energy"])
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(0).double())
        if self.atoms is None:
            raise InvalidInputError("calculate: expected a structure, got none")
        batch = from_ase(self.atoms, dtype=parameter.dtype).to(parameter.device)
        with torch.no_grad():
            out = self.model(
                batch, forces="forces" in wanted, stress="stress" in wanted, energy=self.energy, create_graph=False
            )
        total = float(out[self.energy].detach())
        self.results = {"energy": total, "free_energy": total}
        if f"atomic_{self.energy}" in out:
            self.results["energies"] = out[f"atomic_{self.energy}"].detach().cpu().double().numpy()
        if "forces" in wanted:
            self.results["forces"] = out["forces"].detach().cpu().double().numpy()
        if "stress" in wanted:
            self.results["stress"] = full_3x3_to_voigt_6_stress(out["stress"][0].detach().cpu().double().numpy())
