"""Halves of a transformer layer as single functions with hand-written first and second derivatives.

What `pointwise` and `attention` do for one operation is done here for everything between two residual connections:
normalization, linear maps, and the attention or the gate between them. Elementwise work happens in place or goes
directly to where the next matrix product reads it, and nothing is copied, added or kept by autograd in between.

Each block comes as three functions. ``F(x, weights)`` returns its value and, beside it, its preactivations z, which
nothing outside reads. ``G(g, x, z, weights)`` is the cotangent of x for a cotangent g of the value: it takes x and z as
if they were independent, and sends what its own derivative contributes to z back through F, where it joins the first
order before it meets a matrix. That way the second derivative of a linear map costs as many matrix products as it has
to: for a loss on energies and forces six per map, forward, forces, tangent, adjoint and two for the weights. Third
derivatives, and gradients with respect to weights that will be differentiated again, take the same functions written
with plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import merge, second_order, slopes, softmax_of, split

_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def _wanted(ctx: Any) -> list[bool]:
    """Which inputs need a gradient in this very pass: a pass for forces alone asks for none of the weights.

    ``ctx.needs_input_grad`` says what requires one in any pass. Where the engine cannot tell, that is the answer.
    """
    wanted = []
    for needs, (node, _) in zip(ctx.needs_input_grad, ctx.next_functions, strict=False):
        if needs and node is not None and _will_execute is not None:
            try:
                needs = _will_execute(node)
            except RuntimeError:  # a leaf that torch.autograd.grad was asked for
                needs = True
        wanted.append(needs)
    return wanted


def _differentiable(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients with a graph, by plain operations."""
    with torch.enable_grad():
        # Views of the inputs, so that what is asked for is a gradient with respect to this use of them alone.
        used = [value.view_as(value) for value in inputs]
        pairs = [(out, g) for out, g in zip(function(*used), cotangents, strict=True) if g is not None]
        chosen = [value for value, needed in zip(used, wanted, strict=True) if needed]
        if not pairs or not chosen:
            return [None for _ in wanted]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], chosen, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if needed else None for needed in wanted]


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    return torch.linalg.vecdot(x, x)[..., None].div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)[..., None].div_(x.shape[-1])


def _project(g: Tensor, y: Tensor, a: Tensor, s: Tensor) -> Tensor:
    # Derivative of y = s x applied to g: s (g - y <g y>), where a = <g y>
    return torch.addcmul(g, y, a, value=-1.0).mul_(s)


