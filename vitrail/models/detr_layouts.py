"""How DETR weights are written down: transformers' files, transformers' modules since 5.0, and the authors' files.

The authors keep queries, keys and values of an attention in one matrix; here they are three. A panoptic network's
detector has `detr.` in front. transformers renames some modules while it reads a file: `transformers` is what lies
on disk, `transformers-modules` what a state dict in memory says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vitrail.models.residual_rules import DROPPED, convolution
from vitrail.weights.adapter import Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.detr import Config


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    return {"frozen": config.frozen_norm, "masks": config.masks}


def transformers_config(name: str, config: Config) -> dict[str, Any]:
    """transformers' DetrConfig; nothing where its class computes something else."""
    known = config.backbone in ("resnet50", "resnet101") and config.frozen_norm and config.dilated <= 1
    if not known or config.norm_order != "post":
        return {}
    return {
        "model_type": "detr",
        "architectures": ["DetrForSegmentation" if config.masks else "DetrForObjectDetection"],
        "backbone": config.backbone,
        "use_timm_backbone": True,
        "dilation": bool(config.dilated),
        "num_channels": config.in_chans,
        "num_labels": config.num_classes,
        "d_model": config.width,
        "num_queries": config.queries,
        "encoder_layers": config.encoder_depth,
        "decoder_layers": config.decoder_depth,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.hidden,
        "decoder_ffn_dim": config.hidden,
        "dropout": config.drop_rate,
        "attention_dropout": config.drop_rate,
        "position_embedding_type": config.position,
    }


def _residual(place: str) -> tuple[Rule, ...]:
    """torchvision's and timm's words for a residual network, with `place` in front."""
    ours = "backbone.stages.{s}.blocks.{b}"
    block = f"{place}layer{{s+1}}.{{b}}"
    return (
        *convolution(f"{place}conv1", f"{place}bn1", "backbone.stem.layers.0", fit="channels"),
        *convolution(f"{block}.conv{{k+1}}", f"{block}.bn{{k+1}}", f"{ours}.layers.{{k}}"),
        *convolution(f"{block}.downsample.0", f"{block}.downsample.1", f"{ours}.shortcut"),
    )


def _both(theirs: str, ours: str, **told: str) -> tuple[Rule, ...]:
    """A layer's weight and bias."""
    return tuple(Rule(f"{theirs}.{part}", f"{ours}.{part}", **told) for part in ("weight", "bias"))


def _packed(theirs: str, ours: str) -> tuple[Rule, ...]:
    """torch's attention: one matrix for queries, keys and values."""
    parts = ("query", "key", "value")
    return (
        Rule(f"{theirs}.in_proj_weight", tuple(f"{ours}.{part}.weight" for part in parts)),
        Rule(f"{theirs}.in_proj_bias", tuple(f"{ours}.{part}.bias" for part in parts)),
        *_both(f"{theirs}.out_proj", f"{ours}.proj"),
    )


def _split(theirs: str, ours: str, out: str) -> tuple[Rule, ...]:
    """transformers' attention."""
    pairs = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), (out, "proj"))
    return tuple(rule for one, other in pairs for rule in _both(f"{theirs}.{one}", f"{ours}.{other}"))


def _norms(layer: str, words: tuple[str, ...], ours: str) -> tuple[Rule, ...]:
    return tuple(
        rule
        for number, word in enumerate(words, start=1)
        for rule in _both(f"{layer}.{word}", f"{ours}.norm{number}")
    )


def _positions(place: str) -> tuple[Rule, ...]:
    """Learned codes of rows and columns, where they are not sines."""
    return (
        Rule(f"{place}.row_embed.weight", "positions.rows.weight"),
        Rule(f"{place}.col_embed.weight", "positions.columns.weight"),
    )


_MASKS_ON_DISK = (
    *_both("mask_head.lay1", "mask_head.first.conv"),
    *_both("mask_head.gn1", "mask_head.first.norm"),
    *_both("mask_head.lay2", "mask_head.second.conv"),
    *_both("mask_head.gn2", "mask_head.second.norm"),
    *_both("mask_head.out_lay", "mask_head.last"),
    *_both("mask_head.adapter{i+1}", "mask_head.adapters.{i}"),
    *_both("mask_head.lay{i+3}", "mask_head.refine.{i}.conv"),
    *_both("mask_head.gn{i+3}", "mask_head.refine.{i}.norm"),
    *_both("bbox_attention.q_linear", "mask_head.attention.query"),
    *_both("bbox_attention.k_linear", "mask_head.attention.key"),
)

