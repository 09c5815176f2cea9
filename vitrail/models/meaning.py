"""What tensors do not tell: the fields of a configuration that change what a network computes, and no shape.

Heads, activations and poolings leave every tensor as it is, so weights of six heads fill a network of three without
a word. A model folder tells them in `config.json`: in our words, or in timm's or transformers', which are read here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from vitrail.config import from_dict, to_dict
from vitrail.errors import ModelError, VitrailError, WeightsError
from vitrail.models import registry
from vitrail.weights.card import Card

SHOWN = frozenset((
    "width", "widths", "depth", "depths", "class_depth", "hidden", "mlp_ratio", "mlp_ratios", "head_width",
    "stem_layers", "representation", "head_hidden", "encoder_depth", "decoder_depth", "auxiliary", "auxiliary_growth",
))  # fmt: skip
"""Fields that shapes and names of tensors tell, so that a file that differs in them does not fit anyway."""

FREE = frozenset((
    "img_size", "in_chans", "num_classes", "patch_size", "windows", "init", "layer_scale", "lengths", "redraw_every",
    "drop_path_shape", "head_dropout", "norm", "frozen_norm", "frozen_stages", "auxiliary_weight", "backbone",
    "backbone_changes",
))  # fmt: skip
"""Fields that weights may differ in: sizes, which are resampled and told in the receipt, and what only training sees.
So are all that end in `_rate`. (A backbone is compared field by field.)"""

FIXED: dict[str, dict[str, Any]] = {
    "deit":      {"gelu": "exact", "pool": "token", "eps": 1e-6},
    "cait":      {"gelu": "exact", "pool": "token"},
    "performer": {"gelu": "exact", "pool": "token", "eps": 1e-6, "position": "learned", "norm_order": "pre",
                  "position_on_prefix": True},
    "pit":       {"gelu": "exact", "pool": "token"},
    "swin":      {"gelu": "exact", "pool": "mean"},
    "pvt":       {"gelu": "exact", "pool": "mean"},
    "nonlocal":  {"dilated": 0},
    "detr":      {"activation": "relu"},
}  # fmt: skip
"""What families without such a field always compute."""

ACTIVATIONS = {
    "gelu": "exact", "gelu_python": "exact",
    "gelu_tanh": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh",
}  # fmt: skip
"""The form of the GELU by the names that timm and transformers give it."""

EPSILON = 1e-6
"""How far another library's epsilon may lie from ours: published folders say 1e-12 where the originals add 1e-6, which
moves the logits of a trained network, whose variances are far larger, by millionths."""


class Difference(NamedTuple):
    """A field in which a file and a model differ."""

    field: str
    """Name in our Config; `backbone.` in front where it is the backbone's."""
    theirs: Any
    """What the file was made with."""
    ours: Any
    """What the model has."""


def told(module: ModuleType, config: Any, card: Card) -> dict[str, Any]:
    """What another library's config.json says of a network, as fields of our Config; only what tensors do not show.

    Args:
        module: the family that the weights are read into, and `config` its configuration.
    """
    view = card.foreign
    if "model_type" in view:
        return _of_transformers(view, config)
    arguments = view.get("model_args")
    return _of_timm(view, dict(arguments or {}), module, config) if "architecture" in view else {}


def followed(module: ModuleType, config: Any, card: Card) -> Any:
    """The configuration with the fields in which another library's config.json says otherwise, as it says.

    Raises ModelError where the family cannot compute that.
    """
    fields = {field: value for field, value in told(module, config, card).items() if hasattr(config, field)}
    changes = {
        field: value
        for field, value in fields.items()
        if not _same(field, value, to_dict(config)[field], foreign=True)
    }
    return registry.changed(config, **changes) if changes else config


