"""The metatomic format: models in files, how their outputs transform, and systems made from batches.

Nothing is imported here: the library is optional, and everything that needs it (or torch) is in the modules.
"""

from symmetrize.metatomic.libraries import compilable, import_metatomic, import_metatrain

__all__ = ["compilable", "import_metatomic", "import_metatrain"]