def _bend(g: Tensor, h: Tensor, y: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Gradient with respect to x of <g, s (h - y <h y>)>, where a = <g y> and b = <h y>
    square = s * s
    out = y * (3.0 * a * b).sub_(_mean(g, h)).mul_(square)
    return out.addcmul_(g, b.mul(square), value=-1.0).addcmul_(h, a.mul(square), value=-1.0)


def _normalize(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    s = torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)
    return x * s, s


# ---- x + w_out gate(w_in normalize(x)) ------------------------------------------------------------------------------


def _gated(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    y, _ = _normalize(x, epsilon)
    z = torch.addmm(b_in, y, w_in.t())
    value, control = z.chunk(2, dim=1)
    return x + torch.addmm(b_out, value * torch.sigmoid(control), w_out.t()), z


def _gated_gradient(g: Tensor, x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, epsilon: float) -> tuple[Tensor]:
    y, s = _normalize(x, epsilon)
    value, control = z.chunk(2, dim=1)
    sigma = torch.sigmoid(control)
    inner = g @ w_out
    outer = torch.cat([inner * sigma, inner * value * sigma * (1.0 - sigma)], dim=1) @ w_in
    return (g + s * (outer - y * (outer * y).mean(dim=1, keepdim=True)),)


def _through_gate(inner: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    width = inner.shape[1]
    out = torch.empty_like(z)
    torch.mul(inner, sigma, out=out[:, :width])
    right = out[:, width:]
    torch.mul(inner, z[:, :width], out=right)
    torch.ops.aten.sigmoid_backward.grad_input(right, sigma, grad_input=right)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        s = _inverse_rms(x, epsilon)
        y = x * s
        z = torch.addmm(b_in, y, w_in.t())
        width = w_out.shape[1]
        sigma = torch.sigmoid(z[:, width:])
        middle = z[:, :width] * sigma
        out = torch.addmm(x, middle, w_out.t()).add_(b_out)
        ctx.set_materialize_grads(False)
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, z, y, s, sigma, middle)
        return out, z

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, of_z: Tensor | None) -> Any:
        x, w_in, b_in, w_out, b_out, z, y, s, sigma, middle = ctx.saved_tensors
        wanted = _wanted(ctx)
        if torch.is_grad_enabled():
            if g is not None and of_z is None and not any(wanted[1:]):
                return _GatedGradient.apply(g, x, z, w_in, w_out, y, s, sigma, ctx.epsilon), *[None] * 5
            found = _differentiable(
                partial(_gated, epsilon=ctx.epsilon), (x, w_in, b_in, w_out, b_out), wanted[:5], (g, of_z)
            )
            return *found, None
        of_in = of_bin = of_out = of_bout = of_x = None
        of_gate = of_z
        if g is not None:
            if wanted[3]:
                of_out = g.t() @ middle
            if wanted[4]:
                of_bout = g.sum(dim=0)
            of_gate = _through_gate(g @ w_out, z, sigma)
            if of_z is not None:
                of_gate += of_z
        if of_gate is None:
            return None, None, None, None, None, None
        if wanted[1]:
            of_in = of_gate.t() @ y
        if wanted[2]:
            of_bin = of_gate.sum(dim=0)
        if wanted[0]:
            of_y = of_gate @ w_in
            of_x = of_y.addcmul_(y, _mean(of_y, y), value=-1.0)
            of_x = of_x.mul_(s) if g is None else torch.addcmul(g, of_x, s)
        return of_x, of_in, of_bin, of_out, of_bout, None


class _GatedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        z: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        y: Tensor,
        s: Tensor,
        sigma: Tensor,
        epsilon: float,
    ) -> Tensor:
        inner = g @ w_out
        of_gate = _through_gate(inner, z, sigma)
        of_y = of_gate @ w_in
        a = _mean(of_y, y)
        ctx.epsilon = epsilon
        ctx.save_for_backward(g, x, z, w_in, w_out, y, s, sigma, inner, of_gate, of_y, a)
        return torch.addcmul(of_y, y, a, value=-1.0).mul_(s).add_(g)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, x, z, w_in, w_out, y, s, sigma, inner, of_gate, of_y, a = ctx.saved_tensors
        wanted = _wanted(ctx)
        if torch.is_grad_enabled():
            found = _differentiable(
                partial(_gated_gradient, epsilon=ctx.epsilon), (g, x, z, w_in, w_out), wanted[:5], (h,)
            )
            return *found, None, None, None, None
        width = inner.shape[1]
        b = _mean(h, y)
        tangent = _project(h, y, b, s)
        of_z = tangent @ w_in.t()
        moved, steered = of_z[:, :width], of_z[:, width:]  # tangents of the value and of the control
        slope = torch.addcmul(sigma, sigma, sigma, value=-1.0)
        value = z[:, :width]
        turn = steered * slope
        middle = (moved * sigma).addcmul_(value, turn)
        of_in = of_gate.t() @ tangent if wanted[3] else None
        of_out = g.t() @ middle if wanted[4] else None
        of_g = torch.addmm(h, middle, w_out.t()) if wanted[0] else None
        of_x = _bend(of_y, h, y, s, a, b) if wanted[1] else None
        if wanted[2]:
            # sigma'' = sigma' (1 - 2 sigma)
            bend = torch.addcmul(value, value, sigma, value=-2.0).mul_(turn).addcmul_(moved, slope)
            torch.mul(inner, bend, out=steered)
            torch.mul(inner, turn, out=moved)
        return of_g, of_x, of_z if wanted[2] else None, of_in, of_out, None, None, None, None


