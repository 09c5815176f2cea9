"""Segmentation as a task: the loss of published code, masks at any size, numbers equal to scikit-learn's route."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import MaskOutput
from vitrail.tasks import segment
from vitrail.tasks.segment import Segment

LABELS = ("sky", "wall", "road", "car")


def one_hot(mask: torch.Tensor) -> torch.Tensor:
    """Logits `[B, K, I, J]` whose largest is the mask's class."""
    return F.one_hot(mask.long(), len(LABELS)).movedim(-1, 1).float() * 5


def test_loss_is_cross_entropy_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 5, 7), torch.randint(0, 4, (2, 5, 7))
    targets[0, :2] = 255
    targets[1, 3] = -1
    wanted = F.cross_entropy(logits, targets.masked_fill(targets < 0, 255), ignore_index=255)
    terms = Segment(LABELS).loss(logits, targets)
    assert torch.allclose(terms["loss"], wanted) and set(terms) == {"loss", "mask"}
    valid = ((targets != 255) & (targets >= 0)).sum() / targets.numel()
    assert torch.allclose(Segment(LABELS, average="all").loss(logits, targets)["loss"], wanted * valid)


def test_auxiliary_heads_have_their_weight_and_are_brought_to_the_labels_size() -> None:
    torch.manual_seed(0)
    output = MaskOutput(torch.randn(2, 4, 8, 8), (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 2, 2)))
    targets = torch.randint(0, 4, (2, 8, 8), dtype=torch.uint8)
    small = F.interpolate(output.auxiliary[1], size=(8, 8), mode="bilinear")
    rest = sum(F.cross_entropy(head, targets.long()) for head in (output.auxiliary[0], small))
    terms = Segment(LABELS).loss(output, targets)
    assert torch.allclose(terms["auxiliary"], 0.4 * rest)
    assert torch.allclose(terms["loss"], terms["mask"] + terms["auxiliary"])


def test_weights_of_classes_are_those_of_a_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5, 7), torch.randint(0, 3, (2, 5, 7))
    targets[0, :2] = 255
    weights = [0.5, 1.0, 4.0]
    found = Segment(["a", "b", "c"], weights=weights).loss(logits, targets)["loss"]
    wanted = F.cross_entropy(logits, targets, torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(found, wanted)
    empty = Segment(["a", "b", "c"], weights=weights).loss(logits, torch.full((2, 5, 7), 255))["loss"]
    assert float(empty) == 0
    with pytest.raises(ConfigError, match="3 classes"):
        Segment(["a", "b", "c"], weights=[1.0, 1.0])


def test_a_batch_without_one_label_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = Segment(LABELS).loss(logits, torch.full((1, 3, 3), 255))["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad.abs().max() == 0


def test_unknown_values_are_named() -> None:
    targets = torch.tensor([[[0, 1], [7, 255]]])
    with pytest.raises(DataError, match=r"from 0 to 3, or 255 .* got 7"):
        Segment(LABELS).loss(torch.randn(1, 4, 2, 2), targets)
    metrics = Segment(LABELS).metrics()
    metrics.add(torch.randn(1, 4, 2, 2), targets)
    with pytest.raises(DataError, match="1 pixels of the masks are neither"):
        metrics.result()


def test_wrong_options_say_what_is_legal() -> None:
    with pytest.raises(ConfigError, match="1 to 255"):
        Segment(())
    with pytest.raises(ConfigError, match="must not be a class number"):
        Segment(LABELS, ignore=2)
    with pytest.raises(ConfigError, match="0 or more"):
        Segment(LABELS, auxiliary=-1.0)


def test_masks_come_at_the_pictures_own_size_with_shares() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 8)
    first, second = Segment(LABELS).decode(MaskOutput(logits), [(13, 9), (6, 8)], sources=["a.jpg", "b.jpg"])
    wanted = F.interpolate(logits[:1], size=(13, 9), mode="bilinear").argmax(1)[0]
    assert first.mask.dtype == torch.uint8 and torch.equal(first.mask.long(), wanted)
    assert torch.equal(second.mask.long(), logits[1].argmax(0))
    assert sum(share.share for share in first.shares) == pytest.approx(1)
    assert [share.pixels for share in first.shares] == sorted((s.pixels for s in first.shares), reverse=True)
    told = json.loads(json.dumps(first.to_dict()))
    assert (told["source"], told["height"], told["width"], told["error"]) == ("a.jpg", 13, 9, None)
    assert told["classes"][0]["label"] == first.label
    assert list(second.row(LABELS)) == ["source", *LABELS, "error"]


def test_padding_is_no_part_of_a_mask() -> None:
    logits = one_hot(torch.tensor([[[1, 1, 0], [2, 2, 0], [0, 0, 0]]]))
    (found,) = Segment(LABELS).decode(logits, [(2, 2)], regions=[(0, 0, 2, 2)])
    assert found.mask.tolist() == [[1, 1], [2, 2]]


def test_bands_give_the_numbers_of_one_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "BAND", 4 * 31 * 3)  # three rows at a time
    torch.manual_seed(0)
    logits = torch.randn(4, 11, 9, dtype=torch.float64)
    for size in ((40, 31), (5, 31), (11, 31), (11, 9)):
        joint = torch.cat([band for _, band in segment.bands(logits, size)], dim=1)
        assert torch.allclose(joint[None], F.interpolate(logits[None], size=size, mode="bilinear"))


