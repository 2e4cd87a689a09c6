"""What every adapter owes: listed without being imported, loaded by name, rebuilt from its description, scriptable."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from adapters import require_adapter
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from symmetrize import Backbone, from_ase, list_backbones, load_backbone
from symmetrize.data import with_neighbors
from symmetrize.errors import DeclarationError, MissingDependencyError
from symmetrize.registry import rebuild_backbone


def _random_dgcnn():
    """A file of weights, since none are included."""
    from safetensors.torch import save_file
    from symmetrize.backbones.pointcloud import DGCNN

    path = Path(tempfile.mkdtemp()) / "dgcnn.safetensors"
    save_file(DGCNN().state_dict(), path)
    return (path,)


def _random_transformer():
    """Likewise."""
    from symmetrize.backbones.pyg import molecular_transformer

    path = Path(tempfile.mkdtemp()) / "transformer"
    molecular_transformer(atomic_types=[1, 6, 7, 8], width=8, n_layers=2, seed=0).save(path)
    return (path,)


#: Arguments of the loaders that need some.
ARGUMENTS = {"ase": lambda: (EMT(),), "dgcnn": _random_dgcnn, "molecular-transformer": _random_transformer}
#: Those that have a test file of their own for loading, since a file has to be made first.
FROM_FILES = {"metatomic"}
NAMES = sorted(list_backbones())


def _loaded(name):
    require_adapter(name)
    if name in FROM_FILES:
        pytest.skip("loaded from a file: see its own tests")
    return load_backbone(name, *ARGUMENTS.get(name, tuple)()).eval()


def test_listing_imports_none_of_them():
    code = (
        "import sys\nfrom symmetrize.registry import list_backbones\nfound = list_backbones()\n"
        "assert len(found) >= 5\n"
        "loaded = {m for m in sys.modules if m.startswith('symmetrize.backbones.')}\n"
        "loaded |= {'torch', 'ase'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_complete(name):
    entry = list_backbones()[name]
    assert entry.description and entry.license and entry.maintainer
    assert entry.status in ("stable", "experimental")


@pytest.mark.parametrize("name", NAMES)
def test_library_is_there_or_named(name, monkeypatch):
    if name not in FROM_FILES:
        assert isinstance(_loaded(name), Backbone)
    entry = list_backbones()[name]
    if entry.requires:
        monkeypatch.setattr("symmetrize.registry._is_installed", lambda distribution: False)
        with pytest.raises(MissingDependencyError, match=f"pip install {entry.requires[0]}"):
            load_backbone(name)


def test_a_missing_library_fails_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr("symmetrize.registry._is_installed", lambda distribution: False)
    name = next(n for n, entry in list_backbones().items() if entry.requires)
    monkeypatch.setenv("REQUIRE_ADAPTERS", "")
    with pytest.raises(pytest.skip.Exception, match="pip install"):
        require_adapter(name)
    for asked in ("all", f"something,{name}"):
        monkeypatch.setenv("REQUIRE_ADAPTERS", asked)
        with pytest.raises(pytest.fail.Exception, match="pip install"):
            require_adapter(name)


@pytest.mark.parametrize("name", NAMES)
def test_description_makes_the_same_backbone(name):
    backbone = _loaded(name)
    if not list_backbones()[name].rebuild:
        with pytest.raises(DeclarationError, match=r"backbone="):
            backbone.describe()
        return
    assert backbone.adapter == name
    description = json.loads(json.dumps(backbone.describe()))
    again = rebuild_backbone(name, description)
    assert type(again) is type(backbone) and again.outputs == backbone.outputs
    assert (again.cutoff, again.receptive_field, again.species) == (
        backbone.cutoff,
        backbone.receptive_field,
        backbone.species,
    )
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in backbone.state_dict().items()}


STRUCTURES = {
    "molecules": lambda: [molecule("CH3CH2OH"), molecule("H2O")],
    "crystal": lambda: [bulk("C", cubic=True).repeat((1, 1, 1))],
}


@pytest.mark.parametrize("structures", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_scripted_form_computes_the_same(name, structures):
    backbone = _loaded(name).double()
    try:
        scripted = torch.jit.script(backbone.scriptable())
    except DeclarationError:
        pytest.skip("has no scriptable form, and says so")
    atoms = STRUCTURES[structures]()
    for one in atoms:
        one.rattle(0.05, seed=1)
    batch = from_ase(atoms, dtype=torch.float64)
    n = batch.pos.shape[0]
    if backbone.cutoff is not None:
        batch = with_neighbors(batch, backbone.cutoff)
    batch.center_mask = torch.arange(n) % 3 != 1
    edges = getattr(batch, "edge_index", None)
    none = torch.zeros(0, dtype=torch.int64)
    got = scripted(
        batch.pos,
        batch.z,
        batch.batch,
        len(atoms),
        torch.stack([none, none]) if edges is None else edges,
        none.reshape(0, 3) if edges is None else batch.cell_shift,
        torch.zeros(0, 3, dtype=torch.float64) if edges is None else batch.edge_vec,
        batch.center_mask,
    )
    with torch.no_grad():
        expected = backbone(batch)
    assert set(got) == set(expected)
    for output, value in expected.items():
        assert value.abs().max() > 0
        assert torch.allclose(got[output].detach(), value, rtol=1e-12, atol=1e-12 * float(value.abs().max())), output
    baseline = scripted.baseline(batch.z)
    for output, value in backbone.baseline(batch).items():
        assert torch.equal(baseline[output][batch.center_mask], value)
