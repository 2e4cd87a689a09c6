"""Whether a file that was written gives what the model gives, before anyone relies on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from symmetrize import keys
from symmetrize.data import assemble, replace, validate
from symmetrize.errors import DeclarationError
from symmetrize.export.blocks import Writer, atom_samples, system_samples
from symmetrize.metatomic.systems import systems_of
from symmetrize.metatomic.tensor_maps import RENAMED, parts_of, rows_of
from symmetrize.symmetrizer import Symmetrizer

#: Rounding of the results, in units of machine epsilon and of their size: an average of rotated evaluations adds up
#: some hundreds of numbers, and forces are derivatives with large cancelling parts.
ALLOWED = 2e4


def verify_export(model: Symmetrizer, exported: Any, energy: str, names: Mapping[str, str]) -> None:
    """Compare outputs, energies of atoms and forces on small structures.

    Parameters
    ----------
    model : Symmetrizer
    exported : metatomic.torch.AtomisticModel
    energy : str
        The output that is differentiated; empty for none.
    names : dict of str to str
        Names in the file of the outputs of a backbone; empty for a model that was in this format before.

    Raises
    ------
    DeclarationError
        They differ by more than rounding.
    """
    capabilities = exported.capabilities()
    species = [int(z) for z in capabilities.atomic_types]
    batch = probe(species, float(model.backbone.cutoff or 3.0), model.scope == "atom", model.backbone.dtype)
    expected = model(batch, forces=bool(energy), energy=energy or "energy", create_graph=False)
    targets = {("forces", ""): expected["forces"]} if energy else {}
    for name, spec in model.backbone.outputs.items():
        file_name = names.get(name, name)
        rows = {"": expected[name]}
        if spec.reduce is not None:
            rows = {"system": expected[name], "atom": expected[f"atomic_{name}"]}
        for kind, values in rows.items():
            kind = kind or ("atom" if spec.per == "atom" else "system")
            if name in names:
                # As it is written: by degree, in metatomic's order of components.
                for label, block in _blocks(Writer(spec, file_name), values, kind, batch).items():
                    targets[label, kind] = block
            else:
                targets[name, kind] = values
    reduced = {names.get(name, name) for name, spec in model.backbone.outputs.items() if spec.reduce is not None}
    # Without the rewriting that TorchScript does in its first calls, which takes longer than these calls.
    with torch.jit.optimized_execution(False):
        got = evaluate(exported, batch, names.get(energy, energy), reduced)
    epsilon = torch.finfo(model.backbone.dtype).eps
    for key, target in targets.items():
        values = got[key].to(torch.float64).reshape(target.shape)
        target = target.detach().to(torch.float64)
        size = 1.0 + float(target.abs().max())
        error = float((values - target).abs().max()) / size
        if not error <= ALLOWED * epsilon:
            raise DeclarationError(
                f"export: the file does not reproduce the model: {key[0]!r} is off by {error:.1e} of its size, "
                f"expected at most {ALLOWED * epsilon:.1e}"
            )


def _blocks(writer: Writer, values: Tensor, kind: str, batch: Batch) -> dict[str, Tensor]:
    """Rows of all atoms or structures as they come back from a file."""
    if kind == "atom":
        samples = atom_samples(batch[keys.BATCH], batch[keys.PTR], torch.ones_like(batch[keys.BATCH], dtype=torch.bool))
    else:
        samples = system_samples(len(values), values.device)
    return rows_by_part(writer.name, writer(values.detach(), samples), batch)


def rows_by_part(name: str, tensor: Any, batch: Batch) -> dict[str, Tensor]:
    """Rows of every part of an output."""
    return {
        label: rows_of(part, tensor, batch[keys.PTR])[0].detach() for label, part in parts_of(name, tensor, "").items()
    }


def probe(species: list[int], cutoff: float, periodic: bool, dtype: torch.dtype) -> Batch:
    """A cluster, a linear molecule and a single atom; in atom scope also a crystal."""
    generator = torch.Generator().manual_seed(0)
    spacing = 0.45 * cutoff
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)[:7]
    cluster = spacing * (corners + 0.2 * torch.rand(corners.shape, generator=generator, dtype=torch.float64))
    line = spacing * torch.arange(3.0, dtype=torch.float64)[:, None] * torch.tensor([[0.6, 0.0, 0.8]])
    parts = [cluster, line.to(torch.float64), torch.zeros(1, 3, dtype=torch.float64)]
    if periodic:
        parts.append(cluster[:3])
    counts = torch.tensor([len(part) for part in parts])
    pos = torch.cat(parts)
    cell = torch.zeros(len(parts), 3, 3, dtype=torch.float64)
    pbc = torch.zeros(len(parts), 3, dtype=torch.bool)
    if periodic:
        cell[-1] = 2.0 * spacing * torch.eye(3, dtype=torch.float64)
        cell[-1, 1, 0] = 0.3 * spacing
        pbc[-1] = True
    z = torch.tensor([species[k % len(species)] for k in range(len(pos))])
    fields = {keys.CELL: cell.to(dtype), keys.PBC: pbc, keys.Z: z}
    return validate(assemble(pos=pos.to(dtype), counts=counts, **fields))


def evaluate(
    exported: Any, batch: Batch, energy: str, reduced: Collection[str] = ("energy",)
) -> dict[tuple[str, str], Tensor]:
    """Outputs of an exported model by name and kind of sample, and forces, ``("forces", "")``.

    Parameters
    ----------
    exported : metatomic.torch.AtomisticModel
    batch : Batch
        In the length unit of the model; so are the results.
    energy : str
        The output to differentiate, by its name in the file; empty for none.
    reduced : collection of str
        Outputs per atom that are evaluated per system as well.
    """
    from metatomic.torch import ModelEvaluationOptions, ModelOutput, unit_conversion_factor

    capabilities = exported.capabilities()
    factor = unit_conversion_factor(capabilities.length_unit, "angstrom")
    dtype = getattr(torch, capabilities.dtype)
    scaled = replace(batch, **{name: factor * batch[name].to(dtype) for name in (keys.POS, keys.CELL)})
    pos = scaled[keys.POS].detach().requires_grad_(bool(energy))
    cell = scaled[keys.CELL] * scaled[keys.PBC][:, :, None]
    out: dict[tuple[str, str], Tensor] = {}
    for kind in ("system", "atom"):
        asked = {
            name: ModelOutput(unit="", sample_kind=kind)
            for name, output in capabilities.outputs.items()
            if name not in RENAMED and (kind == output.sample_kind or name in reduced)
        }
        if not asked:
            continue
        systems = systems_of(scaled, exported, pos, cell)
        options = ModelEvaluationOptions(length_unit="angstrom", outputs=asked, selected_atoms=None)
        tensors = exported(systems, options, check_consistency=True)
        for name, tensor in tensors.items():
            for label, rows in rows_by_part(name, tensor, batch).items():
                out[label, kind] = rows
        if energy in asked and kind == "system":
            gradient = torch.autograd.grad(tensors[energy].block().values.sum(), pos)[0]
            out["forces", ""] = -factor * gradient
    return out
