"""The sliding window: where windows lie, the mean where they overlap, and sizes of every kind."""

from __future__ import annotations

import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.nn.shapes import MaskOutput
from vitrail.tasks.sliding import slide, starts


def pointwise(images: torch.Tensor) -> torch.Tensor:
    """A network that looks at each pixel alone: where windows lie cannot matter."""
    return torch.stack([images.sum(1), images[:, 0] * 2], dim=1)


def test_windows_lie_where_the_published_code_puts_them() -> None:
    assert starts(1025, 768, 512) == [0, 257]
    assert starts(2049, 768, 512) == [0, 512, 1024, 1281]
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(100, 512, 341) == [0]


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (20, 31), (3, 40)])
@pytest.mark.parametrize("together", [1, 4])
def test_a_network_of_single_pixels_gives_the_same_as_in_one_piece(
    size: tuple[int, int], together: int
) -> None:
    images = torch.randn(2, 3, *size)
    found = slide(lambda cut: MaskOutput(pointwise(cut)), images, (8, 8), (5, 3), together=together)
    assert torch.allclose(found, pointwise(images), atol=1e-6)


def test_overlapping_windows_are_averaged() -> None:
    calls: list[tuple[int, ...]] = []

    def numbered(cut: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(cut.shape))
        return torch.full((1, 1, *cut.shape[2:]), float(len(calls)))

    found = slide(numbered, torch.zeros(1, 3, 4, 6), (4, 4), (4, 2))
    assert calls == [(1, 3, 4, 4)] * 2
    assert found[0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


def test_windows_of_all_pictures_go_together_and_come_back_apart() -> None:
    images = torch.arange(2).float()[:, None, None, None].expand(2, 1, 4, 8) + torch.arange(8.0)
    found = slide(lambda cut: cut, images, (4, 4), (4, 4), together=2)
    assert torch.equal(found, images)


def test_a_stride_that_leaves_gaps_is_refused() -> None:
    with pytest.raises(ConfigError, match="between 1 and the window"):
        slide(pointwise, torch.zeros(1, 3, 9, 9), (4, 4), (5, 4))
    with pytest.raises(ConfigError, match="at least 1"):
        slide(pointwise, torch.zeros(1, 3, 9, 9), (4, 4), together=0)
