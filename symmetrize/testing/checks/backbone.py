"""What a backbone promises to whoever evaluates it: declared reach, rows of centers, shared work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import assemble, edge_vectors, replace, validate, with_neighbors
from symmetrize.testing.measuring.elements import copied, moved_to, random_elements, split, transform
from symmetrize.testing.running.bench import Bench
from symmetrize.testing.running.catalog import check
from symmetrize.testing.running.outcome import Finding, Outcome


def _backbone(bench: Bench) -> str:
    return "" if bench.subject.kind == "backbone" and bench.subject.backbone is not None else "not a backbone"


def _local(bench: Bench) -> str:
    backbone = bench.subject.backbone
    if bench.subject.kind != "backbone" or backbone is None:
        return "not a backbone"
    if backbone.receptive_field is None:
        return "the receptive field is declared to be everything"
    if not any(spec.per == "atom" for spec in backbone.outputs.values()):
        return "no output per atom"
    return ""


def _of(bench: Bench) -> Backbone:
    if bench.subject.backbone is None:
        raise RuntimeError("expected a backbone")
    return bench.subject.backbone


def _finding(bench: Bench, name: str, error: float, worst: str = "") -> Finding:
    """An error of the rows of an output, on the error scale of its atoms where there is one; NaN is infinite."""
    scale = bench.scales[f"atomic_{name}" if f"atomic_{name}" in bench.scales else name].value
    number = error / scale if scale > 0.0 and error == error else float("inf")
    return Finding(name, number, bench.limit(bench.main), scale=scale, worst=worst)


def _per_atom(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        out = backbone(copied(batch))
    return {name: out[name].to("cpu", torch.float64) for name, s in backbone.outputs.items() if s.per == "atom"}


def _ready(backbone: Backbone, batch: Batch) -> Batch:
    """With a neighbor list and edge vectors."""
    if backbone.cutoff is None:
        return batch
    if batch.get(keys.EDGE_INDEX) is None:
        batch = with_neighbors(batch, backbone.cutoff)
    return replace(batch, **{keys.EDGE_VEC: edge_vectors(batch)})


def _hops(batch: Batch, atom: int) -> Tensor:
    """Number of edges from every atom to one of them; -1 where there is no way."""
    source, target = batch[keys.EDGE_INDEX].cpu()
    hops = torch.full((batch[keys.POS].shape[0],), -1)
    hops[atom], level = 0, 0
    while True:
        reached = target[hops[source] == level]
        fresh = reached[hops[reached] < 0]
        if not len(fresh):
            return hops
        level += 1
        hops[fresh] = level


@check("Declared receptive field", claim="locality", cost=lambda bench, on: 6, needs=_local)
def check_locality(bench: Bench, on: str) -> Outcome:
    """The rows of an atom do not depend on atoms that are more hops away than declared.

    When it fails: ``receptive_field`` is declared too small; a normalisation, a softmax or a sum runs over the whole
    structure. In atom scope the symmetrised model would be wrong without a warning.

    Number: largest change of a row beyond the declared number of hops from an atom that is moved, on the error scale.
    """
    backbone = _of(bench)
    single = split(bench.main.batch)[0]
    reach = (backbone.receptive_field or 0) * (backbone.cutoff or 0.0)
    chain = _ready(backbone, _chain(single, reach, backbone))
    pos = chain[keys.POS].detach().to(torch.float64)
    generator = bench.generator("locality")
    moved = pos.clone()
    moved[0] += 0.1 * torch.randn(3, dtype=torch.float64, generator=generator).to(pos.device)
    other = _ready(backbone, moved_to(replace(chain, **{keys.EDGE_VEC: None}), moved))
    before, after = _per_atom(backbone, chain), _per_atom(backbone, other)
    far = torch.ones(len(pos), dtype=torch.bool)
    for batch in (chain, other):
        if backbone.cutoff is not None:
            hops = _hops(batch, 0)
            far &= (hops < 0) | (hops > (backbone.receptive_field or 0))
    far[0] = False
    out = []
    for name in before:
        change = (after[name] - before[name]).abs().reshape(len(pos), -1).amax(dim=1)
        error = float(change[far].max()) if bool(far.any()) and bool(torch.isfinite(change).all()) else float("inf")
        worst = (
            f"atom {int(torch.where(far, change, -torch.ones_like(change)).argmax())} of a chain of {len(pos)} atoms"
        )
        out.append(_finding(bench, name, error, worst))
    return Outcome(tuple(out), seed=generator.initial_seed())


def _chain(single: Batch, reach: float, backbone: Backbone) -> Batch:
    """Copies of a molecule in a row, near enough to be connected, long enough to end out of reach."""
    pos = single[keys.POS].detach().to(torch.float64)
    pos = pos - pos.mean(dim=0)
    length = float(pos[:, 0].max() - pos[:, 0].min())
    gap = 0.6 * (backbone.cutoff or 1.0)
    n_copies = min(12, 2 + int((reach + 1.0) / (length + gap)) + 1)
    shift = torch.tensor([length + gap, 0.0, 0.0], dtype=torch.float64, device=pos.device)
    rows = torch.cat([pos + k * shift for k in range(n_copies)]).to(single[keys.POS].dtype)
    known = (keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC, keys.EDGE_INDEX, keys.CELL_SHIFT)
    fields = {
        name: value.repeat(n_copies, *([1] * (value.dim() - 1)))
        for name in single.keys()
        if name not in (*known, keys.EDGE_VEC, keys.EDGE_CUTOFF)
        and isinstance(value := single[name], Tensor)
        and value.shape[:1] == (len(pos),)
    }
    return validate(assemble(pos=rows, counts=torch.tensor([len(rows)]), **fields))


@check(
    "Rows of the wanted atoms",
    claim="locality",
    cost=lambda bench, on: 2 * bench.main.n_structures,
    needs=lambda bench: (
        _backbone(bench) or ("" if any(s.per == "atom" for s in _of(bench).outputs.values()) else "no output per atom")
    ),
)
def check_center_rows(bench: Bench, on: str) -> Outcome:
    """With a ``center_mask``, per-atom outputs are the rows of the marked atoms, unchanged and in order.

    When it fails: the mask is not read; atoms that are not wanted are left out of the neighborhoods too.

    Number: largest difference to the rows without the mask, on the error scale.
    """
    backbone = _of(bench)
    batch = _ready(backbone, bench.main.batch)
    every = _per_atom(backbone, batch)
    mask = torch.arange(batch[keys.POS].shape[0], device=batch[keys.POS].device) % 3 != 1
    some = _per_atom(backbone, replace(batch, **{keys.CENTER_MASK: mask}))
    out = []
    for name, rows in every.items():
        expected = rows[mask.cpu()]
        if some[name].shape != expected.shape:
            worst = f"expected {tuple(expected.shape)}, got {tuple(some[name].shape)}"
            out.append(_finding(bench, name, float("inf"), worst))
            continue
        out.append(_finding(bench, name, float((some[name] - expected).abs().max())))
    return Outcome(tuple(out))


@check(
    "Shared work equals plain evaluation",
    claim="locality",
    cost=lambda bench, on: 2 * bench.main.n_structures,
    needs=lambda bench: (
        _backbone(bench) or ("" if _of(bench).shares_work else "the backbone does not share work between frames")
    ),
)
def check_shared_work(bench: Bench, on: str) -> Outcome:
    """``forward_frames(prepare(batch), edge_vec)`` gives what ``forward`` gives, for turned edge vectors too.

    When it fails: something that depends on the orientation was prepared once for all frames, or the order of the
    edges is not that of the batch.

    Number: largest difference, on the error scale.
    """
    backbone = _of(bench)
    batch = _ready(backbone, bench.main.batch)
    turned = _ready(backbone, transform(batch, random_elements(1, bench.generator("shared"))[0]))
    with torch.no_grad():
        plain = backbone(copied(turned))
        geometry = keys.POS if backbone.cutoff is None else keys.EDGE_VEC
        shared = backbone.forward_frames(backbone.prepare(copied(batch)), turned[geometry])
    out = []
    for name in backbone.outputs:
        same = shared[name].shape == plain[name].shape
        error = float((shared[name] - plain[name]).abs().max()) if same else float("inf")
        out.append(_finding(bench, name, error))
    return Outcome(tuple(out))
