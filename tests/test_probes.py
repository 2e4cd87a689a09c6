"""Every wrong declaration is found when it is made, and the message says what to declare instead."""

from __future__ import annotations

import warnings

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from torch import nn
from torch_geometric.nn import global_add_pool

from symmetrize import from_points, keys
from symmetrize.data import replace
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError
from symmetrize.representations import OutputSpec
from symmetrize.wrapping import Wrapped, wrap
from symmetrize.wrapping.probes import ProbeWarning, probe_backbone
from symmetrize.wrapping.trials import ProbeFailure, synthetic_batch

DIPOLE = {"dipole": OutputSpec("1o", per="structure")}
FORCES = {"v": OutputSpec("1o")}
ENERGY = {"energy": OutputSpec("0e", per="structure")}
SINGLE = dict(layout="single", center="centroid")


@pytest.fixture(autouse=True)
def seeded():
    """Parameters of torch's layers come from the global generator."""
    torch.manual_seed(1)


def cubes(pos):
    return (pos**3).sum(0)


def padded_sum(pos, mask):
    return ((torch.tanh(pos) + 0.3) * mask[..., None]).sum(1)


def messages(edge_index, edge_vec, n):
    return torch.zeros(n, 3, dtype=edge_vec.dtype).index_add(0, edge_index[1], edge_vec**3)


def two_hops(z, edge_index, edge_vec):
    first = messages(edge_index, edge_vec, len(z))
    return torch.zeros_like(first).index_add(0, edge_index[1], first[edge_index[0]] * edge_vec)


def degrees(edge_index, edge_vec, z):
    """One hop, but for the number of neighbors of the neighbors, as in graph convolutions."""
    degree = torch.bincount(edge_index[1], minlength=len(z))
    return messages(edge_index, edge_vec / (1 + degree[edge_index[0]])[:, None], len(z))


