"""What a study evaluates: all its cells, and each of them as plain JSON with a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symmetrize.data import read_structures
from symmetrize.errors import SymmetrizeError
from symmetrize.study.backbones import (
    TRAINED,
    fingerprint_backbone,
    is_trained,
    load_named,
    resolve_name,
    training_hash,
    training_recipe,
)
from symmetrize.study.config import BackboneEntry, SkipEntry, Study, StudyError, is_backbone
from symmetrize.study.results import VERSION
from symmetrize.study.structures import (
    DataFile,
    check_references,
    chosen,
    find_file,
    fingerprint_structure,
)
from symmetrize.training.config import DataRecipe
from symmetrize.training.dataset import split


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes
    ----------
    labels : dict
        backbone, method, data, seed, curve.
    skip : str
        Why it is left out; empty if it is not.
    """

    labels: dict[str, Any]
    skip: str = ""

    @property
    def title(self) -> str:
        """Its labels as one line."""
        backbone, method, data, seed = (self.labels[k] for k in ("backbone", "method", "data", "seed"))
        return f"{backbone} | {method} | {data} | seed {seed}"


def list_cells(study: Study) -> list[Cell]:
    """All combinations, those that are skipped included."""
    cells = []
    for seed in study.seeds:
        for backbone, entry in study.backbones.items():
            for data in study.data if entry.data is None else entry.data:
                for method, how in study.methods.items():
                    labels = {"backbone": backbone, "method": method, "data": data, "seed": seed, "curve": how.curve}
                    reason = next((s.reason for s in study.skip if _matches(s, labels)), "")
                    cells.append(Cell(labels, reason))
    return cells


def _matches(skip: SkipEntry, labels: Mapping[str, Any]) -> bool:
    wanted = {kind: getattr(skip, kind) for kind in ("backbone", "method", "data")}
    return all(names is None or labels[kind] in names for kind, names in wanted.items())


