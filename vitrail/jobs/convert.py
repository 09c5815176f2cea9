"""`vitrail convert`: weights from one layout into another; no bit changes unless halving is asked for, and the result
is read back to prove it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.config import from_dict, to_dict
from vitrail.errors import ProofError, WeightsError
from vitrail.models import loading, meaning, registry
from vitrail.runs import ConvertRun
from vitrail.weights import adapter, files, folder, rules
from vitrail.weights.card import Card
from vitrail.weights.reading import OWN as OWN_NAMES

OWN = "vitrail"
"""The name under which users know the layout in which a model folder is written."""


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
        ProofError: the layout does not give back what was read, or the disk what was written; then nothing is left
            of it.
    """
    tensors, card, digest = loading.read(run.source, averaged=run.averaged)
    if run.averaged:
        _check_averaged(tensors, run.source)
    name = run.model or _named(card) or _found(tensors, run.source)
    module = registry.family_of(name)
    if getattr(module, "AVERAGED", False):
        tensors, card, digest = loading.read(run.source, averaged=True)
    files.check_finite(tensors, run.source)
    config = _config(module, name, card, run.source)
    state, receipt, config = _read(tensors, name, config, card, run.source, digest)
    state, moved = _halved(state) if run.half else (state, None)
    context = loading.context(module, config)
    target = Path(run.target)
    layout = _layout(run, name, config, context)
    try:
        written = adapter.write(state, layout, context)
    except WeightsError as error:
        raise WeightsError(f"{error}{_fitting(module, state, context)}") from error
    _prove(state, written, layout, context)
    if target.suffix in files.SUFFIXES:
        sha256 = files.write_tensors(target, written)
    else:
        library = layout.describe(name, config) if layout.describe is not None else {}
        sha256 = folder.save(target, written, _card(name, config, card, layout.name, receipt), library).sha256
    _check_written(target, written)
    return Converted(
        source=run.source,
        target=run.target,
        architecture=name,
        layout=layout.name,
        sha256=sha256,
        receipt=receipt,
        moved=moved,
    )


