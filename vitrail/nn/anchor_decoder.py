"""A decoder whose queries are boxes that every layer corrects (Conditional DETR 2108.06152, DAB-DETR 2201.12329).

What a query reads is decided by two products for each head, one of contents and one of places: the place of a query
is the sine code of its box's centre, scaled by what the query knows, and narrowed or widened by the box's sides.
So a query looks where its box is from the first step of training on. Groups of queries (Group DETR, 2207.13085) do
not see each other; each learns to find all objects, and one alone is used afterwards.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import attend, attention_weights, head_width, merge_heads, split_heads
from vitrail.nn.block import Mlp
from vitrail.nn.decoder import Bias, QueryAttention
from vitrail.nn.heads import fresh_like
from vitrail.nn.position import sine_code
from vitrail.nn.query_head import BoxMlp

TEMPERATURE = 20.0
"""Temperature of the sine codes of places in 0..1 (DAB-DETR, "temperature tuning"); 10,000 is made for word order."""


def place_code(points: Float[Tensor, "*B P"], width: int) -> Float[Tensor, "*B D"]:
    """Sine codes of numbers in 0..1, `width` numbers for each, one after the other."""
    return sine_code(points.float() * (2 * math.pi), width, TEMPERATURE).flatten(-2)


def logit(share: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The inverse of the sigmoid, kept finite."""
    share = share.clamp(1e-4, 1 - 1e-4)
    return torch.log(share / (1 - share))


class PlacedAttention(nn.Module):
    """Attention whose scores add a product of contents and a product of places, head by head.

    `forward(*inputs) == mix(weights(*inputs), *inputs)`; `place` and `cells` are the codes of queries and memory.
    """

    def __init__(self, width: int, heads: int, *, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, (2 * head_width(width, heads)) ** -0.5
        self.attention_dropout = attention_dropout
        self.query, self.query_place = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.key_place = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        place: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        cells: Float[Tensor, "_ N D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        queries, keys = self._pair(content, place, memory, cells)
        values = self._split(self.value(memory))
        depth = values.shape[-1]
        values = F.pad(values, (0, depth))  # as deep as the keys, without which no fused kernel takes them
        dropout = self.attention_dropout if self.training else 0.0
        return self._merge(attend(queries, keys, values, self.scale, bias, dropout)[..., :depth])

    def weights(
        self,
        content: Float[Tensor, "B Q D"],
        place: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        cells: Float[Tensor, "_ N D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B H Q N"]:
        return attention_weights(*self._pair(content, place, memory, cells), self.scale, bias)

    def mix(
        self,
        weights: Float[Tensor, "B H Q N"],
        content: Float[Tensor, "B Q D"],
        place: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        cells: Float[Tensor, "_ N D"],
        bias: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        return self._merge(weights @ self._split(self.value(memory)))

    def _pair(self, content: Tensor, place: Tensor, memory: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, H, Q, 2 E]` and keys `[B, H, N, 2 E]`: content beside place."""
        queries = [self._split(self.query(content)), self._split(self.query_place(place))]
        keys = self.key(memory)
        places = self._split(self.key_place(cells).expand_as(keys))
        return torch.cat(queries, dim=-1), torch.cat([self._split(keys), places], dim=-1)

    def _split(self, tokens: Tensor) -> Tensor:
        return split_heads(tokens, self.heads)

    def _merge(self, heads: Tensor) -> Tensor:
        out: Tensor = self.proj(merge_heads(heads))  # [B, Q, D]
        return out


class AnchorLayer(nn.Module):
    """Queries of a group look at each other, then at the memory around their boxes, then an MLP; norms after each."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer = QueryAttention(width, heads, attention_dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.reader = PlacedAttention(width, heads, attention_dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, dropout=(dropout, 0.0), activation=nn.ReLU())
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        anchor: Float[Tensor, "B Q D"],
        place: Float[Tensor, "B Q D"],
        memory: Float[Tensor, "B N D"],
        cells: Float[Tensor, "_ N D"],
        bias: Bias | None = None,
        groups: Bias | None = None,
    ) -> Float[Tensor, "B Q D"]:
        placed = content + anchor
        content = self.norm1(content + self.dropout(self.mixer(placed, placed, content, groups)))
        content = self.norm2(content + self.dropout(self.reader(content, place, memory, cells, bias)))
        return self.norm3(content + self.dropout(self.mlp(content)))


class AnchorDecoder(nn.Module):
    """Layers that each correct the boxes that the next one starts from."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(AnchorLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.anchor = BoxMlp(2 * width, width, width, 2)
        self.scale = BoxMlp(width, width, width, 2)
        self.sides = BoxMlp(width, width, 2, 2)

    def forward(
        self,
        content: Float[Tensor, "B Q D"],
        boxes: Float[Tensor, "B Q 4"],
        memory: Float[Tensor, "B N D"],
        cells: Float[Tensor, "_ N D"],
        head: AnchorHead,
        bias: Bias | None = None,
        groups: Bias | None = None,
    ) -> list[tuple[Float[Tensor, "B Q K"], Float[Tensor, "B Q 4"]]]:
        """Every layer's logits and boxes; the last one's alone where nothing trains.

        Args:
            boxes: where the queries begin, (cx, cy, w, h) in 0..1.
            cells: the memory's codes of (y, x), as `place_code` makes them.
        """
        answers = []
        for number, layer in enumerate(self.layers):
            code = place_code(boxes, self.width // 2).to(content.dtype)  # [B, Q, 2 * D]: cx, cy, w, h
            half = self.width // 2
            x, y = code[..., :half], code[..., half : 2 * half]
            sides = self.sides(content).sigmoid() / boxes[..., 2:].clamp(min=1e-2).to(content.dtype)
            place = torch.cat([y * sides[..., 1:], x * sides[..., :1]], dim=-1)
            if number:
                place = place * self.scale(content)
            content = layer(content, self.anchor(code), place, memory, cells, bias, groups)
            logits, boxes = head(content, boxes)
            if self.training or number == len(self.layers) - 1:
                answers.append((logits, boxes))
            boxes = boxes.detach()
        return answers


class AnchorHead(nn.Module):
    """One sigmoid a class, and a correction of the box that came in."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        self.boxes = BoxMlp(width, width)

    def forward(
        self, content: Float[Tensor, "B Q D"], boxes: Float[Tensor, "_ Q 4"]
    ) -> tuple[Float[Tensor, "B Q K"], Float[Tensor, "B Q 4"]]:
        moved = self.boxes(content).float() + logit(boxes.float())
        return self.linear(content), moved.sigmoid()

    def init_weights(self) -> None:
        """Classes are rare (0.01) and boxes stay where they are."""
        nn.init.constant_(self.linear.bias, -math.log(99))
        nn.init.zeros_(self.boxes.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.boxes.layers[-1].bias)  # type: ignore[arg-type]

    def reset(self, num_classes: int) -> None:
        """A new class layer."""
        layer = fresh_like(self.linear, self.linear.in_features, num_classes, "torch")
        assert isinstance(layer, nn.Linear)
        nn.init.constant_(layer.bias, -math.log(99))
        self.linear = layer


def group_bias(groups: int, queries: int, like: Tensor) -> Bias:
    """-inf between queries of different groups, `[1, 1, G * Q, G * Q]`."""
    number = torch.arange(groups * queries, device=like.device) // queries
    apart = number[:, None] != number
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -torch.inf)[
        None, None
    ]
