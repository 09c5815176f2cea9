"""`vitrail bench`: speed, memory, parameters and FLOPs of a network, and of its peers in the same run.

Contenders take turns round by round, so that a change of the machine's mood meets all of them. All get the
same synthetic images, the same optimiser (fused AdamW) and the same precision by autocast. Memory is measured
in a process of its own for each contender: how far its peak (resident size; on CUDA the allocator's) grows
from before the network is built to the end of the second round.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError, WeightsError
from vitrail.jobs.bench_dense import dense_loss
from vitrail.jobs.models import Cost, cost
from vitrail.models import deit, registry, vit, vit_layouts
from vitrail.models.merging import merge_tokens
from vitrail.runs import BenchRun
from vitrail.runtime import Precision, Runtime, choose_device, choose_precision
from vitrail.weights.folder import model_folder, on_disk

logger = logging.getLogger(__name__)

Mode = Literal["train", "inference"]


class Speed(NamedTuple):
    """One contender in one mode."""

    contender: str
    mode: Mode
    best: float
    """Images a second in the fastest round."""
    median: float
    """Images a second in the middle round."""
    memory: int
    """Bytes that building and one round added to the process."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured, and on what."""

    model: str
    cost: Cost
    img_size: tuple[int, int]
    batch_size: int
    device: str
    precision: str
    threads: int
    repeats: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a contender is built from; plain, so that it can be handed to another process."""

    maker: str
    model: str
    img_size: tuple[int, int]
    batch_size: int
    device: str
    precision: Precision
    compile: bool
    merge_tokens: int = 0


def bench(run: BenchRun, watch: Callable[[int, int], None] | None = None) -> Benchmark:
    """Measure; `watch` is called with (rounds done, rounds in all). Raises ConfigError on sizes below 1."""
    if run.batch_size < 1 or run.repeats < 1:
        raise ConfigError(
            f"batch-size and repeats must be at least 1; got {run.batch_size} and {run.repeats}."
        )
    device = choose_device(run.device)
    precision = choose_precision(run.precision, device)
    with torch.device("meta"):
        counted = _network(run.model, _size(run.img_size))
    size: tuple[int, int] = counted.config.img_size
    makers = [
        "vitrail",
        *(["vitrail, merged"] if run.merge_tokens else []),
        *(peers_of(counted) if run.peers else []),
    ]
    subjects = [
        Subject(
            maker=maker,
            model=run.model,
            img_size=size,
            batch_size=run.batch_size,
            device=str(device),
            precision=precision,
            compile=run.compile,
            merge_tokens=run.merge_tokens if maker == "vitrail, merged" else 0,
        )
        for maker in makers
    ]
    modes: tuple[Mode, ...] = ("inference", "train") if run.mode == "both" else (run.mode,)
    turns = {mode: [one for one in subjects if mode == "inference" or not one.merge_tokens] for mode in modes}
    total, done = sum(map(len, turns.values())) * (run.repeats + 1), 0
    speeds: list[Speed] = []
    for mode, present in turns.items():
        rounds = [_round(subject, mode) for subject in present]
        times: list[list[float]] = [[] for _ in present]
        for repeat in range(run.repeats + 1):
            for one_round, kept in zip(rounds, times, strict=True):
                seconds = _timed(one_round, device)
                kept.extend([seconds] if repeat else [])  # the first round warms up
                done += 1
                if watch is not None:
                    watch(done, total)
        del rounds
        for subject, kept in zip(present, times, strict=True):
            best, middle = subject.batch_size / min(kept), subject.batch_size / statistics.median(kept)
            speeds.append(Speed(subject.maker, mode, best, middle, _memory_apart(subject, mode)))
    return Benchmark(
        model=run.model,
        cost=cost(counted, size, counted.config.in_chans),
        img_size=size,
        batch_size=run.batch_size,
        device=str(device),
        precision=precision,
        threads=torch.get_num_threads(),
        repeats=run.repeats,
        speeds=tuple(speeds),
    )


def peers_of(model: Any) -> list[str]:
    """The installed packages that have this very network; each absent one is said aloud."""
    stock = registry.variant(model.name)
    own = {field.name for field in dataclasses.fields(stock)} - {"img_size", "num_classes"}
    if changed := sorted(name for name in own if getattr(model.config, name) != getattr(stock, name)):
        logger.warning(
            "No peer has this %s: it differs from the published one in %s.", model.name, ", ".join(changed)
        )
        return []
    found = []
    for maker, has in (("timm", _in_timm), ("transformers", _in_transformers)):
        try:
            if has(model):
                found.append(maker)
            else:
                logger.info("%s has no network that could be measured beside %s.", maker, model.name)
        except ImportError:
            logger.warning("%s is not installed; pip install 'vitrail[peers]' brings it.", maker)
    return found


def _in_timm(model: Any) -> bool:
    import timm

    return bool(timm.is_model(model.name))


def _in_transformers(model: Any) -> bool:
    return _transformers_config(model.name, model.config) is not None


def build(subject: Subject) -> nn.Module:
    """The contender's network with random weights on its device; its output is logits, or has them."""
    torch.manual_seed(0)
    if subject.maker.startswith("vitrail"):
        model: nn.Module = _network(subject.model, subject.img_size)
        if subject.merge_tokens:
            model = merge_tokens(model, subject.merge_tokens)
    else:
        with torch.device("meta"):
            ours = _network(subject.model, subject.img_size)
        twin = _timm_twin if subject.maker == "timm" else _transformers_twin
        model = twin(ours.name, ours.config)
    model.to(torch.device(subject.device))
    if subject.compile:
        model.compile()
    return model


