"""The training job: from a run record to a run folder with a model in it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail import config as records
from vitrail.data.mix import Mix
from vitrail.data.sources import Source
from vitrail.data.transforms import normalise
from vitrail.disk import write_atomically
from vitrail.engines.pytorch import in_float32
from vitrail.errors import ConfigError, TrainingError
from vitrail.evaluate import evaluate
from vitrail.jobs import plan as plans
from vitrail.jobs import training_checkpoints as checkpoints
from vitrail.jobs import training_data as pictures
from vitrail.jobs import training_parts as parts
from vitrail.jobs.dense_data import rows, why_nothing
from vitrail.jobs.training_checkpoints import Checkpointer
from vitrail.nn.joint_norm import join_batch_norms
from vitrail.runs import TrainRun
from vitrail.runtime import Runtime, open_runtime
from vitrail.tasks.registry import facts_of, make_task
from vitrail.train import loop, state
from vitrail.train.average import Average
from vitrail.train.features import FeatureBatches, compute_features
from vitrail.train.log import Log, Note, Record, Reporter, Scores, Stopped, draw_curves, read_log
from vitrail.train.optim import Hyperparameters, build_optimiser
from vitrail.train.pace import Pace
from vitrail.train.schedule import Schedule
from vitrail.train.state import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    folder: Path
    model: Path
    """The model folder, for every other verb."""
    scores: Mapping[str, Mapping[str, float]]
    """Scores of the saved model by split (val, test), shares in 0..1."""
    step: int
    """The step whose weights were saved."""
    seconds: float
    """Time spent training, over all sittings, without start-up."""
    reason: str
    """done, interrupted, or patience."""


def train(run: TrainRun, reporter: Reporter | None = None) -> TrainResult:
    """Trains as a record says, and goes on where its run folder stands.

    Open fields of the record are chosen by `vitrail.jobs.plan`, and said through the reporter. Raises UserError
    for what the caller can fix, TrainingError when the run cannot go on; its last checkpoint is then whole.
    """
    run = plans.with_recipe(run)
    _check(run)
    strict = torch.are_deterministic_algorithms_enabled()
    runtime = open_runtime(run.device, run.precision, run.shard, run.deterministic)
    try:
        with torch.random.fork_rng(devices=[]):
            return _Job(run, runtime, reporter).go()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "The accelerator's memory is full. Halve --batch-size and double --grad-accum-steps (the result"
            f" stays the same), or add --grad-checkpointing. ({str(error).splitlines()[0]})"
        ) from error
    finally:
        torch.use_deterministic_algorithms(strict)
        runtime.close()


class _Job:
    """One sitting of a run."""

    def __init__(self, run: TrainRun, runtime: Runtime, reporter: Reporter | None) -> None:
        self.runtime, self.reporter = runtime, reporter
        self.log: Log | None = None
        self.said: list[str] = []
        self.told: list[Source] = []
        """Pictures to score of which it was said that some cannot be read."""
        self.data = pictures.open_data(run, self.say)
        self.folder = Path(run.output or _default_folder(run))
        self.found = checkpoints.find_checkpoint(run, self.folder, runtime)
        if self.found is not None:
            run = checkpoints.continued(run, self.found, self.data.fingerprint, self.say)
        facts = parts.gather_facts(run, self.data, runtime)
        self.run, choices = plans.choose(run, facts)
        for choice in choices:
            self.say(Note(text=str(choice), kind="choice"))
        for text in _idle(self.run, self.data):
            self.say(Note(text=text, kind="warning"))
        self.data = pictures.decode_once(self.data, self.say)
        self.facts = facts_of(self.data.task)

    def go(self) -> TrainResult:
        run, runtime = self.run, self.runtime
        self.model = parts.build_model(run, self.data, self.say)
        if runtime.world > 1:
            join_batch_norms(self.model, runtime.add_up)
        self.task = make_task(
            self.data.task,
            self.data.classes,
            smoothing=run.smoothing or 0.0,
            loss=run.loss,
            auxiliary=getattr(self.model.config, "auxiliary_weight", 0.4),
            weights=parts.class_weights(run, self.data),
            mean=lambda value: runtime.sum_tensor(value) / runtime.world,
        )
        if self.data.val is not None or self.data.test is not None:
            self.task.metrics()  # a scorer that is not installed must not stop a run at its end
        frozen = parts.freeze(self.model, run)
        self.preprocessing = self.model.card.preprocessing
        blocks = [block for stage in self.model.backbone.stages for block in stage.blocks]
        network = runtime.prepare(self.model, blocks=blocks, compile=run.compile)
        batches = self._batches()
        cached = isinstance(batches, FeatureBatches)
        self.pace = self._pace(len(batches))
        settings = Hyperparameters(
            kind=run.opt or "adamw",
            lr=cast(float, run.lr),
            weight_decay=cast(float, run.weight_decay),
            momentum=cast(float, run.momentum),
            betas=cast(tuple[float, float], run.betas),
            layer_decay=cast(float, run.layer_decay),
            backbone_lr=run.backbone_lr,
        )
        self.optimiser = build_optimiser(cast(Any, self.model), settings, runtime)
        self.average = Average(self.model, run.model_ema) if run.model_ema else None
        self.checkpointer = Checkpointer(
            folder=self.folder,
            run=run,
            runtime=runtime,
            model=self.model,
            optimiser=self.optimiser,
            average=self.average,
            pace=self.pace,
            fingerprint=self.data.fingerprint,
            validation_fingerprint=self.data.val.fingerprint() if self.data.val is not None else None,
            say=self.say,
            classes=self.data.classes,
        )
        self.place = Place() if self.found is None else self.checkpointer.restore(self.found)
        training = loop.Training(
            network=self.model.get_classifier() if cached else network,
            runtime=runtime,
            batches=cast(Any, batches),
            inputs=self._inputs if not cached else lambda images: images.to(runtime.device),
            objective=parts.objective(run, self.task, self.model, runtime),
            optimiser=self.optimiser,
            schedule=self._schedule(),
            pace=self.pace,
            place=self.place,
            average=self.average,
            mix=self._mix(),
            mix_until=round((1 - run.mix_off) * self.pace.steps) if run.mix_off else None,
            before_step=self._set_patch_drop if run.patch_drop else None,
            frozen=frozen,
            evaluate=self._evaluate if self.data.val is not None else None,
            save=self.checkpointer.save,
            keep_best=self.checkpointer.save_best,
            score=self.facts.score,
        )
        self.say(Note(text=self._summary()))
        reason = "done"
        with self._logging():
            with runtime.watch("training"):
                for record in loop.train(training):
                    self.report(record)
                    reason = record.reason if isinstance(record, Stopped) else reason
            skipped = getattr(batches, "skipped", {})
            if skipped:
                text = f"{len(skipped)} pictures could not be read and were left out; train.log lists them."
                self.say(Note(text=text, kind="warning"))
            return self._finish(reason)

    # Pieces of the run

    def _batches(self) -> Any:
        """Training batches: images, or their features where nothing about them changes."""
        run, source, runtime = self.run, self.data.train, self.runtime
        size = pictures.batch_size(run, len(source), runtime.world)
        still = pictures.leaves_pictures_alone(run)
        if run.freeze == "backbone" and still and runtime.world == 1 and parts.has_one_layer(self.model):
            self.say(Note(text=f"The features of {len(source):,} images are computed once."))
            ordered = pictures.batches_in_order(
                run, source, self.preprocessing, runtime, max_bad_share=run.max_bad_share
            )
            last = self.model.get_classifier()
            features = compute_features(self.model, last, rows(ordered), self._inputs, runtime)
            return FeatureBatches(*features, batch_size=size, seed=run.seed)
        return pictures.training_batches(run, source, self.preprocessing, runtime)

    def _set_patch_drop(self, step: int) -> None:
        whole = step >= (1.0 - self.run.patch_drop_off) * self.pace.steps
        self.model.set_patch_drop(0.0 if whole else self.run.patch_drop)

    def _pace(self, batches: int) -> Pace:
        run = self.run
        per_epoch = batches // run.grad_accum_steps
        total = run.steps or max(1, round(cast(int, run.epochs) * per_epoch))
        return Pace(
            steps=total,
            steps_per_epoch=per_epoch,
            accumulate=run.grad_accum_steps,
            clip=cast(float, run.clip_grad),
            log_every=max(1, min(50, per_epoch // 10)),
            evaluate_every=max(1, round(run.eval_every * per_epoch)) if run.eval_every else 0,
            save_every=max(1, round(run.save_every * per_epoch)) if run.save_every else 0,
            patience=run.patience or 0,
            seed=run.seed,
        )

    def _schedule(self) -> Schedule:
        run = self.run
        warmup = round(cast(float, run.warmup_epochs) * self.pace.steps_per_epoch)
        return Schedule(
            course=run.sched or "cosine",
            steps=self.pace.steps,
            warmup=min(warmup, self.pace.steps),
            floor=cast(float, run.min_lr) / cast(float, run.lr),
            cooldown=self.pace.steps // 10,
        )

    def _mix(self) -> Any:
        run = self.run
        if not run.mixup and not run.cutmix:
            return None
        return Mix(
            mixup=run.mixup or 0.0,
            cutmix=run.cutmix or 0.0,
            num_classes=len(self.data.classes),
            smoothing=run.smoothing or 0.0,
        )

    def _inputs(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        there = images.to(self.runtime.device, non_blocking=True)
        if there.device.type in ("cpu", "cuda"):  # convolutions are quicker so, and the others as before
            there = there.contiguous(memory_format=torch.channels_last)
        return normalise(there, self.preprocessing, padding=padding)

    def _evaluate(self) -> tuple[Mapping[str, float], str]:
        assert self.data.val is not None
        applied = self.average.applied() if self.average is not None else contextlib.nullcontext()
        # A sharded network computes in step, so every process goes through all pictures.
        with applied:
            scores = self._score(self.model, self.data.val, shared=not self.runtime.shard)
        return scores, "raw" if self.average is None else "average"

    def _score(self, model: nn.Module, source: Source, shared: bool = False) -> dict[str, float]:
        """The task's metrics of a model over a source, computed as `vitrail evaluate` does."""
        model.eval()

        def forward(images: Tensor, *padding: Tensor) -> Any:
            there = [where.to(self.runtime.device) for where in padding]
            # as an engine does it: with channels last, or with answers in bf16, the last digits are others
            pixels = normalise(images.to(self.runtime.device), self.preprocessing, padding=(*there, None)[0])
            with self.runtime.autocast():
                return in_float32(model(pixels, *there))

        loader = pictures.batches_in_order(self.run, source, self.preprocessing, self.runtime, shared)
        total = self.runtime.sum_tensor if shared else None
        metrics = self.task.metrics()
        scores = dict(evaluate(forward, rows(loader), metrics, total=total))
        if loader.skipped and source not in self.told:
            self.told.append(source)
            text = f"{len(loader.skipped)} of {len(source)} pictures could not be read and are not scored; the first: "
            self.say(Note(text=text + next(iter(loader.skipped.values())), kind="warning"))
        if nothing := why_nothing(metrics, scores):
            self.say(Note(text=nothing, kind="warning"))
        return scores

    # The end

    def _finish(self, reason: str) -> TrainResult:
        """Writes the model folder and the curves, and scores what was written."""
        best = self.checkpointer.checkpoints / f"best-{self.place.best_step or 0:08d}"
        step = self.place.step
        weights = self.runtime.gather(self.checkpointer.scored())
        scores: dict[str, dict[str, float]] = {}
        if self.runtime.main:
            if self.place.best_step is not None:
                weights, step = state.read(best).tensors["model"], self.place.best_step
            final = parts.fresh_copy(self.model, weights).to(self.runtime.device)
            splits = {"val": self.data.val, "test": self.data.test if reason != "interrupted" else None}
            for split, source in splits.items():
                if source is not None:
                    scores[split] = self._score(final, source)
                    self._tell(Scores(step=step, epoch=step / self.pace.steps_per_epoch, scores=scores[split],
                                      best=True, split=split, weights="saved"))  # fmt: skip
            self._write_model(final.cpu(), scores, step)
            title = f"{self.folder.name}: {self.model.name}"
            score = (self.facts.score, self.facts.score_words)
            draw_curves(read_log(self.folder / "metrics.jsonl"), self.folder / "curves.png", title, score)
        self.runtime.barrier()
        return TrainResult(
            folder=self.folder,
            model=self.folder / "model",
            scores=scores,
            step=step,
            seconds=self.place.seconds,
            reason=reason,
        )

    def _write_model(self, final: Any, scores: Mapping[str, Mapping[str, float]], step: int) -> None:
        final.card = dataclasses.replace(
            final.card,
            scores={
                f"{split}_{name}": found[name]
                for split, found in scores.items()
                for name in self.facts.shown
                if math.isfinite(found[name])
            },
            recipe={
                name: value for name, value in records.to_dict(self.run).items() if value not in (None, [])
            },
            notes=f"Weights of step {step} of {self.pace.steps}, chosen by validation."
            if self.place.best_step is not None
            else "",
        )
        final.save_pretrained(self.folder / "model")

    # What is said

    def say(self, note: Note) -> None:
        """Tells the reader something."""
        self._tell(note)

    def report(self, record: Record) -> None:
        """Keeps a record and shows it."""
        if self.log is not None:
            self.log.write(record)
        self._tell(record)

    def _tell(self, record: Record) -> None:
        if not self.runtime.main:
            return
        if isinstance(record, Note) and self.log is None:
            self.said.append(record.text)
        elif isinstance(record, Note | Scores | Stopped):
            logger.info("%s", record.text if isinstance(record, Note) else record)
        if self.reporter is not None:
            self.reporter(record)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Inside, records and log lines go to the run folder."""
        if not self.runtime.main:
            yield
            return
        with state.claim(self.folder):
            yield from self._writing()

    def _writing(self) -> Iterator[None]:
        write_atomically(self.folder / "config.toml", records.toml_text(_without_open(self.run)).encode())
        lines = logging.FileHandler(self.folder / "train.log", encoding="utf-8")
        lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        ours = logging.getLogger("vitrail")
        level = ours.level
        ours.addHandler(lines)
        ours.setLevel(min(level, logging.INFO) if level else logging.INFO)
        for text in self.said:
            lines.emit(ours.makeRecord(ours.name, logging.INFO, "", 0, text, (), None))
        self.log = Log(self.folder, self.place.step)
        try:
            yield
        finally:
            self.log.close()
            ours.removeHandler(lines)
            ours.setLevel(level)
            lines.close()

    def _summary(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        share = "" if trained == count else f" ({trained:,} trained)"
        processes = "" if self.runtime.world == 1 else f" x {self.runtime.world} processes"
        rows, columns = self.preprocessing.input_size
        return (
            f"{self.model.name} at {rows}x{columns}, {count:,} parameters{share}; {len(self.data.train):,} images of"
            f" {len(self.data.classes)} classes; {self.pace.steps:,} steps on {self.runtime.device}"
            f" in {self.runtime.precision}{processes}; into {self.folder}"
        )


def _check(run: TrainRun) -> None:
    """Raises ConfigError for numbers that no part of the run would notice before it is too late."""
    least = {
        "epochs": 1, "steps": 1, "batch_size": 1, "grad_accum_steps": 1, "aug_repeats": 1, "keep": 1, "seed": 0,
        "workers": 0, "warmup_epochs": 0, "min_lr": 0, "clip_grad": 0, "eval_every": 0, "save_every": 0, "patience": 0,
        "balance": 0,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(run, name)
        if value is not None and not bound <= value < float("inf"):
            raise ConfigError(f"{name} must be {bound} or more; got {value}.")
    for name in ("mix_off", "patch_drop_off"):
        if not 0.0 <= getattr(run, name) <= 1.0:
            raise ConfigError(f"{name} is a share of the run, 0..1; got {getattr(run, name)}.")
    if not 0.0 <= run.patch_drop < 1.0:
        raise ConfigError(f"patch_drop is a share of the patches, from 0 to below 1; got {run.patch_drop}.")


def _idle(run: TrainRun, data: pictures.Data) -> Iterator[str]:
    """A sentence for each field that was set, and does nothing in this run."""
    usual = TrainRun(data=run.data)
    without = {
        "distill": ("a teacher", run.teacher),
        "distill_weight": ("a teacher", run.teacher),
        "distill_temperature": ("a teacher and soft distillation", run.teacher and run.distill == "soft"),
        "mix_off": ("mixup or cutmix", run.mixup or run.cutmix),
        "patch_drop_off": ("patch_drop", run.patch_drop),
        "patience": ("validation", data.val is not None and run.eval_every),
    }
    for name, (need, there) in without.items():
        if not there and getattr(run, name) != getattr(usual, name):
            yield f"{name} does nothing without {need}."
    if run.val_share != usual.val_share and data.val_given:
        yield "val_share does nothing: the data has validation pictures."


def _default_folder(run: TrainRun) -> str:
    data = Path(run.data[0]).name.partition(".")[0] or Path(run.data[0]).resolve().name
    return f"runs/{data}-{run.model or 'vit'}"


def _without_open(run: TrainRun) -> dict[str, Any]:
    return {name: value for name, value in records.to_dict(run).items() if value is not None}
