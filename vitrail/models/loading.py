"""Weights into models and out of them: where a family's network meets its files.

A model's state is touched only after everything fits; what was done is the model's `receipt`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.config import from_dict, to_dict
from vitrail.errors import ModelError, WeightsError
from vitrail.models import meaning, registry
from vitrail.models.model import Model
from vitrail.weights import adapter, files, folder, rules
from vitrail.weights.card import Card, Preprocessing
from vitrail.weights.reading import OWN

logger = logging.getLogger(__name__)


def load_pretrained(
    model: Model, path: str | Path, *, replace_head: bool = False, asked: Collection[str] = ()
) -> adapter.Receipt:
    """Load a model folder or a weight file of any of the family's layouts into a model.

    replace_head: whether a head of another class count may be left out, so that the model keeps its own.
    asked: fields of its configuration that were asked for, and may contradict the folder.
    Class names and preprocessing of a model folder come along, as far as it tells them; names only where the head does.

    Raises WeightsError that names what does not fit, or what the folder says that the model does not compute; the
    model is then as it was.
    """
    module = registry.family_of(model.name)
    tensors, card, sha256 = read(path, averaged=getattr(module, "AVERAGED", False))
    if card is not None and card.architecture and card.config:
        _check_family(model, module, card, path)
        meaning.check(model.name, model.config, card, path, getattr(module, "MEANING", ()), asked)
    state, receipt = adapter.read(
        tensors,
        module.RENAMES,
        shapes(model),
        context(module, model.config, card),
        layout=card.layout if card is not None and card.layout else None,
        replace_head=replace_head,
        source=str(path),
        sha256=sha256,
        candidates=lambda: candidates(skip=model.name),
    )
    if card is not None:
        meaning.check(model.name, model.config, card, path, asked=asked)
    _check_numbers(model, state, path)
    model.load_state_dict(state, strict=False)
    model.receipt = receipt
    model.card = dataclasses.replace(
        model.card, preprocessing=seen(model.card.preprocessing, card, module, receipt.layout, path)
    )
    if card is not None:
        kept = not any(name.startswith("head.") for name in receipt.fresh)
        model.card = _adopt(model.card, card, keep_labels=kept)
    return receipt


def load_folder(path: str | Path) -> Model:
    """The model of a folder that vitrail saved, in evaluation mode, weights and card as they were.

    Raises WeightsError for a folder without vitrail's part of config.json, or whose files do not fit or changed.
    """
    tensors, card = folder.load(path)
    if not card.architecture or not card.config:
        raise WeightsError(
            f"{path} does not say which vitrail model it holds (config.json has no architecture and configuration"
            " of ours). For a folder of another library: create_model(NAME, pretrained=PATH), or `vitrail convert`."
        )
    module = registry.family_of(card.architecture)
    config = from_dict(module.Config, card.config, where=f"{path}/config.json")
    model = _unfilled(card.architecture, config)
    state, receipt = adapter.read(
        tensors, module.RENAMES, shapes(model), context(module, config, card), layout=card.layout or None,
        source=str(path), sha256=card.sha256,
    )  # fmt: skip
    missing = set(model.state_dict()) - set(state)
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} tensors of {card.architecture}, such as {min(missing)}."
        )
    _check_kinds(model, state, path)
    # a file of another precision makes a float32 model, as everywhere else
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    model.card, model.receipt = card, receipt
    return model.eval()


def _unfilled(name: str, config: Any) -> Model:
    """The network on the meta device, unless some of its tensors are computed, not stored: those are kept.

    Nothing is made empty on the CPU first: every stored tensor is put in by assignment, and torch's way of making
    an empty one from meta imports sympy, half a second of every start.
    """
    with torch.device("meta"):
        model = registry.from_config(name, config)
    computed = {buffer for buffer, _ in model.named_buffers()} - set(model.state_dict())
    if computed:
        with torch.random.fork_rng(devices=[]):
            return registry.from_config(name, config)
    return model


def save_model(model: Model, path: str | Path) -> None:
    """Write the model folder, its weights under the names of the family's first layout that has a place for them."""
    module = registry.family_of(model.name)
    layout = home(module, model)
    state = adapter.write(
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
        layout,
        context(module, model.config),
    )
    card = dataclasses.replace(
        model.card,
        architecture=model.name,
        config=to_dict(model.config),
        layout=layout.name,
    )
    library = layout.describe(model.name, model.config) if layout.describe is not None else {}
    model.card = folder.save(path, state, card, library)


def home(module: ModuleType, model: Model) -> adapter.Layout:
    """The first layout that names every tensor of a model (timm lacks some variants of a family that it has)."""
    known = context(module, model.config)
    names = list(model.state_dict())
    able = [
        layout for layout in module.RENAMES if all(any(rules.matches(layout, name, known)) for name in names)
    ]
    meant = [layout for layout in able if rules.holds(layout.requires, known)]
    first: adapter.Layout = (*meant, *able, own(names))[0]
    return first


def own(names: Sequence[str]) -> adapter.Layout:
    """The layout in which every tensor has the name that it has in our modules."""
    return adapter.Layout(OWN, tuple(adapter.Rule(name, name) for name in names))


