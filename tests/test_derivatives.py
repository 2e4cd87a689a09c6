"""Forces and stress are the gradient of the energy, through frames and weights; Hessians are symmetric; no NaN."""

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase
from symmetrize.data import replace
from symmetrize.testing import conservative, geometries, measure_forces_fd, measure_hessian_symmetry

ENERGY = {"energy": OutputSpec("0e", reduce="sum")}
ALL = geometries()
FINITE = {name: atoms for name, atoms in ALL.items() if not atoms.pbc.any()}


def make(kind: str) -> Symmetrizer:
    if kind == "structure":
        return Symmetrizer(ToyGlobal({"energy": OutputSpec("0e", per="structure")}), ECSE()).eval()
    hops = 1 if kind == "atom" else 2
    # Gentle enough for finite differences to resolve 1e-7 of the force.
    return Symmetrizer(ToyLocal(ENERGY, cutoff=6.0 if hops == 1 else 4.0, n_hops=hops), ECSE(), scope="atom").eval()


@pytest.mark.parametrize("kind", ["atom", "two-hop", "structure"])
def test_forces_equal_finite_differences(kind):
    f = make(kind)
    names = ["ethanol", "chiral center", "water", "CO2", "HCN", "methane", "benzene", "near-linear"]
    batch = from_ase([atoms for name, atoms in FINITE.items() if name in names])
    found = measure_forces_fd(conservative(f), batch, n_directions=3, step=1e-4)["forces"]
    assert found.relative < 1e-7, str(found)


def test_stress_equals_finite_differences_and_is_symmetric():
    f = make("atom")
    batch = from_ase([ALL["rattled silicon"], ALL["triclinic crystal"], ALL["fcc Al"]])
    found = measure_forces_fd(conservative(f, stress=True), batch, stress=True, n_directions=2, step=4e-4)
    assert found["stress"].relative < 1e-7, str(found["stress"])
    stress = f(batch, stress=True)["stress"]
    assert torch.equal(stress, stress.transpose(1, 2))


def test_forces_through_constant_frames_are_not_the_gradient():
    """Twin: weights and frames held constant give forces that finite differences refute."""

    class Frozen(ECSE):
        def frames(self, batch, **options):
            with torch.no_grad():
                return super().frames(batch, **options)

    f = Symmetrizer(make("atom").backbone, Frozen()).eval()
    assert measure_forces_fd(conservative(f), from_ase(ALL["ethanol"]), n_directions=3)["forces"].relative > 1e-3


@pytest.mark.parametrize("kind", ["atom", "structure"])
def test_hessian_is_symmetric(kind):
    f = make(kind)
    batch = from_ase(ALL["ethanol"])

    def forces(pos):
        return f(replace(batch, pos=pos), forces=True, create_graph=True)["forces"]

    n = batch.pos.numel()
    hessian = -torch.autograd.functional.jacobian(forces, batch.pos).reshape(n, n)
    assert (hessian - hessian.T).abs().max() < 1e-11 * hessian.abs().max()
    # It is also the derivative of the forces as finite differences see it.
    assert measure_hessian_symmetry(conservative(f), batch, n_pairs=2).relative < 1e-6


@pytest.mark.parametrize("kind", ["atom", "two-hop", "structure"])
def test_gradients_are_finite_on_every_geometry(kind):
    """First and second derivatives, bonds along coordinate axes and exactly collinear structures included."""
    f = make(kind)
    batch = from_ase(list((FINITE if kind == "structure" else ALL).values()))
    pos = batch.pos.clone().requires_grad_()
    forces = f(replace(batch, pos=pos), forces=True)["forces"]
    assert torch.isfinite(forces).all()
    second = torch.autograd.grad(forces.square().sum(), pos)[0]
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0


def test_gradients_of_tensors_are_finite_and_right():
    """Derivatives of vectors and tensors (Born charges, Raman) go through the Wigner matrices."""
    outputs = {"dipole": OutputSpec("1o", reduce="sum"), "alpha": OutputSpec("0e + 2e", reduce="sum")}
    f = Symmetrizer(ToyLocal(outputs, cutoff=6.0), ECSE()).eval()
    batch = from_ase([ALL["water"], ALL["CO2"], ALL["bonds along the axes"]])

    def flat(pos):
        out = f(replace(batch, pos=pos))
        return torch.cat([out["dipole"].flatten(), out["alpha"].flatten()])

    jacobian = torch.autograd.functional.jacobian(flat, batch.pos)
    direction = torch.randn(batch.pos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 2e-4
    with torch.no_grad():
        numeric = (
            8 * (flat(batch.pos + h * direction) - flat(batch.pos - h * direction))
            - (flat(batch.pos + 2 * h * direction) - flat(batch.pos - 2 * h * direction))
        ) / (12 * h)
    analytic = (jacobian * direction).sum(dim=(1, 2))
    assert torch.allclose(numeric, analytic, rtol=0, atol=1e-6 * float(analytic.abs().max()))
