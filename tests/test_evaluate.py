"""Evaluation of files: batches, parts, interruption, several devices."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read, write
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from symmetrize.cli import main
from symmetrize.errors import InvalidInputError, MissingDependencyError
from symmetrize.evaluate import evaluate_file
from symmetrize.evaluate.batches import make_batches, share_out
from symmetrize.evaluate.job import Job
from symmetrize.evaluate.parts import Part, Parts, Prediction, key_of
from symmetrize.testing.structures.geometries import crystal, ethanol

BACKBONE = "toy:local"
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def mixed(n: int = 8) -> list[Atoms]:
    """Finite and periodic structures of 9, 2, 3, 9, ... atoms."""
    rng = np.random.default_rng(0)
    kinds = [
        ethanol(),
        crystal("C", "diamond", 3.6, rattle=0.1),
        Atoms("HCO", [[0, 0, 0], [1.1, 0, 0], [1.8, 1.0, 0]]),
    ]
    items = []
    for k in range(n):
        atoms = kinds[k % 3].copy()
        atoms.positions += 0.05 * rng.normal(size=(len(atoms), 3))
        items.append(atoms)
    return items


def quiet(path, **options) -> list[Atoms]:
    return evaluate_file(path, **{"backbone": BACKBONE, "echo": lambda line: None, **options})


def assert_same(found: list[Atoms], expected: list[Atoms]) -> None:
    """The same structures in the same order, with the same predictions to rounding."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a.positions, b.positions, rtol=0, atol=1e-7) and (a.numbers == b.numbers).all()
        assert abs(a.get_potential_energy() - b.get_potential_energy()) < 1e-7
        assert np.allclose(a.get_forces(), b.get_forces(), rtol=0, atol=1e-7)


def interrupt(monkeypatch, after: int) -> list[list[int]]:
    """Make the next evaluation end after some batches; the list holds what is evaluated from then on."""
    seen: list[list[int]] = []
    plain = Job.predict

    def predict(job, model, members, device):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(list(members))
        return plain(job, model, members, device)

    monkeypatch.setattr(Job, "predict", predict)
    return seen


def hidden(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mixed.xyz"
    write(path, mixed(), format="extxyz")
    return path


# --- batches --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 60), st.integers(1, 7))
def test_every_structure_is_in_one_batch_of_one_device(sizes, structures, atoms, n_ranks):
    batches = make_batches(sizes, structures, atoms, n_ranks=n_ranks)
    assert [n for batch in batches for n in batch] == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) <= structures
        assert len(batch) == 1 or sum(sizes[n] for n in batch) <= atoms
    shares = share_out(batches, sizes, n_ranks)
    assert sorted(n for share in shares for batch in share for n in batch) == list(range(len(sizes)))
    if len(sizes) >= n_ranks:
        assert all(shares), "a device is idle"


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(2, 7))
def test_devices_are_loaded_evenly(sizes, structures, n_ranks):
    """Nobody has more than the others by more than one batch."""
    batches = make_batches(sizes, structures, 10**9, n_ranks=n_ranks)
    costs = [sum(sizes[n] for n in batch) for batch in batches]
    loads = [sum(sizes[n] for batch in share for n in batch) for share in share_out(batches, sizes, n_ranks)]
    assert max(loads) - min(loads) <= max(costs)


def test_dealing_batches_out_in_turn_is_less_even():
    sizes = [100, 1, 100, 1, 100, 1, 100, 1]
    batches = make_batches(sizes, 1, 100, n_ranks=2)
    loads = [sum(sizes[n] for batch in share for n in batch) for share in share_out(batches, sizes, 2)]
    assert loads == [202, 202] and sum(sizes[0::2]) == 400


def test_some_members_only():
    assert make_batches([5, 5, 5, 50, 5], 2, 20, members=[0, 2, 3, 4]) == [[0, 2], [3], [4]]


def test_the_size_of_batches_does_not_matter(file):
    expected = quiet(file)
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"max_atoms": 12}, {"max_atoms": 1}):
        assert_same(quiet(file, **options), expected)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_parts_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    parts = Parts(tmp_path / "parts")
    written = {}
    for n in range(3):
        predictions = {
            f"{n}-{k}": Prediction(rng.normal(), rng.normal(size=(k + n + 1, 3)), rng.normal(size=(3, 3)), rng.normal())
            for k in range(n + 1)
        }
        parts.write(Part(predictions, 0.5))
        written |= predictions
    parts.write(Part({"alone": Prediction(1.0)}, 0.5))
    found = parts.read()
    assert found.seconds == 2.0 and found.predictions.keys() == written.keys() | {"alone"}
    for key, expected in written.items():
        got = found.predictions[key]
        assert (got.energy, got.energy_spread) == (expected.energy, expected.energy_spread)
        assert np.array_equal(got.forces, expected.forces) and np.array_equal(got.stress, expected.stress)
    assert found.predictions["alone"] == Prediction(1.0)


