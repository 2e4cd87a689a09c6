"""The Point Edge Transformer as plain tensor code.

Architecture: S. N. Pozdnyakov and M. Ceriotti, "Smooth, exact rotational symmetrization for deep learning on point
clouds", NeurIPS 2023 (arXiv:2305.19302), in the form that metatrain maintains. Parameters carry metatrain's names
below ``backend.`` (see `METATRAIN_NAMES` in `storage` for the one difference), and the functions they define agree.
What differs is how they are evaluated: maps that follow each other without a nonlinearity are contracted first, so that
an edge meets a 4-column matrix where it would meet three wide ones; scales of normalizations and of the attention are
folded into the matrices behind them; and blocks only see the atoms that the wanted outputs depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from .attention import attend
from .conditioning import SystemConditioning
from .config import PETConfig
from .edges import (
    NEVER,
    Layout,
    Stage,
    make_stages,
    narrow_atoms,
    narrow_edges,
    receive,
    select,
    sum_rows,
    to_list,
    to_rows,
)
from .fused import attention_update, gated_update
from .pointwise import gate, rms_epsilon, rms_normalize, silu


class Norm(nn.Module):
    """RMSNorm or LayerNorm, with the affine part separable: ``forward(x) == affine(normalize(x))``."""

    def __init__(self, width: int, kind: str, epsilon: float | None = None) -> None:
        super().__init__()
        self.centered = kind == "LayerNorm"
        self.epsilon = -1.0 if epsilon is None else epsilon  # TorchScript knows no optional floats here
        self.weight = nn.Parameter(torch.ones(width))
        if self.centered:
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.register_parameter("bias", None)

    def normalize(self, x: Tensor) -> Tensor:
        return rms_normalize(self.center(x), self.added(x))

    def center(self, x: Tensor) -> Tensor:
        """``x`` minus its mean if that is part of this norm: ``normalize(x) == rms_normalize(center(x), added(x))``."""
        return x - x.mean(dim=-1, keepdim=True) if self.centered else x

    def added(self, x: Tensor) -> float:
        """What is added to the mean square."""
        if self.centered:
            return 1e-5
        return rms_epsilon(x) if self.epsilon < 0.0 else self.epsilon

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear map with the affine part of this norm in front of it."""
        shift = self.bias
        if shift is not None:
            bias = bias + weight @ shift
        return weight * self.weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize(x) * self.weight
        shift = self.bias
        return y if shift is None else y + shift


