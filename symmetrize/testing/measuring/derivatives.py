"""Conservative forces and stress against finite differences of the energy, and the symmetry of the Hessian.

Derivatives along random directions, one per structure at a time: all structures of a batch are moved at once, since
the energy of one does not depend on the others. Central differences with one step of Richardson extrapolation,
:math:`D = [4 D(h/2) - D(h)] / 3`, whose error is O(h^4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import validate
from symmetrize.errors import BackboneOutputError, InvalidInputError
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing.measuring.elements import copied, moved_to
from symmetrize.testing.measuring.scales import Model


@dataclass(frozen=True)
class DerivativeError:
    """Differences between derivatives and their finite-difference estimates.

    Attributes
    ----------
    name : str
    errors : Tensor of shape (n_directions, n_structures), float64
        Absolute, per component: the error of a derivative along a direction of standard normal components has, over
        directions, the RMS of the error vector's norm, and is divided by the square root of its length. inf where a
        value is not finite.
    scale : float
        RMS component of what is checked (forces, stress, Hessian times direction).
    uncertainty : float
        Of the finite differences themselves, on the same scale as ``relative``: rounding and step size.
    """

    name: str
    errors: Tensor
    scale: float
    uncertainty: float

    @property
    def relative(self) -> float:
        """Largest error over ``scale``; infinite where the scale is 0 or not finite."""
        largest = float(self.errors.max()) if self.errors.numel() else math.inf
        return largest / self.scale if math.isfinite(largest) and 0.0 < self.scale < math.inf else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.relative:.3g} (finite differences: {self.uncertainty:.1g}), "
            f"scale {self.scale:.3g}"
        )


def conservative(model: Callable[..., dict[str, Tensor]], *, energy: str = "energy", stress: bool = False) -> Model:
    """``batch -> model(batch, forces=True, stress=stress, energy=energy)``."""

    def f(batch: Data) -> dict[str, Tensor]:
        return model(batch, forces=True, stress=stress, energy=energy)

    return f


def measure_forces_fd(
    f: Model,
    batch: Data,
    *,
    energy: str = "energy",
    stress: bool = False,
    n_directions: int = 6,
    step: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, DerivativeError]:
    r"""Forces :math:`-\partial E/\partial x` and stress :math:`\partial E/\partial\epsilon / V` by finite differences.

    Parameters
    ----------
    f : callable
        Returns ``energy`` with one row per structure, ``"forces"`` and, with ``stress``, ``"stress"`` (see
        `conservative`).
    batch : Data
        For stress, all structures have to be periodic in three directions.
    step : float, optional
        Unit of the positions; the strains are a fifth of it. By default 5e-4 in float64, and 5e-2 in float32, where
        no more than two or three digits can be checked.
    generator : torch.Generator, optional
        Of the directions; seed 0 by default.

    Returns
    -------
    dict of str to DerivativeError
        ``"forces"`` and, with ``stress``, ``"stress"``.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    h = _step(batch, step)
    reference = f(copied(batch))
    structure, n_structures = batch[keys.BATCH].cpu(), batch[keys.PTR].shape[0] - 1
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    forces = take_rows(reference, "forces", (len(pos), 3))
    lengths = 3.0 * torch.bincount(structure, minlength=n_structures)

    def energies(changed: Batch) -> Tensor:
        return take_rows(f(copied(changed)), energy, (n_structures,))

    def moved(direction: Tensor, s: float) -> Tensor:
        return energies(moved_to(batch, (pos + s * direction).to(_device(batch))))

    errors, doubts = [], []
    for _ in range(n_directions):
        direction = torch.randn(pos.shape, dtype=torch.float64, generator=generator)
        analytic = -segment_sum((forces * direction).sum(dim=1), structure, n_structures)
        numeric, doubt = _richardson(partial(moved, direction), h)
        errors.append((numeric - analytic).abs() / lengths.sqrt())
        doubts.append(doubt / lengths.sqrt())
    out = {"forces": _result("forces", errors, doubts, forces)}
    if stress:
        out["stress"] = _stress_fd(energies, reference, batch, n_directions, h / 5.0, generator)
    return out


