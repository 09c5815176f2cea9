"""Attention whose keys and values come from a smaller map (PVT, 2102.12122 section 3.3; v2, 2106.13797 section 3).

conv     a convolution of kernel and stride R, then a norm: N queries meet N / R² keys. The cost is still
         quadratic in N, divided by R². Rows and columns beyond the last multiple of R are not seen.
pool     average pooling to 7 x 7, a 1 x 1 convolution, a norm and a GELU ("linear" in PVT v2): 49 keys
         whatever the map, so the cost is linear in N.
none     R = 1: plain attention, and the only form that may see prefix tokens.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.attention import attend, attention_weights, head_width, merge_heads, split_heads
from vitrail.nn.shapes import Grid

POOLED = 7
"""Side of the map that linear attention pools to."""


class SpatialReduction(nn.Module):
    """Multi-head attention of all tokens to a reduced map of themselves."""

    def __init__(
        self,
        width: int,
        heads: int,
        reduction: int | Literal["pool"] = 1,
        *,
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.reduction = heads, head_width(width, heads) ** -0.5, reduction
        self.attention_dropout = attention_dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        if reduction != 1:
            side = 1 if reduction == "pool" else reduction
            self.reduce = nn.Conv2d(width, width, kernel_size=side, stride=side)
            self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        keys, values = self.memory(tokens, grid)
        dropout = self.attention_dropout if self.training else 0.0
        return self.merge(attend(self.queries(tokens), keys, values, self.scale, dropout=dropout))

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B H N M"]:
        """Weights of every token over the cells of the reduced map, row by row."""
        return attention_weights(self.queries(tokens), self.memory(tokens, grid)[0], self.scale)

    def mix(
        self, weights: Float[Tensor, "B H N M"], tokens: Float[Tensor, "B N D"], grid: Grid
    ) -> Float[Tensor, "B N D"]:
        return self.merge(weights @ self.memory(tokens, grid)[1])

    def queries(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N E"]:
        return split_heads(self.q(tokens), self.heads)

    def memory(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> tuple[Tensor, Tensor]:
        """Keys and values of the reduced map, each [B, H, M, E]."""
        joint = self.kv(self._reduced(tokens, grid)).unflatten(2, (2, self.heads, -1))  # [B, M, 2, H, E]
        keys, values = joint.permute(2, 0, 3, 1, 4).unbind(0)  # two of [B, H, M, E]
        return keys, values

    def merge(self, heads: Float[Tensor, "B H N E"]) -> Float[Tensor, "B N D"]:
        out: Tensor = self.dropout(self.proj(merge_heads(heads)))  # [B, N, D]
        return out

    def _reduced(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B M D"]:
        if self.reduction == 1:
            return tokens
        map = tokens.transpose(1, 2).unflatten(2, tuple(grid))  # [B, D, h, w]
        if self.reduction == "pool":
            pooled = self.reduce(F.adaptive_avg_pool2d(map, POOLED))
            return F.gelu(self.norm(pooled.flatten(2).transpose(1, 2)))  # [B, 49, D]
        if min(grid) < self.reduction:
            raise ModelError(
                f"A map of {grid.rows}x{grid.columns} cells is smaller than its reduction by {self.reduction}: give"
                f" an image of at least {self.reduction} times the stage's stride, or smaller `reductions`."
            )
        reduced: Tensor = self.norm(self.reduce(map).flatten(2).transpose(1, 2))  # [B, M, D]
        return reduced


class ConvMlp(nn.Module):
    """An MLP that looks at its neighbours: a depth-wise 3 x 3 convolution before the GELU (PVT v2, section 3.2).

    It brings the position in, so that PVT v2 needs no table. `relu` puts a ReLU before the convolution (the
    linear variants).
    """

    def __init__(self, width: int, hidden: int, *, relu: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        map = self.relu(self.fc1(tokens)).transpose(1, 2).unflatten(2, tuple(grid))  # [B, F, h, w]
        hidden = self.dropout(F.gelu(self.conv(map).flatten(2).transpose(1, 2)))  # [B, N, F]
        out: Tensor = self.dropout(self.fc2(hidden))
        return out
