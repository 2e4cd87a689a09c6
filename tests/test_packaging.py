"""Layout: the import ladder, the lazy facade, the list of packages, the guarded name of the adapters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).parent.parent

# A module may import modules of a lower rung, and of its own.
RUNGS = {
    "errors": 0,
    "files": 0,
    "keys": 0,
    "ops": 0,
    "data": 1,
    "representations": 1,
    "backbone": 1,
    "compilation": 1,
    "frames": 1,
    "weights": 1,
    "wrapping": 1,
    "metatomic": 1,
    "methods": 2,
    "copies": 3,
    "forecast": 3,
    "plan": 3,
    "evaluation": 3,
    "equivalence": 3,
    "weighted_sum": 3,
    "averaging": 3,
    "symmetrizer": 3,
    "registry": 4,
    "storage": 4,
    "testing": 5,
    "calculators": 5,
    "training": 5,
    "report": 5,
    "pytest_plugin": 5,
    "convert": 5,
    "evaluate": 5,
    "export": 5,
    "degree": 5,
    "study": 5,
    "check": 5.5,
    "demo": 5.5,
    "cli": 6,
}


def _imports(path: Path) -> set[str]:
    """First components below ``symmetrize`` that a file imports, type-checking blocks aside."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("symmetrize.")}
    return found


def _core_modules() -> list[Path]:
    return sorted(p for p in (ROOT / "symmetrize").rglob("*.py") if p.name != "__init__.py" or p.parent.name in RUNGS)


def test_imports_only_go_down_the_ladder():
    upward = []
    for path in _core_modules():
        own = path.relative_to(ROOT / "symmetrize").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in _imports(path):
            if name in RUNGS and name != own and RUNGS[name] > RUNGS[own]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_every_core_module_has_a_rung():
    tops = {p.relative_to(ROOT / "symmetrize").parts[0].removesuffix(".py") for p in _core_modules()}
    assert tops - {"__init__"} == set(RUNGS)


def test_the_ladder_test_sees_an_upward_import(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("from symmetrize.symmetrizer import Symmetrizer\nimport symmetrize.cli\n")
    assert _imports(planted) == {"symmetrizer", "cli"}


def test_the_core_never_imports_adapters_statically():
    for path in _core_modules():
        assert "backbones" not in _imports(path), path


def test_adapters_see_the_lowest_rungs_only():
    for path in (ROOT / "backbones").rglob("*.py"):
        above = {name for name in _imports(path) if RUNGS.get(name, 0) > 1}
        assert not above, f"{path} imports {above}"


def test_files_stay_short():
    long = [p for folder in ("symmetrize", "backbones") for p in (ROOT / folder).rglob("*.py") if _lines(p) > 500]
    assert not long


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_importing_the_package_does_not_import_torch():
    code = "import symmetrize, symmetrize.backbones, sys; assert 'torch' not in sys.modules; symmetrize.ECSE; "
    code += "assert 'torch' in sys.modules; import symmetrize as s; assert set(s.__all__) <= set(dir(s))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    import symmetrize

    assert all(getattr(symmetrize, name) is not None for name in symmetrize.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        symmetrize.nothing  # noqa: B018


@pytest.mark.skipif(tomllib is None, reason="reading TOML needs Python 3.11")
def test_package_list_matches_the_tree():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tree = {
        ".".join(("symmetrize", *p.parent.relative_to(ROOT / "symmetrize").parts))
        for p in (ROOT / "symmetrize").rglob("__init__.py")
    } | {
        ".".join(("symmetrize.backbones", *p.parent.relative_to(ROOT / "backbones").parts))
        for p in (ROOT / "backbones").rglob("__init__.py")
    }
    assert listed == tree


def test_adapters_refuse_another_name():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import backbones"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "symmetrize.backbones" in result.stderr


def test_the_harness_needs_no_pytest():
    """pytest is for projects that have tests; the command line and the reports do without."""
    code = "import sys; sys.modules['pytest'] = None; import symmetrize.testing, symmetrize.check"
    subprocess.run([sys.executable, "-c", code], check=True)
