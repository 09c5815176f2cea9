"""The panoptic head of DETR (2005.12872, section 4.4): a mask for every query, from where the query looks.

The query's attention over the encoder's map, one map a head, is laid over the backbone's map; convolutions and
finer maps of the backbone bring it to stride 4. One softmax runs over all heads and cells together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import split_heads

GROUPS = 8


class AttentionMaps(nn.Module):
    """Where each query looks: shares of heads and cells that sum to one over both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        for part in (self.query, self.key):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        bias: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B Q H N"]:
        queries = split_heads(self.query(content), self.heads)  # [B, H, Q, E]
        keys = split_heads(self.key(memory), self.heads)  # [B, H, N, E]
        scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)  # [B, H, Q, N]
        scores = (scores if bias is None else scores + bias).transpose(1, 2)  # [B, Q, H, N]
        return scores.flatten(2).softmax(dim=-1).view(scores.shape)  # [B, Q, H, N]


class ConvGroup(nn.Module):
    """A 3 x 3 convolution, a group norm, a ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(GROUPS, out), out)

    def forward(self, map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        out: Tensor = F.relu(self.norm(self.conv(map)))
        return out


class QueryMaskHead(nn.Module):
    """Masks at the finest of the maps handed in.

    Args:
        width: channels of the encoder's map; heads: maps of attention.
        finer: channels of the backbone's maps that come in, coarse to fine.
    """

    def __init__(self, width: int, heads: int, finer: Sequence[int]) -> None:
        super().__init__()
        self.attention = AttentionMaps(width, heads)
        self.first = ConvGroup(width + heads, width + heads)
        self.second = ConvGroup(width + heads, width // 2)
        sizes = [width // 2 ** (number + 1) for number in range(len(finer) + 1)]
        pairs = list(pairwise(sizes))
        self.adapters = nn.ModuleList(
            nn.Conv2d(c, size, 1) for c, (size, _) in zip(finer, pairs, strict=True)
        )
        self.refine = nn.ModuleList(ConvGroup(size, after) for size, after in pairs)
        self.last = nn.Conv2d(sizes[-1], 1, 3, padding=1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.weight.device.type != "meta":
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        map: Float[Tensor, "B D h w"],
        finer: Sequence[Tensor],
        bias: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B Q _ _"]:
        """Logits `[B, Q, h', w']` at the last of the finer maps' size.

        Args:
            content: the decoder's last, normed. memory: the encoder's tokens, `map` what went into the encoder.
            finer: the backbone's maps, coarse to fine.
            bias: -inf at padded cells.
        """
        looks = self.attention(content, memory, bias).unflatten(3, tuple(map.shape[2:]))  # [B, Q, H, h, w]
        queries = looks.shape[1]

        def each(part: Tensor) -> Tensor:
            """One copy a query: [B * Q, C, h, w]."""
            return part[:, None].expand(-1, queries, -1, -1, -1).flatten(0, 1)

        found = self.second(self.first(torch.cat([each(map), looks.flatten(0, 1)], dim=1)))
        for adapter, refine, part in zip(self.adapters, self.refine, finer, strict=True):
            part = each(adapter(part))
            found = refine(part + F.interpolate(found, size=part.shape[-2:], mode="nearest"))
        return self.last(found)[:, 0].unflatten(0, (-1, queries))  # [B, Q, h', w']
