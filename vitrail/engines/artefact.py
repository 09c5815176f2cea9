"""Exported files as models: which there are, and the engine of each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import ConfigError
from vitrail.export.proof_file import check_unchanged

if TYPE_CHECKING:
    from vitrail.engines import Engine

logger = logging.getLogger(__name__)

GRAPH = "model.xml"
"""By this file a folder is known for an OpenVINO one."""

HOMES = {
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "triton": ("onnxruntime", "openvino"),
}
"""Engines that open each format, the usual one first."""


def format_of(path: str | Path) -> str | None:
    """onnx, openvino, torch or triton; None for anything that is not an exported file."""
    place = Path(path)
    if place.is_dir():
        if (place / GRAPH).is_file():
            return "openvino"
        return "triton" if (place / "config.pbtxt").is_file() and (place / "1").is_dir() else None
    if not place.is_file():
        return None
    return {".onnx": "onnx", ".pt2": "torch", ".xml": "openvino"}.get(place.suffix.lower())


def open_artefact(path: str | Path, engine: str = "auto", precision: str = "auto") -> Engine:
    """The engine of an exported file.

    Raises:
        ConfigError: an engine that does not open this format, or a precision that the file does not hold.
        WeightsError: a file without a card, a damaged one, or one that is not what the proof beside it is about.
    """
    kind = format_of(path)
    assert kind is not None
    homes = HOMES[kind]
    if engine not in ("auto", *homes):
        raise ConfigError(f"{path} is opened by {' or '.join(homes)}; got engine {engine!r}.")
    chosen = homes[0] if engine == "auto" else engine
    check_unchanged(Path(path).parent if Path(path).suffix.lower() == ".xml" else Path(path))
    place = Path(path) / "1" / "model.onnx" if kind == "triton" else Path(path)
    opened = _open(chosen, place, precision)
    if precision not in ("auto", opened.precision):
        raise ConfigError(
            f"{path} was exported in {opened.precision} and cannot compute in {precision}; export it again"
            f"{' with --int8' if precision == 'int8' else ''}, or leave --precision out."
        )
    logger.info("engine %s, %s: the exported file %s", opened.name, opened.precision, path)
    return opened


def _open(engine: str, place: Path, precision: str) -> Engine:
    if engine == "onnxruntime":
        from vitrail.engines.onnx import OnnxEngine

        return OnnxEngine(place)
    if engine == "openvino":
        from vitrail.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(place, precision="bf16" if precision == "bf16" else "fp32")
    from vitrail.engines.program import ProgramEngine

    return ProgramEngine(place)
