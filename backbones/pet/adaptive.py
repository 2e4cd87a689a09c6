"""Cutoffs that adapt to the density: about as many neighbors for every atom.

Both methods are those of metatrain (2026.4), whose models they have to reproduce. With f_c the smooth step of width w
that falls to 0 at r, an atom counts ``n(r) = sum_j f_c(d_j; r, w) + N (r / r_max)^3`` neighbors within r. Because of
the cubic term the count reaches N at r_max at the latest. "solver" solves n(r) = N; "grid" averages over a grid of
radii, with weights exp(-[(n - N) / n']^2 / 2).

All of it depends on distances only, so that it is computed once for all orientations. The cutoff of an edge is the mean
of those of its two atoms, and depends on the neighbors of both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edges import step


def count(
    radius: Tensor, length: Tensor, target: Tensor, wanted: float, largest: float, width: float
) -> tuple[Tensor, Tensor]:
    """n(r) of each atom and its derivative with respect to r.

    Parameters
    ----------
    radius : Tensor of shape (n_atoms,)
    length, target : Tensor of shape (n_edges,)
        Length of each edge, and the atom that it belongs to.
    wanted, largest, width : float
        N, r_max and w.
    """
    x = (length - (radius.index_select(0, target) - width)) / width
    weight, _ = step(x, "bump")
    # f = [1 + tanh(cot(pi x))] / 2 has df/dx = -2 pi f (1 - f) / sin(pi x)^2, and dx/dr = -1 / w.
    inside = (weight > 0.0) & (weight < 1.0)
    sine = torch.sin(math.pi * torch.where(inside, x, torch.full_like(x, 0.5)))
    slope = torch.where(inside, weight * (1.0 - weight) / (sine * sine), torch.zeros_like(x)) * (2.0 * math.pi / width)
    reduced = radius / largest
    n = torch.zeros_like(radius).index_add(0, target, weight) + wanted * reduced**3
    return n, torch.zeros_like(radius).index_add(0, target, slope) + 3.0 * wanted / largest * reduced**2


def solve(length: Tensor, target: Tensor, n_atoms: int, wanted: float, largest: float, width: float) -> Tensor:
    """Radius of each atom with n(r) = N, within [r_max / 16, r_max].

    Newton's method, kept strictly inside a bracket, with a bisection every third step, until no radius moves; and a
    last step that carries the derivative. (metatrain takes ten steps, which are not always enough: its radii jump where
    a step lands on the end of the bracket.) First derivatives are those of the implicit function, -(dn/dd) / (dn/dr);
    the second ones are exact as well, since the last step starts from a radius that has the first ones already.
    """
    fixed = length.detach()
    low = torch.zeros(n_atoms, dtype=length.dtype, device=length.device)
    high = torch.full_like(low, largest)
    radius = 0.5 * high
    settled = 1e-11 if length.dtype == torch.float64 else 1e-5
    for number in range(120):
        n, slope = count(radius, fixed, target, wanted, largest, width)
        excess = n - wanted
        below = excess <= 0.0
        low = torch.where(below, radius, low)
        high = torch.where(below, high, radius)
        newton = radius - excess / slope.clamp(min=1e-6)
        inside = (newton > low) & (newton < high)
        # What moves by less than the root of the precision is there after two more steps.
        done = ((newton - radius).abs() <= settled * largest) | (high - low <= settled * largest)
        if bool(done.all()):
            break
        if number % 3 == 2:
            inside = torch.zeros_like(inside)
        radius = torch.where(done, radius, torch.where(inside, newton, 0.5 * (low + high)))
    for _ in range(2):
        n, slope = count(radius, fixed, target, wanted, largest, width)
        radius = (radius - (n - wanted) / slope.clamp(min=1e-6)).clamp(0.0, largest)
    n, slope = count(radius, fixed, target, wanted, largest, width)
    slope = slope.clamp(min=1e-6)
    correction = (n - wanted) / slope
    if length.requires_grad:
        n = count(radius, length, target, wanted, largest, width)[0]
        moving = radius - (n - n.detach()) / slope  # in value the radius, with its first derivative
        n, slope = count(moving, length, target, wanted, largest, width)
        correction = correction + (n - n.detach()) / slope.clamp(min=1e-6)
        radius = moving
    return (radius - correction).clamp(largest / 16.0, largest)


def average_over_grid(
    length: Tensor, target: Tensor, n_atoms: int, wanted: float, largest: float, width: float
) -> Tensor:
    """Mean radius of each atom over a grid from 0.5 in steps of w / 4, weighted by how close its count is to N."""
    probes = torch.arange(0.5, largest, width / 4.0, dtype=length.dtype, device=length.device)
    n_probes = probes.shape[0]
    weight, _ = step((length[:, None] - (probes[None, :] - width)) / width, "bump")
    counted = torch.zeros(n_atoms, n_probes, dtype=length.dtype, device=length.device).index_add(0, target, weight)
    # Here the cubic term runs along the numbers of the probes.
    ramp = torch.linspace(0.0, 1.0, n_probes, dtype=length.dtype, device=length.device)
    excess = counted - wanted + wanted * ramp**3
    if n_probes == 1:
        slope = 0.5 * excess.abs() + 1e-12
    else:
        inner = 0.5 * (excess[:, 2:] - excess[:, :-2])
        slope = torch.cat([excess[:, 1:2] - excess[:, :1], inner, excess[:, -1:] - excess[:, -2:-1]], dim=1)
        slope = slope.abs().clamp(min=1e-12)
    return torch.softmax(-0.5 * (excess / slope) ** 2, dim=1) @ probes


def adaptive_cutoffs(
    length: Tensor,
    source: Tensor,
    target: Tensor,
    n_atoms: int,
    wanted: float,
    largest: float,
    width: float,
    method: str,
) -> Tensor:
    """Cutoff of each edge.

    Parameters
    ----------
    length, source, target : Tensor of shape (n_edges,)
        All edges of a structure up to the largest cutoff.
    n_atoms : int
    wanted : float
        N, about the number of neighbors of each atom.
    largest : float
        r_max.
    width : float
        w.
    method : str
        "solver" or "grid".

    Returns
    -------
    Tensor of shape (n_edges,)
    """
    if method == "solver":
        radius = solve(length, target, n_atoms, wanted, largest, width)
    else:
        radius = average_over_grid(length, target, n_atoms, wanted, largest, width)
    return 0.5 * (radius.index_select(0, source) + radius.index_select(0, target))
