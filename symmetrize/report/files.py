"""Writing reports: at once or not at all."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from symmetrize.errors import MissingDependencyError


def require_libraries() -> None:
    """Raise `MissingDependencyError` now rather than after minutes of measuring."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"reports need: pip install {' '.join(missing)}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through a temporary one beside it, so that no half of it is ever found under its name."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
