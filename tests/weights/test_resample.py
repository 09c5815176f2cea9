"""Tables and kernels at a new size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vitrail.errors import WeightsError
from vitrail.weights import resample


@pytest.mark.parametrize("method", resample.METHODS)
def test_a_plane_of_positions_stays_a_plane_and_prefix_rows_stay(method: str) -> None:
    rows = torch.linspace(0, 1, 8)[:, None].expand(8, 6).reshape(1, 48, 1)
    table = torch.cat([torch.full((1, 2, 1), 9.0), rows], dim=1)
    larger = resample.positions(table, (8, 6), (16, 9), prefix=2, method=method)
    assert larger.shape == (1, 2 + 16 * 9, 1)
    assert torch.equal(larger[:, :2], table[:, :2])
    maps = larger[0, 2:, 0].reshape(16, 9)
    assert torch.allclose(maps, maps[:, :1].expand_as(maps), atol=1e-6)
    assert bool((maps[1:, 0] >= maps[:-1, 0] - 1e-6).all())


def test_the_same_grid_is_not_touched() -> None:
    table = torch.randn(1, 10, 4)
    assert resample.positions(table, (3, 3), (3, 3), prefix=1) is table
    kernel = torch.randn(2, 3, 4, 4)
    assert resample.patch_kernel(kernel, (4, 4)) is kernel and resample.channels(kernel, 3) is kernel


def test_google_is_linear_interpolation_between_corners() -> None:
    table = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 4, 1)
    larger = resample.positions(table, (2, 2), (3, 3), method="bilinear-corners")
    assert torch.allclose(larger.flatten(), torch.tensor([0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3.0]))


def test_half_precision_is_resampled_in_single() -> None:
    table = torch.randn(1, 16, 8, dtype=torch.bfloat16)
    want = resample.positions(table.float(), (4, 4), (7, 7)).bfloat16()
    got = resample.positions(table, (4, 4), (7, 7))
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_a_larger_patch_kernel_sees_a_larger_patch_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel, patch = (torch.randn(*s, generator=generator) for s in ((5, 3, 8, 8), (1, 3, 8, 8)))
    want = functional.conv2d(patch, kernel)
    for size in ((16, 16), (12, 20)):
        resized = resample.resize(patch, size)
        got = functional.conv2d(resized, resample.patch_kernel(kernel, size))
        assert torch.allclose(got, want, atol=1e-4)


def test_patch_kernels_and_channels_equal_timms() -> None:
    layers = pytest.importorskip("timm.layers", reason="timm comes with the extra `peers`")
    manipulate = pytest.importorskip("timm.models._manipulate")
    kernel = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for size in ((8, 8), (32, 32), (14, 20)):
        want = layers.resample_patch_embed(kernel, list(size))
        assert torch.allclose(resample.patch_kernel(kernel, size), want, atol=1e-5)
    for count in (1, 2, 4, 7):
        want = manipulate.adapt_input_conv(count, kernel)
        assert torch.allclose(resample.channels(kernel, count), want, atol=1e-6)


def test_grey_channels_sum() -> None:
    kernel, grey = torch.randn(2, 3, 4, 4), torch.randn(1, 1, 4, 4)
    want = functional.conv2d(grey.expand(1, 3, 4, 4), kernel)
    assert torch.allclose(functional.conv2d(grey, resample.channels(kernel, 1)), want, atol=1e-5)


def test_relative_tables_keep_their_middle() -> None:
    table = torch.randn(13 * 13, 3)
    larger = resample.relative_table(table, (7, 7), (8, 12))
    assert larger.shape == (15 * 23, 3)
    smooth = torch.linspace(-1, 1, 13)[:, None].expand(13, 13).reshape(-1, 1)
    assert resample.relative_table(smooth, (7, 7), (10, 10)).reshape(19, 19)[9].abs().max() < 1e-6
    assert resample.relative_table(table, (7, 7), (7, 7)) is table


def test_tables_that_do_not_belong_are_refused() -> None:
    with pytest.raises(WeightsError, match="has the shape"):
        resample.positions(torch.zeros(1, 10, 4), (3, 3), (4, 4))
    with pytest.raises(WeightsError, match="has 169 rows"):
        resample.relative_table(torch.zeros(10, 3), (7, 7), (8, 8))
    with pytest.raises(WeightsError, match="Did you mean"):
        resample.positions(torch.zeros(1, 9, 4), (3, 3), (4, 4), method="bicubik")
