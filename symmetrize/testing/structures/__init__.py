"""Named structures, paths through them, their symmetry operations, and sets of them for a subject."""
