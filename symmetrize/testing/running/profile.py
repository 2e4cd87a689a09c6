"""How thorough a run is."""

from __future__ import annotations

from dataclasses import dataclass

from symmetrize.errors import DeclarationError, InvalidTypeError, did_you_mean


@dataclass(frozen=True)
class Profile:
    """Sizes of all samples.

    Attributes
    ----------
    name : str
    n_structures : int or None
        Structures per set of the library (None: all) and of the user's files.
    n_elements : int
        Haar-random elements, besides the special ones.
    n_cover : int
        Orientations of the cover of the group.
    n_permutations : int
    paths : tuple of str or None
        Names of the paths through critical geometries; None: all.
    n_points, n_candidates : int
        Points per scan, and places on it that are refined.
    n_directions : int
        Of finite differences.
    n_steps : int
        Of molecular dynamics.
    degree, l_max : int
        Of the quadrature over orientations, and of the spectrum.
    n_angles, n_axes : int
        Of the error against the angle.
    """

    name: str
    n_structures: int | None
    n_elements: int
    n_cover: int
    n_permutations: int
    paths: tuple[str, ...] | None
    n_points: int
    n_candidates: int
    n_directions: int
    n_steps: int
    degree: int
    l_max: int
    n_angles: int
    n_axes: int


PROFILES = {
    "quick": Profile(
        name="quick",
        n_structures=3,
        n_elements=4,
        n_cover=1000,
        n_permutations=2,
        paths=(
            "bending CO2",
            "pair crosses the cutoff",
            "exchange of nearest neighbors",
            "through the tetrahedron",
        ),
        n_points=33,
        n_candidates=1,
        n_directions=3,
        n_steps=40,
        degree=9,
        l_max=4,
        n_angles=9,
        n_axes=2,
    ),
    "full": Profile(
        name="full",
        n_structures=None,
        n_elements=16,
        n_cover=4000,
        n_permutations=6,
        paths=None,
        n_points=101,
        n_candidates=2,
        n_directions=8,
        n_steps=400,
        degree=17,
        l_max=8,
        n_angles=25,
        n_axes=6,
    ),
}


def profile_named(profile: str | Profile) -> Profile:
    """A profile, or the one of a name.

    Raises
    ------
    DeclarationError
        For an unknown name.
    """
    if isinstance(profile, Profile):
        return profile
    if not isinstance(profile, str):
        raise InvalidTypeError(f"profile: expected a Profile or a name, got {type(profile).__name__}")
    if profile not in PROFILES:
        raise DeclarationError(f"profile: unknown profile {profile!r}, {did_you_mean(profile, PROFILES)}")
    return PROFILES[profile]