def _check_averaged(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError where asking for the averaged weights gives what not asking gives."""
    plain = loading.read(source)[0]
    if plain.keys() == tensors.keys() and all(torch.equal(plain[name], tensors[name]) for name in plain):
        raise WeightsError(
            f"{source} holds no averaged weights beside others ({', '.join(files.AVERAGED)}): leave --averaged out."
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


def _config(module: ModuleType, name: str, card: Card | None, source: str) -> Any:
    """The configuration that the card tells in full, or the variant's with what another library's folder says.

    Raises WeightsError where the folder's network computes something else with the same tensors.
    """
    if card is None:
        return registry.variant(name)
    if card.config.keys() > {"num_classes"} and card.architecture == name:
        return from_dict(module.Config, card.config, where="config.json")
    config = meaning.followed(module, registry.variant(name), card)
    meaning.check(name, config, card, source)
    return config


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
        matches = (match for layout in module.RENAMES for match in adapter.matches(layout, key, context))
        fit = next((match.rule.fit for match in matches if match.rule.fit), "")
        if fit == "classes" and len(have) == len(shape):
            count = next(new for new, old in zip(have, shape, strict=True) if new != old)
            changes["num_classes"] = count - getattr(module, "EXTRA_LOGITS", 0)
        elif fit in ("patch", "channels") and have[1] != shape[1]:
            changes["in_chans"] = have[1]
        elif fit == "positions" and len(have) == 3:
            prefix = int(context.get("prefix", 0))
            new, old = math.isqrt(have[1] - prefix), math.isqrt(shape[1] - prefix)
            if new**2 == have[1] - prefix and old**2 == shape[1] - prefix:
                # patches may overlap, so that a cell more is a stride more and not a share
                changes["img_size"] = tuple(side + (new - old) * (side // old) for side in config.img_size)
    config = registry.changed(config, **changes) if changes else config
    for key, shape in loading.shapes_of(name, config).items():
        if tuple(state[key].shape) != shape:
            raise WeightsError(
                f"{key} is {tuple(state[key].shape)}, and nothing says for which image or patch size; {name} has"
                f" {shape}. Convert a model folder, whose config.json tells it, or name a nearer variant."
            )
    return config


def _card(name: str, config: Any, card: Card | None, layout: str, receipt: adapter.Receipt) -> Card:
    """The card of the result: the source's where it has one, else the variant's, with what its layout wants to see."""
    own = registry.default_card(name, config)
    if card is None or not card.preprocessing_told:
        module = registry.family_of(name)
        preprocessing = loading.seen(own.preprocessing, card, module, receipt.layout, receipt.source)
        own = dataclasses.replace(own, preprocessing=preprocessing)
    if card is None:
        return dataclasses.replace(own, layout=layout)
    return dataclasses.replace(
        card,
        architecture=name,
        task=own.task,
        ids=card.ids or own.ids,
        preprocessing=card.preprocessing if card.preprocessing_told else own.preprocessing,
        preprocessing_told=True,
        config=to_dict(config),
        foreign={},
        layout=layout,
        sha256="",
    )


def _layout(run: ConvertRun, name: str, config: Any, context: Mapping[str, Any]) -> adapter.Layout:
    """The layout of the result: the one asked for, else that of the network's model folders.

    Raises WeightsError where the layout is unknown, where a file in it would be taken for another network, or where
    transformers would open a folder in it as some other network with random weights.
    """
    module = registry.family_of(name)
    if run.layout == OWN:
        with torch.device("meta"):
            model = registry.from_config(name, config)
        layout = loading.home(module, model)
    else:
        layout = adapter.by_name(module.RENAMES, run.layout)
    into_folder = Path(run.target).suffix not in files.SUFFIXES
    if into_folder and layout.name.startswith("transformers") and layout.describe is None:
        raise WeightsError(
            f"transformers has no network whose folder holds {name} in the layout {layout.name!r}: write a file"
            " (.safetensors), or take another layout."
        )
    if into_folder or rules.holds(layout.requires, context):
        return layout
    if run.layout == OWN:
        return loading.own(list(loading.shapes_of(name, config)))
    raise WeightsError(
        f"A file in the layout {layout.name!r} {layout.meaning}. Write a folder, whose config.json tells the network."
    )


def _fitting(module: ModuleType, state: Mapping[str, Tensor], context: Mapping[str, Any]) -> str:
    """A sentence that names the family's layouts with a place for every tensor; empty where there is none."""
    fit = []
    for layout in module.RENAMES:
        with contextlib.suppress(WeightsError):
            adapter.write(state, layout, context)
            fit.append(layout.name)
    return f" These have one for every tensor: {', '.join(fit)}." if fit else ""


def _prove(
    state: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    layout: adapter.Layout,
    context: Mapping[str, Any],
) -> None:
    """Read what is to be written by the layout's rules; every bit must be what it was, or nothing is written."""
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layouts = [] if layout.name == OWN_NAMES else [layout]  # reading knows our modules' names by itself
    try:
        again, _ = adapter.read(written, layouts, expected, context, layout=layout.name, adapt=False)
    except WeightsError as error:
        raise ProofError(
            f"The layout {layout.name!r} cannot be read back, and nothing was written: {error}"
        ) from error
    for name, tensor in state.items():
        if not _same(again[name], tensor):
            raise ProofError(
                f"{name} does not come back from the layout {layout.name!r} as it was; nothing was written."
            )


def _check_written(target: Path, written: Mapping[str, Tensor]) -> None:
    """Read the target back; every bit must be what was written, or its weights are removed."""
    try:
        again = files.read_tensors(target)
    except WeightsError:
        again = {}
    wrong = [name for name in written if name not in again or not _same(again[name], written[name])]
    if wrong:
        (target / folder.WEIGHTS if target.is_dir() else target).unlink(missing_ok=True)
        raise ProofError(
            f"{target}: {wrong[0]} read back is not what was written, so the weights were removed again. Look after"
            " the disk, and convert to another one."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same kind, shape and bits."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that a minus zero differs from a zero."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
