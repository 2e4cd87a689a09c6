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
from symmetrize.storage import is_saved_model, load
from symmetrize.symmetrizer import Symmetrizer, check_energy


def evaluate_file(
    structures: str | Path,
    *,
    backbone: str = "pet:ethanol",
    group: str | None = None,
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
        ``"name"`` or ``"name:argument"`` as for `load_backbone`; or the folder of a saved model.
    group : {"O(3)", "SO(3)", "none"}, optional
        ``"none"`` evaluates the bare backbone. By default that of the saved model, else ``"O(3)"``.
    scope : {"atom", "structure"}, optional
        By default that of the saved model, else as `Symmetrizer` chooses.
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
    precision = getattr(torch, dtype)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"device: {device!r} is not available here, 'cpu' is") from error
    model = _model(backbone, group, scope).to(device=device, dtype=precision).eval()
    check_energy(model.backbone, "energy")
    if explain:
        first = frames[:batch_size]
        echo(f"the first {len(first)} of {len(frames)} structures:")
        echo(str(model.explain(from_ase(first, dtype=precision).to(device))))
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
    method = type(model.method).__name__
    symmetry = "bare" if method == "Identity" else f"{method}, {model.group}, scope {model.scope}"
    echo(f"{len(frames)} structures, {sum(map(len, frames))} atoms; {backbone}, {symmetry}; {seconds:.2f} s")
    _report_errors(frames, predicted, forces, echo)
    if output is not None:
        with replacing(output) as temporary:
            write(temporary, predicted, format="extxyz")
        echo(f"wrote {output}")
    else:
        _list_predictions(predicted, echo)
    return predicted


def _model(name: str, group: str | None, scope: str | None) -> Symmetrizer:
    if is_saved_model(name):
        saved = load(name)
        method = Identity() if group == "none" else saved.method
        chosen = saved.group if group in (None, "none") else str(group)
        return Symmetrizer(saved.backbone, method, chosen, scope or saved.scope, saved.chunk_size)
    backbone, _, argument = name.partition(":")
    net = load_backbone(backbone, *([argument] if argument else [])).eval()
    method = Identity() if group == "none" else ECSE()
    return Symmetrizer(net, method, "O(3)" if group in (None, "none") else str(group), scope)


def _list_predictions(predicted: list[Atoms], echo: Callable[[str], None], limit: int = 10) -> None:
    for n, atoms in enumerate(predicted[:limit]):
        results = atoms.calc.results
        line = f"  {n:>4}  {atoms.get_chemical_formula():<12} energy {results['energy']:.6f} eV"
        if "energy_spread" in atoms.info:
            line += f" (spread over frames {1e3 * atoms.info['energy_spread']:.3f} meV)"
        if "forces" in results:
            line += f", largest force {np.linalg.norm(results['forces'], axis=1).max():.4f} eV/A"
        if "stress" in results:
            line += f", pressure {-results['stress'][:3].mean():.6f} eV/A^3"
        echo(line)
    more = f"{len(predicted) - limit} more; " if len(predicted) > limit else ""
    echo(f"  {more}--output FILE writes all of them, forces included")


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
