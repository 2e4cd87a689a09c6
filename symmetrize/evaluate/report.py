"""What is printed about predictions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms


def list_predictions(predicted: list[Atoms], echo: Callable[[str], None], limit: int = 10) -> None:
    """Print the first predictions, a line for each."""
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


def report_errors(references: list[Atoms], predicted: list[Atoms], forces: bool, echo: Callable[[str], None]) -> None:
    """Print mean absolute and root mean square errors against the references that there are."""
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
