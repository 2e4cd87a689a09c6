"""The elements of O(3) that map a structure onto itself: what symmetry demands of a single evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from symmetrize import keys
from symmetrize.data import replace, validate
from symmetrize.errors import InvalidInputError, MissingDependencyError
from symmetrize.ops.rotations import about_axis, octahedral_group
from symmetrize.representations import OutputSpec
from symmetrize.testing.measuring.elements import moved_to

#: An angle that is no rational multiple of pi: its powers come near every rotation about the same axis.
_IRRATIONAL = 2.0

_KNOWN = (keys.POS, keys.BATCH, keys.PTR, keys.CELL, keys.PBC)
_EDGES = (keys.EDGE_INDEX, keys.CELL_SHIFT, keys.EDGE_CUTOFF, keys.EDGE_VEC)


class Operation(NamedTuple):
    """A symmetry operation of a structure.

    With ``g = matrix``, there is one translation t such that for every atom i

    ``pos[i] @ g.T + t == pos[permutation[i]]``, up to a lattice vector:

    the new position of atom i is the position of atom ``permutation[i]``. What an equivariant function returns for the
    atoms therefore obeys ``rho(g) f[i] == f[permutation[i]]``.

    Attributes
    ----------
    name : str
        Such as ``"4-fold about (0, 0, 1)"``; an n-fold rotation turns by 360 / n degrees, counterclockwise.
    matrix : Tensor of shape (3, 3), float64
        Acts on column vectors.
    permutation : Tensor of shape (n_atoms,), int64
    """

    name: str
    matrix: Tensor
    permutation: Tensor


def symmetry_operations(
    structure: Data, *, tolerance: float = 1e-6, vectors: Mapping[str, str] | None = None
) -> list[Operation]:
    """All elements of O(3) that map a structure onto itself, the identity first.

    Per-atom fields (species, features, ``center_mask``) have to agree, fields declared as ``vectors`` to turn along.

    * Finite structures: the point group. Where it is infinite, a finite part that generates a dense subgroup of it:
      for collinear atoms quarter turns, one irrational angle, two mirrors, and all of these times the reflection of
      the axis where there is one; for a single atom the 48 symmetries of a cube and a generic rotation.
    * Periodic in two or three directions: by spglib, every operation that maps the given cell onto itself, pure
      translations in cells that are not primitive included. Operations of the crystal that the shape of a supercell
      breaks are not found.
    * Periodic in one direction: any angle about the axis and both directions of it, screws and glides included; for a
      straight chain as for collinear atoms.

    The matrices are those of the exactly symmetric structure nearby (see `idealized`), so that they form a group to
    rounding and not only to ``tolerance``.

    Parameters
    ----------
    structure : Data
        A batch of one structure.
    tolerance : float
        Distance between an atom's image and the atom that it falls on, in the unit of the positions; at least a few
        roundings of the positions. Where the operations found are no group, it is reduced until they are.
    vectors : dict of str to str, optional
        Further geometric fields, of the atoms or of the structure, as field name -> e3nn irreps.

    Returns
    -------
    list of Operation

    Raises
    ------
    InvalidInputError
        More than one structure, or a tolerance that is not positive.
    MissingDependencyError
        A crystal or slab without spglib installed.
    """
    return idealized(structure, tolerance=tolerance, vectors=vectors)[1]


def idealized(
    structure: Data, *, tolerance: float = 1e-6, vectors: Mapping[str, str] | None = None
) -> tuple[Batch, list[Operation]]:
    """The exactly symmetric structure within ``tolerance`` of a given one, and its `symmetry_operations`.

    Positions, lattice vectors, ``vectors`` and floating-point fields are averaged over the operations, so that what
    remains is rounding: a structure file with eight digits is not symmetric to sixteen. Neighbor lists are built anew.
    """
    batch = validate(structure)
    if batch[keys.PTR].shape[0] != 2:
        raise InvalidInputError(
            f"symmetry_operations: expected one structure, got {batch[keys.PTR].shape[0] - 1}; see split"
        )
    if not tolerance > 0.0:
        raise InvalidInputError(f"symmetry_operations: tolerance: expected a positive length, got {tolerance}")
    pos, pbc = batch[keys.POS].detach().to("cpu", torch.float64), batch[keys.PBC][0].cpu()
    cell = batch[keys.CELL][0].detach().to("cpu", torch.float64)
    size = float(torch.cat([(pos - pos.mean(dim=0)).flatten(), cell[pbc].flatten()]).abs().max())
    tolerance = max(tolerance, 16 * torch.finfo(batch[keys.POS].dtype).eps * size)
    fields = _fields(batch, vectors or {}, tolerance)
    labels = _labels(fields, len(pos), tolerance)
    for shrink in range(8):
        found = _search(pos, cell[pbc], labels, tolerance / 4.0**shrink)
        found = found.only([_keeps(fields, g, p, tolerance) for g, p in found.pairs()])
        if found.closed():
            break
    else:
        found = found.only([k == 0 for k in range(len(found.matrices))])
    if len(found.matrices) == 1:
        return moved_to(batch, batch[keys.POS].detach()), found.operations()
    # One pass leaves the square of the error, a second its fourth power.
    for _ in range(3):
        found = found.averaged()
    full = cell.clone()
    full[pbc] = found.lattice
    out = moved_to(batch, found.pos.to(batch[keys.POS].device), full[None].to(batch[keys.POS].device))
    changed = {}
    for name, (spec, rows) in fields.items():
        if batch[name].is_floating_point():
            mean = torch.stack([_applied(spec, rows, g, p) for g, p in found.pairs()]).mean(dim=0)
            changed[name] = mean.reshape(batch[name].shape).to(batch[name])
    return replace(out, **changed), found.operations()


# --- fields -------------------------------------------------------------------------------------------------------

_Fields = dict[str, tuple[OutputSpec | None, Tensor]]


def _fields(batch: Batch, vectors: Mapping[str, str], tolerance: float) -> _Fields:
    """Fields that operations have to respect: representation (None: invariant) and rows, float64."""
    n_atoms = batch[keys.POS].shape[0]
    out: _Fields = {}
    for name in sorted(batch.keys()):
        value = batch[name]
        if name in _KNOWN or name in _EDGES or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if name not in vectors and value.shape[0] != n_atoms:
            continue
        spec = OutputSpec(vectors[name]) if name in vectors else None
        out[name] = (spec, value.detach().to("cpu", torch.float64))
    if missing := [name for name in vectors if name not in out]:
        raise InvalidInputError(f"{missing[0]}: declared among vectors, but the structure has no such field")
    return out


def _labels(fields: _Fields, n_atoms: int, tolerance: float) -> Tensor:
    """Number of the class of each atom by its invariant fields: Tensor of shape (n_atoms,)."""
    rows = [value.reshape(n_atoms, -1) for spec, value in fields.values() if spec is None]
    table = torch.cat([torch.zeros(n_atoms, 1, dtype=torch.float64), *rows], dim=1)
    labels = torch.full((n_atoms,), -1)
    for i in range(n_atoms):
        if labels[i] < 0:
            same = (table - table[i]).abs() <= tolerance * table.abs().amax(dim=0).clamp(min=1.0)
            labels[same.all(dim=1) & (labels < 0)] = i
    return labels


def _applied(spec: OutputSpec | None, rows: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
    """rho(g) P_g: what was at atom i is turned and found at atom permutation[i]."""
    turned = rows if spec is None else spec.rotate(rows, matrix.expand(len(rows), 3, 3))
    return turned[torch.argsort(permutation)] if len(rows) == len(permutation) else turned


def _keeps(fields: _Fields, matrix: Tensor, permutation: Tensor, tolerance: float) -> bool:
    for spec, rows in fields.values():
        if spec is not None and rows.numel():
            change = (_applied(spec, rows, matrix, permutation) - rows).abs().max()
            if not float(change) <= tolerance * max(1.0, float(rows.abs().max())):
                return False
    return True


# --- search -------------------------------------------------------------------------------------------------------

#: (positions, matrix, permutation) -> the orthogonal matrix nearest to what the permutation does to the positions.
_Fit = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Found:
    """Operations ``g x_i + t = x_p(i) + image_i @ lattice`` of a structure.

    ``codes`` (n, k, k), integer, multiply like the operations do and tell those apart that permute alike.
    """

    pos: Tensor
    lattice: Tensor
    matrices: Tensor
    permutations: Tensor
    images: Tensor
    codes: Tensor
    fit: _Fit
    is_group: bool

    def pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Matrices and permutations."""
        return zip(self.matrices, self.permutations, strict=True)

    def only(self, keep: list[bool]) -> _Found:
        k = torch.tensor(keep)
        rows = {name: getattr(self, name)[k] for name in ("matrices", "permutations", "images", "codes")}
        return dataclasses.replace(self, **rows)

    def translations(self) -> Tensor:
        """Tensor of shape (n, 3)."""
        moved = self.pos[None] @ self.matrices.transpose(1, 2)
        return (self.pos[self.permutations] + self.images @ self.lattice - moved).mean(dim=1)

    def averaged(self) -> _Found:
        """Positions averaged over all operations, and the matrices that belong to them."""
        target = self.pos[self.permutations] + self.images @ self.lattice - self.translations()[:, None]
        pos = (target @ self.matrices).mean(dim=0)
        return dataclasses.replace(self, pos=pos, matrices=torch.stack([self.fit(pos, g, p) for g, p in self.pairs()]))

    def closed(self) -> bool:
        """Whether all products are among the operations (of finite parts of infinite groups they need not be)."""
        if not self.is_group:
            return True
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randint(-(2**40), 2**40, x[0].shape, generator=generator) for x in (self.codes, self.permutations)
        ]

        def number(codes: Tensor, permutations: Tensor) -> Tensor:
            """Tells (code, permutation) apart, but for a chance of the order of 1e-12."""
            return (codes * weights[0]).sum(dim=(1, 2)) + (permutations * weights[1]).sum(dim=1)

        known = number(self.codes, self.permutations)
        return all(
            bool(torch.isin(number(code @ self.codes, permutation[self.permutations]), known).all())
            for code, permutation in zip(self.codes, self.permutations, strict=True)
        )

    def operations(self) -> list[Operation]:
        out = []
        for matrix, permutation, shift in zip(self.matrices, self.permutations, self.translations(), strict=True):
            name = _name(matrix)
            matrix = torch.eye(3, dtype=torch.float64) if name == "identity" else matrix
            if len(self.lattice):
                fraction = torch.linalg.pinv(self.lattice).T @ shift
                fraction = fraction - torch.floor(fraction + 1e-4)
                if float(fraction.abs().max()) > 1e-3:
                    shifted = f"{_vector(fraction)} of the lattice vectors"
                    name = f"translation by {shifted}" if name == "identity" else f"{name}, shifted by {shifted}"
            out.append(Operation(name, matrix, permutation))
        # Identity first, then translations, rotations, and what is improper.
        return sorted(out, key=_rank)


