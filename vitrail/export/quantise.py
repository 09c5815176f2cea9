"""int8 after training: weights by channel, activations by what calibration pictures showed (NNCF on OpenVINO).

If the answers differ beyond the bounds, layers that are known to be sensitive stay in float32, a group more at each
try, until the bound holds or nothing is left to keep: first depthwise convolutions (a few weights a channel, and one
scale for channels of very different strength: behind quantised products they cost PVT v2 two thirds of its answers),
then the patch embedding and the head (few products, much influence), then the second layers of the MLPs (their
inputs, after the GELU, have far outliers), then the products of attention. What was kept is reported.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.errors import require
from vitrail.export.onnx import quiet
from vitrail.export.openvino import from_onnx

logger = logging.getLogger(__name__)


class Rung(NamedTuple):
    """One way of quantising: what stays in float32, in words and as the parts of the network."""

    words: str
    parts: tuple[str, ...]
    smooth: float = -1.0
    """How much of an activation's outliers goes over into the weights before it (SmoothQuant's alpha); -1: nothing."""


PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")

# SmoothQuant is mild: NNCF's own strength cost PVT v2 half of its answers (docs/log.md).
LADDER = (
    Rung("everything is int8", ()),
    Rung("depthwise convolutions stay in float32", ("depthwise",)),
    Rung(
        "everything is int8, depthwise convolutions excepted, outliers smoothed", ("depthwise",), smooth=0.5
    ),
    Rung("patch embedding and head stay in float32", ("depthwise", "stem", "head")),
    Rung(
        "patch embedding, head and the MLPs' second layers stay in float32",
        ("depthwise", "stem", "head", "fc2"),
    ),
    Rung(
        "only the MLPs' first layers and the projections of attention are int8",
        ("depthwise", "stem", "head", "fc2", "products"),
    ),
)


def ladder(onnx: Path) -> list[Rung]:
    """The ways to try with the network of an ONNX file, one after the other: one without depthwise convolutions needs
    no try that keeps them alone."""
    depthwise = "depthwise" in _parts(onnx).values()
    return [rung for rung in LADDER if depthwise or rung.parts != ("depthwise",) or rung.smooth >= 0]


def quantise(onnx: Path, batches: Sequence[Any], rung: Rung) -> Any:
    """The openvino.Model in int8 of an ONNX file.

    batches: numpy uint8 `[B, C, h, w]` for the calibration.
    """
    require("openvino", "nncf", extra="openvino")
    with quiet():
        import nncf

        model = from_onnx(onnx)
        kept = _names(model, onnx, rung.parts)
        made: Any = nncf.quantize(
            model,
            nncf.Dataset(list(batches)),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=rung.smooth)
            ),
            ignored_scope=nncf.IgnoredScope(names=kept, validate=False) if kept else None,
        )
    return made


def quantised_products(model: Any) -> tuple[int, int]:
    """How many matrix products and convolutions of an openvino.Model are int8, and how many there are."""
    products = [node for node in model.get_ops() if node.get_type_name() in PRODUCTS]
    done = [node for node in products if any("FakeQuantize" in _before(node, place) for place in (0, 1))]
    return len(done), len(products)


def _before(node: Any, place: int) -> set[str]:
    """Kinds of the operations that an input comes through, as far as they only move numbers."""
    seen: set[str] = set()
    while True:
        node = node.input_value(place).get_node()
        kind = node.get_type_name()
        seen.add(kind)
        if kind not in (
            "Multiply",
            "Subtract",
            "Convert",
            "Reshape",
            "Transpose",
            "Unsqueeze",
            "Squeeze",
            "Gather",
        ):
            return seen
        place = 0


def _names(model: Any, onnx: Path, parts: tuple[str, ...]) -> list[str]:
    """Operations of the openvino.Model that belong to parts of the network."""
    if not parts:
        return []
    wanted = {name for name, part in _parts(onnx).items() if part in parts}
    return [
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() in PRODUCTS and operation.get_friendly_name().split("/")[0] in wanted
    ]


def _parts(onnx: Path) -> dict[str, str]:
    """The part of the network that each product of an ONNX file belongs to, by its name."""
    import onnx as library

    graph = library.load(str(onnx), load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return {
        node.name: _part(node, shapes.get(node.input[1], ()))
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv")
    }


def _part(node: Any, weight: tuple[int, ...]) -> str:
    """The part of a product with a weight of this shape, by the names of the modules around it."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    if groups > 1 and weight[1:2] == (1,):
        return "depthwise"
    scopes = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "[]")
    names = [name for name in ast.literal_eval(scopes) if name]
    owner = names[-2] if len(names) > 1 else ""  # the last name is the operation's own
    if ".entry" in owner:
        return "stem"
    if owner.startswith("network.head"):
        return "head"
    if owner.endswith(".fc2"):
        return "fc2"
    return "products" if owner.endswith((".mixer", ".body")) else ""
