"""`vitrail convert`: weights from one layout into another; no bit changes unless halving is asked for, and the result
is read back to prove it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.config import from_dict, to_dict
from vitrail.errors import ProofError, WeightsError
from vitrail.models import loading, registry
from vitrail.runs import ConvertRun
from vitrail.weights import adapter, files, folder
from vitrail.weights.card import Card

logger = logging.getLogger(__name__)

OWN = "vitrail"
"""The name under which users know the family's first layout, written as a model folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What was read, and what was written."""

    source: str
    target: str
    architecture: str
    """Name of the network that the weights are for."""
    layout: str
    """Layout of the target."""
    sha256: str
    """Hash of the weight file written."""
    receipt: adapter.Receipt
    """What became of every tensor of the source."""
    moved: float | None = None
    """Largest change of a number through float16, as a share of its tensor's largest; None without rounding."""

    def lines(self) -> list[str]:
        """The receipt, how far rounding moved the numbers, and what was written where."""
        rounded = (
            []
            if self.moved is None
            else [f"rounded  to float16, by at most {self.moved:.1e} of a tensor's largest"]
        )
        return [
            *self.receipt.lines(),
            *rounded,
            f"written  {self.target}: {self.architecture}, layout {self.layout}",
        ]


def convert(run: ConvertRun) -> Converted:
    """Read weights of any known layout, write them in another, read the result back and compare every bit.

    The target is a folder, or a file ending in .safetensors or .npz. Nothing is resampled: image size, channels
    and classes are those of the source.

    Raises:
        WeightsError: the source does not fit any network (or several, then `model` must say which), or the layout
            has no place for one of its tensors.
        ProofError: what was written is not what was read.
    """
    tensors, card, digest = loading.read(run.source)
    files.check_finite(tensors, run.source)
    name = run.model or _named(card) or _found(tensors, run.source)
    module = registry.family_of(name)
    config = _config(module, name, card)
    state, receipt, config = _read(tensors, name, config, card, run.source, digest)
    state, moved = _halved(state) if run.half else (state, None)
    context = loading.context(module, config)
    layout = module.RENAMES[0] if run.layout == OWN else adapter.by_name(module.RENAMES, run.layout)
    written = adapter.write(state, layout, context)
    target = Path(run.target)
    if target.suffix in files.SUFFIXES:
        sha256 = files.write_tensors(target, written)
    else:
        library = layout.describe(name, config) if layout.describe is not None else {}
        sha256 = folder.save(target, written, _card(name, config, card, layout.name), library).sha256
    _prove(state, target, layout, context)
    logger.info("wrote %s: %s in the layout %s", target, name, layout.name)
    return Converted(
        source=run.source,
        target=run.target,
        architecture=name,
        layout=layout.name,
        sha256=sha256,
        receipt=receipt,
        moved=moved,
    )


