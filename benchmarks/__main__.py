"""The command line: ``python -m benchmarks [NAME ...] --output runs/bench``."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import click
import torch

from benchmarks.datasets import load
from benchmarks.record import Result, Setting, provenance, save

#: One module of this package each, with a function ``run(setting) -> Result``.
NAMES = (
    "frames",
    "overhead",
    "evaluations",
    "steepness",
    "smoothness",
    "scaling",
    "memory",
    "deep",
    "training",
    "pet_throughput",
    "compiled",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True, help="Folder."
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with public data sets, see benchmarks/README.md.",
)
@click.option(
    "--pet-source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Clone of github.com/spozdn/pet, the proof of concept of ECSE.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--profile", type=click.Choice(["small", "full"]), default="small", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(
    names: tuple[str, ...],
    output: Path,
    data: Path | None,
    pet_source: Path | None,
    device: str,
    profile: str,
    threads: int,
    quiet: bool,
) -> None:
    """Measure NAMEs, by default all: see benchmarks/README.md."""
    torch.set_num_threads(threads)
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise click.ClickException(f"--device {device}: {str(error).splitlines()[0]}") from error
    datasets, absent = load(data, profile == "full")
    # Without --data nothing was asked for that could be absent.
    setting = Setting(
        datasets, absent if data is not None else [], place, profile == "full", threads, not quiet, pet_source
    )
    if setting.absent:
        click.echo(f"not found in {data}, skipped: {', '.join(setting.absent)}", err=True)
    origin = provenance(setting)
    click.echo(f"{origin['device']}, {origin['cores']} cores, {threads} threads used; {profile} profile\n")
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name in dict.fromkeys(names) or NAMES:
        start = time.perf_counter()
        results[name] = importlib.import_module(f"benchmarks.{name}").run(setting)
        seconds[name] = time.perf_counter() - start
        click.echo(results[name].text())
        # After each, so that an interruption loses one benchmark only.
        save(output, setting, results, seconds, origin)
    click.echo(f"{sum(seconds.values()):.0f} s; results in {output / 'results.json'} and {output / 'results.md'}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
