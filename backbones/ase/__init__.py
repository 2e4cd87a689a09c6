"""Any ASE calculator as a backbone: a black box whose forces and stress stand in for the derivatives of its energy."""

from __future__ import annotations

from typing import Any

from .backbone import ASEBackbone

__all__ = ["ASEBackbone", "load"]


def load(calculator: Any, **options: Any) -> ASEBackbone:
    """An `ASEBackbone` of a calculator, or of a function that makes one, with the given options."""
    return ASEBackbone(calculator, **options)
