"""DeiT and DeiT III: published counts, the authors' numbers, timm's and transformers', and every published naming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_table import measured
from rebuild import agree, apart, built, parameters
from safetensors.torch import save_file
from torch.nn import functional

from vitrail.errors import ModelError, WeightsError
from vitrail.jobs.models import row
from vitrail.models import deit, loading, registry
from vitrail.nn.shapes import ClassOutput
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9
    "deit_tiny_patch16_224": (5_717_416, 1.254),
    "deit_small_patch16_224": (22_050_664, 4.599),
    "deit_base_patch16_224": (86_567_656, 17.56),
    "deit_base_patch16_384": (86_859_496, 55.48),
    "deit_tiny_distilled_patch16_224": (5_910_800, 1.261),
    "deit_small_distilled_patch16_224": (22_436_432, 4.624),
    "deit_base_distilled_patch16_224": (87_338_192, 17.66),
    "deit_base_distilled_patch16_384": (87_630_032, 55.59),
    "deit3_small_patch16_224": (22_059_496, 4.599),
    "deit3_small_patch16_384": (22_205_416, 15.49),
    "deit3_medium_patch16_224": (38_849_512, 7.991),
    "deit3_base_patch16_224": (86_585_320, 17.56),
    "deit3_base_patch16_384": (86_877_160, 55.48),
    "deit3_large_patch16_224": (304_374_760, 61.55),
    "deit3_large_patch16_384": (304_763_880, 191.1),
    "deit3_huge_patch14_224": (632_126_440, 167.3),
    "deit_tiny_patch16_LS": (5_721_832, None),
    "deit_huge_patch14_52_LS": (1_025_726_440, None),
    "deit_huge_patch14_26x2_LS": (1_025_726_440, None),
    "deit_small_patch16_36_LS": (64_665_064, None),
    "deit_small_patch16_36": (64_637_416, None),
    "deit_small_patch16_18x2_LS": (64_665_064, None),
    "deit_small_patch16_18x2": (64_637_416, None),
    "deit_base_patch16_36x1": (256_675_816, None),
    "deit_base_patch16_18x2": (256_675_816, None),
    "deit_giant_40_patch14_LS": (955_030_504, None),
    "deit_Giant_48_patch14_LS": (1_599_158_248, None),
    "deit_small_patch16_hmlp": (21_945_640, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(name) == PUBLISHED[name][0]


QUICK = ("deit_tiny_distilled_patch16_224", "deit3_small_patch16_384")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, (_, cost) in PUBLISHED.items()
        if cost is not None
    ],
)
def test_has_the_published_cost(name: str) -> None:
    assert row(name).gflops == pytest.approx(PUBLISHED[name][1], rel=0.01)


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224", 0),
        ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224", 1),
        ("deit3_small_patch16_224", "deit3_small", 0),
        pytest.param("deit3_small_patch16_224", "deit3_small", 1, marks=pytest.mark.slow),
    ],
)
def test_gives_the_authors_numbers(
    name: str, file: str, place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden(file)
    case = numbers["cases"][place]
    assert agree(built(name, numbers, case, fill), case, fill) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_tiny_patch16_224", (224, 224)),
        ("deit_tiny_distilled_patch16_224", (96, 128)),
        ("deit3_small_patch16_224", (128, 96)),
    ],
)
def test_gives_timms_logits_with_timms_weights(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs = timm.create_model(name, img_size=size).eval()
    _make_loud(theirs)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = registry.create_model(name, pretrained=tmp_path / "weights.safetensors", img_size=size).eval()
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert measured(apart(ours(images), theirs(images)), ours, theirs, size) < 1e-5


def test_takes_weights_at_another_size_as_the_authors_code_does(tmp_path: Path) -> None:
    """facebookresearch/deit `main.py` resizes positions by plain bicubic; timm's own rule would antialias them."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit3_small_patch16_224", depth=2).eval()
    _make_loud(theirs)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = registry.create_model(
        "deit3_small_patch16_224", pretrained=tmp_path / "weights.safetensors", depth=2, img_size=(160, 96)
    ).eval()
    table = theirs.pos_embed.detach().transpose(1, 2).unflatten(2, (14, 14))
    theirs.set_input_size((160, 96))
    resized = functional.interpolate(table, size=(10, 6), mode="bicubic", align_corners=False)
    theirs.pos_embed.data = resized.flatten(2).transpose(1, 2)
    images = torch.randn(1, 3, 160, 96)
    with torch.inference_mode():
        assert measured(apart(ours(images), theirs(images)), ours, theirs, (160, 96)) < 1e-5
    assert any("resampled from 14x14 to 10x6" in made.story for made in ours.receipt.made)


