"""The encoder block: a mixer and an MLP, each with a norm, a residual, layer scale and drop path.

pre        x = x + s(f(norm(x)))      ViT and nearly everything after it (Wang et al. 1906.01787)
post       x = norm(x + s(f(x)))      the original Transformer (Vaswani et al. 2017)
res-post   x = x + norm(f(x))         Swin v2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.shapes import Grid

NormOrder = Literal["pre", "post", "res-post"]


class DropPath(nn.Module):
    """Drops a whole residual branch for a share of the samples while training (stochastic depth, 1603.09382).

    By default each sample's branch is computed, and dropped by a draw of its own. With `subset` a fixed number of
    samples, drawn anew each time, goes through the branch at all (DINOv2, 2304.07193, section 5): the same mean, less
    to compute, shapes that never change. Where the rate is less than half a sample, each draws for itself after all.
    """

    keep: Tensor | None
    """Share of the samples whose branch stays, as a tensor, where blocks are compiled."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate
        self.subset = False
        self.register_buffer("keep", None, persistent=False)

    def forward(self, branch: Float[Tensor, B * rest]) -> Float[Tensor, B * rest]:
        if not self.training:
            return branch
        each = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        if self.keep is not None:
            mask = torch.rand(each, device=branch.device) < self.keep
            return branch * (mask / self.keep).to(branch.dtype)
        if self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        return branch * (branch.new_empty(each).bernoulli_(keep) / keep)

    def add(
        self, tokens: Float[Tensor, "B N D"], branch: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B N D"]:
        """Tokens plus what the branch makes of them, without the samples for which it is dropped."""
        # Nothing before this return may read the rate, or compiled blocks share no code.
        if not (self.subset and self.training):
            return tokens + self(branch(tokens))
        count = len(tokens)
        kept = max(1, round(count * (1.0 - self.rate)))
        if kept == count:
            return tokens + self(branch(tokens))
        chosen = torch.randperm(count, device=tokens.device)[:kept]
        found = branch(tokens[chosen])
        return tokens.index_add(0, chosen, found.to(tokens.dtype), alpha=count / kept)

    def share_code(self, device: torch.device) -> None:
        """From here on the rate is an input of compiled code, so that blocks that differ in nothing else share it."""
        if self.rate > 0.0:
            self.keep = torch.tensor(1.0 - self.rate, device=device)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class LayerScale(nn.Module):
    """One learned factor a channel, small at the start (CaiT, 2103.17239 section 2)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, branch: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return branch * self.gamma


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to every token alone.

    `dropout` stands after each layer; a pair gives the rate after the first and after the second. `activation`
    stands in the GELU's place.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        out: int | None = None,
        dropout: float | tuple[float, float] = 0.0,
        gelu: Literal["exact", "tanh"] = "exact",
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inner, outer = dropout if isinstance(dropout, tuple) else (dropout, dropout)
        self.fc1 = nn.Linear(width, hidden)
        approximate = "none" if gelu == "exact" else "tanh"
        self.act = nn.GELU(approximate=approximate) if activation is None else activation
        self.dropout1 = nn.Dropout(inner)
        self.fc2 = nn.Linear(hidden, width if out is None else out)
        self.dropout2 = nn.Dropout(outer)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B N V"]:
        out: Tensor = self.dropout2(self.fc2(self.dropout1(self.act(self.fc1(tokens)))))
        return out


class Block(nn.Module):
    """Norm, mixer, norm, MLP. Both mixer and MLP are called with tokens and their grid.

    `mlp` is a hidden width, or a module where a paper puts something else in its place (PVT v2). `out` is the
    width after a mixer that changes it and brings its own skip (T2T-ViT's token transformer, pre order only).
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        mlp: int | nn.Module,
        *,
        out: int | None = None,
        order: NormOrder = "pre",
        eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        gelu: Literal["exact", "tanh"] = "exact",
    ) -> None:
        super().__init__()
        self.order, self.skips = order, out is None
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mixer = mixer
        width = width if out is None else out
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp, dropout=dropout, gelu=gelu) if isinstance(mlp, int) else mlp
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N V"]:
        if self.order == "pre":
            if self.skips:
                tokens = self.drop_path.add(tokens, lambda t: self.scale1(self.mixer(self.norm1(t), grid)))
            else:
                tokens = self.drop_path(self.scale1(self.mixer(self.norm1(tokens), grid)))
            tokens = self.drop_path.add(tokens, lambda t: self.scale2(self.mlp(self.norm2(t), grid)))
        elif self.order == "post":
            tokens = self.norm1(self.drop_path.add(tokens, lambda t: self.scale1(self.mixer(t, grid))))
            tokens = self.norm2(self.drop_path.add(tokens, lambda t: self.scale2(self.mlp(t, grid))))
        else:
            tokens = self.drop_path.add(tokens, lambda t: self.scale1(self.norm1(self.mixer(t, grid))))
            tokens = self.drop_path.add(tokens, lambda t: self.scale2(self.norm2(self.mlp(t, grid))))
        return tokens


class Branch(nn.Module):
    """What a residual adds: norm, a mixer or an MLP, layer scale, drop path."""

    def __init__(
        self,
        width: int,
        body: nn.Module,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.body = body
        self.scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        out: Tensor = self.drop_path(self.scale(self.body(self.norm(tokens), grid)))
        return out


class ParallelBlock(nn.Module):
    """Several mixers side by side, then several MLPs side by side, each with its own norm (2203.09795, section 3).

    Half the depth at the same parameters and multiply-adds; pre-norm.
    """

    def __init__(
        self,
        width: int,
        mixers: Sequence[nn.Module],
        hidden: int,
        *,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        mlps = [Mlp(width, hidden, dropout=dropout) for _ in mixers]
        self.mixers = nn.ModuleList(Branch(width, mixer, eps, layer_scale, drop_path) for mixer in mixers)
        self.mlps = nn.ModuleList(Branch(width, mlp, eps, layer_scale, drop_path) for mlp in mlps)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        tokens = tokens + sum(branch(tokens, grid) for branch in self.mixers)
        tokens = tokens + sum(branch(tokens, grid) for branch in self.mlps)
        return tokens


def drop_by_subset(model: nn.Module) -> int:
    """Have the blocks of a model that drop anything take a subset of the batch (`DropPath`); how many there are.

    Parallel blocks and residual networks have no such blocks.
    """
    found = [part for part in model.modules() if isinstance(part, Block) and part.drop_path.rate > 0.0]
    for block in found:
        block.drop_path.subset = True
    return len(found)


def drop_path_rates(rate: float, depth: int, shape: Literal["linear", "constant"] = "linear") -> list[float]:
    """The rate of each block: from 0 to `rate` evenly (the usual), or the same everywhere (DeiT III, CaiT)."""
    if shape == "constant" or depth == 1:
        return [rate] * depth
    return [rate * index / (depth - 1) for index in range(depth)]
