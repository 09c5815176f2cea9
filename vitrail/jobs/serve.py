"""What `vitrail serve` computes: a model opened once, warmed, and asked for answers; nothing of HTTP here."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import logging
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.data.transforms import Preprocess
from vitrail.engines import faster_engine, open_engine
from vitrail.engines.artefact import format_of
from vitrail.errors import ConfigError, UnsupportedError, VitrailError
from vitrail.explain.attention import mixers_of
from vitrail.explain.explainer import Explainer, Explanation
from vitrail.explain.explorer_page import attention_data
from vitrail.explain.overlay import Pixels
from vitrail.explain.trace import trace
from vitrail.explain.trace_page import page_data
from vitrail.explain.trace_poster import shortened
from vitrail.predict import Predictor
from vitrail.runtime import choose_device
from vitrail.tasks.classify import Classify
from vitrail.tasks.draw_dense import index_png, palette
from vitrail.weights.files import weight_files
from vitrail.weights.folder import CONFIG, PREPROCESSOR, model_folder, read_card

logger = logging.getLogger(__name__)

MOST_MASK_LOGITS = 200_000_000
"""Numbers behind one mask, pixels times classes: 800 MB."""

WARM_SECONDS = 20.0
"""After so long no larger batch is tried."""

WORTH = 0.96
"""Share of a smaller batch's seconds a picture that a larger one may take, or it is not worth the wait."""

EXPECTED_IMAGES = 100_000
"""Pictures that a service is expected to answer in its life, by which it is judged whether measuring engines pays."""

MEASURED_AT = 8
"""Pictures in a batch when engines are measured for a service."""

MOST_LANES = 8
"""Pictures that are computed side by side on a CPU."""


@dataclass(frozen=True)
class DecodedPicture:
    """One picture as the decoder handed it over."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """What the network sees of it, [C, h, w]."""
    size: tuple[int, int]
    """Height and width of the upright picture."""
    shown: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    """The picture made small enough to draw on, [3, H, W]; only where it was asked for."""
    name: str = "image"


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up found out."""

    sizes: tuple[int, ...]
    """Batch sizes that are used, from 1 up."""
    difference: float
    """Largest difference of a logit between a batch of any size tried and the picture alone; 0 is bit for bit."""
    seconds: dict[int, float]
    """Time of one batch, by its size."""
    side_by_side: bool = False
    """Whether pictures may be computed side by side, each with its share of the cores."""


def find_engine(folder: str, device: str, precision: str) -> str:
    """The quickest engine for a service of this model, measured and written down where nobody knew it yet.

    Nothing is measured where torch would be through `EXPECTED_IMAGES` sooner than that takes.
    """
    opened = open_engine(folder, device=device, precision=precision)
    found = faster_engine(opened, folder, "auto", images=EXPECTED_IMAGES, batch_size=MEASURED_AT)
    if found is not opened:  # compared with float32 once, beside the graph, so that the next start knows it
        found = open_engine(folder, device=device, precision=precision)
    return found.name


