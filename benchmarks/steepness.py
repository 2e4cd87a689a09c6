"""Backbone evaluations against the steepness of the weights: what each part of the weights of ECSE is worth.

Steepness: the largest first and second derivative of any normalized weight of an atom's frames, when its neighbors or
the atom itself move along any of three perpendicular directions. Weights can be compared at equal steepness only: every
one of them gets by with fewer evaluations when its width is made smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch import Tensor
from torch.func import jvp, vmap

from benchmarks.datasets import BUNDLED
from benchmarks.record import Column, Result, Setting, digits, fixed
from symmetrize.frames import NEGLIGIBLE_WEIGHT
from symmetrize.methods.ecse.candidates import axial_order
from symmetrize.methods.ecse.weights import BROAD, pair_key
from symmetrize.ops.switches import smooth_step
from symmetrize.testing import paths

CUTOFF = 4.5
COLLINEARITY_WIDTH = 0.2
WIDTHS = (0.3, 0.15, 0.075)
#: What is looked at of a set: centers (small, full profile), and neighbors that are moved.
N_CENTERS, N_MOVED = (3, 24), 4
#: Points along a path, around each of its events.
OFFSETS = (-0.06, -0.02, 0.0, 0.02, 0.06)
#: Named after the paths of `symmetrize.testing`.
LIBRARY = "scan library"


@dataclass(frozen=True)
class Weights:
    """A form of the weights.

    Attributes
    ----------
    name : str
    pairs : bool
        All pairs of an axis and a partner compete, instead of axes and then the partners of each.
    angle : bool
        The key of a partner depends on the angle.
    """

    name: str
    pairs: bool
    angle: bool


FORMS = (
    Weights("levels", False, False),
    Weights("+ angle", False, True),
    Weights("pairs (shipped)", True, True),
)

COLUMNS = (
    Column("set", "set"),
    Column("weights", "weights"),
    Column("width", "D (Å)", digits(2)),
    Column("mean", "evaluations", fixed(2)),
    Column("max", "max"),
    Column("first mean", "first derivative (1/Å): mean", digits(3)),
    Column("first max", "max", digits(3)),
    Column("second mean", "second (1/Å²): mean", digits(3)),
    Column("second max", "max", digits(3)),
    Column("scalar", "scalar, second", digits(3)),
    Column("vector", "vector, second", digits(3)),
    Column("equal", "evaluations at equal steepness", fixed(2)),
)


def frame_weights(vectors: Tensor, form: Weights, width: float, cutoff: float = CUTOFF) -> Tensor:
    """Normalized weights of one center, written out densely: pairs (j, k), axes, point.

    Parameters
    ----------
    vectors : Tensor of shape (n, 3)
        To the neighbors, and to anything outside the cutoff.

    Returns
    -------
    Tensor of shape (n * n + n + 1,)
    """
    n, step = vectors.shape[0], smooth_step
    same = torch.eye(n, dtype=torch.bool)
    d = torch.sqrt((vectors * vectors).sum(dim=1))
    units = vectors / d[:, None]
    g = smooth_step((cutoff - d) / width)
    cosine = units @ units.T
    square = (1.0 - cosine * cosine).clamp(min=1e-7 * COLLINEARITY_WIDTH)
    a = (g[None, :] * smooth_step(torch.sqrt(square / COLLINEARITY_WIDTH))).masked_fill(same, 0.0)
    # Without the axis' own key where only the partners of one axis are compared.
    lead = d[:, None] if form.pairs else torch.zeros_like(d)[:, None]
    key = pair_key(lead, d[None, :], d[:, None] if form.angle else 0.0 * d[:, None], cosine)
    ahead = step((d[:, None] - d[None, :]) / width).masked_fill(same, 0.0)
    axis, point = g * torch.prod(1.0 - g * ahead, dim=1), torch.prod(1.0 - g)
    if form.pairs:
        behind = step((key[:, :, None, None] - key) / width)
        kept = torch.prod(1.0 - a * behind, dim=3)
        lag = step((d[:, None] - d[None, :]) / (BROAD * width)).masked_fill(same, 0.0)
        shared = g * torch.prod(1.0 - g * lag, dim=1)
        present = torch.where(same[:, None, :], torch.ones_like(g), shared)
        pair = shared[:, None] * a * torch.prod(1.0 - present * (1.0 - kept), dim=2)
        left = torch.prod(1.0 - shared * (1.0 - torch.prod(1.0 - a, dim=1)))
        axis, point = axis * left, point * left
    else:
        behind = step((key[:, :, None] - key[:, None, :]) / width)
        pair = axis[:, None] * a * torch.prod(1.0 - a[:, None, :] * behind, dim=2)
        axis = axis * torch.prod(1.0 - a, dim=1)
    weights = torch.cat([pair.reshape(-1), axis, point[None]])
    kept = weights * smooth_step(weights / (2.0 * NEGLIGIBLE_WEIGHT) - 1.0)
    return kept / kept.sum()


def run(setting: Setting) -> Result:
    """Curves of all forms of the weights on all sets; `draw` makes a figure of the records."""
    sets = _sets(setting)
    cases = [(name, form, width) for name in sets for form in FORMS for width in WIDTHS]
    records = [_record(name, sets[name], form, width) for name, form, width in setting.bar(cases, "steepness")]
    for name in sets:
        reference = next(
            r for r in records if r["set"] == name and r["weights"] == FORMS[0].name and r["width"] == 0.15
        )
        for form in FORMS:
            curve = [r for r in records if r["set"] == name and r["weights"] == form.name]
            for record in curve:
                record["equal"] = _at_steepness(curve, reference)
    notes = [
        f"Atom scope, SO(3), neighbors within {CUTOFF} Å. Derivatives: the largest of any weight, over the center and "
        f"its {N_MOVED} nearest neighbors; mean and max over centers. {LIBRARY}: around the events of "
        "`symmetrize.testing.paths`.",
        "Scalar, vector: largest second derivative of both outputs of a random network of plane waves, symmetrized.",
        "At equal steepness: the number that goes with the mean first and second derivative of "
        f"'{FORMS[0].name}' at D = 0.15 Å, whichever needs more; interpolated between the widths of the table.",
        "levels: stick-breaking among axes, then among the partners of each, by distance. + angle: partners at a "
        "right angle come first. pairs: all pairs of a center against each other.",
    ]
    parameters = {"cutoff": CUTOFF, "collinearity_width": COLLINEARITY_WIDTH, "widths": list(WIDTHS)}
    rows = [r for r in records if r["width"] == 0.15]
    return Result("Steepness: evaluations against derivatives", records, COLUMNS, parameters, notes, rows)


def _sets(setting: Setting) -> dict[str, Tensor]:
    """Environments: (n_centers, n_neighbors, 3) of each set, in random orientations."""
    rng, n = np.random.default_rng(0), N_CENTERS[setting.full]
    found = {"ethanol": _around(setting.datasets[BUNDLED][::17], 8 * n, 8, rng)}
    for name, size in (("water", 9), ("silicon", 10), ("alloys", 12)):
        if name in setting.datasets:
            found[name] = _around(setting.datasets[name], n, size, rng)
    crystals = {"fcc": "Cu", "bcc": "Fe", "hcp": "Mg", "diamond": "Si"}
    for lattice, symbol in crystals.items():
        size = 10 if lattice == "diamond" else 12
        perfect = bulk(symbol, cubic=True) if lattice != "hcp" else bulk(symbol, orthorhombic=True)
        found[f"{lattice}, perfect"] = _around([perfect], 1, size, rng)
        rattled = perfect * (3, 3, 3)
        rattled.positions += 0.09 * rng.normal(size=rattled.positions.shape)
        found[f"{lattice}, rattled"] = _around([rattled], n, size, rng)
    scan = []
    for path in paths(CUTOFF).values():
        scan += [path(event + offset) for event in path.events for offset in OFFSETS]
    found[LIBRARY] = _around(scan, len(scan) if setting.full else 24, 6, rng)
    return found


def _around(structures: list[Atoms], n_centers: int, size: int, rng: np.random.Generator) -> Tensor:
    """The nearest neighbors of some atoms; what is missing is put outside the cutoff."""
    found = []
    for atoms in structures:
        center, vectors = neighbor_list("iD", atoms, CUTOFF)
        for n in range(len(atoms)):
            own = vectors[center == n]
            own = own[np.argsort(np.linalg.norm(own, axis=1))][:size]
            outside = (CUTOFF + 1.0 + np.arange(size))[:, None] * np.linalg.qr(rng.normal(size=(3, 3)))[0][0]
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            if len(own):
                found.append(np.concatenate([own, outside])[:size] @ turn)
    chosen = np.linspace(0, len(found) - 1, min(n_centers, len(found))).round().astype(int)
    return torch.tensor(np.array([found[n] for n in chosen]))


def _record(name: str, environments: Tensor, form: Weights, width: float) -> dict[str, Any]:
    n = environments.shape[1]
    directions = torch.zeros(N_MOVED + 1, 3, n, 3, dtype=torch.float64)
    for k in range(3):
        directions[-1, k, :, k] = -1.0  # the center itself
        for moved in range(N_MOVED):
            directions[moved, k, moved, k] = 1.0
    directions = directions.reshape(-1, n, 3)

    def derivatives(vectors: Tensor, direction: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        def first(x: Tensor) -> Tensor:
            return jvp(function, (x,), (direction,))[1]

        return jvp(first, (vectors,), (direction,))

    def weights(vectors: Tensor) -> Tensor:
        return frame_weights(vectors, form, width)

    network = _network()
    counts, firsts, seconds, outputs = [], [], [], []
    for vectors in environments:
        value = weights(vectors)
        active = value > NEGLIGIBLE_WEIGHT
        counts.append(int(active[: n * n].sum() + axial_order(1) * active[n * n : -1].sum() + active[-1]))
        one, two = vmap(lambda e, v=vectors: derivatives(v, e, weights), chunk_size=15)(directions)
        firsts.append(float(one.view(-1, 3, value.shape[0]).norm(dim=1).max()))
        seconds.append(float(two.abs().max()))
        chosen = active[: n * n].nonzero()[:, 0]

        def output(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            return _symmetrized(x, weights(x), chosen, network)

        _, two = vmap(lambda e, v=vectors, f=output: derivatives(v, e, f), chunk_size=15)(directions)
        outputs.append([float(two[:, 0].abs().max()), float(two[:, 1:].norm(dim=1).max())])
    return {
        "set": name,
        "weights": form.name,
        "width": width,
        "mean": sum(counts) / len(counts),
        "max": max(counts),
        "first mean": sum(firsts) / len(firsts),
        "first max": max(firsts),
        "second mean": sum(seconds) / len(seconds),
        "second max": max(seconds),
        "scalar": sum(o[0] for o in outputs) / len(outputs),
        "vector": sum(o[1] for o in outputs) / len(outputs),
    }


def _network() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wave, shift, read = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 6), (6,), (6, 4)))
    return wave, shift, read


def _symmetrized(vectors: Tensor, weights: Tensor, chosen: Tensor, network: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A scalar and a vector of a network of plane waves, over the frames of pairs: Tensor of shape (4,)."""
    n = vectors.shape[0]
    if len(chosen) == 0:
        return vectors.new_zeros(4) * vectors.sum()
    wave, shift, read = network
    d = torch.sqrt((vectors * vectors).sum(dim=1))
    units = vectors / d[:, None]
    first, second = units[chosen // n], units[chosen % n]
    normal = torch.linalg.cross(first, second)
    normal = normal / torch.sqrt((normal * normal).sum(dim=1, keepdim=True))
    frames = torch.stack([first, normal, torch.linalg.cross(first, normal)], dim=2)
    local = vectors @ frames
    values = (torch.sin(local @ wave + shift) * smooth_step(CUTOFF - d)[:, None]).sum(dim=1) @ read
    turned = torch.cat([values[:, :1], (frames @ values[:, 1:, None])[:, :, 0]], dim=1)
    return weights[chosen] @ turned


def _at_steepness(curve: list[dict[str, Any]], reference: dict[str, Any]) -> float:
    """Evaluations where the mean derivatives are those of the reference, by logarithmic interpolation."""
    needed = []
    for key in ("first mean", "second mean"):
        steep = np.log([max(r[key], 1e-9) for r in curve])
        order = np.argsort(steep)
        needed.append(
            np.interp(np.log(max(reference[key], 1e-9)), steep[order], np.array([r["mean"] for r in curve])[order])
        )
    return float(max(needed))


def draw(records: list[dict[str, Any]], path: str) -> None:
    """Evaluations against the mean second derivative, one panel for each set that has any."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [n for n in dict.fromkeys(r["set"] for r in records) if "perfect" not in n]
    with matplotlib.rc_context({"svg.hashsalt": "symmetrize", "font.size": 9.0}):
        figure = Figure(figsize=(10.0, 5.2), layout="constrained")
        panels = figure.subplots(2, (len(names) + 1) // 2, squeeze=False).ravel()
        for panel, name in zip(panels, names, strict=False):
            for form, color in zip(FORMS, ("#5a6876", "#e0a526", "#d9622b"), strict=True):
                curve = [
                    r for r in records if r["set"] == name and r["weights"] == form.name and r["second mean"] > 1e-3
                ]
                curve.sort(key=lambda r: r["width"])
                x, y = [r["second mean"] for r in curve], [r["mean"] for r in curve]
                panel.plot(x, y, "o-", color=color, label=form.name, markersize=4.0, linewidth=1.5)
            panel.set(title=name, xscale="log", yscale="log")
            ticks = (1, 2, 5, 10, 20, 50)
            panel.set_yticks(ticks, [str(t) for t in ticks])
            panel.minorticks_off()
        for panel in panels[len(names) :]:
            panel.axis("off")
        panels[0].legend(fontsize=7.5, frameon=False)
        figure.supxlabel("second derivative of weights, mean of the largest (1/Å²)")
        figure.supylabel("evaluations per center, SO(3)")
        figure.savefig(path, **({"metadata": {"Date": None, "Creator": None}} if path.endswith("svg") else {"dpi": 80}))