def differences(name: str, config: Any, card: Card) -> list[Difference]:
    """The fields in which a folder's network computes something else than the one of `name` and `config`."""
    module = registry.family_of(name)
    ours, theirs = to_dict(config), _whole(module, config, card)
    fixed = FIXED.get(registry.family_name(module), {})
    mine, other = {**fixed, **_silent(ours)}, _silent(theirs)
    if all(theirs.get(field, ours.get(field)) == ours.get(field) for field in ("windows", "trained_windows")):
        # The same windows, of maps that another image size may make smaller.
        other.pop("trained_windows", None)
    return [
        Difference(field, value, mine[field])
        for field, value in other.items()
        if field in mine and not _same(field, value, mine[field], bool(card.foreign))
    ]


def check(
    name: str,
    config: Any,
    card: Card,
    path: object,
    fields: Collection[str] | None = None,
    asked: Collection[str] = (),
) -> None:
    """Refuse weights of a network that computes something else with the same tensors.

    What the configuration changes of its variant was asked for, and may differ; the family's MEANING may not.

    Args:
        fields: compare these alone.
        asked: fields that were asked for by name, also where that is what the variant has.

    Raises:
        WeightsError: the folder's config.json contradicts the configuration; names fields, both values, the cure.
    """
    module = registry.family_of(name)
    usual, have = _silent(to_dict(registry.variant(name))), _silent(to_dict(config))
    changed = {field for field in have if have[field] != usual.get(field)}
    free = (changed | set(asked)) - set(getattr(module, "MEANING", ()))
    wrong = [
        found
        for found in differences(name, config, card)
        if found.field not in free and (fields is None or found.field in fields)
    ]
    if not wrong:
        return
    made = ", ".join(f"{field}={theirs!r}" for field, theirs, _ in wrong)
    has = ", ".join(f"{field}={ours!r}" for field, _, ours in wrong)
    able = all(hasattr(config, field.partition(".")[0]) for field, _, _ in wrong)
    if not card.foreign:
        other = f", or open the folder by its own path: from_pretrained({str(path)!r})"
    elif all(found.field in told(module, config, card) for found in wrong):
        other = f", or let `vitrail convert {path} TARGET --model {name}` follow the file"
    else:
        other = ""
    cure = (
        f"Build the model with the file's: create_model({name!r}, pretrained={str(path)!r}, {_arguments(wrong)})"
        f"{other}."
        if able
        else f"The family of {name} computes nothing else: take a network of vitrail's that does, or that library."
    )
    raise WeightsError(
        f"{path} was made with {made} and {name} has {has}: their tensors look alike, and what they compute is not."
        f" {cure}"
    )


def _whole(module: ModuleType, config: Any, card: Card) -> dict[str, Any]:
    """What the folder says of its network: our configuration in full, or as far as another library tells it."""
    if not card.foreign:
        return _own(module, card) if card.config.keys() > {"num_classes"} else {}
    said = told(module, config, card)
    base: dict[str, Any] = {}
    if registry.is_model(card.architecture) and registry.family_of(card.architecture) is module:
        base = to_dict(registry.variant(card.architecture))
    elif "windows" in said:
        base = {"version": config.version, "patch_size": config.patch_size}
    return base | {"img_size": list(card.preprocessing.input_size)} | said


def _own(module: ModuleType, card: Card) -> dict[str, Any]:
    """The configuration of a folder of ours, with the defaults of fields that it was saved without."""
    kind = registry.family_of(card.architecture) if registry.is_model(card.architecture) else module
    try:
        return to_dict(from_dict(kind.Config, card.config))
    except VitrailError:  # of another version: what is there is compared, and windows are not worked out
        return {field: value for field, value in card.config.items() if field != "version"}


