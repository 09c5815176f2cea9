"""How PVT weights are written down: timm (v2 only), the authors' repository, and transformers.

The first layout that has a place for a network is the one in which model folders are written: timm's names,
with the authors' for what timm has not (PVT v1's positions and [CLS]).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vitrail.errors import WeightsError
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.pvt import Config

logger = logging.getLogger(__name__)

STAGE = "backbone.stages.{s}"
BLOCK = f"{STAGE}.blocks.{{j}}"
PAIR = "{weight|bias}"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration: positions halve their grid from stage to stage."""
    rows, columns = config.img_size[0] // config.patch_size, config.img_size[1] // config.patch_size
    return {"grid": (rows, columns), "resample": "bilinear-plain", "v1": config.version == 1}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args`; its network has the stem of stride 4 alone."""
    known = name.startswith("pvt_v2_b")
    arguments = {
        "embed_dims": list(config.widths),
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "mlp_ratios": list(config.mlp_ratios),
        "sr_ratios": list(config.reductions),
        "linear": config.linear,
    }
    return {"architecture": name if known else "pvt_v2_b0", "model_args": arguments}


def transformers_config(name: str, config: Config) -> dict[str, Any]:
    """transformers' PvtConfig or PvtV2Config. Raises WeightsError where its class computes something else.

    It has one eps for all norms. The authors' 1e-5 in patch embeddings and reductions becomes the blocks' 1e-6 there,
    as in transformers' own copies of the authors' weights, and this is logged: logits move by about 1e-5 of the
    largest. In the linear variants, whose reductions see smaller numbers, it can be ten times as much.
    """
    rows, columns = config.img_size
    published = (config.eps, config.entry_eps) == (1e-6, 1e-5) and not config.linear
    needs = {
        "one eps for all norms": config.eps == config.entry_eps or published,
        "square images": config.version == 2 or rows == columns,
        "patches of 4 pixels": config.version == 2 or config.patch_size == 4,
    }
    for need, met in needs.items():
        if not met:
            other = "original" if config.version == 1 else "timm"
            raise WeightsError(f"transformers' PVT has {need}, {name} has not; take the layout {other!r}.")
    if published:
        logger.warning(
            "transformers' PVT has one eps for all norms, %g, and %s has %g in patch embeddings and reductions: there"
            " its logits differ by about 1e-5 of the largest",
            config.eps, name, config.entry_eps,
        )  # fmt: skip
    stages = len(config.widths)
    strides = [config.patch_size, *[2] * (stages - 1)]
    view: dict[str, Any] = {
        "image_size": rows if rows == columns else [rows, columns],
        "num_channels": config.in_chans,
        "num_encoder_blocks": stages,
        "depths": list(config.depths),
        "hidden_sizes": list(config.widths),
        "strides": strides,
        "num_attention_heads": list(config.heads),
        "mlp_ratios": list(config.mlp_ratios),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path_rate,
        "layer_norm_eps": config.eps,
        "qkv_bias": True,
        "num_labels": config.num_classes,
    }
    if config.version == 1:
        return view | {
            "model_type": "pvt",
            "architectures": ["PvtForImageClassification"],
            "patch_sizes": strides,
            "sequence_reduction_ratios": list(config.reductions),
        }
    return view | {
        "model_type": "pvt_v2",
        "architectures": ["PvtV2ForImageClassification"],
        "patch_sizes": [2 * stride - 1 for stride in strides],
        "sr_ratios": list(config.reductions),
        "linear_attention": config.linear,
    }


TIMM = Layout(
    name="timm",
    signature=("stages.{s}.downsample.proj.weight",),
    prefixes=("model.", "backbone."),
    rules=(
        Rule(
            "patch_embed.proj.weight",
            "backbone.stages.0.entry.patches.proj.weight",
            fit="channels",
            when="!v1",
        ),
        Rule("patch_embed.proj.bias", "backbone.stages.0.entry.patches.proj.bias", when="!v1"),
        Rule(f"patch_embed.norm.{PAIR}", f"backbone.stages.0.entry.patches.norm.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.downsample.proj.{PAIR}", f"{STAGE}.entry.patches.proj.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.downsample.norm.{PAIR}", f"{STAGE}.entry.patches.norm.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.attn.q.{PAIR}", f"{BLOCK}.mixer.q.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.attn.kv.{PAIR}", f"{BLOCK}.mixer.kv.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.attn.sr.{PAIR}", f"{BLOCK}.mixer.reduce.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.attn.norm.{PAIR}", f"{BLOCK}.mixer.norm.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.mlp.dwconv.{PAIR}", f"{BLOCK}.mlp.conv.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.blocks.{{j}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}", when="!v1"),
        Rule(f"stages.{{s}}.norm.{PAIR}", f"{STAGE}.norm.{PAIR}", when="!v1"),
        Rule(f"head.{PAIR}", f"head.linear.{PAIR}", fit="classes", when="!v1"),
    ),
    dropped=(Drop("head.*", "this model has no head", when="headless"),),
    describe=timm_config,
)

ORIGINAL = Layout(
    name="original",
    signature=("patch_embed1.proj.weight",),
    prefixes=("backbone.",),
    rules=(
        Rule("pos_embed{s+1}", f"{STAGE}.entry.positions.table", fit="pyramid"),
        Rule("cls_token", f"{STAGE}.entry.prefix.cls"),
        Rule("patch_embed1.proj.weight", "backbone.stages.0.entry.patches.proj.weight", fit="channels"),
        Rule(f"patch_embed{{s+1}}.proj.{PAIR}", f"{STAGE}.entry.patches.proj.{PAIR}"),
        Rule(f"patch_embed{{s+1}}.norm.{PAIR}", f"{STAGE}.entry.patches.norm.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.attn.q.{PAIR}", f"{BLOCK}.mixer.q.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.attn.kv.{PAIR}", f"{BLOCK}.mixer.kv.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.attn.sr.{PAIR}", f"{BLOCK}.mixer.reduce.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.attn.norm.{PAIR}", f"{BLOCK}.mixer.norm.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.mlp.dwconv.dwconv.{PAIR}", f"{BLOCK}.mlp.conv.{PAIR}"),
        Rule(f"block{{s+1}}.{{j}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"norm.{PAIR}", f"{STAGE}.norm.{PAIR}", when="v1"),
        Rule(f"norm{{s+1}}.{PAIR}", f"{STAGE}.norm.{PAIR}", when="!v1"),
        Rule(f"head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(Drop("head.*", "this model has no head", when="headless"),),
)


def _transformers(
    name: str,
    model: str,
    patches: str,
    norm: str,
    block: str,
    mixer: str,
    reduce: str,
    other: tuple[Rule, ...],
) -> Layout:
    """transformers' names for one of the two versions: it keeps keys and values apart."""
    return Layout(
        name=name,
        signature=(f"{patches.format(s=0)}.{norm}.weight".removeprefix(model),),
        prefixes=(model,),
        rules=(
            Rule(f"{patches}.{norm}.{PAIR}", f"{STAGE}.entry.patches.norm.{PAIR}"),
            Rule(f"{block}.layer_norm_1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
            Rule(f"{block}.{mixer}.query.{PAIR}", f"{BLOCK}.mixer.q.{PAIR}"),
            Rule(
                (f"{block}.{mixer}.key.{PAIR}", f"{block}.{mixer}.value.{PAIR}"), f"{BLOCK}.mixer.kv.{PAIR}"
            ),
            Rule(f"{block}.{mixer}.{reduce}.{PAIR}", f"{BLOCK}.mixer.reduce.{PAIR}"),
            Rule(f"{block}.{mixer}.sr.{PAIR}", f"{BLOCK}.mixer.reduce.{PAIR}"),
            Rule(f"{block}.{mixer}.layer_norm.{PAIR}", f"{BLOCK}.mixer.norm.{PAIR}"),
            Rule(f"{block}.layer_norm_2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
            Rule(f"{block}.mlp.{{dense1|dense2}}.weight", f"{BLOCK}.mlp.{{fc1|fc2}}.weight"),
            Rule(f"{block}.mlp.{{dense1|dense2}}.bias", f"{BLOCK}.mlp.{{fc1|fc2}}.bias"),
            *other,
            Rule(f"classifier.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
        ),
        dropped=(Drop("classifier.*", "this model has no head", when="headless"),),
        describe=transformers_config,
    )


_V1 = "pvt.encoder.patch_embeddings.{s}"
_V2 = "pvt_v2.encoder.layers.{s}"

TRANSFORMERS = _transformers(
    "transformers", "pvt.", _V1, "layer_norm", "pvt.encoder.block.{s}.{j}", "attention.self", "sequence_reduction",
    (
        Rule(f"{_V1}.position_embeddings", f"{STAGE}.entry.positions.table", fit="pyramid"),
        Rule(f"{_V1}.cls_token", f"{STAGE}.entry.prefix.cls"),
        Rule(f"{_V1}.projection.weight", f"{STAGE}.entry.patches.proj.weight", fit="channels"),
        Rule(f"{_V1}.projection.bias", f"{STAGE}.entry.patches.proj.bias"),
        Rule("pvt.encoder.block.{s}.{j}.attention.output.dense." + PAIR, f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"pvt.encoder.layer_norm.{PAIR}", f"{STAGE}.norm.{PAIR}"),
    ),
)  # fmt: skip

TRANSFORMERS_V2 = _transformers(
    "transformers-v2", "pvt_v2.", f"{_V2}.patch_embedding", "layer_norm", f"{_V2}.blocks.{{j}}", "attention",
    "spatial_reduction",
    (
        Rule(f"{_V2}.patch_embedding.proj.weight", f"{STAGE}.entry.patches.proj.weight", fit="channels"),
        Rule(f"{_V2}.patch_embedding.proj.bias", f"{STAGE}.entry.patches.proj.bias"),
        Rule(f"{_V2}.blocks.{{j}}.attention.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"{_V2}.blocks.{{j}}.mlp.dwconv.dwconv.{PAIR}", f"{BLOCK}.mlp.conv.{PAIR}"),
        Rule(f"{_V2}.layer_norm.{PAIR}", f"{STAGE}.norm.{PAIR}"),
    ),
)  # fmt: skip

RENAMES: tuple[Layout, ...] = (TIMM, ORIGINAL, TRANSFORMERS, TRANSFORMERS_V2)
