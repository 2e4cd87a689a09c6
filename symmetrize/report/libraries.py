"""What reports need before they are worth measuring for."""

from __future__ import annotations

import importlib.util

from symmetrize.errors import MissingDependencyError


def require_libraries() -> None:
    """Raise `MissingDependencyError` now rather than after minutes of measuring."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"reports need: pip install {' '.join(missing)}")
