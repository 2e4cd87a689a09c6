"""The one evaluator: rotate, evaluate in chunks, rotate back, average."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.averaging import Average, chunk_limit
from symmetrize.backbone import Backbone
from symmetrize.compilation import compile_for_inference, inference
from symmetrize.data import replace, validate, where, with_neighbors
from symmetrize.errors import (
    CostWarning,
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    NoFrameError,
    did_you_mean,
)
from symmetrize.evaluation import HALVES
from symmetrize.forecast import make_forecast
from symmetrize.frames import FrameMethod, FrameSet, Scope, Stratum, check_scope
from symmetrize.methods.ecse import ECSE
from symmetrize.plan import Plan, make_plan
from symmetrize.representations import OutputSpec, check_group


class Symmetrizer(torch.nn.Module):
    r"""A backbone, averaged over the frames of a method: equivariant as the method is.

    .. math:: F(x) = \frac{\sum_k w_k(x)\, \rho(g_k(x))\, f(g_k(x)^{-1} x)}{\sum_k w_k(x)}

    Parameters
    ----------
    backbone : Backbone
        The model to be symmetrised.
    method : FrameMethod
        Where frames and weights come from, such as `symmetrize.ECSE`.
    group : {"O(3)", "SO(3)"}
        Rotations with or without inversion.
    scope : {"atom", "structure"}, optional
        ``"atom"``: every atom's environment is evaluated in frames of its own (exactly size-consistent, linear cost;
        per-atom outputs only). ``"structure"``: whole structures, in frames around the centroid of a finite structure
        (or as the method has them).
        By default ``"atom"`` for strictly local backbones with per-atom outputs (and methods that can do it), else
        ``"structure"``: decided here, from declarations, and never by the data.
    chunk_size : int, optional
        Atoms per call of the backbone, rotated copies included. Memory grows with it and not with the number of
        frames. By default such that a call holds about 4096 atoms and edges on a CPU, 131072 elsewhere.

    Notes
    -----
    Keeps nothing between calls. Outputs have the dtype of the positions, those with a composition baseline float64.
    A backbone in bfloat16 or float16 (``model.backbone.to(torch.bfloat16)``) takes float32 or float64 positions:
    frames, weights and rotations do not become less precise, nor do sums; what the backbone sees and computes is
    rounded. Copies look the same however the input is oriented, so that they round to the same numbers, but where a
    local coordinate lies between two of them: there outputs jump by the rounding of the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: FrameMethod,
        group: str = "O(3)",
        scope: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise InvalidTypeError(f"backbone: expected a Backbone, got {type(backbone).__name__}")
        if not isinstance(method, FrameMethod):
            raise InvalidTypeError(f"method: expected a FrameMethod such as ECSE(), got {type(method).__name__}")
        if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool)):
            raise DeclarationError(f"chunk_size: expected a number of atoms or None, got {chunk_size!r}")
        if chunk_size is not None and chunk_size < 1:
            raise DeclarationError(f"chunk_size: expected a positive number of atoms, got {chunk_size}")
        self.backbone = backbone
        self.method = method
        self.group = check_group(group)
        self.scope = _resolve_scope(backbone, method, scope)
        if self.group not in method.groups:
            raise DeclarationError(
                f"group: {type(method).__name__} averages over {' or '.join(method.groups)}, got {group!r}"
            )
        self.chunk_size = chunk_size
        self.l_max = max(spec.l_max for spec in backbone.outputs.values())
        if method.auxiliary is not None:
            for name, spec in backbone.outputs.items():
                other = method.auxiliary.outputs.get(name)
                if other is None or (other.irreps, other.cartesian, other.per) != (
                    spec.irreps,
                    spec.cartesian,
                    spec.per,
                ):
                    raise DeclarationError(f"fallback: expected an output {name!r} ({spec}) as well, got {other}")
        # A model that was loaded for evaluation stays in evaluation mode.
        self.train(backbone.training)

    def forward(
        self,
        batch: Data,
        *,
        forces: bool = False,
        stress: bool = False,
        energy: str = "energy",
        spread: bool = False,
        create_graph: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Symmetrised outputs of a batch.

        Parameters
        ----------
        batch : Data
            See `symmetrize.keys`; missing neighbor lists are built on a copy.
        forces, stress : bool
            Also return the conservative ``"forces"``, -dE/dr of shape (n_atoms, 3), and ``"stress"``, dE/d(strain)
            divided by the volume, symmetric, of shape (n_structures, 3, 3) (positive under tension, as in ASE): the
            exact gradient, through backbone, frames and weights.
        energy : str
            The output that forces and stress derive from.
        spread : bool
            Also return ``"<name>_spread"``: the weighted standard deviation of every output over the frames (norm over
            components), in (n_rows,). In atom scope the spread of a sum adds atoms in quadrature.
        create_graph : bool, optional
            Keep forces and stress differentiable. Default: in training mode, or if the positions require a gradient.
        generator : torch.Generator, optional
            For stochastic methods.

        Returns
        -------
        dict of str to Tensor
            Outputs by name; with ``reduce`` the reduced output under the name and its rows as ``"atomic_<name>"``.
            Energies with a composition baseline are float64 (float32 cannot resolve a total energy). With forces
            everything is detached unless ``create_graph``; without, use ``torch.no_grad()`` if no gradient is wanted.

        Raises
        ------
        InvalidInputError, InvalidTypeError
            For bad input, naming field, structure and atom.
        BackboneOutputError
            If the backbone does not return what it declared, or something not finite.
        """
        conservative = forces or stress
        if conservative and torch.is_inference_mode_enabled():
            # Forces are derivatives, which inference mode (lightning's validation, for one) does not record.
            with torch.inference_mode(False):
                copied = {name: v.clone() if isinstance(v, Tensor) else v for name, v in batch}
                return self.forward(
                    replace(batch, **copied),
                    forces=forces,
                    stress=stress,
                    energy=energy,
                    spread=spread,
                    create_graph=False,
                    generator=generator,
                )
        batch = self._checked(batch)
        if conservative:
            check_energy(self.backbone, energy)
        if stress:
            _refuse_without_cell(batch)
        if create_graph is None:
            create_graph = conservative and torch.is_grad_enabled() and (self.training or batch[keys.POS].requires_grad)
        with torch.set_grad_enabled(torch.is_grad_enabled() or conservative):
            strained, leaves = _make_differentiable(batch, stress) if conservative else (batch, [])
            graph = self._with_edges(strained)
            frames = self._frames(graph, generator)
            total = Average(self, graph, frames, energy if conservative else None, create_graph, spread)
            # Compiled code can be differentiated once, here, and not again by whoever gets the result.
            once = conservative or not torch.is_grad_enabled()
            with inference(once and not create_graph and not self.training):
                out = total.run()
            if conservative:
                gradients = torch.autograd.grad(
                    total.differentiated, leaves, total.cotangents, create_graph=create_graph, allow_unused=True
                )
                if forces:
                    gradient = gradients[0] if gradients[0] is not None else torch.zeros_like(batch[keys.POS])
                    out["forces"] = -gradient
                if not create_graph:
                    # Part of their graph is gone; better no derivative than half of one.
                    out = {name: value.detach() for name, value in out.items()}
                if stress:
                    out["stress"] = gradients[-1] / torch.linalg.det(batch[keys.CELL]).abs()[:, None, None]
        return out

    def compile(self, **options: Any) -> None:
        """Compile the dense parts of the backbone for inference, in place, with ``torch.compile``.

        Energies, forces and stress then take them, in evaluation mode; training, ``create_graph=True`` and outputs
        that the caller may differentiate are evaluated as before, since compiled code has no second derivatives.
        Results agree to rounding. The first call for energies, and the first one for forces, compile; sizes are
        symbols, so that other sizes do not compile again. Copies and saved models are not compiled.

        Parameters
        ----------
        options
            For ``torch.compile``, such as ``fullgraph=True`` or ``mode``; ``dynamic=True`` by default.

        Raises
        ------
        DeclarationError
            If the backbone names no such parts (see `Backbone.compilable`).
        """
        parts = self.backbone.compilable()
        if not parts:
            raise DeclarationError(
                f"compile: {type(self.backbone).__name__} names no parts that compile (see Backbone.compilable)"
            )
        for part in parts:
            compile_for_inference(part, **options)

    def frames(self, batch: Data, generator: torch.Generator | None = None) -> FrameSet:
        """Group elements and weights of a batch."""
        return self._frames(self._with_edges(self._checked(batch)), generator)

    def explain(self, batch: Data) -> Plan:
        """What evaluating this batch will take: evaluations, copies, time and memory relative to the bare backbone.

        Nothing is evaluated, and no more than a few million pairs of candidates are held at a time. What will be
        expensive is said in ``plan.warnings``, and as a `symmetrize.errors.CostWarning`.
        """
        with torch.no_grad():
            graph = self._with_edges(self._checked(batch))
            hops = self.backbone.oriented_field if self.scope == "atom" else None
            around, forecast = self._surroundings(graph), None
            if isinstance(self.method, ECSE) and not self.method.pooled:
                forecast = make_forecast(self.method, around, self.scope, self._found)
            sets = [self._found(around, None)] if forecast is None else forecast.sets(around, self._found)
            stars = hops is not None and hops <= 1 and self.backbone.shares_work
            limit = chunk_limit(self, graph)
            plan = make_plan(graph, sets, forecast, hops, limit, self.group, stars, forecast is not None)
        if plan.warnings:
            warnings.warn("; ".join(plan.warnings), CostWarning, stacklevel=2)
        return plan

    def extra_repr(self) -> str:
        what = "environments of atoms" if self.scope == "atom" else "whole structures"
        return f"group={self.group}, scope={self.scope} ({what}), chunk_size={self.chunk_size}"

    def _checked(self, batch: Data) -> Data:
        batch = validate(batch)
        parameters = list(self.backbone.parameters())
        devices = {p.device for p in parameters} | {
            batch[name].device for name in batch.keys() if isinstance(batch[name], Tensor)
        }
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise InvalidInputError(f"batch: expected all fields on the device of the model, got {found}")
        expected = {p.dtype for p in parameters if p.is_floating_point()}
        dtype = batch[keys.POS].dtype
        narrow = bool(expected) and expected <= set(HALVES) and dtype in (torch.float32, torch.float64)
        if expected and dtype not in expected and not narrow:
            raise InvalidTypeError(
                f"pos: expected the dtype of the backbone's parameters ({next(iter(expected))}), got {dtype}; "
                "convert one of them: model.to(torch.float64), or from_ase(..., dtype=torch.float32)"
            )
        for name, irreps in self.backbone.vectors.items():
            value, spec = batch.get(name), OutputSpec(irreps)
            shape = (batch[keys.POS].shape[0], *spec.shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = "none" if value is None else tuple(getattr(value, "shape", ()))
                raise InvalidInputError(
                    f"{name}: expected a field of shape {shape} ({irreps}), as batch.{name} = ..., got {got}"
                )
            if value.dtype != dtype:
                raise InvalidTypeError(f"{name}: expected the dtype of pos ({dtype}), got {value.dtype}")
            bad = (~torch.isfinite(value.detach())).reshape(len(value), -1).any(dim=1).nonzero()
            if len(bad):
                raise InvalidInputError(
                    f"{name}: expected finite values, got {value[bad[0, 0]].tolist()} at "
                    f"{where(batch, int(bad[0, 0]), 'atom')}"
                )
        return batch

    def _with_edges(self, batch: Data) -> Data:
        return batch if self.backbone.cutoff is None else with_neighbors(batch, self.backbone.cutoff)

    def _frames(self, graph: Data, generator: torch.Generator | None) -> FrameSet:
        return self._found(self._surroundings(graph), generator)

    def _surroundings(self, graph: Data) -> Data:
        """The batch with the neighbor list of the candidates."""
        hops = self.backbone.oriented_field or 1
        if self.scope != "atom" or hops == 1:
            return graph
        # Candidates have to cover everything the backbone sees from a center, or the average is not exact.
        bare = replace(graph, **{keys.EDGE_INDEX: None, keys.CELL_SHIFT: None, keys.EDGE_CUTOFF: None})
        return with_neighbors(bare, hops * float(self.backbone.cutoff or 0.0))

    def _found(self, graph: Data, generator: torch.Generator | None = None) -> FrameSet:
        frames = self.method.frames(graph, group=self.group, scope=self.scope, l_max=self.l_max, generator=generator)
        degenerate = (frames.stratum == int(Stratum.AXIS)) | (frames.stratum == int(Stratum.POINT))
        if self.backbone.vectors and bool(degenerate.any()):
            raise NoFrameError(
                f"frames: the environment of {where(graph, int(frames.owner[degenerate][0]), self.scope)} is collinear "
                "(or nearly so) or empty; the averages that cover it are exact only for backbones without vector "
                f"inputs, got {sorted(self.backbone.vectors)}"
            )
        return frames


def check_energy(backbone: Backbone, energy: str) -> None:
    """Refuse an output that forces cannot derive from."""
    spec = backbone.outputs.get(energy)
    if spec is None:
        raise DeclarationError(f"energy: unknown output {energy!r}, {did_you_mean(str(energy), backbone.outputs)}")
    if not spec.is_invariant_scalar or (spec.per == "atom" and spec.reduce != "sum"):
        raise DeclarationError(
            f"energy: forces derive from a '0e' that is per structure or a sum over atoms, {energy!r} is {spec}"
        )


def _resolve_scope(backbone: Backbone, method: FrameMethod, scope: str | None) -> Scope:
    per_structure = sorted(name for name, spec in backbone.outputs.items() if spec.per == "structure")
    if scope is None:
        local = backbone.oriented_field in (0, 1) and backbone.cutoff is not None
        preferred: Scope = "atom" if local and not per_structure else "structure"
        scope = preferred if preferred in method.scopes else method.scopes[0]
    resolved = check_scope(scope)
    if resolved not in method.scopes:
        supported = " or ".join(map(repr, method.scopes))
        raise DeclarationError(f"scope: {type(method).__name__} works in scope {supported}, got {resolved!r}")
    if resolved == "atom":
        if per_structure:
            raise DeclarationError(f"scope='atom': expected per-atom outputs only, {per_structure} are per structure")
        if backbone.receptive_field is None:
            raise DeclarationError(
                "scope='atom': expected a backbone with a finite receptive_field (hops), got None: it sees everything"
            )
        if backbone.cutoff is None:
            raise DeclarationError("scope='atom': expected a backbone with a cutoff, got None")
    return resolved


def _make_differentiable(batch: Data, stress: bool) -> tuple[Data, list[Tensor]]:
    """Positions and, for the stress, a symmetric strain as leaves to differentiate with respect to."""
    pos = batch[keys.POS]
    if not pos.requires_grad:
        pos = pos.detach().requires_grad_()
    if not stress:
        return replace(batch, **{keys.POS: pos, keys.EDGE_VEC: None}), [pos]
    n_structures = batch[keys.PTR].shape[0] - 1
    strain = torch.zeros(n_structures, 3, 3, dtype=pos.dtype, device=pos.device, requires_grad=True)
    symmetric = (strain + strain.transpose(1, 2)) / 2
    moved = pos + (pos[:, None, :] @ symmetric[batch[keys.BATCH]])[:, 0]
    cell = batch[keys.CELL] + batch[keys.CELL] @ symmetric
    return replace(batch, **{keys.POS: moved, keys.CELL: cell, keys.EDGE_VEC: None}), [pos, strain]


def _refuse_without_cell(batch: Data) -> None:
    volume = torch.linalg.det(batch[keys.CELL].detach().to(torch.float64)).abs()
    flat = (~(volume > 0.0)).nonzero()
    if len(flat):
        raise InvalidInputError(f"stress: expected a cell with a volume, structure {int(flat[0])} has none")
