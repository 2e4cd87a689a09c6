"""The molecular transformer: a global network of torch-geometric, smooth, saved and trained like the others."""

import pytest
import torch
from adapters import require_adapter
from ase import Atoms
from ase.build import bulk, molecule
from symmetrize.backbones.pyg import TransformerConfig, load_molecular_transformer, molecular_transformer

from symmetrize import ECSE, Identity, Symmetrizer, from_ase
from symmetrize.errors import DeclarationError, InvalidInputError, InvalidTypeError, UnknownSpeciesError
from symmetrize.testing import check_backbone, measure_equivariance, random_elements, tolerance

require_adapter("gnn")
SPECIES = (1, 6, 7, 8)


def network(**options):
    return molecular_transformer(atomic_types=SPECIES, width=8, n_layers=2, seed=3, **options).to(torch.float64).eval()


def test_it_keeps_what_a_backbone_promises():
    report = check_backbone(network(), profile="quick")
    assert report.ok, str(report)


def test_exact_with_ecse_and_not_without():
    batch = from_ase([molecule(name) for name in ("CH3CH2OH", "CO2", "CH4", "NH3", "H2")])
    elements = random_elements(3, torch.Generator().manual_seed(0))
    errors = {}
    for method in (ECSE(), Identity()):
        model = Symmetrizer(network(), method, scope="structure")
        measured = measure_equivariance(lambda b, m=model: m(b, forces=True), batch, model.backbone.outputs, elements)
        errors[type(method)] = float(measured["energy"].relative)
    assert errors[ECSE] < tolerance(torch.float64) < 1e-3 < errors[Identity]


def test_files_hold_all_of_it(tmp_path):
    model = network()
    with torch.no_grad():
        model.scale.fill_(2.5)
        model.composition.copy_(torch.arange(4.0))
    model.save(tmp_path / "saved")
    again = load_molecular_transformer(tmp_path / "saved")
    batch = from_ase([molecule("CH3CH2OH")])
    assert torch.equal(again(batch)["energy"], model(batch)["energy"])
    assert torch.equal(again.baseline(batch)["energy"], model.baseline(batch)["energy"])
    assert again.config == model.config


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: molecular_transformer(atomic_types=[1], widht=3), DeclarationError, "did you mean 'width'"),
        (lambda: molecular_transformer(width=3), DeclarationError, "expected an entry 'atomic_types', got none"),
        (
            lambda: molecular_transformer(atomic_types=[1], n_layers=0),
            DeclarationError,
            "n_layers: expected a positive",
        ),
        (lambda: molecular_transformer(atomic_types=[1], length=-1.0), DeclarationError, "length: expected a positive"),
        (lambda: network()(from_ase([bulk("C")])), InvalidInputError, "expected finite structures"),
        (lambda: network()(from_ase([Atoms("He")])), UnknownSpeciesError, "He|2"),
        (lambda: type(network())({"atomic_types": [1]}), InvalidTypeError, "expected a TransformerConfig, got dict"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_configurations_survive_json():
    config = TransformerConfig(SPECIES, width=16)
    assert TransformerConfig.from_dict(config.to_dict()) == config
