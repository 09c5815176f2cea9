"""Squeeze-and-excitation and non-local blocks: the authors' numbers, and explicit sums in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_table import measured
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.gates import NonLocal, SqueezeExcite

Golden = Callable[[str], dict[str, Any]]

FORMS = ("gaussian", "embedded", "dot", "concatenation")


def weights_of(case: dict[str, Any], fill: ModuleType) -> dict[str, Tensor]:
    told = case.get("state_dict", case.get("fill names and shapes"))
    values = fill.fill({name: tuple(shape) for name, shape in told})
    return {name: torch.from_numpy(value).double() for name, value in values.items()}


def input_of(case: dict[str, Any], fill: ModuleType) -> Tensor:
    factor, shape = re.match(r"(?:(\d+) \* )?picture\(([\d,]+)\)", case["input"]).groups()  # type: ignore[union-attr]
    picture = torch.from_numpy(fill.picture(*map(int, shape.split(",")))).double()
    return picture * int(factor or 1)


def same(ours: Tensor, told: dict[str, Any]) -> float:
    """Length, and values spread over the tensor, as far as they are printed; how far these are apart."""
    assert list(ours.shape) == told["shape"]
    assert ours.norm().item() == pytest.approx(told["l2"], rel=1e-8)
    flat = ours.detach().flatten()
    spread = flat[torch.arange(16) * flat.numel() // 16]
    expected = torch.tensor(told["spread16"], dtype=torch.float64)
    assert torch.allclose(spread, expected, rtol=1e-6, atol=1e-8)
    return float((spread - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "name", ["with biases (1x1 convolutions)", "reduction 8", "without biases (linear layers)"]
)
def test_squeeze_and_excitation_gives_the_authors_numbers(
    name: str, golden: Golden, fill: ModuleType
) -> None:
    case = golden("se_module")["cases"][name]
    weights = weights_of(case, fill)
    if "fc.0.weight" in weights:
        weights = {"fc1.weight": weights["fc.0.weight"], "fc2.weight": weights["fc.2.weight"]}
    channels = case["config"]["channels"]
    gate = SqueezeExcite(
        channels, channels // case["config"]["reduction"], bias="fc1.bias" in weights
    ).double()
    gate.load_state_dict(
        {key: value.flatten(1) if value.ndim == 4 else value for key, value in weights.items()}
    )
    assert sum(parameter.numel() for parameter in gate.parameters()) == case["parameters"]
    found = same(gate(input_of(case, fill)), case["outputs_float64"]["output"])
    assert measured(found, "senet", "published code", variant=f"gate {name}") < 1e-6


NAMES = {
    # theirs: ours
    "g.0.": "g.", "phi.0.": "phi.", "W.0.": "out.", "W.1.": "norm.", "W.": "out.", "bn.": "norm.",
}  # fmt: skip


def block_of(case: dict[str, Any], fill: ModuleType, **options: Any) -> NonLocal:
    state = {}
    for key, value in weights_of(case, fill).items():
        name = next((ours + key.removeprefix(old) for old, ours in NAMES.items() if key.startswith(old)), key)
        state[name] = value.reshape((*value.shape[:2], 1, 1)) if value.ndim > 2 else value
    channels, inner = state["theta.weight"].shape[1], state["theta.weight"].shape[0]
    norm = nn.BatchNorm2d(channels) if "norm.weight" in state else None
    block = NonLocal(channels, inner, norm=norm, **options).double().eval()
    block.load_state_dict(state, strict=norm is None)
    return block


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embedded Gaussian 2D, sub-sampled", {}),
        ("embedded Gaussian 2D, sub-sampled, odd size", {}),
        ("embedded Gaussian 2D, not sub-sampled, no batch norm", {"subsample": "none"}),
        ("embedded Gaussian 3D, sub-sampled", {}),
        ("dot product 2D, sub-sampled", {"form": "dot"}),
        ("dot product 2D, not sub-sampled", {"form": "dot", "subsample": "none"}),
    ],
)
def test_non_local_blocks_give_the_widely_used_numbers(
    name: str, options: dict[str, Any], golden: Golden, fill: ModuleType
) -> None:
    case = golden("nonlocal_block")["cases"][name]
    block = block_of(case, fill, **options)
    assert sum(parameter.numel() for parameter in block.parameters()) == case["parameters"]
    map = input_of(case, fill)
    flat = map.flatten(2, -2)  # frames stand below each other: with even rows no 2 x 2 maximum crosses frames
    told = case["outputs_float64"]
    found = same(block(flat).reshape(map.shape), told["z"])
    assert measured(found, "nonlocal", "widely used code", map.shape[2:], variant=name) < 1e-6
    same(block.weights(flat)[:, 0], told["attention map"])


def test_the_authors_block_scales_and_takes_maxima_first(golden: Golden, fill: ModuleType) -> None:
    case = golden("nonlocal_block")["cases"]["authors' Caffe2 block: embedded Gaussian, scaled, pooled"]
    block = block_of(case, fill, scaled=True, subsample="before")
    map = input_of(case, fill)
    flat = map.flatten(2, -2)
    found = same(block(flat).reshape(map.shape), case["outputs_float64"]["sum"])
    assert (
        measured(found, "nonlocal", "the authors' code", map.shape[2:], variant="embedded Gaussian block")
        < 1e-6
    )
    same(block.weights(flat)[:, 0], case["outputs_float64"]["attention map"])
    for changes in ({"scaled": False, "subsample": "before"}, {"scaled": True, "subsample": "after"}):
        assert not torch.allclose(block_of(case, fill, **changes)(flat), block(flat), rtol=1e-3)


def by_hand(block: NonLocal, map: Tensor) -> Tensor:
    """The paper's sums, place by place and pair by pair, from the fact sheet."""
    batch, _, rows, columns = map.shape

    def at(conv: nn.Conv2d, vector: Tensor) -> Tensor:
        return conv.weight[:, :, 0, 0] @ vector + conv.bias

    def largest(vectors: list[list[Tensor]]) -> list[Tensor]:
        if block.subsample == "none":
            return [vector for line in vectors for vector in line]
        pairs = [(i, j) for i in range(0, rows - 1, 2) for j in range(0, columns - 1, 2)]
        return [
            torch.stack([vectors[i][j], vectors[i + 1][j], vectors[i][j + 1], vectors[i + 1][j + 1]]).amax(0)
            for i, j in pairs
        ]

    def others(picture: Tensor, conv: nn.Conv2d | None) -> list[Tensor]:
        cells = [[picture[:, i, j] for j in range(columns)] for i in range(rows)]
        if block.subsample == "before":
            return [vector if conv is None else at(conv, vector) for vector in largest(cells)]
        return largest([[vector if conv is None else at(conv, vector) for vector in line] for line in cells])

    plain = block.form == "gaussian"
    added = torch.zeros_like(map)
    for number in range(batch):
        picture = map[number]
        keys, values = others(picture, None if plain else block.phi), others(picture, block.g)
        for i in range(rows):
            for j in range(columns):
                query = picture[:, i, j] if plain else at(block.theta, picture[:, i, j])
                if block.form == "concatenation":
                    vector = block.pair.weight[0, :, 0, 0]
                    scores = torch.stack(
                        [torch.relu(vector @ torch.cat([query, key])) for key in keys]
                    ) / len(keys)
                elif block.form == "dot":
                    scores = torch.stack([query @ key for key in keys]) / len(keys)
                else:
                    scores = torch.stack([torch.exp(block.scale * (query @ key)) for key in keys])
                    scores = scores / scores.sum()
                mean = sum(score * value for score, value in zip(scores, values, strict=True))
                added[number, :, i, j] = at(block.out, mean)  # type: ignore[arg-type]
    return map + block.norm(added)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subsample", ["none", "after", "before"])
