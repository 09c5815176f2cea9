"""What is exported: the network with its normalising, from uint8 on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitrail
from vitrail.data.transforms import normalise
from vitrail.export.wrap import Deployed


def small(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = vitrail.create_model(name, **changes)
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("vit_nano_patch4_32", True),
        ("swin_nano_patch2_32", False),
        ("t2t_nano_32", False),
        ("resnet20_32", False),
    ],
)
def test_answers_to_pixels_as_the_network_does_to_normalised_ones(name: str, folded: bool) -> None:
    model = small(name, num_classes=5)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    deployed = Deployed(model)
    with torch.inference_mode():
        wanted = model(normalise(images, model.card.preprocessing))
        logits, probabilities = deployed(images)
    assert deployed.folded is folded
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3))


def test_folding_is_exact_in_double_precision() -> None:
    model = small("vit_nano_patch4_32")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    first = Deployed(model).network.backbone.stages[0].entry.patches.proj
    plain = model.backbone.stages[0].entry.patches.proj
    wanted = plain.double()(normalise(images, model.card.preprocessing).double())
    assert (first.double()(images.double()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_model_itself_stays_as_it_was() -> None:
    model = small("vit_nano_patch4_32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Deployed(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
