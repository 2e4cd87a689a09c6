"""The data dictionary: names of the fields of a batch, with shape and unit above each.

Batches are ``torch_geometric`` ``Data``/``Batch`` objects. Lengths are in the unit of the positions (angstrom for
atoms); nothing here depends on that choice except that cutoffs use the same one.
"""

from typing import Final

# Positions. (n_atoms, 3), floating, length.
POS: Final = "pos"
# Chemical species (atomic numbers). (n_atoms,), integer.
Z: Final = "z"
# Invariant features of the points. (n_atoms, n_features), floating.
X: Final = "x"
# Structure that each atom belongs to, ascending. (n_atoms,), int64.
BATCH: Final = "batch"
# First atom of each structure. (n_structures + 1,), int64.
PTR: Final = "ptr"
# Lattice vectors as rows; zero where there is none. (n_structures, 3, 3), floating, length.
CELL: Final = "cell"
# Periodicity along each lattice vector. (n_structures, 3), bool.
PBC: Final = "pbc"
# Neighbor list, full: row 0 the neighbor (source), row 1 the center (target). (2, n_edges), int64.
EDGE_INDEX: Final = "edge_index"
# Lattice translation of the neighbor's image. (n_edges, 3), integer.
CELL_SHIFT: Final = "cell_shift"
# Radius that the neighbor list was built with. float or (n_structures,), length.
EDGE_CUTOFF: Final = "edge_cutoff"
# pos[neighbor] + cell_shift @ cell - pos[center]: from the center to the neighbor. (n_edges, 3), floating, length.
EDGE_VEC: Final = "edge_vec"
# Total charge and spin multiplicity (2S + 1) of each structure, for models that read them. (n_structures,).
CHARGE: Final = "charge"
SPIN_MULTIPLICITY: Final = "spin_multiplicity"
# Charge and collinear magnetic moment that a calculator starts from. (n_atoms,), elementary charges, Bohr magnetons.
INITIAL_CHARGES: Final = "initial_charges"
INITIAL_MAGMOMS: Final = "initial_magmoms"
# Atoms whose output is wanted; absent means all. (n_atoms,), bool.
CENTER_MASK: Final = "center_mask"