def _rank(operation: Operation) -> int:
    if float(torch.linalg.det(operation.matrix)) < 0:
        return 3
    return {"identity": 0, "translation": 1}.get(operation.name.split()[0], 2)


def _search(pos: Tensor, lattice: Tensor, labels: Tensor, tolerance: float) -> _Found:
    if len(lattice) >= 2:
        return _crystal(pos, lattice, labels, tolerance)
    center = pos.mean(dim=0)
    right = torch.linalg.svd(pos - center, full_matrices=True)[2]
    axis = right[0] if len(lattice) == 0 else torch.nn.functional.normalize(lattice[0], dim=0)
    across = (pos - center) - ((pos - center) @ axis)[:, None] * axis
    straight = float(across.norm(dim=1).max()) <= tolerance
    if len(lattice) == 0 and len(pos) == 1:
        generic = about_axis(torch.tensor([0.3, -0.5, 0.8]), _IRRATIONAL)
        matrices = torch.cat([octahedral_group(improper=True), generic[None]])
        n = len(matrices)
        zero = torch.zeros(n, 1, dtype=torch.int64)
        images = torch.zeros(n, 1, 0, dtype=torch.float64)
        return _Found(pos, lattice, matrices, zero, images, torch.zeros(n, 1, 1), lambda x, g, p: g, False)
    if len(lattice) == 0 and not straight:
        return _molecule(pos, lattice, labels, tolerance)
    return _line(pos - across if straight else pos, lattice, labels, tolerance, axis, straight)


