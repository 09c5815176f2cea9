"""Detection: matching and losses against brute force and the authors' numbers, decoding, broken targets."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import BoxOutput
from vitrail.tasks.detect import BoxTarget, Detect
from vitrail.tasks.matcher import match
from vitrail.tasks.set_loss import SIGMOID, SOFTMAX


def problem(seed: int, classes: int, softmax: bool, slots: int = 5) -> tuple[BoxOutput, list[BoxTarget]]:
    """Two pictures with up to four objects, one of them perhaps empty."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(2, slots, classes + int(softmax), dtype=torch.float64)
    boxes = torch.rand(2, slots, 4, dtype=torch.float64) * 0.4 + 0.2
    targets = []
    for _ in range(2):
        count = int(torch.randint(0, 5, ()))
        wanted = torch.rand(count, 4, dtype=torch.float64) * 0.4 + 0.2
        targets.append(BoxTarget(wanted, torch.randint(0, classes, (count,))))
    return BoxOutput(logits, boxes), targets


def giou_by_hand(one: list[float], other: list[float]) -> float:
    """Of boxes (cx, cy, w, h), with plain numbers."""
    ends = [[c - s / 2, c + s / 2, d - t / 2, d + t / 2] for c, d, s, t in (one, other)]
    (a1, a2, a3, a4), (b1, b2, b3, b4) = ends
    shared = max(0.0, min(a2, b2) - max(a1, b1)) * max(0.0, min(a4, b4) - max(a3, b3))
    union = (a2 - a1) * (a4 - a3) + (b2 - b1) * (b4 - b3) - shared
    hull = (max(a2, b2) - min(a1, b1)) * (max(a4, b4) - min(a3, b3))
    return shared / union - (hull - union) / hull


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def belief(logits: list[float], label: int, softmax: bool) -> float:
    """The class part of a slot's cost for an object."""
    if softmax:
        return -math.exp(logits[label]) / sum(math.exp(value) for value in logits)
    chance = sigmoid(logits[label])
    present = 0.25 * (1 - chance) ** 2 * -math.log(chance)
    return present - 0.75 * chance**2 * -math.log(1 - chance)


def cost_by_hand(
    logits: list[float], box: list[float], label: int, wanted: list[float], softmax: bool
) -> float:
    l1 = sum(abs(a - b) for a, b in zip(box, wanted, strict=True))
    category = (1 if softmax else 2) * belief(logits, label, softmax)
    return category + 5 * l1 - 2 * giou_by_hand(box, wanted)


def cheapest(costs: list[list[float]]) -> dict[int, int]:
    """Object of each slot in the cheapest assignment, found by trying them all."""
    slots, objects = len(costs), len(costs[0]) if costs else 0
    best = min(
        itertools.permutations(range(slots), objects),
        key=lambda chosen: sum(costs[slot][place] for place, slot in enumerate(chosen)),
    )
    return {slot: place for place, slot in enumerate(best)}


def loss_by_hand(output: BoxOutput, targets: list[BoxTarget], softmax: bool) -> dict[str, float]:
    """The terms of one layer, slot by slot."""
    logits, boxes = output.logits.tolist(), output.boxes.tolist()
    classes = len(logits[0][0]) - int(softmax)
    count = max(1, sum(len(target.labels) for target in targets))
    l1 = giou = entropy = weight = focal = 0.0
    for row, target in enumerate(targets):
        wanted, labels = target.boxes.tolist(), target.labels.tolist()
        costs = [
            [
                cost_by_hand(logits[row][q], boxes[row][q], labels[t], wanted[t], softmax)
                for t in range(len(labels))
            ]
            for q in range(len(logits[row]))
        ]
        pairs = cheapest(costs) if labels else {}
        for q, scores in enumerate(logits[row]):
            label = labels[pairs[q]] if q in pairs else classes
            if q in pairs:
                l1 += sum(abs(a - b) for a, b in zip(boxes[row][q], wanted[pairs[q]], strict=True))
                giou += 1 - giou_by_hand(boxes[row][q], wanted[pairs[q]])
            if softmax:
                own = 0.1 if label == classes else 1.0
                weight += own
                entropy -= own * (scores[label] - math.log(sum(math.exp(value) for value in scores)))
            else:
                for number, value in enumerate(scores):
                    chance = sigmoid(value)
                    if number == label:
                        focal += 0.25 * (1 - chance) ** 2 * -math.log(chance)
                    else:
                        focal += 0.75 * chance**2 * -math.log(1 - chance)
    category = entropy / weight if softmax else focal / count
    factor = 1 if softmax else 2
    total = factor * category + 5 * l1 / count + 2 * giou / count
    return {"loss": total, "class": category, "l1": l1 / count, "giou": giou / count}


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", range(6))
def test_matching_and_loss_are_those_of_brute_force(seed: int, softmax: bool) -> None:
    output, targets = problem(seed, 3, softmax)
    found = Detect(["a", "b", "c"]).loss(output, targets)
    for name, value in loss_by_hand(output, targets, softmax).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("softmax", [True, False])
