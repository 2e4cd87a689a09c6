"""Tests of adapters: skipped where the library is missing, unless it was asked for."""

from __future__ import annotations

import os

import pytest

from symmetrize.registry import list_backbones


def require_adapter(name: str) -> None:
    """Skip the test or module if the adapter's library is missing; fail if REQUIRE_ADAPTERS (or "all") names it."""
    missing = list_backbones()[name].missing
    if not missing:
        return
    asked = {part.strip() for part in os.environ.get("REQUIRE_ADAPTERS", "").split(",")}
    message = f"adapter {name!r} needs: pip install {' '.join(missing)}"
    if asked & {name, "all"}:
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)
