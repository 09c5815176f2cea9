"""`vitrail compare`: families side by side on one's own data at equal budget, and what their size costs.

Accuracy: every model is trained by the training job from the same record, for the same epochs or the same
minutes, on the same shares of the training pictures; a share's pictures are the same for every model.
Cost: one picture through every network at growing sizes; time, memory and multiply-adds, and the exponent in
the number of tokens between neighbouring sizes: log(cost ratio) / log(token ratio).

Every finished cell is a line of `cells.jsonl`, so a comparison that was stopped goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.config import from_dict, to_dict
from vitrail.data.dense import kinds_of
from vitrail.disk import write_atomically
from vitrail.errors import ConfigError
from vitrail.jobs.bench import bench
from vitrail.jobs.compare_cells import EPOCHS, Cell, Price
from vitrail.jobs.compare_report import write_report
from vitrail.jobs.dense_data import task_of
from vitrail.jobs.models import count
from vitrail.jobs.train import TrainResult, train
from vitrail.models import registry
from vitrail.runs import BenchRun, CompareRun, TrainRun
from vitrail.runtime import choose_device
from vitrail.tasks.registry import facts_of
from vitrail.train.log import Note, Reporter
from vitrail.weights import folder as folders

SMALL = (
    "vit_nano_patch4_32",
    "deit_nano_patch4_32",
    "cait_nano_patch4_32",
    "t2t_nano_32",
    "pvt_v2_nano_32",
    "swin_nano_patch2_32",
    "pit_nano_32",
    "performer_nano_patch4_32",
    "resnet20_32",
    "se_resnet20_32",
    "nonlocal_resnet20_32",
)
"""Our small variant of each family, for pictures of 32 pixels."""

DENSE = {
    "boxes": ("detr_nano", "quick_detr_nano", "fcos_nano"),
    "masks": ("setr_naive_nano", "setr_pup_nano", "setr_mla_nano", "trans2seg_nano", "fpn_pvt_v2_nano"),
}
"""The same for boxes and masks, by the kind of the data."""

SIZED = (
    "vit_tiny_patch16_224",
    "pvt_tiny",
    "pvt_v2_b0",
    "pvt_v2_b2_li",
    "swin_tiny_patch4_window7_224",
    "performer_tiny_patch16_224",
)
"""Networks whose cost grows in different ways with the picture."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was measured, and where the report lies."""

    folder: Path
    cells: tuple[Cell, ...]
    prices: tuple[Price, ...]
    report: Path


def compare(run: CompareRun, reporter: Reporter | None = None) -> Comparison:
    """Train and measure what is not done yet, then draw the report.

    Raises ConfigError when both epochs and minutes are given or a share lies outside (0, 1], ModelError on
    unknown names before anything is trained.
    """
    check(run)
    run = dataclasses.replace(run, batch_size=batch_of(run), device=str(choose_device(run.device)))
    folder = Path(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    if run.part != "cost":
        claim(run, folder)

    def say(text: str) -> None:
        if reporter is not None:
            reporter(Note(text=text))

    cells = list(_cells(run, folder, say, reporter)) if run.part != "cost" else []
    prices = list(_prices(run, folder, say)) if run.part != "accuracy" else []
    report = write_report(folder, cells, prices, run)
    return Comparison(folder=folder, cells=tuple(cells), prices=tuple(prices), report=report)


def check(run: CompareRun) -> None:
    """Refuse what cannot be compared, before any work."""
    if run.epochs is not None and run.minutes is not None:
        raise ConfigError("Equal budget means the same --epochs or the same --minutes: give one of the two.")
    if run.part != "cost" and not run.data:
        raise ConfigError("Accuracy needs data: name a folder or archive, or ask for --part cost alone.")
    for share in run.shares:
        if not 0 < share <= 1:
            raise ConfigError(f"A share of the training pictures lies above 0 and at most at 1; got {share}.")
    if run.seeds < 1:
        raise ConfigError(f"seeds must be at least 1; got {run.seeds}.")
    if sorted(set(run.sizes)) != list(run.sizes):
        raise ConfigError(f"sizes must grow, each once; got {' '.join(map(str, run.sizes))}.")
    for name in (*models_of(run), *sized_of(run)):
        registry.variant(name)
    tasks = {task_of(name, None): name for name in models_of(run)}
    if run.part != "cost" and len(tasks) > 1:
        told = " and ".join(f"{name} {facts_of(str(task)).words}" for task, name in tasks.items())
        raise ConfigError(f"One comparison is about one task: {told}. Compare them one task at a time.")


EQUAL = (
    "data", "val", "classes", "ignore", "reduce_zero", "epochs", "minutes", "batch_size", "img_size", "opt", "lr",
    "device",
)  # fmt: skip
"""What must be equal for trainings to stand in one table."""


def claim(run: CompareRun, folder: Path) -> None:
    """Notes what the folder's trainings have in common. Raises ConfigError where those that lie there differ in it."""
    told = {name: value for name, value in to_dict(run).items() if name in EQUAL}
    file = folder / "budget.json"
    if not file.is_file():
        write_atomically(file, json.dumps(told, indent=2).encode())
        return
    kept = json.loads(file.read_text(encoding="utf-8"))
    other = [
        f"{name} {_words(kept.get(name))} (now {_words(told[name])})"
        for name in EQUAL
        if kept.get(name) != told[name]
    ]
    if other:
        raise ConfigError(
            f"{folder} holds a comparison with {', '.join(other)}, and one table needs equal trainings: give another"
            " --output, or remove the folder."
        )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) or "left out" if isinstance(value, list) else str(value)


