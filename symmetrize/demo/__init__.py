"""The main job, on real data: trained networks measured bare and symmetrised, with a report."""

from symmetrize.demo.results import SCHEMA, SCHEMA_VERSION, DemoResult
from symmetrize.demo.run import run_demo
from symmetrize.demo.subjects import Subject

__all__ = ["SCHEMA", "SCHEMA_VERSION", "DemoResult", "Subject", "run_demo"]
