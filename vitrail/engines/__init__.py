"""Engines: what computes a model's output. One protocol, chosen when a model is opened.

An engine is called with uint8 images `[B, C, h, w]`, already at the model's size, and answers float32 logits
on the CPU or on its device. Normalising belongs to the engine, so that every engine sees the same bytes.

    torch        the network itself; always there, for every task and device
    compiled     the network through torch.compile, for many pictures on a GPU
    onnxruntime  a prepared graph in ONNX Runtime, on the CPU
    openvino     a prepared graph in OpenVINO, on the CPU; in int8 too

`auto` takes the one that was measured to be the quickest here for this model, and says so.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vitrail.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitrail.engines.graph_cache import GraphCache
    from vitrail.weights.card import Card

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "compiled", "onnxruntime", "openvino")
"""Names of the engines."""


class Engine(Protocol):
    """What every engine offers."""

    name: str
    """Which engine it is."""

    precision: str
    """What it computes in: fp32, bf16, fp16 or int8."""

    card: Card
    """Class names and preprocessing travel with the model."""

    classes: int
    """Number of logits."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32, of uint8 images `[B, C, h, w]` at the model's size."""
        ...


def open_engine(
    model: str | Path | nn.Module, engine: str = "auto", *, device: str = "auto", precision: str = "auto"
) -> Engine:
    """The engine of a model folder, a run folder, an exported file, or a network.

    `auto` never prepares anything here: it takes what was found to be the quickest before, else torch.
    `faster_engine` looks for a quicker one when it is known how much there is to do. An engine that was asked
    for by name is prepared if need be; where it is missing or broken, torch does the work, and that is said.

    Raises:
        ConfigError: an unknown engine, device or precision.
        WeightsError: a folder that holds no model, or a damaged one.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.{suggestion(engine, ENGINES)}"
        )
    from vitrail.engines.artefact import format_of, open_artefact

    if isinstance(model, str | Path):
        if format_of(model) is not None:
            return open_artefact(model, engine, precision)
        quick = _quick(model, engine, device, precision)
        if quick is not None:
            return quick
    from vitrail.engines.pytorch import TorchEngine

    return TorchEngine(model, device=device, precision=precision, compile=engine == "compiled")


def faster_engine(opened: Engine, model: Any, engine: str, *, images: int, batch_size: int) -> Engine:
    """A quicker engine than the one that `open_engine` gave, if there is so much to do that it pays.

    Only `auto` on the CPU looks for one. The answers stay: an engine that differs from torch by more than the bounds
    of the proof is not taken.
    """
    from vitrail.engines.pytorch import TorchEngine

    if engine != "auto" or not isinstance(opened, TorchEngine) or not isinstance(model, str | Path):
        return opened
    if opened.card.task != "image-classification" or opened.runtime.device.type != "cpu":
        return opened
    from vitrail.engines import choose
    from vitrail.engines.graph_cache import GraphCache

    graphs = GraphCache(model)
    if not graphs.usable or not choose.installed() or choose.remembered(graphs, opened.precision):
        return opened
    seconds = choose.seconds_on(opened, graphs, images, batch_size)
    if seconds < choose.WORTH_SECONDS:
        return opened
    logger.info(
        "torch would take about %.0f s for %d pictures: looking for a quicker engine", seconds, images
    )
    found: Engine = choose.measure(graphs, opened.network, opened, opened.precision, batch_size)
    return found


def _quick(model: str | Path, engine: str, device: str, precision: str) -> Engine | None:
    """The quick engine that was asked for, or that is known to be the best here; None means torch."""
    asked = engine in ("onnxruntime", "openvino")
    if precision == "int8" and engine == "onnxruntime":
        raise ConfigError(
            "int8 runs in OpenVINO; got --engine onnxruntime: take --engine openvino, or leave it out."
        )
    if not asked and (engine != "auto" or device not in ("auto", "cpu")):
        return None
    from vitrail.engines import choose
    from vitrail.engines.graph_cache import GraphCache, may_have_graphs
    from vitrail.runtime import choose_device, choose_precision

    place = choose_device(device)
    if not asked and precision != "int8" and not may_have_graphs(model):
        return None
    if place.type != "cpu":
        logger.warning("engine %s runs on the CPU; on %s torch does the work", engine, place)
        return None
    graphs = GraphCache(model)
    if precision == "int8":
        return _int8(graphs)
    chosen = choose_precision(precision, place)
    why = "as chosen"
    if not asked:
        known = choose.remembered(graphs, chosen)
        if known is None or known[0] == "torch" or not graphs.usable:
            return None
        engine, why = known
    return _opened(graphs, engine, chosen, why)


def _opened(graphs: GraphCache, engine: str, precision: str, why: str) -> Engine | None:
    from vitrail.engines import choose

    try:
        if not graphs.usable:
            raise ConfigError(f"{graphs.model} was not saved by vitrail, or its weights are not its card's")
        opened: Engine = choose.open_prepared(graphs, engine, precision)
        agreement = choose.proven(graphs, opened)
    except Exception as error:
        # Whatever keeps a quick engine from starting, the answer can still be had.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        logger.warning("engine %s cannot be used (%s); torch does the work", engine, reason)
        return None
    if agreement.split(" to ")[0] not in why:
        why = f"{why}; {agreement}"
    logger.info("engine %s, %s: %s", opened.name, opened.precision, why)
    return opened


def _int8(graphs: GraphCache) -> Engine:
    """The int8 graph that `vitrail export` left in the cache."""
    from vitrail.engines.openvino import OpenVinoEngine

    path = graphs.folder() / "int8"
    if not path.is_dir():
        raise ConfigError(
            f"{graphs.model} has no int8 graph yet: vitrail export {graphs.model} --int8 --calibrate DATA makes"
            " one and measures what it costs."
        )
    opened = OpenVinoEngine(path, cache=graphs.folder() / "openvino")
    proof = opened.manifest.proof
    logger.info(
        "engine openvino, int8: the first class is torch's in %.2f %% of %s pictures (%s)",
        100 * proof.get("agreement", 0.0), proof.get("images"), proof.get("pictures"),
    )  # fmt: skip
    return opened
