"""Checkpoints of metatrain's PET converted: the same function as metatrain's own, from files that it wrote itself."""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from symmetrize.backbones.pet import load
from symmetrize.backbones.pet.convert import convert
from symmetrize.backbones.pet.translation import from_metatrain

from symmetrize.data import from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, MissingDependencyError
from symmetrize.metatomic import compilable, import_metatomic, import_metatrain

SPECIES = (1, 6, 8)
SMALL = dict(cutoff=3.0, cutoff_width=1.0, d_pet=8, d_node=12, d_head=6, d_feedforward=10, num_heads=2)
SMALL |= dict(num_attention_layers=1, num_gnn_layers=1, featurizer_type="residual")
PAPER = dict(normalization="LayerNorm", activation="SiLU", transformer_type="PostLN", cutoff_function="Cosine")
ENERGY = {"energy": dict(quantity="energy", unit="eV", type="scalar", sample_kind="system", num_subtargets=1)}
FORCES = {
    "non_conservative_forces": dict(
        quantity="", unit="eV/A", type={"cartesian": {"rank": 1}}, sample_kind="atom", num_subtargets=1
    )
}
STRESS = {
    "non_conservative_stress": dict(
        quantity="", unit="eV/A^3", type={"cartesian": {"rank": 2}}, sample_kind="system", num_subtargets=1
    )
}

