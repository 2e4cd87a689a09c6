"""Work around closed loops and conservation laws: forces of an energy pass, forces with a curl and kinks do not."""

from __future__ import annotations

import math

import pytest
import torch
from symmetrize.backbones.toy import ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase
from symmetrize.data import with_neighbors
from symmetrize.errors import BackboneOutputError, InvalidInputError
from symmetrize.testing import conservative, geometries, split
from symmetrize.testing.measuring.dynamics import measure_closed_loops, measure_nve

ALL = geometries()
NAMES = ("ethanol", "rattled carbon", "two N2, skew and near")
BATCH = from_ase([ALL[name] for name in NAMES])
AXIS = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)


def toy(method, dtype=torch.float64):
    backbone = ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=4.0, seed=3)
    return conservative(Symmetrizer(backbone.to(dtype), method, scope="atom").eval())


SYMMETRIZED, BARE = toy(ECSE()), toy(Identity())


def springs(batch, length=1.4, kink=None, offset=0.0):
    """Springs between all pairs of atoms of a structure; with a kink, forces that jump at a distance."""
    pos = batch.pos.detach().requires_grad_()
    energy = []
    for first, last in zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True):
        d = torch.nn.functional.pdist(pos[first:last])
        pairs = 0.5 * (d - length) ** 2
        energy.append((pairs if kink is None else pairs + 3.0 * (kink - d).clamp(min=0.0)).sum())
    total = torch.stack(energy)
    return {"energy": total.detach() + offset, "forces": -torch.autograd.grad(total.sum(), pos)[0]}


def curl(f, size):
    """Forces that swirl about an axis of the laboratory."""

    def swirled(batch):
        result = f(batch)
        return {**result, "forces": result["forces"] + size * torch.linalg.cross(AXIS.expand_as(batch.pos), batch.pos)}

    return swirled


# --- closed loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [springs, BARE], ids=["springs", "bare"])
def test_forces_of_an_energy_do_no_work_on_closed_loops(f):
    found = measure_closed_loops(f, BATCH)
    assert found.work.shape == found.uncertainty.shape == (3, 3) and found.structures.shape == found.scale.shape == (3,)
    assert found.relative < 1e-12 and found.relative_uncertainty < 1e-8, str(found)


def test_symmetrized_forces_do_no_work_either():
    """Weights of coordinate systems vary over short distances: small loops with more points."""
    found = measure_closed_loops(SYMMETRIZED, BATCH, n_loops=1, size=0.03, n_points=64)
    assert found.relative < 1e-5 and found.relative <= 4 * found.relative_uncertainty + 1e-12
    rough = measure_closed_loops(SYMMETRIZED, BATCH, n_loops=1, size=0.03, n_points=16, max_points=16)
    assert rough.n_points == 16 and found.n_points > 16
    assert found.relative_uncertainty < 0.1 * rough.relative_uncertainty


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_a_curl_is_found_in_proportion(size):
    found = measure_closed_loops(curl(springs, size), BATCH)
    twice = measure_closed_loops(curl(springs, 2 * size), BATCH)
    assert float(found.structures.min()) > 1e-3 * size and found.relative > 1e3 * found.relative_uncertainty
    assert torch.allclose(twice.work, 2 * found.work, rtol=1e-3)
    # The work is that of Stokes' theorem: quadratic in the size of the loop.
    small = measure_closed_loops(curl(springs, size), BATCH, size=0.05)
    assert torch.allclose(4 * small.work, found.work, rtol=1e-6, atol=1e-12)


def test_loops_tell_structures_apart_and_refuse_constants():
    shear = lambda b: {  # noqa: E731
        "forces": springs(b)["forces"] + 0.1 * torch.roll(b.pos, 1, 1) * (b.z == 6)[:, None]
    }
    carbon = measure_closed_loops(shear, from_ase([ALL["two N2, skew and near"], ALL["rattled carbon"]]))
    assert float(carbon.structures[0]) < 1e-12 and float(carbon.structures[1]) > 1e-5
    assert measure_closed_loops(springs, split(BATCH)[0], n_loops=1).work.shape == (1, 1)
    nothing = measure_closed_loops(lambda b: {"forces": 0.0 * b.pos}, BATCH)
    broken = measure_closed_loops(lambda b: {"forces": math.nan * b.pos}, BATCH)
    assert nothing.relative == broken.relative == math.inf


def test_no_call_is_too_large():
    seen = []

    def counting(batch):
        seen.append(len(batch.ptr) - 1)
        return springs(batch)

    measure_closed_loops(counting, BATCH, n_loops=9)
    assert max(seen) <= 256 and len(seen) < 12


def test_unusable_loops():
    for options in ({"n_points": 31}, {"n_points": 2}, {"n_loops": 0}, {"size": 0.0}):
        with pytest.raises(InvalidInputError, match="measure_closed_loops"):
            measure_closed_loops(springs, BATCH, **options)
    with pytest.raises(BackboneOutputError, match="push"):
        measure_closed_loops(springs, BATCH, forces="push")


