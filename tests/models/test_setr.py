"""SETR: the authors' numbers for all three decoders, published counts, both layouts, any picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_table import measured
from rebuild import apart
from safetensors.torch import save_file

from vitrail.errors import ModelError, WeightsError
from vitrail.models import loading, registry, setr
from vitrail.models.registry import create_model
from vitrail.nn.masks import UpHead
from vitrail.tasks.segment import Segment
from vitrail.tasks.sliding import slide
from vitrail.weights import adapter

slow = pytest.mark.slow

PUBLISHED = {
    # encoder and main head (the fact sheet's count), and all that the original holds (the paper's, where it has one)
    "setr_naive_large": (304_450_966, 305_669_296),
    "setr_naive_large_768": (305_728_019, 306_576_536),
    "setr_pup_large": (308_319_894, 318_307_292),
    "setr_pup_large_768": (309_596_947, 319_113_662),
    "setr_mla_large": (310_030_486, 310_568_836),
    "setr_mla_large_768": (310_737_427, 310_805_618),
    "setr_naive_base": (86_670_486, 87_690_672),
    "setr_naive_base_768": (87_619_859, None),
    "setr_pup_base": (90_015_126, 97_641_180),
    "setr_pup_base_768": (90_964_499, None),
    "setr_mla_base": (92_051_862, 92_590_212),
    "setr_mla_base_768": (92_431_123, None),
    "setr_pup_deit_base_768": (90_964_499, 98_119_870),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    main, whole = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - sum(parameter.numel() for parameter in model.auxiliary.parameters()) == main
    # Every head of the original inherits a class layer on 512 channels that it never calls.
    if whole is not None:
        assert count + (1 + len(model.auxiliary)) * 513 * model.num_classes == whole


def built(numbers: dict[str, Any], fill: ModuleType, decoder: str) -> Any:
    """The small SETR of a golden file in float64, with the weights that its names stand for."""
    told = numbers["config"]["backbone"]
    depth = told["depth"]
    heads = numbers["config"]["auxiliary_head"]
    taps = tuple(told.get("mla_index", sorted({depth - 1, *(head["in_index"] for head in heads)})))
    encoder = {"width": told["embed_dim"], "depth": depth, "heads": told["num_heads"], "hidden": 256}
    config = registry.changed(
        registry.variant(f"setr_{decoder}_large"), img_size=told["img_size"], num_classes=19, taps=taps,
        auxiliary=tuple(range(len(heads))), backbone_changes=encoder,
    )  # fmt: skip
    torch.manual_seed(0)
    model = registry.from_config(f"setr_{decoder}_large", config)
    state = fill.fill({key: tuple(shape) for key, shape in numbers["state_dict"]})
    ours, receipt = adapter.read(
        {key: torch.from_numpy(value) for key, value in state.items()},
        setr.RENAMES, loading.shapes(model), loading.context(setr, config),
    )  # fmt: skip
    assert receipt.layout == "original"
    assert {reason for _, reason in receipt.dropped} == {"inherited by the original, never called"}
    model.load_state_dict(ours, strict=False)
    unused = numbers["parameter split"]["never used: inherited conv_seg in decode and auxiliary heads"]
    assert sum(parameter.numel() for parameter in model.parameters()) + unused == numbers["parameters"]
    return model.double().eval()


def distance(found: torch.Tensor, told: dict[str, Any]) -> float:
    """The larger of two relative differences: of sixteen values spread over all, and of the length of all."""
    assert list(found.shape) == told["shape"]
    flat = found.flatten()
    spread = flat[torch.arange(16) * flat.numel() // 16]
    return max(
        apart(flat[:16], told["first16"]),
        apart(spread, told["spread16"]),
        apart(flat.norm(), told["l2"]),
    )


@pytest.mark.parametrize("decoder", ["naive", "pup", "mla"])
def test_gives_the_authors_numbers(
    decoder: str, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden(f"setr_{decoder}_tiny")
    model = built(numbers, fill, decoder)
    images = torch.from_numpy(fill.picture(2, 3, 96, 96)).double()
    with torch.inference_mode():
        output = model(images)
        assert output.auxiliary == ()
        maps = model.neck(model.backbone(images).maps)
        auxiliary = tuple(head(maps, (96, 96)) for head in model.auxiliary)
    expected = numbers["outputs_float64"]
    found = measured(distance(output.logits, expected["logits"]), model, "the authors' code", (96, 96))
    assert found < 1e-6
    for place, logits in enumerate(auxiliary):
        assert distance(logits, expected[f"auxiliary {place} logits"]) < 1e-6

    labels = (
        torch.from_numpy(fill.picture(2, 1, 96, 96, name="labels"))[:, 0].double().sigmoid().mul(22).floor()
    )
    labels = labels.masked_fill(labels >= 19, 255).long()
    assert int((labels == 255).sum()) == numbers["inputs"]["ignored pixels"]
    task = Segment(
        [str(index) for index in range(19)], auxiliary=model.config.auxiliary_weight, average="all"
    )
    terms = task.loss(output._replace(auxiliary=auxiliary), labels)
    told = numbers["losses (cross-entropy, mean over all pixels including ignored ones)"]["float64"]
    assert float(terms["loss"]) == pytest.approx(told["sum of losses"], rel=1e-6)
    assert float(terms["mask"]) == pytest.approx(
        told["decode"]["loss (with its weight 1.0 or 0.4)"], rel=1e-6
    )


def test_slides_as_the_authors_do(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    numbers = golden("setr_naive_tiny")
    model = built(numbers, fill, "naive")
    image = torch.from_numpy(fill.picture(1, 3, 112, 144, name="slide")).double()
    with torch.inference_mode():
        logits = slide(model, image, (96, 96), (64, 64))
    assert distance(logits, numbers["outputs_float64"]["sliding window logits"]) < 1e-6


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return registry.from_config("setr_pup_large", registry.changed(setr.TINY, **changes))


DECODERS: dict[str, dict[str, Any]] = {
    "naive": {"decoder": "naive", "growth": (1,), "auxiliary_growth": (1,)},
    "pup": {},
    "mla": {"decoder": "mla", "auxiliary": (0, 1)},
    "alone": {"auxiliary": ()},
    "deit": {"backbone": "deit_tiny_distilled_patch16_224"},
    "channels": {"in_chans": 1},
}


@pytest.mark.parametrize("changes", DECODERS.values(), ids=DECODERS)
def test_takes_any_size_and_every_trained_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    channels = model.config.in_chans
    output = model(torch.randn(2, channels, 40, 27))
    assert output.logits.shape == (2, 5, 40, 27)
    assert len(output.auxiliary) == len(model.config.auxiliary)
    Segment("abcde").loss(output, torch.randint(0, 5, (2, 40, 27)))["loss"].backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() == 0)
    ]
    assert [name for name in dead if not name.endswith("conv.bias")] == []  # a norm takes these biases away
    model.eval()
    assert model(torch.randn(1, channels, 16, 48)).auxiliary == ()


@pytest.mark.parametrize("decoder", ["naive", "pup", "mla"])
def test_saved_and_loaded_it_gives_the_same_bits(decoder: str, tmp_path: Path) -> None:
    model = tiny(**DECODERS[decoder]).eval()
    model.card = dataclasses.replace(model.card, labels=tuple("abcde"))
    model.save_pretrained(tmp_path / "model")
    loaded = registry.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.card.task == "image-segmentation"
    assert loaded.card.layout == "original" and loaded.card.labels == tuple("abcde")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, model(images).logits)


def mmsegmentation(model: Any) -> dict[str, torch.Tensor]:
    """A model's state dict as mmsegmentation's network of the same kind would hold it."""
    context = loading.context(setr, model.config)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("conv.bias")}
    written = adapter.write(state, setr.RENAMES[1], context)
    if model.config.decoder == "mla":
        written |= {f"auxiliary_head.{j}.conv_seg.bias": torch.zeros(5) for j in range(4)}
    return written


MMSEGMENTATION: dict[str, dict[str, Any]] = {
    "naive": DECODERS["naive"],
    "pup": {},
    "mla": {
        "decoder": "mla", "auxiliary": (0, 1, 2, 3), "taps": (0, 1, 2, 3),
        "backbone_changes": {**setr.TINY.backbone_changes, "depth": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize("decoder", MMSEGMENTATION)
def test_loads_what_mmsegmentation_writes(decoder: str, tmp_path: Path) -> None:
    changes = MMSEGMENTATION[decoder]
    model = tiny(**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if name.endswith("conv.bias"):
                parameter.zero_()
    save_file(mmsegmentation(model), tmp_path / "theirs.safetensors")
    fresh = tiny(**changes).eval()
    receipt = loading.load_pretrained(fresh, tmp_path / "theirs.safetensors")
    assert receipt.layout == "mmsegmentation" and not receipt.fresh
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(fresh(images).logits, model(images).logits)
    for one, other in zip(fresh.auxiliary, model.auxiliary, strict=True):
        assert torch.equal(one.linear.weight, other.linear.weight)


def test_multi_level_streams_of_mmsegmentation_run_the_other_way() -> None:
    model = tiny(**MMSEGMENTATION["mla"])
    theirs = mmsegmentation(model)
    ours = model.state_dict()
    deepest = "neck.smooth.3.conv.weight"
    assert torch.equal(theirs["neck.mla.feat_extract.0.conv.weight"], ours[deepest])
    assert torch.equal(theirs["neck.mla.channel_proj.0.conv.weight"], ours["neck.reduce.0.conv.weight"])
    assert torch.equal(theirs["decode_head.mlahead.head2.0.weight"], ours["head.streams.3.0.conv.weight"])
    width = model.config.stream_width
    assert torch.equal(
        theirs["decode_head.conv_seg.weight"][:, :width], ours["head.linear.weight"][:, -width:]
    )


def test_growth_before_or_after_the_class_layer_is_the_same() -> None:
    torch.manual_seed(0)
    one, other = (
        UpHead(8, 3, width=4, growth=(2, 2, 2, 1)).eval(),
        UpHead(8, 3, width=4, growth=(2,) * 4).eval(),
    )
    other.load_state_dict(one.state_dict())
    maps = (torch.randn(1, 8, 3, 2),)
    assert torch.allclose(one(maps, (48, 32)), other(maps, (48, 32)), atol=1e-5)


def test_positions_are_resampled_bilinearly_when_a_file_is_loaded(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    larger = create_model("setr_pup_large", tmp_path / "model", **{**vars(setr.TINY), "img_size": (48, 64)})
    told = [story for name, story in larger.receipt.made if name.endswith("positions.table")]
    assert told == ["positions resampled from 4x4 to 6x8 (bilinear-plain)"]


def test_takes_other_classes_in_every_head(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    model.reset_classifier(7)
    output = model(torch.randn(2, 3, 32, 32))
    assert output.logits.shape[1] == output.auxiliary[0].shape[1] == model.num_classes == 7
    other = create_model("setr_pup_large", tmp_path / "model", **{**vars(setr.TINY), "num_classes": 3})
    assert (
        other(torch.randn(2, 3, 32, 32)).logits.shape[1] == 3 and "head.linear.weight" in other.receipt.fresh
    )
    same = create_model(
        "setr_pup_large",
        tmp_path / "model",
        **{k: v for k, v in vars(setr.TINY).items() if k != "num_classes"},
    )
    assert same.num_classes == 5 and not same.receipt.fresh


def test_a_classifiers_folder_becomes_the_encoder(tmp_path: Path) -> None:
    from vitrail.models.backbones import load_backbone

    changes = dict(setr.TINY.backbone_changes)
    torch.manual_seed(3)
    classifier = create_model("vit_tiny_patch16_224", img_size=64, num_classes=4, **changes)
    classifier.save_pretrained(tmp_path / "vit")
    model = tiny()
    receipt = load_backbone(model, tmp_path / "vit")
    theirs, ours = classifier.state_dict(), model.state_dict()
    name = "backbone.stages.0.blocks.1.mlp.fc1.weight"
    assert torch.equal(ours[name], theirs[name])
    assert any("resampled from 8x8 to 4x4 (bilinear-plain)" in story for _, story in receipt.made)
    assert any(key.endswith("norm.weight") for key, _ in receipt.dropped)


@pytest.mark.parametrize("image", [32, 64])
def test_a_distilled_deit_becomes_the_encoder_without_its_second_token(image: int, tmp_path: Path) -> None:
    from vitrail.models.backbones import load_backbone

    torch.manual_seed(3)
    changes = dict(setr.TINY.backbone_changes)
    teacher = create_model("deit_tiny_distilled_patch16_224", img_size=image, num_classes=4, **changes)
    model = tiny(backbone="deit_tiny_patch16_224")
    table = "stages.0.entry.positions.table"
    theirs = teacher.backbone.state_dict()[table]
    teacher.save_pretrained(tmp_path / "folder")
    state = adapter.write(
        teacher.state_dict(), registry.family_of(teacher.name).RENAMES[0],
        loading.context(registry.family_of(teacher.name), teacher.config),
    )  # fmt: skip
    save_file(state, tmp_path / "file.safetensors")
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        receipt = load_backbone(model, path)
        assert ("dist_token", "this encoder has no distillation token") in receipt.dropped
        ours = model.backbone.state_dict()[table]
        assert torch.equal(ours[:, :1], theirs[:, :1])
        if image == 32:
            assert torch.equal(ours[:, 1:], theirs[:, 2:])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"taps": (1, 0)}, "rising"),
        ({"taps": (0, 5)}, "below the encoder's 2 blocks"),
        ({"auxiliary": (2,)}, "places in taps"),
        ({"growth": (0,)}, "factors of at least 1"),
        ({"backbone": "swin_nano_patch2_32", "backbone_changes": {}}, "keeps one resolution"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"img_size": (33, 32)}, "multiple of the patch's 8"),
    ],
    ids=str,
)
def test_an_illegal_combination_says_what_is_legal(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tiny(**changes)


def test_a_file_of_another_decoder_is_refused() -> None:
    state, model = mmsegmentation(tiny(**MMSEGMENTATION["mla"])), tiny()
    with pytest.raises(WeightsError, match="does not fit the model"):
        adapter.read(state, setr.RENAMES, loading.shapes(model), loading.context(setr, model.config))


def test_seeded_and_started_as_written() -> None:
    one, other = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    head = tiny(width=256).requires_grad_(False).head
    assert (
        float(head.linear.weight.std()) == pytest.approx(0.01, rel=0.1) and head.linear.bias.abs().max() == 0
    )


@slow
def test_traces_whole_without_a_graph_break(unchecked: None) -> None:
    model = tiny().eval()
    images = torch.randn(1, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(images).logits, model(images).logits, atol=1e-5)
