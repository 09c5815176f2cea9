"""ONNX Runtime on the CPU: for exported ONNX files, and for graphs that are prepared from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.engines.outside import classes_of, feed, needed, record
from vitrail.errors import require
from vitrail.export.manifest import KEY, Manifest, damaged


class OnnxEngine:
    """An ONNX file in ONNX Runtime, on as many threads as torch uses.

    manifest: what is known of the file; by default what it carries itself.
    """

    def __init__(self, path: str | Path, *, manifest: Manifest | None = None) -> None:
        require("onnxruntime", extra="onnx")
        import onnxruntime

        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own kinds, which share no parent
            raise damaged(path, error) from error
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY, "")
        self.manifest = Manifest.from_text(text, str(path)) if manifest is None else manifest
        self.name, self.precision = "onnxruntime", self.manifest.precision
        self.card = self.manifest.card
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.outputs = [entry.name for entry in self.session.get_outputs()]
        self.classes = classes_of(self.manifest, self.session.get_outputs()[0].shape, path)

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """What the graph answers, float32 on the CPU, to uint8 images `[B, C, h, w]`: logits `[B, K]`, or the record
        of a dense model (nn.shapes). `padding` `[B, h, w]` is for detectors."""
        inputs = feed(images, padding, self.inputs, self.manifest)
        named = {name: value.numpy() for name, value in zip(self.inputs, inputs, strict=True)}
        asked = needed(self.outputs)
        return record(asked, self.session.run(list(asked), named), self.card.task)
