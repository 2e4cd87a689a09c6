r"""How much of a model's output depends on the orientation of its input: sizes of broken equivariance, no verdicts.

Everything here looks at :math:`F(g) = \rho(g)^{-1} f(g x)`, which is the same for every g when f is equivariant: its
variance over the group and how that is spread over degrees, its change with the angle of a rotation, its derivative,
what it costs in accuracy, and its largest deviation over a dense cover of the orientations. Rotated copies of a batch
are evaluated many at a time. Non-finite outputs count as infinite errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.data import validate
from symmetrize.errors import DeclarationError, InvalidInputError, did_you_mean
from symmetrize.ops.quadrature import orientation_cover, rotation_quadrature
from symmetrize.ops.ragged import segment_sum
from symmetrize.ops.rotations import about_axis, random_rotations
from symmetrize.ops.wigner import handedness, wigner
from symmetrize.representations import OutputSpec, check_group
from symmetrize.testing.measuring.measures import Deviation, Measurement, Scales
from symmetrize.testing.measuring.orbits import (
    applied,
    both_parities,
    changes_over,
    errors_of,
    orbit,
    relative,
    returned,
    structure_mean,
    where_finite,
)
from symmetrize.testing.measuring.scales import Model, Scale, Values, evaluate, resolve_scale


@dataclass(frozen=True)
class Spectrum:
    """Distribution of F over the group, of one output. Squares are means over the rows of a structure and components.

    Attributes
    ----------
    name : str
    mean : Tensor of shape (n_rows, *shape), float64
        Mean of F over the group: the symmetrized output.
    variance : Tensor of shape (n_structures,), float64
        V = E|F|^2 - |E F|^2.
    power : Tensor of shape (n_structures, l_max + 1, n_parities), float64
        Part of E|F|^2 in the Wigner functions of each degree, even and (for O(3)) odd under inversion. The entry
        l = 0, even is the square of ``mean``; all others are broken equivariance and belong to V.
    remainder : Tensor of shape (n_structures,), float64
        Rest of V, of degrees above l_max: ``power`` and ``remainder`` add up to E|F|^2.
    scale : Scale
    degree : int
        Of the quadrature.
    n_elements : int
        Group elements that were evaluated.
    """

    name: str
    mean: Tensor
    variance: Tensor
    power: Tensor
    remainder: Tensor
    scale: Scale
    degree: int
    n_elements: int

    @property
    def relative(self) -> float:
        """Standard deviation per component, over the group and all structures, on the error scale."""
        return self.scale.relative(math.sqrt(float(self.variance.mean())))

    def __str__(self) -> str:
        deviation = math.sqrt(float(self.variance.mean()))
        return (
            f"{self.name}: standard deviation {deviation:.3g} = {self.relative:.3g} x scale {self.scale.value:.3g} "
            f"({self.scale.kind}), {self.n_elements} elements"
        )


@dataclass(frozen=True)
class AngleDependence:
    """Change of F with the angle of a rotation, of one output, on the error scale.

    Attributes
    ----------
    name : str
    angles : Tensor of shape (n_angles,), float64
        From 0 to pi.
    rms, max : Tensor of shape (n_angles,), float64
        RMS and largest component of F(g) - F(1) over axes and structures, over ``scale``.
    scale : Scale
    """

    name: str
    angles: Tensor
    rms: Tensor
    max: Tensor
    scale: Scale


@dataclass(frozen=True)
class LieDerivative:
    """Derivative of F along rotations, of one output.

    Attributes
    ----------
    deviation : Deviation
        Sizes of the derivative, in the unit of the output per radian; a case is a lab axis at an orientation.
    uncertainty : float
        Of the finite differences themselves, on the error scale: rounding and step size.
    """

    deviation: Deviation
    uncertainty: float


@dataclass(frozen=True)
class NetForce:
    r"""Spurious net force and torque of predicted forces.

    Attributes
    ----------
    force : Tensor of shape (n_structures, 3), float64
        :math:`\sum_i F_i`.
    relative_force : Tensor of shape (n_structures,), float64
        Its norm over :math:`\sqrt n\,\mathrm{RMS}|F|`: about 1 where the forces are independent random vectors.
    finite : Tensor of shape (n_finite,)
        Structures that have a torque: not periodic in any direction, and of two or more atoms.
    torque : Tensor of shape (n_finite, 3), float64
        :math:`\sum_i (r_i - \bar r) \times F_i`.
    relative_torque : Tensor of shape (n_finite,), float64
        Its norm over :math:`\sqrt n\,\mathrm{RMS}|F|\,\mathrm{RMS}|r - \bar r|`.
    scale : Scale
        Of the components of the forces: RMS|F| is sqrt(3) times its value.
    """

    force: Tensor
    relative_force: Tensor
    finite: Tensor
    torque: Tensor
    relative_torque: Tensor
    scale: Scale


@dataclass(frozen=True)
class LossShare:
    """Share of broken equivariance in the mean squared error of one output.

    Attributes
    ----------
    name : str
    share : float
        Variance of F over mean squared error. Sampled with n orientations it can be up to n / (n - 1).
    rmse : float
        Of the model as it is, over random orientations, rows and components, in the unit of the output.
    rmse_symmetrized : float
        Estimate for the model averaged over the whole group; 0 where sampling makes its square negative.
    deviation : float
        Standard deviation of F.
    standard_error : float or None
        Of ``share``, from its variation between structures; None for a single one.
    """

    name: str
    share: float
    rmse: float
    rmse_symmetrized: float
    deviation: float
    standard_error: float | None


def measure_orientation_variance(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    degree: int = 9,
    l_max: int = 4,
    scale: Scales | None = None,
) -> dict[str, Spectrum]:
    r"""Mean and variance of F over the group by quadrature, and the degrees that the variance consists of.

    .. math:: P_{l,\pm} = (2l+1) \sum_{mm'} \Big| \int D^l_{mm'}(g) \tfrac12 [F(g) \pm F(-g)] dg \Big|^2

    over rotations g; for SO(3) there is no parity. `rotation_quadrature` of an output that consists of degrees up to B
    is exact for V where 2 B is at most ``degree``, and for :math:`P_l` where l + B is: by default, 380 rotations (twice
    as many elements of O(3)), B = 4 and 5. Components of higher degree are not lost but aliased: they add to V what
    their values at the points amount to, and to the power of degrees from ``degree`` - B + 1 on. A ``remainder`` that
    is not small compared with the power at l_max says that ``degree`` should be higher; 17, with l_max = 8, takes 1980
    rotations. Within the quadrature the parts add up exactly, and none is negative. Everything is accumulated relative
    to F(1), so that a large constant costs no digits.

    Parameters
    ----------
    f : callable
    batch : Data
    outputs : dict of str to OutputSpec
    group : {"O(3)", "SO(3)"}
    vectors : dict of str to str, optional
        Further fields that rotate, as field name -> e3nn irreps.
    degree : int
        Of the quadrature, at least twice ``l_max``.
    l_max : int
        At most 11.
    scale : dict of str to Scale or float, optional
        Error scales; by default `error_scale` of this batch.
    """
    if not (0 <= l_max <= 11 and 2 * l_max <= degree):
        raise InvalidInputError(f"l_max: expected 0 to 11 and at most degree / 2 = {degree / 2:g}, got {l_max}")
    rotations, weights = rotation_quadrature(degree)
    elements = both_parities(rotations, group)
    n_parities = len(elements) // len(rotations)
    weights = weights.repeat(n_parities) / n_parities
    batch = validate(batch)
    n_structures = batch[keys.PTR].shape[0] - 1
    reference = evaluate(f, batch, outputs)
    degrees = torch.arange(l_max + 1)
    of_degree = torch.repeat_interleave(degrees, (2 * degrees + 1) ** 2)
    integrals = {name: torch.zeros((), dtype=torch.float64) for name in reference}
    squares = {name: torch.zeros((), dtype=torch.float64) for name in reference}
    first = 0
    for some, rows in orbit(f, batch, outputs, elements, vectors):
        weight = weights[first : first + len(some)]
        first += len(some)
        basis = torch.cat([wigner(l, some).flatten(1) for l in range(l_max + 1)], dim=1)
        # Odd functions are those of the rotation times the determinant.
        basis = torch.cat([basis, handedness(some)[:, None] * basis][:n_parities], dim=1)
        for name, value in reference.items():
            change = (returned(value.spec, rows[name], some) - value.rows).reshape(len(some), len(value.rows), -1)
            squares[name] = squares[name] + torch.einsum("k,kn->n", weight, change.square().mean(dim=2))
            integrals[name] = integrals[name] + (weight[:, None] * basis).T @ change.flatten(1)
    scales = resolve_scale(f, batch, outputs, reference, scale)
    out = {}
    for name, value in reference.items():
        found = integrals[name].reshape(n_parities, len(of_degree), len(value.rows), -1)
        mean = value.rows + found[0, 0].reshape(value.rows.shape)
        power = segment_sum(found.square().mean(dim=3).transpose(0, 1), of_degree, l_max + 1).permute(2, 0, 1)
        power = power * (2.0 * degrees + 1.0)[:, None]
        variance = squares[name] - power[:, 0, 0]
        power[:, 0, 0] = 0.0
        remainder = variance - power.sum(dim=(1, 2))
        power[:, 0, 0] = mean.reshape(len(mean), -1).square().mean(dim=1)
        # Below zero only by rounding.
        variance, power, remainder = (
            where_finite(structure_mean(x, value.owner, n_structures)).clamp(min=0.0)
            for x in (variance, power, remainder)
        )
        out[name] = Spectrum(
            name, where_finite(mean), variance, power, remainder, scales[name], degree, n_elements=len(elements)
        )
    return out


def measure_angle_dependence(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    n_angles: int = 13,
    n_axes: int = 4,
    vectors: dict[str, str] | None = None,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> dict[str, AngleDependence]:
    """RMS and largest F(g) - F(1) for rotations by ``n_angles`` angles from 0 to pi about ``n_axes`` random axes.

    Further parameters as in `measure_orientation_variance`; ``generator`` is for the axes, seed 0 by default.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    reference = evaluate(f, batch, outputs)
    axes = torch.randn(n_axes, 3, dtype=torch.float64, generator=generator)
    angles = torch.linspace(0.0, math.pi, n_angles, dtype=torch.float64)
    elements = about_axis(axes.repeat_interleave(n_angles, dim=0), angles.repeat(n_axes))
    scales = resolve_scale(f, batch, outputs, reference, scale)
    out = {}
    for name, changes in changes_over(f, batch, outputs, elements, reference, vectors).items():
        largest, rms = errors_of(changes, reference[name].owner, batch)
        largest = largest.reshape(n_axes, n_angles, -1).amax(dim=(0, 2))
        rms = rms.reshape(n_axes, n_angles, -1).square().mean(dim=(0, 2)).sqrt()
        s = scales[name]
        out[name] = AngleDependence(name, angles, relative(rms, s), relative(largest, s), s)
    return out