def test_keys_see_what_predictions_depend_on():
    plain = ethanol()
    variants = [plain.copy() for _ in range(7)]
    variants[0].positions[3, 1] = np.nextafter(variants[0].positions[3, 1], 9.0)
    variants[1].numbers[8] = 9
    variants[2].cell = [9.0, 9.0, 9.0]
    variants[3].pbc = True
    variants[4].info["charge"] = 1
    variants[5].set_initial_charges(np.full(9, 0.1))
    variants[6].info["spin"] = 3
    assert len({key_of(atoms) for atoms in [plain, *variants]}) == 8
    plain.info["name"] = "in another file"
    assert key_of(plain) == key_of(ethanol())


def test_equal_structures_are_evaluated_once(tmp_path, monkeypatch):
    items = mixed(3)
    write(tmp_path / "twice.xyz", [*items, *items[::-1]], format="extxyz")
    with monkeypatch.context() as patch:
        seen = interrupt(patch, after=99)
        found = quiet(tmp_path / "twice.xyz")
    assert seen == [[0, 1, 2]] and len(found) == 6
    assert_same(found[3:], found[2::-1])


# --- interruption ---------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(file, tmp_path, monkeypatch):
    expected = quiet(file, spread=True)
    output = tmp_path / "out" / "predicted.xyz"
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            quiet(file, output=output, batch_size=2, spread=True)
    assert not output.exists() and hidden(output.parent) == [".predicted.xyz.parts"]
    lines: list[str] = []
    with monkeypatch.context() as patch:
        seen = interrupt(patch, after=99)
        found = quiet(file, output=output, batch_size=3, spread=True, echo=lines.append)
    assert seen == [[4, 5, 6], [7]] and lines[0] == "4 of 8 structures were finished before"
    assert_same(found, expected)
    assert_same(read(output, ":"), expected)
    assert hidden(output.parent) == []


def test_structures_may_change_their_places_in_between(tmp_path, monkeypatch):
    items, output, path = mixed(), tmp_path / "predicted.xyz", tmp_path / "file.xyz"
    write(path, items, format="extxyz")
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            quiet(path, output=output, batch_size=4)
    write(path, items[::-1], format="extxyz")
    expected = quiet(path)
    with monkeypatch.context() as patch:
        seen = interrupt(patch, after=99)
        assert_same(quiet(path, output=output), expected)
    assert seen == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "options, name",
    [({"group": "SO(3)"}, "group"), ({"forces": False}, "forces"), ({"dtype": "float32"}, "dtype")],
)
def test_parts_of_another_evaluation_are_refused(file, tmp_path, monkeypatch, options, name):
    output = tmp_path / "predicted.xyz"
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            quiet(file, output=output, batch_size=2)
    with pytest.raises(InvalidInputError, match=f"output: .* parts with {name} = .*--restart"):
        quiet(file, output=output, **options)
    assert hidden(tmp_path) == [".predicted.xyz.parts"], "nothing is lost"
    found = quiet(file, output=output, restart=True, **options)
    assert [a.get_potential_energy() for a in found] == [a.get_potential_energy() for a in quiet(file, **options)]


def test_other_weights_are_another_evaluation(file):
    job = Job(mixed(1), ["0"], BACKBONE, None, None, True, False, False, "float64")
    one, other = job.build(), job.build()
    assert job.describe(one) == job.describe(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-12
    assert job.describe(one) != job.describe(other)


# --- structures that fail -------------------------------------------------------------------------------------------


def test_a_bad_structure_is_called_by_its_number_in_the_file(tmp_path):
    path, output = tmp_path / "bad.xyz", tmp_path / "predicted.xyz"
    items = mixed(7)
    items[5] = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0]])
    write(path, items, format="extxyz")
    for batch_size in (32, 6, 4, 1):
        with pytest.raises(InvalidInputError, match="structure 5"):
            quiet(path, output=output, batch_size=batch_size)
        assert not output.exists()
        assert bool(hidden(tmp_path)) == (batch_size < 6), "what is finished is kept, and nothing else"
    del items[5]
    write(path, items, format="extxyz")
    assert_same(quiet(path, output=output), quiet(path))
    assert hidden(tmp_path) == []


def test_errors_without_a_number_get_one(monkeypatch):
    def fail(job, model, members, device):
        if 3 in members:
            raise InvalidInputError("field: expected another value")

    monkeypatch.setattr(Job, "_predict", fail)
    job = Job([], [], BACKBONE, None, None, True, False, False, "float64")
    with pytest.raises(InvalidInputError, match=r"^structure 3: field: expected"):
        job.predict(None, [1, 2, 3], None)
    assert job.predict(None, [1, 2], None) is None


# --- several devices ------------------------------------------------------------------------------------------------