class Served:
    """One version of one model, ready to answer. Called by one thread at a time, save for explanations.

    Args:
        name: what requests call it.
        folder: model folder or run folder.
        exact: use only batch sizes for which every picture's answer has the bits it has alone.
        batch_size: most pictures in one batch.
        device, precision, engine: as for `vitrail predict`.
        share: cores of one picture where several are computed side by side; 0 for all.
        copies: folder where the model's copy is made; the system's for temporary files by default.

    Raises:
        What opening a model raises; ConfigError where no picture has the model's channels.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        *,
        exact: bool = True,
        batch_size: int = 32,
        device: str = "auto",
        precision: str = "auto",
        engine: str = "auto",
        share: int = 0,
        copies: str | None = None,
    ) -> None:
        self.name, self.folder = name, folder
        self.stamp = stamp(folder)
        self.copy = tempfile.mkdtemp(prefix="vitrail-serve-", dir=copies)
        weakref.finalize(self, shutil.rmtree, self.copy, ignore_errors=True)
        # Weights stay mapped from their file. If somebody wrote over that, or cut it short, the pages behind the
        # mapping would change under the service, or be gone, and the system would end it (SIGBUS).
        shutil.copytree(model_folder(folder), self.copy, dirs_exist_ok=True)
        self.predictor = Predictor(self.copy, engine, precision, device=device, batch_size=batch_size)
        self.card = self.predictor.engine.card
        # ONNX Runtime has one set of threads for all calls.
        apart = self.predictor.engine.name in ("torch", "openvino")
        self.share = share if share and apart else torch.get_num_threads()
        self.labels = self.predictor.labels
        self.version = _version(self.copy, self.card.sha256 or self.stamp)
        self.preprocessing = dataclasses.asdict(self.card.preprocessing)
        self.loaded_at = time.time()
        Preprocess(self.card.preprocessing)
        self.warm_up = self._warmed(batch_size, exact)
        network: Any = getattr(self.predictor.engine, "network", None)
        # Where something else computes, the model's own network explains.
        self._explainer = Explainer(self.copy) if network is None else None
        asked = self._explainer or Explainer(network)
        self.methods, self.default_method = asked.methods, asked.default
        self._lock = threading.Lock()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of what the network sees."""
        wanted = self.card.preprocessing
        return (wanted.in_chans, *wanted.input_size)

    @property
    def classifies(self) -> bool:
        """Whether answers are classes of whole pictures; else they are boxes or masks."""
        return self.card.task == "image-classification"

    def compute(self, batch: Sequence[DecodedPicture]) -> list[Any]:
        """What comes of each picture: logits [K], or the record of its boxes or mask.

        The number of pictures must be one of `warm_up.sizes`.
        """
        if self.classifies:
            images = torch.from_numpy(np.stack([seen.pixels for seen in batch]))
            return list(self.predictor.forward(images).numpy())
        pixels = [torch.from_numpy(np.array(seen.pixels)) for seen in batch]
        return self.predictor.answer(pixels, [seen.size for seen in batch])

    def records(
        self, results: Sequence[Any], names: Sequence[str], top_k: int, mask: bool = False
    ) -> list[dict[str, Any]]:
        """The records that `vitrail predict` gives for what was computed, JSON-ready.

        `mask` adds a segmentation's mask as a PNG of class numbers, in base64.
        """
        if not self.classifies:
            named = [
                dataclasses.replace(record, source=name) for record, name in zip(results, names, strict=True)
            ]
            return [record.to_dict() | (self._mask(record) if mask else {}) for record in named]
        found = self.predictor.task.decode(
            torch.from_numpy(np.stack(results)), top_k=min(top_k, len(self.labels)), sources=list(names)
        )
        return [record.to_dict() for record in found]

    def failure(self, name: str, error: str) -> dict[str, Any]:
        """The record of a picture that has no answer, JSON-ready."""
        found: dict[str, Any] = self.predictor.failure(name, error).to_dict()
        return found

    def too_large(self, size: tuple[int, int]) -> bool:
        """Whether a picture's answer would take more memory than a request may: a mask's logits, at its own size."""
        logits = size[0] * size[1] * len(self.labels)
        return self.card.task == "image-segmentation" and logits > MOST_MASK_LOGITS

    def _mask(self, record: Any) -> dict[str, str]:
        mask = getattr(record, "mask", None)
        if mask is None:
            return {}
        return {"mask": base64.b64encode(index_png(mask.numpy(), len(self.labels))).decode()}

    def probabilities(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Softmax of logits [B, K], in float32."""
        return torch.from_numpy(logits).softmax(dim=1).numpy()

    def about(self) -> dict[str, Any]:
        """What a client may know of the model, JSON-ready; no path of this machine is in it."""
        channels, rows, columns = self.input_shape
        return {
            "name": self.name,
            "version": self.version,
            "architecture": self.card.architecture,
            "task": self.card.task,
            "labels": list(self.labels),
            "colours": [] if self.classifies else _colours(len(self.labels)),
            "input": {"channels": channels, "rows": rows, "columns": columns},
            "scores": dict(self.card.scores),
            "licence": self.card.licence,
            "explain": {
                "methods": list(self.methods),
                "default": self.default_method,
                "story": self.classifies,
            },
            "engine": self.predictor.engine.name,
            "precision": self.predictor.engine.precision,
            "batch_sizes": list(self.warm_up.sizes),
            "side_by_side": self.warm_up.side_by_side,
            "batch_difference": self.warm_up.difference,
            "loaded_at": self.loaded_at,
        }

    def _warmed(self, most: int, exact: bool) -> WarmUp:
        """Run every batch size once on noise, compare each row with the same picture alone, keep what is equal.

        Which kernel computes a product depends on the shapes, not on the values: a size that keeps the bits of
        noise keeps those of pictures. The rows of a batch are different ones, so a row's place is tried too.
        """
        if not self.classifies:
            # Boxes and masks are computed one picture at a time: their pictures differ in size, and padding one to
            # another's would change its answer.
            channels, rows, columns = self.input_shape
            self.compute(
                [DecodedPicture(np.zeros((channels, rows, columns), dtype=np.uint8), (rows, columns))]
            )
            begun = time.perf_counter()
            self.compute(
                [DecodedPicture(np.zeros((channels, rows, columns), dtype=np.uint8), (rows, columns))]
            )
            return WarmUp((1,), 0.0, {1: time.perf_counter() - begun})
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (most, *self.input_shape), dtype=torch.uint8, generator=generator)
        if not bool(self.predictor.forward(noise[:1]).isfinite().all()):
            raise ConfigError(f"{self.name}: the model answers with numbers that are not finite.")
        begun = time.perf_counter()
        alone = [self.predictor.forward(noise[:1])]
        if exact:
            _end_alone(getattr(self.predictor.engine, "network", None))
        threads = torch.get_num_threads()
        use_threads(self.share)
        try:
            found, seconds = self._timed(noise[:1])
            apart = float((found - alone[0]).abs().max())
            side_by_side = self.share < threads and (apart == 0.0 or not exact)
            if not side_by_side:
                use_threads(threads)
                found, seconds = self._timed(noise[:1])
            kept, difference, size, pace = {1: seconds}, apart, 2, seconds
            while size <= most and time.perf_counter() - begun < WARM_SECONDS:
                alone += [self.predictor.forward(noise[row : row + 1]) for row in range(len(alone), size)]
                found, seconds = self._timed(noise[:size])
                apart = float((found - torch.cat(alone)).abs().max())
                difference = max(difference, apart)
                if (apart == 0.0 or not exact) and seconds / size < WORTH * pace:
                    kept[size], pace = seconds, seconds / size
                elif size > 4 * max(kept):  # the third size in a row that is of no use
                    break
                size *= 2
        finally:
            use_threads(threads)
        return WarmUp(tuple(kept), difference, kept, side_by_side)

    def _timed(self, images: Tensor) -> tuple[Tensor, float]:
        """Logits of a batch, and the time of the quicker of two runs."""
        times = []
        for _ in range(2):
            since = time.perf_counter()
            found = self.predictor.forward(images)
            times.append(time.perf_counter() - since)
        return found, min(times)

    def explainer(self) -> Explainer:
        """The model once more, in float32, for explanations: made at the first call, from this version's weights."""
        with self._lock:
            if self._explainer is None:
                self._explainer = Explainer(self.copy)
            return self._explainer

    def explain(self, seen: DecodedPicture, asked: ExplainRequest) -> dict[str, Any]:
        """One map with its picture, JSON-ready. Raises what `Explainer` raises."""
        return explained(self._explain(seen, asked))

    def story(self, seen: DecodedPicture, top_k: int) -> dict[str, Any]:
        """What the page tells of one picture: every step, the attention of every layer and head.

        Raises UnsupportedError where there is no class at the end.
        """
        if not self.classifies:
            raise UnsupportedError(f"{self.name} finds boxes or masks, of which no story is told.")
        explainer = self.explainer()
        follow = trace(
            explainer.network,
            torch.from_numpy(seen.pixels),
            self.card.preprocessing,
            Classify(self.labels),
            source=seen.name,
            original=seen.size,
            top_k=top_k,
        )
        looked = explainer(
            _picture(seen), method="gradcam", name=seen.name, pixels=torch.from_numpy(seen.pixels)
        )
        return {
            "model": self.name,
            "version": self.version,
            "architecture": follow.model,
            "steps": [{"step": name, "shape": size, "note": note} for name, size, note in shortened(follow)],
            "convolutional": follow.convolutional,
            "methods": list(explainer.methods),
            "default": explainer.default,
            "trace": page_data(follow),
            "attention": attention_data(explainer, looked) if mixers_of(explainer.network) else [],
        }

    def _explain(self, seen: DecodedPicture, asked: ExplainRequest) -> Explanation:
        return self.explainer()(
            _picture(seen),
            asked.target,
            asked.method,
            score=asked.score,
            name=seen.name,
            pixels=torch.from_numpy(seen.pixels),
            **asked.options,
        )


def _colours(classes: int) -> list[str]:
    """The colours in which boxes and masks are drawn, as pages write them."""
    return ["#" + bytes(colour).hex() for colour in palette(classes)[:classes]]


def use_threads(count: int) -> None:
    """Let what the calling thread computes take so many cores."""
    torch.set_num_threads(count)


def shares(device: str) -> tuple[int, int]:
    """How many pictures are computed side by side, and the cores of all together. Raises ConfigError."""
    threads = torch.get_num_threads()
    return (max(1, min(threads, MOST_LANES)) if choose_device(device).type == "cpu" else 1), threads


def _end_alone(network: nn.Module | None) -> None:
    """Have what has become one vector a picture go through linear layers picture by picture.

    A product of one row is added up in another order than one of several. Nearly always that is the head, where it
    costs nothing beside the rest, and the only place where a batch moves bits.
    """
    for part in network.modules() if network is not None else ():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(_by_rows)


def _by_rows(layer: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
    vectors = given[0]
    if vectors.ndim != 2 or len(vectors) == 1:
        return found
    return torch.cat([layer.forward(row) for row in vectors.split(1)])


@dataclass(frozen=True, kw_only=True)
class ExplainRequest:
    """What is asked of an explanation."""

    method: str = "auto"
    target: str | int | None = None
    """Class by name or, where no class has that name, by number in text; by number; the predicted one by default."""
    score: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """layer, head, token, steps: what the method takes; box, of a detector, counted from the surest."""


def explained(found: Explanation) -> dict[str, Any]:
    """An explanation as JSON: what `vitrail explain` writes, the map's numbers and the overlay as a PNG."""
    values = np.ascontiguousarray(found.values, dtype="<f4")
    return {
        **found.to_dict(),
        "map": {
            "rows": values.shape[0],
            "columns": values.shape[1],
            "data": [round(float(value), 7) for value in values.ravel()] if values.size <= 4096 else None,
            "float32": base64.b64encode(values.tobytes()).decode(),
        },
        "overlay": _png(found.overlay()),
        "picture": _png(found.picture.permute(1, 2, 0).contiguous().numpy()),
    }


def _png(pixels: Pixels) -> str:
    """A PNG as base64; written for speed, since somebody waits for it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(seen: DecodedPicture) -> Tensor:
    if seen.shown is None:
        raise ConfigError("An explanation needs the picture as it is shown.")
    return torch.from_numpy(seen.shown)


def _version(folder: str, weights: str) -> str:
    """What tells one state of a model from another: a hash of its weights' and of the card that lies in its folder.

    An engine may carry a card of its own, so that the version would depend on what computes.
    """
    card = dataclasses.asdict(read_card(folder))
    text = json.dumps({**card, "sha256": weights}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stamp(folder: str) -> str:
    """What changes when the model in a folder is replaced: inode, size and time of its files. Empty when it is gone."""
    try:
        place = model_folder(folder)
        files = [place / CONFIG, *weight_files(place)]
        # In transformers' folders it alone says how pictures are prepared, and it need not be there.
        files += [file for file in (place / PREPROCESSOR,) if file.exists()]
        return " ".join(
            f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
            for status in (file.stat() for file in files)
        )
    except (OSError, VitrailError):
        return ""


def served_names(models: Sequence[str]) -> dict[str, str]:
    """Name -> folder for what was asked to be served: NAME=FOLDER, or a folder, called by its last telling part.

    Raises ConfigError for two models of one name, for names that a path of a URL cannot hold, and for exported models.
    """
    found: dict[str, str] = {}
    for word in models:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name:
            folder = word
            parts = [part for part in Path(word).resolve().parts if part not in ("model", "run")]
            name = parts[-1] if parts else "model"
        name = "".join(
            letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in name
        )
        if not name.strip(".-"):
            raise ConfigError(f"{word!r} gives a model no name; say NAME=FOLDER.")
        if name in found:
            raise ConfigError(f"Two models are called {name}; name them with NAME=FOLDER.")
        kind = format_of(folder)
        if kind is not None:
            raise ConfigError(
                f"{folder} is an exported model ({kind}), and those are not served: name the model folder or the run"
                " folder that it was exported from, or a model that ships. vitrail predict and evaluate open it."
            )
        found[name] = folder
    if not found:
        raise ConfigError("There is no model to serve: name model folders or run folders.")
    return found
