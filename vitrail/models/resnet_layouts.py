"""How ResNet weights are written down: torchvision and timm (the same words), DETR's backbone, and MMPretrain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.models.residual_rules import DROPPED, blocks, convolution, linear, stem
from vitrail.weights.adapter import Drop, Layout

if TYPE_CHECKING:
    from vitrail.models.resnet import Config

STEM = "backbone.stem.layers"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    return {"frozen": config.norm == "frozen", "deep": config.stem == "deep"}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args`; its networks have the 7 x 7 stem."""
    arguments = {
        "layers": list(config.depths),
        "cardinality": config.groups,
        "base_width": config.group_width,
    }
    return {"architecture": "resnet18" if name == "resnet20_32" else name, "model_args": arguments}


TORCHVISION = Layout(
    name="torchvision",
    signature=("layer1.0.conv1.weight", "bn1.weight"),
    prefixes=("model.", "backbone.0.body.", "backbone."),
    rules=(
        *stem("conv1", "bn1", STEM),
        *blocks("layer{s+1}.{b}"),
        linear("fc"),
    ),
    dropped=(*DROPPED, Drop("fc.*", "this model has no head", when="headless")),
    describe=timm_config,
)

MMPRETRAIN = Layout(
    name="mmpretrain",
    signature=("layer1.0.conv1.weight", "head.fc.weight"),
    prefixes=("backbone.",),
    rules=(
        *convolution("backbone.conv1", "backbone.bn1", f"{STEM}.0", fit="channels"),
        *blocks("backbone.layer{s+1}.{b}"),
        linear("head.fc"),
    ),
    dropped=(
        *DROPPED,
        Drop("data_preprocessor.*", "mean and std are in the card"),
        Drop("head.*", "this model has no head", when="headless"),
    ),
)

RENAMES: tuple[Layout, ...] = (TORCHVISION, MMPRETRAIN)
