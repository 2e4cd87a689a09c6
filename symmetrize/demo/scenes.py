"""One structure looked at closely: its energy along a full rotation, and the frames on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import build_neighbor_list, natural_cutoffs

from symmetrize import keys
from symmetrize.data import replace
from symmetrize.demo.results import Drawing, Scan, ScanCurve
from symmetrize.demo.subjects import ROTATIONS, TREATMENTS, Subject
from symmetrize.demo.sweep import MILLI, energy_and_forces, graph_of
from symmetrize.frames import NEGLIGIBLE_WEIGHT, FrameSet, Stratum
from symmetrize.ops.rotations import about_axis

#: Axis of the full rotation: nothing special.
AXIS = (0.3, -0.5, 0.8)


def scan_rotation(
    subject: Subject, atoms: Atoms, structure: int, n_angles: int, dtype: torch.dtype, tick: Callable[[], None]
) -> Scan:
    """Energy and force error of a structure turned through 360 degrees, and of its mirror image."""
    angles = torch.linspace(0.0, 360.0, n_angles, dtype=torch.float64)
    turns = about_axis(torch.tensor(AXIS).expand(n_angles, 3), torch.deg2rad(angles))
    batch = graph_of(subject, [atoms] * n_angles, dtype)
    curves = []
    for treatment in TREATMENTS:
        model = subject.model(treatment, baseline=False)
        start = energy_and_forces(model, graph_of(subject, [atoms], dtype))
        energies, errors = [], []
        for sign in (1.0, -1.0):
            elements = (sign * turns)[batch[keys.BATCH]]
            pos = torch.einsum("nab,nb->na", elements, batch[keys.POS].double()).to(dtype)
            out = energy_and_forces(model, replace(batch, **{keys.POS: pos}))
            back = torch.einsum("nba,nb->na", elements, out["forces"].double())
            error = (back.reshape(n_angles, -1) - start["forces"].double().reshape(1, -1)).square()
            energies.append((out["energy"].double() - start["energy"].double()).numpy() * MILLI)
            errors.append(error.mean(dim=1).sqrt().numpy() * MILLI)
            tick()
        curves.append(ScanCurve(treatment, np.stack(energies), np.stack(errors)))
    return Scan(subject.label, structure, AXIS, angles.numpy(), curves)


def draw_frames(subjects: Sequence[Subject], structures: Sequence[Atoms], dtype: torch.dtype) -> Drawing:
    """The structure with the most coordinate systems, with those of its atoms and of its centroid."""
    with torch.no_grad():
        chosen = _richest(subjects, structures, dtype)
        atoms = structures[chosen]
        centroid = atoms.positions.mean(axis=0)
        positions = atoms.positions - centroid
        symbols = atoms.get_chemical_symbols()
        names = [f"{symbol}{n + 1}" for n, symbol in enumerate(symbols)]
        owners: list[dict[str, Any]] = []
        for subject in subjects:
            single = subject.model(ROTATIONS).frames(graph_of(subject, [atoms], dtype))
            titles = names if subject.scope == "atom" else ["centroid"]
            for k, title in enumerate(titles):
                origin = positions[k] if subject.scope == "atom" else np.zeros(3)
                found = _frames(single, k, origin, positions, names)
                owners.append({"name": title, "scope": f"{subject.scope} scope", "origin": origin, "frames": found})
    neighbors = build_neighbor_list(atoms, natural_cutoffs(atoms, mult=1.15), self_interaction=False, bothways=False)
    bonds = [(i, int(j)) for i in range(len(atoms)) for j in neighbors.get_neighbors(i)[0]]
    return Drawing(chosen, symbols, positions, bonds, owners)


def _richest(subjects: Sequence[Subject], structures: Sequence[Atoms], dtype: torch.dtype) -> int:
    total = torch.zeros(len(structures), dtype=torch.int64)
    for subject in subjects:
        graph = graph_of(subject, structures, dtype)
        counts = subject.model(ROTATIONS).frames(graph).evaluations
        rows = graph[keys.BATCH] if subject.scope == "atom" else torch.arange(len(structures))
        total.index_add_(0, rows, counts)
    return int(total.argmax())


def _frames(
    frames: FrameSet, owner: int, origin: np.ndarray, positions: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    mine = (frames.owner == owner) & (frames.weights > NEGLIGIBLE_WEIGHT)
    weights = frames.normalized_weights[mine].numpy()
    rotations, strata = frames.rotations[mine].numpy(), frames.stratum[mine].tolist()
    out = []
    for k in np.argsort(-weights, kind="stable"):
        axes = rotations[k].T
        out.append(
            {
                "axes": axes,
                "weight": float(weights[k]),
                "stratum": Stratum(strata[k]).name.lower(),
                "made_from": _made_from(axes, positions - origin, names),
            }
        )
    return out


def _made_from(axes: np.ndarray, vectors: np.ndarray, names: Sequence[str]) -> list[str]:
    """The atoms that a coordinate system was built from, found by direction."""
    length = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(length > 0.0, length, 1.0)[:, None]
    along = unit @ axes[0]
    first = int(np.argmax(along))
    if along[first] < 1.0 - 1e-6:
        return []
    in_plane = np.abs(unit @ axes[1]) + np.where((unit @ axes[2] < -1e-3) & (length > 0.0), 0.0, 9.0)
    second = int(np.argmin(in_plane))
    return [names[first], names[second]] if in_plane[second] < 1e-6 else [names[first]]
