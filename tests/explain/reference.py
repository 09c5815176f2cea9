"""Attention, rollout and relevance written out in full: whole matrices, loops, float64, as the papers state them.

Nothing of vitrail.explain is used here; of the network, only its weights and what its mixers are given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.nn.class_attention import ClassAttention, TalkingHeads
from vitrail.nn.performer import RandomFeatures
from vitrail.nn.reduction import SpatialReduction
from vitrail.nn.trunk import Stage
from vitrail.nn.window import WindowAttention


def attention(mixer: Any, tokens: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
    """Weights [B, H, N, M], and what each key is made of [M, N]; fewer queries where only the first tokens ask."""
    if isinstance(mixer, SpatialReduction):
        return reduced(mixer, tokens, grid)
    if isinstance(mixer, WindowAttention):
        return windowed(mixer, tokens, grid)
    return plain(mixer, tokens, grid), torch.eye(tokens.shape[1], dtype=tokens.dtype)


def plain(mixer: Any, tokens: Tensor, grid: Any) -> Tensor:
    if isinstance(mixer, ClassAttention):
        count = tokens.shape[1] - grid.rows * grid.columns
        return softmax(heads(mixer.query(tokens[:, :count]), mixer), heads(mixer.key(tokens), mixer), mixer)
    queries, keys, _ = mixer.project(tokens)
    if isinstance(mixer, RandomFeatures):
        return random_features(mixer, queries, keys)
    if isinstance(mixer, TalkingHeads):
        scores = torch.einsum("bhie,bhje->bhij", queries, keys) * mixer.scale
        mixed = torch.einsum("gh,bhij->bgij", mixer.before.weight, scores) + mixer.before.bias[:, None, None]
        return mixed.softmax(-1)
    return softmax(queries, keys, mixer)


def heads(tokens: Tensor, mixer: Any) -> Tensor:
    return torch.stack(tokens.chunk(mixer.heads, dim=2), dim=1)


def softmax(queries: Tensor, keys: Tensor, mixer: Any) -> Tensor:
    scores = torch.exp(torch.einsum("bhie,bhje->bhij", queries, keys) * mixer.scale)
    return scores / scores.sum(-1, keepdim=True)


def reduced(mixer: Any, tokens: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
    """Every key's weight is shared out evenly among the cells that it was made of."""
    keys, made_of = tokens, torch.eye(tokens.shape[1], dtype=tokens.dtype)
    side = mixer.reduction
    if side != 1:
        map = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
        keys = mixer.norm(mixer.reduce(map).flatten(2).transpose(1, 2))
        columns = grid.columns // side
        made_of = torch.zeros(keys.shape[1], tokens.shape[1], dtype=tokens.dtype)
        for key in range(keys.shape[1]):
            for row in range(side):
                for column in range(side):
                    cell = (key // columns * side + row) * grid.columns + key % columns * side + column
                    made_of[key, cell] = 1 / side**2
    return softmax(
        heads(mixer.q(tokens), mixer), heads(mixer.kv(keys).chunk(2, dim=2)[0], mixer), mixer
    ), made_of


def windowed(mixer: Any, tokens: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
    """Pairs of cells that share a window of the shifted map, one by one; padding takes its share and is lost."""
    sides = [min(size, side) for size, side in zip(grid, mixer.window, strict=True)]
    shifts = [
        side // 2 if mixer.shifted and size > side else 0
        for size, side in zip(grid, mixer.window, strict=True)
    ]
    padded = [-(-size // side) * side for size, side in zip(grid, sides, strict=True)]
    map = tokens.reshape(len(tokens), grid.rows, grid.columns, -1)
    map = F.pad(map, (0, 0, 0, padded[1] - grid.columns, 0, padded[0] - grid.rows))
    queries, keys, _ = mixer.project(map.flatten(1, 2))
    bias = mixer.relative_bias(type(grid)(*sides))  # [H, L, L]
    cells = [(row, column) for row in range(padded[0]) for column in range(padded[1])]

    def home(cell: tuple[int, int]) -> tuple[Any, int]:
        """Window, with the part of it that the roll brought from the other side, and place inside."""
        rolled = [(at - shift) % size for at, shift, size in zip(cell, shifts, padded, strict=True)]
        wrapped = tuple(at < shift for at, shift in zip(cell, shifts, strict=True))
        window = tuple(at // side for at, side in zip(rolled, sides, strict=True))
        return (window, wrapped), (rolled[0] % sides[0]) * sides[1] + rolled[1] % sides[1]

    places = [home(cell) for cell in cells]
    scores = torch.full((len(tokens), mixer.heads, len(cells), len(cells)), -math.inf, dtype=tokens.dtype)
    for i, (mine, at) in enumerate(places):
        for j, (theirs, other) in enumerate(places):
            if mine == theirs:
                dot = (queries[:, :, i] * keys[:, :, j]).sum(-1) * mixer.scale
                scores[:, :, i, j] = dot + bias[:, at, other]
    weights = scores.softmax(-1)
    real = [number for number, (row, column) in enumerate(cells) if row < grid.rows and column < grid.columns]
    made_of = torch.zeros(len(cells), len(real), dtype=tokens.dtype)
    made_of[real, range(len(real))] = 1
    return weights[:, :, real], made_of


def random_features(mixer: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """phi(q) · phi(k), each row divided by its sum; phi as the paper writes it."""
    phi_q = mixer.kernel.features(queries, mixer.projection, keys=False)
    phi_k = mixer.kernel.features(keys, mixer.projection, keys=True)
    joint = torch.einsum("bhim,bhjm->bhij", phi_q, phi_k)
    return joint / (joint.sum(-1, keepdim=True) + mixer.kernel.guard)


def layers(network: nn.Module, images: Tensor, target: int | None = None) -> list[tuple[str, Any]]:
    """What happened to the tokens, in order: ("mix", [N, N] averaged over heads) and ("move", [N', N]).

    With a target, the matrices are the means over heads of the positive part of gradient times weight.
    """
    steps: list[tuple[str, Any]] = []
    handles = []
    for stage in network.modules():
        if isinstance(stage, Stage):
            handles.append(
                stage.entry.register_forward_hook(lambda m, a, o: steps.append(("move", (m, a, o))))
            )
            for block in stage.blocks:
                for mixer in [part for part in block.modules() if hasattr(part, "mix")]:
                    handles.append(mixer.register_forward_hook(_explicit(steps)))
    logits = network(images)
    for handle in handles:
        handle.remove()
    weights = [item[0] for kind, item in steps if kind == "mix"]
    gradients = weights
    if target is not None:
        gradients = torch.autograd.grad(logits[0, target], weights, allow_unused=True)
    out: list[tuple[str, Any]] = []
    number = 0
    for kind, item in steps:
        if kind == "move":
            out.append(("move", pooling(*item)))
            continue
        weight, made_of, tokens = item
        matrix = weight[0].detach()
        if target is not None:
            gradient = gradients[number]
            matrix = (matrix * (gradient[0] if gradient is not None else 0)).clamp(min=0)
        number += 1
        whole = torch.zeros(tokens, tokens, dtype=matrix.dtype)
        whole[: matrix.shape[1]] = matrix.mean(0) @ made_of
        out.append(("mix", (whole, matrix.shape[1])))
    return out


def _explicit(steps: list[Any]) -> Any:
    def hook(mixer: Any, arguments: Any, _output: Tensor) -> Any:
        tokens, grid = arguments
        weights, made_of = attention(mixer, tokens, grid)
        if not weights.requires_grad:
            weights.requires_grad_()
        steps.append(("mix", (weights, made_of, tokens.shape[1])))
        return mixer.mix(weights, tokens, grid)

    return hook


def pooling(entry: Any, arguments: Any, output: Any) -> tuple[Tensor, int]:
    """[P' + n', P + n]: each new cell shared out to the old cells in its window; prefix as it is."""
    before, after = arguments[0].shape[2:], output[0].shape[2:]
    old = 0 if arguments[1] is None else arguments[1].shape[1]
    new = 0 if output[1] is None else output[1].shape[1]
    kernel, stride, padding = window(entry, arguments[0].shape[1])
    matrix = torch.zeros(new + after[0] * after[1], old + before[0] * before[1], dtype=torch.float64)
    for token in range(old):
        matrix[token, token] = 1
    down = [line(row, after[0], before[0], kernel, stride, padding) for row in range(after[0])]
    across = [line(column, after[1], before[1], kernel, stride, padding) for column in range(after[1])]
    for row in range(after[0]):
        for column in range(after[1]):
            for y, share in down[row].items():
                for x, other in across[column].items():
                    matrix[new + row * after[1] + column, old + y * before[1] + x] = share * other
    return matrix, new


def line(cell: int, after: int, before: int, kernel: int, stride: int, padding: int) -> dict[int, float]:
    """What one window of a row of them gives each old cell: less where more windows cover it; one at most."""
    covers = [
        [at for at in range(i * stride - padding, i * stride - padding + kernel) if 0 <= at < before]
        for i in range(after)
    ]
    given = {at: 1 / sum(at in other for other in covers) / min(kernel, stride) for at in covers[cell]}
    most = max(1.0, sum(given.values()))
    return {at: share / most for at, share in given.items()}


def window(entry: Any, channels: int) -> tuple[int, int, int]:
    """Kernel, stride and padding of an entry, or of the one part of it that has them."""
    if type(entry).__name__ == "Merge":
        return 2, 2, 0
    for part in entry.modules():
        if type(part).__name__ == "SoftSplit":
            return part.kernel, part.stride, part.padding
        if isinstance(part, nn.Conv2d):
            return part.kernel_size[0], part.stride[0], part.padding[0]
    return 1, 1, 0


def rollout(network: nn.Module, images: Tensor, reader: Tensor) -> Tensor:
    """Shares of the tokens of the first stage in what the reader (a row over the last tokens) reads."""
    product = None
    for kind, item in layers(network, images):
        if kind == "move":
            matrix, _ = item
            product = torch.eye(matrix.shape[0], dtype=torch.float64) if product is None else matrix @ product
        else:
            whole, mixed = item
            step = torch.eye(len(whole), dtype=torch.float64)
            step[:mixed] = (step[:mixed] + whole[:mixed]) / 2
            product = step @ product
    return reader @ product


def relevance(network: nn.Module, images: Tensor, target: int, reader: Tensor) -> Tensor:
    """Chefer et al. 2021, equation 6: R = 1; R = R + A R for every layer; less what the identity alone gives."""
    product = plain = None
    for kind, item in layers(network, images, target):
        if kind == "move":
            matrix, _ = item
            start = torch.eye(matrix.shape[0], dtype=torch.float64)
            product = start if product is None else matrix @ product
            plain = start if plain is None else matrix @ plain
        else:
            product = product + item[0] @ product
    return reader @ product - reader @ plain
