"""Batch norm (Ioffe and Szegedy, 1502.03167) whose batch is that of all processes together.

A process sees its share of a step's pictures. Normalised over the shares alone, a network would compute another
function on two processes than on one; SETR, Trans2Seg and most detectors were trained with joint statistics.
torch's own SyncBatchNorm runs on accelerators only, and this one wherever processes can add tensors up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, on its device; every process calls it in the same order."""


def join_batch_norms(network: nn.Module, total: Total) -> None:
    """Makes every batch norm of the network count the pictures of all processes while it trains.

    Parameters and buffers stay the same objects under the same names.
    """
    for parent in list(network.modules()):
        for name, part in parent.named_children():
            if type(part) is nn.BatchNorm2d and part.affine and part.track_running_stats:
                setattr(parent, name, JointBatchNorm(part, total))


class JointBatchNorm(nn.BatchNorm2d):
    """`norm`, with the statistics of all processes in training; in evaluation it is `norm`."""

    def __init__(self, norm: nn.BatchNorm2d, total: Total) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.train(norm.training)
        # Collectives are not for the compiler. Here and not as a decorator: it imports the whole of it.
        self._jointly = torch.compiler.disable(partial(_jointly, total=total))

    def forward(self, maps: Float[Tensor, "B C I J"]) -> Float[Tensor, "B C I J"]:
        out: Tensor = self._jointly(self, maps) if self.training else super().forward(maps)
        return out


def _jointly(norm: JointBatchNorm, maps: Tensor, total: Total) -> Tensor:
    """The maps normalised over all processes' maps, whose statistics the norm remembers."""
    mean, variance, count = _statistics(maps.detach(), total)
    assert (
        norm.num_batches_tracked is not None
        and norm.running_mean is not None
        and norm.running_var is not None
    )
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).to(norm.running_var.dtype), share)
    inverse = torch.rsqrt(variance + norm.eps)
    out: Tensor = cast(Any, _Normalise).apply(maps, norm.weight, norm.bias, mean, inverse, count, total)
    return out


def _statistics(maps: Tensor, total: Total) -> tuple[Float[Tensor, C], Float[Tensor, C], Float[Tensor, ""]]:
    """Mean, variance and number of the values of each channel."""
    values = maps.to(torch.promote_types(maps.dtype, torch.float32))
    number = values.new_tensor([values.numel() // values.shape[1]])
    sums = total(torch.cat([values.sum(dim=(0, 2, 3)), number]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    # from deviations: a difference of mean squares would cancel where means are large
    return mean, total((values - _wide(mean)).square().sum(dim=(0, 2, 3))) / count, count


class _Normalise(torch.autograd.Function):
    """(maps - mean) · inverse · weight + bias, whose gradient knows that mean and deviation hang on all maps."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: Tensor,
        total: Total,
    ) -> Tensor:
        ctx.save_for_backward(maps, weight, mean, inverse, count)
        ctx.total = total
        return (_wide(inverse * weight) * (maps - _wide(mean)) + _wide(bias)).to(maps.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, inverse, count = ctx.saved_tensors
        gradient = gradient.to(mean.dtype)
        normal = (maps - _wide(mean)) * _wide(inverse)
        to_weight, to_bias = (gradient * normal).sum(dim=(0, 2, 3)), gradient.sum(dim=(0, 2, 3))
        along, even = (ctx.total(torch.stack([to_weight, to_bias])) / count).unbind()
        to_maps = _wide(weight * inverse) * (gradient - _wide(even) - normal * _wide(along))
        return to_maps.to(maps.dtype), to_weight, to_bias, None, None, None, None


def _wide(values: Float[Tensor, C]) -> Float[Tensor, "C 1 1"]:
    return values[:, None, None]
