"""What is asked of a network that gives boxes or masks, so that the methods for classes can answer it.

A question turns the network's output into probabilities of classes for one box or one region, as a classifier
gives them for a picture:

    box       p(class) = max over the predicted boxes of their probability of the class times their overlap (IoU)
              with the box that is asked about (the similarity of D-RISE, Petsiuk et al. 2021, 2006.03204, without
              its embedding); the rest is the probability of "nothing". Which slot finds the object may change when
              part of the picture is hidden; the question stays the same.
    region    p(class) = the mean over a region's pixels of the softmax (Seg-Grad-CAM, Vinogradova et al. 2020,
              2002.11434, takes the sum of logits): by default the pixels that the network gave that class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.explain.attention import slid
from vitrail.explain.heat import Heat
from vitrail.explain.places import Placement, stretched
from vitrail.explain.still import held_still
from vitrail.models.registry import name_of
from vitrail.nn.decoder import QueryAttention
from vitrail.nn.shapes import DenseBoxOutput, Features, Grid, Level, MaskOutput
from vitrail.tasks.boxes import iou, to_corners
from vitrail.tasks.detect import Detect, DetectorOutput
from vitrail.tasks.segment import Segment

LEAST = 1e-6
"""Probabilities are not taken below this, where their logarithm would tell nothing."""


class NothingThere(ConfigError):
    """The picture has no such box, or no pixel of the class."""


class BoxQuestion(NamedTuple):
    """What is at this box?"""

    corners: Float[Tensor, " 4"]
    """x1, y1, x2, y2 in shares of the network's input."""


class RegionQuestion(NamedTuple):
    """What do these pixels show?"""

    region: Bool[Tensor, "I J"]


Question = BoxQuestion | RegionQuestion


class Asked(nn.Module):
    """A detector or segmenter as a classifier of what is asked: images to the logarithm of probabilities `[B, K]`.

    A detector's last column is "nothing there".
    """

    def __init__(self, network: nn.Module, task: Detect | Segment) -> None:
        super().__init__()
        self.network: Any = network
        self.task = task
        self.question: Question | None = None

    @property
    def name(self) -> str:
        return name_of(self.network)

    @property
    def levels(self) -> tuple[Level, ...]:
        levels: tuple[Level, ...] = self.network.levels
        return levels

    def forward(self, images: Float[Tensor, "B C I J"]) -> Float[Tensor, "B K"]:
        return self.answer(self.network(images))

    def answer(self, output: Any) -> Float[Tensor, "B K"]:
        """The logarithm of the probabilities that an output gives to the question."""
        assert self.question is not None
        if isinstance(self.question, BoxQuestion):
            found = self.similarities(output, self.question.corners).amax(dim=1)  # [B, K]
            found = found / found.sum(dim=1, keepdim=True).clamp_min(1)
            nothing = 1 - found.sum(dim=1, keepdim=True)
            return torch.cat([found, nothing], dim=1).clamp_min(LEAST).log()
        inside = self.question.region.to(output.logits.device)
        shares = output.logits.float().softmax(dim=1)[:, :, inside].mean(dim=2)  # [B, K]
        return shares.clamp_min(LEAST).log()

    def similarities(self, output: DetectorOutput, corners: Float[Tensor, " 4"]) -> Float[Tensor, "B Q K"]:
        """Of every predicted box: its probability of each class times its overlap with the box asked about."""
        assert isinstance(self.task, Detect)
        logits = output.logits.float()
        if isinstance(output, DenseBoxOutput):
            classes = (logits.sigmoid() * output.quality.float().sigmoid()[..., None]).clamp_min(LEAST).sqrt()
        else:
            classes = logits.softmax(dim=-1)[..., :-1] if self.task.softmax(output) else logits.sigmoid()
        overlap = iou(to_corners(output.boxes.float()), corners.to(output.boxes.device))[0]  # [B, Q]
        return classes * overlap[..., None]


def box_question(
    asked: Asked, output: DetectorOutput, wanted: int | None, number: int, labels: Sequence[str]
) -> tuple[int, tuple[float, float, float, float]]:
    """Ask about a detector's box, counted from the surest; its class, and its corners in shares of the input.

    Raises NothingThere where there are not so many boxes (of the wanted class).
    """
    assert isinstance(asked.task, Detect)
    _, classes, boxes = asked.task.detections(output)[0]
    kept = torch.ones_like(classes, dtype=torch.bool) if wanted is None else classes == wanted
    classes, boxes = classes[kept], boxes[kept]
    if not 0 <= number < len(classes):
        what = "boxes" if wanted is None else f"boxes of {labels[wanted]}"
        if not len(classes):
            raise NothingThere(f"There are no {what} to explain; got box {number}.")
        raise NothingThere(
            f"box must be 0 to {len(classes) - 1}: there are {len(classes)} {what}; got {number}."
        )
    corners = to_corners(boxes[number].float())
    asked.question = BoxQuestion(corners)
    x1, y1, x2, y2 = corners.tolist()
    return int(classes[number]), (x1, y1, x2, y2)


