"""Heads of detectors with queries: what a query has found, and where."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.heads import fresh_like


class BoxMlp(nn.Module):
    """Linear layers with ReLUs between them, from a query's content to four numbers."""

    def __init__(self, width: int, hidden: int, out: int = 4, depth: int = 3) -> None:
        super().__init__()
        sizes = [width] + [hidden] * (depth - 1) + [out]
        self.layers = nn.ModuleList(nn.Linear(size, after) for size, after in pairwise(sizes))

    def forward(self, content: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        for number, layer in enumerate(self.layers):
            content = layer(F.relu(content) if number else content)
        return content


class QueryHead(nn.Module):
    """Class logits with no-object last, and boxes (cx, cy, w, h) in 0..1, of every query."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes + 1)
        self.boxes = BoxMlp(width, width)

    def forward(
        self, content: Float[Tensor, "B Q D"]
    ) -> tuple[Float[Tensor, "B Q K"], Float[Tensor, "B Q 4"]]:
        return self.linear(content), self.boxes(content).sigmoid()

    def reset(self, num_classes: int) -> None:
        """A new class layer."""
        layer = fresh_like(self.linear, self.linear.in_features, num_classes + 1, "torch")
        assert isinstance(layer, nn.Linear)
        self.linear = layer
