"""Semantic segmentation: one class for every pixel. Loss, decoding to index masks, and metrics that hold no masks.

A mask is made of class numbers; the value `ignore` marks pixels that nobody labelled. They enter neither the loss
nor any number. Scores are computed at the size of the labels: logits are brought there, labels never move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import MaskOutput

IGNORE = 255
"""The value of pixels without a label, in most published masks."""

BAND = 2**24
"""Logits that exist at once while a picture is brought to its size: 64 MB in float32."""

Region = tuple[int, int, int, int]
"""First row, first column, rows, columns of the output that a picture fills; the rest is padding."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of a picture one class covers."""

    label: str
    index: int
    pixels: int
    share: float
    """0..1, of all pixels of the picture."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """What was found in one picture: a class for every pixel, or the reason why there is none."""

    source: str = ""
    """Name of the picture: its path, or its place in what was handed over."""
    mask: UInt8[Tensor, "I J"] | None = None
    """Class numbers at the picture's own size, on the CPU."""
    shares: tuple[Share, ...] = ()
    """The classes that occur, the largest first."""
    mask_file: str | None = None
    """The index PNG in which the mask was written, where one was."""
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The class that covers most of the picture."""
        return self.shares[0].label if self.shares else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: source, height, width, classes (label, index, pixels, share each), mask_file where the mask
        was written, error. No mask itself: that is what an index PNG is for."""
        rows, columns = (None, None) if self.mask is None else tuple(self.mask.shape)
        return {
            "source": self.source,
            "height": rows,
            "width": columns,
            "classes": [
                {"label": s.label, "index": s.index, "pixels": s.pixels, "share": s.share}
                for s in self.shares
            ],
            **({} if self.mask_file is None else {"mask_file": self.mask_file}),
            "error": self.error,
        }

    def row(self, labels: Sequence[str]) -> dict[str, Any]:
        """One flat row: source, each class's share under its name, error."""
        found = {share.label: share.share for share in self.shares}
        shares = {label: "" if self.mask is None else found.get(label, 0.0) for label in labels}
        return {"source": self.source, **shares, "error": self.error or ""}


