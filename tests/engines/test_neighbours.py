"""Nearest neighbours in a network's vectors: they know the pictures they were given, and vote for the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vitrail.engines.neighbours import TEMPERATURE, Neighbours
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError
from vitrail.models.registry import create_model


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(create_model("vit_nano_patch4_32", depth=2), precision="fp32")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(
        0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def remembered(engine: TorchEngine, pictures: torch.Tensor, k: int) -> Neighbours:
    targets = torch.arange(len(pictures)) % 3
    halves = [slice(0, 8), slice(8, None)]
    batches = [SimpleNamespace(images=pictures[half], targets=targets[half]) for half in halves]
    return Neighbours(engine, batches, ("a", "b", "c"), k)


def test_a_picture_does_not_vote_for_itself(engine: TorchEngine, pictures: torch.Tensor) -> None:
    model = remembered(engine, pictures, 1)
    alike = model.memory @ model.memory.T
    nearest = alike.fill_diagonal_(-1).argmax(1)
    assert model(pictures).argmax(1).tolist() == (nearest % 3).tolist()
    assert model.met == 12
    nudged = pictures.clone()
    nudged[:, 0, 0, 0] ^= 1  # another picture, and nearly the same
    assert model(nudged).argmax(1).tolist() == [number % 3 for number in range(12)]
    assert model.met == 12


def test_who_knows_one_picture_alone_says_nothing_of_it(engine: TorchEngine, pictures: torch.Tensor) -> None:
    alone = SimpleNamespace(images=pictures[:1], targets=torch.zeros(1, dtype=torch.int64))
    shares = Neighbours(engine, [alone], ("a", "b", "c"))(pictures[:1]).softmax(1)
    torch.testing.assert_close(shares, torch.full((1, 3), 1 / 3))


def test_votes_are_the_weighted_shares_of_the_k_nearest(engine: TorchEngine, pictures: torch.Tensor) -> None:
    model = remembered(engine, pictures, 5)
    picture = pictures[:1].flip(3)
    cosines = (model.vectors(picture) @ model.memory.T)[0]
    order = cosines.argsort(descending=True)[:5]
    weights = (cosines[order] / TEMPERATURE).exp()
    votes = torch.stack([weights[order % 3 == number].sum() for number in range(3)]) / weights.sum()
    torch.testing.assert_close(model(picture)[0].exp(), votes.clamp_min(1e-6), rtol=1e-4, atol=1e-6)


def test_other_classes_than_the_network_was_trained_on(engine: TorchEngine, pictures: torch.Tensor) -> None:
    model = remembered(engine, pictures, 3)
    assert model.card.labels == ("a", "b", "c") and model.classes == 3
    assert model.card.preprocessing == engine.card.preprocessing


def test_what_cannot_be_asked_is_refused(engine: TorchEngine, pictures: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        remembered(engine, pictures, 0)
    with pytest.raises(ConfigError, match="no labelled pictures"):
        Neighbours(engine, [], ("a",), 3)
    with pytest.raises(ConfigError, match="Neighbours need a classifier on the engine torch"):
        Neighbours(SimpleNamespace(name="onnxruntime", card=engine.card), [], ("a",))  # type: ignore[arg-type]
