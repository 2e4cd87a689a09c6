"""How large is the broken symmetry, of what kind, and does it matter?"""

from __future__ import annotations

import math

from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.testing.checks.common import judged
from symmetrize.testing.measuring.elements import random_elements
from symmetrize.testing.measuring.layers import measure_layers
from symmetrize.testing.measuring.measures import measure_equivariance
from symmetrize.testing.measuring.orientation import (
    measure_angle_dependence,
    measure_cover,
    measure_lie_derivative,
    measure_loss_share,
    measure_orientation_variance,
    measure_torque,
)
from symmetrize.testing.measuring.scales import Model
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome


@check(
    "All orientations",
    claim="rotations",
    cost=lambda bench, on: bench.profile.n_cover,
)
def check_orientation_cover(bench: Bench, on: str) -> Outcome:
    """The first structure is equivariant in every orientation of an even cover, not only in a few.

    When it fails: if the other rotation checks pass, there is a patch of orientations in which the model is another
    one (a branch, a bin, an argmax over absolute directions).

    Number: as for rotations, over an even cover of SO(3) (super-Fibonacci spirals).
    """
    bench = bench.double()
    found = bench.part(bench.main, [0])
    measured = measure_cover(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        n=bench.profile.n_cover,
        group="SO(3)",
        vectors=dict(bench.subject.vectors),
        scale=bench.scale(bench.main),
    )
    return judged(measured, found, bench.limit(found))


@check(
    "Error relative to the bare model",
    claim=None,
    judged=False,
    cost=lambda bench, on: 2 * (bench.profile.n_elements + 1) * bench.main.n_structures,
    needs=lambda bench: "" if bench.subject.bare is not None else "no bare model to compare with",
)
def check_against_bare(bench: Bench, on: str) -> Outcome:
    """What symmetrisation has removed: the equivariance error over that of the same model without it.

    When it fails: this is recorded and cannot fail. A ratio near 1 says that the method does nothing for an output, or
    that the bare model had the symmetry already.

    Number: largest error over random elements of the claimed group, over the largest error of the bare model; the RMS
    errors of both on the error scale beside it.
    """
    found, subject = bench.main, bench.subject
    outputs = subject.declared(found.batch)
    elements = random_elements(bench.profile.n_elements, bench.generator("bare"), group=subject.judged_group)
    ours, bare = (
        measure_equivariance(f, found.batch, outputs, elements, vectors=dict(subject.vectors), scale=bench.scale(found))
        for f in (bench.model, _counted(bench, subject.bare or subject.model))
    )
    out = []
    for name in outputs:
        before, after = bare[name], ours[name]
        text = f"RMS {before.relative_rms:.2g} before, {after.relative_rms:.2g} after"
        if before.relative > 0.0:
            ratio = after.relative / before.relative
            out.append(Finding(name, ratio, unit="of the bare model's error", worst=text))
    return Outcome(tuple(out) or (Finding("outputs in which the bare model errs", 0.0, unit="outputs"),))


def _counted(bench: Bench, model: Model) -> Model:
    def f(batch: Data) -> dict[str, Tensor]:
        bench.count(int(batch[keys.PTR].shape[0] - 1))
        return model(batch)

    return f


@check(
    "Spectrum of the orientation dependence",
    claim=None,
    judged=False,
    cost=lambda bench, on: 2 * (1980 if bench.profile.degree > 9 else 380),
)
def check_orientation_spectrum(bench: Bench, on: str) -> Outcome:
    """Which degrees l and parities the dependence on orientation consists of.

    When it fails: this is recorded and cannot fail. Power in l = 1 is a preferred direction, in l = 2 and 4 the axes
    of a grid or of the cell, odd parts change sign under inversion; much power in high l means rapid wiggles.

    Number: orientation variance V = E|F|^2 - |E F|^2 of F(g) = rho(g)^-1 f(g x), as standard deviation on the error
    scale; its parts by character projection, P_l = (2l + 1) sum_mm' |int D^l_mm'(g) F(g) dg|^2, from a quadrature of
    SO(3) and its inverted copy.
    """
    found = bench.part(bench.main, [0])
    spectra = measure_orientation_variance(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        group="O(3)",
        vectors=dict(bench.subject.vectors),
        degree=bench.profile.degree,
        l_max=bench.profile.l_max,
        scale=bench.scale(bench.main),
    )
    out, shown = [], {}
    for name, spectrum in spectra.items():
        power = spectrum.power[0].clone()
        power[0, 0] = 0.0  # the symmetrised mean: no part of the variance
        size = spectrum.scale.value
        if not size > 0.0:
            continue
        amplitude = (power.clamp(min=0.0)).sqrt() / size
        largest = int(amplitude.argmax())
        l, odd = divmod(largest, amplitude.shape[1])
        kind = f"mostly l = {l}, {'odd' if odd else 'even'}"
        worst = f"{kind if spectrum.relative > bench.limit(found) else 'rounding'}, of {found.names[0]}"
        out.append(Finding(name, spectrum.relative, scale=size, worst=worst))
        shown[name] = {
            "even": amplitude[:, 0].tolist(),
            "odd": amplitude[:, 1].tolist() if amplitude.shape[1] > 1 else [],
        }
    plot = {
        "kind": "spectrum",
        "title": "orientation variance by degree",
        "outputs": shown,
        "limit": bench.limit(found),
    }
    return Outcome(tuple(out), (plot,))


