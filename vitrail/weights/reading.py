"""One pass over the tensors that a model expects, and over the keys that a file has."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.errors import WeightsError, suggestion
from vitrail.weights import patterns
from vitrail.weights.rules import Layout, Match, Rule, base, holds, matches, strip
from vitrail.weights.transforms import FITS, TRANSFORMS, Context

OWN = "own"
"""Name of the layout in which a model's tensors have the names of our modules."""

Shapes = Mapping[str, tuple[int, ...]]


class Made(NamedTuple):
    """A tensor of ours that is not simply what the file holds."""

    name: str
    story: str


class Source(NamedTuple):
    """The rule that makes a tensor of ours, and the file's keys (without prefixes) that it takes."""

    match: Match
    keys: tuple[str, ...]


def recognise(
    state: Mapping[str, Tensor],
    layouts: Sequence[Layout],
    expected: Shapes,
    context: Context,
    name: str | None,
) -> tuple[Layout, dict[str, str], dict[str, Source]]:
    """The layout that explains most of the model by a file's content; its keys; where each tensor comes from.

    Raises:
        WeightsError: no layout explains anything, or two explain the same equally well.
    """
    layouts = [*layouts, *_own(state, layouts, expected, context)]
    known = [layout.name for layout in layouts]
    if name is not None and name not in known:
        raise WeightsError(f"there is no layout {name!r}, only {', '.join(known)}.{suggestion(name, known)}")
    trials: list[tuple[tuple[int, int, int], Layout, dict[str, str], dict[str, Source]]] = []
    for layout in layouts:
        names = _names(state, layout)
        if name not in (None, layout.name) or names is None or not signed(layout, names):
            continue
        found = {ours: source for ours in expected if (source := _source(layout, ours, names, context))}
        if found:
            rest = set(names) - {base(key) for source in found.values() for key in source.keys}
            left = sum(not any(patterns.match(drop.pattern, key) for drop in layout.dropped) for key in rest)
            weight = -1 if layout.name == OWN else len(layout.signature)  # a family's layout knows better
            trials.append(((len(found), -left, weight), layout, names, found))
    if not trials:
        keys = sorted(state)[:4]
        raise WeightsError(
            f"no layout of this family explains the file (known: {', '.join(known) or 'none'}); "
            f"its {len(state)} keys begin with {', '.join(keys) or 'nothing'}."
        )
    best = max(trials, key=lambda trial: trial[0])
    equals = [trial[1].name for trial in trials if trial[0] == best[0]]
    if len(equals) > 1:
        raise WeightsError(
            f"the file can be read as {' or '.join(equals)}, which differ in meaning: say which (layout=...)."
        )
    if name is None and not holds(best[1].requires, context):
        raise WeightsError(f"the file's layout {best[1].name!r} {best[1].meaning}.")
    return best[1:]


