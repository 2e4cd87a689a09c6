"""The checks of this package on other symmetrisation tools: ``python -m benchmarks.peers``, see docs/peers.md."""