@check(
    "Error against the angle",
    claim=None,
    judged=False,
    cost=lambda bench, on: bench.profile.n_angles * bench.profile.n_axes * min(3, bench.main.n_structures),
)
def check_angle_dependence(bench: Bench, on: str) -> Outcome:
    """How the error grows with the angle by which a structure is turned.

    When it fails: this is recorded and cannot fail. A line from the origin is a smooth dependence on orientation; a
    step at small angles is a jump or noise.

    Number: RMS over axes, structures and components of |rho(g)^-1 f(g x) - f(x)|, on the error scale.
    """
    found = bench.part(bench.main, range(min(3, bench.main.n_structures)))
    measured = measure_angle_dependence(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        n_angles=bench.profile.n_angles,
        n_axes=bench.profile.n_axes,
        vectors=dict(bench.subject.vectors),
        generator=bench.generator("angles"),
        scale=bench.scale(bench.main),
    )
    degrees: list[float] = []
    series, out = {}, []
    for name, one in measured.items():
        degrees = [180.0 * float(a) / math.pi for a in one.angles]
        series[name] = one.rms.tolist()
        worst = int(one.rms.argmax())
        out.append(
            Finding(
                name,
                float(one.max.max()),
                rms=float(one.rms[worst]),
                scale=one.scale.value,
                worst=f"{degrees[worst]:.0f} degrees",
            )
        )
    plot = {
        "kind": "curve",
        "title": "error against the angle",
        "x": degrees,
        "x_label": "angle, degrees",
        "y_label": "RMS error on the error scale",
        "series": series,
        "log": True,
    }
    return Outcome(tuple(out), (plot,))


@check(
    "Lie derivative",
    claim=None,
    judged=False,
    cost=lambda bench, on: 49 * min(3, bench.main.n_structures),
)
def check_lie_derivative(bench: Bench, on: str) -> Outcome:
    """The local equivariance error: how fast outputs change when a structure starts to turn.

    When it fails: this is recorded and cannot fail. For an energy it is the spurious torque per unit of the error
    scale.

    Number: RMS and maximum over the three generators and random orientations of |d/dt rho(exp(t J))^-1 f(exp(t J) g
    x)| at t = 0, per radian, on the error scale (Gruver et al. 2023, arXiv:2210.02984).
    """
    found = bench.part(bench.main, range(min(3, bench.main.n_structures)))
    measured = measure_lie_derivative(
        bench.model,
        found.batch,
        bench.subject.declared(found.batch),
        vectors=dict(bench.subject.vectors),
        generator=bench.generator("lie"),
        scale=bench.scale(bench.main),
    )
    return Outcome(
        tuple(
            Finding(
                name,
                one.deviation.relative,
                rms=one.deviation.relative_rms,
                scale=one.deviation.scale.value,
                worst=f"per radian; finite differences good to {one.uncertainty:.1g}",
            )
            for name, one in measured.items()
        ),
        seed=bench.generator("lie").initial_seed(),
    )


