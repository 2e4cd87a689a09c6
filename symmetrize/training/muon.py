"""Muon: momentum orthogonalised by a Newton-Schulz iteration, for matrices; AdamW for everything else.

Not ``torch.optim.Muon`` (torch 2.9), although momentum, coefficients and, with ``match_rms_adamw``, the scale of a step
are the same: it iterates in bfloat16, so its steps differ by one percent or so from those in the precision of the
parameters, which the shipped weights were trained with; it steps matrix by matrix, where here those of one shape are
stacked; and it takes matrices only, where Lightning's automatic optimisation wants one optimizer for all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Odd polynomial x -> a x + b x^3 + c x^5 with a steep slope at 0 that keeps (0, 1] near 1 (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor U V^T of each matrix U S V^T.

    Parameters
    ----------
    matrices : Tensor of shape (n, rows, columns)
    steps : int
        Newton-Schulz iterations; after five, singular values are between about 0.7 and 1.2.

    Returns
    -------
    Tensor of shape (n, rows, columns)
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    a, b, c = _QUINTIC
    wide = wide / wide.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    for _ in range(steps):
        gram = wide @ wide.transpose(1, 2)
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``matrix=True``, AdamW for the others.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's, so that one
    learning rate serves both (Liu et al. 2025, "Muon is scalable for LLM training").

    Parameters
    ----------
    groups : iterable of dict
        Parameter groups with an entry ``matrix``; parameters of matrix groups have two axes.
    lr : float
        Learning rate of both parts.
    momentum : float
        Of the matrices, Nesterov's variant.
    betas : tuple of float
        Decay rates of AdamW's moments.
    weight_decay : float
        Decoupled weight decay of both parts.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "matrix": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients that are present."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if not with_gradient:
                continue
            torch._foreach_mul_(with_gradient, 1.0 - group["lr"] * group["weight_decay"])
            if group["matrix"]:
                self._step_matrices(with_gradient, group)
            else:
                self._step_others(with_gradient, group)
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in parameters:
            rows, columns = parameter.shape
            by_shape.setdefault((rows, columns), []).append(parameter)
        for (rows, columns), same in by_shape.items():
            directions = []
            for parameter in same:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient = torch.as_tensor(parameter.grad)
                state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
                directions.append(gradient.lerp(state["momentum"], group["momentum"]))
            updates = orthogonalize(torch.stack(directions))
            step = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
            torch._foreach_add_(same, list(updates.unbind()), alpha=step)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
                state["count"] = 0
            state["count"] += 1
            state["mean"].lerp_(parameter.grad, 1.0 - beta1)
            state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
            denominator = (state["square"] / (1.0 - beta2 ** state["count"])).sqrt_().add_(1e-8)
            parameter.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1.0 - beta1 ** state["count"]))


def muon_groups(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of a network: matrices of linear layers with more than one output, and the rest."""
    matrices: list[Tensor] = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear) and min(layer.weight.shape) > 1 and layer.weight.requires_grad:
            matrices.append(layer.weight)
    chosen = {id(parameter) for parameter in matrices}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": matrices, "matrix": True}, {"params": rest, "matrix": False}]
    return [group for group in groups if group["params"]]