def measure_lie_derivative(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    group: str = "O(3)",
    n_orientations: int = 4,
    step: float | None = None,
    vectors: dict[str, str] | None = None,
    generator: torch.Generator | None = None,
    scale: Scales | None = None,
) -> dict[str, LieDerivative]:
    r"""Derivative :math:`\partial_\theta F(e^{\theta J_a} g)` at 0 about the lab axes a, at random orientations g.

    Central differences with one step of Richardson extrapolation, whose error is O(step^4). This is the Lie derivative
    of N. Gruver, M. Finzi, M. Goldblum and A. G. Wilson, The Lie derivative for measuring learned equivariance,
    ICLR 2023 (arXiv:2210.02984), at g x: zero everywhere exactly where F is constant on each component of the
    group. What it cannot see is a jump.

    Parameters
    ----------
    step : float, optional
        Radians; by default 2e-3 in float64 and 5e-2 in float32, where two or three digits are left.
    generator : torch.Generator, optional
        Of the orientations; seed 0 by default. Further parameters as in `measure_orientation_variance`.
    """
    improper = None if check_group(group) == "O(3)" else False
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    reference = evaluate(f, batch, outputs)
    h = step if step is not None else 2e-3 if batch[keys.POS].dtype == torch.float64 else 5e-2
    if not h > 0.0:
        raise InvalidInputError(f"step: expected a positive angle, got {h}")
    steps = torch.tensor([s * h / 2**k for k in range(3) for s in (1, -1)], dtype=torch.float64)
    axes = torch.eye(3, dtype=torch.float64)
    turns = torch.stack([about_axis(axes, angle.expand(3)) for angle in steps])
    orientations = random_rotations(n_orientations, generator, improper=improper)
    cases = tuple(f"about {axis}, orientation {k}" for k in range(n_orientations) for axis in "xyz")
    elements = (turns[:, None] @ orientations[None, :, None]).reshape(-1, 3, 3)
    scales = resolve_scale(f, batch, outputs, reference, scale)
    out = {}
    for name, changes in changes_over(f, batch, outputs, elements, reference, vectors).items():
        pairs = changes.reshape(3, 2, n_orientations * 3, *changes.shape[1:])
        d = [(plus - minus) / (2.0 * h / 2**k) for k, (plus, minus) in enumerate(pairs)]
        coarse, fine = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
        deviation = Deviation(name, cases, *errors_of(fine, reference[name].owner, batch), scales[name])
        doubt, _ = errors_of(fine - coarse, reference[name].owner, batch)
        out[name] = LieDerivative(deviation, scales[name].relative(float(doubt.max())))
    return out


