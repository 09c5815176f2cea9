"""Positions at another grid, and patches of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitrail.nn.position import resample_table
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import join, split


def test_the_prefix_keeps_its_rows_and_the_grid_is_resampled() -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 2 + 12, 5)
    out = resample_table(table, Grid(3, 4), Grid(6, 5), prefix=2)
    assert out.shape == (1, 2 + 30, 5)
    assert torch.equal(out[:, :2], table[:, :2])
    image = table[:, 2:].reshape(1, 3, 4, 5).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, size=(6, 5), mode="bicubic", antialias=True)
    assert torch.allclose(out[:, 2:], wanted.permute(0, 2, 3, 1).reshape(1, 30, 5), atol=1e-6)
    assert resample_table(table, Grid(3, 4), Grid(3, 4), prefix=2) is table


def test_a_smooth_table_keeps_its_shape_at_twice_the_size() -> None:
    ramp = torch.linspace(0, 1, 8)[:, None].expand(8, 8).reshape(1, 64, 1)
    out = resample_table(ramp, Grid(8, 8), Grid(16, 16)).reshape(16, 16)
    assert torch.allclose(out[:, 3], out[:, 12], atol=1e-5)
    assert (out.diff(dim=0)[2:-2] > 0).all()


def test_tokens_and_map_are_two_views_of_the_same() -> None:
    tokens = torch.randn(2, 1 + 6, 4)
    map, prefix = split(tokens, Grid(2, 3))
    assert map.shape == (2, 4, 2, 3)
    assert prefix is not None and prefix.shape == (2, 1, 4)
    assert torch.equal(map[1, :, 1, 2], tokens[1, 1 + 5])  # token t lies at (t // columns, t % columns)
    assert torch.equal(join(map, prefix), tokens)
