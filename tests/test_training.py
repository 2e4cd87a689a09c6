"""Training: recipes, data, forces, reproducibility, resumption after a kill, and what is written in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from symmetrize import keys
from symmetrize.errors import InvalidInputError, UnknownSpeciesError
from symmetrize.ops.rotations import random_rotations
from symmetrize.training import Recipe, RecipeError, evaluate, load_recipe, train
from symmetrize.training.composition import baseline_of, count_species, energy_scale, fit_composition
from symmetrize.training.config import BackboneRecipe, DataRecipe, ScheduleRecipe
from symmetrize.training.dataset import (
    TARGET_ENERGY,
    TARGET_FORCES,
    augment,
    fingerprint,
    gather,
    generator_for,
    read_structures,
    split,
    tabulate,
    transform,
)
from symmetrize.training.gradients import energy_and_forces
from symmetrize.training.lit import EpochOrder, TrainingModule, validation_share
from symmetrize.training.models import build_backbone, set_energy_reference
from symmetrize.training.muon import orthogonalize
from symmetrize.training.run import _accelerator

ROOT = Path(__file__).parents[1]
DATA = ROOT / "symmetrize" / "demo" / "data" / "ethanol-test.xyz"
TINY = {
    "cutoff": 4.5,
    "d_pet": 16,
    "d_node": 16,
    "d_head": 16,
    "d_feedforward": 16,
    "num_heads": 2,
    "num_attention_layers": 1,
}

# Where the suite turns warnings into errors: advice of Lightning's about its own settings is not ours to act on.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def recipe(**changes):
    content = {
        "data": {"path": str(DATA), "train": 20, "validation": 10, "test": 5},
        "backbone": {"name": "pet", "hyperparameters": TINY},
        "optimizer": {"name": "muon", "lr": 5e-3},
        "loss": {"kind": "norm"},
        "epochs": 6,
        "batch_size": 4,
        "ema": 0.9,
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    content.update(changes)
    return content


@pytest.fixture(scope="module")
def table():
    structures = read_structures(DataRecipe(str(DATA), train=20, validation=0))
    return tabulate(structures[:20], 4.5, "energy", "forces")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run that several tests look at."""
    folder = tmp_path_factory.mktemp("run")
    return train(recipe(), output=folder, progress=False)


def tiny(seed=0):
    return build_backbone(BackboneRecipe("pet", TINY), (1, 6, 8), seed).double()


