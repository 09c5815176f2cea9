"""How SETR weights are written down: by the authors (fudan-zvg/SETR), and by mmsegmentation.

mmsegmentation's multi-level neck answers its streams deepest first, so its head numbers them the other way round,
and the class layer's four blocks of inputs are reversed. Its convolutions have no bias (the authors' have one, in
front of a norm), and its auxiliary heads of MLA have one that the authors' have not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.setr import Config

ENTRY = "backbone.stages.0.entry"
BLOCK = "backbone.stages.0.blocks.{i}"
PAIR = "{weight|bias}"
NORM = "{weight|bias|running_mean|running_var}"

UNUSED = "inherited by the original, never called"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    from vitrail.models.backbones import backbone_config

    patch = backbone_config(config.backbone, config.in_chans, **config.backbone_changes).patch_size
    return {
        "grid": (config.img_size[0] // patch[0], config.img_size[1] // patch[1]),
        "prefix": 1,
        "resample": "bilinear-plain",
        "mla": config.decoder == "mla",
        "alone": not config.auxiliary,
        f"convs{len(config.growth)}": True,
        f"auxiliary{len(config.auxiliary_growth)}": True,
    }


def _normed(conv: str, norm: str, ours: str, bias: str = "") -> tuple[Rule, ...]:
    """A convolution and its batch norm; `bias` is what ours becomes where theirs has none."""
    biases = (Rule(f"{conv}.bias", f"{ours}.conv.bias", default=bias, when="!mla"),)
    return (
        Rule(f"{conv}.weight", f"{ours}.conv.weight"),
        *biases,
        Rule(f"{norm}.{NORM}", f"{ours}.norm.{NORM}"),
        Rule(f"{norm}.num_batches_tracked", f"{ours}.norm.num_batches_tracked", default="zeros"),
    )


def _classes(theirs: str, ours: str, when: str = "") -> tuple[Rule, ...]:
    return (Rule(f"{theirs}.{PAIR}", f"{ours}.linear.{PAIR}", fit="classes", when=when),)


ORIGINAL = Layout(
    name="original",
    signature=("backbone.blocks.{i}.norm1.weight",),
    rules=(
        Rule("backbone.cls_token", f"{ENTRY}.prefix.cls"),
        Rule("backbone.pos_embed", f"{ENTRY}.positions.table", fit="positions"),
        Rule("backbone.patch_embed.proj.weight", f"{ENTRY}.patches.proj.weight", fit="patch"),
        Rule("backbone.patch_embed.proj.bias", f"{ENTRY}.patches.proj.bias"),
        Rule("backbone.blocks.{i}.{norm1|norm2}.weight", f"{BLOCK}.{{norm1|norm2}}.weight"),
        Rule("backbone.blocks.{i}.{norm1|norm2}.bias", f"{BLOCK}.{{norm1|norm2}}.bias"),
        Rule(f"backbone.blocks.{{i}}.attn.qkv.{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"),
        Rule(f"backbone.blocks.{{i}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule("backbone.blocks.{i}.mlp.{fc1|fc2}.weight", f"{BLOCK}.mlp.{{fc1|fc2}}.weight"),
        Rule("backbone.blocks.{i}.mlp.{fc1|fc2}.bias", f"{BLOCK}.mlp.{{fc1|fc2}}.bias"),
        # naive and PUP: the class layer is the convolution after the last normed one
        Rule(f"decode_head.norm.{PAIR}", f"head.norm.norm.{PAIR}"),
        *_normed("decode_head.conv_{k}", "decode_head.syncbn_fc_{k}", "head.convs.{k}"),
        *_classes("decode_head.conv_1", "head", "!mla convs1"),
        *_classes("decode_head.conv_2", "head", "!mla convs2"),
        *_classes("decode_head.conv_3", "head", "!mla convs3"),
        *_classes("decode_head.conv_4", "head", "!mla convs4"),
        Rule(f"auxiliary_head.{{j}}.norm.{PAIR}", f"auxiliary.{{j}}.norm.norm.{PAIR}"),
        *_normed(
            "auxiliary_head.{j}.conv_{k}", "auxiliary_head.{j}.syncbn_fc_{k}", "auxiliary.{j}.convs.{k}"
        ),
        *_classes("auxiliary_head.{j}.conv_1", "auxiliary.{j}", "!mla auxiliary1"),
        *_classes("auxiliary_head.{j}.conv_2", "auxiliary.{j}", "!mla auxiliary2"),
        # MLA
        Rule(f"backbone.norm_{{k}}.{PAIR}", f"neck.norms.{{k}}.norm.{PAIR}"),
        *_normed("backbone.mla.mla_p{k+2}_1x1.0", "backbone.mla.mla_p{k+2}_1x1.1", "neck.reduce.{k}"),
        *_normed("backbone.mla.mla_p{k+2}.0", "backbone.mla.mla_p{k+2}.1", "neck.smooth.{k}"),
        *_normed(
            "decode_head.mlahead.head{k+2}.{3*c}",
            "decode_head.mlahead.head{k+2}.{3*c+1}",
            "head.streams.{k}.{c}",
        ),
        *_classes("decode_head.cls", "head", "mla"),
        Rule("auxiliary_head.{j}.aux.weight", "auxiliary.{j}.linear.weight", fit="classes", when="mla"),
    ),
    dropped=(
        Drop("decode_head.conv_seg.*", UNUSED),
        Drop("auxiliary_head.{j}.conv_seg.*", UNUSED),
        Drop("auxiliary_head.*", "this model has no auxiliary heads", when="alone"),
    ),
)

MMSEGMENTATION = Layout(
    name="mmsegmentation",
    signature=("backbone.layers.{i}.ln1.weight",),
    rules=(
        Rule("backbone.cls_token", f"{ENTRY}.prefix.cls"),
        Rule("backbone.pos_embed", f"{ENTRY}.positions.table", fit="positions"),
        Rule("backbone.patch_embed.projection.weight", f"{ENTRY}.patches.proj.weight", fit="patch"),
        Rule("backbone.patch_embed.projection.bias", f"{ENTRY}.patches.proj.bias"),
        Rule(f"backbone.layers.{{i}}.ln1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ln2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.attn.attn.in_proj_{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.attn.attn.out_proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ffn.layers.0.0.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ffn.layers.1.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"decode_head.norm.{PAIR}", f"head.norm.norm.{PAIR}"),
        *_normed(
            "decode_head.up_convs.{k}.0.conv", "decode_head.up_convs.{k}.0.bn", "head.convs.{k}", "zeros"
        ),
        *_classes("decode_head.conv_seg", "head", "!mla"),
        Rule(f"auxiliary_head.{{j}}.norm.{PAIR}", f"auxiliary.{{j}}.norm.norm.{PAIR}"),
        *_normed(
            "auxiliary_head.{j}.up_convs.{k}.0.conv",
            "auxiliary_head.{j}.up_convs.{k}.0.bn",
            "auxiliary.{j}.convs.{k}",
            "zeros",
        ),
        *_classes("auxiliary_head.{j}.conv_seg", "auxiliary.{j}", "!mla"),
        Rule(f"neck.norm.{{k}}.{PAIR}", f"neck.norms.{{k}}.norm.{PAIR}"),
        *_normed("neck.mla.channel_proj.{k}.conv", "neck.mla.channel_proj.{k}.bn", "neck.reduce.{k}"),
        *_normed("neck.mla.feat_extract.{3-k}.conv", "neck.mla.feat_extract.{3-k}.bn", "neck.smooth.{k}"),
        *_normed(
            "decode_head.mlahead.head{5-k}.{3*c}",
            "decode_head.mlahead.head{5-k}.{3*c+1}",
            "head.streams.{k}.{c}",
        ),
        Rule(
            "decode_head.conv_seg.weight", "head.linear.weight", "reversed_inputs", fit="classes", when="mla"
        ),
        Rule("decode_head.conv_seg.bias", "head.linear.bias", fit="classes", when="mla"),
        Rule(
            "auxiliary_head.{3-j}.conv_seg.weight", "auxiliary.{j}.linear.weight", fit="classes", when="mla"
        ),
    ),
    dropped=(
        Drop("auxiliary_head.*", "this model has no auxiliary heads", when="alone"),
        Drop(
            "auxiliary_head.{j}.conv_seg.bias",
            "our auxiliary heads have no bias, as the authors'; they serve training alone",
            when="mla",
        ),
    ),
)

RENAMES: tuple[Layout, ...] = (ORIGINAL, MMSEGMENTATION)