def measure_torque(f: Model, batch: Data, *, forces: str = "forces", scale: Scale | float | None = None) -> NetForce:
    """Net force and torque of the output ``forces``: both vanish where forces are the gradient of an energy that
    neither translations nor rotations change.

    The torque refers to the mean position, and is left out for structures that are periodic in any direction, where
    there is none, and for single atoms.

    Raises
    ------
    InvalidInputError
        A ``center_mask`` leaves out atoms: nothing holds for the sum over a part of them.
    BackboneOutputError
        There is no such output of shape (n_atoms, 3).
    """
    batch = validate(batch)
    mask = batch.get(keys.CENTER_MASK)
    if mask is not None and not bool(mask.all()):
        raise InvalidInputError("center_mask: expected the forces on all atoms, some are left out")
    outputs = {forces: OutputSpec("1o")}
    reference = evaluate(f, batch, outputs)
    s = resolve_scale(f, batch, outputs, reference, None if scale is None else {forces: scale})[forces]
    rows, owner = reference[forces].rows, reference[forces].owner
    n_structures = batch[keys.PTR].shape[0] - 1
    counts = torch.bincount(owner, minlength=n_structures).to(torch.float64)
    pos = batch[keys.POS].detach().to("cpu", torch.float64)
    arm = pos - (segment_sum(pos, owner, n_structures) / counts[:, None])[owner]
    radius = (segment_sum(arm.square().sum(dim=1), owner, n_structures) / counts).sqrt()
    force = where_finite(segment_sum(rows, owner, n_structures))
    torque = where_finite(segment_sum(torch.linalg.cross(arm, rows), owner, n_structures))
    finite = ((counts > 1) & ~batch[keys.PBC].cpu().any(dim=1)).nonzero()[:, 0]
    relative_force = relative(force.norm(dim=1) / (3.0 * counts).sqrt(), s)
    relative_torque = relative(torque.norm(dim=1)[finite] / ((3.0 * counts).sqrt() * radius)[finite], s)
    return NetForce(force, relative_force, finite, torque[finite], relative_torque, s)


