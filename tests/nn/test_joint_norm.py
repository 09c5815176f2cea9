"""Batch norm over several processes, played by threads' shares one after the other; two real ones in tests/train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitrail.nn.joint_norm import JointBatchNorm, join_batch_norms


def alone(values: Tensor) -> Tensor:
    """The sum over one process."""
    return values


def norms() -> tuple[nn.BatchNorm2d, JointBatchNorm]:
    torch.manual_seed(0)
    pair = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    with torch.no_grad():
        for ours, theirs in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            ours.copy_(torch.randn(5))
            theirs.copy_(ours)
    return pair[0], JointBatchNorm(pair[1], alone)


def test_on_one_process_it_is_torchs_batch_norm() -> None:
    plain, joint = norms()
    for step in range(3):
        maps = torch.randn(4, 5, 3, 2, dtype=torch.float64) * 3 + 100
        images, same = maps.clone().requires_grad_(), maps.clone().requires_grad_()
        expected, found = plain(images), joint(same)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), step
        wanted = torch.randn_like(expected)
        expected.backward(wanted)
        found.backward(wanted)
        assert torch.allclose(same.grad, images.grad, rtol=1e-7, atol=1e-9)  # type: ignore[arg-type]
    for ours, theirs in zip(joint.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9)  # type: ignore[arg-type]
    for name, buffer in plain.named_buffers():
        assert torch.allclose(dict(joint.named_buffers())[name], buffer, rtol=1e-12), name
    maps = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    assert torch.allclose(joint.eval()(maps), plain.eval()(maps), rtol=1e-9)


def test_large_means_cost_no_digits_and_half_precision_stays_half() -> None:
    plain, joint = nn.BatchNorm2d(3), JointBatchNorm(nn.BatchNorm2d(3), alone)
    maps = torch.randn(8, 3, 4, 4) + 1000
    assert torch.allclose(joint(maps), plain(maps), atol=2e-3)
    half = torch.randn(8, 3, 4, 4).bfloat16()
    assert joint(half).dtype == torch.bfloat16
    assert torch.allclose(joint(half).float(), plain(half).float(), atol=0.02)


def test_parameters_and_names_stay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    before, names = list(network.parameters()), list(network.state_dict())
    network[1][0].weight.requires_grad_(False)
    join_batch_norms(network, alone)
    assert isinstance(network[1][0], JointBatchNorm)
    assert all(now is then for now, then in zip(network.parameters(), before, strict=True))
    assert list(network.state_dict()) == names and not network[1][0].weight.requires_grad
    norm = network[1][0]
    network.load_state_dict({name: torch.ones_like(value) for name, value in network.state_dict().items()})
    assert float(norm.running_mean.sum()) == pytest.approx(4.0)
