"""A torch.export program (.pt2) on PyTorch, without the code of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.export.label import Label
from vitrail.export.torch_program import read_label


class ProgramEngine:
    """An exported torch program on the CPU. Loading one runs torch's own reader: open only files you trust."""

    def __init__(self, path: str | Path, *, label: Label | None = None) -> None:
        self.label = read_label(Path(path)) if label is None else label
        self.network: Any = torch.export.load(path).module()
        self.name, self.precision = "torch program", self.label.precision
        self.card = self.label.card
        self.classes = int(self.card.num_classes or 0)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32 on the CPU, of uint8 images `[B, C, h, w]`."""
        with torch.no_grad():
            logits: Tensor = self.network(images.cpu())[0]
        return logits
