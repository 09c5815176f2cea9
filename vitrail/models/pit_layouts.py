"""How PiT weights are written down: timm, and the authors' repository, which counts the poolings apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.pit import Config

ENTRY = "backbone.stages.0.entry"
BLOCK = "backbone.stages.{i}.blocks.{j}"
POOL = "backbone.stages.{i}.entry"
PAIR = "{weight|bias}"


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    return {"grid": tuple(config.grid), "resample": "bicubic-plain"}


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args` for a network."""
    arguments = {
        "img_size": list(config.img_size),
        "patch_size": config.patch_size,
        "stride": config.stride,
        "stem_type": "overlap",
        "base_dims": [config.head_width] * len(config.heads),
        "heads": list(config.heads),
        "depth": list(config.depths),
        "mlp_ratio": config.mlp_ratio,
    }
    known = name != "pit_nano_32"
    return {"architecture": name if known else "pit_s_224", "model_args": arguments}


def _layout(name: str, pool: str, signature: tuple[str, ...]) -> Layout:
    return Layout(
        name=name,
        signature=signature,
        prefixes=("model.", "backbone."),
        rules=(
            Rule("cls_token", f"{ENTRY}.prefix.tokens"),
            Rule("pos_embed", f"{ENTRY}.positions.table", "map", fit="positions"),
            Rule("patch_embed.conv.weight", f"{ENTRY}.patches.proj.weight", fit="channels"),
            Rule("patch_embed.conv.bias", f"{ENTRY}.patches.proj.bias"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.attn.qkv.{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
            Rule(f"transformers.{{i}}.blocks.{{j}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
            Rule(f"{pool}.conv.{PAIR}", f"{POOL}.conv.{PAIR}"),
            Rule(f"{pool}.fc.{PAIR}", f"{POOL}.linear.{PAIR}"),
            Rule(f"norm.{PAIR}", f"head.norm.{PAIR}"),
            Rule(f"head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
            Rule(f"head_dist.{PAIR}", f"head.distilled.{PAIR}", fit="classes"),
        ),
        dropped=(
            Drop("head.*", "this model has no head", when="headless"),
            Drop("head_dist.*", "this model has no head", when="headless"),
        ),
        describe=timm_config if name == "timm" else None,
    )


RENAMES: tuple[Layout, ...] = (
    _layout("timm", "transformers.{i}.pool", ("transformers.{i}.pool.conv.weight",)),
    _layout("original", "pools.{i-1}", ("pools.{i}.conv.weight",)),
)
