"""Saving and loading a symmetrised model: the same numbers, an old version upgraded, damage named."""

import json

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Anchored, GroupAveraging, Identity, OutputSpec, Symmetrizer, from_points, load, save
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.storage import UPGRADES, VERSION, is_saved_model, read_metadata


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    z = torch.randint(1, 9, (7,), generator=generator)
    return from_points(pos, batch=torch.tensor([0, 0, 0, 0, 1, 1, 1]), z=z)


OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum", unit="eV"),
    "tensor": OutputSpec(cartesian="ij=ji"),
    "mixed": OutputSpec("0o + 2x1e + 2e"),
}
MODELS = {
    "local": lambda: Symmetrizer(ToyLocal(OUTPUTS, n_hops=2, seed=3), ECSE(cutoff_width=0.3), "SO(3)", "atom"),
    "global": lambda: Symmetrizer(ToyGlobal(OUTPUTS, length=1.2), GroupAveraging(2), chunk_size=64),
    "anchored": lambda: Symmetrizer(ToyGlobal(OUTPUTS), Anchored(ECSE(cutoff_width=0.02), n_anchors=5)),
    "bare": lambda: Symmetrizer(ToyLocal(OUTPUTS), Identity()),
    "auxiliary": lambda: Symmetrizer(ToyLocal(OUTPUTS), ECSE(fallback=ToyLocal(OUTPUTS, seed=9)), scope="structure"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # not the weights of the seed
            parameter += 0.01
    save(model, tmp_path / "model", metadata={"trained on": "nothing"})
    assert is_saved_model(tmp_path / "model") and not is_saved_model(tmp_path)
    again = load(tmp_path / "model")
    assert repr(again) == repr(model) and not again.training
    assert read_metadata(tmp_path / "model") == {"trained on": "nothing"}
    expected, got = model(_batch(), forces=True), again(_batch(), forces=True)
    for output in expected:
        assert torch.equal(expected[output], got[output]), output
    fresh = MODELS[name]().eval()(_batch())
    assert not torch.equal(fresh["energy"], got["energy"])


def test_precision_is_kept_per_tensor(tmp_path):
    from symmetrize import load_backbone

    model = Symmetrizer(load_backbone("pet", "ethanol"), ECSE())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save(model, tmp_path)
    again = load(tmp_path)
    assert {n: v.dtype for n, v in again.state_dict().items()} == {n: v.dtype for n, v in model.state_dict().items()}
    assert again.backbone.composition.dtype == torch.float64
    assert load(tmp_path, dtype=torch.float64).backbone.dtype == torch.float64


def test_a_backbone_without_an_adapter_is_passed_in(tmp_path):
    class Mine(ToyLocal):
        adapter = None

    model = Symmetrizer(Mine(OUTPUTS, seed=5), ECSE())
    with pytest.warns(UserWarning, match=r"a Mine, cannot be made again.*load\(folder, backbone=\.\.\.\)"):
        save(model, tmp_path)
    with pytest.raises(DeclarationError, match=r"a Mine, has no adapter.*load\(folder, backbone=\.\.\.\)"):
        load(tmp_path)
    again = load(tmp_path, backbone=Mine(OUTPUTS, seed=0))
    assert torch.equal(again(_batch())["energy"], model(_batch())["energy"])
    with pytest.raises(DeclarationError, match="backbone: expected the outputs"):
        load(tmp_path, backbone=Mine())


def test_a_method_of_somebody_else_is_passed_in(tmp_path):
    class Other(ECSE):
        pass

    model = Symmetrizer(ToyLocal(OUTPUTS), Other())
    with pytest.warns(UserWarning, match=r"the method, a Other.*load\(folder, method=\.\.\.\)"):
        save(model, tmp_path)
    with pytest.raises(DeclarationError, match="its method is not one of this package"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, method=ECSE())(_batch())["energy"], model(_batch())["energy"])


def test_older_versions_are_upgraded_and_newer_ones_refused(tmp_path, monkeypatch):
    model = Symmetrizer(ToyLocal(OUTPUTS), ECSE())
    save(model, tmp_path)
    path = tmp_path / "model.json"
    description = json.loads(path.read_text())
    description["symmetrizer"]["old_name_of_group"] = description["symmetrizer"].pop("group")
    path.write_text(json.dumps(description | {"version": VERSION - 1}))

    with pytest.raises(InvalidInputError, match="can no longer be read"):
        load(tmp_path)

    def upgrade(old, tensors):
        old["symmetrizer"]["group"] = old["symmetrizer"].pop("old_name_of_group")
        return old, tensors

    monkeypatch.setitem(UPGRADES, VERSION - 1, upgrade)
    assert torch.equal(load(tmp_path)(_batch())["energy"], model(_batch())["energy"])
    path.write_text(json.dumps(description | {"version": VERSION + 1}))
    with pytest.raises(InvalidInputError, match=f"version {VERSION} or older, got {VERSION + 1}; a newer"):
        load(tmp_path)


def test_damage_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = Symmetrizer(ToyLocal(OUTPUTS), ECSE())
    with pytest.raises(InvalidInputError, match=r"expected a folder with a file 'model\.json'"):
        load(tmp_path)
    save(model, tmp_path)
    numbers, words = tmp_path / "model.safetensors", tmp_path / "model.json"
    tensors, text = load_file(numbers), words.read_text()
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, numbers)
    with pytest.raises(InvalidInputError, match=f"lacks tensor '{name}'"):
        load(tmp_path)
    save_file(tensors | {"more": torch.zeros(1)}, numbers)
    with pytest.raises(InvalidInputError, match="holds the unexpected tensor 'more'"):
        load(tmp_path)
    save_file(tensors | {name: torch.zeros(1, 2, 3)}, numbers)
    with pytest.raises(InvalidInputError, match="expected shape"):
        load(tmp_path)
    numbers.write_bytes(b"\x80\x04not a safetensors file")
    with pytest.raises(InvalidInputError, match="expected safetensors"):
        load(tmp_path)
    numbers.unlink()
    with pytest.raises(InvalidInputError, match="expected a file"):
        load(tmp_path)
    words.write_text(text.replace('"name": "ECSE"', '"name": "ECES"'))
    save_file(tensors, numbers)
    with pytest.raises(InvalidInputError, match="did you mean 'ECSE'"):
        load(tmp_path)
    words.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "backbone"}))
    with pytest.raises(InvalidInputError, match="lacks the entry 'backbone'"):
        load(tmp_path)
    words.write_text("{")
    with pytest.raises(InvalidInputError, match="expected JSON"):
        load(tmp_path)
    words.write_text('{"format": "something else"}')
    with pytest.raises(InvalidInputError, match="expected the description of a"):
        load(tmp_path)


def test_bad_arguments(tmp_path):
    model = Symmetrizer(ToyLocal(OUTPUTS), ECSE())
    with pytest.raises(InvalidTypeError, match="expected a Symmetrizer"):
        save(ToyLocal(), tmp_path)
    with pytest.raises(InvalidTypeError, match="expected what JSON can hold"):
        save(model, tmp_path, metadata={"a": object()})
    assert not is_saved_model(tmp_path)
    save(model, tmp_path)
    with pytest.raises(InvalidTypeError, match=r"dtype: expected"):
        load(tmp_path, dtype=torch.float16)
    with pytest.raises(InvalidTypeError, match="backbone: expected a Backbone"):
        load(tmp_path, backbone=torch.nn.Linear(3, 3))
