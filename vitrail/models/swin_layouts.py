"""How Swin weights are written down: timm, the authors (and old timm), transformers, torchvision, MMPretrain.

The merging of 2 x 2 tokens ends a stage in the authors' files and begins the next one in timm's since 0.9 (and
in ours): the same words with another number, told apart by the head's name (`head` and `head.fc`). Indices,
masks and coordinates that the authors' files hold are computed here, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vitrail.errors import WeightsError
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.swin import Config

STAGE = "backbone.stages.{i}"
BLOCK = f"{STAGE}.blocks.{{j}}"
MIXER = f"{BLOCK}.mixer"
PATCHES = "backbone.stages.0.entry.patches"
PAIR = "{weight|bias}"

EPS = 1e-5
"""What transformers' Swin adds to the variance in its patch embedding and merging, whatever its config.json says."""

COMPUTED = (
    Drop("*.relative_position_index", "computed from the window"),
    Drop("*.relative_coords_table", "computed from the window"),
    Drop("*.attn_mask", "computed from the grid"),
)


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration: which version's parts there are, and the windows of stages."""
    return {"v2": config.version == 2, "resample": "bicubic-plain", "windows": config.stage_windows}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args` for a network."""
    arguments: dict[str, Any] = {
        "img_size": list(config.img_size),
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": list(config.windows) if config.version == 1 else config.windows[0],
    }
    if any(config.trained_windows):
        arguments["pretrained_window_sizes"] = list(config.trained_windows)
    if name.startswith(("swin_nano", "swin_tiny_c24")):
        name = "swin_tiny_patch4_window7_224"
    return {"architecture": name, "model_args": arguments}


def transformers_config(name: str, config: Config) -> dict[str, Any]:
    """transformers' SwinConfig or Swinv2Config. Raises WeightsError where its class computes something else."""
    window = _one_window(config)
    if window is None:
        raise WeightsError(
            "transformers' Swin has one square window for all stages, and moves it along both axes or along none;"
            f" {name} has windows {_told(config.stage_windows)} at {_told([config.img_size])} pixels: take the layout"
            " 'timm'."
        )
    if config.eps != EPS:
        raise WeightsError(
            f"transformers' Swin has eps={EPS} after patches and in merging, this model has {config.eps}: take the"
            " layout 'timm'."
        )
    rows, columns = config.img_size
    view: dict[str, Any] = {
        "model_type": "swin",
        "architectures": ["SwinForImageClassification"],
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": window,
        "mlp_ratio": float(config.mlp_ratio),
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path_rate,
        "use_absolute_embeddings": False,
        "layer_norm_eps": config.eps,
        "num_labels": config.num_classes,
    }
    if config.version == 1:
        return view
    return view | {
        "model_type": "swinv2",
        "architectures": ["Swinv2ForImageClassification"],
        "pretrained_window_sizes": list(config.trained_windows),
    }


def _one_window(config: Config) -> int | None:
    """The window that gives every stage of transformers' network the windows and shifts of ours, if there is one.

    Theirs never shrinks in v1, and in v2 to the rows of the stage's map, which are counted down; a map that is no
    larger than its window along one axis is not shifted along the other either.
    """
    window = max(side for grid in config.stage_windows for side in grid)
    for number, (ours, depth) in enumerate(zip(config.stage_windows, config.depths, strict=True)):
        rows, columns = (-(-size // (config.patch_size << number)) for size in config.img_size)
        counted = (config.img_size[0] // config.patch_size) >> number
        side = window if config.version == 1 else min(counted, window)
        moves = (min(rows, columns) if config.version == 1 else counted) > side
        shifted = depth > 1 and ((rows > side) != moves or (columns > side) != moves)
        if ours != (side, side) or shifted:
            return None
    return window


def _told(grids: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{rows}x{columns}" for rows, columns in grids)


def _blocks(block: str, attention: str = "attn") -> tuple[Rule, ...]:
    """The authors' words for a block, which timm shares: `block` is its place."""
    mixer = f"{block}.{attention}"
    return (
        Rule(f"{block}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"{mixer}.relative_position_bias_table", f"{MIXER}.relative_bias.table", fit="relative"),
        Rule(f"{mixer}.logit_scale", f"{MIXER}.logit_scale"),
        Rule(f"{mixer}.{{q_bias|v_bias}}", f"{MIXER}.{{q_bias|v_bias}}"),
        Rule(f"{mixer}.cpb_mlp.0.{PAIR}", f"{MIXER}.relative_bias.fc1.{PAIR}"),
        Rule(f"{mixer}.cpb_mlp.2.weight", f"{MIXER}.relative_bias.fc2.weight"),
        Rule(f"{mixer}.rpe_mlp.0.{PAIR}", f"{MIXER}.relative_bias.fc1.{PAIR}"),
        Rule(f"{mixer}.rpe_mlp.2.weight", f"{MIXER}.relative_bias.fc2.weight"),
        Rule(f"{mixer}.qkv.weight", f"{MIXER}.qkv.weight"),
        Rule(f"{mixer}.qkv.bias", f"{MIXER}.qkv.bias"),
        Rule(f"{mixer}.proj.{PAIR}", f"{MIXER}.proj.{PAIR}"),
        Rule(f"{block}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
    )


def _patches(proj: str, norm: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{proj}.weight", f"{PATCHES}.proj.weight", fit="patch"),
        Rule(f"{proj}.bias", f"{PATCHES}.proj.bias"),
        Rule(f"{norm}.{PAIR}", f"{PATCHES}.norm.{PAIR}"),
    )


def _merging(merge: str, stage: str = STAGE) -> tuple[Rule, ...]:
    return (
        Rule(f"{merge}.reduction.weight", f"{stage}.entry.reduction.weight"),
        Rule(f"{merge}.norm.{PAIR}", f"{stage}.entry.norm.{PAIR}"),
    )


def _end(norm: str, head: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{norm}.{PAIR}", f"{STAGE}.norm.{PAIR}"),
        Rule(f"{head}.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    )


_MLP = Rule("layers.{i}.blocks.{j}.mlp.{fc1|fc2}.weight", f"{BLOCK}.mlp.{{fc1|fc2}}.weight")
_MLP_BIAS = Rule("layers.{i}.blocks.{j}.mlp.{fc1|fc2}.bias", f"{BLOCK}.mlp.{{fc1|fc2}}.bias")

TIMM = Layout(
    name="timm",
    signature=("layers.1.downsample.reduction.weight",),
    prefixes=("model.", "backbone."),
    rules=(
        *_patches("patch_embed.proj", "patch_embed.norm"),
        *_merging("layers.{i}.downsample"),
        *_blocks("layers.{i}.blocks.{j}"),
        _MLP,
        _MLP_BIAS,
        *_end("norm", "head.fc"),
    ),
    dropped=(*COMPUTED, Drop("head.*", "this model has no head", when="headless")),
    describe=timm_config,
)

ORIGINAL = Layout(
    name="original",
    signature=("layers.0.downsample.reduction.weight",),
    prefixes=("backbone.", "encoder."),
    rules=(
        *_patches("patch_embed.proj", "patch_embed.norm"),
        *_merging("layers.{i-1}.downsample"),
        *_blocks("layers.{i}.blocks.{j}"),
        _MLP,
        _MLP_BIAS,
        *_end("norm", "head"),
    ),
    dropped=(
        *COMPUTED,
        Drop("mask_token", "used in masked pre-training only"),
        Drop("decoder.*", "used in masked pre-training only"),
        Drop(
            "norm{i}.*",
            "norms of the detector's feature maps, which a classifier does not have",
            when="headless",
        ),
        Drop("head.*", "this model has no head", when="headless"),
    ),
)

_HF = "encoder.layers.{i}.blocks.{j}"


def _transformers(name: str, model: str, rules: tuple[Rule, ...]) -> Layout:
    return Layout(
        name=name,
        signature=(
            "embeddings.patch_embeddings.projection.weight",
            "encoder.layers.0.downsample.reduction.weight",
        ),
        prefixes=(model,),
        rules=(
            *_patches(f"{model}embeddings.patch_embeddings.projection", f"{model}embeddings.norm"),
            *_merging(f"{model}encoder.layers.{{i-1}}.downsample"),
            Rule(f"{model}{_HF}.layernorm_before.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
            Rule(f"{model}{_HF}.layernorm_after.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
            *rules,
            *_end(f"{model}layernorm", "classifier"),
        ),
        dropped=(
            *COMPUTED,
            Drop("embeddings.mask_token", "used in masked pre-training only"),
            Drop("classifier.*", "this model has no head", when="headless"),
        ),
        describe=transformers_config,
    )


def _dense(model: str) -> tuple[Rule, ...]:
    """The MLP and the output projection under the names on disk, which version 1 and 2 share."""
    block = f"{model}{_HF}"
    return (
        Rule(f"{block}.attention.output.dense.{PAIR}", f"{MIXER}.proj.{PAIR}"),
        Rule(f"{block}.intermediate.dense.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"{block}.output.dense.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
    )


_SWIN = f"swin.{_HF}.attention"
_SWIN2 = f"swinv2.{_HF}.attention.self"

TRANSFORMERS = _transformers(
    "transformers",
    "swin.",
    (
        # names on disk, which every version reads and writes
        Rule(tuple(f"{_SWIN}.self.{x}.{PAIR}" for x in ("query", "key", "value")), f"{MIXER}.qkv.{PAIR}"),
        Rule(f"{_SWIN}.self.relative_position_bias_table", f"{MIXER}.relative_bias.table", fit="relative"),
        *_dense("swin."),
        # names in memory since version 5
        Rule(tuple(f"{_SWIN}.{x}_proj.{PAIR}" for x in ("q", "k", "v")), f"{MIXER}.qkv.{PAIR}"),
        Rule(
            f"{_SWIN}.relative_position_bias.relative_position_bias_table",
            f"{MIXER}.relative_bias.table",
            fit="relative",
        ),
        Rule(f"{_SWIN}.o_proj.{PAIR}", f"{MIXER}.proj.{PAIR}"),
        Rule(f"swin.{_HF}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"swin.{_HF}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
    ),
)

TRANSFORMERS_V2 = _transformers(
    "transformers-v2",
    "swinv2.",
    (
        Rule(tuple(f"{_SWIN2}.{x}.weight" for x in ("query", "key", "value")), f"{MIXER}.qkv.weight"),
        Rule(f"{_SWIN2}.{{query|value}}.bias", f"{MIXER}.{{q_bias|v_bias}}"),
        Rule(f"{_SWIN2}.logit_scale", f"{MIXER}.logit_scale"),
        Rule(f"{_SWIN2}.continuous_position_bias_mlp.0.{PAIR}", f"{MIXER}.relative_bias.fc1.{PAIR}"),
        Rule(f"{_SWIN2}.continuous_position_bias_mlp.2.weight", f"{MIXER}.relative_bias.fc2.weight"),
        *_dense("swinv2."),
    ),
)

_TV = "features.{2*i+1}.{j}"

TORCHVISION = Layout(
    name="torchvision",
    signature=("features.0.0.weight", "features.2.reduction.weight"),
    rules=(
        *_patches("features.0.0", "features.0.2"),
        *_merging("features.{2*i}"),
        # v2 keeps a bias for keys too, which it takes as zero
        Rule(f"{_TV}.attn.qkv.bias", (f"{MIXER}.q_bias", f"{MIXER}.v_bias"), "without_keys", when="v2"),
        *_blocks(_TV),
        Rule(f"{_TV}.mlp.0.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"{_TV}.mlp.3.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        *_end("norm", "head"),
    ),
    dropped=(*COMPUTED, Drop("head.*", "this model has no head", when="headless")),
)

_MM = "backbone.stages.{i}.blocks.{j}"

MMPRETRAIN = Layout(
    name="mmpretrain",
    signature=("stages.0.blocks.0.attn.w_msa.qkv.weight",),
    prefixes=("backbone.",),
    rules=(
        *_patches("backbone.patch_embed.projection", "backbone.patch_embed.norm"),
        # unfold lays the four neighbours out channel by channel
        Rule(
            "backbone.stages.{i-1}.downsample.reduction.weight", f"{STAGE}.entry.reduction.weight", "unfolded"
        ),
        Rule(
            f"backbone.stages.{{i-1}}.downsample.norm.{PAIR}",
            f"{STAGE}.entry.norm.{PAIR}",
            "unfolded",
            when="!v2",
        ),
        Rule(f"backbone.stages.{{i-1}}.downsample.norm.{PAIR}", f"{STAGE}.entry.norm.{PAIR}", when="v2"),
        *_blocks(_MM, "attn.w_msa"),
        Rule(f"{_MM}.ffn.layers.0.0.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"{_MM}.ffn.layers.1.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        *_end("backbone.norm3", "head.fc"),
    ),
    dropped=(
        *COMPUTED,
        Drop("data_preprocessor.*", "mean and std are in the card"),
        Drop("head.*", "this model has no head", when="headless"),
    ),
)

RENAMES: tuple[Layout, ...] = (TIMM, ORIGINAL, TRANSFORMERS, TRANSFORMERS_V2, TORCHVISION, MMPRETRAIN)
