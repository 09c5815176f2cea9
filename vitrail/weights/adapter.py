"""Foreign state dicts to ours and back, with every key accounted for.

A family describes each layout in which its weights are found as a `Layout` of `Rule`s (see `rules`). Reading
goes from the names that the model expects, so nothing is ever half loaded: the answer is complete, or a
WeightsError says what does not fit. Writing is the same rules the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.errors import WeightsError, suggestion
from vitrail.weights import patterns
from vitrail.weights.reading import Made, Reading, Shapes, recognise, signed
from vitrail.weights.rules import Drop as Drop
from vitrail.weights.rules import Layout as Layout
from vitrail.weights.rules import Match as Match
from vitrail.weights.rules import Rule as Rule
from vitrail.weights.rules import matches as matches
from vitrail.weights.rules import strip
from vitrail.weights.transforms import TRANSFORMS, Context

SHOWN = 4
"""Problems that a message spells out; the rest are counted."""


@dataclass(frozen=True)
class Receipt:
    """What became of every tensor of a file."""

    layout: str
    """Name of the layout that was recognised."""

    used: tuple[str, ...]
    """Keys of the file that are now in the model."""

    made: tuple[Made, ...] = ()
    """Tensors of ours that were resampled, filled in, or stay as initialised: (name, story)."""

    dropped: tuple[tuple[str, str], ...] = ()
    """Keys of the file that were left out on purpose, with the reason."""

    fresh: tuple[str, ...] = ()
    """Tensors of ours that the answer does not hold: they stay as initialised."""

    bytes: int = 0
    """Size of the tensors used."""

    source: str = ""
    """Where the tensors come from."""

    sha256: str = ""
    """Hash of the file, where there is one."""

    def summary(self) -> str:
        """One line for a log: `layout timm: 150 tensors used (22.9 MB), 2 made, 1 dropped on purpose`."""
        parts = [f"layout {self.layout}: {len(self.used)} tensors used ({self.bytes / 1e6:.1f} MB)"]
        if self.made:
            parts.append(f"{len(self.made)} made")
        if self.dropped:
            parts.append(f"{len(self.dropped)} dropped on purpose")
        return ", ".join(parts) + (f", from {self.source}" if self.source else "")

    def lines(self) -> list[str]:
        """The summary, and one line for each tensor that was made or dropped."""
        lines = [self.summary()]
        lines += [f"made     {name}: {story}" for name, story in self.made]
        lines += [f"dropped  {key}: {reason}" for key, reason in self.dropped]
        if self.sha256:
            lines.append(f"sha256   {self.sha256}")
        return lines


class Candidate(NamedTuple):
    """A model that a file might have been meant for."""

    name: str
    layouts: Sequence[Layout]
    expected: Callable[[], Shapes]
    """Names and shapes of its tensors; asked for only where a layout's signature is in the file."""
    context: Context


class Likeness(NamedTuple):
    """How well a file fits a candidate."""

    name: str
    layout: str
    share: float
    """Share of the candidate's tensors that the file explains, less what is left over; resizing is no fault."""
    exact: float
    """Share of the candidate's tensors that have their very shape in the file."""


def read(
    state: Mapping[str, Tensor],
    layouts: Sequence[Layout],
    expected: Shapes,
    context: Context | None = None,
    *,
    layout: str | None = None,
    replace_head: bool = False,
    adapt: bool = True,
    source: str = "",
    sha256: str = "",
    candidates: Callable[[], Iterable[Candidate]] | None = None,
) -> tuple[dict[str, Tensor], Receipt]:
    """Our tensors from a foreign state dict.

    Args:
        state: the file's tensors by their names.
        layouts: the family's RENAMES.
        expected: names and shapes of the model's state dict.
        context: what rules ask for: flags for `when`, and `heads`, `grid`, `from_grid`, `prefix`, `resample`.
        layout: name of the layout, where the caller knows it; otherwise it is recognised by content.
        replace_head: whether a head of another class count (or none at all) may be left out of the answer, so
            that the model keeps the one it was initialised with.
        adapt: whether tensors of another size are resampled; without it their size is kept (for conversion).
        source, sha256: for the receipt.
        candidates: other models to compare with when the file does not fit, for the message alone.

    Returns:
        Tensors by our names (all that are expected, but those in `receipt.fresh`), and the receipt.

    Raises:
        WeightsError: no layout is recognised, or two are; a tensor is missing, left over or of wrong shape.
            The message names tensors, shapes and the nearest match.
    """
    where = source or "The weights"
    try:
        chosen, names, found = recognise(state, layouts, expected, context or {}, layout)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}{_looks_like(state, candidates)}") from None
    reading = Reading(state, names, chosen, expected, context or {}, replace_head, adapt)
    reading.run(found)
    if reading.problems:
        shown = "; ".join(problem() for problem in reading.problems[:SHOWN])
        more = len(reading.problems) - SHOWN
        many = len(reading.problems) * 10 > len(expected)  # else it is this model's file, with a fault
        like = _looks_like(state, candidates) if many else ""
        raise WeightsError(
            f"{where} does not fit the model (layout {chosen.name}).{like} Nothing was"
            f" loaded, because {shown}{f'; and {more} more' if more > 0 else ''}."
        )
    receipt = Receipt(
        layout=chosen.name,
        used=tuple(sorted(names[key] for key in reading.used)),
        made=tuple(reading.made),
        dropped=tuple(reading.dropped),
        fresh=tuple(reading.fresh),
        bytes=sum(state[names[key]].nbytes for key in reading.used),
        source=source,
        sha256=sha256,
    )
    return reading.result, receipt


