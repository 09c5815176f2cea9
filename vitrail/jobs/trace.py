"""`vitrail trace`: the story of one image as steps, one picture and one page."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail.data.image import decode
from vitrail.data.transforms import Preprocess
from vitrail.disk import write_atomically
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, ModelError
from vitrail.explain.page import page
from vitrail.explain.poster import poster
from vitrail.explain.trace import Trace
from vitrail.explain.trace import trace as follow
from vitrail.jobs.trace_dense import DenseTrace, trace_dense
from vitrail.models.registry import create_model, from_pretrained, is_model
from vitrail.predict import class_names
from vitrail.runs import TraceRun
from vitrail.tasks.classify import Classify
from vitrail.weights.folder import model_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The story and the files that show it."""

    trace: Trace | DenseTrace
    picture: Path
    """trace.png"""
    page: Path
    """trace.html, self-contained"""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.trace.to_dict(), "picture": str(self.picture), "page": str(self.page)}


def trace(run: TraceRun) -> Traced:
    """Follow one image through a model, in float32, and write trace.png and trace.html.

    Raises ImageError for a picture that cannot be read, ModelError for a model that is neither a folder nor a
    name, UnsupportedError for a network without stages.
    """
    if run.top_k < 1:
        raise ConfigError(f"top_k must be at least 1; got {run.top_k}.")
    image = decode(run.image, name=run.image)
    network, note = _network(run.model)
    network = from_pretrained(model_folder(network)) if isinstance(network, str) else network
    folder = Path(run.output) if run.output else Path("trace") / Path(run.image).stem
    picture, html = folder / "trace.png", folder / "trace.html"
    if network.card.task != "image-classification":
        dense, figure, text = trace_dense(network, run, note)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(picture, figure)
        write_atomically(html, text.encode())
        return Traced(trace=dense, picture=picture, page=html)
    engine = TorchEngine(network, device=run.device, precision="fp32")
    preprocessing = engine.card.preprocessing
    story = follow(
        engine.network,
        Preprocess(preprocessing)(image),
        preprocessing,
        Classify(class_names(engine)),
        source=Path(run.image).name,
        original=(int(image.shape[1]), int(image.shape[2])),
        top_k=run.top_k,
        note=note,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, poster(story))
    write_atomically(html, page(story).encode())
    return Traced(trace=story, picture=picture, page=html)


def _network(model: str) -> tuple[Any, str]:
    """What the engine opens, and what must be said of it: a folder, or a new network with random weights."""
    if Path(model).exists():
        return model, ""
    if not is_model(model):
        raise ModelError(
            f"{model} is neither a folder nor the name of a network; `vitrail models` lists the names."
        )
    note = "random weights: the numbers mean nothing"
    logger.warning("%s has no weights here: it is traced with random ones.", model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(model), note