pytestmark = [
    # torch announces the end of TorchScript, which metatensor is written in
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def mt():
    """What is used of metatrain, metatomic and metatensor."""
    try:
        pet = import_metatrain("metatrain.pet").PET
    except MissingDependencyError as error:
        if {"metatrain", "all"} & set(os.environ.get("REQUIRE_ADAPTERS", "").split(",")):
            pytest.fail(str(error))
        pytest.skip(str(error))
    with compilable():
        import metatensor.torch as mts
    return SimpleNamespace(
        PET=pet,
        mts=mts,
        metatomic=import_metatomic(),
        data=import_metatrain("metatrain.utils.data"),
        info=import_metatrain("metatrain.utils.data.target_info"),
        defaults=import_metatrain("metatrain.utils.architectures").get_default_hypers("pet")["model"],
        lists=import_metatrain("metatrain.utils.neighbor_lists"),
    )


def make(mt, targets=ENERGY, *, species=SPECIES, seed=0, length_unit="angstrom", **hypers):
    """A PET of metatrain with random parameters, composition and scale, in double precision."""
    infos = {name: mt.info.get_generic_target_info(name, target) for name, target in targets.items()}
    info = mt.data.DatasetInfo(length_unit=length_unit, atomic_types=list(species), targets=infos)
    torch.manual_seed(seed)
    model = mt.PET(copy.deepcopy(mt.defaults) | SMALL | hypers, info)
    generator = torch.Generator().manual_seed(seed)

    def random(values, offset):
        return offset + torch.randn(values.shape, dtype=torch.float64, generator=generator)

    def randomized(buffer, offset):
        old = mt.mts.load_buffer(buffer)
        blocks = [
            mt.mts.TensorBlock(
                values=random(b.values, offset), samples=b.samples, components=b.components, properties=b.properties
            )
            for b in old.blocks()
        ]
        return mt.mts.save_buffer(mt.mts.TensorMap(old.keys, blocks))

    with torch.no_grad():
        for p in model.backend.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
        for name in targets:
            scaler = model.scaler
            setattr(scaler, f"{name}_scaler_buffer", randomized(getattr(scaler, f"{name}_scaler_buffer"), 2.0))
            composition = model.additive_models[0]
            if f"{name}_composition_buffer" in dict(composition.named_buffers()):
                buffer = randomized(getattr(composition, f"{name}_composition_buffer"), -10.0)
                setattr(composition, f"{name}_composition_buffer", buffer)
    model.additive_models[0].sync_tensor_maps()
    model.scaler.sync_tensor_maps()
    return model.eval()


def save(model, path, dtype=torch.float64, **changes):
    checkpoint = copy.deepcopy(model).to(dtype).get_checkpoint()
    torch.save({**checkpoint, "trainer_ckpt_version": 15, "epoch": 7, "best_epoch": 5, **changes}, path)
    return path


def structures():
    """Molecules, an isolated atom, small crystals whose atoms neighbor their own images, rattled."""
    from ase import Atoms
    from ase.build import bulk, molecule

    items = [molecule("CH3CH2OH"), molecule("H2O"), Atoms("O"), Atoms("CO", [[0, 0, 0], [1.1, 0.1, 0]])]
    carbon = bulk("C", "diamond", 3.2)
    salt = bulk("CO", "rocksalt", 3.9)
    big = bulk("CO", "rocksalt", 4.1) * (2, 1, 1)
    for n, crystal in enumerate((carbon, salt, big)):
        crystal.rattle(0.08, seed=n)
        items.append(crystal)
    return items


def systems_of(mt, model, items, dtype, **data):
    out = []
    for n, atoms in enumerate(items):
        system = mt.metatomic.systems_to_torch(atoms, dtype=dtype)
        system = mt.metatomic.System(system.types, system.positions.requires_grad_(), system.cell, system.pbc)
        for name, values in data.items():
            block = mt.mts.TensorBlock(
                values=torch.tensor([[values[n]]], dtype=dtype),
                samples=mt.mts.Labels(["system"], torch.tensor([[0]])),
                components=[],
                properties=mt.mts.Labels([name], torch.tensor([[0]])),
            )
            system.add_data(name, mt.mts.TensorMap(mt.mts.Labels.single(), [block]))
        out.append(mt.lists.get_system_with_neighbor_lists(system, model.requested_neighbor_lists()))
    return out


def metatrain_outputs(mt, model, items, dtype, kind="atom", zero_composition=False, **data):
    """Outputs (values of the blocks by target) and forces, by metatrain's own interface."""
    model = copy.deepcopy(model).to(dtype).eval()
    if zero_composition:  # in single precision it would round the rest away
        for name, weights in model.additive_models[0].model.weights.items():
            model.additive_models[0].model.weights[name] = mt.mts.zeros_like(weights)
    systems = systems_of(mt, _WithLists(model), items, dtype, **data)
    wanted = {name: mt.metatomic.ModelOutput(sample_kind=kind) for name in model.target_names}
    with compilable():
        out = model(systems, wanted)
    values = {name: [block.values for block in out[name].blocks()] for name in wanted}
    energies = [v[0] for name, v in values.items() if name.partition("/")[0] in ("energy", "mtt::U0")]
    forces = None
    if energies:
        gradients = torch.autograd.grad(
            energies[0].sum(), [s.positions for s in systems], allow_unused=True, materialize_grads=True
        )
        forces = -torch.cat(gradients)
    return values, forces


class _WithLists:
    """All neighbor lists of a model and of what it adds (metatrain's own exporter collects them likewise)."""

    def __init__(self, model):
        self.lists = list(model.requested_neighbor_lists())
        for additive in list(model.additive_models)[1:]:
            self.lists += additive.requested_neighbor_lists()

    def requested_neighbor_lists(self):
        return self.lists


def our_outputs(model, items, **fields):
    batch = from_ase(items, cutoff=model.cutoff, dtype=model.dtype)
    batch["pos"] = batch.pos.clone().requires_grad_()
    del batch["edge_vec"]
    for name, value in fields.items():
        batch[name] = value
    out = model(batch)
    forces = None
    if "energy" in out:
        forces = -torch.autograd.grad(out["energy"].sum(), batch.pos, retain_graph=True)[0]
    return out, forces, model.baseline(batch)


def rms_error(ours, theirs):
    """RMS difference over the RMS of the reference."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def error(ours, theirs):
    """Largest difference over the RMS of the reference."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape and bool(torch.isfinite(ours).all()) and float(theirs.abs().max()) > 0
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


CASES = {
    "plain": {},
    "paper": PAPER,
    "two blocks": dict(num_gnn_layers=2, d_node=8),
    "feedforward": dict(featurizer_type="feedforward", num_gnn_layers=2, num_attention_layers=2),
    "solver": dict(num_neighbors_adaptive=4, cutoff=4.0),
    "solver, two blocks": dict(num_neighbors_adaptive=3, num_gnn_layers=2, cutoff_width_adaptive=0.7),
    "solver, feedforward": dict(num_neighbors_adaptive=5, featurizer_type="feedforward", cutoff=4.0),
    "grid": dict(num_neighbors_adaptive=4, adaptive_cutoff_method="grid", cutoff=4.0),
    "grid, cosine": dict(num_neighbors_adaptive=4, adaptive_cutoff_method="grid", **PAPER),
    "repulsion": dict(zbl=True),
}


@pytest.mark.parametrize("case", CASES)
def test_same_function_as_metatrain(mt, case, tmp_path):
    """Energies without composition, forces and direct outputs, in both precisions."""
    original = make(mt, ENERGY | FORCES | STRESS, **CASES[case])
    items = structures()
    for dtype in (torch.float64, torch.float32):
        path = save(original, tmp_path / "model.ckpt", dtype)
        model = convert(path, tmp_path / "converted", trust_pickle=True)
        assert model.dtype == dtype and not model.training
        values, expected = metatrain_outputs(mt, original, items, dtype, zero_composition=dtype == torch.float32)
        for ours in (model, load(tmp_path / "converted")):
            out, forces, baseline = our_outputs(ours, items)
            energy = values["energy"][0][:, 0].double()
            if dtype == torch.float64:
                energy = energy - baseline["energy"]
            for found, reference in (
                (out["energy"], energy),
                (forces, expected),
                (out["non_conservative_forces"], values["non_conservative_forces"][0][..., 0]),
                (out["non_conservative_stress"], values["non_conservative_stress"][0][..., 0]),
            ):
                if dtype == torch.float64:
                    assert error(found, reference) < 1e-9
                else:  # metatrain's own single precision is no better where cutoffs are adaptive
                    assert rms_error(found, reference) < 1e-5 and error(found, reference) < 1e-4
    assert list(baseline) == ["energy"] and float(baseline["energy"].abs().min()) > 1.0
    spec = model.outputs["non_conservative_stress"]
    assert (spec.cartesian, spec.reduce, spec.unit) == ("ij=ji", "sum", "eV/A^3")
    finite = out["non_conservative_stress"][:9]  # ethanol
    assert float(finite.detach().abs().max()) == 0.0  # no cell, no volume


def test_repulsion_beyond_the_cutoff(mt):
    """Large atoms repel each other further away than the network looks."""
    from ase.build import bulk

    original = make(mt, ENERGY, species=(8, 55), zbl=True, cutoff=2.5).double()
    model, items = from_metatrain(original), []
    for n, a in enumerate((5.2, 5.7)):
        items.append(bulk("CsO", "rocksalt", a) * (2, 1, 1))
        items[-1].rattle(0.1, seed=n)
    assert model.cutoff == pytest.approx(4.88) and model.config.cutoff == 2.5
    out, forces, baseline = our_outputs(model, items)
    values, expected = metatrain_outputs(mt, original, items, torch.float64)
    assert error(out["energy"] + baseline["energy"], values["energy"][0][:, 0]) < 1e-9
    assert error(forces, expected) < 1e-9
    model.repulsion.radii.mul_(0.8)  # twin
    assert error(our_outputs(model, items)[1], expected) > 1e-3


def test_one_wrong_weight_is_seen(mt, tmp_path):
    """Twin: the comparison above fails when a single number differs."""
    original = make(mt, ENERGY)
    model = from_metatrain(original.double())
    items = structures()
    expected = metatrain_outputs(mt, original, items, torch.float64)[0]["energy"][0][:, 0]
    for name in ("network.gnn_layers.0.edge_embedder.weight", "factor", "composition", "network.edge_embedder.weight"):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.state_dict()[name].view(-1)[1] *= 1.0 + 1e-6
        errors = []
        for candidate in (model, wrong):
            out, _, baseline = our_outputs(candidate, items)
            errors.append(error(out["energy"] + baseline["energy"], expected))
        assert errors[0] < 1e-12 < 1e-9 < errors[1], name


def test_every_version_that_metatrain_ships_a_checkpoint_of(mt, tmp_path):
    """Its own loader upgrades them; they are tests of that in its package."""
    io = import_metatrain("metatrain.utils.io")
    folder = Path(sys.modules["metatrain"].__file__).parent / "pet" / "tests" / "checkpoints"
    files = {path.name.split("_")[0]: path for path in sorted(folder.glob("*.ckpt.gz"))}
    if not files:
        pytest.skip("this version of metatrain comes without its tests")
    seen = set()
    for file in files.values():
        path = tmp_path / "model.ckpt"
        path.write_bytes(gzip.decompress(file.read_bytes()))
        model = convert(path, trust_pickle=True, dtype=torch.float64)
        with compilable():
            original = io.load_model(path)
        items = structures()
        for atoms in items:
            atoms.numbers = [model.species[k % len(model.species)] for k in range(len(atoms))]
        data = {"charge": [0] * len(items)} if model.config.system_conditioning else {}
        out, forces, baseline = our_outputs(model, items)
        values, expected = metatrain_outputs(mt, original, items, torch.float64, **data)
        assert error(out["energy"], values["energy"][0][:, 0] - baseline["energy"]) < 1e-9, file.name
        assert error(forces, expected) < 1e-9, file.name
        seen.add(model.metadata["converted"]["checkpoint_version"])
    assert {1, 7, 16} <= seen


@pytest.mark.parametrize("featurizer", ["residual", "feedforward"])
def test_charge_and_spin_multiplicity(mt, featurizer):
    original = make(
        mt, ENERGY, featurizer_type=featurizer, num_gnn_layers=2, system_conditioning=True, max_charge=3
    ).double()
    model, items = from_metatrain(original), structures()
    charges, spins = [0, 1, -3, 2, 0, 1, 3], [1, 2, 3, 1, 10, 4, 1]
    values, expected = metatrain_outputs(mt, original, items, torch.float64, charge=charges, spin_multiplicity=spins)
    fields = dict(charge=torch.tensor(charges), spin_multiplicity=torch.tensor(spins))
    out, forces, baseline = our_outputs(model, items, **fields)
    assert error(out["energy"] + baseline["energy"], values["energy"][0][:, 0]) < 1e-9
    assert error(forces, expected) < 1e-9
    neutral, _, _ = our_outputs(model, items)
    assert error(neutral["energy"], out["energy"]) > 1e-3


def test_targets_of_every_kind(mt, tmp_path):
    """Scalars, Cartesian and spherical tensors, per atom and per structure, several properties and blocks."""
    spherical = {"spherical": {"irreps": [{"o3_lambda": 0, "o3_sigma": 1}, {"o3_lambda": 2, "o3_sigma": 1}]}}
    pseudo = {"spherical": {"irreps": [{"o3_lambda": 1, "o3_sigma": -1}]}}
    common = dict(quantity="", unit="", sample_kind="atom", num_subtargets=1)
    targets = ENERGY | {
        "mtt::charges": common | dict(type="scalar", num_subtargets=3),
        "mtt::dipole": common | dict(type={"cartesian": {"rank": 1}}, sample_kind="system", num_subtargets=2),
        "mtt::alpha": common | dict(type={"cartesian": {"rank": 2}}, num_subtargets=2, unit="A^3"),
        "mtt::shielding": common | dict(type=spherical, num_subtargets=2),
        "mtt::spin": common | dict(type=pseudo),
    }
    original = make(mt, targets)
    model = convert(save(original, tmp_path / "model.ckpt"), tmp_path / "converted", trust_pickle=True)
    items = structures()
    out, _, baseline = our_outputs(load(tmp_path / "converted"), items)
    values, _ = metatrain_outputs(mt, original, items, torch.float64)
    specs = {name: str(spec) for name, spec in model.outputs.items()}
    assert specs["mtt::charges"] == "3x0e per atom" and specs["mtt::dipole"] == "2x1o per atom, sum"
    assert specs["mtt::alpha[1]"] == "cartesian ij per atom [A^3]" and specs["mtt::spin"] == "1x1e per atom"
    square = "mtt::shielding[o3_lambda=2,o3_sigma=1]"
    scalar = "mtt::shielding[o3_lambda=0,o3_sigma=1]"
    assert specs[square] == "2x2e per atom" and specs[scalar] == "2x0e per atom"
    assert set(baseline) == {"energy", "mtt::charges", scalar}

    def total(name):
        return out[name] + baseline[name]

    assert error(total("energy"), values["energy"][0][:, 0]) < 1e-9
    assert error(total("mtt::charges"), values["mtt::charges"][0]) < 1e-9
    assert error(out["mtt::dipole"], values["mtt::dipole"][0].transpose(1, 2).flatten(1)) < 1e-9
    for k in range(2):
        assert error(out[f"mtt::alpha[{k}]"], values["mtt::alpha"][0][..., k]) < 1e-9
    assert error(total(scalar), values["mtt::shielding"][0][:, 0]) < 1e-9
    # metatensor's m = -l ... l about z: xy, yz, z^2, xz, x^2 - y^2, and y, z, x
    from e3nn import o3

    direction = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
    x, y, z = direction.unbind(1)
    harmonics = torch.stack([x * y, y * z, (2 * z * z - x * x - y * y) / 12**0.5, x * z, (x * x - y * y) / 2], dim=1)
    theirs = harmonics @ values["mtt::shielding"][1][:5].transpose(1, 2).reshape(10, 5).T * 15**0.5
    ours = o3.spherical_harmonics(2, direction, normalize=False) * 3**0.5 * 5**0.5 / 15**0.5
    scale = (theirs / (ours @ out[square][:5].reshape(10, 5).T)).detach()
    assert float((scale - scale[0, 0]).abs().max()) < 1e-9  # the same function of the direction, up to a constant
    assert error(out["mtt::spin"], values["mtt::spin"][0][:, [2, 0, 1], 0]) < 1e-9
    with pytest.raises(DeclarationError, match="did you mean 'mtt::charges'"):
        from_metatrain(original, targets=["mtt::charge"])
    assert list(from_metatrain(original, targets=["mtt::spin", "energy"]).outputs) == ["energy", "mtt::spin"]
    assert list(from_metatrain(original, targets="mtt::spin").outputs) == ["mtt::spin"]


def test_variants_and_the_choice_of_an_energy(mt):
    forces = FORCES["non_conservative_forces"]
    targets = {f"energy/{v}": ENERGY["energy"] for v in ("pbe", "scan")}
    targets |= {f"non_conservative_forces/{v}": forces for v in ("pbe", "scan")}
    original = make(mt, targets).double()
    with pytest.raises(DeclarationError, match=r"one of the energies \['energy/pbe', 'energy/scan'\]"):
        from_metatrain(original)
    model, items = from_metatrain(original, energy="energy/scan"), structures()
    assert list(model.outputs) == ["energy/pbe", "energy", "non_conservative_forces/pbe", "non_conservative_forces"]
    out, _, baseline = our_outputs(model, items)
    values, _ = metatrain_outputs(mt, original, items, torch.float64)
    for ours, theirs in (("energy", "energy/scan"), ("energy/pbe", "energy/pbe")):
        assert error(out[ours] + baseline[ours], values[theirs][0][:, 0]) < 1e-9
    assert error(out["non_conservative_forces"], values["non_conservative_forces/scan"][0][..., 0]) < 1e-9
    only = make(mt, {"mtt::U0": ENERGY["energy"]}).double()
    assert list(from_metatrain(only).outputs) == ["energy"]
    with pytest.raises(DeclarationError, match="expected a scalar energy"):
        from_metatrain(original, energy="non_conservative_forces/pbe")


def test_best_and_last_weights_and_where_they_come_from(mt, tmp_path):
    original = make(mt, ENERGY)
    checkpoint = original.get_checkpoint()
    last = {name: 2 * v if v.is_floating_point() else v for name, v in original.state_dict().items()}
    path = save(original, tmp_path / "model.ckpt", torch.float32, model_state_dict=last)
    found = {w: convert(path, trust_pickle=True, weights=w) for w in ("best", "last")}
    best, after = (m.network.edge_embedder.weight for m in found.values())
    assert torch.equal(2 * best, after)
    about = found["best"].metadata["converted"]
    assert about["checkpoint_version"] == checkpoint["model_ckpt_version"] and about["epoch"] == 5
    assert found["last"].metadata["converted"]["epoch"] == 7 and about["length_unit"] == "angstrom"
    assert about["targets"]["energy"]["unit"] == "eV" and about["hypers"]["d_pet"] == 8
    assert about["metatrain_version"] == sys.modules["metatrain"].__version__ and about["file"] == "model.ckpt"
    json.dumps(about)
    assert convert(path, trust_pickle=True, dtype=torch.float64).dtype == torch.float64


def test_low_rank_fine_tuning_is_merged(mt):
    finetuning = import_metatrain("metatrain.pet.modules.finetuning")
    original = make(mt, ENERGY)
    before = from_metatrain(copy.deepcopy(original).double())
    config = {"method": "lora", "config": {"rank": 2, "alpha": 0.7}, "inherit_heads": {}, "read_from": None}
    tuned = finetuning.apply_finetuning_strategy(original, config)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    tuned = tuned.double().eval()
    items = structures()
    out, forces, baseline = our_outputs(from_metatrain(tuned), items)
    values, expected = metatrain_outputs(mt, tuned, items, torch.float64)
    assert error(out["energy"] + baseline["energy"], values["energy"][0][:, 0]) < 1e-9
    assert error(forces, expected) < 1e-9
    assert error(our_outputs(before, items)[0]["energy"], out["energy"]) > 1e-3


class TestBadInput:
    def test_pickles_are_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path(tmp_path / "was_run").touch, ())

        path = tmp_path / "model.ckpt"
        torch.save({"architecture_name": "pet", "evil": Evil()}, path)
        with pytest.raises(InvalidInputError, match=r"pickles: reading one runs whatever code.*--trust-pickle"):
            convert(path)
        assert not (tmp_path / "was_run").exists()

    def test_files_that_are_no_checkpoints(self, tmp_path, mt):
        (tmp_path / "text").write_text("no")
        with pytest.raises(InvalidInputError, match="another kind of file"):
            convert(tmp_path / "text")
        with pytest.raises(InvalidInputError, match="no such file"):
            convert(tmp_path / "nothing")
        with pytest.raises(InvalidInputError, match="a folder"):
            convert(tmp_path)
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
        with pytest.raises(InvalidInputError, match="TorchScript module"):
            convert(tmp_path / "script.pt")
        torch.save([1, 2], tmp_path / "list.ckpt")
        with pytest.raises(InvalidInputError, match="architecture_name, got list"):
            convert(tmp_path / "list.ckpt", trust_pickle=True)
        torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "other.ckpt")
        with pytest.raises(InvalidInputError, match=r"got \['epoch', 'state_dict'\]"):
            convert(tmp_path / "other.ckpt", trust_pickle=True)
        (tmp_path / "broken.ckpt").write_bytes(b"\x80\x02nonsense")
        with pytest.raises(InvalidInputError, match="fails to load"):
            convert(tmp_path / "broken.ckpt", trust_pickle=True)

    def test_unknown_versions_and_other_architectures(self, mt, tmp_path):
        original = make(mt, ENERGY)
        path = save(original, tmp_path / "model.ckpt", model_ckpt_version=99)
        with pytest.raises(InvalidInputError, match=r"cannot read this checkpoint.*version 99.*pip install"):
            convert(path, trust_pickle=True)
        path = save(original, tmp_path / "model.ckpt", architecture_name="soap_bpnn")
        with pytest.raises(InvalidInputError, match=r"architecture 'pet', got 'soap_bpnn'.*wrap the exported file"):
            convert(path, trust_pickle=True)
        path = save(original, tmp_path / "model.ckpt", best_model_state_dict={"a": torch.ones(1), "b": torch.ones(1)})
        with pytest.raises(InvalidInputError, match="cannot read this checkpoint"):
            convert(path, trust_pickle=True)

    def test_metatrain_is_missing(self, monkeypatch, tmp_path):
        torch.save({}, tmp_path / "model.ckpt")
        monkeypatch.setitem(sys.modules, "metatrain", None)
        with pytest.raises(MissingDependencyError, match="pip install metatrain"):
            convert(tmp_path / "model.ckpt", trust_pickle=True)

    def test_metatrain_is_too_old(self, mt, monkeypatch, tmp_path):
        torch.save({}, tmp_path / "model.ckpt")
        monkeypatch.setattr(mt.PET, "__checkpoint_version__", 15)
        with pytest.raises(MissingDependencyError, match=r"too old.*pip install --upgrade metatrain"):
            convert(tmp_path / "model.ckpt", trust_pickle=True)

    def test_features_that_are_not_supported(self, mt):
        with pytest.raises(DeclarationError, match=r"length.*'bohr'"):
            from_metatrain(make(mt, ENERGY, length_unit="bohr"))
        model = make(mt, ENERGY)
        model.hypers["long_range"]["enable"] = True
        with pytest.raises(DeclarationError, match="long-range features"):
            from_metatrain(model)
        model = make(mt, ENERGY)
        model.hypers["activation"] = "GELU"
        with pytest.raises(DeclarationError, match="activation = 'GELU'"):
            from_metatrain(model)
        model = make(mt, ENERGY)
        model.hypers["magnetism"] = True
        with pytest.raises(DeclarationError, match="setting magnetism = True, which is newer"):
            from_metatrain(model)
        model = make(mt, ENERGY)
        model.backend.extra = torch.nn.Linear(1, 1)
        with pytest.raises(InvalidInputError, match=r"unknown parameter 'extra\.bias'"):
            from_metatrain(model)

    def test_targets_that_cannot_be_rotated(self, mt):
        per_species = {"spherical": {"irreps": {z: [{"o3_lambda": 1, "o3_sigma": 1}] for z in SPECIES}}}
        basis = dict(quantity="", unit="", type=per_species, sample_kind="atom", num_subtargets=1)
        model = make(mt, ENERGY | {"mtt::basis": basis})
        with pytest.warns(UserWarning, match="'mtt::basis' is left out: .*atomic basis"):
            assert list(from_metatrain(model).outputs) == ["energy"]
        with pytest.raises(DeclarationError, match="'mtt::basis' is not supported"):
            from_metatrain(model, targets=["mtt::basis"])

    def test_options(self, tmp_path):
        with pytest.raises(DeclarationError, match="did you mean 'best'"):
            convert(tmp_path, weights="bets")
        with pytest.raises(InvalidTypeError, match=r"torch\.float32 or torch\.float64"):
            convert(tmp_path, dtype=torch.float16)
