"""The ViT computes what timm, transformers and torchvision compute, with weights that went through files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_table import Difference, measured
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrail.models import loading
from vitrail.models.registry import create_model, from_config, from_pretrained, variant
from vitrail.models.vit import RENAMES, context
from vitrail.weights import adapter, files

slow = pytest.mark.slow


def timm_model(name: str, **arguments: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm comes with the extra `peers`")
    return randomised(timm.create_model(name, pretrained=False, **arguments))


def randomised(model: nn.Module) -> nn.Module:
    """Weights that differ everywhere from their start values, so that a swap of two cannot hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "token" not in name else 0.2
            parameter.add_(noise, alpha=scale)
    return model.eval()


def difference(
    ours: nn.Module,
    theirs: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    reference: str = "",
) -> Difference:
    """Largest difference of the logits of two pictures, relative to the largest logit."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        want, got = theirs(images), ours.eval()(images)
    assert want.std() > 1e-3
    return measured(float((got - want).abs().max() / want.abs().max()), ours, reference or theirs, size)


def _logits(theirs: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: theirs(images).logits


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (224, 224)),
        pytest.param("vit_small_patch32_224", (224, 224), marks=slow),
        pytest.param("vit_base_patch16_224", (224, 224), marks=slow),
        pytest.param("vit_base_patch16_384", (384, 384), marks=slow),
    ],
)
def test_logits_equal_timms(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = timm_model(name, num_classes=1000)
    ours = create_model(name, saved(theirs, tmp_path / "timm.pth"))
    assert ours.receipt.layout == "timm" and not ours.receipt.made and not ours.receipt.dropped
    assert difference(ours, theirs, size) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_r_s16_p8_224",
        pytest.param("vit_small_r26_s32_224", marks=slow),
        pytest.param("vit_base_r50_s16_224", marks=slow),
        pytest.param("vit_large_r50_s32_224", marks=slow),
    ],
)
def test_hybrids_equal_timms(name: str, tmp_path: Path) -> None:
    """In double precision, because a deep convolutional stem with random weights loses digits in single."""
    shape = {"img_size": (64, 64), "depth": 1, "num_classes": 10}
    theirs = timm_model(name, **shape)
    ours = create_model(name, saved(theirs, tmp_path / "timm.pth"), **shape)
    assert ours.receipt is not None and not ours.receipt.made
    assert difference(ours.double(), theirs.double(), (64, 64), torch.float64) < 1e-9


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"global_pool": "avg"}, {"pool": "mean", "pool_norm": "after"}),
        ({"global_pool": "avg", "fc_norm": False}, {"pool": "mean"}),
        (
            {"global_pool": "avg", "class_token": False},
            {"pool": "mean", "pool_norm": "after", "class_token": False},
        ),
        ({"reg_tokens": 4, "no_embed_class": True}, {"registers": 4, "position_on_prefix": False}),
        (
            {"qk_norm": True, "init_values": 0.1, "qkv_bias": False},
            {"qk_norm": True, "layer_scale": 0.1, "qkv_bias": False},
        ),
        ({"act_layer": "gelu_tanh", "in_chans": 3}, {"gelu": "tanh"}),
        ({"img_size": (96, 160)}, {"img_size": (96, 160)}),
    ],
    ids=lambda value: "-".join(value),
)  # fmt: skip
def test_every_choice_computes_what_timms_does(
    theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    size = theirs.get("img_size", (64, 64))
    shape = {"depth": 2, "img_size": size}
    peer = timm_model("vit_tiny_patch16_224", **{**theirs, **shape})
    model = create_model("vit_tiny_patch16_224", saved(peer, tmp_path / "timm.pth"), **{**ours, **shape})
    assert difference(model, peer, size) < 1e-5
    model.save_pretrained(tmp_path / "folder")
    timm = pytest.importorskip("timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert difference(model, again, size) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", pytest.param("vit_base_patch16_384", marks=slow)])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `peers`")
    config = variant(name)
    theirs = randomised(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
                intermediate_size=config.hidden, image_size=config.img_size[0], num_labels=1000, layer_norm_eps=1e-6,
            )
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "disk")  # names on disk
    save_file(theirs.state_dict(), tmp_path / "memory.safetensors")  # names in memory
    for path in (tmp_path / "disk", tmp_path / "memory.safetensors"):
        ours = create_model(name, path)
        assert ours.receipt.layout == "transformers"
        assert difference(ours, _logits(theirs), config.img_size, reference="transformers") < 1e-5


@pytest.mark.parametrize("name", ["small", pytest.param("vit_b_16", marks=slow)])
def test_logits_equal_torchvisions(name: str, tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    if name == "small":
        theirs = VisionTransformer(
            64, 16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=7
        )
    else:
        theirs = VisionTransformer(224, 16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072)
    randomised(theirs)
    path = saved(theirs, tmp_path / "vit.pth")
    if name == "small":
        ours = create_model("vit_tiny_patch16_224", path, img_size=64, depth=2)
        assert ours.num_classes == 7
    else:
        ours = create_model("vit_base_patch16_224", path)
    assert difference(ours, theirs, ours.config.img_size) < 1e-5
    older = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in theirs.state_dict().items()
    }
    torch.save(older, path)
    again = create_model(ours.name, path, **{"img_size": 64, "depth": 2} if name == "small" else {})
    for ours_now, ours_then in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(ours_now, ours_then)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": (64, 64)}),
        ("vit_tiny_r_s16_p8_224", {"depth": 1, "img_size": (64, 64)}),
        pytest.param("vit_base_r50_s16_224", {"depth": 1, "img_size": (64, 64)}, marks=slow),
    ],
)
@pytest.mark.parametrize("layout", ["google", "big_vision", "big_vision_scan"])
def test_timms_own_reader_agrees_with_our_npz(
    name: str, changes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """An .npz that we write, read by timm's reader of Google's files, computes the same."""
    if layout == "big_vision_scan" and "_r" in name:
        pytest.skip("nobody stacks the blocks of a hybrid")
    ours = randomised(from_config(name, variant(name, **changes, num_classes=9)))
    if layout != "google":  # these have no position for [CLS]
        with torch.no_grad():
            ours.get_parameter("backbone.stages.0.entry.positions.table")[:, 0] = 0
    known = context(ours.config)
    written = adapter.write(ours.state_dict(), adapter.by_name(RENAMES, layout), known)
    files.write_tensors(tmp_path / "vit.npz", written)
    peer = timm_model(
        name, num_classes=9, **changes, **({"no_embed_class": True} if layout != "google" else {})
    )
    peer.load_pretrained(str(tmp_path / "vit.npz"))
    assert difference(ours.double(), peer.double(), (64, 64), torch.float64) < 1e-9
    ours = ours.float()
    loaded = create_model(name, tmp_path / "vit.npz", **changes)
    assert loaded.receipt.layout == layout
    for mine, theirs in zip(loaded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
def test_prefixes_of_jax_trainers_are_known(prefix: str, tmp_path: Path) -> None:
    ours = from_config("vit_tiny_patch16_224", variant("vit_tiny_patch16_224", depth=1, img_size=32))
    state = adapter.write(ours.state_dict(), adapter.by_name(RENAMES, "google"), context(ours.config))
    halved = {f"{prefix}{key}": value.to(torch.bfloat16) for key, value in state.items()}
    files.write_tensors(tmp_path / "vit.npz", halved)
    loaded = create_model("vit_tiny_patch16_224", tmp_path / "vit.npz", depth=1, img_size=32)
    for mine, theirs in zip(loaded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16).float())


def test_positions_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    peer = timm_model("vit_tiny_patch16_224", img_size=64, depth=2)
    path = saved(peer, tmp_path / "timm.pth")
    ours = create_model("vit_tiny_patch16_224", path, img_size=(96, 160), patch_size=(8, 8), depth=2)
    stories = dict(ours.receipt.made)
    assert "from 4x4 to 12x20" in stories["backbone.stages.0.entry.positions.table"]
    assert "from 16x16 to 8x8" in stories["backbone.stages.0.entry.patches.proj.weight"]
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(96, 160), patch_size=8, depth=2).eval()
    theirs.load_state_dict(checkpoint_filter_fn(peer.state_dict(), theirs))
    assert difference(ours, theirs, (96, 160)) < 1e-5


@pytest.mark.parametrize("layout", ["transformers", "torchvision", "google"])
def test_positions_are_resampled_as_the_files_library_does_it(layout: str, tmp_path: Path) -> None:
    """A table for 4 x 4 patches, brought to 6 x 6 by that library's own means."""
    ours = randomised(
        from_config("vit_tiny_patch16_224", variant("vit_tiny_patch16_224", depth=1, img_size=64))
    )
    state = adapter.write(ours.state_dict(), adapter.by_name(RENAMES, layout), context(ours.config))  # type: ignore[arg-type]
    files.write_tensors(path := tmp_path / ("w.npz" if layout == "google" else "w.safetensors"), state)
    loaded = create_model("vit_tiny_patch16_224", path, depth=1, img_size=96)
    assert loaded.receipt.layout == layout
    table = ours.state_dict()["backbone.stages.0.entry.positions.table"]
    if layout == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `peers`")
        peer = transformers.ViTModel(transformers.ViTConfig(hidden_size=192, num_hidden_layers=1, num_attention_heads=3,
                                                            image_size=64))  # fmt: skip
        peer.embeddings.position_embeddings.data = table
        wanted = peer.embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 192), 96, 96).detach()
    elif layout == "torchvision":
        from torchvision.models.vision_transformer import interpolate_embeddings

        wanted = interpolate_embeddings(96, 16, {"encoder.pos_embedding": table})["encoder.pos_embedding"]
    else:  # google-research/vision_transformer `checkpoint.py`, interpolate_posembed
        zoom = pytest.importorskip("scipy.ndimage").zoom
        cells = zoom(table[0, 1:].reshape(4, 4, 192).numpy(), (1.5, 1.5, 1), order=1)
        wanted = torch.cat([table[:, :1], torch.from_numpy(cells).reshape(1, 36, 192)], dim=1)
    found = loaded.state_dict()["backbone.stages.0.entry.positions.table"]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_folder_opens_in_timm_and_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `peers`")
    timm = pytest.importorskip("timm", reason="timm comes with the extra `peers`")
    changes = {"depth": 2, "img_size": (64, 96), "num_classes": 3, "width": 96, "hidden": 200}
    ours = randomised(from_config("vit_tiny_patch16_224", variant("vit_tiny_patch16_224", **changes)))
    ours.save_pretrained(tmp_path)
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert difference(ours, peer, (64, 96)) < 1e-5
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert difference(ours, _logits(wrapped), (64, 96), reference="transformers") < 1e-5
    again = from_pretrained(tmp_path)
    assert difference(ours, again, (64, 96), reference="its own folder") == 0


def test_a_learned_grid_that_is_not_square_is_told_by_the_folder(tmp_path: Path) -> None:
    made = from_config("vit_tiny_patch16_224", variant("vit_tiny_patch16_224", depth=1, img_size=(32, 128)))
    made.save_pretrained(tmp_path)
    # 2x8 and 4x4: both 16 cells.
    told = create_model("vit_tiny_patch16_224", tmp_path, depth=1, img_size=(64, 64))
    assert "from 2x8 to 4x4" in dict(told.receipt.made)["backbone.stages.0.entry.positions.table"]


def test_shapes_of_a_configuration_cost_no_memory() -> None:
    shapes = loading.shapes_of("vit_gigantic_patch14_224", variant("vit_gigantic_patch14_224"))
    assert shapes["head.linear.weight"] == (1000, 1664)
