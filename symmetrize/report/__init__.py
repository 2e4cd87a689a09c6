"""Self-contained HTML reports with inline figures."""

from symmetrize.report.demo import render_demo
from symmetrize.report.libraries import require_libraries
from symmetrize.report.tables import Table, number

__all__ = ["Table", "number", "render_demo", "require_libraries"]