# --- constant energy ----------------------------------------------------------------------------------------------


def test_springs_conserve_everything():
    found = measure_nve(springs, from_ase([ALL[name] for name in ("ethanol", "methane", "CO2")]), n_steps=60)
    assert found.orders == pytest.approx(torch.full((3,), 2.0), abs=0.1) and found.order > 1.9
    assert found.relative < 1e-4 < float(found.fluctuation.max()) < 0.05
    assert found.relative_drift < 1e-2
    assert found.relative_momentum < 1e-12 and found.relative_angular_momentum < 1e-12, str(found)


def test_symmetrized_model_conserves_everything():
    found = measure_nve(SYMMETRIZED, BATCH, n_steps=30)
    assert found.orders == pytest.approx(torch.full((3,), 2.0), abs=0.3), str(found)
    assert found.relative < 1e-2 * float(found.fluctuation[1].max()) + 1e-4
    assert found.relative_momentum < 1e-12 and found.relative_angular_momentum < 1e-12
    assert torch.isnan(found.angular_momentum).tolist() == [False, True, False]


def test_bare_backbone_conserves_energy_but_not_angular_momentum():
    found = measure_nve(BARE, BATCH, n_steps=30)
    assert found.order > 1.7 and found.relative_momentum < 1e-12
    assert found.relative_angular_momentum > 1e-2


@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_a_curl_drifts_whatever_the_time_step(size):
    exact = measure_nve(springs, BATCH, n_steps=40)
    found = measure_nve(curl(springs, size), BATCH, n_steps=40)
    assert found.relative > max(10 * exact.relative, 1e-2 * size)
    assert found.relative_momentum > 1e-3 * size and found.relative_angular_momentum > 1e-3 * size
    if size > 1e-2:
        assert found.order < 0.5 and found.relative_drift > 1e-3


def test_energy_of_other_forces_is_found():
    def wrong(batch):
        result = springs(batch)
        return {**result, "energy": 1.01 * result["energy"]}

    found = measure_nve(wrong, BATCH, n_steps=40)
    assert found.relative > 1e-3 and found.relative_momentum < 1e-12
    broken = measure_nve(lambda b: {k: math.nan * v for k, v in springs(b).items()}, BATCH, n_steps=4)
    nothing = measure_nve(lambda b: {k: 0.0 * v for k, v in springs(b).items()}, BATCH, n_steps=4)
    assert broken.relative == nothing.relative == math.inf
    assert broken.relative_momentum == broken.relative_drift == math.inf and not broken.order > 1.0


def test_a_kink_lowers_the_order():
    """A pair that collides at a jump of the force: the energy error is of first order there."""
    batch = from_ase(ALL["CO2"])
    smooth = measure_nve(springs, batch, n_steps=60)
    kinked = [measure_nve(lambda b: springs(b, kink=k), batch, n_steps=60) for k in (1.16, 2.32)]  # noqa: B023
    assert smooth.order > 1.9 and min(found.order for found in kinked) < 1.5
    assert max(found.relative for found in kinked) > 100 * smooth.relative


def test_floor_and_units():
    """Rounding of a large offset hides the integrator's error; no unit matters, nor does the mass."""
    batch = from_ase([ALL["ethanol"], ALL["CO2"]])
    plain = measure_nve(springs, batch, n_steps=20)
    assert bool((plain.fluctuation[1] > 1e6 * plain.floor).all())
    offset = measure_nve(lambda b: springs(b, offset=1e13), batch, n_steps=20)
    assert bool((offset.fluctuation[1] < 10 * offset.floor).all()) and math.isnan(offset.order)
    scaled = measure_nve(lambda b: {k: 1e6 * v for k, v in springs(b).items()}, batch, n_steps=20)
    heavy = measure_nve(springs, batch, n_steps=20, masses=torch.full((12,), 9.0))
    for other in (scaled, heavy):
        assert torch.allclose(other.fluctuation, plain.fluctuation, rtol=1e-3)
    assert torch.allclose(heavy.time_step, 3 * plain.time_step, rtol=1e-3)


def test_float32_and_neighbor_lists():
    batch = with_neighbors(from_ase([ALL[name] for name in NAMES], dtype=torch.float32), 4.0)
    found = measure_nve(toy(ECSE(), torch.float32), batch, n_steps=10)
    assert found.dtype == torch.float32 and found.relative_angular_momentum < 1e-4 and found.relative_momentum < 1e-4
    assert 1e-8 < float(found.floor.max()) < 1e-2


def test_unusable_runs():
    for options, message in (
        ({"n_steps": 3}, "n_steps"),
        ({"excursion": 0.0}, "excursion"),
        ({"masses": torch.ones(2)}, "masses"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            measure_nve(springs, BATCH, **options)
    with pytest.raises(InvalidInputError, match="structure 1 has one"):
        measure_nve(springs, from_ase([ALL["CO2"], ALL["isolated atom"]]))
    with pytest.raises(BackboneOutputError, match="enthalpy"):
        measure_nve(springs, BATCH, energy="enthalpy")
