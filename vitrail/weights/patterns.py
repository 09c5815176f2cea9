"""The small language in which rules name tensors: numbers, sums of numbers, alternatives, slices."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from vitrail.errors import WeightsError

_BRACES = re.compile(r"\{([^{}]*)\}")
_SUM = re.compile(r"(?:(\d+)\*)?([a-z])(?:([+-])(\d+))?")
_REST = re.compile(r"(\d+)-([a-z])")
_NUMBER = re.compile(r"\{[a-z]\}|\d+")
_SLICE = re.compile(r"(.*)\[(\d+)\]")

Numbers = Mapping[str, int]


def alternatives(pattern: str, place: int) -> str:
    """The pattern with every `{a|b|...}` replaced by its word number `place`."""

    def word(match: re.Match[str]) -> str:
        words = match[1].split("|")
        if len(words) == 1:
            return match[0]
        if place >= len(words):
            raise WeightsError(f"Pattern {pattern!r} has fewer alternatives than its partner.")
        return words[place]

    return _BRACES.sub(word, pattern)


def count_alternatives(pattern: str) -> int:
    """How many words the first `{a|b|...}` holds; 1 where there is none."""
    return max((len(match[1].split("|")) for match in _BRACES.finditer(pattern)), default=1)


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression for a pattern: `{i}` is a number (the same one each time), `*` is anything."""
    parts: list[str] = []
    seen: set[str] = set()
    for piece in re.split(r"(\{[^{}]*\}|\*)", pattern):
        if piece == "*":
            parts.append(".*")
        elif piece.startswith("{"):
            name = piece[1:-1]
            if not re.fullmatch(r"[a-z]", name):
                raise WeightsError(f"Pattern {pattern!r}: {piece} may only be one letter on this side.")
            parts.append(f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)")
            seen.add(name)
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts))


def match(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers for which the pattern is the name, or None."""
    found = compiled(pattern).fullmatch(name)
    return None if found is None else {key: int(value) for key, value in found.groupdict().items()}


def skeleton(name: str) -> str:
    """A name or pattern with every number, known or not, left out: what only names that match can share."""
    return _NUMBER.sub("#", name)


def filled(pattern: str, numbers: Numbers) -> str:
    """The pattern with its sums worked out: `block{i+1}` for i = 2 is `block3`."""

    def value(match: re.Match[str]) -> str:
        counted_down = _REST.fullmatch(match[1])
        if counted_down is not None and counted_down[2] in numbers:
            return str(int(counted_down[1]) - numbers[counted_down[2]])
        parsed = _SUM.fullmatch(match[1])
        if parsed is None or parsed[2] not in numbers:
            raise WeightsError(f"Pattern {pattern!r}: cannot work out {match[0]} from {dict(numbers)}.")
        number = int(parsed[1] or 1) * numbers[parsed[2]]
        step = int(parsed[4] or 0)
        return str(number - step if parsed[3] == "-" else number + step)

    return _BRACES.sub(value, pattern)


def sliced(name: str) -> tuple[str, int | None]:
    """`("a/b", 3)` for `a/b[3]`, and `("a/b", None)` for `a/b`."""
    found = _SLICE.fullmatch(name)
    return (name, None) if found is None else (found[1], int(found[2]))
