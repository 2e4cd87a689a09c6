"""Comparative studies: backbones x methods x data sets x seeds, measured, written down, resumable.

One combination is a cell. Results are a file ``results.jsonl`` with one JSON object per finished cell:

``schema``, ``version``
    "torch-symmetrize-study", 1.
``key``
    16 digits of the SHA-256 of everything that determines the cell: weights or recipe of its backbone, method, data
    (hash of the file, structures, references), sizes, measures, seed, dtype.
``cell``
    Labels: ``backbone``, ``method``, ``data``, ``seed``, ``curve``.
``status``
    "ok"; "refused": the method says itself that it cannot do this, which is a finding; "failed": anything else.
``error``
    None, or ``type``, ``message``, ``traceback``.
``measures``
    By name what it returned, with its ``seconds``; or ``error``, where ``refused`` says whether a structure of the
    measure was refused.
``environment``
    Versions, threads, machine, date.
``seconds``
    Wall time.

Numbers that are not finite are the strings "inf", "-inf" and "nan". Of several records of one key the last one counts.
"""

from symmetrize.study.config import (
    BackboneEntry,
    DataEntry,
    MethodEntry,
    SkipEntry,
    Study,
    StudyError,
    load_study,
)
from symmetrize.study.prepared import PreparedCell
from symmetrize.study.results import StudyRun, read_run
from symmetrize.study.run import run_study

__all__ = [
    "BackboneEntry",
    "DataEntry",
    "MethodEntry",
    "PreparedCell",
    "SkipEntry",
    "Study",
    "StudyError",
    "StudyRun",
    "load_study",
    "read_run",
    "run_study",
]
