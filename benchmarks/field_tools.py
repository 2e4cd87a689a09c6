"""Every tool of `benchmarks.field` around the same network: energy and forces of structures."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import FrameMethod, Symmetrizer, from_ase, keys
from symmetrize.backbone import Backbone
from symmetrize.copies import copy_structures, edge_offsets
from symmetrize.data import replace, validate, with_neighbors
from symmetrize.metatomic import import_metatomic

#: What each tool's smoothness is known from.
SMOOTHNESS = "docs/peers.md"

#: Rotated copies in one call of a metatomic model.
BATCH_SIZE = 512

_IN_FLOAT32 = "SymmetrizedModel is running in float32"


@dataclass(frozen=True)
class About:
    """What is said of a tool.

    Attributes
    ----------
    name : str
    family : str
        Tools that differ by a degree: one curve.
    group : str
        That it averages over; empty for none.
    smooth : bool
        See `SMOOTHNESS`.
    package : str
        Distribution whose version is recorded; empty for this one.
    degree : int or None
    together : bool
        Whether several structures go into one call.
    """

    name: str
    family: str
    group: str = "O(3)"
    smooth: bool = True
    package: str = ""
    degree: int | None = None
    together: bool = False


class Tool(ABC):
    """A network, symmetrised in some way.

    Parameters
    ----------
    about : About
    backbone : Backbone
        With energies of atoms; its precision is that of the tool.
    """

    def __init__(self, about: About, backbone: Backbone) -> None:
        self.about, self.backbone = about, backbone

    def prepare(self, structures: Sequence[Atoms]) -> Any:
        """What `evaluate` takes; its time is not counted."""
        return from_ase(list(structures), dtype=self.backbone.dtype)

    @abstractmethod
    def evaluate(self, prepared: Any) -> tuple[Tensor, Tensor]:
        """Energies (n_structures,) in eV and forces (n_atoms, 3) in eV/angstrom, neighbor list included."""

    @abstractmethod
    def evaluations(self, structures: Sequence[Atoms]) -> float:
        """Of the network, mean over structures (or, in atom scope, over environments)."""


# --- without and with this package ----------------------------------------------------------------------------------


class Bare(Tool):
    """The network alone, this package's evaluator not in between."""

    def evaluate(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        batch, pos = _graph(self.backbone, prepared)
        energy = _energies(self.backbone, batch)
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return energy.detach() + composition(self.backbone, batch), -gradient

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        return 1.0


class Averaged(Tool):
    """A `Symmetrizer`."""

    def __init__(self, about: About, backbone: Backbone, method: FrameMethod, scope: str) -> None:
        super().__init__(about, backbone)
        self.model = Symmetrizer(backbone, method, group=about.group or "O(3)", scope=scope).eval()

    def evaluate(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        out = self.model(prepared, forces=True)
        return out["energy"], out["forces"]

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        with torch.no_grad():
            return float(self.model.frames(self.prepare(structures)).evaluations.double().mean())


# --- metatomic ------------------------------------------------------------------------------------------------------


class Exported(Tool):
    """A model in the metatomic format, forces by automatic differentiation.

    Parameters
    ----------
    about, backbone
        The backbone is what was exported.
    model : metatomic.torch.AtomisticModel
    counted : float or Tool
        Evaluations, or the tool that takes as many.
    """

    def __init__(self, about: About, backbone: Backbone, model: Any, counted: float | Tool) -> None:
        super().__init__(about, backbone)
        self.model, self.counted = model, counted

    def evaluate(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        from symmetrize.backbones.metatomic.model import copied_systems, evaluate, request

        batch, pos = _graph(self.backbone, prepared)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_IN_FLOAT32)
            systems = copied_systems(self.model, batch)
            out = evaluate(self.model, systems, {"energy": request(self.model, "energy", "structure")})
        energy = out["energy"].block().values[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return energy.detach(), -gradient

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        return self.counted if isinstance(self.counted, float) else self.counted.evaluations(structures)


def exported(model: Symmetrizer) -> Any:
    """A symmetrised model (with `symmetrize.Identity`, the bare one) in the metatomic format."""
    from symmetrize.export.metatomic import export

    return export(model, verify=False)


def symmetrized_model(backbone: Backbone, model: Any, degree: int) -> Exported:
    """``SymmetrizedModel.wrap(model, max_angular_momentum_grid=degree)``."""
    import_metatomic()
    from metatomic.torch.o3 import SymmetrizedModel

    wrapped = SymmetrizedModel.wrap(model, max_angular_momentum_grid=degree, batch_size=BATCH_SIZE)
    buffers = dict(wrapped.named_buffers())
    n_rotations = next(len(value) for name, value in buffers.items() if name.endswith("_rotation_weights"))
    about = About(
        f"SymmetrizedModel, degree {degree}", "metatomic SymmetrizedModel", package="metatomic-torch", degree=degree
    )
    # Every rotation with and without inversion.
    return Exported(about, backbone, wrapped, float(2 * n_rotations))


class AseSymmetrized(Tool):
    """``SymmetrizedCalculator(MetatomicCalculator(model), l_max=degree)``, a structure at a time."""

    def __init__(self, backbone: Backbone, model: Any, degree: int) -> None:
        import_metatomic()
        from metatomic_ase import MetatomicCalculator, SymmetrizedCalculator

        name = f"SymmetrizedCalculator, degree {degree}"
        about = About(name, "metatomic SymmetrizedCalculator", package="metatomic-ase", degree=degree)
        super().__init__(about, backbone)
        base = MetatomicCalculator(model, device="cpu")
        self.calculator = SymmetrizedCalculator(base, l_max=degree, batch_size=BATCH_SIZE)

    def prepare(self, structures: Sequence[Atoms]) -> list[Atoms]:
        return [atoms.copy() for atoms in structures]

    def evaluate(self, prepared: list[Atoms]) -> tuple[Tensor, Tensor]:
        energies, forces = [], []
        for atoms in prepared:
            # Directly: nothing is taken from what an earlier call kept.
            self.calculator.calculate(atoms, ["energy", "forces"], ["positions"])
            energies.append(torch.as_tensor(float(self.calculator.results["energy"]), dtype=torch.float64))
            forces.append(torch.as_tensor(self.calculator.results["forces"]))
        return torch.stack(energies), torch.cat(forces)

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        # It evaluates the structure as it is besides.
        return 1.0 + len(self.calculator.quadrature_rotations)


# --- frame-averaging-pytorch ----------------------------------------------------------------------------------------


class PrincipalAxes(Tool):
    """``FrameAverage(invariant_output=True)`` on molecules of the same number of atoms."""

    def __init__(self, backbone: Backbone) -> None:
        from frame_averaging_pytorch import FrameAverage

        about = About(
            "FrameAverage", "frame-averaging-pytorch", smooth=False, package="frame-averaging-pytorch", together=True
        )
        super().__init__(about, backbone)
        # Without a network it returns the points in all frames, and what averages over them.
        self.average = FrameAverage(invariant_output=True)

    def evaluate(self, prepared: Batch) -> tuple[Tensor, Tensor]:
        batch, pos = _graph(self.backbone, prepared)
        n_structures = batch[keys.PTR].shape[0] - 1
        turned, average = self.average(pos.reshape(n_structures, -1, 3))
        structures = torch.arange(n_structures).repeat_interleave(turned.shape[1])
        energies = _energies(self.backbone, _copied(batch, structures, turned.reshape(-1, 3)))
        energy = average(energies.reshape(n_structures, -1))
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return energy.detach() + composition(self.backbone, batch), -gradient

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        return float(self.average.num_frames)


# --- the proof of concept -------------------------------------------------------------------------------------------


class ProofOfConcept(Tool):
    """Frames and weights of the article's own code, pooled over all atoms, around the network.

    As published: all structures one by one, SO(3), every frame of weight above 1e-10, whole structures in every frame,
    no second model for collinear structures.

    Parameters
    ----------
    backbone : Backbone
    source : Path
        A clone of github.com/spozdn/pet; only ``src/sp_frames_calculator.py`` is loaded.
    """

    def __init__(self, backbone: Backbone, source: Path) -> None:
        super().__init__(About("proof of concept", "ECSE proof of concept", group="SO(3)"), backbone)
        spec = importlib.util.spec_from_file_location("sp_frames_calculator", source / "src/sp_frames_calculator.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        chosen = yaml.safe_load((source / "default_hypers/sp_default_hypers.yaml").read_text())
        with _default_dtype(backbone.dtype):
            self.calculator = module.SPFramesCalculator(SimpleNamespace(**chosen))
        self.n_species = len(backbone.species or ())

    def prepare(self, structures: Sequence[Atoms]) -> list[Batch]:
        return [super(ProofOfConcept, self).prepare([atoms]) for atoms in structures]

    def evaluate(self, prepared: list[Batch]) -> tuple[Tensor, Tensor]:
        found = [self._evaluate(batch) for batch in prepared]
        return torch.cat([energy for energy, _ in found]), torch.cat([forces for _, forces in found])

    def _evaluate(self, single: Batch) -> tuple[Tensor, Tensor]:
        batch, pos = _graph(self.backbone, single)
        rotations, weights = self.frames(batch)
        structures = torch.zeros(len(rotations), dtype=torch.int64)
        n_atoms = pos.shape[0]
        turned = (pos @ rotations).reshape(-1, 3)
        energies = _energies(self.backbone, _copied(batch, structures, turned, rotations))
        energy = ((weights * energies).sum() / weights.sum())[None]
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return energy.detach() + composition(self.backbone, batch), -gradient.reshape(n_atoms, 3)

    def frames(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rotations (n, 3, 3) with axes as columns and weights (n,) of one structure with neighbor list."""
        (source, target), vectors, z = batch[keys.EDGE_INDEX], batch[keys.EDGE_VEC], batch[keys.Z]
        kinds = torch.searchsorted(torch.tensor(self.backbone.species), z)
        environments = [
            [vectors[target == center], kinds[source[target == center]], kinds[center]] for center in range(len(z))
        ]
        with _default_dtype(vectors.dtype), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using torch.cross without specifying the dim arg")
            axes, weights, _ = self.calculator.get_all_frames_global(
                environments, float(self.backbone.cutoff or 0.0), self.n_species
            )
        return torch.stack(axes), weights

    def evaluations(self, structures: Sequence[Atoms]) -> float:
        counts = [len(self.frames(_graph(self.backbone, batch)[0])[1]) for batch in self.prepare(structures)]
        return sum(counts) / len(counts)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What the proof of concept makes its constants of."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- shared ---------------------------------------------------------------------------------------------------------


def installed(*packages: str) -> list[str]:
    """Those that are not."""
    missing = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


def _graph(backbone: Backbone, batch: Batch) -> tuple[Batch, Tensor]:
    """With neighbor list, and the positions to differentiate with respect to."""
    pos = batch[keys.POS].detach().clone().requires_grad_()
    return with_neighbors(replace(validate(batch), pos=pos), backbone.cutoff or 0.0), pos


def _energies(backbone: Backbone, batch: Batch) -> Tensor:
    """Of structures, without the energy of the composition: (n_structures,)."""
    rows = backbone(batch)["energy"]
    return rows.new_zeros(batch[keys.PTR].shape[0] - 1).index_add(0, batch[keys.BATCH], rows)


def composition(backbone: Backbone, batch: Batch) -> Tensor:
    """Energies of the composition (n_structures,), float64."""
    out = torch.zeros(batch[keys.PTR].shape[0] - 1, dtype=torch.float64)
    rows = backbone.baseline(batch).get("energy")
    return out if rows is None else out.index_add(0, batch[keys.BATCH], rows)


def _copied(batch: Batch, structures: Tensor, pos: Tensor, rotations: Tensor | None = None) -> Batch:
    """Copies of whole structures with the same neighbors.

    Parameters
    ----------
    batch : Batch
        With neighbor list.
    structures : Tensor of shape (n_copies,)
    pos : Tensor of shape (n_atoms of all copies, 3)
    rotations : Tensor of shape (n_copies, 3, 3), optional
        Matrices that vectors (as rows) were multiplied by; without, structures are finite.
    """
    copies = copy_structures(batch, edge_offsets(batch), structures)
    edges = torch.stack([copies.source, copies.target])
    cell = batch[keys.CELL][structures]
    if rotations is None:
        vectors = pos[copies.source] - pos[copies.target]
    else:
        vectors = (batch[keys.EDGE_VEC][copies.edge][:, None, :] @ rotations[copies.edge_copy])[:, 0]
        cell = cell @ rotations
    counts = torch.bincount(copies.atom_copy, minlength=len(structures))
    return Batch(
        pos=pos,
        z=batch[keys.Z][copies.atom],
        batch=copies.atom_copy,
        ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        cell=cell,
        pbc=batch[keys.PBC][structures],
        edge_index=edges,
        cell_shift=batch[keys.CELL_SHIFT][copies.edge],
        edge_cutoff=batch[keys.EDGE_CUTOFF],
        edge_vec=vectors,
    )
