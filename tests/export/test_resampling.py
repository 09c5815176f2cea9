"""Positions in exported graphs: two matrix products in place of a resizing that engines do each in their own way."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from vitrail.nn.position import Resampling, _resampled_by_products, resample_table
from vitrail.nn.shapes import Grid


@pytest.mark.parametrize("method", get_args(Resampling))
@pytest.mark.parametrize("new", [Grid(7, 5), Grid(14, 5), Grid(3, 9), Grid(24, 31)])
def test_products_resample_as_torch_does(method: Resampling, new: Grid) -> None:
    old = Grid(7, 5)
    table = torch.randn(1, 2 + old.size, 6)
    wanted = resample_table(table, old, new, 2, method)
    assert torch.allclose(_resampled_by_products(table, old, new, 2, method), wanted, atol=2e-5)
