"""Seconds of several functions, measured in turns: what slows the machine down for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.backbone import Backbone
from symmetrize.data import replace, validate, with_neighbors


class Times:
    """Seconds of each function in each round."""

    def __init__(self, rounds: list[dict[str, float]]) -> None:
        self.rounds = rounds

    def seconds(self, name: str) -> float:
        """Least over rounds: what other processes do only adds to it."""
        return min(r[name] for r in self.rounds)

    def ratio(self, over: str, under: str) -> float:
        """Ratio of the least times."""
        return self.seconds(over) / self.seconds(under)


def in_turns(functions: Mapping[str, Callable[[], object]], n_rounds: int, device: torch.device) -> Times:
    """Time all functions ``n_rounds`` times, after one call of each that does not count.

    One thread on a CPU: the time of this process, in which nobody else shares.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    rounds = []
    for n in range(n_rounds + 1):
        seconds = {}
        for name, function in functions.items():
            _wait(device)
            start = clock()
            function()
            _wait(device)
            seconds[name] = clock() - start
        if n:
            rounds.append(seconds)
    return Times(rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_energy(backbone: Backbone, batch: Batch) -> Tensor:
    """Neighbor list and one forward pass, without this package in between."""
    with torch.no_grad():
        return backbone(_graph(backbone, validate(batch)))["energy"].sum()


def bare_forces(backbone: Backbone, batch: Batch) -> Tensor:
    """Neighbor list, energy, and forces by one backward pass."""
    pos = batch[keys.POS].detach().requires_grad_()
    energy = backbone(_graph(backbone, replace(validate(batch), pos=pos)))["energy"].sum()
    return -torch.autograd.grad(energy, pos)[0]


def _graph(backbone: Backbone, batch: Batch) -> Batch:
    return batch if backbone.cutoff is None else with_neighbors(batch, backbone.cutoff)
