"""Predictions for a file of structures, compared with the references that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.stress import full_3x3_to_voigt_6_stress
from tqdm import tqdm

from symmetrize.data import from_ase
from symmetrize.errors import InvalidInputError
from symmetrize.files import replacing
from symmetrize.methods.ecse import ECSE
from symmetrize.methods.identity import Identity
from symmetrize.registry import load_backbone
from symmetrize.symmetrizer import Symmetrizer, check_energy


def evaluate_file(
    structures: str | Path,
    *,
    backbone: str = "pet:ethanol",
    group: str = "O(3)",
    scope: str | None = None,
    forces: bool = True,
    stress: bool = False,
    spread: bool = False,
    dtype: str = "float64",
    batch_size: int = 32,
    output: str | Path | None = None,
    explain: bool = False,
    device: str = "cpu",
    echo: Callable[[str], None] = print,
) -> list[Atoms]:
    """Evaluate all structures of a file and report errors against its references.

    Parameters
    ----------
    structures : path
        Any format that ASE reads; energies in eV, forces in eV/angstrom where present.
    backbone : str
        ``"name"`` or ``"name:argument"`` as for `load_backbone`.
    group : {"O(3)", "SO(3)", "none"}
        ``"none"`` evaluates the bare backbone.
    output : path, optional
        Where to write the structures with the predictions attached (extxyz).
    explain : bool
        Only print the plan of the first batch.
    device : str
        Where to evaluate, such as ``"cuda"``.

    Returns
    -------
    list of ase.Atoms
        Copies with a `SinglePointCalculator` that holds the predictions; none with ``explain``.
    """
    try:
        found = read(structures, ":")
    except Exception as error:  # whatever ASE's many readers raise
        raise InvalidInputError(f"{structures}: expected structures that ASE reads, got {error}") from error
    frames = found if isinstance(found, list) else [found]
    if not frames:
        raise InvalidInputError(f"{structures}: expected at least one structure, got none")
    name, _, argument = backbone.partition(":")
    precision = getattr(torch, dtype)
    net = load_backbone(name, *([argument] if argument else [])).to(device=device, dtype=precision).eval()
    check_energy(net, "energy")
    method = Identity() if group == "none" else ECSE()
    model = Symmetrizer(net, method, group="O(3)" if group == "none" else group, scope=scope)
    if explain:
        echo(str(model.explain(from_ase(frames[:batch_size], dtype=precision).to(device))))
        return []
    predicted, seconds = [], 0.0
    for start in tqdm(range(0, len(frames), batch_size), unit="batch", disable=None, leave=False):
        part = frames[start : start + batch_size]
        batch = from_ase(part, dtype=precision).to(device)
        began = time.perf_counter()
        with torch.no_grad():
            out = model(batch, forces=forces, stress=stress, spread=spread, create_graph=False)
        seconds += time.perf_counter() - began
        ends = batch.ptr.tolist()
        for n, atoms in enumerate(part):
            results = {"energy": float(out["energy"][n])}
            if forces:
                results["forces"] = out["forces"][ends[n] : ends[n + 1]].cpu().double().numpy()
            if stress:
                results["stress"] = full_3x3_to_voigt_6_stress(out["stress"][n].cpu().double().numpy())
            copy = atoms.copy()
            copy.calc = SinglePointCalculator(copy, **results)
            if spread:
                copy.info["energy_spread"] = float(out["energy_spread"][n])
            predicted.append(copy)
    symmetry = "bare" if group == "none" else f"ECSE, {group}, scope {model.scope}"
    echo(f"{len(frames)} structures, {sum(map(len, frames))} atoms; {backbone}, {symmetry}; {seconds:.2f} s")
    _report_errors(frames, predicted, forces, echo)
    if output is not None:
        with replacing(output) as temporary:
            write(temporary, predicted, format="extxyz")
        echo(f"wrote {output}")
    return predicted


def _report_errors(references: list[Atoms], predicted: list[Atoms], forces: bool, echo: Callable[[str], None]) -> None:
    energy, per_atom, force = [], [], []
    for reference, prediction in zip(references, predicted, strict=True):
        results = {} if reference.calc is None else reference.calc.results
        if "energy" in results:
            difference = prediction.get_potential_energy() - results["energy"]
            energy.append(difference)
            per_atom.append(difference / len(reference))
        if forces and "forces" in results:
            force.append((prediction.get_forces() - results["forces"]).ravel())
    if energy:
        echo(
            f"energy MAE {1e3 * np.abs(energy).mean():.3f} meV ({1e3 * np.abs(per_atom).mean():.3f} meV/atom), "
            f"RMSE {1e3 * np.sqrt(np.square(energy).mean()):.3f} meV"
        )
    if force:
        flat = np.concatenate(force)
        echo(
            f"force  MAE {1e3 * np.abs(flat).mean():.2f} meV/A, RMSE {1e3 * np.sqrt(np.square(flat).mean()):.2f} meV/A"
        )
    if not energy and not force:
        echo("no reference energies or forces in the file")