def measure_loss_share(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    references: Mapping[str, Tensor],
    *,
    n_elements: int = 24,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LossShare]:
    r"""Share of the mean squared error that is caused by broken equivariance, and the error without it.

    At the mean :math:`\bar F` of F over the group, :math:`E|F - y|^2 = |\bar F - y|^2 + V`: averaging the model over
    the group removes V and nothing else. With K independent Haar-random orientations, the same for all structures, V
    is estimated with K - 1 in the denominator and the mean squared error as the mean over orientations, both without
    bias for every K; so is their difference, the squared error of the averaged model.

    Parameters
    ----------
    references : dict of str to Tensor of shape (n_rows, *shape)
        True values for the batch as it is, of the outputs to be judged. They are compared as they are: an offset of the
        energy counts as an error.
    n_elements : int
        K, at least 2.
    generator : torch.Generator, optional
        Of the orientations; seed 0 by default. Further parameters as in `measure_orientation_variance`.

    Raises
    ------
    InvalidInputError
        A reference is not finite, or has another shape than the output.
    """
    if n_elements < 2:
        raise InvalidInputError(f"n_elements: expected two or more, got {n_elements}")
    improper = None if check_group(group) == "O(3)" else False
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch = validate(batch)
    values = evaluate(f, batch, outputs)
    targets: dict[str, Values] = {}
    for name, target in references.items():
        if name not in values:
            raise DeclarationError(f"references: unknown output {name!r}, {did_you_mean(name, values)}")
        value = values[name]
        if target.shape != value.rows.shape or not bool(torch.isfinite(target).all()):
            raise InvalidInputError(
                f"references: {name}: expected finite numbers of shape {tuple(value.rows.shape)}, "
                f"got shape {tuple(target.shape)}"
            )
        targets[name] = Values(value.spec, value.per, target.detach().to("cpu", torch.float64), value.owner)
    n_structures = batch[keys.PTR].shape[0] - 1
    elements = random_rotations(n_elements, generator, improper=improper)
    out = {}
    for name, errors in changes_over(f, batch, outputs, elements, targets, vectors).items():
        errors = errors.reshape(n_elements, errors.shape[1], -1)
        owner = targets[name].owner
        mse, variance = (
            where_finite(segment_sum(x, owner, n_structures))
            for x in (errors.square().mean(dim=(0, 2)), errors.var(dim=0).mean(dim=1))
        )
        out[name] = _loss_share(name, mse, variance, len(owner))
    return out


