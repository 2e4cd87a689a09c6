"""What a backbone promises, tried on a few small structures: cheap enough to run whenever one is made.

Every probe evaluates the backbone on a changed copy of the same structures and compares. An error counts if it exceeds
what rounding explains: ``1e4 eps`` of how much the output varies with the positions, plus ``1e3 eps`` of its size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import replace, with_neighbors
from symmetrize.errors import DeclarationError
from symmetrize.wrapping.trials import ProbeFailure, Trial, alone, copied, evaluate, rms, taken, with_edges


class ProbeWarning(UserWarning):
    """A backbone does what was declared, but probably not what was meant."""


def probe_backbone(backbone: Backbone, batch: Data, *, seed: int = 0) -> None:
    """Try what a backbone declares and promises, in evaluation mode; its mode, parameters and buffers stay as they are.

    In this order: it runs; its outputs have the names, shapes and kind declared and are finite; it changes none of its
    inputs; it gives the same again; renumbering atoms, shifting structures, evaluating them alone, asking for some
    centers only, and moving atoms outside the receptive field change nothing that they should not. Then it is warned
    about positions or vectors without influence, gradients that do not reach the positions, second derivatives that do
    not exist, outputs of another precision, and randomness or mixing of structures in training mode.

    Parameters
    ----------
    backbone : Backbone
    batch : Data
        Structures of different sizes; from a single one a second is made by leaving out atoms.
    seed : int

    Raises
    ------
    ProbeFailure
        Naming the property, the output, the deviation, and the likely cause.
    InvalidInputError, InvalidTypeError
        If the batch itself is unusable.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(batch)):
            torch.manual_seed(seed)
            trial = Trial(backbone, batch, seed)
            for probe in (_mutation, _determinism, _permutation, _translation, _batch, _centers, _locality):
                probe(trial)
            for look in (_precision, _vectors, _gradients):
                look(trial)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if backbone.training:
        with torch.random.fork_rng(devices=_cuda_devices(batch)):
            _training_mode(trial)


def _mutation(trial: Trial) -> None:
    given = copied(trial.batch)
    evaluate(trial.backbone, given)
    for name in trial.batch.keys():
        before, after = trial.batch[name], given.get(name)
        if isinstance(before, Tensor) and not (isinstance(after, Tensor) and torch.equal(before, after)):
            raise ProbeFailure(
                "mutation",
                f"mutation: expected the batch to stay as it is, got a changed field {name!r}. The module writes into "
                "its input (an operation in place such as '-=' or 'add_'); let it work on a copy",
            )
        if isinstance(after, Tensor) and after.requires_grad:
            raise ProbeFailure(
                "mutation",
                f"mutation: expected the batch to stay as it is, got a field {name!r} that requires a gradient. Does "
                "the module differentiate by itself? Let it return the energy, and ask the Symmetrizer for forces",
            )


def _determinism(trial: Trial) -> None:
    torch.manual_seed(20_000_003)
    trial.compare(
        "determinism",
        trial.run(trial.batch),
        trial.reference,
        "calling it again",
        "In evaluation mode a module has to be a function: dropout that ignores .eval() "
        "(torch.nn.functional.dropout without training=self.training), random sampling, or state kept between calls?",
    )


def _permutation(trial: Trial) -> None:
    batch = trial.batch
    ptr = batch[keys.PTR]
    parts = []
    for first, last in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        n = last - first
        # Never the identity: a cyclic shift by a random amount, in a random order of the atoms.
        order = torch.randperm(n, generator=trial.generator)
        image = torch.empty_like(order)
        image[order] = order.roll(1)
        parts.append(first + image)
    new = torch.cat(parts).to(ptr.device)
    structures = torch.arange(len(ptr) - 1, device=ptr.device)
    got = trial.run(with_edges(trial.backbone, taken(batch, new, structures, ptr.diff())))
    rows = {name: v[new] if trial.backbone.outputs[name].per == "atom" else v for name, v in trial.reference.items()}
    trial.compare(
        "permutation",
        got,
        rows,
        "renumbering the atoms (and with them their rows)",
        "The module depends on the order of its points: positional encodings, a recurrent or convolutional layer "
        "along the points, a flattened input, or sampling that starts at the first point?",
    )


