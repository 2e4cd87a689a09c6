"""The template for adapters, copied into a package of its own, registered, checked, saved and scripted."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
import torch
from symmetrize.backbones.template import Template

from symmetrize import ECSE, Identity, Symmetrizer, list_backbones, load_backbone
from symmetrize.errors import DeclarationError, UnknownSpeciesError
from symmetrize.registry import ENTRY_POINT_GROUP, rebuild_backbone
from symmetrize.testing import check_backbone, measure_equivariance, tolerance, within
from symmetrize.wrapping.probes import probe_backbone
from symmetrize.wrapping.trials import synthetic_batch, with_edges

SOURCE = Path(sys.modules["symmetrize.backbones.template"].__file__)
NAME = "my_copied_adapter"


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The copy, importable and with an entry point, as if it were installed."""
    package = tmp_path / NAME
    package.mkdir()
    shutil.copy(SOURCE, package / "__init__.py")
    info = tmp_path / f"{NAME}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\ntemplate = {NAME}:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield NAME
    sys.modules.pop(NAME, None)


def test_a_copy_is_found_by_name_without_being_imported(registered):
    entry = list_backbones()["template"]
    assert registered in entry.description and entry.status == "third party" and registered not in sys.modules
    backbone = load_backbone("template", seed=3, width=8)
    assert type(backbone).__module__ == registered and backbone.width == 8


def test_without_registration_it_is_not_there():
    with pytest.raises(DeclarationError, match="unknown backbone 'template'"):
        load_backbone("template")


def test_a_copy_keeps_all_promises_and_is_symmetrized(registered):
    backbone = load_backbone("template")
    probe_backbone(backbone, synthetic_batch(backbone))
    # Turning a structure finely is by far the longest check, and of interest for frames.
    report = check_backbone(backbone, profile="quick", skip=("rotation_smoothness",))
    assert report.ok, str(report)
    batch = synthetic_batch(backbone)
    model = Symmetrizer(backbone, ECSE())
    assert model.scope == "atom"
    assert within(measure_equivariance(model, batch, backbone.outputs).relative, tolerance(torch.float64))
    bare = measure_equivariance(Symmetrizer(backbone, Identity()), batch, backbone.outputs)
    assert bare.relative > 1e-2


def test_a_broken_copy_is_found(registered):
    path = Path(importlib.import_module(registered).__file__)
    text = path.read_text()
    broken = text.replace("(fade**3)[:, None] * ", "")
    assert broken != text
    path.write_text(broken)
    sys.modules.pop(registered)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    report = check_backbone(load_backbone("template"), profile="quick", only=("smoothness",))
    assert not report.ok and report.failed_checks() == {"smoothness"}


def test_it_is_rebuilt_from_its_description(registered):
    backbone = load_backbone("template", species=(1, 8), cutoff=3.0)
    other = rebuild_backbone("template", backbone.describe()).double()
    batch = with_edges(backbone, synthetic_batch(backbone))
    assert not torch.equal(other(batch)["energy"], backbone(batch)["energy"])
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(batch)["energy"], backbone(batch)["energy"])


def test_its_scripted_form_gives_the_same():
    backbone = Template().double()
    batch = with_edges(backbone, synthetic_batch(backbone))
    scripted = torch.jit.script(backbone.scriptable())
    center = torch.arange(len(batch.pos)) % 2 == 0
    got = scripted(batch.pos, batch.z, batch.batch, 3, batch.edge_index, batch.cell_shift, batch.edge_vec, center)
    assert torch.allclose(got["energy"], backbone(batch)["energy"][center], rtol=1e-13)
    assert scripted.baseline(batch.z) == {}


def test_bad_input_is_refused():
    with pytest.raises(DeclarationError, match="species: expected atomic numbers"):
        Template(species=(0,))
    backbone = Template(species=(1, 6)).double()
    batch = with_edges(backbone, synthetic_batch(Template().double()))
    with pytest.raises(UnknownSpeciesError, match=r"z: expected species among \(1, 6\), got [78]"):
        backbone(batch)
