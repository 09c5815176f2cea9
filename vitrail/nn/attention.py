"""Multi-head attention (Vaswani et al. 2017, section 3.2; ViT, appendix A).

A mixer is called with tokens and their grid and returns tokens of the same shape. A mixer whose
weights can be written down also answers

    weights(tokens, grid) -> [B, H, N, M]     rows sum to one
    mix(weights, tokens, grid) -> [B, N, D]   so that forward(x, g) == mix(weights(x, g), x, g)

which explanations call; the fast path below never builds more than it needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.shapes import Grid


def attend(
    queries: Float[Tensor, "*B N E"],
    keys: Float[Tensor, "*B M E"],
    values: Float[Tensor, "*B M V"],
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*B N V"]:
    """softmax(queries keysᵀ · scale + bias) values, by the kernel that suits the device, the type and the shape.

    The rule is fixed, not timed at run time, so that a resumed run computes the same bits. docs/log.md has the
    measurements: the fused call wins but for bfloat16 on a CPU whose matrix products are native in it, as long as
    the weights fit its caches. Exported graphs get plain products, which every engine takes with free sizes.
    """
    if torch.compiler.is_exporting() or _plain_is_quicker(queries, keys):
        weights = attention_weights(queries, keys, scale, bias)
        return (F.dropout(weights, dropout) if dropout else weights) @ values
    if bias is not None and bias.ndim < queries.ndim:  # else the fused kernel falls back to one of many steps
        bias = bias[(None,) * (queries.ndim - bias.ndim)]
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=scale
    )


PLAIN_WEIGHTS = 16_000_000
"""Attention weights of a call above which the fused kernel is the quicker one in bfloat16, too."""


def _plain_is_quicker(queries: Tensor, keys: Tensor) -> bool:
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16 or not native_bf16():
        return False
    return math.prod(queries.shape[:-1]) * keys.shape[-2] <= PLAIN_WEIGHTS


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# What torch.compiler.assume_constant_result sets. The decorator itself imports the whole compiler, which takes
# as long as torch: every prediction from cold would wait for it.
native_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention_weights(
    queries: Float[Tensor, "*B N E"], keys: Float[Tensor, "*B M E"], scale: float, bias: Tensor | None = None
) -> Float[Tensor, "*B N M"]:
    """softmax(queries keysᵀ · scale + bias) over the keys, in the queries' type."""
    scores = (queries * scale) @ keys.transpose(-2, -1)
    return torch.softmax(scores if bias is None else scores + bias.to(scores.dtype), dim=-1)


def head_width(width: int, heads: int) -> int:
    """Channels of one head. Raises ModelError where the heads cannot share the width evenly."""
    if heads < 1 or width % heads:
        raise ModelError(
            f"The width of attention must be a multiple of its heads; got {width} and {heads} heads."
        )
    return width // heads


def split_heads(tokens: Float[Tensor, "B N D"], heads: int) -> Float[Tensor, "B H N E"]:
    """Each head's share of the channels, D = H * E."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(heads: Float[Tensor, "B H N E"]) -> Float[Tensor, "B N D"]:
    """Heads side by side, D = H * E: the inverse of `split_heads`."""
    return heads.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Global multi-head self-attention over all tokens.

    `inner` is the width that the heads share among themselves (default: the token width); `scale` defaults to
    the head width to the power -1/2. `qk_norm` puts a layer norm on each head's queries and keys (ViT-22B).
    `value_skip` adds the values to the output: the residual of a mixer that changes the width (T2T-ViT).
    """

    sees_grid = False
    """Whether it matters where tokens lie; else any of them may be missing."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        inner: int | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        value_skip: bool = False,
        eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        channels = head_width(inner, heads)
        self.heads, self.scale = heads, channels**-0.5 if scale is None else scale
        self.attention_dropout, self.value_skip = attention_dropout, value_skip
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(channels, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(channels, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(inner, inner)
        self.dropout = nn.Dropout(dropout)

    def project(self, tokens: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, N, E]."""
        batch, count, _ = tokens.shape
        joint = self.qkv(tokens).view(batch, count, 3, self.heads, -1)  # [B, N, 3, H, E]
        queries, keys, values = joint.permute(2, 0, 3, 1, 4).unbind(0)  # three of [B, H, N, E]
        return self.q_norm(queries), self.k_norm(keys), values

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B N V"]:
        queries, keys, values = self.project(tokens)
        dropout = self.attention_dropout if self.training else 0.0
        return self.merge(attend(queries, keys, values, self.scale, dropout=dropout), values)

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid | None = None) -> Float[Tensor, "B H N N"]:
        queries, keys, _ = self.project(tokens)
        return attention_weights(queries, keys, self.scale)

    def mix(
        self, weights: Float[Tensor, "B H N N"], tokens: Float[Tensor, "B N D"], grid: Grid | None = None
    ) -> Float[Tensor, "B N V"]:
        values = self.project(tokens)[2]
        return self.merge(weights @ values, values)

    def merge(
        self, heads: Float[Tensor, "B H N E"], values: Float[Tensor, "B H M E"]
    ) -> Float[Tensor, "B N V"]:
        """Heads side by side, then the output projection, and the values themselves where they are the skip."""
        out: Tensor = self.dropout(self.proj(merge_heads(heads)))  # [B, N, V]
        return out + merge_heads(values) if self.value_skip else out
