"""What ``symmetrize convert`` does: a checkpoint of metatrain's PET in, safetensors and JSON out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    trust_pickle: bool = False,
    weights: str = "best",
    energy: str | None = None,
    targets: Sequence[str] = (),
    dtype: str | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Convert, write, and say what was found; options as on the command line.

    Parameters
    ----------
    checkpoint : path
    output : path, optional
        Stem of the files; by default that of the checkpoint.

    Returns
    -------
    Path
        The stem that was written.
    """
    import torch

    # Adapters are found by name at run time: the core does not import them.
    pet = importlib.import_module("symmetrize.backbones.pet.convert")
    stem = Path(checkpoint).with_suffix("") if output is None else Path(output)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    model: Any = pet.convert(
        checkpoint,
        stem,
        trust_pickle=trust_pickle,
        weights=weights,
        energy=energy,
        targets=targets or None,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    species = ", ".join(chemical_symbols[z] for z in model.species)
    n_parameters = sum(p.numel() for p in model.parameters())
    reach = "strictly local" if model.receptive_field == 1 else f"{model.receptive_field} hops"
    echo(f"PET, {n_parameters} parameters, {str(model.dtype).removeprefix('torch.')}; species {species}")
    echo(f"cutoff {model.cutoff:g} A, {reach}")
    for name, spec in model.outputs.items():
        echo(f"  {name}: {spec}")
    echo(f"wrote {stem}.safetensors and {stem}.json; use it as pet:{stem}")
    return stem
