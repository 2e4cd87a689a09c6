"""ASE calculators as subjects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import validate
from symmetrize.errors import BackboneOutputError, DeclarationError, InvalidTypeError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.testing.structures.geometries import GEOMETRIES, with_species
from symmetrize.testing.subjects.subject import CLAIMS, Subject

if TYPE_CHECKING:
    from ase import Atoms

#: Properties of ASE that are looked for, in its units. A total energy is extensive.
PROPERTIES: dict[str, OutputSpec] = {
    "energy": OutputSpec("0e", reduce="sum", unit="eV"),
    "forces": OutputSpec("1o", unit="eV/A"),
    "energies": OutputSpec("0e", unit="eV"),
    "dipole": OutputSpec("1o", per="structure", unit="e A"),
    "charges": OutputSpec("0e", unit="e"),
}

#: Those that need periodicity in three directions.
PERIODIC_PROPERTIES: dict[str, OutputSpec] = {
    "stress": OutputSpec(cartesian="ij=ji", per="structure", unit="eV/A^3"),
}

#: Those that exist and whose behavior is known, but which are left out unless asked for.
_ON_REQUEST: dict[str, OutputSpec] = {
    "free_energy": OutputSpec("0e", reduce="sum", unit="eV"),
    "magmom": OutputSpec("0e", per="structure", unit="mu_B"),
    "magmoms": OutputSpec("0e", unit="mu_B"),
}


def of_calculator(
    calc: Any,
    structures: Atoms | Data | Iterable[Atoms] | None = None,
    *,
    outputs: Iterable[str] | Mapping[str, OutputSpec] | None = None,
    **options: Any,
) -> Subject:
    """An ASE calculator as a subject.

    Every structure is evaluated on a new ``Atoms`` after ``calc.reset()``, so that results kept from before can neither
    speed up nor hide anything. A calculator that changes the positions, species, cell or periodicity of the ``Atoms``
    that it is given changes the batch, where the check of side effects finds it.

    Parameters
    ----------
    calc : ase calculator, or callable
        Anything with ``get_property(name, atoms)``, or a function (or class) that returns one: it is then called once
        per batch.
    structures : Atoms, Data, or iterable of Atoms, optional
        Such as it is made for: its elements, and whether it is used with and without periodicity, are taken from them,
        and properties that it lists but does not have are found by trying the first one. Without them, structures
        of the library are tried.
    outputs : iterable of str, or dict of str to OutputSpec, optional
        Names of properties, or their declarations; by default those of `PROPERTIES` and `PERIODIC_PROPERTIES` that are
        there. What is asked for has to be there.
    **options
        Attributes of `Subject`, instead of those found: ``dtype=torch.float32`` for a calculator whose arithmetic is
        single precision, ``species``, ``periodic``, ``finite``, ``reach``, ``claims``.

    Returns
    -------
    Subject
        Energies in eV, lengths in angstrom, stress as a matrix in eV/A^3.

    Raises
    ------
    InvalidTypeError
        Not a calculator.
    DeclarationError
        Unknown property, or none.
    Exception
        What the calculator raises, as it is.
    """
    make = _factory(calc)
    sample = _listed(structures)
    first = make()
    found: dict[str, Any] = dict(
        name=type(first).__name__,
        kind="calculator",
        # What an atom sees of its surroundings is not declared by a calculator.
        claims=frozenset(CLAIMS) - {"locality"},
        smooth=1,
        species=_species_of(sample) if sample else _known_species(first),
        periodic=any(bool(atoms.pbc.any()) for atoms in sample) if sample else True,
        finite=any(not atoms.pbc.any() for atoms in sample) if sample else True,
        dtype=torch.float64,
    )
    settings = {**found, **options}
    wanted = _declarations(first, outputs)
    probes = _probes(sample, settings)
    names = _present(make, wanted, probes, required=outputs is not None)
    plain = {name: spec for name, spec in names.items() if name not in PERIODIC_PROPERTIES}
    full = {name: spec for name, spec in names.items() if name in PERIODIC_PROPERTIES}
    if not names:
        raise DeclarationError(
            f"{settings['name']}: expected at least one of {', '.join(wanted or PROPERTIES)}, got none of them"
        )
    evaluated = {
        "outputs": plain,
        "periodic_outputs": full,
        "energy": "energy" if {"energy", "forces"} <= set(plain) else None,
        "model": CalculatorModel(make, plain, full),
    }
    return Subject(**{**settings, **evaluated, **options})


class CalculatorModel:
    """A calculator as a function of batches.

    Parameters
    ----------
    make : callable
        Returns the calculator.
    outputs, periodic_outputs : dict of str to OutputSpec
        Properties; the latter where all structures are periodic in three directions.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        outputs: Mapping[str, OutputSpec],
        periodic_outputs: Mapping[str, OutputSpec] | None = None,
    ) -> None:
        self.make, self.outputs, self.periodic_outputs = make, dict(outputs), dict(periodic_outputs or {})

    def __call__(self, batch: Data) -> dict[str, Tensor]:
        full = validate(batch)
        wanted = {**self.outputs, **self.periodic_outputs} if bool(full[keys.PBC].all()) else self.outputs
        calc = self.make()
        rows: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        mask = full.get(keys.CENTER_MASK)
        for s, atoms in enumerate(structures_of(full)):
            first, last = full[keys.PTR][s : s + 2].tolist()
            before = atoms.copy()
            results = evaluate_calculator(calc, atoms, wanted)
            for name, spec in wanted.items():
                value = results[name]
                if mask is not None and spec.per == "atom" and spec.reduce is None:
                    value = value[mask[first:last].cpu().numpy()]
                rows[name].append(value)
            _write_changes(batch, s, (first, last), before, atoms)
        device = full[keys.POS].device
        return {
            name: torch.as_tensor(np.concatenate(listed), dtype=torch.float64, device=device)
            for name, listed in rows.items()
        }


