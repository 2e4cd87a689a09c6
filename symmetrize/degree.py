"""The lowest degree of group averaging that makes a network as equivariant as wanted, found by measuring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, SymmetrizeError, did_you_mean
from symmetrize.methods.group_averaging import GroupAveraging
from symmetrize.ops.quadrature import PRODUCT_RULES
from symmetrize.ops.rotations import random_rotations
from symmetrize.symmetrizer import Symmetrizer
from symmetrize.testing import of_symmetrizer
from symmetrize.testing.measuring.orbits import changes_over, structure_mean, where_finite
from symmetrize.testing.measuring.scales import evaluate, resolve_scale

if TYPE_CHECKING:
    from ase import Atoms

    from symmetrize.representations import OutputSpec
    from symmetrize.testing.measuring.measures import Scales
    from symmetrize.testing.subjects.subject import Subject


@dataclass(frozen=True)
class DegreePoint:
    """What one degree gives.

    Attributes
    ----------
    degree : int
    evaluations : int
        Of the backbone, for every structure or atom.
    deviations : dict of str to float
        Standard deviation of every output over orientations, on its error scale; conservative ``"forces"`` included.
    """

    degree: int
    evaluations: int
    deviations: Mapping[str, float]


@dataclass(frozen=True)
class DegreeSearch:
    """What `find_degree` found.

    Attributes
    ----------
    model : Symmetrizer
        The backbone, averaged to the lowest degree that is good enough.
    targets : dict of str to float
        Largest standard deviation that was wanted, of every output that was judged.
    points : tuple of DegreePoint
        All degrees that were tried, ascending; the last one is that of ``model``.
    """

    model: Symmetrizer
    targets: Mapping[str, float]
    points: tuple[DegreePoint, ...]

    @property
    def method(self) -> GroupAveraging:
        """The method of ``model``."""
        method = self.model.method
        if not isinstance(method, GroupAveraging):
            raise InvalidTypeError(f"method: expected GroupAveraging, got {type(method).__name__}")
        return method

    @property
    def degree(self) -> int:
        """The degree that was found."""
        return self.points[-1].degree

    def __str__(self) -> str:
        return _table(self.points)


class DegreeNotFoundError(SymmetrizeError, RuntimeError):
    """No degree up to the highest one allowed reaches the target.

    Attributes
    ----------
    points : tuple of DegreePoint
        All that were tried.
    """

    def __init__(self, message: str, points: tuple[DegreePoint, ...]) -> None:
        super().__init__(message)
        self.points = points

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.points)


def find_degree(
    backbone: Backbone,
    structures: Data | Sequence[Atoms],
    target: float | Mapping[str, float],
    *,
    group: str = "O(3)",
    rule: str = "lebedev",
    start: int = 1,
    maximum: int = 15,
    step: int = 1,
    scope: str | None = None,
    forces: bool | None = None,
    energy: str = "energy",
    n_orientations: int = 8,
    seed: int = 0,
    scale: Scales | None = None,
    progress: bool = True,
) -> DegreeSearch:
    r"""Raise the degree of `GroupAveraging` until outputs depend on the orientation by less than a target.

    With :math:`A_L` the average to degree L, :math:`F_L(g) = \rho(g)^{-1} A_L(g x)` is the same for all g where the
    average is exact. For each degree its variance over the group is estimated from K random orientations, without bias
    for any K (sum of squares over K - 1), and averaged over structures, rows and components:

    .. math:: \sigma_L^2 = \frac{1}{K - 1} \sum_{k=1}^K \big\langle (F_L(g_k) - \bar F_L)^2 \big\rangle

    A standard deviation divided by the error scale of the output (`symmetrize.testing.Scale`) is compared with the
    target. The orientations are random, and the same ones for all degrees, because those of a quadrature could be
    related to those of the rule: an average over a group is exactly equivariant under it. The estimate is uncertain by
    a fraction of about :math:`1/\sqrt{2 (K - 1) n}` for n structures that have little to do with each other.

    Parameters
    ----------
    backbone : Backbone
    structures : Batch or sequence of ase.Atoms
        That the model will be used for, or like those: several, since the error scale is their variation.
    target : float, or dict of str to float
        Standard deviation over orientations on the error scale, for all outputs (``atomic_<name>`` and ``"forces"``
        included) or for those that are named; the others are measured, but not judged.
    group : {"O(3)", "SO(3)"}
    rule : {"lebedev", "gauss"}
    start, maximum, step : int
        Degrees to try. Costs grow as the third power of the degree.
    scope : {"atom", "structure"}, optional
        Of the `Symmetrizer`.
    forces : bool, optional
        Also the conservative forces, the gradient of ``energy``; by default where the backbone has such an output.
    energy : str
    n_orientations : int
        K, at least 2.
    seed : int
        Of the orientations.
    scale : dict of str to Scale or float, optional
        Error scales; by default, those of the averaged outputs of the structures.
    progress : bool
        A progress bar over the degrees, on terminals.

    Returns
    -------
    DegreeSearch

    Raises
    ------
    DegreeNotFoundError
        The target is not reached; ``points`` of the error are what was measured.
    DeclarationError
        A rule without degrees to choose from, a target for an unknown output, a target or degrees without sense.
    """
    _check_arguments(rule, target, start, maximum, step, n_orientations)
    batch = _batch(structures, backbone)
    orientations = random_rotations(
        n_orientations, torch.Generator().manual_seed(seed), improper=None if group == "O(3)" else False
    )
    points: list[DegreePoint] = []
    with (
        _evaluating(backbone),
        tqdm(range(start, maximum + 1, step), unit="degree", disable=None if progress else True, leave=False) as bar,
    ):
        for degree in bar:
            bar.set_description(f"degree {degree}")
            method = GroupAveraging(degree, rule)
            model = Symmetrizer(backbone, method, group=group, scope=scope)
            subject = of_symmetrizer(model, forces=forces, energy=energy)
            prepared = subject.prepare(batch)
            deviations = _deviations(subject, prepared, orientations, scale)
            targets = _targets(target, deviations)
            points.append(DegreePoint(degree, len(method.elements(model.group)[1]), deviations))
            worst = max(targets, key=lambda name: deviations[name] / targets[name])
            bar.set_postfix_str(f"{worst}: {deviations[worst]:.1e} (target {targets[worst]:.1e})")
            if all(deviations[name] <= targets[name] for name in targets):
                break
        else:
            raise DegreeNotFoundError(
                f"find_degree: {worst}: expected a standard deviation over orientations of at most {targets[worst]:g} "
                f"of the error scale, got {deviations[worst]:.2g} at degree {degree}; give a larger maximum or target, "
                f"or use ECSE, which is exact\n{_table(points)}",
                tuple(points),
            )
    return DegreeSearch(model.train(backbone.training), targets, tuple(points))


def _check_arguments(
    rule: str, target: float | Mapping[str, float], start: int, maximum: int, step: int, n_orientations: int
) -> None:
    if rule not in PRODUCT_RULES:
        raise DeclarationError(
            f"find_degree: rule: expected one with degrees to choose from, got {rule!r}; "
            f"{did_you_mean(str(rule), PRODUCT_RULES)}"
        )
    numbers = {"start": (start, 0), "maximum": (maximum, start), "step": (step, 1)}
    numbers["n_orientations"] = (n_orientations, 2)
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DeclarationError(f"find_degree: {name}: expected an integer of at least {least}, got {value!r}")
    for name, wanted in (target if isinstance(target, Mapping) else {"target": target}).items():
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not 0.0 < wanted < math.inf:
            raise DeclarationError(f"find_degree: {name}: expected a positive target, got {wanted!r}")
    if isinstance(target, Mapping) and not target:
        raise DeclarationError("find_degree: target: expected at least one output, got none")


def _batch(structures: Data | Sequence[Atoms], backbone: Backbone) -> Data:
    if isinstance(structures, Data):
        return structures
    from symmetrize.data import from_ase

    listed = list(structures)
    if not listed:
        raise InvalidInputError("find_degree: structures: expected at least one, got none")
    return from_ase(listed, dtype=backbone.dtype)


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """In evaluation mode: dropout would count as a dependence on the orientation."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _deviations(subject: Subject, batch: Batch, orientations: torch.Tensor, scale: Scales | None) -> dict[str, float]:
    outputs: dict[str, OutputSpec] = subject.declared(batch)
    reference = evaluate(subject.model, batch, outputs)
    scales = resolve_scale(subject.model, batch, outputs, reference, scale)
    n_structures = batch[keys.PTR].shape[0] - 1
    changes = changes_over(subject.model, batch, outputs, orientations, reference, dict(subject.vectors))
    out = {}
    for name, change in changes.items():
        rows = change.flatten(2) if change.dim() > 2 else change[:, :, None]
        variance = where_finite(rows.var(dim=0).mean(dim=1))
        deviation = math.sqrt(float(structure_mean(variance, reference[name].owner, n_structures).mean()))
        size = scales[name]
        # What is the same number for all structures needs no average, unless it changes by more than rounding.
        rounding = 1e3 * torch.finfo(batch[keys.POS].dtype).eps * size.magnitude
        out[name] = 0.0 if size.kind == "none" and deviation <= rounding else size.relative(deviation)
    return out


def _targets(target: float | Mapping[str, float], deviations: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(target, Mapping):
        return dict.fromkeys(deviations, float(target))
    for name in target:
        if name not in deviations:
            raise DeclarationError(f"target: unknown output {name!r}, {did_you_mean(str(name), deviations)}")
    return {name: float(value) for name, value in target.items()}


def _table(points: Sequence[DegreePoint]) -> str:
    names = list(points[0].deviations)
    lines = ["degree  evaluations  " + "  ".join(f"{name:>10}" for name in names)]
    for point in points:
        cells = "  ".join(f"{point.deviations[name]:>{max(10, len(name))}.2e}" for name in names)
        lines.append(f"{point.degree:>6}  {point.evaluations:>11}  {cells}")
    return "\n".join(lines)
