"""Encoder and decoder layers with positions, padding and object queries (DETR, 2005.12872, appendix A.3).

Positions are added to queries and keys in every layer, never to values. Queries are positions too: what they read
starts at zero. A bias `[B, 1, 1, M]` of 0 and -inf leaves padding out.

    post   x = norm(x + f(x))     the published models
    pre    x = x + f(norm(x)), and a norm after the last encoder layer
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import attend, attention_weights, head_width, merge_heads, split_heads
from vitrail.nn.block import Mlp
from vitrail.nn.recompute import recomputed

Order = Literal["post", "pre"]
Bias = Float[Tensor, "_ _ _ _"]


class QueryAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from three places.

    `forward(q, k, v, bias) == mix(weights(q, k, v, bias), q, k, v, bias)`.
    """

    def __init__(self, width: int, heads: int, *, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_width(width, heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B M D"],
        values: Float[Tensor, "B M D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        dropout = self.attention_dropout if self.training else 0.0
        heads = attend(
            self._split(self.query(queries)), self._split(self.key(keys)), self._split(self.value(values)),
            self.scale, bias, dropout,
        )  # fmt: skip
        return self._merge(heads)

    def weights(
        self,
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B M D"],
        values: Float[Tensor, "B M D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B H Q M"]:
        return attention_weights(
            self._split(self.query(queries)), self._split(self.key(keys)), self.scale, bias
        )

    def mix(
        self,
        weights: Float[Tensor, "B H Q M"],
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B M D"],
        values: Float[Tensor, "B M D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        return self._merge(weights @ self._split(self.value(values)))

    def _split(self, tokens: Tensor) -> Tensor:
        return split_heads(tokens, self.heads)

    def _merge(self, heads: Tensor) -> Tensor:
        out: Tensor = self.proj(merge_heads(heads))  # [B, Q, D]
        return out


class EncoderLayer(nn.Module):
    """Self-attention over the map, and an MLP with a ReLU; dropout on each branch."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, order: Order = "post", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.order = order
        self.mixer = QueryAttention(width, heads, attention_dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, dropout=(dropout, 0.0), activation=nn.ReLU())
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Float[Tensor, "B N D"], positions: Float[Tensor, "_ N D"], bias: Bias | None = None
    ) -> Float[Tensor, "B N D"]:
        if self.order == "post":
            placed = tokens + positions
            tokens = self.norm1(tokens + self.dropout(self.mixer(placed, placed, tokens, bias)))
            tokens = self.norm2(tokens + self.dropout(self.mlp(tokens)))
            return tokens
        normed = self.norm1(tokens)
        placed = normed + positions
        tokens = tokens + self.dropout(self.mixer(placed, placed, normed, bias))
        return tokens + self.dropout(self.mlp(self.norm2(tokens)))


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the memory, then an MLP."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, order: Order = "post", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.order = order
        self.mixer = QueryAttention(width, heads, attention_dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.reader = QueryAttention(width, heads, attention_dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, dropout=(dropout, 0.0), activation=nn.ReLU())
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        queries: Float[Tensor, "Q D"],
        memory: Float[Tensor, "B N D"],
        keys: Float[Tensor, "B N D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """
        Args:
            content: what the queries know so far.
            queries: their learned positions.
            memory: the encoder's tokens, and `keys` the same with their positions added.
            bias: -inf at the memory's padding.
        """
        if self.order == "post":
            placed = content + queries
            content = self.norm1(content + self.dropout(self.mixer(placed, placed, content)))
            content = self.norm2(content + self.dropout(self.reader(content + queries, keys, memory, bias)))
            return self.norm3(content + self.dropout(self.mlp(content)))
        normed = self.norm1(content)
        placed = normed + queries
        content = content + self.dropout(self.mixer(placed, placed, normed))
        content = content + self.dropout(self.reader(self.norm2(content) + queries, keys, memory, bias))
        return content + self.dropout(self.mlp(self.norm3(content)))


class Encoder(nn.Module):
    """Layers one after the other; a norm at the end in the pre order only."""

    def __init__(
        self, width: int, heads: int, hidden: int, depth: int, *, order: Order = "post", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, hidden, order=order, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if order == "pre" else nn.Identity()
        self.recompute = False  # activation checkpointing, switched by set_grad_checkpointing

    def forward(
        self, tokens: Float[Tensor, "B N D"], positions: Float[Tensor, "_ N D"], bias: Bias | None = None
    ) -> Float[Tensor, "B N D"]:
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                tokens = recomputed(layer, tokens, positions, bias)
            else:
                tokens = layer(tokens, positions, bias)
        out: Tensor = self.norm(tokens)
        return out


class Decoder(nn.Module):
    """Layers one after the other, and one norm on a copy of each layer's output."""

    def __init__(
        self, width: int, heads: int, hidden: int, depth: int, *, order: Order = "post", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, hidden, order=order, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.recompute = False

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        memory: Float[Tensor, "B N D"],
        positions: Float[Tensor, "_ N D"],
        bias: Bias | None = None,
    ) -> list[Float[Tensor, "B Q D"]]:
        """Every layer's content after the norm; the last one alone where nothing trains."""
        content = memory.new_zeros(memory.shape[0], *queries.shape)  # [B, Q, D]
        keys = memory + positions
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                content = recomputed(layer, content, queries, memory, keys, bias)
            else:
                content = layer(content, queries, memory, keys, bias)
            if self.training or number == len(self.layers) - 1:
                kept.append(self.norm(content))
        return kept


def padding_bias(padding: Tensor, like: Tensor) -> Bias:
    """0 where a cell is real and -inf where it is padding, from `[B, h, w]` or `[B, N]`, True at padding, to
    `[B, 1, 1, N]`."""
    bias = torch.zeros(padding.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill(padding, float("-inf")).flatten(1)[:, None, None]  # [B, 1, 1, N]


def padding_at(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels' padding `[B, I, J]` at a map's size: each cell takes the nearest pixel's."""
    return F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0].bool()  # [B, h, w]
