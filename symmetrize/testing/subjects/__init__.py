"""Any model as a subject: symmetrizers, backbones, functions of batches or tensors, calculators, metatomic models."""
