"""`vitrail inspect`: the figures of the papers, for a model of one's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.config import finite
from vitrail.data.image import SUFFIXES, decode
from vitrail.data.sources import open_pictures
from vitrail.data.transforms import Preprocess, normalise
from vitrail.disk import write_atomically
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError
from vitrail.explain.anatomy import Anatomy, anatomy
from vitrail.explain.anatomy_figures import figures
from vitrail.jobs.opening import open_network
from vitrail.runs import InspectRun

logger = logging.getLogger(__name__)

BATCH = 4
"""Pictures that go through the network together: the attention of all layers is kept of them."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was found, in numbers and in files."""

    anatomy: Anatomy
    note: str
    files: tuple[Path, ...]

    @property
    def model(self) -> str:
        return self.anatomy.model

    @property
    def findings(self) -> list[tuple[str, str]]:
        return ([("note", self.note)] if self.note else []) + self.anatomy.findings()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.anatomy.to_dict(), "note": self.note, "files": [str(path) for path in self.files]}


def inspect(run: InspectRun) -> Inspected:
    """Draw what the model's weights tell, and, over pictures, what its heads, gates and tokens do.

    Raises ModelError for a name that means nothing, DataError for pictures that are not there.
    """
    if run.samples < 1:
        raise ConfigError(f"samples must be at least 1; got {run.samples}.")
    network, note = open_network(run.model)
    engine = TorchEngine(network, device=run.device, precision="fp32")
    found = anatomy(engine.network, _batches(run, engine))
    if not run.images:
        logger.info("No pictures were given: attention distance, heads, gates and norms are left out.")
    folder = Path(run.output) if run.output else Path("inspect") / Path(run.model).name
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data in figures(found).items():
        files.append(folder / f"{name}.png")
        write_atomically(files[-1], data)
    files.append(folder / "inspect.json")
    told = finite({**found.to_dict(), "note": note})
    write_atomically(
        files[-1], (json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
    return Inspected(anatomy=found, note=note, files=tuple(files))


def _batches(run: InspectRun, engine: TorchEngine) -> Iterator[Tensor]:
    """Some of the pictures, chosen by the seed, normalised and on the device."""
    wanted = engine.card.preprocessing
    preprocess = Preprocess(wanted)
    pictures = [preprocess(decode(data, name=name)) for name, data in _chosen(run)]
    for first in range(0, len(pictures), BATCH):
        yield normalise(torch.stack(pictures[first : first + BATCH]).to(engine.runtime.device), wanted)


def _chosen(run: InspectRun) -> Iterator[tuple[str, Any]]:
    """Names and contents of pictures that are named, or of some out of folders and archives."""
    order = np.random.default_rng(run.seed)
    files = [path for path in run.images if Path(path).suffix.lower() in SUFFIXES]
    yield from ((path, path) for path in files)
    others = [path for path in run.images if path not in files]
    if others:
        source = open_pictures(others)
        for number in order.permutation(len(source))[: max(0, run.samples - len(files))].tolist():
            yield source.name(number), source.read(number)
