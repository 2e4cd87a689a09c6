"""The results of the demo as tables."""

from __future__ import annotations

from collections.abc import Callable

from symmetrize.demo.results import DemoResult, Row, SymmetryError
from symmetrize.report.tables import Table, number


def tables(result: DemoResult) -> list[Table]:
    """Accuracy and cost, symmetry errors in units, and the same on the common error scale."""
    n = result.provenance["n_structures"]
    accuracy = Table(
        f"Accuracy against the reference and cost, {n} structures",
        [
            ("model",),
            ("energy MAE", "meV"),
            ("energy MAE", "meV/atom"),
            ("force MAE", "meV/A"),
            ("backbone", "evaluations"),
            ("at most",),
            ("CPU time", "s"),
            ("CPU time", "/ bare"),
        ],
        [
            [
                _name(row),
                number(row.energy_mae),
                number(row.energy_mae_per_atom),
                number(row.force_mae),
                f"{row.evaluations:.2f} per {row.scope}",
                str(row.evaluations_max),
                number(row.seconds, 2),
                f"{row.ratio:.1f}",
            ]
            for row in result.rows
        ],
    )
    elements = f"{result.provenance['n_elements']} random elements per structure"
    plain = _errors(
        result,
        f"Symmetry errors, {elements}",
        ("E, meV", "F, meV/A"),
        lambda e: (e.energy_max, e.energy_rms, e.force_max, e.force_rms),
    )
    scale = (
        f"Symmetry errors on the common scale (energy / {number(result.scales['energy'])} meV, "
        f"force / {number(result.scales['force'])} meV/A)"
    )
    relative = _errors(
        result,
        scale,
        ("E", "F"),
        lambda e: (e.energy_max_relative, e.energy_rms_relative, e.force_max_relative, e.force_rms_relative),
    )
    return [accuracy, plain, relative]


def _errors(
    result: DemoResult, title: str, units: tuple[str, str], take: Callable[[SymmetryError], tuple[float, ...]]
) -> Table:
    columns: list[tuple[str, ...]] = [("model",)]
    for kind in ("rotation", "inversion"):
        columns += [(kind, unit, which) for unit in units for which in ("max", "RMS")]

    def cells(error: SymmetryError) -> list[str]:
        return [number(value, 3) for value in take(error)]

    return Table(title, columns, [[_name(row), *cells(row.rotation), *cells(row.inversion)] for row in result.rows])


def _name(row: Row) -> str:
    return f"{row.label}, {row.scope}: {'bare' if row.treatment == 'bare' else 'ECSE ' + row.treatment}"


def dynamics_table(result: DemoResult) -> Table:
    """What the NVE runs conserve."""
    dynamics = result.dynamics
    length = dynamics.trajectories[0].time[-1] / 1000.0
    rows = []
    for t in dynamics.trajectories:
        rows.append(
            [
                f"{dynamics.label}: {'bare' if t.treatment == 'bare' else 'ECSE ' + t.treatment}",
                number(t.energy_drift),
                number(t.energy_fluctuation),
                number(100.0 * t.stretched),
                number(t.turned),
            ]
        )
    return Table(
        f"Molecular dynamics at constant energy: {number(float(length))} ps, steps of {dynamics.timestep:g} fs",
        [
            ("model",),
            ("energy drift", "meV/ps"),
            ("fluctuation", "meV"),
            ("|L| change", "%, max"),
            ("L turned by", "degrees, max"),
        ],
        rows,
    )


def all_tables(result: DemoResult) -> list[Table]:
    """Everything in the order in which it is shown."""
    return [*tables(result), dynamics_table(result)]


def as_text(result: DemoResult) -> str:
    """All tables for a terminal."""
    return "\n\n".join(table.text() for table in all_tables(result))


def as_markdown(result: DemoResult) -> str:
    """All tables as Markdown."""
    return "\n\n".join(table.markdown() for table in all_tables(result)) + "\n"
