"""All checks. Importing this package registers them; they run in the order of these imports."""

from symmetrize.testing.checks import equivariance, invariance  # noqa: F401