class Segment:
    """The task of naming what every pixel shows.

    Args:
        labels: class names in the order of the logits; at most 255, so that a mask is a picture of bytes.
        ignore: the value of pixels that count nowhere; negative values never count either.
        auxiliary: weight of each auxiliary head's loss (SETR: 0.4), the last head's is 1.
        weights: what a pixel of each class counts in the loss `[K]`; left out, all count alike. The loss is divided
            by the summed weights of the pixels, so that only their ratios matter.
        average: "valid" divides by the pixels that have a label; "all" by all pixels, as mmsegmentation does,
            which makes steps smaller where much is ignored.

    Raises:
        ConfigError: no labels or too many, a negative weight, another number of weights than classes, or an ignored
            value that is a class.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        ignore: int = IGNORE,
        auxiliary: float = 0.4,
        weights: Sequence[float] | None = None,
        average: Literal["valid", "all"] = "valid",
    ) -> None:
        if not 1 <= len(labels) <= 255:
            raise ConfigError(f"A segmentation needs 1 to 255 class names; got {len(labels)}.")
        if 0 <= ignore < len(labels):
            raise ConfigError(
                f"The ignored value must not be a class number (0 to {len(labels) - 1}); got {ignore}. Take {IGNORE}."
            )
        if auxiliary < 0:
            raise ConfigError(f"The weight of auxiliary heads must be 0 or more; got {auxiliary}.")
        if weights is not None and (len(weights) != len(labels) or min(weights) < 0):
            raise ConfigError(
                f"weights takes a number of at least 0 for each of the {len(labels)} classes; got {list(weights)}."
            )
        self.labels = tuple(labels)
        self.ignore, self.auxiliary, self.average = ignore, auxiliary, average
        self.weights = None if weights is None else torch.tensor(list(weights), dtype=torch.float32)

    def loss(self, output: Tensor | MaskOutput, targets: Int[Tensor, "B I J"]) -> dict[str, Tensor]:
        """Cross-entropy over pixels in float32: "loss" is the total, "mask" the last head's, "auxiliary" the
        weighted sum of the others', where there are any.

        Logits of another size are resized bilinearly to the targets'. A batch in which every pixel is ignored has
        a loss of 0, and zero gradients.

        Raises:
            DataError: a target is neither a class nor ignored (found on the CPU only: it would stall a GPU).
        """
        logits, others = (output.logits, output.auxiliary) if isinstance(output, MaskOutput) else (output, ())
        targets = targets.long()
        unlabelled = (targets == self.ignore) | (targets < 0)
        if targets.device.type == "cpu" and bool(((targets >= len(self.labels)) & ~unlabelled).any()):
            found = sorted(set(targets[~unlabelled].unique().tolist()) - set(range(len(self.labels))))
            raise DataError(_unknown(found, len(self.labels), self.ignore))
        targets = targets.masked_fill(unlabelled, IGNORE)
        count: Tensor | int = targets.numel()
        if self.average == "valid":
            count = (~unlabelled).sum().clamp(min=1)
            if self.weights is not None:
                each = self.weights.to(logits.device)[targets.masked_fill(unlabelled, 0)]
                count = (each * ~unlabelled).sum().clamp(min=1e-6)
        main = self._term(logits, targets) / count
        if not others:
            return {"loss": main, "mask": main}
        rest = torch.stack([self._term(head, targets) for head in others]).sum() * self.auxiliary / count
        return {"loss": main + rest, "mask": main, "auxiliary": rest}

    def _term(self, logits: Float[Tensor, "B K _ _"], targets: Int[Tensor, "B I J"]) -> Float[Tensor, ""]:
        """Cross-entropy summed over pixels."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[2:] != targets.shape[1:]:
            logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
        weight = None if self.weights is None else self.weights.to(logits)
        return F.cross_entropy(logits, targets, weight, ignore_index=IGNORE, reduction="sum")

    def decode(
        self,
        output: Tensor | MaskOutput,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        sources: Sequence[str] = (),
        regions: Sequence[Region] = (),
    ) -> list[Segmentation]:
        """The most likely class of every pixel.

        Args:
            output: logits `[B, K, I, J]`, or a segmenter's output.
            sizes: rows and columns of each original picture; left out, masks have the logits' size.
            sources: the pictures' names.
            regions: what part of the logits each picture fills, where it was padded; left out, all of it.
        """
        logits = (output.logits if isinstance(output, MaskOutput) else output).detach()
        batch = len(logits)
        names = sources or [""] * batch
        parts = regions or [(0, 0, *logits.shape[2:])] * batch
        found = []
        for place in range(batch):
            row, column, rows, columns = parts[place]
            part = logits[place, :, row : row + rows, column : column + columns]
            mask = class_map(part, sizes[place] if sizes else (rows, columns)).cpu()
            found.append(Segmentation(source=names[place], mask=mask, shares=self.shares(mask)))
        return found

    def shares(self, mask: UInt8[Tensor, "I J"]) -> tuple[Share, ...]:
        """The classes that occur in a mask, the largest first; ignored pixels count as part of the whole."""
        counts = torch.bincount(mask.flatten().long(), minlength=len(self.labels))[: len(self.labels)]
        order = sorted(range(len(self.labels)), key=lambda index: -int(counts[index]))
        return tuple(
            Share(
                label=self.labels[index],
                index=index,
                pixels=int(counts[index]),
                share=int(counts[index]) / mask.numel(),
            )
            for index in order
            if counts[index]
        )

    def metrics(self) -> MaskMetrics:
        """A fresh accumulator."""
        return MaskMetrics(self.labels, self.ignore)