def read(path: str | Path, averaged: bool = False) -> tuple[dict[str, Tensor], Card | None, str]:
    """Tensors of a folder or a weight file, the folder's card if it has one, and the file's hash.

    averaged: take a training checkpoint's averaged weights, for families whose published scores are theirs.
    """
    found = folder.find(path)
    if found is not None:
        tensors, card = folder.load(found)
        return tensors, card, card.sha256
    place = Path(path)
    return files.read_tensors(place, averaged=averaged), None, files.sha256(place)


def context(module: ModuleType, config: Any, card: Card | None = None) -> dict[str, Any]:
    """What a family's rules must know, and the grid of the file's positions where its card tells it."""
    known: dict[str, Any] = module.context(config) if hasattr(module, "context") else {}
    whole = card is not None and card.config.keys() > {"num_classes"}  # timm's and transformers' tell no more
    if card is not None and whole and "from_grid" not in known and hasattr(module, "context"):
        try:
            known["from_grid"] = module.context(from_dict(module.Config, card.config)).get("grid")
        except Exception:  # a foreign or older card: the grid is then told from the table's length
            logger.debug("the card's configuration is not this family's", exc_info=True)
    return known


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def classes_in(module: ModuleType, config: Any, path: str | Path) -> int | None:
    """How many classes the head of a file has; None where it has no head, or nobody can tell."""
    tensors, card, _ = read(path, averaged=getattr(module, "AVERAGED", False))
    if card is not None and card.num_classes is not None:
        return card.num_classes
    own = {rules.strip(key, ()): key for key in tensors}
    extra = getattr(module, "EXTRA_LOGITS", 0)  # rows of the head that are no class
    if "head.linear.bias" in own:  # a state dict under our own names
        return tensors[own["head.linear.bias"]].numel() - extra
    known = context(module, config)
    for layout in module.RENAMES:
        names = {rules.strip(key, layout.prefixes): key for key in tensors}
        for match in rules.matches(layout, "head.linear.bias", known):
            keys = match.keys(layout.prefixes)
            if match.rule.fit == "classes" and len(keys) == 1 and keys[0] in names:
                return tensors[names[keys[0]]].numel() - extra
    return None


def candidates(skip: str = "") -> Iterator[adapter.Candidate]:
    """Every variant of every family as shapes, to say what a file that does not fit looks like; the variants of
    the family of `skip` come first, without itself."""
    home = registry.family_of(skip) if skip else None
    for name in sorted(registry.list_models(), key=lambda name: registry.family_of(name) is not home):
        if name == skip:
            continue
        module, config = registry.family_of(name), registry.variant(name)
        expected = functools.partial(shapes_of, name, config)
        yield adapter.Candidate(name, module.RENAMES, expected, context(module, config))


def shapes_of(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a configuration's tensors, without memory for them."""
    with torch.device("meta"):
        return shapes(registry.from_config(name, config))


def _check_family(model: Model, module: ModuleType, card: Card, path: str | Path) -> None:
    try:
        theirs = registry.family_of(card.architecture)
    except ModelError:
        return
    if theirs is not module and not getattr(module, "ACCEPTS", set()) & {registry.family_name(theirs)}:
        raise WeightsError(
            f"{path} holds a {card.architecture}, and the model asked for is a {model.name}: take"
            f" --model {card.architecture}, or weights of a {registry.family_name(module)}."
        )


def _check_numbers(model: Model, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that no network can compute with: not finite, or whole numbers where fractions belong."""
    _check_kinds(model, state, path)
    files.check_finite(state, str(path))


def _check_kinds(model: Model, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights that a quantising program made whole numbers of."""
    ours = model.state_dict()
    for name, tensor in state.items():
        if ours[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{path}: {name} holds {kind} where floating-point numbers belong: quantised weights mean nothing"
                " without their scales. Take the file from before they were quantised."
            )


def seen(
    ours: Preprocessing, card: Card | None, module: ModuleType, layout: str, path: str | Path
) -> Preprocessing:
    """What weights want to see: as their folder tells it, else as their layout's authors have it, else as the variant.

    Args:
        ours: the variant's, whose size and channels stay.
        layout: name of the layout that the weights came in.
    """
    if card is not None and card.preprocessing_told:
        theirs = card.preprocessing
    else:
        known = next((known for known in module.RENAMES if known.name == layout), None)
        theirs = ours if known is None or known.preprocessing is None else known.preprocessing
        if card is not None:
            logger.info("%s does not say how pictures are prepared: taken as usual for these weights", path)
    if theirs.in_chans != ours.in_chans:
        return ours
    return dataclasses.replace(theirs, input_size=ours.input_size)


def _adopt(ours: Card, theirs: Card, keep_labels: bool) -> Card:
    """Our card with what else travels with weights: class names and origin."""
    return dataclasses.replace(
        ours,
        labels=theirs.labels if keep_labels else None,
        folders=theirs.folders if keep_labels else (),
        licence=theirs.licence,
        source=theirs.source,
        data=theirs.data,
        notes=theirs.notes,
    )
