"""Graphs prepared for quick engines, kept beside the model that they were made from.

`MODEL/.engines/KEY/` holds graph.onnx, the engines' own compiled forms, and choice.json with what was measured.
KEY is a hash of the weights, the preprocessing and the versions that made the graph: a model that has changed
finds nothing, and the old graph is removed. Where the model's folder cannot be written, the graphs lie in
~/.cache/vitrail/engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from vitrail.config import to_dict
from vitrail.disk import write_atomically
from vitrail.export.manifest import Manifest
from vitrail.export.onnx import write_onnx
from vitrail.export.program import capture
from vitrail.export.wrap import Deployed
from vitrail.models.registry import from_pretrained
from vitrail.weights import files, shipped
from vitrail.weights.card import Card
from vitrail.weights.folder import model_folder, read_card

logger = logging.getLogger(__name__)

REVISION = 1
"""Goes up whenever the same model would be written as another graph."""

FOLDER = ".engines"
GRAPH = "graph.onnx"
MEASUREMENTS = "choice.json"


def may_have_graphs(model: str | Path) -> bool:
    """Whether a model may have graphs: a look at folders alone, where a GraphCache hashes the weights."""
    folder = model_folder(model)
    return (folder / FOLDER).is_dir() or (not _takes_graphs(folder) and fallback_folder().is_dir())


def fallback_folder() -> Path:
    """Where the graphs of models lie whose folders take none."""
    return Path.home() / ".cache/vitrail/engines"


def _takes_graphs(folder: Path) -> bool:
    """Whether graphs may be written into a model's folder; the package is not a place to write to."""
    return os.access(folder, os.W_OK) and folder.parent != shipped.ASSETS


class GraphCache:
    """The prepared graphs of one model folder, and what was measured with them."""

    def __init__(self, model: str | Path) -> None:
        self.model = model_folder(model)
        self.card: Card = read_card(self.model)
        found = files.weight_files(self.model)
        self.sha256 = files.sha256(found[0]) if len(found) == 1 else ""
        key = {
            "weights": self.sha256,
            "card": to_dict(self.card.preprocessing),
            "labels": self.card.labels,
            "torch": torch.__version__,
            "revision": REVISION,
        }
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def usable(self) -> bool:
        """Whether the model is one file of weights that its card knows, so that a hash stands for it."""
        return bool(self.sha256) and self.card.sha256 in ("", self.sha256) and bool(self.card.architecture)

    def folder(self) -> Path:
        """The folder of this model's graphs, whether there is one yet or not."""
        beside, away = self.model / FOLDER / self.key, fallback_folder() / self.key
        if (away / GRAPH).exists() and not (beside / GRAPH).exists():
            return away
        return beside if beside.exists() or _takes_graphs(self.model) else away

    def graph(self) -> Path | None:
        """The prepared graph, if there is one."""
        path = self.folder() / GRAPH
        return path if path.is_file() else None

    def prepare(self, network: Any = None) -> Path:
        """The graph, made if it is not there; that is said, and how long it took.

        network: the model's network where it is already in memory.
        """
        ready = self.graph()
        if ready is not None:
            return ready
        place = self.folder()
        logger.info("preparing a graph of %s for quick engines; this happens once", self.model)
        started = time.monotonic()
        unfinished = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        unfinished.mkdir(parents=True)
        try:
            model = from_pretrained(self.model) if network is None else network
            deployed = Deployed(model)
            program = capture(deployed, free_size=False)
            manifest = Manifest(
                card=model.card,
                outputs=program.outputs,
                normalised_inside="folded" if deployed.folded else "computed",
                source_sha256=self.sha256,
            )
            write_onnx(program, unfinished / GRAPH, manifest)
            place.mkdir(parents=True, exist_ok=True)  # it may hold an int8 graph already
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == GRAPH):
                os.replace(file, place / file.name)  # the graph last: what it needs is there when it is
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._sweep(place)
        logger.info("prepared in %.1f s, kept in %s", time.monotonic() - started, place)
        return place / GRAPH

    def measurements(self) -> dict[str, Any]:
        """What was measured with this graph, by circumstances; empty where nothing was, or it cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder() / MEASUREMENTS).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def record(self, measured: dict[str, Any]) -> None:
        """Write down what was measured; where the folder cannot be written, it is measured again next time."""
        text = json.dumps(self.measurements() | measured, indent=2) + "\n"
        with contextlib.suppress(Exception):
            write_atomically(self.folder() / MEASUREMENTS, text.encode())

    def _sweep(self, kept: Path) -> None:
        """Remove graphs of what the model beside them was before."""
        if kept.parent != self.model / FOLDER:
            return
        for other in kept.parent.iterdir():
            half_made = other.name.startswith(".")  # by another process, at this moment
            if other != kept and other.is_dir() and not half_made:
                shutil.rmtree(other, ignore_errors=True)
