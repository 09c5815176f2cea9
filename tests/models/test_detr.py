"""DETR: published counts and costs, the authors' numbers, transformers' boxes, layouts, padding, backbones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import shaken
from parity_table import Difference, measured
from rebuild import apart
from safetensors.torch import save_file
from torch import Tensor

from vitrail.errors import ModelError, WeightsError
from vitrail.models import backbones, detr, loading, registry
from vitrail.models.registry import create_model
from vitrail.nn.position import LearnedAxes, MaskedSine
from vitrail.weights import adapter

slow = pytest.mark.slow

PUBLISHED = {
    # parameters, those that are trained
    "detr_resnet50": (41_524_768, 41_302_368),
    "detr_resnet50_dc5": (41_524_768, 41_302_368),
    "detr_resnet101": (60_464_672, 60_242_272),
    "detr_resnet101_dc5": (60_464_672, 60_242_272),
    "detr_resnet50_panoptic": (42_899_288, 42_676_888),
    "detr_resnet101_panoptic": (61_839_192, 61_616_792),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    counts = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert (sum(counts), sum(trained)) == PUBLISHED[name]
    assert model.card.task == "object-detection"


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("detr_resnet50", 91.2),
        pytest.param("detr_resnet50_dc5", 198.5, marks=slow),
        pytest.param("detr_resnet101", 162.2, marks=slow),
        pytest.param("detr_resnet101_dc5", 269.5, marks=slow),
    ],
)
def test_costs_what_the_authors_code_costs_at_800_by_1200(name: str, cost: float) -> None:
    from vitrail.jobs.models import cost as count

    with torch.device("meta"):
        model = create_model(name)
    assert count(model, (800, 1200)).gflops == pytest.approx(cost, rel=0.01)


def canvas(fill: ModuleType) -> tuple[Tensor, Tensor]:
    """Two pictures of different sizes on one canvas, and what of it is padding."""
    images = torch.zeros(2, 3, 256, 352, dtype=torch.float64)
    images[0, :, :256, :320] = torch.from_numpy(fill.picture(3, 256, 320, name="image0"))
    images[1, :, :200] = torch.from_numpy(fill.picture(3, 200, 352, name="image1"))
    padding = torch.ones(2, 256, 352, dtype=torch.bool)
    padding[0, :, :320] = False
    padding[1, :200] = False
    return images, padding


def rebuilt(numbers: dict[str, Any], fill: ModuleType) -> Any:
    """The network in float64 with the weights that the names of the golden file stand for."""
    shapes = {key: tuple(shape) for key, shape in numbers["state_dict"]}
    state = {key: torch.from_numpy(value) for key, value in fill.fill(shapes).items()}
    for part, factor in numbers["gains"]:
        state = {key: value * factor if part in key else value for key, value in state.items()}
    model = create_model("detr_resnet50")
    ours, receipt = adapter.read(
        state, detr.RENAMES, loading.shapes(model), loading.context(detr, model.config)
    )
    assert receipt.layout == "original" and len(receipt.used) == len(shapes) and not receipt.dropped
    model.load_state_dict(ours)
    return model.double().eval()


@slow
def test_gives_the_authors_numbers(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    numbers = golden("detr_resnet50")
    model = rebuilt(numbers, fill)
    for case, told in numbers["cases"].items():
        if case == "single":
            images, padding = torch.from_numpy(fill.picture(1, 3, 256, 320)).double(), None
        else:
            images, padding = canvas(fill)
        with torch.inference_mode():
            output = model(images, padding)
        for name, tensor in (("pred_logits", output.logits), ("pred_boxes", output.boxes)):
            expected = told["outputs_float64"][name]
            flat = tensor.flatten()
            spread = flat[[number * len(flat) // 16 for number in range(16)]]
            found = max(
                apart(flat[:16], expected["first16"]),
                apart(spread, expected["spread16"]),
                apart(flat.norm(), expected["l2"]),
            )
            size = tuple(images.shape[-2:])
            assert measured(found, model, "the authors' code", size) < 1e-6, (case, name)


def test_position_codes_are_the_authors(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    numbers = golden("detr_position_code")
    padding = torch.tensor(numbers["mask"], dtype=torch.bool)
    map = torch.zeros(2, 8, 5, 7)
    code = MaskedSine(8)(map, padding).transpose(1, 2)  # [B, D, N]
    expected = torch.tensor(numbers["sine num_pos_feats=4 normalize=True, all values (2,8,5,7)"])
    assert torch.allclose(code.flatten(), expected, atol=1e-6)
    wide = MaskedSine(256)(map, padding).transpose(1, 2).unflatten(2, (5, 7))
    told = numbers["sine 128, image 1, padded position row 4, column 0, all 256 channels"]
    assert torch.allclose(wide[1, :, 4, 0], torch.tensor(told), atol=1e-6)
    learned = LearnedAxes(256)
    values = fill.fill({name: tuple(shape) for name, shape in numbers["learned state_dict"]})
    learned.load_state_dict(
        {
            "rows.weight": torch.from_numpy(values["row_embed.weight"]),
            "columns.weight": torch.from_numpy(values["col_embed.weight"]),
        }
    )
    found = learned(map).unflatten(1, (5, 7))[0, 1, 2]
    assert torch.allclose(found, torch.tensor(numbers["learned image 0 row 1 column 2, all 256 channels"]))


def test_a_code_without_padding_is_that_of_a_mask_without_padding() -> None:
    map = torch.zeros(2, 8, 4, 6)
    assert torch.equal(
        MaskedSine(8)(map).expand(2, -1, -1), MaskedSine(8)(map, torch.zeros(2, 4, 6, dtype=torch.bool))
    )


SMALL = {
    "width": 32,
    "heads": 4,
    "hidden": 48,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "queries": 7,
    "num_classes": 4,
}


PANOPTIC = {
    "width": 64,
    "heads": 8,
}  # transformers' mask head wants width and heads together to be a multiple of 8


def theirs_small(masks: bool = False, **changes: Any) -> Any:
    """transformers' DETR of the same sizes, on the real backbone."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    told = {
        "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 7, "num_labels": 4,
    }  # fmt: skip
    if masks:
        told |= {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    kind = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    torch.manual_seed(0)
    return shaken(kind(transformers.DetrConfig(**told, **changes)))


def difference(theirs: Any, ours: Any, padded: bool, size: tuple[int, int] = (96, 128)) -> Difference:
    """The largest relative difference of logits, boxes and masks."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    padding = None
    if padded:
        padding = torch.zeros(2, *size, dtype=torch.bool)
        padding[1, 70:] = True
        padding[1, :, 100:] = True
        images = images.masked_fill(padding[:, None], 0.0)
    with torch.inference_mode():
        output = ours(images, padding)
        expected = theirs(images, pixel_mask=None if padding is None else (~padding).long())
    found = max(apart(output.logits, expected.logits), apart(output.boxes, expected.pred_boxes))
    if output.masks is not None:
        found = max(found, apart(output.masks, expected.pred_masks))
    return measured(found, ours, theirs, size)


def read_from(theirs: Any, folder: Path, name: str = "detr_resnet50", **changes: Any) -> Any:
    state = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(state, folder / "theirs.safetensors")
    ours = create_model(name, pretrained=folder / "theirs.safetensors", **(SMALL | changes)).eval()
    return ours


def test_parity_with_transformers(tmp_path: Path) -> None:
    theirs = theirs_small()
    ours = read_from(theirs, tmp_path)
    assert difference(theirs, ours, padded=False) < 1e-5
    assert difference(theirs, ours, padded=True) < 1e-5


@slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"dilation": True}, {"dilated": 1}),
        ({"position_embedding_type": "learned"}, {"position": "learned"}),
    ],
    ids=["dc5", "learned positions"],
)
def test_parity_of_variations(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    network = theirs_small(**theirs)
    model = read_from(network, tmp_path, **ours)
    assert difference(network, model, padded=True) < 1e-5


@slow
def test_parity_of_the_panoptic_head(tmp_path: Path) -> None:
    network = theirs_small(masks=True)
    model = read_from(network, tmp_path, "detr_resnet50_panoptic", **PANOPTIC)
    assert difference(network, model, padded=False) < 1e-5
    assert difference(network, model, padded=True) < 1e-5


@slow
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_dc5"])
def test_parity_at_the_published_size(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = transformers.DetrConfig(num_labels=91, dilation=name.endswith("dc5"))
    theirs = shaken(transformers.DetrForObjectDetection(config))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    ours = create_model(name, pretrained=tmp_path / "theirs.safetensors", num_classes=91).eval()
    assert difference(theirs, ours, padded=True, size=(224, 320)) < 1e-5


def test_a_saved_folder_opens_in_transformers_and_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = shaken(create_model("detr_resnet50", **SMALL))
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "model").eval()
    assert difference(theirs, ours, padded=True) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    back = create_model("detr_resnet50", pretrained=tmp_path / "theirs", **SMALL).eval()
    assert back.receipt.layout == "transformers" and difference(theirs, back, padded=True) < 1e-5


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return registry.from_config("detr_resnet50", registry.changed(detr.TINY, **changes))


@pytest.mark.parametrize("layout", detr.RENAMES, ids=lambda layout: layout.name)
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "panoptic"])
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout, masks: bool) -> None:
    model = shaken(tiny(masks=masks))
    known = loading.context(detr, model.config)
    written = adapter.write(model.state_dict(), layout, known)
    assert any(key.startswith("detr.") for key in written) == masks
    read, receipt = adapter.read(written, detr.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_the_authors_file_loads_with_its_classes_and_without(tmp_path: Path) -> None:
    model = shaken(tiny(num_classes=6))
    state = adapter.write(
        model.state_dict(), adapter.by_name(detr.RENAMES, "original"), loading.context(detr, model.config)
    )
    torch.save({"model": state}, tmp_path / "detr.pth")
    changes = {name: value for name, value in vars(detr.TINY).items() if name != "num_classes"}
    told = create_model("detr_resnet50", tmp_path / "detr.pth", **changes)
    assert told.num_classes == 6 and told.get_classifier().out_features == 7
    other = create_model("detr_resnet50", tmp_path / "detr.pth", num_classes=3, **changes)
    assert set(other.receipt.fresh) == {"head.linear.weight", "head.linear.bias"}
    assert torch.equal(other.head.boxes.layers[0].weight, model.head.boxes.layers[0].weight)


def test_a_torn_file_is_refused_and_the_tensor_named(tmp_path: Path) -> None:
    model = tiny()
    state = adapter.write(
        model.state_dict(), adapter.by_name(detr.RENAMES, "original"), loading.context(detr, model.config)
    )
    del state["transformer.decoder.layers.1.norm3.bias"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(WeightsError, match="norm3"):
        create_model("detr_resnet50", tmp_path / "torn.pth", **vars(detr.TINY))


def test_training_gives_every_layers_answer_and_evaluation_the_last() -> None:
    model = tiny(decoder_depth=3, frozen_norm=True)
    images = torch.randn(2, 3, 64, 64)
    output = model.train()(images)
    assert [pair[0].shape for pair in output.auxiliary] == [(2, 10, 6)] * 2
    with torch.inference_mode():
        last = model.eval()(images)
    assert last.auxiliary == () and last.masks is None
    assert torch.allclose(last.logits, output.logits, atol=1e-5)


def test_padding_does_not_change_what_is_found_in_a_padded_batch() -> None:
    model = shaken(tiny())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        outputs = []
        for junk in (0.0, 5.0):
            batch = torch.full((1, 3, 64, 128), junk)
            batch[..., :64] = images
            padding = torch.zeros(1, 64, 128, dtype=torch.bool)
            padding[..., 64:] = True
            model.backbone.eval()
            outputs.append(model(batch.masked_fill(padding[:, None], 0.0), padding))
    assert torch.equal(outputs[0].boxes, outputs[1].boxes)


@pytest.mark.parametrize("name", ["swin_nano_patch2_32", "deit_tiny_patch16_224", "pvt_v2_b0"])
def test_any_network_of_the_library_can_be_the_backbone(name: str, tmp_path: Path) -> None:
    model = tiny(backbone=name).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        output = model(images)
        assert output.boxes.shape == (1, 10, 4)
        model.save_pretrained(tmp_path / "model")
        again = registry.from_pretrained(tmp_path / "model")
        assert torch.equal(again(images).boxes, output.boxes)


def test_a_classifiers_folder_becomes_the_backbone_with_a_receipt(tmp_path: Path) -> None:
    classifier = shaken(create_model("resnet10_nano", num_classes=7))
    classifier.save_pretrained(tmp_path / "classifier")
    model = tiny()
    receipt = backbones.load_backbone(model, tmp_path / "classifier")
    assert any("fc.weight" in key for key, _ in receipt.dropped)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = classifier.features(images).maps[-1]
        assert torch.equal(model.eval().features(images).maps[-1], expected)
    with pytest.raises(WeightsError, match="backbone is a resnet10_nano"):
        vit = create_model("deit_tiny_patch16_224")
        vit.save_pretrained(tmp_path / "vit")
        backbones.load_backbone(model, tmp_path / "vit")


def test_frozen_parts_stay_frozen_through_a_folder(tmp_path: Path) -> None:
    model = tiny(frozen_norm=True, frozen_stages=1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(name.startswith(("backbone.stem", "backbone.stages.0")) for name in frozen)
    model.save_pretrained(tmp_path / "model")
    again = registry.from_pretrained(tmp_path / "model")
    assert {name for name, parameter in again.named_parameters() if not parameter.requires_grad} == frozen


def test_other_classes_leave_everything_else() -> None:
    model = tiny()
    boxes = model.head.boxes.layers[0].weight
    model.reset_classifier(9)
    assert model.num_classes == 9 and model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 10, 10)
    assert model.head.boxes.layers[0].weight is boxes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heads": 3}, "multiple of the heads"),
        ({"drop_rate": 1.0}, "must lie in"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"backbone": "deit_tiny_patch16_224", "frozen_norm": True}, "has no norm"),
        ({"backbone": "detr_nano"}, "classification network"),
        ({"frozen_stages": -1}, "must be 0 or more"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        tiny(**changes)


def test_cocos_ids_go_with_cocos_classes() -> None:
    with torch.device("meta"):
        assert create_model("detr_resnet50").card.ids == tuple(range(91))
        assert create_model("detr_resnet50", num_classes=3).card.ids == ()
