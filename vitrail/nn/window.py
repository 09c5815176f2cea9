"""Attention inside windows (Swin, 2103.14030 section 3.2) and its cosine form (Swin v2, 2111.09883 section 3.2).

A map is cut into windows of w x w tokens, and each token attends to its own window: the cost grows with the
map's area, not with its square. Every second block moves the windows by half their side, so that neighbours
meet; windows that the move wraps around an edge are kept apart by a mask.

Any grid: an axis that is no longer than the window is one window and is not shifted (the original's rule at
its native sizes, taken axis by axis); a longer one is padded with zeros below and to the right, before the
shift (the order of the detection code; the padding is attended to, as there). Windows, shift and mask follow
from the grid in every call, and no module remembers a resolution. (An exported graph has a free batch, but the
size that it was exported at: how many windows there are decides the shapes inside.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vitrail.nn.attention import Attention, attend, attention_weights
from vitrail.nn.shapes import Grid

MASKED = -100.0
"""What the originals add to the score of a pair that the shift's wrapping brought together."""


class Cut(NamedTuple):
    """How a grid is cut into windows."""

    window: Grid
    """Rows and columns of a window."""
    shift: Grid
    """By how much the map is rolled up and to the left before cutting."""
    padded: Grid
    """The grid with its padding, a multiple of the window."""

    @property
    def windows(self) -> int:
        """Windows in one map."""
        return (self.padded.rows // self.window.rows) * (self.padded.columns // self.window.columns)


def cut(grid: Grid, window: Grid, shifted: bool) -> Cut:
    """How windows of at most this size cover a grid."""
    sides, shifts, padded = [], [], []
    for size, side in zip(grid, window, strict=True):
        sides.append(min(size, side))
        shifts.append(side // 2 if shifted and size > side else 0)
        padded.append(-(-size // sides[-1]) * sides[-1])
    return Cut(Grid(*sides), Grid(*shifts), Grid(*padded))


def partition(map: Shaped[Tensor, "B h w D"], window: Grid) -> Shaped[Tensor, "B W L D"]:
    """Windows row by row, tokens row by row inside each."""
    parts = map.unflatten(2, (-1, window.columns)).unflatten(1, (-1, window.rows))  # [B, h/r, r, w/c, c, D]
    windows: Tensor = parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, W, L, D]
    return windows


def reverse(windows: Float[Tensor, "B W L D"], window: Grid, padded: Grid) -> Float[Tensor, "B h w D"]:
    """The map of which these are the windows."""
    columns = padded.columns // window.columns
    parts = windows.unflatten(2, tuple(window)).unflatten(1, (-1, columns))  # [B, h/r, w/c, r, c, D]
    map: Tensor = parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, h, w, D]
    return map


def shift_mask(plan: Cut, like: Tensor) -> Float[Tensor, "W L L"] | None:
    """0 for pairs of tokens that lie together on the map, MASKED for those that only the roll brought together.

    Along each axis the rolled map has three bands: windows that the roll left whole, and the two parts of the
    last window. Tokens of different bands do not belong together.
    """
    if plan.shift == (0, 0):
        return None
    bands = []
    for size, side, shift in zip(plan.padded, plan.window, plan.shift, strict=True):
        places = torch.arange(size, device=like.device)
        bands.append(
            (places >= size - side).long() + (places >= size - shift).long() if shift else 0 * places
        )
    regions = 3 * bands[0][:, None] + bands[1]  # [h, w]
    labels = partition(regions[None, :, :, None], plan.window)[0, :, :, 0]  # [W, L]
    apart = labels[:, :, None] != labels[:, None, :]  # [W, L, L]
    return apart.to(like.dtype) * MASKED


def offset_index(window: Grid, table: Grid, device: torch.device) -> Int[Tensor, "L L"]:
    """For each query and key of a window, the row of a table that lists the offsets of a window `table`."""
    rows = torch.arange(window.rows, device=device)
    columns = torch.arange(window.columns, device=device)
    down = rows[:, None] - rows + table.rows - 1  # [r, r], query first
    right = columns[:, None] - columns + table.columns - 1  # [c, c]
    index = down[:, None, :, None] * (2 * table.columns - 1) + right[None, :, None, :]  # [r, c, r, c]
    return index.flatten(2).flatten(0, 1)  # [L, L]


class RelativeTable(nn.Module):
    """One learned bias for each head and offset between two tokens of a window (Swin, equation 4).

    A window smaller than the table's uses the offsets it has.
    """

    def __init__(self, heads: int, window: Grid) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros((2 * window.rows - 1) * (2 * window.columns - 1), heads))

    def forward(self, window: Grid) -> Float[Tensor, "H L L"]:
        index = offset_index(window, self.window, self.table.device)
        return self.table[index].permute(2, 0, 1)  # [H, L, L]


class RelativeNetwork(nn.Module):
    """The bias as a small network of the offset in logarithmic coordinates (Swin v2, section 3.3).

    Offsets are divided by the window that the weights were trained with (`trained`), so that weights go over
    to windows of another size; the bias lies between 0 and 16.
    """

    def __init__(self, heads: int, trained: Grid, hidden: int = 512) -> None:
        super().__init__()
        self.trained = trained
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads, bias=False)

    def forward(self, window: Grid) -> Float[Tensor, "H L L"]:
        device = self.fc1.weight.device
        axes = [
            log_offsets(side, trained, device) for side, trained in zip(window, self.trained, strict=True)
        ]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # [offsets, 2]
        table = self.fc2(F.relu(self.fc1(offsets.to(self.fc1.weight.dtype))))  # [offsets, H]
        bias = table[offset_index(window, window, device)].permute(2, 0, 1)  # [H, L, L]
        return 16 * torch.sigmoid(bias)


