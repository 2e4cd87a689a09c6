"""A symmetrised model as an ASE calculator."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from symmetrize.backbone import Backbone
from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, did_you_mean
from symmetrize.symmetrizer import Symmetrizer, check_energy

_CONSERVATIVE = ("forces", "stress")


class SymmetrizerCalculator(Calculator):
    """ASE calculator of a `Symmetrizer`: energy, energies, conservative forces, stress, and every other output.

    Parameters
    ----------
    model : Symmetrizer
        With energies in eV and lengths in angstrom.
    energy : str
        The output that is the energy.
    forces : str, optional
        An output that is taken for the forces (``"1o"`` per atom, eV/angstrom) in place of the derivative of the
        energy: fewer operations, but energy is then not conserved. The stress stays a derivative.
    spread : bool
        Also offer ``"energy_spread"``, ``"energies_spread"`` and ``"<name>_spread"`` of other outputs: the weighted
        standard deviation over the frames (see `Symmetrizer.forward`), a measure of how far the backbone is from
        symmetric in this structure.
    dtype : torch.dtype, optional
        Compute with a copy of the model in this precision; the model that was given stays as it is. Vibrations,
        phonons and tight relaxations want ``torch.float64``. By default the model's own precision.
    **options
        Passed to ``ase.calculators.calculator.Calculator``.

    Raises
    ------
    InvalidTypeError
        ``model`` is not a Symmetrizer, or ``dtype`` neither float32 nor float64.
    DeclarationError
        ``energy`` or ``forces`` names no output, or one of the wrong kind.

    Notes
    -----
    Outputs besides the energy are properties by their names: ``calc.get_property("quadrupole", atoms)``, summed or
    averaged over atoms as declared, with the rows of the atoms as ``"atomic_<name>"``. An output ``"dipole"`` is what
    ``atoms.get_dipole_moment()`` returns.

    Forces and stress come from one evaluation, whichever is asked for first, and are kept while the structure stays as
    it is. Results follow the structure, not the model: after a change of its parameters call ``reset()``. The model is
    used as it is: put it into evaluation mode if it behaves differently in training.

    ``model.compile()`` compiles the network inside for inference (see `symmetrize.Symmetrizer.compile`); ``dtype=``
    copies the model, and copies are not compiled: compile ``calc.model`` then.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 (ASE's interface)

    def __init__(
        self,
        model: Symmetrizer,
        energy: str = "energy",
        *,
        forces: str | None = None,
        spread: bool = False,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(model, Symmetrizer):
            hint = "the bare model is Symmetrizer(backbone, Identity())"
            if isinstance(getattr(model, "_orig_mod", None), Symmetrizer):
                hint = "use model.compile() of the Symmetrizer instead"
            raise InvalidTypeError(f"model: expected a Symmetrizer, got {type(model).__name__}; {hint}")
        if dtype not in (None, torch.float32, torch.float64):
            raise InvalidTypeError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype!r}")
        check_energy(model.backbone, energy)
        if forces is not None:
            _check_forces(model.backbone, forces)
        self.model = model if dtype is None else copy.deepcopy(model).to(dtype)
        self.energy, self.forces, self.spread = energy, forces, spread
        self.implemented_properties = _properties(model.backbone, energy, spread)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate what is asked for; see ``ase.calculators.calculator.Calculator.calculate``."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        if self.atoms is None:
            raise InvalidInputError("calculate: expected a structure, got none")
        wanted = set(properties or ["energy"]) & set(_CONSERVATIVE)
        if self.forces is not None:
            wanted.discard("forces")
        if wanted and abs(np.linalg.det(self.atoms.cell.array)) > 0.0:
            # The strain is one leaf more of the same graph; ASE asks for forces and stress one after the other.
            wanted.add("stress")
        if wanted and self.forces is None:
            wanted.add("forces")
        backbone = self.model.backbone
        device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        batch = from_ase(self.atoms, dtype=backbone.dtype).to(device)
        with torch.no_grad():
            out = self.model(
                batch,
                forces="forces" in wanted,
                stress="stress" in wanted,
                energy=self.energy,
                spread=self.spread,
                create_graph=False,
            )
        found = self._named(out)
        # A new dictionary: what was handed out before stays as it was. What is known of this structure is kept.
        self.results = found if system_changes else {**self.results, **found}

    def _named(self, out: dict[str, Tensor]) -> dict[str, Any]:
        """Results under ASE's names."""
        total = float(out[self.energy])
        results: dict[str, Any] = {"energy": total, "free_energy": total}
        for name, spec in self.model.backbone.outputs.items():
            single = spec.per == "structure" or spec.reduce is not None
            for suffix in ("", "_spread"):
                # Rows of atoms come along with what is reduced.
                if f"atomic_{name}{suffix}" in out:
                    key = f"energies{suffix}" if name == self.energy else f"atomic_{name}{suffix}"
                    results[key] = _array(out[f"atomic_{name}{suffix}"])
                if f"{name}{suffix}" in out and (suffix or name != self.energy):
                    key = f"energy{suffix}" if name == self.energy else f"{name}{suffix}"
                    values = _array(out[f"{name}{suffix}"])
                    results[key] = _scalar(values[0]) if single else values
        if self.forces is not None:
            results["forces"] = _array(out[self.forces])
        elif "forces" in out:
            results["forces"] = _array(out["forces"])
        if "stress" in out:
            results["stress"] = full_3x3_to_voigt_6_stress(_array(out["stress"])[0])
        return results


def _array(values: Tensor) -> np.ndarray:
    return np.array(values.detach().cpu().double().numpy())


def _scalar(values: np.ndarray) -> Any:
    return float(values) if values.ndim == 0 else values


def _check_forces(backbone: Backbone, name: str) -> None:
    spec = backbone.outputs.get(name)
    if spec is None:
        raise DeclarationError(f"forces: unknown output {name!r}, {did_you_mean(name, backbone.outputs)}")
    if spec.per != "atom" or spec.reduce is not None or (spec.irreps != "1x1o" and spec.cartesian != "i"):
        raise DeclarationError(f"forces: expected an output of vectors per atom ('1o' or cartesian 'i'), got {spec}")


def _properties(backbone: Backbone, energy: str, spread: bool) -> list[str]:
    """Names of everything that a model gives."""
    found = ["energy", "free_energy", *_CONSERVATIVE]
    for name, spec in backbone.outputs.items():
        rows = [] if spec.reduce is None else ["energies" if name == energy else f"atomic_{name}"]
        names = [*rows, "energy" if name == energy else name]
        found += names + [f"{entry}_spread" for entry in names if spread]
    return list(dict.fromkeys(found))