class TestRecipe:
    def test_defaults_and_overrides(self):
        found = load_recipe(recipe(), {"epochs": 3, "loss.forces": 2})
        assert isinstance(found, Recipe)
        assert (found.epochs, found.loss.forces, found.loss.energy) == (3, 2.0, 1.0)
        assert load_recipe(found.to_dict()) == found

    def test_last_epoch_is_validated(self):
        pairs = [(1, 2), (5, 2), (6, 2), (100, 7), (3, 50)]
        found = [load_recipe(recipe(epochs=n, validate_every=every)).validation_interval for n, every in pairs]
        assert found == [1, 1, 2, 5, 3]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epoch": 3}, "epoch: unknown entry; did you mean 'epochs'"),
            ({"optimizer": {"learning_rat": 1.0}}, "optimizer.learning_rat: unknown entry"),
            ({"optimizer": {"name": "adam"}}, "optimizer.name: unknown value 'adam'; did you mean 'adamw'"),
            ({"epochs": "many"}, "epochs: expected int, got 'many'"),
            ({"epochs": 0}, "epochs: expected a positive number, got 0"),
            ({"ema": 1.0}, "ema: expected a number from 0 to below 1"),
            ({"data": {"path": "x"}}, "data.train: expected an entry, got none"),
            ({"data": 3}, "data: expected a section, got 3"),
            ({"loss": {"energy": 0, "forces": 0}}, "loss: expected a positive weight"),
            ({"trainer": {"max_epochs": 3}}, "trainer.max_epochs: set by epochs"),
            ({"trainer": {"accelerator": "mps"}}, "trainer.accelerator: expected 'auto', 'cpu' or 'cuda', got 'mps'"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe(**changes))
        assert message in str(caught.value)

    def test_yaml(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(
            "data: {path: d/x.xyz, train: 1, validation: 1}\nbackbone: {name: pet}\noptimizer: {lr: 1e-3}\n"
        )
        found = load_recipe(path)
        assert found.optimizer.lr == 1e-3  # a string for YAML 1.1
        assert Path(found.data.path) == tmp_path / "d" / "x.xyz"
        assert load_recipe(path, {"data.path": "y.xyz"}).data.path == "y.xyz"
        path.write_text("data: [")
        with pytest.raises(RecipeError, match="no valid YAML"):
            load_recipe(path)
        with pytest.raises(RecipeError, match="there is none"):
            load_recipe(tmp_path / "b.yaml")

    def test_shipped_recipes_are_valid(self):
        paths = sorted((ROOT / "examples" / "configs").glob("pet-*.yaml"))
        assert len(paths) >= 2
        for path in paths:
            found = load_recipe(path)
            assert found.data.source
            assert Path(found.data.path).resolve() == ROOT / "examples" / "data" / "ethanol_1000.xyz"

    def test_accelerator(self, monkeypatch):
        for available, expected in ((True, "cuda"), (False, "cpu")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
            assert _accelerator("auto") == expected
        assert [_accelerator(name) for name in ("gpu", "cpu", "tpu")] == ["cuda", "cpu", "tpu"]

    def test_missing_data_says_where_to_get_it(self, tmp_path):
        data = {"path": str(tmp_path / "no.xyz"), "train": 1, "validation": 1, "source": "https://example.org"}
        with pytest.raises(InvalidInputError, match=r"no\.xyz; get it from https://example\.org"):
            train(recipe(data=data), output=tmp_path)

    def test_too_few_structures(self, tmp_path):
        data = {"path": str(DATA), "train": 100, "validation": 1}
        with pytest.raises(InvalidInputError, match="expected at least 101"):
            train(recipe(data=data), output=tmp_path)

    def test_backbone_errors(self, tmp_path):
        for backbone, message in [
            ({"name": "pett"}, "did you mean 'pet'"),
            ({"name": "no.such:thing"}, "cannot import"),
            ({"name": "pet", "hyperparameters": {"cutof": 4.0}}, "did you mean 'cutoff"),
        ]:
            with pytest.raises(RecipeError, match=message):
                train(recipe(backbone=backbone), output=tmp_path, progress=False)


class TestShippedWeights:
    """What the weights say about their origin is what the recipe beside them would do."""

    @pytest.mark.parametrize(
        ("weights", "config"), [("ethanol", "pet-ethanol"), ("ethanol-2block", "pet-ethanol-2block")]
    )
    def test_recipe(self, weights, config):
        path = ROOT / "backbones" / "pet" / "weights" / f"{weights}.json"
        text = path.read_text(encoding="utf-8")
        description = json.loads(text)
        training = description["metadata"]["training"]
        shipped = load_recipe(ROOT / "examples" / "configs" / f"{config}.yaml")
        as_run = load_recipe(training["recipe"]).to_dict()
        expected = shipped.to_dict()
        assert as_run["data"].pop("path") == Path(expected["data"].pop("path")).name
        assert as_run == expected
        assert training["epochs"] == shipped.epochs
        assert training["data_source"] == shipped.data.source
        assert (
            training["data_sha256"] == fingerprint(shipped.data.path) and training["data_sha256"] in shipped.data.source
        )
        assert training["test_structures"] == split(1000, shipped.data).test.tolist()
        assert {"torch", "lightning", "numpy", "torch-symmetrize"} <= training["versions"].keys()
        hyperparameters = {"atomic_types": [1, 6, 8], **shipped.backbone.hyperparameters}
        assert {name: description["config"][name] for name in hyperparameters} == hyperparameters
        assert "/" not in text.replace(training["data_source"], "").replace("eV/", "")  # no paths of any machine

    def test_errors(self):
        """The errors that the weights claim are those that they make."""
        from symmetrize.backbones.pet import load

        for weights, config in (("ethanol", "pet-ethanol"), ("ethanol-2block", "pet-ethanol-2block")):
            backbone = load(ROOT / "backbones" / "pet" / "weights" / weights)
            settings = load_recipe(ROOT / "examples" / "configs" / f"{config}.yaml").data
            table, parts, _ = gather(read_structures(settings), backbone.cutoff, settings)
            composition = backbone.composition
            claimed = backbone.metadata["training"]["errors"]
            baseline = baseline_of(table, composition, (1, 6, 8))
            for part in ("validation", "test"):
                found = evaluate(backbone, table, getattr(parts, part), baseline).to_dict()
                assert found == pytest.approx(claimed[part], rel=1e-3)

    def test_size(self):
        files = (ROOT / "backbones" / "pet" / "weights").glob("*.safetensors")
        assert sum(path.stat().st_size for path in files) < 2e6


class TestSchedule:
    def test_shape(self):
        schedule = ScheduleRecipe(warmup=2, decay=10, final=0.1)
        rates = [schedule.rate(epoch, 30) for epoch in (1, 2, 11, 20, 25, 30, 31)]
        assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1])

    def test_without_constant_phase(self):
        schedule = ScheduleRecipe(warmup=0)
        assert [schedule.rate(epoch, 8) for epoch in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])


