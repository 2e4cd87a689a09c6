"""What the frames cost, without any evaluation of a network: time, operations, host synchronisations."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from ase import Atoms
from symmetrize.backbones.pet import PET, PETConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch

from benchmarks.datasets import BUNDLED
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import Times, in_turns
from symmetrize import ECSE, from_ase, from_points, keys
from symmetrize.data import replace, with_neighbors
from symmetrize.frames import FrameSet
from symmetrize.testing import geometries

CUTOFF = 4.5
GROUP = "O(3)"
N_MOLECULES = 64
#: Neighbors of a center, for the cost against their number.
NEIGHBORS = (10, 25, 50, 100, 200)
#: The size of metatrain's default PET.
LARGE = {"d_pet": 128, "d_node": 256, "d_head": 128, "d_feedforward": 256, "num_heads": 8, "num_gnn_layers": 2}
#: What makes the host wait for a device: the result decides about shapes, or is read.
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_")

COLUMNS = (
    Column("system", "system"),
    Column("n_atoms", "atoms"),
    Column("seconds_frames", "frames (s)", digits(3)),
    Column("seconds_gradients", "with gradients (s)", digits(3)),
    Column("seconds_neighbors", "neighbor list (s)", digits(3)),
    Column("over_default", "frames / PET", digits(2)),
    Column("both_over_default", "with list / PET", digits(2)),
    Column("over_large", "frames / large PET", digits(2)),
    Column("both_over_large", "with list / large PET", digits(2)),
    Column("operations", "operations"),
    Column("synchronisations", "synchronisations"),
    Column("microseconds_per_center", "per center (µs)", fixed(2)),
    Column("faster", "than the proof of concept", lambda x: f"{x:.0f}x faster"),
)


class Counter(TorchDispatchMode):
    """Counts operations, and those among them that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        masked = name.startswith(("aten.index.", "aten.index_put")) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        unsized = name.startswith("aten.repeat_interleave") and kwargs.get("output_size") is None
        self.operations += 1
        self.synchronisations += name.startswith(WAITING) or masked or unsized
        return func(*args, **kwargs)


def run(setting: Setting) -> Result:
    """Frames of whole batches, then of one center with more and more neighbors."""
    rounds = 40 if setting.full else 15
    systems = _systems(setting)
    records = [_record(setting, name, structures, rounds) for name, structures in setting.bar(systems, "frames")]
    records += _against_neighbors(setting, rounds)
    if setting.pet_source is not None:
        records += _against_proof_of_concept(setting, setting.pet_source, rounds)
    notes = [
        f"Atom scope, {GROUP}, cutoff {CUTOFF} Å, default widths. The neighbor list is built before the frames. PET: "
        "one forward pass on the same batch in float32, at this package's default size and at metatrain's.",
        "Synchronisations: operations whose result decides about shapes or is read by the host (nonzero, reading a "
        "number, repeating without a known size), whatever the batch. They do not cost time on a CPU.",
        "Neighbors: 200 centers, each in a random cloud of constant density. A cost that is linear in the neighbors "
        "gives a constant plus a multiple of their number.",
        f"Least times of {rounds} rounds, in turns.",
    ]
    if setting.pet_source is None:
        notes.append("The published proof of concept was not measured: --pet-source PATH.")
    parameters = {"group": GROUP, "cutoff": CUTOFF, "n_rounds": rounds, "large": LARGE}
    return Result("Construction of frames", records, COLUMNS, parameters, notes)


def _systems(setting: Setting) -> list[tuple[str, list[Atoms]]]:
    ethanols = setting.datasets[BUNDLED][:N_MOLECULES]
    systems = [(f"{len(ethanols)} ethanols", ethanols)]
    if "water" in setting.datasets:
        systems.append(("liquid water", setting.datasets["water"][:1]))
    silicon = [atoms for atoms in setting.datasets.get("silicon", []) if len(atoms) == 64][:1]
    systems.append(("silicon", silicon or [geometries()["rattled silicon"].repeat(2)]))
    return systems


def frames(batch: Batch) -> FrameSet:
    """The frames that are measured."""
    return ECSE().frames(batch, group=GROUP, scope="atom", l_max=1)


def _gradients(batch: Batch) -> object:
    vectors = batch[keys.EDGE_VEC].clone().requires_grad_()
    found = frames(replace(batch, **{keys.EDGE_VEC: vectors}))
    return torch.autograd.grad(found.weights.sum() + found.rotations.sum(), vectors)


