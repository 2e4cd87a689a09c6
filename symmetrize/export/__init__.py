"""Symmetrised models as files for simulation engines.

Nothing is imported here: the libraries of the formats are optional.
"""
