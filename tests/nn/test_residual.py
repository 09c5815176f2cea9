"""Residual parts: a frozen norm laid into its convolution, and the order of a large picture's channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitrail
from vitrail.nn import resnet
from vitrail.nn.resnet import ConvNorm, FrozenBatchNorm


def frozen(stride: int = 1, bias: bool = False, groups: int = 1) -> ConvNorm:
    torch.manual_seed(0)
    made = ConvNorm(8, 16, 3, stride, groups=groups, norm="frozen", bias=bias).double()
    norm: Any = made.norm
    for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        buffer.uniform_(0.5, 2.0)
    return made


@pytest.mark.parametrize(("stride", "bias", "groups"), [(1, False, 1), (2, True, 1), (2, False, 4)])
def test_a_frozen_norm_in_the_kernel_is_the_norm_behind_it(stride: int, bias: bool, groups: int) -> None:
    layer, image = frozen(stride, bias, groups), torch.randn(2, 8, 24, 40, dtype=torch.float64)
    answers, slopes = [], []
    for once in (True, False):
        layer.zero_grad()
        given = image.clone().requires_grad_()
        assert layer._pays(given)
        answer = layer(given) if once else layer.norm(layer.conv(given))
        answer.square().sum().backward()
        answers.append(answer.detach())
        slopes.append((given.grad, layer.conv.weight.grad))
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_small_map_or_a_norm_that_learns_keeps_its_norm() -> None:
    assert not frozen()._pays(torch.zeros(64, 8, 4, 4)), "whatever the batch is"
    assert not ConvNorm(8, 16, 3)._pays(torch.zeros(1, 8, 64, 64))
    assert isinstance(frozen().norm, FrozenBatchNorm)


def test_the_order_of_channels_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = vitrail.create_model("resnet10_nano", num_classes=3).double().eval()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.inference_mode():
        as_given = model(image)
        monkeypatch.setattr(resnet, "LARGE", 64 * 96)
        turned = model(image)
        assert model.backbone(image).maps[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(turned, as_given, rtol=1e-11, atol=1e-11)