class TestData:
    def test_split(self):
        parts = split(100, DataRecipe("", train=50, validation=20, test=10, split_seed=3))
        everything = torch.cat([parts.train, parts.validation, parts.test])
        assert [len(parts.train), len(parts.validation), len(parts.test)] == [50, 20, 10]
        assert everything.unique().shape[0] == 80
        smaller = split(100, DataRecipe("", train=5, validation=20, test=10, split_seed=3))
        assert torch.equal(smaller.test, parts.test)
        assert not torch.equal(split(100, DataRecipe("", 5, 20, 10, split_seed=4)).test, parts.test)

    def test_bundled_file_is_the_test_set(self):
        import ase.io

        structures = ase.io.read(DATA, index=":")
        test = split(1000, load_recipe(ROOT / "examples" / "configs" / "pet-ethanol.yaml").data).test
        assert [atoms.info["index"] for atoms in structures] == test.tolist()

    def test_selection_equals_a_fresh_table(self, table):
        picked = torch.tensor([7, 2, 2])
        batch = table.select(picked, torch.float64)
        structures = read_structures(DataRecipe(str(DATA), train=20, validation=0))
        fresh = tabulate([structures[i] for i in picked], 4.5, "energy", "forces")
        for name in (keys.POS, keys.Z, keys.BATCH, keys.PTR, keys.EDGE_INDEX, keys.EDGE_VEC, keys.CELL_SHIFT):
            assert torch.equal(batch[name], fresh.batch[name]), name
        assert torch.equal(batch[TARGET_ENERGY], fresh.energy)
        assert torch.equal(batch[TARGET_FORCES], fresh.forces)

    def test_structures_outside_the_split_are_left_alone(self):
        structures = read_structures(DataRecipe(str(DATA), train=20, validation=0))
        data = DataRecipe(str(DATA), train=5, validation=2, test=3, split_seed=1)
        whole = split(100, data)
        for n in set(range(100)) - set(torch.cat([whole.train, whole.validation, whole.test]).tolist()):
            structures[n] = None  # would fail where it is looked at
        table, parts, numbers = gather(structures, 4.5, data)
        assert len(table) == 10
        for part in ("train", "validation", "test"):
            rows, expected = getattr(parts, part), getattr(whole, part)
            assert torch.equal(numbers[rows], expected)
            assert table.energy[rows].tolist() == [structures[n].get_potential_energy() for n in expected]
        lacking = int(whole.test[1])
        structures[lacking].calc.results.pop("forces")
        with pytest.raises(InvalidInputError, match=f"structure {lacking}: expected a reference value 'forces'"):
            gather(structures, 4.5, data)

    @pytest.mark.parametrize(("n_structures", "n_ranks"), [(10, 3), (3, 3), (2, 5), (1, 4)])
    def test_every_device_has_work(self, n_structures, n_ranks):
        everything = list(range(7, 7 + n_structures))
        shares = [validation_share(everything, rank, n_ranks) for rank in range(n_ranks)]
        assert all(shares) and {n for share in shares for n in share} == set(everything)
        if n_structures >= n_ranks:
            assert sum(map(len, shares)) == n_structures  # each counts once
        orders = [list(EpochOrder(n_structures, 0, rank, n_ranks)) for rank in range(n_ranks)]
        assert len({len(order) for order in orders}) == 1 and {n for order in orders for n in order} == set(
            range(n_structures)
        )

    def test_missing_reference(self):
        structures = read_structures(DataRecipe(str(DATA), train=1, validation=0))
        with pytest.raises(InvalidInputError, match="expected a reference value 'dft_energy'"):
            tabulate(structures[:1], 4.5, "dft_energy", "forces")

    def test_streams(self):
        draws = [torch.rand(4, generator=generator_for(*seeds)) for seeds in [(0, 1, 2), (0, 1, 2), (0, 2, 1)]]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


