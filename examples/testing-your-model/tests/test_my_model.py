"""Everything that a model of molecules should fulfil, one test for each property."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from my_model import bare, dipole_of_charges, symmetrized

from symmetrize.testing import (
    CLAIMS,
    Subject,
    assert_equivariant,
    assert_smooth,
    of_backbone,
    parametrize_with_checks,
    paths,
)

AUGMENTED = "the network has to learn this from rotated copies"


def molecules() -> list[Atoms]:
    return [molecule(name) for name in ("CH3CH2OH", "H2O", "CO2")]


def bare_claiming_everything() -> Subject:
    """By default a backbone makes no promise about rotations, and errors are recorded without being judged."""
    return of_backbone(bare(), claims=frozenset(CLAIMS))


@parametrize_with_checks({"symmetrized": symmetrized}, structures=molecules, library=False)
def test_symmetrized(check):
    check()


@parametrize_with_checks(
    {"bare": bare_claiming_everything},
    structures=molecules,
    library=False,
    only=[
        "rotation_equivariance",
        "inversion_equivariance",
        "translation_invariance",
        "permutation_equivariance",
        "batch_independence",
    ],
    expected_failures={"rotation_equivariance": AUGMENTED, "inversion_equivariance": AUGMENTED},
)
def test_bare(check):
    check()


def test_symmetrized_in_one_line():
    assert_equivariant(symmetrized(), molecules())


def test_the_bare_network_would_not_pass():
    with pytest.raises(AssertionError, match="rotated"):
        assert_equivariant(bare(), molecules())


def test_dipole_of_charges():
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    charges = torch.randn(5, dtype=torch.float64, generator=generator)
    assert_equivariant(dipole_of_charges, {"positions": (positions, "1o"), "charges": charges}, "1o:structure")


def test_smooth_while_a_molecule_bends():
    assert_smooth(symmetrized(), paths()["bending CO2"])
