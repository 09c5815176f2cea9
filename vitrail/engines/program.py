"""A torch.export program (.pt2) on PyTorch, without the code of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.engines.outside import feed, record
from vitrail.export.manifest import Manifest
from vitrail.export.torch_program import read_manifest
from vitrail.export.wrap import takes_padding


class ProgramEngine:
    """An exported torch program on the CPU. Loading one runs torch's own reader: open only files you trust."""

    def __init__(self, path: str | Path, *, manifest: Manifest | None = None) -> None:
        self.manifest = read_manifest(Path(path)) if manifest is None else manifest
        self.network: Any = torch.export.load(path).module()
        self.name, self.precision = "torch program", self.manifest.precision
        self.card = self.manifest.card
        self.classes = int(self.card.num_classes or 0)

        self.inputs = ("images", "padding") if takes_padding(self.card) else ("images",)

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """What the program answers, float32 on the CPU, to uint8 images `[B, C, h, w]`: logits `[B, K]`, or the
        record of a dense model (nn.shapes). `padding` `[B, h, w]` is for detectors."""
        with torch.no_grad():
            found = self.network(*feed(images, padding, self.inputs, self.manifest))
        return record(self.manifest.outputs, found, self.card.task)
