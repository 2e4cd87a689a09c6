"""Equivariance, exact to rounding, on every named geometry: C eps(dtype) with one C, where the bare backbone fails."""

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer, from_ase
from symmetrize.testing import (
    NEAR_COLLINEAR_FACTOR,
    conservative,
    declared,
    error_scale,
    geometries,
    measure_batching,
    measure_equivariance,
    measure_periodicity,
    measure_permutation,
    measure_translation,
    random_elements,
    tolerance,
    within,
)

OUTPUTS = {
    "energy": OutputSpec("0e", reduce="sum"),
    "vector": OutputSpec("1o"),
    "pseudovector": OutputSpec("1e"),
    "pseudoscalar": OutputSpec("0o"),
    "symmetric": OutputSpec(cartesian="ij=ji"),
    "antisymmetric": OutputSpec(cartesian="ij=-ji"),
    "rank3": OutputSpec(cartesian="ijk"),
    **{f"l{l}{p}": OutputSpec(f"{l}{p}") for l in range(2, 7) for p in "eo"},
}
PER_STRUCTURE = {name: OutputSpec(spec.irreps, spec.cartesian, per="structure") for name, spec in OUTPUTS.items()}
ALL = geometries()
FINITE = {name: atoms for name, atoms in ALL.items() if not atoms.pbc.any()}
GENERIC = geometries("generic")


class Antisymmetrized(ToyLocal):
    """The toy network knows shapes, not symmetries of tensors."""

    def forward(self, batch):
        out = super().forward(batch)
        return {**out, **symmetrized(out)}


class AntisymmetrizedGlobal(ToyGlobal):
    def forward(self, batch):
        out = super().forward(batch)
        return {**out, **symmetrized(out)}


def symmetrized(out):
    return {
        "symmetric": out["symmetric"] + out["symmetric"].transpose(1, 2),
        "antisymmetric": out["antisymmetric"] - out["antisymmetric"].transpose(1, 2),
    }


def model(kind: str, method, dtype=torch.float64, outputs=None, **options):
    if kind == "structure":
        backbone = AntisymmetrizedGlobal(PER_STRUCTURE | {"atomwise": OutputSpec("1o")}, seed=1)
    else:
        backbone = Antisymmetrized(
            OUTPUTS, cutoff=4.0 if kind == "atom" else 3.0, n_hops=1 if kind == "atom" else 2, seed=2
        )
    scope = "structure" if kind == "structure" else "atom"
    return Symmetrizer(backbone.to(dtype), method, scope=scope, **options).eval()


def factor(name: str) -> float:
    near = any(word in name for word in ("off the line", "near-collinear"))
    return NEAR_COLLINEAR_FACTOR if near else 1e4


def limit(name: str, dtype: torch.dtype) -> float:
    return tolerance(dtype, factor(name))


def scales(kind: str):
    """One error scale per output, from generic structures: on a symmetric one an output may vanish altogether."""
    f = model(kind, ECSE())
    structures = [atoms for name, atoms in GENERIC.items() if kind != "structure" or name in FINITE]
    return {name: scale.value for name, scale in error_scale(f, from_ase(structures), f.backbone.outputs).items()}


SCALES = {kind: scales(kind) for kind in ("atom", "two-hop", "structure")}


def judge(measured, names, dtype, loose=1.0):
    """Failures, judged structure by structure: all geometries are measured in one batch."""
    failures = []
    for output, deviation in measured.outputs.items():
        for n, name in enumerate(names):
            error = deviation.scale.relative(float(deviation.max[:, n].max()))
            if not within(error, loose * limit(name, dtype)):
                failures.append(f"{name}: {output}: {error:.1e}")
    return failures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["atom", "two-hop", "structure"])
def test_every_output_is_exactly_equivariant_on_every_geometry(kind, dtype):
    f = model(kind, ECSE(), dtype)
    elements = random_elements(3, torch.Generator().manual_seed(5))
    chosen = FINITE if kind == "structure" else ALL
    batch = from_ase(list(chosen.values()), dtype=dtype)
    measured = measure_equivariance(f, batch, f.backbone.outputs, elements, scale=SCALES[kind])
    failures = judge(measured, list(chosen), dtype)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kind", ["atom", "two-hop", "structure"])