def _halved(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The state in float16, and the largest change. Raises WeightsError for numbers beyond float16's range."""
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    moved = 0.0
    for name, half in halves.items():
        if not torch.isfinite(half).all():
            raise WeightsError(
                f"{name} reaches {state[name].abs().max():.3g}, and float16 ends at 65504: convert it without --half."
            )
        largest = float(state[name].abs().max()) if state[name].numel() else 0.0
        if largest and half.is_floating_point():
            moved = max(moved, float((half.float() - state[name].float()).abs().max()) / largest)
    return halves, moved


def _named(card: Card | None) -> str | None:
    """The network that a folder says it holds, if it is one of ours."""
    return card.architecture if card is not None and registry.is_model(card.architecture) else None


def _found(tensors: Mapping[str, Tensor], source: str) -> str:
    """The only network that all tensors fit. Raises WeightsError when there is none, or more than one."""
    likes = adapter.ranked(tensors, loading.candidates())
    if not likes or likes[0].share < 1:
        near = f" It comes nearest to {likes[0].name} ({likes[0].share:.0%})." if likes else ""
        raise WeightsError(f"{source} fits no network that vitrail knows.{near} Name it with --model.")
    equal = [like.name for like in likes if like[2:] == likes[0][2:]]
    if len(equal) > 1:
        raise WeightsError(
            f"{source} fits {', '.join(equal[:6])} equally well, and they compute different things or see"
            " differently prepared pictures: name one with --model."
        )
    return likes[0].name


def _config(module: ModuleType, name: str, card: Card | None) -> Any:
    """The configuration that the card tells in full, or the variant's."""
    if card is not None and card.config.keys() > {"num_classes"} and card.architecture == name:
        return from_dict(module.Config, card.config, where="config.json")
    return registry.variant(name)


def _read(
    tensors: Mapping[str, Tensor], name: str, config: Any, card: Card | None, source: str, digest: str
) -> tuple[dict[str, Tensor], adapter.Receipt, Any]:
    """Our tensors as large as they are in the file, and the configuration brought to their sizes."""
    module = registry.family_of(name)

    def once(config: Any) -> tuple[dict[str, Tensor], adapter.Receipt]:
        return adapter.read(
            tensors,
            module.RENAMES,
            loading.shapes_of(name, config),
            loading.context(module, config),
            layout=card.layout if card is not None and card.layout else None,
            replace_head=True,
            adapt=False,
            source=source,
            sha256=digest,
            candidates=lambda: loading.candidates(skip=name),
        )

    state, receipt = once(config)
    if receipt.fresh:  # a trunk without a head
        config = registry.changed(config, num_classes=0)
        state, receipt = once(config)
    return state, receipt, _sized(module, name, config, state)


def _sized(module: ModuleType, name: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """The configuration with the classes, channels and square image size that the tensors have.

    Raises WeightsError where a tensor still differs: its size cannot be told from its shape.
    """
    changes: dict[str, Any] = {}
    context = loading.context(module, config)
    for key, shape in loading.shapes_of(name, config).items():
        have = tuple(state[key].shape)
        if have == shape:
            continue
        fit = next(adapter.matches(module.RENAMES[0], key, context)).rule.fit
        if fit == "classes":
            changes["num_classes"] = have[0]
        elif fit in ("patch", "channels") and have[1] != shape[1]:
            changes["in_chans"] = have[1]
        elif fit == "positions" and len(have) == 3:
            prefix = int(context.get("prefix", 0))
            new, old = math.isqrt(have[1] - prefix), math.isqrt(shape[1] - prefix)
            if new**2 == have[1] - prefix and old**2 == shape[1] - prefix:
                changes["img_size"] = tuple(side * new // old for side in config.img_size)
    config = registry.changed(config, **changes) if changes else config
    for key, shape in loading.shapes_of(name, config).items():
        if tuple(state[key].shape) != shape:
            raise WeightsError(
                f"{key} is {tuple(state[key].shape)}, and nothing says for which image or patch size; {name} has"
                f" {shape}. Convert a model folder, whose config.json tells it, or name a nearer variant."
            )
    return config


def _card(name: str, config: Any, card: Card | None, layout: str) -> Card:
    """The card of the result: the source's where it has one, else the variant's."""
    own = registry.default_card(name, config)
    if card is None:
        return dataclasses.replace(own, layout=layout)
    return dataclasses.replace(card, architecture=name, config=to_dict(config), layout=layout, sha256="")


def _prove(
    state: Mapping[str, Tensor], target: Path, layout: adapter.Layout, context: Mapping[str, Any]
) -> None:
    """Read the target back; every bit must be what it was."""
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    again, _ = adapter.read(files.read_tensors(target), [layout], expected, context, adapt=False)
    for name, tensor in state.items():
        same = again[name].dtype == tensor.dtype and torch.equal(_bits(again[name]), _bits(tensor))
        if not same:
            raise ProofError(f"{target}: {name} read back is not what was written; do not use this file.")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that a minus zero differs from a zero."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
