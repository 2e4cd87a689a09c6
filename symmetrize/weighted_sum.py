r"""The weighted sum over frames as a pure function of its differentiable tensors, evaluated in chunks of copies.

For every output, and for the gradient of an energy with respect to each tensor t (inputs of the backbone, rotations,
origins, weights),

.. math:: S = \sum_k w_k\, \rho(R_k)\, f(R_k^{-1} x), \qquad \partial S_\mathrm{energy} / \partial t.

There are three ways to evaluate it: in turns, where nothing of a chunk outlives it; together, in one graph; and
recomputed, in turns both in the forward and in the backward pass, so that training on forces runs in bounded memory,
too. A chunk reads the rows that it needs and adds its gradients to these rows: its work does not depend on the size of
the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symmetrize import keys
from symmetrize.backbone import Backbone, Copies
from symmetrize.copies import copied_sizes, copy_environments, copy_stars, copy_structures, divide, edge_offsets
from symmetrize.equivalence import (
    N_NUMBERS,
    Merge,
    Table,
    averaged,
    candidates,
    classes,
    coordinate_sizes,
    correspondence,
    pack_classes,
    reduced,
    symmetric_owners,
    tabulate,
)
from symmetrize.evaluation import Source, check_outputs, rotated_inputs, run_backbone
from symmetrize.frames import FrameSet, Stratum

# Suffix of the per-copy reduced values of an output, for their spread.
REDUCED = " reduced"

# Copies of equal environments that are gathered for one call, as a multiple of what it evaluates.
MEMBERS = 16


class Chunk(NamedTuple):
    """Copies that are evaluated in one call of the backbone."""

    frame: Tensor  # frames of this chunk, (n_copies,)
    copies: Copies
    invariant: bool  # the point stratum: only the invariant part of the outputs counts
    structure: Tensor  # that each copy belongs to, (n_copies,)
    number: Tensor | None  # supposed class of each copy, among those that are evaluated together
    row_copy: dict[str, Tensor]  # for the rows of each output: the copy that they come from,
    row_target: dict[str, Tensor]  # and the row of the result that they add to


class Part(NamedTuple):
    """Frames that are evaluated in one call, and the class that each is supposed to be in."""

    frame: Tensor
    invariant: bool
    number: Tensor | None = None


class WeightedSum:
    """Sums of one batch over its frames.

    It holds only what lies upstream of its results: a reference to what is made from them would close a cycle through
    the autograd graph, which no garbage collector can free.

    Parameters
    ----------
    backbone : Backbone
    source : Source
    frames : FrameSet
    group : str
    energy : str or None
        The output whose gradient is wanted.
    limit : int
        Atoms in one call of the backbone.
    collect : bool
        Keep the values of every copy, for their spread.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: Source,
        frames: FrameSet,
        group: str,
        energy: str | None,
        limit: int,
        collect: bool,
    ) -> None:
        self.backbone, self.source, self.frames, self.group, self.energy = backbone, source, frames, group, energy
        self.batch = source.batch
        self.names = list(backbone.outputs)
        self.inputs = list(source.inputs)
        # Filled in when they are differentiated: walking through modules takes as long as many operations.
        self.parameters: list[Tensor] = []
        hops = backbone.oriented_field
        self.parts = [Part(frame, invariant) for frame, _, invariant in divide(self.batch, frames, hops, limit)]
        self.limit = limit
        # A strictly local backbone that shares work is given centers with their edges.
        self.stars = frames.scope == "atom" and backbone.shares_work and (hops or 0) <= 1
        # Once per batch: every chunk looks up its edges here.
        self.edge_ptr = edge_offsets(self.batch)
        # Differences in local coordinates that rounding of positions and lattice vectors makes, relative to their size.
        self.tolerance = 4.0 * torch.finfo(self.batch[keys.POS].dtype).eps
        self.sizes: Tensor | None = None
        self.collect = collect
        self.collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def __call__(self, weights: Tensor, create_graph: bool) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Sums by output, and pairs of a differentiable tensor and the gradient of the energy with respect to it."""
        tensors = [*self.source.inputs.values(), self.frames.rotations, self.frames.origins, weights]
        wanted = [t for t in tensors if t.requires_grad]
        differentiable = torch.is_grad_enabled() and (self.energy is None or create_graph)
        if differentiable:
            self.parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        if not differentiable or not (wanted or self.parameters):
            with torch.no_grad():
                classes = self._classes(tensors)
            sums, gradients = self.in_turns(tensors, classes)
        elif len(self.parts) == 1:
            sums, gradients = self.together(tensors)
        else:
            flat = _Recomputed.apply(self, len(tensors), *tensors, *self.parameters)
            sums, gradients = list(flat[: len(self.names)]), list(flat[len(self.names) :])
        pairs = list(zip(wanted, gradients, strict=True)) if self.energy is not None else []
        return dict(zip(self.names, sums, strict=True)), pairs

    def in_turns(self, tensors: list[Tensor], parts: list[Part] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Sums, and gradients with respect to the tensors that require one, as plain numbers."""
        sums = self._zeros()
        wanted = [n for n, t in enumerate(tensors) if t.requires_grad] if self.energy is not None else []
        gradients = {n: torch.zeros_like(tensors[n]) for n in wanted}
        for chunk in self._chunks(parts):
            rows = self._rows(chunk)
            local = _leaves(tensors, rows)
            with torch.set_grad_enabled(self.energy is not None):
                outputs = self._outputs(local, chunk)
                found = _partial(self._energy(outputs, local, chunk), [local[n] for n in wanted]) if wanted else []
            with torch.no_grad():
                for total, values, at in self._weighted(sums, outputs, local, chunk):
                    total.index_add_(0, at, values)
                for n, gradient in zip(wanted, found, strict=True):
                    _add(gradients[n], rows[n], gradient)
            self._observe(outputs, local, chunk)
        return sums, list(gradients.values())

    def together(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same in one graph, differentiable any number of times."""
        # Aliases: some tensors are functions of others, and the gradients below are meant to be partial ones.
        tensors = [t.view_as(t) for t in tensors]
        sums = self._zeros()
        energy = torch.zeros((), dtype=torch.float64, device=sums[0].device)
        for chunk in self._chunks():
            rows = self._rows(chunk)
            local = [t if at is None else t.index_select(0, at) for t, at in zip(tensors, rows, strict=True)]
            outputs = self._outputs(local, chunk)
            weighted = self._weighted(sums, outputs, local, chunk)
            sums = [total.index_add(0, at, values) for total, values, at in weighted]
            if self.energy is not None:
                energy = energy + self._energy(outputs, local, chunk)
            self._observe(outputs, local, chunk)
        if self.energy is None:
            return sums, []
        return sums, _partial(energy, [t for t in tensors if t.requires_grad], create_graph=True)

    def backward(
        self, tensors: list[Tensor], cotangents: list[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of <cotangents, (sums, gradients)> with respect to tensors and parameters, in turns."""
        of_sums, of_gradients = cotangents[: len(self.names)], cotangents[len(self.names) :]
        wanted = [n for n, t in enumerate(tensors) if t.requires_grad]
        totals = {n: torch.zeros_like(tensors[n]) for n in wanted}
        of_parameters = [torch.zeros_like(p) for p in self.parameters]
        for chunk in self._chunks():
            rows = self._rows(chunk)
            with torch.enable_grad():
                local = _leaves(tensors, rows)
                leaves = [local[n] for n in wanted]
                outputs = self._outputs(local, chunk)
                terms = [
                    (values * of_sum.index_select(0, at)).sum()
                    for (_, values, at), of_sum in zip(
                        self._weighted(of_sums, outputs, local, chunk), of_sums, strict=True
                    )
                    if of_sum is not None
                ]
                if self.energy is not None:
                    first = _partial(self._energy(outputs, local, chunk), leaves, create_graph=True)
                    for n, gradient, of_gradient in zip(wanted, first, of_gradients, strict=True):
                        if of_gradient is not None:
                            at = rows[n]
                            given = of_gradient if at is None else of_gradient.index_select(0, at)
                            terms.append((gradient * given).sum(dtype=torch.float64))
                scalar = torch.stack([term.to(torch.float64) for term in terms]).sum()
                found = _partial(scalar, leaves + self.parameters)
            with torch.no_grad():
                for n, gradient in zip(wanted, found, strict=False):
                    _add(totals[n], rows[n], gradient)
                for total, gradient in zip(of_parameters, found[len(wanted) :], strict=True):
                    total.add_(gradient)
        return [totals.get(n) for n in range(len(tensors))], list(of_parameters)

    def _zeros(self) -> list[Tensor]:
        n_rows = {"atom": self.batch[keys.POS].shape[0], "structure": self.batch[keys.PTR].shape[0] - 1}
        device = self.batch[keys.POS].device
        return [
            torch.zeros(n_rows[spec.per], *spec.shape, dtype=torch.float64, device=device)
            for spec in self.backbone.outputs.values()
        ]

    def _classes(self, tensors: list[Tensor]) -> list[Part] | None:
        """Calls in which copies that look the same are together, None where no two do."""
        backbone, source, frames = self.backbone, self.source, self.frames
        if sum(part.frame.shape[0] for part in self.parts) < 2:
            return None
        comparable = candidates(backbone, source, self.stars)
        if comparable is None:
            return None
        self.sizes = coordinate_sizes(self.batch)
        largest = self.tolerance * float(self.sizes.max())
        likely = symmetric_owners(self.batch, frames.scope, comparable, 8.0 * largest)[frames.owner]
        parts = _some(self.parts, likely)
        # Copies of one structure and stratum are compared, all others are of a kind of their own.
        structure = frames.owner if frames.scope == "structure" else self.batch[keys.BATCH][frames.owner]
        number = 2 * structure + (frames.stratum == int(Stratum.POINT))
        alone = torch.arange(frames.n_frames, device=number.device) + 2 * comparable.shape[0]
        number = torch.where(likely, number, alone)
        # One number tells nearly all copies apart; the others are looked at more closely.
        for n_numbers in (1, N_NUMBERS):
            if not parts:
                return None
            frame, fingerprint = [], []
            for chunk in self._chunks(parts):
                frame.append(chunk.frame)
                local = _leaves(tensors, self._rows(chunk))
                table = self._table(self._local(local, chunk), local, chunk)
                fingerprint.append(table.fingerprint(n_numbers))
            found = torch.cat(frame)
            its = classes(torch.cat(fingerprint), number[found], 1024.0 * self.tolerance)
            number[found] = its + int(number.max()) + 1
            tied = torch.zeros_like(number, dtype=torch.bool)
            tied[found] = (torch.bincount(its) > 1)[its]
            parts = _some(parts, tied)
        if not parts:
            return None
        out = []
        for invariant in (False, True):
            chosen = [part.frame for part in self.parts if part.invariant == invariant]
            if chosen:
                frame_of = torch.cat(chosen)
                hops = 0 if invariant else backbone.oriented_field
                sizes = copied_sizes(self.batch, frames.owner[frame_of], frames.scope, hops)
                packed = pack_classes(number[frame_of], sizes, self.limit, MEMBERS)
                out += [Part(frame_of[rows], invariant, number[frame_of[rows]]) for rows in packed]
        return out

    def _chunks(self, parts: list[Part] | None = None) -> Iterator[Chunk]:
        for frame, invariant, number in self.parts if parts is None else parts:
            owner = self.frames.owner[frame]
            copies = self._copies(owner, invariant)
            structure = owner if self.frames.scope == "structure" else self.batch[keys.BATCH][owner]
            atoms = copies.atom_copy[copies.center], copies.atom[copies.center]
            structures = torch.arange(owner.shape[0], device=owner.device), owner
            specs = self.backbone.outputs
            rows = {name: atoms if spec.per == "atom" else structures for name, spec in specs.items()}
            row_copy, row_target = ({name: pair[side] for name, pair in rows.items()} for side in (0, 1))
            yield Chunk(frame, copies, invariant, structure, number, row_copy, row_target)

    def _copies(self, owner: Tensor, invariant: bool) -> Copies:
        if self.frames.scope == "structure":
            return copy_structures(self.batch, self.edge_ptr, owner)
        hops = 0 if invariant else int(self.backbone.oriented_field or 0)
        if self.stars:
            stars = copy_stars(self.edge_ptr, owner)
            if not invariant:
                return stars
            none = stars.edge[:0]
            return stars._replace(edge=none, edge_copy=none, source=none, target=none)
        return copy_environments(self.batch, self.edge_ptr, owner, hops)

    def _rows(self, chunk: Chunk) -> list[Tensor | None]:
        """Rows of each tensor that a chunk reads, None for all of them."""
        rows = [self.source.rows(name, chunk.copies, chunk.structure) for name in self.inputs]
        return [*rows, chunk.frame, chunk.frame, chunk.frame]

    def _outputs(self, local: list[Tensor], chunk: Chunk) -> dict[str, Tensor]:
        """Outputs of the copies of a chunk, rotated back."""
        backbone, copies, rotations, weights = self.backbone, chunk.copies, local[-3], local[-1]
        inputs = self._local(local, chunk)
        if chunk.number is None:
            got = run_backbone(backbone, self.source, inputs, copies)
            outputs = check_outputs(backbone, got, copies, chunk.frame.shape[0], self.batch)
        else:
            merged = self._merge(chunk, chunk.number, inputs, local)
            inputs = averaged(self.source, inputs, copies, weights, merged)
            got = run_backbone(backbone, self.source, inputs, merged.copies)
            got = check_outputs(backbone, got, merged.copies, merged.chosen.shape[0], self.batch)
            outputs = {name: got[name][merged.output_rows(copies, spec.per)] for name, spec in backbone.outputs.items()}
        if chunk.invariant:
            return {n: spec.project_invariant(outputs[n], self.group) for n, spec in backbone.outputs.items()}
        return {n: spec.rotate(outputs[n], rotations, chunk.row_copy[n]) for n, spec in backbone.outputs.items()}

    def _local(self, local: list[Tensor], chunk: Chunk) -> dict[str, Tensor]:
        """Inputs of the copies of a chunk in local coordinates."""
        inputs = dict(zip(self.inputs, local[:-3], strict=True))
        return rotated_inputs(self.backbone, self.source, inputs, chunk.copies, local[-3], local[-2])

    def _table(self, inputs: dict[str, Tensor], local: list[Tensor], chunk: Chunk) -> Table:
        size = (coordinate_sizes(self.batch) if self.sizes is None else self.sizes)[chunk.structure]
        return tabulate(self.source, inputs, chunk.copies, local[-3], local[-2], size, self.stars)

    def _merge(self, chunk: Chunk, number: Tensor, inputs: dict[str, Tensor], local: list[Tensor]) -> Merge:
        copies = chunk.copies
        with torch.no_grad():
            table = self._table(inputs, local, chunk)
            representative, atom, edge = correspondence(
                table, torch.unique(number, return_inverse=True)[1], copies, self.tolerance, self.stars
            )
            chosen = (representative == torch.arange(chunk.frame.shape[0], device=number.device)).nonzero()[:, 0]
            smaller = self._copies(self.frames.owner[chunk.frame[chosen]], chunk.invariant)
            return reduced(representative, copies, atom, edge, smaller)

    def _energy(self, outputs: dict[str, Tensor], local: list[Tensor], chunk: Chunk) -> Tensor:
        name = str(self.energy)
        return (outputs[name].to(torch.float64) * local[-1].index_select(0, chunk.row_copy[name])).sum()

    def _weighted(
        self, sums: list[Any], outputs: dict[str, Tensor], local: list[Tensor], chunk: Chunk
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Of every output: its sum, the weighted rows of a chunk, and where in the sum they belong."""
        for total, name in zip(sums, self.names, strict=True):
            values = outputs[name]
            weight = local[-1].index_select(0, chunk.row_copy[name]).reshape((-1,) + (1,) * (values.dim() - 1))
            yield total, values.to(torch.float64) * weight, chunk.row_target[name]

    def _observe(self, outputs: dict[str, Tensor], local: list[Tensor], chunk: Chunk) -> None:
        if not self.collect:
            return
        for name in self.names:
            row_copy, row_target = chunk.row_copy[name], chunk.row_target[name]
            self.collect_values(name, outputs[name], local[-1], row_copy, row_target, self.frames.owner[chunk.frame])

    def collect_values(
        self, name: str, values: Tensor, weights: Tensor, row_copy: Tensor, row_target: Tensor, owner: Tensor
    ) -> None:
        """Keep the values of an output of some copies; ``weights`` and ``owner`` are those of the copies."""
        spec, values, weights = self.backbone.outputs[name], values.detach(), weights.detach()
        self.collected[name].append((values, weights[row_copy], row_target))
        if spec.reduce is not None and self.frames.scope == "structure":
            # All atoms of a structure share their frames: what varies is the reduced value of each copy.
            reduced = spec.reduce_atoms(values, row_copy, weights.shape[0])
            self.collected[name + REDUCED].append((reduced, weights, owner))


class _Recomputed(torch.autograd.Function):
    """The sum whose graph, gradients included, never exists for more than one chunk.

    `torch.utils.checkpoint` frees activations after the first backward pass, but the gradient inside (the forces) would
    keep them for a second one. Here the forward pass returns sums and gradients as plain numbers, and the backward pass
    evaluates each chunk again with a graph and differentiates both.
    """

    @staticmethod
    def forward(ctx: Any, function: WeightedSum, n_tensors: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.n_tensors = function, n_tensors
        device = tensors[0].device.type
        ctx.devices = [tensors[0].device] if device == "cuda" else []
        ctx.random_state = torch.get_rng_state()
        ctx.device_state = torch.cuda.get_rng_state(tensors[0].device) if device == "cuda" else None
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            plain = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:n_tensors]]
            sums, gradients = function.in_turns(plain)
        return (*sums, *gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        function: WeightedSum = ctx.function
        tensors, parameters = list(ctx.saved_tensors[: ctx.n_tensors]), list(ctx.saved_tensors[ctx.n_tensors :])
        # As it was in the forward pass: random numbers (dropout) and mixed precision.
        with torch.random.fork_rng(devices=ctx.devices), torch.autocast(**ctx.autocast):
            torch.set_rng_state(ctx.random_state)
            if ctx.device_state is not None:
                torch.cuda.set_rng_state(ctx.device_state, tensors[0].device)
            if again:
                found, of_parameters = _differentiated(function, tensors, parameters, list(cotangents))
            else:
                found, of_parameters = function.backward(tensors, list(cotangents))
        return (None, None, *found, *of_parameters)


def _differentiated(
    function: WeightedSum, tensors: list[Tensor], parameters: list[Tensor], cotangents: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`WeightedSum.backward` with a graph, for higher derivatives: all chunks at once."""
    with torch.enable_grad():
        tensors = [t.view_as(t) for t in tensors]
        sums, gradients = function.together(tensors)
        results = [
            (result, cotangent)
            for result, cotangent in zip([*sums, *gradients], cotangents, strict=True)
            if cotangent is not None and result.requires_grad
        ]
        wanted = [t for t in (*tensors, *parameters) if t.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if results and wanted:
            values, given = [result for result, _ in results], [cotangent for _, cotangent in results]
            found = list(torch.autograd.grad(values, wanted, given, allow_unused=True, create_graph=True))
    iterator = iter(found)
    everything = [next(iterator) if t.requires_grad else None for t in (*tensors, *parameters)]
    return everything[: len(tensors)], everything[len(tensors) :]


def _some(parts: list[Part], frames: Tensor) -> list[Part]:
    """What is left of calls if only some frames are evaluated."""
    left = [Part(part.frame[frames[part.frame]], part.invariant) for part in parts]
    return [part for part in left if part.frame.shape[0]]


def _leaves(tensors: list[Tensor], rows: list[Tensor | None]) -> list[Tensor]:
    """Rows of tensors, cut off from what they were computed from: gradients wanted here are partial ones."""
    with torch.no_grad():
        local = [t.detach() if at is None else t.index_select(0, at) for t, at in zip(tensors, rows, strict=True)]
    return [t.requires_grad_(whole.requires_grad) for t, whole in zip(local, tensors, strict=True)]


def _partial(scalar: Tensor, tensors: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradient with respect to every tensor, zeros where there is no dependence."""
    found: list[Tensor | None] = [None] * len(tensors)
    if scalar.requires_grad and tensors:
        found = list(torch.autograd.grad(scalar, tensors, create_graph=create_graph, allow_unused=True))
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _add(total: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        total.add_(values)
    else:
        total.index_add_(0, rows, values)
