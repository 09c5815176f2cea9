"""Classification: one class for a picture. Loss, decoding, and metrics that hold no predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import ClassOutput

CALIBRATION_BINS = 15
"""Bins of equal width over the confidence, as in Guo et al. 2017 (1706.04599)."""

LARGEST_CONFUSION = 2048
"""Classes above which no confusion matrix is kept (it grows with their square); every other number stays."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One class that a picture may show."""

    label: str
    index: int
    score: float
    """Softmax probability, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was found in one picture: the best classes, best first, or the reason why there are none."""

    source: str = ""
    """Name of the picture: its path, or its place in what was handed over."""
    top: tuple[Guess, ...] = ()
    error: str | None = None

    @property
    def label(self) -> str | None:
        """Name of the best class; None where there is none."""
        return self.top[0].label if self.top else None

    @property
    def index(self) -> int | None:
        """Number of the best class."""
        return self.top[0].index if self.top else None

    @property
    def score(self) -> float | None:
        """Probability of the best class, 0..1."""
        return self.top[0].score if self.top else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: source, label, index, score, predictions (label, index, score each), error."""
        return {
            "source": self.source,
            "label": self.label,
            "index": self.index,
            "score": self.score,
            "predictions": [{"label": g.label, "index": g.index, "score": g.score} for g in self.top],
            "error": self.error,
        }

    def row(self, top_k: int) -> dict[str, Any]:
        """One flat row: source, label_1, score_1 ... label_k, score_k, error; absent ones are empty."""
        row: dict[str, Any] = {"source": self.source}
        for place in range(top_k):
            guess = self.top[place] if place < len(self.top) else None
            row[f"label_{place + 1}"] = "" if guess is None else guess.label
            row[f"score_{place + 1}"] = "" if guess is None else guess.score
        row["error"] = self.error or ""
        return row


class Classify:
    """The task of naming what a picture shows.

    Args:
        labels: class names in the order of the logits.
        smoothing: label smoothing, 0..1, on class numbers only; soft targets are taken as they come.
        objective: "softmax" is cross-entropy; "sigmoid" is binary cross-entropy per class, averaged over
            images and classes, where every class in a soft target counts as present (DeiT III, 2204.07118).

    Raises:
        ConfigError: no labels, a smoothing outside 0..1, or smoothing with the sigmoid objective.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        smoothing: float = 0.0,
        objective: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        if not labels:
            raise ConfigError("A classification needs at least one class name; got none.")
        if not 0.0 <= smoothing < 1.0:
            raise ConfigError(f"Label smoothing must lie in 0..1 (1 excluded); got {smoothing}.")
        if smoothing and objective == "sigmoid":
            raise ConfigError(
                "Label smoothing would make every class present under the sigmoid objective; got"
                f" {smoothing}. Set smoothing to 0, or take the softmax objective."
            )
        self.labels = tuple(labels)
        self.smoothing = smoothing
        self.objective = objective

    def loss(self, output: Tensor | ClassOutput, targets: Tensor) -> dict[str, Tensor]:
        """The loss under "loss", in float32, averaged over the batch.

        A distilled model's pair of outputs gives the mean of both heads' losses, and each under its own name.

        Args:
            output: logits `[B, K]`, or both heads' logits.
            targets: class numbers `[B]`, or soft targets `[B, K]`.
        """
        if isinstance(output, ClassOutput):
            own, distilled = self._term(output.logits, targets), self._term(output.distilled, targets)
            return {"loss": (own + distilled) / 2, "class": own, "distilled": distilled}
        return {"loss": self._term(output, targets)}

    def _term(self, logits: Float[Tensor, "B K"], targets: Tensor) -> Float[Tensor, ""]:
        logits = logits.float()
        soft = targets.is_floating_point()
        if self.objective == "softmax":
            return F.cross_entropy(logits, targets, label_smoothing=0.0 if soft else self.smoothing)
        present = targets > 0 if soft else F.one_hot(targets, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype))

    def decode(
        self, logits: Float[Tensor, "B K"], *, top_k: int = 5, sources: Sequence[str] = ()
    ) -> list[Prediction]:
        """The `top_k` best classes of every picture, by softmax."""
        scores, indices = logits.detach().float().softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
        names = sources or [""] * len(logits)
        return [
            Prediction(
                source=name,
                top=tuple(
                    Guess(label=self.labels[index], index=index, score=score)
                    for score, index in zip(row, order, strict=True)
                ),
            )
            for name, row, order in zip(names, scores.tolist(), indices.tolist(), strict=True)
        ]

    def metrics(self) -> ClassMetrics:
        """A fresh accumulator."""
        return ClassMetrics(self.labels)


