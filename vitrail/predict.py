"""Prediction: pictures in any form in, one record for each out, in their order.

What the network sees is what evaluation and training's own evaluation show it: `data.image.decode`, then
`data.transforms.Preprocess` with the model's card, then the engine's normalising.
"""

from __future__ import annotations

import glob
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vitrail.data.dense_loader import capped_batch_size, pad_together
from vitrail.data.finding import is_picture, note_unread
from vitrail.data.image import SUFFIXES, decode
from vitrail.data.transforms import Preprocess, colour
from vitrail.engines import Engine, open_engine
from vitrail.errors import ConfigError, DataError, ImageError
from vitrail.tasks.registry import make_task

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Tensor

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """One picture on its way to the network."""

    pixels: Tensor
    """Uint8 `[C, h, w]`, at the model's size."""
    size: tuple[int, int]
    """Height and width of the picture itself."""


class Predictor:
    """A model, its preprocessing and its class names, ready for pictures.

    Args:
        model: a model folder, a run folder, an exported file, or a network.
        engine: what computes: torch, compiled, onnxruntime, openvino, or auto (see vitrail.engines).
        precision: auto (bf16 where the chip computes in it), fp32, bf16, int8 (what `vitrail export --int8`
            made of the model), or fp16 on CUDA.
        device: auto, cpu, cuda, cuda:N or mps.
        batch_size: pictures that go through the network together; fewer where boxes or masks are found in large ones
            (`data.dense_loader.MOST_PIXELS`).
        top_k: classes named for each picture, unless a call says otherwise.
        threshold: score that a box must have to be told, 0..1.

    Records are what the model's task decodes: Prediction (classes), BoxPrediction or Segmentation.

    Example:
        predictor = Predictor("runs/flowers/model")
        for record in predictor(["a.jpg", "b.png"]):
            print(record.source, record.label, record.score, record.error)
    """

    def __init__(
        self,
        model: Any,
        engine: str = "auto",
        precision: str = "auto",
        *,
        device: str = "auto",
        batch_size: int = 32,
        top_k: int = 5,
        threshold: float = 0.5,
        workers: int | None = None,
    ) -> None:
        """`workers`: threads that read pictures; by default one more than cores, 8 at most."""
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1; got {workers}.")
        if batch_size < 1 or top_k < 1:
            raise ConfigError(f"batch_size and top_k must be at least 1; got {batch_size} and {top_k}.")
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is a score in 0..1; got {threshold}.")
        self.engine: Engine = open_engine(model, engine, device=device, precision=precision)
        self.labels = class_names(self.engine)
        self.task: Any = make_task(self.engine.card.task, self.labels)
        self.threshold = threshold
        dense = self.engine.card.task != "image-classification"
        self.batch_size = (
            capped_batch_size(batch_size, self.engine.card.preprocessing) if dense else batch_size
        )
        self.top_k = top_k
        self.workers = workers or min(8, (os.cpu_count() or 1) + 1)

    def __call__(self, images: Picture | Iterable[Picture], *, top_k: int | None = None) -> list[Any]:
        """One record for each picture, in order; a picture that cannot be read has its record's `error` set.

        A picture is a path, the bytes of an image file, a PIL image, a uint8 array `[I, J]`, `[I, J, 3]` or
        `[I, J, 4]`, or a uint8 tensor `[3, I, J]`. A single one gives a list of one; a four-dimensional array
        or tensor is a batch of pictures of any size.
        """
        return list(self.stream(images, top_k=top_k))

    def stream(self, images: Picture | Iterable[Picture], *, top_k: int | None = None) -> Iterator[Any]:
        """The same records, each as soon as its batch is done; pictures are read while the network runs."""
        wanted = self.top_k if top_k is None else top_k
        if wanted < 1:
            raise ConfigError(f"top_k must be at least 1; got {wanted}.")
        named = ((_name(item, place), item) for place, item in enumerate(_pictures(images)))
        pool = ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="decode")
        ahead: deque[list[tuple[str, Future[Prepared]]]] = deque()
        try:
            while True:
                chunk = [
                    (name, pool.submit(self._prepared, item, name))
                    for name, item in islice(named, self.batch_size)
                ]
                if chunk:
                    ahead.append(chunk)
                if not ahead:
                    return
                if len(ahead) == 2 or not chunk:
                    yield from self._finish(ahead.popleft(), wanted)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def prepare(self, image: Picture, name: str = "image") -> Tensor:
        """The bytes that the network sees of one picture: uint8 `[C, h, w]` at the model's size.

        Raises:
            ImageError: the picture cannot be read, or may not be; the message names it.
        """
        return self._prepared(image, name).pixels

    def _prepared(self, image: Picture, name: str) -> Prepared:
        picture = decode(_pixels(image), name=name)
        return Prepared(self.preprocess(picture), (int(picture.shape[1]), int(picture.shape[2])))

    @cached_property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing. Raises ConfigError where no picture has the model's channels."""
        return Preprocess(self.engine.card.preprocessing)

    def forward(self, images: Any) -> Tensor:
        """Logits `[B, K]`, float32 on the CPU, of a uint8 batch `[B, C, h, w]` already at the model's size.

        Takes a tensor or a numpy array. Raises ConfigError for another type or shape.
        """
        batch = torch.as_tensor(images)
        wanted = self.engine.card.preprocessing
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != wanted.in_chans:
            raise ConfigError(
                f"forward takes uint8 [B, {wanted.in_chans}, {wanted.input_size[0]}, {wanted.input_size[1]}];"
                f" got {str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}. Call the predictor"
                " itself with pictures of any kind."
            )
        logits: Tensor = self.engine(batch).cpu()
        return logits

    def answer(
        self,
        pixels: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        sources: Sequence[str] = (),
        top_k: int | None = None,
    ) -> list[Any]:
        """Records of prepared pictures, whatever the task.

        Args:
            pixels: what `prepare` gave for each, uint8 `[C, h, w]`.
            sizes: height and width of each original picture; classes of whole pictures do not need them.
            sources: names that the records get.
        """
        names = list(sources) or [""] * len(pixels)
        task = self.engine.card.task
        if task == "image-classification":
            logits = self.engine(torch.stack(list(pixels)))
            found: list[Any] = self.task.decode(logits, top_k=top_k or self.top_k, sources=names)
            return found
        batch, padding = pad_together(pixels, colour(self.engine.card.preprocessing))
        if task == "object-detection":
            dense: Any = self.engine  # only the engines of detectors take padding
            output = self.engine(batch) if padding is None else dense(batch, padding)
            found = self.task.decode(output, sizes, sources=names, threshold=self.threshold)
            if getattr(output, "masks", None) is not None:
                found = self._with_segments(found, output, sizes, padding)
            return found
        own = [(0, 0, int(image.shape[1]), int(image.shape[2])) for image in pixels]
        regions = {} if padding is None else {"regions": own}
        found = self.task.decode(self.engine(batch), sizes, sources=names, **regions)
        return found

    def _with_segments(
        self, records: list[Any], output: Any, sizes: Sequence[tuple[int, int]], padding: Tensor | None
    ) -> list[Any]:
        """The records of a panoptic network with the segments that its masks make of each picture."""
        from vitrail.tasks.panoptic import merge

        regions = None
        if padding is not None:  # masks are coarser than the picture by the same factor both ways
            tall, wide = (
                there / own for there, own in zip(output.masks.shape[-2:], padding.shape[-2:], strict=True)
            )
            regions = [
                (math.ceil(int((~one[:, 0]).sum()) * tall), math.ceil(int((~one[0]).sum()) * wide))
                for one in padding
            ]
        things = range(int(self.engine.card.config.get("things") or len(self.labels)))
        merged = merge(output, sizes, self.labels, things, regions=regions)
        return [replace(record, segments=own) for record, own in zip(records, merged, strict=True)]

    def failure(self, source: str, error: str) -> Any:
        """The record of a picture that could not be read."""
        if self.engine.card.task == "object-detection":
            from vitrail.tasks.detect import BoxPrediction

            return BoxPrediction(source=source, error=error)
        if self.engine.card.task == "image-segmentation":
            from vitrail.tasks.segment import Segmentation

            return Segmentation(source=source, error=error)
        from vitrail.tasks.classify import Prediction

        return Prediction(source=source, error=error)

    def _finish(self, chunk: list[tuple[str, Future[Prepared]]], top_k: int) -> Iterator[Any]:
        """Records of one batch: the readable pictures through the network, the others with their reason."""
        names: list[str] = []
        ready: list[Prepared] = []
        errors: dict[int, str] = {}
        for place, (name, future) in enumerate(chunk):
            try:
                ready.append(future.result())
                names.append(name)
            except (ImageError, OSError) as error:
                errors[place] = str(error)
        pixels, sizes = [one.pixels for one in ready], [one.size for one in ready]
        found = iter(self.answer(pixels, sizes, names, top_k) if ready else [])
        for place, (name, _) in enumerate(chunk):
            yield self.failure(name, errors[place]) if place in errors else next(found)