def test_every_form_is_its_sum(form: str, subsample: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    block = NonLocal(6, form=form, subsample=subsample, norm=norm).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in (*block.parameters(), norm.running_mean):
            tensor.normal_(std=0.7)
    map = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        ours, sums = block(map), by_hand(block, map)
    found = float((ours - sums).norm() / sums.norm())
    assert measured(found, "nonlocal", "explicit sums", (5, 4), variant=f"{form}, maxima {subsample}") < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normed", [True, False])
def test_a_fresh_block_changes_nothing_and_can_learn(form: str, normed: bool) -> None:
    torch.manual_seed(0)
    block = NonLocal(8, form=form, norm=nn.BatchNorm2d(8) if normed else None)  # type: ignore[arg-type]
    block.init_weights()
    map = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(map), map)
    block(map).square().sum().backward()
    moved = block.norm.weight if normed else block.out.weight
    assert moved.grad is not None and moved.grad.abs().max() > 0  # type: ignore[union-attr]


def test_rows_of_the_softmax_forms_sum_to_one() -> None:
    for form in ("gaussian", "embedded"):
        rows = NonLocal(8, form=form).weights(torch.randn(1, 8, 6, 6)).sum(-1)  # type: ignore[arg-type]
        assert torch.allclose(rows, torch.ones_like(rows))


def test_a_scale_without_softmax_is_refused() -> None:
    with pytest.raises(ModelError, match="goes with the form"):
        NonLocal(8, form="dot", scaled=True)