class FeedForward(nn.Module):
    """One hidden layer, gated (SwiGLU as metatrain has it: value times sigmoid of the gate) or not."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gated = activation == "SwiGLU"
        self.w_in = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.w_out = nn.Linear(hidden, width)

    def apply_folded(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = linear(x, weight, bias)
        return self.w_out(gate(h) if self.gated else silu(h))

    def update(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """x + apply_folded(rms_normalize(x, epsilon), ...)."""
        if torch.jit.is_scripting():
            return x + self.apply_folded(rms_normalize(x, epsilon), weight, bias)
        elif not self.gated or torch.compiler.is_compiling():
            return x + self.apply_folded(rms_normalize(x, epsilon), weight, bias)
        else:
            return gated_update(x, weight, bias, self.w_out.weight, self.w_out.bias, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_folded(x, self.w_in.weight, self.w_in.bias)


class Attention(nn.Module):
    """Multi-head attention among the tokens of an atom; the logarithm of the cutoff is added to the logits."""

    def __init__(self, width: int, n_heads: int, temperature: float) -> None:
        super().__init__()
        self.input_linear = nn.Linear(width, 3 * width)
        self.output_linear = nn.Linear(width, width)
        self.n_heads = n_heads
        self.width = width
        self.logit_scale = 1.0 / ((width // n_heads) ** 0.5 * temperature)

    def scaled(self, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        # Queries take the scale of the logits; on the weights it costs nothing.
        weight = torch.cat([weight[: self.width] * self.logit_scale, weight[self.width :]])
        shift = torch.cat([shift[: self.width] * self.logit_scale, shift[self.width :]])
        return weight, shift

    def update(self, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        """forward(rms_normalize(x, epsilon)), with other weights."""
        weight, shift = self.scaled(weight, shift)
        if torch.jit.is_scripting():
            return self.output_linear(attend(linear(rms_normalize(x, epsilon), weight, shift), bias, self.n_heads))
        elif torch.compiler.is_compiling():  # which cannot follow functions that ask the engine what is wanted
            return self.output_linear(attend(linear(rms_normalize(x, epsilon), weight, shift), bias, self.n_heads))
        else:
            out = self.output_linear
            return attention_update(x, bias, weight, shift, out.weight, out.bias, self.n_heads, epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        weight, shift = self.scaled(self.input_linear.weight, self.input_linear.bias)
        return self.output_linear(attend(linear(x, weight, shift), bias, self.n_heads))


class TransformerLayer(nn.Module):
    """Attention and feed-forward layer; an atom's own features may be wider than a token."""

    __constants__ = ("expanded", "pre_norm", "centered")  # branches on these are resolved when TorchScript compiles

    def __init__(self, config: PETConfig) -> None:
        super().__init__()
        width, node_width, norm = config.d_pet, config.d_node, config.normalization
        self.attention = Attention(width, config.num_heads, config.attention_temperature)
        self.norm_attention = Norm(width, norm, config.normalization_epsilon)
        self.norm_mlp = Norm(width, norm, config.normalization_epsilon)
        self.mlp = FeedForward(width, config.d_feedforward, config.activation)
        self.expanded = node_width != width
        self.pre_norm = config.transformer_type == "PreLN"
        self.centered = norm == "LayerNorm"
        if self.expanded:
            self.center_contraction = nn.Linear(node_width, width)
            self.center_expansion = nn.Linear(width, node_width)
            self.norm_center_features = Norm(node_width, norm, config.normalization_epsilon)
            self.center_mlp = FeedForward(node_width, 2 * node_width, config.activation)

    def forward(self, node: Tensor, edge: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n_atoms, d_node), tokens (n_atoms, width, d_pet) and logit bias (n_atoms, 1 + width)."""
        if self.expanded:
            token = self.center_contraction(node)
        else:
            token = node
        tokens = torch.cat([token[:, None, :], edge], dim=1)
        if self.pre_norm:
            norm = self.norm_attention
            weight, shift = norm.fold(self.attention.input_linear.weight, self.attention.input_linear.bias)
            tokens = self.attention.update(norm.center(tokens), bias, weight, shift, norm.added(tokens))
            token, update = tokens[:, 0], tokens[:, 1:]
            edge = edge + update
            norm = self.norm_mlp
            weight, shift = norm.fold(self.mlp.w_in.weight, self.mlp.w_in.bias)
            if self.centered:
                edge = edge + self.mlp.apply_folded(norm.normalize(edge), weight, shift)
            else:
                edge = self.mlp.update(edge, weight, shift, norm.added(edge))
        else:
            tokens = self.norm_attention(tokens + self.attention(tokens, bias))
            tokens = self.norm_mlp(tokens + self.mlp(tokens))
            token, edge = tokens[:, 0], tokens[:, 1:]
        if self.expanded:
            token = node + self.center_expansion(token)
            norm = self.norm_center_features
            weight, shift = norm.fold(self.center_mlp.w_in.weight, self.center_mlp.w_in.bias)
            if self.centered:
                token = token + self.center_mlp.apply_folded(norm.normalize(token), weight, shift)
            else:
                token = self.center_mlp.update(token, weight, shift, norm.added(token))
        return token, edge


class Transformer(nn.Module):
    """A stack of layers."""

    def __init__(self, config: PETConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TransformerLayer(config) for _ in range(config.num_attention_layers)])

    def forward(self, node: Tensor, edge: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            node, edge = layer(node, edge, bias)
        return node, edge


class SiLU(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class Block(nn.Module):
    """Tokens of edges from their geometry, species and message, and a transformer over the tokens of each atom."""

    __constants__ = ("first",)

    def __init__(self, config: PETConfig, first: bool) -> None:
        super().__init__()
        width = config.d_pet
        self.first = first
        self.width = width
        self.trans = Transformer(config)
        self.edge_embedder = nn.Linear(4, width)
        self.compress = nn.Sequential(nn.Linear((2 if first else 3) * width, width), SiLU(), nn.Linear(width, width))
        if not first:
            self.neighbor_embedder = nn.Embedding(len(config.atomic_types), width)

    def forward(
        self,
        node: Tensor,
        geometry: Tensor,
        species: Tensor,
        table: Tensor,
        message: Tensor,
        bias: Tensor,
        places: Layout,
    ) -> tuple[Tensor, Tensor]:
        """Features of atoms and of edges (as a rectangle).

        Parameters
        ----------
        node : Tensor of shape (n_rows, d_node)
        geometry : Tensor of shape (n_edges, 4)
            Vector and length of each edge.
        species : Tensor of shape (n_edges,)
            Species of the neighbors.
        table : Tensor of shape (n_species, d_pet)
            Part of the incoming message that depends on the neighbor's species alone.
        message : Tensor of shape (n_edges, d_pet)
            The other part; not read by the first block, where there is none.
        bias : Tensor of shape (n_rows, 1 + width)
            Logarithm of the cutoff of each token.
        places : Layout
        """
        wide = self.compress[0].weight
        # What is linear in the geometry, and what depends on the species: contracted before it meets an edge.
        geometric = wide[:, : self.width]  # type: ignore[index]
        from_geometry = geometric @ self.edge_embedder.weight
        from_message = wide[:, -self.width :].t()  # type: ignore[index]
        constant = geometric @ self.edge_embedder.bias + self.compress[0].bias  # type: ignore[operator]
        by_species = torch.addmm(constant, table, from_message)
        if not self.first:
            by_species = torch.addmm(
                by_species,
                self.neighbor_embedder.weight,
                wide[:, self.width : 2 * self.width].t(),  # type: ignore[index]
            )
        edge = torch.addmm(embedding(species, by_species), geometry, from_geometry.t())
        if not self.first:
            edge = torch.addmm(edge, message, from_message)
        edge = self.compress[2](self.compress[1](edge))
        return self.trans(node, to_rows(edge, places, 0.0), bias)


class PETNetwork(nn.Module):
    """Features and readouts of every wanted atom."""

    __constants__ = ("residual", "lengths_only")

    def __init__(self, config: PETConfig) -> None:
        super().__init__()
        n_species, width, n_blocks = len(config.atomic_types), config.d_pet, config.num_gnn_layers
        self.residual = config.featurizer_type == "residual"
        self.n_exchanges = config.n_exchanges
        self.lengths_only = config.inputs == "lengths"
        self.gnn_layers = nn.ModuleList([Block(config, first=number == 0) for number in range(n_blocks)])
        self.combination_norms = nn.ModuleList()
        self.combination_mlps = nn.ModuleList()
        if not self.residual:
            for _ in range(n_blocks):
                self.combination_norms.append(Norm(2 * width, "LayerNorm"))
                self.combination_mlps.append(
                    nn.Sequential(nn.Linear(2 * width, 2 * width), SiLU(), nn.Linear(2 * width, width))
                )
        n_readouts = n_blocks if self.residual else 1
        self.node_embedders = nn.ModuleList([nn.Embedding(n_species, config.d_node) for _ in range(n_readouts)])
        self.edge_embedder = nn.Embedding(n_species, width)
        self.system_conditioning = (
            SystemConditioning(config.d_node, config.max_charge, config.max_spin_multiplicity)
            if config.system_conditioning
            else None
        )
        self.node_heads = nn.ModuleDict()
        self.edge_heads = nn.ModuleDict()
        self.node_last_layers = nn.ModuleDict()
        self.edge_last_layers = nn.ModuleDict()
        for name, n_components in config.output_widths.items():
            self.node_heads[name] = nn.ModuleList([_head(config.d_node, config.d_head) for _ in range(n_readouts)])
            self.edge_heads[name] = nn.ModuleList([_head(width, config.d_head) for _ in range(n_readouts)])
            self.node_last_layers[name] = nn.ModuleList(
                [nn.Linear(config.d_head, n_components) for _ in range(n_readouts)]
            )
            self.edge_last_layers[name] = nn.ModuleList(
                [nn.Linear(config.d_head, n_components) for _ in range(n_readouts)]
            )

    def forward(
        self,
        edge_vec: Tensor,
        edge_scalars: Tensor,
        neighbor_species: Tensor,
        species: Tensor,
        source: Tensor,
        target: Tensor,
        reverse: Tensor,
        center: Tensor,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Readouts of the atoms in ``center``.

        Parameters
        ----------
        edge_vec : Tensor of shape (n_edges, 3)
        edge_scalars : Tensor of shape (n_edges, 3)
            Length, cutoff weight and its logarithm.
        neighbor_species : Tensor of shape (n_edges,)
            Species of the neighbors, as rows of the embeddings.
        species : Tensor of shape (n_atoms,)
        source, target : Tensor of shape (n_edges,)
            Neighbor and center of each edge; ``target`` is ascending, ``source`` is not read where no messages are
            exchanged.
        reverse : Tensor of shape (n_edges,)
            Number of the reverse edge, -1 for none; not read where no messages are exchanged.
        center : Tensor of shape (n_atoms,), bool
        condition : Tensor of shape (n_atoms, d_node), optional
            Added to the features of the atoms behind every block.

        Returns
        -------
        dict of str to Tensor of shape (n_centers, n_components)
        """
        if self.lengths_only:
            # Still part of the graph: whoever differentiates finds zeros, not nothing.
            edge_vec = 0.0 * edge_vec
        geometry = torch.cat([edge_vec, edge_scalars[:, :1]], dim=1)
        stages = make_stages(center, source, target, self.n_exchanges)
        last = stages[-1]
        nodes: list[Tensor] = []
        edges: list[Tensor] = []
        # Messages are kept in two parts: share * edge_embedder(species of the neighbor) + message.
        message = geometry
        share = 1.0
        number = 0
        if self.residual:
            for block, node_embedder in zip(self.gnn_layers, self.node_embedders, strict=True):
                stage = stages[number]
                node, edge = block(
                    embedding(select(species, stage.atom, stage), node_embedder.weight),  # type: ignore[arg-type]
                    select(geometry, stage.edge, stage),
                    select(neighbor_species, stage.edge, stage),
                    share * self.edge_embedder.weight,
                    message,
                    logit_bias(edge_scalars, stage),
                    stage.places,
                )
                if condition is not None:
                    node = node + select(condition, stage.atom, stage)
                nodes.append(narrow_atoms(node, stage, last))
                edges.append(narrow_edges(to_list(edge, stage.places), stage, last))
                if number < self.n_exchanges:
                    received = receive(edge, stage, stages[number + 1], reverse)
                    if number > 0:
                        received = received + narrow_edges(message, stage, stages[number + 1])
                    message = 0.5 * received
                    share = 0.5 * share
                number += 1
        else:
            first = stages[0]
            node = embedding(select(species, first.atom, first), self.node_embedders[0].weight)  # type: ignore[arg-type]
            for block, norm, mlp in zip(self.gnn_layers, self.combination_norms, self.combination_mlps, strict=True):
                stage = stages[number]
                after = stages[number + 1]
                node, edge = block(
                    node,
                    select(geometry, stage.edge, stage),
                    select(neighbor_species, stage.edge, stage),
                    self.edge_embedder.weight,
                    message,
                    logit_bias(edge_scalars, stage),
                    stage.places,
                )
                if condition is not None:
                    node = node + select(condition, stage.atom, stage)
                received = receive(edge, stage, after, reverse)
                sent = narrow_edges(to_list(edge, stage.places), stage, after)
                node = narrow_atoms(node, stage, after)
                widen = mlp[0]  # type: ignore[index]
                weight, shift = norm.fold(widen.weight, widen.bias)  # type: ignore[operator]
                hidden = linear(norm.normalize(torch.cat([sent, received], dim=1)), weight, shift)  # type: ignore[operator]
                update = sent + mlp[2](mlp[1](hidden))  # type: ignore[index]
                message = update if number == 0 else update + narrow_edges(message, stage, after)
                number += 1
            nodes.append(node)
            final_species = select(neighbor_species, last.edge, last)
            edges.append(message + embedding(final_species, self.edge_embedder.weight))
        return self.read_out(nodes, edges, select(edge_scalars, last.edge, last)[:, 1:2], last.places)

    def read_out(self, nodes: list[Tensor], edges: list[Tensor], weight: Tensor, places: Layout) -> dict[str, Tensor]:
        """Sum over readouts of the contributions of the atoms and of their edges, weighted by the cutoff."""
        out: dict[str, Tensor] = {}
        for name, node_heads, edge_heads, node_last, edge_last in zip(
            self.node_heads.keys(),
            self.node_heads.values(),
            self.edge_heads.values(),
            self.node_last_layers.values(),
            self.edge_last_layers.values(),
            strict=True,
        ):
            number = 0
            for node_head, edge_head, last_node, last_edge in zip(  # type: ignore[call-overload]
                node_heads, edge_heads, node_last, edge_last, strict=True
            ):
                values = last_node(node_head(nodes[number])) + sum_rows(
                    last_edge(edge_head(edges[number])) * weight, places
                )
                out[name] = values if number == 0 else out[name] + values
                number += 1
        return out


def logit_bias(edge_scalars: Tensor, stage: Stage, never: float = NEVER) -> Tensor:
    """Logarithm of the cutoff of each token of each atom, that of the atom itself first: (n_rows, 1 + width)."""
    logarithm = select(edge_scalars, stage.edge, stage)[:, 2]
    if logarithm.dtype == torch.float16:  # which ends at 65504; the exponential is zero all the same
        never = -6e4
        logarithm = logarithm.clamp(min=never)
    rows = to_rows(logarithm, stage.places, never)
    return torch.cat([torch.zeros_like(stage.atom, dtype=rows.dtype)[:, None], rows], dim=1)


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), SiLU(), nn.Linear(hidden, hidden), SiLU())
