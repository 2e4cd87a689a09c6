"""Studies: YAML files turned into validated, frozen dataclasses."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from symmetrize.errors import DeclarationError, SymmetrizeError, did_you_mean
from symmetrize.methods import make_method

#: Value of `DataEntry.energy` and ``forces``: under the usual name, where the file has it.
AUTO = "auto"
#: What a ``train`` section's own section ``data`` may hold; everything else comes from the data set.
_SPLIT = ("set", "train", "validation")


class StudyError(DeclarationError):
    """A study is incomplete or contradictory, or holds an unknown entry; the message names the place."""


@dataclass(frozen=True)
class DataEntry:
    """Structures with reference values.

    Attributes
    ----------
    path : str
        File that ASE reads, relative to the folder of data (where one is given) or of the configuration; or
        ``"bundled:ethanol"``, held-out structures that come with the package.
    source, license : str
        Where the file can be had, and on which terms.
    sha256 : str
        First digits of the hash that the file has to have; empty: any.
    test : int
        Structures that are evaluated, drawn without replacement; 0: all, in the order of the file.
    held_out : int, optional
        Structures that are kept from training, those that are evaluated among them; by default ``test``.
    split_seed : int
        Of the permutation that `symmetrize.training` splits by: held-out structures come first.
    energy, forces : str, optional
        Names of reference values (eV, eV/angstrom). "auto": ``energy`` and ``forces`` where the file has them; null:
        none.
    properties : dict of str to str
        Names of further reference values, by the output of the backbone that they are compared with, in its unit.
    """

    path: str
    source: str = ""
    license: str = ""
    sha256: str = ""
    test: int = 0
    held_out: int | None = None
    split_seed: int = 0
    energy: str | None = AUTO
    forces: str | None = AUTO
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BackboneEntry:
    """What is symmetrised: a backbone by name, or a recipe to train one first.

    Attributes
    ----------
    name : str, optional
        ``"adapter"``, ``"adapter:argument"``, or the folder of a saved model; paths are relative to the configuration.
    options : dict
        Further arguments of the adapter's loader.
    train : dict, optional
        Instead of a name: a recipe as for ``symmetrize train``, without ``seed`` (that of the study) and with
        ``data: {set: NAME, train: N, validation: N}``, NAME being a data set of the study.
    data : list of str, optional
        Data sets that it is evaluated on; by default all. None (``[]``) for one that only methods refer to.
    scope : str, optional
        "atom" or "structure" for all methods that do not say otherwise; by default as `symmetrize.Symmetrizer` decides.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None
    data: list[str] | None = None
    scope: Literal["atom", "structure"] | None = None


@dataclass(frozen=True)
class MethodEntry:
    """A symmetrisation method.

    Attributes
    ----------
    name : str
        As `symmetrize.methods.make_method` knows it.
    options : dict
        Of its constructor: in the configuration these stand beside the name. ``{backbone: "pet:ethanol"}`` stands for
        a backbone, such as an auxiliary one, and ``{backbone: LABEL}`` for one of the study.
    group : str, optional
        By default "O(3)" where the method averages over it, else "SO(3)".
    scope : str, optional
        By default that of the backbone's entry.
    curve : str, optional
        Methods of one curve are joined in plots against the cost.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    group: Literal["O(3)", "SO(3)"] | None = None
    scope: Literal["atom", "structure"] | None = None
    curve: str | None = None


@dataclass(frozen=True)
class SkipEntry:
    """Combinations that make no sense: of one label or several; what is not named may be anything."""

    reason: str
    backbone: list[str] | None = None
    method: list[str] | None = None
    data: list[str] | None = None


@dataclass(frozen=True)
class Study:
    """Backbones x methods x data sets x seeds, and what is measured of each combination.

    Attributes
    ----------
    name : str
    data, backbones, methods : dict
        Entries by label.
    measures : list of str
        Names in `symmetrize.study.measures.MEASURES`, in their order there; by default all.
    sizes : dict
        Of the measures; each has a default.
    seeds : list of int
    dtype : {"float64", "float32"}
        Precision of the evaluation.
    skip : list of SkipEntry
    profile : str, optional
        The profile that was chosen.
    folder : Path
        That relative paths start from.
    """

    name: str
    data: dict[str, DataEntry]
    backbones: dict[str, BackboneEntry]
    methods: dict[str, MethodEntry]
    measures: list[str] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    dtype: Literal["float64", "float32"] = "float64"
    skip: list[SkipEntry] = field(default_factory=list)
    profile: str | None = None
    folder: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, without the folder."""
        content = dataclasses.asdict(self)
        del content["folder"]
        return content


