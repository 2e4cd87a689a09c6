"""Engines that symmetrised models run in."""

from symmetrize.calculators.ase import SymmetrizerCalculator

__all__ = ["SymmetrizerCalculator"]