def structures_of(batch: Data) -> list[Atoms]:
    """A validated batch as ASE structures; atoms without a species are ``X``."""
    from ase import Atoms

    pos = batch[keys.POS].detach().to("cpu", torch.float64).numpy()
    cell = batch[keys.CELL].detach().to("cpu", torch.float64).numpy()
    species = batch.get(keys.Z)
    numbers = np.zeros(len(pos), dtype=int) if species is None else species.cpu().numpy()
    ptr, pbc = batch[keys.PTR].tolist(), batch[keys.PBC].cpu().numpy()
    return [
        Atoms(numbers=numbers[a:b].copy(), positions=pos[a:b].copy(), cell=cell[s].copy(), pbc=pbc[s].copy())
        for s, (a, b) in enumerate(pairwise(ptr))
    ]


def evaluate_calculator(calc: Any, atoms: Atoms, outputs: Mapping[str, OutputSpec]) -> dict[str, np.ndarray]:
    """Properties of one structure, with one row per structure or atom, whatever was calculated before."""
    if callable(getattr(calc, "reset", None)):
        calc.reset()
    n_atoms = len(atoms)
    out = {}
    for name, spec in outputs.items():
        value = calc.get_property(name, atoms)
        if value is None:
            raise _not_implemented()(f"{name}: the calculator returned None")
        array = np.array(value, dtype=np.float64)
        if name in PERIODIC_PROPERTIES and array.shape == (6,):
            xx, yy, zz, yz, xz, xy = array
            array = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        shape = (n_atoms if spec.per == "atom" and spec.reduce is None else 1, *spec.shape)
        if array.size != int(np.prod(shape)):
            raise BackboneOutputError(f"{name}: expected shape {shape} ({spec}), got {array.shape}")
        out[name] = array.reshape(shape)
    return out


def _write_changes(batch: Data, structure: int, atoms_range: tuple[int, int], before: Atoms, after: Atoms) -> None:
    """What the calculator did to its structure, done to the batch."""
    first, last = atoms_range
    if len(after) != len(before):
        raise BackboneOutputError(f"model: expected {len(before)} atoms to stay, the calculator left {len(after)}")
    with torch.no_grad():
        for name, new, old, rows in (
            (keys.POS, after.positions, before.positions, slice(first, last)),
            (keys.Z, after.numbers, before.numbers, slice(first, last)),
            (keys.CELL, after.cell.array, before.cell.array, structure),
            (keys.PBC, after.pbc, before.pbc, structure),
        ):
            # A NaN is a change.
            if batch.get(name) is not None and not np.array_equal(new, old):
                batch[name][rows] = torch.as_tensor(np.array(new)).to(batch[name])


