"""Backbones by name: listed without being imported, imported only when loaded."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from symmetrize.errors import DeclarationError, InvalidTypeError, MissingDependencyError, did_you_mean

if TYPE_CHECKING:
    from symmetrize.backbone import Backbone

#: Entry-point group through which other packages add their backbones.
ENTRY_POINT_GROUP = "symmetrize.backbones"


@dataclass(frozen=True)
class Entry:
    """A backbone that can be loaded by name; the fields are those of an adapter in `symmetrize.backbones`.

    ``target`` and ``rebuild`` are functions, as ``"module:attribute"``.
    """

    name: str
    description: str
    status: str
    maintainer: str
    license: str
    requires: tuple[str, ...]
    target: str
    rebuild: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Required libraries that are not installed."""
        return tuple(name for name in self.requires if not _is_installed(name))


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def list_backbones() -> dict[str, Entry]:
    """All registered backbones by name; none of them is imported."""
    adapters = importlib.import_module("symmetrize.backbones").ADAPTERS
    found = {
        name: Entry(
            name=name,
            description=adapter.description,
            status=adapter.status,
            maintainer=adapter.maintainer,
            license=adapter.license,
            requires=tuple(adapter.requires),
            target=f"symmetrize.backbones{adapter.module}:{adapter.attribute}",
            rebuild=f"symmetrize.backbones{adapter.module}:{adapter.rebuild}" if adapter.rebuild else "",
        )
        for name, adapter in adapters.items()
    }
    for point in entry_points(group=ENTRY_POINT_GROUP):
        package = point.dist.name if point.dist is not None else "unknown package"
        found.setdefault(
            point.name, Entry(point.name, f"registered by {package}", "third party", package, "", (), point.value)
        )
    return found


def load_backbone(name: str, *args: Any, **options: Any) -> Backbone:
    """Load a backbone by name; arguments go to its loader.

    The library behind it is imported here, and torch with it: listing needs neither.

    Raises
    ------
    DeclarationError
        For an unknown name, with the nearest known ones.
    MissingDependencyError
        If its library is not installed, with the command that installs it.
    """
    entry = _find(name, "load_backbone")
    return _call(entry, entry.target, *args, **options)


def rebuild_backbone(name: str, description: dict[str, Any]) -> Backbone:
    """Make an untrained backbone again from what its ``describe`` returned.

    An adapter of another package offers this as a function ``rebuild`` in the module of its entry point.

    Raises
    ------
    DeclarationError, MissingDependencyError
        As `load_backbone`; also if the adapter cannot do this.
    """
    entry = _find(name, "rebuild_backbone")
    target = entry.rebuild or f"{entry.target.partition(':')[0]}:rebuild"
    module, _, attribute = target.partition(":")
    if getattr(_imported(entry, module), attribute, None) is None:
        raise DeclarationError(f"rebuild_backbone: the adapter {name!r} cannot make a backbone from its description")
    return _call(entry, target, description)


def _find(name: str, function: str) -> Entry:
    known = list_backbones()
    if name not in known:
        raise DeclarationError(f"{function}: unknown backbone {name!r}, {did_you_mean(str(name), known)}")
    entry = known[name]
    if entry.missing:
        raise MissingDependencyError(f"backbone {name!r} needs: pip install {' '.join(entry.missing)}")
    return entry


def _imported(entry: Entry, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("symmetrize"):
            raise  # a fault here, not a missing library
        raise MissingDependencyError(
            f"backbone {entry.name!r}: cannot import {error.name!r}, which {module!r} needs: {error}"
        ) from error


def _call(entry: Entry, target: str, *args: Any, **options: Any) -> Backbone:
    from symmetrize.backbone import Backbone

    module, _, attribute = target.partition(":")
    loader = getattr(_imported(entry, module), attribute)
    try:
        inspect.signature(loader).bind(*args, **options)
    except TypeError as error:
        raise DeclarationError(
            f"backbone {entry.name!r}: {error}; its loader is {attribute}{inspect.signature(loader)}"
        ) from error
    backbone = loader(*args, **options)
    if not isinstance(backbone, Backbone):
        raise InvalidTypeError(
            f"backbone {entry.name!r}: expected its loader to return a Backbone, got {type(backbone)}"
        )
    return backbone
