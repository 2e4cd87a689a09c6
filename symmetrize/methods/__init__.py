"""Symmetrisation methods: one file per method, each a `FrameMethod`."""
