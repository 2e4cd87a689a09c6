"""Which structures a subject is checked on: sets from the library, and those of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import from_ase, replace, validate
from symmetrize.errors import InvalidInputError, InvalidTypeError
from symmetrize.testing.measuring.elements import batched, split
from symmetrize.testing.measuring.tolerances import EXACT_FACTOR, NEAR_COLLINEAR_FACTOR
from symmetrize.testing.running.profile import Profile
from symmetrize.testing.structures.geometries import GEOMETRIES, with_species
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms

#: What the user's own structures are called.
YOURS = "yours"

#: And those of them that are periodic in three directions, where there are others too.
YOUR_CRYSTALS = "yours, crystals"

#: Sets of the library, in the order in which they claim a geometry: name -> tags, all of which it has to have.
_SETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("crystals", ("periodic", "symmetric")),
    ("periodic", ("periodic",)),
    ("near-collinear", ("near-collinear",)),
    ("isolated", ("isolated",)),
    ("collinear", ("collinear",)),
    ("collinear environments", ("axial",)),
    ("planar", ("planar",)),
    ("symmetric", ("symmetric",)),
    ("equidistant", ("equidistant",)),
    ("generic", ()),
)

#: Geometries that a short profile takes first.
_FIRST = (
    *("ethanol", "chiral center", "random cluster"),
    *("methane", "propyne", "SF6"),
    *("CO2", "H2", "C2H2"),
    *("water", "benzene", "square"),
    *("water at 179.9 degrees", "CO2, 1e-4 off the line", "CO2, 1e-8 off the line"),
    *("triclinic crystal", "rattled silicon", "slab"),
    *("silicon", "fcc Al", "bcc Fe, cubic cell"),
    *("two-hop collinear", "two H2, skew", "N2 and a far atom"),
)


@dataclass(frozen=True)
class StructureSet:
    """Structures that are judged together.

    Attributes
    ----------
    name : str
    names : tuple of str
        Of the structures.
    batch : Batch
        Prepared for the subject.
    factor : float
        Tolerance in units of the machine epsilon.
    """

    name: str
    names: tuple[str, ...]
    batch: Batch
    factor: float = EXACT_FACTOR

    @property
    def n_structures(self) -> int:
        """Number of structures."""
        return len(self.names)

    @property
    def finite(self) -> bool:
        """Whether none is periodic."""
        return not bool(self.batch[keys.PBC].any())


def library_sets(subject: Subject, profile: Profile) -> dict[str, StructureSet]:
    """Named geometries that the subject can take, by kind of degeneracy."""
    members: dict[str, list[str]] = {name: [] for name, _ in _SETS}
    for name, geometry in GEOMETRIES.items():
        kind = next(kind for kind, tags in _SETS if geometry.tags.issuperset(tags))
        if _fits(subject, kind, geometry.tags):
            members[kind].append(name)
    out = {}
    for kind, names in members.items():
        names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        chosen = names[: profile.n_structures]
        if chosen:
            structures = [mapped(GEOMETRIES[name](), subject) for name in chosen]
            factor = NEAR_COLLINEAR_FACTOR if kind == "near-collinear" else EXACT_FACTOR
            out[kind] = structure_set(subject, kind, structures, factor)
    return out


def _fits(subject: Subject, kind: str, tags: frozenset[str]) -> bool:
    if kind in ("isolated", "collinear", "near-collinear", "collinear environments") and not subject.collinear:
        return False
    if "periodic" in tags:
        return subject.periodic and (subject.collinear or "collinear" not in tags)
    return subject.finite


def mapped(atoms: Atoms, subject: Subject) -> Atoms:
    """The structure, of elements that the subject knows."""
    if subject.species is None or set(atoms.numbers.tolist()) <= set(subject.species):
        return atoms
    out = with_species(atoms, subject.species)
    out.info["name"] = atoms.info.get("name", "")
    return out


def structure_set(
    subject: Subject, name: str, structures: Sequence[Atoms], factor: float = EXACT_FACTOR
) -> StructureSet:
    """A set of ASE structures, in the subject's dtype and with the fields that it needs."""
    names = tuple(str(a.info.get("name") or f"{a.get_chemical_formula()} {n}") for n, a in enumerate(structures))
    batch = subject.prepare(from_ase(list(structures), dtype=subject.dtype))
    return StructureSet(name, names, batch, factor)


def users_set(subject: Subject, structures: Atoms | Data | Sequence[Atoms | Data], limit: int | None) -> StructureSet:
    """The user's structures: ASE's ``Atoms``, batches, or a sequence of either; at most ``limit``, evenly spaced.

    Raises
    ------
    InvalidInputError, InvalidTypeError
        Nothing, or something else.
    """
    from ase import Atoms

    if isinstance(structures, Data):
        singles = split(cast(structures, subject))
        chosen = _spread(singles, limit)
        names = tuple(f"structure {k}" for k in _spread(list(range(len(singles))), limit))
        return StructureSet(YOURS, names, subject.prepare(batched(chosen)))
    if isinstance(structures, Atoms):
        structures = [structures]
    listed = list(structures)
    if not listed:
        raise InvalidInputError("structures: expected at least one, got none")
    if all(isinstance(s, Data) for s in listed):
        return users_set(subject, batched([cast(s, subject) for s in listed]), limit)
    for n, s in enumerate(listed):
        if not isinstance(s, Atoms):
            raise InvalidTypeError(f"structures[{n}]: expected ase.Atoms or a torch_geometric Data, got {type(s)}")
    numbered = []
    for n, s in enumerate(listed):
        copy = s.copy()
        copy.info["name"] = str(s.info.get("name") or f"{s.get_chemical_formula()} {n}")
        numbered.append(copy)
    return structure_set(subject, YOURS, _spread(numbered, limit))


def cast(batch: Data, subject: Subject) -> Batch:
    """Floating fields in the subject's dtype."""
    out = validate(batch)
    changed = {
        name: out[name].to(subject.dtype)
        for name in out.keys()
        if isinstance(out[name], torch.Tensor) and out[name].is_floating_point()
    }
    return replace(out, **changed)


def _spread(items: list, limit: int | None) -> list:
    if limit is None or len(items) <= limit:
        return items
    return [items[round(k * (len(items) - 1) / max(limit - 1, 1))] for k in range(limit)]


def by_periodicity(subject: Subject, found: StructureSet) -> dict[str, StructureSet]:
    """The user's structures as they are; or, where the model has outputs of crystals only and the structures are
    mixed, crystals in a set of their own: a batch is judged by outputs that all of its structures have."""
    full = found.batch[keys.PBC].all(dim=1).tolist()
    if not subject.periodic_outputs or all(full) or not any(full):
        return {found.name: found}
    singles = split(found.batch)
    parts = {YOURS: [k for k, f in enumerate(full) if not f], YOUR_CRYSTALS: [k for k, f in enumerate(full) if f]}
    return {
        name: StructureSet(name, tuple(found.names[k] for k in ks), batched([singles[k] for k in ks]), found.factor)
        for name, ks in parts.items()
    }
