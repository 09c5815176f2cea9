"""How T2T-ViT weights are written down: by the authors (and us), and by MMPretrain, which has the `t` models alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.nn.shapes import Grid
from vitrail.weights.adapter import Drop, Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.t2t import Config

PAIR = "{weight|bias}"


def token_grid(config: Config) -> Grid:
    """The grid that the soft splits leave of the configuration's image."""
    rows, columns = config.img_size
    for kernel, stride, padding in config.splits:
        rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in (rows, columns))
    return Grid(rows, columns)


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    return {
        "prefix": 1,
        "grid": token_grid(config),
        "resample": "bicubic-plain",
        "performer": config.tokens == "performer",
        "ghost": config.block == "ghost",
    }


LAST = "backbone.stages.2"
BLOCK = f"{LAST}.blocks.{{i}}"


def _narrow(stage: int) -> tuple[Rule, ...]:
    """The narrow attention behind the first (0) or the second (1) soft split, in the authors' files."""
    theirs, ours = f"tokens_to_token.attention{stage + 1}", f"backbone.stages.{stage}.blocks.0"
    performer = (
        Rule(f"{theirs}.w", f"{ours}.mixer.projection"),
        Rule(f"{theirs}.kqv.{PAIR}", f"{ours}.mixer.qkv.{PAIR}", "kqv", when="performer"),
        Rule(f"{theirs}.proj.{PAIR}", f"{ours}.mixer.proj.{PAIR}", when="performer"),
        Rule(f"{theirs}.mlp.0.{PAIR}", f"{ours}.mlp.fc1.{PAIR}", when="performer"),
        Rule(f"{theirs}.mlp.2.{PAIR}", f"{ours}.mlp.fc2.{PAIR}", when="performer"),
    )
    transformer = (
        Rule(f"{theirs}.attn.qkv.weight", f"{ours}.mixer.qkv.weight", when="!performer"),
        Rule(f"{theirs}.attn.proj.{PAIR}", f"{ours}.mixer.proj.{PAIR}", when="!performer"),
        Rule(f"{theirs}.mlp.fc1.{PAIR}", f"{ours}.mlp.fc1.{PAIR}", when="!performer"),
        Rule(f"{theirs}.mlp.fc2.{PAIR}", f"{ours}.mlp.fc2.{PAIR}", when="!performer"),
    )
    norms = (
        Rule(f"{theirs}.norm1.{PAIR}", f"{ours}.norm1.{PAIR}"),
        Rule(f"{theirs}.norm2.{PAIR}", f"{ours}.norm2.{PAIR}"),
    )
    return performer + transformer + norms


ORIGINAL = Layout(
    name="original",
    signature=("tokens_to_token.project.weight", "blocks.0.norm1.weight"),
    rules=(
        Rule("cls_token", f"{LAST}.entry.prefix.cls"),
        Rule("pos_embed", f"{LAST}.entry.positions.table", fit="positions"),
        Rule(f"tokens_to_token.project.{PAIR}", f"{LAST}.entry.patches.proj.{PAIR}"),
        *_narrow(0),
        *_narrow(1),
        *(
            Rule(f"blocks.{{i}}.{theirs}.{PAIR}", f"{BLOCK}.{ours}.{PAIR}")
            for theirs, ours in (
                ("norm1", "norm1"),
                ("attn.proj", "mixer.proj"),
                ("attn.se_layer.fc.0", "mixer.squeeze"),
                ("attn.se_layer.fc.2", "mixer.excite"),
                ("norm2", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
                ("dense_linear", "grow"),
                ("linear", "linear"),
            )
        ),
        Rule("blocks.{i}.attn.qkv.weight", f"{BLOCK}.mixer.qkv.weight", when="!ghost"),
        # ghosts: q, k and v are three matrices there
        Rule(
            tuple(f"blocks.{{i}}.attn.{x}.weight" for x in "qkv"), f"{BLOCK}.mixer.qkv.weight", when="ghost"
        ),
        Rule(
            tuple(f"blocks.{{i}}.attn.cheap_operation_{x}.weight" for x in "qkv"),
            f"{BLOCK}.mixer.ghost.weight",
        ),
        Rule("blocks.{i}.mlp.cheap_operation{j+2}.weight", f"{BLOCK}.mlp.ghosts.{{j}}.weight"),
        Rule(f"norm.{PAIR}", f"{LAST}.norm.{PAIR}"),
        Rule(f"head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(Drop("head.*", "this model has no head", when="headless"),),
)

MMPRETRAIN = Layout(
    name="mmpretrain",
    signature=("backbone.tokens_to_token.project.weight", "backbone.encoder.{i}.ln1.weight"),
    prefixes=("backbone.",),
    rules=(
        Rule("backbone.cls_token", f"{LAST}.entry.prefix.cls"),
        Rule("backbone.pos_embed", f"{LAST}.entry.positions.table", fit="positions"),
        Rule(f"backbone.tokens_to_token.project.{PAIR}", f"{LAST}.entry.patches.proj.{PAIR}"),
        *(
            Rule(f"backbone.{block}.{theirs}.{PAIR}", f"{ours}.{part}.{PAIR}")
            for block, ours in (
                ("tokens_to_token.attention1", "backbone.stages.0.blocks.0"),
                ("tokens_to_token.attention2", "backbone.stages.1.blocks.0"),
                ("encoder.{i}", BLOCK),
            )
            for theirs, part in (
                ("ln1", "norm1"),
                ("attn.qkv", "mixer.qkv"),
                ("attn.proj", "mixer.proj"),
                ("ln2", "norm2"),
                ("ffn.layers.0.0", "mlp.fc1"),
                ("ffn.layers.1", "mlp.fc2"),
            )
        ),
        Rule(f"backbone.norm.{PAIR}", f"{LAST}.norm.{PAIR}"),
        Rule(f"head.layers.head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(
        Drop("head.*", "this model has no head", when="headless"),
        Drop("data_preprocessor.*", "mean and std are in the card"),
    ),
)

RENAMES: tuple[Layout, ...] = (ORIGINAL, MMPRETRAIN)
