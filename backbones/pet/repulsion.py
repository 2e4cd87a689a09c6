"""The universal repulsion of screened nuclei (Ziegler, Biersack and Littmark 1985), smoothly cut off.

    E(r) = k z_i z_j / r sum_m c_m exp(-d_m r / a),  a = 0.4685 A / (z_i^0.23 + z_j^0.23),

plus the polynomial A r^3 / 3 + B r^4 / 4 + C with which energy, force and its derivative vanish at the sum of the
covalent radii (LAMMPS, ``pair_style zbl``, with inner cutoff 0; metatrain has the same).
"""

# No "from __future__ import annotations" here: TorchScript cannot read the attributes of a module through it.
import torch
from torch import Tensor, nn

_COULOMB = 14.399645478425668  # e^2 / (4 pi epsilon_0) in eV angstrom


class Repulsion(nn.Module):
    """Repulsion of pairs in eV, for lengths in angstrom.

    Parameters
    ----------
    atomic_types : tuple of int
    radii : tuple of float
        Covalent radius of each of them in angstrom.
    """

    radii: Tensor
    strength: Tensor
    inverse_length: Tensor

    def __init__(self, atomic_types: tuple[int, ...], radii: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("radii", torch.tensor(radii, dtype=torch.float64), persistent=False)
        # In single precision, as in the models that this has to reproduce.
        z = torch.tensor(atomic_types, dtype=torch.int64)
        power = z.to(torch.float32) ** 0.23
        strength = (_COULOMB * z.to(torch.float32))[:, None] * z.to(torch.float32)[None, :]
        self.register_buffer("strength", strength.double(), persistent=False)
        length = 0.46850 / (power[:, None] + power[None, :])
        self.register_buffer("inverse_length", 1.0 / length.double(), persistent=False)

    def forward(self, length: Tensor, species: Tensor, neighbor_species: Tensor) -> Tensor:
        """Half the energy of each edge, which appears in both directions: Tensor of shape (n_edges,)."""
        dtype = length.dtype
        cutoff = (self.radii[species] + self.radii[neighbor_species]).to(dtype)
        strength = self.strength[species, neighbor_species].to(dtype)
        decay = self.inverse_length[species, neighbor_species].to(dtype)
        at_cutoff, first, second = screened(cutoff, strength, decay)
        cubic = (cutoff * second - 3.0 * first) / cutoff**2
        quartic = (2.0 * first - cutoff * second) / cutoff**3
        constant = 0.5 * cutoff * first - at_cutoff - cutoff**2 * second / 12.0
        inside = length < cutoff
        safe = torch.where(inside, length, cutoff)
        energy = screened(safe, strength, decay)[0] + cubic / 3.0 * safe**3 + quartic / 4.0 * safe**4 + constant
        return torch.where(inside, 0.5 * energy, torch.zeros_like(energy))


def screened(r: Tensor, strength: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of two screened nuclei and its first and second derivative."""
    coefficients = [0.02817, 0.28022, 0.50986, 0.18175]  # not globals, which TorchScript does not read
    exponents = [0.20162, 0.40290, 0.94229, 3.19980]
    value, first, second = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    for coefficient, exponent in zip(coefficients, exponents, strict=True):
        rate = exponent * decay
        term = coefficient * torch.exp(-rate * r)
        value = value + term
        first = first - rate * term
        second = second + rate * rate * term
    factor = strength / r
    return (
        factor * value,
        factor * (first - value / r),
        factor * (second - 2.0 / r * first + 2.0 * value / (r * r)),
    )
