"""The ONNX file: one file with weights and card; of a model above 2 GB, the weights lie beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import require
from vitrail.export.manifest import KEY, Manifest
from vitrail.export.program import Program

logger = logging.getLogger(__name__)

LARGEST = 1_900_000_000
"""Bytes of weights that go into one file; protobuf ends at 2 GiB."""


LOST = 1e-8
"""Constants up to this size, which torch's ONNX optimiser takes for 0 and does not add: T2T-ViT's guard."""


def write_onnx(program: Program, path: Path, manifest: Manifest) -> None:
    """Translate a program and write it, with its manifest inside.

    Raises ConfigError where the packages are missing.
    """
    require("onnx", "onnxscript", extra="onnx")
    import torch

    optimize = not adds_next_to_nothing(program.exported)
    with quiet():
        made: Any = torch.onnx.export(
            program.exported,
            program.example,
            dynamo=True,
            optimize=optimize,
            verbose=False,
            input_names=list(program.inputs),
            output_names=list(program.outputs),
        )
    model = made.model
    if not optimize:
        _fold(model)
    model.metadata_props[KEY] = manifest.to_text()
    model.doc_string = description(program, manifest)
    _name_sizes(model, program.free_size)
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    made.save(str(path), external_data=weights > LARGEST)


def adds_next_to_nothing(exported: Any) -> bool:
    """Whether a program adds or subtracts a constant that is not 0, and that the optimiser would leave out."""
    return any(
        node.op == "call_function"
        and str(node.target).startswith(("aten.add.", "aten.sub.", "aten.add_.", "aten.sub_.", "aten.rsub."))
        and any(isinstance(value, float) and 0 < abs(value) <= LOST for value in node.args)
        for node in exported.graph.nodes
    )


def _fold(model: Any) -> None:
    """What the optimiser does that cannot lose a summand: constants are computed ahead, and what is unused goes."""
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)


def description(program: Program, manifest: Manifest) -> str:
    """What a file takes and gives, for whoever opens it without vitrail."""
    wanted = manifest.card.preprocessing
    channels = {1: "one channel", 3: "RGB"}.get(wanted.in_chans, f"{wanted.in_chans} channels")
    own = "" if wanted.crop_mode == "fit" else " (the model's own: {} x {})".format(*wanted.input_size)
    size = "{} x {} pixels".format(*wanted.input_size)
    if program.free_size:
        size = f"h {program.rows}, w {program.columns} pixels{own}"
    padding = (
        ", and padding: bool [N, h, w], true where there is no picture" if "padding" in program.inputs else ""
    )
    gives = ", ".join(program.outputs)
    return (
        f"Takes images: uint8 0..255, {channels}, [N, {wanted.in_chans}, h, w], {size}{padding}; normalisation is"
        f" inside, resizing is not. Gives {gives}. The metadata property {KEY} (JSON) tells preprocessing, classes,"
        " origin and proof."
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a file. Raises WeightsError where there is none, ConfigError where onnx is not installed."""
    require("onnx", extra="onnx")
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return Manifest.from_text(properties.get(KEY, ""), str(path))


def replace_manifest(path: Path, manifest: Manifest) -> None:
    """Put another manifest into a file; the graph and the weights stay as they are."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=KEY, value=manifest.to_text())])
    onnx.save(model, str(path))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What exporters say while they work is for their authors: deprecations, progress, telemetry."""
    from_libraries = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "nncf", "onnx_ir")]
    before = [log.level for log in from_libraries]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in from_libraries:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(from_libraries, before, strict=True):
                log.setLevel(level)


def _name_sizes(model: Any, free_size: bool) -> None:
    """Give the free sizes of the inputs words for names, in place of the tracer's numbers."""
    old: dict[str, str] = {}
    for entry in model.graph.inputs:
        words = (
            ("batch", "channels", "rows", "columns")
            if len(entry.shape) == 4
            else ("batch", "rows", "columns")
        )
        for size, word in zip(entry.shape, words, strict=True):
            if not isinstance(size, int):
                old.setdefault(str(size), word)
    if len(set(old.values())) != (3 if free_size else 1):
        return
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for place, size in enumerate(value.shape or ()):
            if str(size) in old:
                value.shape[place] = old[str(size)]


def remove(path: Path) -> None:
    """Remove a file and the weights beside it."""
    for place in (path, path.with_name(path.name + ".data")):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