class MaskMetrics:
    """A confusion matrix over pixels, from which every number follows; nothing grows with the pictures.

    Everything is a sum: `merge` takes another accumulator, `reduce` a function that sums a tensor over processes.
    """

    def __init__(self, labels: Sequence[str], ignore: int = IGNORE) -> None:
        self.labels, self.ignore = tuple(labels), ignore
        self.pairs = torch.zeros(len(self.labels) ** 2, dtype=torch.int64)  # target * K + predicted
        self.counts = torch.zeros(2, dtype=torch.int64)  # pictures, pixels of unknown value
        self.entropy = torch.zeros(1, dtype=torch.float64)  # summed over labelled pixels

    def add(self, output: Tensor | MaskOutput, targets: Tensor | Sequence[Tensor]) -> None:
        """Count one batch: logits `[B, K, I, J]`, and masks `[B, I, J]` or a sequence of masks of any sizes.

        Logits are brought to each mask's size, band by band. A mask without one labelled pixel counts nowhere.
        Nothing is copied off the device.
        """
        logits = (output.logits if isinstance(output, MaskOutput) else output).detach()
        self._move(logits.device)
        for own, mask in zip(logits, targets, strict=True):
            mask = mask.to(logits.device)
            labelled = torch.zeros((), dtype=torch.int64, device=logits.device)
            for rows, band in bands(own, (mask.shape[0], mask.shape[1])):
                labelled += self._count(band, mask[rows].long())
            self.counts[0] += (labelled > 0).long()

    def _count(self, band: Float[Tensor, "K I J"], truth: Int[Tensor, "I J"]) -> Int[Tensor, ""]:
        """Count one picture's rows; answers how many of their pixels have a label."""
        classes = len(self.labels)
        known = (truth >= 0) & (truth < classes) & (truth != self.ignore)
        self.counts[1] += ((truth >= classes) & (truth != self.ignore)).sum()
        weight, truth = known.long(), truth.masked_fill(~known, 0)
        log_probabilities = band.float().log_softmax(dim=0)
        predicted = band.argmax(dim=0)
        self.pairs.index_add_(0, (truth * classes + predicted).flatten(), weight.flatten())
        missed = log_probabilities.gather(0, truth[None])[0].masked_fill(~known, 0.0)
        self.entropy -= missed.to(self.entropy.dtype).sum()
        return weight.sum()

    def merge(self, other: MaskMetrics) -> None:
        """Add the counts of another accumulator over the same classes."""
        if other.labels != self.labels:
            raise ConfigError("Counts over different classes cannot be merged.")
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs.to(mine)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace every count by its sum over processes; `total` is called for each tensor, in one order."""
        for counts in self._sums():
            counts.copy_(total(counts))

    def result(self) -> dict[str, float]:
        """The numbers by name, shares in 0..1, over all pixels that have a label.

        miou (mean over classes that occur in labels or predictions), pixel_acc, mean_acc (mean over classes that
        occur in labels), loss (cross-entropy, nats), images.

        Raises:
            DataError: nothing was labelled, or labels held values that are neither a class nor ignored.
        """
        images, unknown = self.counts.tolist()
        if unknown:
            raise DataError(
                f"{unknown} pixels of the masks are neither a class (0 to {len(self.labels) - 1}) nor ignored"
                f" ({self.ignore}); look at the data with vitrail data check."
            )
        if not images:
            raise DataError(
                "There was not one labelled pixel to score; look at the data with vitrail data check."
            )
        hits, support, _, iou = self._rates()
        there = support > 0
        return {
            "miou": float(iou[~iou.isnan()].mean()),
            "pixel_acc": float(hits.sum() / support.sum()),
            "mean_acc": float((hits[there] / support[there]).mean()),
            "loss": float(self.entropy.cpu()[0] / support.sum()),
            "images": float(images),
        }

    def classes(self) -> list[dict[str, Any]]:
        """One row a class: label, index, iou and accuracy (None where undefined), support and predicted (pixels)."""
        hits, support, predicted, iou = (values.tolist() for values in self._rates())
        return [
            {
                "label": label,
                "index": index,
                "iou": iou[index] if support[index] + predicted[index] else None,
                "accuracy": hits[index] / support[index] if support[index] else None,
                "support": int(support[index]),
                "predicted": int(predicted[index]),
            }
            for index, label in enumerate(self.labels)
        ]

    @property
    def confusion(self) -> Int[Tensor, "K K"]:
        """Pixels by true class (rows) and predicted class (columns)."""
        return self.pairs.cpu().view(len(self.labels), -1)  # [K, K]

    def _rates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hits, labelled and predicted pixels, and intersection over union (nan where 0 / 0); on the CPU."""
        matrix = self.confusion.double()
        hits, support, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
        return hits, support, predicted, hits / (support + predicted - hits)

    def _sums(self) -> tuple[Tensor, ...]:
        return self.pairs, self.counts, self.entropy

    def _move(self, device: torch.device) -> None:
        if self.pairs.device == device:
            return
        exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's chips have no float64
        self.pairs, self.counts = self.pairs.to(device), self.counts.to(device)
        self.entropy = self.entropy.to(device, exact)


def class_map(logits: Float[Tensor, "K h w"], size: tuple[int, int]) -> UInt8[Tensor, "I J"]:
    """The most likely class of every pixel of a picture of another size, the logits resized bilinearly."""
    return torch.cat([band.argmax(dim=0).to(torch.uint8) for _, band in bands(logits, size)])


def bands(logits: Float[Tensor, "K h w"], size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Logits `[K, h, w]` at another size, some rows at a time: which rows, and `[K, rows, J]`.

    The same numbers as resizing all of it bilinearly (without aligned corners), in bounded memory: 150 classes of
    a picture of 12 megapixels are 7 GB.
    """
    classes, height, width = logits.shape
    rows, columns = size
    step = max(1, BAND // (classes * columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        if (rows, columns) == (height, width):
            yield slice(first, last), logits[:, first:last]
            continue
        places = (
            torch.arange(first, last, dtype=torch.float64).add(0.5).mul(height / rows).sub(0.5).clamp(min=0)
        )
        above = places.long().clamp(max=height - 1)
        share = (places - above).to(logits)[:, None]
        below = (above + 1).clamp(max=height - 1).to(logits.device)
        above = above.to(logits.device)
        mixed = logits[:, above] * (1 - share) + logits[:, below] * share  # [K, rows, w]
        wide = F.interpolate(mixed[None], size=(last - first, columns), mode="bilinear", align_corners=False)
        yield slice(first, last), wide[0]


def _unknown(found: Sequence[int], classes: int, ignore: int) -> str:
    told = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
    return (
        f"Masks must hold class numbers from 0 to {classes - 1}, or {ignore} for pixels that are ignored; got {told}."
        " Look at the data with vitrail data check."
    )