def log_offsets(side: int, trained: int, device: torch.device) -> Float[Tensor, offsets]:
    """sign(u) log2(1 + |u|) / log2(8) for u = 8 Δ / (trained - 1), Δ from 1 - side to side - 1."""
    steps = torch.arange(1 - side, side, device=device, dtype=torch.float32)
    scaled = 8 * steps / max(trained - 1, 1)  # a window of one token has the offset 0 alone
    return torch.sign(scaled) * torch.log2(1 + scaled.abs()) / math.log2(8)


class Kept(NamedTuple):
    """A bias that was computed, and what it was computed from."""

    state: tuple[Any, ...]
    weights: tuple[Tensor, ...]
    """Held, so that no other tensor can take their place in memory."""
    bias: Tensor


class WindowAttention(Attention):
    """Multi-head attention among the tokens of each window, with a bias for their relative positions.

    `window` is the largest window; `shifted` moves the windows by half their side. The map has no prefix.
    """

    sees_grid = True

    def __init__(
        self,
        width: int,
        heads: int,
        window: Grid,
        relative_bias: nn.Module,
        *,
        shifted: bool = False,
        scale: float | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads, scale=scale, qkv_bias=qkv_bias, attention_dropout=attention_dropout, dropout=dropout
        )
        self.window, self.shifted = window, shifted
        self.relative_bias = relative_bias
        self._kept: Kept | None = None

    def forward(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:  # type: ignore[override]
        plan = cut(grid, self.window, self.shifted)
        windows = self._windows(self._padded(tokens, grid, plan), plan)  # [B, W, L, D]
        queries, keys, values = self.project(windows.flatten(0, 1))  # [B * W, H, L, E]
        heads = self._attend(queries, keys, values, plan)  # [B * W, H, L, E]
        mixed = self.merge(heads, values).unflatten(0, (-1, plan.windows))  # [B, W, L, D]
        return self._laid_out(mixed, grid, plan)

    def weights(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B H N M"]:  # type: ignore[override]
        """Weights over the whole padded map, zero outside the window; M is N where nothing is padded."""
        inside, members = self.local_weights(tokens, grid), self.members(grid, tokens.device)
        plan = cut(grid, self.window, self.shifted)
        everywhere = inside.new_zeros(inside.shape[0], self.heads, plan.padded.size, plan.padded.size)
        everywhere[:, :, members[:, :, None], members[:, None, :]] = inside
        places = torch.arange(plan.padded.size, device=tokens.device).view(*plan.padded)
        return everywhere[:, :, places[: grid.rows, : grid.columns].flatten()]  # [B, H, N, M]

    def mix(  # type: ignore[override]
        self, weights: Float[Tensor, "B H N M"], tokens: Float[Tensor, "B N D"], grid: Grid
    ) -> Float[Tensor, "B N D"]:
        plan = cut(grid, self.window, self.shifted)
        values = self.project(self._padded(tokens, grid, plan).flatten(1, 2))[2]  # [B, H, M, E]
        return self.merge(weights @ values, values)

    def local_weights(self, tokens: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B H W L L"]:
        """The same weights window by window, without the zeros outside; `members` says which cells these are."""
        plan = cut(grid, self.window, self.shifted)
        windows = self._windows(self._padded(tokens, grid, plan), plan)  # [B, W, L, D]
        queries, keys, _ = (
            part.unflatten(0, (-1, plan.windows)) for part in self.project(windows.flatten(0, 1))
        )
        bias, mask = self.relative_bias(plan.window), shift_mask(plan, tokens)
        if mask is not None:
            bias = bias + mask[:, None]  # [W, H, L, L]
        return attention_weights(queries, keys, self.scale, bias).transpose(1, 2)  # [B, H, W, L, L]

    def local_mix(
        self, weights: Float[Tensor, "B H W L L"], tokens: Float[Tensor, "B N D"], grid: Grid
    ) -> Float[Tensor, "B N D"]:
        """What `forward` answers, from weights window by window."""
        plan = cut(grid, self.window, self.shifted)
        windows = self._windows(self._padded(tokens, grid, plan), plan)  # [B, W, L, D]
        values = self.project(windows.flatten(0, 1))[2]  # [B * W, H, L, E]
        mixed = self.merge(weights.transpose(1, 2).flatten(0, 1) @ values, values)  # [B * W, L, D]
        return self._laid_out(mixed.unflatten(0, (-1, plan.windows)), grid, plan)

    def members(self, grid: Grid, device: torch.device) -> Int[Tensor, "W L"]:
        """Which cells of the padded map each window holds, row by row."""
        plan = cut(grid, self.window, self.shifted)
        places = torch.arange(plan.padded.size, device=device).view(1, *plan.padded, 1)  # [1, h, w, 1]
        return self._windows(places, plan)[0, :, :, 0]  # [W, L]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Cut) -> Float[Tensor, "BW H L E"]:
        bias = self._bias(plan, queries)
        dropout = self.attention_dropout if self.training else 0.0
        if len(bias) == self.heads:
            return attend(queries, keys, values, self.scale, bias, dropout)
        # windows differ in their mask: they stand beside the heads, so that one bias serves the whole batch
        parts = (part.unflatten(0, (-1, plan.windows)) for part in (queries, keys, values))
        queries, keys, values = (part.flatten(1, 2) for part in parts)  # each [B, W * H, L, E]
        heads = attend(queries, keys, values, self.scale, bias, dropout)
        apart: Tensor = heads.unflatten(1, (plan.windows, self.heads)).flatten(0, 1)  # [B * W, H, L, E]
        return apart

    def _bias(self, plan: Cut, like: Tensor) -> Float[Tensor, "_ L L"]:
        """The relative bias [H, L, L], with the mask of each window where they are shifted: [W * H, L, L].

        It is kept from call to call while nobody learns, until a weight behind it changes.
        """
        weights = tuple(self.relative_bias.parameters())
        jit: Any = torch.jit  # it states no types
        tracing = torch.compiler.is_compiling() or jit.is_tracing()
        if torch.is_grad_enabled() or tracing or any(weight.is_inference() for weight in weights):
            return self._computed_bias(plan, like)
        state = (plan, like.dtype, *((weight.data_ptr(), weight._version) for weight in weights))
        kept = self._kept  # one look, so that threads may share the module
        if (
            kept is None
            or kept.state != state
            or any(a is not b for a, b in zip(kept.weights, weights, strict=True))
        ):
            kept = Kept(state, weights, self._computed_bias(plan, like).contiguous())
            self._kept = kept
        return kept.bias

    def _computed_bias(self, plan: Cut, like: Tensor) -> Float[Tensor, "_ L L"]:
        bias, mask = self.relative_bias(plan.window), shift_mask(plan, like)
        return bias if mask is None else (bias + mask[:, None]).flatten(0, 1)

    def _padded(self, tokens: Float[Tensor, "B N D"], grid: Grid, plan: Cut) -> Float[Tensor, "B h w D"]:
        map = tokens.unflatten(1, tuple(grid))  # [B, h, w, D]
        below, right = plan.padded.rows - grid.rows, plan.padded.columns - grid.columns
        return F.pad(map, (0, 0, 0, right, 0, below)) if below or right else map

    def _windows(self, map: Tensor, plan: Cut) -> Tensor:
        """The windows of a padded map after the shift, [B, W, L, D]."""
        if plan.shift != (0, 0):
            map = torch.roll(map, (-plan.shift.rows, -plan.shift.columns), dims=(1, 2))
        return partition(map, plan.window)

    def _laid_out(self, windows: Float[Tensor, "B W L D"], grid: Grid, plan: Cut) -> Float[Tensor, "B N D"]:
        """The tokens of windows in the order of the grid, shift and padding undone."""
        map = reverse(windows, plan.window, plan.padded)
        if plan.shift != (0, 0):
            map = torch.roll(map, tuple(plan.shift), dims=(1, 2))
        return map[:, : grid.rows, : grid.columns].flatten(1, 2)  # [B, N, D]

    def extra_repr(self) -> str:
        return f"window={tuple(self.window)}, shifted={self.shifted}"


class CosineWindowAttention(WindowAttention):
    """Window attention whose scores are cosines times a learned temperature of each head (Swin v2, equation 2).

    Keys have no bias. The temperature is e to the `logit_scale`, at most 100.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        window: Grid,
        relative_bias: nn.Module,
        *,
        shifted: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads, window, relative_bias, shifted=shifted, scale=1.0, qkv_bias=False,
            attention_dropout=attention_dropout, dropout=dropout,
        )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def project(self, tokens: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit queries times the temperature, unit keys, and values, each [B, H, N, E]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        joint = F.linear(tokens, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))  # [B, N, 3, H, E]
        queries, keys, values = joint.permute(2, 0, 3, 1, 4).unbind(0)  # three of [B, H, N, E]
        # A zero key (padding) must stay zero, which the guard against division by zero cannot promise in half.
        exact = torch.promote_types(queries.dtype, torch.float32)
        temperature = self.logit_scale.clamp(max=math.log(100)).exp()
        queries = (F.normalize(queries.to(exact), dim=-1) * temperature).to(values.dtype)
        return queries, F.normalize(keys.to(exact), dim=-1).to(values.dtype), values
