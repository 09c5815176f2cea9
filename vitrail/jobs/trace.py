"""`vitrail trace`: the story of one image as steps, one picture and one page."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.data.image import decode
from vitrail.data.transforms import Preprocess
from vitrail.disk import write_atomically
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError
from vitrail.explain.trace import Trace
from vitrail.explain.trace import trace as follow
from vitrail.explain.trace_page import page
from vitrail.explain.trace_poster import poster
from vitrail.explain.trace_words import IN_FLOAT32
from vitrail.jobs.opening import open_network
from vitrail.jobs.trace_dense import DenseTrace, trace_dense
from vitrail.predict import class_names
from vitrail.runs import TraceRun
from vitrail.tasks.classify import Classify

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
    logger.info(IN_FLOAT32)
    network, note = open_network(run.model)
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
