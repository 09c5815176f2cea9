"""Flags and help from a run record: its fields give the names, its types the values, its docstrings the help.

Only the standard library is used, so that help comes at once (docs/decisions/002).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

from vitrail.config import from_dict
from vitrail.errors import ConfigError, suggestion

T = TypeVar("T")

SHORT = {"batch_size": "-b", "workers": "-j", "output": "-o", "top_k": "-k"}


class FieldDoc(NamedTuple):
    """The text under a field, and the heading (a comment line) of the group it stands in."""

    text: str
    group: str


def documents(record: type) -> dict[str, FieldDoc]:
    """The documentation of every field of a record, read from its source."""
    source = inspect.getsource(record)
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found: dict[str, FieldDoc] = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = inspect.cleandoc(str(following.value.value))
        above = [line.strip() for line in lines[: node.lineno - 1] if line.strip().startswith("# ")]
        found[node.target.id] = FieldDoc(text, above[-1][2:] if above else "")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def flag(field: str) -> str:
    """The flag of a field; one named like a word of Python ends in _, which the flag leaves out."""
    return "--" + field.rstrip("_").replace("_", "-")


def parser(record: type, program: str, positional: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser whose result holds only what was given, so that defaults and recipes stay visible below it."""
    places = "".join(f" {_place(field)}" for field in dataclasses.fields(record) if field.name in positional)
    made = _Parser(
        prog=program,
        usage=f"{program}{places} [FLAGS]",
        description=inspect.getdoc(record),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    hints = typing.get_type_hints(record)
    notes = documents(record)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        text = notes[field.name].text.replace("%", "%%")
        title = "arguments" if field.name in positional else notes[field.name].group or "options"
        if title not in groups:
            groups[title] = made.add_argument_group(title)
        group = groups[title]
        shown = _default_text(field.default)
        help_text = f"{text} [{shown}]" if shown else text
        if field.name in positional:
            # Optional to argparse, since a recipe may give it; `complete` looks for what is missing.
            several = "*" if get_origin(hints[field.name]) is tuple else "?"
            group.add_argument(field.name, nargs=several, metavar=field.name.upper(), help=help_text)
        else:
            names = [*filter(None, [SHORT.get(field.name)]), flag(field.name)]
            option = _option(hints[field.name], field.name)
            group.add_argument(*names, dest=field.name, help=help_text, **option)
    other = groups.get("options") or made.add_argument_group("options")
    other.add_argument("-h", "--help", action="help", help="Show this help.")
    return made


def read(made: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The given values by field name. Raises ConfigError with near matches for an unknown flag."""
    known = [name for action in made._actions for name in action.option_strings]
    for word in arguments:
        if word == "--":
            break
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise ConfigError(f"There is no flag {name}.{suggestion(name, known)} See {made.prog} --help.")
    found, left = made.parse_known_intermixed_args(list(arguments))
    if left:
        raise ConfigError(f"{made.prog} does not take {left[0]!r}. See {made.prog} --help.")
    # An intermixed parse fills positionals that were not given with their empty form.
    return {name: value for name, value in vars(found).items() if value is not None and value != []}


def complete(record: type[T], given: Mapping[str, Any], program: str) -> T:
    """The record from what was given. Raises ConfigError for a field without a default that is missing."""
    for field in dataclasses.fields(typing.cast(Any, record)):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise ConfigError(f"{field.name.upper()} is missing. See {program} --help.")
    return from_dict(record, given)


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING or default is None or default is False or default == ():
        return ""
    if isinstance(default, tuple):
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    return "on" if default is True else str(default)


def _place(field: dataclasses.Field[Any]) -> str:
    several = get_origin(field.type) is tuple or str(field.type).startswith("tuple")
    word = field.name.upper() + (" ..." if several else "")
    return word if field.default is dataclasses.MISSING else f"[{word}]"


def _option(hint: Any, name: str) -> dict[str, Any]:
    kinds = [kind for kind in _members(hint) if kind is not types.NoneType]
    kind = kinds[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        count: str | int = "+" if Ellipsis in inner else len(inner)
        return {"nargs": count, "type": _reader(inner[0], name), "metavar": _metavar(inner[0])}
    return {"type": _reader(kind, name), "metavar": _metavar(kind)}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _reader(kind: type, name: str) -> Callable[[str], Any]:
    given = flag(name)

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{given} takes {what}; got {text!r}.") from None
        if not math.isfinite(value):
            raise ConfigError(f"{given} takes a finite number; got {text!r}.")
        return value

    return number if kind in (int, float) else str
