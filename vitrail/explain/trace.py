"""The story of one image: every step from pixels to a prediction, with shapes and the values worth seeing.

What a step is follows from the network's stages (`nn.trunk`, `nn.resnet`), entries and blocks, never from a
family's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitrail.data.transforms import normalise
from vitrail.errors import UnsupportedError
from vitrail.explain.attention import slid
from vitrail.explain.capture import (
    BlockRecord,
    EntryRecord,
    Gaze,
    Recording,
    capture,
    evaluation,
    gaze,
    listen,
    stages_of,
    strength,
)
from vitrail.explain.places import Placement, Reach, joined, reaches, stretched
from vitrail.explain.residual import block_words, capture_maps, is_residual, stem_words
from vitrail.models.registry import name_of
from vitrail.nn.entry import Patchify, PrefixTokens
from vitrail.nn.position import LearnedPosition, SinCosPosition
from vitrail.nn.resnet import ResidualBlock, Stem
from vitrail.nn.shapes import Grid
from vitrail.tasks.classify import Classify, Prediction
from vitrail.weights.card import Preprocessing

MOST_REFERENCES = 196
"""Places whose positional similarity is kept; larger grids are thinned evenly."""

TOKEN_WORDS = {
    "cls": ("[CLS]",),
    "dist": ("[DIST]",),
    "distillation": ("[DIST]",),
    "tokens": ("[CLS]", "[DIST]"),
    "registers": ("[REG]",),
}
"""How prefix tokens are called in the story, the last word for all further ones; others go by their name."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the story."""

    name: str
    shape: tuple[int, ...]
    note: str = ""

    @property
    def size(self) -> str:
        """The shape in words: `14 × 14`, `197 × 512`."""
        return " × ".join(str(side) for side in self.shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"step": self.name, "shape": list(self.shape), "note": self.note}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block after it has run."""

    name: str
    grid: Grid
    placement: Placement
    """Where the grid's cells lie in the image."""
    tokens: Float[Tensor, "N D"]
    component: Float[Tensor, "h w"]
    """The direction in which the patch tokens differ most, per cell (first principal component)."""
    gaze: Gaze | None


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """What is worth seeing of one stage."""

    name: str
    grid: Grid
    prefix: tuple[str, ...]
    """Names of the tokens that stand before the patches."""
    embeddings: Float[Tensor, "n D"]
    """The patches' tokens when they have just been made, before positions."""
    similarity: Float[Tensor, "R h w"] | None
    """Cosine of some places' positions to every place's, -1..1; None where no positions are added."""
    references: tuple[tuple[int, int], ...]
    """Row and column of those places."""
    layers: tuple[Layer, ...]

    @property
    def least_similarity(self) -> float:
        """Where the colour scale of `similarity` begins; it ends at 1.

        Learned positions fill -1 to 1, sines and cosines only its top: on a fixed scale they are one flat colour.
        """
        return -1.0 if self.similarity is None else min(float(self.similarity.min()), 0.99)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One image on its way through a network."""

    model: str
    source: str
    original: tuple[int, int]
    """Rows and columns of the picture as it was read."""
    pixels: UInt8[Tensor, "C h w"]
    """What the network saw, before normalising."""
    windows: tuple[Reach, Reach]
    """Which rows and columns of pixels each cell of the first grid is made of."""
    placement: Placement
    """Where the first grid's cells lie in the image."""
    steps: tuple[Step, ...]
    stages: tuple[StageTrace, ...]
    prediction: Prediction
    note: str = ""
    """What must be said aloud, such as random weights."""
    convolutional: bool = False
    """Whether cells of maps are followed, where other networks have tokens of patches."""

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of pixels that one cell of the first grid is made of."""
        return self.windows[0].kernel, self.windows[1].kernel

    @property
    def placed(self) -> StageTrace | None:
        """The first stage that adds positions; None where none does."""
        return next((stage for stage in self.stages if stage.similarity is not None), None)

    @property
    def overlapping(self) -> bool:
        """Whether the first tokens' windows share pixels: convolutional stems, overlapping patches."""
        return any(window.overlaps for window in self.windows)

    def window(self, row: int, column: int) -> tuple[slice, slice]:
        """The rows and columns of pixels in one cell's window, as far as they lie in the image."""
        rows, columns = (
            slice(max(0, (first := reach.first(number))), min(size, first + reach.kernel))
            for reach, number, size in zip(self.windows, (row, column), self.pixels.shape[1:], strict=True)
        )
        return rows, columns

    def to_dict(self) -> dict[str, Any]:
        """The story without its pictures, JSON-ready."""
        return {
            "model": self.model,
            "note": self.note,
            "precision": "fp32",
            "steps": [step.to_dict() for step in self.steps],
            **self.prediction.to_dict(),
        }


