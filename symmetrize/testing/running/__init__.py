"""Checks as objects: the workbench they run on, the catalog, the loop over them, and what comes out."""