def _record(setting: Setting, name: str, structures: list[Atoms], rounds: int) -> dict[str, Any]:
    raw = from_ase(structures, dtype=torch.float32).to(setting.device)
    batch = with_neighbors(raw, CUTOFF)
    species = tuple(sorted({int(z) for z in raw[keys.Z].tolist()}))
    networks = {
        "default": PET(PETConfig(species, cutoff=CUTOFF), seed=0),
        "large": PET(PETConfig(species, cutoff=CUTOFF, **LARGE), seed=0),
    }
    functions: dict[str, Callable[[], object]] = {
        "frames": _without_gradients(lambda: frames(batch)),
        "gradients": lambda: _gradients(batch),
        "neighbors": _without_gradients(lambda: with_neighbors(raw, CUTOFF)),
    }
    for size, network in networks.items():
        network = network.to(setting.device).requires_grad_(False).eval()
        functions[size] = _without_gradients(lambda network=network: network(batch))
    times = in_turns(functions, rounds, setting.device)
    with torch.no_grad(), Counter() as counter:
        frames(batch)
    both = times.seconds("frames") + times.seconds("neighbors")
    return {
        "system": name,
        "n_atoms": raw[keys.POS].shape[0],
        "n_edges": batch[keys.EDGE_INDEX].shape[1],
        **{f"seconds_{part}": times.seconds(part) for part in functions},
        **{f"over_{size}": times.ratio("frames", size) for size in networks},
        **{f"both_over_{size}": both / times.seconds(size) for size in networks},
        "operations": counter.operations,
        "synchronisations": counter.synchronisations,
        "microseconds_per_center": 1e6 * times.seconds("frames") / raw[keys.POS].shape[0],
    }


def _without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function()

    return call


def _against_neighbors(setting: Setting, rounds: int, n_centers: int = 200) -> list[dict[str, Any]]:
    batches = {k: _clouds(k, n_centers).to(setting.device) for k in NEIGHBORS}
    functions = {str(k): _without_gradients(lambda batch=batch: frames(batch)) for k, batch in batches.items()}
    times: Times = in_turns(functions, rounds, setting.device)
    records = []
    for k, batch in batches.items():
        with torch.no_grad(), Counter() as counter:
            frames(batch)
        records.append(
            {
                "system": f"{n_centers} centers, {k} neighbors",
                "n_atoms": n_centers,
                "n_edges": k * n_centers,
                "seconds_frames": times.seconds(str(k)),
                "operations": counter.operations,
                "synchronisations": counter.synchronisations,
                "microseconds_per_center": 1e6 * times.seconds(str(k)) / n_centers,
            }
        )
    return records


def _clouds(n_neighbors: int, n_centers: int) -> Batch:
    """Centers with exactly so many neighbors, at the density at which 25 of them are within the cutoff."""
    generator = torch.Generator().manual_seed(n_neighbors)
    direction = torch.randn(n_centers, n_neighbors, 3, generator=generator, dtype=torch.float64)
    radius = CUTOFF * (n_neighbors / 25.0) ** (1.0 / 3.0)
    distance = radius * torch.rand(n_centers, n_neighbors, 1, generator=generator, dtype=torch.float64) ** (1.0 / 3.0)
    vectors = (direction / direction.norm(dim=2, keepdim=True) * distance.clamp(min=0.2 * CUTOFF)).reshape(-1, 3)
    center = torch.arange(n_centers).repeat_interleave(n_neighbors)
    batch = from_points(torch.randn(n_centers, 3, generator=generator, dtype=torch.float64))
    edges = {keys.EDGE_INDEX: torch.stack([center, center]), keys.EDGE_VEC: vectors, keys.EDGE_CUTOFF: 1.01 * radius}
    return replace(batch, **edges)


def _against_proof_of_concept(setting: Setting, source: Path, rounds: int) -> list[dict[str, Any]]:
    """One small structure each: the other code has no batches and knows the CPU only where it is given CPU tensors."""
    spec = importlib.util.spec_from_file_location("sp_frames_calculator", source / "src" / "sp_frames_calculator.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no src/sp_frames_calculator.py in {source}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    structures = {"one ethanol": setting.datasets[BUNDLED][0]}
    carbon = [atoms for atoms in setting.datasets.get("carbon", []) if len(atoms) == 4]
    if carbon:
        structures["carbon, 4 atoms"] = max(carbon, key=lambda atoms: len(atoms) / atoms.get_volume())
    else:
        structures["silicon"] = geometries()["rattled silicon"]
    records = []
    for name, atoms in structures.items():
        batch = from_ase(atoms, cutoff=CUTOFF)
        calculator = module.SPFramesCalculator(_hypers(source))
        center, vectors = batch[keys.EDGE_INDEX][1], batch[keys.EDGE_VEC]
        n_atoms = batch[keys.POS].shape[0]
        zeros = torch.zeros(n_atoms, dtype=torch.int64)
        count = torch.bincount(center, minlength=n_atoms)
        environments = [
            [vectors[center == i], torch.zeros(int(count[i]), dtype=torch.int64), zeros[i]] for i in range(n_atoms)
        ]

        def published(calculator: Any = calculator, environments: Any = environments) -> object:
            return calculator.get_all_frames_global(environments, CUTOFF, 1)

        # Once is enough for seconds against a millisecond.
        theirs = in_turns({"published": _without_gradients(published)}, 1, setting.device).seconds("published")
        ours = in_turns({"frames": _without_gradients(lambda batch=batch: frames(batch))}, rounds, setting.device)
        records.append(
            {
                "system": name,
                "n_atoms": n_atoms,
                "n_edges": int(center.shape[0]),
                "seconds_frames": ours.seconds("frames"),
                "seconds_published": theirs,
                "faster": theirs / ours.seconds("frames"),
            }
        )
    return records


def _hypers(source: Path) -> SimpleNamespace:
    """What the other code is run with: its own defaults."""
    text = (source / "default_hypers" / "sp_default_hypers.yaml").read_text()
    return SimpleNamespace(**yaml.safe_load(text))
