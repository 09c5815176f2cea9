"""The Vision Transformer: published counts, shapes for any picture, every option, and errors that say what is legal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrail.errors import ModelError
from vitrail.models import registry, vit
from vitrail.models.registry import create_model
from vitrail.nn.bit import Unit

PUBLISHED = {
    # google-research/vision_transformer models_test.py, and the analytic counts of the fact sheet
    "vit_tiny_patch16_224": 5_717_416,
    "vit_tiny_patch16_384": 5_790_376,
    "vit_small_patch32_224": 22_878_952,
    "vit_small_patch32_384": 22_915_432,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch16_384": 22_196_584,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch32_384": 88_297_192,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch8_224": 86_576_872,
    "vit_large_patch32_224": 306_535_400,
    "vit_large_patch32_384": 306_632_680,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "vit_huge_patch14_224": 632_045_800,
    "vit_giant_patch14_224": 1_012_611_432,
    "vit_gigantic_patch14_224": 1_844_440_680,
    "vit_tiny_r_s16_p8_224": 6_337_704,
    "vit_small_r26_s32_224": 36_431_912,
    "vit_base_r50_s16_224": 98_659_112,
    "vit_base_r50_s16_384": 98_950_952,
    "vit_large_r50_s32_224": 328_994_856,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert count(create_model(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 21k classes and the representation layer (B/16); sine/cosine and averaged patches with either head (S/16)
        (
            {"width": 768, "heads": 12, "hidden": 3072, "num_classes": 21_843, "representation": 768},
            103_186_515,
        ),
        ({"position": "sincos2d", "class_token": False, "pool": "mean"}, 21_974_632),
        ({"position": "sincos2d", "class_token": False, "pool": "mean", "representation": 384}, 22_122_472),
        ({"class_token": False, "pool": "mean"}, 22_049_896),
    ],
)
def test_options_have_the_published_number_of_parameters(changes: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        assert count(create_model("vit_small_patch16_224", **changes)) == expected


def tiny(**changes: Any) -> torch.nn.Module:
    return vit.build(registry.changed(vit.TINY, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "none"},
        {"position": "sincos1d"},
        {"position": "sincos2d", "position_on_prefix": False},
        {"position_on_prefix": False, "registers": 3},
        {"registers": 2},
        {"norm_order": "post"},
        {"class_token": False, "pool": "mean"},
        {"class_token": False, "pool": "mean", "pool_norm": "after"},
        {"pool": "flatten", "head_hidden": (16, 8), "head_dropout": 0.5},
        {"representation": 24},
        {"layer_scale": 1e-4, "qk_norm": True, "qkv_bias": False},
        {"drop_path_rate": 0.2, "drop_rate": 0.1, "attn_drop_rate": 0.1},
        {"position": "none", "drop_rate": 0.1},
        {"in_chans": 1},
        {"in_chans": 7, "patch_size": (4, 8)},
        {"stem": "conv"},
        {"stem": "residual"},
        {"stem": "resnet", "stem_layers": (1, 1), "img_size": (64, 32)},
        {"img_size": (48, 16), "gelu": "tanh", "init": "timm"},
    ],
    ids=str,
)
def test_every_option_gives_logits_and_trains(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    config = registry.changed(vit.TINY, **changes)
    logits = model(torch.randn(2, config.in_chans, *config.img_size))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"img_size": (33, 32)}, "multiple of the patch's 8; got 33. The nearest legal: 32 or 40"),
        ({"heads": 3}, "multiple of the heads; got width 32, 3 heads"),
        ({"class_token": False}, "pool='token' reads"),
        ({"position": "sincos2d"}, "no place for"),
        (
            {"position": "sincos2d", "class_token": False, "pool": "mean", "width": 30, "heads": 2},
            "4 divides",
        ),
        ({"pool_norm": "after"}, "goes with pool='mean'"),
        ({"drop_path_rate": 1.0}, "must lie in"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"pol": "mean"}, "Did you mean pool"),
        ({"pool": "mena"}, "one of token, mean, flatten"),
        ({"stem": "conv", "patch_size": (6, 6), "img_size": (36, 36)}, "2, 4, 8, 16 or 32"),
    ],
    ids=str,
)
def test_an_illegal_combination_says_what_is_legal(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says.replace("[", r"\[")):
        tiny(**changes)


def test_a_head_on_all_tokens_refuses_another_size_and_says_why() -> None:
    with pytest.raises(ModelError, match="Build the model with this img_size"):
        tiny(pool="flatten")(torch.randn(1, 3, 64, 64))


def test_an_unknown_model_is_answered_with_near_names() -> None:
    with pytest.raises(ModelError, match="vit_small_patch16_224"):
        create_model("vit_smal_patch16_224")


def test_positions_before_the_class_token_touch_patches_alone() -> None:
    model = tiny(position_on_prefix=False)
    with torch.no_grad():
        model.backbone.stages[0].entry.positions.table.fill_(7.0)
    map, prefix = model.backbone.stages[0].entry(torch.zeros(1, 3, 32, 32), None)
    assert prefix.abs().max() == 0
    assert (map == map.flatten()[0]).all() or map.min() > 1


def test_sine_positions_are_those_of_the_paper() -> None:
    from vitrail.nn.position import sincos_1d, sincos_2d
    from vitrail.nn.shapes import Grid

    table = sincos_1d(6, 8)[0]
    for place in range(6):
        for channel in range(8):
            angle = torch.tensor(place / 10000 ** (2 * (channel // 2) / 8))
            wanted = angle.sin() if channel % 2 == 0 else angle.cos()
            assert table[place, channel] == pytest.approx(float(wanted), abs=1e-6)
    grid = sincos_2d(Grid(2, 3), 8)[0]
    # token 5 lies in row 1, column 2; rates are 1 and 1/10000
    x, y = torch.tensor([2.0, 2e-4]), torch.tensor([1.0, 1e-4])
    assert torch.allclose(grid[5], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]), atol=1e-6)


def test_the_same_seed_builds_the_same_weights() -> None:
    torch.manual_seed(3)
    one = tiny().state_dict()
    torch.manual_seed(3)
    other = tiny().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_starts_with_the_distributions_of_the_original() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", depth=1)
    block = model.backbone.stages[0].blocks[0]
    width = 192
    bound = (6 / (2 * width)) ** 0.5  # Xavier over each of q, k, v, not over the three together
    assert block.mixer.qkv.weight.abs().max() <= bound
    assert float(block.mixer.qkv.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert block.mixer.qkv.bias.abs().max() == 0
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    patches = model.backbone.stages[0].entry.patches.proj
    assert float(patches.weight.detach().std()) == pytest.approx((1 / 768) ** 0.5, rel=0.02)
    assert model.backbone.stages[0].entry.positions.table.detach().std().item() == pytest.approx(
        0.02, rel=0.02
    )
    assert model.head.linear.weight.abs().max() == 0


@pytest.mark.parametrize("init", ["jax", "timm"])
def test_a_fresh_hybrid_stem_adds_nothing_to_its_shortcuts(init: str) -> None:
    model = create_model("vit_small_r26_s32_224", num_classes=2, init=init)
    units = [part for part in model.modules() if isinstance(part, Unit)]
    assert len(units) == 8 and not any(unit.norm3.weight.any() for unit in units)


def test_depth_rises_from_the_stem_to_the_head() -> None:
    model = tiny()
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert depths["backbone.stages.0.entry.patches.proj.weight"] == 0
    assert depths["backbone.stages.0.entry.prefix.cls"] == 0
    assert depths["backbone.stages.0.blocks.0.norm1.weight"] == 1
    assert depths["backbone.stages.0.blocks.1.mlp.fc2.bias"] == 2
    assert depths["head.linear.weight"] == model.depth + 1 == 3
    assert model.no_weight_decay() == {
        "backbone.stages.0.entry.prefix.cls",
        "backbone.stages.0.entry.positions.table",
    }


def test_recomputing_activations_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = tiny(init="timm")
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
