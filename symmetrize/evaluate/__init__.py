"""Predictions for a file of structures, on one device or several, compared with the references that it holds."""

from symmetrize.evaluate.command import evaluate_file

__all__ = ["evaluate_file"]
