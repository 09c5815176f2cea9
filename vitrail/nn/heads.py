"""Heads: from the last tokens to class logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.shapes import ClassOutput

Pool = Literal["token", "mean", "flatten"]
Start = Literal["small", "zero", "torch"]
"""How a new class layer starts: N(0, 0.02) and biases 0, all zero, or as torch starts a linear layer."""


class ClassHead(nn.Module):
    """Pool the tokens, then a linear layer or an MLP.

    pool "token" takes the first prefix token, "mean" averages what stands behind `prefix` tokens, "flatten" lays all
    `tokens` end to end (the Keras CIFAR-100 example; this one fixes the image size). `norm` is a norm after the
    pooling. `representation` is the tanh layer of the 21k checkpoints. `hidden` are widths of GELU layers with dropout.
    `start` is the family's way to start a class layer, for `reset`.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        pool: Pool = "token",
        tokens: int = 1,
        prefix: int = 0,
        norm: nn.Module | None = None,
        representation: int = 0,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        start: Start = "small",
    ) -> None:
        super().__init__()
        self.pooling, self.expected, self.prefix, self.start = pool, tokens, prefix, start
        self.norm = nn.Identity() if norm is None else norm
        features = width * tokens if pool == "flatten" else width
        self.representation: nn.Module = nn.Identity()
        if representation:
            self.representation = nn.Sequential(nn.Linear(features, representation), nn.Tanh())
            features = representation
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(features, size), nn.GELU(), nn.Dropout(dropout)]
            features = size
        self.hidden = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.linear = class_layer(features, num_classes)

    def pool(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B _"]:
        """One vector a picture: what the last layers see, after the norm that follows the pooling."""
        if self.pooling == "token":
            vector = tokens[:, 0]
        elif self.pooling == "mean":
            vector = tokens[:, self.prefix :].mean(dim=1)
        else:
            if tokens.shape[1] != self.expected:
                raise ModelError(
                    f"A head on all tokens laid end to end was built for {self.expected} tokens; got"
                    f" {tokens.shape[1]}. Build the model with this img_size, or take pool='mean'."
                )
            vector = tokens.flatten(1)  # [B, N * D]
        pooled: Tensor = self.norm(vector)
        return pooled

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        vector = self.hidden(self.dropout(self.representation(self.pool(tokens))))
        out: Tensor = self.linear(vector)
        return out

    @property
    def classifier(self) -> nn.Module:
        return self.linear

    def reset(self, num_classes: int) -> None:
        """A new last layer for other classes, as a new model has it."""
        self.linear = fresh_like(self.linear, _features(self.linear), num_classes, self.start)


class DistilledHead(nn.Module):
    """Two linear heads, on the class token and on the distillation token; their logits are averaged (DeiT).

    While `separate` is set and the module trains, the pair is returned, for a loss on each.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
        start: Start = "small",
    ) -> None:
        super().__init__()
        self.start = start
        self.norm = nn.Identity() if norm is None else norm
        self.dropout = nn.Dropout(dropout)
        self.linear = class_layer(width, num_classes)
        self.distilled = class_layer(width, num_classes)
        self.separate = False

    def pool(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """The mean of the two tokens that the heads read."""
        pooled: Tensor = self.norm(tokens[:, :2]).mean(dim=1)
        return pooled

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Tensor | ClassOutput:
        pair = self.dropout(self.norm(tokens[:, :2]))  # [B, 2, D]
        logits, distilled = self.linear(pair[:, 0]), self.distilled(pair[:, 1])  # [B, K] each
        if self.separate and self.training:
            return ClassOutput(logits, distilled)
        return (logits + distilled) / 2

    @property
    def classifier(self) -> nn.Module:
        return self.linear

    def reset(self, num_classes: int) -> None:
        """New last layers for other classes, as a new model has them."""
        features = _features(self.linear)
        self.linear = fresh_like(self.linear, features, num_classes, self.start)
        self.distilled = fresh_like(self.distilled, features, num_classes, self.start)


def class_layer(features: int, num_classes: int) -> nn.Module:
    """The last linear layer, or nothing where the model has no classes."""
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _features(layer: nn.Module) -> int:
    """Features that a class layer reads. Raises ModelError where the model has no classes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    raise ModelError("A head without classes cannot be given new ones: build the model with num_classes.")


def fresh_like(old: nn.Module, features: int, num_classes: int, start: Start) -> nn.Module:
    """A new class layer on the old one's device and in its type."""
    layer = class_layer(features, num_classes)
    if isinstance(layer, nn.Linear):
        if start == "small":
            nn.init.trunc_normal_(layer.weight, std=0.02)
        elif start == "zero":
            nn.init.zeros_(layer.weight)
        if start != "torch":
            nn.init.zeros_(layer.bias)
        if isinstance(old, nn.Linear):
            layer = layer.to(device=old.weight.device, dtype=old.weight.dtype)
    return layer
