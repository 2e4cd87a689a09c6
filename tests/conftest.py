"""One thread everywhere: small tensors on several threads are slower, and results depend on the split."""

import torch

torch.set_num_threads(1)
