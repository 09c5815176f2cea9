"""The classification task against independent definitions: scikit-learn's, torch's, and hand-made cases."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import ClassOutput
from vitrail.tasks.classify import LARGEST_CONFUSION, Classify, ClassMetrics, Mistakes, Prediction


def labels(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def scored(classes: int, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), targets] += 1.0
    return logits, targets


def counted(logits: Tensor, targets: Tensor, batch: int = 7) -> ClassMetrics:
    metrics = Classify(labels(logits.shape[1])).metrics()
    for start in range(0, len(targets), batch):
        metrics.add(logits[start : start + batch], targets[start : start + batch])
    return metrics


def expected_calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Straight from the definition, one image at a time: 15 bins (a, b]."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(15)]
    for row, target in zip(logits.double().softmax(dim=1).tolist(), targets.tolist(), strict=True):
        confidence = max(row)
        bins[max(0, math.ceil(confidence * 15) - 1)].append(
            (confidence, float(row.index(confidence) == target))
        )
    return sum(
        abs(sum(confidence for confidence, _ in found) - sum(hit for _, hit in found)) for found in bins
    ) / len(targets)


def test_numbers_equal_scikit_learns_whatever_the_batches() -> None:
    logits, targets = scored(6, 203)
    result = counted(logits, targets).result()
    predicted = logits.argmax(dim=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets, predicted, average="macro", zero_division=0
    )
    assert result["acc1"] == pytest.approx((predicted == targets).double().mean().item())
    assert result["precision_macro"] == pytest.approx(precision)
    assert result["recall_macro"] == pytest.approx(recall)
    assert result["f1_macro"] == pytest.approx(f1)
    assert result["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6
    )
    assert result["ece"] == pytest.approx(expected_calibration_error(logits, targets), abs=1e-6)
    in_five = (logits.argsort(dim=1, descending=True)[:, :5] == targets[:, None]).any(dim=1)
    assert result["acc5"] == pytest.approx(in_five.double().mean().item())
    assert result["images"] == 203


def test_class_rows_and_confusion_agree_with_scikit_learn() -> None:
    logits, targets = scored(5, 90, seed=3)
    targets[targets == 4] = 0  # a class without an image
    metrics = counted(logits, targets)
    predicted = logits.argmax(dim=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predicted, labels=range(5), zero_division=0
    )
    for index, row in enumerate(metrics.classes()):
        assert row["precision"] == pytest.approx(precision[index])
        assert row["recall"] == pytest.approx(recall[index])
        assert row["f1"] == pytest.approx(f1[index])
        assert row["support"] == support[index]
    confusion = metrics.confusion
    assert confusion is not None
    for truth, said in zip(targets.tolist(), predicted.tolist(), strict=True):
        confusion[truth, said] -= 1
    assert not confusion.any()


def test_counts_merge_and_reduce_to_the_whole() -> None:
    logits, targets = scored(4, 60)
    whole, left, right = (
        counted(logits, targets),
        counted(logits[:20], targets[:20]),
        counted(logits[20:], targets[20:]),
    )
    left.merge(right)
    assert left.result() == pytest.approx(whole.result())
    twice = counted(logits, targets)
    twice.reduce(lambda counts: counts * 2)
    assert twice.result()["images"] == 120
    assert twice.result()["acc1"] == whole.result()["acc1"]
    with pytest.raises(ConfigError, match="different classes"):
        left.merge(ClassMetrics(labels(5)))


def test_rows_that_only_keep_processes_in_step_weigh_nothing() -> None:
    logits, targets = scored(4, 30)
    filled = torch.cat([logits, torch.randn(3, 4)]), torch.cat([targets, torch.full((3,), -1)])
    assert counted(*filled).result() == pytest.approx(counted(logits, targets).result())


def test_many_classes_need_no_square_of_memory() -> None:
    metrics = Classify(labels(LARGEST_CONFUSION + 1)).metrics()
    metrics.add(torch.randn(4, LARGEST_CONFUSION + 1), torch.arange(4))
    assert metrics.confusion is None
    assert metrics.result()["images"] == 4
    assert max(counts.numel() for counts in metrics._counts()) <= 3 * (LARGEST_CONFUSION + 1)


def test_logits_that_are_not_numbers_do_not_stop_the_counting() -> None:
    metrics = Classify(labels(3)).metrics()
    metrics.add(torch.tensor([[float("nan")] * 3, [9.0, 0.0, 0.0]]), torch.tensor([1, 0]))
    result = metrics.result()
    assert math.isnan(result["loss"]) and result["acc1"] == 0.5


def test_no_image_is_an_error() -> None:
    with pytest.raises(DataError, match="not one image"):
        Classify(labels(2)).metrics().result()


def test_smoothing_acts_on_class_numbers_and_soft_targets_are_taken_as_they_come() -> None:
    logits, targets = scored(5, 8)
    task = Classify(labels(5), smoothing=0.2)
    soft = torch.full((8, 5), 0.2 / 5).scatter_add_(1, targets[:, None], torch.full((8, 1), 0.8))
    assert torch.allclose(task.loss(logits, targets)["loss"], task.loss(logits, soft)["loss"])
    assert not torch.allclose(
        task.loss(logits, targets)["loss"], Classify(labels(5)).loss(logits, targets)["loss"]
    )


def test_sigmoid_objective_counts_both_mixed_classes_as_present() -> None:
    logits = torch.randn(1, 3)
    mixed = torch.tensor([[0.7, 0.3, 0.0]])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1.0, 0.0]]))
    task = Classify(labels(3), objective="sigmoid")
    assert torch.allclose(task.loss(logits, mixed)["loss"], wanted)
    assert torch.allclose(
        task.loss(logits, torch.tensor([1]))["loss"], task.loss(logits, torch.eye(3)[1:2])["loss"]
    )


def test_both_heads_of_a_distilled_model_learn() -> None:
    logits, targets = scored(4, 6)
    other = torch.randn(6, 4)
    terms = Classify(labels(4)).loss(ClassOutput(logits, other), targets)
    assert torch.allclose(terms["loss"], (terms["class"] + terms["distilled"]) / 2)
    assert torch.allclose(terms["distilled"], torch.nn.functional.cross_entropy(other, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = scored(4, 6)
    loss = Classify(labels(4)).loss(logits.to(dtype), targets)["loss"]
    assert loss.dtype == torch.float32


def test_illegal_settings_say_what_is_legal() -> None:
    with pytest.raises(ConfigError, match="at least one class"):
        Classify([])
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        Classify(labels(2), smoothing=1.0)
    with pytest.raises(ConfigError, match="smoothing to 0"):
        Classify(labels(2), smoothing=0.1, objective="sigmoid")


def test_predictions_are_best_first_and_json_ready() -> None:
    task = Classify(["cat", "dog", "eel"])
    record = task.decode(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2, sources=["a.jpg"])[0]
    assert [guess.label for guess in record.top] == ["dog", "eel"]
    assert (record.label, record.index) == ("dog", 1)
    assert record.score == pytest.approx(torch.tensor([0.0, 2.0, 1.0]).softmax(dim=0)[1].item())
    view = json.loads(json.dumps(record.to_dict()))
    assert view["source"] == "a.jpg" and view["error"] is None and len(view["predictions"]) == 2
    assert len(task.decode(torch.zeros(1, 3), top_k=9)[0].top) == 3


def test_rows_have_the_same_columns_with_and_without_an_error() -> None:
    good = Classify(["cat", "dog"]).decode(torch.zeros(1, 2), sources=["a"])[0].row(2)
    bad = Prediction(source="b", error="damaged").row(2)
    assert list(good) == list(bad) == ["source", "label_1", "score_1", "label_2", "score_2", "error"]
    assert bad["error"] == "damaged" and bad["label_1"] == ""


class Batch:
    def __init__(self, targets: Tensor, indices: Tensor) -> None:
        self.targets, self.indices = targets, indices
        self.images = indices.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def test_mistakes_are_the_most_confident_ones_of_all_batches() -> None:
    logits, targets = scored(4, 100)
    order = list(range(100))
    random.Random(0).shuffle(order)
    mistakes = Mistakes(labels(4), most=5)
    for start in range(0, 100, 9):
        indices = torch.tensor(order[start : start + 9])
        mistakes.add(logits[indices], Batch(targets[indices], indices))
    scores, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = [index for index in range(100) if predicted[index] != targets[index]]
    wanted = sorted(wrong, key=lambda index: -scores[index].item())[:5]
    found = mistakes.result()
    assert [mistake.index for mistake in found] == wanted
    assert all(int(mistake.pixels[0, 0, 0]) == mistake.index for mistake in found)
    assert all(mistake.truth == f"class {targets[mistake.index]}" for mistake in found)