class Specs:
    """Everything that the cells of a study need, as plain JSON; files and names are looked at once.

    Parameters
    ----------
    study : Study
    output : Path
        Folder of the run, which holds trained backbones.
    data : Path, optional
        Folder with data.
    """

    def __init__(self, study: Study, output: Path, data: Path | None = None) -> None:
        from symmetrize.study.measures import MEASURES

        self.study, self.output, self.data = study, output, data
        self.measures = [name for name in MEASURES if name in (study.measures or MEASURES)]
        self._files: dict[str, tuple[DataFile, list[int]]] = {}
        self._evaluated: dict[str, dict[str, int]] = {}
        self._trained_on: dict[str, set[str]] = {}
        self._backbones: dict[tuple[str, int], dict[str, Any]] = {}
        self._outputs: dict[str, set[str]] = {}

    def spec(self, cell: Cell) -> dict[str, Any]:
        """What `evaluate_cell` gets.

        Raises
        ------
        SymmetrizeError
            Data or a backbone that the study names cannot be used; the message names the place.
        """
        study, labels = self.study, cell.labels
        backbone = self._backbone(labels["backbone"], labels["seed"])
        entry = study.data[labels["data"]]
        file, numbers = self._file(labels["data"])
        method = study.methods[labels["method"]]
        options = {k: self._option(v, labels["seed"]) for k, v in method.options.items()}
        used = [v["backbone"] for v in method.options.values() if is_backbone(v)]
        for label in (labels["backbone"], *used):
            self._refuse_leaks(label, labels["data"])
        scope = method.scope or study.backbones[labels["backbone"]].scope
        spec = {
            "cell": dict(labels),
            "backbone": backbone,
            "method": {"name": method.name, "options": options, "group": method.group, "scope": scope},
            "data": {
                "path": str(file.path),
                "sha256": file.sha256,
                "numbers": numbers,
                "entry": {k: getattr(entry, k) for k in ("energy", "forces", "properties")},
            },
            "measures": self.measures,
            "sizes": dict(study.sizes),
            "dtype": study.dtype,
        }
        return {"key": cell_key(spec), **spec}

    def check_properties(self, cells: list[Cell]) -> None:
        """Refuse reference properties that no backbone predicts.

        Raises
        ------
        StudyError
        """
        for label in {cell.labels["data"] for cell in cells}:
            names = {cell.labels["backbone"] for cell in cells if cell.labels["data"] == label}
            known = [self._outputs[name] for name in names if name in self._outputs]
            if len(known) < len(names):
                continue  # one is trained first
            for output in self.study.data[label].properties:
                if not any(output in outputs for outputs in known):
                    there = sorted(set().union(*known))
                    raise StudyError(
                        f"data.{label}.properties.{output}: expected an output of one of its backbones, got {there}"
                    )

    def _file(self, label: str) -> tuple[DataFile, list[int]]:
        if label not in self._files:
            entry = self.study.data[label]
            file = find_file(label, entry, self.study.folder, self.data)
            frames = read_structures(file.path, f"data.{label}.path")
            numbers = chosen(entry, len(frames), label)
            check_references(label, entry, frames, numbers, file.path.name)
            self._files[label] = file, numbers
            self._evaluated[label] = {fingerprint_structure(frames[n]): n for n in numbers}
        return self._files[label]

    def _backbone(self, label: str, seed: int) -> dict[str, Any]:
        entry = self.study.backbones[label]
        if entry.train is None:
            seed = self.study.seeds[0]  # the same for all
        if (label, seed) not in self._backbones:
            made = self._named(label, entry) if entry.train is None else self._trained(label, entry, seed)
            self._backbones[label, seed] = made
        return self._backbones[label, seed]

    def _named(self, label: str, entry: BackboneEntry) -> dict[str, Any]:
        name = resolve_name(str(entry.name), self.study.folder)
        try:
            backbone = load_named(name, entry.options)
        except SymmetrizeError as error:
            raise StudyError(f"backbones.{label}.name: {error}") from error
        except Exception as error:  # whatever a loader makes of its options
            raise StudyError(f"backbones.{label}: {name}: {type(error).__name__}: {error}") from error
        self._outputs[label] = set(backbone.outputs)
        return {"name": name, "options": dict(entry.options), "sha256": fingerprint_backbone(backbone)}

    def _trained(self, label: str, entry: BackboneEntry, seed: int) -> dict[str, Any]:
        name = (entry.train or {})["data"]["set"]
        data = self.study.data[name]
        file = find_file(name, data, self.study.folder, self.data)
        recipe = training_recipe(self.study, label, seed, file)
        digest = training_hash(recipe, file)
        folder = self.output.resolve() / TRAINED / digest
        if label not in self._trained_on:
            frames = read_structures(file.path, f"data.{name}.path")
            parts = split(len(frames), DataRecipe(**recipe["data"]))
            seen = [*parts.train.tolist(), *parts.validation.tolist()]
            self._trained_on[label] = {fingerprint_structure(frames[n]) for n in seen}
        return {"label": f"{label}, seed {seed}", "recipe": recipe, "folder": str(folder), "sha256": digest}

    def _refuse_leaks(self, backbone: str, data: str) -> None:
        """Whatever the files are called: what a backbone has seen says nothing about how good it is."""
        evaluated = self._evaluated[data]
        common = sorted(evaluated[key] for key in evaluated.keys() & self._trained_on.get(backbone, set()))
        if common:
            raise StudyError(
                f"backbones.{backbone}.train: expected training without what is evaluated, got structure "
                f"{common[0]} of {data!r} in it ({len(common)} in all); name the same path in both data sets, or "
                "raise held_out"
            )

    def _option(self, value: Any, seed: int) -> Any:
        """An option of a method; a backbone is described as that of the cell is."""
        if not is_backbone(value):
            return value
        if value["backbone"] in self.study.backbones:
            return {"backbone": self._backbone(value["backbone"], seed)}
        name = resolve_name(value["backbone"], self.study.folder)
        options = {k: v for k, v in value.items() if k != "backbone"}
        digest = fingerprint_backbone(load_named(name, options))
        return {"backbone": {"name": name, "options": options, "sha256": digest}}


def described_backbone(option: Any) -> dict[str, Any] | None:
    """The backbone that an option of a method stands for in a specification; None for other options."""
    found = option.get("backbone") if isinstance(option, Mapping) else None
    return found if isinstance(found, dict) else None


def missing_folders(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Backbones of a cell, by folder, that have to be trained first: its own and those of its method."""
    described = [spec["backbone"], *map(described_backbone, spec["method"]["options"].values())]
    found = {one["folder"]: one for one in described if one is not None and "folder" in one}
    return {folder: one for folder, one in found.items() if not is_trained(Path(folder))}


def cell_key(spec: Mapping[str, Any]) -> str:
    """16 digits of the hash of everything that determines the numbers of a cell, wherever its files lie."""
    data = {k: v for k, v in spec["data"].items() if k != "path"}
    labels = {k: v for k, v in spec["cell"].items() if k != "curve"}
    options = {}
    for name, value in spec["method"]["options"].items():
        described = described_backbone(value)
        options[name] = value if described is None else _by_hash(described)
    method = {**spec["method"], "options": options}
    backbone = _by_hash(spec["backbone"])
    content = {**spec, "cell": labels, "backbone": backbone, "data": data, "method": method, "version": VERSION}
    content.pop("key", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _by_hash(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name in ("options", "sha256")}
