"""Attention and the block, against the definitions written out in loops and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from vitrail.errors import ModelError
from vitrail.nn.attention import Attention, attend
from vitrail.nn.block import Block, DropPath, drop_path_rates
from vitrail.nn.shapes import Grid


def test_attention_is_what_the_paper_writes() -> None:
    torch.manual_seed(0)
    mixer = Attention(12, 3, qk_norm=True).double()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    weight, bias = mixer.qkv.weight, mixer.qkv.bias
    heads = []
    for head in range(3):
        rows = slice(head * 4, head * 4 + 4)
        queries = tokens @ weight[0:12][rows].T + bias[0:12][rows]
        keys = tokens @ weight[12:24][rows].T + bias[12:24][rows]
        values = tokens @ weight[24:36][rows].T + bias[24:36][rows]
        queries, keys = (nn.functional.layer_norm(part, (4,), eps=1e-6) for part in (queries, keys))
        scores = queries @ keys.transpose(1, 2) / math.sqrt(4)
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ values)
    wanted = torch.cat(heads, dim=-1) @ mixer.proj.weight.T + mixer.proj.bias
    assert torch.allclose(mixer(tokens, Grid(1, 5)), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", ["no bias", "a bias for each head", "one bias"])
@pytest.mark.parametrize("plain_weights", [0, 10**9])
def test_all_kernels_compute_the_same(
    dtype: torch.dtype, biased: str, plain_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.nn.attention.PLAIN_WEIGHTS", plain_weights)
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 4, 7, 8, dtype=dtype).unbind(0)
    bias = (
        None
        if biased == "no bias"
        else torch.randn((7, 7) if biased == "one bias" else (4, 7, 7), dtype=dtype)
    )
    scores = queries.double() @ keys.double().transpose(-2, -1) * 0.3
    exact = torch.softmax(scores + (0 if bias is None else bias.double()), -1) @ values.double()
    with torch.no_grad():
        near = attend(queries, keys, values, 0.3, bias).double()
    assert (near - exact).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * exact.norm()


def test_a_bias_reaches_the_fused_kernel_in_the_form_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer dimensions than the queries, torch computes step by step, several times slower."""
    seen = []
    fused = nn.functional.scaled_dot_product_attention

    def look(*inputs: torch.Tensor, attn_mask: torch.Tensor, **options: float) -> torch.Tensor:
        seen.append(attn_mask.ndim)
        return fused(*inputs, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", look)
    queries, keys, values = torch.randn(3, 2, 4, 7, 8).unbind(0)
    attend(queries, keys, values, 0.3, torch.zeros(4, 7, 7))
    assert seen == [4]


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="multiple of its heads; got 10 and 4"):
        Attention(10, 4)


@pytest.mark.parametrize("order", ["pre", "post", "res-post"])
def test_the_block_puts_its_norms_where_its_order_says(order: str) -> None:
    torch.manual_seed(0)
    block = Block(8, Attention(8, 2), 16, order=order).double()  # type: ignore[arg-type]
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    grid = Grid(2, 3)
    attention, mlp, norm1, norm2 = block.mixer, block.mlp, block.norm1, block.norm2
    if order == "pre":
        wanted = x + attention(norm1(x), grid)
        wanted = wanted + mlp(norm2(wanted), grid)
    elif order == "post":
        wanted = norm1(x + attention(x, grid))
        wanted = norm2(wanted + mlp(wanted, grid))
    else:
        wanted = x + norm1(attention(x, grid))
        wanted = wanted + norm2(mlp(wanted, grid))
    assert torch.allclose(block(x, grid), wanted, atol=1e-12)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2))
    per_sample = out.flatten(1)
    assert ((per_sample == per_sample[:, :1]).all(dim=1)).all()
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(torch.ones(5, 2)), torch.ones(5, 2))


def test_drop_path_by_subset_computes_only_what_stays_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    drop.subset = True
    seen = []

    def branch(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return torch.ones_like(part)

    tokens = torch.randn(8, 3, 2)
    added = sum((drop.add(tokens, branch) - tokens).flatten(1) for _ in range(400)) / 400
    assert seen == [6] * 400
    assert torch.allclose(added, torch.ones(8, 6), atol=0.15)
    once = (drop.add(tokens, branch) - tokens).flatten(1)
    assert torch.allclose(once.sum(dim=0), torch.full((6,), 8.0), atol=1e-5)
    assert torch.allclose(drop.eval().add(tokens, branch), tokens + 1) and seen[-1] == 8


@pytest.mark.parametrize("order", ["pre", "post", "res-post"])
def test_a_block_without_its_dropped_samples_is_the_block_of_the_others(order: Any) -> None:
    torch.manual_seed(0)
    block = Block(8, Attention(8, 2), 16, order=order, drop_path=0.5).double().train()
    block.drop_path.subset = True
    tokens, grid = torch.randn(2, 4, 8, dtype=torch.float64), Grid(2, 2)
    torch.manual_seed(3)
    first, second = (int(torch.randperm(2)[0]) for _ in range(2))
    torch.manual_seed(3)
    found = block(tokens, grid)
    # One of two stays in each branch, and counts twice.
    block.drop_path = DropPath(0.0)
    norm1, norm2, mixer, mlp = block.norm1, block.norm2, block.mixer, block.mlp
    wanted = tokens
    for chosen, norm, part in ((first, norm1, mixer), (second, norm2, mlp)):
        before = norm(wanted) if order == "pre" else wanted
        added = 2.0 * (norm(part(before, grid)) if order == "res-post" else part(before, grid))
        added[1 - chosen] = 0.0
        wanted = norm(wanted + added) if order == "post" else wanted + added
    assert torch.allclose(found, wanted, atol=1e-12)
    found.sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())


def test_drop_path_rates_rise_evenly_or_stay() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 3, "constant") == [0.3, 0.3, 0.3]
