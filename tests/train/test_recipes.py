"""Every recipe that comes with vitrail can be run: read as the job reads it, for a network that exists."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from vitrail import config
from vitrail.data.augment import Augmentation
from vitrail.data.joint import JointAugmentation
from vitrail.data.mix import Mix
from vitrail.errors import ConfigError
from vitrail.jobs.dense_data import task_of
from vitrail.jobs.plan import Facts, choose, find_recipe, with_recipe
from vitrail.jobs.training_parts import read_fields, size_of
from vitrail.models import registry
from vitrail.runs import TrainRun
from vitrail.tasks.classify import Classify
from vitrail.train.optim import Hyperparameters
from vitrail.train.schedule import Schedule

HOME = find_recipe("papers/vit_small_patch16_224").parents[1]
NAMES = sorted(path.relative_to(HOME).with_suffix("").as_posix() for path in HOME.rglob("*.toml"))
PHOTOS = Facts(images=1_281_167, classes=1000, side=375, device="cuda", cores=16)
CIFAR = Facts(images=45_000, classes=10, side=32, device="cpu", cores=2)


def read(name: str) -> TrainRun:
    return with_recipe(TrainRun(data=("x",), recipe=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_and_every_part_of_the_run_takes_it(name: str) -> None:
    """Nothing but the loading is left to the machine, so that a recipe means the same everywhere."""
    values = config.read_toml(find_recipe(name))
    assert config.from_dict(TrainRun, {"data": ["x"], **values}, where=name).recipe is None
    run = read(name)
    assert run.recipe == name and all(
        config.to_dict(run)[field] == value for field, value in values.items() if field != "data"
    ), "a value of the recipe was not taken over"
    facts = PHOTOS if name.startswith("papers/") else CIFAR
    task = task_of(run.model, None) or facts.task
    facts = dataclasses.replace(facts, task=task)
    chosen, choices = choose(run, facts)
    assert not {field for choice in choices for field in choice.fields} - {"workers"}
    assert chosen.lr and chosen.scale and chosen.betas and chosen.crop and chosen.aa
    smoothing, mixup, cutmix = chosen.smoothing or 0.0, chosen.mixup or 0.0, chosen.cutmix or 0.0
    Hyperparameters(
        kind=chosen.opt or "adamw",
        lr=chosen.lr,
        weight_decay=chosen.weight_decay or 0.0,
        momentum=chosen.momentum or 0.0,
        betas=chosen.betas,
        layer_decay=chosen.layer_decay or 0.0,
    )
    Schedule(course=chosen.sched or "cosine", steps=100, floor=(chosen.min_lr or 0.0) / chosen.lr)
    if task != "image-classification":
        JointAugmentation(
            scale=chosen.scale, hflip=chosen.hflip or 0.0, color_jitter=chosen.color_jitter or 0.0
        )
        return
    Augmentation(crop=chosen.crop, scale=chosen.scale, aa=chosen.aa, color_jitter=chosen.color_jitter or 0.0)
    Mix(num_classes=10, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
    Classify(["a", "b"], smoothing=smoothing, objective="sigmoid" if chosen.loss == "bce" else "softmax")


@pytest.mark.parametrize("name", NAMES)
def test_the_network_of_a_recipe_exists_and_takes_its_fields(name: str) -> None:
    run = read(name)
    if run.model is None:  # the plan's own small network, by model_kwargs
        return
    changed = registry.variant(
        run.model,
        img_size=size_of(run.img_size),
        drop_path_rate=run.drop_path,
        **read_fields(run.model_kwargs),
    )
    assert dataclasses.is_dataclass(changed)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_recipe_tells_command_cost_and_score(name: str) -> None:
    text = find_recipe(name).read_text(encoding="utf-8").splitlines()
    lines = [
        line.removeprefix("#").strip()
        for line in itertools.takewhile(lambda line: line.startswith("#"), text)
    ]
    assert any(line.startswith("vitrail train ") and f"--recipe {name}" in line for line in lines)
    words = " ".join(lines).lower()
    assert "cost: " in words or "measured: " in words
    if name.startswith("papers/"):
        assert "published top-1" in words and "not as published" in words


def test_every_family_has_a_recipe_for_small_data() -> None:
    models = [read(name).model for name in NAMES if name.endswith("-cifar10")]
    assert {registry.family_name(registry.family_of(model)) for model in models if model} == set(
        registry.families()
    )


def test_fields_of_a_part_are_told_as_json() -> None:
    told = read_fields(("width=64", "taps=5,11", 'backbone_changes={"stem": "conv"}'))
    assert told == {"width": 64, "taps": (5, 11), "backbone_changes": {"stem": "conv"}}
    with pytest.raises(ConfigError, match="JSON"):
        read_fields(("backbone_changes={stem: conv}",))
