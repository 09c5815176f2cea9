"""`vitrail trace` for boxes and masks: what every part of the network answers to one picture, and what it found."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vitrail.data.image import decode
from vitrail.data.transforms import Geometry
from vitrail.explain.heat import Heat
from vitrail.explain.overlay import on_picture
from vitrail.explain.places import Placement
from vitrail.explain.questions import backbone_maps
from vitrail.explain.trace import Step
from vitrail.predict import Predictor
from vitrail.runs import TraceRun
from vitrail.tasks.draw_dense import Drawn, as_png, draw_boxes, draw_mask, side_by_side, titled
from vitrail.tasks.panoptic import segment_numbers

MOST = 6
"""Tensors that are told of one part's answer."""

COLD_TO_WARM = np.array([(13, 8, 65), (90, 24, 130), (190, 55, 85), (245, 140, 40), (250, 235, 130)], float)


@dataclass(frozen=True, kw_only=True)
class DenseTrace:
    """One picture on its way through a network of boxes or masks."""

    model: str
    note: str
    steps: tuple[Step, ...]
    record: Any
    """What was found: BoxPrediction or Segmentation."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps = [step.to_dict() for step in self.steps]
        record = self.record.to_dict()
        return {"model": self.model, "note": self.note, "precision": "fp32", "steps": steps, **record}


def trace_dense(network: Any, run: TraceRun, note: str) -> tuple[DenseTrace, bytes, str]:
    """The story of a picture, its figure as PNG, and a page with both."""
    predictor = Predictor(network, precision="fp32", device=run.device)
    picture = decode(run.image, name=run.image)
    size = (int(picture.shape[1]), int(picture.shape[2]))
    name = Path(run.image).name
    pixels = predictor.preprocess(picture)
    heard: list[tuple[str, Any, Any]] = []
    hooks = [
        part.register_forward_hook(lambda module, _in, out, part=part_name: heard.append((part, module, out)))
        for part_name, part in network.named_children()
    ]
    try:
        with backbone_maps(network.backbone) as seen:
            record = predictor.answer([pixels], [size], [name])[0]
    finally:
        for hook in hooks:
            hook.remove()
    wanted = network.card.preprocessing
    steps = [
        Step(name="picture", shape=(*size, 3), note=f"{name}, rows × columns × channels"),
        Step(
            name="image",
            shape=tuple(pixels.shape),
            note=f"resized ({wanted.crop_mode}, {wanted.interpolation})",
        ),
        *(step for part, module, out in heard for step in _steps(part, module, out)),
        Step(name="found", shape=(_count(record),), note=_summary(record)),
    ]
    trace = DenseTrace(model=network.name, note=note, steps=tuple(steps), record=record)
    placed = [placement for _, placement in seen]
    geometry = predictor.preprocess.geometry(*size)
    figure = as_png(_figure(picture, heard, placed, geometry, network, record, predictor.labels, trace))
    return trace, figure, _page(trace, figure)


def _tensors(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, tuple | list):
        for part in answer:
            yield from _tensors(part)


def _steps(part: str, module: Any, answer: Any) -> Iterator[Step]:
    for number, tensor in enumerate(list(_tensors(answer))[:MOST]):
        several = "" if number == 0 and len(list(_tensors(answer))) == 1 else f" {number + 1}"
        yield Step(name=f"{part}{several}", shape=tuple(tensor.shape[1:]), note=type(module).__name__)


def _count(record: Any) -> int:
    return len(record.boxes) if hasattr(record, "boxes") else len(record.shares)


def _summary(record: Any) -> str:
    if hasattr(record, "boxes"):
        names = [box.label for box in record.boxes]
        return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names)) or "no box"
    return ", ".join(f"{share.label} {share.share:.0%}" for share in record.shares[:5])


def _figure(
    picture: UInt8[Tensor, "3 H W"],
    heard: list[Any],
    placed: Sequence[Placement],
    geometry: Geometry,
    network: Any,
    record: Any,
    labels: Any,
    trace: DenseTrace,
) -> Any:
    """The picture, how strongly each map of the backbone answers at each place of it, and what was found."""
    seen = picture.permute(1, 2, 0).numpy()
    tiles = [titled(seen, "the picture")]
    levels = getattr(network.backbone, "levels", ())
    maps = next((list(_tensors(out)) for part, _, out in heard if part == "backbone"), [])
    maps = [map for map in maps if map.ndim == 4][: len(placed)]  # without the prefix
    for number, (map, placement) in enumerate(zip(maps, placed, strict=True)):
        stride = f", stride {levels[number].stride}" if number < len(levels) else ""
        rows, columns = map.shape[2:]
        tiles.append(
            titled(_heat(map[0], placement, geometry), f"map {number + 1}: {rows}×{columns} cells{stride}")
        )
    if hasattr(record, "boxes"):
        boxes = [Drawn(box.index, box.corners, box.score) for box in record.boxes]
        tiles.append(draw_boxes(seen, boxes, labels))
        if record.segments is not None:
            tiles.append(draw_mask(seen, *segment_numbers(record.segments)))
    else:
        tiles.append(draw_mask(seen, record.mask.numpy(), labels))
    shelves = [tiles[start : start + 3] for start in range(0, len(tiles), 3)]
    caption = "; ".join(filter(None, [trace.note, "maps: length of the vector in each cell, dark is short"]))
    return side_by_side(shelves, f"{trace.model} looks at {trace.steps[0].note.partition(',')[0]}", caption)


def _heat(map: Tensor, placement: Placement, geometry: Geometry) -> Any:
    """The length of a map's `[C, h, w]` vectors at each pixel of the picture, uint8 `[H, W, 3]`; black beyond it."""
    length = map.detach().float().cpu().pow(2).mean(dim=0).sqrt()
    values = on_picture(
        Heat(values=length[None], placement=placement, units=""), geometry, smooth=False
    ).numpy()
    low, high = float(length.min()), float(length.max())
    place = (values - low) / max(high - low, 1e-12) * (len(COLD_TO_WARM) - 1)
    stops = np.arange(len(COLD_TO_WARM))
    colours = np.stack([np.interp(place, stops, COLD_TO_WARM[:, channel]) for channel in range(3)], axis=-1)
    return np.nan_to_num(colours).round().astype(np.uint8)


def _page(trace: DenseTrace, figure: bytes) -> str:
    """One self-contained page: the figure and the steps."""
    rows = "".join(
        f"<tr><td>{html.escape(step.name)}</td><td>{html.escape(step.size)}</td><td>{html.escape(step.note)}</td></tr>"
        for step in trace.steps
    )
    picture = base64.b64encode(figure).decode()
    return (
        "<!doctype html><meta charset=utf-8><title>trace</title><style>body{font:15px system-ui;margin:2rem;"
        "max-width:80rem}img{max-width:100%}td{padding:.2rem 1rem .2rem 0;border-bottom:1px solid #ddd}</style>"
        f"<h1>{html.escape(trace.model)}</h1><p>{html.escape(trace.note)}</p>"
        f'<img alt="what each map answers, and what was found" src="data:image/png;base64,{picture}">'
        f"<table>{rows}</table>"
    )
