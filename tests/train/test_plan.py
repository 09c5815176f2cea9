"""The plan fills every open field, says why, and never touches what was given."""

from __future__ import annotations

import dataclasses

import pytest

from vitrail import config
from vitrail.errors import ConfigError
from vitrail.jobs.plan import Facts, choose, find_recipe, is_open, with_recipe
from vitrail.runs import TrainRun

DIGITS = Facts(images=1259, classes=10, side=8, device="cpu", cores=2, digits=True)
CIFAR = Facts(images=50_000, classes=10, side=32, device="cpu", cores=2)
PHOTOS = Facts(images=9_469, classes=10, side=224, device="cpu", cores=2)
LARGE = Facts(images=1_281_167, classes=1000, side=400, device="cuda", cores=16)

# Fields that stay open: nothing has to be chosen where they say nothing.
OPTIONAL = {"output", "recipe", "pretrained", "teacher", "steps", "patience", "val", "model_kwargs"}
OPTIONAL |= {"backbone", "classes", "ignore", "balance"}


@pytest.mark.parametrize("facts", [DIGITS, CIFAR, PHOTOS, LARGE], ids=["digits", "cifar", "photos", "large"])
@pytest.mark.parametrize("start", [{}, {"freeze": "backbone", "pretrained": "x"}, {"pretrained": "x"}])
def test_every_open_field_is_chosen(facts: Facts, start: dict[str, str]) -> None:
    if start:
        facts = dataclasses.replace(facts, pretrained="vit_small_patch16_224", size=(224, 224))
    run, choices = choose(TrainRun(data=("x",), **start), facts)  # type: ignore[arg-type]
    still = {field.name for field in dataclasses.fields(run) if is_open(run, field.name)}
    assert still <= OPTIONAL
    assert choices and all(choice.reason for choice in choices)


def test_a_length_in_steps_is_planned_like_the_same_length_in_epochs() -> None:
    short, _ = choose(TrainRun(data=("x",), steps=200), CIFAR)  # half a pass over the pictures
    assert short.warmup_epochs == pytest.approx(0.05, rel=0.05) and short.mixup == 0.0
    long = {"data": ("x",), "batch_size": 125}
    steps, _ = choose(TrainRun(**long, steps=400 * 50), CIFAR)  # type: ignore[arg-type]
    epochs, _ = choose(TrainRun(**long, epochs=50), CIFAR)  # type: ignore[arg-type]
    assert config.replace(steps, steps=None, epochs=50) == epochs
    assert epochs.warmup_epochs == 5.0 and epochs.aa == "trivial"


def test_split_weights_get_an_optimiser_that_can_train_them() -> None:
    run, choices = choose(TrainRun(data=("x",), shard=True), CIFAR)
    plain, _ = choose(TrainRun(data=("x",), opt="adamw"), CIFAR)
    assert (run.opt, run.lr, run.momentum) == ("adamw", plain.lr, plain.momentum)
    assert any("--shard" in choice.reason for choice in choices)
    assert choose(TrainRun(data=("x",)), CIFAR)[0].opt == "muon"


def test_what_was_given_is_never_changed() -> None:
    given = TrainRun(
        data=("x",), model="vit_small_patch16_224", lr=0.5, mixup=0.0, epochs=3, model_ema=0.0, crop="none"
    )
    run, choices = choose(given, CIFAR)
    for name in ("model", "lr", "mixup", "epochs", "model_ema", "crop", "img_size", "model_kwargs"):
        if name not in ("img_size", "model_kwargs"):
            assert getattr(run, name) == getattr(given, name)
        assert all(name not in choice.fields for choice in choices) or name == "img_size"


def test_small_pictures_get_small_patches() -> None:
    sizes = []
    for facts in (DIGITS, CIFAR, PHOTOS):
        run, _ = choose(TrainRun(data=("x",)), facts)
        fields = dict(text.split("=") for text in run.model_kwargs)
        patch = int(fields["patch_size"])
        sizes.append((run.img_size[0], patch))
        assert run.img_size[0] % patch == 0
        assert 16 <= (run.img_size[0] // patch) ** 2 <= 200
    assert sizes == sorted(sizes)


def test_digits_are_never_mirrored_nor_given_weights_trained_hard() -> None:
    run, _ = choose(TrainRun(data=("digits",)), DIGITS)
    assert run.hflip == 0.0
    given = dataclasses.replace(PHOTOS, pretrained="vit_base_patch16_224", size=(224, 224))
    gentle, _ = choose(TrainRun(data=("x",), pretrained="x"), given)
    assert gentle.layer_decay is not None and gentle.layer_decay < 1
    assert gentle.model == "vit_base_patch16_224" and gentle.img_size == (224, 224)


@pytest.mark.parametrize("name", ["digits", "cifar10-cpu", "imagenette-cpu"])
def test_recipes_are_complete_and_legal(name: str) -> None:
    """A recipe leaves nothing to the plan, so that it means the same tomorrow."""
    values = config.read_toml(find_recipe(name))
    run = config.from_dict(TrainRun, {"data": ["x"], **values}, where=name)
    _, choices = choose(run, dataclasses.replace(CIFAR, images=100_000))
    assert not [choice for choice in choices if set(choice.fields) - {"workers"}]
    head = find_recipe(name).read_text().split("\n\n")[0]
    assert head.startswith("#") and "vitrail train" in head


def test_a_recipe_fills_open_fields_only() -> None:
    run = with_recipe(TrainRun(data=("digits",), recipe="digits", lr=0.123))
    assert run.lr == 0.123 and run.epochs == config.read_toml(find_recipe("digits"))["epochs"]
    with pytest.raises(ConfigError, match="Did you mean digits"):
        with_recipe(TrainRun(data=("x",), recipe="digit"))


def test_a_length_that_is_given_goes_before_the_recipes() -> None:
    """--recipe imagenette-vit-tiny --steps 150: the recipe's epochs are not meant then."""
    run = with_recipe(TrainRun(data=("x",), recipe="digits", steps=7))
    assert (run.steps, run.epochs) == (7, None)
    assert with_recipe(TrainRun(data=("x",), recipe="digits", epochs=2)).epochs == 2
