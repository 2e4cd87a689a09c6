"""Make any deep network on point clouds exactly and smoothly equivariant.

Names are imported on first use: torch and e3nn take seconds, and a pytest plugin imports its parent package in every
session.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symmetrize.backbone import Backbone
    from symmetrize.data import from_ase, from_points
    from symmetrize.degree import find_degree
    from symmetrize.errors import (
        BackboneOutputError,
        DeclarationError,
        InvalidInputError,
        InvalidTypeError,
        MissingDependencyError,
        NoFrameError,
        SymmetrizeError,
        UnknownSpeciesError,
    )
    from symmetrize.frames import FrameMethod, FrameSet
    from symmetrize.methods.anchored import Anchored
    from symmetrize.methods.ecse import ECSE
    from symmetrize.methods.frame_averaging import FrameAveraging
    from symmetrize.methods.group_averaging import GroupAveraging
    from symmetrize.methods.identity import Identity
    from symmetrize.methods.learned_canonicalization import LearnedCanonicalization
    from symmetrize.methods.minimal_frame_averaging import MinimalFrameAveraging
    from symmetrize.methods.random_augmentation import RandomAugmentation
    from symmetrize.methods.sampled import SampledFrames
    from symmetrize.methods.stochastic_frame_averaging import StochasticFrameAveraging
    from symmetrize.methods.weighted_frame_averaging import WeightedFrameAveraging
    from symmetrize.registry import list_backbones, load_backbone
    from symmetrize.representations import OutputSpec
    from symmetrize.storage import load, save
    from symmetrize.symmetrizer import Symmetrizer
    from symmetrize.wrapping import wrap

__version__ = "0.1.0"

_HOME = {
    "Anchored": "symmetrize.methods.anchored",
    "Backbone": "symmetrize.backbone",
    "BackboneOutputError": "symmetrize.errors",
    "DeclarationError": "symmetrize.errors",
    "ECSE": "symmetrize.methods.ecse",
    "FrameAveraging": "symmetrize.methods.frame_averaging",
    "FrameMethod": "symmetrize.frames",
    "FrameSet": "symmetrize.frames",
    "GroupAveraging": "symmetrize.methods.group_averaging",
    "Identity": "symmetrize.methods.identity",
    "InvalidInputError": "symmetrize.errors",
    "InvalidTypeError": "symmetrize.errors",
    "LearnedCanonicalization": "symmetrize.methods.learned_canonicalization",
    "MinimalFrameAveraging": "symmetrize.methods.minimal_frame_averaging",
    "MissingDependencyError": "symmetrize.errors",
    "NoFrameError": "symmetrize.errors",
    "OutputSpec": "symmetrize.representations",
    "RandomAugmentation": "symmetrize.methods.random_augmentation",
    "SampledFrames": "symmetrize.methods.sampled",
    "StochasticFrameAveraging": "symmetrize.methods.stochastic_frame_averaging",
    "SymmetrizeError": "symmetrize.errors",
    "Symmetrizer": "symmetrize.symmetrizer",
    "UnknownSpeciesError": "symmetrize.errors",
    "WeightedFrameAveraging": "symmetrize.methods.weighted_frame_averaging",
    "find_degree": "symmetrize.degree",
    "from_ase": "symmetrize.data",
    "from_points": "symmetrize.data",
    "list_backbones": "symmetrize.registry",
    "load": "symmetrize.storage",
    "load_backbone": "symmetrize.registry",
    "save": "symmetrize.storage",
    "wrap": "symmetrize.wrapping",
}

__all__ = [
    "ECSE",
    "Anchored",
    "Backbone",
    "BackboneOutputError",
    "DeclarationError",
    "FrameAveraging",
    "FrameMethod",
    "FrameSet",
    "GroupAveraging",
    "Identity",
    "InvalidInputError",
    "InvalidTypeError",
    "LearnedCanonicalization",
    "MinimalFrameAveraging",
    "MissingDependencyError",
    "NoFrameError",
    "OutputSpec",
    "RandomAugmentation",
    "SampledFrames",
    "StochasticFrameAveraging",
    "SymmetrizeError",
    "Symmetrizer",
    "UnknownSpeciesError",
    "WeightedFrameAveraging",
    "find_degree",
    "from_ase",
    "from_points",
    "list_backbones",
    "load",
    "load_backbone",
    "save",
    "wrap",
]


_SUBPACKAGES = ("calculators", "export", "keys", "testing", "training")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"symmetrize.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'symmetrize' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBPACKAGES])
