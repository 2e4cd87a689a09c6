"""What is symmetrised: the ``Backbone`` base class, with one method to write and a few declarations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from symmetrize import keys
from symmetrize.errors import DeclarationError, InvalidTypeError
from symmetrize.representations import OutputSpec


class Copies(NamedTuple):
    """Which atoms and edges of a batch make up a list of (rotated) copies of structures or of environments.

    Copies are numbered from 0; the atoms and the edges of one copy are contiguous, and edges are in ascending order
    of their original number inside a copy. ``edge_index`` refers to rows of ``atom``. Where a backbone that shares work
    between frames is strictly local, the copies hold their centers only, and row 0 of ``edge_index`` is empty.

    Attributes
    ----------
    atom : Tensor of shape (n_copied_atoms,)
        Original atom of each copied atom.
    edge : Tensor of shape (n_copied_edges,)
        Original edge of each copied edge.
    atom_copy, edge_copy : Tensor of shape (n_copied_atoms,), (n_copied_edges,)
        The copy that each of them belongs to.
    source, target : Tensor of shape (n_copied_edges,)
        Rows of ``atom`` that hold the neighbor and the center of each edge; ``source`` has shape (0,) when the copies
        hold centers only.
    center : Tensor of shape (n_copied_atoms,)
        bool, the rows whose output is wanted.
    """

    atom: Tensor
    edge: Tensor
    atom_copy: Tensor
    edge_copy: Tensor
    source: Tensor
    target: Tensor
    center: Tensor

    def rows(self, level: str) -> Tensor | None:
        """Rows of the batch that the copies hold at a level, "atom" or "edge"; None for any other: all of them."""
        return self.atom if level == "atom" else self.edge if level == "edge" else None

    def gather(self, cache: Mapping[str, Tensor], levels: Mapping[str, str]) -> dict[str, Tensor]:
        """Entries with the rows of the copies, where ``levels`` says what their rows are."""
        rows = {name: self.rows(levels.get(name, "")) for name in cache}
        return {
            name: value if (row := rows[name]) is None else value.index_select(0, row) for name, value in cache.items()
        }


class Backbone(torch.nn.Module, ABC):
    """A model of point clouds that knows nothing about rotations.

    A subclass sets the declarations below in its ``__init__`` (through ``super().__init__(...)``) and writes one
    method, ``forward``. In exchange for making no promise about rotations it promises: permutation equivariance (of
    copies that only differ in the order of their atoms one is evaluated), translation invariance, independence of
    the other structures of the batch, smoothness, and no mutation of its input. ``symmetrize.testing`` measures
    each promise.

    Parameters
    ----------
    outputs : dict of str to OutputSpec
        What ``forward`` returns, and how each output transforms.
    cutoff : float or None
        Radius of the neighbor list that the backbone reads (same unit as the positions); None: it reads no edges.
    receptive_field : int or None
        Number of message-passing hops that an output of an atom depends on: 1 means strictly local (the atom and its
        neighbors), None means everything in the structure.
    vectors : dict of str to str, optional
        Further per-atom geometric inputs, as field name -> e3nn irreps; they rotate with the positions.
    """

    #: Whether ``prepare`` and ``forward_frames`` are implemented.
    shares_work: bool = False

    #: What the entries of the cache of `prepare` are, by name. "atom", "edge": one row for each; `forward_frames` gets
    #: the rows of the copies instead of all. "graph": numbers of atoms and edges, handed over whole, as is what is not
    #: named. Large caches should be named: the gradient of an entry that is not costs as much as the whole entry in
    #: every call, and copies that look the same are evaluated once only if all entries are named.
    cache_rows: Mapping[str, str] = {}

    #: Atomic numbers that it knows; None: any.
    species: tuple[int, ...] | None = None

    #: Name in `symmetrize.list_backbones` of the adapter that rebuilds it from `describe`; None: there is none.
    adapter: str | None = None

    def __init__(
        self,
        *,
        outputs: dict[str, OutputSpec],
        cutoff: float | None,
        receptive_field: int | None,
        vectors: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not outputs:
            raise DeclarationError("outputs: expected at least one OutputSpec, got none")
        for name, spec in outputs.items():
            if not isinstance(spec, OutputSpec):
                raise InvalidTypeError(f"outputs[{name!r}]: expected an OutputSpec, got {type(spec).__name__}")
        if cutoff is not None and not cutoff > 0.0:
            raise DeclarationError(f"cutoff: expected a positive length or None, got {cutoff}")
        if receptive_field is not None and (isinstance(receptive_field, bool) or receptive_field < 0):
            raise DeclarationError(f"receptive_field: expected a number of hops or None, got {receptive_field}")
        if receptive_field is not None and receptive_field > 0 and cutoff is None:
            raise DeclarationError(f"receptive_field: {receptive_field} hops need a cutoff, got cutoff=None")
        self.outputs = dict(outputs)
        self.cutoff = None if cutoff is None else float(cutoff)
        self.receptive_field = receptive_field
        self.vectors = dict(vectors or {})

    @abstractmethod
    def forward(self, batch: Data) -> dict[str, Tensor]:
        """Evaluate the network in the orientation in which the batch is given.

        ``batch`` holds the fields of `symmetrize.keys`; ``edge_vec`` is to be read where present, since rotated copies
        of environments are defined by it. Per-atom outputs are rows of ``center_mask`` (all atoms where absent), in
        order; per-structure outputs have one row per structure. Additive terms that depend on the composition alone
        belong into `baseline`, not here.
        """

    def baseline(self, batch: Data) -> dict[str, Tensor]:
        """Orientation-independent additive part of the outputs, such as composition energies, in float64.

        Same rows as the output of that name in `forward`, which does not include it. It is added once, after
        averaging, so that a large constant does not cost the average its precision.
        """
        return {}

    def prepare(self, batch: Data) -> dict[str, Tensor]:
        """Everything that does not depend on orientation, computed once for all frames (see ``shares_work``)."""
        raise NotImplementedError(f"{type(self).__name__} does not share work between frames")

    def forward_frames(
        self, cache: dict[str, Tensor], edge_vec: Tensor, copies: Copies | None = None
    ) -> dict[str, Tensor]:
        """Evaluate copies of what was prepared, given the (rotated) edge vectors of the copies.

        Parameters
        ----------
        cache : dict of str to Tensor
            What `prepare` returned; of entries in ``cache_rows`` the rows of the copied atoms or edges.
        edge_vec : Tensor of shape (n_copied_edges, 3)
            Where ``cutoff`` is None, the rotated positions of the copied atoms instead, (n_copied_atoms, 3).
        copies : Copies, optional
            None stands for one unrotated copy of every structure: ``forward_frames(prepare(batch), edge_vec)`` equals
            ``forward(batch)``.

        Returns
        -------
        dict of str to Tensor
            Rows of ``copies.center`` for per-atom outputs, one row per copy for per-structure outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} does not share work between frames")

    @property
    def oriented_field(self) -> int | None:
        """Hops over which an output of an atom depends on the directions of edges: what a rotated copy has to hold.

        The receptive field, unless a backbone that shares work reads further distances in `prepare` (as for cutoffs
        that adapt to the neighbors of neighbors): these are the same in all orientations.
        """
        return self.receptive_field

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable description from which the adapter rebuilds this backbone, all but its parameters.

        Raises
        ------
        DeclarationError
            By default: there is no such description. A saved model is then loaded into a backbone that the caller
            makes (``symmetrize.load(folder, backbone=...)``).
        """
        raise DeclarationError(
            f"{type(self).__name__}: cannot be rebuilt from a description; make it yourself when the model is loaded: "
            "symmetrize.load(folder, backbone=...)"
        )

    def scriptable(self) -> torch.nn.Module:
        """This backbone as a module of plain tensors that ``torch.jit.script`` accepts, for exports.

        It shares the parameters and buffers of this one, and has two methods, with types that TorchScript reads:

        ``forward(pos, z, structure, n_structures, edge_index, cell_shift, edge_vec, center) -> Dict[str, Tensor]``
            The outputs of `forward`, row for row. ``pos`` (n_atoms, 3); ``z``, ``structure`` (n_atoms,), int64;
            ``n_structures`` an int; ``edge_index`` (2, n_edges), int64, sorted by center; ``cell_shift`` (n_edges, 3),
            int64; ``edge_vec`` (n_edges, 3), to be read instead of differences of positions; ``center`` (n_atoms,),
            bool. A last argument ``cell: Optional[Tensor] = None``, (n_structures, 3, 3), is passed where there is one.
        ``baseline(z) -> Dict[str, Tensor]``
            That of `baseline` for atoms of these species: per atom, float64; empty where there is none.

        Raises
        ------
        DeclarationError
            By default: there is no such form.
        """
        raise DeclarationError(
            f"{type(self).__name__}: cannot be exported, since it has no scriptable form (see Backbone.scriptable)"
        )

    def compilable(self) -> list[torch.nn.Module]:
        """Modules whose calls ``torch.compile`` can take over for inference (see `Symmetrizer.compile`).

        Each takes and returns plain tensors, with no operation whose shape depends on values and no Python decision on
        them; what surrounds it (neighbor lists, ragged rows) stays as it is. By default there are none.
        """
        return []

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters (float64 without parameters).

        Positions have to have the same, except that those of a bfloat16 or float16 network are float32 or float64.
        """
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float64)

    def extra_repr(self) -> str:
        outputs = ", ".join(f"{name}: {spec}" for name, spec in self.outputs.items())
        return f"outputs={{{outputs}}}, cutoff={self.cutoff}, receptive_field={self.receptive_field}"


def n_centers(batch: Data) -> int:
    """Number of rows of a per-atom output."""
    mask = batch.get(keys.CENTER_MASK)
    return int(batch[keys.POS].shape[0] if mask is None else mask.sum())
