"""Masks of queries: losses by hand, and how masks become one map."""

from __future__ import annotations

import pytest
import torch

from vitrail.errors import DataError
from vitrail.nn.shapes import BoxOutput
from vitrail.tasks.detect import BoxTarget, Detect
from vitrail.tasks.panoptic import mask_loss, merge

PAIR = (torch.tensor([0]), torch.tensor([0]))


def test_losses_of_a_mask_by_hand() -> None:
    logits = torch.tensor([[[[2.0, -1.0], [0.0, 3.0]]]], dtype=torch.float64)
    wanted = torch.tensor([[[True, False], [True, False]]])
    found = mask_loss(logits, [wanted], [PAIR], torch.tensor(2.0))
    focal, inside, chances = 0.0, 0.0, 0.0
    for value, truth in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        chance = 1 / (1 + 2.718281828459045 ** (-value))
        right = chance if truth else 1 - chance
        focal += (0.25 if truth else 0.75) * (1 - right) ** 2 * -float(torch.tensor(right).double().log())
        inside, chances = inside + chance * truth, chances + chance
    assert float(found["mask"]) == pytest.approx(focal / 4 / 2, rel=1e-6)
    assert float(found["dice"]) == pytest.approx((1 - (2 * inside + 1) / (chances + 2 + 1)) / 2, rel=1e-6)


def test_masks_of_other_sizes_than_the_batch_are_refused() -> None:
    masks = torch.zeros(2, 1, 2, 2)
    targets = [torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, 8, 4, dtype=torch.bool)]
    with pytest.raises(DataError, match="as large as its pictures"):
        mask_loss(masks, targets, [PAIR, PAIR], torch.tensor(1.0))


def test_a_panoptic_head_adds_two_terms_where_objects_have_masks() -> None:
    torch.manual_seed(0)
    output = BoxOutput(torch.randn(1, 3, 3), torch.rand(1, 3, 4) * 0.4 + 0.2, (), torch.randn(1, 3, 4, 4))
    target = BoxTarget(torch.full((1, 4), 0.5), torch.tensor([1]))
    task = Detect(["a", "b"])
    without = task.loss(output, [target])
    together = task.loss(output, [target._replace(masks=torch.ones(1, 8, 8, dtype=torch.bool))])
    assert "mask" not in without
    assert float(together["loss"]) == pytest.approx(
        float(without["loss"] + together["mask"] + together["dice"]), rel=1e-6
    )


def scene() -> BoxOutput:
    """Six queries on an 8 x 8 map: two things, two halves of one stuff, an unsure one, one that is no object."""
    masks = torch.full((1, 6, 8, 8), -5.0)
    masks[0, 0, :4, :4] = 5.0  # thing
    masks[0, 1, :4, 4:] = 5.0  # another of its class
    masks[0, 2, 4:, :4] = 5.0  # stuff
    masks[0, 3, 4:, 4:] = 5.0  # the same stuff
    masks[0, 4] = 9.0
    masks[0, 5] = 9.0
    logits = torch.full((1, 6, 4), -4.0)
    for query, index in enumerate((0, 0, 1, 1, 2, 3)):
        logits[0, query, index] = 4.0
    logits[0, 4] = 0.0  # sure of nothing
    return BoxOutput(logits, torch.full((1, 6, 4), 0.5), (), masks)


LABELS = ["cell", "plasma", "glass"]


def test_things_stay_apart_and_stuff_is_joined() -> None:
    (found,) = merge(scene(), [(16, 16)], LABELS, {0}, sources=["a.png"])
    assert [(segment.label, segment.thing, segment.pixels) for segment in found.segments] == [
        ("cell", True, 64),
        ("cell", True, 64),
        ("plasma", False, 128),
    ]
    assert found.map is not None and found.map.shape == (16, 16)
    assert found.map[0, 0] != found.map[0, 15] and found.map[15, 0] == found.map[15, 15]
    assert found.to_dict()["segments_info"][2]["area"] == 128


def test_tiny_segments_give_way() -> None:
    output = scene()
    assert output.masks is not None
    output.masks[0, 0] = -5.0
    output.masks[0, 0, :2, :2] = 5.0  # four pixels
    output.masks[0, 1, :4, :4] = 0.0
    (found,) = merge(output, [(8, 8)], LABELS, {0})
    assert [segment.label for segment in found.segments] == ["cell", "plasma"]
    assert found.segments[0].pixels == 32


def test_nothing_sure_gives_an_empty_map() -> None:
    output = scene()._replace(logits=torch.zeros(1, 6, 4))
    (found,) = merge(output, [(8, 8)], LABELS, {0})
    assert found.segments == () and found.map is not None and bool((found.map == -1).all())


def test_boxes_alone_are_refused() -> None:
    with pytest.raises(DataError, match="panoptic head"):
        merge(scene()._replace(masks=None), [(8, 8)], LABELS, {0})
