"""How ViT weights are written down: by timm and us, transformers, torchvision, MMPretrain, Google's JAX code.

The first layout is the one in which model folders are written. Sources: google-research/vision_transformer
`models_vit.py` and big_vision `models/vit.py` (.npz keys), and the state dicts of the libraries named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.errors import WeightsError
from vitrail.weights.adapter import Drop, Layout, Rule
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

if TYPE_CHECKING:
    from vitrail.models.vit import Config

ENTRY = "backbone.stages.0.entry"
BLOCK = "backbone.stages.0.blocks.{i}"
LAST_NORM = "backbone.stages.0.norm"
PAIR = "{weight|bias}"

TIMM_EPS = 1e-6
"""What timm's ViT adds to the variance, and no argument changes; smaller ones give the same logits."""

OURS_ALONE = ("vit_nano_patch4_32", "vit_tiny_patch4_32")
"""Variants that timm does not have under their name."""


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    on_prefix = config.class_token and config.position_on_prefix
    return {
        "heads": config.heads,
        "grid": (config.img_size[0] // config.patch_size[0], config.img_size[1] // config.patch_size[1]),
        "prefix": int(on_prefix),
        "root": config.stem == "resnet" and not config.stem_layers,
    }


def timm_config(name: str, config: Config) -> dict[str, Any]:
    """timm's `architecture` and `model_args` for a network; where timm has no such network, those of its nearest
    relative, whose strict loading refuses the file."""
    from vitrail.models.vit import VARIANTS

    architecture = name if name in VARIANTS and name not in OURS_ALONE else "vit_base_patch16_224"
    usual = _timm_arguments(VARIANTS[architecture])
    unusual = {key: value for key, value in _timm_arguments(config).items() if value != usual[key]}
    if abs(config.eps - TIMM_EPS) > TIMM_EPS:
        # timm has no such argument, and so refuses the folder rather than compute something else.
        unusual["eps"] = config.eps
    return {"architecture": architecture} | ({"model_args": unusual} if unusual else {})


def _timm_arguments(config: Config) -> dict[str, Any]:
    ratio = config.hidden / config.width
    if int(ratio * config.width) != config.hidden:  # timm rounds down
        ratio = (config.hidden + 0.5) / config.width
    arguments: dict[str, Any] = {
        "img_size": list(config.img_size),
        "in_chans": config.in_chans,
        "patch_size": one_or_two(config.patch_size),
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,
        "class_token": config.class_token,
        "no_embed_class": config.class_token and not config.position_on_prefix,
        "reg_tokens": config.registers,
        "global_pool": {"mean": "avg"}.get(config.pool, config.pool),
        "fc_norm": config.pool_norm == "after" if config.pool == "mean" else None,
        "act_layer": "gelu" if config.gelu == "exact" else "gelu_tanh",
    }
    return arguments


def transformers_config(name: str, config: Config) -> dict[str, Any]:
    """transformers' ViTConfig. Raises WeightsError where its class computes something else."""
    needs = {
        "pool='token'": config.pool == "token",
        "a learned position for [CLS]": config.position == "learned" and config.position_on_prefix,
        "norm_order='pre'": config.norm_order == "pre",
        "a patch stem": config.stem == "patch",
        "no representation layer": not config.representation,
        "no MLP head": not config.head_hidden,
    }
    for need, met in needs.items():
        if not met:
            raise WeightsError(f"transformers' ViT has {need}, this model has not; take the layout 'timm'.")
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu" if config.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.eps,
        "image_size": one_or_two(config.img_size),
        "patch_size": one_or_two(config.patch_size),
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        "num_labels": config.num_classes,
    }


def one_or_two(size: tuple[int, int]) -> int | list[int]:
    """A size as configurations of other libraries say it: one number where it is square."""
    return size[0] if size[0] == size[1] else list(size)


