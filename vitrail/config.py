"""Typed records to plain data and back: TOML, JSON, dotted overrides, and errors that name the field.

A record is a frozen dataclass. Nothing here knows what a record means, and nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from vitrail.errors import ConfigError, suggestion

T = TypeVar("T")


def from_dict(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A record of the given kind from plain data; lists become tuples where the field is a tuple.

    Raises ConfigError that names the field, what it takes and what came.
    """
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.init}
    for name in values:
        if name not in names:
            raise ConfigError(
                f"{_place(where, name)} is no field of {kind.__name__}.{suggestion(name, names)}"
            )
    converted = {name: _convert(value, hints[name], _place(where, name)) for name, value in values.items()}
    try:
        return kind(**converted)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}{' in ' + where if where else ''}: {error}") from None


def to_dict(record: Any) -> dict[str, Any]:
    """The record as JSON-ready plain data; tuples become lists."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def finite(value: Any) -> Any:
    """Plain data with None for numbers that are not finite, which JSON cannot say; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(record: T, **changes: Any) -> T:
    """A copy of the record with some fields changed; an unknown field raises ConfigError with near matches."""
    return override(record, changes)


def override(record: T, changes: Mapping[str, Any]) -> T:
    """A copy of the record with changes by dotted name (`"optimiser.lr"`), converted to the fields' types."""
    hints = typing.get_type_hints(type(record))
    names = {field.name for field in dataclasses.fields(typing.cast(Any, record))}
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        name, _, rest = dotted.partition(".")
        if name not in names:
            raise ConfigError(
                f"{name} is no field of {_words(type(record))}.{suggestion(name, names)}"
                f" Its fields are: {', '.join(sorted(names))}."
            )
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            direct[name] = _convert(value, hints[name], dotted)
    for name, inner in nested.items():
        direct[name] = override(getattr(record, name), inner)
    return typing.cast(T, dataclasses.replace(typing.cast(Any, record), **direct))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError when the file is absent or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None


def toml_text(values: Mapping[str, Any]) -> str:
    """Plain data as TOML text, sub-tables last; what is None is left out."""
    lines: list[str] = []
    _toml_table(values, (), lines)
    return "\n".join(lines).strip() + "\n"


def _toml_table(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {
        key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None
    }
    if path and (plain or not values):
        lines.extend(["", f"[{'.'.join(_toml_key(key) for key in path)}]"])
    lines.extend(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items())
    for key, value in values.items():
        if isinstance(value, Mapping):
            _toml_table(value, (*path, key), lines)


def _toml_key(key: str) -> str:
    return key if key and all(c.isalnum() or c in "_-" for c in key) and key.isascii() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    raise ConfigError(f"TOML has no form for a {type(value).__name__}.")


def _place(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _words(hint: Any) -> str:
    """A type as a person would write it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is types.NoneType or hint is None:
        return "none"
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in arguments)
    if origin is tuple:
        inner = [_words(option) for option in arguments if option is not Ellipsis]
        return f"a list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the hinted type, or ConfigError. Numbers are never made from text, nor text from numbers."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments and type(value) in {type(option) for option in arguments}:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if Ellipsis in arguments:
            return tuple(_convert(item, arguments[0], where) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(item, kind, where) for item, kind in zip(value, arguments, strict=True))
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where)
    elif hint in (type(None), None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    raise ConfigError(f"{where} takes {_words(hint)}; got {value!r}.")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