def _factory(calc: Any) -> Callable[[], Any]:
    if not isinstance(calc, type) and callable(getattr(calc, "get_property", None)):
        return lambda: calc
    if not callable(calc):
        raise InvalidTypeError(
            f"calc: expected an ASE calculator (with get_property) or a function that returns one, "
            f"got {type(calc).__name__}"
        )

    def make() -> Any:
        made = calc()
        if not callable(getattr(made, "get_property", None)):
            raise InvalidTypeError(f"calc(): expected an ASE calculator, got {type(made).__name__}")
        return made

    return make


def _listed(structures: Atoms | Data | Iterable[Atoms] | None) -> list[Atoms]:
    from ase import Atoms

    if structures is None:
        return []
    if isinstance(structures, Data):
        return structures_of(validate(structures))
    items = [structures] if isinstance(structures, Atoms) else list(structures)
    out: list[Atoms] = []
    for n, item in enumerate(items):
        if isinstance(item, Data):
            out += structures_of(validate(item))
        elif isinstance(item, Atoms):
            out.append(item)
        else:
            raise InvalidTypeError(f"structures[{n}]: expected ase.Atoms or a Data, got {type(item).__name__}")
    return out


def _species_of(structures: Sequence[Atoms]) -> tuple[int, ...]:
    """In order of first appearance, which is how geometries of the library are mapped to them."""
    return tuple(dict.fromkeys(int(z) for atoms in structures for z in atoms.numbers))


def _known_species(calc: Any) -> tuple[int, ...] | None:
    from ase.data import atomic_numbers

    if type(calc).__module__ == "ase.calculators.emt":
        from ase.calculators.emt import parameters

        return tuple(sorted(atomic_numbers[symbol] for symbol in parameters))
    return None


def _declarations(calc: Any, outputs: Iterable[str] | Mapping[str, OutputSpec] | None) -> dict[str, OutputSpec]:
    known = {**PROPERTIES, **PERIODIC_PROPERTIES}
    if outputs is None:
        listed = getattr(calc, "implemented_properties", None)
        return {name: spec for name, spec in known.items() if listed is None or name in listed}
    if isinstance(outputs, Mapping):
        return dict(cast("Mapping[str, OutputSpec]", outputs))
    if isinstance(outputs, str):
        outputs = [outputs]
    every = {**known, **_ON_REQUEST}
    for name in outputs:
        if name not in every:
            raise DeclarationError(
                f"outputs: unknown property {name!r}, {did_you_mean(name, every)} "
                "(a dict declares how any other one transforms)"
            )
    return {name: every[name] for name in outputs}


def _probes(sample: Sequence[Atoms], settings: Mapping[str, Any]) -> dict[bool, Atoms | None]:
    """A structure to try, and one that is periodic in three directions."""
    if sample:
        return {False: sample[0], True: next((atoms for atoms in sample if atoms.pbc.all()), None)}
    out: dict[bool, Atoms | None] = {}
    for periodic, allowed, name in ((False, "finite", "random cluster"), (True, "periodic", "triclinic crystal")):
        atoms, species = GEOMETRIES[name](), settings["species"]
        known = species is None or set(atoms.numbers.tolist()) <= set(species)
        out[periodic] = (atoms if known else with_species(atoms, species)) if settings[allowed] else None
    return out


def _present(
    make: Callable[[], Any], wanted: Mapping[str, OutputSpec], probes: Mapping[bool, Atoms | None], required: bool
) -> dict[str, OutputSpec]:
    """Properties that the calculator has on the structures that are there to be tried."""
    calc = make()
    out = {}
    for name, spec in wanted.items():
        periodic = name in PERIODIC_PROPERTIES
        probe = probes[periodic] if periodic else probes[False] or probes[True]
        if probe is None:
            continue
        try:
            evaluate_calculator(calc, probe.copy(), {name: spec})
        except _not_implemented():
            if required:
                raise
        else:
            out[name] = spec
    return out


def _not_implemented() -> type[Exception]:
    from ase.calculators.calculator import PropertyNotImplementedError

    return PropertyNotImplementedError


__all__ = ["PERIODIC_PROPERTIES", "PROPERTIES", "CalculatorModel", "of_calculator", "structures_of"]