def load_study(source: str | Path | Mapping[str, Any], profile: str | None = None) -> Study:
    """Study from a YAML file or a nested mapping.

    Parameters
    ----------
    source : path or mapping
    profile : str, optional
        An entry of ``profiles``, whose values replace those of the study, section by section; null removes an entry.

    Raises
    ------
    StudyError
        No such file, no valid YAML, unknown, missing or unusable entries; the message holds the dotted name.
    """
    folder = Path()
    if isinstance(source, Mapping):
        content: Any = source
    else:
        folder = Path(source).resolve().parent
        content = _read_yaml(Path(source))
    if not isinstance(content, Mapping):
        raise StudyError(f"study: expected sections such as 'data' and 'methods', got {type(content).__name__}")
    values = dict(content)
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, Mapping):
        raise StudyError(f"profiles: expected a section, got {profiles!r}")
    if profile is not None and profile not in profiles:
        raise StudyError(f"profiles: unknown profile {profile!r}, {did_you_mean(profile, map(str, profiles))}")
    for name, overrides in profiles.items():
        if not isinstance(overrides, Mapping):
            raise StudyError(f"profiles.{name}: expected a section, got {overrides!r}")
        if name != profile:  # as strict about the profiles that are not chosen
            _checked(_merged(values, overrides), folder, f"profiles.{name}: ", values)
    if profile is None:
        return _checked(values, folder)
    merged = _merged(values, profiles[profile])
    return dataclasses.replace(_checked(merged, folder, f"profiles.{profile}: ", values), profile=profile)


def _checked(values: Mapping[str, Any], folder: Path, prefix: str = "", base: Mapping[str, Any] | None = None) -> Study:
    try:
        study = dataclasses.replace(_build_study(values), folder=folder)
        _check(study)
    except StudyError as error:
        if prefix and base is not None and _is_error(base, folder, str(error)):
            raise
        raise StudyError(f"{prefix}{error}") from error
    return study


def _is_error(values: Mapping[str, Any], folder: Path, message: str) -> bool:
    """Whether a study itself has an error, and not what a profile makes of it."""
    try:
        _checked(values, folder)
    except StudyError as error:
        return str(error) == message
    return False


class _Loader:
    """YAML 1.2 where YAML 1.1 surprises: 1e-3 is a number, and a name that is given twice is an error."""

    def __init__(self) -> None:
        import yaml

        class Loader(yaml.SafeLoader):
            pass

        def mapping(loader: Any, node: Any) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise StudyError(f"{key.value}: expected one entry of this name, got another one in line {line}")
                seen.add(key.value)
            loader.flatten_mapping(node)
            return loader.construct_mapping(node, deep=True)

        Loader.add_constructor("tag:yaml.org,2002:map", mapping)
        Loader.add_implicit_resolver(
            "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
        )
        self.load = lambda text: yaml.load(text, Loader=Loader)


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise StudyError(f"study: expected a YAML file, there is none at {path}")
    try:
        return _Loader().load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"study: {path} is no valid YAML: {error}") from error


def _merged(values: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(values) if isinstance(values, Mapping) else {}
    for name, value in overrides.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, Mapping):
            out[name] = _merged(out.get(name), value)
        else:
            out[name] = value
    return out


# --- from mappings to dataclasses ------------------------------------------------------------------------------------


