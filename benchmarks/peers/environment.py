"""A virtual environment of its own for the tools that are compared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
WITHOUT_DEPENDENCIES = HERE / "requirements-no-deps.txt"


def python_of(environment: Path) -> Path:
    """Its interpreter."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(environment: Path) -> Path:
    """Create the environment, or bring it up to date with the requirements; returns its interpreter.

    A package without installable wheel is reported and left out: the benchmark lists it as not run.
    """
    python = python_of(environment)
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + WITHOUT_DEPENDENCIES.read_bytes()).hexdigest()
    stamp = environment / "requirements.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        click.echo(f"creating {environment}", err=True)
        venv.create(environment, with_pip=True)
    click.echo("installing (minutes)", err=True)
    _pip(python, "-r", str(REQUIREMENTS))
    complete = True
    for line in WITHOUT_DEPENDENCIES.read_text().splitlines():
        if line and not line.startswith("#"):
            try:
                _pip(python, "--no-deps", line)
            except subprocess.CalledProcessError:
                complete = False
                click.echo(f"{line} cannot be installed, goes on without", err=True)
    _pip(python, "--no-deps", "-e", str(ROOT))
    if complete:
        stamp.write_text(wanted)
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
