"""The command line: ``symmetrize demo | train | evaluate | check | compare | report | convert | export | list``."""

from __future__ import annotations

import functools
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from symmetrize import __version__
from symmetrize.errors import SymmetrizeError


def _friendly(command: Callable[..., None], status: int = 1) -> Callable[..., None]:
    """Turn our own errors into one line and an exit status; leave bugs their traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **options)
        except ModuleNotFoundError as error:
            extras = {"lightning": "train", "matplotlib": "report", "jinja2": "report", "metatomic": "metatomic"}
            extra = extras.get(str(error.name).partition(".")[0])
            if extra is None:
                raise
            raise _failure(
                f"this command needs {error.name}: pip install 'torch-symmetrize[{extra}]'", status
            ) from error
        except SymmetrizeError as error:
            raise _failure(str(error), status) from error

    return wrapper


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    click.echo(f"Warning: {message}" if category is UserWarning else f"{category.__name__}: {message}", err=True)


class _CannotRun(click.ClickException):
    """For a command whose status 1 is a verdict."""

    exit_code = 2


def _failure(message: str, status: int) -> click.ClickException:
    return (_CannotRun if status == _CannotRun.exit_code else click.ClickException)(message)


class _Recorded(click.Command):
    """Keeps its arguments as they were given, to say in a report how to repeat it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after having taken a copy."""
        ctx.meta["command"] = shlex.join(["symmetrize", str(ctx.info_name), *args])
        return super().parse_args(ctx, args)


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
    help="NAME or NAME:WEIGHTS (pet:ethanol, pet:ethanol-2block; see 'symmetrize list'), or a saved model's folder.",
)
@click.option(
    "--group",
    type=click.Choice(["O(3)", "SO(3)", "none"]),
    help="With or without inversion, or bare.  [default: as saved, else O(3)]",
)
@click.option(
    "--scope",
    type=click.Choice(["atom", "structure"]),
    help="[default: as saved, else atom for strictly local networks and structure for others]",
)
@click.option("--forces/--no-forces", default=True, show_default=True)
@click.option("--stress", is_flag=True, help="Also the stress (periodic structures).")
@click.option("--spread", is_flag=True, help="Also the spread of the energy over the frames.")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64", show_default=True)
@click.option("--device", "--accelerator", default="cpu", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@click.option("--devices", default="1", show_default=True, help="How many (auto: all), or which, such as 0,2.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "ddp", "ddp_spawn"]),
    default="auto",
    show_default=True,
    help="How Lightning starts a process for each of several devices.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Structures at a time.")
@click.option("--max-atoms", type=click.IntRange(min=1), default=4096, show_default=True, help="Atoms at a time.")
@click.option("--output", type=click.Path(path_type=Path), help="Write structures with predictions (extxyz).")
@click.option("--restart", is_flag=True, help="Start anew even if an interrupted run left parts beside OUTPUT.")
@click.option("--explain", is_flag=True, help="Print what it would take, and stop.")
@_friendly
def evaluate(structures: Path, **options: Any) -> None:
    """Energies and forces of STRUCTURES (any format of ASE), with errors where the file holds references.

    A run with --output that was killed goes on where it was when it is repeated.
    """
    from symmetrize.evaluate import evaluate_file

    evaluate_file(structures, echo=click.echo, **options)


@main.command(
    cls=_Recorded,
    short_help="Test the symmetries of any model: table, verdict, report.",
    epilog="Exit status: 0 passed, 1 a check failed, 2 it could not be run.",
)
@click.argument("target", required=False)
@click.option(
    "--structures",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your structures, beside the named geometries (any format of ASE).",
)
@click.option(
    "--outputs",
    multiple=True,
    metavar="NAME=SPEC",
    help="How an output of a torch module or function transforms; see above.",
)
@click.option(
    "--group",
    type=click.Choice(["O(3)", "SO(3)"]),
    help="The group that is claimed; without inversion, parity is recorded only.  [default: of the model, else O(3)]",
)
@click.option("--symmetrize", is_flag=True, help="Check a backbone symmetrised by ECSE, instead of bare.")
@click.option(
    "--method",
    metavar="NAME[:OPTION=VALUE,...]",
    help="Check a backbone symmetrised by this method (see 'symmetrize list'), such as GroupAveraging:degree=5.",
)
@click.option("--cutoff", type=float, help="Radius of the neighbor list that a torch module or function needs.")
@click.option("--species", metavar="H,C,...", help="Elements that the model knows.  [default: of the model, else any]")
@click.option(
    "--tolerance", type=float, help="Largest error that is accepted, on the error scale.  [default: rounding]"
)
@click.option("--dtype", type=click.Choice(["float64", "float32"]), help="Convert to it.  [default: as the model is]")
@click.option("--profile", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--only", multiple=True, metavar="ID", help="Run this check only (repeatable); 'check' or 'check[set]'.")
@click.option("--skip", multiple=True, metavar="ID", help="Leave this check out (repeatable).")
@click.option(
    "--expect-failure",
    "expected_failures",
    multiple=True,
    metavar="ID=REASON",
    help="A known failure (repeatable); if it passes, that is a failure.",
)
@click.option("--references", is_flag=True, help="Compare with the energies and forces in the file of --structures.")
@click.option(
    "--trajectory",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Frames of the same atoms, along which outputs have to be smooth.",
)
@click.option(
    "--library/--no-library",
    default=None,
    help="Also on named geometries (linear, planar, crystals, ...).  [default: yes for a Symmetrizer or Backbone, else "
    "without --structures only]",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="Write a report: .html, .md or .json (repeatable).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random rotations, permutations, ...")
@click.option("--list", "list_only", is_flag=True, help="List the checks (those of TARGET, where given), and stop.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of torch; small structures want one."
)
@click.option("--quiet", is_flag=True, help="Only the table and the verdict.")
@click.pass_context
@functools.partial(_friendly, status=2)
def check(ctx: click.Context, target: str | None, **options: Any) -> None:
    """Test the symmetries of TARGET, any model of structures of atoms.

    \b
    TARGET is one of
      package.module:object   of your code: a Symmetrizer, a Backbone, an ASE calculator, a torch
                              module or function of a batch (with --outputs), or a function
                              without arguments that returns one of these; also file.py:object
      pet:ethanol             a registered backbone (see 'symmetrize list')
      model.pt                an exported metatomic model

    \b
    For example
      symmetrize check pet:ethanol --symmetrize --report report.html
      symmetrize check ase.calculators.emt:EMT --species Al,Cu
      symmetrize check my_model.py:net --outputs energy=0e:structure --outputs forces=1o:atom

    \b
    SPEC is REPRESENTATION[:ROWS[:UNIT]]
      REPRESENTATION  e3nn irreps (0e, 1o, 0e+2e), a Cartesian formula (i, ij, ij=ji), or a word:
                      scalar, pseudoscalar, vector, pseudovector, tensor, symmetric-tensor
      ROWS            atom or structure: what a row belongs to (default: found from their number);
                      sum or mean: rows of atoms, whose sum or mean is the output
    """
    from symmetrize.check import check_target, list_checks

    if target is None:
        if not options["list_only"]:
            raise click.UsageError("Missing argument 'TARGET'; see 'symmetrize check --help'.")
        list_checks(click.echo)
        return
    ctx.exit(check_target(target, echo=click.echo, command=ctx.meta["command"], **options))


@main.command(
    short_help="A study: backbones x methods x data sets, measured and resumable.",
    epilog="Exit status: 0 all cells ok (or refused by their method), 1 some failed, 2 it could not be run.",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<name of the study>]")
@click.option("--data", type=click.Path(path_type=Path), help="Folder that holds the data, in any subfolders.")
@click.option("--profile", metavar="NAME", help="Entry of 'profiles' in CONFIG, such as small.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes; 0: this one.  [default: 2, 1 on one core]")
@click.option("--scheduler", metavar="ADDRESS", help="Of a dask cluster that evaluates instead: tcp://host:8786.")
@click.option("--only-method", multiple=True, metavar="LABEL", help="Evaluate this method only (repeatable).")
@click.option("--only-backbone", multiple=True, metavar="LABEL", help="Evaluate this backbone only (repeatable).")
@click.option("--only-data", multiple=True, metavar="LABEL", help="Evaluate this data set only (repeatable).")
@click.option("--retry-failed", is_flag=True, help="Evaluate cells that have failed again.")
@click.option("--dry-run", is_flag=True, help="List the cells with what is done, and stop.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
@functools.partial(_friendly, status=2)
def compare(
    ctx: click.Context,
    config: Path,
    quiet: bool,
    only_method: tuple[str, ...],
    only_backbone: tuple[str, ...],
    only_data: tuple[str, ...],
    **options: Any,
) -> None:
    """Evaluate the study CONFIG (YAML): which way of restoring symmetry suits which backbone and data.

    A study that was killed goes on where it was when it is repeated; what is finished is not evaluated again.

    \b
    For example
      symmetrize compare study.yaml --profile small --output runs/study
      symmetrize report runs/study
    """
    from symmetrize.study.command import compare as run

    only: dict[str, Any] = {"method": only_method, "backbone": only_backbone, "data": only_data}
    ctx.exit(run(config, only=only, progress=not quiet, echo=click.echo, **options))


@main.command(short_help="A page and figures from the results of 'symmetrize compare'.")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html]")
@_friendly
def report(run: Path, output: Path | None) -> None:
    """Write RUN/report.html, one page that needs no network, and its figures and tables as files.

    RUN is the folder of a study ('symmetrize compare'), finished or not.
    """
    from symmetrize.report.study import write_report

    click.echo(f"report: {write_report(run, output)}")


@main.command(short_help="A metatrain PET checkpoint as a model of this package.")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write OUTPUT.safetensors and OUTPUT.json.  [default: beside the checkpoint, under its name]",
)
@click.option("--trust-pickle", is_flag=True, help="Read the checkpoint although reading it runs the code in it.")
@click.option("--weights", type=click.Choice(["best", "last"]), default="best", show_default=True)
@click.option("--energy", metavar="TARGET", help="Which target becomes the energy, where there are several.")
@click.option("--targets", multiple=True, metavar="TARGET", help="Keep this target only (repeatable).")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), help="Convert to it.  [default: as trained]")
@_friendly
def convert(checkpoint: Path, output: Path | None, dtype: str | None, **options: Any) -> None:
    """Turn CHECKPOINT, written by metatrain's PET, into safetensors and JSON.

    \b
    The result computes what metatrain's model computes. Then, for example,
      symmetrize evaluate structures.xyz --backbone pet:OUTPUT
      symmetrize check pet:OUTPUT --symmetrize
      symmetrize export pet:OUTPUT -o model.pt
    """
    from symmetrize.convert import convert_checkpoint

    convert_checkpoint(checkpoint, output, dtype=dtype, echo=click.echo, **options)


@main.command(short_help="A symmetrised model as one file for ASE, i-PI, LAMMPS, torch-sim.")
@click.argument("model", metavar="MODEL")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("model.pt"),
    show_default=True,
    help="The file.",
)
@click.option("--group", type=click.Choice(["O(3)", "SO(3)"]), help="[default: as saved, else O(3)]")
@click.option(
    "--scope",
    type=click.Choice(["atom", "structure"]),
    help="[default: as saved, else atom for strictly local networks and structure for others]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "mixed"]),
    help="mixed: the network in float32, everything else in float64.  [default: as the model is]",
)
@click.option("--chunk-size", type=click.IntRange(min=1), help="Atoms, rotated copies included, evaluated at a time.")
@click.option("--bare", is_flag=True, help="Not symmetrised, for comparison.")
@click.option("--species", metavar="H,C,...", help="Elements, where the model does not say them.")
@click.option("--outputs", multiple=True, metavar="NAME", help="Of a metatomic file: keep this output (repeatable).")
@click.option("--name", default="", help="Of the model, in the metadata.")
@click.option("--description", default="", help="In the metadata.")
@click.option("--author", "authors", multiple=True, help="In the metadata (repeatable).")
@_friendly
def export(model: str, output: Path, **options: Any) -> None:
    """Write MODEL, symmetrised, in the metatomic format that simulation engines read.

    \b
    MODEL is one of
      pet:ethanol, pet:PATH   a registered backbone (pet, gnn, or another one with a scriptable form), which is
                              symmetrised by ECSE
      FOLDER                  a model that symmetrize.save wrote, as it is
      other.pt                another model in the metatomic format, which is symmetrised by ECSE

    See docs/engines.md for input files of ASE, i-PI, LAMMPS and torch-sim.
    """
    from symmetrize.export.command import run_export

    run_export(model, output, echo=click.echo, **options)


@main.command("list")
def list_() -> None:
    """Registered backbones (without importing them) and symmetrisation methods."""
    from symmetrize.methods import SUMMARIES
    from symmetrize.registry import list_backbones

    click.echo("backbones")
    for name, entry in sorted(list_backbones().items()):
        missing = f"; needs: pip install {' '.join(entry.missing)}" if entry.missing else ""
        click.echo(f"  {name:<25} {entry.status:<12} {entry.description} ({entry.license}){missing}")
    click.echo("  weights of pet: ethanol (1 block), ethanol-2block; for ethanol only")
    click.echo("methods")
    for name, summary in SUMMARIES.items():
        click.echo(f"  {name:<25} {summary}")


if __name__ == "__main__":
    sys.exit(main())