def _build_study(values: Mapping[str, Any]) -> Study:
    raw = dict(values)
    # Options of a method stand beside its name.
    methods = raw.get("methods")
    if isinstance(methods, Mapping):
        raw["methods"] = {label: _method(entry, f"methods.{label}") for label, entry in methods.items()}
    raw.pop("profile", None)
    fields = {item.name for item in dataclasses.fields(Study)} - {"folder", "profile"}
    for name in raw:
        if name not in fields:
            raise StudyError(f"{name}: unknown entry, {did_you_mean(str(name), {*fields, 'profiles'})}")
    return typing.cast(Study, _build(Study, raw, ""))


def _method(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping):
        raise StudyError(f"{where}: expected a section such as {{name: ECSE}}, got {entry!r}")
    own = {"name", "group", "scope", "curve"}
    for name in entry:
        if not isinstance(name, str):
            raise StudyError(f"{where}.{name}: expected the name of an option, got {name!r}")
    return {
        **{name: value for name, value in entry.items() if name in own},
        "options": {name: value for name, value in entry.items() if name not in own},
    }


def _build(cls: type, values: Any, where: str) -> Any:
    """Dataclass from a mapping, checking the name and the type of every entry."""
    if not isinstance(values, Mapping):
        raise StudyError(f"{where}: expected a section, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise StudyError(f"{prefix}{name}: unknown entry, {did_you_mean(str(name), fields)}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise StudyError(f"{prefix}{name}: expected an entry, got none")
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise StudyError(f"{where}: unknown value {value!r}, {did_you_mean(str(value), arguments)}")
        return value
    if type(None) in arguments:
        (inner,) = (choice for choice in arguments if choice is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is list:
        if isinstance(value, str) and arguments[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise StudyError(f"{where}: expected a list, got {value!r}")
        return [_convert(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise StudyError(f"{where}: expected a section, got {value!r}")
        inner = arguments[1]
        for name in value:
            if not isinstance(name, str):
                raise StudyError(f"{where}.{name}: expected a name, got {name!r}; put it into quotes")
        return {k: v if inner is Any else _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise StudyError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


# --- what the entries mean -------------------------------------------------------------------------------------------


def _check(study: Study) -> None:
    from symmetrize.study.measures import MEASURES
    from symmetrize.study.measures.sizes import SIZES

    if not study.name or "/" in study.name or study.name.startswith("."):
        raise StudyError(f"name: expected a name that a folder can have, got {study.name!r}")
    for section in ("data", "backbones", "methods"):
        if not getattr(study, section):
            raise StudyError(f"{section}: expected at least one entry, got none")
    for n, measure in enumerate(study.measures):
        if measure not in MEASURES:
            raise StudyError(f"measures[{n}]: unknown measure {measure!r}, {did_you_mean(measure, MEASURES)}")
    for name in study.sizes:
        if name not in SIZES:
            raise StudyError(f"sizes.{name}: unknown size, {did_you_mean(name, SIZES)}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        raise StudyError(f"seeds: expected different numbers from 0 on, got {study.seeds}")
    for label, data in study.data.items():
        _check_data(label, data)
    for label, backbone in study.backbones.items():
        _check_backbone(study, label, backbone)
    for label, method in study.methods.items():
        check_method(method, f"methods.{label}")
    _check_used(study)
    for n, skip in enumerate(study.skip):
        if skip.backbone is skip.method is skip.data is None:
            raise StudyError(f"skip[{n}]: expected a backbone, a method or a data set, got a reason only")
        if not skip.reason.strip():
            raise StudyError(f"skip[{n}].reason: expected a reason, got none")
        for kind, known in (("backbone", study.backbones), ("method", study.methods), ("data", study.data)):
            for value in getattr(skip, kind) or ():
                if value not in known:
                    raise StudyError(f"skip[{n}].{kind}: unknown {value!r}, {did_you_mean(value, known)}")


def _check_data(label: str, data: DataEntry) -> None:
    for name in ("test", "held_out", "split_seed"):
        value = getattr(data, name)
        if value is not None and value < 0:
            raise StudyError(f"data.{label}.{name}: expected zero or a positive number, got {value}")
    if data.held_out is not None and data.held_out < data.test:
        raise StudyError(
            f"data.{label}.held_out: expected at least the {data.test} structures that are evaluated, "
            f"got {data.held_out}"
        )
    for output, key in data.properties.items():
        if not isinstance(key, str):
            raise StudyError(f"data.{label}.properties.{output}: expected the name of a reference value, got {key!r}")


def _check_backbone(study: Study, label: str, backbone: BackboneEntry) -> None:
    where = f"backbones.{label}"
    if (backbone.name is None) == (backbone.train is None):
        raise StudyError(f"{where}: expected either a name or a section train, got {_both(backbone)}")
    for n, name in enumerate(backbone.data or ()):
        if name not in study.data:
            raise StudyError(f"{where}.data[{n}]: unknown data set {name!r}, {did_you_mean(name, study.data)}")
    if backbone.train is None:
        return
    if backbone.options:
        raise StudyError(f"{where}.options: expected none, since it is trained; see train.backbone.hyperparameters")
    split = backbone.train.get("data")
    if not isinstance(split, Mapping):
        raise StudyError(f"{where}.train.data: expected {{set: NAME, train: N, validation: N}}, got {split!r}")
    for name in split:
        if name not in _SPLIT:
            raise StudyError(f"{where}.train.data.{name}: unknown entry, {did_you_mean(str(name), _SPLIT)}")
    if "set" not in split:
        raise StudyError(f"{where}.train.data.set: expected an entry, got none")
    if split["set"] not in study.data:
        raise StudyError(
            f"{where}.train.data.set: unknown data set {split['set']!r}, {did_you_mean(str(split['set']), study.data)}"
        )
    if "seed" in backbone.train:
        raise StudyError(f"{where}.train.seed: expected none, since every seed of the study trains one")
    from symmetrize.study.backbones import training_recipe

    training_recipe(study, label, study.seeds[0])


def _check_used(study: Study) -> None:
    """Every backbone is evaluated, or part of a method."""
    used: set[str] = set()
    for label, method in study.methods.items():
        for option, value in method.options.items():
            if is_backbone(value) and value["backbone"] in study.backbones:
                used.add(value["backbone"])
                more = sorted(set(value) - {"backbone"})
                if more:
                    raise StudyError(
                        f"methods.{label}.{option}.{more[0]}: expected none, since {value['backbone']!r} is a backbone "
                        "of the study with options of its own"
                    )
    for label, backbone in study.backbones.items():
        if backbone.data == [] and label not in used:
            raise StudyError(
                f"backbones.{label}.data: expected at least one data set, or a method with {{backbone: {label}}}, "
                "got neither"
            )


def _both(backbone: BackboneEntry) -> str:
    return "none" if backbone.name is None else "both"


def check_method(method: MethodEntry, where: str) -> None:
    """Refuse names, options and groups that do not exist.

    Raises
    ------
    StudyError
        Naming the place.
    """
    # An auxiliary backbone may take long to load: names and options are checked without it.
    plain = {name: value for name, value in method.options.items() if not is_backbone(value)}
    try:
        made = make_method(method.name, **plain)
    except SymmetrizeError as error:
        message = str(error)
        for option in method.options:
            if f"unknown option {option!r}" in message:
                raise StudyError(f"{where}.{option}: {message}") from error
        if "unknown method" in message:
            where = f"{where}.name"
        raise StudyError(f"{where}: {message}") from error
    except TypeError as error:
        raise StudyError(f"{where}: {method.name}: {error}") from error
    if method.group is not None and method.group not in made.groups:
        expected = " or ".join(made.groups)
        raise StudyError(f"{where}.group: {method.name} averages over {expected}, got {method.group!r}")
    if method.scope is not None and method.scope not in made.scopes:
        expected = " or ".join(map(repr, made.scopes))
        raise StudyError(f"{where}.scope: {method.name} works in scope {expected}, got {method.scope!r}")


def is_backbone(value: Any) -> bool:
    """Whether an option of a method stands for a backbone."""
    return isinstance(value, Mapping) and isinstance(value.get("backbone"), str)
