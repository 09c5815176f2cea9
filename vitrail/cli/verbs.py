"""One function a verb: run the job, show its result, give the exit code. Jobs are imported when they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrail.cli import show
from vitrail.cli.explaining import explain as explain
from vitrail.cli.explaining import inspect as inspect
from vitrail.cli.exporting import export as export
from vitrail.cli.predicting import predict as predict
from vitrail.cli.serving import serve as serve

if TYPE_CHECKING:
    from vitrail.jobs.bench import Benchmark
    from vitrail.jobs.info import Info
    from vitrail.runs import (
        BenchRun,
        CompareRun,
        ConvertRun,
        DataCheckRun,
        DemoRun,
        DoctorRun,
        EvaluateRun,
        InfoRun,
        ModelsRun,
        TraceRun,
        TrainRun,
    )

MOST_CLASSES = 40
"""Classes that a table still lists one by one; the report holds them all."""


def train(run: TrainRun) -> int:
    """A run, watched; 130 when it was interrupted (and saved)."""
    import os

    from vitrail.cli.training import TrainingView
    from vitrail.jobs.train import train as job

    # The job logs what it reports, for the run's train.log; here the view shows it.
    with show.messages(without="vitrail.jobs.train") as handler, TrainingView(handler) as view:
        result = job(run, view)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if result.scores:
        columns = [name for name in SCORES if any(name in found for found in result.scores.values())]
        columns = [name for name in columns if name in TRAINED]
        rows = [
            [split, *(score_text(name, found[name]) for name in columns)]
            for split, found in result.scores.items()
        ]
        names = [SCORES[name] if name != "loss" else "loss" for name in columns]
        show.table(["split", *names], rows, right=names)
    show.say(f"trained for {show.duration(result.seconds)}; weights of step {result.step}")
    show.say(f"model:  {result.model}\ncurves: {result.folder / 'curves.png'}")
    return 130 if result.reason == "interrupted" else 0


def evaluate(run: EvaluateRun) -> int:
    """Scores of a model, by class too."""
    from vitrail.jobs.evaluate import evaluate as job

    with show.messages() as handler, show.Counter("images", handler) as counter:
        found = job(run, counter)
    if run.format == "json":
        print(show.json_text(found.to_dict()))
        return 0
    scores = dict(found.scores)
    rows = [["images", f"{scores.pop('images'):.0f}"], ["split", found.split]]
    rows += [[SCORES.get(name, name), score_text(name, value)] for name, value in scores.items()]
    show.table(["score", "value"], rows, right=["value"])
    if len(found.classes) <= MOST_CLASSES:
        columns, lines = _class_rows(found.classes)
        print()
        show.table(columns, lines, right=columns[1:])
    for path in found.files:
        show.say(f"written: {path}")
    return 0


SCORES = {
    "acc1": "top-1",
    "acc5": "top-5",
    "loss": "cross-entropy",
    "precision_macro": "precision, mean of classes",
    "recall_macro": "recall, mean of classes",
    "f1_macro": "F1, mean of classes",
    "ece": "calibration error",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP, small",
    "ap_medium": "AP, medium",
    "ap_large": "AP, large",
    "ar1": "recall, 1 box",
    "ar10": "recall, 10 boxes",
    "ar100": "recall, 100 boxes",
    "ar_small": "recall, small",
    "ar_medium": "recall, medium",
    "ar_large": "recall, large",
    "miou": "mIoU",
    "pixel_acc": "pixel accuracy",
    "mean_acc": "accuracy, mean of classes",
}
"""Scores in words."""

TRAINED = ("acc1", "acc5", "loss", "ap", "ap50", "ap75", "miou", "pixel_acc")
"""Scores that stand in the table at the end of a training."""


def score_text(name: str, value: float) -> str:
    """A share as a percentage, anything else as a number; a dash for what is not defined."""
    if value != value:
        return "–"
    return f"{value:.4f}" if name == "loss" else show.percent(value)


def _class_rows(classes: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the scores by class, whatever the task."""
    shares = [name for name in CLASS_SCORES if any(name in row for row in classes)]
    support = {"iou": "pixels", "ap": "boxes"}.get(shares[0] if shares else "", "images")

    def cell(value: float | None) -> str:
        return "–" if value is None or value != value else show.percent(value)

    lines = [
        [row["label"], str(row.get("support", "")), *(cell(row.get(name)) for name in shares)]
        for row in classes
    ]
    return ["class", support, *(CLASS_SCORES[name] for name in shares)], lines


CLASS_SCORES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "iou": "IoU",
    "accuracy": "accuracy",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
}
"""Scores of one class, and their columns."""


