"""Writes ``docs/checks.md`` from the docstrings of the checks: ``python docs/checks.py``."""

from __future__ import annotations

from pathlib import Path

from symmetrize.testing import CLAIMS, all_checks

HEAD = """# What is checked

`symmetrize check`, `check_*` and the pytest plugin run the same checks: one function per property, in
`symmetrize/testing/checks/`. A number is compared with a limit that depends on the precision of the model and on
nothing else (1e4 machine epsilons of the error scale; 1e5 for nearly collinear structures), unless the subject has a
`tolerance`.

**Error scale.** RMS over structures of the output minus its composition baseline (a constant per species, by least
squares): errors of a total energy are compared with how much energies vary, not with its -4209 eV. Forces are compared
with the RMS force.

**Claims.** A check judges a claim of the model. Everything is claimed unless it is taken back; what is not claimed is
measured and recorded, or skipped.

| claim | in words |
|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD + "\n".join(f"| `{name}` | {words} |" for name, words in CLAIMS.items()), ""]
    for check in all_checks().values():
        judged = "recorded, never judged" if check.claim is None and "cannot fail" in check.suspicion else check.claim
        lines += [
            f"## {check.title}",
            "",
            f"`{check.name}`; claim: {judged or 'none, always judged'}",
            "",
            check.meaning,
            "",
        ]
        if "cannot fail" not in check.suspicion:
            lines += [f"*When it fails:* {check.suspicion}", ""]
        elif rest := check.suspicion.partition("cannot fail.")[2].strip():
            lines += [f"*How to read it:* {rest}", ""]
        lines += [f"*Number:* {check.definition}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "checks.md").write_text(page(), encoding="utf-8")
