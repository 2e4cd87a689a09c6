"""PET here and in metatrain: throughput of inference and training, beside the time of their matrix products alone.

Both start from the same weights, see the same structures and take the same steps: random orientation, energies and
forces, mean squared errors of both, gradient clipping, Adam. What comes before a step counts where it is taken: in
metatrain neighbor lists and composition energies of every batch, here the gathering of a batch from a table.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.io import write
from symmetrize.backbones.pet.translation import from_metatrain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.datasets import BUNDLED
from benchmarks.record import Column, Result, Setting, digits, fixed
from benchmarks.timing import Times, in_turns
from symmetrize import keys
from symmetrize.errors import MissingDependencyError
from symmetrize.metatomic import import_metatomic, import_metatrain
from symmetrize.training.dataset import TARGET_ENERGY, TARGET_FORCES, augment, generator_for, tabulate
from symmetrize.training.gradients import energy_and_forces, evaluate

#: Hyperparameters of metatrain that differ from its defaults.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "d_pet": 64,
        "d_node": 64,
        "d_head": 64,
        "d_feedforward": 128,
        "num_heads": 4,
        "num_attention_layers": 1,
    },
    "default": {},
}
BATCH_SIZES = (8, 64)
ENERGY, FORCES = "reference_energy", "reference_forces"
LOSS = {
    "energy": {
        "type": "mse",
        "weight": 1.0,
        "reduction": "mean",
        "gradients": {"positions": {"type": "mse", "weight": 1.0, "reduction": "mean"}},
    }
}

COLUMNS = (
    Column("size", "size"),
    Column("n_parameters", "parameters"),
    Column("batch_size", "batch"),
    Column("task", "task"),
    Column("ms_metatrain", "metatrain (ms)", digits(3)),
    Column("ms", "here (ms)", digits(3)),
    Column("speedup", "speedup", fixed(2)),
    Column("ms_floor", "products alone (ms)", digits(3)),
    Column("speedup_limit", "speedup at the floor", fixed(2)),
    Column("validation", "force MAE (meV/Å), here / metatrain", str),
)

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


def run(setting: Setting) -> Result:
    """Times of both in turns, float32; in the full profile both are trained as well."""
    if setting.device.type != "cpu":
        return Result("PET and metatrain", [], COLUMNS, {}, ["Only measured on the CPU."])
    structures = [_labeled(atoms) for atoms in setting.datasets.get("ethanol", setting.datasets[BUNDLED])]
    cases = [(size, n) for size in SIZES for n in BATCH_SIZES]
    try:
        records = [r for size, n in setting.bar(cases, "PET") for r in _speed(setting, structures, size, n)]
        if setting.full:
            records += [_trained(structures, size) for size in setting.bar(list(SIZES), "training")]
    except MissingDependencyError as error:
        return Result("PET and metatrain", [], COLUMNS, {}, [f"Skipped: {error}"])
    notes = [
        "Energy: one batch without gradients; forces: with one backward pass; step: loss on both, backward, clipping "
        "and Adam; step with data: from the numbers of the structures. Least CPU times, in turns.",
        "Products alone: the matrix products of our evaluation again, each at its own shape, on contiguous operands "
        "of their own, and nothing else. The last column is the speedup if everything else took no time.",
        "Small: 64 wide, one attention layer per block; default: metatrain's. Both: two blocks, feed-forward readout.",
        "Training: same initial weights, order, learning rates and number of epochs; errors on structures left out.",
    ]
    return Result("PET and metatrain", records, COLUMNS, {"dtype": "float32", "sizes": SIZES}, notes)


def _labeled(atoms: Atoms) -> Atoms:
    out = Atoms(numbers=atoms.numbers, positions=atoms.positions)
    out.info[ENERGY] = atoms.get_potential_energy()
    out.arrays[FORCES] = atoms.get_forces()
    return out


class Metatrain:
    """The inner loop of metatrain's trainer of PET, piece by piece."""

    def __init__(self, structures: list[Atoms], hypers: dict[str, Any], batch_size: int) -> None:
        pet, self.trainer = import_metatrain("metatrain.pet"), import_metatrain("metatrain.pet.trainer")
        data, readers = import_metatrain("metatrain.utils.data"), import_metatrain("metatrain.utils.data.readers")
        self.output = import_metatomic().ModelOutput
        defaults = import_metatrain("metatrain.utils.architectures").get_default_hypers("pet", 32)
        t = self.trainer
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = str(Path(folder) / "structures.xyz")
            write(file, structures, format="extxyz")
            systems = readers.read_systems(file)
            targets, infos = readers.read_targets(_targets(file))
            dataset = data.Dataset.from_dict({"system": systems, **targets})
            species = sorted({int(z) for atoms in structures for z in atoms.numbers})
            torch.manual_seed(0)
            self.model = pet.PET(
                {**copy.deepcopy(defaults["model"]), **hypers}, data.DatasetInfo("angstrom", species, infos)
            )
            self.model.to(dtype=torch.float32)
            additive, scaler = self.model.additive_models, self.model.scaler
            for part in (*additive, scaler):
                part.to(dtype=torch.float64)
            t.train_or_load_composition_model(
                composition_model=additive[0],
                atomic_baseline={},
                train_datasets=[dataset],
                other_additive_models=[],
                batch_size=batch_size,
                is_distributed=False,
                checkpoint_dir=folder,
            )
            t.train_or_load_scaler(
                scaler=scaler,
                fixed_weights={},
                train_datasets=[dataset],
                additive_models=additive,
                batch_size=batch_size,
                is_distributed=False,
                checkpoint_dir=folder,
                per_structure_targets=[],
            )
        additive[0].weights_to(device="cpu", dtype=torch.float64)
        scaler.scales_to(device="cpu", dtype=torch.float64)
        augmenter = t.O3Augmenter(target_info_dict=infos, extra_data_info_dict={})
        prepare = [
            t.get_system_with_neighbor_lists_transform(t.get_requested_neighbor_lists(self.model)),
            t.get_remove_additive_transform(copy.deepcopy(additive), infos),
            t.get_remove_scale_transform(copy.deepcopy(scaler)),
        ]
        self.as_given = t.CollateFn(target_keys=list(infos), callables=prepare)
        self.augmented = t.CollateFn(
            target_keys=list(infos), callables=[augmenter.apply_random_augmentations, *prepare]
        )
        self.infos, self.dataset = infos, dataset
        self.loss = t.LossAggregator(targets=infos, config=LOSS)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=defaults["training"]["learning_rate"])
        self.hypers = defaults["training"]

    def batch(self, numbers: list[int], augmented: bool = True) -> Any:
        collate = self.augmented if augmented else self.as_given
        return collate([self.dataset[n] for n in numbers])

    def unpacked(self, batch: Any) -> Any:
        return self.trainer.batch_to(*self.trainer.unpack_batch(batch), dtype=torch.float32, device=torch.device("cpu"))

    def energy(self, systems: Any) -> Any:
        self.model.eval()
        with torch.no_grad():
            return self.model(systems, {"energy": self.output(unit="eV", sample_kind="system")})

    def forces(self, systems: Any) -> Any:
        self.model.eval()
        return self.trainer.evaluate_model(self.model, systems, self.infos, is_training=False)

    def step(self, batch: Any) -> float:
        t = self.trainer
        self.model.train()
        self.optimizer.zero_grad()
        systems, targets, extra = self.unpacked(batch)
        predictions = t.evaluate_model(self.model, systems, self.infos, is_training=True)
        predictions = t.average_by_num_atoms(predictions, systems, [])
        targets = t.average_by_num_atoms(targets, systems, [])
        predictions = self.model.scaler.apply_scales(
            systems, predictions, remove=False, use_per_target_scales=False, use_per_property_scales=True
        )
        loss = self.loss(predictions, targets, extra)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hypers["grad_clip_norm"])
        self.optimizer.step()
        return float(loss.detach())


