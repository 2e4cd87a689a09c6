"""Backbones by name: listed without being imported, imported only when loaded."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from symmetrize.errors import DeclarationError, InvalidTypeError, MissingDependencyError, did_you_mean

if TYPE_CHECKING:
    from symmetrize.backbone import Backbone

#: Entry-point group through which other packages add their backbones.
ENTRY_POINT_GROUP = "symmetrize.backbones"


@dataclass(frozen=True)
class Entry:
    """A backbone that can be loaded by name."""

    name: str
    description: str
    status: str
    maintainer: str
    license: str
    requires: tuple[str, ...]
    target: str

    @property
    def missing(self) -> tuple[str, ...]:
        """Required libraries that are not installed."""
        return tuple(r for r in self.requires if importlib.util.find_spec(r.replace("-", "_")) is None)


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
    from symmetrize.backbone import Backbone

    known = list_backbones()
    if name not in known:
        raise DeclarationError(f"load_backbone: unknown backbone {name!r}, {did_you_mean(str(name), known)}")
    entry = known[name]
    if entry.missing:
        raise MissingDependencyError(f"backbone {name!r} needs: pip install {' '.join(entry.missing)}")
    module, _, attribute = entry.target.partition(":")
    backbone = getattr(importlib.import_module(module), attribute)(*args, **options)
    if not isinstance(backbone, Backbone):
        raise InvalidTypeError(f"backbone {name!r}: expected its loader to return a Backbone, got {type(backbone)}")
    return backbone