def region_question(
    asked: Asked, output: MaskOutput, wanted: int | None, labels: Sequence[str]
) -> tuple[int, Bool[Tensor, "I J"]]:
    """Ask about the pixels that a segmenter gave a class (by default the one with most pixels); its number, and they.

    Raises NothingThere where no pixel has the wanted class, with those that occur.
    """
    mask = output.logits[0].argmax(dim=0)  # [I, J]
    counts = torch.bincount(mask.flatten(), minlength=len(labels))
    number = int(counts.argmax()) if wanted is None else wanted
    if not counts[number]:
        there = ", ".join(label for label, count in zip(labels, counts.tolist(), strict=False) if count)
        raise NothingThere(f"No pixel is called {labels[number]} here; there are: {there}.")
    region = mask == number
    asked.question = RegionQuestion(region)
    return number, region


def reader_of(asked: Asked) -> QueryAttention | None:
    """The last layer in which queries look at the one map of a detector; None where there is no such layer."""
    decoder = getattr(asked.network, "decoder", None)
    layers = getattr(decoder, "layers", None)
    reader = getattr(layers[-1], "reader", None) if layers else None
    one_map = hasattr(asked.network, "projection")
    return reader if isinstance(reader, QueryAttention) and one_map else None


def query_attention(asked: Asked, images: Float[Tensor, "B C I J"], targets: Sequence[int] | Tensor) -> Heat:
    """What the query that answers the question looks at in the last layer, mean over heads (DETR, figure 6)."""
    reader = reader_of(asked)
    assert reader is not None and isinstance(asked.question, BoxQuestion)
    heard: list[Tensor] = []
    handle = reader.register_forward_hook(lambda module, given, _: heard.append(module.weights(*given)))
    try:
        with held_still(asked), torch.no_grad(), backbone_maps(asked.network.backbone) as seen:
            output = asked.network(images)
    finally:
        handle.remove()
    wanted = torch.as_tensor(targets, device=images.device)
    similar = asked.similarities(output, asked.question.corners)  # [B, Q, K]
    rows = torch.arange(len(wanted), device=images.device)
    queries = similar[rows, :, wanted].argmax(dim=1)  # [B]
    grid, placement = seen[-1]
    weights = heard[0].mean(dim=1)[rows, queries]  # [B, M]
    return Heat(
        values=weights.unflatten(1, tuple(grid)).float().cpu(),
        placement=placement,
        units="share of attention",
        where=f"last decoder layer, mean over heads, query {', '.join(str(int(query)) for query in queries)}",
        elsewhere=(1 - weights.sum(dim=1)).float().cpu(),
    )


@contextmanager
def backbone_maps(backbone: nn.Module) -> Iterator[list[tuple[Grid, Placement]]]:
    """The grid of each map that a backbone answers inside, and where its cells lie in the images, fine to coarse."""
    seen: list[tuple[Grid, Placement]] = []
    with slid(backbone) as places:

        def heard(_module: nn.Module, given: Any, output: Features) -> None:
            size = (given[0].shape[2], given[0].shape[3])
            grids = [Grid(map.shape[2], map.shape[3]) for map in output.maps]
            seen[:] = [(grid, places.get(grid, stretched(grid, size))) for grid in grids]

        handle = backbone.register_forward_hook(heard)
        try:
            yield seen
        finally:
            handle.remove()


def question_gradcam(asked: Asked, images: Float[Tensor, "B C I J"], targets: Sequence[int] | Tensor) -> Heat:
    """Grad-CAM on all of the backbone's maps, cell by cell: activation times its own gradient, summed over channels.

    A box or a region hangs on its own cells, so gradients are not averaged over the map first (HiResCAM, Draelos and
    Carin 2020, 2011.08891). The maps are brought to the finest one's cells, each from where its own cells lie, a
    cell's share spread over the finer ones, and added up; what tells against the class is cut at 0 after the sum.
    """
    leaves: list[Tensor] = []

    def heard(_module: nn.Module, _arguments: Any, output: Features) -> Features:
        leaves.extend(map.detach().requires_grad_() for map in output.maps)
        return Features(tuple(leaves), None if output.prefix is None else output.prefix.detach())

    handle = asked.network.backbone.register_forward_hook(heard)
    try:
        with held_still(asked), torch.enable_grad(), backbone_maps(asked.network.backbone) as seen:
            answer = asked(images)
            score = answer.gather(1, torch.as_tensor(targets, device=answer.device)[:, None]).sum()
            gradients = torch.autograd.grad(score, leaves, allow_unused=True)
    finally:
        handle.remove()
    grid, finest = seen[0]
    ys, xs = finest.middles(grid)
    units, total = "activation times gradient, all levels, cut at 0", torch.zeros(len(images), *grid)
    for map, gradient, (_, placement) in zip(leaves, gradients, seen, strict=True):
        if gradient is not None:
            part = (gradient * map.detach()).sum(dim=1).float().cpu()  # [B, h, w]
            finer = finest.scale_y * finest.scale_x / (placement.scale_y * placement.scale_x)
            total += finer * Heat(values=part, placement=placement, units=units).at(ys, xs)
    return Heat(values=total.clamp_min(0), placement=finest, units=units, where="after the backbone")