def test_gives_transformers_logits_with_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.DeiTConfig(
        hidden_size=192, num_hidden_layers=3, num_attention_heads=3, intermediate_size=768, num_labels=11,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    _make_loud(theirs)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs(images).logits
    theirs.save_pretrained(tmp_path / "saved")
    save_file(theirs.state_dict(), tmp_path / "memory.safetensors")
    for place in (tmp_path / "saved" / "model.safetensors", tmp_path / "memory.safetensors"):
        ours = registry.create_model("deit_tiny_distilled_patch16_224", pretrained=place, depth=3).eval()
        assert ours.receipt.layout == "transformers" and ours.num_classes == 11
        with torch.inference_mode():
            assert measured(apart(ours(images), expected), ours, theirs, (224, 224)) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"layer_scale": 0.5}, {"layer_scale": 0.5, "parallel": 2}, {"parallel": 2}]
)
@pytest.mark.parametrize("layout", [layout.name for layout in deit.RENAMES])
def test_every_naming_goes_out_and_comes_back(layout: str, changes: dict[str, Any]) -> None:
    if layout in ("transformers", "mmpretrain") and changes.get("parallel"):
        pytest.skip("has no parallel blocks")
    if layout == "transformers" and changes:
        pytest.skip("has no layer scale")
    model = _tiny(**changes)
    chosen = next(each for each in deit.RENAMES if each.name == layout)
    written = adapter.write(model.state_dict(), chosen, deit.context(model.config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrapped = {f"module.{name}": tensor for name, tensor in written.items()}
    back, receipt = adapter.read(wrapped, deit.RENAMES, shapes, deit.context(model.config))
    assert receipt.layout == layout or (layout == "original" and receipt.layout == "timm")
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_reads_the_authors_file_with_its_wrapper(tmp_path: Path) -> None:
    model = _tiny(layer_scale=0.1)
    original = next(layout for layout in deit.RENAMES if layout.name == "original")
    torch.save(
        {"model": adapter.write(model.state_dict(), original, deit.context(model.config)), "epoch": 3},
        tmp_path / "deit_3.pth",
    )
    fields = {field: getattr(model.config, field) for field in ("width", "depth", "heads", "hidden")}
    again = registry.create_model(
        "deit_tiny_distilled_patch16_224", pretrained=tmp_path / "deit_3.pth", img_size=(32, 32),
        patch_size=(8, 8), layer_scale=1.0, **fields,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model(images))


@pytest.mark.parametrize(
    "changes", [{}, {"position_on_prefix": False, "layer_scale": 0.5, "distilled": False}]
)
def test_a_saved_folder_opens_in_timm(changes: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model, images = _tiny(**changes), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "saved")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.allclose(model(images), theirs(images), atol=1e-5)


def test_a_plain_file_is_refused_by_a_distilled_model() -> None:
    plain, distilled = _tiny(distilled=False), _tiny()
    written = adapter.write(plain.state_dict(), deit.RENAMES[0], deit.context(plain.config))
    with pytest.raises(WeightsError, match=r"prefix\.distillation"):
        adapter.read(written, deit.RENAMES, loading.shapes(distilled), deit.context(distilled.config))


def test_both_heads_speak_while_it_learns_from_a_teacher() -> None:
    model = _tiny()
    images = torch.randn(2, 3, 32, 32)
    mean = model(images)
    model.train()
    assert torch.allclose(model(images), mean, atol=1e-6)
    model.set_distilled_training(True)
    pair = model(images)
    assert isinstance(pair, ClassOutput)
    assert torch.allclose((pair.logits + pair.distilled) / 2, mean, atol=1e-6)
    model.eval()
    assert torch.equal(model(images), mean)


def test_a_parallel_block_adds_each_branch_to_the_same_tokens() -> None:
    model = _tiny(parallel=2, layer_scale=0.3)
    block, grid = model.backbone.stages[0].blocks[0], model.grid
    tokens = torch.randn(2, 2 + grid.size, 32)
    middle = tokens + sum(
        branch.scale.gamma * branch.body(branch.norm(tokens), grid) for branch in block.mixers
    )
    expected = middle + sum(
        branch.scale.gamma * branch.body(branch.norm(middle), grid) for branch in block.mlps
    )
    assert torch.allclose(block(tokens, grid), expected, atol=1e-6)


def test_the_hmlp_stem_keeps_patches_apart() -> None:
    model = registry.create_model(
        "deit_small_patch16_hmlp", img_size=(32, 48), width=32, heads=2, depth=1
    ).eval()
    stem = model.backbone.stages[0].entry.patches
    images = torch.randn(1, 3, 32, 48)
    changed = images.clone()
    changed[:, :, :16, 16:32] += 1
    moved = (stem(images, None)[0] != stem(changed, None)[0]).any(dim=1)[0]
    assert moved.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of the heads"),
        ({"img_size": (30, 32)}, "nearest legal"),
        ({"parallel": 0}, "at least 1"),
        ({"drop_path_rate": 1.0}, "must lie in"),
        ({"stem": "hmlp"}, "hMLP"),
        ({"num_classes": -1}, "0 or more"),
        ({"img_size": (0, 32)}, "at least 1"),
    ],
)
def test_refuses_what_means_nothing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        registry.changed(deit.TINY, **changes)


def _tiny(**changes: Any) -> Any:
    torch.manual_seed(1)
    model = registry.from_config("deit_nano_distilled_patch4_32", registry.changed(deit.TINY, **changes))
    _make_loud(model)
    return model.eval()


def _make_loud(model: torch.nn.Module) -> None:
    """Weights large enough for every part to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name or "ls" in name.split("."):
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
