"""Check a built wheel: its top-level names, and that nothing that should travel is missing or should not is there."""

import sys
import zipfile
from pathlib import Path


def main(wheel: str) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    dist_info = {name for name in top if name.endswith(".dist-info")}
    if top - dist_info != {"symmetrize"} or len(dist_info) != 1:
        raise SystemExit(f"wheel: expected the one top-level package symmetrize, got {sorted(top)}")
    root = Path(__file__).parent.parent
    expected = {f"symmetrize/{p.relative_to(root / 'symmetrize')}" for p in (root / "symmetrize").rglob("*.py")}
    expected |= {
        f"symmetrize/backbones/{p.relative_to(root / 'backbones')}" for p in (root / "backbones").rglob("*.py")
    }
    expected |= {f"symmetrize/{p.relative_to(root)}" for p in (root / "backbones").glob("*/weights/*")}
    expected |= {str(p.relative_to(root)) for p in (root / "symmetrize/demo/data").iterdir()}
    for pattern in ("report/templates/*.html", "report/*.json"):
        expected |= {f"symmetrize/{p.relative_to(root / 'symmetrize')}" for p in (root / "symmetrize").glob(pattern)}
    missing = sorted(expected - set(names))
    if missing:
        raise SystemExit(f"wheel: missing {missing}")
    extra = [name for name in names if name.endswith((".pt", ".ckpt", ".pkl")) or "/tests/" in name]
    if extra:
        raise SystemExit(f"wheel: expected no checkpoints and no tests, got {extra}")
    print(f"wheel: {len(names)} files, top level symmetrize")


if __name__ == "__main__":
    main(sys.argv[1])