@check(
    "No net force, no torque",
    claim="rotations",
    cost=lambda bench, on: bench.main.n_structures,
    needs=lambda bench: (
        ""
        if "forces" in bench.subject.outputs and bench.subject.energy is not None
        else "no forces that derive from an energy"
    ),
    unclaimed="record",
)
def check_torque(bench: Bench, on: str) -> Outcome:
    """The forces on a free structure add up to zero, and so do their torques.

    When it fails: the energy depends on orientation (torque) or on position (net force): a molecule in empty space
    would start to spin or to move, and spectra and diffusion are wrong.

    Number: |sum F| over RMS force and sqrt(n_atoms); |sum (r - <r>) x F| over RMS force, RMS distance and
    sqrt(n_atoms).
    """
    bench = bench.double()
    found = bench.main
    measured = measure_torque(bench.model, found.batch, scale=bench.scale(found).get("forces"))
    limit = 10.0 * bench.limit(found)
    out = []
    if measured.relative_force.numel():
        worst = int(measured.relative_force.argmax())
        out.append(Finding("net force", float(measured.relative_force[worst]), limit, worst=found.names[worst]))
    if measured.relative_torque.numel():
        worst = int(measured.relative_torque.argmax())
        name = found.names[int(measured.finite[worst])]
        out.append(Finding("torque", float(measured.relative_torque[worst]), limit, worst=name))
    return Outcome(tuple(out))


def _references(bench: Bench) -> str:
    if not bench.references:
        return "no reference values were given"
    return "" if bench.referenced is not None else "references belong to structures, and none were given"


@check(
    "Share of the loss",
    claim=None,
    judged=False,
    cost=lambda bench, on: 24 * bench.main.n_structures,
    needs=_references,
)
def check_loss_share(bench: Bench, on: str) -> Outcome:
    """Which part of the squared error against references comes from broken equivariance: what symmetrisation removes.

    When it fails: this is recorded and cannot fail. A small share says that the model's own error is larger than its
    asymmetry, and not that the asymmetry is harmless: torques, splittings and drifts remain.

    Number: variance over random orientations (with K - 1 in the denominator, so that the expectation does not depend
    on their number K) over the mean squared error over orientations.
    """
    found = bench.referenced or bench.main
    outputs = {k: v for k, v in bench.subject.declared(found.batch).items() if k in bench.references}
    measured = measure_loss_share(
        bench.model,
        found.batch,
        outputs,
        {name: bench.references[name] for name in outputs},
        n_elements=max(12, bench.profile.n_elements),
        group=bench.subject.group,
        vectors=dict(bench.subject.vectors),
        generator=bench.generator("loss"),
    )
    out = []
    for name, one in measured.items():
        unit = outputs[name].unit
        error = "" if one.standard_error is None else f" ± {100 * one.standard_error:.2g} %"
        out.append(
            Finding(
                f"{name}: share of the squared error", one.share, unit="of it", worst=f"{100 * one.share:.3g} %{error}"
            )
        )
        out.append(Finding(f"{name}: RMSE", one.rmse, unit=unit))
        out.append(Finding(f"{name}: RMSE after averaging over all orientations", one.rmse_symmetrized, unit=unit))
    return Outcome(tuple(out), seed=bench.generator("loss").initial_seed())


@check(
    "Where equivariance is lost",
    claim=None,
    judged=False,
    cost=lambda bench, on: 700,
    needs=lambda bench: (
        "layers can be walked in torch modules only"
        if bench.subject.module is None
        else ("check the backbone on its own to see its layers" if bench.subject.kind == "symmetrizer" else "")
    ),
)
def check_layers(bench: Bench, on: str) -> Outcome:
    """Which layer of a network is the first whose output no longer transforms under any representation.

    When it fails: this is recorded and cannot fail. The layer that is named receives equivariant input and returns
    something else: usually the first nonlinearity on raw coordinates.

    Number: residual of the best hypothesis (invariant, vector, declared irreps, any linear representation) for the
    output of a layer, over the RMS of that output, over random elements.
    """
    bench = bench.double()
    found, subject = bench.part(bench.main, range(min(3, bench.main.n_structures))), bench.subject
    f = subject.backbone if subject.kind == "backbone" and subject.backbone is not None else bench.model
    report = measure_layers(
        f,
        found.batch,
        module=subject.module,
        group=subject.group,
        vectors=dict(subject.vectors),
        generator=bench.generator("layers"),
    )
    culprit = report.culprit
    layers = [
        {
            "name": layer.label,
            "type": layer.type_name,
            "shape": list(layer.shape),
            "transforms_as": layer.transforms_as or "cannot tell",
            "residual": layer.residual,
        }
        for layer in report.layers
    ]
    plot = {
        "kind": "layers",
        "title": "layers",
        "layers": layers,
        "culprit": None if culprit is None else culprit.label,
    }
    if culprit is None:
        finding = Finding("layers that break equivariance", 0.0, unit="layers")
    else:
        worst = f"{culprit.label} ({culprit.type_name}) {culprit.transforms_as}"
        finding = Finding(
            "residual of the first layer that breaks it", culprit.residual, unit="of its output", worst=worst
        )
    return Outcome((finding,), (plot,), note=report.note, seed=report.seed)
