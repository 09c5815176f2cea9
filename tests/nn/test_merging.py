"""Token merging: what is merged, what never is, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitrail
from vitrail.errors import ModelError, UnsupportedError
from vitrail.models.merging import merge_tokens
from vitrail.nn.merging import MergingTrunk, merge


def small(name: str = "deit_nano_distilled_patch4_32", **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = vitrail.create_model(name, depth=3, **changes)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_the_likest_pair_becomes_its_mean_and_the_rest_stays() -> None:
    tokens = torch.arange(12.0).view(1, 6, 2)
    keys = torch.tensor([[9.0, 9], [1, 0], [0, 1], [-1, 0], [0.1, 1], [-5, -5]]).view(1, 1, 6, 2)
    # hands after one prefix token: 1, 3, 5 and 2, 4; the nearest pair is (1, 4), then nothing as near
    found, sizes = merge(tokens, torch.ones(1, 6, 1), keys, 1, prefix=1)
    assert sizes.flatten().tolist() == [1, 1, 1, 1, 2]
    assert torch.equal(found[0, -1], (tokens[0, 1] + tokens[0, 4]) / 2)
    assert torch.equal(found[0, :4], tokens[0, [0, 3, 5, 2]])


def test_sizes_add_up_to_the_patches_and_means_are_weighted() -> None:
    torch.manual_seed(0)
    tokens, sizes = torch.randn(2, 17, 8), torch.ones(2, 17, 1)
    total = tokens[:, 1:].sum(dim=1)
    for _ in range(3):
        tokens, sizes = merge(tokens, sizes, torch.randn(2, 4, tokens.shape[1], 8), 4, prefix=1)
    assert tokens.shape[1] == 5 and torch.equal(sizes.sum(dim=1), torch.full((2, 1), 17.0))
    assert torch.allclose((tokens * sizes)[:, 1:].sum(dim=1), total, atol=1e-5)


def test_merging_nothing_changes_nothing() -> None:
    model = small()
    trunk = MergingTrunk(model.backbone, 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens, grid = trunk.tokens(images)
        assert torch.allclose(tokens, model.forward_features(images), atol=1e-5)
    assert grid.size == 64


@pytest.mark.parametrize("name", ["deit_nano_distilled_patch4_32", "vit_nano_patch4_32"])
def test_equal_patches_are_merged_without_a_trace(name: str) -> None:
    changes = {"position": "none"} if name.startswith("vit") else {}
    model = small(name, **changes)
    if not changes:
        with torch.no_grad():
            model.backbone.stages[0].entry.positions.table[:, 2:].fill_(0.1)
    images = torch.full((2, 3, 32, 32), 0.3)  # every patch is the same: their means are they themselves
    merged = merge_tokens(model, 8)
    with torch.inference_mode():
        assert torch.allclose(merged(images), model(images), atol=1e-4)


def test_tokens_become_fewer_and_weights_are_shared() -> None:
    model = small("vit_nano_patch4_32")
    merged = merge_tokens(model, 10)
    tokens, grid = merged.backbone.tokens(torch.randn(1, 3, 32, 32))
    assert (
        grid.size
        == 64 - 3 * 10
        == tokens.shape[1] - (model.backbone.tokens(torch.randn(1, 3, 32, 32))[0].shape[1] - 64)
    )
    assert {id(p) for p in merged.parameters()} == {id(p) for p in model.parameters()}
    assert model.backbone is not merged.backbone


def test_other_networks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="plain ViTs"):
        merge_tokens(vitrail.create_model("swin_nano_patch2_32"), 4)
    with pytest.raises(ModelError, match="at least 1"):
        merge_tokens(small(), 0)