def _timm_twin(name: str, config: Any) -> nn.Module:
    """timm's network of this name, with the sizes of ours."""
    import timm

    try:
        return timm.create_model(name, num_classes=config.num_classes, img_size=config.img_size)
    except TypeError:  # networks without positions fit every size, and take none
        return timm.create_model(name, num_classes=config.num_classes)


def _transformers_twin(name: str, config: Any) -> nn.Module:
    """transformers' network of the shape of ours."""
    import transformers

    shape = _transformers_config(name, config)
    network: nn.Module = getattr(transformers, shape.architectures[0])(shape)
    return network


def _transformers_config(name: str, config: Any) -> Any:
    """transformers' configuration of a classifier of ours, as a folder in its layout has it; None where it has none."""
    from transformers import AutoConfig

    module = registry.family_of(name)
    described = [
        one.describe for one in module.RENAMES if one.describe and one.name.startswith("transformers")
    ]
    if registry.task_of(module) != registry.CLASSIFICATION or not described:
        return None
    if hasattr(config, "entry_eps"):  # its PVT has one eps, which is as quick as two
        config = dataclasses.replace(config, entry_eps=config.eps)
    if module is deit and not config.distilled:  # there a DeiT of one token is a ViT
        plain = ("img_size", "in_chans", "num_classes", "patch_size", "width", "depth", "heads", "hidden")
        own = {field: getattr(config, field) for field in plain}
        if config != deit.Config(**own):
            return None
        described, config = [vit_layouts.transformers_config], vit.Config(**own)
    try:
        fields = described[0](name, config) | {"num_labels": config.num_classes}
    except WeightsError:
        return None
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _network(model: str, img_size: tuple[int, int] | None) -> Any:
    """A network by name, or that of a folder, with random weights: speed does not depend on them."""
    changes: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if on_disk(model):
        with torch.device("cpu"):
            kept = registry.from_pretrained(model_folder(model))
        return registry.from_config(str(kept.name), registry.changed(kept.config, **changes))
    return registry.create_model(model, **changes)


def _size(given: tuple[int, ...]) -> tuple[int, int] | None:
    if len(given) > 2:
        raise ConfigError(f"img-size takes one number, or rows and columns; got {' '.join(map(str, given))}.")
    return (given[0], given[-1]) if given else None


def _round(subject: Subject, mode: Mode) -> Callable[[], object]:
    """One round of a contender: a forward pass, or a whole training step."""
    model: Any = build(subject)
    device = torch.device(subject.device)
    runtime = Runtime(device=device, precision=subject.precision)
    channels = model.config.in_chans if subject.maker.startswith("vitrail") else 3
    images = torch.randn(subject.batch_size, channels, *subject.img_size, device=device)
    if mode == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.no_grad(), runtime.autocast():
                return _logits(model(images))

        return infer
    model.train()
    loss_of = _loss(model, images)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> float:
        with runtime.autocast():
            loss = loss_of(model(images))
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def _loss(model: nn.Module, images: Tensor) -> Callable[[Any], Tensor]:
    """The loss of a network's answer to these images, against targets drawn once."""
    if getattr(getattr(model, "card", None), "task", "image-classification") != "image-classification":
        return dense_loss(model, images)
    with torch.no_grad():
        classes = _logits(model(images[:1])).shape[1]
    targets = torch.randint(classes, (len(images),), device=images.device)
    return lambda output: F.cross_entropy(_logits(output).float(), targets)


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _timed(one_round: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    one_round()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _memory_apart(subject: Subject, mode: Mode) -> int:
    """`_memory` in a fresh process, so that nothing of another contender is counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (subject, mode))


def _memory(subject: Subject, mode: Mode) -> int:
    device = torch.device(subject.device)
    if not subject.maker.startswith("vitrail"):
        __import__(subject.maker)  # the package itself is not what is measured
    if device.type == "cuda":
        for _ in range(2):
            _round(subject, mode)()
        return torch.cuda.max_memory_allocated(device)
    torch.zeros(8).exp_()  # torch's own start is not the network's
    before = _peak()
    one_round = _round(subject, mode)
    for _ in range(2):
        one_round()
    return _peak() - before


def _peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the process was before exec, too: its parent's size
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
