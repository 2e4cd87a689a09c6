"""Attention among few tokens, cheap to differentiate twice.

Tokens are as many as an atom has neighbors: rows of 10 to 50 numbers, for which the library's softmax and the copies
around batched matrix products cost more than the products. With the logits transposed (keys first), the sum over keys
runs along a strided axis, which vectorises, and first and second derivatives are written out on buffers that hold the
heads apart already. No fused kernel is used: those of torch have no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split(x: Tensor, n_parts: int, n_heads: int) -> Tensor:
    """(n_rows, n_tokens, n_parts * width) to contiguous (n_parts, n_rows * n_heads, n_tokens, width / n_heads)."""
    n_rows, n_tokens, width = x.shape[0], x.shape[1], x.shape[2] // n_parts
    parts = x.view(n_rows, n_tokens, n_parts, n_heads, width // n_heads).permute(2, 0, 3, 1, 4)
    return parts.reshape(n_parts, n_rows * n_heads, n_tokens, width // n_heads)


def merge(x: Tensor, n_heads: int) -> Tensor:
    """Inverse of `split`: (n_parts, n_rows * n_heads, n_tokens, n) to (n_rows, n_tokens, n_parts * n_heads * n)."""
    n_parts, n_rows, n_tokens, n = x.shape[0], x.shape[1] // n_heads, x.shape[2], x.shape[3]
    parts = x.view(n_parts, n_rows, n_heads, n_tokens, n).permute(1, 3, 0, 2, 4)
    return parts.reshape(n_rows, n_tokens, n_parts * n_heads * n)


def softmax_of(heads: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Attention weights P[key, query]: Tensor of shape (n_rows * n_heads, n_tokens, n_tokens)."""
    n_tokens = bias.shape[1]
    logits = torch.bmm(heads[1], heads[0].transpose(1, 2))
    if torch.jit.is_scripting():
        shared = False
    else:
        shared = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and logits.device.type == "cpu"
    if shared and logits.shape[0] > 0:
        # One shift for all queries of a head takes fewer passes over short rows, and is as good as one for each as
        # long as no sum is small.
        shift = bias[:, None, :] - logits.amax(dim=(1, 2)).view(-1, n_heads, 1)
        weights = torch.add(logits, shift.view(-1, n_tokens, 1)).exp_()
        total = weights.sum(dim=1, keepdim=True)
        least, most = torch.aminmax(total)
        if float(least) > 1e-4 and float(most) < 1e30:
            return weights.div_(total)
    logits = logits.view(bias.shape[0], n_heads, n_tokens, n_tokens) + bias[:, None, :, None]
    weights = (logits - logits.detach().amax(dim=2, keepdim=True)).exp()
    weights = weights / weights.sum(dim=2, keepdim=True)
    return weights.view(-1, n_tokens, n_tokens)


