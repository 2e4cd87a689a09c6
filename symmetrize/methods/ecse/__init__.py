"""Equivariant coordinate system ensembles (ECSE) in stratified form."""

from symmetrize.methods.ecse.method import ECSE

__all__ = ["ECSE"]