def _silent(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that tensors do not show, as plain data; a backbone's with `backbone.` in front."""
    fields = {field: value for field, value in config.items() if _counts(field)}
    if config.get("version") == 2 and "trained_windows" in config:
        fields["trained_windows"] = _divisors(config)
    else:
        fields.pop("trained_windows", None)
    if isinstance(config.get("backbone"), str):
        try:
            inner = to_dict(registry.variant(config["backbone"]))
        except ModelError:
            return fields
        changes = {
            field: value
            for field, value in (config.get("backbone_changes") or {}).items()
            if value is not None
        }
        fields |= {f"backbone.{field}": value for field, value in _silent({**inner, **changes}).items()}
    return fields


def _counts(field: str) -> bool:
    return field not in SHOWN and field not in FREE and not field.endswith("_rate")


def _divisors(config: Mapping[str, Any]) -> list[int]:
    """What Swin v2 divides offsets by in each stage: the first training's windows, or the stage's own."""
    found = []
    side = -(-min(config["img_size"]) // config["patch_size"])
    for window, trained in zip(config["windows"], config["trained_windows"], strict=True):
        found.append(trained or min(window, side))
        side = -(-side // 2)
    return found


def _of_transformers(view: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The fields that transformers' words stand for."""
    words = {
        "num_attention_heads": "heads",
        "num_heads": "heads",
        "layer_norm_eps": "eps",
        "linear_attention": "linear",
    }
    said = {field: view[word] for word, field in words.items() if view.get(word) is not None}
    if "hidden_act" in view:
        said["gelu"] = ACTIVATIONS.get(str(view["hidden_act"]), view["hidden_act"])
    if view["model_type"] == "detr":
        heads = [
            view[f"{part}_attention_heads"]
            for part in ("encoder", "decoder")
            if f"{part}_attention_heads" in view
        ]
        said |= {"heads": heads[0] if len(set(heads)) == 1 else heads} if heads else {}
        names = {
            "activation_function": "activation",
            "position_embedding_type": "position",
            "dilation": "dilated",
        }
        said |= {field: view[word] for word, field in names.items() if view.get(word) is not None}
        said |= {"dilated": int(said["dilated"])} if "dilated" in said else {}
    return said | _windows(view, config)


def _of_timm(
    view: Mapping[str, Any], arguments: dict[str, Any], module: ModuleType, config: Any
) -> dict[str, Any]:
    """The fields that timm's arguments stand for, and its pooling, which it also writes beside them."""
    words = {"num_heads": "heads", "heads": "heads", "linear": "linear", "stride": "stride"}
    said = {
        field: arguments[word]
        for word, field in words.items()
        if arguments.get(word) is not None and hasattr(config, field)
    }
    if arguments.get("act_layer") is not None:
        said["gelu"] = ACTIVATIONS.get(str(arguments["act_layer"]), arguments["act_layer"])
    pool = arguments.get("global_pool", view.get("global_pool"))
    if (
        isinstance(pool, str)
        and pool
        and registry.family_name(module) in ("vit", "deit", "cait", "pit", "swin", "pvt")
    ):
        said["pool"] = "mean" if pool == "avg" else pool
        if said["pool"] == "mean" and hasattr(config, "pool_norm"):
            said["pool_norm"] = "before" if arguments.get("fc_norm") is False else "after"
    return said | _windows(arguments, config)


def _windows(words: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Swin v2's windows, which both libraries call the same; version 1 keeps a table, whose size tells them."""
    if getattr(config, "version", 1) != 2 or not hasattr(config, "windows"):
        return {}
    said: dict[str, Any] = {}
    for word, field in (("window_size", "windows"), ("pretrained_window_sizes", "trained_windows")):
        value = words.get(word)
        if value is not None:
            said[field] = [value] * len(config.windows) if isinstance(value, int) else list(value)
    return said


def _same(field: str, theirs: Any, ours: Any, foreign: bool) -> bool:
    if foreign and field in ("eps", "entry_eps"):
        return abs(float(theirs) - float(ours)) <= EPSILON
    return bool(theirs == ours)


def _arguments(wrong: list[Difference]) -> str:
    """The arguments of create_model that give a model the file's fields."""
    own = [f"{field}={theirs!r}" for field, theirs, _ in wrong if not field.startswith("backbone.")]
    inner = {field.partition(".")[2]: theirs for field, theirs, _ in wrong if field.startswith("backbone.")}
    return ", ".join([*own, f"backbone_changes={inner!r}"] if inner else own)
