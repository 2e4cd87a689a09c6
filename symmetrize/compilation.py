"""``torch.compile`` for inference: dense parts of a backbone as compiled code, for as long as nothing else is wanted.

Compiled code has first derivatives only, and its shapes are symbols. Whatever these do not cover (training, forces that
are differentiated again, sizes of zero and one, which would each be compiled separately) is evaluated as if nothing had
been compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

_INFERENCE: ContextVar[bool] = ContextVar("symmetrize_inference", default=False)


@contextmanager
def inference(possible: bool) -> Iterator[None]:
    """A context in which compiled code is used where there is any, or not."""
    token = _INFERENCE.set(possible)
    try:
        yield
    finally:
        _INFERENCE.reset(token)


def compile_for_inference(module: torch.nn.Module, **options: Any) -> None:
    """Let calls of a module run compiled code inside `inference`, in place.

    Gradients reach the inputs, not the parameters: they are constants of the compiled code, whose backward pass would
    otherwise compute their gradients as well, wanted or not.

    Parameters
    ----------
    module : Module
        Takes and returns tensors (a tuple of them); shapes must not depend on values.
    options
        For ``torch.compile``. By default ``dynamic=True``: one graph for all sizes.

    Notes
    -----
    State dict, copies, pickles and TorchScript do not know about it: a copy of the module is not compiled.
    """
    run = torch.compile(_own_code(_frozen(module)), **{"dynamic": True, **options})

    def call(*args: Tensor) -> Any:
        small = any(size < 2 for x in args for size in x.shape)
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        if small or hooked or not _INFERENCE.get() or torch.is_autocast_enabled(args[0].device.type):
            return module._call_impl(*args)
        return run(*args)

    # Where Module.compile puts what it makes; it is left out when a module is copied or saved.
    module._compiled_call_impl = call


class _Plain(torch.nn.Module):
    """A module, called without what `compile_for_inference` puts in front of it."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Any:
        return self.module.forward(*args)


def _frozen(module: torch.nn.Module) -> Callable[..., Any]:
    plain = _Plain(module)

    def frozen(*args: Tensor) -> Any:
        constants = {name: p.detach() for name, p in plain.named_parameters()}
        return functional_call(plain, constants, args)

    return frozen


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: compiled graphs are kept, and limited in number, per code object."""
    code = function.__code__
    own = code.replace(co_name=f"{code.co_name}_{id(function)}")
    return FunctionType(own, function.__globals__, own.co_name, function.__defaults__, function.__closure__)
