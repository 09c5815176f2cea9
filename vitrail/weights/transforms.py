"""What happens to one tensor on its way: two-way transforms, and fits to another size. Tables by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.weights import resample

Context = Mapping[str, Any]


class Transform(NamedTuple):
    """Theirs to ours, and ours to theirs; each undoes the other."""

    read: Callable[[Tensor, Context], Tensor]
    write: Callable[[Tensor, Context], Tensor]


def _heads(context: Context) -> int:
    if "heads" not in context:
        raise WeightsError("This layout stores attention by head: give context={'heads': number of heads}.")
    return int(context["heads"])


def _prefix_zeros(table: Tensor, context: Context) -> Tensor:
    """Entries for the prefix tokens, all zero: adding them is the same as having none."""
    zeros = table.new_zeros(table.shape[0], int(context.get("prefix", 1)), table.shape[2])
    return torch.cat([zeros, table], dim=1)


def _without_prefix_zeros(table: Tensor, context: Context) -> Tensor:
    prefix = int(context.get("prefix", 1))
    if torch.count_nonzero(table[:, :prefix]):
        raise WeightsError("This layout has no positions for prefix tokens, and the model's are not zero.")
    return table[:, prefix:]


def _neighbours_last(tensor: Tensor) -> Tensor:
    """The last axis from (channel, row, column) of 2 x 2 neighbours to (column, row, channel)."""
    turned: Tensor = tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    return turned


def _channels_first(tensor: Tensor) -> Tensor:
    turned: Tensor = tensor.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)
    return turned


def _without_keys(bias: Tensor, context: Context) -> Tensor:
    """The biases of queries and values out of those of queries, keys and values."""
    queries, _, values = bias.chunk(3)
    return torch.cat([queries, values])


def _with_zero_keys(bias: Tensor, context: Context) -> Tensor:
    queries, values = bias.chunk(2)
    return torch.cat([queries, torch.zeros_like(queries), values])


def _swap_first_thirds(rows: Tensor, context: Context) -> Tensor:
    first, second, third = rows.chunk(3)
    return torch.cat([second, first, third])


def _reversed_inputs(weight: Tensor, context: Context) -> Tensor:
    return torch.cat(weight.chunk(4, dim=1)[::-1], dim=1)


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(lambda x, c: x, lambda x, c: x),
    # JAX dense (in, out) <-> torch linear (out, in)
    "linear": Transform(lambda x, c: x.t(), lambda x, c: x.t()),
    # JAX convolution (rows, columns, in, out) <-> torch (out, in, rows, columns)
    "conv": Transform(lambda x, c: x.permute(3, 2, 0, 1), lambda x, c: x.permute(2, 3, 1, 0)),
    # JAX attention kernels: (D, heads, width of a head) for q, k, v; (heads, width of a head, D) for the last
    "heads_in": Transform(
        lambda x, c: x.reshape(x.shape[0], -1).t(),
        lambda x, c: x.t().reshape(x.shape[1], _heads(c), -1),
    ),
    "heads_out": Transform(
        lambda x, c: x.reshape(-1, x.shape[-1]).t(),
        lambda x, c: x.t().reshape(_heads(c), -1, x.shape[0]),
    ),
    "heads_bias": Transform(lambda x, c: x.reshape(-1), lambda x, c: x.reshape(_heads(c), -1)),
    # (1, 1, 1, C) <-> (C): how JAX keeps the scale of a group norm
    "vector": Transform(lambda x, c: x.reshape(-1), lambda x, c: x.reshape(1, 1, 1, -1)),
    # (N, D) <-> (1, N, D), and the other way
    "batch": Transform(lambda x, c: x.unsqueeze(0), lambda x, c: x.squeeze(0)),
    "unbatch": Transform(lambda x, c: x.squeeze(0), lambda x, c: x.unsqueeze(0)),
    # a convolution of kernel 1 <-> a linear layer, and the other way
    "conv1x1": Transform(lambda x, c: x.flatten(1), lambda x, c: x[:, :, None, None]),
    "to_conv1x1": Transform(lambda x, c: x[:, :, None, None], lambda x, c: x.flatten(1)),
    # rows in the order key, query, value (T2T-ViT's token performer) <-> query, key, value
    "kqv": Transform(_swap_first_thirds, _swap_first_thirds),
    "prefix_zeros": Transform(_prefix_zeros, _without_prefix_zeros),
    # (1, D, h, w) <-> (1, N, D): positions kept as a map (PiT)
    "map": Transform(
        lambda x, c: x.flatten(2).transpose(1, 2),
        lambda x, c: x.transpose(1, 2).unflatten(2, tuple(c["grid"])),
    ),
    # how MMPretrain and Swin lay out the 4 C numbers of four merged tokens
    "unfolded": Transform(lambda x, c: _neighbours_last(x), lambda x, c: _channels_first(x)),
    # (out, in, 1, h, w) <-> (out, in, h, w): a video network's convolution over one frame
    "one_frame": Transform(lambda x, c: x.squeeze(2), lambda x, c: x.unsqueeze(2)),
    # a convolution over four streams side by side that are set in the other order (SETR in mmsegmentation)
    "reversed_inputs": Transform(_reversed_inputs, _reversed_inputs),
    # torchvision's Swin v2 stores a bias of keys that it takes as zero
    "without_keys": Transform(_without_keys, _with_zero_keys),
}


def fit_positions(tensor: Tensor, shape: tuple[int, ...], context: Context) -> tuple[Tensor, str]:
    """A position table for the model's grid; `context` holds `grid`, `prefix` and perhaps `from_grid`.

    With `dense` set, one entry more after the prefix is the distillation token's, which a dense model leaves out.
    """
    prefix, method = int(context.get("prefix", 0)), str(context.get("resample", "bicubic"))
    new = tuple(context["grid"])
    cells, told = tensor.shape[1] - prefix, context.get("from_grid")
    if context.get("dense") and (told[0] * told[1] == cells - 1 if told else _square(cells) is None):
        tensor = torch.cat([tensor[:, :prefix], tensor[:, prefix + 1 :]], dim=1)
    old = told or _square(tensor.shape[1] - prefix)
    if old is None:
        raise WeightsError(
            f"holds {tensor.shape[1] - prefix} grid positions, which make no square, and nothing says"
            " which grid (a model folder's config.json does)"
        )
    table = resample.positions(tensor, (int(old[0]), int(old[1])), (int(new[0]), int(new[1])), prefix, method)
    return table, f"positions resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]} ({method})"


def fit_pyramid(tensor: Tensor, shape: tuple[int, ...], context: Context) -> tuple[Tensor, str]:
    """The position table of one stage of a pyramid, whose grid is `grid` halved so many times; the last stage's
    table may have a class token's entry in front."""
    for level in range(16):
        grid = tuple(int(side) >> level for side in context["grid"])
        prefix = shape[1] - grid[0] * grid[1]
        if prefix in (0, 1):
            break
    else:
        raise WeightsError(f"holds {tensor.shape[1]} positions, and no stage has {shape[1]}")
    told = context.get("from_grid")
    old = None if told is None else tuple(int(side) >> level for side in told)
    return fit_positions(tensor, shape, {**context, "grid": grid, "prefix": prefix, "from_grid": old})