def trace(
    network: nn.Module,
    pixels: UInt8[Tensor, "C h w"],
    preprocessing: Preprocessing,
    task: Classify,
    *,
    source: str = "image",
    original: tuple[int, int] | None = None,
    top_k: int = 5,
    note: str = "",
) -> Trace:
    """Follow one preprocessed image through a classifier; the network is left as it came.

    Args:
        network: a classifier whose trunk is made of stages with blocks, on any device.
        pixels: the image as `data.transforms.Preprocess` made it.
        preprocessing: how it is normalised (the card's).
        task: names the classes.
        source: name of the picture.
        original: rows and columns before preprocessing.
        top_k: classes in the prediction.
        note: what must be said of the model, such as that its weights are random.

    Raises:
        UnsupportedError: the network has no stages to tell a story of.
    """
    head: Any = getattr(network, "head", None)
    residual = is_residual(network)
    if not (residual or stages_of(network)) or not hasattr(head, "pool"):
        raise UnsupportedError(f"{name_of(network)} is not made of stages with blocks: it cannot be traced.")
    pooled: list[Tensor] = []

    def heard(_name: str, module: Any, arguments: tuple[Any, ...], _output: Any) -> None:
        pooled.append(module.pool(*arguments))

    device = next(network.parameters()).device
    capturing = capture_maps if residual else capture
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    with (
        torch.no_grad(),
        evaluation(network),
        capturing(network) as recording,
        slid(network) as places,
        listen({"head": head}, heard),
    ):
        logits: Tensor = network(normalise(pixels[None].to(device), preprocessing))
    original = size if original is None else original
    prediction = task.decode(logits, top_k=top_k, sources=[source])[0]
    steps = [
        Step(name="picture", shape=(*original, 3), note=f"{source}, rows × columns × channels"),
        Step(name="image", shape=(*size, int(pixels.shape[0])), note=_fitted(preprocessing)),
        Step(name="normalised", shape=(int(pixels.shape[0]), *size), note=_normalised(preprocessing)),
        *_body_steps(recording),
        *_end_steps(head, pooled[0], recording, logits, prediction),
    ]
    stages = tuple(_stage(recording, number, size, places) for number in range(recording.stages))
    grid = stages[0].grid if stages else Grid(1, 1)
    return Trace(
        model=name_of(network),
        source=source,
        original=original,
        pixels=pixels.cpu(),
        windows=_windows(recording, size, grid),
        placement=places.get(grid, stretched(grid, size)),
        steps=tuple(steps),
        stages=stages,
        prediction=prediction,
        note=note,
        convolutional=residual,
    )


