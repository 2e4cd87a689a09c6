"""What an evaluation will take, known before it runs, and without allocating what it warns of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.copies import count_environments, divide, edge_offsets
from symmetrize.forecast import PAIR_BYTES, Forecast
from symmetrize.frames import FrameSet, Stratum

#: Cost in bare evaluations of the batch, and evaluations of one owner, from which on a plan warns.
COSTLY = 50.0
#: Mean share of its structure in the environment of an atom from which on a plan warns, if the cost is notable.
WRAPPED, NOTABLE = 0.5, 20.0
#: Bytes for the candidates of frames from which on a plan warns.
LARGE = 4 * 2**30


@dataclass(frozen=True)
class Plan:
    """Predicted cost of symmetrising one batch.

    Attributes
    ----------
    group, scope : str
    n_structures, n_atoms, n_edges, n_owners : int
        Owners are the atoms or structures that have frames of their own.
    n_evaluations : int
        Backbone evaluations, axis copies and mirrors included. Copies that turn out to be equal (in perfect crystals)
        are evaluated once, and counted every time: all counts are upper bounds there.
    evaluations_mean, evaluations_max : float, int
        Per owner.
    effective_mean : float
        Mean over owners of (sum w)^2 / sum w^2.
    weight_min : float
        Smallest total weight of any owner before normalization.
    strata : dict of str to int
        Frames of each kind.
    hops : int or None
        Message-passing hops of the copied environments; None: whole structures are copied.
    copied_atoms, copied_edges : int
        Atoms and edges in all rotated copies together, as the backbone gets them.
    cost_ratio : float
        Copied atoms per atom of the batch.
    edge_ratio : float
        Copied edges per edge of the batch (atoms where there are no edges): about the time relative to one bare
        evaluation for a network whose layers all evaluate everything that they get.
    layer_ratio : float
        The same for a network whose layers evaluate only what the centers still depend on (the last one centers alone,
        the one before also their neighbors, ...), as PET does: a lower bound of the time.
    n_chunks : int
        Calls of the backbone.
    call_ratio : float
        Atoms and edges of the largest call per atom and edge of the batch: about its memory relative to that of one
        bare evaluation.
    frame_bytes : int
        Memory while frames are found from pairs of candidates, about; 0 where no pairs are formed.
    exact : bool
        Whether numbers of evaluations and copies are what will happen; otherwise they are estimates, since counting
        them would take as much as is warned of.
    warnings : tuple of str
        What will be expensive, why, and what there is instead.
    """

    group: str
    scope: str
    n_structures: int
    n_atoms: int
    n_edges: int
    n_owners: int
    n_evaluations: int
    evaluations_mean: float
    evaluations_max: int
    effective_mean: float
    weight_min: float
    strata: dict[str, int]
    hops: int | None
    copied_atoms: int
    copied_edges: int
    cost_ratio: float
    edge_ratio: float
    layer_ratio: float
    n_chunks: int
    call_ratio: float
    frame_bytes: int
    exact: bool = True
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        owner = "atom" if self.scope == "atom" else "structure"
        kinds = {"frame": "full frames", "axis": "about an axis", "point": "lone centers", "auxiliary": "auxiliary"}
        strata = ", ".join(f"{count} {kinds[name]}" for name, count in self.strata.items() if count)
        about = "" if self.exact else "about "
        work = f"{self.edge_ratio:.1f} x the batch"
        if self.layer_ratio < self.edge_ratio:
            work += f", {self.layer_ratio:.1f} x in a network that narrows layer by layer"
        lines = [
            f"{self.n_structures} structures, {self.n_atoms} atoms; {self.group}, scope {self.scope}",
            f"evaluations   {about}{self.n_evaluations} ({self.evaluations_mean:.2f} per {owner}, "
            f"at most {self.evaluations_max})",
            f"kinds         {strata}; effective {self.effective_mean:.2f} per {owner}",
            f"total weight  at least {self.weight_min:.3f}",
            f"copied atoms  {about}{self.copied_atoms} ({self.cost_ratio:.1f} x the batch) in {self.n_chunks} calls",
            f"copied edges  {about}{self.copied_edges} ({work})",
            f"memory        largest call {self.call_ratio:.2f} x the batch; frames {self.frame_bytes / 2**20:.0f} MiB",
        ]
        return "\n".join(lines + [f"warning       {text}" for text in self.warnings])


@dataclass
class _Counts:
    """Sums over sets of frames of different owners."""

    evaluations: Tensor
    strata: Tensor
    effective: float = 0.0
    weight_min: float = float("inf")
    n_chunks: int = 0
    copied_atoms: int = 0
    copied_edges: int = 0
    nested_edges: int = 0
    largest_call: int = 0

    def add(self, frames: FrameSet) -> None:
        busy = frames.evaluations > 0
        self.evaluations += frames.evaluations
        self.strata += torch.bincount(frames.stratum, minlength=len(Stratum))
        self.effective += float(frames.effective_number[busy].sum())
        self.weight_min = min(self.weight_min, float(frames.total_weight[busy].min()))


def make_plan(
    batch: Data,
    sets: Iterable[FrameSet],
    forecast: Forecast | None,
    hops: int | None,
    chunk_size: int,
    group: str,
    stars: bool,
    counted: bool,
) -> Plan:
    """Collect the numbers of a `Plan`.

    Parameters
    ----------
    batch : Data
        With the edges of the backbone.
    sets : iterable of FrameSet
        All frames, those of an owner in one set.
    forecast : Forecast, optional
        What was known of their number before; owners that it estimates have no frames in ``sets``.
    hops : int or None
        Of the copied environments, None for structures.
    chunk_size : int
        Atoms per call.
    group : str
    stars : bool
        Whether copies of environments hold no rows for neighbors.
    counted : bool
        Whether the number of evaluations depends on the data, and not on the choice of the user alone.
    """
    n_atoms, n_structures = int(batch[keys.POS].shape[0]), int(batch[keys.PTR].shape[0]) - 1
    edges = batch.get(keys.EDGE_INDEX)
    n_edges = 0 if edges is None else int(edges.shape[1])
    scope = "structure" if hops is None else "atom"
    device = batch[keys.POS].device
    counts = _Counts(
        torch.zeros(n_structures if hops is None else n_atoms, dtype=torch.int64, device=device),
        torch.zeros(len(Stratum), dtype=torch.int64, device=device),
    )
    sizes = _Sizes(batch, scope, hops, stars)
    for frames in sets:
        counts.add(frames)
        _add_calls(counts, batch, frames, sizes, hops, chunk_size)
    n_sampled = _add_estimates(counts, forecast, sizes, chunk_size)
    busy = counts.evaluations > 0
    n_owners = int(busy.sum())
    names = {int(stratum): stratum.name.lower() for stratum in Stratum}
    cost = counts.copied_atoms / n_atoms
    edge_ratio = counts.copied_edges / n_edges if n_edges else cost
    nested = counts.nested_edges / (n_edges * max(1, hops or 1)) if n_edges else cost
    plan = Plan(
        group=group,
        scope=scope,
        n_structures=n_structures,
        n_atoms=n_atoms,
        n_edges=n_edges,
        n_owners=n_owners,
        n_evaluations=int(counts.evaluations.sum()),
        evaluations_mean=float(counts.evaluations.sum()) / max(1, n_owners),
        evaluations_max=int(counts.evaluations.max()),
        effective_mean=counts.effective / max(1, n_owners - n_sampled),
        weight_min=counts.weight_min if counts.weight_min < float("inf") else 0.0,
        strata={names[number]: int(count) for number, count in enumerate(counts.strata.tolist())},
        hops=hops,
        copied_atoms=counts.copied_atoms,
        copied_edges=counts.copied_edges,
        cost_ratio=cost,
        edge_ratio=edge_ratio,
        layer_ratio=nested,
        n_chunks=counts.n_chunks,
        call_ratio=counts.largest_call / (n_atoms + n_edges),
        frame_bytes=0 if forecast is None else PAIR_BYTES * forecast.pairs,
        exact=n_sampled == 0,
    )
    words = tuple(_warnings(plan, bool(batch[keys.PBC].any()), sizes.share(busy), counted))
    return Plan(**{**plan.__dict__, "warnings": words})


class _Sizes:
    """Atoms and edges of the copies of every owner, found once and when they are wanted."""

    def __init__(self, batch: Data, scope: str, hops: int | None, stars: bool) -> None:
        ptr, edge_ptr = batch[keys.PTR], edge_offsets(batch)
        self.batch = batch
        if scope == "structure":
            self.atoms, self.edges = ptr[1:] - ptr[:-1], edge_ptr[ptr[1:]] - edge_ptr[ptr[:-1]]
            self.nested, self.reached = self.edges, self.atoms
            return
        n_atoms = batch[keys.POS].shape[0]
        edges = batch.get(keys.EDGE_INDEX)
        edges = torch.zeros(2, 0, dtype=torch.int64, device=ptr.device) if edges is None else edges
        everyone = torch.arange(n_atoms, device=ptr.device)
        mask = batch.get(keys.CENTER_MASK)
        owners = everyone if mask is None else everyone[mask]
        found = count_environments(edges, edge_ptr, n_atoms, owners, hops or 0)
        atoms, self.edges, self.nested = (torch.zeros_like(everyone).index_copy(0, owners, x) for x in found)
        self.reached, self.atoms = atoms, torch.ones_like(atoms) if stars else atoms

    def share(self, owners: Tensor) -> float:
        """Share of its structure that the environment of an atom of these reaches, on average."""
        if self.reached.shape[0] != self.batch[keys.BATCH].shape[0]:
            return 1.0
        ptr, structure = self.batch[keys.PTR], self.batch[keys.BATCH]
        whole = (ptr[1:] - ptr[:-1])[structure]
        return float((self.reached / whole)[owners].mean()) if bool(owners.any()) else 0.0


def _add_calls(
    counts: _Counts, batch: Data, frames: FrameSet, sizes: _Sizes, hops: int | None, chunk_size: int
) -> None:
    for frame, _, invariant in divide(batch, frames, hops, chunk_size):
        owner = frames.owner[frame]
        atoms = owner.shape[0] if invariant and hops is not None else int(sizes.atoms[owner].sum())
        edges = 0 if invariant and hops is not None else int(sizes.edges[owner].sum())
        counts.n_chunks += 1
        counts.copied_atoms += atoms
        counts.copied_edges += edges
        counts.nested_edges += 0 if edges == 0 else int(sizes.nested[owner].sum())
        counts.largest_call = max(counts.largest_call, atoms + edges)


def _add_estimates(counts: _Counts, forecast: Forecast | None, sizes: _Sizes, chunk_size: int) -> int:
    """Owners whose frames were estimated instead of counted; their number."""
    if forecast is None or not len(forecast.dense):
        return 0
    for owner, evaluations in zip(forecast.dense.tolist(), forecast.estimates, strict=True):
        counts.evaluations[owner] = evaluations
        counts.strata[int(Stratum.FRAME)] += evaluations
        counts.copied_atoms += evaluations * int(sizes.atoms[owner])
        counts.copied_edges += evaluations * int(sizes.edges[owner])
        counts.nested_edges += evaluations * int(sizes.nested[owner])
        per_call = max(1, chunk_size // max(1, int(sizes.atoms[owner])))
        counts.n_chunks += -(-evaluations // per_call)
        call = min(per_call, evaluations) * int(sizes.atoms[owner] + sizes.edges[owner])
        counts.largest_call = max(counts.largest_call, call)
    return len(forecast.dense)


def _warnings(plan: Plan, periodic: bool, share: float, counted: bool) -> Iterable[str]:
    """What a user should know before waiting for it."""
    deep = plan.scope == "atom" and (plan.hops or 0) > 1
    whole = (
        "scope='structure' with GroupAveraging evaluates each structure once per rotation for all of its atoms (exact "
        "to its degree only)"
        if periodic
        else "scope='structure' evaluates each structure once per frame for all of its atoms, and is as exact"
    )
    if deep and plan.layer_ratio > COSTLY:
        yield (
            f"{plan.layer_ratio:.0f} to {plan.edge_ratio:.0f} times the cost of a bare evaluation: {plan.hops} hops of "
            f"message passing copy {plan.copied_atoms / plan.n_evaluations:.0f} atoms and "
            f"{plan.copied_edges / plan.n_evaluations:.0f} edges for each of {plan.evaluations_mean:.1f} frames of "
            f"every atom. Strictly local networks cost {plan.evaluations_mean:.1f}; {whole}"
        )
    elif deep and share > WRAPPED and plan.layer_ratio > NOTABLE:
        yield f"the environment of an atom holds {100 * share:.0f} % of its structure: {whole}"
    if counted and plan.evaluations_mean > COSTLY:
        yield (
            f"{'about ' if not plan.exact else ''}{plan.evaluations_mean:.0f} evaluations per {plan.scope}: many "
            "neighbors at similar distances share the weight. A smaller cutoff_width (a length in the unit of the "
            "positions: are they in that of the default, angstrom?) leaves fewer, "
            + ("group='SO(3)' half of them, " if plan.group == "O(3)" else "")
            + ("Anchored a number that does not grow with the cloud, " if plan.scope == "structure" else "")
            + "GroupAveraging a fixed one (exact to its degree only)"
        )
    if plan.frame_bytes > LARGE:
        yield (
            f"about {plan.frame_bytes / 2**30:.0f} GiB while the frames are found: every axis looks at all candidates "
            "within the receptive field; fewer structures per batch, or fewer hops, take less"
        )
