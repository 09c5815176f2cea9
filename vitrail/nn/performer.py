"""Attention through random features: FAVOR+ (Choromanski et al. 2021, Performers, arXiv 2009.14794).

For w ~ N(0, I) the product exp(w·q - |q|²/2) exp(w·k - |k|²/2) has the mean exp(q·k). With m such numbers a token,
phi(q)·phi(k) stands for softmax's exp(q·k), and (phi(Q) phi(K)ᵀ) V can be computed as phi(Q) (phi(K)ᵀ V): the cost
grows with N m, not with N². One and the same W serves queries and keys; its rows are orthogonal in blocks.

The features say little where |q + k|² is large (after the scaling, their relative error is
sqrt((exp(|q + k|²) - 1) / m)): they want small queries and keys, as networks have that learn with them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.attention import Attention
from vitrail.nn.shapes import Grid

Form = Literal["softmax", "relu", "none"]
Lengths = Literal["chi", "width", "features"]


@dataclass(frozen=True)
class Kernel:
    """What makes features of queries and keys; `features` follows the paper and its code, with T2T-ViT's changes.

    softmax   exp(w·x - |x|²/2 - c) + epsilon, divided by sqrt(m): an unbiased, positive estimate of exp(q·k)
    relu      max(w·x, 0) + epsilon: the generalised kernel, no estimate of softmax, strong in practice
    none      softmax over the width for queries, over the tokens for keys; no random matrix
    """

    form: Form = "softmax"
    """Which of the three."""
    epsilon: float = 1e-6
    """Added to each feature, so that none is zero: a little of uniform attention."""
    scaled: bool = True
    """Whether x is first multiplied by E^(-1/4), so that q·k carries softmax attention's E^(-1/2)."""
    stabilised: bool = True
    """Whether c is the largest w·x, per token for queries and per picture and head for keys; else 0."""
    guard: float = 0.0
    """Added to the sum that every row is divided by."""

    def features(
        self, tokens: Float[Tensor, "*B N E"], projection: Float[Tensor, "M E"] | None, keys: bool
    ) -> Float[Tensor, "*B N M"]:
        """phi of queries, or of keys."""
        if self.form == "none" or projection is None:
            return torch.softmax(tokens, dim=-2 if keys else -1)
        if self.scaled:
            tokens = tokens * tokens.shape[-1] ** -0.25
        scores = tokens @ projection.T  # [*B, N, M]
        if self.form == "relu":
            return torch.relu(scores) + self.epsilon
        exponents = scores - tokens.square().sum(dim=-1, keepdim=True) / 2
        if self.stabilised:
            # a factor of a query's own, or of all keys together, leaves the rows that it is divided out of alone
            exponents = exponents - scores.amax(dim=(-2, -1) if keys else -1, keepdim=True).detach()
        ratio = float(projection.shape[0]) ** -0.5
        features: Tensor = (exponents.exp() + self.epsilon) * ratio
        return features


T2T_KERNEL = Kernel(epsilon=0.0, scaled=False, stabilised=False, guard=1e-8)
"""T2T-ViT's token performer as its code has it: no scaling, no stabiliser."""


def linear_attention(
    queries: Float[Tensor, "*B N M"],
    keys: Float[Tensor, "*B L M"],
    values: Float[Tensor, "*B L V"],
    guard: float = 0.0,
) -> Float[Tensor, "*B N V"]:
    """Rows of (queries keysᵀ) divided by their sums, times the values, without ever writing down an N x N matrix."""
    context = keys.transpose(-2, -1) @ values  # [*B, M, V]
    sums = queries @ keys.sum(dim=-2).unsqueeze(-1)  # [*B, N, 1]
    return (queries @ context) / (sums + guard)


