"""OpenVINO on the CPU: for exported folders, for ONNX files, and for graphs that are prepared from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.export.label import Label
from vitrail.export.onnx import require
from vitrail.export.openvino import MODEL, label_of


class OpenVinoEngine:
    """An OpenVINO folder, or an ONNX file, compiled for this CPU on as many threads as torch uses.

    Args:
        path: the folder, its model.xml, or an .onnx file.
        precision: fp32, bf16 (where the chip computes in it), or int8 for a file that was quantised.
        cache: folder where compiled graphs are kept, for quicker starts.
        label: what is known of the file; by default what it carries itself.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str = "fp32",
        cache: Path | None = None,
        label: Label | None = None,
    ) -> None:
        require("openvino", extra="openvino")
        import openvino

        place = Path(path)
        core: Any = openvino.Core()
        model = core.read_model(str(place / MODEL if place.is_dir() else place))
        self.label = label_of(model, place) if label is None else label
        self.name = "openvino"
        self.precision = "int8" if self.label.precision == "int8" else precision
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        self.compiled: Any = core.compile_model(model, "CPU", options)
        self.card = self.label.card
        self.classes = int(self.compiled.output(0).partial_shape[-1].get_length())

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32 on the CPU, of uint8 images `[B, C, h, w]`."""
        found = self.compiled([images.cpu().contiguous().numpy()])
        return torch.from_numpy(found[0].copy()).float()
