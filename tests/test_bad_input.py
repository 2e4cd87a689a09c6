"""Bad input: an error of our own that says what, where and what was expected; never a silent NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyGlobal, ToyLocal
from torch_geometric.data import Data

from symmetrize import ECSE, Identity, Symmetrizer, load_backbone
from symmetrize.backbone import Backbone
from symmetrize.data import from_ase, from_points, replace, validate
from symmetrize.errors import (
    BackboneOutputError,
    DeclarationError,
    InvalidInputError,
    InvalidTypeError,
    NoFrameError,
    SymmetrizeError,
    UnknownSpeciesError,
)
from symmetrize.representations import OutputSpec
from symmetrize.testing.structures.geometries import ethanol, geometries, linear

NAN, INF = float("nan"), float("inf")
ENERGY = {"energy": OutputSpec("0e", reduce="sum")}


def local(**options):
    return Symmetrizer(ToyLocal(cutoff=3.0, width=4), ECSE(), **options)


def three():
    """Structures of 9, 1 and 3 atoms."""
    return from_ase([ethanol(), Atoms("He", positions=[[0.1, 0.2, 0.3]]), geometries()["water"]])


def refused(kind, *words):
    """The error is ours, of this kind, and names all of the words."""
    import re

    return pytest.raises(kind, match="".join(f"(?=.*{re.escape(word)})" for word in words))


def test_the_good_input_is_accepted():
    """The twin of everything below."""
    out = local()(three(), forces=True)
    assert bool(torch.isfinite(out["energy"]).all()) and bool(torch.isfinite(out["forces"]).all())


def test_every_error_has_the_common_root():
    for kind in (BackboneOutputError, DeclarationError, InvalidInputError, InvalidTypeError, NoFrameError):
        assert issubclass(kind, SymmetrizeError)
    assert issubclass(InvalidInputError, ValueError) and issubclass(InvalidTypeError, TypeError)


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "atom, where", [(0, "structure 0, atom 0"), (9, "structure 1, atom 0"), (12, "structure 2, atom 2")]
)
def test_positions_that_are_not_finite(value, atom, where):
    pos = three().pos.clone()
    pos[atom, 1] = value
    with refused(InvalidInputError, "pos", "finite", where):
        local()(replace(three(), pos=pos))
    with refused(InvalidInputError, "pos", "finite", where):
        from_points(pos, batch=three().batch)


def test_positions_of_ase_that_are_not_finite():
    atoms = geometries()["water"]
    atoms.positions[1, 2] = NAN
    with refused(InvalidInputError, "pos", "structure 1, atom 1"):
        from_ase([ethanol(), atoms])


def test_coincident_atoms():
    pos = three().pos.clone()
    pos[12] = pos[10]
    with refused(InvalidInputError, "pos", "distinct", "structure 2, atom 0", "structure 2, atom 2"):
        local()(replace(three(), pos=pos))
    pos = three().pos.clone()
    pos[9] = pos[0]  # atoms of different structures may coincide
    local()(replace(three(), pos=pos))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(6))
def test_coincident_periodic_images(seed, dtype):
    """Rounding of the lattice translation must not hide that two atoms are the same."""
    cell = geometries()["triclinic crystal"].cell.array
    rng = np.random.default_rng(seed)
    first = rng.random(3) @ cell
    positions = [first, first + rng.integers(1, 3, 3) @ cell]
    items = [ethanol(), Atoms("CO", positions=positions, cell=cell, pbc=True)]
    with refused(InvalidInputError, "pos", "coincident", "structure 1, atom 0", "structure 1, atom 1"):
        local().to(dtype)(from_ase(items, dtype=dtype))
    items[1].pbc = False
    local().to(dtype)(from_ase(items, dtype=dtype))


@pytest.mark.parametrize(
    "pos, kind, words",
    [
        (torch.zeros(3, 2), InvalidInputError, ["pos", "(n_atoms, 3)", "(3, 2)"]),
        (torch.zeros(3), InvalidInputError, ["pos", "(n_atoms, 3)", "(3,)"]),
        (torch.zeros(3, 3, dtype=torch.int64), InvalidTypeError, ["pos", "float32 or float64", "int64"]),
        (torch.zeros(3, 3, dtype=torch.float16), InvalidTypeError, ["pos", "float32 or float64", "float16"]),
        (torch.zeros(3, 3, dtype=torch.complex64), InvalidTypeError, ["pos", "float32 or float64", "complex64"]),
        (torch.zeros(0, 3), InvalidInputError, ["at least one atom", "empty batch"]),
        (None, InvalidInputError, ["pos", "none"]),
        ([[0.0, 0.0, 0.0]], InvalidInputError, ["pos"]),
    ],
    ids=str,
)
def test_positions_of_the_wrong_kind(pos, kind, words):
    with refused(kind, *words):
        local()(Data(pos=pos))


# --- other fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, kind, words",
    [
        ("z", torch.ones(12, dtype=torch.int64), InvalidInputError, ["z", "13", "12"]),
        ("z", torch.ones(13), InvalidTypeError, ["z", "integers", "float32"]),
        ("z", torch.ones(13, 1, dtype=torch.int64), InvalidTypeError, ["z", "(13, 1)"]),
        ("z", [1] * 13, InvalidInputError, ["z", "list"]),
        ("x", torch.ones(3, 2), InvalidInputError, ["x", "13", "(3, 2)"]),
        ("center_mask", torch.ones(13), InvalidTypeError, ["center_mask", "bool", "float32"]),
        ("center_mask", torch.ones(3, dtype=torch.bool), InvalidInputError, ["center_mask", "13"]),
        ("batch", torch.zeros(12, dtype=torch.int64), InvalidInputError, ["batch", "(13,)", "(12,)"]),
        ("batch", torch.zeros(13), InvalidInputError, ["batch", "int64", "float32"]),
        ("batch", torch.arange(13).flip(0), InvalidInputError, ["batch", "ascending"]),
        ("batch", torch.arange(13) - 1, InvalidInputError, ["batch", "ascending"]),
        ("batch", [0] * 13, SymmetrizeError, ["batch"]),
        ("ptr", torch.tensor([0, 8, 10, 13]), InvalidInputError, ["ptr", "offsets"]),
        ("ptr", torch.tensor([0, 13]), InvalidInputError, ["ptr", "3", "1"]),
        ("ptr", torch.tensor([0, 9, 10, 13, 13]), InvalidInputError, ["structure 3 is empty"]),
        ("ptr", [0, 9, 10, 13], SymmetrizeError, ["ptr"]),
        ("cell", torch.zeros(3, 3, dtype=torch.float64), InvalidInputError, ["cell", "(3, 3, 3)", "(1, 3, 3)"]),
        ("cell", torch.zeros(9, 3, dtype=torch.float64), InvalidInputError, ["cell", "(3, 3, 3)", "(9, 3)"]),
        ("cell", torch.zeros(3, 3, 3), InvalidTypeError, ["cell", "float64", "float32"]),
        ("cell", torch.full((3, 3, 3), NAN, dtype=torch.float64), InvalidInputError, ["cell", "finite", "structure 0"]),
        ("cell", np.zeros((3, 3, 3)), SymmetrizeError, ["cell"]),
        ("cell", [[[0.0] * 3] * 3] * 3, SymmetrizeError, ["cell"]),
        ("pbc", torch.zeros(9, dtype=torch.bool), InvalidInputError, ["pbc", "(3, 3)", "(9,)", "(1, 3)"]),
        ("pbc", torch.zeros(3, 3), InvalidTypeError, ["pbc", "bool", "float32"]),
        ("pbc", [False] * 3, SymmetrizeError, ["pbc"]),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[:20],
)
def test_fields_of_the_wrong_shape_or_dtype(name, value, kind, words):
    with refused(kind, *words):
        local()(replace(three(), ptr=None, **{name: value}) if name == "batch" else replace(three(), **{name: value}))


@pytest.mark.parametrize(
    "cell", [np.zeros((3, 3)), np.diag([5.0, 5.0, 0.0]), [[4, 0, 0], [2, 0, 0], [0, 0, 4]]], ids=str
)
def test_a_singular_cell_with_periodicity(cell):
    with refused(InvalidInputError, "cell", "structure 1", "linearly independent"):
        from_ase([ethanol(), Atoms("C", cell=cell, pbc=True)])
    from_ase([ethanol(), Atoms("C", cell=cell, pbc=False)])


def test_a_missing_lattice_vector_is_fine_where_nothing_is_periodic():
    out = local()(from_ase(geometries()["slab"]))
    assert bool(torch.isfinite(out["energy"]).all())
    flat = geometries()["slab"]
    flat.pbc = True
    with refused(InvalidInputError, "cell", "structure 0"):
        from_ase(flat)


@pytest.mark.parametrize(
    "items, kind", [([], InvalidInputError), ([Atoms()], InvalidInputError), (["H2O"], InvalidTypeError)]
)
def test_nothing_to_convert(items, kind):
    with refused(kind, "expected"):
        from_ase(items)


def test_something_that_is_not_a_sequence_of_structures():
    with refused(SymmetrizeError, "from_ase"):
        from_ase(5)


def test_an_empty_structure_among_others():
    with refused(InvalidInputError, "structure 1 is empty"):
        from_ase([ethanol(), Atoms(), ethanol()])


@pytest.mark.parametrize("bad", [[0, 0, 2, 2], [1, 1, 0, 0], [-1, 0, 0, 0], [1, 1, 1, 1]], ids=str)
def test_cloud_numbers_ascend_without_gaps(bad):
    with refused(SymmetrizeError, "batch"):
        from_points(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), batch=torch.tensor(bad))


def test_features_have_one_row_per_point():
    with refused(InvalidInputError, "speed", "one row per point"):
        from_points(torch.randn(4, 3), speed=torch.zeros(3))
    with refused(InvalidTypeError, "pos", "list"):
        from_points([[0.0, 0.0, 0.0]])


def test_a_batch_that_is_no_batch():
    for bad in (None, torch.zeros(3, 3), [ethanol()], ethanol()):
        with refused(InvalidTypeError, "batch", type(bad).__name__):
            local()(bad)


# --- species --------------------------------------------------------------------------------------------------------


def pet():
    sizes = dict(d_pet=4, d_node=4, d_head=4, d_feedforward=4, num_heads=1)
    return PET(PETConfig(atomic_types=(1, 6, 8), cutoff=3.0, cutoff_width=1.0, **sizes)).double()


def test_an_unknown_species():
    atoms = ethanol()
    atoms.numbers[4] = 92
    with refused(UnknownSpeciesError, "structure 1, atom 4", "[1, 6, 8]", "92"):
        Symmetrizer(pet(), ECSE())(from_ase([ethanol(), atoms]))


def test_no_species_where_they_are_needed():
    with refused(InvalidInputError, "'z'"):
        Symmetrizer(pet(), ECSE())(from_points(torch.as_tensor(ethanol().positions)))


# --- what the backbone returns --------------------------------------------------------------------------------------


class Broken(Backbone):
    """`ToyLocal` whose outputs a function spoils: called with the batch and the outputs."""

    def __init__(self, spoil, outputs=None, hops=1):
        outputs = ENERGY if outputs is None else outputs
        super().__init__(outputs=outputs, cutoff=3.0, receptive_field=hops)
        self.inner, self.spoil = ToyLocal(outputs=outputs, cutoff=3.0, n_hops=hops, width=4), spoil

    def forward(self, batch):
        return self.spoil(batch, self.inner(batch))


METHODS = [Identity(), ECSE()]


@pytest.mark.parametrize("method", METHODS, ids=["Identity", "ECSE"])
@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda b, out: {"energy": out["energy"][:-1]}, ["'energy'", "expected shape", "got"]),
        (lambda b, out: {"energy": out["energy"][:, None]}, ["'energy'", "expected shape", "1)"]),
        (lambda b, out: {"energy": out["energy"].sum()}, ["'energy'", "expected shape", "got ()"]),
        (lambda b, out: {"Energy": out["energy"]}, ["'energy'", "['Energy']"]),
        (lambda b, out: {"energy": out["energy"].tolist()}, ["'energy'"]),
        (lambda b, out: out["energy"], ["dict", "Tensor"]),
        (lambda b, out: None, ["dict", "NoneType"]),
    ],
)
def test_outputs_that_were_not_declared(method, scope, spoil, words):
    with refused(BackboneOutputError, *words):
        Symmetrizer(Broken(spoil), method, scope=scope)(three())


def poison(z, value):
    """Not finite for atoms of one species only."""

    def spoil(batch, out):
        mask = batch.get("center_mask")
        species = batch["z"] if mask is None else batch["z"][mask]
        wrong = (species == z).reshape((-1,) + (1,) * (out["energy"].dim() - 1))
        return {"energy": torch.where(wrong, torch.full_like(out["energy"], value), out["energy"])}

    return spoil


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 40])
@pytest.mark.parametrize("scope, hops", [("atom", 1), ("atom", 2), ("structure", 1)])
@pytest.mark.parametrize("method", METHODS, ids=["Identity", "ECSE"])
def test_an_output_that_is_not_finite_is_traced_to_its_atom(method, scope, hops, chunk_size, value):
    """Rows of rotated copies, in chunks sorted by size, are not rows of the batch."""
    batch = from_ase([ethanol(), geometries()["chiral center"], geometries()["water"]])  # one F, one Cl
    model = Symmetrizer(Broken(poison(17, value), hops=hops), method, scope=scope, chunk_size=chunk_size)
    with refused(BackboneOutputError, "'energy'", "finite", "structure 1, atom 3"):
        model(batch)
    with refused(BackboneOutputError, "'energy'", "finite", "structure 1, atom 3"):
        model(batch, forces=True)
    clean = Symmetrizer(Broken(poison(99, value), hops=hops), method, scope=scope, chunk_size=chunk_size)
    assert bool(torch.isfinite(clean(batch)["energy"]).all())


@pytest.mark.parametrize("chunk_size", [None, 1, 12])
def test_a_structure_output_that_is_not_finite_is_traced_to_its_structure(chunk_size):
    def spoil(batch, out):
        has = torch.zeros(len(out["energy"]), dtype=torch.bool)
        has[batch["batch"][batch["z"] == 17]] = True
        return {"energy": torch.where(has, torch.full_like(out["energy"], NAN), out["energy"])}

    batch = from_ase([ethanol(), geometries()["water"], geometries()["chiral center"]])
    model = Symmetrizer(Broken(spoil, {"energy": OutputSpec("0e", per="structure")}), ECSE(), chunk_size=chunk_size)
    with refused(BackboneOutputError, "'energy'", "finite", "structure 2"):
        model(batch)


def test_an_auxiliary_model_is_held_to_its_declaration_too():
    model = Symmetrizer(ToyLocal(cutoff=3.0, width=4), ECSE(fallback=Broken(poison(6, NAN))))
    with refused(BackboneOutputError, "'energy'", "finite", "structure 1, atom 0"):
        model(from_ase([geometries()["water"], linear("CO", [0.0, 1.1])]))


# --- group, scope, parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["O3", "so(3)", "SU(2)", "", None, 3])
def test_an_unknown_group(group):
    with refused(DeclarationError, "group", repr(group)):
        local(group=group)


@pytest.mark.parametrize("scope", ["atoms", "Atom", "molecule", 1])
def test_an_unknown_scope(scope):
    with refused(DeclarationError, "scope", repr(scope)):
        local(scope=scope)


def test_atom_scope_needs_a_finite_receptive_field():
    with refused(DeclarationError, "scope='atom'", "receptive_field", "None"):
        Symmetrizer(ToyGlobal(), ECSE(), scope="atom")


def test_atom_scope_needs_outputs_of_atoms():
    outputs = {"gap": OutputSpec("0e", per="structure"), **ENERGY}
    with refused(DeclarationError, "scope='atom'", "per-atom", "gap"):
        Symmetrizer(ToyLocal(outputs=outputs), ECSE(), scope="atom")


def test_scope_is_resolved_from_declarations():
    assert local().scope == "atom" and Symmetrizer(ToyGlobal(), ECSE()).scope == "structure"
    assert Symmetrizer(ToyLocal(n_hops=2), ECSE()).scope == "structure"
    assert Symmetrizer(ToyLocal(outputs={"gap": OutputSpec("0e", per="structure")}), ECSE()).scope == "structure"


class Ideal(Backbone):
    """A gas without neighbors: no cutoff, no receptive field beyond the atom."""

    def __init__(self):
        super().__init__(outputs=ENERGY, cutoff=None, receptive_field=0)

    def forward(self, batch):
        mask = batch.get("center_mask")
        z = (batch["z"] if mask is None else batch["z"][mask]).to(batch["pos"].dtype)
        return {"energy": torch.cos(z)}


def test_a_scope_that_is_chosen_by_default_works():
    """Without a cutoff there is no neighbor list to build frames of atoms from."""
    out = Symmetrizer(Ideal(), ECSE())(three())
    assert torch.allclose(out["atomic_energy"], torch.cos(three().z.double()))


@pytest.mark.parametrize("chunk_size", [0, -1, True, "many", 2.5])
def test_chunk_sizes_are_positive_numbers_of_atoms(chunk_size):
    with refused(DeclarationError, "chunk_size"):
        local(chunk_size=chunk_size)


def test_wrong_kinds_of_parts():
    with refused(InvalidTypeError, "backbone", "Linear"):
        Symmetrizer(torch.nn.Linear(1, 1), ECSE())
    with refused(InvalidTypeError, "method", "ECSE()"):
        Symmetrizer(ToyLocal(), ECSE)


@pytest.mark.parametrize("name", ["cutoff_width", "collinearity_width"])
@pytest.mark.parametrize("value", [0, -0.1, NAN, INF, "0.15", None, True])
def test_widths_of_ecse_are_positive(name, value):
    with refused(DeclarationError, "ECSE", name, "positive"):
        ECSE(**{name: value})


def test_other_parameters_of_ecse():
    with refused(DeclarationError, "collinearity_width", "less than 1"):
        ECSE(collinearity_width=1.0)
    for fallback in ("Axial", None, 3, ToyLocal):
        with refused(DeclarationError, "ECSE", "fallback"):
            ECSE(fallback=fallback)
    with refused(DeclarationError, "fallback", "dipole"):
        Symmetrizer(ToyLocal(outputs={"dipole": OutputSpec("1o")}), ECSE(fallback=ToyLocal()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"outputs": {}, "cutoff": 3.0, "receptive_field": 1}, ["outputs"]),
        ({"outputs": {"a": "1o"}, "cutoff": 3.0, "receptive_field": 1}, ["outputs['a']", "str"]),
        ({"outputs": ENERGY, "cutoff": -1.0, "receptive_field": 1}, ["cutoff"]),
        ({"outputs": ENERGY, "cutoff": NAN, "receptive_field": 1}, ["cutoff"]),
        ({"outputs": ENERGY, "cutoff": 3.0, "receptive_field": -1}, ["receptive_field"]),
        ({"outputs": ENERGY, "cutoff": None, "receptive_field": 2}, ["receptive_field", "cutoff=None"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_declarations_of_a_backbone(options, words):
    class Declared(Backbone):
        def forward(self, batch):
            return {}

    with refused(SymmetrizeError, *words):
        Declared(**options)


def test_unknown_backbones_get_a_suggestion():
    with refused(DeclarationError, "'pett'", "did you mean 'pet'"):
        load_backbone("pett")
    with refused(DeclarationError, "'globl'", "'global'"):
        load_backbone("toy", "globl")


# --- energies, forces, stress ---------------------------------------------------------------------------------------


def test_stress_needs_a_cell():
    items = [geometries()["rattled carbon"], ethanol()]
    with refused(InvalidInputError, "stress", "cell", "structure 1"):
        local()(from_ase(items), stress=True)
    with refused(InvalidInputError, "stress", "cell", "structure 0"):
        local()(from_ase(geometries()["slab"]), stress=True)
    assert bool(torch.isfinite(local()(from_ase(items[:1]), stress=True)["stress"]).all())


def test_forces_derive_from_an_energy():
    outputs = {
        "dipole": OutputSpec("1o"),
        "mean": OutputSpec("0e", reduce="mean"),
        "odd": OutputSpec("0o", reduce="sum"),
    }
    model = Symmetrizer(ToyLocal(outputs=outputs, cutoff=3.0, width=4), ECSE())
    with refused(DeclarationError, "energy", "dipole"):
        model(three(), forces=True)
    for name in outputs:
        with refused(DeclarationError, "forces derive", repr(name)):
            model(three(), forces=True, energy=name)


@pytest.mark.parametrize("model, batch", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_precisions_do_not_mix(model, batch):
    with refused(InvalidTypeError, "pos", str(model), str(batch), "convert"):
        local().to(model)(from_ase(ethanol(), dtype=batch))


# --- frames ---------------------------------------------------------------------------------------------------------


def test_structure_scope_of_a_periodic_structure():
    with refused(InvalidInputError, "structure 1", "periodic", "scope='atom'"):
        local(scope="structure")(from_ase([ethanol(), geometries()["silicon"]]))


@pytest.mark.parametrize("scope, words", [("atom", ["structure 1, atom 0"]), ("structure", ["structure 1"])])
def test_no_fallback_on_linear_molecules(scope, words):
    model = Symmetrizer(ToyLocal(cutoff=3.0, width=4), ECSE(fallback="error"), scope=scope)
    with refused(NoFrameError, "collinear", "fallback='axial'", *words):
        model(from_ase([ethanol(), linear("OCO", [-1.16, 0.0, 1.16])]))
    with refused(NoFrameError, "structure 1", "empty"):
        model(from_ase([ethanol(), Atoms("H")]))
    model(from_ase(ethanol()))


class Moving(Backbone):
    """Reads a velocity besides the positions."""

    def __init__(self):
        super().__init__(outputs=ENERGY, cutoff=3.0, receptive_field=1, vectors={"velocity": "1o"})

    def forward(self, batch):
        mask = batch.get("center_mask")
        energy = torch.sin(batch["velocity"] @ batch["pos"].new_tensor([1.0, -0.4, 0.3]))
        return {"energy": energy if mask is None else energy[mask]}


def test_declared_vectors_are_needed():
    velocity = torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Symmetrizer(Moving(), ECSE())
    for bad in (None, velocity[:5], velocity[:, :2]):
        with refused(InvalidInputError, "velocity", "(13, 3)"):
            model(replace(three(), velocity=bad))


@pytest.mark.parametrize("atoms", [Atoms("H"), linear("CO", [0.0, 1.1])], ids=str)
def test_vectors_without_a_frame_are_refused_rather_than_not_symmetrised(atoms):
    """No direction comes from the neighbors, yet the output depends on that of the velocity."""
    model = Symmetrizer(Moving(), ECSE())
    velocity = torch.randn(len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        first = model(replace(from_ase(atoms), velocity=velocity))["energy"]
    except SymmetrizeError:
        return
    turned = atoms.copy()
    turned.positions = atoms.positions[:, [1, 2, 0]]
    second = model(replace(from_ase(turned), velocity=velocity[:, [1, 2, 0]]))["energy"]
    assert torch.allclose(first, second, atol=1e-12)


def test_validation_leaves_good_batches_alone():
    assert validate(three()).ptr.tolist() == [0, 9, 10, 13]
