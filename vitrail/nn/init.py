"""Initial distributions, one function per paper's table; each fills every parameter of a model by name and kind.

All draw from torch's default generator, so `torch.manual_seed` before building makes a model reproducible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitrail.nn.bit import Unit
from vitrail.nn.block import Mlp
from vitrail.nn.decoder import QueryAttention
from vitrail.nn.gates import NonLocal
from vitrail.nn.position import LearnedAxes


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Truncated normal, cut at two sigmas, of variance 1 / fan_in (flax `lecun_normal`)."""
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978  # the standard deviation that the cut takes away
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_jax(model: nn.Module) -> None:
    """google-research/vision_transformer: Xavier for each of q, k, v and the MLP, LeCun for patches, zero head.

    MLP biases N(0, 1e-6); positions N(0, 0.02); class token, registers and every other bias 0.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = 3 if name.endswith("qkv") else 1  # q, k, v are three matrices there, and are drawn as such
            for part in module.weight.chunk(rows):
                nn.init.xavier_uniform_(part)
            if module.bias is not None:
                if ".mlp." in name:
                    nn.init.normal_(module.bias, std=1e-6)
                else:
                    nn.init.zeros_(module.bias)
            if name.startswith("head.representation"):
                lecun_normal_(module.weight, module.in_features)
        elif isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight, module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    zero_head(model)
    for name, parameter in model.named_parameters():
        if name.endswith("positions.table"):
            nn.init.normal_(parameter, std=0.02)
    init_units(model)


def init_units(model: nn.Module) -> None:
    """Hybrid ViTs: the last norm of each residual unit is zero, so that a fresh unit adds nothing (BiT, 1912.11370)."""
    for module in model.modules():
        if isinstance(module, Unit):
            nn.init.zeros_(module.norm3.weight)


def init_trunc_normal(model: nn.Module, std: float = 0.02) -> None:
    """DeiT and its descendants: every linear weight N(0, 0.02), biases 0, positions and tokens N(0, 0.02).

    Patch convolutions keep torch's default. (The originals' truncation at ±2 cuts nothing at this width.)
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("positions.table") or ".prefix." in name:
            nn.init.trunc_normal_(parameter, std=std)
    init_units(model)


def zero_head(model: nn.Module) -> None:
    """The last class layer at zero: every class starts equally likely."""
    for name, module in model.named_modules():
        if name == "head.linear" and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def skip_on_meta(model: nn.Module) -> bool:
    """Whether there is nothing to fill: the model was built for its shapes alone."""
    return any(parameter.device == torch.device("meta") for parameter in model.parameters())


def init_pvt_v2(model: nn.Module) -> None:
    """PVT v2: linear layers as in DeiT; every convolution N(0, 2 / fan out), fan out = k² · outputs / groups."""
    init_trunc_normal(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / outputs))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_swin(model: nn.Module) -> None:
    """Swin: linear layers as in DeiT, relative tables N(0, 0.02). Swin v2's block norms start at zero, so that a
    fresh block is the identity."""
    init_trunc_normal(model)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_bias.table"):
            nn.init.trunc_normal_(parameter, std=0.02)
    for module in model.modules():
        if getattr(module, "order", "") == "res-post":
            for norm in (module.norm1, module.norm2):
                nn.init.zeros_(norm.weight)  # type: ignore[union-attr, arg-type]


def init_pit(model: nn.Module) -> None:
    """PiT: positions and class tokens N(0, 0.02); linear layers and convolutions keep torch's default."""
    for name, parameter in model.named_parameters():
        if name.endswith("positions.table") or ".prefix." in name:
            nn.init.trunc_normal_(parameter, std=0.02)


def init_resnet(model: nn.Module) -> None:
    """ResNets: convolutions N(0, 2 / fan out) (He et al. 2015); norms 1 and 0; the last layer keeps torch's default.

    Non-local blocks: convolutions N(0, 0.01), and their norm zero (or, without one, their last convolution).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in model.modules():
        if isinstance(module, NonLocal):
            module.init_weights()


def init_detr(model: nn.Module) -> None:
    """DETR: Xavier for every matrix of encoder and decoder, queries, keys and values drawn as one matrix.

    Biases of attention are zero; queries N(0, 1), learned positions U(0, 1); heads keep torch's default. The
    backbone stays as its own family starts it.
    """
    for name, module in model.named_modules():
        if not name.startswith(("encoder.", "decoder.")):
            continue
        if isinstance(module, QueryAttention):
            for part in (module.query, module.key, module.value):
                bound = math.sqrt(6 / (part.in_features + 3 * part.out_features))
                nn.init.uniform_(part.weight, -bound, bound)
            nn.init.xavier_uniform_(module.proj.weight)
            for part in (module.query, module.key, module.value, module.proj):
                nn.init.zeros_(part.bias)
        elif isinstance(module, Mlp):
            nn.init.xavier_uniform_(module.fc1.weight)
            nn.init.xavier_uniform_(module.fc2.weight)
    for module in model.modules():
        if isinstance(module, LearnedAxes):
            nn.init.uniform_(module.rows.weight)
            nn.init.uniform_(module.columns.weight)


def init_masks(model: nn.Module) -> None:
    """What stands behind a segmenter's backbone: convolutions N(0, 2 / fan out), class layers N(0, 0.01), biases 0.

    The backbone stays as its own family starts it.
    """
    for name, module in model.named_modules():
        if name.startswith("backbone.") or not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(".linear"):
            nn.init.normal_(module.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_trans2seg(model: nn.Module) -> None:
    """Trans2Seg: the transformer N(0, 0.02), its biases 0, positions, class token and queries N(0, 0.02); the
    convolutional head as other segmenters'; the last convolution keeps torch's default."""
    score = model.head.score  # type: ignore[union-attr]
    init_masks(model)
    score.reset_parameters()  # type: ignore[operator, union-attr]
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or name == "head.encoder.entry.patches.proj"
        if linear and not name.startswith("backbone."):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.startswith("head.") and (name.endswith(("positions.table", "queries")) or ".prefix." in name):
            nn.init.trunc_normal_(parameter, std=0.02)