def test_more_objects_than_slots_leave_objects_over(softmax: bool) -> None:
    torch.manual_seed(3)
    target = BoxTarget(torch.rand(6, 4) * 0.4 + 0.2, torch.arange(6) % 3)
    logits, boxes = torch.randn(1, 2, 3 + int(softmax)), torch.rand(1, 2, 4) * 0.4 + 0.2
    ((slots, objects),) = match(logits, boxes, [target], SOFTMAX if softmax else SIGMOID, softmax=softmax)
    assert slots.tolist() == [0, 1] and len(set(objects.tolist())) == 2


def test_the_worked_example() -> None:
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 3]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.25, 0.1, 0.1], [0.7, 0.7, 0.4, 0.4]]])
    target = BoxTarget(torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4]]), torch.tensor([1, 0]))
    found = Detect(["a", "b"]).loss(BoxOutput(logits, boxes), [target])
    expected = {"class": 0.381182, "l1": 0.25, "giou": 0.625, "loss": 2.881182, "class_error": 0.0}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-6)


def test_gives_the_authors_losses(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    numbers = golden("detr_matcher_loss")

    def answer(name: str) -> tuple[Tensor, Tensor]:
        boxes = torch.from_numpy(fill.picture(2, 100, 4, name=f"{name}.boxes")).double().sigmoid().float()
        boxes[..., 2:] /= 2
        return 2 * torch.from_numpy(fill.picture(2, 100, 92, name=f"{name}.logits")).double(), boxes.double()

    pairs = [answer(f"aux{number}") for number in range(5)]
    told = zip(numbers["inputs"]["target boxes"], numbers["inputs"]["target labels"], strict=True)
    targets = [BoxTarget(torch.tensor(boxes).double(), torch.tensor(labels)) for boxes, labels in told]
    logits, boxes = (part.detach().requires_grad_() for part in answer("final"))
    task = Detect([str(number) for number in range(91)])
    found = task.loss(BoxOutput(logits, boxes, tuple(pairs)), targets)
    expected = numbers["float64"]
    assert float(found["loss"].detach()) == pytest.approx(expected["total"], rel=1e-7)
    ours = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    ours |= {"class_error": "class_error", "cardinality_error": "cardinality_error"}
    for name, theirs in ours.items():
        assert float(found[name].detach()) == pytest.approx(expected["losses"][theirs], rel=1e-6), name
    found["loss"].backward()
    for tensor, name in ((logits, "pred_logits"), (boxes, "pred_boxes")):
        assert tensor.grad is not None
        gradient = expected["gradient of the total"][name]
        assert float(tensor.grad.norm()) == pytest.approx(gradient["l2"], rel=1e-6)
    matched = match(logits.detach(), boxes.detach(), targets, SOFTMAX)
    chosen = [[slots.tolist(), objects.tolist()] for slots, objects in matched]
    assert chosen == expected["assignment (predicted slot, target) per image, last layer"]


def test_a_batch_without_objects_teaches_that_there_are_none() -> None:
    output = BoxOutput(torch.randn(2, 4, 3, requires_grad=True), torch.rand(2, 4, 4, requires_grad=True))
    empty = BoxTarget(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    found = Detect(["a", "b"]).loss(output, [empty, empty])
    assert found["l1"].item() == found["giou"].item() == 0.0 and found["class"].item() > 0
    found["loss"].backward()
    assert torch.isfinite(output.logits.grad).all() and output.logits.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_crowds_are_no_objects_of_the_loss() -> None:
    output, targets = problem(1, 3, True)
    more = [
        BoxTarget(
            torch.cat([target.boxes, torch.full((1, 4), 0.3, dtype=torch.float64)]),
            torch.cat([target.labels, torch.tensor([0])]),
            crowd=torch.tensor([False] * len(target.labels) + [True]),
        )
        for target in targets
    ]
    task = Detect(["a", "b", "c"])
    assert float(task.loss(output, more)["loss"]) == float(task.loss(output, targets)["loss"])


def test_objects_are_counted_over_processes() -> None:
    output, targets = problem(2, 3, True)
    alone = Detect(["a", "b", "c"]).loss(output, targets)
    among = Detect(["a", "b", "c"], mean=lambda count: count * 2).loss(output, targets)
    assert float(among["l1"]) == pytest.approx(float(alone["l1"]) / 2)
    assert float(among["class"]) == float(alone["class"])


def test_half_precision_is_summed_in_float32() -> None:
    output, targets = problem(4, 3, True)
    half = BoxOutput(output.logits.bfloat16(), output.boxes.bfloat16())
    found = Detect(["a", "b", "c"]).loss(half, targets)
    assert found["loss"].dtype == torch.float32
    assert float(found["loss"]) == pytest.approx(
        float(Detect(["a", "b", "c"]).loss(output, targets)["loss"]), rel=0.05
    )


def test_numbers_that_are_not_finite_give_a_loss_that_is_not() -> None:
    output, targets = problem(0, 3, True)
    output.logits[0, 0, 0] = math.nan
    assert not torch.isfinite(Detect(["a", "b", "c"]).loss(output, targets)["loss"])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_number_without_a_name_is_refused(label: int) -> None:
    output, _ = problem(0, 3, True)
    target = BoxTarget(torch.full((1, 4), 0.5, dtype=torch.float64), torch.tensor([label]))
    with pytest.raises(DataError, match="must lie in"):
        Detect(["a", "b", "c"]).loss(output, [target, target])


def test_logits_that_fit_no_labels_are_refused() -> None:
    output, targets = problem(0, 5, True)
    with pytest.raises(ConfigError, match="num_classes=3"):
        Detect(["a", "b", "c"]).loss(output, targets)


def test_decoding_leaves_out_no_object_and_tells_original_pixels() -> None:
    logits = torch.tensor([[[0.0, 3.0, 5.0], [4.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    task = Detect(["cell", "platelet"])
    (found,) = task.decode(BoxOutput(logits, boxes), [(100, 200)], sources=["a.jpg"], threshold=0.05)
    assert [box.label for box in found.boxes] == ["cell", "platelet"]
    assert found.boxes[0].corners == pytest.approx((0, 0, 100, 100))
    assert found.boxes[1].score == pytest.approx(float(logits[0, 0].softmax(0)[1]))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["source"] == "a.jpg" and told["height"] == 100 and told["width"] == 200
    assert told["detections"][1]["bbox"] == pytest.approx([80, 30, 40, 40])
    (sure,) = task.decode(BoxOutput(logits, boxes), [(100, 200)], threshold=0.5)
    assert [box.label for box in sure.boxes] == ["cell"]


def test_sigmoids_may_name_one_box_twice() -> None:
    logits = torch.tensor([[[2.0, 1.0], [-9.0, -9.0]]])
    (found,) = Detect(["a", "b"]).decode(BoxOutput(logits, torch.full((1, 2, 4), 0.5)), [(10, 10)])
    assert [(box.label, round(box.score, 3)) for box in found.boxes] == [("a", 0.881), ("b", 0.731)]


def test_post_processing_is_the_authors(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    told = golden("detr_matcher_loss")
    key = next(name for name in told if name.startswith("post-processing"))
    boxes = torch.from_numpy(fill.picture(2, 100, 4, name="final.boxes")).double().sigmoid().float()
    boxes[..., 2:] /= 2
    logits = 2 * torch.from_numpy(fill.picture(2, 100, 92, name="final.logits")).double()
    task = Detect([str(number) for number in range(91)])
    found = task.decode(BoxOutput(logits, boxes.double()), [(480, 640), (333, 500)], threshold=0.0)
    for picture, expected in zip(found, told[key]["float64"], strict=True):
        counted = sorted(box.index for box in picture.boxes)
        assert counted == sorted(expected["labels of every slot"])
        corners = torch.tensor([box.corners for box in picture.boxes], dtype=torch.float64)
        assert float(corners.norm()) == pytest.approx(expected["boxes xyxy in pixels"]["l2"], rel=1e-7)
        scores = torch.tensor([box.score for box in picture.boxes], dtype=torch.float64)
        assert float(scores.norm()) == pytest.approx(expected["scores"]["l2"], rel=1e-7)
