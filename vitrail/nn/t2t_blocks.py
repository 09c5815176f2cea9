"""What T2T-ViT borrows from convolutional networks to compare (Yuan et al. 2021, 2101.11986, section 3.2).

Squeeze-and-excitation behind the attention, ghost features in place of half the projections, dense connections.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import Attention, merge_heads
from vitrail.nn.block import Block
from vitrail.nn.shapes import Grid


class GatedAttention(Attention):
    """Attention whose output channels are scaled by a squeeze-and-excitation gate over the tokens' mean."""

    def __init__(
        self, width: int, heads: int, *, reduction: int = 16, **options: float | bool | None
    ) -> None:
        super().__init__(width, heads, **options)  # type: ignore[arg-type]
        self.squeeze = nn.Linear(width, width // reduction, bias=False)
        self.excite = nn.Linear(width // reduction, width, bias=False)

    def merge(
        self, heads: Float[Tensor, "B H N E"], values: Float[Tensor, "B H N E"]
    ) -> Float[Tensor, "B N V"]:
        out: Tensor = self.proj(merge_heads(heads))  # [B, N, D]
        squeezed = torch.relu(self.squeeze(out.mean(dim=1, keepdim=True)))
        gate = torch.sigmoid(self.excite(squeezed))  # [B, 1, D]
        gated: Tensor = self.dropout(out * gate)
        return gated


class Ghost(nn.Module):
    """Scaled copies of features beside the features: a depthwise 1 x 1 convolution without bias."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, 1, 1))
        nn.init.uniform_(self.weight, -1.0, 1.0)  # torch's default for a kernel with one number

    def forward(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return features * self.weight.flatten()


class GhostAttention(Attention):
    """Attention that projects half of each of q, k and v, and takes ghosts for the other half."""

    def __init__(self, width: int, heads: int, **options: float | bool | None) -> None:
        super().__init__(width, heads, **options)  # type: ignore[arg-type]
        self.qkv = nn.Linear(width, 3 * (width // 2), bias=self.qkv.bias is not None)
        self.ghost = Ghost(3 * (width // 2))

    def project(self, tokens: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        half = self.qkv(tokens)  # [B, N, 3 * D / 2]
        joint = torch.stack([half, self.ghost(half)], dim=2).unflatten(3, (3, -1))  # [B, N, 2, 3, D / 2]
        joint = joint.permute(3, 0, 1, 2, 4).flatten(3)  # [3, B, N, D]: features first, their ghosts behind
        joint = joint.unflatten(3, (self.heads, -1)).transpose(2, 3)  # [3, B, H, N, E]
        queries, keys, values = joint.unbind(0)
        return queries, keys, values


class GhostMlp(nn.Module):
    """An MLP whose inner layer is one projection of the token's width and two ghosts of it, each after a GELU."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.ghosts = nn.ModuleList([Ghost(width), Ghost(width)])
        self.act, self.dropout = nn.GELU(), nn.Dropout(dropout)
        self.fc2 = nn.Linear(3 * width, width)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B N D"]:
        inner = self.act(self.fc1(tokens))
        ghosts = [self.act(ghost(inner)) for ghost in self.ghosts]
        inner = torch.cat([inner, *ghosts], dim=-1)  # [B, N, 3 * D]
        out: Tensor = self.dropout(self.fc2(self.dropout(inner)))
        return out


class DenseBlock(Block):
    """A pre-norm block whose output is projected to `growth` channels and put beside the input's."""

    def __init__(self, width: int, growth: int, mixer: nn.Module, mlp: int, **options: float) -> None:
        super().__init__(width, mixer, mlp, **options)  # type: ignore[arg-type]
        self.grow = nn.Linear(width, growth)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N V"]:
        return torch.cat([tokens, self.grow(super().forward(tokens, grid))], dim=-1)  # [B, N, D + growth]


class Transition(nn.Module):
    """Between dense stages: half the width, and a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width // 2), nn.GELU()

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N V"]:
        out: Tensor = self.act(self.linear(tokens))
        return out
