"""New classes for a network, of every task: all class layers change, or nothing does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from vitrail.errors import ModelError
from vitrail.models import registry

DENSE = (*registry.families("object-detection"), *registry.families("image-segmentation"))


def tiny(family: str) -> Any:
    module = registry.module_of(family)
    torch.manual_seed(0)
    return registry.from_config(next(iter(module.VARIANTS)), module.TINY)


@pytest.mark.parametrize(("family", "count"), [*((family, 0) for family in DENSE), ("vit", -1)])
def test_classes_that_a_network_cannot_have_leave_it_as_it_was(family: str, count: int) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, card = model.config, model.card
    with pytest.raises(ModelError, match=f"num_classes must be .* got {count}"):
        model.reset_classifier(count)
    assert model.config == config and model.card == card
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["vit", *DENSE])
def test_names_of_the_old_classes_go_with_them(family: str) -> None:
    model = tiny(family)
    names = tuple("abcde")
    model.card = dataclasses.replace(model.card, labels=names, folders=names)
    model.reset_classifier(3)
    assert model.num_classes == model.card.num_classes == 3
    assert model.card.labels is None and model.card.folders == ()
    assert model.card.names == {}
