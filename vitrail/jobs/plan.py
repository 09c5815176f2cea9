"""The plan: what a run does where its user left the choice, from the data, the weights and the machine.

A field that is None (or an empty tuple) is chosen here, and every choice comes with its reason; a field with
a value is never touched. The numbers behind the choices are in docs/log.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail import config as records
from vitrail.errors import ConfigError, suggestion
from vitrail.runs import TrainRun


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the plan knows of a run."""

    images: int
    """Training images."""
    classes: int
    side: int
    """Short side of a typical training picture, in pixels."""
    device: str
    """cpu, cuda or mps."""
    cores: int
    digits: bool = False
    """Whether the built-in digits are among the data: they must not be mirrored, nor mixed."""
    pretrained: str | None = None
    """Name of the given weights' network, where they tell it."""
    size: tuple[int, int] | None = None
    """Image size that the given weights were trained at."""
    task: str = "image-classification"
    """What the network is for, in the words of its card."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision of the plan. One without a reason changes nothing, and is not worth saying."""

    fields: dict[str, Any]
    reason: str = ""

    def __str__(self) -> str:
        chosen = ", ".join(f"{_flag(name)} {_shown(value)}" for name, value in self.fields.items())
        return f"{chosen}: {self.reason}"


def choose(run: TrainRun, facts: Facts) -> tuple[TrainRun, list[Choice]]:
    """The run with every open field filled in, and what was chosen and why."""
    made: list[Choice] = []
    if run.epochs is not None and run.steps is not None:
        raise ConfigError("Give epochs or steps, not both.")
    offers = [_network, _length, _optimiser, _regularisation, _augmentation, _loading]
    if facts.task != "image-classification":
        from vitrail.jobs import plan_dense

        plan_dense.check(run)
        offers = [*plan_dense.OFFERS, _loading]
    for offer in offers:
        for choice in offer(run, facts):
            fields = {name: value for name, value in choice.fields.items() if is_open(run, name)}
            if "epochs" in fields and run.steps is not None:
                del fields["epochs"]
            if fields:
                run = records.replace(run, **fields)
                if choice.reason:
                    made.append(dataclasses.replace(choice, fields=fields))
    return run, made


def is_open(run: TrainRun, name: str) -> bool:
    """Whether a field was left to the plan."""
    return getattr(run, name) in (None, ())


def with_recipe(run: TrainRun) -> TrainRun:
    """The run with the open fields that its recipe sets. (The command line lets a recipe set every field.)"""
    if run.recipe is None:
        return run
    values = records.read_toml(find_recipe(run.recipe))
    known = {field.name for field in dataclasses.fields(TrainRun)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{run.recipe}: {name} is no field of a run.{suggestion(name, known)}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainRun)}
    if run.steps is not None or run.epochs is not None:  # a run has one length, and its own goes first
        values = {name: value for name, value in values.items() if name not in ("steps", "epochs")}
    return records.replace(
        run, **{name: value for name, value in values.items() if getattr(run, name) == defaults[name]}
    )


def passes(run: TrainRun, facts: Facts) -> float:
    """How often the run sees every training image, whether its length is given in epochs or in steps.

    Asked once batch size and length are chosen.
    """
    return run.steps / steps_per_epoch(run, facts) if run.steps is not None else float(run.epochs or 1)


def steps_per_epoch(run: TrainRun, facts: Facts) -> float:
    """Optimiser steps in which every training image is seen once."""
    return facts.images / ((run.batch_size or 1) * run.grad_accum_steps)


def ema_decay(run: TrainRun, facts: Facts, epochs: int) -> float:
    """A decay of averaged weights whose memory is about so many epochs, and at most a twentieth of the run."""
    an_epoch = steps_per_epoch(run, facts)
    memory = max(10.0, min(epochs * an_epoch, passes(run, facts) * an_epoch / 20))
    return round(1 - 1 / memory, 4)


def find_recipe(name: str) -> Path:
    """The TOML file of a recipe: a path, or the name of one that comes with vitrail."""
    if Path(name).exists():
        return Path(name)
    home = Path(__file__).parents[1] / "recipes"
    folders = [home, home.parents[1] / "recipes"]  # in a wheel, and in a checkout
    shipped = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.toml"))
    }
    if name in shipped:
        return shipped[name]
    ours = ", ".join(found for found in shipped if "/" not in found)
    near = suggestion(name, shipped) or f" The recipes are: {ours}, and the papers' under papers/."
    raise ConfigError(f"There is no recipe {name}.{near}")


