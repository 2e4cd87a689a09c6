"""The command line: ``symmetrize demo | train | evaluate | list``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from symmetrize import __version__
from symmetrize.errors import SymmetrizeError


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our own errors into one line and exit status 1; leave bugs their traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except ModuleNotFoundError as error:
            extra = {"lightning": "train", "matplotlib": "report", "jinja2": "report"}.get(str(error.name))
            if extra is None:
                raise
            raise click.ClickException(
                f"this command needs {error.name}: pip install 'torch-symmetrize[{extra}]'"
            ) from error
        except SymmetrizeError as error:
            raise click.ClickException(str(error)) from error

    return wrapper


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="symmetrize")
def main() -> None:
    """Make deep networks on point clouds exactly and smoothly equivariant."""


@main.command(short_help="A trained network before and after symmetrisation.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option("--structures", type=click.Path(exists=True, path_type=Path), help="Other ethanol structures (extxyz).")
@click.option("--n-structures", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--n-elements", type=click.IntRange(min=1), default=16, show_default=True, help="Group elements each.")
@click.option("--n-steps", type=click.IntRange(min=2), help="Steps of molecular dynamics.")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
@_friendly
def demo(output: Path, structures: Path | None, quiet: bool, **options: Any) -> None:
    """A trained PET before and after symmetrisation: table, short dynamics, HTML report.

    Takes about two minutes on two cores.
    """
    from symmetrize.demo import run_demo
    from symmetrize.demo.table import as_text

    if options["n_steps"] is None:
        del options["n_steps"]
    result = run_demo(output, structures=structures, progress=not quiet, **options)
    if quiet:
        click.echo(f"{as_text(result)}\n\nreport: {result.report}")


@main.command(short_help="Train a backbone as a recipe (YAML) says.")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Run folder (default: from the configuration).")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Structures, instead of the configured file."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Number of epochs, instead of the configured one.")
@click.option("--restart", is_flag=True, help="Start anew even if the run folder holds a checkpoint.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@_friendly
def train(config: Path, output: Path | None, data: Path | None, epochs: int | None, restart: bool, quiet: bool) -> None:
    """Train a backbone as CONFIG (YAML) says; a run that was killed goes on from its last checkpoint.

    For example: symmetrize train examples/configs/pet-ethanol.yaml
    """
    from symmetrize.training import train as run

    overrides: dict[str, Any] = {}
    if data is not None:
        overrides["data.path"] = str(data.resolve())
    if epochs is not None:
        overrides["epochs"] = epochs
    run(config, output=output, resume=not restart, progress=not quiet, overrides=overrides)


@main.command(short_help="Energies and forces of structures in a file.")
@click.argument("structures", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--backbone",
    default="pet:ethanol",
    show_default=True,
    help="NAME or NAME:WEIGHTS (pet:ethanol, pet:ethanol-2block); see 'symmetrize list'.",
)
@click.option(
    "--group",
    type=click.Choice(["O(3)", "SO(3)", "none"]),
    default="O(3)",
    show_default=True,
    help="With or without inversion, or bare.",
)
@click.option(
    "--scope",
    type=click.Choice(["atom", "structure"]),
    help="Default: atom for strictly local networks, else structure.",
)
@click.option("--forces/--no-forces", default=True, show_default=True)
@click.option("--stress", is_flag=True, help="Also the stress (periodic structures).")
@click.option("--spread", is_flag=True, help="Also the spread of the energy over the frames.")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Such as cuda.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Structures at a time.")
@click.option("--output", type=click.Path(path_type=Path), help="Write structures with predictions (extxyz).")
@click.option("--explain", is_flag=True, help="Print what it would take, and stop.")
@_friendly
def evaluate(structures: Path, **options: Any) -> None:
    """Energies and forces of STRUCTURES (any format of ASE), with errors where the file holds references."""
    from symmetrize.evaluate import evaluate_file

    evaluate_file(structures, echo=click.echo, **options)


@main.command("list")
def list_() -> None:
    """Registered backbones (without importing them) and symmetrisation methods."""
    from symmetrize.registry import list_backbones

    click.echo("backbones")
    for name, entry in sorted(list_backbones().items()):
        missing = f"; needs: pip install {' '.join(entry.missing)}" if entry.missing else ""
        click.echo(f"  {name:<10} {entry.status:<12} {entry.description} ({entry.license}){missing}")
    click.echo("  weights of pet: ethanol (1 block), ethanol-2block; for ethanol only")
    click.echo("methods")
    click.echo(f"  {'ECSE':<10} exact, smooth, deterministic; O(3) and SO(3), per atom or per structure")
    click.echo(f"  {'Identity':<10} the bare backbone")


if __name__ == "__main__":
    sys.exit(main())
