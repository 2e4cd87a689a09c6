"""The command line: ``python -m benchmarks.peers --output runs/peers``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.environment import ROOT, prepare

SCHEMA = "torch-symmetrize peers"
SCHEMA_VERSION = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/peers"), show_default=True, help="Folder."
)
@click.option(
    "--environment",
    type=click.Path(path_type=Path),
    help="Virtual environment to create or use, by default OUTPUT/environment.",
)
@click.option("--here", is_flag=True, help="Run in this environment as it is, install nothing.")
def main(names: tuple[str, ...], output: Path, environment: Path | None, here: bool) -> None:
    """Run the checks on other tools (NAMEs, by default all) and compare with what is known of them.

    The exit status is 1 where a tool behaves in another way than expected, better or worse.
    """
    if here:
        sys.exit(_measure(names, output))
    python = prepare((environment or output / "environment").absolute())
    command = [str(python), "-m", "benchmarks.peers", "--here", "--output", str(output.absolute()), *names]
    # One thread, unless told otherwise: more make small tensors slower.
    variables = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode)


def _measure(names: tuple[str, ...], output: Path) -> int:
    import torch

    from benchmarks.peers import network
    from benchmarks.peers.expected import OTHERS, compare_judges, compare_peer
    from benchmarks.peers.judges import compare
    from benchmarks.peers.measure import PROFILE, judge_degrees, measure
    from benchmarks.peers.registry import NOT_RUN, PEERS
    from benchmarks.peers.table import render
    from symmetrize.files import write_text

    known = [peer.key for peer in PEERS]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"unknown tool {unknown[0]!r}; known: {', '.join(known)}")
    # What other packages warn about when they are imported or called is not what is measured.
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    rows: dict[str, Any] = {}
    families = {peer.family for peer in PEERS if peer.family and (not names or peer.key in names)}
    not_run, unexpected = dict(NOT_RUN), []
    for peer in PEERS:
        if names and peer.key not in names and peer.family not in families:
            continue
        try:
            row = measure(peer)
        except ImportError as error:
            not_run[peer.title] = f"cannot be imported: {error}"
            unexpected.append(f"{peer.title}: {not_run[peer.title]}")
            click.echo(f"{peer.title}: {not_run[peer.title]}")
            continue
        row["version"] = _version(peer.package)
        row["others"] = OTHERS.get(peer.key, {})
        rows[peer.key] = row
        click.echo(f"{peer.title}: {row['seconds']} s")
    for family in families:
        judge_degrees({p.key: rows[p.key] for p in PEERS if p.family == family and p.key in rows})
    for key, row in rows.items():
        unexpected += compare_peer(key, row)
    judges = compare()
    unexpected += compare_judges(judges)
    record = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "command": "python -m benchmarks.peers" + "".join(f" {name}" for name in names),
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": _provenance(),
        "profile": PROFILE.name,
        "network": {
            "seed": network.SEED,
            "width": network.WIDTH,
            "length": network.LENGTH,
            "n_species": network.N_SPECIES,
            "dtype": "float64",
        },
        "as_expected": not unexpected,
        "unexpected": unexpected,
        "peers": rows,
        "judges": judges,
        "not_run": not_run,
    }
    write_text(output / "peers.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(output / "peers.md", render(record))
    click.echo(f"{record['seconds']} s; results in {output / 'peers.json'} and {output / 'peers.md'}")
    for text in unexpected:
        click.echo(f"not as expected: {text}")
    return 1 if unexpected else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _provenance() -> dict[str, Any]:
    import torch

    packages = ("torch-symmetrize", "torch", "torch-geometric", "e3nn", "metatomic-torch", "numpy", "scipy", "ase")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in packages},
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.peers")
