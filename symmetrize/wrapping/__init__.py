"""Any torch module or function as a backbone, in one call, and the probes that find a wrong declaration at once."""

from symmetrize.wrapping.probes import ProbeWarning, probe_backbone
from symmetrize.wrapping.trials import ProbeFailure, synthetic_batch
from symmetrize.wrapping.wrapped import Wrapped, wrap

__all__ = ["ProbeFailure", "ProbeWarning", "Wrapped", "probe_backbone", "synthetic_batch", "wrap"]
