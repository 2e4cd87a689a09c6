"""Training through the symmetrisation: recipes, steps, reproducible draws, resumption, starting from weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from symmetrize.backbones.pet import load

from symmetrize import keys
from symmetrize.training import RecipeError, load_recipe, train
from symmetrize.training import drawn as module
from symmetrize.training.config import BackboneRecipe, DataRecipe, SymmetrizeRecipe
from symmetrize.training.dataset import augment, generator_for, read_structures, tabulate
from symmetrize.training.drawn import DrawnFrames
from symmetrize.training.lit import TrainingModule
from symmetrize.training.models import build_backbone, energy_reference, load_start
from symmetrize.training.symmetrized import (
    evaluate_symmetrized,
    make_method,
    make_symmetrizer,
    sampled_energy_and_forces,
    symmetrized_energy_and_forces,
)

DATA = Path(__file__).parents[1] / "symmetrize" / "demo" / "data" / "ethanol-test.xyz"
TINY = {
    "cutoff": 3.0,
    "d_pet": 8,
    "d_node": 8,
    "d_head": 8,
    "d_feedforward": 8,
    "num_heads": 2,
    "num_attention_layers": 1,
}
LOCAL, DEEP = {**TINY}, {**TINY, "num_gnn_layers": 2}

# Where the suite turns warnings into errors: advice of Lightning's about its own settings is not ours to act on.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def recipe(**changes):
    content = {
        "data": {"path": str(DATA), "train": 12, "validation": 6},
        "backbone": {"name": "pet", "hyperparameters": LOCAL},
        "optimizer": {"lr": 2e-3},
        "loss": {"kind": "norm"},
        "symmetrize": {},
        "epochs": 4,
        "batch_size": 4,
        "ema": 0.9,
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    content.update(changes)
    return content


def tiny(hyperparameters=LOCAL, seed=0):
    return build_backbone(BackboneRecipe("pet", hyperparameters), (1, 6, 8), seed).double()


@pytest.fixture(scope="module")
def table():
    return tabulate(read_structures(DataRecipe(str(DATA), train=8, validation=0))[:8], 3.0, "energy", "forces")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(recipe(), output=tmp_path_factory.mktemp("run"), progress=False)


class TestRecipe:
    def test_absent_means_bare(self):
        assert load_recipe(recipe(symmetrize=None)).symmetrize is None
        content = recipe()
        del content["symmetrize"]
        assert load_recipe(content).symmetrize is None and load_recipe(content).start_from is None

    def test_defaults(self):
        found = load_recipe(recipe())
        assert found.symmetrize == SymmetrizeRecipe() and found.symmetrize.frames == "sampled"
        assert load_recipe(found.to_dict()) == found
        assert load_recipe(recipe(), {"symmetrize.scope": "structure"}).symmetrize.scope == "structure"

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"frame": "all"}, "symmetrize.frame: unknown entry; did you mean 'frames'"),
            ({"frames": "sample"}, "symmetrize.frames: unknown value 'sample'; did you mean 'sampled'"),
            ({"method": "esce"}, "symmetrize.method: unknown value 'esce'; did you mean 'ecse'"),
            ({"group": "O3"}, "symmetrize.group: unknown value 'O3'; did you mean 'O(3)'"),
            ({"scope": "atoms"}, "symmetrize.scope: unknown value 'atoms'; did you mean 'atom'"),
            ({"n_samples": 0}, "symmetrize.n_samples: expected a positive number, got 0"),
            ({"score_every": 0}, "symmetrize.score_every: expected a positive number, got 0"),
            ({"n_samples": 1.5}, "symmetrize.n_samples: expected int, got 1.5"),
            ({"frames": "all", "n_samples": 2}, "symmetrize.n_samples: expected frames: sampled"),
            ({"frames": "all", "chunk_size": 0}, "symmetrize.chunk_size: expected a positive number of atoms, got 0"),
            ({"chunk_size": 64}, "symmetrize.chunk_size: expected frames: all"),
            (3, "symmetrize: expected a section, got 3"),
        ],
    )
    def test_errors(self, section, message):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe(symmetrize=section))
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"), [({"width": 1.0}, "'width'"), ({"cutoff_width": -1.0}, "expected a positive number")]
    )
    def test_options(self, options, message):
        with pytest.raises(RecipeError, match=f"symmetrize.options: .*{message}"):
            make_method(SymmetrizeRecipe(options=options))
        assert make_method(SymmetrizeRecipe(options={"cutoff_width": 0.3})).cutoff_width == 0.3


class TestStart:
    def test_shipped_weights(self):
        found = load_start(BackboneRecipe("pet", {"cutoff": 5.0}), "pet:ethanol", (1, 6, 8), 0)
        shipped = load("ethanol")
        assert found.training and all(
            torch.equal(a, b) for a, b in zip(found.state_dict().values(), shipped.state_dict().values(), strict=True)
        )
        composition, scale = energy_reference(found)
        assert torch.equal(composition, shipped.composition.double()) and scale == float(shipped.scale)

    @pytest.mark.parametrize(
        ("backbone", "weights", "message"),
        [
            ({"name": "pet", "hyperparameters": {"cutoff": 4.0}}, "pet:ethanol", "hyperparameters.cutoff: expected"),
            ({"name": "pet"}, "pet:ethanl", "start_from: .*ethanol"),
            ({"name": "pet"}, "gnn:ethanol", "start_from: expected weights of the backbone 'pet'"),
            ({"name": "pet"}, "nowhere/model", "start_from: "),
            ({"name": "symmetrize.backbones.pyg:reference"}, "nowhere/model", "start_from: expected a file"),
        ],
    )
    def test_errors(self, backbone, weights, message):
        if backbone["name"] != "pet":
            pytest.importorskip("symmetrize.backbones.pyg")
        with pytest.raises(RecipeError, match=message):
            load_start(load_recipe(recipe(backbone=backbone)).backbone, weights, (1, 6, 8), 0)

    def test_paths_start_at_the_recipe(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(json.dumps(recipe(start_from="run/model")))
        assert load_recipe(path).start_from == str(tmp_path / "run" / "model")
        path.write_text(json.dumps(recipe(start_from="pet:ethanol-2block")))
        assert load_recipe(path).start_from == "pet:ethanol-2block"

    def test_goes_on_where_a_run_ended(self, finished, tmp_path):
        """With no step to speak of, weights, composition energies and errors are those that it started from."""
        content = recipe(
            start_from=str(finished.weights), backbone={"name": "pet"}, epochs=1, optimizer={"lr": 1e-12}, ema=0.0
        )
        again = train(content, output=tmp_path, progress=False)
        before, after = (load_file(f"{run.weights}.safetensors") for run in (finished, again))
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
        assert again.report["composition"] == pytest.approx(finished.report["composition"], rel=1e-6)
        mine, other = again.errors["validation"].forces_mae, finished.errors["validation"].forces_mae
        assert mine == pytest.approx(other, rel=1e-4)


class TestDrawnFrames:
    def source(self, table, hyperparameters=LOCAL, **changes):
        settings = SymmetrizeRecipe(**changes)
        return DrawnFrames(table, make_symmetrizer(tiny(hyperparameters), settings), settings, (0, 3))

    @pytest.mark.parametrize("hyperparameters", [LOCAL, DEEP])
    def test_depend_on_epoch_and_structure_alone(self, table, hyperparameters, monkeypatch):
        baseline, order = torch.zeros(len(table), dtype=torch.float64), [5, 1, 7, 0, 2, 3, 4, 6]
        at_once = self.source(table, hyperparameters).select(order[:4], torch.float64, baseline, 2, order)
        monkeypatch.setattr(module, "BLOCK", 1)  # nothing ahead
        one_by_one = self.source(table, hyperparameters)
        parts = [one_by_one.select([n], torch.float64, baseline, 2, order[::-1]) for n in order[:4]]
        for name in (module.ROTATION, module.TURN, module.SCORE, module.DIFFERS, module.COMPANION):
            assert torch.allclose(at_once[name].double(), torch.cat([p[name].double() for p in parts]), atol=1e-12)
        other = self.source(table, hyperparameters).select(order[:4], torch.float64, baseline, 3, order)
        assert not torch.allclose(other[module.ROTATION], at_once[module.ROTATION])

    def test_samples_are_copies(self, table):
        baseline = torch.zeros(len(table), dtype=torch.float64)
        batch = self.source(table, n_samples=3).select([4, 2], torch.float64, baseline, 0, [4, 2])
        n_atoms = 2 * 9
        assert batch[keys.PTR].shape[0] - 1 == 6 and batch[module.ROTATION].shape[0] == 3 * n_atoms
        assert torch.equal(batch[keys.POS][:n_atoms], batch[keys.POS][n_atoms : 2 * n_atoms])
        assert not torch.allclose(batch[module.ROTATION][:n_atoms], batch[module.ROTATION][n_atoms : 2 * n_atoms])

    @pytest.mark.parametrize(("hyperparameters", "scope"), [(LOCAL, "atom"), (DEEP, "structure")])
    @pytest.mark.parametrize("n_samples", [1, 2])
    def test_mean_of_many_draws(self, table, hyperparameters, scope, n_samples):
        """Once more, with the whole machinery: within five standard errors of the average (tests/test_sampled.py
        has the exact statement)."""
        backbone, baseline, n = tiny(hyperparameters), torch.zeros(len(table), dtype=torch.float64), 20
        settings = SymmetrizeRecipe(n_samples=n_samples)
        model = make_symmetrizer(backbone, settings)
        source = DrawnFrames(table, model, settings, (0, 3))
        found = []
        for epoch in range(n):
            batch = source.select([0, 1], torch.float64, baseline, epoch, [0, 1])
            energy, forces = sampled_energy_and_forces(backbone, batch, scope, n_samples, create_graph=False)
            found.append(torch.cat([energy.detach(), forces.reshape(-1)]))
        samples = torch.stack(found)
        assert model.scope == scope
        plain = table.select(torch.tensor([0, 1]), torch.float64)
        exact = torch.cat([v.reshape(-1) for v in symmetrized_energy_and_forces(model, plain, create_graph=False)])
        deviation = (samples.mean(dim=0) - exact).square().mean().sqrt()
        expected = (samples.var(dim=0) / n).mean().sqrt()
        assert float(expected) > 1e-6  # the draws differ
        assert float(deviation) < 5 * float(expected)


class TestSteps:
    def step(self, table, monkeypatch, backbone=None, turned=False, **section):
        settings = load_recipe(recipe(symmetrize=section, dtype="float64"))
        found = TrainingModule(backbone or tiny(), settings, 1.0)
        monkeypatch.setattr(found, "log", lambda *_, **__: None)
        monkeypatch.setattr(TrainingModule, "current_epoch", 0)
        monkeypatch.setattr(TrainingModule, "global_rank", 0)
        batch = table.select(torch.arange(3), torch.float64)
        if turned:
            batch = augment(batch, generator_for(4))
        loss = found.training_step(batch, 0)
        loss.backward()
        return float(loss.detach()), [p.grad for p in found.backbone.parameters()]

    def test_all_frames_see_no_orientation(self, table, monkeypatch):
        first, gradients = self.step(table, monkeypatch, frames="all")
        second, again = self.step(table, monkeypatch, frames="all", turned=True)
        assert first == pytest.approx(second, rel=1e-11)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(gradients, again, strict=True))

    def test_chunks_bound_what_is_evaluated_at_once(self, table, monkeypatch):
        backbone, rows = tiny(), []
        whole, gradients = self.step(table, monkeypatch, frames="all", chunk_size=10**9)
        inner = type(backbone).forward_frames

        def counting(self, cache, edge_vec, copies=None):
            rows.append(copies.atom.shape[0])
            return inner(self, cache, edge_vec, copies)

        monkeypatch.setattr(type(backbone), "forward_frames", counting)
        parts, again = self.step(table, monkeypatch, backbone, frames="all", chunk_size=16)
        assert max(rows) <= 16 and sum(rows) > 100
        assert whole == pytest.approx(parts, rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(gradients, again, strict=True))

    def test_deep_networks_in_atom_scope(self, table, monkeypatch):
        """They need copies of environments: the evaluator makes them."""
        loss, gradients = self.step(table, monkeypatch, tiny(DEEP), scope="atom", n_samples=2)
        again, _ = self.step(table, monkeypatch, tiny(DEEP), scope="atom", n_samples=2)
        assert np.isfinite(loss) and loss == again and all(g is not None for g in gradients)


class TestRuns:
    def test_what_is_written(self, finished):
        rows = np.genfromtxt(next(finished.folder.glob("logs/*/metrics.csv")), delimiter=",", names=True)
        for name in ("spread_energy", "spread_forces", "share_energy", "share_forces"):
            values = rows[f"validationorientation_{name}"]
            assert bool((values[np.isfinite(values)] > 0).all()) and bool(np.isfinite(values).any())
        assert bool((rows["validationorientation_share_forces"][np.isfinite(values)] < 1).all())
        # The bare backbone, in the format of bare training.
        assert load_file(f"{finished.weights}.safetensors").keys() == tiny().state_dict().keys()
        assert finished.report["orientation"].startswith("any")
        bare = finished.report["errors_bare"]["validation"]["forces_mae"]
        assert bare != finished.errors["validation"].forces_mae
        backbone, again = load(finished.weights), finished.errors["validation"]
        found = evaluate_symmetrized(backbone, *self.validation(backbone), SymmetrizeRecipe())
        assert found.forces_mae == pytest.approx(again.forces_mae, rel=1e-4)

    @staticmethod
    def validation(backbone):
        from symmetrize.training.composition import baseline_of
        from symmetrize.training.dataset import gather

        settings = load_recipe(recipe()).data
        rows, parts, _ = gather(read_structures(settings), backbone.cutoff, settings)
        return rows, parts.validation, baseline_of(rows, backbone.composition, (1, 6, 8))

    def test_loss_decreases(self, finished):
        rows = np.genfromtxt(next(finished.folder.glob("logs/*/metrics.csv")), delimiter=",", names=True)
        loss = rows["trainloss"][np.isfinite(rows["trainloss"])]
        assert len(loss) == 4 and loss[-1] < loss[0]

    @pytest.mark.parametrize(
        ("hyperparameters", "section"), [(LOCAL, {}), (DEEP, {"n_samples": 2}), (LOCAL, {"frames": "all"})]
    )
    def test_resumed_run_is_the_same(self, hyperparameters, section, tmp_path, monkeypatch):
        content = recipe(symmetrize=section, backbone={"name": "pet", "hyperparameters": hyperparameters}, epochs=3)
        step = TrainingModule.training_step

        def stop(self, batch, batch_idx):
            if self.current_epoch == 2 and batch_idx == 1:
                raise InterruptedError
            return step(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "training_step", stop)
            with pytest.raises(InterruptedError):
                train(content, output=tmp_path / "a", progress=False)
        resumed = train(content, output=tmp_path / "a", progress=False)
        direct = train(content, output=tmp_path / "b", progress=False)
        first, second = (load_file(f"{run.weights}.safetensors") for run in (resumed, direct))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_another_section_is_another_run(self, finished):
        with pytest.raises(RecipeError, match=r"symmetrize\.frames = 'sampled', got 'all'"):
            train(recipe(symmetrize={"frames": "all"}), output=finished.folder, progress=False)