def slopes(heads: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of queries, keys and values, and of the logits, given that of the output.

    Beside them the centered cotangent of the weights, T - <P T>.
    """
    query, key, value = heads[0], heads[1], heads[2]
    through = torch.bmm(value, g.transpose(1, 2))
    through = through - (weights * through).sum(dim=1, keepdim=True)
    slope = weights * through
    if torch.is_grad_enabled():
        parts = torch.stack([torch.bmm(slope.transpose(1, 2), key), torch.bmm(slope, query), torch.bmm(weights, g)])
    else:
        parts = torch.empty_like(heads)
        torch.bmm(slope.transpose(1, 2), key, out=parts[0])
        torch.bmm(slope, query, out=parts[1])
        torch.bmm(weights, g, out=parts[2])
    return parts, slope, through


def second_order(
    heads: Tensor,
    weights: Tensor,
    incoming: Tensor,
    slope: Tensor,
    through: Tensor,
    cotangents: Tensor,
    h_bias: Tensor | None,
    n_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of ``incoming``, of the heads, and of the logits, given those of what `slopes` finds.

    With P the weights, T = V g^T, S = P (T - <P T>), the contraction of h with the gradient is <S, W> + <P, R> where
    W = K hq^T + hk Q^T + hb and R = hv g^T; its derivatives with respect to everything follow.
    """
    query, key, value = heads[0], heads[1], heads[2]
    h_query, h_key, h_value = cotangents[0], cotangents[1], cotangents[2]
    wanted = torch.baddbmm(torch.bmm(h_key, query.transpose(1, 2)), key, h_query.transpose(1, 2))
    if h_bias is not None:
        spread = h_bias[:, None, :].expand(-1, n_heads, -1).reshape(-1, h_bias.shape[1], 1)
        wanted = wanted + spread
    wanted = wanted - (weights * wanted).sum(dim=1, keepdim=True)
    centered = weights * wanted  # cotangent of T, and of the logits in first order
    # Cotangent of P, from S and from R, but for what is the same for all keys of a query: that drops out below.
    of_weights = torch.baddbmm(through * wanted, h_value, incoming.transpose(1, 2))
    of_logits = weights * (of_weights - (weights * of_weights).sum(dim=1, keepdim=True))
    of_incoming = torch.baddbmm(torch.bmm(centered.transpose(1, 2), value), weights.transpose(1, 2), h_value)
    if torch.is_grad_enabled():
        parts = torch.stack(
            [
                torch.baddbmm(torch.bmm(slope.transpose(1, 2), h_key), of_logits.transpose(1, 2), key),
                torch.baddbmm(torch.bmm(slope, h_query), of_logits, query),
                torch.bmm(centered, incoming),
            ]
        )
    else:
        parts = torch.empty_like(heads)
        torch.bmm(slope.transpose(1, 2), h_key, out=parts[0])
        parts[0].baddbmm_(of_logits.transpose(1, 2), key)
        torch.bmm(slope, h_query, out=parts[1])
        parts[1].baddbmm_(of_logits, query)
        torch.bmm(centered, incoming, out=parts[2])
    return of_incoming, parts, of_logits


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
        heads = split(qkv, 3, n_heads)
        weights = softmax_of(heads, bias, n_heads)
        ctx.n_heads = n_heads
        ctx.save_for_backward(qkv, bias, heads, weights)
        return merge(torch.bmm(weights.transpose(1, 2), heads[2])[None], n_heads)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        qkv, bias, heads, weights = ctx.saved_tensors
        grad_qkv, grad_bias = _AttentionGradient.apply(g, qkv, bias, heads, weights, ctx.n_heads)
        return grad_qkv, grad_bias, None


class _AttentionGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, qkv: Tensor, bias: Tensor, heads: Tensor, weights: Tensor, n_heads: int
    ) -> tuple[Tensor, Tensor]:
        incoming = split(g, 1, n_heads)[0]
        parts, slope, through = slopes(heads, weights, incoming)
        ctx.n_heads = n_heads
        ctx.save_for_backward(g, qkv, bias, heads, weights, incoming, slope, through)
        grad_bias = slope.view(bias.shape[0], n_heads, bias.shape[1], bias.shape[1]).sum(dim=(1, 3))
        return merge(parts, n_heads), grad_bias

    @staticmethod
    def backward(ctx: Any, h: Tensor, h_bias: Tensor) -> Any:
        g, qkv, bias, heads, weights, incoming, slope, through = ctx.saved_tensors
        n_heads, n_tokens = ctx.n_heads, bias.shape[1]
        if torch.is_grad_enabled():  # a third derivative: what was kept does not know where it came from
            heads = split(qkv, 3, n_heads)
            weights = softmax_of(heads, bias, n_heads)
            incoming = split(g, 1, n_heads)[0]
            _, slope, through = slopes(heads, weights, incoming)
        grad_g, grad_parts, of_logits = second_order(
            heads, weights, incoming, slope, through, split(h, 3, n_heads), h_bias, n_heads
        )
        grad_bias = of_logits.view(bias.shape[0], n_heads, n_tokens, n_tokens).sum(dim=(1, 3))
        return merge(grad_g[None], n_heads), merge(grad_parts, n_heads), grad_bias, None, None, None


def attend(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Mixed values of the tokens of each row.

    Parameters
    ----------
    qkv : Tensor of shape (n_rows, n_tokens, 3 * width)
        Queries (scaled), keys and values, each with the features of one head next to each other.
    bias : Tensor of shape (n_rows, n_tokens)
        Added to the logits of each key; a finite number for at least one key of each row.
    n_heads : int

    Returns
    -------
    Tensor of shape (n_rows, n_tokens, width)
    """
    if torch.jit.is_scripting():
        heads = split(qkv, 3, n_heads)
        return merge(torch.bmm(softmax_of(heads, bias, n_heads).transpose(1, 2), heads[2])[None], n_heads)
    elif torch.compiler.is_compiling():  # which derives what it needs itself
        heads = split(qkv, 3, n_heads)
        return merge(torch.bmm(softmax_of(heads, bias, n_heads).transpose(1, 2), heads[2])[None], n_heads)
    else:
        return _Attention.apply(qkv, bias, n_heads)