def _targets(file: str) -> Any:
    """What metatrain's readers want to know about the targets."""
    source = {"read_from": file, "reader": None}
    energy = {
        **source,
        "quantity": "energy",
        "key": ENERGY,
        "unit": "eV",
        "description": "",
        "sample_kind": "system",
        "type": "scalar",
        "num_subtargets": 1,
        "forces": {**source, "key": FORCES},
        "stress": False,
        "virial": False,
    }
    return import_metatrain("omegaconf").OmegaConf.create({"energy": energy})


class Ours:
    """The same steps with the same weights."""

    def __init__(self, other: Metatrain, structures: list[Atoms]) -> None:
        self.model = from_metatrain(other.model.eval()).requires_grad_(True)
        self.table = tabulate(structures, self.model.cutoff, ENERGY, FORCES)
        everything = self.table.batch
        composition = self.model.baseline(everything)["energy"]
        self.baseline = torch.zeros(len(structures), dtype=torch.float64)
        self.baseline.index_add_(0, everything[keys.BATCH], composition.detach().reshape(-1))
        self.scale = float(self.model.scale * self.model.factor[0, 0])
        self.clip = other.hypers["grad_clip_norm"]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=other.hypers["learning_rate"], fused=True)
        self.n_batches = 0

    def batch(self, numbers: list[int], augmented: bool = True) -> Any:
        batch = self.table.select(torch.tensor(numbers), torch.float32, self.baseline)
        self.n_batches += 1
        return augment(batch, generator_for(0, self.n_batches)) if augmented else batch

    def energy(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self.model(batch)["energy"]

    def forces(self, batch: Any) -> Any:
        return energy_and_forces(self.model, batch, create_graph=False)

    def step(self, batch: Any) -> float:
        self.optimizer.zero_grad()
        energy, forces = energy_and_forces(self.model, batch, create_graph=True)
        n_atoms = batch[keys.PTR].diff()
        loss = ((energy - batch[TARGET_ENERGY]) / (n_atoms * self.scale)).square().mean()
        loss = loss + ((forces - batch[TARGET_FORCES]) / self.scale).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return float(loss.detach())


def _in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> Times:
    """As `in_turns`, but with one thread in CPU time, to which other processes add less than to wall time."""
    if torch.get_num_threads() > 1:
        return in_turns(functions, rounds, torch.device("cpu"))
    seconds = []
    for n in range(rounds + 1):
        found = {}
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name] = time.process_time() - start
        if n:
            seconds.append(found)
    return Times(seconds)