class Broken(nn.Module):
    """A network with one fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0
        self.linear = nn.Linear(3, 3).double()
        self.species = nn.Embedding(3, 3).double()
        self.normalize = nn.BatchNorm1d(3).double()

    def forward(self, pos, batch, z=None):
        if self.fault == "in place":
            pos -= pos.mean(0)
        rows = self.linear(pos) ** 3
        if self.fault == "nan":
            rows = rows.log()
        elif self.fault == "dropout":
            rows = torch.nn.functional.dropout(rows, 0.5)
        elif self.fault == "state":
            self.calls += 1
            rows = rows * self.calls
        elif self.fault == "order":
            rows = rows * torch.arange(len(rows))[:, None]
        elif self.fault == "whole batch":
            rows = rows + rows.mean(0)
        elif self.fault == "integers":
            rows = rows.round().long()
        elif self.fault == "species":
            rows = rows + self.species(z)
        elif self.fault == "float":
            rows = rows.float()
        elif self.fault == "normalization":
            rows = self.normalize(rows)
        elif self.fault == "constant":
            rows = torch.ones_like(rows)
        return rows


#: Fault -> (what is wrapped, what the message says).
FAULTS = {
    "not translation invariant": (
        lambda: wrap(cubes, DIPOLE, layout="single"),
        r"translation: output 'dipole'.*got a change of [\d.e+]+ where its size.*Tried: with center='centroid' all",
    ),
    "per structure, but rows of atoms": (
        lambda: wrap(lambda pos: pos**3, DIPOLE, **SINGLE),
        r"expected shape \(3,\) \(one row per structure\), got \(7, 3\); that is one row per atom: declare per='atom'",
    ),
    "per atom, but one row": (
        lambda: wrap(cubes, FORCES, **SINGLE),
        r"expected shape \(7, 3\).*got \(3,\).*declare per='structure'.*Tried: with per='structure'",
    ),
    "wrong number of components": (
        lambda: wrap(cubes, {"q": OutputSpec("2e", per="structure")}, **SINGLE),
        r"output 'q' \(1x2e per structure\): expected shape \(5,\).*got \(3,\).*called with pos: float64 \(7, 3\)",
    ),
    "one result for the whole batch": (
        lambda: wrap(lambda pos, batch: pos.sum(0), DIPOLE),
        r"got \(3,\); that is one result for the whole batch: layout='single'",
    ),
    "mask of the opposite meaning": (
        lambda: wrap(padded_sum, DIPOLE, layout="padded", center="centroid", inputs={"mask": "padding_mask"}),
        r"batch: .*\(4 of \[7, 4, 6\] atoms\) alone.*opposite meaning.*Tried: with inputs=\{'mask': 'mask'\}",
    ),
    "mask ignored": (
        lambda: wrap(lambda pos, mask: torch.cos(pos).sum(1), DIPOLE, layout="padded", center="centroid"),
        r"batch: .*padding that the module takes for points.*Tried: with layout='dense'",
    ),
    "no mask": (
        lambda: wrap(lambda pos: torch.cos(pos).sum(1), DIPOLE, layout="padded", center="centroid"),
        r"layout='padded': none of the arguments takes a mask.*layout='dense'",
    ),
    "channels last, but first is wanted": (
        lambda: wrap(nn.Conv1d(3, 3, 1).double(), FORCES, layout="dense", center="centroid"),
        r"call: .*got RuntimeError: Given groups=1.*Tried: with channels_first=True",
    ),
    "channels first out, but they are last": (
        lambda: wrap(lambda x: x.transpose(1, 2) ** 3, FORCES, layout="dense", center="centroid", channels_first=True),
        r"got \(1, 4, 3\); declare channels_first_out=False",
    ),
    "fewer hops than there are": (
        lambda: wrap(two_hops, FORCES, cutoff=2.5, receptive_field=1),
        r"locality: .*moving what is 2 or more hops.*receptive_field=1.*Tried: with receptive_field=2 all",
    ),
    "neighbors of neighbors are counted": (
        lambda: wrap(degrees, FORCES, cutoff=2.5, receptive_field=1),
        r"locality: .*removing what is further away.*Tried: with receptive_field=2",
    ),
    "gradients of its own": (
        lambda: wrap(lambda pos, batch: pos.requires_grad_() ** 3, FORCES),
        r"mutation: .*'pos' that requires a gradient.*ask the Symmetrizer for forces",
    ),
    "local, but everything is pooled": (
        lambda: wrap(
            lambda edge_index, edge_vec, batch: (
                (m := messages(edge_index, edge_vec, len(batch))) + global_add_pool(m**2, batch)[batch]
            ),
            FORCES,
            cutoff=2.5,
            receptive_field=1,
        ),
        r"locality: .*pooling over the structure.*Tried: with receptive_field=None",
    ),
    "in place": (lambda: wrap(Broken("in place"), FORCES), r"mutation: .*changed field 'pos'.*in place"),
    "nan": (lambda: wrap(Broken("nan"), FORCES), r"output 'v': expected finite values, got \d+ others"),
    "dropout": (lambda: wrap(Broken("dropout"), FORCES), r"determinism: .*dropout that ignores \.eval\(\)"),
    "state": (lambda: wrap(Broken("state"), FORCES), r"determinism: .*state kept between calls"),
    "order": (lambda: wrap(Broken("order"), FORCES, center="centroid"), r"permutation: .*order of its points"),
    "whole batch": (lambda: wrap(Broken("whole batch"), FORCES, center="centroid"), r"batch: .*whole batch instead of"),
    "integers": (lambda: wrap(Broken("integers"), FORCES), r"output 'v': expected floating-point values, got .*int64"),
    "species": (lambda: wrap(Broken("species"), FORCES), r"call: .*IndexError.*species=\(\.\.\.\)"),
    "edges without a cutoff": (
        lambda: wrap(two_hops, FORCES),
        r"argument 'edge_index' \(edge_index\) needs a neighbor list: declare its radius, cutoff=",
    ),
    "edges of padded points": (
        lambda: wrap(two_hops, FORCES, cutoff=2.5, layout="dense"),
        r"argument 'edge_index' .*expected layout='flat' or 'single', got 'dense'",
    ),
    "a mask of flat points": (
        lambda: wrap(padded_sum, DIPOLE),
        r"argument 'mask' .*expected layout='padded', got 'flat'",
    ),
    "flat, but nothing says which atom belongs where": (
        lambda: wrap(cubes, DIPOLE),
        r"layout='flat': a per-structure output.*layout='single'",
    ),
    "unknown argument": (
        lambda: wrap(cubes, DIPOLE, inputs={"poss": "pos"}, **SINGLE),
        r"no argument 'poss', did you mean 'pos'",
    ),
    "no positions": (
        lambda: wrap(lambda a, b: a, FORCES, **SINGLE),
        r"none of the arguments \('a', 'b'\) is known to take positions.*inputs=\{'a': 'pos'\}",
    ),
    "a field that only the batch has": (
        lambda: wrap(lambda pos, charge: pos * charge, FORCES, **SINGLE),
        r"argument 'charge' takes a field 'charge' that only the batch has; expected an example, probe=batch",
    ),
    "features of unknown width": (
        lambda: wrap(lambda pos, x: pos * x, FORCES, **SINGLE),
        r"argument 'x' takes features of unknown width; expected an example, probe=batch",
    ),
    "more values than outputs": (
        lambda: wrap(lambda pos: (cubes(pos), pos), DIPOLE, **SINGLE),
        r"expected 1 values \(dipole\), got 2; say which is which: returns=\{'dipole': 0\}",
    ),
    "no tensor": (lambda: wrap(lambda pos: 0.0, DIPOLE, **SINGLE), r"expected 'dipole' .*got float"),
    "a centroid in a local model": (
        lambda: wrap(two_hops, FORCES, cutoff=2.5, receptive_field=2, center="centroid"),
        r"center: the centroid depends on all atoms, a receptive_field of 2 hops does not",
    ),
    "unknown layout": (lambda: wrap(cubes, DIPOLE, layout="pad"), r"unknown layout 'pad', did you mean 'padded'"),
    "channels first, flat": (lambda: wrap(cubes, DIPOLE, channels_first=True), r"channels_first: expected layout="),
    "a vector called pos": (lambda: wrap(cubes, DIPOLE, vectors={"pos": "1o"}), r"vectors: 'pos' is a field"),
    "returns of an unknown output": (
        lambda: wrap(cubes, DIPOLE, returns={"dipol": 0}, **SINGLE),
        r"returns: unknown output 'dipol', did you mean 'dipole'",
    ),
    "hops without a cutoff": (lambda: wrap(cubes, FORCES, receptive_field=1), r"1 hops need a cutoff"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_declaration_is_found_and_explained(fault):
    make, message = FAULTS[fault]
    with pytest.raises(DeclarationError, match=f"(?s){message}"):
        make()


#: Declaration -> what is wrapped: the same modules declared rightly, which nothing is found about.
RIGHT = {
    "centered": lambda: wrap(cubes, DIPOLE, **SINGLE),
    "masked": lambda: wrap(padded_sum, DIPOLE, layout="padded", center="centroid"),
    "dense": lambda: wrap(lambda pos: torch.cos(pos).sum(1), DIPOLE, layout="dense", center="centroid"),
    "channels": lambda: wrap(nn.Conv1d(3, 3, 1).double(), FORCES, layout="dense", channels_first=True,
                             center="centroid"),
    "hops": lambda: wrap(two_hops, FORCES, cutoff=2.5, receptive_field=2),
    "one hop": lambda: wrap(
        lambda z, edge_index, edge_vec: messages(edge_index, edge_vec, len(z)), FORCES, cutoff=2.5, receptive_field=1
    ),
    "species": lambda: wrap(Broken("species"), FORCES, species=(1, 2), center="centroid"),
    "network": lambda: wrap(Broken(""), FORCES, center="centroid"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_declaration_passes_without_a_word(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIGHT[name]()


@pytest.mark.parametrize(
    "backbone",
    [ToyLocal(n_hops=1), ToyLocal(n_hops=2, outputs=FORCES), ToyGlobal(outputs={**DIPOLE, **FORCES})],
    ids=["local", "two hops", "global"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_backbone_can_be_probed(backbone, dtype):
    backbone = backbone.to(dtype)
    probe_backbone(backbone, synthetic_batch(backbone))
    assert backbone.training


class TooLocal(ToyLocal):
    """Says one hop and does two."""

    def __init__(self):
        super().__init__(n_hops=2, outputs=FORCES)
        self.receptive_field = 1


class AllRows(ToyLocal):
    """Forgets about center_mask."""

    def forward(self, batch):
        return super().forward(replace(batch, **{keys.CENTER_MASK: None}))


def test_faults_of_any_backbone_are_found():
    with pytest.raises(ProbeFailure, match="locality"):
        probe_backbone(TooLocal(), synthetic_batch(TooLocal()))
    with pytest.raises(ProbeFailure, match=r"expected floating-point values of shape \(11,\).* \(17,\)"):
        probe_backbone(AllRows(), synthetic_batch(AllRows()))


#: What may be meant, but rarely is -> (what is wrapped, what the warning says).
DOUBTS = {
    "vector not read": (
        lambda: wrap(cubes, DIPOLE, vectors={"velocity": "1o"}, **SINGLE),
        r"'velocity' is declared, but changing it changes no output",
    ),
    "constant": (lambda: wrap(Broken("constant"), FORCES), r"none depends on the positions"),
    "detached": (
        lambda: wrap(lambda pos: cubes(pos.detach()), DIPOLE, **SINGLE),
        r"no gradient reaches them.*detached.*forces would be zero",
    ),
    "partly detached": (
        lambda: wrap(lambda pos: (pos * pos.detach() ** 2).sum(0), DIPOLE, **SINGLE),
        r"expected a slope of .* as by differences, got .*: wrong forces",
    ),
    "numpy": (
        lambda: wrap(lambda pos: torch.from_numpy(pos.numpy() ** 3).sum(0), DIPOLE, **SINGLE),
        r"gradient: none can be had \(Can't call numpy",
    ),
    "precision": (lambda: wrap(Broken("float"), FORCES, center="centroid"),
                  r"dtype of the positions.*got torch.float32"),
    "batch normalization": (
        lambda: wrap(Broken("normalization").train(), FORCES, center="centroid"),
        r"training mode, where its outputs are different from those in evaluation mode.*\.eval\(\)",
    ),
    "dropout in training mode": (
        lambda: wrap(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double(), FORCES, **SINGLE),
        r"training mode, where its outputs are random",
    ),
    "no second derivatives": (
        lambda: wrap(
            lambda points: nn.functional.scaled_dot_product_attention(*[points[:, None]] * 3).square().sum((1, 2, 3)),
            ENERGY,
            layout="dense",
            center="centroid",
            inputs={"points": lambda b: torch.sin(b.pos @ torch.ones(3, 8, dtype=b.pos.dtype))},
        ),
        r"no second derivatives.*math_attention=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_is_probably_not_meant_is_warned_about(doubt):
    make, message = DOUBTS[doubt]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    found = [w for w in seen if issubclass(w.category, ProbeWarning)]
    assert len(found) == 1
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        raise AssertionError(str(found[0].message))


def test_training_mode_leaves_statistics_alone():
    net = Broken("normalization").train()
    before = net.normalize.running_mean.clone()
    with pytest.warns(ProbeWarning):
        wrap(net, FORCES, center="centroid")
    assert torch.equal(net.normalize.running_mean, before) and net.normalize.training


def test_an_example_gives_what_random_clusters_lack():
    batch = from_points(torch.randn(8, 3, dtype=torch.float64), x=torch.rand(8, 2, dtype=torch.float64))
    outputs, options = {"v": OutputSpec("1o")}, dict(layout="single", center="centroid")
    wrap(lambda pos, x: pos**3 * x[:, :1], outputs, probe=batch, **options)
    with pytest.raises(ProbeFailure, match="permutation"):
        wrap(lambda pos, x: pos**3 * x[:1, :1], outputs, probe=batch, **options)
    # A wrong precision of the example is told as such.
    with pytest.raises(InvalidTypeError, match=r"expected the dtype .*float32.* got .*float64"):
        wrap(nn.Linear(3, 3), outputs, probe=batch, **options)
    with pytest.raises(InvalidInputError, match="probe: expected a structure with two or more atoms"):
        wrap(cubes, DIPOLE, probe=from_points(torch.zeros(1, 3)), **options)
    with pytest.raises(InvalidTypeError, match="probe: expected a bool or"):
        wrap(cubes, DIPOLE, probe="yes", **options)
    assert isinstance(wrap(lambda pos, x: pos * x, outputs, probe=False, **options), Wrapped)


def test_a_large_offset_hides_nothing():
    def total(pos):
        return 1e4 + (pos**3).sum()

    with pytest.raises(ProbeFailure, match="translation"):
        wrap(total, ENERGY, layout="single")
    wrap(total, ENERGY, **SINGLE)


def test_probing_leaves_random_numbers_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    wrap(cubes, DIPOLE, **SINGLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_and_backbones_are_not_wrapped():
    with pytest.raises(InvalidTypeError, match="got the class Broken"):
        wrap(Broken, FORCES)
    with pytest.raises(InvalidTypeError, match=r"a Backbone, which needs no wrap\(\)"):
        wrap(ToyLocal(), FORCES)
    with pytest.raises(InvalidTypeError, match="got int"):
        wrap(3, FORCES)
