"""COCO's average precision: known answers, pycocotools on the same boxes, merging over processes, empty data."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import ConfigError, DataError, UnsupportedError
from vitrail.nn.shapes import BoxOutput
from vitrail.tasks.average_precision import NAMES, BoxMetrics
from vitrail.tasks.detect import BoxTarget, Detect

pytest.importorskip("faster_coco_eval")

LABELS = ["a", "b", "c"]


def pictures(count: int, seed: int = 0) -> list[tuple[BoxOutput, BoxTarget]]:
    """Noisy answers about random objects of all sizes; some crowds, some pictures without objects."""
    torch.manual_seed(seed)
    made = []
    for index in range(count):
        objects = int(torch.randint(0, 8, ()))
        boxes = torch.rand(objects, 4) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + torch.tensor(
            [0.2, 0.2, 0.02, 0.02]
        )
        labels = torch.randint(0, 3, (objects,))
        guesses = torch.cat([boxes + torch.randn(objects, 4) * 0.01, torch.rand(10, 4) * 0.3 + 0.2])
        logits = torch.randn(objects + 10, 4)
        logits[torch.arange(objects), labels] += 2
        crowd = torch.rand(objects) < 0.15
        made.append(
            (BoxOutput(logits[None], guesses[None]), BoxTarget(boxes, labels, (400, 600), crowd, None, index))
        )
    return made


def scored(made: list[tuple[BoxOutput, BoxTarget]]) -> BoxMetrics:
    metrics = Detect(LABELS).metrics()
    for output, target in made:
        metrics.add(output, [target])
    return metrics


def test_equals_pycocotools_on_the_same_boxes() -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics = scored(pictures(40))
    truth, found = metrics.coco()
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = metrics.result()
    assert result["ap_small"] > 0 and result["ap_medium"] > 0 and result["ap_large"] > 0
    for name, theirs in zip(NAMES, evaluation.stats, strict=True):
        assert result[name] == pytest.approx(float(theirs), abs=1e-12), name


def picture_of(places: list[float], scores: list[float], objects: list[float]) -> tuple[BoxOutput, BoxTarget]:
    """Boxes of one class, told by their middle's column."""

    def boxes(columns: list[float]) -> Tensor:
        return torch.tensor([[column, 0.5, 0.1, 0.1] for column in columns]).view(-1, 4)

    chances = torch.tensor(scores)
    logits = torch.log(chances / (1 - chances))
    target = BoxTarget(boxes(objects), torch.zeros(len(objects), dtype=torch.int64), (200, 200))
    return BoxOutput(logits[None, :, None], boxes(places)[None]), target


def test_known_answers() -> None:
    three = picture_of([0.2, 0.9, 0.4], [0.9, 0.8, 0.7], [0.2, 0.4, 0.6])
    late = picture_of([0.9, 0.2], [0.9, 0.8], [0.2])
    for (output, target), expected in ((three, 0.5545), (late, 0.5)):
        metrics = Detect(["a"]).metrics()
        metrics.add(output, [target])
        assert metrics.result()["ap50"] == pytest.approx(expected, abs=1e-4)


def test_classes_tell_their_own_precision() -> None:
    made = pictures(30)
    rows = scored(made).classes()
    result = scored(made).result()
    assert [row["label"] for row in rows] == LABELS
    assert sum(row["ap"] for row in rows) / 3 == pytest.approx(result["ap"])
    assert sum(row["ap50"] for row in rows) / 3 == pytest.approx(result["ap50"])
    crowds = sum(int(target.crowd.sum()) for _, target in made)  # type: ignore[union-attr]
    assert sum(row["support"] for row in rows) == sum(len(target.labels) for _, target in made) - crowds


def test_parts_merge_to_the_whole() -> None:
    made = pictures(20)
    whole, part, other = scored(made), scored(made[:7]), scored(made[7:])
    part.merge(other)
    assert same(part.result(), whole.result())
    with pytest.raises(ConfigError, match="different classes"):
        part.merge(Detect(["a"]).metrics())


def test_processes_reduce_to_the_whole_and_count_a_shared_picture_once() -> None:
    made = pictures(21)
    shares = [scored(made[:12]), scored(made[10:])]  # pictures 10 and 11 are with both
    tables: list[list[Tensor]] = [[], []]
    for number, share in enumerate(shares):  # what each hands over, told from a run with nobody else
        _copy(share).reduce(_remember(tables[number], len(made), 8))
    sums = [one + other for one, other in zip(*tables, strict=True)]
    answers = iter([torch.tensor(len(made)), torch.tensor(8), sums[2]])
    shares[0].reduce(lambda _: next(answers))
    assert same(shares[0].result(), scored(made).result())


def _copy(metrics: BoxMetrics) -> BoxMetrics:
    fresh = Detect(LABELS).metrics()
    fresh.merge(metrics)
    return fresh


def _remember(kept: list[Tensor], pictures: int, objects: int) -> Any:
    """A sum over processes that writes down what came, and says how much there is in all."""

    def total(value: Tensor) -> Tensor:
        kept.append(value)
        return {1: torch.tensor(pictures), 2: torch.tensor(objects)}.get(len(kept), value)

    return total


def same(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(
        one[name] == pytest.approx(other[name]) or (math.isnan(one[name]) and math.isnan(other[name]))
        for name in other
    )


def test_areas_of_the_annotations_decide_what_is_small() -> None:
    output, target = picture_of([0.2], [0.9], [0.2])
    metrics = Detect(["a"]).metrics()
    metrics.add(output, [target._replace(area=torch.tensor([5000.0]))])
    result = metrics.result()
    assert result["ap_medium"] == pytest.approx(1.0) and math.isnan(result["ap_small"])


def test_nothing_to_score_is_an_error_and_not_a_zero() -> None:
    metrics = Detect(["a"]).metrics()
    with pytest.raises(DataError, match="not one image"):
        metrics.result()
    output, target = picture_of([0.2], [0.9], [])
    metrics.add(output, [target])
    with pytest.raises(DataError, match="None of the 1 images has a box"):
        metrics.result()
    with pytest.raises(DataError, match="every picture's size"):
        metrics.add(output, [target._replace(size=(0, 0))])


def test_a_network_that_finds_nothing_has_precision_zero() -> None:
    _, target = picture_of([], [], [0.2])
    metrics = Detect(["a"]).metrics()
    metrics.add(BoxOutput(torch.zeros(1, 0, 1), torch.zeros(1, 0, 4)), [target])
    assert metrics.result()["ap"] == 0.0


def test_a_missing_package_is_named_before_pictures_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        Detect(LABELS).metrics()