class _Products(TorchDispatchMode):
    """Counts matrix products by name and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func.overloadpacket.__name__)
        if first is not None:
            self.counts[tuple(args[first].shape), tuple(args[first + 1].shape)] += 1
        return func(*args, **(kwargs or {}))


def floor(function: Callable[[], object], rounds: int) -> float:
    """Seconds that the matrix products of a function take on their own."""
    with _Products() as products:
        function()
    shapes = list(products.counts)
    operands = [(torch.randn(left), torch.randn(right)) for left, right in shapes]
    outs = [torch.empty_like(left @ right) for left, right in operands]
    again = {
        str(n): (lambda pair=pair, out=out: torch.matmul(*pair, out=out))
        for n, (pair, out) in enumerate(zip(operands, outs, strict=True))
    }
    times = _in_turns(again, rounds)
    return sum(products.counts[shape] * times.seconds(str(n)) for n, shape in enumerate(shapes))


def _speed(setting: Setting, structures: list[Atoms], size: str, batch_size: int) -> list[dict[str, Any]]:
    structures = structures[:batch_size]
    theirs = Metatrain(structures, SIZES[size], batch_size)
    ours = Ours(theirs, structures)
    numbers = list(range(len(structures)))
    given, taken = theirs.batch(numbers, False), ours.batch(numbers, False)
    for number in range(3):  # the same function, the same gradients, the same optimizer
        expected, found = theirs.step(given), ours.step(taken)
        if not math.isclose(expected, found, rel_tol=1e-3):
            raise RuntimeError(f"loss of step {number}: expected {expected} as in metatrain, got {found}")
    systems = theirs.unpacked(given)[0]
    tasks: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "energy": (lambda: theirs.energy(systems), lambda: ours.energy(taken)),
        "forces": (lambda: theirs.forces(systems), lambda: ours.forces(taken)),
        "step": (lambda: theirs.step(given), lambda: ours.step(taken)),
        "step with data": (
            lambda: theirs.step(theirs.batch(numbers)),
            lambda: ours.step(ours.batch(numbers)),
        ),
    }
    rounds = (6 if batch_size < 64 else 3) * (4 if setting.full else 1) * (2 if size == "small" else 1)
    pairs = {f"{task}{n}": pair[n] for task, pair in tasks.items() for n in range(2)}
    times = _in_turns(pairs, rounds)
    records = []
    alone = 0.0
    for task in tasks:
        # The data add none.
        alone = alone if task == "step with data" else floor(tasks[task][1], rounds)
        slow, fast = times.seconds(f"{task}0"), times.seconds(f"{task}1")
        records.append(
            {
                "size": size,
                "n_parameters": sum(p.numel() for p in ours.model.parameters()),
                "batch_size": len(numbers),
                "task": task,
                "ms_metatrain": 1e3 * slow,
                "ms": 1e3 * fast,
                "speedup": slow / fast,
                "ms_floor": 1e3 * alone,
                "speedup_limit": slow / alone,
            }
        )
    return records


def _trained(
    structures: list[Atoms], size: str, n_train: int = 80, epochs: int = 60, batch_size: int = 8
) -> dict[str, Any]:
    """Both trained for some epochs, and their errors on the structures that are left."""
    theirs = Metatrain(structures[:n_train], SIZES[size], batch_size)
    ours = Ours(theirs, structures[:n_train])
    steps = n_train // batch_size
    hypers = {**theirs.hypers, "num_epochs": epochs}
    orders, schedules = [], []
    for side in (theirs, ours):
        for group in side.optimizer.param_groups:
            group["lr"] = 1e-3
        schedules.append(theirs.trainer.get_scheduler(side.optimizer, hypers, steps))
        orders.append(torch.Generator().manual_seed(0))
    seconds = [0.0, 0.0]
    for _ in range(epochs):  # in turns
        for n, side in enumerate((theirs, ours)):
            start = time.process_time()
            for numbers in torch.randperm(n_train, generator=orders[n])[: steps * batch_size].split(batch_size):
                side.step(side.batch(numbers.tolist()))
                schedules[n].step()
            seconds[n] += time.process_time() - start
    validation = tabulate(structures[n_train:], ours.model.cutoff, ENERGY, FORCES)
    per_structure = float(ours.baseline[0])  # one molecule, one composition
    baseline = torch.full((len(validation),), per_structure, dtype=torch.float64)
    everything = torch.arange(len(validation))
    errors = [evaluate(m, validation, everything, baseline) for m in (ours.model, from_metatrain(theirs.model.eval()))]
    return {
        "size": size,
        "n_parameters": sum(p.numel() for p in ours.model.parameters()),
        "batch_size": batch_size,
        "task": f"{epochs} epochs, {n_train} structures",
        "ms_metatrain": 1e3 * seconds[0],
        "ms": 1e3 * seconds[1],
        "speedup": seconds[0] / seconds[1],
        "validation": " / ".join(f"{1e3 * e.forces_mae:.1f}" for e in errors),
        "energy_mae": errors[0].energy_mae,
        "energy_mae_metatrain": errors[1].energy_mae,
        "forces_mae": errors[0].forces_mae,
        "forces_mae_metatrain": errors[1].forces_mae,
    }