def fit_patch(tensor: Tensor, shape: tuple[int, ...], context: Context) -> tuple[Tensor, str]:
    """A patch kernel for the model's patch size and input channels."""
    stories = []
    if tensor.shape[1] != shape[1]:
        tensor, story = fit_channels(tensor, shape, context)
        stories.append(story)
    old, new = tuple(tensor.shape[2:]), (shape[2], shape[3])
    if old != new:
        tensor = resample.patch_kernel(tensor, new)
        stories.append(f"patch kernel resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]} (pseudo-inverse)")
    return tensor, "; ".join(stories)


def fit_channels(tensor: Tensor, shape: tuple[int, ...], context: Context) -> tuple[Tensor, str]:
    """A first kernel for the model's number of input channels."""
    how = "summed" if shape[1] == 1 else "repeated and scaled"
    story = f"input channels from {tensor.shape[1]} to {shape[1]} ({how})"
    return resample.channels(tensor, shape[1]), story


def fit_relative(tensor: Tensor, shape: tuple[int, ...], context: Context) -> tuple[Tensor, str]:
    """A relative table for the model's window; `context` may hold `windows`, those of all stages."""
    method = str(context.get("resample", "bicubic"))
    old = _window(tensor.shape[0])
    known = (
        window
        for window in context.get("windows", ())
        if (2 * window[0] - 1) * (2 * window[1] - 1) == shape[0]
    )
    new = next(known, None) or _window(shape[0])
    if old is None or new is None:
        raise WeightsError("is a relative table of a window that is not square, and nothing says which")
    table = resample.relative_table(tensor, (int(old[0]), int(old[1])), (int(new[0]), int(new[1])), method)
    return table, f"relative table resampled from window {old[0]}x{old[1]} to {new[0]}x{new[1]} ({method})"


FITS: dict[str, Callable[[Tensor, tuple[int, ...], Context], tuple[Tensor, str]]] = {
    "positions": fit_positions,
    "pyramid": fit_pyramid,
    "patch": fit_patch,
    "channels": fit_channels,
    "relative": fit_relative,
}


def _square(cells: int) -> tuple[int, int] | None:
    side = math.isqrt(max(cells, 0))
    return (side, side) if side * side == cells and side else None


def _window(rows: int) -> tuple[int, int] | None:
    side = math.isqrt(rows)
    return ((side + 1) // 2, (side + 1) // 2) if side * side == rows and side % 2 else None
