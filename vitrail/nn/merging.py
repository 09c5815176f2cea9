"""Token merging (Bolya et al. 2023, 2210.09461): tokens that are alike become one, a few in every block.

Between attention and MLP, the patch tokens are dealt into two hands in turns. Each token of the first finds the
token of the second whose key is nearest (cosine, keys averaged over heads); the `count` nearest pairs become one
token each, the mean weighted by how many patches each stands for. Attention then counts a token as often as it
stands for patches: log(size) is added to the scores ("proportional attention", equation 1). Prefix tokens are
never merged. No weight changes, and nothing is trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import UnsupportedError
from vitrail.nn.attention import Attention, attend
from vitrail.nn.block import Block
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Trunk, join


def merge(
    tokens: Float[Tensor, "B N D"],
    sizes: Float[Tensor, "B N 1"],
    keys: Float[Tensor, "B H N E"],
    count: int,
    prefix: int,
) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M 1"]]:
    """Tokens and their sizes with `count` fewer of them (at most half of those that are no prefix)."""
    count = min(count, (tokens.shape[1] - prefix) // 2)
    if count <= 0:
        return tokens, sizes
    likeness = F.normalize(keys.mean(dim=1)[:, prefix:].float(), dim=-1)  # [B, N - P, E]
    best, partner = (likeness[:, ::2] @ likeness[:, 1::2].transpose(1, 2)).max(dim=-1)  # [B, A] each
    order = best.argsort(dim=-1, descending=True)
    going, staying = order[:, :count], order[:, count:].sort(dim=-1).values  # [B, count], [B, A - count]
    into = partner.gather(1, going)[..., None]  # [B, count, 1]
    sums = torch.cat([tokens * sizes, sizes], dim=-1)  # [B, N, D + 1]: sums and sizes move alike
    width = sums.shape[-1]
    first, second = sums[:, prefix::2], sums[:, prefix + 1 :: 2]
    moved = first.gather(1, going[..., None].expand(-1, -1, width))  # [B, count, D + 1]
    grown = second.scatter_add(1, into.expand(-1, -1, width), moved)
    kept = first.gather(1, staying[..., None].expand(-1, -1, width))
    sums = torch.cat([sums[:, :prefix], kept, grown], dim=1)  # [B, N - count, D + 1]
    return sums[..., :-1] / sums[..., -1:], sums[..., -1:]


class MergingTrunk(nn.Module):
    """A plain trunk (one stage of pre-norm blocks with global attention) that merges `count` tokens a block.

    Shares its parameters with the trunk. Only `tokens` is offered, for classification: a map is no longer there.
    Raises UnsupportedError for a trunk of another kind.
    """

    def __init__(self, trunk: Trunk, count: int) -> None:
        super().__init__()
        plain = (
            isinstance(trunk, Trunk)
            and len(trunk.stages) == 1
            and all(
                isinstance(block, Block)
                and block.order == "pre"
                and block.skips
                and type(block.mixer) is Attention
                for block in trunk.stages[0].blocks  # type: ignore[union-attr]
            )
        )
        if not plain:
            raise UnsupportedError(
                "Tokens are merged in plain ViTs only: one stage of pre-norm blocks with global attention (ViT, DeiT)."
            )
        self.stages, self.count = trunk.stages, count
        self.levels: tuple[Level, ...] = trunk.levels

    def tokens(self, images: Float[Tensor, "B C I J"]) -> tuple[Float[Tensor, "B N D"], Grid]:
        """The last tokens after the norm, and as grid one row of those that are no prefix.

        Patch tokens are scaled by their sizes, so that their plain mean is the mean over patches.
        """
        stage = self.stages[0]
        map, prefix = stage.entry(images, None)  # type: ignore[operator]
        front = 0 if prefix is None else prefix.shape[1]
        tokens = join(map, prefix)
        sizes = torch.ones_like(tokens[..., :1])  # [B, N, 1]
        for block in stage.blocks:  # type: ignore[union-attr]
            tokens, sizes = self._block(block, tokens, sizes, front)
        tokens = stage.norm(tokens)  # type: ignore[operator]
        patches, share = tokens[:, front:], sizes[:, front:]
        patches = patches * (share / share.mean(dim=1, keepdim=True))
        return torch.cat([tokens[:, :front], patches], dim=1), Grid(1, patches.shape[1])

    def _block(self, block: nn.Module, tokens: Tensor, sizes: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        assert isinstance(block, Block) and isinstance(block.mixer, Attention)
        queries, keys, values = block.mixer.project(block.norm1(tokens))
        bias = sizes.log().transpose(1, 2)[:, None].to(queries.dtype)  # [B, 1, 1, N]
        heads = attend(queries, keys, values, block.mixer.scale, bias)
        tokens = tokens + block.scale1(block.mixer.merge(heads, values))
        tokens, sizes = merge(tokens, sizes, keys, self.count, prefix)
        return tokens + block.scale2(block.mlp(block.norm2(tokens))), sizes