def gated_update(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, epsilon: float) -> Tensor:
    """x + W_out (v sigma(c)) + b_out, where (v, c) = W_in x / rms(x) + b_in.

    Parameters
    ----------
    x : Tensor of shape (..., width)
    w_in : Tensor of shape (2 * hidden, width)
    b_in : Tensor of shape (2 * hidden,)
    w_out : Tensor of shape (width, hidden)
    b_out : Tensor of shape (width,)
    epsilon : float
        Added to the mean square.

    Returns
    -------
    Tensor of shape (..., width)
    """
    return _Gated.apply(x.reshape(-1, x.shape[-1]), w_in, b_in, w_out, b_out, epsilon)[0].reshape(x.shape)


# ---- w_out attend(w_in normalize(x)) --------------------------------------------------------------------------------


def _rows(x: Tensor, bias: Tensor) -> Tensor:
    return x.reshape(bias.shape[0], bias.shape[1], x.shape[1])


def _over_heads(logits: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    return logits.view(bias.shape[0], n_heads, bias.shape[1], bias.shape[1]).sum(dim=(1, 3))


def _attended(
    x: Tensor, bias: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, n_heads: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    y, _ = _normalize(x, epsilon)
    z = torch.addmm(b_in, y, w_in.t())
    heads = split(_rows(z, bias), 3, n_heads)
    mixed = torch.bmm(softmax_of(heads, bias, n_heads).transpose(1, 2), heads[2])
    return torch.addmm(b_out, merge(mixed[None], n_heads).flatten(0, 1), w_out.t()), z


def _attended_gradient(
    g: Tensor, x: Tensor, z: Tensor, bias: Tensor, w_in: Tensor, w_out: Tensor, n_heads: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    y, s = _normalize(x, epsilon)
    heads = split(_rows(z, bias), 3, n_heads)
    weights = softmax_of(heads, bias, n_heads)
    incoming = split(_rows(g @ w_out, bias), 1, n_heads)[0]
    parts, slope, _ = slopes(heads, weights, incoming)
    outer = merge(parts, n_heads).flatten(0, 1) @ w_in
    of_bias = _over_heads(slope, bias, n_heads)
    return s * (outer - y * (outer * y).mean(dim=1, keepdim=True)), of_bias


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
        n_heads: int,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        s = _inverse_rms(x, epsilon)
        y = x * s
        z = torch.addmm(b_in, y, w_in.t())
        heads = split(_rows(z, bias), 3, n_heads)
        weights = softmax_of(heads, bias, n_heads)
        mixed = merge(torch.bmm(weights.transpose(1, 2), heads[2])[None], n_heads).reshape(x.shape)
        ctx.set_materialize_grads(False)
        ctx.options = n_heads, epsilon
        ctx.save_for_backward(x, bias, w_in, b_in, w_out, b_out, z, y, s, heads, weights, mixed)
        return torch.addmm(b_out, mixed, w_out.t()), z

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, of_z: Tensor | None) -> Any:
        x, bias, w_in, b_in, w_out, b_out, z, y, s, heads, weights, mixed = ctx.saved_tensors
        n_heads, epsilon = ctx.options
        wanted = _wanted(ctx)
        if torch.is_grad_enabled():
            if g is not None and of_z is None and not any(wanted[2:]):
                kept = (y, s, heads, weights)
                return *_AttendedGradient.apply(g, x, z, bias, w_in, w_out, *kept, n_heads, epsilon), *[None] * 6
            found = _differentiable(
                partial(_attended, n_heads=n_heads, epsilon=epsilon),
                (x, bias, w_in, b_in, w_out, b_out),
                wanted[:6],
                (g, of_z),
            )
            return *found, None, None
        of_x = of_bias = of_in = of_bin = of_out = of_bout = None
        of_heads = of_z
        if g is not None:
            if wanted[4]:
                of_out = g.t() @ mixed
            if wanted[5]:
                of_bout = g.sum(dim=0)
            incoming = split(_rows(g @ w_out, bias), 1, n_heads)[0]
            parts, slope, _ = slopes(heads, weights, incoming)
            of_heads = merge(parts, n_heads).reshape(z.shape)
            if of_z is not None:
                of_heads += of_z
            if wanted[1]:
                of_bias = _over_heads(slope, bias, n_heads)
        if of_heads is None:
            return None, None, None, None, None, None, None, None
        if wanted[2]:
            of_in = of_heads.t() @ y
        if wanted[3]:
            of_bin = of_heads.sum(dim=0)
        if wanted[0]:
            of_y = of_heads @ w_in
            of_x = of_y.addcmul_(y, _mean(of_y, y), value=-1.0).mul_(s)
        return of_x, of_bias, of_in, of_bin, of_out, of_bout, None, None


class _AttendedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        z: Tensor,
        bias: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        y: Tensor,
        s: Tensor,
        heads: Tensor,
        weights: Tensor,
        n_heads: int,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        incoming = split(_rows(g @ w_out, bias), 1, n_heads)[0]
        parts, slope, through = slopes(heads, weights, incoming)
        of_heads = merge(parts, n_heads).reshape(z.shape)
        of_y = of_heads @ w_in
        a = _mean(of_y, y)
        ctx.set_materialize_grads(False)
        ctx.options = n_heads, epsilon
        ctx.save_for_backward(
            g, x, z, bias, w_in, w_out, y, s, heads, weights, incoming, slope, through, of_heads, of_y, a
        )
        of_bias = _over_heads(slope, bias, n_heads)
        return _project(of_y, y, a, s), of_bias

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, h_bias: Tensor | None) -> Any:
        g, x, z, bias, w_in, w_out, y, s, heads, weights, incoming, slope, through, of_heads, of_y, a = (
            ctx.saved_tensors
        )
        n_heads, epsilon = ctx.options
        wanted = _wanted(ctx)
        if torch.is_grad_enabled():
            found = _differentiable(
                partial(_attended_gradient, n_heads=n_heads, epsilon=epsilon),
                (g, x, z, bias, w_in, w_out),
                wanted[:6],
                (h, h_bias),
            )
            return *found, *[None] * 6
        h = torch.zeros_like(x) if h is None else h
        b = _mean(h, y)
        tangent = _project(h, y, b, s)
        cotangents = split(_rows(tangent @ w_in.t(), bias), 3, n_heads)
        of_incoming, of_parts, of_logits = second_order(
            heads, weights, incoming, slope, through, cotangents, h_bias, n_heads
        )
        mixed = merge(of_incoming[None], n_heads).reshape(x.shape)
        of_in = of_heads.t() @ tangent if wanted[4] else None
        of_out = g.t() @ mixed if wanted[5] else None
        of_g = mixed @ w_out.t() if wanted[0] else None
        of_x = _bend(of_y, h, y, s, a, b) if wanted[1] else None
        of_z = merge(of_parts, n_heads).reshape(z.shape) if wanted[2] else None
        of_bias = None
        if wanted[3]:
            of_bias = _over_heads(of_logits, bias, n_heads)
        return of_g, of_x, of_z, of_bias, of_in, of_out, *[None] * 6


def attention_update(
    x: Tensor,
    bias: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    n_heads: int,
    epsilon: float,
) -> Tensor:
    """W_out attend(W_in x / rms(x) + b_in) + b_out, see `attend`.

    Parameters
    ----------
    x : Tensor of shape (n_rows, n_tokens, width)
    bias : Tensor of shape (n_rows, n_tokens)
        Added to the logits of each key.
    w_in : Tensor of shape (3 * width, width)
        Queries are scaled already.
    b_in : Tensor of shape (3 * width,)
    w_out : Tensor of shape (width, width)
    b_out : Tensor of shape (width,)
    n_heads : int
    epsilon : float
        Added to the mean square.

    Returns
    -------
    Tensor of shape (n_rows, n_tokens, width)
    """
    flat = x.reshape(-1, x.shape[-1])
    return _Attended.apply(flat, bias, w_in, b_in, w_out, b_out, n_heads, epsilon)[0].reshape(x.shape)
