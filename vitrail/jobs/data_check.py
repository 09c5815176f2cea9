"""`vitrail data check`: what is wrong with a data set, found before it is trained on.

Every picture is read and decoded as training would. The report is plain data; beside it lies a contact sheet:
a few pictures of each class, and every kind of trouble.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from vitrail.data.dense import kinds_of
from vitrail.data.dense_loader import check_size
from vitrail.data.finding import is_unread
from vitrail.data.image import decode
from vitrail.data.sources import Source, Splits
from vitrail.data.stores import entries
from vitrail.disk import write_atomically
from vitrail.errors import ImageError
from vitrail.jobs.contact_sheet import Tile, draw_sheet
from vitrail.jobs.dense_data import open_kind
from vitrail.jobs.overlays import draw_overlays
from vitrail.runs import DataCheckRun

TINY = 16
"""Pixels of the short side below which a picture is called tiny, unless most of the data set is as small."""

HUGE = 20_000_000
"""Pixels above which a picture is called huge: it costs decoding time and brings no accuracy."""

UNEVEN = 10.0
"""Pictures of the largest class over those of the smallest, above which the classes count as unbalanced."""

SHOWN = 6
"""Pictures of each class and of each trouble on the contact sheet."""

CLASSES_SHOWN = 20
"""Classes on the contact sheet."""

Watch = Callable[[int, int], None]


class Examined(NamedTuple):
    """What one picture showed."""

    number: int
    height: int
    width: int
    digest: bytes
    reason: str


ONE = {"pictures": "picture", "boxes": "box", "pixels": "pixel"}
"""What is counted, if there is one of it."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What is known of a data set; `to_dict` is JSON-ready. Files are named as their sources name them."""

    data: tuple[str, ...]
    pictures: dict[str, int]
    """Pictures of each split."""
    classes: dict[str, dict[str, int]]
    """Pictures of each class, by split."""
    sizes: dict[str, list[int]]
    """Height and width: smallest, middle and largest of all readable pictures."""
    unreadable: list[dict[str, str]]
    """File and reason."""
    tiny: list[dict[str, Any]]
    """File, height and width."""
    huge: list[dict[str, Any]]
    duplicates: list[list[str]]
    """Groups of files with exactly the same bytes, or pixels where there are no bytes."""
    leaks: list[list[str]]
    """Those groups that lie in more than one split: what is trained on is also tested on."""
    conflicts: list[list[str]]
    """Those groups whose files have different classes."""
    thin: list[str]
    """Classes with a single training picture."""
    absent: list[str]
    """Classes without a picture in a split, as SPLIT/CLASS."""
    imbalance: float
    """Training pictures of the largest class over those of the smallest."""
    notes: list[str]
    """What finding the data brought up."""
    counted: str = "pictures"
    """What the numbers of the classes count: pictures, boxes, or pixels of masks."""
    listed: dict[str, list[str]] = field(default_factory=dict)
    """Boxes and masks: what is odd about the annotations, by kind, one line each."""
    files: tuple[str, ...] = ()
    """The report, the contact sheet, and ten overlays of boxes or masks."""

    @property
    def problems(self) -> list[str]:
        """What should be fixed, one sentence each; empty for a sound data set."""
        total = sum(self.pictures.values())
        said = [
            (self.unreadable, f"{len(self.unreadable)} of {total} pictures cannot be read."),
            (self.leaks, f"In more than one split: {_count(self.leaks)}; scores would be too good."),
            (self.conflicts, f"In more than one class: {_count(self.conflicts)}."),
            (self.duplicates, f"More than once: {_count(self.duplicates)}."),
            (self.tiny, f"Tiny (short side below {TINY} pixels): {_count(self.tiny)}."),
            (self.huge, f"Huge (above {HUGE / 1e6:g} million pixels): {_count(self.huge)}."),
            *(
                (names, f"{len(names)} × {kind}, such as {names[0].removesuffix('.')}.")
                for kind, names in self.listed.items()
            ),
            (
                self.thin,
                f"With a single training {ONE[self.counted]}: {_count(self.thin, 'class', 'classes')}.",
            ),
            (self.absent, f"Classes without {self.counted} in a split: {', '.join(self.absent[:5])}."),
            (
                self.imbalance > UNEVEN and self.counted == "pictures",
                f"The largest class has {self.imbalance:.1f} times the pictures of the smallest.",
            ),
        ]
        return [sentence for wrong, sentence in said if wrong]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": self.problems}


