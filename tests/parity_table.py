"""What the tests compared with other implementations, as a table: `make parity`, or pytest --parity.

A comparison is a number that remembers what it compares. When a test holds it against its bound, the pair is
written down, so the table shows what the tests asserted and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

COMPARERS = frozenset({"agree", "difference", "measured"})
"""Helpers that hand out comparisons: a test that calls one is a parity test."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One assertion: how far two results were apart, and how far they might be."""

    family: str
    variant: str
    reference: str
    size: str
    apart: float
    bound: float


made: list[Comparison] = []
"""Comparisons of the test that is running; conftest hands them to its report."""


class Difference(float):
    """A relative difference that is written down when it is compared with a bound."""

    about: dict[str, str]

    def __lt__(self, bound: float) -> bool:
        made.append(Comparison(**self.about, apart=float(self), bound=bound))
        return float(self) < bound

    def __eq__(self, bound: object) -> bool:
        if isinstance(bound, float | int):
            made.append(Comparison(**self.about, apart=float(self), bound=float(bound)))
        return float(self) == bound

    __hash__ = float.__hash__


def measured(
    value: float, model: Any, reference: str | object, size: Sequence[int] = (), variant: str = ""
) -> Difference:
    """A difference between a model of ours (or the family's name) and a reference: its name, or its network."""
    found = Difference(value)
    name = reference if isinstance(reference, str) else type(reference).__module__.partition(".")[0]
    found.about = {
        "family": model if isinstance(model, str) else model.family,
        "variant": variant or str(model.name),
        "reference": name,
        "size": "x".join(str(side) for side in size),
    }
    return found


def table(reports: Iterable[Sequence[tuple[str, object]]]) -> list[str]:
    """Lines of the table, from the properties of test reports: the worst of equal comparisons, by family."""
    worst: dict[tuple[str, str, str, str, float], tuple[float, bool]] = {}
    for report in reports:
        for key, values in report:
            if key == "parity" and isinstance(values, dict):
                found = Comparison(**values)
                place = (found.family, found.variant, found.reference, found.size, found.bound)
                held = found.apart < found.bound or found.apart == found.bound == 0
                before, fine = worst.get(place, (0.0, True))
                worst[place] = max(before, found.apart), fine and held
    head = ("family", "variant", "reference", "image", "largest difference", "bound", "verdict")
    rows = [
        (*place[:4], f"{apart:.1e}", f"{place[4]:.0e}" if place[4] else "0", "equal" if held else "DIFFERS")
        for place, (apart, held) in sorted(worst.items())
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    families = len({place[0] for place in worst})
    failed = sum(not held for _, held in worst.values())
    end = f"{len(rows)} comparisons of {families} families, {failed or 'none'} beyond its bound"
    return [*lines, "", f"{end}; differences are relative to the size of the reference's answer."]


def properties() -> list[tuple[str, dict[str, Any]]]:
    """The comparisons made since the last call, as properties of a test report."""
    taken = [("parity", asdict(found)) for found in made]
    made.clear()
    return taken
