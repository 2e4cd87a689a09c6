"""Every example script runs, in its small profile, and draws its figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example(script, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(script), "--small", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip(), "an example prints what it found"
    figures = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".svg", ".png")]
    assert figures and all(p.stat().st_size > 1000 for p in figures)
    # Nothing outside the folder that was asked for.
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_readme_names_every_example():
    text = (ROOT / "examples" / "README.md").read_text()
    assert not [script.name for script in SCRIPTS if script.name not in text]
