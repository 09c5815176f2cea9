"""How Trans2Seg weights are written down by the authors (xieenze/Trans2Seg).

Their files hold parts that never enter a result, a good third of all numbers; those are left out by name. The last
decoder layer's MLP along the map is ours alone to keep, so its number is told by the depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.models.residual_rules import DROPPED, blocks, convolution, stem
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.trans2seg import Config

PAIR = "{weight|bias}"
VIT = "transformer_head.transformer.vit"
HEAD = "transformer_head"
ENTRY = "head.encoder.entry"
BLOCK = "head.encoder.blocks.{i}"

DEPTHS = range(1, 25)
"""Depths for which the last layer's number is written out."""

UNUSED = "enters no result in the original either"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    from vitrail.models.backbones import backbone_config

    changed = backbone_config(config.backbone, config.in_chans, **config.backbone_changes)
    stride = 4 * 2 ** (3 - getattr(changed, "dilated", 0))
    return {
        "grid": (-(-config.img_size[0] // stride), -(-config.img_size[1] // stride)),
        "prefix": 1,
        "resample": "bilinear-corners",
        "published": config.numerics == "published",
        "deep": getattr(changed, "stem", "") == "deep",
        f"depth{config.depth}": True,
    }


def _separable(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *convolution(f"{HEAD}.{theirs}.block.depthwise", f"{HEAD}.{theirs}.block.bn_depth", f"{ours}.depth"),
        *convolution(f"{HEAD}.{theirs}.block.pointwise", f"{HEAD}.{theirs}.block.bn_point", f"{ours}.point"),
    )


def _last_maps() -> tuple[Rule, ...]:
    """The norm and MLP along the map of the last layer, for each depth."""
    rules: list[Rule] = []
    for depth in DEPTHS:
        layer, when = f"{VIT}.blocks_decoder.{depth - 1}", f"depth{depth}"
        rules.append(Rule(f"{layer}.norm4.{PAIR}", f"head.grid_mlp.norm.{PAIR}", when=when))
        rules.append(Rule(f"{layer}.mlp3.fc1.{PAIR}", f"head.grid_mlp.mlp.fc1.{PAIR}", when=when))
        rules.append(Rule(f"{layer}.mlp3.fc2.{PAIR}", f"head.grid_mlp.mlp.fc2.{PAIR}", when=when))
    return tuple(rules)


def _last_unused() -> tuple[Drop, ...]:
    """What the last layer makes of queries and tokens."""
    return tuple(
        Drop(f"{VIT}.blocks_decoder.{depth - 1}.{part}.*", UNUSED, when=f"depth{depth}")
        for depth in DEPTHS
        for part in ("attn.proj", "norm2", "norm3", "mlp", "mlp2")
    )


_LAYER, _OURS = f"{VIT}.blocks_decoder.{{i}}", "head.layers.{i}"

ORIGINAL = Layout(
    name="original",
    signature=(f"{VIT}.cls_embed",),
    requires="published",
    meaning="holds weights of the released code, which computes something else: take trans2seg_medium and its like",
    rules=(
        *stem("encoder.conv1", "encoder.bn1", "backbone.stem.layers"),
        *blocks("encoder.layer{s+1}.{b}"),
        Rule(f"{VIT}.hybrid_embed.proj.{PAIR}", f"{ENTRY}.patches.proj.{PAIR}", "to_conv1x1|copy"),
        Rule(f"{VIT}.cls_token", f"{ENTRY}.prefix.cls"),
        Rule(f"{VIT}.pos_embed", f"{ENTRY}.positions.table", fit="positions"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.attn.qkv.weight", f"{BLOCK}.mixer.qkv.weight"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"{VIT}.blocks_encoder.{{i}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"{VIT}.norm.{PAIR}", f"head.encoder.norm.{PAIR}"),
        Rule(f"{VIT}.cls_embed", "head.queries", fit="classes"),
        Rule(f"{_LAYER}.norm1_clsembed.{PAIR}", f"{_OURS}.query_norm.{PAIR}"),
        Rule(f"{_LAYER}.norm1.{PAIR}", f"{_OURS}.token_norm.{PAIR}"),
        Rule(f"{_LAYER}.attn.fc_q.weight", f"{_OURS}.query.weight"),
        Rule(f"{_LAYER}.attn.fc_kv.weight", f"{_OURS}.key_value.weight"),
        Rule(f"{_LAYER}.attn.proj.{PAIR}", f"{_OURS}.proj.{PAIR}"),
        Rule(f"{_LAYER}.norm2.{PAIR}", f"{_OURS}.norm2.{PAIR}"),
        Rule(f"{_LAYER}.mlp.fc1.{PAIR}", f"{_OURS}.mlp.fc1.{PAIR}"),
        Rule(f"{_LAYER}.mlp.fc2.{PAIR}", f"{_OURS}.mlp.fc2.{PAIR}"),
        Rule(f"{_LAYER}.norm3.{PAIR}", f"{_OURS}.norm3.{PAIR}"),
        Rule(f"{_LAYER}.mlp2.fc1.{PAIR}", f"{_OURS}.token_mlp.fc1.{PAIR}"),
        Rule(f"{_LAYER}.mlp2.fc2.{PAIR}", f"{_OURS}.token_mlp.fc2.{PAIR}"),
        *_last_maps(),
        *convolution(f"{HEAD}.conv_c1.conv", f"{HEAD}.conv_c1.bn", "head.detail"),
        *_separable("lay1", "head.join"),
        *_separable("lay2", "head.refine"),
        *_separable("lay3", "head.finish"),
        Rule(f"{HEAD}.pred.{PAIR}", f"head.score.{PAIR}"),
    ),
    dropped=(
        *DROPPED,
        Drop("encoder.fc.*", "the class layer of the backbone's first training"),
        Drop(f"{VIT}.blocks_decoder.{{i}}.norm4.*", UNUSED),
        Drop(f"{VIT}.blocks_decoder.{{i}}.mlp3.*", UNUSED),
        *_last_unused(),
    ),
)

RENAMES: tuple[Layout, ...] = (ORIGINAL,)
