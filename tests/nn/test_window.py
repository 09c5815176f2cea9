"""Windows, shifts, masks and relative biases against loops over pairs of tokens, on any grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vitrail.nn.shapes import Grid
from vitrail.nn.window import (
    CosineWindowAttention,
    RelativeNetwork,
    RelativeTable,
    WindowAttention,
    cut,
    log_offsets,
    offset_index,
    partition,
    reverse,
    shift_mask,
)

GRIDS = [Grid(8, 8), Grid(6, 9), Grid(4, 11), Grid(3, 2), Grid(1, 7)]


def attention(version: int, window: Grid, shifted: bool) -> WindowAttention:
    torch.manual_seed(0)
    if version == 1:
        mixer = WindowAttention(8, 2, window, RelativeTable(2, window), shifted=shifted)
    else:
        mixer = CosineWindowAttention(8, 2, window, RelativeNetwork(2, window), shifted=shifted)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer.double()


def by_hand(mixer: WindowAttention, tokens: Tensor, grid: Grid, window: Grid, shifted: bool) -> Tensor:
    """For each token: who shares its window after the shift and lies next to it without wrapping, one by one."""
    padded = [-(-size // min(size, side)) * min(size, side) for size, side in zip(grid, window, strict=True)]
    sides = [min(size, side) for size, side in zip(grid, window, strict=True)]
    shifts = [side // 2 if shifted and size > side else 0 for size, side in zip(grid, window, strict=True)]
    map = torch.zeros(*padded, tokens.shape[-1], dtype=tokens.dtype)
    map[: grid.rows, : grid.columns] = tokens.reshape(grid.rows, grid.columns, -1)
    queries, keys, values = (part[0] for part in mixer.project(map.reshape(1, -1, map.shape[-1])))
    bias = mixer.relative_bias(Grid(*sides))

    def place(cell: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[bool, bool]]:
        """The window, the place inside it, and whether the roll carried the cell over an edge."""
        moved = [(at - shift) % size for at, shift, size in zip(cell, shifts, padded, strict=True)]
        over = tuple(at < shift for at, shift in zip(cell, shifts, strict=True))
        windows = tuple(at // side for at, side in zip(moved, sides, strict=True))
        inside = tuple(at % side for at, side in zip(moved, sides, strict=True))
        return windows, inside, over  # type: ignore[return-value]

    cells = list(itertools.product(range(padded[0]), range(padded[1])))
    out = []
    for cell in itertools.product(range(grid.rows), range(grid.columns)):
        mine, here, over = place(cell)
        friends = [other for other in cells if place(other)[0] == mine and place(other)[2] == over]
        numbers = [at[0] * padded[1] + at[1] for at in friends]
        own = cell[0] * padded[1] + cell[1]
        row = here[0] * sides[1] + here[1]
        inside = [place(other)[1][0] * sides[1] + place(other)[1][1] for other in friends]
        scores = mixer.scale * (queries[:, own, None] * keys[:, numbers]).sum(-1) + bias[:, row, inside]
        out.append((scores.softmax(-1)[:, :, None] * values[:, numbers]).sum(1).flatten())
    return mixer.proj(torch.stack(out))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_attention_is_its_sum_over_neighbours_on_any_grid(version: int, shifted: bool, grid: Grid) -> None:
    window = Grid(4, 4)
    mixer = attention(version, window, shifted)
    tokens = torch.randn(1, grid.size, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(
            mixer(tokens, grid)[0], by_hand(mixer, tokens[0], grid, window, shifted), atol=1e-10
        )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_written_down_mix_to_the_same_tokens(version: int, shifted: bool, grid: Grid) -> None:
    mixer = attention(version, Grid(4, 4), shifted)
    tokens = torch.randn(2, grid.size, 8, dtype=torch.float64)
    with torch.no_grad():
        weights = mixer.weights(tokens, grid)
        assert torch.allclose(weights.sum(-1), torch.ones(1, dtype=torch.float64))
        assert torch.allclose(mixer.mix(weights, tokens, grid), mixer(tokens, grid), atol=1e-10)


def test_a_window_that_covers_an_axis_is_not_shifted_and_another_is_padded() -> None:
    plan = cut(Grid(7, 16), Grid(7, 7), shifted=True)
    assert (plan.window, plan.shift, plan.padded) == (Grid(7, 7), Grid(0, 3), Grid(7, 21))
    small = cut(Grid(5, 3), Grid(7, 7), shifted=True)
    assert (small.window, small.shift, small.padded) == (Grid(5, 3), Grid(0, 0), Grid(5, 3))


def test_partition_and_reverse_undo_each_other() -> None:
    map = torch.arange(2 * 6 * 8 * 3, dtype=torch.float32).reshape(2, 6, 8, 3)
    windows = partition(map, Grid(3, 4))
    assert windows.shape == (2, 4, 12, 3)
    assert torch.equal(windows[0, 1, 0], map[0, 0, 4])
    assert torch.equal(reverse(windows, Grid(3, 4), Grid(6, 8)), map)


def test_offsets_have_the_published_numbers() -> None:
    index = offset_index(Grid(7, 7), Grid(7, 7), torch.device("cpu"))
    assert index[0, :7].tolist() == [84, 83, 82, 81, 80, 79, 78]
    assert (index[0, 7].item(), index[48, 0].item(), index.max().item()) == (71, 168, 168)


def test_logarithmic_offsets_have_the_published_numbers() -> None:
    told = [-1.0566, -0.9913, -0.9157, -0.8260, -0.7156, -0.5721, -0.3665, 0.0]
    assert log_offsets(8, 8, torch.device("cpu"))[:8].tolist() == pytest.approx(told, abs=5e-5)
    assert log_offsets(24, 12, torch.device("cpu"))[-1].item() == pytest.approx(1.3826, abs=5e-5)
    assert log_offsets(1, 1, torch.device("cpu")).tolist() == [0.0]


def test_masks_have_the_golden_values(golden: object) -> None:
    numbers = golden("swin_tiny_patch4_window7_224")  # type: ignore[operator]
    shapes = {name: shape for name, shape, _ in numbers["derived"]}
    mask = shift_mask(cut(Grid(56, 56), Grid(7, 7), shifted=True), torch.zeros(1))
    assert mask is not None
    assert list(mask.shape) == shapes["layers.0.blocks.1.attn_mask"]
    assert mask[:-8].reshape(7, 8, 49, 49)[:, :7].abs().max() == 0
    assert set(mask.unique().tolist()) == {-100.0, 0.0}


def test_the_temperature_is_at_most_a_hundred() -> None:
    mixer = attention(2, Grid(2, 2), shifted=False)
    with torch.no_grad():
        mixer.logit_scale.fill_(50.0)  # type: ignore[operator]
    queries, keys, _ = mixer.project(torch.randn(1, 4, 8, dtype=torch.float64))
    assert torch.allclose(queries.norm(dim=-1), torch.tensor(100.0, dtype=torch.float64))
    assert torch.allclose(keys.norm(dim=-1), torch.tensor(1.0, dtype=torch.float64))


def test_padding_stays_finite_in_half_precision() -> None:
    mixer = attention(2, Grid(4, 4), shifted=True).to(torch.float16)
    grid = Grid(5, 6)
    with torch.no_grad():
        for parameter in (mixer.q_bias, mixer.v_bias):  # keys of padding are zero
            parameter.zero_()  # type: ignore[operator]
        assert torch.isfinite(mixer(torch.randn(1, grid.size, 8, dtype=torch.float16), grid)).all()
    assert math.isfinite(mixer.logit_scale.sum().item())  # type: ignore[operator]


@pytest.mark.parametrize("version", [1, 2])
def test_a_bias_kept_from_before_follows_weights_grid_and_type(version: int) -> None:
    mixer, grid = attention(version, Grid(4, 4), shifted=True), Grid(8, 8)
    tokens = torch.randn(2, grid.size, 8, dtype=torch.float64)

    def agrees(tokens: Tensor, grid: Grid) -> bool:
        learning = mixer(tokens, grid).detach()  # nothing is kept where gradients may flow
        with torch.no_grad():
            return torch.allclose(mixer(tokens, grid), learning, atol=1e-5)

    assert agrees(tokens, grid) and agrees(tokens, grid)
    with torch.no_grad():
        next(mixer.relative_bias.parameters()).add_(1 + torch.rand(()))
        before = mixer(tokens, grid)
        next(mixer.relative_bias.parameters()).mul_(-1)
        assert not torch.allclose(mixer(tokens, grid), before)
    assert agrees(tokens, grid) and agrees(tokens[:, :24], Grid(4, 6))
    mixer.load_state_dict({name: value * 0.5 for name, value in mixer.state_dict().items()}, assign=True)
    assert agrees(tokens, grid)
    mixer.float()
    assert agrees(tokens.float(), grid)
