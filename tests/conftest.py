"""One thread everywhere: small tensors on several threads are slower, and results depend on the split."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

# For the tests of `benchmarks`, which are not installed. Last, so that the package is the installed one.
sys.path.append(str(Path(__file__).resolve().parents[1]))
