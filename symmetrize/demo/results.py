"""Everything that the demo measured, as values that can be written down."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "torch-symmetrize demo"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SymmetryError:
    """|f(g x) - g f(x)| over random elements g and structures x.

    Attributes
    ----------
    energy_max, energy_rms : float
        meV.
    force_max, force_rms : float
        Components, meV/A.
    energy_max_relative, energy_rms_relative, force_max_relative, force_rms_relative : float
        The same on the common error scale.
    energy, force : ndarray of shape (n_elements, n_structures)
        Per orientation and structure: error of the energy (meV), RMS error of the force components (meV/A).
    """

    energy_max: float
    energy_rms: float
    force_max: float
    force_rms: float
    energy_max_relative: float
    energy_rms_relative: float
    force_max_relative: float
    force_rms_relative: float
    energy: np.ndarray
    force: np.ndarray

    @property
    def relative(self) -> float:
        """Largest error of energies and forces on the common scale; infinite if any is not a number."""
        values = (self.energy_max_relative, self.force_max_relative)
        return max(values) if all(map(math.isfinite, values)) else math.inf


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes
    ----------
    label, scope, treatment : str
    energy_mae, energy_mae_per_atom : float
        Against the reference, meV per structure and per atom.
    force_mae : float
        meV/A, over components.
    rotation, inversion : SymmetryError
        Under proper and improper random elements.
    evaluations, evaluations_max : float, int
        Of the backbone, per atom (scope "atom") or structure.
    seconds, ratio : float
        Energies and forces of all structures, processor time of one thread; relative to the bare backbone.
    """

    label: str
    scope: str
    treatment: str
    energy_mae: float
    energy_mae_per_atom: float
    force_mae: float
    rotation: SymmetryError
    inversion: SymmetryError
    evaluations: float
    evaluations_max: int
    seconds: float
    ratio: float


@dataclass(frozen=True)
class FrameCounts:
    """How many frames the owners of a scope have in SO(3).

    Attributes
    ----------
    label, scope : str
    evaluations : dict of str to list of int
        Group of owners (a chemical symbol, or "structure") -> evaluations of each of them.
    effective_mean, weight_min : float
        Mean of (sum w)^2 / sum w^2, and the smallest total weight before normalization.
    strata : dict of str to int
        Frames of each kind.
    """

    label: str
    scope: str
    evaluations: dict[str, list[int]]
    effective_mean: float
    weight_min: float
    strata: dict[str, int]


@dataclass(frozen=True)
class Drawing:
    """A molecule with the coordinate systems of its atoms and of its centroid.

    Attributes
    ----------
    structure : int
    symbols : list of str
    positions : ndarray of shape (n_atoms, 3)
        A, relative to the centroid.
    bonds : list of pair of int
    owners : list of dict
        ``name``, ``origin`` and ``frames``: axes as rows, weight (sum 1), stratum, and the neighbors that define it.
    """

    structure: int
    symbols: list[str]
    positions: np.ndarray
    bonds: list[tuple[int, int]]
    owners: list[dict[str, Any]]


@dataclass(frozen=True)
class ScanCurve:
    """Along a full rotation; index 0 of the first axis: proper, 1: with an inversion.

    Attributes
    ----------
    treatment : str
    energy : ndarray of shape (2, n_angles)
        Deviation from the structure as given, meV.
    force : ndarray of shape (2, n_angles)
        RMS error of the force components after rotating back, meV/A.
    """

    treatment: str
    energy: np.ndarray
    force: np.ndarray


@dataclass(frozen=True)
class Scan:
    """One structure turned about a fixed axis through 360 degrees."""

    label: str
    structure: int
    axis: tuple[float, float, float]
    angles: np.ndarray
    curves: list[ScanCurve]


