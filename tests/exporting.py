"""Structures, and evaluations as an engine does them, for tests of exported files."""

from __future__ import annotations

import torch
from ase import Atoms
from scriptable_toy import ScriptableToy

from symmetrize import ECSE, GroupAveraging, Identity, Symmetrizer, from_ase, keys
from symmetrize.export.metatomic import export
from symmetrize.metatomic.systems import systems_of


def ethanol(seed=1):
    from ase.build import molecule

    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=seed)
    return atoms


def finite():
    linear = Atoms("OCO", positions=[[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]])
    linear.rotate(33, (1, 2, 3))
    nearly = linear.copy()
    nearly.positions[1] += [0.02, 0.0, 0.01]
    return {
        "molecule": ethanol(),
        "linear": linear,
        "nearly linear": nearly,
        "pair": Atoms("CO", positions=[[0, 0, 0], [0.3, 1.0, 0.2]]),
        "atom": Atoms("O", positions=[[0.3, 0.1, 0.2]]),
        "apart": Atoms("OH", positions=[[0, 0, 0], [9.0, 0, 0]]),
    }


def periodic():
    from ase.build import bulk

    crystal = bulk("C", "diamond", 3.57, cubic=True)
    crystal.rattle(0.1, seed=2)
    small = Atoms(
        "CO", positions=[[0, 0, 0], [1.2, 0.1, 0.2]], cell=[[2.4, 0, 0], [0.4, 2.2, 0], [0, 0.3, 2.6]], pbc=True
    )
    slab = small.copy()
    slab.pbc = [True, True, False]
    wire = Atoms("C", cell=[[2.0, 0, 0], [0, 9, 0], [0, 0, 9]], pbc=[True, False, False])
    return {"crystal": crystal, "small cell": small, "slab": slab, "wire": wire}


def in_memory(model, **options):
    return export(model, verify=False, **options)


def run(exported, batch, energy_kind="system", selected=None, others=()):
    """Energies (and other outputs), with the leaves to differentiate by."""
    from metatensor.torch import Labels
    from metatomic.torch import ModelEvaluationOptions, ModelOutput

    dtype = getattr(torch, exported.capabilities().dtype)
    batch = batch.clone()
    batch[keys.POS], batch[keys.CELL] = batch[keys.POS].to(dtype), batch[keys.CELL].to(dtype)
    pos = batch[keys.POS].clone().requires_grad_()
    strain = torch.zeros_like(batch[keys.CELL]).requires_grad_()
    turn = torch.eye(3, dtype=dtype) + (strain + strain.transpose(1, 2)) / 2
    moved = (pos[:, None] @ turn[batch[keys.BATCH]])[:, 0]
    systems = systems_of(batch, exported, moved, (batch[keys.CELL] * batch[keys.PBC][:, :, None]) @ turn)
    outputs = {"energy": ModelOutput(unit="eV", sample_kind=energy_kind)}
    outputs |= {name: ModelOutput(unit="", sample_kind=kind) for name, kind in others}
    if selected is not None:
        selected = Labels(["system", "atom"], torch.as_tensor(selected, dtype=torch.int32).reshape(-1, 2))
    options = ModelEvaluationOptions(length_unit="angstrom", outputs=outputs, selected_atoms=selected)
    tensors = exported(systems, options, check_consistency=True)
    return tensors, pos, strain


def conservative(exported, batch):
    """As an engine would: energies, energies of atoms, forces, virials."""
    tensors, pos, strain = run(exported, batch)
    energy = tensors["energy"].block().values[:, 0]
    gradient, virial = torch.autograd.grad(energy.sum(), [pos, strain], allow_unused=True)
    atomic = run(exported, batch, "atom")[0]["energy"].block().values[:, 0].detach()
    virial = torch.zeros_like(strain) if virial is None else virial
    return {"energy": energy.detach(), "atomic_energy": atomic, "forces": -gradient, "virial": virial}


def expected(model, batch):
    out = model(batch, forces=True, create_graph=False)
    result = {name: out[name].detach() for name in ("energy", "atomic_energy", "forces")}
    solid = batch[keys.PBC].all(dim=1)
    result["virial"] = torch.zeros_like(batch[keys.CELL])
    for s in solid.nonzero()[:, 0].tolist():
        one = from_ase(batch.atoms_list[s], dtype=batch[keys.POS].dtype)
        stress = model(one, forces=True, stress=True, create_graph=False)["stress"].detach()
        result["virial"][s] = stress[0] * torch.linalg.det(one[keys.CELL][0]).abs()
    return result


def batch_of(structures, dtype=torch.float64):
    batch = from_ase(list(structures), dtype=dtype)
    batch.atoms_list = list(structures)
    return batch


def errors(model, exported, batch):
    """Relative to the error scale: energies without their composition, RMS forces and virials."""
    target, got = expected(model, batch), conservative(exported, batch)
    base = model.backbone.baseline(batch)["energy"].detach()
    totals = torch.zeros(len(target["energy"]), dtype=torch.float64).index_add(0, batch[keys.BATCH], base)
    solid = batch[keys.PBC].all(dim=1)
    scales = {
        "energy": (target["energy"] - totals).square().mean().sqrt(),
        "atomic_energy": (target["atomic_energy"] - base).square().mean().sqrt(),
        "forces": target["forces"].square().mean().sqrt(),
        "virial": target["virial"][solid].square().mean().sqrt() if bool(solid.any()) else torch.tensor(1.0),
    }
    got["virial"] = torch.where(solid[:, None, None], got["virial"], torch.zeros_like(got["virial"]))
    return {name: float((got[name] - target[name]).abs().max() / (scales[name] + 1e-30)) for name in scales}


CASES = {
    "atom": lambda: Symmetrizer(ScriptableToy(), ECSE()),
    "two hops": lambda: Symmetrizer(ScriptableToy(n_hops=2), ECSE(), scope="atom", chunk_size=60),
    "rotations only": lambda: Symmetrizer(ScriptableToy(), ECSE(), group="SO(3)"),
    "structure": lambda: Symmetrizer(ScriptableToy(), ECSE(), scope="structure"),
    "group averaging": lambda: Symmetrizer(ScriptableToy(), GroupAveraging(2)),
    "group averaging of structures": lambda: Symmetrizer(ScriptableToy(n_hops=2), GroupAveraging(1)),
    "bare": lambda: Symmetrizer(ScriptableToy(), Identity()),
}
