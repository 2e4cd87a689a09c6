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


_OURS = "torch-symmetrize developers"

ADAPTERS: dict[str, Adapter] = {
    "pet": Adapter(
        module=".pet",
        attribute="load",
        status="stable",
        maintainer=_OURS,
        license="BSD-3-Clause",
        description="Point Edge Transformer, trained here or converted from metatrain: interatomic energies",
        rebuild="rebuild",
    ),
    "metatomic": Adapter(
        module=".metatomic",
        attribute="load",
        status="stable",
        maintainer=_OURS,
        license="BSD-3-Clause (metatomic)",
        description="any exported metatomic model, from its file alone",
        requires=("metatomic-torch",),
        rebuild="rebuild",
    ),
    "ase": Adapter(
        module=".ase",
        attribute="load",
        status="stable",
        maintainer=_OURS,
        license="LGPL-2.1-or-later (ASE)",
        description="any ASE calculator, as a black box",
    ),
    "gnn": Adapter(
        module=".pyg",
        attribute="load",
        status="stable",
        maintainer=_OURS,
        license="MIT (torch-geometric)",
        description="plain message passing on raw edge vectors with torch-geometric: interatomic energies",
        rebuild="rebuild",
    ),
    "molecular-transformer": Adapter(
        module=".pyg",
        attribute="load_molecular_transformer",
        status="experimental",
        maintainer=_OURS,
        license="MIT (torch-geometric)",
        description="Point Transformer layers on all pairs of atoms of a molecule: interatomic energies",
        rebuild="rebuild_molecular_transformer",
    ),
    "schnet": Adapter(
        module=".pyg",
        attribute="load_schnet",
        status="experimental",
        maintainer=_OURS,
        license="MIT (torch-geometric)",
        description="SchNet of torch-geometric, invariant by construction: a control",
        rebuild="rebuild_schnet",
    ),
    "pointnet": Adapter(
        module=".pointcloud",
        attribute="load_pointnet",
        status="stable",
        maintainer=_OURS,
        license="MIT (weights: learning3d)",
        description="PointNet classifier of point clouds, trained on ModelNet40",
        rebuild="rebuild_pointnet",
    ),
    "dgcnn": Adapter(
        module=".pointcloud",
        attribute="load_dgcnn",
        status="experimental",
        maintainer=_OURS,
        license="MIT (weights, not included: dgcnn.pytorch)",
        description="DGCNN segmentation of rooms (S3DIS), for weights that you have",
        rebuild="rebuild_dgcnn",
    ),
    "point-transformer": Adapter(
        module=".pointcloud",
        attribute="load_point_transformer",
        status="experimental",
        maintainer=_OURS,
        license="MIT (torch-geometric)",
        description="Point Transformer classifier of point clouds",
        rebuild="rebuild_point_transformer",
    ),
    "toy": Adapter(
        module=".toy",
        attribute="load",
        status="stable",
        maintainer=_OURS,
        license="BSD-3-Clause",
        description="small, strongly anisotropic random networks with any outputs, for tests and examples",
        rebuild="rebuild",
    ),
}
