"""ONNX Runtime on the CPU: for exported ONNX files, and for graphs that are prepared from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.export.label import KEY, Label
from vitrail.export.onnx import require
from vitrail.export.wrap import OUTPUTS


class OnnxEngine:
    """An ONNX file in ONNX Runtime, on as many threads as torch uses.

    label: what is known of the file; by default what it carries itself.
    """

    def __init__(self, path: str | Path, *, label: Label | None = None) -> None:
        require("onnxruntime", extra="onnx")
        import onnxruntime

        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY, "")
        self.label = Label.from_text(text, str(path)) if label is None else label
        self.name, self.precision = "onnxruntime", self.label.precision
        self.card = self.label.card
        self.classes = int(self.session.get_outputs()[0].shape[-1])

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32 on the CPU, of uint8 images `[B, C, h, w]`."""
        feed = {self.session.get_inputs()[0].name: images.cpu().contiguous().numpy()}
        return torch.from_numpy(self.session.run([OUTPUTS[0]], feed)[0])
