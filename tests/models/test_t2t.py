"""T2T-ViT: published counts, the authors' numbers, its parts against their formulas, and every published naming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rebuild import agree, apart, built, picture
from torch import Tensor

from vitrail.errors import ModelError
from vitrail.jobs.models import row
from vitrail.models import registry, t2t
from vitrail.nn.entry import SoftSplit
from vitrail.nn.shapes import Grid
from vitrail.nn.t2t_blocks import DenseBlock, GatedAttention, GhostAttention, GhostMlp
from vitrail.weights import adapter

PUBLISHED = {
    # parameters as the paper counts them (the stored tables too), trained ones, and multiply-adds in 10^9
    "t2t_vit_7": (4_310_222, 4_255_694, 1.147),
    "t2t_vit_10": (5_889_230, 5_834_702, 1.516),
    "t2t_vit_12": (6_941_902, 6_887_374, 1.763),
    "t2t_vit_14": (21_545_550, 21_465_806, 4.783),
    "t2t_vit_14_384": (21_691_470, 21_465_806, 16.37),
    "t2t_vit_19": (39_177_422, 39_085_070, 8.480),
    "t2t_vit_24": (64_105_934, 64_000_974, 13.66),
    "t2t_vit_t_14": (21_541_070, 21_465_422, 6.089),
    "t2t_vit_t_19": (39_172_942, 39_084_686, 9.785),
    "t2t_vit_t_24": (64_101_454, 64_000_590, 14.97),
    "t2t_vit_14_resnext": (21_545_550, 21_465_806, 4.783),
    "t2t_vit_14_wide": (25_156_302, 25_000_910, 5.229),
    "t2t_vit_dense": (23_647_062, 23_617_750, 5.276),
    "t2t_vit_14_se": (21_803_598, 21_723_854, 4.784),
    "t2t_vit_16_ghost": (16_253_262, 16_173_518, 3.802),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = registry.create_model(name)
    trained = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(buffer.numel() for buffer in model.buffers())
    assert (trained + stored, trained) == PUBLISHED[name][:2]


QUICK = ("t2t_vit_7", "t2t_vit_t_14")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PUBLISHED]
)
def test_has_the_published_cost(name: str) -> None:
    assert row(name).gflops == pytest.approx(PUBLISHED[name][2], rel=0.01)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_gives_the_authors_numbers_with_the_performer(
    place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden("t2t_vit_7")
    case = numbers["cases"][place]
    scale = case["build"].get("qk_scale")
    model = built("t2t_vit_7", numbers, case, fill, **({"scale": scale} if scale else {}))
    assert agree(model, case, fill) < 1e-6
    if place == 0:
        _check_token_maps(model, case, fill)


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_gives_the_authors_numbers_with_the_transformer(
    place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden("t2t_vit_t_14")
    case = numbers["cases"][place]
    assert agree(built("t2t_vit_t_14", numbers, case, fill), case, fill) < 1e-6


def _check_token_maps(model: Any, case: dict[str, Any], fill: ModuleType) -> None:
    """The maps of the narrow attentions are levels of their own."""
    expected = {entry["at"]: entry["first8"] for entry in case["checkpoints_float64"]}
    maps = model.features(picture(case, fill)).maps
    assert [tuple(map.shape[1:]) for map in maps] == [(64, 56, 56), (64, 28, 28), (256, 14, 14)]
    for number, map in enumerate(maps[:2]):
        tokens = map.flatten(2).transpose(1, 2)
        assert apart(tokens.flatten()[:8], expected[f"tokens_to_token.attention{number + 1}"]) < 1e-6


def test_a_soft_split_lays_windows_side_by_side_channel_by_channel() -> None:
    map = torch.arange(2.0 * 3 * 5).view(1, 2, 3, 5) + 1
    cells, _ = SoftSplit(2, 3, 2, 1)(map, None)
    assert cells.shape == (1, 18, 2, 3)
    padded = torch.nn.functional.pad(map, (1, 1, 1, 1))
    for i in range(2):
        for j in range(3):
            window = padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            assert torch.equal(cells[0, :, i, j], window.flatten())


def test_a_gate_scales_the_output_channels_by_the_tokens_mean() -> None:
    torch.manual_seed(0)
    mixer, tokens = GatedAttention(32, 2, reduction=4), torch.randn(2, 5, 32)
    plain = (
        torch.softmax(mixer.project(tokens)[0] @ mixer.project(tokens)[1].mT / 4, -1)
        @ mixer.project(tokens)[2]
    )
    out = mixer.proj(plain.transpose(1, 2).flatten(2))
    gate = torch.sigmoid(torch.relu(out.mean(1) @ mixer.squeeze.weight.T) @ mixer.excite.weight.T)
    assert torch.allclose(mixer(tokens), out * gate[:, None], atol=1e-6)


def test_ghosts_stand_behind_the_features_they_copy() -> None:
    torch.manual_seed(0)
    mixer, tokens = GhostAttention(8, 2), torch.randn(2, 5, 8)
    factors = mixer.ghost.weight.view(3, 4)
    for place, ours in enumerate(mixer.project(tokens)):
        half = (
            tokens @ mixer.qkv.weight[4 * place : 4 * place + 4].T + mixer.qkv.bias[4 * place : 4 * place + 4]
        )
        whole = torch.cat([half, half * factors[place]], dim=-1)  # [B, N, D]
        assert torch.allclose(ours.transpose(1, 2).flatten(2), whole, atol=1e-6)
    mlp, gelu = GhostMlp(8), torch.nn.functional.gelu
    inner = gelu(mlp.fc1(tokens))
    wide = torch.cat([inner] + [gelu(inner * ghost.weight.view(-1)) for ghost in mlp.ghosts], dim=-1)
    assert torch.allclose(mlp(tokens), mlp.fc2(wide), atol=1e-6)


def test_a_dense_block_keeps_its_input_and_grows() -> None:
    class Nothing(torch.nn.Module):
        def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
            return torch.zeros_like(tokens)

    block, tokens = DenseBlock(8, 4, Nothing(), 16), torch.randn(2, 5, 8)
    out = block(tokens, Grid(1, 5))
    assert torch.equal(out[..., :8], tokens)
    after = tokens + block.mlp(block.norm2(tokens))
    assert torch.allclose(out[..., 8:], block.grow(after), atol=1e-6)


VARIED: dict[str, dict[str, Any]] = {
    "performer": {},
    "transformer": {"tokens": "transformer"},
    "se": {"block": "se"},
    "ghost": {"block": "ghost", "hidden": 96},
    "dense": {"block": "dense", "growth": 16, "dense_depths": (1, 2), "depth": 3},
}

MARKS = {
    # keys that only this form has, in the authors' files
    "performer": ("tokens_to_token.attention1.w", "tokens_to_token.attention2.kqv.bias"),
    "transformer": ("tokens_to_token.attention1.attn.qkv.weight", "tokens_to_token.attention2.mlp.fc1.bias"),
    "se": ("blocks.0.attn.se_layer.fc.0.weight", "blocks.1.attn.se_layer.fc.2.weight"),
    "ghost": ("blocks.0.attn.cheap_operation_q.weight", "blocks.1.mlp.cheap_operation3.weight"),
    "dense": ("blocks.0.dense_linear.weight", "blocks.1.linear.bias"),
}


@pytest.mark.parametrize("form", VARIED)
def test_the_authors_naming_goes_out_and_comes_back(form: str) -> None:
    model = _tiny(**VARIED[form])
    known = t2t.context(model.config)
    written = adapter.write(model.state_dict(), t2t.RENAMES[0], known)
    assert set(MARKS[form]) <= set(written)
    if form == "ghost":
        assert written["blocks.0.attn.cheap_operation_q.weight"].shape == (16, 1, 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    back, _ = adapter.read(
        {f"module.{key}": value for key, value in written.items()}, t2t.RENAMES, shapes, known
    )
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_mmpretrains_naming_of_the_softmax_models_is_known() -> None:
    model = _tiny(tokens="transformer")
    known, layout = t2t.context(model.config), t2t.RENAMES[1]
    written = adapter.write(model.state_dict(), layout, known)
    assert "backbone.encoder.0.ffn.layers.0.0.weight" in written and "head.layers.head.bias" in written
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    back, receipt = adapter.read(written, t2t.RENAMES, shapes, known)
    assert receipt.layout == "mmpretrain"
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_reads_the_authors_file_and_takes_its_averaged_weights(tmp_path: Path) -> None:
    model = _tiny()
    averaged = adapter.write(model.state_dict(), t2t.RENAMES[0], t2t.context(model.config))
    raw = {key: torch.zeros_like(value) for key, value in averaged.items()}
    torch.save(
        {"state_dict": raw, "state_dict_ema": averaged, "epoch": 309}, tmp_path / "81.5_T2T_ViT_14.pth.tar"
    )
    fields = ("width", "depth", "heads", "hidden", "token_width", "token_features", "img_size")
    again = registry.create_model(
        "t2t_vit_14", pretrained=tmp_path / "81.5_T2T_ViT_14.pth.tar",
        **{field: getattr(model.config, field) for field in fields},
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model(images))


def test_the_random_features_stay_and_the_sinusoid_is_not_trained() -> None:
    model = _tiny().train()
    first = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sorted(name.rpartition(".")[2] for name in first) == ["projection", "projection", "table"]
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(buffer, first[name]) for name, buffer in model.named_buffers())
    for projection in (first["backbone.stages.0.blocks.0.mixer.projection"],):
        assert torch.allclose(projection @ projection.T, 8 * torch.eye(8), atol=1e-5)  # rows sqrt(m) long


def test_any_picture_that_leaves_a_token_goes_through() -> None:
    model = _tiny()
    for size in ((33, 50), (17, 64), (16, 16)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of the heads"),
        ({"splits": ((7, 0, 2), (3, 2, 1), (3, 2, 1))}, "stride from 1"),
        ({"img_size": (2, 32)}, "too small"),
        ({"block": "dense"}, "goes with growth"),
        ({"growth": 3}, "goes with growth"),
        ({"block": "ghost"}, "hidden = 3 x width"),
        ({"token_drop_rate": 1.5}, "must lie in"),
        ({"token_features": 0}, "at least 1"),
    ],
)
def test_refuses_what_means_nothing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        registry.changed(t2t.TINY, **changes)


def _tiny(**changes: Any) -> Any:
    torch.manual_seed(1)
    model = registry.from_config("t2t_nano_32", registry.changed(t2t.TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