TIMM = Layout(
    name="timm",
    signature=("blocks.0.norm1.weight",),
    prefixes=("model.", "backbone.", "timm_model."),
    rules=(
        Rule("cls_token", f"{ENTRY}.prefix.cls"),
        Rule("reg_token", f"{ENTRY}.prefix.registers"),
        Rule("pos_embed", f"{ENTRY}.positions.table", fit="positions"),
        Rule("patch_embed.proj.weight", f"{ENTRY}.patches.proj.weight", fit="patch"),
        Rule("patch_embed.proj.bias", f"{ENTRY}.patches.proj.bias"),
        Rule(f"blocks.{{i}}.norm1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.qkv.{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.q_norm.{PAIR}", f"{BLOCK}.mixer.q_norm.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.k_norm.{PAIR}", f"{BLOCK}.mixer.k_norm.{PAIR}"),
        Rule(f"blocks.{{i}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule("blocks.{i}.ls1.gamma", f"{BLOCK}.scale1.gamma"),
        Rule(f"blocks.{{i}}.norm2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"blocks.{{i}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"blocks.{{i}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule("blocks.{i}.ls2.gamma", f"{BLOCK}.scale2.gamma"),
        Rule(f"norm.{PAIR}", f"{LAST_NORM}.{PAIR}"),
        Rule(f"fc_norm.{PAIR}", f"head.norm.{PAIR}"),
        Rule(f"pre_logits.fc.{PAIR}", f"head.representation.0.{PAIR}"),
        Rule(f"head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
        # the stem of the hybrids; "R+Ti/16" is the root alone, which timm nests one level less
        Rule(
            "patch_embed.backbone.stem.conv.weight", f"{ENTRY}.stem.conv.weight", fit="channels", when="!root"
        ),
        Rule(f"patch_embed.backbone.stem.norm.{PAIR}", f"{ENTRY}.stem.norm.{PAIR}", when="!root"),
        Rule("patch_embed.backbone.conv.weight", f"{ENTRY}.stem.conv.weight", fit="channels", when="root"),
        Rule(f"patch_embed.backbone.norm.{PAIR}", f"{ENTRY}.stem.norm.{PAIR}", when="root"),
        Rule(
            "patch_embed.backbone.stages.{s}.blocks.{u}.{conv1|conv2|conv3|downsample.conv}.weight",
            f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{conv1|conv2|conv3|shortcut.0}}.weight",
        ),
        Rule(
            "patch_embed.backbone.stages.{s}.blocks.{u}.{norm1|norm2|norm3|downsample.norm}.weight",
            f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{norm1|norm2|norm3|shortcut.1}}.weight",
        ),
        Rule(
            "patch_embed.backbone.stages.{s}.blocks.{u}.{norm1|norm2|norm3|downsample.norm}.bias",
            f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{norm1|norm2|norm3|shortcut.1}}.bias",
        ),
        # ours alone: timm has neither this stem nor this head
        Rule(f"patch_embed.layers.{{i}}.{PAIR}", f"{ENTRY}.patches.layers.{{i}}.{PAIR}"),
        Rule(
            "patch_embed.layers.{i}.{running_mean|running_var|num_batches_tracked}",
            f"{ENTRY}.patches.layers.{{i}}.{{running_mean|running_var|num_batches_tracked}}",
        ),
        Rule(
            f"patch_embed.layers.{{i}}.layers.{{j}}.{PAIR}",
            f"{ENTRY}.patches.layers.{{i}}.layers.{{j}}.{PAIR}",
        ),
        Rule(
            "patch_embed.layers.{i}.layers.{j}.{running_mean|running_var|num_batches_tracked}",
            f"{ENTRY}.patches.layers.{{i}}.layers.{{j}}.{{running_mean|running_var|num_batches_tracked}}",
        ),
        Rule(f"head.hidden.{{i}}.{PAIR}", f"head.hidden.{{i}}.{PAIR}"),
    ),
    dropped=(
        Drop("pre_logits.*", "belongs to the old head", when="fresh_head"),
        Drop("pre_logits.*", "belongs to the head, which this model lacks", when="headless"),
        Drop("head.*", "this model has no head", when="headless"),
        Drop("fc_norm.*", "belongs to the old head", when="fresh_head"),
    ),
    describe=timm_config,
)

TRANSFORMERS = Layout(
    name="transformers",
    resample="bicubic-plain",
    signature=("vit.embeddings.patch_embeddings.projection.weight",),
    prefixes=("vit.",),
    rules=(
        Rule("vit.embeddings.cls_token", f"{ENTRY}.prefix.cls"),
        Rule("vit.embeddings.position_embeddings", f"{ENTRY}.positions.table", fit="positions"),
        Rule(
            "vit.embeddings.patch_embeddings.projection.weight", f"{ENTRY}.patches.proj.weight", fit="patch"
        ),
        Rule("vit.embeddings.patch_embeddings.projection.bias", f"{ENTRY}.patches.proj.bias"),
        # names on disk, which every version reads and writes
        Rule(f"vit.encoder.layer.{{i}}.layernorm_before.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(
            tuple(
                f"vit.encoder.layer.{{i}}.attention.attention.{x}.{PAIR}" for x in ("query", "key", "value")
            ),
            f"{BLOCK}.mixer.qkv.{PAIR}",
        ),
        Rule(f"vit.encoder.layer.{{i}}.attention.output.dense.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"vit.encoder.layer.{{i}}.layernorm_after.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"vit.encoder.layer.{{i}}.intermediate.dense.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"vit.encoder.layer.{{i}}.output.dense.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        # names in memory since version 5
        Rule(f"vit.layers.{{i}}.layernorm_before.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(
            tuple(f"vit.layers.{{i}}.attention.{x}_proj.{PAIR}" for x in ("q", "k", "v")),
            f"{BLOCK}.mixer.qkv.{PAIR}",
        ),
        Rule(f"vit.layers.{{i}}.attention.o_proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"vit.layers.{{i}}.layernorm_after.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"vit.layers.{{i}}.mlp.fc1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"vit.layers.{{i}}.mlp.fc2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"vit.layernorm.{PAIR}", f"{LAST_NORM}.{PAIR}"),
        Rule(f"vit.pooler.dense.{PAIR}", f"head.representation.0.{PAIR}"),
        Rule(f"classifier.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(
        Drop("embeddings.mask_token", "used in masked pre-training only"),
        Drop("decoder.*", "used in masked pre-training only"),
        Drop("pooler.*", "belongs to the old head", when="fresh_head"),
        Drop("pooler.*", "belongs to the head, which this model lacks", when="headless"),
        Drop("classifier.*", "this model has no head", when="headless"),
    ),
    describe=transformers_config,
)

TORCHVISION = Layout(
    name="torchvision",
    resample="bicubic-corners",
    signature=("conv_proj.weight", "encoder.layers.encoder_layer_{i}.ln_1.weight"),
    rules=(
        Rule("class_token", f"{ENTRY}.prefix.cls"),
        Rule("encoder.pos_embedding", f"{ENTRY}.positions.table", fit="positions"),
        Rule("conv_proj.weight", f"{ENTRY}.patches.proj.weight", fit="patch"),
        Rule("conv_proj.bias", f"{ENTRY}.patches.proj.bias"),
        Rule(f"encoder.layers.encoder_layer_{{i}}.ln_1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(
            f"encoder.layers.encoder_layer_{{i}}.self_attention.in_proj_{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"
        ),
        Rule(
            f"encoder.layers.encoder_layer_{{i}}.self_attention.out_proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"
        ),
        Rule(f"encoder.layers.encoder_layer_{{i}}.ln_2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"encoder.layers.encoder_layer_{{i}}.mlp.0.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"encoder.layers.encoder_layer_{{i}}.mlp.3.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"encoder.layers.encoder_layer_{{i}}.mlp.linear_1.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"encoder.layers.encoder_layer_{{i}}.mlp.linear_2.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"encoder.ln.{PAIR}", f"{LAST_NORM}.{PAIR}"),
        Rule(f"heads.pre_logits.{PAIR}", f"head.representation.0.{PAIR}"),
        Rule(f"heads.head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(
        Drop("heads.pre_logits.*", "belongs to the old head", when="fresh_head"),
        Drop("heads.*", "this model has no head", when="headless"),
    ),
    # torchvision's own recipe (IMAGENET1K_V1: short side to 256, crop of 224); the JAX code's wants [-1, 1]
    preprocessing=Preprocessing(
        mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", crop_pct=0.875
    ),
)

MMPRETRAIN = Layout(
    name="mmpretrain",
    resample="bicubic-plain",
    signature=("layers.{i}.ln1.weight", "patch_embed.projection.weight"),
    prefixes=("backbone.",),
    rules=(
        Rule("backbone.cls_token", f"{ENTRY}.prefix.cls"),
        Rule("backbone.pos_embed", f"{ENTRY}.positions.table", fit="positions"),
        Rule("backbone.patch_embed.projection.weight", f"{ENTRY}.patches.proj.weight", fit="patch"),
        Rule("backbone.patch_embed.projection.bias", f"{ENTRY}.patches.proj.bias"),
        Rule(f"backbone.layers.{{i}}.ln1.{PAIR}", f"{BLOCK}.norm1.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.attn.qkv.{PAIR}", f"{BLOCK}.mixer.qkv.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.attn.proj.{PAIR}", f"{BLOCK}.mixer.proj.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ln2.{PAIR}", f"{BLOCK}.norm2.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ffn.layers.0.0.{PAIR}", f"{BLOCK}.mlp.fc1.{PAIR}"),
        Rule(f"backbone.layers.{{i}}.ffn.layers.1.{PAIR}", f"{BLOCK}.mlp.fc2.{PAIR}"),
        Rule(f"backbone.ln1.{PAIR}", f"{LAST_NORM}.{PAIR}"),
        Rule(f"head.layers.pre_logits.{PAIR}", f"head.representation.0.{PAIR}"),
        Rule(f"head.layers.head.{PAIR}", f"head.linear.{PAIR}", fit="classes"),
    ),
    dropped=(
        Drop("head.layers.pre_logits.*", "belongs to the old head", when="fresh_head"),
        Drop("head.*", "this model has no head", when="headless"),
        Drop("data_preprocessor.*", "mean and std are in the card"),
    ),
)


def _jax(
    name: str, block: str, mixer: str, norm2: str, mlp: str, slice: str, marks: tuple[str, ...]
) -> Layout:
    """One of Google's three ways to number a block's parts; `slice` picks a block out of stacked tensors."""
    query = tuple(f"{block}/{mixer}/{part}/{{kernel|bias}}{slice}" for part in ("query", "key", "value"))
    old, new = "Transformer/posembed_input/pos_embedding", "pos_embedding"
    table = f"{ENTRY}.positions.table"
    places = (
        (Rule(old, table, fit="positions"), Rule(new, table, fit="positions", when="!prefix"))
        if name == "google"
        else (Rule(new, table, fit="positions", when="!prefix"),)
    )
    return Layout(
        name=name,
        signature=("embedding/kernel", *marks),
        resample="bilinear-corners",
        prefixes=("opt/target/", "params/", "img/"),
        rules=(
            Rule("cls", f"{ENTRY}.prefix.cls"),
            *places,
            # big_vision gives [CLS] no position, which is a position of zero
            Rule(new, table, "prefix_zeros", fit="positions", when="prefix"),
            Rule("embedding/kernel", f"{ENTRY}.patches.proj.weight", "conv", fit="patch"),
            Rule("embedding/bias", f"{ENTRY}.patches.proj.bias"),
            Rule(f"{block}/LayerNorm_0/{{scale|bias}}{slice}", f"{BLOCK}.norm1.{PAIR}"),
            Rule(query, f"{BLOCK}.mixer.qkv.{PAIR}", "heads_in|heads_bias"),
            Rule(
                f"{block}/{mixer}/out/{{kernel|bias}}{slice}", f"{BLOCK}.mixer.proj.{PAIR}", "heads_out|copy"
            ),
            Rule(f"{block}/{norm2}/{{scale|bias}}{slice}", f"{BLOCK}.norm2.{PAIR}"),
            Rule(f"{block}/{mlp}/Dense_0/{{kernel|bias}}{slice}", f"{BLOCK}.mlp.fc1.{PAIR}", "linear|copy"),
            Rule(f"{block}/{mlp}/Dense_1/{{kernel|bias}}{slice}", f"{BLOCK}.mlp.fc2.{PAIR}", "linear|copy"),
            Rule("Transformer/encoder_norm/{scale|bias}", f"{LAST_NORM}.{PAIR}"),
            Rule("pre_logits/{kernel|bias}", f"head.representation.0.{PAIR}", "linear|copy"),
            Rule("head/{kernel|bias}", f"head.linear.{PAIR}", "linear|copy", fit="classes"),
            Rule("conv_root/kernel", f"{ENTRY}.stem.conv.weight", "conv", fit="channels"),
            Rule("gn_root/{scale|bias}", f"{ENTRY}.stem.norm.{PAIR}", "vector"),
            Rule(
                "block{s+1}/unit{u+1}/{conv1|conv2|conv3|conv_proj}/kernel",
                f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{conv1|conv2|conv3|shortcut.0}}.weight",
                "conv",
            ),
            Rule(
                "block{s+1}/unit{u+1}/{gn1|gn2|gn3|gn_proj}/scale",
                f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{norm1|norm2|norm3|shortcut.1}}.weight",
                "vector",
            ),
            Rule(
                "block{s+1}/unit{u+1}/{gn1|gn2|gn3|gn_proj}/bias",
                f"{ENTRY}.stem.stages.{{s}}.{{u}}.{{norm1|norm2|norm3|shortcut.1}}.bias",
                "vector",
            ),
        ),
        dropped=(
            Drop("pre_logits/*", "belongs to the old head", when="fresh_head"),
            Drop("pre_logits/*", "belongs to the head, which this model lacks", when="headless"),
            Drop("MAPHead_0/*", "belongs to the old head", when="fresh_head"),
            Drop("head/*", "this model has no head", when="headless"),
        ),
    )


_NUMBERED = "Transformer/encoderblock_{i}"

RENAMES: tuple[Layout, ...] = (
    TIMM,
    TRANSFORMERS,
    TORCHVISION,
    MMPRETRAIN,
    _jax("google", _NUMBERED, "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3", "",
         (f"{_NUMBERED}/LayerNorm_2/scale",)),
    _jax("big_vision", _NUMBERED, "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "",
         (f"{_NUMBERED}/LayerNorm_1/scale",)),
    _jax("big_vision_scan", "Transformer/encoderblock", "MultiHeadDotProductAttention_0", "LayerNorm_1",
         "MlpBlock_0", "[{i}]", ("Transformer/encoderblock/LayerNorm_1/scale",)),
)  # fmt: skip