def _translation(trial: Trial) -> None:
    batch = trial.batch
    shift = 2.0 * trial.length * trial.normal((batch[keys.PTR].shape[0] - 1, 3))
    moved = replace(batch, **{keys.POS: batch[keys.POS] + shift[batch[keys.BATCH]]})
    trial.compare(
        "translation",
        trial.run(with_edges(trial.backbone, moved)),
        trial.reference,
        "shifting every structure",
        "The module reads absolute positions: declare center='centroid', which hands in positions relative to the "
        "centroid of each structure, or let it read edge_vec",
    )


def _batch(trial: Trial) -> None:
    batch, outputs = trial.batch, trial.backbone.outputs
    ptr = batch[keys.PTR]
    for s in range(len(ptr) - 1):
        got = trial.run(with_edges(trial.backbone, alone(batch, s)))
        expected = {
            name: value[ptr[s] : ptr[s + 1]] if outputs[name].per == "atom" else value[s : s + 1]
            for name, value in trial.reference.items()
        }
        trial.compare(
            "batch",
            got,
            expected,
            f"evaluating structure {s} ({int(ptr[s + 1] - ptr[s])} of {ptr.diff().tolist()} atoms) alone",
            "Something reaches across structures: padding that the module takes for points (no mask, or one of the "
            "opposite meaning: 'mask' is True for points, 'padding_mask' for padding; or a bias that is added to rows "
            "of padding behind the mask), pooling or attention over the whole batch instead of per structure, or "
            "normalization over the batch?",
        )


def _centers(trial: Trial) -> None:
    outputs = {name: spec for name, spec in trial.backbone.outputs.items() if spec.per == "atom"}
    if not outputs:
        return
    mask = torch.arange(len(trial.batch[keys.POS]), device=trial.batch[keys.POS].device) % 3 != 1
    got = trial.run(replace(trial.batch, **{keys.CENTER_MASK: mask}))
    trial.compare(
        "centers",
        got,
        {name: trial.reference[name][mask] for name in outputs},
        "asking for the rows of some centers only (center_mask)",
        "Rows of center_mask are wanted, the other atoms are still neighbors",
    )


def _locality(trial: Trial) -> None:
    """A chain in which every hop reaches the next atom: what lies one hop further than declared must not matter."""
    backbone, hops = trial.backbone, trial.backbone.receptive_field
    outputs = [name for name, spec in backbone.outputs.items() if spec.per == "atom"]
    if hops is None or not outputs:
        return
    spacing = 0.6 * (backbone.cutoff or trial.length)
    n = hops + 4
    atoms = torch.arange(n, device=trial.batch[keys.POS].device) % int(trial.batch[keys.PTR][1])
    chain = taken(trial.batch, atoms, torch.zeros_like(atoms[:1]), torch.tensor([n]))
    pos = torch.zeros_like(chain[keys.POS])
    pos[:, 0] = spacing * torch.arange(n)
    pos = pos + 0.05 * spacing * trial.normal(pos.shape)
    chain = replace(chain, **{keys.POS: pos, keys.CELL: torch.zeros_like(chain[keys.CELL])})
    chain[keys.PBC] = torch.zeros_like(chain[keys.PBC])
    moved_pos = pos.clone()
    # Outwards, so that nothing comes nearer.
    moved_pos[hops + 1 :] = pos[hops + 1 :] + 0.2 * spacing * torch.tensor([1.0, 0.7, -0.4]).to(pos)
    before = trial.run(with_edges(backbone, chain))
    after = trial.run(with_edges(backbone, replace(chain, **{keys.POS: moved_pos})))
    for changed, what in (
        (after, f"moving what is {hops + 1} or more hops (of {backbone.cutoff}) away"),
        # Down to what an environment holds; networks may need a pair.
        (trial.run(with_edges(backbone, _first_atoms(chain, max(2, hops + 1)))), "removing what is further away"),
    ):
        trial.compare(
            "locality",
            {name: changed[name][:1] for name in outputs},
            {name: before[name][:1] for name in outputs},
            what,
            f"A row depends on more than receptive_field={hops} hops: further layers, pooling over the structure, "
            "or a neighbor list of its own? Declare the number of hops, or None for everything",
        )


def _first_atoms(batch: Data, n: int) -> Batch:
    atoms = torch.arange(n, device=batch[keys.POS].device)
    return taken(batch, atoms, torch.zeros_like(atoms[:1]), torch.tensor([n]))


def _precision(trial: Trial) -> None:
    dtype = trial.batch[keys.POS].dtype
    for name, value in trial.reference.items():
        if value.dtype != dtype:
            _warn(f"output {name!r}: expected the dtype of the positions ({dtype}), got {value.dtype}")