def trace(run: TraceRun) -> int:
    """The steps of one image, and where their pictures are."""
    from vitrail.jobs.trace import trace as job

    with show.messages():
        traced = job(run)
    if run.format == "json":
        print(show.json_text(traced.to_dict()))
        return 0
    steps = traced.trace.steps
    show.table(["step", "shape", ""], [[step.name, step.size, step.note] for step in steps], right=["shape"])
    show.say(f"picture: {traced.picture}\npage:    {traced.page}")
    return 0


def convert(run: ConvertRun) -> int:
    """What was read, made and dropped, and what was written."""
    from vitrail.jobs.convert import convert as job

    with show.messages():
        found = job(run)
    print("\n".join(found.lines()))
    return 0


def data_check(run: DataCheckRun) -> int:
    """What a data set holds, and what is wrong with it; 1 when there is something to fix."""
    from vitrail.jobs.data_check import data_check as job

    with show.messages() as handler, show.Counter("pictures", handler) as counter:
        found = job(run, counter)
    if run.format == "json":
        print(show.json_text(found.to_dict()))
        return 1 if found.problems else 0
    splits = list(found.pictures)
    if found.counted != "pictures":
        show.say(", ".join(f"{split}: {count} pictures" for split, count in found.pictures.items()))
    rows = [[name, *(str(held.get(split, 0)) for split in splits)] for name, held in found.classes.items()]
    total = ["all", *(str(sum(held.get(split, 0) for held in found.classes.values())) for split in splits)]
    first = "class" if found.counted == "pictures" else f"class ({found.counted})"
    show.table([first, *splits], [*rows[:MOST_CLASSES], total], right=splits)
    if len(rows) > MOST_CLASSES:
        show.say(f"and {len(rows) - MOST_CLASSES} more classes; the report lists them all")
    for side, name in enumerate(("height", "width") if found.sizes else ()):
        low, middle, high = (sizes[side] for sizes in found.sizes.values())
        show.say(f"{name}: {low} to {high} pixels, middle {middle}")
    for note in found.notes:
        show.say(note)
    for sentence in found.problems:
        print(sentence)
    for broken in found.unreadable[:MOST_CLASSES]:
        print(f"  {broken['reason']}")
    if not found.problems:
        print("Nothing is wrong with this data set.")
    for path in found.files:
        show.say(f"written: {path}")
    return 1 if found.problems else 0


def demo(run: DemoRun) -> int:
    """The verbs one after the other, each with the line that a person would type."""
    import os

    # Read when torch starts. In a network this small, threads mostly wait for each other; on a busy machine they
    # made a run of two minutes one of an hour.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vitrail.jobs.demo import demo as job

    todo = {"TrainRun": train, "EvaluateRun": evaluate, "PredictRun": predict, "TraceRun": trace}
    for step in job(run):
        show.say(f"\n$ {step.line}")
        do: Any = todo[type(step.record).__name__]
        code = int(do(step.record))
        if code:
            return code
    show.say(
        f"\nEverything is in {run.output}: look at trace/trace.png, trace/trace.html, evaluation/ and run/."
    )
    return 0


def models(run: ModelsRun) -> int:
    """The list of networks."""
    from vitrail.jobs.models import RULE, shipped
    from vitrail.jobs.models import models as job

    rows = job(run)
    if run.format == "json":
        print(show.json_text([row._asdict() for row in rows]))
        return 0
    show.table(
        ["model", "family", "parameters", "GFLOPs", "input"],
        [
            [row.name, row.family, f"{row.parameters:,}", f"{row.gflops:.2f}", _size(row.input_size)]
            for row in rows
        ],
        right=["parameters", "GFLOPs", "input"],
    )
    show.say(f"{len(rows)} model{'s' * (len(rows) != 1)}. {RULE}.")
    for name, card in shipped(run):
        scores = ", ".join(f"{score} {value:.4f}" for score, value in card.scores.items() if score != "loss")
        show.say(f"with weights: {name}, {len(card.labels or ())} classes, {card.data}: {scores}")
    return 0


def info(run: InfoRun) -> int:
    """A card."""
    from vitrail.jobs.info import info as job

    with show.messages():
        found = job(run)
    if run.format == "json":
        print(show.json_text(found.to_dict()))
    else:
        show.table(["", found.model], _card_rows(found))
    return 0


