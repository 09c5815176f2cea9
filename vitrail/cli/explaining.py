"""What `vitrail explain` and `vitrail inspect` show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrail.cli import show

if TYPE_CHECKING:
    from pathlib import Path

    from vitrail.jobs.explain import Explained, Scored
    from vitrail.runs import ExplainRun, InspectRun


def explain(run: ExplainRun) -> int:
    """Maps for pictures as they come, or the table of methods over a data set; 1 when some were not explained."""
    from vitrail.jobs import explain as job

    done: list[Explained] = []
    with show.messages() as handler:
        if job.is_trial(run):
            with show.Counter("pictures", handler) as counter:
                scored = job.score(run, counter)
            _trial(run, scored)
            return 0
        for explained in job.explain(run):
            done.append(explained)
            if run.format == "table":
                _explained(run, explained)
    if run.format == "json":
        print(show.json_text([explained.to_dict() for explained in done]))
    bad = sum(explained.error is not None for explained in done)
    if bad:
        show.say(f"{bad} of {len(done)} pictures could not be explained.")
    return 1 if bad else 0


def _explained(run: ExplainRun, explained: Explained) -> None:
    if explained.error is not None:
        show.table([explained.source], [[f"error: {explained.error}"]])
        return
    first = explained.explanations[0]
    columns = [first.source, "class", "probability"]
    if run.score:
        columns += ["fill", "deletion", "insertion", "gap", "random gap", "centre gap"]
    rows = []
    for found in explained.explanations:
        cells = [
            found.method,
            found.label if found.class_specific else f"({found.label})",
            show.percent(found.score),
        ]
        for fill, score in found.faithfulness.items():
            controls = (found.controls[fill][name].gap for name in ("random", "centre"))
            numbers = (score.deletion, score.insertion, score.gap, *controls)
            rows.append([*cells, fill, *(f"{number:.3f}" for number in numbers)])
            cells = ["", "", ""]
        if not found.faithfulness:
            rows.append(cells)
    show.table(columns, rows, right=columns[2:3] + columns[4:])
    best = first.prediction.top[0]
    if first.target != best.index:
        where = "" if first.corners is None and first.region is None else " there"
        show.say(f"note: the model says {best.label}{where}, {show.percent(best.score)}")
    for caution in explained.cautions:
        show.say(f"note: {caution}")
    _written(explained.files)


def _trial(run: ExplainRun, scored: Scored) -> None:
    found = scored.trial
    if run.format == "json":
        print(show.json_text(found.to_dict()))
        return
    columns = [
        "fill",
        "method",
        "deletion",
        "insertion",
        "gap",
        "95 % interval",
        "over random",
        "p",
        "over centre",
        "p",
        "forwards",
        "",
    ]
    rows = [
        [
            fill,
            row.method,
            f"{row.deletion.mean:.3f}",
            f"{row.insertion.mean:.3f}",
            f"{row.gap.mean:+.3f}",
            f"{row.gap.low:+.3f} to {row.gap.high:+.3f}",
            f"{row.over_random:+.3f}",
            f"{row.p_random:.4f}",
            f"{row.over_centre:+.3f}",
            f"{row.p_centre:.4f}",
            f"{found.costs.get(row.method, 0):.1f}",
            row.warning,
        ]
        for fill, standing in found.tables.items()
        for row in standing
    ]
    show.table(columns, rows, right=[*columns[2:5], *columns[6:11]])
    order = "the same" if found.agreed else "not the same: trust neither order alone"
    show.say(f"{found.images} pictures; the order of the methods under all fills is {order}")
    _written([scored.path, scored.path.with_suffix(".md")])


def inspect(run: InspectRun) -> int:
    """What was found in a model, and where its figures are."""
    from vitrail.jobs.inspect import inspect as job

    with show.messages():
        found = job(run)
    if run.format == "json":
        print(show.json_text(found.to_dict()))
        return 0
    show.table(["", found.model], [[name, value] for name, value in found.findings])
    _written(found.files)
    return 0


def _written(files: Sequence[Path]) -> None:
    """Where files of one folder are: the folder once, then their names."""
    show.say(f"written into {files[0].parent}: " + ", ".join(path.name for path in files))