def test_the_bare_backbone_is_not(kind):
    """On every geometry that has an orientation at all, some output is off by many orders of magnitude."""
    f = model(kind, Identity())
    elements = random_elements(3, torch.Generator().manual_seed(5))
    chosen = FINITE if kind == "structure" else ALL
    measured = measure_equivariance(
        f, from_ase(list(chosen.values())), f.backbone.outputs, elements, scale=SCALES[kind]
    )
    for n, (name, atoms) in enumerate(chosen.items()):
        worst = max(d.scale.relative(float(d.max[:, n].max())) for d in measured.outputs.values())
        sees_nothing = name.startswith("isolated atom") or (name == "pair at the cutoff" and kind == "atom")
        assert worst > 1e-2 or sees_nothing or (kind == "two-hop" and len(atoms) == 2), name


@pytest.mark.parametrize("kind", ["atom", "structure"])
def test_so3_is_exact_for_rotations_and_not_for_inversion(kind):
    f = model(kind, ECSE(), group="SO(3)")
    chiral = from_ase(FINITE["chiral center"])
    proper = random_elements(4, torch.Generator().manual_seed(1), group="SO(3)")
    improper = [e for e in random_elements(12, torch.Generator().manual_seed(2)) if torch.linalg.det(e.matrix) < 0]
    assert within(measure_equivariance(f, chiral, f.backbone.outputs, proper).relative, tolerance(torch.float64))
    assert measure_equivariance(f, chiral, f.backbone.outputs, improper).relative > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["atom", "two-hop"])
def test_forces_and_stress_are_exactly_equivariant(kind, dtype):
    hops = 1 if kind == "atom" else 2
    backbone = ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=4.0 if hops == 1 else 3.0, n_hops=hops)
    f = Symmetrizer(backbone.to(dtype), ECSE(), scope="atom").eval()
    outputs = declared(backbone.outputs, forces=True, stress=True)
    elements = random_elements(3, torch.Generator().manual_seed(6))
    for stress in (False, True):
        chosen = {name: atoms for name, atoms in ALL.items() if bool(atoms.pbc.all()) is stress}
        batch = from_ase(list(chosen.values()), dtype=dtype)
        call = conservative(f, stress=stress)
        wanted = outputs if stress else declared(backbone.outputs, forces=True)
        generic = from_ase([a for name, a in chosen.items() if name in GENERIC], dtype=dtype)
        scale = {name: s.value for name, s in error_scale(call, generic, wanted).items()}
        failures = judge(measure_equivariance(call, batch, wanted, elements, scale=scale), list(chosen), dtype)
        assert not failures, "\n".join(failures)


@pytest.mark.parametrize("measure", [measure_translation, measure_permutation, measure_periodicity, measure_batching])
@pytest.mark.parametrize("kind", ["atom", "two-hop", "structure"])
def test_translation_permutation_lattice_and_batch_change_nothing(kind, measure):
    f = model(kind, ECSE())
    pool = FINITE if kind == "structure" or measure is measure_permutation else ALL
    names = ["ethanol", "benzene", "methane", "propyne", "two N2, skew and near", "CO2"]
    if measure is measure_periodicity:
        if kind == "structure":
            pytest.skip("structure scope is for finite structures")
        names = ["rattled silicon", "triclinic crystal", "slab", "wire", "fcc Al"]
    batch = from_ase([pool[name] for name in names])
    measured = measure(f, batch, f.backbone.outputs, scale=SCALES[kind])
    assert within(measured.relative, tolerance(torch.float64)), str(measured)


def test_two_skew_dimers_need_candidates_as_far_as_the_backbone_sees():
    """Twin: with frames from one hop only, a two-hop backbone is not symmetrised exactly."""

    class ShortSighted(ECSE):
        def frames(self, batch, **options):
            from symmetrize.data import replace

            near = batch.edge_vec.norm(dim=1) < 3.0
            batch = replace(
                batch,
                edge_index=batch.edge_index[:, near],
                edge_vec=batch.edge_vec[near],
                cell_shift=batch.cell_shift[near],
                edge_cutoff=3.0,
            )
            return super().frames(batch, **options)

    from symmetrize.testing.structures.geometries import two_hop_collinear

    batch = from_ase(two_hop_collinear(3.0))
    exact, short = model("two-hop", ECSE()), model("two-hop", ShortSighted())
    elements = random_elements(4, torch.Generator().manual_seed(0))
    assert within(
        measure_equivariance(exact, batch, OUTPUTS, elements, scale=SCALES["two-hop"]).relative,
        tolerance(torch.float64),
    )
    assert measure_equivariance(short, batch, OUTPUTS, elements, scale=SCALES["two-hop"]).relative > 1e-6