def data_check(run: DataCheckRun, watch: Watch | None = None) -> DataReport:
    """Check a data set and write report.json, contact-sheet.png and for boxes and masks overlays.png.

    Raises DataError where there is none, or where training would not begin: annotations that mean nothing.
    """
    options = {"classes": run.classes, "ignore": run.ignore, "reduce_zero": run.reduce_zero}
    output = run.output or "data-check"
    return check(run.data, output, val=run.val, workers=run.workers, watch=watch, **options)


def check(
    data: Iterable[str],
    output: str | Path,
    *,
    val: Iterable[str] = (),
    workers: int | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> DataReport:
    """As `data_check`, in plain arguments. `watch` hears (done, total); `options` as open_kind's.

    Pictures that the data holds back for validation by itself count as training pictures here.
    """
    data = tuple(data)
    splits = open_kind(kinds_of(data)[0], data, val=tuple(val), val_share=0.0, **options)
    source = splits.everything
    place = _split_names(splits)
    pictures = list(_examine_all(source, workers, watch))
    report = _judged(data, splits, source, place, pictures)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    sheet, written = folder / "contact-sheet.png", folder / "report.json"
    rows, files = list(_rows(source, pictures, report)), [written]
    if rows:
        draw_sheet(rows, sheet)
        files.append(sheet)
    sound = [picture.number for picture in pictures if not picture.reason]
    if source.kind != "classes" and sound:
        files.append(draw_overlays(source, sound, folder))
    report = DataReport(**{**vars(report), "files": tuple(map(str, files))})
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(written, text.encode("utf-8", "surrogateescape"))
    return report


def _count(found: Sequence[Any], one: str = "picture", many: str = "pictures") -> str:
    return f"{len(found)} {one if len(found) == 1 else many}"


def _split_names(splits: Splits) -> list[str]:
    """The split of each picture of `everything`, which holds train, val and test in this order."""
    names: list[str] = []
    for name in ("train", "val", "test"):
        part: Source | None = getattr(splits, name)
        names += [name] * (len(part) if part is not None else 0)
    return names


def _examine_all(source: Source, workers: int | None, watch: Watch | None) -> Iterator[Examined]:
    """Decoders release Python's lock, so threads do."""
    threads = workers if workers is not None else os.cpu_count() or 1
    total = len(source)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, total, 256):  # in pieces, so that Ctrl-C and memory stay in hand
            for picture in pool.map(
                lambda index: _examine(source, index), range(start, min(start + 256, total))
            ):
                yield picture
                if watch is not None:
                    watch(picture.number + 1, total)


def _examine(source: Source, index: int) -> Examined:
    try:
        data = source.read(index)
        raw = data.tobytes() if isinstance(data, np.ndarray) else data
        digest = hashlib.sha256(raw).digest()
        _, height, width = decode(data, source.name(index)).shape
        if source.kind != "classes":
            check_size(source.name(index), (height, width), cast(Any, source).target(index))
    except ImageError as error:
        return Examined(index, 0, 0, b"", str(error))
    return Examined(index, height, width, digest, "")


