"""CaiT: published counts, the authors' numbers, timm's, and the two attentions against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_table import measured
from rebuild import agree, apart, built, parameters, picture
from safetensors.torch import save_file

from vitrail.errors import ModelError
from vitrail.jobs.models import row
from vitrail.models import cait, registry
from vitrail.nn.class_attention import ClassAttention, ClassBlock, TalkingHeads
from vitrail.nn.shapes import Grid
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9
    "cait_xxs24_224": (11_956_264, 2.523),
    "cait_xxs24_384": (12_029_224, 9.599),
    "cait_xxs36_224": (17_299_720, 3.756),
    "cait_xxs36_384": (17_372_680, 14.31),
    "cait_xs24_224": (26_560_648, 5.390),
    "cait_xs24_384": (26_670_088, 19.3),
    "cait_xs36_224": (38_557_432, 8.030),
    "cait_xs36_384": (38_666_872, 28.70),
    "cait_s24_224": (46_916_200, 9.4),
    "cait_s24_384": (47_062_120, 32.2),
    "cait_s36_224": (68_220_712, 13.90),
    "cait_s36_384": (68_366_632, 48.0),
    "cait_s48_224": (89_525_224, 18.48),
    "cait_s48_384": (89_671_144, 63.71),
    "cait_m24_224": (185_850_088, 35.78),
    "cait_m24_384": (186_141_928, 115.9),
    "cait_m36_224": (270_929_512, 53.37),
    "cait_m36_384": (271_221_352, 173.3),
    "cait_m48_448": (356_460_520, 329.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(name) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "cait_s24_384" else [pytest.mark.slow]) for name in PUBLISHED],
)
def test_has_the_published_cost(name: str) -> None:
    assert row(name).gflops == pytest.approx(PUBLISHED[name][1], rel=0.01)


@pytest.mark.parametrize("place", [0, 1])
def test_gives_the_authors_numbers(
    place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden("cait_xxs24_224")
    case = numbers["cases"][place]
    model = built("cait_xxs24_224", numbers, case, fill)
    assert agree(model, case, fill) < 1e-6
    if place == 0:
        expected = {entry["at"]: entry["first8"] for entry in case["checkpoints_float64"]}
        features = model.features(picture(case, fill))
        assert len(features.maps) == 1
        joined = torch.cat([features.prefix, features.maps[0].flatten(2).transpose(1, 2)], dim=1)
        assert apart(joined.flatten()[:8], expected["norm"]) < 1e-6


@pytest.mark.parametrize(("name", "size"), [("cait_xxs24_224", (224, 224)), ("cait_xxs36_224", (64, 96))])
def test_gives_timms_logits_with_timms_weights(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs = timm.create_model(name, img_size=size).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "gamma" in key:
                parameter.fill_(0.3)
            elif "proj_l" in key or "proj_w" in key:
                parameter.normal_(std=0.5)
    # as the authors' files are: under "model", every key with the prefix of data-parallel training
    torch.save(
        {"model": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "X.pth"
    )
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = theirs(images)
        for file in ("X.pth", "weights.safetensors"):
            ours = registry.create_model(name, pretrained=tmp_path / file, img_size=size).eval()
            assert measured(apart(ours(images), expected), ours, theirs, size) < 1e-5


def test_a_saved_folder_opens_in_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = registry.create_model("cait_nano_patch4_32", depth=2).eval()
    model.save_pretrained(tmp_path / "saved")
    theirs, images = (
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True),
        torch.randn(2, 3, 32, 32),
    )
    with torch.inference_mode():
        assert torch.allclose(model(images), theirs.eval()(images), atol=1e-5)


def test_positions_follow_the_picture(tmp_path: Path) -> None:
    model = registry.create_model("cait_nano_patch4_32", depth=1).eval()
    written = adapter.write(model.state_dict(), cait.RENAMES[0], cait.context(model.config))
    save_file(written, tmp_path / "w.safetensors")
    larger = registry.create_model(
        "cait_nano_patch4_32", pretrained=tmp_path / "w.safetensors", depth=1, img_size=(48, 32)
    )
    assert [made.story for made in larger.receipt.made] == [
        "positions resampled from 8x8 to 12x8 (bicubic-plain)"
    ]


def test_talking_heads_mix_scores_and_weights_over_the_heads() -> None:
    torch.manual_seed(0)
    mixer = TalkingHeads(24, 3).double()
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    joint = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).reshape(2, 5, 3, 3, 8)
    queries, keys, values = joint.unbind(2)  # [B, N, H, E] each
    scores = torch.einsum("bnhe,bmhe->bnmh", queries, keys) * 8**-0.5
    weights = torch.softmax(scores @ mixer.before.weight.T + mixer.before.bias, dim=2)
    mixed = weights @ mixer.after.weight.T + mixer.after.bias
    expected = mixer.proj(torch.einsum("bnmh,bmhe->bnhe", mixed, values).reshape(2, 5, 24))
    assert torch.allclose(mixer(tokens), expected, atol=1e-12)
    assert torch.allclose(mixer.weights(tokens), weights.permute(0, 3, 1, 2), atol=1e-12)


def test_class_attention_changes_the_class_token_alone() -> None:
    torch.manual_seed(0)
    block = ClassBlock(16, ClassAttention(16, 2), 32, layer_scale=0.5)
    tokens, grid = torch.randn(2, 7, 16), Grid(2, 3)
    out = block(tokens, grid)
    assert torch.equal(out[:, 1:], tokens[:, 1:])
    assert not torch.allclose(out[:, :1], tokens[:, :1])
    weights = block.mixer.weights(tokens, grid)
    assert weights.shape == (2, 2, 1, 7)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 1))


def test_drop_path_has_one_rate_in_the_first_stage_and_none_in_the_second() -> None:
    model = registry.create_model("cait_nano_patch4_32", drop_path_rate=0.2)
    first, second = model.backbone.stages
    assert {block.drop_path.rate for block in first.blocks} == {0.2}
    assert {block.drop_path.rate for block in second.blocks} == {0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of the heads"),
        ({"img_size": (30, 32)}, "nearest legal"),
        ({"class_depth": 0}, "at least 1"),
        ({"attn_drop_rate": -0.1}, "must lie in"),
        ({"num_classes": -1}, "0 or more"),
        ({"patch_size": (0, 8)}, "at least 1"),
    ],
)
def test_refuses_what_means_nothing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        registry.changed(cait.TINY, **changes)
