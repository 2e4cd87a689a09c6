"""`evaluate_file`: what ``symmetrize evaluate`` does."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress
from tqdm import tqdm

from symmetrize.data import read_structures
from symmetrize.errors import CostWarning, InvalidInputError, MissingDependencyError, SymmetrizeError, did_you_mean
from symmetrize.evaluate.batches import make_batches, share_out
from symmetrize.evaluate.job import Job
from symmetrize.evaluate.parts import Part, Parts, Prediction, key_of
from symmetrize.evaluate.report import list_predictions, report_errors
from symmetrize.files import replacing
from symmetrize.symmetrizer import Symmetrizer

STRATEGIES = ("auto", "ddp", "ddp_spawn")


def evaluate_file(
    structures: str | Path,
    *,
    backbone: str = "pet:ethanol",
    group: str | None = None,
    scope: str | None = None,
    forces: bool = True,
    stress: bool = False,
    spread: bool = False,
    dtype: str = "float64",
    batch_size: int = 32,
    max_atoms: int = 4096,
    output: str | Path | None = None,
    restart: bool = False,
    explain: bool = False,
    device: str = "cpu",
    devices: int | str | Sequence[int] = 1,
    strategy: str = "auto",
    echo: Callable[[str], None] = print,
) -> list[Atoms]:
    """Evaluate all structures of a file and report errors against its references.

    With an ``output``, what is finished is kept in a folder beside it until all is, so that a run that was interrupted
    goes on from there when it is repeated, with any batches and devices.

    Parameters
    ----------
    structures : path
        Any format that ASE reads; energies in eV, forces in eV/angstrom where present.
    backbone : str
        ``"name"`` or ``"name:argument"`` as for `load_backbone`; or the folder of a saved model.
    group : {"O(3)", "SO(3)", "none"}, optional
        ``"none"`` evaluates the bare backbone. By default that of the saved model, else ``"O(3)"``.
    scope : {"atom", "structure"}, optional
        By default that of the saved model, else as `Symmetrizer` chooses.
    batch_size, max_atoms : int
        Structures and atoms at a time, at most; a structure with more atoms is evaluated alone.
    output : path, optional
        Where to write the structures with the predictions attached (extxyz).
    restart : bool
        Forget what an interrupted run has finished.
    explain : bool
        Only print the plan of the first batch.
    device : str
        Where to evaluate: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for CUDA where there is any.
    devices : int, str or sequence of int
        How many of this kind, ``"auto"`` for all, or which, such as ``"0,2"``. Several need Lightning.
    strategy : {"auto", "ddp", "ddp_spawn"}
        How Lightning starts a process for each of several devices: ``"auto"`` and ``"ddp"`` repeat the command of this
        process, ``"ddp_spawn"`` calls a function, and is what a script of yours wants (below ``if __name__ ==
        "__main__"``).

    Returns
    -------
    list of ase.Atoms
        Copies with a `SinglePointCalculator` that holds the predictions; none with ``explain``, and none in the
        processes that "ddp" starts beside the first.

    Raises
    ------
    InvalidInputError
        For an unusable file, structure (by its number) or device, or an ``output`` with parts of another evaluation.
    MissingDependencyError
        For several devices without Lightning.
    """
    started = time.perf_counter()
    kind, chosen = _find_devices(device, devices)
    if strategy not in STRATEGIES:
        raise InvalidInputError(f"strategy: unknown {strategy!r}, {did_you_mean(strategy, STRATEGIES)}")
    for name, limit in (("batch_size", batch_size), ("max_atoms", max_atoms)):
        if limit < 1:
            raise InvalidInputError(f"{name}: expected a positive number, got {limit}")
    first = len(chosen) == 1 or _is_first_process()
    frames = read_structures(structures)
    job = Job(frames, [key_of(a) for a in frames], backbone, group, scope, forces, stress, spread, dtype)
    n_atoms = [len(atoms) for atoms in frames]
    model = job.build()
    if explain:
        members = make_batches(n_atoms, batch_size, max_atoms)[0]
        echo(f"the first {len(members)} of {len(frames)} structures:")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CostWarning)  # the plan says the same
            echo(str(model.to(chosen[0]).explain(job.batch(members).to(chosen[0]))))
        return []
    with _parts(output) as parts:
        if first:
            parts.claim(job.describe(model), restart)
        before = parts.read().predictions
        if first and before:
            echo(f"{sum(key in before for key in job.keys)} of {len(frames)} structures were finished before")
        pending = _pending(job, before)
        n_ranks = min(len(chosen), max(1, len(pending)))
        batches = make_batches(n_atoms, batch_size, max_atoms, members=pending, n_ranks=n_ranks)
        try:
            if n_ranks == 1:
                _predict_here(job, model, parts, batches, chosen[0])
            else:
                from symmetrize.evaluate.lit import predict_on_devices

                shares = share_out(batches, n_atoms, n_ranks)
                ids = n_ranks if kind == "cpu" else [int(d.index) for d in chosen[:n_ranks]]
                predict_on_devices(job, parts, shares, accelerator=kind, devices=ids, strategy=strategy)
            if not first:
                return []
            failure = parts.failure
            if failure is not None:
                raise failure
        except SymmetrizeError:
            parts.remove_if_empty()
            raise
        finished = parts.read()
        predicted = _attach(job, finished)
        wall = time.perf_counter() - started
        if output is not None:
            with replacing(output) as temporary:
                write(temporary, predicted, format="extxyz")
            parts.remove()
        _summarize(job, model, finished, wall, n_ranks, echo)
        report_errors(frames, predicted, forces, echo)
        if output is not None:
            echo(f"wrote {output}")
        else:
            list_predictions(predicted, echo)
    return predicted


def _find_devices(device: str, devices: int | str | Sequence[int]) -> tuple[str, list[torch.device]]:
    """Kind and list of what to evaluate on; several only where Lightning is installed."""
    kind = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(device, device)
    try:
        torch.zeros(1, device=kind)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"device: {device!r} is not available here, 'cpu' is") from error
    expected = f"devices: expected a number, 'auto' or a list such as '0,2', got {devices!r}"
    numbers: list[int] | None = None
    try:
        if isinstance(devices, str) and devices != "auto" and "," not in devices:
            devices = int(devices)
        elif isinstance(devices, str) and devices != "auto":
            numbers = [int(word) for word in devices.split(",") if word.strip()]
        elif not isinstance(devices, (str, int)):
            numbers = [int(number) for number in devices]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(expected) from error
    if isinstance(devices, int) and devices == 1:
        return kind.partition(":")[0], [torch.device(kind)]
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"device: with devices={devices!r} expected 'cpu', 'cuda' or 'auto', got {device!r}")
    if kind == "cpu" and numbers is not None:
        raise InvalidInputError(f"devices: expected a number of processes for the CPU, got {devices!r}")
    available = torch.cuda.device_count() if kind == "cuda" else None
    if numbers is None:
        count = devices if isinstance(devices, int) else available or 1
        if count < 1:
            raise InvalidInputError(expected)
        numbers = list(range(count))
    if not numbers or len(set(numbers)) < len(numbers):
        raise InvalidInputError(expected)
    if available is not None and not all(0 <= number < available for number in numbers):
        raise InvalidInputError(f"devices: expected some of the {available} that are here, got {devices!r}")
    if len(numbers) > 1:
        _require_lightning()
    found = [torch.device(kind, number) if kind == "cuda" else torch.device(kind) for number in numbers]
    return kind, found


def _require_lightning() -> None:
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "several devices need lightning; install it with: pip install 'torch-symmetrize[train]'"
        ) from error


def _is_first_process() -> bool:
    from symmetrize.evaluate.lit import is_first_process

    return is_first_process()


@contextlib.contextmanager
def _parts(output: str | Path | None) -> Iterator[Parts]:
    """Beside the output, where they outlive this process; otherwise in a temporary folder."""
    if output is not None:
        path = Path(output)
        yield Parts(path.parent / f".{path.name}.parts")
        return
    with tempfile.TemporaryDirectory(prefix="symmetrize-") as folder:
        yield Parts(Path(folder))


def _pending(job: Job, before: dict[str, Prediction]) -> list[int]:
    """Structures that have no prediction yet; of equal ones the first."""
    first: dict[str, int] = {}
    for n, key in enumerate(job.keys):
        first.setdefault(key, n)
    return [n for key, n in first.items() if key not in before]


def _predict_here(job: Job, model: Symmetrizer, parts: Parts, batches: list[list[int]], device: torch.device) -> None:
    model = model.to(device)
    for members in tqdm(batches, unit="batch", disable=None, leave=False):
        parts.write(job.predict(model, members, device))


def _attach(job: Job, finished: Part) -> list[Atoms]:
    """Copies of the structures, in the order of the file, with their predictions."""
    lost = [n for n, key in enumerate(job.keys) if key not in finished.predictions]
    if lost:
        raise InvalidInputError(
            f"structures: expected a prediction for each, got none for {len(lost)} of them, the first one {lost[0]}; "
            "was a process stopped, or a file deleted?"
        )
    return [_copy(atoms, finished.predictions[key]) for atoms, key in zip(job.frames, job.keys, strict=True)]


def _copy(atoms: Atoms, prediction: Prediction) -> Atoms:
    results: dict[str, Any] = {"energy": prediction.energy}
    if prediction.forces is not None:
        results["forces"] = prediction.forces
    if prediction.stress is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress)
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, **results)
    if prediction.energy_spread is not None:
        copy.info["energy_spread"] = prediction.energy_spread
    return copy


def _summarize(
    job: Job, model: Symmetrizer, finished: Part, wall: float, n_ranks: int, echo: Callable[[str], None]
) -> None:
    method = type(model.method).__name__
    symmetry = "bare" if method == "Identity" else f"{method}, {model.group}, scope {model.scope}"
    on = f" on {n_ranks} devices" if n_ranks > 1 else ""
    echo(
        f"{len(job.frames)} structures, {sum(map(len, job.frames))} atoms; {job.backbone}, {symmetry}; "
        f"{finished.seconds:.2f} s in the model{on}, {wall:.2f} s in all"
    )
