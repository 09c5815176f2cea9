"""Muon: momentum whose update is made orthogonal, for the hidden matrices of a network.

After K. Jordan's description (2024), with the scale of Liu et al. (arXiv 2502.16982), by which one learning
rate and one weight decay serve both Muon and the AdamW beside it. torch has an optimiser of this name; this
one computes in float32 where the chip has no bf16 units (there it is several times faster), handles equal
shapes in one batched product, and treats a joined query-key-value matrix as the three matrices it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

# Coefficients of the quintic iteration, from the same description: steep at zero, so five rounds bring every
# singular value near one.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5

JOINED = "qkv.weight"
"""How the name of a joined projection ends: queries, keys and values of equal widths."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for 2-D parameters `[rows, columns]`.

    A parameter named `*qkv.weight`, the joined projection of queries, keys and values, is split into three
    matrices; `params` without names are taken whole. `lr` is in AdamW's units.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            names = group.get("param_names") or [""] * len(group["params"])
            learning = [pair for pair in zip(names, group["params"], strict=True) if pair[1].grad is not None]
            if not learning:
                continue
            parameters = [parameter for _, parameter in learning]
            directions = self._directions(parameters, group["momentum"], group["nesterov"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for (name, parameter), direction in zip(learning, directions, strict=True):
                parts = 3 if name.endswith(JOINED) else 1
                for matrix, update in zip(parameter.chunk(parts), direction.chunk(parts), strict=True):
                    by_shape.setdefault(tuple(matrix.shape), []).append((matrix, update))
            for shape, pairs in by_shape.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = orthogonal(torch.stack([update for _, update in pairs]), self.dtype)
                matrices = [matrix for matrix, _ in pairs]
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype)), alpha=-size)

    def _directions(self, parameters: list[Tensor], momentum: float, nesterov: bool) -> Sequence[Tensor]:
        """Where each parameter should go, before its update is made orthogonal; few kernels for all together."""
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum) if nesterov else buffers


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrices with singular values about one: `[M, rows, columns]`, same shape out."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
