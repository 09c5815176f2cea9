"""The OpenVINO folder: model.xml, model.bin, and the card in the model's rt_info.

Made from the ONNX graph by the runtime's own reader. (The converter of the `openvino` package would read the
program directly, but it reports its use over the network.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrail.errors import require
from vitrail.export.manifest import KEY, Manifest, damaged

MODEL = "model.xml"
"""The file of the graph; the weights are model.bin beside it."""

FILES = (MODEL, "model.bin")
"""All that is written into a folder."""


def from_onnx(path: Path) -> Any:
    """The openvino.Model of an ONNX file."""
    require("openvino", extra="openvino")
    import openvino

    return openvino.Core().read_model(str(path))


def write_openvino(model: Any, folder: Path, manifest: Manifest) -> None:
    """Write an openvino.Model into a folder, with its manifest inside."""
    require("openvino", extra="openvino")
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    model.set_rt_info(manifest.to_text(), [KEY])
    openvino.save_model(model, str(folder / MODEL), compress_to_fp16=False)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises WeightsError where there is none, or the files are damaged."""
    require("openvino", extra="openvino")
    import openvino

    try:
        model = openvino.Core().read_model(str(folder / MODEL))
    except RuntimeError as error:
        raise damaged(folder, error) from error
    return manifest_of(model, folder)


def manifest_of(model: Any, where: Path) -> Manifest:
    """The manifest inside an openvino.Model, whether it was read from a folder or from an ONNX file."""
    for place in ([KEY], ["framework", KEY]):
        if model.has_rt_info(place):
            return Manifest.from_text(str(model.get_rt_info(place).value), str(where))
    return Manifest.from_text("", str(where))
