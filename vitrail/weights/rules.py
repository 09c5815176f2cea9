"""Rules as data: the records in which a family writes down how others name its tensors.

    Rule("blocks.{i}.norm1.{weight|bias}", "backbone.stages.0.blocks.{i}.norm1.{weight|bias}")
    Rule(("q.weight", "k.weight", "v.weight"), "qkv.weight")                 # joined along the first axis
    Rule("block{i+1}.{kernel|bias}", "stages.{i}.fc.{weight|bias}", "linear|copy")

`{i}` is a number; theirs may hold sums of it (`{i+1}`, `{2*i-1}`, `{3-i}`). `{a|b}` writes several rules in one: the
first word on one side belongs to the first on the other, also in `how`. Several rules may make one tensor
of ours: reading takes the first whose tensors are in the file, writing takes the first. A name of theirs that
ends in `[{i}]` is one slice of a stacked tensor. An empty name of theirs stands for zeros like its kin.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitrail.errors import WeightsError
from vitrail.weights import patterns
from vitrail.weights.card import Preprocessing
from vitrail.weights.transforms import FITS, TRANSFORMS, Context

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel training and compilation leave on every key, whoever wrote the file."""

DEFAULTS = ("", "zeros", "ones", "fresh")


@dataclass(frozen=True)
class Rule:
    """How tensors of theirs become tensors of ours, and back."""

    theirs: str | tuple[str, ...]
    """One name, or several that are joined along the first axis."""

    ours: str | tuple[str, ...]
    """One name, or several that are cut from the first axis."""

    how: str = "copy"
    """A two-way transform by name (`transforms.TRANSFORMS`); `a|b` where the names hold `{a|b}`."""

    fit: str = ""
    """What may be done when the shape differs: `positions`, `patch`, `channels`, `relative`, `classes`."""

    when: str = ""
    """Flags of the context that must be set, or not set (`!flag`), separated by blanks."""

    default: str = ""
    """What ours becomes when the file has none: `zeros`, `ones`, `fresh` (as initialised); else an error."""


class Drop(NamedTuple):
    """Tensors of a file that are left out on purpose."""

    pattern: str
    """Their name, with `{i}` for numbers and `*` for anything."""

    reason: str
    """Why nothing is lost."""

    when: str = ""
    """As in Rule; reading itself sets `fresh_head` and `headless`."""


@dataclass(frozen=True)
class Layout:
    """One way in which a family's weights are written down."""

    name: str
    """`timm`, `transformers`, `torchvision`, `google`, `original`, ..."""

    rules: tuple[Rule, ...]
    """Together they make every tensor of the model."""

    signature: tuple[str, ...] = ()
    """Patterns (as in Drop) that must each match a key, for this layout to be considered at all."""

    dropped: tuple[Drop, ...] = ()
    """What a file may hold besides."""

    prefixes: tuple[str, ...] = ()
    """Beginnings that a file's keys may have or lack (`vit.`, `backbone.`); WRAPPERS always count."""

    requires: str = ""
    """Flags (as in Rule) of the networks that files of this layout are meant for, where the tensors do not tell:
    a file that is recognised as this layout is refused for others."""

    meaning: str = ""
    """What `requires` stands for and the cure, as the end of a sentence: "is Caffe's: take legacy_seresnet50"."""

    preprocessing: Preprocessing | None = None
    """What the networks of this layout's bare files want to see, where it is not what the variant's card says."""

    resample: str = ""
    """How the code of this layout's files brings positions to another size (one of `resample.METHODS`), where it is not
    what the family's context says."""

    describe: Callable[[str, Any], dict[str, Any]] | None = None
    """That library's own `config.json` keys for a variant's name and Config, where it has such a file."""

    @functools.cached_property
    def index(self) -> dict[str, list[tuple[Rule, int]]]:
        """Rules, and the place among their tensors of ours, by the name of ours with its numbers left out."""
        index: dict[str, list[tuple[Rule, int]]] = {}
        for rule in _written_out(self):
            for place, pattern in enumerate(several(rule.ours)):
                index.setdefault(patterns.skeleton(pattern), []).append((rule, place))
        return index


class Match(NamedTuple):
    """A rule that makes a certain tensor of ours."""

    rule: Rule
    numbers: Mapping[str, int]
    """What `{i}`, `{j}` stand for."""
    place: int
    """Which of the rule's tensors of ours it is."""

    @property
    def theirs(self) -> list[str]:
        """Names in the file, with the numbers filled in."""
        return [patterns.filled(pattern, self.numbers) for pattern in several(self.rule.theirs)]

    @property
    def ours(self) -> list[str]:
        """Names in the model, with the numbers filled in."""
        return [patterns.filled(pattern, self.numbers) for pattern in several(self.rule.ours)]

    def keys(self, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        """The names of theirs without prefixes, as they are looked up in a file."""
        return tuple(strip(key, prefixes) for key in self.theirs)


def matches(layout: Layout, name: str, context: Context) -> Iterator[Match]:
    """The rules of a layout that make a tensor of ours, in order."""
    for rule, place in layout.index.get(patterns.skeleton(name), ()):
        numbers = patterns.match(several(rule.ours)[place], name)
        if numbers is not None and holds(rule.when, context):
            yield Match(rule, numbers, place)


def holds(when: str, context: Context) -> bool:
    """Whether all flags of a condition are as it says."""
    return all(bool(context.get(flag.removeprefix("!"))) != flag.startswith("!") for flag in when.split())


def strip(key: str, prefixes: tuple[str, ...]) -> str:
    """A key without any of the prefixes, however often they come."""
    while True:
        for prefix in (*prefixes, *WRAPPERS):
            if key.startswith(prefix):
                key = key.removeprefix(prefix)
                break
        else:
            return key


def base(key: str) -> str:
    """The name of the stored tensor: the key without its slice."""
    return patterns.sliced(key)[0]


def several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """One name as a tuple of one."""
    return (names,) if isinstance(names, str) else names


def _written_out(layout: Layout) -> Iterator[Rule]:
    """The layout's rules with every `{a|b}` written out, and checked."""
    for rule in layout.rules:
        names = (*several(rule.theirs), *several(rule.ours))
        hows = rule.how.split("|")
        for place in range(max(patterns.count_alternatives(name) for name in names)):
            how = hows[place] if len(hows) > 1 else hows[0]
            single = dataclasses.replace(
                rule, how=how, theirs=_worded(rule.theirs, place), ours=_worded(rule.ours, place)
            )
            fits = single.fit in {"", "classes", *FITS}
            if how not in TRANSFORMS or not fits or single.default not in DEFAULTS:
                raise WeightsError(
                    f"Layout {layout.name!r}: unknown how, fit or default in the rule for {rule.ours}."
                )
            yield single


def _worded(names: str | tuple[str, ...], place: int) -> str | tuple[str, ...]:
    if isinstance(names, str):
        return patterns.alternatives(names, place)
    return tuple(patterns.alternatives(name, place) for name in names)