def _loss_share(name: str, mse: Tensor, variance: Tensor, n_rows: int) -> LossShare:
    """From sums over the rows of each structure."""
    a, b = float(variance.sum()), float(mse.sum())
    if not (math.isfinite(a) and math.isfinite(b)):
        return LossShare(name, math.inf, math.inf, math.inf, math.inf, None if len(mse) < 2 else math.inf)
    share, doubt = a / b if b > 0.0 else 0.0, None
    if (n := len(mse)) > 1:
        # Standard error of a ratio of two sums over independent structures.
        residual = float((variance - share * mse).square().sum())
        doubt = math.sqrt(n / (n - 1) * residual) / b if b > 0.0 else 0.0
    return LossShare(
        name, share, math.sqrt(b / n_rows), math.sqrt(max(0.0, b - a) / n_rows), math.sqrt(a / n_rows), doubt
    )


def measure_cover(
    f: Model,
    batch: Data,
    outputs: Mapping[str, OutputSpec],
    *,
    n: int = 1000,
    group: str = "O(3)",
    vectors: dict[str, str] | None = None,
    scale: Scales | None = None,
) -> Measurement:
    """Equivariance errors, as those of `measure_equivariance`, over ``n`` evenly spread rotations (`orientation_cover`)
    and, for O(3), the same ones times the inversion.

    What happens in a small part of the orientations only, such as where a frame or a sorted order jumps, is missed by a
    few random rotations; a ball of rotations of a measure of 4 / n or more is met with certainty, wherever it is.
    """
    elements = both_parities(orientation_cover(n), group)
    batch = validate(batch)
    reference = evaluate(f, batch, outputs)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in reference}
    for some, rows in orbit(f, batch, outputs, elements, vectors):
        for name, value in reference.items():
            expected = applied(value.spec, value.rows.expand(rows[name].shape), some)
            found[name].append(errors_of(rows[name] - expected, value.owner, batch))
    labels = [f"cover {k + 1} of {n}" for k in range(n)]
    labels = (labels + [f"{label}, inverted" for label in labels])[: len(elements)]
    scales = resolve_scale(f, batch, outputs, reference, scale)
    deviations = {}
    for name, errors in found.items():
        largest, rms = (torch.cat(x) for x in zip(*errors, strict=True))
        deviations[name] = Deviation(name, tuple(labels), largest, rms, scales[name])
    return Measurement("equivariance over a cover", deviations, batch[keys.POS].dtype)