def _vectors(trial: Trial) -> None:
    for name in trial.backbone.vectors:
        value = trial.batch[name]
        got = trial.run(replace(trial.batch, **{name: value + rms(value) * trial.normal(value.shape)}))
        if not _differ(trial, got):
            _warn(f"vectors: {name!r} is declared, but changing it changes no output: is it handed to the module?")


def _gradients(trial: Trial) -> None:
    """Whether gradients reach the positions, agree with differences, and can be differentiated again."""
    backbone, pos = trial.backbone, trial.batch[keys.POS]
    if not any(scale.variation > 0.0 for scale in trial.scales.values()):
        _warn("outputs: none depends on the positions: is the right field handed to the module?")
        return
    direction = trial.normal(pos.shape)
    direction = direction / direction.norm() * trial.length
    cotangents = {name: trial.normal(v.shape) / (rms(v) or 1.0) for name, v in trial.reference.items()}

    def functional(points: Tensor) -> Tensor:
        graph = replace(trial.batch, **{keys.POS: points, keys.EDGE_VEC: None})
        graph = with_neighbors(graph, backbone.cutoff) if backbone.cutoff is not None else graph
        got = backbone(graph)
        return torch.stack([(got[name] * c).sum() for name, c in cotangents.items()]).sum()

    def difference(h: float) -> float:
        with torch.no_grad():
            return float(functional(pos + h * direction) - functional(pos - h * direction)) / (2 * h)

    leaf = pos.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = functional(leaf)
            gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    except RuntimeError as error:
        _warn(f"gradient: none can be had ({str(error).splitlines()[0]}): no forces")
        return
    cause = "is something detached, turned into numpy, or computed under no_grad?"
    if gradient is None or not bool((gradient != 0).any()):
        _warn(
            f"gradient: outputs change with the positions, but no gradient reaches them ({cause}); forces would be zero"
        )
        return
    slope = float((gradient * direction).sum())
    step = 1e-4 if pos.dtype == torch.float64 else 1e-2
    once, twice = difference(step), difference(2 * step)
    size = max(abs(once), abs(slope))
    # Kinks (ReLU) make differences depend on the step: then they prove nothing.
    if abs(once - twice) <= 1e-3 * size and not abs(slope - once) <= 3e-2 * size:
        _warn(
            f"gradient: expected a slope of {once:.3g} along the positions, as by differences, got {slope:.3g}: wrong "
            f"forces; {cause}"
        )
    if any(spec.is_invariant_scalar for spec in backbone.outputs.values()):
        try:
            with torch.enable_grad():
                first = torch.autograd.grad(functional(leaf), leaf, create_graph=True)[0]
                if first.requires_grad:
                    torch.autograd.grad(first.square().sum(), leaf, allow_unused=True)
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            _warn(
                f"gradient: no second derivatives ({text}): forces can be had, but not trained on; for attention "
                "declare math_attention=True"
            )


def _training_mode(trial: Trial) -> None:
    """On a copy, since batch normalization keeps statistics."""
    try:
        backbone = copy.deepcopy(trial.backbone).train()
    except Exception:  # what cannot be copied is not looked at
        return
    with _quiet():
        try:
            torch.manual_seed(1)
            first = evaluate(backbone, copied(trial.batch))
            torch.manual_seed(2)
            again = evaluate(backbone, copied(trial.batch))
        except DeclarationError:
            return
    found = []
    dtype = trial.batch[keys.POS].dtype
    for name in first:
        if not float((first[name] - again[name]).abs().max()) <= trial.scales[name].limit(dtype):
            found.append("random (dropout)")
        elif not float((first[name] - trial.reference[name]).abs().max()) <= trial.scales[name].limit(dtype):
            found.append("different from those in evaluation mode (batch normalization)")
    if found:
        _warn(
            f"mode: the module is in training mode, where its outputs are {found[0]}; call .eval() to use it as it is"
        )


def _differ(trial: Trial, got: dict[str, Tensor]) -> bool:
    dtype = trial.batch[keys.POS].dtype
    return any(
        not float((got[name] - value).abs().max()) <= trial.scales[name].limit(dtype)
        for name, value in trial.reference.items()
    )


def _warn(message: str) -> None:
    warnings.warn(message, ProbeWarning, stacklevel=5)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cuda_devices(batch: Data) -> list[torch.device]:
    pos = batch.get(keys.POS)
    return [pos.device] if isinstance(pos, Tensor) and pos.is_cuda else []
