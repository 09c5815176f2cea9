"""The measure itself, on networks whose answer is known without measuring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.explain.families import FAMILIES, pictures, tiny
from vitrail.explain import explainer as explainer_module
from vitrail.explain import trial as trial_module
from vitrail.explain.explainer import Explainer
from vitrail.explain.faithfulness import (
    FILLS,
    MAY_BE_CHANCE,
    TOO_FEW,
    Score,
    better_by_chance,
    centre_map,
    filled,
    fills_for,
    forwards,
    interval,
    random_map,
    rank,
    score_maps,
    standings,
)
from vitrail.explain.heat import Heat
from vitrail.explain.places import Placement

GRID = (4, 4)


class OneRegion(nn.Module):
    """Says class 1 for certain where one region of 8 x 8 pixels is as bright as it was, else class 0."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.box = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += len(images)
        there = images[:, :, *self.box].mean((1, 2, 3)) > 0.9
        return torch.stack([torch.where(there, -50.0, 50.0), torch.where(there, 50.0, -50.0)], dim=1)


def image() -> Tensor:
    picture = -torch.ones(3, 32, 32)
    picture[:, 8:16, 16:24] = 1  # region (1, 2)
    return picture


def perfect() -> Tensor:
    map = torch.zeros(GRID)
    map[1, 2] = 1
    return map


@pytest.mark.parametrize("fill", FILLS)
def test_a_perfect_map_deletes_at_once_and_inserts_at_once(fill: str) -> None:
    network = OneRegion(1, 2)
    (best, worst) = score_maps(network, image(), 1, torch.stack([perfect(), -perfect()]), fill=fill, steps=8)
    assert best.deletion == pytest.approx(1 / 16, abs=1e-4)  # whole at 0, gone from the first step on
    assert best.insertion == pytest.approx(15 / 16, abs=1e-4)
    assert worst.deletion == pytest.approx(15 / 16, abs=1e-4)
    assert worst.insertion == pytest.approx(1 / 16, abs=1e-4)


def test_a_random_map_sits_at_its_analytic_level() -> None:
    """The region is filled by step k of K with probability k / K: both areas are 1/2 in the mean, the gap 0."""
    maps = torch.stack([random_map(GRID, seed) for seed in range(200)])
    scores = score_maps(OneRegion(1, 2), image(), 1, maps, fill="mean", steps=16)
    gaps = torch.tensor([score.gap for score in scores])
    assert abs(float(gaps.mean())) <= 2 * float(gaps.std()) / len(gaps) ** 0.5
    deletion = torch.tensor([score.deletion for score in scores])
    assert abs(float(deletion.mean()) - 0.5) <= 2 * float(deletion.std()) / len(deletion) ** 0.5


def test_the_centre_map_wins_where_the_evidence_is_in_the_middle_and_says_so() -> None:
    middle, corner = OneRegion(1, 2), OneRegion(0, 3)
    picture = torch.ones(3, 32, 32)
    for network, better in ((middle, True), (corner, False)):
        (score,) = score_maps(network, picture, 1, centre_map(GRID)[None], fill="mean", steps=16)
        assert (score.gap > 0) is better


def test_the_cost_that_is_announced_is_the_cost() -> None:
    network = OneRegion(1, 2)
    maps = torch.stack([perfect(), centre_map(GRID), random_map(GRID, 0)])
    for fill in FILLS:
        score_maps(network, image(), 1, maps, fill=fill, steps=10)
    assert network.calls == forwards(3, 10)


def test_ties_are_read_from_the_middle_outwards() -> None:
    order = rank(torch.zeros(5, 5)).view(5, 5)
    assert int(order[2, 2]) == 0
    assert set(order[[0, 0, 4, 4], [0, 4, 0, 4]].tolist()) == {21, 22, 23, 24}
    one = torch.zeros(5, 5)
    one[4, 4] = 1
    assert int(rank(one).view(5, 5)[4, 4]) == 0


def test_fills_leave_nothing_to_see() -> None:
    picture = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not filled(picture, "mean").any()
    blurred = filled(picture, "blur")
    assert float(blurred.std()) < 0.1 * float(picture.std())
    flat = torch.full((3, 16, 16), 0.7)
    assert torch.allclose(filled(flat, "blur"), flat, atol=1e-6)


def test_intervals_hold_the_mean_and_chance_is_called_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator) + 0.5
    found = interval(values)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(4 * float(values.std()) / 20, rel=0.15)
    assert better_by_chance(values) < 0.001
    assert 0.05 < better_by_chance(torch.randn(400, generator=generator)) < 0.95


