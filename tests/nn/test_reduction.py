"""Attention to a reduced map: against its formula, and its cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import ModelError
from vitrail.nn.reduction import ConvMlp, SpatialReduction
from vitrail.nn.shapes import Grid


@pytest.mark.parametrize("reduction", [1, 2, "pool"])
def test_attention_is_its_formula(reduction: int | str) -> None:
    torch.manual_seed(0)
    mixer = SpatialReduction(8, 2, reduction).double()  # type: ignore[arg-type]
    grid = Grid(6, 9)
    tokens = torch.randn(2, grid.size, 8, dtype=torch.float64)
    map = tokens.transpose(1, 2).reshape(2, 8, 6, 9)
    if reduction == 1:
        seen = tokens
    elif reduction == 2:
        cut = map[:, :, :6, :8].reshape(2, 8, 3, 2, 4, 2)
        seen = torch.einsum("bchrwk,dcrk->bhwd", cut, mixer.reduce.weight).flatten(1, 2) + mixer.reduce.bias
        seen = F.layer_norm(seen, (8,), mixer.norm.weight, mixer.norm.bias, 1e-5)
    else:
        pooled = F.adaptive_avg_pool2d(map, 7).flatten(2).transpose(1, 2)
        seen = pooled @ mixer.reduce.weight[:, :, 0, 0].T + mixer.reduce.bias
        seen = F.gelu(F.layer_norm(seen, (8,), mixer.norm.weight, mixer.norm.bias, 1e-5))
    queries = mixer.q(tokens).reshape(2, -1, 2, 4)
    keys, values = mixer.kv(seen).reshape(2, -1, 2, 2, 4).unbind(2)
    scores = torch.einsum("bnhe,bmhe->bhnm", queries, keys) / 2
    expected = mixer.proj(torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), values).flatten(2))
    assert torch.allclose(mixer(tokens, grid), expected, atol=1e-12)
    weights = mixer.weights(tokens, grid)
    assert weights.shape == (2, 2, 54, {1: 54, 2: 12, "pool": 49}[reduction])
    assert torch.allclose(mixer.mix(weights, tokens, grid), expected, atol=1e-12)


def test_only_the_pooled_form_has_as_many_keys_on_every_map() -> None:
    for reduction, expected in ((2, [16, 64]), ("pool", [49, 49])):
        mixer = SpatialReduction(8, 2, reduction)  # type: ignore[arg-type]
        counts = [
            mixer.weights(torch.randn(1, side * side, 8), Grid(side, side)).shape[-1] for side in (8, 16)
        ]
        assert counts == expected


def test_the_mlp_looks_at_neighbours_before_its_gelu() -> None:
    torch.manual_seed(0)
    mlp = ConvMlp(4, 6, relu=True).double()
    tokens = torch.randn(1, 12, 4, dtype=torch.float64)
    hidden = F.relu(mlp.fc1(tokens)).transpose(1, 2).reshape(1, 6, 3, 4)
    hidden = F.gelu(F.conv2d(hidden, mlp.conv.weight, mlp.conv.bias, padding=1, groups=6))
    assert torch.allclose(mlp(tokens, Grid(3, 4)), mlp.fc2(hidden.flatten(2).transpose(1, 2)), atol=1e-12)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="multiple of its heads"):
        SpatialReduction(8, 3, 1)
