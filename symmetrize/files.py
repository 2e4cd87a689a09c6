"""Writing files at once or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], *suffixes: str) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes it when the block ends without an error.

    No half of a file is ever found under the final name. With ``suffixes`` both names are stems, and so it goes for the
    file of each suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        inner = Path(folder) / path.name
        yield inner
        for suffix in suffixes or ("",):
            os.replace(f"{inner}{suffix}", f"{path}{suffix}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
