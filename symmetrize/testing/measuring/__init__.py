"""Measures: numbers, no verdicts."""