@dataclass(frozen=True)
class Trajectory:
    """An NVE run.

    Attributes
    ----------
    treatment : str
    time : ndarray of shape (n_samples,)
        fs.
    energy : ndarray of shape (n_samples,)
        Total energy relative to the start, meV.
    angular_momentum : ndarray of shape (n_samples, 3)
        About the center of mass, in units of hbar.
    temperature : ndarray of shape (n_samples,)
        K, from the kinetic energy.
    """

    treatment: str
    time: np.ndarray
    energy: np.ndarray
    angular_momentum: np.ndarray
    temperature: np.ndarray

    @property
    def angle(self) -> np.ndarray:
        """Between the angular momentum and that of the start, degrees."""
        start = self.angular_momentum[0]
        across = np.linalg.norm(np.cross(start, self.angular_momentum), axis=1)
        return np.degrees(np.arctan2(across, self.angular_momentum @ start))

    @property
    def magnitude_change(self) -> np.ndarray:
        """Length of the angular momentum relative to the start, minus one."""
        length = np.linalg.norm(self.angular_momentum, axis=1)
        return length / length[0] - 1.0

    @property
    def turned(self) -> float:
        """Largest `angle`, degrees."""
        return float(self.angle.max())

    @property
    def stretched(self) -> float:
        """Largest `magnitude_change` of either sign."""
        return float(np.abs(self.magnitude_change).max())

    @property
    def energy_drift(self) -> float:
        """Slope of the total energy, meV/ps, least squares."""
        if len(self.time) < 2:
            return 0.0
        return float(np.polyfit(self.time / 1000.0, self.energy, 1)[0])

    @property
    def energy_fluctuation(self) -> float:
        """Standard deviation of the total energy about its drift, meV."""
        if len(self.time) < 2:
            return 0.0
        return float(np.std(self.energy - np.polyval(np.polyfit(self.time, self.energy, 1), self.time)))


@dataclass(frozen=True)
class Dynamics:
    """The same molecule from the same start in different models."""

    label: str
    structure: int
    timestep: float
    temperature: float
    trajectories: list[Trajectory]

    def __getitem__(self, treatment: str) -> Trajectory:
        return next(t for t in self.trajectories if t.treatment == treatment)


@dataclass(frozen=True)
class DemoResult:
    """Everything that was measured.

    Attributes
    ----------
    rows : list of Row
    scales : dict of str to float
        Common error scales: ``energy`` (meV, RMS over structures of the reference minus its composition baseline) and
        ``force`` (meV/A, RMS).
    tolerance : float
        Largest error on the common scale that rounding explains.
    counts : list of FrameCounts
    drawing : Drawing
    scan : Scan
    dynamics : Dynamics
    provenance : dict
        Versions, settings, data source.
    phases : dict of str to float
        Seconds.
    output : Path or None
        Folder that it was written to.
    """

    rows: list[Row]
    scales: dict[str, float]
    tolerance: float
    counts: list[FrameCounts]
    drawing: Drawing
    scan: Scan
    dynamics: Dynamics
    provenance: dict[str, Any]
    phases: dict[str, float]
    output: Path | None = None

    def row(self, label: str, treatment: str) -> Row:
        """The row of a model."""
        return next(r for r in self.rows if r.label == label and r.treatment == treatment)

    @property
    def labels(self) -> list[str]:
        """Backbones in order."""
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def report(self) -> Path | None:
        """Path of the page."""
        return None if self.output is None else self.output / "report.html"

    @property
    def worst(self) -> float:
        """Largest error on the common scale that should not be there: of SO(3) under rotations, of O(3) under both."""
        found = [row.rotation.relative for row in self.rows if row.treatment != "bare"]
        found += [row.inversion.relative for row in self.rows if row.treatment == "O(3)"]
        return max(found, default=math.inf)

    @property
    def exact(self) -> bool:
        """Whether every symmetrised model has the symmetry it was given, to rounding."""
        return self.worst <= self.tolerance

    def to_json(self) -> str:
        """Everything but the paths, with the version of the schema."""
        content = dataclasses.asdict(self)
        del content["output"]
        content = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "exact": self.exact, **content}
        return json.dumps(_plain(content), allow_nan=False) + "\n"


def _plain(value: Any, digits: int | None = None) -> Any:
    """JSON types only: arrays as lists with 9 digits, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v, digits) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), 9)
    if isinstance(value, (list, tuple)):
        return [_plain(v, digits) for v in value]
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            return None
        return float(value) if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, np.integer):
        return int(value)
    return value
