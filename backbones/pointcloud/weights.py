"""Reading trained parameters without running what a file brings along."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from symmetrize.errors import InvalidInputError

#: Trained models that come with the package.
SHIPPED = Path(__file__).parent / "weights"


def read_tensors(path: str | os.PathLike[str], trust_pickle: bool = False) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file, or from a checkpoint of PyTorch that holds nothing but tensors.

    Parameters
    ----------
    path : str or path
    trust_pickle : bool
        Also open files that PyTorch's restricted reader refuses. **Opening one runs whatever code its author put
        there**, with all your rights: only for files that you have made yourself.

    Raises
    ------
    InvalidInputError
        For a file that is not there or is damaged, that would run code, or that holds something else than tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidInputError(f"weights: expected a file, got {os.fspath(path)!r}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InvalidInputError(f"{file}: expected a safetensors file, got a damaged or another one") from error
    with open(file, "rb") as opened:
        # A zip archive, or the first bytes of a pickle: what torch.save writes, now or before 2020.
        if opened.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise InvalidInputError(
                f"{file}: expected a file of tensors (.safetensors, or torch.save), got another kind"
            )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not trust_pickle:
            raise InvalidInputError(
                f"{file}: expected a file of tensors alone, got one that PyTorch's restricted reader refuses: it is "
                "damaged, or a pickle that would run code of its author on this machine when opened. If you made it "
                "yourself and trust it, pass trust_pickle=True; better, save its state_dict() as safetensors"
            ) from error
        content = torch.load(file, map_location="cpu", weights_only=False)
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InvalidInputError(f"{file}: expected a state dict (names and tensors), got {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def flat(value: Tensor) -> Tensor:
    """A convolution of width one as the matrix that it is."""
    return value.reshape(value.shape[:2]) if value.dim() > 2 else value
