"""The two attentions of CaiT (Touvron et al. 2021, 2103.17239): talking heads, and the class token's own.

Talking heads (Shazeer et al. 2020, 2003.02436) mix the heads' scores before the softmax and their weights after it.
Class attention lets the class token read the patches, which stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import Attention, attend, attention_weights, head_width, merge_heads, split_heads
from vitrail.nn.block import Block
from vitrail.nn.shapes import Grid


class HeadMixing(nn.Linear):
    """A linear map, with bias, from the heads' maps to as many others: H x H numbers for maps `[B, H, N, M]`."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads, heads)

    def forward(self, input: Float[Tensor, "B H N M"]) -> Float[Tensor, "B H N M"]:
        # As a convolution, a CPU takes 6 (bf16) to 80 times (float32) as long: it has only H channels.
        mixing = self.weight.expand(input.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], mixing, input.flatten(2)).view_as(input)


class TalkingHeads(Attention):
    """Self-attention whose heads are mixed before the softmax (`before`) and after it (`after`).

    `weights` are those of the softmax, whose rows sum to one; `mix` begins with the second mixing, whose rows need
    not, and may be negative. No fused kernel computes this: memory grows with H N².
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout, dropout=dropout
        )
        self.before, self.after = HeadMixing(heads), HeadMixing(heads)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B N D"]:
        queries, keys, values = self.project(tokens)
        return self._read(self._softmax(queries, keys), values)

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B H N N"]:
        queries, keys, _ = self.project(tokens)
        return self._softmax(queries, keys)

    def mix(
        self, weights: Float[Tensor, "B H N N"], tokens: Float[Tensor, "B N D"], grid: Grid | None = None
    ) -> Float[Tensor, "B N D"]:
        return self._read(weights, self.project(tokens)[2])

    def _softmax(self, queries: Tensor, keys: Tensor) -> Tensor:
        scores = (queries * self.scale) @ keys.transpose(-2, -1)  # [B, H, N, N]
        return torch.softmax(self.before(scores), dim=-1)

    def _read(self, weights: Tensor, values: Tensor) -> Tensor:
        mixed = F.dropout(self.after(weights), self.attention_dropout, self.training)
        return self.merge(mixed @ values, values)


class ClassAttention(nn.Module):
    """Attention whose queries are the prefix tokens alone, over prefix and patches: linear in their number.

    `forward` and `mix` answer the prefix only, `[B, P, D]`; `weights` are `[B, H, P, N]`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_width(width, heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key = nn.Linear(width, width, bias=qkv_bias)
        self.value = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B P D"]:
        queries, keys = self._pair(tokens, grid)
        dropout = self.attention_dropout if self.training else 0.0
        return self._merge(
            attend(queries, keys, self._split(self.value(tokens)), self.scale, dropout=dropout)
        )

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B H P N"]:
        queries, keys = self._pair(tokens, grid)
        return attention_weights(queries, keys, self.scale)

    def mix(
        self, weights: Float[Tensor, "B H P N"], tokens: Float[Tensor, "B N D"], grid: Grid
    ) -> Float[Tensor, "B P D"]:
        return self._merge(weights @ self._split(self.value(tokens)))

    def _pair(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        prefix = tokens[:, : tokens.shape[1] - grid.size]
        return self._split(self.query(prefix)), self._split(self.key(tokens))

    def _split(self, tokens: Tensor) -> Tensor:
        return split_heads(tokens, self.heads)

    def _merge(self, heads: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.proj(merge_heads(heads)))  # [B, P, D]
        return out


class ClassBlock(Block):
    """A pre-norm block that updates the prefix tokens alone; the patches are read and handed on as they are."""

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        count = tokens.shape[1] - grid.size
        prefix, patches = tokens[:, :count], tokens[:, count:]
        prefix = prefix + self.drop_path(self.scale1(self.mixer(self.norm1(tokens), grid)))
        prefix = prefix + self.drop_path(self.scale2(self.mlp(self.norm2(prefix), grid)))
        return torch.cat([prefix, patches], dim=1)
