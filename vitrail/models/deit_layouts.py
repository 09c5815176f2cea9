"""How DeiT weights are written down: by us and timm, the original repository, transformers, MMPretrain.

The blocks of DeiT are ViT's, and so are most of the names; what is here is what DeiT adds. Sources:
facebookresearch/deit `models.py`, `models_v2.py`, and the state dicts of the libraries named.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vitrail.errors import WeightsError
from vitrail.models import vit_layouts as plain
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.deit import Config

ENTRY, BLOCK, PAIR = plain.ENTRY, plain.BLOCK, plain.PAIR


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    prefix = 1 + config.distilled if config.position_on_prefix else 0
    rows, columns = config.patch_size
    grid = (config.img_size[0] // rows, config.img_size[1] // columns)
    return {"prefix": prefix, "grid": grid, "resample": "bicubic-plain"}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args` for a network; a network that timm lacks keeps its own name."""
    if config.parallel > 1 or config.stem != "patch":
        return {"architecture": name, "model_args": {}}
    rows, columns = config.patch_size
    arguments: dict[str, Any] = {
        "img_size": list(config.img_size),
        "patch_size": rows if rows == columns else [rows, columns],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.hidden / config.width,
    }
    if config.in_chans != 3:
        arguments["in_chans"] = config.in_chans
    if not config.position_on_prefix:
        return {
            "architecture": "deit3_small_patch16_224",
            "model_args": arguments | {"init_values": config.layer_scale, "no_embed_class": True},
        }
    beside = "_distilled" if config.distilled else ""
    return {"architecture": f"deit_tiny{beside}_patch16_224", "model_args": arguments}


def transformers_config(name: str, config: Config) -> dict[str, Any]:
    """transformers' DeiTConfig. Raises WeightsError where its class computes something else."""
    if not config.distilled or config.layer_scale is not None or config.parallel > 1:
        raise WeightsError(
            "transformers' DeiT has a distillation token, no layer scale and no parallel blocks,"
            f" {name} has not; take the layout 'timm'."
        )
    return {
        "model_type": "deit",
        "architectures": ["DeiTForImageClassificationWithTeacher"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": plain.one_or_two(config.img_size),
        "patch_size": plain.one_or_two(config.patch_size),
        "num_channels": config.in_chans,
        "qkv_bias": True,
    }


def _parallel(attention: tuple[str, str, str], mlp: tuple[str, str, str], place: str) -> tuple[Rule, ...]:
    """The rules of one branch of mixers and one of MLPs; names are (norm, body, factor) of theirs."""
    rules = []
    for (norm, body, factor), ours, parts in (
        (attention, f"{BLOCK}.mixers.{place}", ("qkv", "proj")),
        (mlp, f"{BLOCK}.mlps.{place}", ("fc1", "fc2")),
    ):
        rules.append(Rule(f"blocks.{{i}}.{norm}.{PAIR}", f"{ours}.norm.{PAIR}"))
        rules.extend(
            Rule(f"blocks.{{i}}.{body}.{part}.{PAIR}", f"{ours}.body.{part}.{PAIR}") for part in parts
        )
        rules.append(Rule(f"blocks.{{i}}.{factor}", f"{ours}.scale.gamma"))
    return tuple(rules)


_STATISTICS = "{weight|bias|running_mean|running_var|num_batches_tracked}"

_TOKENS_AND_HEADS = (
    Rule("dist_token", f"{ENTRY}.prefix.distillation"),
    Rule(f"head_dist.{PAIR}", f"head.distilled.{PAIR}", fit="classes"),
    Rule(f"patch_embed.proj.{{i}}.{_STATISTICS}", f"{ENTRY}.patches.layers.{{i}}.{_STATISTICS}"),
)

_NO_HEAD = Drop("head_dist.*", "this model has no head", when="headless")
_NO_TOKEN = Drop("dist_token", "this encoder has no distillation token", when="dense")

TIMM = Layout(
    name="timm",
    # DeiT's own files have both as well, so this layout, which asks for more, wins.
    signature=("norm.weight", "pos_embed"),
    prefixes=plain.TIMM.prefixes,
    rules=(
        *plain.TIMM.rules,
        *_TOKENS_AND_HEADS,
        *_parallel(
            ("attns.{j}.norm", "attns.{j}.attn", "attns.{j}.ls.gamma"),
            ("ffns.{j}.norm", "ffns.{j}.mlp", "ffns.{j}.ls.gamma"),
            "{j}",
        ),
    ),
    dropped=(*plain.TIMM.dropped, _NO_HEAD, _NO_TOKEN),
    describe=timm_config,
)

ORIGINAL = Layout(
    name="original",
    signature=("norm.weight",),
    rules=(
        *(rule for rule in plain.TIMM.rules if ".ls" not in str(rule.theirs)),
        *_TOKENS_AND_HEADS,
        Rule("blocks.{i}.gamma_1", f"{BLOCK}.scale1.gamma"),
        Rule("blocks.{i}.gamma_2", f"{BLOCK}.scale2.gamma"),
        *_parallel(("norm1", "attn", "gamma_1"), ("norm2", "mlp", "gamma_2"), "0"),
        *_parallel(("norm11", "attn1", "gamma_1_1"), ("norm21", "mlp1", "gamma_2_1"), "1"),
    ),
    dropped=(*plain.TIMM.dropped, _NO_HEAD, _NO_TOKEN),
)


def _as_deit(theirs: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A name in transformers' ViT as its DeiT has it."""
    if isinstance(theirs, tuple):
        return tuple(str(_as_deit(name)) for name in theirs)
    return re.sub("^classifier", "cls_classifier", re.sub("^vit", "deit", theirs))


TRANSFORMERS = Layout(
    name="transformers",
    signature=("embeddings.patch_embeddings.projection.weight",),
    prefixes=("deit.", "vit."),
    rules=(
        *(Rule(_as_deit(rule.theirs), rule.ours, rule.how, rule.fit) for rule in plain.TRANSFORMERS.rules),
        Rule(f"classifier.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
        Rule("deit.embeddings.distillation_token", f"{ENTRY}.prefix.distillation"),
        Rule(f"distillation_classifier.{PAIR}", f"head.distilled.{PAIR}", fit="classes"),
    ),
    dropped=(
        *plain.TRANSFORMERS.dropped,
        Drop("*_classifier.*", "this model has no head", when="headless"),
    ),
    describe=transformers_config,
)

MMPRETRAIN = Layout(
    name="mmpretrain",
    signature=plain.MMPRETRAIN.signature,
    prefixes=plain.MMPRETRAIN.prefixes,
    rules=(
        *plain.MMPRETRAIN.rules,
        Rule("backbone.dist_token", f"{ENTRY}.prefix.distillation"),
        Rule("backbone.layers.{i}.attn.gamma1.weight", f"{BLOCK}.scale1.gamma"),
        Rule("backbone.layers.{i}.ffn.gamma2.weight", f"{BLOCK}.scale2.gamma"),
        Rule(f"head.layers.head_dist.{PAIR}", f"head.distilled.{PAIR}", fit="classes"),
    ),
    dropped=plain.MMPRETRAIN.dropped,
)

RENAMES: tuple[Layout, ...] = (TIMM, ORIGINAL, TRANSFORMERS, MMPRETRAIN)
