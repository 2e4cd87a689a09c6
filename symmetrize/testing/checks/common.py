"""What several checks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from e3nn import o3
from e3nn.io import CartesianTensor
from torch import Tensor

from symmetrize.representations import OutputSpec
from symmetrize.testing.bench import Bench
from symmetrize.testing.measures import Measurement
from symmetrize.testing.outcome import Finding, Outcome
from symmetrize.testing.scales import Model
from symmetrize.testing.structures import StructureSet


def every_set(bench: Bench) -> Sequence[str]:
    """All sets of structures."""
    return list(bench.sets)


def findings(
    measured: Measurement, found: StructureSet, limit: float | None, magnitudes: Mapping[str, float] | None = None
) -> list[Finding]:
    """One finding per output, with the case and the structure of its largest error.

    ``magnitudes``: size of what an output is made of; a rounding of it is no error, however small the scale.
    """
    out = []
    for name, deviation in measured.outputs.items():
        case, structure = deviation.worst
        out.append(
            Finding(
                quantity=name,
                number=deviation.relative,
                limit=limit,
                rms=deviation.relative_rms,
                scale=deviation.scale.value,
                worst=f"{case}, {found.names[structure]}",
            )
        )
    return out


def judged(measured: Measurement, found: StructureSet, limit: float | None, **more: Any) -> Outcome:
    """A measurement with the same limit for every output."""
    return Outcome(tuple(findings(measured, found, limit)), (histogram(measured, limit),), seed=measured.seed, **more)


def histogram(measured: Measurement, limit: float | None) -> dict[str, Any]:
    """Relative errors of all cases and structures, for a figure."""
    outputs = {}
    for name, deviation in measured.outputs.items():
        scale = deviation.scale.value
        errors = (deviation.max / scale if scale > 0.0 else deviation.max).flatten()
        if len(errors) > 400:
            errors = errors.sort().values[torch.linspace(0, len(errors) - 1, 400).round().long()]
        outputs[name] = errors.tolist()
    return {"kind": "histogram", "title": measured.name, "outputs": outputs, "limit": limit}


def by_irrep(model: Model, outputs: Mapping[str, OutputSpec]) -> tuple[Model, dict[str, OutputSpec]]:
    """The model with the irreducible parts of its outputs beside them, named ``"output: 2e"``.

    Parts of outputs that are irreducible already are left out. Cartesian tensors are decomposed with all components
    independent, whatever symmetry is declared, so that a part which should vanish is seen too.
    """
    parts: dict[str, list[tuple[str, OutputSpec]]] = {}
    changes: dict[str, Tensor] = {}
    for name, spec in outputs.items():
        if spec.cartesian is not None:
            if spec.rank < 2:
                continue
            tensor = CartesianTensor("abcdefgh"[: spec.rank])
            irreps = o3.Irreps(tensor)
            changes[name] = tensor.reduced_tensor_products().change_of_basis.to(torch.float64)
        else:
            irreps = o3.Irreps(spec.irreps)
        if len({str(ir) for _, ir in irreps}) > 1:
            parts[name] = [
                (f"{name}: {ir}", OutputSpec(str(o3.Irreps([(n, ir)])), per=spec.per, reduce=spec.reduce))
                for ir, n in _multiplicities(irreps).items()
            ]
    every = {**outputs, **{part: spec for listed in parts.values() for part, spec in listed}}

    def f(batch: Any) -> dict[str, Tensor]:
        out = dict(model(batch))
        for name, listed in parts.items():
            spec = outputs[name]
            rows = out[name].detach().to("cpu", torch.float64)
            if spec.cartesian is not None:
                flat = torch.einsum("k...,n...->nk", changes[name], rows)
                irreps = o3.Irreps(CartesianTensor("abcdefgh"[: spec.rank]))
            else:
                flat, irreps = rows.reshape(len(rows), -1), o3.Irreps(spec.irreps)
            for part, part_spec in listed:
                wanted = o3.Irreps(part_spec.irreps)[0].ir
                columns = [
                    flat[:, window]
                    for (_, ir), window in zip(irreps, irreps.slices(), strict=True)
                    if ir == wanted
                ]
                out[part] = torch.cat(columns, dim=1).reshape(len(rows), *part_spec.shape)
        return out

    return f, every


def _multiplicities(irreps: o3.Irreps) -> dict[o3.Irrep, int]:
    out: dict[o3.Irrep, int] = {}
    for n, ir in irreps:
        out[ir] = out.get(ir, 0) + n
    return out
