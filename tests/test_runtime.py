"""How models are run: inference mode, modes, garbage, scripting of the pure functions."""

import gc
import warnings
import weakref

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, DeclarationError, Identity, OutputSpec, Symmetrizer, from_ase
from symmetrize.averaging import Average
from symmetrize.methods.ecse.strata import stratify
from symmetrize.testing import geometries

ALL = geometries()
ENERGY = {"energy": OutputSpec("0e", reduce="sum")}


def model(**options):
    return Symmetrizer(ToyLocal(ENERGY), ECSE(), **options).eval()


@pytest.mark.parametrize("chunk_size", [None, 30])
def test_forces_in_inference_mode_are_the_forces(chunk_size):
    f, atoms = model(chunk_size=chunk_size), ALL["rattled silicon"]
    expected = f(from_ase(atoms), forces=True, stress=True)
    with torch.inference_mode():
        got = f(from_ase(atoms), forces=True, stress=True)
    for name in ("energy", "forces", "stress"):
        assert torch.equal(expected[name], got[name])
    assert got["forces"].abs().max() > 0.01


def test_outputs_are_plain_numbers_unless_a_graph_is_wanted():
    f, batch = model(), from_ase(ALL["ethanol"])
    for value in f(batch, forces=True).values():
        assert not value.requires_grad
    for value in f(batch, forces=True, create_graph=True).values():
        assert value.requires_grad


@pytest.mark.parametrize("forces", [False, True])
def test_nothing_of_a_call_outlives_it(monkeypatch, forces):
    """Chunks that are recomputed in the backward pass must not keep the call alive through the autograd graph."""
    alive = []
    create = Average.__init__

    def spy(self, *args, **options):
        create(self, *args, **options)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Average, "__init__", spy)
    f, batch = model(chunk_size=20).train(), from_ase([ALL["ethanol"], ALL["CO2"]])
    for _ in range(3):
        out = f(batch, forces=forces)
        loss = out["energy"].square().sum() + (out["forces"].square().sum() if forces else 0.0)
        loss.backward()
        del out, loss
    gc.collect()
    assert len(alive) == 3 and all(reference() is None for reference in alive)


def test_a_model_takes_over_the_mode_of_its_backbone():
    assert not Symmetrizer(ToyLocal(ENERGY).eval(), ECSE()).training
    assert Symmetrizer(ToyLocal(ENERGY).train(), ECSE()).training


class WithBaseline(ToyLocal):
    """A constant per atom that is no part of what is averaged."""

    constant = 0.0

    def baseline(self, batch):
        return {"energy": torch.full((batch.pos.shape[0],), self.constant, dtype=torch.float64)}


def test_baseline_is_added_once_and_the_auxiliary_brings_its_own():
    backbone, auxiliary = WithBaseline(ENERGY, seed=0).eval(), WithBaseline(ENERGY, seed=1).eval()
    plain = Symmetrizer(backbone, ECSE())(from_ase(ALL["ethanol"]))["energy"]
    backbone.constant, auxiliary.constant = -1000.0, -50.0
    n = len(ALL["ethanol"])
    shifted = Symmetrizer(backbone, ECSE())(from_ase(ALL["ethanol"]))["energy"]
    assert abs(shifted - plain + 1000.0 * n) < 1e-10
    # On a line only the auxiliary model speaks, with the constant that it was made with.
    linear = from_ase(ALL["CO2"])
    expected = Symmetrizer(auxiliary, Identity())(linear)["energy"]
    assert abs(Symmetrizer(backbone, ECSE(fallback=auxiliary))(linear)["energy"] - expected) < 1e-10


def test_auxiliary_model_has_to_declare_the_same():
    other = ToyGlobal({"energy": OutputSpec("0e", per="structure")})
    with pytest.raises(DeclarationError, match="fallback: expected an output 'energy'"):
        Symmetrizer(ToyLocal(ENERGY), ECSE(fallback=other))


def test_float32_keeps_the_precision_of_a_large_baseline():
    backbone = WithBaseline(ENERGY).to(torch.float32).eval()
    backbone.constant = -1e5
    out = Symmetrizer(backbone, ECSE())(from_ase(ALL["ethanol"], dtype=torch.float32))
    bare = Symmetrizer(ToyLocal(ENERGY).to(torch.float32).eval(), ECSE())(from_ase(ALL["ethanol"], dtype=torch.float32))
    assert out["energy"].dtype == torch.float64 and bare["energy"].dtype == torch.float32
    assert abs(out["energy"] + 1e5 * len(ALL["ethanol"]) - bare["energy"]) < 1e-6


def test_frames_and_weights_can_be_scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(stratify)
    vectors = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = (
        vectors,
        torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.ones(24, dtype=torch.float64),
        torch.tensor([0, 10, 10, 24]),
        *(0.15, 0.45, 8, True, 1e-28, 1e-6, 1e-10),
    )
    for expected, got in zip(stratify(*arguments), scripted(*arguments), strict=True):
        assert torch.equal(expected, got)
