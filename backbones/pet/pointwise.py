"""Pointwise building blocks, cheap to differentiate twice.

Training on forces differentiates every operation twice, and the derivatives that autograd derives for normalization
and gates are long chains of small kernels: they cost more than the matrix products around them. Here first and second
derivatives are written out. Third and higher ones are correct too, but not tuned. Under TorchScript and
``torch.compile``, which derives what it needs itself, the plain expressions are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_epsilon(x: Tensor) -> float:
    # What torch.nn.RMSNorm adds by default; torch.finfo is not available to TorchScript.
    return 2.220446049250313e-16 if x.dtype == torch.float64 else 1.1920928955078125e-07


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        s = _inverse_rms(x, epsilon)
        y = x * s
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, y, s)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, y, s = ctx.saved_tensors
        return _RMSGradient.apply(g, x, y.detach(), s.detach(), ctx.epsilon), None


class _RMSGradient(torch.autograd.Function):
    # s (g - y <g y>), with the mean over features in brackets; linear and self-adjoint in g.
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, y: Tensor, s: Tensor, epsilon: float) -> Tensor:
        a = (g * y).mean(dim=-1, keepdim=True)
        ctx.epsilon = epsilon
        ctx.save_for_backward(g, x, y, s, a)
        return torch.addcmul(g, y, a, value=-1.0).mul_(s)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, x, y, s, a = ctx.saved_tensors
        if torch.is_grad_enabled():
            s = _inverse_rms(x, ctx.epsilon)
            y = x * s
            a = (g * y).mean(dim=-1, keepdim=True)
        b = (h * y).mean(dim=-1, keepdim=True)
        grad_g = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_g = torch.addcmul(h, y, b, value=-1.0) * s
        if ctx.needs_input_grad[1]:
            c = (g * h).mean(dim=-1, keepdim=True)
            square = -s * s
            grad_x = torch.addcmul(y * ((c - 3.0 * a * b) * square), h, a * square)
            grad_x = torch.addcmul(grad_x, g, b * square)
        return grad_g, grad_x, None, None, None


def rms_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    if torch.jit.is_scripting():
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)
    elif torch.compiler.is_compiling():
        return x * _inverse_rms(x, epsilon)
    else:
        return _RMS.apply(x, epsilon)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _SiLUGradient.apply(g, x)


class _SiLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.silu_backward(g, x)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, x = ctx.saved_tensors
        grad_g = _SiLUGradient.apply(h, x) if ctx.needs_input_grad[0] else None
        grad_x = None
        if ctx.needs_input_grad[1]:
            sigma = torch.sigmoid(x)
            curvature = torch.addcmul(x + 2.0, x, sigma, value=-2.0)
            grad_x = torch.ops.aten.sigmoid_backward(g * h, sigma) * curvature
        return grad_g, grad_x


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    if torch.jit.is_scripting():
        return torch.nn.functional.silu(x)
    elif torch.compiler.is_compiling():
        return torch.nn.functional.silu(x)
    else:
        return _SiLU.apply(x)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        sigma = torch.sigmoid(gate)
        ctx.save_for_backward(x, sigma)
        return value * sigma

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, sigma = ctx.saved_tensors
        return _GateGradient.apply(u, x, sigma)


class _GateGradient(torch.autograd.Function):
    # [u sigma, u v sigma'] for x = [v, g] and sigma = sigmoid(g)
    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(u, x, sigma)
        value = x[..., : u.shape[-1]]
        return torch.cat([u * sigma, torch.ops.aten.sigmoid_backward(u * value, sigma)], dim=-1)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        u, x, sigma = ctx.saved_tensors
        width = u.shape[-1]
        value, control = x[..., :width], x[..., width:]
        if torch.is_grad_enabled():
            sigma = torch.sigmoid(control)
        left, right = w[..., :width], w[..., width:]
        slope = torch.addcmul(sigma, sigma, sigma, value=-1.0)
        right_slope = right * slope
        grad_u = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_u = torch.addcmul(left * sigma, right_slope, value)
        if ctx.needs_input_grad[1]:
            # sigma'' = sigma' (1 - 2 sigma)
            bend = torch.addcmul(value, value, sigma, value=-2.0) * right_slope
            grad_x = torch.cat([u * right_slope, u * torch.addcmul(bend, left, slope)], dim=-1)
        return grad_u, grad_x, None


def gate(x: Tensor) -> Tensor:
    """First half of the features times the sigmoid of the second half."""
    if torch.jit.is_scripting():
        value, control = x.chunk(2, dim=-1)
        return value * torch.sigmoid(control)
    elif torch.compiler.is_compiling():
        value, control = x.chunk(2, dim=-1)
        return value * torch.sigmoid(control)
    else:
        return _Gate.apply(x)