def test_two_processes_give_what_one_gives(file, tmp_path):
    """The strategy of which the user's command is repeated, as it is used: by the command line."""
    pytest.importorskip("lightning", reason="several devices need lightning")
    output = tmp_path / "predicted.xyz"
    code = "import sys; from symmetrize.cli import main; main()"
    script = tmp_path / "symmetrize"
    script.write_text(code)
    command = [sys.executable, script, "evaluate", file, "--backbone", BACKBONE, "--batch-size", "3"]
    done = subprocess.run([*command, "--devices", "2", "--output", output], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "on 2 devices" in done.stdout and len(done.stdout.splitlines()) == 3, done.stdout
    found, expected = read(output, ":"), quiet(file)
    assert_same(found, expected)
    assert hidden(tmp_path) == []
    swapped = [expected[3], *expected[1:3], expected[0], *expected[4:]]  # both are ethanol
    with pytest.raises(AssertionError):
        assert_same(found, swapped)


def test_more_processes_than_structures_of_which_one_fails(tmp_path):
    pytest.importorskip("lightning", reason="several devices need lightning")
    path, output = tmp_path / "bad.xyz", tmp_path / "predicted.xyz"
    items = [ethanol(), Atoms("H2", positions=[[0, 0, 0], [0, 0, 0]])]
    write(path, items, format="extxyz")
    with pytest.raises(InvalidInputError, match="structure 1"):
        quiet(path, output=output, devices=3, strategy="ddp_spawn")
    assert not output.exists()


def one_process(path, tmp_path, accelerator: str = "cpu") -> Parts:
    """Through Lightning, without the price of starting processes."""
    from symmetrize.evaluate.lit import predict_on_devices

    frames = read(path, ":")
    job = Job(frames, [key_of(a) for a in frames], BACKBONE, None, None, True, False, False, "float64")
    parts = Parts(tmp_path / "parts")
    batches = make_batches([len(a) for a in frames], 3, 99)
    devices = 1 if accelerator == "cpu" else [0]
    predict_on_devices(job, parts, [batches], accelerator=accelerator, devices=devices, strategy="auto")
    return parts


def test_lightning_evaluates_in_the_order_of_the_file(file, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="several devices need lightning")
    expected = quiet(file)

    def energies(parts):
        found = parts.read().predictions
        return [found[key_of(atoms)].energy for atoms in read(file, ":")]

    right = [a.get_potential_energy() for a in expected]
    assert np.allclose(energies(one_process(file, tmp_path)), right, rtol=0, atol=1e-10)
    plain = Job._predict

    def reversed_rows(job, model, members, device):
        part = plain(job, model, members, device)
        return Part(dict(zip(part.predictions, reversed(part.predictions.values()), strict=True)), 0.0)

    monkeypatch.setattr(Job, "_predict", reversed_rows)
    assert not np.allclose(energies(one_process(file, tmp_path)), right, rtol=0, atol=1e-3), "the test sees no order"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_what_the_cpu_gives(file, tmp_path):
    expected = quiet(file)
    assert_same(quiet(file, device="cuda"), expected)
    assert_same(quiet(file, device="cuda", devices="0,"), expected)
    pytest.importorskip("lightning", reason="several devices need lightning")
    found = one_process(file, tmp_path, "cuda").read().predictions
    for atoms, right in zip(read(file, ":"), expected, strict=True):
        assert abs(found[key_of(atoms)].energy - right.get_potential_energy()) < 1e-7


def test_a_failure_stops_what_comes_after_it(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="several devices need lightning")
    path = tmp_path / "bad.xyz"
    items = mixed(9)
    items[4] = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0]])
    write(path, items, format="extxyz")
    seen = interrupt(monkeypatch, after=99)
    failure = one_process(path, tmp_path).failure
    assert isinstance(failure, InvalidInputError) and "structure 4" in str(failure)
    assert seen == [[0, 1, 2], [3, 4, 5]]


def test_one_device_needs_no_lightning(file, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "symmetrize.evaluate.lit", raising=False)
    assert len(quiet(file, devices=1)) == 8
    with pytest.raises(MissingDependencyError, match=r"pip install 'torch-symmetrize\[train\]'"):
        quiet(file, devices=2)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--devices", "0"], "devices: expected a number, 'auto' or a list"),
        (["--devices", "two"], "devices: expected a number, 'auto' or a list"),
        (["--devices", "0,1"], "expected a number of processes for the CPU"),
        (["--device", "cpu:1", "--devices", "2"], "expected 'cpu', 'cuda' or 'auto'"),
        (["--device", "nothing"], "device: 'nothing' is not available"),
    ],
)
def test_unusable_devices_are_one_line(file, options, words):
    result = CliRunner().invoke(main, ["evaluate", str(file), "--backbone", BACKBONE, *options])
    assert result.exit_code == 1 and words in result.output and len(result.output.splitlines()) == 1, result.output


def test_devices_have_several_names(file):
    expected = quiet(file)
    for options in ({"devices": "1"}, {"devices": "auto"}, {"device": "cpu:0"}):
        assert_same(quiet(file, **options), expected)