def models_of(run: CompareRun) -> tuple[str, ...]:
    """The models that are trained: those asked for, else our small one of every family for such data."""
    if run.models:
        return run.models
    kind = kinds_of(run.data)[0] if run.data else "classes"
    return tuple(name for name in DENSE.get(kind, SMALL) if registry.is_model(name))


def sized_of(run: CompareRun) -> tuple[str, ...]:
    """The networks whose cost is measured: those asked for, of boxes and masks those that are trained, else SIZED."""
    if run.cost_models:
        return run.cost_models
    return models_of(run) if is_dense(run) else SIZED


def is_dense(run: CompareRun) -> bool:
    """Whether boxes or masks are compared."""
    return any(task_of(name, None) != "image-classification" for name in models_of(run))


def batch_of(run: CompareRun) -> int:
    """Images in one step: as asked, else 128, and 8 of boxes and masks."""
    if run.batch_size is not None:
        return run.batch_size
    return 8 if is_dense(run) else 128


def _cells(
    run: CompareRun, folder: Path, say: Callable[[str], None], reporter: Reporter | None
) -> Iterator[Cell]:
    """Every training of the comparison, from the file where it is done."""
    kept = {cell.key: cell for cell in _read(folder / "cells.jsonl", Cell)}
    jobs = [
        (name, share, seed)
        for share in sorted(run.shares)
        for seed in range(run.seeds)
        for name in models_of(run)
    ]
    for number, key in enumerate(jobs, 1):
        if key not in kept:
            name, share, seed = key
            say(f"{number} of {len(jobs)}: {name}, {share:.0%} of the training pictures, seed {seed}")
            kept[key] = _train(run, folder, name, share, seed, reporter)
            _append(folder / "cells.jsonl", kept[key])
        yield kept[key]


def _train(
    run: CompareRun, folder: Path, name: str, share: float, seed: int, reporter: Reporter | None
) -> Cell:
    """One cell: the training job with everything equal but the model."""
    record = TrainRun(
        data=run.data,
        val=run.val,
        model=name,
        train_share=share,
        seed=seed,
        epochs=(run.epochs or EPOCHS) if run.minutes is None else None,
        batch_size=batch_of(run),
        classes=run.classes,
        ignore=run.ignore,
        reduce_zero=run.reduce_zero,
        img_size=run.img_size,
        opt=run.opt,
        lr=run.lr,
        eval_every=0.0,
        workers=run.workers,
        device=run.device,
        output=str(folder / "runs" / f"{name}-{share:g}-{seed}"),
    )
    if run.minutes is not None:
        speed = _speed(run, name)
        record = dataclasses.replace(record, steps=max(1, round(run.minutes * 60 * speed / batch_of(run))))
    result = train(record, reporter)
    if result.reason == "interrupted":
        raise KeyboardInterrupt  # it goes on from its checkpoint when the comparison does
    split = "test" if "test" in result.scores else "val"
    if split not in result.scores:
        raise ConfigError(
            "A comparison needs pictures to score on: give --val, or data with a val or test split."
        )
    cost = count(name, _built(name, result))
    score = facts_of(task_of(name, None) or "image-classification").score
    return Cell(
        model=name,
        share=share,
        seed=seed,
        acc1=result.scores[split][score],
        score=score,
        split=split,
        steps=result.step,
        seconds=result.seconds,
        images_per_second=result.step * batch_of(run) / max(result.seconds, 1e-9),
        parameters=cost.parameters,
        multiply_adds=cost.multiply_adds,
    )


def _built(name: str, result: TrainResult) -> Any:
    """The configuration that was trained: it has other classes than the variant, and perhaps another size."""
    card = folders.load(result.model)[1]
    return from_dict(registry.family_of(name).Config, card.config, where=f"{result.model}/config.json")


def _speed(run: CompareRun, name: str) -> float:
    """Images a second in training, measured, so that equal minutes can be planned as steps."""
    measured = bench(
        BenchRun(
            model=name,
            mode="train",
            batch_size=batch_of(run),
            img_size=run.img_size,
            repeats=3,
            device=run.device,
        )
    )
    return measured.speeds[0].median


def _prices(run: CompareRun, folder: Path, say: Callable[[str], None]) -> Iterator[Price]:
    """Every network at every size on the device, from the file where it is done."""
    measured = _read(folder / "prices.jsonl", Price)
    kept = {(price.model, price.size): price for price in measured if price.device == run.device}
    for name in sized_of(run):
        for size in run.sizes:
            if (name, size) not in kept:
                say(f"cost of {name} at {size} pixels")
                found = bench(
                    BenchRun(
                        model=name,
                        mode="inference",
                        batch_size=1,
                        img_size=(size,),
                        repeats=run.repeats,
                        device=run.device,
                        precision="fp32",
                    )
                )
                kept[name, size] = Price(
                    model=name,
                    size=size,
                    seconds=1 / found.speeds[0].best,
                    memory=found.speeds[0].memory,
                    multiply_adds=found.cost.multiply_adds,
                    device=found.device,
                )
                _append(folder / "prices.jsonl", kept[name, size])
            yield kept[name, size]


def _read(path: Path, kind: Any) -> Iterator[Any]:
    """The records of a file of JSON lines; a last line that was cut short is left out and done again."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        yield from_dict(kind, values, where=str(path))


def _append(path: Path, record: Any) -> None:
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # the last line was cut short by a stop
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(to_dict(record)) + "\n")