def _stress_fd(
    energies: Callable[[Batch], Tensor],
    reference: dict[str, Tensor],
    batch: Batch,
    n_directions: int,
    h: float,
    generator: torch.Generator,
) -> DerivativeError:
    if not bool(batch[keys.PBC].all()):
        raise InvalidInputError("measure_forces_fd: stress needs structures that are periodic in three directions")
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    cell = batch[keys.CELL].detach().to("cpu", torch.float64)
    structure, n_structures = batch[keys.BATCH].cpu(), len(cell)
    volume = torch.linalg.det(cell).abs()
    values = take_rows(reference, "stress", (n_structures, 3, 3))
    errors, doubts = [], []
    for _ in range(n_directions):
        noise = torch.randn(n_structures, 3, 3, dtype=torch.float64, generator=generator)
        strain = 0.5 * (noise + noise.transpose(1, 2))

        def strained(s: float, strain: Tensor = strain) -> Tensor:
            deformation = torch.eye(3, dtype=torch.float64) + s * strain
            moved = torch.einsum("na,nab->nb", pos, deformation[structure])
            return energies(moved_to(batch, moved.to(_device(batch)), (cell @ deformation).to(_device(batch))))

        numeric, doubt = _richardson(strained, h)
        errors.append((numeric / volume - (values * strain).sum(dim=(1, 2))).abs() / 3.0)
        doubts.append(doubt / volume / 3.0)
    # A symmetric strain cannot see an antisymmetric part: it is an error in itself.
    errors.append((values - values.transpose(1, 2)).abs().amax(dim=(1, 2)) / 2.0)
    return _result("stress", errors, doubts, values)


def measure_hessian_symmetry(
    f: Model,
    batch: Data,
    *,
    n_pairs: int = 4,
    step: float | None = None,
    generator: torch.Generator | None = None,
) -> DerivativeError:
    r"""Curl of the forces, :math:`w \cdot H v - v \cdot H w` for random directions, H by differences of ``"forces"``.

    Zero when the forces are the gradient of something, whatever the model says the energy is.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    h = _step(batch, step)
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    structure, n_structures = batch[keys.BATCH].cpu(), batch[keys.PTR].shape[0] - 1
    lengths = 3.0 * torch.bincount(structure, minlength=n_structures)

    def forces(direction: Tensor, s: float) -> Tensor:
        return take_rows(f(copied(moved_to(batch, (pos + s * direction).to(_device(batch))))), "forces", (len(pos), 3))

    errors, doubts, products = [], [], []
    for _ in range(n_pairs):
        v, w = torch.randn((2, *pos.shape), dtype=torch.float64, generator=generator)
        (hv, doubt_v), (hw, doubt_w) = (_richardson(partial(forces, x), h) for x in (v, w))
        curl = segment_sum((w * hv - v * hw).sum(dim=1), structure, n_structures)
        errors.append(curl.abs() / lengths.sqrt())
        doubts.append(torch.stack([doubt_v.max(), doubt_w.max()]))
        products.append(hv)
    return _result("hessian symmetry", errors, doubts, torch.cat(products))


def _step(batch: Batch, step: float | None) -> float:
    if step is not None:
        return step
    return 5e-4 if batch[keys.POS].dtype == torch.float64 else 5e-2


def _device(batch: Batch) -> torch.device:
    return batch[keys.POS].device


def take_rows(result: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """One output in float64 on the CPU, or an error that names it."""
    if name not in result:
        raise BackboneOutputError(f"{name}: expected among the outputs, got {sorted(result)}")
    value = result[name]
    if value.shape == (*shape, 1):
        value = value[..., 0]  # scalars often come as columns
    if value.shape != shape:
        raise BackboneOutputError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    return value.detach().to("cpu", torch.float64)


def _richardson(value: Callable[[float], Tensor], h: float) -> tuple[Tensor, Tensor]:
    """Derivative at 0, and how far it is from the next better one (an upper bound of its error)."""
    plus, minus = [value(h), value(h / 2), value(h / 4)], [value(-h), value(-h / 2), value(-h / 4)]
    d = [(a - b) / (2.0 * h / 2**k) for k, (a, b) in enumerate(zip(plus, minus, strict=True))]
    coarse, fine = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
    return fine, (fine - coarse).abs()


def _result(name: str, errors: list[Tensor], doubts: list[Tensor], values: Tensor) -> DerivativeError:
    stacked = torch.stack(errors)
    # Finite check first: a NaN is an infinite error.
    stacked = torch.where(torch.isfinite(stacked), stacked, torch.full_like(stacked, math.inf))
    scale = float(values.square().mean().sqrt()) if values.numel() else 0.0
    numbers: Any = torch.stack([d.max() for d in doubts])
    doubt = float(numbers.max())
    return DerivativeError(name, stacked, scale, doubt / scale if scale > 0.0 else math.inf)
