"""The focal loss, and the precision in which losses of boxes and masks are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def focal(
    logits: Float[Tensor, "*B"], present: Float[Tensor, "*B"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*B"]:
    """Sigmoid focal loss (Lin et al. 2017, 1708.02002), element by element."""
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, present, reduction="none")
    wrong = chance * (1 - present) + (1 - chance) * present
    balance = alpha * present + (1 - alpha) * (1 - present)
    return balance * wrong**gamma * entropy


def exact(answer: Tensor) -> Tensor:
    """At least float32: in half precision, sums of a thousand slots and areas of small boxes lose what counts."""
    return answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer
