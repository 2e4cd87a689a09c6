"""Value and first two derivatives are continuous through every critical geometry; how steep they get is bounded."""

import pytest
import torch
from symmetrize.backbones.toy import ToyGlobal, ToyLocal

from symmetrize import ECSE, Identity, OutputSpec, Symmetrizer
from symmetrize.ops.rotations import random_rotations
from symmetrize.testing import Path, along, max_derivatives, measure_smoothness, paths

CUTOFF = 4.0
OUTPUTS = {"energy": OutputSpec("0e", reduce="sum"), "dipole": OutputSpec("1o", reduce="sum")}
PER_STRUCTURE = {"energy": OutputSpec("0e", per="structure"), "dipole": OutputSpec("1o", per="structure")}
PATHS = paths(CUTOFF)
FINITE = {name: path for name, path in PATHS.items() if not path(0.5).pbc.any()}
BENDING = [name for name in PATHS if name.startswith("bending")]


def local(method, seed=0):
    return Symmetrizer(ToyLocal(OUTPUTS, cutoff=CUTOFF, seed=seed), method, scope="atom").eval()


def whole(method, seed=0):
    return Symmetrizer(ToyGlobal(PER_STRUCTURE, seed=seed), method).eval()


def jumps(f, path, output):
    """Jumps of value, first and second derivative in units of the largest value of that derivative on the scan."""
    found = measure_smoothness(along(f, path, output), events=path.events, n_points=33, n_candidates=1)
    # The networks' outputs are of order 0.1 to 1; what symmetry makes constant is not judged by its rounding.
    sizes = (max(found.span, 0.01), max(found.max_first, 0.1), max(found.max_second, 1.0))
    return [jump.size / size for jump, size in zip(found.jumps, sizes, strict=True)], found


CENTRAL = ("bending", "right", "atom", "exchange", "through the tetra")


@pytest.mark.parametrize(
    ("name", "output"),
    [(name, "energy") for name in PATHS] + [(name, "dipole") for name in PATHS if name.startswith(CENTRAL)],
)
def test_atom_scope_is_smooth_through_every_event(name, output):
    relative, found = jumps(local(ECSE()), PATHS[name], output)
    assert relative[0] < 1e-9 and relative[1] < 1e-5 and relative[2] < 2e-2, str(found)


@pytest.mark.parametrize("name", list(FINITE))
def test_structure_scope_is_smooth_through_every_event(name):
    relative, found = jumps(whole(ECSE()), PATHS[name], "energy")
    assert relative[0] < 1e-9 and relative[1] < 1e-5 and relative[2] < 2e-2, str(found)


class Nearest(ECSE):
    """Planted fault: all the weight to the heaviest frame."""

    def frames(self, batch, **options):
        found = super().frames(batch, **options)
        best = torch.zeros(found.n_owners, dtype=torch.float64).scatter_reduce(0, found.owner, found.weights, "amax")
        hard = (found.weights >= best[found.owner] * (1 - 1e-9)).to(torch.float64)
        return type(found)(
            found.rotations, hard, found.owner, found.stratum, found.origins, found.n_owners, found.scope
        )


class HardCutoff(ECSE):
    """Planted fault of the published weights: a neighbor at the cutoff still has weight."""

    def _around_atoms(self, batch):
        pos, vectors, ptr, available, _, lengths = super()._around_atoms(batch)
        ones = torch.ones_like(available)
        return pos, vectors, ptr, ones, ones, lengths


@pytest.mark.parametrize(
    ("method", "name", "output"),
    [(Nearest(), "exchange of nearest neighbors", "energy"), (HardCutoff(), "pair crosses the cutoff", "dipole")],
    ids=["hard choice", "hard cutoff"],
)
def test_a_planted_jump_is_found(method, name, output):
    relative, found = jumps(local(method), PATHS[name], output)
    assert relative[0] > 1e-4, str(found)
    if isinstance(method, HardCutoff):
        assert abs(found.jumps[0].location - 0.5) < 1e-3


def turned(path, g):
    """The same path in another orientation."""

    def build(t):
        atoms = path(t)
        atoms.positions = atoms.positions @ g.T
        return atoms

    return Path(path.name, build, path.events, path.what)


@pytest.mark.parametrize("scope", ["atom", "structure"])
@pytest.mark.parametrize("name", BENDING)
def test_bending_stays_as_gentle_as_the_backbone(name, scope):
    """The second derivative of a scalar stays within 10 times the bare backbone's own.

    The bare backbone has no orientation of its own: it is given the path in several. `benchmarks` reports the ratio for
    other networks and paths.
    """
    orientations = random_rotations(48, torch.Generator().manual_seed(0)).numpy()
    ratios = []
    for seed in range(2):
        # Phases of up to 1.5 per angstrom.
        backbone = ToyLocal({"energy": OUTPUTS["energy"]}, cutoff=8.0, seed=seed)
        bare, ours = (Symmetrizer(backbone, method, scope=scope) for method in (Identity(), ECSE()))
        own = max(max_derivatives(along(bare, turned(PATHS[name], g), "energy"), n_points=21)[1] for g in orientations)
        ratios.append(max_derivatives(along(ours, PATHS[name], "energy"), n_points=81)[1] / own)
    assert max(ratios) < 10.0, ratios
