"""Symmetrisation methods: one file per method, each a `FrameMethod`; named here without being imported."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, Final

from symmetrize.errors import DeclarationError, did_you_mean

if TYPE_CHECKING:
    from symmetrize.frames import FrameMethod

#: Where each method is found.
METHODS: Final = {
    "Anchored": "symmetrize.methods.anchored",
    "ECSE": "symmetrize.methods.ecse",
    "FrameAveraging": "symmetrize.methods.frame_averaging",
    "GroupAveraging": "symmetrize.methods.group_averaging",
    "Identity": "symmetrize.methods.identity",
    "LearnedCanonicalization": "symmetrize.methods.learned_canonicalization",
    "MinimalFrameAveraging": "symmetrize.methods.minimal_frame_averaging",
    "PaperECSE": "symmetrize.methods.ecse.paper",
    "RandomAugmentation": "symmetrize.methods.random_augmentation",
    "SampledFrames": "symmetrize.methods.sampled",
    "StochasticFrameAveraging": "symmetrize.methods.stochastic_frame_averaging",
    "WeightedFrameAveraging": "symmetrize.methods.weighted_frame_averaging",
}

#: Methods that are made by a function of a class, under the name that one would write.
PRESETS: Final = {"ECSE.paper": ("ECSE", "paper")}

#: What each of them is, in a few words. "exact": equivariant to rounding; "smooth": as smooth as the backbone.
SUMMARIES: Final = {
    "ECSE": "exact, smooth, deterministic; about 2 evaluations per atom or molecule, 4 with inversion",
    "ECSE.paper": "ECSE as published: SO(3), all atoms' frames pooled, steep, none on linear molecules",
    "GroupAveraging": "fixed orientations, smooth, exact up to a degree: 24 evaluations for degree 3",
    "RandomAugmentation": "random orientations: right in expectation only",
    "FrameAveraging": "principal axes: 4 or 8 evaluations, exact and smooth where no two axes are equivalent",
    "StochasticFrameAveraging": "one of those, drawn: right in expectation only",
    "MinimalFrameAveraging": "1 or a few evaluations, exact; depends on the order of the atoms, not smooth",
    "WeightedFrameAveraging": "all pairs of points, weighted: exact and continuous; many evaluations",
    "LearnedCanonicalization": "1 evaluation in a frame from a small trainable network; exact where its vectors exist",
    "SampledFrames": "a few frames of another method, drawn: for training",
    "Anchored": "ECSE from a few points of a large cloud: exact, not smooth",
    "Identity": "the bare backbone",
}


def find_method(name: str) -> type[FrameMethod]:
    """The class of a method in `METHODS`, which is imported now."""
    found: type[FrameMethod] = getattr(importlib.import_module(METHODS[name]), name)
    return found


def make_method(name: str, /, **options: Any) -> FrameMethod:
    """A method by name, as configurations and command lines give it.

    Parameters
    ----------
    name : str
        One of `METHODS` or `PRESETS`.
    **options
        Of its constructor. A ``method`` among them, for those that build on another one, may be a name, or a mapping
        with the entry ``name`` and options of its own.

    Raises
    ------
    DeclarationError
        For an unknown name or option, with the nearest known ones.
    """
    known = {*METHODS, *PRESETS}
    if name not in known:
        raise DeclarationError(f"method: unknown method {name!r}, {did_you_mean(str(name), known)}")
    home, attribute = PRESETS.get(name, (name, ""))
    make = getattr(find_method(home), attribute) if attribute else find_method(home)
    accepted = inspect.signature(make).parameters
    for option in options:
        if option not in accepted:
            raise DeclarationError(f"{name}: unknown option {option!r}, {did_you_mean(option, accepted)}")
    missing = [p.name for p in accepted.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise DeclarationError(f"{name}: expected the option {missing[0]!r}, got {sorted(options) or 'no options'}")
    inner = options.get("method")
    if isinstance(inner, str):
        options = {**options, "method": make_method(inner)}
    elif isinstance(inner, dict):
        rest = {key: value for key, value in inner.items() if key != "name"}
        options = {**options, "method": make_method(str(inner.get("name", "")), **rest)}
    method: FrameMethod = make(**options)
    return method