def _judged(
    data: tuple[str, ...], splits: Splits, source: Source, place: list[str], pictures: list[Examined]
) -> DataReport:
    sound = [picture for picture in pictures if not picture.reason]
    sides = np.array([(picture.height, picture.width) for picture in sound], dtype=np.int64).reshape(-1, 2)
    small = bool(len(sides)) and bool(np.median(sides.min(axis=1)) < 2 * TINY)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for picture in sound:
        groups[picture.digest].append(picture.number)
    twins = [members for members in groups.values() if len(members) > 1]
    labels = source.labels

    def named(members: list[int]) -> list[str]:
        return [source.name(index) for index in members]

    def measured(picture: Examined) -> dict[str, Any]:
        return {"file": source.name(picture.number), "height": picture.height, "width": picture.width}

    counts: dict[str, dict[str, int]] = {name: {} for name in source.classes}
    for split in dict.fromkeys(place):
        part: Source = getattr(splits, split)
        for name, count in part.counts().items():
            counts[name][split] = count
    leading = "train" if splits.train is not None else place[0]
    numbers = [by_split[leading] for by_split in counts.values()]
    return DataReport(
        data=data,
        pictures={split: place.count(split) for split in dict.fromkeys(place)},
        classes=counts,
        sizes=_spread(sides),
        unreadable=[
            {"file": source.name(picture.number), "reason": picture.reason}
            for picture in pictures
            if picture.reason
        ],
        tiny=[]
        if small
        else [measured(picture) for picture in sound if min(picture.height, picture.width) < TINY],
        huge=[measured(picture) for picture in sound if picture.height * picture.width > HUGE],
        duplicates=[named(members) for members in twins],
        leaks=[named(members) for members in twins if len({place[index] for index in members}) > 1],
        conflicts=[named(members) for members in twins if len(set(labels[members].tolist())) > 1],
        thin=[name for name, by_split in counts.items() if by_split[leading] == 1],
        absent=[
            f"{split}/{name}" for name, parts in counts.items() for split, count in parts.items() if not count
        ],
        imbalance=round(max(numbers) / max(1, min(numbers)), 2),
        notes=[note for note in splits.notes if not note.startswith("Validation has no picture")],
        counted={"boxes": "boxes", "masks": "pixels"}.get(source.kind, "pictures"),
        listed={kind: list(names) for kind, names in getattr(source, "listed", {}).items()} | _unread(source),
    )


def _unread(source: Source) -> dict[str, list[str]]:
    """Pictures beside the others that nothing reads: whoever put them there thinks that they are learned."""
    names = [
        f"{store.place}/{store.names[entry]}"
        for store in source.stores
        for entry, parts in entries(store)
        if is_unread(parts[-1])
    ]
    return {"picture of a kind that is not read (convert it to PNG)": names} if names else {}


def _spread(sides: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, list[int]]:
    if not len(sides):
        return {}
    order = np.sort(sides, axis=0)  # each side by itself: the smallest height may be another picture's
    return {
        "smallest": order[0].tolist(),
        "middle": order[len(order) // 2].tolist(),
        "largest": order[-1].tolist(),
    }


def _rows(source: Source, pictures: list[Examined], report: DataReport) -> Iterator[tuple[str, list[Tile]]]:
    """Heading and tiles of each row of the contact sheet; troubles first."""
    by_name = {source.name(picture.number): picture for picture in pictures}

    def tiles(names: Iterable[str]) -> list[Tile]:
        chosen = list(names)[:SHOWN]
        return [_tile(source, by_name[name]) for name in chosen]

    for heading, names in (
        ("cannot be read", [item["file"] for item in report.unreadable]),
        ("in more than one split", [name for group in report.leaks for name in group]),
        ("in more than one class", [name for group in report.conflicts for name in group]),
        ("more than once", [name for group in report.duplicates for name in group]),
        ("tiny", [item["file"] for item in report.tiny]),
        ("huge", [item["file"] for item in report.huge]),
    ):
        if names:
            yield f"{heading}: {len(names)}", tiles(names)
    sound = np.array([not picture.reason for picture in pictures])
    shown = list(enumerate(source.classes))[:CLASSES_SHOWN] if source.kind == "classes" else []
    for number, name in shown:
        members = np.flatnonzero((source.labels == number) & sound)
        spread = members[np.linspace(0, len(members) - 1, min(SHOWN, len(members))).astype(int)]
        count = sum(report.classes[name].values())
        yield f"{name}: {count}", [_tile(source, pictures[index]) for index in spread.tolist()]


def _tile(source: Source, picture: Examined) -> Tile:
    name = os.path.basename(source.name(picture.number))
    if picture.reason:
        return Tile(None, name)
    return Tile(decode(source.read(picture.number)).permute(1, 2, 0).numpy(), name)