def _from_scratch(run: TrainRun) -> bool:
    return run.pretrained is None


def _network(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    if facts.pretrained is not None:
        yield Choice(fields={"model": facts.pretrained}, reason="the network of the given weights")
    if not _from_scratch(run):
        if facts.size is not None:
            yield Choice(fields={"img_size": facts.size}, reason="the size that the weights were trained at")
        return
    if run.model is not None:
        return
    side, patch = _size(facts)
    name, why = _small_vit(facts)
    yield Choice(fields={"model": name}, reason=why)
    yield Choice(fields={"img_size": (side,)}, reason=f"a picture's short side is about {facts.side}")
    # On pictures of 32 pixels pooling won by three points (docs/log.md); on larger ones it costs too much.
    fields = [f"patch_size={patch}", "stem=pool" if patch == 4 else "stem=conv"]
    if facts.side <= 16:
        fields += ["width=64", "depth=4", "hidden=128"]
    yield Choice(
        fields={"model_kwargs": tuple(fields)},
        reason=f"{(side // patch) ** 2} tokens a picture, made by convolutions, which learn sooner than one matrix",
    )


def _size(facts: Facts) -> tuple[int, int]:
    """Image side and patch: about 64 tokens on a CPU, up to 196 on an accelerator."""
    if facts.side <= 16:
        return max(4, 2 * math.ceil(facts.side / 2)), 2
    if facts.side <= 40:
        return 32, 4
    if facts.side <= 80:
        return 64, 8
    return (128, 16) if facts.device == "cpu" else (224, 16)


def _small_vit(facts: Facts) -> tuple[str, str]:
    """The network for pictures without given weights, and why."""
    if facts.device == "cpu":
        return "vit_nano_patch4_32", "a small plain ViT, which a CPU can train from nothing"
    if facts.images < 200_000:
        return "vit_tiny_patch4_32", f"a plain ViT as large as {facts.images:,} images can fill"
    return "vit_small_patch16_224", f"a plain ViT that {facts.images:,} images can fill"


def _length(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    if run.freeze == "backbone":
        # Eight steps an epoch at least: with a few hundred pictures, one a step would end before anything is learned.
        batch = min(256, max(1, facts.images // 8))
        yield Choice(fields={"epochs": 50, "batch_size": batch}, reason="only the last layer learns")
    elif not _from_scratch(run):
        epochs = 40 if facts.images < 2_000 else 20 if facts.images < 20_000 else 8
        yield Choice(fields={"epochs": epochs}, reason=f"given weights need few passes over {facts.images:,}")
    else:
        few, some, many = (60, 40, 10) if facts.device == "cpu" else (100, 100, 90)
        epochs = few if facts.images < 2_000 else some if facts.images < 20_000 else many
        why = "a ViT that starts from nothing needs many passes; more will give more"
        yield Choice(fields={"epochs": epochs}, reason=why)
    batch = 64 if facts.images < 20_000 else 128
    if facts.images < 2_000 and not _from_scratch(run):
        batch = 32
    if facts.device == "cuda" and facts.images >= 100_000:
        batch = 512
    yield Choice(
        fields={"batch_size": min(batch, max(1, facts.images // 2))},
        reason=f"about {facts.images // batch:,} steps an epoch",
    )


def _optimiser(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    images_in_a_step = (run.batch_size or 1) * run.grad_accum_steps
    opt = run.opt or ("adamw" if run.shard or not _from_scratch(run) else "muon")
    if run.freeze == "backbone":
        yield Choice(
            fields={
                "opt": "adamw",
                "lr": 1e-3,
                "weight_decay": 0.0,
                "layer_decay": 1.0,
                "warmup_epochs": 0.0,
            },
            reason="one linear layer",
        )
    elif _from_scratch(run):
        if run.shard:
            yield Choice(fields={"opt": "adamw"}, reason="--shard splits the matrices that Muon needs whole")
        else:
            yield Choice(fields={"opt": "muon"}, reason="ahead of AdamW in short runs from scratch")
        # Where an epoch has few steps and the network is narrow, large steps did better (docs/log.md, digits).
        muon = 1.4e-2 if facts.side <= 16 and facts.images < 5_000 else 2e-3
        base = {"muon": muon, "adamw": 1e-3, "sgd": 0.05}[opt]
        rate = _round(base * math.sqrt(images_in_a_step / 128))
        yield Choice(fields={"lr": rate}, reason=f"{base:g} at 128 images a step, times a root")
        yield Choice(fields={"weight_decay": 1e-4 if run.opt == "sgd" else 0.05, "layer_decay": 1.0})
    else:
        base = {"muon": 2e-4, "adamw": 2e-4, "sgd": 0.01}[opt]
        rate = _round(base * math.sqrt(images_in_a_step / 64))
        yield Choice(
            fields={"opt": "adamw", "lr": rate, "layer_decay": 0.75, "weight_decay": 0.05},
            reason="given weights are changed gently, those near the picture least",
        )
    yield Choice(fields={"sched": "cosine", "min_lr": 0.0, "clip_grad": 1.0})
    momentum = 0.95 if opt == "muon" and _from_scratch(run) else 0.9
    yield Choice(fields={"momentum": momentum, "betas": (0.9, 0.95 if _from_scratch(run) else 0.999)})
    warmup = min(5.0, _round(passes(run, facts) / 10))
    yield Choice(fields={"warmup_epochs": warmup}, reason="a tenth of the run, 5 at most")


def _regularisation(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    if run.freeze == "backbone":
        fields = {"drop_path": 0.0, "smoothing": 0.0, "model_ema": 0.0, "mixup": 0.0, "cutmix": 0.0}
        yield Choice(fields=fields, reason="a linear layer on fixed features needs none")
        return
    long_enough = passes(run, facts) >= 20
    drop = 0.1 if long_enough else 0.0
    smoothing = 0.0 if run.loss == "bce" else 0.1  # smoothed, every class would count as present
    yield Choice(fields={"drop_path": drop, "smoothing": smoothing}, reason="against overfitting")
    yield Choice(fields={"model_ema": ema_decay(run, facts, 2)}, reason="weights averaged over two epochs")
    if _from_scratch(run) and long_enough and not facts.digits:
        yield Choice(fields={"mixup": 0.2, "cutmix": 1.0}, reason="regularises a network from scratch")
    else:
        yield Choice(fields={"mixup": 0.0, "cutmix": 0.0})


def _augmentation(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    if run.freeze == "backbone":
        fields = {"crop": "none", "hflip": 0.0, "aa": "none", "reprob": 0.0, "color_jitter": 0.0}
        yield Choice(fields=fields, reason="a linear layer learns from pictures as they are")
    elif facts.side <= 80 and _from_scratch(run):
        yield Choice(fields={"crop": "pad"}, reason="small pictures are shifted, not zoomed into")
    else:
        scale = (0.08, 1.0) if facts.images >= 100_000 else (0.25, 1.0)
        yield Choice(fields={"crop": "resized", "scale": scale}, reason="another crop every time")
    if facts.digits:
        fields = {"hflip": 0.0, "aa": "none", "reprob": 0.0, "color_jitter": 0.0}
        yield Choice(fields=fields, reason="a mirrored digit is no digit")
    yield Choice(fields={"hflip": 0.5}, reason="most things are seen from both sides")
    policy = "trivial" if _from_scratch(run) and passes(run, facts) >= 40 else "none"
    why = "as strong as the run is long" if policy != "none" else ""
    yield Choice(fields={"aa": policy, "reprob": 0.0, "color_jitter": 0.0}, reason=why)
    yield Choice(fields={"scale": (0.08, 1.0)})


def _loading(run: TrainRun, facts: Facts) -> Iterator[Choice]:
    workers = 0 if facts.side <= 16 else min(8, facts.cores)
    reason = "tiny pictures are quicker to read than to hand over" if not workers else "one a core"
    yield Choice(fields={"workers": workers}, reason=reason)


def _round(value: float) -> float:
    """Two digits: a rate is never known better."""
    return float(f"{value:.2g}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
