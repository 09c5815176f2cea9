"""What `vitrail predict` shows: classes, boxes or masks, as a table, JSON, lines of JSON, CSV or COCO's form."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from vitrail.cli import show

if TYPE_CHECKING:
    from vitrail.runs import PredictRun


def predict(run: PredictRun) -> int:
    """Records for images; 1 when some could not be read."""
    if run.cluster:
        return _on_cluster(run)
    from vitrail.jobs.predict import coco_form
    from vitrail.jobs.predict import predict as job

    records: list[Any] = []
    with show.messages() as handler:
        found = job(run)
        with show.Counter("images", handler) as counter:
            for record in found:
                records.append(_lighter(record))
                counter(len(records), found.total)
                if run.format == "jsonl" and run.output is None:
                    print(json.dumps(record.to_dict(), ensure_ascii=False), flush=True)
    top_k = min(run.top_k, len(found.labels))
    if run.format == "json":
        show.write_result(show.json_text([record.to_dict() for record in records]), run.output)
    elif run.format == "coco":
        show.write_result(
            json.dumps(coco_form(records, found.labels, found.ids), ensure_ascii=False), run.output
        )
    elif run.format == "csv":
        rows = [row for record in records for row in _rows(record, top_k, found.labels)]
        show.write_result(show.csv_text(rows), run.output)
    elif run.format == "jsonl" and run.output is not None:
        lines = (json.dumps(record.to_dict(), ensure_ascii=False) for record in records)
        show.write_result("\n".join(lines), run.output)
    elif run.format == "table":
        _table(found.task, records, top_k, run.output)
    if found.folder is not None:
        show.say(f"drawings: {found.folder}")
    wrong = [record for record in records if record.error is not None]
    bad = len(wrong)
    for record in wrong if run.format == "table" else ():
        show.say(f"error: {record.error}")
    if bad:
        show.say(f"{bad} of {len(records)} images could not be read.")
    return 1 if bad else 0


def _lighter(record: Any) -> Any:
    """The record without what its files hold by now, so that a thousand photographs need no thousand masks in memory:
    of a mask only the size is kept, and the segments of boxes as they are told."""
    if getattr(record, "mask", None) is not None:
        return dataclasses.replace(record, mask=record.mask[:1, :1].clone().expand(record.mask.shape))
    if getattr(record, "segments", None) is not None:
        return dataclasses.replace(record, segments=dataclasses.replace(record.segments, map=None))
    return record


def _on_cluster(run: PredictRun) -> int:
    """What a job on a cluster did; 1 when some images could not be read."""
    from vitrail.jobs.cluster import predict_on_cluster

    with show.messages():
        done = predict_on_cluster(run, progress=sys.stderr.isatty())
    show.say(
        f"{done.folder}: {done.total} images, {done.before} of them from before, {done.seconds:.1f} s on"
        f" {done.workers} workers"
    )
    if done.errors:
        show.say(f"{done.errors} of {done.total} images could not be read.")
    return 1 if done.errors else 0


def _rows(record: Any, top_k: int, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a CSV: one for each picture, or for each box; a picture without a box has an empty one."""
    if hasattr(record, "top"):
        return [record.row(top_k)]
    if not hasattr(record, "boxes"):
        return [record.row(labels)]
    empty = {"label": "", "score": "", "left": "", "top": "", "right": "", "bottom": ""}
    rows = [
        {"label": box.label, "score": box.score, **dict(zip(list(empty)[2:], box.corners, strict=True))}
        for box in record.boxes
    ]
    return [{"source": record.source, **row, "error": record.error or ""} for row in rows or [empty]]


def _table(task: str, records: list[Any], top_k: int, output: str | None) -> None:
    if task == "image-classification":
        columns = ["image", *(f"{place + 1}." for place in range(top_k))]
        cells = [[f"{guess.label} {show.percent(guess.score)}" for guess in r.top] for r in records]
    elif task == "object-detection":
        columns = ["image", "found"]
        counts = [Counter(box.label for box in record.boxes) for record in records]
        cells = [
            [", ".join(f"{n} {label}" for label, n in count.most_common()) or "nothing"] for count in counts
        ]
    else:
        columns = ["image", *(f"{place + 1}." for place in range(top_k))]
        cells = [[f"{s.label} {show.percent(s.share)}" for s in record.shares[:top_k]] for record in records]
    rows = []
    for record, own in zip(records, cells, strict=True):
        line = ["error"] if record.error else own  # the reason, which is long, stands below the table
        rows.append([record.source, *line, *[""] * (len(columns) - 1 - len(line))])
    if output is None:
        show.table(columns, rows)
    else:
        show.write_result(show.plain_table(columns, rows), output)
