"""Every parameter learns at its own rate, decays or not, and keeps its memory by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train.standin import Net
from vitrail import create_model
from vitrail.errors import ConfigError, WeightsError
from vitrail.runtime import Runtime
from vitrail.train.average import Average
from vitrail.train.muon import Muon, orthogonal
from vitrail.train.optim import Hyperparameters, build_optimiser, parameter_groups

CPU = Runtime(device=torch.device("cpu"))


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name, _ in group["params"]}


def test_matrices_decay_and_nothing_else() -> None:
    decays = by_name(parameter_groups(Net(), Hyperparameters(weight_decay=0.1)), "weight_decay")
    assert {name for name, decay in decays.items() if decay} == {
        "stem.weight",
        "blocks.0.0.weight",
        "blocks.0.2.weight",
        "blocks.1.0.weight",
        "blocks.1.2.weight",
        "head.weight",
    }


def test_layer_decay_lowers_the_rate_towards_the_image() -> None:
    peaks = by_name(parameter_groups(Net(), Hyperparameters(lr=1.0, layer_decay=0.5)), "peak")
    assert peaks["head.weight"] == 1.0
    assert peaks["blocks.1.0.weight"] == 0.5
    assert peaks["blocks.0.0.bias"] == 0.25
    assert peaks["stem.weight"] == peaks["position"] == 0.125


def test_a_backbone_can_learn_slower_than_its_head() -> None:
    model = create_model("vit_nano_patch4_32", num_classes=3)
    peaks = by_name(parameter_groups(model, Hyperparameters(lr=1.0, backbone_lr=0.1)), "peak")
    assert {name.partition(".")[0]: peak for name, peak in peaks.items()} == {"backbone": 0.1, "head": 1.0}
    assert {peak for name, peak in peaks.items() if name.startswith("backbone.")} == {0.1}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    net = Net()
    optimiser = build_optimiser(net, Hyperparameters(kind="muon"), CPU)
    first, second = optimiser.parts
    assert isinstance(first, Muon) and isinstance(second, torch.optim.AdamW)
    names = {name for group in first.param_groups for name in group["param_names"]}
    assert names == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)}
    assert len(optimiser.parameters) == len(list(net.parameters()))


def test_an_orthogonal_update_has_singular_values_near_one() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonal(shaped, torch.float32))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_muon_moves_joined_queries_keys_and_values_one_by_one() -> None:
    joined = torch.nn.Parameter(torch.zeros(24, 8))
    parts = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    joined.grad = gradient
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.grad = piece
    Muon([("blocks.0.mixer.qkv.weight", joined)], lr=0.1).step()
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(joined, torch.cat(list(parts)))


def test_muon_takes_a_matrix_of_the_same_shape_and_another_name_whole() -> None:
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    wide, joined = (torch.nn.Parameter(torch.zeros(24, 8)) for _ in range(2))
    wide.grad, joined.grad = gradient, gradient.clone()
    Muon([("blocks.0.mlp.fc1.weight", wide), ("blocks.0.mixer.qkv.weight", joined)], lr=0.1).step()
    values = torch.linalg.svdvals(wide.detach())
    assert float(values.max() / values.min()) < 2.2  # about one, all of them, of the whole matrix
    assert not torch.allclose(wide, joined, atol=1e-3)


def test_a_step_of_muon_is_as_long_as_its_paper_says() -> None:
    weight = torch.nn.Parameter(torch.full((4, 16), 2.0))
    weight.grad = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    # The first step's momentum points as the gradient does.
    update = orthogonal(weight.grad[None], torch.float32)[0]
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    expected = torch.full((4, 16), 2.0) * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 16**0.5 * update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_memory_goes_away_and_comes_back(kind: Any) -> None:
    def step(net: Net, optimiser: Any) -> None:
        torch.manual_seed(1)
        net(torch.randn(4, 3, 2, 2)).square().sum().backward()
        optimiser.step()
        optimiser.zero()

    torch.manual_seed(0)
    net = Net()
    optimiser = build_optimiser(net, Hyperparameters(kind=kind), CPU)
    step(net, optimiser)
    again = Net()
    again.load_state_dict(net.state_dict())
    other = build_optimiser(again, Hyperparameters(kind=kind), CPU)
    other.load({name: value.clone() for name, value in optimiser.state().items()})
    step(net, optimiser)
    step(again, other)
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), again.parameters(), strict=True))


def test_memory_of_another_network_is_refused() -> None:
    optimiser = build_optimiser(Net(), Hyperparameters(), CPU)
    with pytest.raises(WeightsError, match="no parameter for other/exp_avg"):
        optimiser.load({"other/exp_avg": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"is \[3\], its parameter \[8\]"):
        optimiser.load({"norm.bias/exp_avg": torch.zeros(3)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", float("nan")),
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("layer_decay", 0.0),
        ("backbone_lr", 0.0),
    ],
)
def test_illegal_numbers_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Hyperparameters(**{field: value})  # type: ignore[arg-type]


def test_nothing_to_train_is_said() -> None:
    net = Net().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimiser(net, Hyperparameters(), CPU)


def test_the_average_forgets_the_start_at_once_and_follows_slowly_later() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    average = Average(net, 0.99)
    with torch.no_grad():
        net.weight.fill_(1.0)
    average.update(0)
    assert average.weights["weight"].item() == pytest.approx(0.9)
    average.update(100_000)
    assert average.weights["weight"].item() == pytest.approx(0.901)
    with average.applied():
        assert net.weight.item() == pytest.approx(0.901)
    assert net.weight.item() == 1.0