class ClassMetrics:
    """Counts from which every number follows; the size depends on the classes, never on the images.

    Everything is a sum, so that parts from several processes add up: `merge` takes another accumulator,
    `reduce` a function that sums one tensor over processes.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        classes = len(self.labels)
        self.sums = torch.zeros(4, dtype=torch.float64)  # images, cross-entropy, top-1, top-5
        self.per_class = torch.zeros(3, classes, dtype=torch.int64)  # hits, predicted, support
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)  # images, confidence, hits
        pairs = classes * classes if classes <= LARGEST_CONFUSION else 0
        self.pairs = torch.zeros(pairs, dtype=torch.int64)  # target * K + predicted

    def add(self, output: Tensor | ClassOutput, targets: Int[Tensor, " B"]) -> None:
        """Count one batch: logits `[B, K]` and true class numbers `[B]`; rows with a negative one are left out.

        Nothing is copied off the device.
        """
        logits = (output.logits if isinstance(output, ClassOutput) else output).detach().float()
        self._move(logits.device)
        targets = targets.to(logits.device)
        one = (targets >= 0).long()  # a row that only keeps processes in step weighs nothing
        targets = targets.clamp(min=0)
        log_probabilities = logits.log_softmax(dim=1)
        truth = log_probabilities.gather(1, targets[:, None]).squeeze(1)  # [B]
        best, predicted = log_probabilities.max(dim=1)
        hits = (predicted == targets) * one
        in_five = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(targets[:, None]).any(dim=1) * one
        exact = self.sums.dtype
        for number, values in enumerate((one, -truth * one, hits, in_five)):
            self.sums[number] += values.to(exact).sum()
        self.per_class[0].index_add_(0, targets, hits)
        self.per_class[1].index_add_(0, predicted, one)
        self.per_class[2].index_add_(0, targets, one)
        if len(self.pairs):
            self.pairs.index_add_(0, targets * len(self.labels) + predicted, one)
        confidence = best.exp().nan_to_num(0.0).to(exact) * one
        place = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)  # [B]
        self.bins[0].index_add_(0, place, one.to(exact))
        self.bins[1].index_add_(0, place, confidence)
        self.bins[2].index_add_(0, place, hits.to(exact))

    def merge(self, other: ClassMetrics) -> None:
        """Add the counts of another accumulator over the same classes."""
        if other.labels != self.labels:
            raise ConfigError("Counts over different classes cannot be merged.")
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            mine += theirs.to(mine)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace every count by its sum over processes; `total` is called for each tensor, in one order."""
        for counts in self._counts():
            counts.copy_(total(counts))

    def result(self) -> dict[str, float]:
        """The numbers by name, shares in 0..1; class averages leave out classes never seen nor predicted.

        acc1, acc5 (1 with five classes or fewer), loss (cross-entropy, nats), precision_macro, recall_macro,
        f1_macro, ece (expected calibration error over 15 bins of equal width), images.
        """
        images, entropy, first, five = self.sums.tolist()
        if not images:
            raise DataError("There was not one image to score; look at the data with vitrail data check.")
        precision, recall, f1, met = self._rates()
        _, confidence, hits = self.bins
        return {
            "acc1": first / images,
            "acc5": five / images,
            "loss": entropy / images,
            "precision_macro": float(precision[met].mean()),
            "recall_macro": float(recall[met].mean()),
            "f1_macro": float(f1[met].mean()),
            "ece": float((confidence - hits).abs().sum() / images),
            "images": images,
        }

    def classes(self) -> list[dict[str, Any]]:
        """One row a class: label, index, precision, recall, f1, support (images), predicted (times)."""
        precision, recall, f1, _ = (values.tolist() for values in self._rates())
        _, predicted, support = self.per_class.tolist()
        return [
            {
                "label": label,
                "index": index,
                "precision": precision[index],
                "recall": recall[index],
                "f1": f1[index],
                "support": support[index],
                "predicted": predicted[index],
            }
            for index, label in enumerate(self.labels)
        ]

    @property
    def confusion(self) -> Int[Tensor, "K K"] | None:
        """Images by true class (rows) and predicted class (columns); None above LARGEST_CONFUSION classes."""
        return self.pairs.cpu().view(len(self.labels), -1) if len(self.pairs) else None  # [K, K]

    def calibration(self) -> list[dict[str, float]]:
        """One row a bin of confidence (above, up to]: images, mean confidence, share that was right."""
        rows = []
        for number, (images, confidence, hits) in enumerate(self.bins.t().tolist()):
            rows.append(
                {
                    "above": number / CALIBRATION_BINS,
                    "up_to": (number + 1) / CALIBRATION_BINS,
                    "images": images,
                    "confidence": confidence / images if images else 0.0,
                    "accuracy": hits / images if images else 0.0,
                }
            )
        return rows

    def _rates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Precision, recall, F1 of each class (0 where undefined), and which classes occur; on the CPU."""
        hits, predicted, support = self.per_class.cpu().double()
        precision = hits / predicted.clamp(min=1)
        recall = hits / support.clamp(min=1)
        f1 = 2 * hits / (predicted + support).clamp(min=1)
        return precision, recall, f1, (predicted + support) > 0

    def _counts(self) -> tuple[Tensor, ...]:
        return self.sums, self.per_class, self.bins, self.pairs

    def _move(self, device: torch.device) -> None:
        if self.sums.device == device:
            return
        exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's chips have no float64
        self.sums, self.bins = self.sums.to(device, exact), self.bins.to(device, exact)
        self.per_class, self.pairs = self.per_class.to(device), self.pairs.to(device)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One picture that was named wrongly."""

    index: int
    """Its number in the data."""
    truth: str
    predicted: str
    score: float
    """Probability given to the wrong class."""
    pixels: UInt8[Tensor, "C h w"]
    """What the network saw."""


class Mistakes:
    """The most confident mistakes of an evaluation; hand `add` to it as `watch`."""

    def __init__(self, labels: Sequence[str], most: int = 25) -> None:
        self.labels, self.most = tuple(labels), most
        self._found: list[Mistake] = []

    def add(self, output: Tensor, batch: Any) -> None:
        """Look at one batch: logits `[B, K]`, and `.images`, `.targets`, `.indices`."""
        scores, predicted = output.detach().float().softmax(dim=1).max(dim=1)
        targets = batch.targets.to(predicted.device)
        scores = scores.masked_fill((predicted == targets) | (targets < 0), -1.0).nan_to_num(-1.0)
        best = scores.topk(min(self.most, len(scores)))
        limit = self._found[-1].score if len(self._found) == self.most else 0.0
        for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if score > limit:
                self._found.append(
                    Mistake(
                        index=int(batch.indices[place]),
                        truth=self.labels[int(targets[place])],
                        predicted=self.labels[int(predicted[place])],
                        score=score,
                        pixels=batch.images[place].cpu().clone(),
                    )
                )
        self._found = sorted(self._found, key=lambda mistake: -mistake.score)[: self.most]

    def result(self) -> list[Mistake]:
        """The mistakes, most confident first."""
        return list(self._found)