def write(state: Mapping[str, Tensor], layout: Layout, context: Context | None = None) -> dict[str, Tensor]:
    """Our tensors under a layout's names; `read` of the result gives the same bits.

    Raises:
        WeightsError: the layout has no place for a tensor.
    """
    written: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    done: set[str] = set()
    for name in state:
        if name in done:
            continue
        match = next(matches(layout, name, context or {}), None)
        if match is None:
            raise WeightsError(
                f"The layout {layout.name!r} has no place for {name}; nothing was written: "
                "take another layout, or a model without this part."
            )
        done.update(match.ours)
        for key, part in zip(match.theirs, _parts(state, match, layout, context or {}), strict=True):
            stored, index = patterns.sliced(key)
            if stored in written or index in stacks.get(stored, {}):
                raise WeightsError(f"The layout {layout.name!r} writes {key} twice, again from {name}.")
            if not key:
                _check_zero(part, name, layout)
            elif index is None:
                written[stored] = part
            else:
                stacks.setdefault(stored, {})[index] = part
    for stored, parts in stacks.items():
        written[stored] = torch.stack([parts[index] for index in sorted(parts)])
    return written


def ranked(state: Mapping[str, Tensor], candidates: Iterable[Candidate]) -> list[Likeness]:
    """How well a file fits each candidate, best first; candidates whose layouts it does not know are left out."""
    return sorted(_likenesses(state, candidates), key=lambda like: (-like.share, -like.exact))


def nearest(state: Mapping[str, Tensor], candidates: Iterable[Candidate]) -> Likeness | None:
    """The candidate that a file fits best (the first that it fits to the last tensor), or None."""
    best: Likeness | None = None
    for like in _likenesses(state, candidates):
        if best is None or like[2:] > best[2:]:
            best = like
        if like.share == like.exact == 1:
            break
    return best


def _likenesses(state: Mapping[str, Tensor], candidates: Iterable[Candidate]) -> Iterator[Likeness]:
    empty = {key: torch.empty(tensor.shape, device="meta") for key, tensor in state.items()}
    ours = any(strip(key, ()).startswith("backbone.stages.") for key in state)
    for candidate in candidates:
        if not ours and not any(signed(layout, empty) for layout in candidate.layouts):
            continue
        expected = candidate.expected()
        try:
            layout, names, found = recognise(empty, candidate.layouts, expected, candidate.context, None)
        except WeightsError:
            continue
        reading = Reading(empty, names, layout, expected, candidate.context, True, False)
        reading.run(found)
        share = 1 - len(reading.problems) / max(len(expected), len(reading.problems), 1)
        exact = sum(tuple(tensor.shape) == expected[name] for name, tensor in reading.result.items())
        yield Likeness(candidate.name, layout.name, share, exact / max(len(expected), 1))


def by_name(layouts: Sequence[Layout], name: str) -> Layout:
    """The layout of a name. Raises WeightsError that lists them."""
    for layout in layouts:
        if layout.name == name:
            return layout
    names = [layout.name for layout in layouts]
    near = suggestion(name, names)
    raise WeightsError(f"There is no layout {name!r} for this family, only {', '.join(names)}.{near}")


def _parts(state: Mapping[str, Tensor], match: Match, layout: Layout, context: Context) -> list[Tensor]:
    """The tensors of theirs that a rule makes of ours."""
    absent = [name for name in match.ours if name not in state]
    if absent:
        joined = ", ".join(match.ours)
        raise WeightsError(f"The layout {layout.name!r} joins {joined}, but {absent[0]} is not there.")
    joint = torch.cat([state[name] for name in match.ours]) if len(match.ours) > 1 else state[match.ours[0]]
    count = len(match.theirs)
    if count > 1 and joint.shape[0] % count:
        raise WeightsError(f"{match.ours[0]} {tuple(joint.shape)} cannot be cut into {count} equal parts.")
    parts = joint.chunk(count) if count > 1 else (joint,)
    try:
        return [TRANSFORMS[match.rule.how].write(part, context).contiguous() for part in parts]
    except (RuntimeError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{match.ours[0]} {tuple(joint.shape)} cannot be written as {match.theirs[0]}: {error}"
        ) from error


def _check_zero(part: Tensor, name: str, layout: Layout) -> None:
    if torch.count_nonzero(part):
        raise WeightsError(f"The layout {layout.name!r} takes a part of {name} as zero, and it is not.")


def _looks_like(state: Mapping[str, Tensor], candidates: Callable[[], Iterable[Candidate]] | None) -> str:
    best = nearest(state, candidates()) if candidates is not None else None
    if best is None or best.share < 0.5:
        return ""
    return f" The file looks like {best.name} (layout {best.layout}, {best.share:.0%} of its tensors fit)."