def test_scores_the_example_of_the_fact_sheet() -> None:
    metrics = Segment(LABELS).metrics()
    metrics.add(one_hot(torch.tensor([[[0, 0, 1], [1, 1, 2]]])), torch.tensor([[[0, 1, 1], [255, 1, 0]]]))
    assert metrics.result()["miou"] == pytest.approx(1 / 3)
    assert [row["iou"] for row in metrics.classes()] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        0.0,
        None,
    ]


def test_scores_equal_scikit_learns_confusion_matrix() -> None:
    from sklearn.metrics import confusion_matrix

    torch.manual_seed(0)
    metrics = Segment(LABELS).metrics()
    truths, guesses, nats = [], [], []
    for size in ((8, 6), (9, 5), (4, 4)):
        logits, targets = torch.randn(2, 4, 6, 7), torch.randint(0, 3, (2, *size))
        targets[torch.rand(2, *size) < 0.2] = 255
        metrics.add(logits, list(targets))
        big = F.interpolate(logits, size=size, mode="bilinear")
        keep = targets != 255
        truths.append(targets[keep].numpy())
        guesses.append(big.argmax(1)[keep].numpy())
        nats.append(F.cross_entropy(big, targets, ignore_index=255, reduction="sum"))
    matrix = confusion_matrix(np.concatenate(truths), np.concatenate(guesses), labels=range(4)).astype(float)
    assert np.array_equal(metrics.confusion.numpy(), matrix)
    hits, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    result = metrics.result()
    assert result["miou"] == pytest.approx((hits / (support + predicted - hits)).mean())
    assert result["pixel_acc"] == pytest.approx(hits.sum() / matrix.sum())
    assert result["mean_acc"] == pytest.approx((hits[:3] / support[:3]).mean())  # the fourth is never a label
    assert result["loss"] == pytest.approx(float(sum(nats)) / matrix.sum(), rel=1e-5)
    assert result["images"] == 6


def test_parts_of_several_processes_add_up() -> None:
    torch.manual_seed(0)
    task = Segment(LABELS)
    whole, parts = task.metrics(), [task.metrics() for _ in range(3)]
    for part in parts:
        logits, targets = torch.randn(2, 4, 5, 5), torch.randint(0, 4, (2, 5, 5))
        whole.add(logits, targets)
        part.add(logits, targets)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].result() == pytest.approx(whole.result())
    whole.reduce(lambda counts: counts * 2)
    assert whole.result()["images"] == 12 and whole.result()["miou"] == parts[0].result()["miou"]


def test_nothing_labelled_is_no_score() -> None:
    metrics = Segment(LABELS).metrics()
    metrics.add(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), 255))
    with pytest.raises(DataError, match="not one labelled pixel"):
        metrics.result()