class Reading:
    """Collects what fits and every problem; touches nothing else."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        names: Mapping[str, str],
        layout: Layout,
        expected: Shapes,
        context: Context,
        replace_head: bool,
        adapt: bool,
    ) -> None:
        self.state, self.names, self.layout, self.expected = state, names, layout, expected
        self.context: dict[str, Any] = dict(context)
        if layout.resample:
            self.context["resample"] = layout.resample
        self.replace_head, self.adapt = replace_head, adapt
        self.result: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.slices: dict[str, set[int]] = {}
        """Which slices of stacked tensors were used, by the tensor's name."""
        self.made: list[Made] = []
        self.dropped: list[tuple[str, str]] = []
        self.fresh: list[str] = []
        self.problems: list[Callable[[], str]] = []
        """Each is told when it is asked for: finding near matches takes time."""

    def run(self, found: Mapping[str, Source]) -> None:
        """Take every expected tensor, then account for every key that is left."""
        heads = self._heads(found)
        for name, shape in self.expected.items():
            if heads.get(name):
                self._leave_fresh(name, shape, found.get(name))
            elif name in found:
                self._take(name, shape, found[name])
            else:
                self._absent(name, shape)
        self.context["fresh_head"] = any(heads.values())
        self.context["headless"] = not heads
        self._account_for_rest()

    def _heads(self, found: Mapping[str, Source]) -> dict[str, bool]:
        """The tensors of class layers, and whether their layer stays as initialised (whole layers)."""
        names = [name for name in self.expected if (rule := self._rule(name)) and rule.fit == "classes"]
        new = {_module(name) for name in names if self.replace_head and self._differs(name, found.get(name))}
        return {name: _module(name) in new for name in names}

    def _differs(self, name: str, source: Source | None) -> bool:
        if source is None:
            return True
        try:
            have = tuple(self._tensor(source, self.expected[name]).shape)
            return self.adapt and have != self.expected[name]
        except (RuntimeError, IndexError, ValueError):
            return True

    def _leave_fresh(self, name: str, shape: tuple[int, ...], source: Source | None) -> None:
        self.fresh.append(name)
        if source is None:
            self.made.append(Made(name, f"stays as initialised {shape}, the file has no head"))
            return
        for key in filter(None, source.keys):
            self.made.append(Made(name, f"stays as initialised {shape}, the file has {self._told(key)}"))
            self.dropped.append((self.names[base(key)], "the head is new"))

    def _take(self, name: str, shape: tuple[int, ...], source: Source) -> None:
        try:
            tensor = self._tensor(source, shape)
        except (RuntimeError, IndexError, ValueError) as error:
            told = " + ".join(self._told(key) for key in source.keys if key)
            self._problem(f"{name} {shape} cannot be made of {told} ({_first_line(error)})")
            return
        for key in filter(None, source.keys):
            stored, index = patterns.sliced(key)
            self.used.add(stored)
            if index is not None:
                self.slices.setdefault(stored, set()).add(index)
        self._fit(name, shape, source, tensor)

    def _tensor(self, source: Source, shape: tuple[int, ...]) -> Tensor:
        """The tensor of ours that a rule makes, whatever its shape."""
        transform = TRANSFORMS[source.match.rule.how]
        parts = [transform.read(self._raw(key), self.context) if key else None for key in source.keys]
        like = next(part for part in parts if part is not None)
        filled = [torch.zeros_like(like) if part is None else part for part in parts]
        joint = torch.cat(filled) if len(filled) > 1 else filled[0]
        ours = source.match.ours
        if len(ours) > 1:
            absent = [name for name in ours if name not in self.expected]
            if absent:
                raise ValueError(f"a part of it is for {absent[0]}, which the model has not")
            sizes = [self.expected[name][0] for name in ours]
            if sum(sizes) != joint.shape[0]:
                raise ValueError(f"{joint.shape[0]} rows cannot be cut into {' + '.join(map(str, sizes))}")
            joint = torch.split(joint, sizes)[source.match.place]
        return joint.contiguous()

    def _fit(self, name: str, shape: tuple[int, ...], source: Source, tensor: Tensor) -> None:
        """Keep the tensor if its shape is right or can be made right; note the problem if not."""
        have, fit = tuple(tensor.shape), source.match.rule.fit
        told = " + ".join(self.names[base(key)] for key in source.keys if key)
        moved = fit == "positions" and self._moved()
        if (fit and not self.adapt) or (have == shape and not moved):
            self.result[name] = tensor
            if fit == "positions" and self.adapt and self._unsure():
                grid = self.context["grid"]
                self.made.append(Made(name, f"taken as a grid of {grid[0]}x{grid[1]}, the file does not say"))
            return
        if fit in FITS:
            try:
                tensor, story = FITS[fit](tensor, shape, self.context)
            except (WeightsError, RuntimeError) as error:
                self._problem(f"{told} {have} {_first_line(error)}")
                return
            if tuple(tensor.shape) == shape:
                self.result[name] = tensor
                self.made.append(Made(name, story))
                return
        cure = " (pass num_classes for a new head)" if fit == "classes" else ""
        self._problem(f"{told} is {have} in the file, the model's {name} is {shape}{cure}")

    def _moved(self) -> bool:
        """Whether the file's grid is known to be another one, though it may have as many cells."""
        old, new = self.context.get("from_grid"), self.context.get("grid")
        if old is None or new is None:
            return False
        return (old[0], old[1]) != (new[0], new[1])

    def _unsure(self) -> bool:
        """Whether a table that fits could as well be a square grid's."""
        grid = self.context.get("grid")
        if grid is None or grid[0] == grid[1] or self.context.get("from_grid") is not None:
            return False
        cells = int(grid[0]) * int(grid[1])
        return math.isqrt(cells) ** 2 == cells

    def _absent(self, name: str, shape: tuple[int, ...]) -> None:
        rule = self._rule(name)
        if rule is None:
            self._problem(f"the layout {self.layout.name} has nothing for {name} {shape}")
        elif rule.default in ("zeros", "ones"):
            self.result[name] = torch.zeros(shape) if rule.default == "zeros" else torch.ones(shape)
            self.made.append(Made(name, f"{rule.default}, the file has none"))
        elif rule.default == "fresh":
            self.fresh.append(name)
            self.made.append(Made(name, "stays as initialised, the file has none"))
        else:
            cure = ", pass num_classes for a new head" if rule.fit == "classes" else ""
            self.problems.append(lambda: f"{name} {shape} is missing{self._near(name)}{cure}")

    def _near(self, name: str) -> str:
        """What the file should have held, and the key that comes nearest to it."""
        match = next(matches(self.layout, name, self.context))
        wanted = [key for key in match.keys(self.layout.prefixes) if key and base(key) not in self.names]
        if not wanted:
            return ""
        near = difflib.get_close_matches(wanted[0], sorted(set(self.names) - self.used), n=1, cutoff=0.6)
        return f" (no {wanted[0]} in the file{f', the nearest is {self._told(near[0])}' if near else ''})"

    def _account_for_rest(self) -> None:
        """Every key that was not used is dropped for a reason, or a problem; so is every unused slice."""
        for stored, used in self.slices.items():
            if len(used) < self._raw(stored).shape[0]:
                self._problem(f"{self._told(stored)} stacks more than the {len(used)} that the model has")
        gone = {key for key, _ in self.dropped}
        for key, original in self.names.items():
            if key in self.used or original in gone:
                continue
            reasons = [
                drop.reason
                for drop in self.layout.dropped
                if holds(drop.when, self.context) and patterns.match(drop.pattern, key) is not None
            ]
            if reasons:
                self.dropped.append((original, reasons[0]))
                continue
            self.problems.append(functools.partial(self._without_place, key))

    def _without_place(self, key: str) -> str:
        near = difflib.get_close_matches(key, sorted(self.used), n=1, cutoff=0.8)
        like = f" (like {self._told(near[0])}, which has one)" if near else ""
        return f"{self._told(key)} has no place in the model{like}"

    def _problem(self, text: str) -> None:
        self.problems.append(lambda: text)

    def _rule(self, name: str) -> Rule | None:
        match = next(matches(self.layout, name, self.context), None)
        return None if match is None else match.rule

    def _raw(self, key: str) -> Tensor:
        stored, index = patterns.sliced(key)
        tensor = self.state[self.names[stored]]
        return tensor if index is None else tensor[index]

    def _told(self, key: str) -> str:
        original = self.names[base(key)]
        return f"{original} {tuple(self.state[original].shape)}"


