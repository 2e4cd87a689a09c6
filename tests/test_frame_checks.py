"""The checks of frames and of backbones find what they are for, in planted faults, and nothing where there is none."""

from dataclasses import fields, replace

import pytest
import torch
from faults import Pairwise
from symmetrize.backbones.toy import ToyLocal
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import ECSE, FrameSet, Identity, OutputSpec, Symmetrizer, keys
from symmetrize.data import replace as replace_fields
from symmetrize.ops.ragged import segment_sum
from symmetrize.testing.running.profile import PROFILES
from symmetrize.testing.running.runner import run
from symmetrize.testing.subjects.subject import of_backbone, of_symmetrizer

SMALL = replace(PROFILES["quick"], n_structures=2, paths=("exchange of nearest neighbors", "pair crosses the cutoff"))
FRAME_CHECKS = (
    *("frame_equivariance", "frame_permutation", "frame_weights"),
    *("frame_conditioning", "frame_continuity", "frame_statistics"),
)
BACKBONE_CHECKS = ("locality", "center_rows", "shared_work")


def changed(found: FrameSet, **values: Tensor) -> FrameSet:
    return FrameSet(**{**{f.name: getattr(found, f.name) for f in fields(found)}, **values})


class Faulty(ECSE):
    """ECSE whose frames are changed."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def frames(self, batch, **options):
        return self.change(super().frames(batch, **options))


def hard(found):
    best = torch.zeros(found.n_owners, dtype=torch.float64).scatter_reduce(0, found.owner, found.weights, "amax")
    return changed(found, weights=(found.weights >= best[found.owner] * (1 - 1e-9)).to(torch.float64))


def lab(found):
    return changed(found, rotations=torch.eye(3, dtype=torch.float64).expand(found.n_frames, 3, 3).clone())


def by_index(found):
    first = torch.zeros(found.n_owners, dtype=torch.int64).scatter_reduce(
        0, found.owner, torch.arange(found.n_frames), "amin", include_self=False
    )
    return changed(found, weights=found.weights * (1.0 + 0.3 * (torch.arange(found.n_frames) - first[found.owner])))


def vanishing(found):
    return changed(found, weights=1e-7 * found.weights)


def check_frames(method):
    backbone = ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=4.0)
    return run(of_symmetrizer(Symmetrizer(backbone, method)), profile=SMALL, only=FRAME_CHECKS)


def test_the_frames_of_ecse_pass_in_both_scopes():
    assert check_frames(ECSE()).ok
    model = Symmetrizer(ToyLocal({"energy": OutputSpec("0e", reduce="sum")}), ECSE(), scope="structure", group="SO(3)")
    report = run(of_symmetrizer(model), profile=SMALL, only=FRAME_CHECKS)
    assert report.ok, str(report)


def test_a_model_in_float32_is_measured_in_float64():
    model = Symmetrizer(ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=4.0).float(), ECSE())
    report = run(of_symmetrizer(model), profile=SMALL, only=[*FRAME_CHECKS, "rotation_equivariance", "exactness"])
    assert report.subject["dtype"] == "float32" and report.ok, str(report)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Faulty(hard), {"frame_continuity"}),
        (Faulty(lab), {"frame_equivariance"}),
        (Faulty(by_index), {"frame_permutation"}),
        (Faulty(vanishing), {"frame_weights"}),
        # The switch from collinear to full weight happens within a millionth of a radian.
        (ECSE(collinearity_width=1e-12), {"frame_conditioning"}),
    ],
    ids=["hard choice", "lab frame", "weights by index", "vanishing weights", "ill-defined frame"],
)
def test_a_fault_of_frames_is_caught(method, expected):
    report = check_frames(method)
    found = report.failed_checks()
    assert expected <= found, str(report)
    # Steep weights may look like jumps; a set that depends on the index is not the same set in another orientation.
    related = {"frame_continuity"} if expected != {"frame_weights"} else set()
    assert found <= expected | related | {"frame_equivariance", "frame_permutation"}, str(report)


def test_statistics_are_recorded_and_a_bare_model_has_none():
    report = check_frames(ECSE())
    numbers = {f.quantity: f.number for f in report["frame_statistics[generic]"].outcome.findings}
    assert 1.0 <= numbers["evaluations per atom, mean"] <= numbers["evaluations per atom, largest"]
    bare = run(
        of_symmetrizer(Symmetrizer(ToyLocal({"energy": OutputSpec("0e", reduce="sum")}), Identity())),
        profile=SMALL,
        only=FRAME_CHECKS,
    )
    assert {r.verdict.value for r in bare.results} == {"skipped"}


def without_mask(batch):
    return replace_fields(batch, **{keys.CENTER_MASK: None})


class Nonlocal(Pairwise):
    def forward(self, batch):
        out = super().forward(without_mask(batch))
        total = segment_sum(out["energy"], batch[keys.BATCH], len(batch[keys.PTR]) - 1)
        out["vector"] = out["vector"] * (1.0 + 0.1 * torch.sin(total))[batch[keys.BATCH], None]
        mask = batch.get(keys.CENTER_MASK)
        return out if mask is None else {name: value[mask] for name, value in out.items()}


class Unmasked(Pairwise):
    def forward(self, batch):
        mask = batch.get(keys.CENTER_MASK)
        out = super().forward(without_mask(batch))
        # As many rows as wanted, of the wrong atoms.
        return out if mask is None else {name: value[: int(mask.sum())] for name, value in out.items()}


class Sharing(Pairwise):
    """Shares what does not depend on orientation, or more than that."""

    shares_work = True

    def __init__(self, too_much: bool) -> None:
        super().__init__()
        self.too_much = too_much

    def prepare(self, batch):
        out = super().forward(batch)
        cache = {"energy": out["energy"]}
        if self.too_much:
            return {**cache, **out}
        return {**cache, "z": batch[keys.Z], "edge_index": batch[keys.EDGE_INDEX], "pos": batch[keys.POS]}

    def forward_frames(self, cache, edge_vec, copies=None):
        if self.too_much:
            return dict(cache)
        # A distance-only network: all of it could be shared, the vectors are made anew.
        batch = Data(pos=cache["pos"], z=cache["z"], edge_index=cache["edge_index"], edge_vec=edge_vec)
        return super().forward(batch)


@pytest.mark.parametrize(
    ("backbone", "failing"),
    [
        (Pairwise(), set()),
        (Nonlocal(), {"locality"}),
        (Unmasked(), {"center_rows"}),
        (Sharing(too_much=False), set()),
        (Sharing(too_much=True), {"shared_work"}),
    ],
    ids=["sound", "nonlocal", "mask not read", "shared", "shared too much"],
)
def test_promises_of_backbones(backbone, failing):
    report = run(of_backbone(backbone), profile=SMALL, only=BACKBONE_CHECKS)
    assert report.failed_checks() == failing, str(report)


def test_a_receptive_field_that_is_too_small_is_found():
    honest = ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=3.0, n_hops=2)
    assert run(of_backbone(honest), profile=SMALL, only=["locality"]).ok
    honest.receptive_field = 1
    assert not run(of_backbone(honest), profile=SMALL, only=["locality"]).ok
