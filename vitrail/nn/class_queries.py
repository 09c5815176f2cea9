"""One learned query a class, and what each finds in a picture: Trans2Seg's decoder (2101.08461) and its head.

A layer's queries attend to the tokens; the scores before the softmax, `[B, K, H, N]`, are the classes' maps. The
head reads the encoder's map beside the maps of one class and gives that class's logits: it runs once a class, with
the same weights.

    published   what the released code computes. The old queries are lost in every layer (the sum that should keep
                them adds the new ones to themselves, which also doubles tokens and maps); queries are cut into heads
                without exchanging heads and classes; maps pass an MLP over the places of a fixed grid.
    clean       residuals where the paper draws them, heads cut as everywhere, maps as they are: any size is alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.attention import head_width, merge_heads, split_heads
from vitrail.nn.block import Mlp
from vitrail.nn.entry import Map
from vitrail.nn.masks import Maps, MaskHead, resize
from vitrail.nn.resnet import ConvNorm
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, split

Numerics = Literal["published", "clean"]


class ClassLayer(nn.Module):
    """One decoder layer: scores of queries over tokens; new queries and tokens unless it is the last."""

    def __init__(
        self, width: int, heads: int, hidden: int, numerics: Numerics, last: bool, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.numerics = heads, head_width(width, heads) ** -0.5, numerics
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.token_norm = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.last = last
        if not last:
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, eps=eps)
            self.mlp = Mlp(width, hidden)
            self.norm3 = nn.LayerNorm(width, eps=eps)
            self.token_mlp = Mlp(width, hidden)

    def forward(
        self, queries: Float[Tensor, "B K D"], tokens: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B N D"], Float[Tensor, "B H K N"]]:
        asked = self.query(self.query_norm(queries))
        if self.numerics == "published":
            asked = asked.view(asked.shape[0], self.heads, queries.shape[1], -1)  # [B, H, K, E], scrambled
        else:
            asked = split_heads(asked, self.heads)  # [B, H, K, E]
        pairs = self.key_value(self.token_norm(tokens)).unflatten(2, (2, self.heads, -1))  # [B, N, 2, H, E]
        keys, values = pairs.permute(2, 0, 3, 1, 4).unbind(0)  # two of [B, H, N, E]
        scores = asked @ keys.transpose(-2, -1) * self.scale  # [B, H, K, N]
        if self.last:
            return queries, tokens, scores
        found = scores.softmax(dim=-1) @ values  # [B, H, K, E]
        if self.numerics == "published":
            found = self.proj(found.reshape(queries.shape))  # [B, K, D], scrambled as the queries were
            queries, tokens = found + found, tokens + tokens
        else:
            queries = queries + self.proj(merge_heads(found))  # [B, K, D]
        queries = queries + self.mlp(self.norm2(queries))
        tokens = tokens + self.token_mlp(self.norm3(tokens))
        return queries, tokens, scores


class GridMlp(nn.Module):
    """Twice the maps, and an MLP along their places: those of one grid, which maps of another are brought to.

    Its inner width is three times the places, whatever the other MLPs' is.
    """

    def __init__(self, grid: Grid, eps: float) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(grid.size, eps=eps)
        self.mlp = Mlp(grid.size, 3 * grid.size)

    def forward(self, maps: Float[Tensor, "B K H N"], grid: Grid) -> Float[Tensor, "B K H N"]:
        twice = maps + maps
        if grid == self.grid:
            return twice + self._added(twice)
        image = twice.flatten(0, 1).unflatten(2, tuple(grid))  # [B * K, H, h, w]
        at_home = resize(image, self.grid, aligned=True).flatten(2)  # [B * K, H, N']
        added = self._added(at_home).unflatten(2, tuple(self.grid))
        added = resize(added, grid, aligned=True).flatten(2)  # [B * K, H, N]
        return twice + added.unflatten(0, maps.shape[:2])

    def _added(self, maps: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """The MLP's share; its width is fixed, so the first axes are laid together for it."""
        flat = maps.reshape(1, -1, maps.shape[-1])
        out: Tensor = self.mlp(self.norm(flat))
        return out.view(maps.shape)