def _windows(recording: Recording, size: tuple[int, int], grid: Grid) -> tuple[Reach, Reach]:
    """The windows of the first stage's cells; where its entries do not say, the image shared out over the grid."""
    found: list[tuple[Reach, Reach]] = []
    for entry in recording.entries:
        if entry.stage == 0:
            found += reaches(entry.module, (int(entry.map_before.shape[2]), int(entry.map_before.shape[3])))
    rows, columns = ([pair[axis] for pair in found] for axis in (0, 1))
    if found and (rows[-1].after, columns[-1].after) == tuple(grid):
        return joined(rows), joined(columns)
    even = [-(-pixels // cells) for pixels, cells in zip(size, grid, strict=True)]
    return Reach(even[0], even[0], 0, grid.rows), Reach(even[1], even[1], 0, grid.columns)


def _fitted(preprocessing: Preprocessing) -> str:
    kept = {"center": "middle cropped", "squash": "squashed", "border": "padded"}[preprocessing.crop_mode]
    return f"resized ({preprocessing.interpolation}), {kept}"


def _normalised(preprocessing: Preprocessing) -> str:
    mean, std = (
        f"{values[0]:.3g}" if len(set(values)) == 1 else f"({', '.join(f'{value:.3g}' for value in values)})"
        for values in (preprocessing.mean, preprocessing.std)
    )
    return f"(pixel / 255 - {mean}) / {std}"


def _body_steps(recording: Recording) -> list[Step]:
    """Entries and blocks in the order in which they ran."""
    several = recording.stages > 1
    steps = []
    for number in range(recording.stages):
        where = f"stage {number + 1}: " if several else ""
        for entry in recording.entries:
            if entry.stage == number:
                steps += _entry_steps(entry, where)
        steps += [_block_step(block, where) for block in recording.blocks if block.stage == number]
    return steps


def _entry_steps(record: EntryRecord, where: str) -> list[Step]:
    grid, width = record.grid, int(record.map.shape[1])
    count = grid.size + (0 if record.prefix is None else int(record.prefix.shape[1]))
    if isinstance(record.module, Patchify):
        rows, columns = record.module.patch
        channels = int(record.map_before.shape[1])
        flat = rows * columns * channels
        cells = "pixels" if where in ("", "stage 1: ") and record.map_before.shape[1] <= 4 else "cells"
        return [
            Step(
                name=f"{where}grid",
                shape=tuple(grid),
                note=f"{grid.size} patches of {rows} × {columns} {cells}",
            ),
            Step(
                name=f"{where}flattened patches",
                shape=(grid.size, flat),
                note=f"{rows} · {columns} · {channels} = {flat} numbers a patch",
            ),
            Step(name=f"{where}projection", shape=(grid.size, width), note=f"linear, {flat} → {width}"),
        ]
    if isinstance(record.module, PrefixTokens):
        words = _prefix_words(record.module)
        shown = " + ".join(dict.fromkeys(words))
        return [Step(name=f"{where}{shown}", shape=(count, width), note="learned, put in front")]
    if isinstance(record.module, LearnedPosition | SinCosPosition):
        return [
            Step(name=f"{where}positions", shape=(count, width), note=_position_words(record.module, grid))
        ]
    if isinstance(record.module, Stem):
        return [Step(name=f"{where}stem", shape=(*grid, width), note=stem_words(record.module))]
    about = (type(record.module).__doc__ or "").strip().splitlines()
    return [
        Step(
            name=f"{where}{_words(record.module) if record.name == 'entry' else record.name}",
            shape=(*grid, width),
            note=about[0].rstrip(".") if about else "",
        ),
    ]


def _prefix_words(module: PrefixTokens) -> list[str]:
    """One word a token."""
    words: list[str] = []
    for name in module.names:
        known = TOKEN_WORDS.get(name, (f"[{name.upper()}]",))
        words += [known[min(place, len(known) - 1)] for place in range(int(getattr(module, name).shape[1]))]
    return words


def _position_words(module: LearnedPosition | SinCosPosition, grid: Grid) -> str:
    if isinstance(module, SinCosPosition):
        return {"sincos1d": "sine/cosine over the sequence", "sincos2d": "sine/cosine over rows and columns"}[
            module.kind
        ] + ", added"
    if module.grid != grid:
        old = f"{module.grid.rows} × {module.grid.columns}"
        return f"learned, resampled from {old} to {grid.rows} × {grid.columns}, added"
    return "learned, added"


def _block_step(record: BlockRecord, where: str) -> Step:
    shape = (int(record.tokens.shape[1]), int(record.tokens.shape[2]))
    if isinstance(record.module, ResidualBlock):
        return Step(
            name=f"{where}block {record.number + 1}",
            shape=(*record.grid, shape[1]),
            note=block_words(record.module),
        )
    return Step(name=f"{where}block {record.number + 1}", shape=shape, note=_mixer_words(record))


def _mixer_words(record: BlockRecord) -> str:
    """The mixers' class in words, their heads, and what follows them."""
    if not record.mixers:
        return ""
    mixer = record.mixers[0].module
    name = _words(mixer)
    heads = getattr(mixer, "heads", None)
    name += f", {heads} head{'' if heads == 1 else 's'}" if heads else ""
    count = len(record.mixers)
    return f"{name}, then MLP" if count == 1 else f"{count} side by side: {name}; then {count} MLPs"


def _words(module: nn.Module) -> str:
    """The name of a module's class as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(module).__name__).lower()


def _end_steps(
    head: nn.Module, pooled: Tensor, recording: Recording, logits: Tensor, prediction: Prediction
) -> list[Step]:
    """From the last tokens to the prediction."""
    width, classes = int(pooled.shape[-1]), int(logits.shape[1])
    name, note = {
        "token": ("[CLS] vector", "the first token after the last norm"),
        "mean": ("mean vector", "mean of the patch tokens, no [CLS] is read"),
        "flatten": ("all tokens", "laid end to end"),
        "both": ("[CLS] and [DIST]", "their mean; each has a head of its own"),
    }.get("both" if hasattr(head, "distilled") else getattr(head, "pooling", ""), ("pooled vector", ""))
    if recording.blocks and recording.blocks[-1].module is not None:
        note = "mean over the cells of the last map"
    scores = logits[0].float().softmax(dim=0)
    best = prediction.top[0]
    return [
        Step(name=name, shape=(width,), note=note),
        Step(
            name="logits",
            shape=(classes,),
            note=f"from {float(logits.min()):.2f} to {float(logits.max()):.2f}",
        ),
        Step(name="probabilities", shape=(classes,), note=f"softmax, entropy {_entropy(scores):.2f} nats"),
        Step(name="prediction", shape=(), note=f"{best.label}, {best.score:.1%}"),
    ]


def _entropy(scores: Float[Tensor, " K"]) -> float:
    return float(-(scores * scores.clamp_min(1e-30).log()).sum())


def _stage(
    recording: Recording, number: int, size: tuple[int, int], places: Mapping[Grid, Placement]
) -> StageTrace:
    entries = [entry for entry in recording.entries if entry.stage == number]
    blocks = [block for block in recording.blocks if block.stage == number]
    where = f"stage {number + 1} " if recording.stages > 1 else ""
    words = [
        word
        for entry in recording.entries
        if entry.stage <= number and entry.prefix is not None and isinstance(entry.module, PrefixTokens)
        for word in _prefix_words(entry.module)
    ]
    made = next((entry for entry in entries if isinstance(entry.module, Patchify)), None)
    made = made or next((entry for entry in entries if not _is_position(entry.module)), None)
    made = made or next(iter(entries), None)
    similarity, references = _position_similarity(entries)
    layers: list[Layer] = []
    for block in blocks:
        before = layers[-1].component if layers else None
        layers.append(
            Layer(
                name=f"{where}block {block.number + 1}",
                grid=block.grid,
                placement=places.get(block.grid, stretched(block.grid, size)),
                tokens=block.tokens[0].float().cpu(),
                component=_component(block, before),
                gaze=gaze(block) or strength(block),
            )
        )
    return StageTrace(
        name=where.strip() or "the trunk",
        grid=entries[-1].grid if entries else blocks[0].grid,
        prefix=tuple(words) if entries and entries[-1].prefix is not None else (),
        embeddings=(made.map[0].flatten(1).t() if made else blocks[0].tokens[0]).float().cpu(),  # [n, D]
        similarity=similarity,
        references=references,
        layers=tuple(layers),
    )


def _is_position(module: nn.Module) -> bool:
    return isinstance(module, LearnedPosition | SinCosPosition)


def _position_similarity(entries: list[EntryRecord]) -> tuple[Tensor | None, tuple[tuple[int, int], ...]]:
    """Cosine between what was added at some places and what was added at every place."""
    entry = next((entry for entry in entries if _is_position(entry.module)), None)
    if entry is None:
        return None, ()
    grid = entry.grid
    added = (entry.map - entry.map_before)[0].float().cpu()  # [D, h, w]
    places = F.normalize(added.flatten(1), dim=0).t()  # [h * w, D]
    step = 1
    while -(-grid.rows // step) * -(-grid.columns // step) > MOST_REFERENCES:
        step += 1
    references = tuple(
        (row, column) for row in range(0, grid.rows, step) for column in range(0, grid.columns, step)
    )
    chosen = places[[row * grid.columns + column for row, column in references]]  # [R, D]
    return (chosen @ places.t()).unflatten(1, tuple(grid)), references  # [R, h, w]


def _component(block: BlockRecord, before: Tensor | None) -> Float[Tensor, "h w"]:
    """First principal component of the patch tokens, by power iteration from the token furthest out.

    Its sign, which means nothing, is chosen to agree with the block before.
    """
    tokens = block.tokens[0, block.prefix :].float().cpu()
    centred = tokens - tokens.mean(dim=0)
    direction = centred[centred.norm(dim=1).argmax()]
    for _ in range(30):
        direction = F.normalize(centred.t() @ (centred @ direction), dim=0)
    values: Tensor = (centred @ direction).unflatten(0, tuple(block.grid))  # [h, w]
    if before is not None and before.shape == values.shape and float((before * values).sum()) < 0:
        values = -values
    return values
