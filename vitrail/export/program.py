"""From a module to a program that stands alone: torch.export with as much left free as the family allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.export.manifest import ANY, Sizes
from vitrail.export.wrap import Deployed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Program:
    """An exported program, and what it leaves free."""

    exported: Any
    """The torch.export.ExportedProgram."""
    example: tuple[torch.Tensor, ...]
    """What it was traced with: images uint8 `[2, C, I, J]`, and their padding Bool `[2, I, J]` where it takes one."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free_size: bool
    """Whether height and width are free beside the batch."""
    rows: Sizes = ANY
    """The heights that it holds for, where they are free."""
    columns: Sizes = ANY
    """The widths."""


def capture(deployed: Deployed, *, free_size: bool = True) -> Program:
    """The program of a deployed network: the batch is free, height and width where tracing finds no objection.

    free_size: False fixes height and width to the model's input size, which lets engines compute ahead what
        depends on them.
    """
    config = deployed.network.config
    torch.manual_seed(0)
    rows, columns = config.img_size
    images = torch.randint(0, 256, (2, config.in_chans, rows, columns), dtype=torch.uint8)
    padding = torch.zeros(2, rows, columns, dtype=torch.bool)
    padding[1, rows - rows // 4 :] = True
    example = (images, padding)[: len(deployed.inputs)]
    free = torch.export.Dim.DYNAMIC
    names: dict[str, Any] = {"example": example, "inputs": deployed.inputs, "outputs": deployed.outputs}
    # Windows are counted from the size, and shapes inside follow the count: tracing that takes minutes and fails.
    if free_size and not any(hasattr(part, "window") for part in deployed.network.modules()):
        try:
            sizes = ({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free})
            exported = _export(deployed, example, sizes[: len(example)])
            high, wide = legal_sizes(exported, example, -2), legal_sizes(exported, example, -1)
            if (high.least, wide.least) != (high.most, wide.most):
                return Program(exported=exported, free_size=True, rows=high, columns=wide, **names)
        except Exception as error:  # tracing objects in many kinds; what matters is that it does
            logger.debug("the size cannot be left free: %s", error)
    exported = _export(deployed, example, ({0: free},) * len(example))
    return Program(exported=exported, free_size=False, **names)


def takes_one(program: Program) -> bool:
    """Whether the program itself holds for a batch of one picture; graphs that are made from it do in any case."""
    try:
        with torch.no_grad():
            program.exported.module()(*(value[:1] for value in program.example))
    except Exception:  # a condition of the traced way through the network
        return False
    return True


def legal_sizes(exported: Any, example: Sequence[torch.Tensor], axis: int) -> Sizes:
    """The heights (axis -2) or widths (axis -1) that a program holds for, as far as twice the example's tells.

    Tracing follows one way through the network, and the program keeps the conditions of that way: a patch that divides
    the size, nothing to fill up, more than one cell. Graphs that are made from it lose them, and answer something wrong
    to other sizes.
    """
    module, own = exported.module(), int(example[0].shape[axis])

    def takes(pixels: int) -> bool:
        shapes = [list(value.shape) for value in example]
        for shape in shapes:
            shape[axis] = pixels
        try:
            with torch.no_grad():
                module(*(value.new_zeros(shape) for value, shape in zip(example, shapes, strict=True)))
        except Exception:  # a condition that does not hold, or a part without pixels left
            return False
        return True

    above = next(filter(takes, range(own + 1, 2 * own + 1)), None)
    below = next(filter(takes, range(own - 1, 0, -1)), None) if above is None else None
    if above is None and below is None:
        return Sizes(least=own, most=own)
    step = above - own if above is not None else own - (below or 0)
    least = next(filter(takes, range(own % step or step, own, step)), own)
    return Sizes(least=least, step=step, most=None if above is not None else own)


def _export(deployed: Deployed, example: tuple[torch.Tensor, ...], free: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return torch.export.export(deployed, example, dynamic_shapes=free, strict=False)
