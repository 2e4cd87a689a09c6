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


def _split(x: Tensor, n_parts: int, n_heads: int) -> Tensor:
    """(n_rows, n_tokens, n_parts * width) to contiguous (n_parts, n_rows * n_heads, n_tokens, width / n_heads)."""
    n_rows, n_tokens, width = x.shape[0], x.shape[1], x.shape[2] // n_parts
    parts = x.view(n_rows, n_tokens, n_parts, n_heads, width // n_heads).permute(2, 0, 3, 1, 4)
    return parts.reshape(n_parts, n_rows * n_heads, n_tokens, width // n_heads)


def _merge(x: Tensor, n_heads: int) -> Tensor:
    """Inverse of `_split`: (n_parts, n_rows * n_heads, n_tokens, n) to (n_rows, n_tokens, n_parts * n_heads * n)."""
    n_parts, n_rows, n_tokens, n = x.shape[0], x.shape[1] // n_heads, x.shape[2], x.shape[3]
    parts = x.view(n_parts, n_rows, n_heads, n_tokens, n).permute(1, 3, 0, 2, 4)
    return parts.reshape(n_rows, n_tokens, n_parts * n_heads * n)


def _weights(heads: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Attention weights P[key, query]: Tensor of shape (n_rows * n_heads, n_tokens, n_tokens)."""
    n_tokens = bias.shape[1]
    logits = torch.bmm(heads[1], heads[0].transpose(1, 2)).view(bias.shape[0], n_heads, n_tokens, n_tokens)
    logits = logits + bias[:, None, :, None]
    weights = (logits - logits.detach().amax(dim=2, keepdim=True)).exp()
    weights = weights / weights.sum(dim=2, keepdim=True)
    return weights.view(-1, n_tokens, n_tokens)


def _gradient(heads: Tensor, weights: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of queries, keys and values, and of the logits, given that of the output."""
    query, key, value = heads[0], heads[1], heads[2]
    slope = torch.bmm(value, g.transpose(1, 2))
    slope = weights * (slope - (weights * slope).sum(dim=1, keepdim=True))
    return torch.stack([torch.bmm(slope.transpose(1, 2), key), torch.bmm(slope, query), torch.bmm(weights, g)]), slope


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
        heads = _split(qkv, 3, n_heads)
        weights = _weights(heads, bias, n_heads)
        ctx.n_heads = n_heads
        ctx.save_for_backward(qkv, bias, heads, weights)
        return _merge(torch.bmm(weights.transpose(1, 2), heads[2])[None], n_heads)

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
        incoming = _split(g, 1, n_heads)[0]
        parts, slope = _gradient(heads, weights, incoming)
        ctx.n_heads = n_heads
        ctx.save_for_backward(g, qkv, bias, heads, weights, incoming, slope)
        grad_bias = slope.view(bias.shape[0], n_heads, bias.shape[1], bias.shape[1]).sum(dim=(1, 3))
        return _merge(parts, n_heads), grad_bias

    @staticmethod
    def backward(ctx: Any, h: Tensor, h_bias: Tensor) -> Any:
        g, qkv, bias, heads, weights, incoming, slope = ctx.saved_tensors
        n_heads, n_tokens = ctx.n_heads, bias.shape[1]
        if torch.is_grad_enabled():  # a third derivative: what was kept does not know where it came from
            heads = _split(qkv, 3, n_heads)
            weights = _weights(heads, bias, n_heads)
            incoming = _split(g, 1, n_heads)[0]
            slope = _gradient(heads, weights, incoming)[1]
        query, key, value = heads[0], heads[1], heads[2]
        cotangents = _split(h, 3, n_heads)
        h_query, h_key, h_value = cotangents[0], cotangents[1], cotangents[2]
        # With P the weights, T = V g^T, S = P (T - <P T>): the contraction of h with the gradient is
        #   <S, W> + <P, R>,  W = K hq^T + hk Q^T + hb,  R = hv g^T,  whose derivatives with respect to all follow.
        wanted = torch.baddbmm(torch.bmm(h_key, query.transpose(1, 2)), key, h_query.transpose(1, 2))
        spread = h_bias[:, None, :, None].expand(-1, n_heads, -1, n_tokens).reshape(wanted.shape)
        wanted = wanted + spread
        mean = (weights * wanted).sum(dim=1, keepdim=True)
        centered = weights * (wanted - mean)  # cotangent of T, and of the logits in first order
        # cotangent of P, from S and from R; S - P <W> collects both occurrences of P in <P T>
        through = torch.bmm(value, incoming.transpose(1, 2))
        through_mean = (weights * through).sum(dim=1, keepdim=True)
        of_weights = (through - through_mean) * wanted - mean * through
        of_weights = torch.baddbmm(of_weights, h_value, incoming.transpose(1, 2))
        of_logits = weights * (of_weights - (weights * of_weights).sum(dim=1, keepdim=True))
        grad_g = torch.baddbmm(torch.bmm(centered.transpose(1, 2), value), weights.transpose(1, 2), h_value)
        grad_parts = torch.stack(
            [
                torch.baddbmm(torch.bmm(slope.transpose(1, 2), h_key), of_logits.transpose(1, 2), key),
                torch.baddbmm(torch.bmm(slope, h_query), of_logits, query),
                torch.bmm(centered, incoming),
            ]
        )
        grad_bias = of_logits.view(bias.shape[0], n_heads, n_tokens, n_tokens).sum(dim=(1, 3))
        return _merge(grad_g[None], n_heads), _merge(grad_parts, n_heads), grad_bias, None, None, None


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
        heads = _split(qkv, 3, n_heads)
        return _merge(torch.bmm(_weights(heads, bias, n_heads).transpose(1, 2), heads[2])[None], n_heads)
    else:
        return _Attention.apply(qkv, bias, n_heads)
