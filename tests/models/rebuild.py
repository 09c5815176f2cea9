"""Weights and pictures of a golden file, brought into a model of ours; and how far two results are apart."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from parity_table import Difference, measured
from torch import Tensor

from vitrail.models import loading, registry
from vitrail.models.classifier import Classifier
from vitrail.weights import adapter


def built(
    name: str, golden: dict[str, Any], case: dict[str, Any], fill: ModuleType, **changes: Any
) -> Classifier:
    """The variant in float64, in evaluation mode, with the weights that the names of the golden file stand for."""
    if "img_size" in case["build"]:
        changes["img_size"] = case["build"]["img_size"]
    torch.manual_seed(0)
    model = registry.create_model(name, **changes)
    shapes = {key: tuple(shape) for key, shape in golden["tensors"]}
    shapes |= {key: tuple(shape) for key, shape in case.get("tensor_shapes_that_differ", [])}
    weights = {
        key: value for key, value in fill.fill(shapes).items() if key not in case["kept_as_constructed"]
    }
    filled = case["filled"]
    assert sum(value.size for value in weights.values()) == filled["values"]
    assert np.isclose(sum(value.astype(np.float64).sum() for value in weights.values()), filled["sum"])
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    for key in case["kept_as_constructed"]:  # ours computes it too; only its place is taken
        state[key] = model.state_dict()["backbone.stages.2.entry.positions.table"]
    family = registry.family_of(name)
    ours, receipt = adapter.read(
        state, family.RENAMES, loading.shapes(model), loading.context(family, model.config)
    )
    assert len(receipt.used) == len(shapes) and not receipt.dropped
    model.load_state_dict(ours, strict=False)
    return model.double().eval()


def picture(case: dict[str, Any], fill: ModuleType) -> Tensor:
    """The input of a case."""
    images = fill.picture(*case["input"]["shape"], name=case["input"]["name"])
    assert np.allclose(images.ravel()[:8], case["input"]["first8"])
    return torch.from_numpy(images).double()


def apart(ours: Any, theirs: Any) -> float:
    """Length of the difference over the length of the reference."""
    one = torch.as_tensor(ours, dtype=torch.float64).detach().flatten()
    other = torch.as_tensor(theirs, dtype=torch.float64).flatten()
    return float((one - other).norm() / other.norm())


def parameters(name: str) -> int:
    """Trained numbers of a variant, built without memory."""
    with torch.device("meta"):
        model = registry.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def agree(model: Classifier, golden_case: dict[str, Any], fill: ModuleType) -> Difference:
    """The larger of two relative differences: of the first logits, and of the length of all."""
    with torch.inference_mode():
        logits = model(picture(golden_case, fill))
    expected = golden_case["float64"]
    assert list(logits.shape) == golden_case["logits_shape"]
    found = max(apart(logits[:, :16], expected["first16"]), apart(logits.norm(), expected["l2"]))
    return measured(found, model, "the authors' code", golden_case["input"]["shape"][-2:])
