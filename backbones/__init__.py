"""Adapters to the networks that are symmetrised, each in a folder of its own: names are data, code is loaded on demand.

Distributed inside the package, as ``symmetrize.backbones``.
"""

from __future__ import annotations

from dataclasses import dataclass

if __name__ != "symmetrize.backbones":
    raise ImportError(
        f"these adapters are to be imported as 'symmetrize.backbones', got {__name__!r}: a top-level 'backbones' "
        "belongs to another project; install this one with 'pip install -e .' and do not put its root on sys.path"
    )


@dataclass(frozen=True)
class Adapter:
    """Where a backbone is found, without importing it.

    Attributes
    ----------
    module : str
        Module that holds the loader, relative to this package.
    attribute : str
        Function in that module that returns a ready backbone.
    status : str
        "stable" or "experimental".
    maintainer : str
    license : str
        License of the wrapped library, or of the code here where nothing is wrapped.
    description : str
    requires : tuple of str
        What pip has to install beyond the dependencies of this package.
    rebuild : str
        Function in that module that makes an untrained backbone from what ``Backbone.describe`` returned; empty where
        there is none.
    """

    module: str
    attribute: str
    status: str
    maintainer: str
    license: str
    description: str
    requires: tuple[str, ...] = ()
    rebuild: str = ""


ADAPTERS: dict[str, Adapter] = {
    "pet": Adapter(
        module=".pet",
        attribute="load",
        status="stable",
        maintainer="torch-symmetrize developers",
        license="BSD-3-Clause",
        description="Point Edge Transformer: attention over the edges of each atom, interatomic energies",
    ),
    "toy": Adapter(
        module=".toy",
        attribute="load",
        status="stable",
        maintainer="torch-symmetrize developers",
        license="BSD-3-Clause",
        description="small, strongly anisotropic random networks with any outputs, for tests and examples",
    ),
}
