"""Pure tensor functions: smooth switches, rotations, Wigner matrices, ragged indexing, neighbor lists."""
