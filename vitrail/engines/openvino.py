"""OpenVINO on the CPU: for exported folders, for ONNX files, and for graphs that are prepared from a folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.engines.outside import classes_of, feed, needed, record
from vitrail.errors import require
from vitrail.export.manifest import Manifest, damaged
from vitrail.export.openvino import MODEL, manifest_of
from vitrail.runtime import has_bfloat16


class OpenVinoEngine:
    """An OpenVINO folder, or an ONNX file, compiled for this CPU.

    A call computes on as many threads as torch would use in the thread that calls. With fewer than when the engine
    was made, calls from several threads go side by side, each on its share of the cores.

    Args:
        path: the folder, its model.xml, or an .onnx file.
        precision: fp32, bf16 (where the chip computes in it), or int8 for a file that was quantised.
        cache: folder where compiled graphs are kept, for quicker starts.
        manifest: what is known of the file; by default what it carries itself.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str = "fp32",
        cache: Path | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        require("openvino", extra="openvino")
        import openvino

        place = Path(path)
        core: Any = openvino.Core()
        try:
            model = core.read_model(str(place / MODEL if place.is_dir() else place))
        except RuntimeError as error:
            raise damaged(place, error) from error
        self.manifest = manifest_of(model, place) if manifest is None else manifest
        self.name = "openvino"
        self.precision = "int8" if self.manifest.precision == "int8" else precision
        # What int8 leaves over (norms, softmax, what was kept) is quicker in bf16, too; the proof sees it so.
        half = precision == "bf16" or (self.precision == "int8" and has_bfloat16(torch.device("cpu")))
        self.threads = torch.get_num_threads()
        self._options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        }
        if cache is not None:
            self._options["CACHE_DIR"] = str(cache)
        self._core, self._model = core, model
        self._compiled: dict[int, Any] = {}
        self._requests = threading.local()
        self._making = threading.Lock()
        self.compiled: Any = self._on(self.threads)
        self.card = self.manifest.card
        self.inputs = [entry.get_any_name() for entry in self.compiled.inputs]
        shape = self.compiled.output(0).partial_shape
        self.classes = classes_of(
            self.manifest, [size.get_length() if size.is_static else None for size in shape], place
        )

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """What the graph answers, float32 on the CPU, to uint8 images `[B, C, h, w]`: logits `[B, K]`, or the record
        of a dense model (nn.shapes). `padding` `[B, h, w]` is for detectors."""
        inputs = feed(images, padding, self.inputs, self.manifest)
        found = self._request().infer([value.numpy() for value in inputs])
        asked = needed(self.manifest.outputs)
        return record(
            asked, [found[self.manifest.outputs.index(name)].copy() for name in asked], self.card.task
        )

    def _on(self, threads: int) -> Any:
        """The graph compiled for calls on so many threads each; as many calls at a time as there are cores for."""
        with self._making:
            if threads not in self._compiled:
                streams = self.threads // threads
                hint = {"NUM_STREAMS": streams} if streams > 1 else {"PERFORMANCE_HINT": "LATENCY"}
                self._compiled[threads] = self._core.compile_model(self._model, "CPU", self._options | hint)
            return self._compiled[threads]

    def _request(self) -> Any:
        """What runs a call: each thread that calls has its own."""
        threads = min(torch.get_num_threads(), self.threads)
        kept: Any = self._requests.__dict__
        if threads not in kept:
            kept[threads] = self._on(threads).create_infer_request()
        return kept[threads]