def test_a_method_that_knows_nothing_gets_a_warning() -> None:
    generator = torch.Generator().manual_seed(0)

    def scores(lead: float) -> list[Score]:
        noise = torch.randn(200, generator=generator) * 0.05
        return [Score(deletion=0.4, insertion=0.4 + lead + float(value)) for value in noise]

    rows = standings(
        {
            "good": scores(0.3),
            "noise": scores(0.0),
            "weak": scores(0.05),
            "random": scores(0.0),
            "centre": scores(0.1),
            "close": scores(0.102),
        },
        "mean",
    )
    warnings = {row.method: row.warning for row in rows}
    assert next(row.method for row in rows) == "good"
    assert warnings["good"] == "" and warnings["random"] == ""
    assert warnings["noise"] == "no better than a random map"
    assert warnings["weak"] == "no better than pointing at the middle"
    assert warnings["close"] == MAY_BE_CHANCE


@pytest.mark.parametrize(("count", "proved"), [(1, False), (6, False), (7, True)])
def test_a_few_pictures_that_agree_prove_no_more_than_their_signs(count: int, proved: bool) -> None:
    assert better_by_chance(torch.full((count,), 0.3)) == pytest.approx(max(0.5**count, 1e-4), rel=0.01)
    ahead, level = ([Score(deletion=0.1, insertion=value)] * count for value in (0.9, 0.1))
    rows = standings({"good": ahead, "random": level, "centre": level}, "mean")
    (good,) = (row for row in rows if row.method == "good")
    assert good.warning == ("" if proved else TOO_FEW)


def test_removing_tokens_is_running_without_them() -> None:
    """No position: the tokens that are left must give what an image of those patches alone gives."""
    model = tiny("vit", position="none")
    picture = pictures(model, 1)[0]
    half = torch.zeros(4, 4)
    half[:2] = 1  # the upper half counts most
    assert "removal" in fills_for(model)
    with torch.no_grad():
        lower = model(picture[None, :, 16:]).softmax(1)[0, 2]
        upper = model(picture[None, :, :16]).softmax(1)[0, 2]
        whole = model(picture[None]).softmax(1)[0, 2]
    (score,) = score_maps(model, picture, 2, half[None], fill="removal", steps=2)
    (other,) = score_maps(model, picture, 2, -half[None], fill="removal", steps=2)
    # with two steps the area is (ends / 2 + middle) / 2, and both maps share the ends
    assert score.deletion - other.deletion == pytest.approx(float(lower - upper) / 2, abs=1e-5)
    nothing = 4 * score.deletion - float(whole) - 2 * float(lower)
    assert score.insertion == pytest.approx((nothing / 2 + float(upper) + float(whole) / 2) / 2, abs=1e-5)


def test_tokens_are_removed_only_where_attention_alone_reads_them() -> None:
    can = {family: "removal" in fills_for(tiny(family)) for family in FAMILIES}
    assert can == {family: family in ("vit", "deit", "cait", "performer") for family in FAMILIES}


def test_a_token_is_removed_by_its_own_value_and_not_by_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind a stem a cell lies over four regions: means would rank three neighbours with it."""
    values = torch.arange(16.0).view(1, 4, 4)
    heat = Heat(values=values, placement=Placement(8, 8, -3.5, -3.5), units="")
    assert torch.equal(heat.ranked((32, 32), (4, 4)), values)
    assert not torch.equal(heat.regions((32, 32), (4, 4)), values)
    assert heat.ranked((32, 32), (2, 2)).shape == (1, 2, 2)
    model = tiny("vit", stem="conv")
    explainer = Explainer(model)
    seen: dict[str, torch.Tensor] = {}

    def listening(
        network: object, image: object, target: int, maps: torch.Tensor, **told: object
    ) -> list[Score]:
        seen[str(told["fill"])] = maps[0]
        return [Score(deletion=0.0, insertion=0.0)] * len(maps)

    for module in (explainer_module, trial_module):
        monkeypatch.setattr(module, "score_maps", listening)
    pixels = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = explainer(pixels, method="rollout", score=True, pixels=pixels)
    assert torch.equal(seen["removal"], found.heat.values[0])
    assert torch.equal(seen["mean"], found.heat.regions((32, 32), (4, 4))[0])
    seen.clear()
    trial_module.trial(explainer, [pixels], ["rollout"])
    assert torch.allclose(seen["removal"], found.heat.values[0])
    assert not torch.allclose(seen["mean"], seen["removal"])
