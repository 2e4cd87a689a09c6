"""All checks. Importing this package registers them; they run in this order."""

# isort: skip_file
from symmetrize.testing.checks import soundness  # noqa: F401
from symmetrize.testing.checks import equivariance  # noqa: F401
from symmetrize.testing.checks import size  # noqa: F401
from symmetrize.testing.checks import sites  # noqa: F401
from symmetrize.testing.checks import precision  # noqa: F401
from symmetrize.testing.checks import invariance  # noqa: F401
from symmetrize.testing.checks import smoothness  # noqa: F401
from symmetrize.testing.checks import conservation  # noqa: F401
from symmetrize.testing.checks import frames  # noqa: F401
from symmetrize.testing.checks import backbone  # noqa: F401
from symmetrize.testing.checks import cost  # noqa: F401
