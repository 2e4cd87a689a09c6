"""The workbench of a run: subject, structures, error scales and counters, shared by all checks."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, did_you_mean
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import Element, batched, copied, split
from symmetrize.testing.measuring.scales import Scale, error_scale
from symmetrize.testing.measuring.tolerances import tolerance
from symmetrize.testing.running.profile import Profile
from symmetrize.testing.structures.paths import Path
from symmetrize.testing.structures.sets import YOUR_CRYSTALS, YOURS, StructureSet, cast, mapped
from symmetrize.testing.structures.symmetry_operations import Operation, symmetry_operations
from symmetrize.testing.subjects.subject import Subject

if TYPE_CHECKING:
    from ase import Atoms


class Bench:
    """What checks work with.

    Parameters
    ----------
    subject : Subject
    sets : dict of str to StructureSet
        The first is the main one: error scales come from it.
    profile : Profile
    seed : int
    trajectory : sequence of ase.Atoms, optional
        Frames along which smoothness is checked.
    references : dict of str to Tensor, optional
        Reference values of outputs for the user's structures.
    library : bool
        Whether named geometries and paths may be used.
    """

    def __init__(
        self,
        subject: Subject,
        sets: Mapping[str, StructureSet],
        profile: Profile,
        seed: int = 0,
        trajectory: Sequence[Atoms] | None = None,
        references: Mapping[str, Tensor] | None = None,
        library: bool = True,
    ) -> None:
        if not sets:
            raise DeclarationError("structures: expected at least one that the model can take, got none")
        self.subject, self.sets, self.profile, self.seed = subject, dict(sets), profile, seed
        self.trajectory = list(trajectory) if trajectory else []
        self.references = dict(references or {})
        self.library = library
        #: The user's structures, in the order of the references.
        self.referenced: StructureSet | None = None
        #: Precision that the subject came in, and its constants have.
        self.made_in = subject.dtype
        self._evaluations = 0
        self._independent: bool | None = None
        self._scales: dict[str, Scale] | None = None
        self._own: dict[str, dict[str, Scale]] = {}
        self._double: Bench | None = None
        self._operations: dict[str, list[list[Operation]]] = {}

    def model(self, batch: Data) -> dict[str, Tensor]:
        """The subject's model, counted.

        Where the structures of a batch turn out to influence each other, they are evaluated one by one: that fault
        has a check of its own, and shall not pass for others.
        """
        n = int(batch[keys.PTR].shape[0] - 1)
        self._evaluations += n
        if n == 1 or self.independent:
            return self.subject.model(batch)
        singles = [self.subject.model(single) for single in split(batch)]
        return {name: torch.cat([single[name] for single in singles]) for name in singles[0]}

    @property
    def evaluations(self) -> int:
        """Structures that the model was called on so far, in any precision."""
        return self._evaluations + (0 if self._double is None else self._double.evaluations)

    def count(self, n: int) -> None:
        """Add evaluations that were not made through this bench."""
        self._evaluations += n

    @property
    def independent(self) -> bool:
        """Whether a structure of the main set has, to a millionth, the same outputs alone and in the batch."""
        if self._independent is None:
            self._independent = True
            try:
                self._independent = _independent(self.subject, self.main.batch)
            except Exception:  # whatever it is, it will come up again where it is reported
                pass
        return self._independent

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one check, whatever ran before it."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()) % 1_000_003)

    def __getitem__(self, name: str) -> StructureSet:
        if name not in self.sets:
            raise DeclarationError(f"structures: unknown set {name!r}, {did_you_mean(name, self.sets)}")
        return self.sets[name]

    @property
    def main(self) -> StructureSet:
        """The user's structures where there are any, else the generic ones of the library."""
        for name in (YOURS, YOUR_CRYSTALS, "generic", "periodic"):
            if name in self.sets:
                return self.sets[name]
        return next(iter(self.sets.values()))

    def periodic(self) -> StructureSet | None:
        """Structures that are periodic in three directions, from one set."""
        for name in (YOUR_CRYSTALS, YOURS, "periodic", "crystals"):
            found = self.sets.get(name)
            if found is not None:
                chosen = [k for k, full in enumerate(found.batch[keys.PBC].all(dim=1).tolist()) if full]
                if chosen:
                    return self.part(found, chosen)
        return None

    def part(self, found: StructureSet, chosen: Sequence[int]) -> StructureSet:
        """Some of the structures of a set."""
        singles = split(found.batch)
        return dataclasses.replace(
            found, names=tuple(found.names[k] for k in chosen), batch=batched([singles[k] for k in chosen])
        )

    def limit(self, found: StructureSet) -> float:
        """Largest error on the error scale that is still rounding."""
        if self.subject.tolerance is not None:
            return self.subject.tolerance
        if self.made_in != self.subject.dtype:
            # Converted upwards: the arithmetic is precise, constants of the model may still be rounded.
            return max(tolerance(self.subject.dtype, found.factor), 1e-2 * tolerance(self.made_in, found.factor))
        return tolerance(self.subject.dtype, found.factor)

    @property
    def scales(self) -> dict[str, Scale]:
        """The common error scale of every output: that of the main set (stress: of periodic structures)."""
        if self._scales is None:
            batch = self.main.batch
            self._scales = dict(error_scale(self.model, batch, self.subject.declared(batch)))
            crystals = self.periodic()
            if self.subject.periodic_outputs and crystals is not None:
                rest = {k: v for k, v in self.subject.periodic_outputs.items() if k not in self._scales}
                if rest:
                    self._scales |= error_scale(self.model, crystals.batch, rest)
        return self._scales

    def scale(self, found: StructureSet) -> dict[str, float]:
        """Error scale of every output on a set: the common one, or that of the set where it is larger; its size where
        it is constant, and 1 where it is zero."""
        if found.name not in self._own:
            self._own[found.name] = error_scale(self.model, found.batch, self.subject.declared(found.batch))
        own, common = self._own[found.name], self.scales
        out = {}
        for name in own:
            both = [scale for scale in (own[name], common.get(name)) if scale is not None]
            # A constant output fails its own check, and is compared with itself in the others.
            largest = max(scale.value for scale in both) or max(scale.magnitude for scale in both)
            out[name] = largest if 0.0 < largest < math.inf else 1.0
        return out

    def component_scale(self, found: StructureSet, outputs: Mapping[str, OutputSpec]) -> dict[str, float]:
        """`scale` for outputs some of which are components of others, named ``"output: irrep"``."""
        whole = self.scale(found)
        return {name: whole[name.split(": ")[0]] for name in outputs if name.split(": ")[0] in whole} | {
            name: value for name, value in whole.items() if name.startswith("atomic_")
        }

    def operations(self, found: StructureSet) -> list[list[Operation]]:
        """Symmetry operations of every structure of a set, the identity first."""
        if found.name not in self._operations:
            vectors = dict(self.subject.vectors)
            self._operations[found.name] = [symmetry_operations(s, vectors=vectors) for s in split(found.batch)]
        return self._operations[found.name]

    def own_elements(self, found: StructureSet, limit: int = 2) -> list[Element]:
        """A few symmetry operations of the structures of a set, proper and improper."""
        out: list[Element] = []
        for name, operations in zip(found.names, self.operations(found), strict=True):
            for sign in (1, -1):
                known = [torch.eye(3, dtype=torch.float64), *(e.matrix for e in out)]
                own = [op for op in operations if float(torch.linalg.det(op.matrix)) * sign > 0.0]
                for op in own[: limit + 1]:
                    if not any(torch.allclose(op.matrix, other, atol=1e-9) for other in known):
                        out.append(Element(f"{op.name} of {name}", op.matrix))
        return out

    def double(self) -> Bench:
        """The same in float64 where the subject can be converted: for differences and derivatives."""
        if self.subject.dtype == torch.float64 or self.subject.convert is None:
            return self
        if self._double is None:
            self._double = self.converted(torch.float64)
        return self._double

    def converted(self, dtype: torch.dtype) -> Bench:
        """The same subject and structures in another precision."""
        subject = self.subject.converted(dtype)
        sets = {name: dataclasses.replace(s, batch=cast(s.batch, subject)) for name, s in self.sets.items()}
        bench = Bench(subject, sets, self.profile, self.seed, self.trajectory, self.references, self.library)
        bench.made_in, bench.referenced = self.made_in, self.referenced
        return bench

    def turned(self, path: Path) -> Any:
        """The structures of a path, in the subject's species."""
        return lambda t: mapped(path(t), self.subject)

    def batch_of(self, structures: Sequence[Atoms]) -> Batch:
        """ASE structures, prepared for the subject."""
        return self.subject.prepare(from_ase(list(structures), dtype=self.subject.dtype))


def _independent(subject: Subject, batch: Batch) -> bool:
    together = subject.model(copied(batch))
    for n, single in enumerate(split(batch)[:3]):
        alone = subject.model(copied(single))
        for name in subject.declared(batch):
            rows = together[name].detach()
            if len(rows) == batch[keys.PTR].shape[0] - 1:
                mine = rows[n : n + 1]
            elif len(rows) == batch[keys.POS].shape[0]:
                mine = rows[batch[keys.BATCH] == n]
            else:
                continue
            size = float((rows - rows.mean(dim=0)).abs().max()) or float(rows.abs().max())
            slack = 1e2 * torch.finfo(rows.dtype).eps * float(rows.abs().max())
            if not float((alone[name].detach() - mine).abs().max()) <= 1e-6 * size + slack:
                return False
    return True
