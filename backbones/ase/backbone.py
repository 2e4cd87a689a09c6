"""`ASEBackbone`: one calculation for each copy of a structure, and an energy that is differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes, all_properties
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.errors import (
    BackboneOutputError,
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    did_you_mean,
)
from symmetrize.representations import OutputSpec

from .gradient import with_gradient

#: Properties of ASE as outputs: the name here, and how it transforms. Direct forces and stress are named apart from
#: those that a `Symmetrizer` derives from the energy.
DIRECT: dict[str, tuple[str, OutputSpec]] = {
    "energies": ("energies", OutputSpec("0e", per="atom", unit="eV")),
    "forces": ("non_conservative_forces", OutputSpec("1o", per="atom", unit="eV/A")),
    "stress": ("non_conservative_stress", OutputSpec(cartesian="ij=ji", per="structure", unit="eV/A^3")),
    "dipole": ("dipole", OutputSpec("1o", per="structure", unit="e A")),
    "charges": ("charges", OutputSpec("0e", per="atom", unit="e")),
    # Spins quantised along an axis of their own (no spin-orbit coupling): numbers, not vectors.
    "magmom": ("magmom", OutputSpec("0e", per="structure", unit="mu_B")),
    "magmoms": ("magmoms", OutputSpec("0e", per="atom", unit="mu_B")),
}

#: Optional fields of a batch that reach the calculator, and what they are called there: one number per atom.
_INITIAL = {keys.INITIAL_CHARGES: "charges", keys.INITIAL_MAGMOMS: "magmoms"}


class ASEBackbone(Backbone):
    r"""An ASE calculator, evaluated for one structure at a time, in structure scope.

    Nothing differentiates through a calculator, but what it returns are derivatives: :math:`\partial E/\partial r_i =
    -f_i`, and with the stress :math:`\sigma` of a periodic structure of volume :math:`V`

    .. math:: V \sigma = \sum_i r_i \otimes \frac{\partial E}{\partial r_i}
              + \sum_a c_a \otimes \frac{\partial E}{\partial c_a},

    which determines the derivative with respect to the lattice vectors :math:`c_a`. ``energy`` is differentiable with
    these, once, so that the forces and the stress of a `Symmetrizer` are the exact gradient of the averaged energy:
    frames and weights depend on the positions too, and directly averaged forces would not be.

    Parameters
    ----------
    calculator : ase calculator, or callable
        A callable without arguments makes a new calculator for every evaluation: for those that cannot be used again
        for other structures, or that remember.
    properties : iterable of str, optional
        Properties of ASE to return: "energy" (by default this alone), and as they come, without a gradient, "forces"
        (as ``non_conservative_forces``), "stress" (as ``non_conservative_stress``), "dipole", "charges", "magmoms",
        "magmom" (both along one axis), "energies".
    energy : {"energy", "free_energy"}
        What the output ``energy`` is: the one that the forces of the calculator derive from. With smeared occupations
        that is the free energy.

    Raises
    ------
    DeclarationError
        An unknown property, or one that the calculator does not implement.

    Notes
    -----
    Calculators compute in float64 on the CPU, so float64 positions lose nothing. Numbers of atoms, cells and
    periodicity are passed on, and the per-atom fields ``initial_charges`` and ``initial_magmoms`` where the batch has
    them. A calculation costs as much as any other: only what is needed is asked for, forces only for gradients and
    stress only for gradients with respect to the cell. (A ``MetatomicCalculator`` does more of its own accord unless it
    is made with ``do_gradients_with_energy=False``, and divides by the volume that a molecule does not have.)

    The six components of a stress leave out how the energy of a periodic structure changes as the whole is turned,
    which only frames that move with the atoms of a crystal would need; averages over fixed orientations do not.
    """

    adapter = "ase"

    def __init__(
        self,
        calculator: BaseCalculator | Callable[[], BaseCalculator],
        *,
        properties: Iterable[str] | None = None,
        energy: str = "energy",
    ) -> None:
        if isinstance(properties, str):
            raise InvalidTypeError(f"properties: expected several names, got the string {properties!r}")
        wanted = ("energy",) if properties is None else tuple(dict.fromkeys(properties))
        if energy not in ("energy", "free_energy"):
            raise DeclarationError(f"energy: expected 'energy' or 'free_energy', got {energy!r}")
        outputs = {}
        for name in wanted:
            if name != "energy" and name not in DIRECT:
                raise DeclarationError(
                    f"properties: unknown property {name!r}, {did_you_mean(str(name), ['energy', *DIRECT])}"
                )
            spec = OutputSpec("0e", per="structure", unit="eV")
            key, spec = ("energy", spec) if name == "energy" else DIRECT[name]
            outputs[key] = spec
        super().__init__(outputs=outputs, cutoff=None, receptive_field=None)
        self.calculator = calculator
        self.energy = energy
        self.properties = wanted
        known = self._calculator().implemented_properties
        for name in (energy if name == "energy" else name for name in wanted):
            if name not in known:
                raise DeclarationError(
                    f"properties: {self._name()} does not implement {name!r}, {did_you_mean(name, known)}"
                )
        # There is nothing to train: forces keep no graph unless the positions ask for one.
        self.eval()

    def forward(self, batch: Data) -> dict[str, Tensor]:
        """The declared outputs in float64, in the orientation given."""
        pos, cell = batch[keys.POS], batch[keys.CELL]
        periodic = batch[keys.PBC].any(dim=1)
        recording = torch.is_grad_enabled() and "energy" in self.outputs
        forces = recording and (pos.requires_grad or cell.requires_grad)
        stress = recording and cell.requires_grad and bool(periodic.any())
        if stress:
            _refuse_flat_cells(batch)
        ptr = batch[keys.PTR].tolist()
        results = [
            self._calculate(batch, structure, slice(*ptr[structure : structure + 2]), forces, stress)
            for structure in range(len(ptr) - 1)
        ]
        out: dict[str, Tensor] = {}
        for name, (key, spec) in DIRECT.items():
            if name in self.properties:
                rows = [result[name] for result in results]
                values = torch.stack(rows) if spec.per == "structure" else torch.cat(rows)
                mask = batch.get(keys.CENTER_MASK) if spec.per == "atom" else None
                values = values.to(pos.device)
                out[key] = values if mask is None else values[mask]
        if "energy" in self.outputs:
            energy = torch.stack([result[self.energy] for result in results]).to(pos.device)
            if forces:
                slopes = -torch.cat([result["forces"] for result in results]).to(pos.device)
                lattice = self._lattice_slopes(batch, results, slopes) if stress else torch.zeros_like(cell)
                energy = with_gradient(energy, pos, cell, slopes, lattice, batch[keys.BATCH])
            out["energy"] = energy
        return out

    def describe(self) -> dict[str, Any]:
        """Refused: a calculator is a program, which no description here can make again.

        Raises
        ------
        DeclarationError
            Always.
        """
        raise DeclarationError(
            f"ase: {self._name()} cannot be rebuilt from a description; make the calculator yourself when the model is "
            "loaded: symmetrize.load(folder, backbone=ASEBackbone(calculator))"
        )

    def extra_repr(self) -> str:
        return f"calculator={self._name()}, {super().extra_repr()}"

    def _name(self) -> str:
        made = isinstance(self.calculator, BaseCalculator)
        return type(self.calculator).__name__ if made else getattr(self.calculator, "__name__", "calculator")

    def _calculator(self) -> BaseCalculator:
        if isinstance(self.calculator, BaseCalculator):
            return self.calculator
        if not callable(self.calculator):
            raise InvalidTypeError(
                "calculator: expected an ASE calculator or a function that makes one, got "
                f"{type(self.calculator).__name__}"
            )
        made = self.calculator()
        if not isinstance(made, BaseCalculator):
            raise InvalidTypeError(f"calculator: expected a function that makes a calculator, got {type(made)} from it")
        return made

    def _calculate(self, batch: Data, structure: int, rows: slice, forces: bool, stress: bool) -> dict[str, Tensor]:
        """Results of one structure as float64 tensors."""
        atoms = self._atoms(batch, structure, rows)
        asked = {self.energy if name == "energy" else name for name in self.properties}
        asked |= {"forces"} if forces else set()
        asked |= {"stress"} if stress and bool(atoms.pbc.any()) else set()
        calculator = self._calculator()
        if isinstance(calculator, Calculator):
            # What is left of other structures is neither a result nor a starting point.
            calculator.reset()
        label = f"{self._name()}: structure {structure} of the batch ({atoms.get_chemical_formula()})"
        try:
            # Calculators may differentiate with torch themselves, whatever is recorded here.
            with torch.inference_mode(False), torch.enable_grad():
                calculator.calculate(atoms, [name for name in all_properties if name in asked], list(all_changes))
        except Exception as error:
            raise BackboneOutputError(
                f"{label}: the calculation of {', '.join(sorted(asked))} failed: {type(error).__name__}: {error}"
            ) from error
        found = calculator.results
        shapes = {name: (len(atoms), *s.shape) if s.per == "atom" else s.shape for name, (_, s) in DIRECT.items()}
        results = {}
        for name in sorted(asked):
            if found.get(name) is None:
                hint = "; a stress needs periodicity" if name == "stress" and not atoms.pbc.any() else ""
                raise BackboneOutputError(
                    f"{label}: expected {name!r}, got {', '.join(sorted(found)) or 'nothing'}{hint}"
                )
            value = torch.tensor(found[name], dtype=torch.float64)
            if name == "stress" and value.shape == (6,):  # xx, yy, zz, yz, xz, xy
                value = value[torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]])]
            shape = shapes.get(name, ())
            if tuple(value.shape) != shape:
                raise BackboneOutputError(f"{label}: {name}: expected shape {shape}, got {tuple(value.shape)}")
            results[name] = value
        if forces:
            _refuse_other_energy(label, self.energy, found)
        return results

    def _atoms(self, batch: Data, structure: int, rows: slice) -> Atoms:
        z = batch.get(keys.Z)
        if z is None:
            raise InvalidInputError("batch: expected a field 'z' with atomic numbers, got none")

        def numbers(values: Tensor) -> Any:
            return values.detach().to("cpu", torch.float64).numpy().copy()

        n_atoms = z.shape[0]
        initial = {}
        for field, name in _INITIAL.items():
            value = batch.get(field)
            if value is None:
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != (n_atoms,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidInputError(f"{field}: expected one number per atom, ({n_atoms},), got {got}")
            initial[name] = numbers(value[rows])
        return Atoms(
            numbers=z[rows].detach().cpu().numpy(),
            positions=numbers(batch[keys.POS][rows]),
            cell=numbers(batch[keys.CELL][structure]),
            pbc=batch[keys.PBC][structure].cpu().numpy(),
            **initial,
        )

    def _lattice_slopes(self, batch: Data, results: list[dict[str, Tensor]], slopes: Tensor) -> Tensor:
        """Derivatives with respect to the lattice vectors, float64: Tensor of shape (n_structures, 3, 3)."""
        cell, pos = batch[keys.CELL].detach().to(torch.float64), batch[keys.POS].detach().to(torch.float64)
        out = torch.zeros_like(cell)
        ptr = batch[keys.PTR].tolist()
        for structure, result in enumerate(results):
            if "stress" not in result:
                continue  # nothing finite depends on its box
            volume = torch.linalg.det(cell[structure]).abs()
            rows = slice(*ptr[structure : structure + 2])
            virial = volume * result["stress"].to(cell.device) - pos[rows].T @ slopes[rows]
            out[structure] = torch.linalg.solve(cell[structure].T, virial)
        return out


def _refuse_flat_cells(batch: Data) -> None:
    volume = torch.linalg.det(batch[keys.CELL].detach().to(torch.float64)).abs()
    flat = (batch[keys.PBC].any(dim=1) & ~(volume > 0.0)).nonzero()
    if len(flat):
        structure = int(flat[0])
        raise InvalidInputError(
            f"stress: structure {structure} is periodic along {batch[keys.PBC][structure].tolist()}: expected three "
            "independent lattice vectors, got a cell without a volume"
        )


def _refuse_other_energy(label: str, energy: str, found: dict[str, Any]) -> None:
    """Where both energies are there and differ, forces are derivatives of the free energy: ASE's convention."""
    free, bound = found.get("free_energy"), found.get("energy")
    if energy == "free_energy" or free is None or bound is None:
        return
    if abs(float(free) - float(bound)) > 1e-9 * max(1.0, abs(float(free))):
        raise BackboneOutputError(
            f"{label}: forces derive from the free energy, {float(free)} eV, which differs from the energy, "
            f"{float(bound)} eV; use ASEBackbone(..., energy='free_energy')"
        )
