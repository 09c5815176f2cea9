"""From what a person names to what computes: a network for the verbs that look inside, an engine for the others."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vitrail.engines import Engine, faster_engine
from vitrail.errors import ModelError
from vitrail.models.registry import create_model, from_pretrained, is_model
from vitrail.runs import EvaluateRun, PredictRun
from vitrail.weights.folder import model_folder, on_disk

logger = logging.getLogger(__name__)


def open_network(model: str) -> tuple[Any, str]:
    """The network, and a note that every result must carry (random weights), or an empty one.

    Raises ModelError where the name means nothing, WeightsError where its folder cannot be read.
    """
    if on_disk(model):
        return from_pretrained(model_folder(model)), ""
    if not is_model(model):
        raise ModelError(
            f"{model} is neither a folder nor the name of a network; `vitrail models` lists the names."
        )
    logger.warning("%s has no weights here: its weights are random.", model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(model), "random weights: what is shown means nothing"


def engine_name(run: EvaluateRun | PredictRun) -> str:
    """The name of the engine that a run asks for; where tokens are merged or neighbours vote, auto means torch."""
    inside = run.merge_tokens or (isinstance(run, EvaluateRun) and run.knn)
    return "torch" if inside and run.engine == "auto" else run.engine


def engine_for(engine: Engine, run: EvaluateRun | PredictRun, images: int) -> Engine:
    """The engine for so many pictures: with merged tokens if the run wants them, else a quicker one if it pays."""
    if run.merge_tokens:
        from vitrail.engines.merging import merging

        return merging(engine, run.merge_tokens)
    return faster_engine(engine, run.model, run.engine, images=images, batch_size=run.batch_size)
