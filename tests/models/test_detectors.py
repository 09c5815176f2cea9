"""The battery of detectors: every family of them on its TINY configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.models import backbones, registry
from vitrail.models.registry import create_model
from vitrail.nn.shapes import DenseBoxOutput
from vitrail.tasks.detect import BoxTarget, Detect

FAMILIES = registry.families("object-detection")

every = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str, **changes: Any) -> Any:
    module = registry.module_of(family)
    torch.manual_seed(0)
    config = registry.changed(module.TINY, **changes)
    return registry.from_config(next(iter(module.VARIANTS)), config)


def pictures(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def targets(batch: int) -> list[BoxTarget]:
    boxes = torch.tensor([[0.3, 0.3, 0.3, 0.4], [0.6, 0.7, 0.5, 0.4]])
    return [BoxTarget(boxes, torch.tensor([0, 3])) for _ in range(batch)]


def settle(model: Any) -> Any:
    """Batch norms that have seen something, so that evaluation is no degenerate case."""
    with torch.no_grad():
        model.train()(pictures(4))
    return model.eval()


@every
def test_answers_finite_classes_and_boxes_for_any_shape(family: str) -> None:
    model = settle(tiny(family))
    assert model.card.task == "object-detection"
    for size in ((64, 64), (48, 112)):
        with torch.inference_mode():
            output = model(pictures(2, size))
        assert output.boxes.shape == (*output.logits.shape[:2], 4)
        assert torch.isfinite(output.logits).all() and torch.isfinite(output.boxes).all()
        (first, _) = Detect([str(number) for number in range(5)]).decode(output, [size, size], threshold=0.0)
        assert first.boxes and first.boxes[0].score >= first.boxes[-1].score


@every
def test_a_picture_alone_and_padded_in_a_batch_is_the_same_picture(family: str) -> None:
    model = settle(tiny(family))
    image = pictures(1)
    batch = torch.zeros(2, 3, 64, 128)
    batch[0, :, :, :64] = image
    batch[1] = pictures(1, (64, 128))
    padding = torch.zeros(2, 64, 128, dtype=torch.bool)
    padding[0, :, 64:] = True
    same = torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.inference_mode():
        alone, masked = model(image), model(image, same)
        assert torch.allclose(alone.boxes, masked.boxes, atol=1e-5)
        together = model(batch, padding)
        again = model(batch.roll(1, 0), padding.roll(1, 0))
    assert torch.allclose(together.boxes[0], again.boxes[1], atol=1e-5)
    assert torch.allclose(together.logits[0], again.logits[1], atol=1e-5)


@every
def test_the_loss_reaches_every_parameter_that_is_trained(family: str) -> None:
    model = tiny(family).train()
    output = model(pictures(4))
    Detect([str(number) for number in range(5)]).loss(output, targets(4))["loss"].backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not torch.isfinite(parameter.grad).all())
    ]
    assert not dead


@every
def test_saved_and_loaded_it_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model = settle(tiny(family))
    model.save_pretrained(tmp_path / "model")
    loaded = registry.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.card.task == "object-detection"
    with torch.inference_mode():
        assert torch.equal(loaded(pictures()).boxes, model(pictures()).boxes)


@every
def test_a_folder_gives_its_weights_to_other_classes(family: str, tmp_path: Path) -> None:
    model = settle(tiny(family))
    model.save_pretrained(tmp_path / "model")
    changes = {name: value for name, value in vars(model.config).items() if name != "num_classes"}
    name = next(iter(registry.module_of(family).VARIANTS))
    other = create_model(name, tmp_path / "model", num_classes=2, **changes).eval()
    assert other.receipt.fresh and all(
        name.rpartition(".")[0].endswith("linear") for name in other.receipt.fresh
    )
    told = create_model(name, tmp_path / "model", **changes)
    assert told.num_classes == 5
    with torch.inference_mode():
        assert other(pictures()).logits.shape[-1] == model(pictures()).logits.shape[-1] - 3


@every
def test_takes_other_classes(family: str) -> None:
    model = tiny(family)
    before = model(pictures()).logits.shape[-1]
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(pictures()).logits.shape[-1] == before + 2


@every
def test_traces_whole_without_a_graph_break(family: str, unchecked: None) -> None:
    model, images = settle(tiny(family)), pictures()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(images).boxes, model(images).boxes, atol=1e-5)


@every
def test_bfloat16_stays_close_to_float32(family: str) -> None:
    model = settle(tiny(family))
    with torch.inference_mode():
        exact = model(pictures())
        with torch.autocast("cpu", torch.bfloat16):
            near = model(pictures())
    assert (near.logits.float() - exact.logits).norm() <= 0.1 * exact.logits.norm()


@every
def test_recomputing_activations_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny(family).train()
        model.set_grad_checkpointing(recompute)
        Detect([str(number) for number in range(5)]).loss(model(pictures()), targets(2))["loss"].backward()
        gradients.append(model.backbone.stages[0].blocks[0].layers[0].conv.weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "swin_nano_patch2_32", "resnet20_32"])
def test_pyramids_of_all_kinds_carry_a_dense_head(backbone: str) -> None:
    model = settle(tiny("fcos", backbone=backbone))
    with torch.inference_mode():
        output = model(pictures(1, (64, 96)))
    assert isinstance(output, DenseBoxOutput)
    strides = [level.stride for level in (*model.pyramid.levels, *model.farther.levels)]
    expected = sum(-(-64 // stride) * -(-96 // stride) for stride in strides)
    assert output.logits.shape == (1, expected, 5)


def test_a_plain_vit_carries_a_dense_head_on_its_one_map() -> None:
    model = settle(tiny("fcos", backbone="deit_tiny_patch16_224", maps=1))
    with torch.inference_mode():
        assert model(pictures(1)).logits.shape == (1, 4 * 4 + 2 * 2, 5)


def test_quick_detr_trains_all_cells_groups_and_layers_and_answers_with_one_group() -> None:
    model = tiny("quick_detr").train()
    output = model(pictures())
    config = model.config
    assert len(output.auxiliary) == 1 + config.groups * config.decoder_depth - 1
    assert output.auxiliary[0][0].shape == (2, 4 * 4 + 2 * 2, 5)  # cells of strides 16 and 32
    assert output.logits.shape == (2, config.queries, 5)
    assert model.eval()(pictures()).auxiliary == ()


def test_groups_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = tiny("quick_detr", drop_rate=0.0).train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    images = pictures(1)
    with torch.no_grad():
        one = model(images)
        model.queries.weight[model.count :] += 1.0  # the second group's
        other = model(images)
    assert torch.equal(one.logits, other.logits)
    assert not torch.equal(one.auxiliary[-1][0], other.auxiliary[-1][0])


def test_a_backbone_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    small = {"width": 32, "depth": 2, "hidden": 64, "init": "timm"}
    registry.create_model("vit_tiny_patch16_224", num_classes=5, heads=4, **small).save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match=r"heads=4, and the backbone .* has heads=2.*\"depth\": 2.*\"heads\": 4"
    ):
        backbones.load_backbone(segmenter(small, 2), tmp_path)
    assert backbones.load_backbone(segmenter(small, 4), tmp_path).used


def segmenter(small: dict[str, Any], heads: int) -> Any:
    return registry.create_model(
        "setr_naive_nano",
        backbone="vit_tiny_patch16_224",
        backbone_changes={**small, "heads": heads},
        taps=(0, 1),
    )


def test_load_backbone_leaves_the_rest_alone(tmp_path: Path) -> None:
    classifier = create_model("resnet10_nano", num_classes=3)
    classifier.save_pretrained(tmp_path / "classifier")
    model = tiny("fcos")
    before = model.head.linear.weight.clone()
    receipt = backbones.load_backbone(model, tmp_path / "classifier")
    assert torch.equal(model.head.linear.weight, before)
    theirs = classifier.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.backbone.state_dict().items())
    assert len(receipt.used) == len(theirs)


@pytest.mark.parametrize("family", ["detr", "quick_detr"])
def test_attention_written_down_reads_the_same(family: str) -> None:
    model = settle(tiny(family))
    mixers = [part for part in model.modules() if hasattr(part, "weights") and hasattr(part, "mix")]
    seen: list[tuple[Any, Any, Tensor]] = []
    for mixer in mixers:
        mixer.register_forward_hook(lambda part, inputs, output: seen.append((part, inputs, output)))
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, :, 40:] = True
    with torch.inference_mode():
        model(pictures(), padding)
        for mixer, inputs, output in list(seen):
            weights = mixer.weights(*inputs)
            assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
            assert torch.allclose(mixer.mix(weights, *inputs), output, atol=1e-5)
    assert len(seen) == len(mixers) > 2
