"""The plan for boxes and masks, where its user left the choice. The numbers behind it are in docs/log.md."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vitrail.data.dense import Kind
from vitrail.errors import ConfigError
from vitrail.jobs.dense_data import DEFAULTS
from vitrail.jobs.plan import Choice, Facts, ema_decay, passes
from vitrail.runs import TrainRun


def check(run: TrainRun) -> None:
    """Raises ConfigError for what has a meaning for classes of whole pictures only."""
    asked = {
        "mixup": bool(run.mixup),
        "cutmix": bool(run.cutmix),
        "reprob": bool(run.reprob),
        "smoothing": bool(run.smoothing),
        "aa": run.aa not in (None, "none"),
        "crop": run.crop == "pad",
        "loss": run.loss != "ce",
        "teacher": run.teacher is not None,
    }
    wrong = [name for name, is_asked in asked.items() if is_asked]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: made for classes of whole pictures; with boxes and masks use crop (resized, none),"
            " scale, hflip and color_jitter."
        )


def _network(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    if facts.pretrained is not None:
        yield Choice(fields={"model": facts.pretrained}, reason="the network of the given weights")
    if facts.pretrained is not None and facts.size is not None:
        yield Choice(fields={"img_size": facts.size}, reason="the size that the weights were trained at")
    kind: Kind = "boxes" if facts.task == "object-detection" else "masks"
    if run.pretrained is None:
        yield Choice(fields={"model": DEFAULTS[kind]}, reason=f"a small network for {kind}")


def _length(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    given = run.pretrained is not None or run.backbone is not None
    epochs = 100 if facts.images < 2_000 else 50 if facts.images < 20_000 else 24
    why = "few pictures are looked at often"
    yield Choice(fields={"epochs": epochs // 2 if given else epochs}, reason=why)
    batch = min(8 if facts.device == "cpu" else 16, max(1, facts.images // 2))
    yield Choice(fields={"batch_size": batch}, reason=f"about {facts.images // batch:,} steps an epoch")


def _optimiser(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    base = 1e-4 if run.pretrained is not None else 5e-4
    size = (run.batch_size or 1) * run.grad_accum_steps
    rate = float(f"{base * math.sqrt(size / 8):.2g}")
    yield Choice(fields={"opt": "adamw"}, reason="as the papers do it")
    yield Choice(fields={"lr": rate}, reason=f"{base:g} at 8 images a step, times a root")
    given = run.pretrained is not None or run.backbone is not None
    yield Choice(
        fields={"layer_decay": 0.85 if given else 1.0},
        reason="given weights are changed gently" if given else "",
    )
    yield Choice(fields={"weight_decay": 0.05, "sched": "cosine", "min_lr": 0.0, "clip_grad": 1.0})
    yield Choice(fields={"momentum": 0.9, "betas": (0.9, 0.999)})
    warmup = min(5.0, float(f"{passes(run, facts) / 20:.2g}"))
    yield Choice(fields={"warmup_epochs": warmup}, reason="a twentieth of the run, 5 at most")


def _regularisation(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    yield Choice(fields={"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "aa": "none"})
    yield Choice(fields={"model_ema": ema_decay(run, facts, 4)}, reason="weights averaged over a few epochs")


def _augmentation(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    yield Choice(fields={"crop": "resized"}, reason="large-scale jitter: nearer, farther, elsewhere")
    yield Choice(fields={"scale": (0.5, 2.0)}, reason="half to twice the size")
    yield Choice(fields={"hflip": 0.5, "color_jitter": 0.2}, reason="most things are seen from both sides")


OFFERS = [_network, _length, _optimiser, _regularisation, _augmentation]
"""In the order in which later ones may ask what earlier ones chose."""
