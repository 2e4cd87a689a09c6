"""The evaluation of one cell, in any process: from plain JSON to the models, and from these to a record."""

from __future__ import annotations

import contextlib
import inspect
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from symmetrize.backbone import Backbone
from symmetrize.data import read_structures
from symmetrize.errors import DeclarationError, InvalidInputError, NoFrameError, SymmetrizeError
from symmetrize.frames import FrameMethod
from symmetrize.methods import METHODS, find_method, make_method
from symmetrize.methods.identity import Identity
from symmetrize.study.backbones import load_named, load_trained
from symmetrize.study.config import DataEntry
from symmetrize.study.prepared import PreparedCell
from symmetrize.study.results import FAILED, OK, REFUSED, SCHEMA, VERSION, encode
from symmetrize.study.specs import described_backbone
from symmetrize.study.structures import reference_keys, references
from symmetrize.symmetrizer import Symmetrizer, check_energy

#: What says of a structure that a method, or a model, is not meant for it.
REFUSALS = (NoFrameError, InvalidInputError)


class Refused(Exception):
    """The method says that it cannot do this; the cause says why."""


def evaluate_cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Evaluate one cell, on one thread; whatever it raises is part of the record.

    Parameters
    ----------
    spec : dict
        Of `Specs.spec`: plain JSON.

    Returns
    -------
    dict
        The record: see `symmetrize.study`.
    """
    began = time.perf_counter()
    status, error, measured = OK, None, {}
    with one_thread():
        try:
            cell = prepare_cell(spec)
            probe(cell)
        except Refused as refusal:
            status, error = REFUSED, describe_error(refusal.__cause__ or refusal)
        except Exception as failure:  # whatever a backbone, a method or a library raises
            status, error = FAILED, describe_error(failure)
        else:
            measured = _measure(cell, spec["measures"])
            broken = [name for name, value in measured.items() if _is_failure(value)]
            if broken:
                status, error = FAILED, dict(measured[broken[0]]["error"])
                error["message"] = f"measure {', '.join(broken)}: {error['message']}"
    return make_record(spec, status, error, measured, time.perf_counter() - began)


def make_record(
    spec: Mapping[str, Any], status: str, error: Mapping[str, Any] | None, measured: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """One line of the results."""
    record: dict[str, Any] = encode(
        {
            "schema": SCHEMA,
            "version": VERSION,
            "key": spec["key"],
            "cell": spec["cell"],
            "status": status,
            "error": error,
            "measures": measured,
            "environment": environment(),
            "seconds": round(seconds, 3),
        }
    )
    return record


def _measure(cell: PreparedCell, names: list[str]) -> dict[str, Any]:
    from symmetrize.study.measures import MEASURES

    found: dict[str, Any] = {}
    for name in names:
        measure: Callable[[PreparedCell], dict[str, Any]] = MEASURES[name]
        began = time.perf_counter()
        try:
            found[name] = encode(measure(cell))
        except Exception as error:  # the other measures go on
            found[name] = {"error": {**describe_error(error), "refused": isinstance(error, REFUSALS)}}
        found[name].setdefault("seconds", round(time.perf_counter() - began, 3))
    return found


def _is_failure(measured: Mapping[str, Any]) -> bool:
    error = measured.get("error")
    return isinstance(error, Mapping) and not error.get("refused", False)


def prepare_cell(spec: Mapping[str, Any]) -> PreparedCell:
    """Models, structures and references of a cell.

    Raises
    ------
    Refused
        The method cannot symmetrise this backbone in this group and scope.
    SymmetrizeError
        Something else is wrong.
    """
    dtype = getattr(torch, spec["dtype"])
    backbone = _load(spec["backbone"]).to(dtype).eval().requires_grad_(False)
    labels, data = spec["cell"], spec["data"]
    entry = DataEntry(path=data["path"], **data["entry"])
    frames = read_structures(Path(data["path"]), f"data.{labels['data']}.path")
    structures = [frames[n] for n in data["numbers"]]
    values, units = references(labels["data"], entry, structures, backbone.outputs)
    bare_structures = [_without_references(atoms, entry) for atoms in structures]
    seed = int(labels["seed"])
    try:
        method = _method(spec["method"], seed, dtype)
        group = spec["method"]["group"] or ("O(3)" if "O(3)" in method.groups else method.groups[0])
        model = Symmetrizer(backbone, method, group, spec["method"]["scope"]).eval()
    except SymmetrizeError as error:
        raise Refused from error
    try:
        check_energy(backbone, "energy")
        energy: str | None = "energy"
    except DeclarationError:
        energy = None
    present = tuple(sorted({int(z) for atoms in structures for z in atoms.numbers}))
    return PreparedCell(
        model=model,
        bare=Symmetrizer(backbone, Identity(), group, model.scope).eval(),
        backbone=backbone,
        structures=bare_structures,
        references=values,
        outputs=dict(backbone.outputs),
        species=present if backbone.species is None else tuple(backbone.species),
        energy=energy,
        seed=seed,
        sizes=dict(spec["sizes"]),
        units=units,
        dtype=dtype,
        group=group,
    )


def probe(cell: PreparedCell) -> None:
    """Evaluate all structures once: what a method is not meant for it refuses here.

    Raises
    ------
    Refused
        The model, where the bare one evaluates them.
    """
    forces = cell.energy is not None
    cell.bare(cell.batch(), forces=forces, create_graph=False)
    try:
        with torch.set_grad_enabled(forces):
            cell.model(cell.batch(), forces=forces, create_graph=False)
    except REFUSALS as error:
        raise Refused from error


def _load(described: Mapping[str, Any]) -> Backbone:
    if "recipe" in described:
        return load_trained(Path(described["folder"]))
    return load_named(described["name"], described["options"])


def _method(described: Mapping[str, Any], seed: int, dtype: torch.dtype) -> FrameMethod:
    options = {}
    for name, value in described["options"].items():
        backbone = described_backbone(value)
        options[name] = value if backbone is None else _load(backbone).to(dtype).eval().requires_grad_(False)
    return make_method(described["name"], **options, **_seeded(described["name"], options, seed)).eval()


def _seeded(name: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The seed of the study, for methods that draw something and were not given another one."""
    if "seed" in options or name not in METHODS:
        return {}
    return {"seed": seed} if "seed" in inspect.signature(find_method(name)).parameters else {}


def _without_references(atoms: Any, entry: DataEntry) -> Any:
    keys = set(reference_keys(entry, atoms).values())
    copy = atoms.copy()  # without a calculator
    for name in keys:
        copy.info.pop(name, None)
        if name in copy.arrays and name not in ("numbers", "positions"):
            del copy.arrays[name]
    return copy


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Several threads on busy cores can be ten times slower than one, and cells run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """Versions, threads, kind of machine and date."""
    versions = {"python": platform.python_version()}
    for name in ("torch-symmetrize", "torch", "e3nn", "torch-geometric", "ase", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "threads": 1,
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_error(error: BaseException) -> dict[str, Any]:
    """Type, message and where it was raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return {"type": type(error).__name__, "message": str(error), "traceback": "\n".join(lines[-12:])}