def _collect(
    pos: Tensor,
    lattice: Tensor,
    labels: Tensor,
    tolerance: float,
    candidates: Iterable[tuple[Tensor, Tensor, Tensor]],
    fit: _Fit,
    is_group: bool = True,
) -> _Found:
    """Those of the candidates (matrix, translation, code) that are symmetry operations.

    Atoms are assigned generously, then the matrix is fitted to the assignment, and only then ``tolerance`` decides: a
    candidate may be made from atoms that determine it poorly.
    """
    inverse = torch.linalg.pinv(lattice)
    lengths = torch.cat([torch.nn.functional.pdist(pos), lattice.norm(dim=1)])
    loose = 0.25 * float(lengths.min()) if len(lengths) else 1.0
    found: dict[tuple[bytes, bytes], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for matrix, translation, code in candidates:
        apart = (pos @ matrix.T + translation)[:, None] - pos[None]
        image = torch.round(apart @ inverse)
        distance = (apart - image @ lattice).norm(dim=2)
        distance = torch.where(labels[:, None] == labels[None], distance, math.inf)
        permutation = distance.argmin(dim=1)
        if not float(distance.amin(dim=1).max()) <= loose or len(torch.unique(permutation)) < len(pos):
            continue
        key = (code.numpy().tobytes(), permutation.numpy().tobytes())
        if key in found:
            continue
        matrix = fit(pos, matrix, permutation)
        image = image[torch.arange(len(pos)), permutation]
        off = pos[permutation] + image @ lattice - pos @ matrix.T
        if float((off - off.mean(dim=0)).norm(dim=1).max()) <= tolerance:
            found[key] = (matrix, permutation, image, code)
    matrices, permutations, images, codes = (torch.stack(column) for column in zip(*found.values(), strict=True))
    return _Found(pos, lattice, matrices, permutations, images, codes, fit, is_group)


def _molecule(pos: Tensor, lattice: Tensor, labels: Tensor, tolerance: float) -> _Found:
    """Candidates are the two elements that map a pair of atoms onto one of equal species, radii and distance."""
    x = pos - pos.mean(dim=0)
    radius = x.norm(dim=1)
    alike = (labels[:, None] == labels[None]) & ((radius[:, None] - radius[None]).abs() <= 2 * tolerance)
    count = alike.sum(dim=1)
    area = torch.linalg.cross(x[:, None].expand(-1, len(x), 3), x[None].expand(len(x), -1, 3)).norm(dim=2)
    # Few images, and among those the pair that determines an element best.
    cost = torch.where(area > 0.3 * area.max(), (count[:, None] * count[None]).to(area), math.inf)
    cost = torch.where(cost == cost.min(), cost - area / (2 * area.max()), math.inf)
    a, b = divmod(int(cost.argmin()), len(x))

    def frame(i: int, j: int, sign: float) -> Tensor:
        first = x[i] / x[i].norm()
        second = torch.nn.functional.normalize(x[j] - (x[j] @ first) * first, dim=0)
        return torch.stack([first, second, sign * torch.linalg.cross(first, second)], dim=1)

    def candidates() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        start = frame(a, b, 1.0)
        for i, j in itertools.product(alike[a].nonzero()[:, 0].tolist(), alike[b].nonzero()[:, 0].tolist()):
            if i == j or abs(float((x[i] - x[j]).norm() - (x[a] - x[b]).norm())) > 4 * tolerance:
                continue
            for sign in (1.0, -1.0):
                matrix = frame(i, j, sign) @ start.T
                center = pos.mean(dim=0)
                yield matrix, center - matrix @ center, torch.tensor([[int(sign)]])

    def fit(pos: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
        # g commutes with the covariance of the positions, so that it acts on normalised principal coordinates in the
        # same way: as well determined for molecules that are nearly straight as for others.
        left, singular, right = torch.linalg.svd(pos - pos.mean(dim=0), full_matrices=False)
        left = torch.where(singular > tolerance, left, torch.zeros_like(left))
        u, _, v = torch.linalg.svd(left[permutation].T @ left)
        sign = torch.ones(3, dtype=torch.float64)
        sign[2] = torch.linalg.det(matrix).sign() * torch.linalg.det(u @ v)
        return right.T @ (u * sign) @ v @ right

    return _collect(pos, lattice, labels, tolerance, candidates(), fit)


def _line(pos: Tensor, lattice: Tensor, labels: Tensor, tolerance: float, axis: Tensor, straight: bool) -> _Found:
    """Operations that map an axis onto itself: collinear atoms, and structures periodic along one direction."""
    helper = torch.eye(3, dtype=torch.float64)[int(axis.abs().argmin())]
    first = torch.nn.functional.normalize(helper - (helper @ axis) * axis, dim=0)
    frame = torch.stack([first, torch.linalg.cross(axis, first), axis], dim=1)

    def element(angle: float, hand: int, along: int) -> Tensor:
        c, s = math.cos(angle), math.sin(angle)
        block = torch.tensor([[c, -hand * s, 0.0], [s, hand * c, 0.0], [0.0, 0.0, along]], dtype=torch.float64)
        return frame @ block @ frame.T

    def plane(x: Tensor) -> Tensor:
        return torch.complex(*((x - x.mean(dim=0)) @ frame[:, :2]).unbind(dim=1))

    def turn(pos: Tensor, matrix: Tensor, permutation: Tensor) -> Tensor:
        z = plane(pos)
        along = 1 if float(axis @ matrix @ axis) > 0 else -1
        hand = along if float(torch.linalg.det(matrix)) > 0 else -along
        return element(float(((z.conj() if hand == 1 else z) * z[permutation]).sum().angle()), hand, along)

    z = plane(pos)
    far = int(z.abs().argmax())
    alike = ((labels == labels[far]) & ((z.abs() - z.abs()[far]).abs() <= 2 * tolerance)).nonzero()[:, 0].tolist()
    turns = [(0.0, 1), (math.pi, 1), (0.5 * math.pi, 1), (-0.5 * math.pi, 1), (_IRRATIONAL, 1), (0.0, -1), (1.0, -1)]
    center = pos.mean(dim=0)

    def candidates() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for i, along in itertools.product(alike, (1, -1)):
            fitting = [(float((z[i] * (z[far].conj() if hand == 1 else z[far])).angle()), hand) for hand in (1, -1)]
            for n, (angle, hand) in enumerate(turns if straight else fitting):
                matrix = element(angle, hand, along)
                shift = center - matrix @ center
                shift = shift + axis * (axis @ (pos[i] - matrix @ pos[far] - shift))
                code = torch.tensor([[along, 0, 0], [0, hand, 0], [0, 0, n if straight else 1]])
                yield matrix, shift, code

    fit: _Fit = (lambda x, g, p: g) if straight else turn
    return _collect(pos, lattice, labels, tolerance, candidates(), fit, is_group=not straight)


def _crystal(pos: Tensor, lattice: Tensor, labels: Tensor, tolerance: float) -> _Found:
    """By spglib; a slab gets a long third lattice vector along its normal, and keeps the operations that keep that."""
    try:
        import spglib
    except ImportError as error:
        raise MissingDependencyError("symmetry operations of crystals need: pip install spglib") from error
    cell, is_slab = lattice, len(lattice) == 2
    if is_slab:
        normal = torch.nn.functional.normalize(torch.linalg.cross(lattice[0], lattice[1]), dim=0)
        height = float((pos @ normal).max() - (pos @ normal).min()) + 3.7 * float(lattice.norm(dim=1).sum())
        cell = torch.cat([lattice, height * normal[None]])
    # Right-handed, as spglib wants it: inverted cell and positions have the same operations.
    sign = float(torch.linalg.det(cell).sign())
    fraction = torch.linalg.solve(cell.T, pos.T).T
    try:
        with warnings.catch_warnings():
            # Announces that a failure will raise instead of returning None: both are handled.
            warnings.simplefilter("ignore", DeprecationWarning)
            given = ((sign * cell).tolist(), (sign * fraction).tolist(), labels.tolist())
            result = spglib.get_symmetry(given, tolerance)
    except getattr(spglib, "SpglibError", ValueError):
        result = None
    identity = torch.eye(3, dtype=torch.int64)
    turns, shifts = identity[None], torch.zeros(1, 3, dtype=torch.float64)
    if result is not None:
        turns = torch.as_tensor(result["rotations"]).to(torch.int64)
        shifts = sign * torch.as_tensor(result["translations"]).to(torch.float64)
    if is_slab:
        keep = (turns[:, 2, :2] == 0).all(dim=1) & (turns[:, :2, 2] == 0).all(dim=1)
        turns, shifts = turns[keep], shifts[keep]
    # The metric that all of them leave alone, and the cell of this metric nearest to the given one.
    real = turns.to(torch.float64)
    metric = (real.transpose(1, 2) @ (cell @ cell.T) @ real).mean(dim=0)
    root = torch.linalg.cholesky(metric)
    u, _, v = torch.linalg.svd(root.T @ cell)
    cell = root @ u @ v
    ideal, inverse = fraction @ cell, torch.linalg.inv(cell.T)
    center = ideal.mean(dim=0)

    def candidates() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for turn, shift in zip(turns, shifts, strict=True):
            matrix = cell.T @ turn.to(torch.float64) @ inverse
            translation = shift @ cell
            if is_slab:
                across = torch.nn.functional.normalize(cell[2], dim=0)
                translation = translation + across * (across @ (center - matrix @ center - translation))
            yield matrix, translation, turn

    return _collect(ideal, cell[: len(lattice)], labels, tolerance, candidates(), lambda x, g, p: g)


# --- names --------------------------------------------------------------------------------------------------------


def _vector(x: Tensor) -> str:
    return "(" + ", ".join(f"{round(float(v), 2) + 0.0:g}" for v in x) + ")"


def _name(matrix: Tensor) -> str:
    proper = float(torch.linalg.det(matrix)) > 0
    sign = 1.0 if proper else -1.0
    trace = float(torch.trace(matrix))
    if abs(trace - 3.0 * sign) < 1e-9:
        return "identity" if proper else "inversion"
    # For an improper element the angle of the rotation that comes with the reflection.
    angle = math.acos(max(-1.0, min(1.0, 0.5 * (trace - sign))))
    values, directions = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    axis = directions[:, int((values - sign).abs().argmin())]
    skew = 0.5 * (matrix - matrix.T)
    sense = float(torch.stack([skew[2, 1], skew[0, 2], skew[1, 0]]) @ axis)
    if abs(sense) < 1e-7:
        sense = float(axis[int((axis.abs() > 1e-6).nonzero()[0])])
    axis = axis if sense > 0 else -axis
    if not proper and angle < 1e-6:
        return f"mirror normal to {_vector(axis)}"
    kind = "" if proper else " rotation-reflection"
    for n in range(2, 25):
        k = angle * n / (2.0 * math.pi)
        if abs(k - round(k)) < 1e-6:
            times = "" if round(k) == 1 else f" ({round(k)} times)"
            return f"{n}-fold{kind}{times} about {_vector(axis)}"
    return f"{kind.strip() or 'rotation'} by {math.degrees(angle):.3f} degrees about {_vector(axis)}"
