"""What several checks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from e3nn import o3
from torch import Tensor

from symmetrize.ops.quadrature import rotation_quadrature
from symmetrize.ops.wigner import wigner
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.measures import Measurement
from symmetrize.testing.measuring.scales import Model
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.outcome import Finding, Outcome
from symmetrize.testing.structures.sets import StructureSet


def every_set(bench: Bench) -> Sequence[str]:
    """All sets of structures."""
    return list(bench.sets)


def findings(measured: Measurement, found: StructureSet, limit: float | None) -> list[Finding]:
    """One finding per output, with the case and the structure of its largest error.

    To the limit is added what a few roundings of the output itself amount to on the error scale: a large constant,
    such as a total energy, costs digits that no model can keep.
    """
    out = []
    eps = torch.finfo(measured.dtype).eps
    for name, deviation in measured.outputs.items():
        case, structure = deviation.worst
        scale = deviation.scale
        allowed = None if limit is None else limit + (8.0 * eps * scale.magnitude / scale.value if scale.value else 0.0)
        out.append(
            Finding(
                quantity=name,
                number=deviation.relative,
                limit=allowed,
                rms=deviation.relative_rms,
                scale=scale.value,
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
    parts: dict[str, dict[str, Tensor]] = {}
    for name, spec in outputs.items():
        projectors = _projectors(spec.irreps, spec.rank)
        if len(projectors) > 1:
            parts[name] = {f"{name}: {ir}": projector for ir, projector in projectors.items()}
    every = dict(outputs)
    for name, listed in parts.items():
        spec = outputs[name]
        free = OutputSpec(cartesian="abcdefgh"[: spec.rank], per=spec.per, reduce=spec.reduce) if spec.rank else spec
        every |= dict.fromkeys(listed, free)

    def f(batch: Any) -> dict[str, Tensor]:
        out = dict(model(batch))
        for name, listed in parts.items():
            rows = out[name].detach().to("cpu", torch.float64)
            for part, projector in listed.items():
                out[part] = (rows.reshape(len(rows), -1) @ projector).reshape(rows.shape)
        return out

    return f, every


@lru_cache(maxsize=64)
def _projectors(irreps: str | None, rank: int) -> dict[str, Tensor]:
    """Orthogonal projectors onto the isotypic parts of a representation, by irrep: symmetric (dim, dim) matrices.

    For a Cartesian tensor by its characters, :math:`P_l = (2l + 1) \\int \\chi_l(g) \\rho(g) dg`.
    """
    if irreps is not None:
        parsed = o3.Irreps(irreps)
        of_row = [str(ir) for n, ir in parsed for _ in range(n * ir.dim)]
        return {
            ir: torch.diag(torch.tensor([float(row == ir) for row in of_row], dtype=torch.float64))
            for ir in dict.fromkeys(of_row)
        }
    rotations, weights = rotation_quadrature(2 * rank)
    product = rotations
    for _ in range(rank - 1):
        product = torch.einsum("nij,nkl->nikjl", product, rotations).reshape(len(product), 3 * product.shape[1], -1)
    out = {}
    for l in range(rank + 1):
        character = torch.einsum("nii->n", wigner(l, rotations))
        projector = (2 * l + 1) * torch.einsum("n,nij->ij", weights * character, product)
        if float(projector.abs().max()) > 1e-9:
            out[f"{l}{'e' if rank % 2 == 0 else 'o'}"] = 0.5 * (projector + projector.T)
    return out