class Separable(nn.Module):
    """3 x 3 over each channel alone, then 1 x 1; batch norm and ReLU after each."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.depth = ConvNorm(channels, channels, 3, groups=channels)
        self.point = ConvNorm(channels, out, 1)

    def forward(self, map: Map) -> Map:
        return F.relu(self.point(F.relu(self.depth(map))))


class ClassQueryHead(MaskHead):
    """Encoder over the last map, decoder with class queries, and a small convolutional head that runs once a class.

    Called as every mask head; the first map lends its detail, resizings keep the corners in the corners. In
    evaluation classes go through the convolutions `together` at a time, which changes nothing but the memory.
    """

    together = 16

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        encoder: Stage,
        width: int,
        depth: int,
        heads: int,
        ratio: int,
        *,
        inner: int = 64,
        numerics: Numerics = "clean",
        grid: Grid,
        eps: float = 1e-5,
    ) -> None:
        """
        Args:
            levels: of the maps that the head is called with; the first and the last are read.
            encoder: from the last map to tokens, perhaps with a class token in front.
            ratio: an MLP's inner width over its outer one.
            inner: channels of the convolutions.
            grid: of the last map at the size that a published network is made for.
        """
        super().__init__()
        self.encoder = encoder
        self.queries = nn.Parameter(torch.zeros(1, num_classes, width))
        self.layers = nn.ModuleList(
            ClassLayer(width, heads, ratio * width, numerics, number == depth - 1, eps)
            for number in range(depth)
        )
        self.grid_mlp = GridMlp(grid, eps) if numerics == "published" else None
        self.join = Separable(width + heads, inner)
        self.refine = Separable(inner, inner)
        self.detail = ConvNorm(levels[0].channels, inner, 1)
        self.finish = Separable(inner, inner)
        self.score = nn.Conv2d(inner, 1, 1)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "B K I J"]:
        tokens, grid, _ = self.encoder(maps[-1], None)
        map, _ = split(tokens, grid)
        found = self.class_maps(tokens[:, tokens.shape[1] - grid.size :], grid)  # [B, K, H, h, w]
        detail = F.relu(self.detail(maps[0]))
        step = found.shape[1] if self.training else self.together
        parts = [
            self._score(map, found[:, first : first + step], detail)
            for first in range(0, found.shape[1], step)
        ]
        return resize(torch.cat(parts, dim=1), size, aligned=True)

    def class_maps(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B K H h w"]:
        """Where each class's query looks, one map a head, before any softmax."""
        first = self.queries.repeat(tokens.shape[0], 1, 1)  # [B, K, D]
        queries = first
        for number, layer in enumerate(self.layers):
            queries, tokens, scores = layer(queries + first if number else queries, tokens)
        maps = scores.transpose(1, 2)  # [B, K, H, N]
        if self.grid_mlp is not None:
            maps = self.grid_mlp(maps, grid)
        return maps.unflatten(3, tuple(grid))

    def _score(self, map: Map, found: Float[Tensor, "B K H h w"], detail: Map) -> Float[Tensor, "B K i j"]:
        """Logits of some classes at the first map's size."""
        batch, classes = found.shape[:2]
        shared = map[:, None].expand(-1, classes, -1, -1, -1)  # [B, K, D, h, w]
        joint = self.refine(self.join(torch.cat([shared, found], dim=2).flatten(0, 1)))  # [B * K, C, h, w]
        fine = resize(joint, (detail.shape[2], detail.shape[3]), aligned=True)
        fine = fine.unflatten(0, (batch, classes)) + detail[:, None]  # [B, K, C, i, j]
        out: Tensor = self.score(self.finish(fine.flatten(0, 1)))  # [B * K, 1, i, j]
        return out.view(batch, classes, *out.shape[2:])

    @property
    def classifier(self) -> nn.Module:
        return self.score

    def reset(self, num_classes: int) -> None:
        """New queries, N(0, 0.02); the convolutions serve every class and stay."""
        old = self.queries
        self.queries = nn.Parameter(old.new_empty(1, num_classes, old.shape[2]))
        nn.init.trunc_normal_(self.queries, std=0.02)
