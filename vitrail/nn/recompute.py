"""Activation checkpointing (Chen et al., 1604.06174): what a block computed is forgotten, and computed again in the
backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)`, whose activations are computed again when gradients are; they and all buffers are the same."""
    out: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _counted(block))
    )
    return out


@contextlib.contextmanager
def _counted(block: nn.Module) -> Iterator[None]:
    """While inside, batch norms write their statistics into copies: they have counted this batch already."""
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm) and part.training]
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update(
            {name: None if held is None else held.clone() for name, held in norm._buffers.items()}
        )
    try:
        yield
    finally:
        for norm, held in zip(norms, own, strict=True):
            norm._buffers.update(held)
