"""How CaiT weights are written down: one naming, by the authors (under `module.`) and timm alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.cait import Config

PATCHES, CLASS = "backbone.stages.0", "backbone.stages.1"
PAIR = "{weight|bias}"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    rows, columns = config.patch_size
    grid = (config.img_size[0] // rows, config.img_size[1] // columns)
    return {"prefix": 0, "grid": grid, "resample": "bicubic-plain"}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args` for a network."""
    rows, columns = config.patch_size
    arguments: dict[str, Any] = {
        "img_size": list(config.img_size),
        "patch_size": rows if rows == columns else [rows, columns],
        "embed_dim": config.width,
        "depth": config.depth,
        "depth_token_only": config.class_depth,
        "num_heads": config.heads,
        "mlp_ratio": config.hidden / config.width,
        "mlp_ratio_token_only": config.hidden / config.width,
        "init_values": config.layer_scale,
    }
    if config.in_chans != 3:
        arguments["in_chans"] = config.in_chans
    return {"architecture": "cait_xxs24_224", "model_args": arguments}


def _block(theirs: str, ours: str) -> tuple[Rule, ...]:
    """What the blocks of both stages have."""
    return (
        Rule(f"{theirs}.{{norm1|norm2}}.weight", f"{ours}.{{norm1|norm2}}.weight"),
        Rule(f"{theirs}.{{norm1|norm2}}.bias", f"{ours}.{{norm1|norm2}}.bias"),
        Rule(f"{theirs}.attn.proj.{PAIR}", f"{ours}.mixer.proj.{PAIR}"),
        Rule(f"{theirs}.mlp.fc1.{PAIR}", f"{ours}.mlp.fc1.{PAIR}"),
        Rule(f"{theirs}.mlp.fc2.{PAIR}", f"{ours}.mlp.fc2.{PAIR}"),
        Rule(f"{theirs}.{{gamma_1|gamma_2}}", f"{ours}.{{scale1|scale2}}.gamma"),
    )


TIMM = Layout(
    name="timm",
    signature=("blocks_token_only.0.norm1.weight",),
    rules=(
        Rule("cls_token", f"{CLASS}.entry.prefix.cls"),
        Rule("pos_embed", f"{PATCHES}.entry.positions.table", fit="positions"),
        Rule("patch_embed.proj.weight", f"{PATCHES}.entry.patches.proj.weight", fit="patch"),
        Rule("patch_embed.proj.bias", f"{PATCHES}.entry.patches.proj.bias"),
        *_block("blocks.{i}", f"{PATCHES}.blocks.{{i}}"),
        Rule(f"blocks.{{i}}.attn.qkv.{PAIR}", f"{PATCHES}.blocks.{{i}}.mixer.qkv.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.proj_l.{PAIR}", f"{PATCHES}.blocks.{{i}}.mixer.before.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.proj_w.{PAIR}", f"{PATCHES}.blocks.{{i}}.mixer.after.{PAIR}"),
        *_block("blocks_token_only.{i}", f"{CLASS}.blocks.{{i}}"),
        *(
            Rule(f"blocks_token_only.{{i}}.attn.{short}.{PAIR}", f"{CLASS}.blocks.{{i}}.mixer.{long}.{PAIR}")
            for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
        ),
        Rule(f"norm.{PAIR}", f"{CLASS}.norm.{PAIR}"),
        Rule(f"head.{PAIR}", "head.linear." + PAIR, fit="classes"),
    ),
    dropped=(Drop("head.*", "this model has no head", when="headless"),),
    describe=timm_config,
)

RENAMES: tuple[Layout, ...] = (TIMM,)
