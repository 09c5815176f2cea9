"""How SE networks' weights are written down: timm's own, timm's `legacy` port of the Caffe networks, MMPretrain.

The tensors of a block have the same shapes everywhere, but the legacy networks compute something else with
them (stride, max-pool). Each layout therefore says which configuration its files belong to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.models.residual_rules import BLOCK, DROPPED, blocks, convolution, linear, stem
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.senet import Config

STEM = "backbone.stem.layers"
PAIR = "{weight|bias}"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration: whether it is Caffe's or timm's, and which stem it has."""
    stride = "first" if config.groups == 1 and config.block == "bottleneck" else "middle"
    return {
        "frozen": config.norm == "frozen",
        "as_caffe": config.pool == "ceil" and config.stride_in == stride,
        "as_timm": config.pool == "pad" and config.stride_in == "middle",
        "deep": config.stem == "deep",
    }


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture`; its networks of these names take no arguments that change the shape."""
    return {"architecture": "seresnet50" if name == "se_resnet20_32" else name, "model_args": {}}


def _gates(theirs: str, first: str = "fc1", second: str = "fc2") -> tuple[Rule, ...]:
    """The gate's two layers, kept as 1 x 1 convolutions everywhere but here."""
    return (
        Rule(f"{theirs}.{first}.{PAIR}", f"{BLOCK}.gate.fc1.{PAIR}", "conv1x1|copy"),
        Rule(f"{theirs}.{second}.{PAIR}", f"{BLOCK}.gate.fc2.{PAIR}", "conv1x1|copy"),
    )


TIMM = Layout(
    name="timm",
    signature=("layer1.0.conv1.weight", "layer1.0.se.fc1.weight"),
    prefixes=("model.", "backbone."),
    requires="as_timm",
    meaning="has a padded max-pool and the stride in the 3 x 3: take seresnet50 and its like",
    rules=(
        *stem("conv1", "bn1", STEM),
        *blocks("layer{s+1}.{b}"),
        *_gates("layer{s+1}.{b}.se"),
        linear("fc"),
    ),
    dropped=(*DROPPED, Drop("fc.*", "this model has no head", when="headless")),
    describe=timm_config,
)

LEGACY = Layout(
    name="legacy",
    signature=("layer1.0.conv1.weight", "layer1.0.se_module.fc1.weight"),
    prefixes=("model.", "backbone."),
    requires="as_caffe",
    meaning=(
        "is Caffe's: a max-pool that rounds up, and in SE-ResNets the stride in the first 1 x 1:"
        " take legacy_seresnet50 and its like"
    ),
    rules=(
        *convolution("layer0.conv1", "layer0.bn1", f"{STEM}.0", fit="channels"),
        *convolution("layer0.conv{i+1}", "layer0.bn{i+1}", f"{STEM}.{{i}}"),
        *blocks("layer{s+1}.{b}"),
        *_gates("layer{s+1}.{b}.se_module"),
        linear("last_linear"),
    ),
    dropped=(*DROPPED, Drop("last_linear.*", "this model has no head", when="headless")),
    describe=timm_config,
)

MMPRETRAIN = Layout(
    name="mmpretrain",
    signature=("layer1.0.conv1.weight", "layer1.0.se_layer.conv1.conv.weight"),
    prefixes=("backbone.",),
    requires="as_timm",
    meaning="has a padded max-pool and the stride in the 3 x 3: take seresnet50 and its like",
    rules=(
        *convolution("backbone.conv1", "backbone.bn1", f"{STEM}.0", fit="channels"),
        *blocks("backbone.layer{s+1}.{b}"),
        *_gates("backbone.layer{s+1}.{b}.se_layer", "conv1.conv", "conv2.conv"),
        linear("head.fc"),
    ),
    dropped=(
        *DROPPED,
        Drop("data_preprocessor.*", "mean and std are in the card"),
        Drop("head.*", "this model has no head", when="headless"),
    ),
)

RENAMES: tuple[Layout, ...] = (TIMM, LEGACY, MMPRETRAIN)