class TestComposition:
    def test_recovers_species_energies(self):
        generator = torch.Generator().manual_seed(0)
        counts = torch.randint(0, 5, (30, 3), generator=generator).double() + torch.eye(3).repeat(10, 1)
        energies = torch.tensor([-13.0, -1000.0, -2000.0], dtype=torch.float64)
        assert torch.allclose(fit_composition(counts, counts @ energies), energies, rtol=1e-10)

    def test_single_composition(self, table):
        counts = count_species(table.batch[keys.Z], table.batch[keys.BATCH], len(table), (1, 6, 8))
        composition = fit_composition(counts, table.energy)
        # Nothing tells the species apart, so they share the energy evenly.
        assert torch.allclose(composition, (table.energy.mean() / 9).expand(3), rtol=1e-12)
        rest = table.energy - baseline_of(table, composition, (1, 6, 8))
        assert abs(float(rest.mean())) < 1e-9
        assert energy_scale(table.forces, rest) == pytest.approx(float(table.forces.square().mean().sqrt()))
        assert energy_scale(torch.zeros(2, 3), rest) == pytest.approx(float(rest.square().mean().sqrt()))

    def test_species_that_the_data_lacks(self, table):
        types = (1, 6, 7, 8)
        counts = count_species(table.batch[keys.Z], table.batch[keys.BATCH], len(table), types)
        composition = fit_composition(counts, table.energy)
        few = fit_composition(counts[:, [0, 1, 3]], table.energy)
        assert torch.allclose(composition[[0, 1, 3]], few, rtol=1e-12)
        assert float(composition[2]) == pytest.approx(float(table.energy.mean() / 9), rel=1e-12)
        with pytest.raises(RecipeError, match="'composition': expected 4 entries, got 3"):
            set_energy_reference(tiny(), composition, 1.0)

    def test_unknown_species(self, table):
        with pytest.raises(UnknownSpeciesError, match="got 8 in structure 0"):
            count_species(table.batch[keys.Z], table.batch[keys.BATCH], len(table), (1, 6))