_MASKS_IN_MODULES = (
    *_both("bbox_attention.q_proj", "mask_head.attention.query"),
    *_both("bbox_attention.k_proj", "mask_head.attention.key"),
    *_both("mask_head.conv1.conv", "mask_head.first.conv"),
    *_both("mask_head.conv1.norm", "mask_head.first.norm"),
    *_both("mask_head.conv2.conv", "mask_head.second.conv"),
    *_both("mask_head.conv2.norm", "mask_head.second.norm"),
    *_both("mask_head.output_conv", "mask_head.last"),
    *_both("mask_head.fpn_stages.{i}.fpn_adapter", "mask_head.adapters.{i}"),
    *_both("mask_head.fpn_stages.{i}.refine.conv", "mask_head.refine.{i}.conv"),
    *_both("mask_head.fpn_stages.{i}.refine.norm", "mask_head.refine.{i}.norm"),
)


def _original(place: str) -> tuple[Rule, ...]:
    """The authors' words for the detector, with `place` in front."""
    rules: list[Rule] = [*_residual(f"{place}backbone.0.body."), *_positions(f"{place}backbone.1")]
    for part in ("encoder", "decoder"):
        theirs, ours = f"{place}transformer.{part}.layers.{{i}}", f"{part}.layers.{{i}}"
        rules += _packed(f"{theirs}.self_attn", f"{ours}.mixer")
        rules += _packed(f"{theirs}.multihead_attn", f"{ours}.reader")
        rules += _both(f"{theirs}.linear1", f"{ours}.mlp.fc1") + _both(f"{theirs}.linear2", f"{ours}.mlp.fc2")
        rules += _norms(theirs, ("norm1", "norm2", "norm3"), ours)
        rules += _both(f"{place}transformer.{part}.norm", f"{part}.norm")
    rules += _both(f"{place}input_proj", "projection")
    rules.append(Rule(f"{place}query_embed.weight", "queries.weight"))
    rules += _both(f"{place}class_embed", "head.linear", fit="classes")
    rules += _both(f"{place}bbox_embed.layers.{{i}}", "head.boxes.layers.{i}")
    return tuple(rules)


def _transformers(place: str, encoder: str, out: str, mlp: str) -> tuple[Rule, ...]:
    """transformers' words, with `place` in front."""
    model = f"{place}model."
    rules: list[Rule] = [*_residual(f"{model}backbone.{encoder}model.")]
    words = {
        "encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    }
    for part in ("encoder", "decoder"):
        theirs, ours = f"{model}{part}.layers.{{i}}", f"{part}.layers.{{i}}"
        rules += _split(f"{theirs}.self_attn", f"{ours}.mixer", out)
        if part == "decoder":
            rules += _split(f"{theirs}.encoder_attn", f"{ours}.reader", out)
        rules += _both(f"{theirs}.{mlp}fc1", f"{ours}.mlp.fc1") + _both(
            f"{theirs}.{mlp}fc2", f"{ours}.mlp.fc2"
        )
        rules += _norms(theirs, words[part], ours)
    rules += _both(f"{model}decoder.layernorm", "decoder.norm") + _both(
        f"{model}input_projection", "projection"
    )
    rules.append(Rule(f"{model}query_position_embeddings.weight", "queries.weight"))
    for word, ours in (("row", "rows"), ("column", "columns")):
        for position in ("position_embedding", "backbone.position_embedding"):
            rules.append(Rule(f"{model}{position}.{word}_embeddings.weight", f"positions.{ours}.weight"))
    rules += _both(f"{place}class_labels_classifier", "head.linear", fit="classes")
    rules += _both(f"{place}bbox_predictor.layers.{{i}}", "head.boxes.layers.{i}")
    return tuple(rules)


def _either(rules: Callable[[str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """The detector's rules as they are in a detector's file and, behind `detr.`, in a panoptic one's."""
    return (
        *(dataclasses.replace(rule, when="!masks") for rule in rules("")),
        *(dataclasses.replace(rule, when="masks") for rule in rules("detr.")),
    )


TRANSFORMERS = Layout(
    name="transformers",
    signature=("model.encoder.layers.0.fc1.weight", "model.query_position_embeddings.weight"),
    prefixes=("detr.",),
    rules=(*_either(lambda place: _transformers(place, "conv_encoder.", "out_proj", "")), *_MASKS_ON_DISK),
    dropped=DROPPED,
    describe=transformers_config,
)

MODULES = Layout(
    name="transformers-modules",
    signature=("model.encoder.layers.0.mlp.fc1.weight", "model.query_position_embeddings.weight"),
    prefixes=("detr.",),
    rules=(*_either(lambda place: _transformers(place, "", "o_proj", "mlp.")), *_MASKS_IN_MODULES),
    dropped=DROPPED,
)

ORIGINAL = Layout(
    name="original",
    signature=("transformer.encoder.layers.0.linear1.weight", "query_embed.weight"),
    prefixes=("detr.",),
    rules=(*_either(_original), *_MASKS_ON_DISK),
    dropped=DROPPED,
)

RENAMES: tuple[Layout, ...] = (TRANSFORMERS, MODULES, ORIGINAL)
