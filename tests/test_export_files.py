"""Exported files: what is written and refused, networks of PET, other files symmetrised, the command."""

from __future__ import annotations

import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from scriptable_toy import ScriptableToy
from symmetrize.backbones.pet import PET, PETConfig, Target
from symmetrize.backbones.pet.config import DIRECT_FORCES, ENERGY

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, keys, load_backbone
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError

require_adapter("metatomic")

# What needs the library that was asked for above.
from exporting import batch_of, errors, ethanol, expected, finite, in_memory, periodic, run  # noqa: E402

from symmetrize.export import frames as frames_of_export  # noqa: E402
from symmetrize.export.command import load_model, parse_species, run_export, symmetrized  # noqa: E402
from symmetrize.export.metatomic import export, export_wrapped  # noqa: E402
from symmetrize.metatomic import import_metatrain  # noqa: E402
from symmetrize.metatomic.tensor_maps import parts_of, rows_of  # noqa: E402

# torch 2.13 deprecates all of TorchScript, which the format consists of.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

#: Of the error scale, in float64.
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def without_optimization():
    """TorchScript rewrites itself during the first calls, which takes longer than the calls."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def models():
    """In atom and in structure scope."""
    return {
        scope: in_memory(Symmetrizer(ScriptableToy(width=4), ECSE(), scope=scope).eval())
        for scope in ("atom", "structure")
    }


STRESS = Target("non_conservative_stress", cartesian="ij=ji", reduce="sum", per_volume=True, unit="eV/A^3")


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("atom", {"targets": (ENERGY, DIRECT_FORCES, STRESS)}),
        ("atom", {"num_gnn_layers": 2, "num_neighbors_adaptive": 6.0}),
        ("structure", {"num_gnn_layers": 2, "featurizer_type": "feedforward", "zbl": (0.31, 0.76, 0.66)}),
        # Repelled where it is about to leave the list: half an environment, half a lone atom.
        ("atom", {"zbl": (1.5, 1.5, 1.5)}),
    ],
)
def test_networks_of_pet(scope, options):
    config = PETConfig((1, 6, 8), cutoff=3.0, d_pet=16, d_node=16, d_head=8, d_feedforward=16, num_heads=2, **options)
    model = Symmetrizer(PET(config).double(), ECSE(), scope=scope).eval()
    file = export(model)
    fading = Atoms("CO", positions=[[0, 0, 0], [0, 0, 2.9]])
    structures = [ethanol(), finite()["linear"], fading] + ([periodic()["small cell"]] if scope == "atom" else [])
    found = errors(model, file, batch_of(structures))
    assert all(error <= TOLERANCE for error in found.values()), found
    alone = errors(model, file, batch_of([fading]))
    assert all(error <= TOLERANCE for error in alone.values()), alone
    if "targets" in options:
        assert {"non_conservative_force", "non_conservative_stress"} <= set(file.capabilities().outputs)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    model = Symmetrizer(ScriptableToy(width=4), ECSE()).eval()
    path = tmp_path / "model.pt"
    path.write_text("what was there before")
    plain = frames_of_export.ECSEFrames.__init__

    def wider(self, *args, **options):
        plain(self, *args, **options)
        self.width = 2.0 * self.width

    with monkeypatch.context() as patch:
        patch.setattr(frames_of_export.ECSEFrames, "__init__", wider)
        with pytest.raises(DeclarationError, match="does not reproduce the model"):
            export(model, path)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]
    export(model, path)
    assert path.stat().st_size > 10_000 and list(tmp_path.iterdir()) == [path]


def test_description(tmp_path):
    model = Symmetrizer(ScriptableToy(n_hops=2, more={"dipole": OutputSpec("1o")}), ECSE(), scope="atom")
    options = dict(
        name="a name", authors=["someone"], names={"dipole": "mine::dipole"}, species=[1, 8], extra={"k": "v"}
    )
    file = in_memory(model, length_unit="bohr", **options)
    capabilities, metadata = file.capabilities(), file.metadata()
    assert set(capabilities.outputs) == {"energy", "mine::dipole"} and list(capabilities.atomic_types) == [1, 8]
    assert capabilities.interaction_range == 5.0 and capabilities.length_unit == "bohr"
    assert capabilities.dtype == "float64" and "cuda" in capabilities.supported_devices
    assert metadata.name == "a name" and metadata.extra["group"] == "O(3)" and metadata.extra["k"] == "v"
    assert "2305.19302" in metadata.references["architecture"][0]
    assert {(r.cutoff, r.full_list, r.strict) for r in file.requested_neighbor_lists()} == {
        (2.5, True, True),
        (5.0, True, True),
    }
    structure = in_memory(Symmetrizer(ScriptableToy(width=4), ECSE(), scope="structure"))
    assert structure.capabilities().interaction_range == float("inf")


def test_no_systems(models):
    from metatomic.torch import ModelEvaluationOptions, ModelOutput

    for kind in ("system", "atom"):
        options = ModelEvaluationOptions(
            length_unit="angstrom", outputs={"energy": ModelOutput(unit="eV", sample_kind=kind)}, selected_atoms=None
        )
        out = models["atom"]([], options, check_consistency=True)
        assert out["energy"].block().values.shape == (0, 1)


def test_refusals(models):
    with pytest.raises(torch.jit.Error, match="around the centroid of a finite structure"):
        run(models["structure"], batch_of([periodic()["crystal"]]))
    with pytest.raises(InvalidTypeError, match="expected a Symmetrizer"):
        export(ScriptableToy())
    toy = ScriptableToy(width=4)
    with pytest.raises(DeclarationError, match="auxiliary model"):
        export(Symmetrizer(toy, ECSE(fallback=ScriptableToy())))
    with pytest.raises(DeclarationError, match="unknown precision"):
        export(Symmetrizer(toy, ECSE()), dtype="float16")
    with pytest.raises(DeclarationError, match="does not know"):
        export(Symmetrizer(toy, ECSE()), species=[1, 26])
    with pytest.raises(DeclarationError, match="names: unknown output"):
        export(Symmetrizer(toy, ECSE()), names={"enrgy": "energy"})
    strict = in_memory(Symmetrizer(toy, ECSE(fallback="error")))
    run(strict, batch_of([ethanol()]))
    with pytest.raises(torch.jit.Error, match="collinear"):
        run(strict, batch_of([finite()["linear"]]))
    from symmetrize.backbones.toy import ToyLocal

    with pytest.raises(DeclarationError, match="species"):
        unnamed = ScriptableToy(width=4)
        unnamed.species = None
        export(Symmetrizer(unnamed, ECSE()))
    if type(ToyLocal()).scriptable is type(toy).__mro__[1].scriptable:
        with pytest.raises(DeclarationError, match="no scriptable form"):
            export(Symmetrizer(ToyLocal(), ECSE()), species=[1])


@pytest.fixture(scope="module")
def bare_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    more = {"dipole": OutputSpec("1o", reduce="sum"), "quadrupole": OutputSpec("2e")}
    for n_hops in (1, 2):
        scope = "atom" if n_hops == 1 else "structure"
        bare = Symmetrizer(ScriptableToy(n_hops=n_hops, width=4, more=more), Identity(), scope=scope).eval()
        export(bare, folder / f"bare{n_hops}.pt", verify=False)
    return folder


@pytest.mark.parametrize(("n_hops", "scope"), [(1, "atom"), (2, "atom"), (1, "structure")])
def test_another_file_symmetrized(bare_files, n_hops, scope):
    backbone = load_backbone("metatomic", bare_files / f"bare{n_hops}.pt")
    model = Symmetrizer(backbone, ECSE(), scope=scope).eval()
    file = export(model, verify=False)
    assert file.capabilities().interaction_range == (2.5 * n_hops if scope == "atom" else float("inf"))
    structures = [ethanol(), finite()["linear"], finite()["atom"]] + (
        [periodic()["small cell"]] if scope == "atom" else []
    )
    batch = batch_of(structures)
    found = errors(model, file, batch)
    assert all(error <= TOLERANCE for error in found.values()), found
    # And it is what symmetrising the network itself gives.
    own = Symmetrizer(ScriptableToy(n_hops=n_hops, width=4), ECSE(), scope=scope).eval()
    more = {"dipole": OutputSpec("1o", reduce="sum"), "quadrupole": OutputSpec("2e")}
    own = Symmetrizer(ScriptableToy(n_hops=n_hops, width=4, more=more), ECSE(), scope=scope).eval()
    found = errors(own, file, batch)
    assert found["forces"] <= TOLERANCE, found
    names = ["symmetrize::dipole", "symmetrize::quadrupole"]
    tensors, _, _ = run(file, batch, others=[(name, "atom") for name in names])
    out = own(batch)
    for name, target in zip(names, (out["atomic_dipole"], out["quadrupole"]), strict=True):
        (part,) = parts_of(name, tensors[name], "").values()
        rows, _ = rows_of(part, tensors[name], batch[keys.PTR])
        assert torch.allclose(rows, target.detach(), atol=1e-11, rtol=0.0) and float(target.detach().abs().max()) > 1e-3
    # Selected atoms.
    atomic = run(file, batch, "atom", [[0, 3]])[0]["energy"].block()
    assert atomic.samples.values.tolist() == [[0, 3]]
    assert float(atomic.values.detach()) == pytest.approx(float(expected(own, batch)["atomic_energy"][3]), abs=1e-9)


def test_another_file_refuses_what_it_cannot(bare_files):
    with pytest.raises(DeclarationError, match="for a model in the metatomic format"):
        export_wrapped(bare_files / "bare1.pt", dtype="mixed")
    file = export_wrapped(bare_files / "bare1.pt", scope="structure", outputs=["energy"], verify=False)
    assert list(file.capabilities().outputs) == ["energy"]
    with pytest.raises(torch.jit.Error, match="symmetrized as a whole, around the centroid"):
        run(file, batch_of([periodic()["crystal"]]))
    # Nor with frames that need no centroid: no derivative would reach the cell.
    fixed = export_wrapped(bare_files / "bare1.pt", method=Identity(), scope="structure", verify=False)
    with pytest.raises(torch.jit.Error, match="symmetrized as a whole"):
        run(fixed, batch_of([periodic()["crystal"]]))
    for options, message in (({"names": {"energy": "e"}}, "names"), ({"length_unit": "nm"}, "length_unit")):
        with pytest.raises(DeclarationError, match=message):
            export_wrapped(bare_files / "bare1.pt", **options)


def test_command(tmp_path, bare_files):
    lines = []
    path = tmp_path / "model.pt"
    run_export("pet:ethanol", path, dtype="mixed", name="ethanol", species="H,C,8", echo=lines.append)
    assert path.is_file() and "H, C, O" in lines[0] and "5 angstrom" in lines[0]
    with pytest.raises(InvalidInputError, match="another file"):
        run_export(str(bare_files / "bare1.pt"), bare_files / "bare1.pt")
    with pytest.raises(InvalidInputError, match="no such file"):
        run_export("nothing.pt", path)
    with pytest.raises(InvalidInputError, match="folder"):
        run_export("pet:ethanol", tmp_path)
    with pytest.raises(DeclarationError, match="did you mean"):
        load_model("pett")
    assert parse_species("H, 8,C") == [1, 6, 8]
    with pytest.raises(DeclarationError, match="symbols"):
        parse_species("Xy")
    again = symmetrized(Symmetrizer(ScriptableToy(), ECSE()), group="SO(3)", chunk_size=5)
    assert (again.group, again.scope, again.chunk_size) == ("SO(3)", "atom", 5)
    assert isinstance(symmetrized(ScriptableToy(), bare=True).method, Identity)


@pytest.mark.filterwarnings("ignore:metatomic. :UserWarning")  # atoms beyond the declared range, which is found
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of metatrain's own libraries
def test_a_model_of_metatrain(tmp_path):
    pytest.importorskip("metatrain")
    pet, data, information, defaults = (
        import_metatrain(f"metatrain.{name}")
        for name in ("pet", "utils.data", "utils.data.target_info", "utils.architectures")
    )
    small = dict(cutoff=3.0, d_pet=8, d_node=8, d_head=8, d_feedforward=8, num_heads=1, num_attention_layers=1)
    targets = {"energy": information.get_energy_target_info("energy", {"unit": "eV"})}
    for blocks, scope in ((1, "atom"), (2, "structure")):
        torch.manual_seed(0)
        hypers = defaults.get_default_hypers("pet")["model"] | small | {"num_gnn_layers": blocks}
        path = tmp_path / f"{blocks}.pt"
        pet.__model__(hypers, data.DatasetInfo("angstrom", [1, 6, 8], targets)).eval().export().save(str(path))
        backbone = load_backbone("metatomic", path, ["energy"], dtype=torch.float64)
        model = Symmetrizer(backbone, ECSE(), scope=scope).eval()
        structures = [ethanol(), finite()["linear"]] + ([periodic()["small cell"]] if scope == "atom" else [])
        file = in_memory(model)
        found = errors(model, file, batch_of(structures))
        assert all(error <= 10 * TOLERANCE for error in found.values()), found
        bare = Symmetrizer(backbone, Identity(), scope=scope).eval()
        assert errors(bare, file, batch_of(structures[:1]))["forces"] > 1e-4