def _card_rows(found: Info) -> list[list[str]]:
    """What a card says, line by line; what nobody knows is left out."""
    rows: list[tuple[str, str]] = [("what", found.what), ("family", found.family)]
    if found.cost is not None:
        rows += [("parameters", f"{found.cost.parameters:,}"), ("GFLOPs", f"{found.cost.gflops:.3g}")]
    rows += [("classes", str(found.config.get("num_classes", "")))]
    if found.card is not None:
        card, wanted = found.card, found.card.preprocessing
        labels = card.labels or ()
        rows += [
            ("labels", ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")),
            ("input", f"{wanted.in_chans} × {_size(wanted.input_size)}"),
            ("resizing", f"{wanted.interpolation}, {wanted.crop_mode}, keeps {wanted.crop_pct:.4g}"),
            ("mean", " ".join(f"{value:.4g}" for value in wanted.mean)),
            ("std", " ".join(f"{value:.4g}" for value in wanted.std)),
            *((name, f"{value:.4f}") for name, value in card.scores.items()),
            ("data", card.data),
            ("source", card.source),
            ("licence", card.licence),
            ("notes", card.notes),
        ]
    if found.tensors:
        rows += [
            ("layout", found.layout),
            ("fits", "" if found.fit is None else f"{found.fit:.1%} of the network's tensors"),
            ("also fits", ", ".join(found.also) + " (the file cannot say which it is)" if found.also else ""),
            ("tensors", f"{found.tensors} ({found.bytes / 1e6:.1f} MB)"),
            ("sha256", found.sha256),
        ]
    rows += [("config", ", ".join(f"{name}={_plain(value)}" for name, value in found.config.items()))]
    return [[name, value] for name, value in rows if value]


def doctor(run: DoctorRun) -> int:
    """The findings; 1 when something is broken."""
    from vitrail.jobs.doctor import doctor as job

    findings = job(run)
    if run.format == "json":
        print(show.json_text([finding._asdict() for finding in findings]))
    else:
        show.table(
            ["", "status", "", "cure"],
            [[finding.name, finding.status, finding.value, finding.cure] for finding in findings],
        )
    broken = [finding.name for finding in findings if finding.status == "broken"]
    show.say(f"broken: {', '.join(broken)}" if broken else "Nothing is broken.")
    return 1 if broken else 0


def bench(run: BenchRun) -> int:
    """Speeds of a network, and of its peers beside it."""
    import dataclasses

    from vitrail.jobs.bench import bench as job
    from vitrail.jobs.models import RULE

    with show.messages() as handler, show.Counter("rounds", handler) as counter:
        found = job(run, counter)
    if run.format == "json":
        gflops = {"parameters": found.cost.parameters, "gflops": found.cost.gflops}
        speeds = [speed._asdict() for speed in found.speeds]
        print(show.json_text({**dataclasses.asdict(found), "cost": gflops, "speeds": speeds}))
        return 0
    columns, rows, right = bench_rows(found)
    show.table(columns, rows, right)
    show.say(
        f"{found.model}, {_size(found.img_size)}, batch {found.batch_size}, {found.precision}, {found.device},"
        f" {found.threads} threads, {found.repeats} rounds in turns; {found.cost.parameters:,} parameters,"
        f" {found.cost.gflops:.3g} GFLOPs. {RULE}."
    )
    return 0


def bench_rows(found: Benchmark) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and the columns that are numbers, for a table of speeds."""
    ours = {speed.mode: speed.best for speed in found.speeds if speed.contender == "vitrail"}
    rows = [
        [
            speed.contender,
            speed.mode,
            f"{speed.best:.2f}",
            f"{speed.median:.2f}",
            "" if speed.contender == "vitrail" else f"{ours[speed.mode] / speed.best:.2f} ×",
            f"{speed.memory / 1e6:,.0f}",
        ]
        for speed in found.speeds
    ]
    numbers = ["images/s, best", "median", "vitrail is", "memory, MB"]
    return ["network of", "mode", *numbers], rows, numbers


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _plain(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def compare(run: CompareRun) -> int:
    """Accuracy at equal budget and cost against size, as tables and a report."""
    from vitrail.cli.training import TrainingView
    from vitrail.jobs.compare import compare as job
    from vitrail.jobs.compare_report import COST_COLUMNS, accuracy_columns, accuracy_rows, cost_rows

    with show.messages(without="vitrail.jobs.train") as handler, TrainingView(handler) as view:
        found = job(run, view)
    if found.cells:
        columns = accuracy_columns(list(found.cells))
        show.table(columns, accuracy_rows(list(found.cells)), right=columns[1:])
    if found.prices:
        show.table(COST_COLUMNS, cost_rows(list(found.prices)), right=COST_COLUMNS[1:])
    show.say(f"report: {found.report}")
    return 0
