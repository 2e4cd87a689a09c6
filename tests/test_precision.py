"""Narrow backbones under precise frames: what is rounded, and what is not."""

from __future__ import annotations

import copy

import pytest
import torch
from e3nn.o3 import rand_matrix
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase, wrap
from symmetrize.errors import InvalidTypeError
from symmetrize.methods.ecse.coordinate_systems import pair_frames
from symmetrize.testing.structures.geometries import ethanol

WIDTHS = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8, "num_heads": 2}
HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator))

    def forward(self, pos):
        return torch.tanh(pos @ self.weight).sum(dim=1)


def backbones():
    return {
        "pet": PET(PETConfig((1, 6, 8), cutoff=3.5, **WIDTHS)),
        "toy": ToyLocal(),
        "wrapped": wrap(Flat(), {"energy": OutputSpec("0e", per="atom", reduce="sum")}, probe=False),
    }


def structure(dtype, turn=None, seed=1):
    atoms = ethanol()
    atoms.rattle(0.05, seed=seed)
    if turn is not None:
        atoms.positions = atoms.positions @ turn.numpy().T
    return from_ase(atoms, dtype=dtype)


def turns(n=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [rand_matrix(dtype=torch.float64) for _ in range(n)]


def orientation_error(model, dtype):
    """Relative change of energies and of forces, turned back, over orientations."""
    reference = model(structure(dtype), forces=True)
    errors = []
    for turn in turns():
        out = model(structure(dtype, turn), forces=True)
        back = out["forces"].to(torch.float64) @ turn
        size = reference["forces"].abs().max()
        errors.append(float((back - reference["forces"]).abs().max() / size))
        errors.append(float((out["energy"] - reference["energy"]).abs() / reference["energy"].abs()))
    return max(errors)


@pytest.mark.parametrize("name", ["pet", "toy", "wrapped"])
@pytest.mark.parametrize("narrow", HALVES, ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_results_have_the_precision_of_the_positions_and_the_values_of_the_backbone(name, narrow, wide):
    backbone = backbones()[name]

    def rounding(method):
        """Relative error of the narrow backbone, atomic energies and forces."""
        precise, model = (
            Symmetrizer(copy.deepcopy(backbone).to(dtype), method).eval() for dtype in (torch.float64, narrow)
        )
        out = model(structure(wide), forces=True)
        expected = precise(structure(torch.float64), forces=True)
        assert out["forces"].dtype == wide
        return [
            float((out[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in ("atomic_energy", "forces")
        ]

    (energies, forces), (bare_energies, bare_forces) = rounding(ECSE()), rounding(Identity())
    assert 0.0 < energies < 5.0 * bare_energies
    # Gradients of weights multiply differences between frames, and with them the rounding of energies.
    assert 0.0 < forces < 20.0 * bare_forces


@pytest.mark.parametrize("name", ["pet", "toy", "wrapped"])
@pytest.mark.parametrize("narrow", HALVES, ids=str)
def test_narrow_backbones_are_equivariant_to_the_precision_of_the_positions(name, narrow):
    # In local coordinates inputs agree to 1e-15, and round to the same numbers.
    backbone = backbones()[name].to(narrow)
    assert orientation_error(Symmetrizer(backbone, ECSE()).eval(), torch.float64) < 1e-9
    # The twin: the bare backbone, which sees other numbers in every orientation.
    assert orientation_error(Symmetrizer(backbone, Identity()).eval(), torch.float64) > 1e-3


def test_frames_are_float64_whatever_the_backbone_is():
    for dtype, parameters in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16)):
        model = Symmetrizer(ToyLocal().to(parameters), ECSE())
        rotations = model.frames(structure(dtype)).rotations
        assert rotations.dtype == torch.float64
        assert not_orthogonal(rotations) < 2e-15
    # The twin: the same construction in float32.
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 100, 3, generator=generator)
    first, second = vectors / vectors.norm(dim=2, keepdim=True)
    assert not_orthogonal(pair_frames(first, second)) > 1e-8


def not_orthogonal(rotations):
    wide = rotations.to(torch.float64)
    return float((wide.transpose(1, 2) @ wide - torch.eye(3, dtype=torch.float64)).abs().max())


@pytest.mark.parametrize(("parameters", "positions"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_other_differences_of_precision_are_refused(parameters, positions):
    with pytest.raises(InvalidTypeError, match="convert one of them"):
        Symmetrizer(ToyLocal().to(parameters), ECSE())(structure(positions))


def test_lengths_and_buffers_of_a_narrow_pet_are_not_rounded():
    backbone = backbones()["pet"].to(torch.bfloat16)
    batch = from_ase(ethanol(), cutoff=3.5)
    assert backbone.prepare(batch)["edge_scalars"].dtype == torch.float64
    assert backbone.scale.dtype == backbone.factor.dtype == torch.float64
    narrow = backbone(batch)["energy"]
    assert torch.isfinite(narrow).all()
