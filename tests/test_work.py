"""The work of an evaluation is proportional to the number of atoms: counted, not timed."""

import ase.build
import pytest
import torch
from symmetrize.backbones.pet import PET, PETConfig
from symmetrize.backbones.toy import ToyLocal
from torch.utils._python_dispatch import TorchDispatchMode

from symmetrize import ECSE, OutputSpec, Symmetrizer, from_ase, weighted_sum


class Elements(TorchDispatchMode):
    """Elements that operations make or change."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_add_.default:
            self.total += args[3].numel()  # what is added, in place
        elif isinstance(out, torch.Tensor) and not func.is_view:  # views move nothing
            self.total += out.numel()
        return out


def water(n):
    """A liquid-like box of n x 2 x 2 molecules that never look the same."""
    atoms = ase.build.molecule("H2O")
    atoms.cell, atoms.pbc = [3.1, 3.1, 3.1], True
    atoms = atoms * (n, 2, 2)
    atoms.rattle(0.1, seed=n)
    return from_ase(atoms, dtype=torch.float32)


def pet():
    sizes = dict(d_pet=8, d_node=8, d_head=4, d_feedforward=8, num_heads=2)
    return PET(PETConfig(atomic_types=(1, 8), cutoff=3.0, **sizes))


def toy():
    return ToyLocal({"energy": OutputSpec("0e", reduce="sum")}, cutoff=3.0, width=4).to(torch.float32)


def growth(make, create_graph):
    """Work for four times the atoms over the work for the atoms, in calls of the same size."""
    model = Symmetrizer(make(), ECSE(cutoff_width=0.05), group="SO(3)", scope="atom", chunk_size=60)
    totals = []
    for n in (8, 32):
        batch = water(n)
        with Elements() as counted:
            out = model(batch, forces=True, create_graph=create_graph)
            if create_graph:
                out["forces"].square().sum().backward()
        totals.append(counted.total)
    return totals[1] / totals[0]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("make", [pet, toy])
def test_work_is_linear(make, create_graph):
    assert 3.0 < growth(make, create_graph) < 4.4


def test_a_call_that_touches_everything_is_seen(monkeypatch):
    """The twin: gradients of all rows of the batch for every call."""
    add = weighted_sum._add

    def wasteful(total, rows, values):
        everything = torch.zeros_like(total)
        add(everything, rows, values)
        add(total, None, everything)

    monkeypatch.setattr(weighted_sum, "_add", wasteful)
    assert growth(pet, False) > 4.4