def _own(
    state: Mapping[str, Tensor], layouts: Sequence[Layout], expected: Shapes, context: Context
) -> tuple[Layout, ...]:
    """The layout of a model's own state dict, where the file has such names: every name stands for itself.

    What may be resampled is what the family's first layout says.
    """
    names = {strip(key, ()) for key in state}
    if names.isdisjoint(expected):
        return ()
    rules = []
    for name in expected:
        match = next((match for layout in layouts for match in matches(layout, name, context)), None)
        fit, default = (match.rule.fit, match.rule.default) if match is not None else ("", "")
        rules.append(Rule(name, name, fit=fit, default=default))
    return (Layout(OWN, tuple(rules)),)


def _names(state: Mapping[str, Tensor], layout: Layout) -> dict[str, str] | None:
    """The file's keys by their name without prefixes; None where two become one."""
    names = {strip(key, layout.prefixes): key for key in state}
    return names if len(names) == len(state) else None


def signed(layout: Layout, keys: Iterable[str]) -> bool:
    """Whether every pattern of a layout's signature matches one of the keys."""
    names = {strip(key, layout.prefixes) for key in keys}
    return all(
        any(patterns.match(strip(pattern, layout.prefixes), name) is not None for name in names)
        for pattern in layout.signature
    )


def _source(layout: Layout, name: str, names: Mapping[str, str], context: Context) -> Source | None:
    """The first rule for a tensor of ours whose tensors are all in the file."""
    for match in matches(layout, name, context):
        keys = match.keys(layout.prefixes)
        if all(base(key) in names for key in keys if key):
            return Source(match, keys)
    return None


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