class RandomFeatures(Attention):
    """Self-attention by FAVOR+; parameters are those of softmax attention, so its weights fit.

    `features` is m, by default the whole part of E ln E. `projection`, W, is a buffer: drawn when built, kept with the
    weights, redrawn only by `Redraw`. `weights` writes the N x N matrix down that `forward` never builds.
    """

    projection: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        features: int | None = None,
        kernel: Kernel = Kernel(),
        lengths: Lengths = "chi",
        inner: int | None = None,
        qkv_bias: bool = True,
        value_skip: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, inner=inner, qkv_bias=qkv_bias, value_skip=value_skip, dropout=dropout)
        self.kernel, self.lengths = kernel, lengths
        head_width = (width if inner is None else inner) // heads
        count = default_features(head_width) if features is None else features
        if count < 1:
            raise ModelError(f"Random-feature attention needs at least 1 feature; got {count}.")
        drawn = None if kernel.form == "none" else draw_projection(count, head_width, lengths)
        self.register_buffer("projection", drawn)

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B N V"]:
        queries, keys, values = self.project(tokens)
        with _without_autocast(tokens):
            phi_q, phi_k = self._features(queries, keys)
            heads = linear_attention(phi_q, phi_k, values.to(phi_q.dtype), self.kernel.guard)
        return self.merge(heads.to(values.dtype), values)

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B H N N"]:
        queries, keys = self.factors(tokens, grid)
        with _without_autocast(tokens):
            return queries @ keys.transpose(-2, -1)

    def factors(
        self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None
    ) -> tuple[Float[Tensor, "B H N M"], Float[Tensor, "B H N M"]]:
        """The weights as they are before they are written down: the first times the second, transposed."""
        queries, keys, _ = self.project(tokens)
        with _without_autocast(tokens):
            phi_q, phi_k = self._features(queries, keys)
            summed = phi_k.sum(dim=-2, keepdim=True)  # [B, H, 1, M]
            total = phi_q @ summed.transpose(-2, -1) + self.kernel.guard  # [B, H, N, 1]
            return phi_q / total, phi_k

    def _features(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Both in float32 at least: exp(-17) is zero in half precision."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        projection = None if self.projection is None else self.projection.to(wide)
        return (
            self.kernel.features(queries.to(wide), projection, keys=False),
            self.kernel.features(keys.to(wide), projection, keys=True),
        )


class Redraw(nn.Module):
    """An entry that passes everything on, and draws new features for all mixers at every so many training forwards.

    Never in evaluation. The count of forwards and the seed are buffers, so a resumed run draws what the uninterrupted
    one draws, and so do all ranks. It stands before the blocks, where recomputed activations do not call it again.
    """

    calls: Tensor
    seed: Tensor

    def __init__(self, mixers: Sequence[RandomFeatures], every: int) -> None:
        super().__init__()
        self.every = every
        self.mixers = tuple(mixers)  # a tuple: they are registered in their blocks
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**31, ()))

    def forward(
        self, map: Float[Tensor, "B C h w"], prefix: Float[Tensor, "B P C"] | None
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B P C"] | None]:
        if self.training and self.every:
            lengths = self.mixers[0].lengths
            projections = [mixer.projection for mixer in self.mixers if mixer.projection is not None]
            torch.ops.vitrail.redraw(projections, self.calls, self.seed, self.every, lengths)
        return map, prefix

    def extra_repr(self) -> str:
        return f"every={self.every}"


@torch.library.custom_op(
    "vitrail::redraw",
    mutates_args=("projections", "calls"),
    schema="(Tensor(a!)[] projections, Tensor(b!) calls, Tensor seed, int every, str lengths) -> ()",
)
def redraw(projections: Sequence[Tensor], calls: Tensor, seed: Tensor, every: int, lengths: str) -> None:
    """Count a training forward, and fill the projections anew when one is due; one node in a compiled graph."""
    calls.add_(1)
    count = int(calls)
    if count % every == 0:
        generator = torch.Generator().manual_seed(int(seed) + count // every)
        for projection in projections:
            rows, width = projection.shape
            projection.copy_(draw_projection(rows, width, lengths, generator))  # type: ignore[arg-type]


def draw_projection(
    rows: int, width: int, lengths: Lengths = "chi", generator: torch.Generator | None = None
) -> Float[Tensor, "M E"]:
    """W: blocks of `width` orthogonal rows, the last block cut short, each row at its length.

    lengths "chi": that of a fresh Gaussian vector, so that every row is N(0, I) and the estimate unbiased; "width":
    sqrt(E), biased low and less scattered; "features": sqrt(m), T2T-ViT's.
    """
    blocks, place = -(-rows // width), None if generator is None else generator.device
    gaussian = torch.randn(blocks, width, width, generator=generator, device=place)
    directions = orthogonal_rows(gaussian)
    directions = directions.flatten(0, 1)[:rows]  # [M, E]
    if lengths == "chi":
        gaussian = torch.randn(rows, width, generator=generator, device=place)
        norms: Tensor = torch.linalg.vector_norm(gaussian, dim=1)
        return directions * norms[:, None]
    return directions * math.sqrt(width if lengths == "width" else rows)


def orthogonal_rows(gaussian: Float[Tensor, "*B E E"]) -> Float[Tensor, "*B E E"]:
    """Orthonormal rows, uniform over all rotations, from Gaussian matrices.

    QR alone is not uniform: its algorithm fixes the signs of Q. Times the signs of R's diagonal it is (Mezzadri 2007),
    which takes a bias of up to 15 % from the kernel along (1, ..., 1).
    """
    q, r = torch.linalg.qr(gaussian)
    signs: Tensor = r.diagonal(dim1=-2, dim2=-1).sign()
    rows: Tensor = (q * signs.unsqueeze(-2)).transpose(-2, -1)
    return rows


def default_features(width: int) -> int:
    """m = E ln E, the count with which the paper's uniform bound holds (266 for heads of 64)."""
    return max(1, int(width * math.log(width)))


def _without_autocast(tokens: Tensor) -> contextlib.AbstractContextManager[object]:
    """Whatever autocast does outside, features are computed in the type that they are given."""
    kind = tokens.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