def class_names(engine: Engine) -> tuple[str, ...]:
    """The model's class names, or `class 0`, `class 1` ... where nobody wrote them down."""
    return engine.card.labels or tuple(f"class {index}" for index in range(engine.classes))


def expand(patterns: Iterable[str]) -> list[str]:
    """Paths of images: files as they are, folders with all below them, patterns (`**` too); no path twice.

    Hidden files below a folder are passed over. A file that is named and does not exist stays in the list, so that it
    gets its own error record.

    Raises:
        DataError: a folder without an image, or a pattern that nothing matches.
    """
    found: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            files = [
                str(path) for path in Path(pattern).rglob("*") if not _housekeeping(path.relative_to(pattern))
            ]
            note_unread(pattern, files, logger.warning)
            below = sorted(name for name in files if is_picture(name))
            if not below:
                raise DataError(f"The folder {pattern} holds no image ({', '.join(sorted(SUFFIXES))}).")
            found += below
        elif not os.path.exists(pattern) and glob.has_magic(pattern):
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
            if not matches:
                raise DataError(f"No file matches {pattern}.")
            found += matches
        else:
            found.append(pattern)
    return list(dict.fromkeys(found))


def _housekeeping(path: Path) -> bool:
    """Whether a file below a folder is hidden, or one that macOS packs beside the real ones."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _pictures(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One picture as a list of one; a batch in one array as its rows."""
    if isinstance(images, str | os.PathLike | bytes | bytearray) or type(images).__module__.startswith(
        "PIL."
    ):
        return [images]  # type: ignore[list-item]
    if getattr(images, "ndim", 4) < 4:
        return [images]  # type: ignore[list-item]
    return images  # type: ignore[return-value]


def _name(item: Picture, place: int) -> str:
    """A path's own name; for the rest, the file a PIL image came from, or its place in the call."""
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return str(getattr(item, "filename", "") or f"image {place}")


def _pixels(image: Picture) -> Any:
    """What `decode` takes: a tensor `[3, I, J]` as an array `[I, J, 3]`, everything else as it is."""
    if not isinstance(image, Tensor):
        return image
    return (image.permute(1, 2, 0) if image.ndim == 3 else image).detach().cpu().numpy()