class TestGradients:
    def test_forces_are_minus_the_gradient(self, table):
        backbone = tiny()
        batch = table.select(torch.tensor([0, 1]), torch.float64)
        forces = energy_and_forces(backbone, batch, create_graph=False)[1]
        step, atom, axis = 1e-4, 12, 1
        values = []
        for sign in (1, -1):
            moved = batch.clone()
            moved[keys.POS][atom, axis] += sign * step
            neighbor, center = moved[keys.EDGE_INDEX]
            moved[keys.EDGE_VEC] = moved[keys.POS][neighbor] - moved[keys.POS][center]
            values.append(energy_and_forces(backbone, moved, create_graph=False)[0].sum())
        numeric = -(values[0] - values[1]) / (2 * step)
        assert abs(float(forces[atom, axis])) > 1e-4
        assert float(forces[atom, axis]) == pytest.approx(float(numeric), rel=1e-5)  # truncation error, order step^2

    def test_augmentation_is_a_symmetry_of_the_targets(self, table):
        batch = table.select(torch.arange(8), torch.float64)
        turned = augment(batch, generator_for(1))
        owner = batch[keys.BATCH]
        # Recover each g from the positions alone, then compare everything else with it.
        signs = set()
        for s in range(8):
            rows = owner == s
            g = torch.linalg.lstsq(batch[keys.POS][rows], turned[keys.POS][rows]).solution.T
            assert torch.allclose(g @ g.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
            signs.add(round(float(torch.linalg.det(g))))
            assert torch.allclose(turned[TARGET_FORCES][rows], batch[TARGET_FORCES][rows] @ g.T, atol=1e-10)
            edges = owner[batch[keys.EDGE_INDEX][1]] == s
            assert torch.allclose(turned[keys.EDGE_VEC][edges], batch[keys.EDGE_VEC][edges] @ g.T, atol=1e-10)
            assert not torch.allclose(g, torch.eye(3, dtype=torch.float64), atol=0.1)
        assert signs == {1, -1}
        assert torch.equal(turned[TARGET_ENERGY], batch[TARGET_ENERGY])
        again = augment(batch, generator_for(1))
        assert torch.equal(again[keys.POS], turned[keys.POS])

    def test_augmentation_transforms_an_invariant_model_consistently(self, table):
        """Averaging forces of f(g x) rotated back over {g, ...} is what training approximates: check one element."""
        batch = table.select(torch.arange(3), torch.float64)
        elements = random_rotations(3, torch.Generator().manual_seed(2), improper=True)
        turned = transform(batch, elements, batch[keys.BATCH])
        backbone = PairEnergy()
        energy, forces = energy_and_forces(backbone, batch, create_graph=False)
        energy_turned, forces_turned = energy_and_forces(backbone, turned, create_graph=False)
        assert torch.allclose(energy, energy_turned, rtol=1e-12)
        expected = torch.einsum("nij,nj->ni", elements[batch[keys.BATCH]], forces)
        assert torch.allclose(forces_turned, expected, atol=1e-12)
        assert not torch.allclose(forces_turned, forces, atol=1e-3)
        # The twin: a bare PET is not invariant, or there would be nothing to augment.
        bare = tiny()
        first = energy_and_forces(bare, batch, create_graph=False)[0]
        assert not torch.allclose(first, energy_and_forces(bare, turned, create_graph=False)[0], atol=1e-6)

    @pytest.mark.parametrize("weights", [{"energy": 0.0}, {"forces": 0.0}, {}])
    def test_every_parameter_has_a_gradient(self, table, weights, monkeypatch):
        """Devices that train together wait for the gradients of all parameters."""
        settings = load_recipe(recipe(loss={"kind": "norm", **weights}, dtype="float64"))
        module = TrainingModule(tiny(), settings, 1.0)
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        monkeypatch.setattr(TrainingModule, "current_epoch", 0)
        monkeypatch.setattr(TrainingModule, "global_rank", 0)
        module.training_step(table.select(torch.arange(3), torch.float64), 0).backward()
        without = [name for name, parameter in module.backbone.named_parameters() if parameter.grad is None]
        assert not without

    def test_orthogonalize(self):
        matrices = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
        singular = torch.linalg.svdvals(orthogonalize(matrices))
        assert float(singular.min()) > 0.5 and float(singular.max()) < 1.3


class PairEnergy(torch.nn.Module):
    """Invariant by construction: a function of distances."""

    def forward(self, batch):
        lengths = batch[keys.EDGE_VEC].norm(dim=1)
        center = batch[keys.EDGE_INDEX][1]
        return {"energy": torch.zeros_like(batch[keys.POS][:, 0]).index_add(0, center, torch.exp(-lengths))}


class TestRuns:
    def test_loss_decreases(self, finished):
        rows = np.genfromtxt(next(finished.folder.glob("logs/*/metrics.csv")), delimiter=",", names=True)
        loss = rows["trainloss"][np.isfinite(rows["trainloss"])]
        assert len(loss) == 6 and loss[-1] < 0.9 * loss[0]

    def test_saved_weights_reproduce_the_reported_errors(self, finished):
        from symmetrize.backbones.pet import load

        settings = load_recipe(recipe())
        backbone = load(finished.weights)
        structures = tabulate(read_structures(settings.data), backbone.cutoff, "energy", "forces")
        parts = split(len(structures), settings.data)
        # With the model's own baseline: everything that a prediction needs is in the file.
        atomic = backbone.baseline(structures.batch)["energy"]
        baseline = torch.zeros(len(structures), dtype=torch.float64).index_add(0, structures.batch[keys.BATCH], atomic)
        for part in ("validation", "test"):
            again = evaluate(backbone, structures, getattr(parts, part), baseline)
            reported = json.loads((finished.folder / "result.json").read_text())["errors"][part]
            assert again.forces_mae == pytest.approx(reported["forces_mae"], rel=1e-5)
            assert again.energy_mae == pytest.approx(reported["energy_mae"], rel=1e-4)
            assert again.n_structures == {"validation": 10, "test": 5}[part]
        training = backbone.metadata["training"]
        assert training["recipe"]["epochs"] == 6 and 1 <= training["best_epoch"] <= 6
        leftovers = [path.name for path in finished.folder.iterdir() if path.name.startswith(".")]
        assert not leftovers

    def test_seeded_and_resumed_after_a_kill(self, finished, tmp_path):
        """A killed and resumed run ends where the uninterrupted one did; so does a repeated one, by implication."""
        content = tmp_path / "recipe.json"
        content.write_text(json.dumps(recipe()))
        # Stops by itself inside the third epoch and waits for the kill.
        script = (
            "import json, sys, time\n"
            "from symmetrize.training import lit, train\n"
            "step = lit.TrainingModule.training_step\n"
            "def slow(self, batch, batch_idx):\n"
            "    if self.current_epoch == 3 and batch_idx == 2:\n"
            "        print('waiting', flush=True); time.sleep(60)\n"
            "    return step(self, batch, batch_idx)\n"
            "lit.TrainingModule.training_step = slow\n"
            "train(json.load(open(sys.argv[1])), output=sys.argv[2], progress=False)\n"
        )
        folder = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(content), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        try:
            assert process.stdout is not None
            assert "waiting" in process.stdout.readline()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=20)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "result.json").exists() and not (folder / "model.safetensors").exists()
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        start = time.monotonic()
        resumed = train(recipe(), output=folder, progress=False)
        assert time.monotonic() - start < 60
        assert resumed.epochs == finished.epochs == 6
        rows = np.genfromtxt(sorted(folder.glob("logs/*/metrics.csv"))[-1], delimiter=",", names=True)
        assert int(rows["epoch"].min()) == 3  # taken up, not started again
        for part in ("validation", "test"):
            # The same operations in the same order; another process may choose other kernels, hence not exactly.
            assert resumed.errors[part].forces_mae == pytest.approx(finished.errors[part].forces_mae, rel=1e-5)
            assert resumed.errors[part].energy_mae == pytest.approx(finished.errors[part].energy_mae, rel=1e-4)

    def test_length_may_change_while_the_rate_is_constant(self, tmp_path, monkeypatch):
        """Stopped in the constant phase and given a new length, a run equals one of that length from the start."""
        step = TrainingModule.training_step

        def stop(self, batch, batch_idx):
            if self.current_epoch == 3:
                raise InterruptedError
            return step(self, batch, batch_idx)

        long = recipe(epochs=9, schedule={"warmup": 1, "decay": 3})
        short = recipe(epochs=5, schedule={"warmup": 1, "decay": 2})
        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "training_step", stop)
            with pytest.raises(InterruptedError):
                train(long, output=tmp_path / "a", progress=False)
        changed = train(short, output=tmp_path / "a", progress=False)
        direct = train(short, output=tmp_path / "b", progress=False)
        assert changed.epochs == direct.epochs == 5
        assert changed.errors["test"].forces_mae == pytest.approx(direct.errors["test"].forces_mae, rel=1e-6)
        with pytest.raises(RecipeError, match=r"expected recipe\.epochs = 5, got 9"):
            train(long, output=tmp_path / "b", progress=False)

    def test_another_recipe_in_the_same_folder(self, finished):
        with pytest.raises(RecipeError, match=r"expected recipe\.epochs = 6, got 7"):
            train(recipe(epochs=7), output=finished.folder, progress=False)

    def test_finished_run_is_returned(self, finished):
        before = (finished.folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
        again = train(recipe(), output=finished.folder, progress=False)
        assert again.errors["test"].forces_mae == pytest.approx(finished.errors["test"].forces_mae, rel=1e-6)
        assert (finished.folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before

    def test_more_species_than_the_data_has(self, tmp_path):
        """Composition energies go to the species that they belong to, wherever those stand."""
        from symmetrize.backbones.pet import load

        data = {"path": str(DATA), "train": 8, "validation": 4}
        backbone = {"name": "pet", "hyperparameters": {**TINY, "atomic_types": [1, 5, 6, 8]}}
        found = train(recipe(data=data, backbone=backbone, epochs=1), output=tmp_path, progress=False)
        assert list(found.report["composition"]) == ["1", "5", "6", "8"]
        assert load(found.weights).composition.tolist() == list(found.report["composition"].values())
        backbone["hyperparameters"]["atomic_types"] = [1, 6, 9]
        with pytest.raises(InvalidInputError, match=r"expected all species of the data, \[1, 6, 8\], .* without \[8\]"):
            train(recipe(data=data, backbone=backbone), output=tmp_path / "b", progress=False)

    def test_another_seed_is_another_run(self, finished, tmp_path):
        other = train(recipe(seed=1, epochs=1), output=tmp_path, progress=False)
        assert other.errors["validation"].forces_mae != finished.errors["validation"].forces_mae
