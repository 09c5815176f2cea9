"""How non-local ResNets' weights are written down: torchvision's words with ours for the new blocks, and the
blobs of video-nonlocal-net (Caffe2, frame by frame).

In the first layout a file may lack the non-local blocks: they stay as initialised, and change nothing. The blobs
of the authors belong to what their code computes: scaled scores, maxima before the projections, a max-pool
without padding. Their `riv` is the running variance, whatever its name says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.models.residual_rules import BLOCK, DROPPED, blocks, convolution, linear
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.nonlocal_net import Config

STEM = "backbone.stem.layers.0"
WORDS = "{weight|bias|running_mean|running_var}"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration: whether it computes what the authors' code does."""
    theirs = (
        config.scaled and config.subsample == "before" and config.pool == "floor" and config.stem == "7x7"
    )
    return {"as_authors": theirs}


_NEW = "layer{s+1}.{b}.non_local"

TORCHVISION = Layout(
    name="torchvision",
    signature=("layer1.0.conv1.weight", "bn1.weight"),
    prefixes=("model.", "backbone."),
    rules=(
        *convolution("conv1", "bn1", STEM, fit="channels"),
        *blocks("layer{s+1}.{b}"),
        Rule(
            f"{_NEW}.{{theta|phi|g|out}}.weight", f"{BLOCK}.after.{{theta|phi|g|out}}.weight", default="fresh"
        ),
        Rule(f"{_NEW}.{{theta|phi|g|out}}.bias", f"{BLOCK}.after.{{theta|phi|g|out}}.bias", default="fresh"),
        Rule(f"{_NEW}.pair.weight", f"{BLOCK}.after.pair.weight", default="fresh"),
        Rule(f"{_NEW}.norm.{WORDS}", f"{BLOCK}.after.norm.{WORDS}", default="fresh"),
        Rule(f"{_NEW}.norm.num_batches_tracked", f"{BLOCK}.after.norm.num_batches_tracked", default="fresh"),
        linear("fc"),
    ),
    dropped=(*DROPPED, Drop("fc.*", "this model has no head", when="headless")),
)


def _blobs(conv: str, norm: str, ours: str) -> tuple[Rule, ...]:
    """A convolution over one frame and its norm, as Caffe2 names blobs."""
    return (
        Rule(f"{conv}_w", f"{ours}.conv.weight", "one_frame"),
        Rule(f"{norm}_{{s|b|rm|riv}}", f"{ours}.norm.{WORDS}"),
        Rule(f"{norm}_batches", f"{ours}.norm.num_batches_tracked", default="zeros"),  # theirs does not count
    )


_RES = "res{s+2}_{b}_branch"
_NL = "nonlocal_conv{s+2}_{b}"

CAFFE2 = Layout(
    name="caffe2",
    signature=("conv1_w", "res_conv1_bn_s"),
    requires="as_authors",
    meaning=(
        "belongs to the authors' code: build the model with scaled=True, subsample='before', pool='floor'"
    ),
    rules=(
        *_blobs("conv1", "res_conv1_bn", STEM),
        *_blobs(f"{_RES}2a", f"{_RES}2a_bn", f"{BLOCK}.layers.0"),
        *_blobs(f"{_RES}2b", f"{_RES}2b_bn", f"{BLOCK}.layers.1"),
        *_blobs(f"{_RES}2c", f"{_RES}2c_bn", f"{BLOCK}.layers.2"),
        *_blobs(f"{_RES}1", f"{_RES}1_bn", f"{BLOCK}.shortcut"),
        Rule(f"{_NL}_{{theta|phi|g|out}}_w", f"{BLOCK}.after.{{theta|phi|g|out}}.weight", "one_frame"),
        Rule(f"{_NL}_{{theta|phi|g|out}}_b", f"{BLOCK}.after.{{theta|phi|g|out}}.bias"),
        Rule(f"{_NL}_bn_{{s|b|rm|riv}}", f"{BLOCK}.after.norm.{WORDS}"),
        Rule(f"{_NL}_bn_batches", f"{BLOCK}.after.norm.num_batches_tracked", default="zeros"),
        Rule("pred_{w|b}", "head.linear.{weight|bias}", fit="classes"),
    ),
    dropped=(
        Drop("*_momentum", "the optimiser's"),
        Drop("lr", "the optimiser's"),
        Drop("model_iter", "the optimiser's"),
        Drop("pred_*", "this model has no head", when="headless"),
    ),
)

RENAMES: tuple[Layout, ...] = (TORCHVISION, CAFFE2)
